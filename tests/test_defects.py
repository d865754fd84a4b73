"""What goes wrong where the pattern is written by hand, and does not here.

A framework's four stores, a local one, ADLS, OneLake and Open Mirroring, each staged files, moved them and cleaned up in
code of their own. What was found wrong there has a number, which stands at the beginning of a test's docstring.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from pathlib import Path

import anyio
import anyio.lowlevel
import pyarrow
import pytest
from anyio import to_thread
from blockbuster import BlockBuster
from dfs import Plan
from kinds import KINDS, Mirrored, Place, Served, place_of

from staged import (
    CommitBlocked,
    CommitIncomplete,
    Exists,
    InvalidInput,
    StagedError,
    StagingError,
    StorageError,
    WrongState,
    open_store,
)
from staged.drivers.local import LocalDriver
from staged.errors import InvalidPath
from staged.testing.faults import Crash, FaultDriver, Moment

ELSEWHERE = {
    2: "tests/test_local.py::test_a_foreign_file_in_the_way_blocks_a_decided_commit_until_somebody_says_what_to_do",
    4: "tests/test_azure.py::test_every_request_that_changes_something_says_what_it_expects_and_comes_again_without_harm",
    5: "tests/test_wire.py::test_one_fault_at_any_request_is_neither_a_false_failure_nor_a_false_success",
    8: "tests/test_planning.py::test_a_control_area_in_the_target_itself_is_not_dropped",
    10: "tests/test_kills.py::test_a_writer_killed_at_any_call_or_moment_leaves_old_or_new_and_recover_clears_the_rest",
    12: "tests/test_etl.py::test_a_run_killed_at_any_phase_and_started_again_until_it_ends_loads_every_row_once",
    16: "tests/test_open_mirroring.py::test_indexes_go_on_after_what_was_read_is_gone_and_begin_at_1_after_a_drop",
    18: "tests/test_open_mirroring.py::test_the_service_sees_files_in_order_and_ends_with_the_rows_of_the_source",
    21: "tests/test_cancellation.py::test_a_block_cancelled_at_any_await_ends_old_or_new_and_its_caller_hears_of_it",
    22: "tests/test_paths.py::test_a_bad_part_is_refused_wherever_it_stands_and_the_message_says_why",
}
"""What is tried more thoroughly elsewhere."""

REPLACING = [kind for kind in KINDS if kind != "open_mirroring"]
"""Where what was published is ever replaced, file by file."""

pytestmark = pytest.mark.anyio


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def anyio_backend(kind: str) -> str:
    """One loop for each kind: each request takes milliseconds."""
    return "asyncio" if kind in ("local", "onelake") else "trio"


@pytest.fixture
async def place(kind: str, tmp_path: Path) -> AsyncIterator[Place]:
    with place_of(kind, tmp_path) as place:
        yield place
        await place.aclose()


def table(*ids: int) -> pyarrow.Table:
    return pyarrow.table({"id": pyarrow.array(ids, "int64")})


async def load(place: Place, mode: str, *batches: int, **options: object) -> None:
    """Another process commits a file with one row for each of these."""
    async with open_store(place.driver()) as store, store.staged_write(mode, **options) as tx:  # type: ignore[arg-type]
        for batch in batches:
            await tx.write_table(table(batch))


async def recovered(place: Place) -> None:
    """Another process repairs what it finds."""
    async with open_store(place.driver()) as store:
        await store.recover()


def inodes(directory: Path) -> set[int]:
    return {path.stat().st_ino for path in directory.rglob("*.parquet")}


def ids(place: Place) -> list[int]:
    return sorted(row["id"] for row in place.rows())


class Strike:
    """A gate that does something at each call of a name; a death ends all that follows."""

    def __init__(self, call: str, moment: Moment, act: Callable[[], Awaitable[None]]) -> None:
        self.call, self.moment, self.act = call, moment, act
        self.struck = self.dead = False

    async def __call__(self, name: str, moment: Moment) -> None:
        if self.dead:
            raise Crash
        if name.startswith(self.call) and moment == self.moment:
            self.struck = True
            try:
                await self.act()
            except Crash:
                self.dead = True
                raise


async def fails() -> None:
    raise StorageError("The store says no.")


async def dies() -> None:
    raise Crash


# ------------------------------------------------------------------------------------------------------------------- names


async def test_each_file_of_one_run_has_a_name_of_its_own(place: Place) -> None:
    """1: the next name was computed from what was published, so that all files of a run had the same."""
    await load(place, "append", 1, 2, 3)
    assert ids(place) == [1, 2, 3]


async def test_what_is_at_a_files_name_is_never_taken_for_that_file_because_it_is_there(place: Place) -> None:
    """2: a staged file that was gone, and any file at its name, passed for a file that was moved already."""
    name = f"{1:020d}.parquet" if isinstance(place, Mirrored) else "a"

    async def comes_first() -> None:
        await to_thread.run_sync(place.put, name, b"theirs")

    gate = Strike("publish", "before", comes_first)
    async with open_store(FaultDriver(place.driver(), gate)) as store:
        with pytest.raises(CommitBlocked) as raised:
            async with store.staged_write("append") as tx:
                await tx.write(name, b"ours")
    assert (raised.value.outcome, raised.value.paths) == ("committed", (name,))
    assert place.files()[name] == b"theirs"


async def test_a_second_run_never_overwrites_what_the_first_one_appended(place: Place) -> None:
    """3: each run began to count anew, and wrote over the files of the one before."""
    for batch in (1, 2):
        await load(place, "append", batch)
    assert ids(place) == [1, 2]
    if not isinstance(place, Mirrored):  # which gives the names itself
        for data in (b"first", b"second"):
            async with open_store(place.driver()) as store:
                try:
                    async with store.staged_write("append") as tx:
                        await tx.write("a.txt", data)
                except Exists as refused:
                    assert refused.outcome == "untouched" and data == b"second"
        assert place.files()["a.txt"] == b"first"


async def test_a_new_load_takes_no_name_of_an_old_one_and_a_failed_look_at_them_is_no_new_beginning(
    place: Place,
) -> None:
    """16: after a drop the numbers went on, and where the listing failed they began at 1, over what was there."""
    await load(place, "append", 1, 2)
    before = {name for name in place.files() if name.endswith(".parquet")}
    await load(place, "full_drop", 3)
    after = {name for name in place.files() if name.endswith(".parquet")}
    if isinstance(place, Mirrored):
        assert after == {f"{1:020d}.parquet"}
    else:
        assert not before & after
    gate = Strike("arrange", "before", fails)
    async with open_store(FaultDriver(place.driver(), gate)) as store:
        with pytest.raises(StagingError) as raised:
            async with store.staged_write("append") as tx:
                await tx.write_table(table(4))
    assert gate.struck and raised.value.outcome == "untouched"
    await load(place, "append", 5)
    assert ids(place) == [3, 5]


# ----------------------------------------------------------------------------------------------------------------- moving


async def test_publishing_moves_files_within_their_place_and_copies_no_byte(place: Place) -> None:
    """4: a rename named no file system, failed without a word, and copies were made instead, once into another one."""
    async with open_store(place.driver()) as store:
        tx = await store.begin("append")
        for batch in range(3):
            await tx.write_table(table(batch))
        await tx.prepare()
        if not isinstance(place, Served):
            staged = inodes(Path(place.url, "_staged"))
            await tx.commit()
            assert staged == inodes(Path(place.url, "t"))
            return
        place.server.log.clear()
        await tx.commit()
        target = f"{place.filesystem}/{place.above}/t/"
        done = [line for line in place.server.log if line.status < 400]
        sent = [(line.verb, line.path) for line in done if line.path.startswith(target)]
        assert sum(verb == "rename" and path.endswith(".parquet") for verb, path in sent) == 3
        assert not {verb for verb, _ in sent} & {"create", "append", "flush", "put_blob", "put_block", "put_block_list"}
    assert ids(place) == [0, 1, 2]


async def test_a_move_whose_answer_was_lost_is_found_done(place: Place) -> None:
    """5: a rename was done, its answer lost, and the second one's 404 called a failure."""
    if not isinstance(place, Served):
        gate = Strike("publish", "after", fails)
        async with open_store(FaultDriver(place.driver(), gate)) as store:
            with pytest.raises(CommitIncomplete) as raised:
                async with store.staged_write("append") as tx:
                    await tx.write_table(table(0))
        assert raised.value.outcome == "committed"
        await load(place, "append", 1, 2)
    else:
        async with open_store(place.driver()) as store:
            await store.capabilities()
            for number in range(3):  # of the directory when it is sealed, of metadata or a file, of a file
                place.server.counts.clear()
                place.server.plan = Plan(f"loses@rename:{number}")
                async with store.staged_write("append") as tx:
                    await tx.write_table(table(number))
                assert tx.receipt.phase == "committed"
    assert ids(place) == [0, 1, 2]


