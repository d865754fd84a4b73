"""A table of a landing zone, the service that mirrors it, and what its source holds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow
from dfs import DfsServer
from fabric import Replicator

from staged import Store
from staged.drivers.open_mirroring import OpenMirroringDriver
from staged.model import RowMarker

ITEM = "sales.MountedRelationalDatabase"
ZONE = f"{ITEM}/Files/LandingZone"
SAS = "sv=2024-01-01&sig=CANARY"
_NUMBERS = itertools.count()

Rows = dict[int, str]
"""A table, by its key."""


class Mirror:
    """One mirrored database with a table `t`, and the service that looks at it before every third request."""

    def __init__(self, server: DfsServer, *, every: int = 3, **options: Any) -> None:
        assert server.onelake is not None
        self.server, self.workspace = server, f"ws{next(_NUMBERS)}"
        server.add_item(self.workspace, ITEM)
        # What was read stays for seven days: for longer than any of these histories.
        self.replicator = Replicator(server.namespace, self.workspace, ITEM, **{"removed_after": 1_000_000} | options)
        server.before = self.replicator.before_requests(every=every)

    @property
    def url(self) -> str:
        return f"{self.server.url}/{self.workspace}/{ITEM}"

    def driver(self, table: str = "t", **options: Any) -> OpenMirroringDriver:
        """Another process's driver."""
        given = {"keys": ["id"], "credential": SAS, "period": 0.2, "drop_poll": 0.01} | options
        return OpenMirroringDriver(f"{self.url}/Files/LandingZone/{table}".rstrip("/"), **given)

    def settle(self, polls: int = 12) -> None:
        """Let the service look until there is nothing more to do."""
        for _ in range(polls):
            self.server.call(self.replicator.poll)

    def rows(self, table: str = "t") -> list[tuple[int, str]] | None:
        """The rows that the service has, sorted; None where it has no such table."""

        def look() -> list[tuple[int, str]] | None:
            found = self.replicator.tables.get(table)
            return None if found is None else sorted((row["id"], row["v"]) for row in found.rows)

        return self.server.call(look)

    def wrong(self, *dropped: str) -> list[str]:
        """What the service should never have seen; `dropped` are tables that were meant to be dropped."""
        return self.server.call(lambda: list(map(str, self.replicator.violations(dropped))))

    def drops(self) -> list[str]:
        """Why the service dropped tables, each time."""
        return self.server.call(lambda: [drop.why for drop in self.replicator.record.drops])

    def names(self, below: str = "t") -> list[str]:
        """All files in the landing zone below a directory."""
        start = f"{ZONE}/{below}".rstrip("/") + "/"
        return [name[len(start) :] for name in self.server.namespace.paths(self.workspace) if name.startswith(start)]


def table_of(rows: Mapping[int, str | None]) -> pyarrow.Table:
    """Rows as a table."""
    return pyarrow.table({"id": pyarrow.array(list(rows), "int64"), "v": pyarrow.array(list(rows.values()), "string")})


@dataclass(frozen=True, slots=True)
class Changes:
    """What one writer does: files of changes, in order."""

    mode: str
    files: tuple[tuple[RowMarker, tuple[tuple[int, str], ...]], ...]
    key: str | None = None

    def __str__(self) -> str:
        return f"{self.mode}({', '.join(marker for marker, _ in self.files)})"

    async def __call__(self, store: Store, lock_timeout: float = 60.0) -> str:
        """Do it; the transaction's phase on its receipt."""
        async with store.staged_write(self.mode, key=self.key, lock_timeout=lock_timeout) as tx:
            for marker, rows in self.files:
                await tx.write_changes(table_of(dict(rows)), marker)
        return tx.receipt.phase

    def apply(self, rows: Rows) -> Rows:
        """The table after a commit."""
        after = {} if self.mode == "full_drop" else dict(rows)
        for marker, changed in self.files:
            for key, value in changed:
                if marker == "delete":
                    after.pop(key, None)
                else:
                    assert marker != "insert" or key not in after, "the service would not look for duplicates"
                    after[key] = value
        return after


LOAD = Changes("append", (("insert", ((1, "a"), (2, "b"))), ("insert", ((3, "c"),))))
WORKS = (
    Changes("append", (("insert", ((4, "d"),)), ("insert", ((5, "e"), (6, "f"))), ("insert", ((7, "g"),))), key="once"),
    # The order of files matters: what is deleted comes back.
    Changes(
        "append", (("delete", ((2, ""),)), ("insert", ((2, "B"),)), ("update", ((1, "A"),)), ("upsert", ((9, "i"),)))
    ),
    Changes("full_drop", (("insert", ((7, "G"),)), ("insert", ((8, "H"),)))),
)
