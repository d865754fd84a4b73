"""Open Mirroring where several things come together: whoever is late, stopped, blocked or waiting loses and doubles no row."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import aclosing
from datetime import timedelta
from functools import partial
from typing import Any

import anyio
import pytest
from dfs import DfsServer, Plan
from dfs.faults import FAULTS
from mirror import ITEM, LOAD, WORKS, ZONE, Changes, Mirror, table_of

from staged import CommitBlocked, CommitIncomplete, StorageError, Unsupported, open_store
from staged.model import Resolve
from staged.testing.exploration import FAULT_MOMENTS, Fault, attempt
from staged.testing.faults import Crash, FaultDriver, Gate, Moment

pytestmark = pytest.mark.anyio

Figure = Callable[[str, str], None]
SOAK = int(os.environ.get("STAGED_SOAK", "1"))
DROP = WORKS[2]
NEW = sorted(DROP.apply({}).items())


@pytest.fixture
def server() -> Iterator[DfsServer]:
    with DfsServer(onelake=True) as server:
        yield server


def stand_still(mirror: Mirror) -> None:
    """From now on the service looks only when it is told to."""
    mirror.server.before = lambda number: None


async def dropped_halfway(mirror: Mirror) -> None:
    """A full_drop whose writer gave up: the folder is aside, and the service has not seen it."""
    async with open_store(mirror.driver(drop_timeout=-1)) as store:
        with pytest.raises(CommitIncomplete, match="has not dropped it"):
            await DROP(store)
    assert mirror.server.namespace.get(mirror.workspace, f"{ZONE}/t") is None


def just_before(call: str, act: Callable[[], object], number: int = 1) -> Gate:
    """Act once, before the call of that name and number."""
    calls = 0

    async def gate(name: str, moment: Moment) -> None:
        nonlocal calls
        if name.startswith(call) and moment == "before":
            calls += 1
            if calls == number:
                act()

    return gate


def befalls(fault: Fault, call: str, number: int) -> Gate:
    """One fault at the call of that name and number."""
    calls = 0
    dead = False

    async def gate(name: str, moment: Moment) -> None:
        nonlocal calls, dead
        if dead:
            raise Crash
        calls += name.startswith(call) and moment == "before"
        if name.startswith(call) and calls == number and moment == FAULT_MOMENTS[fault]:
            calls += 1
            if fault in ("answer lost", "fails"):
                raise StorageError(f"{fault} at {name}", retryable=True)
            dead = True
            raise Crash

    return gate


def names(mirror: Mirror) -> list[str]:
    """All names of files and directories in the control area of the table; for the server's thread."""
    return [name for name, _ in mirror.server.namespace.walk(mirror.workspace, f"{ITEM}/Files/_tmp/t")]


def everything(mirror: Mirror) -> list[str]:
    """The same, from any thread."""
    return mirror.server.call(lambda: names(mirror))


async def recovered(mirror: Mirror) -> None:
    """What another process does while the service looks again, and what the service does then."""
    mirror.server.before = mirror.replicator.before_requests(every=3)
    async with open_store(mirror.driver()) as store:
        await store.recover()
    mirror.settle()


# ------------------------------------------------------------------------------------------------------ whoever is too late


@pytest.mark.parametrize("parent_first", [False, True])
@pytest.mark.parametrize("first", [False, True])
async def test_files_that_are_published_once_more_do_not_bring_a_dropped_table_back(
    server: DfsServer, first: bool, parent_first: bool
) -> None:
    mirror = Mirror(server)
    server.namespace.parent_first = parent_first
    async with aclosing(mirror.driver()) as driver, open_store(mirror.driver()) as store:
        if not first:
            await LOAD(store)
        tx = await store.begin("append")
        await tx.write_changes(table_of({4: "d"}), "insert")
        await tx.prepare()
        arranged = await driver.arrange(tx.id, tx.entries, await store.meta(), afresh=False)
        assert arranged is not None
        assert set(await driver.publish(tx.id, arranged.entries, {})) == {"done"}
        mirror.settle()
        stand_still(mirror)
        await dropped_halfway(mirror)
        assert "done" not in await driver.publish(tx.id, arranged.entries, {})
        assert server.namespace.get(mirror.workspace, f"{ZONE}/t") is None
        await tx.rollback()
    mirror.settle()
    await recovered(mirror)
    assert (mirror.rows(), mirror.drops(), mirror.wrong("t")) == (NEW, ["gone"], [])