async def test_no_reader_ever_finds_a_file_in_part(place: Place) -> None:
    """6: files were copied by create, append and flush: one of zero bytes was there first, and stayed after a crash."""
    seen: set[bytes] = set()
    gate = place.watch(lambda files: seen.update(files.values()))
    whole: set[bytes] = set()
    rows = 20 if isinstance(place, Mirrored) else 200_000  # of which a file takes more than one request
    for number, mode in enumerate(("append", "append", "full_drop")):
        async with open_store(FaultDriver(place.driver(), gate)) as store, store.staged_write(mode) as tx:
            for first in (number, -number):
                await tx.write_table(table(*range(first, first + rows)))
        whole |= set(place.files().values())
    assert len(seen) > 4
    assert seen <= whole
    assert place.wrong("t") == []


async def test_what_cannot_be_moved_is_an_error_and_nothing_is_cleaned_up(place: Place) -> None:
    """11: a file that could not be moved was logged, the rest went on, and what was staged was forgotten."""
    await load(place, "append", 1)
    gate = Strike("publish", "before", fails)
    async with open_store(FaultDriver(place.driver(), gate)) as store:
        with pytest.raises(CommitIncomplete) as raised:
            async with store.staged_write("append") as tx:
                await tx.write_table(table(2))
        assert tx.receipt.phase == "committing"
    assert raised.value.outcome == "committed"
    assert any(path.endswith(".parquet") for path in place.staged())
    await recovered(place)
    assert ids(place) == [1, 2]


