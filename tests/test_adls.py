"""Azure Data Lake Storage Gen2 and OneLake, against a server that answers as they were recorded to."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from dfs import DfsServer, File

from staged.driver import Driver
from staged.drivers.adls import AdlsDriver
from staged.drivers.onelake import OneLakeDriver
from staged.testing.conformance import DriverConformance
from staged.testing.harness import Files, Harness, Step

SAS = "sv=2024-01-01&sig=CANARY"
_NUMBERS = itertools.count()


class AdlsHarness(Harness):
    """A target in a file system, or in an item of OneLake, of its own.

    Args:
        path: Its directory; empty where the target is the file system or the item's folder, which cannot be renamed.
        period: Of silence, after which a writer is taken for dead.
        guids: Open it by the GUIDs of the workspace and the item; listings tell names all the same.
    """

    resolution = 1.0

    def __init__(
        self, server: DfsServer, path: str = "lake/target", *, period: float = 0.5, guids: bool = False
    ) -> None:
        self.server, self.period = server, period
        self.filesystem = f"fs{next(_NUMBERS)}"
        self.drivers: list[Driver] = []
        self.guids: tuple[str, str] | None = None
        self.kind: type[AdlsDriver] = AdlsDriver
        self.path = path
        if server.onelake is None:
            server.namespace.create_filesystem(self.filesystem)
        else:
            both = server.add_item(self.filesystem, "sales.Lakehouse")
            self.guids = both if guids else None
            self.kind, self.path = OneLakeDriver, f"sales.Lakehouse/Files/{path}".rstrip("/")
        above, _, name = self.path.rpartition("/")
        self.control = f"{above}/_staged/{name}/".lstrip("/") if path else f"{self.path}/_staged/_staged/".lstrip("/")

    @property
    def url(self) -> str:
        if self.guids is not None:
            return f"{self.server.url}/{self.guids[0]}/{self.guids[1]}/{quote(self.path.partition('/')[2])}"
        return f"{self.server.url}/{self.filesystem}/{quote(self.path)}"

    def process(self, step: Step | None = None) -> Driver:
        self.drivers.append(self.kind(self.url, credential=SAS, period=self.period))
        return self.drivers[-1]

    async def aclose(self) -> None:
        for driver in self.drivers:
            await driver.aclose()

    async def kill(self, driver: Driver) -> None:
        pass

    def content(self) -> Files:
        start = f"{self.path}/" if self.path else ""
        nodes = self.server.namespace.walk(self.filesystem)
        return {
            name[len(start) :]: node.data
            for name, node in nodes
            if isinstance(node, File) and name.startswith(start) and "_staged" not in name.split("/")
        }

    async def files(self) -> Files:
        return self.content()

    async def put(self, path: str, data: bytes) -> None:
        name = f"{self.path}/{path}" if self.path else path
        self.server.namespace.put_block(self.filesystem, name, "a", data)
        self.server.namespace.put_block_list(self.filesystem, name, ["a"])

    async def delete(self, path: str) -> None:
        self.server.namespace.delete(self.filesystem, f"{self.path}/{path}" if self.path else path)

    async def leftovers(self) -> list[str]:
        names = self.server.namespace.paths(self.filesystem)
        kept = ("staging/", "old/")
        return [name for name in names if name.startswith(tuple(f"{self.control}{kind}" for kind in kept))]


class _Served(DriverConformance):
    onelake = guids = False
    path = "lake/target"

    @pytest.fixture(autouse=True)
    def _server(self) -> Iterator[None]:
        with DfsServer(onelake=self.onelake) as self.server:
            yield

    def harness(self, directory: Path) -> Harness:
        return AdlsHarness(self.server, self.path, guids=self.guids)


def only(loop: str) -> object:
    """One event loop, where another kind of lake has both: each request takes milliseconds."""

    @pytest.fixture(params=[loop])
    def anyio_backend(self: object, request: pytest.FixtureRequest) -> str:
        backend: str = request.param
        return backend

    return anyio_backend


class TestAdls(_Served):
    """A directory of a file system."""


class TestAdlsRoot(_Served):
    """A whole file system, whose tree cannot be renamed."""

    path = ""
    anyio_backend = only("asyncio")


class TestOneLake(_Served):
    """A directory of an item's folder."""

    onelake = True
    anyio_backend = only("trio")


class TestOneLakeFolder(_Served):
    """A folder of an item, which Fabric manages, by GUIDs."""

    onelake, path, guids = True, "", True
    anyio_backend = only("asyncio")