async def test_a_folder_that_somebody_deleted_is_not_made_again_without_its_metadata(server: DfsServer) -> None:
    mirror = Mirror(server)
    async with open_store(mirror.driver()) as store:
        await LOAD(store)
    mirror.settle()
    stand_still(mirror)
    delete = partial(server.namespace.delete, mirror.workspace, f"{ZONE}/t", recursive=True)
    async with open_store(FaultDriver(mirror.driver(), just_before("publish", delete))) as store:
        with pytest.raises(CommitIncomplete, match="Somebody deleted the folder"):
            await WORKS[0](store)
    assert server.namespace.get(mirror.workspace, f"{ZONE}/t") is None
    mirror.settle()
    server.namespace.create(mirror.workspace, f"{ZONE}/t", directory=True)
    await recovered(mirror)
    async with open_store(mirror.driver()) as store:
        await DROP(store)
    mirror.settle()
    assert mirror.rows() == NEW


# ------------------------------------------------------------------------------------------------------- what is in the way


@pytest.mark.parametrize("resolve", ["keep", "replace"])
async def test_a_file_in_the_way_is_neither_kept_for_ours_nor_replaced_by_it(
    server: DfsServer, resolve: Resolve
) -> None:
    mirror = Mirror(server)
    async with open_store(mirror.driver()) as store:
        await LOAD(store)
    mirror.settle()
    stand_still(mirror)
    name = f"{ZONE}/t/{4:020d}.parquet"
    put = partial(server.namespace.create, mirror.workspace, name, b"theirs")
    async with open_store(FaultDriver(mirror.driver(), just_before("publish", put))) as store:
        with pytest.raises(CommitBlocked, match="Take that away") as blocked:
            await WORKS[0](store)
        # The lowest index is not there, so that the service reads nothing.
        assert {f"{index:020d}.parquet" for index in (3, 4)} == set(blocked.value.paths)
        for _ in range(2):
            with pytest.raises(CommitBlocked):
                await store.recover(resolve=resolve)
        assert server.namespace.read(mirror.workspace, name) == b"theirs"
        assert (await store.status()).head == "committed"
    server.namespace.delete(mirror.workspace, name)
    await recovered(mirror)
    assert (mirror.rows(), mirror.wrong()) == (sorted(WORKS[0].apply(LOAD.apply({})).items()), [])


@pytest.mark.parametrize("resolve", ["keep", "replace"])
async def test_a_folder_in_the_way_of_a_full_drop_is_neither_kept_for_ours_nor_replaced_by_it(
    server: DfsServer, resolve: Resolve
) -> None:
    mirror = Mirror(server)
    async with open_store(mirror.driver()) as store:
        await LOAD(store)
    mirror.settle()
    stand_still(mirror)
    await dropped_halfway(mirror)
    server.namespace.create(mirror.workspace, f"{ZONE}/t/theirs", b"1")
    async with open_store(mirror.driver()) as store:
        with pytest.raises(CommitBlocked, match="Take that away"):
            await store.recover(resolve=resolve)
        assert mirror.names() == ["theirs"]
    server.namespace.delete(mirror.workspace, f"{ZONE}/t", recursive=True)
    mirror.settle()
    await recovered(mirror)
    assert (mirror.rows(), mirror.wrong("t")) == (NEW, [])


# ---------------------------------------------------------------------------------------------------- one place for control


async def test_a_table_whose_commits_are_kept_in_the_other_place_is_refused(server: DfsServer) -> None:
    mirror = Mirror(server)
    for table, ours, theirs in (("t", "_tmp", "_scratchPad"), ("dbo.schema/u", "_scratchPad", "_tmp")):
        async with (
            open_store(mirror.driver(table, scratch=ours)) as store,
            open_store(mirror.driver(table, scratch=theirs)) as other,
        ):
            # Neither is there yet when both begin.
            late = await other.begin("append")
            await late.write_changes(table_of({1: "theirs"}), "insert")
            await LOAD(store)
            with pytest.raises(Unsupported, match="open it with that scratch="):
                await late.commit()
            for ask in (other.status, other.recover, other.gc, other.meta):
                with pytest.raises(Unsupported, match="open it with that scratch="):
                    await ask()
        async with open_store(mirror.driver(table, scratch=theirs)) as other:
            with pytest.raises(Unsupported, match="open it with that scratch="):
                await other.begin("append")
        async with open_store(mirror.driver(table, scratch=ours)) as store:
            await Changes("append", (("insert", ((4, "d"),)),))(store)
        mirror.settle()
        assert mirror.rows(table.replace(".schema/", ".")) == [*sorted(LOAD.apply({}).items()), (4, "d")]
    assert mirror.wrong() == []


# ---------------------------------------------------------------------------------------------- what a live commit needs


def fails_to_free_the_head() -> Gate:
    """A store that fails just when the outcome is written: what was staged is discarded, and the head is not freed."""
    written = False

    async def gate(name: str, moment: Moment) -> None:
        nonlocal written
        written = written or name.startswith("put_segment outcome/")
        if written and name == "cas head":
            raise StorageError("not now")

    return gate