@pytest.mark.parametrize("kind", REPLACING, indirect=True)
async def test_a_file_that_replaces_itself_stays(place: Place) -> None:
    """17: a file that was moved to where it was already was deleted there."""
    for _ in range(2):
        async with open_store(place.driver()) as store:
            async with store.staged_write("overwrite_files") as tx:
                await tx.write("a", b"the same")
            assert place.files() == {"a": b"the same"}
            with pytest.raises(InvalidInput):
                async with store.staged_write("overwrite_files") as tx:
                    await tx.write("a", b"the same")
                    await tx.delete("a")
    if place.kind == "local":
        async with open_store(place.driver()) as store, store.staged_write("overwrite_files") as tx:
            await tx.put_file("a", source=f"{place.url}/t/a")
    assert place.files() == {"a": b"the same"}


@pytest.mark.parametrize("kind", ["open_mirroring"], indirect=True)
async def test_metadata_is_there_before_the_data(place: Place) -> None:
    """18: metadata came last, and the service read files without it."""
    assert isinstance(place, Mirrored)
    place.server.before = place.replicator.before_requests(every=1)
    await load(place, "append", 1, 2)
    await load(place, "full_drop", 3, 4)
    assert ids(place) == [3, 4]
    assert place.wrong("t") == []


# --------------------------------------------------------------------------------------------------------------- replacing


