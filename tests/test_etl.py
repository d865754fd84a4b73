"""The recipe of an ETL: whatever kills it, each entity has exactly the rows of its source, and one line in the journal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import anyio
import etl_runs
import pyarrow
import pytest
from etl_runs import DROPPED, ENTITIES, KEYS, RUNS, lines, load, opened, source
from kinds import KINDS, Place, place_of
from recipes import etl

from staged import StagingError, StorageError, open_store
from staged.drivers.memory import MemoryDriver, MemoryStorage
from staged.testing.faults import FaultDriver, Moment

SOAK = int(os.environ.get("STAGED_SOAK", "1"))


def check(place: Place, kept: tuple[str, ...] = ()) -> None:
    """Everything is there, once, and nothing else but what a living process keeps."""
    for name in ENTITIES:
        found = sorted(place.rows(name), key=lambda row: row["id"])
        assert found == source(name, RUNS[-1]), name
    order = [(run, name) for run in RUNS for name in ENTITIES]
    assert sorted(place.rows("journal"), key=lambda row: order.index((row["run"], row["entity"]))) == lines()
    assert anyio.run(watermarks, place) == {name: len(source(name, RUNS[-1])) for name in ENTITIES}
    assert [path for name in KEYS for path in place.staged(name) if not path.startswith(kept)] == []
    assert place.wrong(*DROPPED) == []


async def watermarks(place: Place) -> dict[str, object]:
    async with opened(place.kind, place.url) as stores:
        return {name: (await stores[name].meta())["watermark"] for name in ENTITIES}


# Each request takes milliseconds: one loop for each kind.
@pytest.mark.parametrize(
    ("kind", "loop"),
    [("local", "asyncio"), ("adls", "trio"), ("onelake", "asyncio"), ("open_mirroring", "trio")],
    ids=KINDS,
)
def test_two_runs_load_exactly_the_rows_of_the_source_and_one_line_each_into_the_journal(
    kind: str, loop: str, tmp_path: Path
) -> None:
    with place_of(kind, tmp_path) as place:
        for run in RUNS:
            anyio.run(load, kind, place.url, run, backend=loop)
        check(place, kept=("old/",))


# Where the processes of a case die: at calls so far apart for any store, or once at one for the journal.
CASES = {
    "local": ("any:11+97", "journal:20"),
    "adls": ("any:110+380",),
    "onelake": ("any:170+420",),
    "open_mirroring": ("any:120+380",),
}


def cases(kind: str) -> list[str]:
    more = [f"any:{3 + 7 * number}+{31 + number % 50}" for number in range(SOAK - 1)]
    return [*CASES[kind], *more]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_at_any_phase_and_started_again_until_it_ends_loads_every_row_once(
    kind: str, tmp_path: Path, figure: Callable[[str, str], None]
) -> None:
    calls: Counter[str] = Counter()
    for case in cases(kind):
        (directory := tmp_path / case.replace(":", "-")).mkdir()
        with place_of(kind, directory) as place:
            program = [sys.executable, etl_runs.__file__, kind, f"{case}={place.url}"]
            run = subprocess.run(program, capture_output=True, text=True, check=False, timeout=600)
            assert run.returncode == 0, (case, run.stdout[-500:], run.stderr[-3000:])
            *deaths, end = map(json.loads, run.stdout.splitlines())
            assert end == {"ended": case}
            check(place)
        calls.update("the journal" if death["name"] == "journal" else death["call"].split()[0] for death in deaths)
    figure(f"ETL over {kind}", f"killed {calls.total()} times, {len(calls)} kinds of calls; every row and line once")
    assert calls.total() > 2


@pytest.mark.anyio
async def test_an_entity_that_fails_at_every_try_stays_as_it_was_and_the_others_are_loaded() -> None:
    tried: Counter[str] = Counter()

    def gives(name: str, rows: int) -> Callable[[int], AsyncGenerator[pyarrow.Table, None]]:
        async def give(after: int) -> AsyncGenerator[pyarrow.Table, None]:
            tried[name] += 1
            yield pyarrow.table({"id": range(rows)})
            if rows == 9:
                raise ConnectionError("broke off")

        return give

    storage, names = MemoryStorage(), ("good", "bad", "empty", "journal")
    stores = {name: open_store(MemoryDriver(name, storage=storage)) for name in names}
    for run, rows in (("1", {"good": 2, "bad": 2, "empty": 2}), ("2", {"good": 3, "bad": 9, "empty": 0})):
        failed = await etl.run_all(
            run,
            [etl.Entity(name, "full_drop", gives(name, count)) for name, count in rows.items()],
            stores,
            stores["journal"],
            tries=2,
        )
    assert {name: type(error) for name, error in failed.items()} == {"bad": ConnectionError, "empty": StagingError}
    assert tried == {"good": 2, "bad": 3, "empty": 2}  # what is no passing fault is not tried again
    metas = {name: await stores[name].meta() for name in rows}
    assert {name: meta["watermark"] for name, meta in metas.items()} == {"good": 2, "bad": 1, "empty": 1}
    assert (await stores["journal"].status()).commits == 4


@pytest.mark.anyio
async def test_a_line_that_a_run_did_not_come_to_is_written_by_the_next_one() -> None:
    broken = True

    async def gate(call: str, moment: Moment) -> None:
        if broken and call.startswith("cas"):
            raise StorageError("The journal cannot be written.")

    async def give(after: int) -> AsyncGenerator[pyarrow.Table, None]:
        yield pyarrow.table({"id": [after + 1]})

    storage = MemoryStorage()
    stores = {"a": open_store(MemoryDriver("a", storage=storage))}
    journal = open_store(FaultDriver(MemoryDriver("journal", storage=storage), gate))
    for run in RUNS:
        failed = await etl.run_all(run, [etl.Entity("a", "append", give)], stores, journal)
        assert failed.keys() == ({"a"} if broken else set())
        broken = False
    assert await stores["a"].meta() == {
        "watermark": 2,
        "journal": {"run": "2", "entity": "a", "mode": "append", "phase": "committed", "rows": 1, "watermark": 2},
    }
    assert (await journal.status()).commits == 2