@pytest.mark.parametrize("detection", ["sequence", "update_time"])
@pytest.mark.parametrize("work", [WORKS[0], DROP], ids=str)
async def test_a_commit_whose_head_was_not_freed_is_completed_though_all_was_read_and_removed(
    server: DfsServer, work: Changes, detection: str
) -> None:
    mirror = Mirror(server, last_stays=False, ready_after=1, removed_after=2)
    async with open_store(mirror.driver(detection=detection)) as store:
        await LOAD(store)
    mirror.settle()
    async with open_store(FaultDriver(mirror.driver(detection=detection), fails_to_free_the_head())) as store:
        assert await work(store) == "committed"
    mirror.settle()
    async with open_store(mirror.driver(detection=detection)) as store:
        assert (await store.status()).head == "committed"
        assert len((await store.recover()).finished) == 1
        assert (await store.status()).head == "free"
        await Changes("append", (("upsert", ((99, "next"),)),))(store)
    mirror.settle()
    assert mirror.rows() == sorted([*work.apply(LOAD.apply({})).items(), (99, "next")])
    assert mirror.wrong(*(["t"] if work is DROP else [])) == []


async def test_gc_takes_nothing_from_a_full_drop_that_waits(server: DfsServer) -> None:
    mirror = Mirror(server)
    async with open_store(mirror.driver()) as store:
        await LOAD(store)
    mirror.settle()
    stand_still(mirror)
    async with open_store(mirror.driver(period=1.0)) as store, open_store(mirror.driver(period=1.0)) as other:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(DROP, store)
            with anyio.fail_after(30):
                while not any(name.endswith("/gone") for name in everything(mirror)):  # noqa: ASYNC110 - the server knows no event
                    await anyio.sleep(0.02)
            # Since when it waits is told by the age of a directory.
            kept = [name for name in everything(mirror) if "/old/" in name or "/staging/" in name]
            assert len((await other.gc(older_than=timedelta(0))).alive) == 1
            assert [name for name in everything(mirror) if name in kept] == kept
            mirror.settle()
        await other.gc(older_than=timedelta(0))
        assert not [name for name in everything(mirror) if "/old/" in name or "/staging/" in name]
    mirror.settle()
    assert (mirror.rows(), mirror.drops(), mirror.wrong("t")) == (NEW, ["gone"], [])


async def test_a_full_drop_that_keeps_nothing_old_leaves_nothing_of_it(server: DfsServer) -> None:
    mirror = Mirror(server)
    async with open_store(mirror.driver()) as store:
        await LOAD(store)
        for value in ("x", "y"):
            mirror.settle()
            async with store.staged_write("full_drop", keep_old=0) as tx:
                await tx.write_changes(table_of({1: value}), "insert")
            assert not [name for name in everything(mirror) if "/old/" in name or "/staging/" in name]
    mirror.settle()
    assert (mirror.rows(), mirror.drops(), mirror.wrong("t")) == ([(1, "y")], ["gone", "gone"], [])


# --------------------------------------------------------------------------------------------------------- waiting for a drop


async def test_recover_waits_for_a_busy_folder_and_for_the_drop_as_the_writer_does(server: DfsServer) -> None:
    mirror = Mirror(server, drop_after=12)
    async with open_store(mirror.driver()) as store:
        await LOAD(store)
    mirror.settle()
    async with open_store(FaultDriver(mirror.driver(), befalls("crash before", "swap", 1))) as store:
        assert await attempt(lambda: DROP(store)) == "crash"
    mirror.settle()
    assert mirror.rows() == sorted(LOAD.apply({}).items())
    busy, tries = (mirror.workspace, f"{ZONE}/t"), 0

    def look(number: int) -> None:
        nonlocal tries
        mirror.replicator.poll()
        tries += any("/old/" in name for name in names(mirror))
        (server.namespace.busy.add if tries < 20 else server.namespace.busy.discard)(busy)

    server.before = look
    async with open_store(mirror.driver()) as store:
        assert len((await store.recover()).finished) == 1
    mirror.settle()
    assert len([one for one in server.log if (one.verb, one.status) == ("rename", 409)]) > 1
    assert (mirror.rows(), mirror.drops(), mirror.wrong("t")) == (NEW, ["gone"], [])


async def test_recover_that_waits_too_long_says_so_and_the_next_one_goes_on(server: DfsServer) -> None:
    mirror = Mirror(server)
    async with open_store(mirror.driver()) as store:
        await LOAD(store)
    mirror.settle()
    stand_still(mirror)
    mirror.replicator.namespace.busy.add((mirror.workspace, f"{ZONE}/t"))
    async with open_store(mirror.driver(drop_timeout=-1)) as store:
        with pytest.raises(CommitIncomplete, match="could not be put aside"):
            await DROP(store)
        with pytest.raises(CommitIncomplete, match="could not be put aside"):
            await store.recover()
        assert mirror.rows() == sorted(LOAD.apply({}).items())
        mirror.replicator.namespace.busy.clear()
        with pytest.raises(CommitIncomplete, match="has not dropped it"):
            await store.recover()
    await recovered(mirror)
    assert (mirror.rows(), mirror.drops(), mirror.wrong("t")) == (NEW, ["gone"], [])


