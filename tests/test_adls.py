"""Azure Data Lake Storage Gen2 and OneLake, against a server that answers as they were recorded to."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from dfs import DfsServer, File

from staged.driver import Driver
from staged.drivers.adls import AdlsDriver
from staged.testing.conformance import DriverConformance
from staged.testing.harness import Files, Harness, Step

SAS = "sv=2024-01-01&sig=CANARY"
_NUMBERS = itertools.count()


class AdlsHarness(Harness):
    """A directory of a file system of its own; without a path it is the file system itself, whose tree cannot be renamed."""

    def __init__(self, server: DfsServer, path: str = "lake/target") -> None:
        self.server, self.path = server, path
        self.filesystem = f"fs{next(_NUMBERS)}"
        server.namespace.create_filesystem(self.filesystem)
        self.drivers: list[Driver] = []
        above, _, name = path.rpartition("/")
        self.control = f"{above}/_staged/{name}/".lstrip("/") if path else "_staged/_staged/"

    def process(self, step: Step | None = None) -> Driver:
        self.drivers.append(AdlsDriver(f"{self.server.url}/{self.filesystem}/{self.path}", credential=SAS, period=0.5))
        return self.drivers[-1]

    async def aclose(self) -> None:
        for driver in self.drivers:
            await driver.aclose()

    async def kill(self, driver: Driver) -> None:
        pass

    async def files(self) -> Files:
        found = {}
        start = f"{self.path}/" if self.path else ""
        for name, node in self.server.namespace.walk(self.filesystem):
            if isinstance(node, File) and name.startswith(start) and "_staged" not in name.split("/"):
                found[name[len(start) :]] = node.data
        return found

    async def put(self, path: str, data: bytes) -> None:
        name = f"{self.path}/{path}" if self.path else path
        namespace = self.server.namespace
        namespace.put_block(self.filesystem, name, "a", data)
        namespace.put_block_list(self.filesystem, name, ["a"])

    async def delete(self, path: str) -> None:
        self.server.namespace.delete(self.filesystem, f"{self.path}/{path}" if self.path else path)

    async def leftovers(self) -> list[str]:
        names = self.server.namespace.paths(self.filesystem)
        return [name for name in names if name.startswith((f"{self.control}staging/", f"{self.control}old/"))]


@pytest.fixture(scope="module")
def server() -> Iterator[DfsServer]:
    with DfsServer() as server:
        yield server


class TestAdls(DriverConformance):
    @pytest.fixture(autouse=True)
    def _server(self, server: DfsServer) -> None:
        type(self).server = server

    def harness(self, directory: Path) -> Harness:
        return AdlsHarness(self.server)


class TestAdlsRoot(DriverConformance):
    @pytest.fixture(autouse=True)
    def _server(self, server: DfsServer) -> None:
        type(self).server = server

    def harness(self, directory: Path) -> Harness:
        return AdlsHarness(self.server, "")