@pytest.mark.parametrize(
    ("kind", "call"),
    [*((kind, "swap") for kind in KINDS), *((kind, "remove") for kind in REPLACING)],
    indirect=["kind"],
)
async def test_old_files_that_cannot_be_removed_are_an_error_and_never_stay_beside_the_new_ones(
    place: Place, call: str
) -> None:
    """7: a delete that failed answered False, which nobody asked for: old rows stayed beside the new."""
    await load(place, "append", 1)
    gate = Strike(call, "before", fails)
    async with open_store(FaultDriver(place.driver(), gate)) as store:
        with pytest.raises(CommitIncomplete) as raised:
            async with store.staged_write("full_drop" if call == "swap" else "overwrite_files") as tx:
                await tx.write_table(table(2))
                for name in place.files() if call == "remove" else ():
                    await tx.delete(name)
    assert gate.struck and raised.value.outcome == "committed"
    await recovered(place)
    assert ids(place) == [2]
    assert place.wrong("t") == []


async def test_what_is_staged_lies_outside_of_what_a_full_drop_replaces(place: Place) -> None:
    """8: staging lay in the directory that was deleted before what was staged was moved."""
    await load(place, "append", 1)
    before = place.files()
    async with open_store(place.driver()) as store:
        tx = await store.begin("full_drop")
        await tx.write_table(table(2))
        await tx.prepare()
        assert place.files().keys() == before.keys()
        assert any(path.endswith(".parquet") for path in place.staged())
        await tx.commit()
    assert ids(place) == [2]
    if place.kind == "local":
        with pytest.raises(StagedError, match="lies in the target"):
            await open_store(LocalDriver(f"{place.url}/t", staging=f"{place.url}/t/staging")).begin("append")


async def test_a_death_after_the_old_files_went_is_completed_by_whoever_comes_next(place: Place) -> None:
    """10: a crash after the delete left nothing in production, and the next run wiped what was staged."""
    await load(place, "append", 1)
    gate = Strike("swap", "after", dies)
    with pytest.raises(Crash):
        async with open_store(FaultDriver(place.driver(), gate)) as store, store.staged_write("full_drop") as tx:
            await tx.write_table(table(2))
    await load(place, "append", 3)
    assert ids(place) == [2, 3]
    assert place.wrong("t") == []


async def test_without_rows_nothing_is_dropped_unless_that_is_said(place: Place) -> None:
    """15: zero rows dropped the table in one store and kept the old rows in another."""
    await load(place, "append", 1)
    with pytest.raises(StagingError, match="allow_empty"):
        await load(place, "full_drop")
    await load(place, "append")
    assert ids(place) == [1]
    await load(place, "full_drop", allow_empty=True)
    assert ids(place) == []
    assert place.wrong("t") == []


# ------------------------------------------------------------------------------------------- runs, attempts and their ends


async def test_closing_twice_takes_nothing_away(place: Place) -> None:
    """9: closing after finishing deleted what was just published."""
    store = open_store(place.driver())
    tx = await store.begin("append")
    await tx.write_table(table(1))
    assert await tx.commit() == await tx.commit()
    with pytest.raises(WrongState):
        await tx.rollback()
    await store.recover()
    for _ in range(2):
        await store.aclose()
    await recovered(place)
    assert ids(place) == [1]


async def test_the_watermark_advances_with_the_rows_or_not_at_all(place: Place) -> None:
    """12: after a full_drop that failed the watermark advanced all the same: a gap that nobody saw."""
    await load(place, "append", 1, meta={"watermark": 1})
    async with open_store(place.driver()) as store:
        with pytest.raises(ConnectionError):
            async with store.staged_write("full_drop", meta={"watermark": 2}) as tx:
                await tx.write_table(table(2))
                raise ConnectionError("The source broke off.")
        assert tx.receipt.phase == "rolled_back"
        assert (await store.meta())["watermark"] == 1
    assert ids(place) == [1]