# -------------------------------------------------------------------------------------------------------- many files at once


async def test_hundreds_of_files_of_one_append_become_readable_at_once(server: DfsServer) -> None:
    mirror = Mirror(server, every=20)
    async with open_store(mirror.driver(period=10.0)) as store:
        await LOAD(store)
        mirror.settle()
        before = len(mirror.replicator.record.applied)
        async with store.staged_write("append") as tx:
            for key in range(10, 270):
                await tx.write_changes(table_of({key: "x"}), "insert")
    mirror.settle()
    applied = mirror.replicator.record.applied[before:]
    assert [int(one.name[:20]) for one in applied] == list(range(3, 263))
    assert len({one.poll for one in applied}) == 1
    assert mirror.rows() == sorted([*LOAD.apply({}).items(), *((key, "x") for key in range(10, 270))])
    assert mirror.wrong() == []


@pytest.mark.parametrize("fault", ["crash before", "crash after", "answer lost"])
async def test_files_published_in_several_batches_leave_no_gap_that_stays(
    server: DfsServer, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.setattr("staged.commit._BATCH", 2)
    work = Changes("append", tuple(("insert", ((key, "x"),)) for key in range(4, 11)))
    for prior in (True, False):
        for batch in range(1, 5):
            mirror = Mirror(server, every=1)
            if prior:
                async with open_store(mirror.driver()) as store:
                    await LOAD(store)
            old = LOAD.apply({}) if prior else {}
            gate = befalls(fault, "publish", batch)
            async with open_store(FaultDriver(mirror.driver(), gate)) as store:
                await attempt(lambda: work(store))
            mirror.settle()
            # Only once the last batch is there the service reads any of it.
            assert (mirror.rows() or []) == sorted(
                (work.apply(old) if batch == 4 and fault != "crash before" else old).items()
            )
            await recovered(mirror)
            assert mirror.rows() == sorted(work.apply(old).items()), (prior, batch)
            assert mirror.wrong() == [], (prior, batch)


# ----------------------------------------------------------------------------------------------- other names and other places


@pytest.mark.parametrize(
    ("table", "options"),
    [("t", {"detection": "update_time"}), ("dbo.schema/t", {}), ("t", {"scratch": "_scratchPad"})],
    ids=["update time", "schema", "scratch pad"],
)
async def test_one_fault_at_any_request_loses_and_doubles_no_row_wherever_and_however_it_is_published(
    server: DfsServer, table: str, options: dict[str, Any], figure: Figure, anyio_backend: str
) -> None:
    shown = table.replace(".schema/", ".")
    kinds: Counter[str] = Counter()
    for number, work in enumerate((WORKS[0], DROP)):
        expected = sorted(work.apply(LOAD.apply({})).items())
        dropped = [shown] if work is DROP else []
        requests = 60
        # On one event loop other requests than on the other.
        at = 40 * (anyio_backend == "trio") + number
        while at < requests * len(FAULTS):
            kind = FAULTS[at % len(FAULTS)]
            amount = {"delays": 1, "lags": 1, "replays": 1 + at % 17, "lates": 1 + at % 13}.get(kind, 0)
            plan = f"{kind}@{at // len(FAULTS)}" + (f"+{amount}" if amount else "")
            mirror = Mirror(server, every=2, busy=at % 2)
            async with open_store(mirror.driver(table, **options)) as store:
                await LOAD(store)
            mirror.settle()
            server.counts.clear()
            server.plan = Plan(plan)
            async with open_store(mirror.driver(table, **options)) as store:
                said = await attempt(lambda: work(store))  # noqa: B023 - awaited at once
            server.replay()
            server.plan = Plan()
            text = f"{work}, DfsServer(plan={plan!r})"
            requests = min(requests, server.counts.total())
            async with open_store(mirror.driver(table, **options)) as store:
                await store.recover()
                await store.gc(older_than=timedelta(0))
            mirror.settle()
            assert (said, mirror.rows(shown)) == ("committed", expected), text
            assert mirror.wrong(*dropped) == [], text
            assert mirror.drops() == ["gone"] * len(dropped), text
            kinds[kind] += 1
            at += max(1, 83 // SOAK)
    figure(
        f"one fault at the wire, {table}, {', '.join(options.values())}, {anyio_backend}",
        f"{kinds.total()}, all committed, no row lost or twice",
    )
    assert kinds.total() > 8
