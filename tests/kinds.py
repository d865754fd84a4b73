"""A place for targets on each kind of store, and what a reader finds there."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pyarrow
import pyarrow.parquet
from anyio import to_thread
from dfs import DfsServer, File
from fabric import Replicator

from staged.driver import Driver
from staged.testing.faults import Gate, Moment
from staged.testing.harness import Files

KINDS = ("local", "adls", "onelake", "open_mirroring")
LAKES = KINDS[1:]
DATABASE = "sales.MountedRelationalDatabase"
SAS = "sv=2024-01-01&sig=CANARY"
_NUMBERS = itertools.count()

Row = dict[str, Any]


def root_of(kind: str, url: str, *, period: float = 0.5, **options: Any) -> Driver:
    """A driver for another process; its children are the targets of a place."""
    if kind == "local":
        from staged.drivers.local import LocalDriver

        return LocalDriver(url, durability="none")
    options = {"credential": SAS, "period": period, **options}
    if kind == "adls":
        from staged.drivers.adls import AdlsDriver

        return AdlsDriver(url, **options)
    if kind == "onelake":
        from staged.drivers.onelake import OneLakeDriver

        return OneLakeDriver(url, **options)
    from staged.drivers.open_mirroring import OpenMirroringDriver

    options = {"drop_poll": 0.01, "keys": ["id"], **options}
    return OpenMirroringDriver(url, **options)


class Place(ABC):
    """Somewhere below which targets lie, each under its name.

    Attributes:
        url: As `root_of` takes it.
    """

    kind: ClassVar[str]
    url: str

    def driver(self, name: str = "t", **options: Any) -> Driver:
        """Another process's driver for a target; closed with the place."""
        root = root_of(self.kind, self.url, **options)
        self._roots.append(root)
        return root.child(name)

    _roots: list[Driver]

    async def aclose(self) -> None:
        """Close all drivers."""
        for root in self._roots:
            await root.aclose()
        self._roots.clear()

    @abstractmethod
    def files(self, name: str = "t") -> Files:
        """The target's files, by path."""

    @abstractmethod
    def watch(self, look: Callable[[Files], None], name: str = "t") -> Gate:
        """Look at the target's files as often as a reader can: a gate for the writer's driver that does so."""

    @abstractmethod
    def put(self, path: str, data: bytes, name: str = "t") -> None:
        """Write a file into the target as a stranger would."""

    @abstractmethod
    def kept(self, name: str = "t") -> list[str]:
        """All that is in the control area."""

    def staged(self, name: str = "t") -> list[str]:
        """What transactions staged, put aside or left to be looked after."""
        return [path for path in self.kept(name) if path.startswith(("tx/", "staging/", "old/", "foreign/"))]

    def rows(self, name: str = "t") -> list[Row]:
        """All rows that a reader gets."""
        files = self.files(name).values()
        return [row for data in files for row in pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist()]

    def wrong(self, *dropped: str) -> list[str]:
        """What a reader should never have seen; `dropped` are the tables that were meant to be dropped."""
        return []


class _Local(Place):
    kind = "local"

    def __init__(self, directory: Path) -> None:
        self.url, self._roots = str(directory), []

    def watch(self, look: Callable[[Files], None], name: str = "t") -> Gate:
        async def gate(call: str, moment: Moment) -> None:
            await to_thread.run_sync(lambda: look(self.files(name)))

        return gate

    def files(self, name: str = "t") -> Files:
        root = Path(self.url, name)
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    def put(self, path: str, data: bytes, name: str = "t") -> None:
        file = Path(self.url, name, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)

    def kept(self, name: str = "t") -> list[str]:
        area = Path(self.url, "_staged", name)
        return [str(path.relative_to(area)) for path in area.rglob("*") if path.is_file()]


class Served(Place):
    """A directory of a file system, on a server of its own."""

    kind = "adls"
    above = "lake"
    control = "lake/_staged"

    def __init__(self, server: DfsServer) -> None:
        self.server, self.filesystem, self._roots = server, f"fs{next(_NUMBERS)}", []
        self._make()
        self.url = f"{server.url}/{self.filesystem}/{self.above}"

    def _make(self) -> None:
        self.server.namespace.create_filesystem(self.filesystem)

    def _peek(self, directory: str) -> Files:
        """What is below a directory; for the server's thread."""
        namespace = self.server.namespace
        if namespace.get(self.filesystem, directory) is None:
            return {}
        found = namespace.walk(self.filesystem, directory)
        return {path[len(directory) + 1 :]: node.data for path, node in found if isinstance(node, File)}

    def watch(self, look: Callable[[Files], None], name: str = "t") -> Gate:
        before = self.server.before

        def both(number: int) -> None:
            before(number)
            look(self._peek(f"{self.above}/{name}"))

        async def gate(call: str, moment: Moment) -> None:
            pass  # before each request is more often

        self.server.before = both
        return gate

    def files(self, name: str = "t") -> Files:
        return self.server.call(lambda: self._peek(f"{self.above}/{name}"))

    def put(self, path: str, data: bytes, name: str = "t") -> None:
        create = self.server.namespace.create
        self.server.call(lambda: create(self.filesystem, f"{self.above}/{name}/{path}", data))

    def kept(self, name: str = "t") -> list[str]:
        return self.server.call(lambda: list(self._peek(f"{self.control}/{name}")))


class _OneLake(Served):
    kind = "onelake"
    above = "sales.Lakehouse/Files/lake"
    control = f"{above}/_staged"

    def _make(self) -> None:
        self.server.add_item(self.filesystem, "sales.Lakehouse")


class Mirrored(Served):
    """A landing zone, and the service that looks at it before every fifth request."""

    kind = "open_mirroring"
    above = f"{DATABASE}/Files/LandingZone"
    control = f"{DATABASE}/Files/_tmp"

    def _make(self) -> None:
        self.server.add_item(self.filesystem, DATABASE)
        # What was read stays for seven days: for longer than any run.
        self.replicator = Replicator(self.server.namespace, self.filesystem, DATABASE, removed_after=1_000_000)
        self.server.before = self.replicator.before_requests(every=5)
        self.settle()

    def settle(self) -> None:
        """Let the service look until there is nothing more to do."""
        for _ in range(8):
            self.server.call(self.replicator.poll)

    def rows(self, name: str = "t") -> list[Row]:
        self.settle()
        return self.server.call(
            lambda: list(self.replicator.tables[name].rows if name in self.replicator.tables else ())
        )

    def wrong(self, *dropped: str) -> list[str]:
        self.settle()
        return self.server.call(lambda: list(map(str, self.replicator.violations(dropped))))


@contextmanager
def place_of(kind: str, directory: Path) -> Iterator[Place]:
    """A place of a kind, with its server where it needs one."""
    if kind == "local":
        yield _Local(directory)
        return
    makes = {"adls": Served, "onelake": _OneLake, "open_mirroring": Mirrored}
    with DfsServer(onelake=kind != "adls") as server:
        yield makes[kind](server)