async def test_what_was_staged_is_found_and_cleaned_up_where_it_is(place: Place) -> None:
    """13: the clean-up looked at another path than the one where files were staged."""
    async with open_store(place.driver()) as store:
        for end in ("commit", "roll back"):
            tx = await store.begin("append")
            await tx.write_table(table(1))
            assert any(path.endswith(".parquet") for path in place.staged())
            await (tx.commit() if end == "commit" else tx.rollback())
            assert place.staged() == []
        dead = await store.begin("append")
        await dead.write_table(table(2))
        await dead.prepare()
        await dead.release()
        await store.gc(older_than=timedelta(0))
    assert place.staged() == []
    assert ids(place) == [1]


async def test_another_attempt_is_another_transaction_and_knows_nothing_of_the_last(place: Place) -> None:
    """14: a second attempt published the files of the first one, too."""
    async with open_store(place.driver()) as store:
        for attempt in (1, 2):
            try:
                async with store.staged_write("append", key="run 1") as tx:
                    await tx.write_table(table(1))
                    if attempt == 1:
                        raise ConnectionError("The source broke off.")
                    await tx.write_table(table(2))
            except ConnectionError:
                assert attempt == 1
    assert ids(place) == [1, 2]


async def test_two_runs_at_once_share_no_staging(place: Place) -> None:
    """20: staging was named after the table alone: a second run wrote over the first one's files, and cleaned them up."""
    async with open_store(place.driver()) as store, open_store(place.driver()) as other:
        first, second = await store.begin("full_drop"), await other.begin("full_drop")
        third = await store.begin("full_drop")
        for tx, row in ((first, 1), (second, 2), (third, 3)):
            await tx.write_table(table(row), None if isinstance(place, Mirrored) else "same.parquet")
        await third.rollback()
        await first.commit()
        assert ids(place) == [1]
        await second.commit()
    assert ids(place) == [2]


async def test_a_cancelled_run_leaves_nothing_staged(place: Place) -> None:
    """21: a cancellation went past the clean-up, and a full queue hung."""
    await load(place, "append", 1)
    async with open_store(place.driver()) as store:
        with anyio.CancelScope() as scope:
            async with store.staged_write("full_drop") as tx:
                await tx.write_table(table(2))
                scope.cancel()
                await anyio.lowlevel.checkpoint()
        assert tx.receipt.phase == "rolled_back"
    assert place.staged() == []
    assert ids(place) == [1]


# ------------------------------------------------------------------------------------------------------------------ manners


async def test_others_get_their_turn_while_a_commit_is_under_way(
    place: Place, nothing_blocks: BlockBuster | None
) -> None:
    """19: requests of a synchronous SDK and `time.sleep` stood still within `async def`."""
    assert nothing_blocks is not None  # a call of ours that blocks raises
    turns = 0

    async def ticks() -> None:
        nonlocal turns
        while True:
            await anyio.sleep(0.001)
            turns += 1

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ticks)
        await load(place, "append", 1, 2)
        await load(place, "full_drop", 3)
        tasks.cancel_scope.cancel()
    assert turns > 10


async def test_paths_have_slashes_on_every_store(place: Place) -> None:
    """22: paths of a cloud went through `pathlib`, with backslashes on Windows."""
    async with open_store(place.driver()) as store:
        tx = await store.begin("append")
        with pytest.raises(InvalidPath):
            await tx.write("p=1\\a.parquet", b"1")
        if not isinstance(place, Mirrored):
            await tx.write("p=1/a.parquet", b"1")
            await tx.commit()
            assert place.files() == {"p=1/a.parquet": b"1"}


# ------------------------------------------------------------------------------------------------------------- the whole


def numbers() -> set[int]:
    """The numbers of the defects for which there is a test here."""
    tests = [function for name, function in globals().items() if name.startswith("test_")]
    found = [re.match(r"(\d+): ", function.__doc__ or "") for function in tests]
    return {int(match[1]) for match in found if match}


def test_every_defect_is_tested_and_what_is_said_to_be_tested_elsewhere_is() -> None:
    assert numbers() | ELSEWHERE.keys() == set(range(1, 23))
    root = Path(__file__).parent.parent
    for named in ELSEWHERE.values():
        file, _, test = named.partition("::")
        assert re.search(rf"^(async )?def {test}\(", (root / file).read_text(), re.MULTILINE), named
