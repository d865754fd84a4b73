"""What each driver declares that it promises, as the table of the README; run as a program it puts the table there.

To add a store, add its driver to `STORES`.
"""

from __future__ import annotations

import atexit
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import anyio
from azurite import KEY, AzuriteServer
from dfs import DfsServer
from gcs import GcsServer
from google.auth.credentials import AnonymousCredentials
from s3 import S3Proxy, S3Server

from staged import open_store
from staged.driver import Driver
from staged.drivers.adls import AdlsDriver
from staged.drivers.azure_blob import AzureBlobDriver
from staged.drivers.gcs import GcsDriver
from staged.drivers.local import LocalDriver
from staged.drivers.memory import MemoryDriver, MemoryStorage
from staged.drivers.onelake import OneLakeDriver
from staged.drivers.open_mirroring import OpenMirroringDriver
from staged.drivers.s3 import S3Driver
from staged.model import Guarantee, Mode

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- guarantees -->\n\n", "\n<!-- end of guarantees -->\n"
GUARANTEES: tuple[Guarantee, ...] = get_args(Guarantee)


class Local(LocalDriver):
    """A local directory on a file system that can exchange trees, or cannot, whatever this machine's can do."""

    def __init__(self, path: str, *, swaps: bool) -> None:
        super().__init__(path)
        self._swaps = swaps

    def _try(self, control: int) -> tuple[bool, bool]:
        return self._swaps, False


@cache
def lakes(*, onelake: bool, conditions: bool = True) -> DfsServer:
    """A server that answers as Data Lake Storage or OneLake was recorded to; it ends with the program."""
    server = DfsServer(onelake=onelake, conditions=conditions).__enter__()
    if onelake:
        server.add_item("sales", "x.Lakehouse")
        server.add_item("sales", "x.MountedRelationalDatabase")
    else:
        server.namespace.create_filesystem("sales")
    return server


def adls(path: str) -> Driver:
    return AdlsDriver(f"{lakes(onelake=False).url}/sales{path}", credential="sig=1")


def onelake(path: str, *, conditions: bool = True) -> Driver:
    server = lakes(onelake=True, conditions=conditions)
    return OneLakeDriver(f"{server.url}/sales/x.Lakehouse/Files{path}", credential="sig=1")


def open_mirroring(path: str) -> Driver:
    zone = f"{lakes(onelake=True).url}/sales/x.MountedRelationalDatabase/Files/LandingZone"
    return OpenMirroringDriver(f"{zone}/t{path.rpartition('/')[2]}", keys=["id"], credential="sig=1")


@cache
def s3_server(kind: str, *, drops: tuple[str, ...] = ()) -> tuple[S3Server, str]:
    """A server of S3, and its endpoint, or that of a proxy which drops headers."""
    server = S3Server(kind).__enter__()
    atexit.register(server.__exit__, None, None, None)
    return server, S3Proxy(server.url, drops=drops).__enter__().url if drops else server.url


def s3(path: str, *, kind: str = "ministack", drops: tuple[str, ...] = ()) -> Driver:
    server, url = s3_server(kind, drops=drops)
    return S3Driver(f"s3://{server.bucket()}/t", client=server.client(url))


@cache
def gcs_server(*, conditions: bool) -> GcsServer:
    """A server of Cloud Storage's JSON API; it ends with the program."""
    return GcsServer(conditions=conditions).__enter__()


def gcs(path: str, *, conditions: bool = True) -> Driver:
    server = gcs_server(conditions=conditions)
    if "sales" not in server.store.buckets:
        server.call(lambda: server.store.create_bucket("sales"))
    credential: Any = AnonymousCredentials()
    return GcsDriver(f"gs://sales{path}", credential=credential, api_endpoint=server.url, rate=0.0)


@cache
def azurite_server() -> AzuriteServer:
    """Azurite; it ends with the program."""
    server = AzuriteServer().__enter__()
    atexit.register(server.__exit__, None, None, None)
    return server


def azure_blob(path: str) -> Driver:
    return AzureBlobDriver(f"{azurite_server().container().url}/t", credential=KEY)


STORES: dict[str, Callable[[str], Driver]] = {
    "local directory": lambda path: Local(path, swaps=True),
    "local directory, file by file": lambda path: Local(path, swaps=False),
    "ADLS Gen2, a directory": adls,
    "ADLS Gen2, a whole file system": lambda path: adls(""),
    "OneLake, a directory": onelake,
    "OneLake, were it to ignore conditions": lambda path: onelake(path, conditions=False),
    "Open Mirroring, a table": open_mirroring,
    "S3": s3,
    "S3, where deletions take no ETag": lambda path: s3(path, kind="moto"),
    "S3, where conditions are ignored": lambda path: s3(path, drops=("If-Match", "If-None-Match")),
    "Google Cloud Storage": gcs,
    "Azure Blob Storage": azure_blob,
    "memory, for tests": lambda path: MemoryDriver(storage=MemoryStorage()),
}


@dataclass(frozen=True, slots=True)
class Row:
    """The modes of one store that promise the same."""

    store: str
    modes: tuple[Mode, ...]
    promised: frozenset[Guarantee]

    def __str__(self) -> str:
        if len(self.modes) == len(Mode):
            modes = "every mode"
        elif len(self.modes) > len(Mode) / 2:
            modes = "the other modes"
        else:
            modes = ", ".join(f"`{mode}`" for mode in self.modes)
        cells = ("yes" if guarantee in self.promised else "no" for guarantee in GUARANTEES)
        return f"| {' | '.join((self.store, modes, *cells))} |"


async def declared(store: str, path: str) -> list[Row]:
    """The rows of one store; those of few modes come first."""
    async with open_store(STORES[store](path)) as opened:
        promises = (await opened.capabilities()).guarantees
    alike: dict[frozenset[Guarantee], list[Mode]] = {}
    for mode, promised in promises.items():
        alike.setdefault(promised, []).append(mode)
    return [
        Row(store, tuple(modes), promised) for promised, modes in sorted(alike.items(), key=lambda row: len(row[1]))
    ]


async def table() -> str:
    """All rows, in Markdown."""
    lines = [
        f"| | | {' | '.join(f'`{guarantee}`' for guarantee in GUARANTEES)} |",
        f"|---|---|{'---|' * len(GUARANTEES)}",
    ]
    with TemporaryDirectory() as directory:
        for number, store in enumerate(STORES):
            lines += map(str, await declared(store, f"{directory}/{number}"))
    return "\n".join(lines) + "\n"


def within(readme: str) -> re.Match[str]:
    """The place of the table in the README."""
    found = re.search(f"(?<={BEGIN}).*?(?={END})", readme, flags=re.DOTALL)
    assert found is not None
    return found


if __name__ == "__main__":
    text, new = README.read_text(), anyio.run(table)
    place = within(text)
    README.write_text(text[: place.start()] + new + text[place.end() :])
    print(new, end="")
