"""Open Mirroring: what the service sees is always in order, and in the end it has what the source has."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import anyio
import pyarrow
import pytest
from dfs import DfsServer, Plan
from dfs.faults import FAULTS
from mirror import ITEM, LOAD, SAS, WORKS, ZONE, Changes, Mirror, Rows, table_of

from staged import (
    CommitIncomplete,
    Conflict,
    InvalidInput,
    StagedError,
    StagingError,
    Unsupported,
    open_mirror,
    open_store,
)
from staged.drivers.open_mirroring import OpenMirroringDriver
from staged.testing.exploration import At, attempt
from staged.testing.faults import FaultDriver

Figure = Callable[[str, str], None]
SOAK = int(os.environ.get("STAGED_SOAK", "1"))
PRIOR: Rows = LOAD.apply({})

pytestmark = pytest.mark.anyio


@pytest.fixture
def server() -> Iterator[DfsServer]:
    with DfsServer(onelake=True) as server:
        yield server


async def loaded(server: DfsServer, **options: Any) -> Mirror:
    """A mirror whose service has read the prior rows."""
    mirror = Mirror(server, **options)
    async with open_store(mirror.driver()) as store:
        await LOAD(store)
    mirror.settle()
    assert mirror.rows() == sorted(PRIOR.items())
    return mirror


def dropped(work: Changes) -> tuple[str, ...]:
    return ("t",) if work.mode == "full_drop" else ()


async def repaired(mirror: Mirror) -> None:
    """What another process does after a death."""
    async with open_store(mirror.driver()) as store:
        await store.recover()
        await store.gc(older_than=timedelta(0))
    mirror.settle()


# -------------------------------------------------------------------------------------------------------------- the proof


@pytest.mark.parametrize("work", WORKS, ids=str)
@pytest.mark.parametrize("every", [1, 4])
async def test_the_service_sees_files_in_order_and_ends_with_the_rows_of_the_source(
    server: DfsServer, work: Changes, every: int
) -> None:
    mirror = await loaded(server, every=every, busy=2)
    before = len(mirror.replicator.record.applied)
    async with open_store(mirror.driver()) as store:
        assert await work(store) == "committed"
    mirror.settle()
    # All files of a batch become readable at one rename.
    assert len({one.poll for one in mirror.replicator.record.applied[before:]}) == 1
    assert mirror.rows() == sorted(work.apply(PRIOR).items())
    assert mirror.wrong(*dropped(work)) == []
    assert mirror.drops() == ["gone"] * len(dropped(work))


async def test_one_fault_at_any_request_loses_and_doubles_no_row(
    server: DfsServer, figure: Figure, anyio_backend: str
) -> None:
    kinds: Counter[str] = Counter()
    for number, work in enumerate(WORKS):
        expected = sorted(work.apply(PRIOR).items())
        requests = 60
        at = 0
        while at < requests * len(FAULTS):
            kind = FAULTS[at % len(FAULTS)]
            amount = {"delays": 1, "lags": 1, "replays": 1 + at % 17, "lates": 1 + at % 13}.get(kind, 0)
            plan = f"{kind}@{at // len(FAULTS)}" + (f"+{amount}" if amount else "")
            mirror = await loaded(server, every=2, busy=at % 2)
            server.counts.clear()
            server.plan = Plan(plan)
            async with open_store(mirror.driver()) as store:
                said = await attempt(lambda: work(store))  # noqa: B023 - awaited at once
            server.replay()
            server.plan = Plan()
            text = f"{work}, DfsServer(plan={plan!r})"
            requests = min(requests, server.counts.total())
            await repaired(mirror)
            assert (said, mirror.rows()) == ("committed", expected), text
            assert mirror.wrong(*dropped(work)) == [], text
            assert mirror.drops() == ["gone"] * len(dropped(work)), text
            kinds[kind] += 1
            at += max(1, 61 // SOAK) + number
    figure(
        f"one fault at the wire, open mirroring, {anyio_backend}",
        f"{kinds.total()}, all committed, no row lost or twice",
    )
    assert kinds.total() > 20


async def test_many_faults_leave_the_old_rows_or_the_new_and_the_truth(
    server: DfsServer, figure: Figure, anyio_backend: str
) -> None:
    ends: Counter[str] = Counter()
    for seed in range(6 * SOAK):
        work = WORKS[seed % len(WORKS)]
        mirror = await loaded(server, every=3, busy=seed % 3)
        server.counts.clear()
        server.plan = plan = Plan.seeded(seed, requests=300, rate=0.2)
        with anyio.fail_after(300):
            async with open_store(mirror.driver()) as store:
                said = await attempt(lambda: work(store))  # noqa: B023 - awaited at once
            server.replay()
            server.plan = Plan()
            await repaired(mirror)
        old, new = sorted(PRIOR.items()), sorted(work.apply(PRIOR).items())
        text = f"{work}, DfsServer(plan={str(plan)!r})"
        assert mirror.rows() in {"committed": [new], "untouched": [old], "unknown": [old, new]}[said], text
        assert mirror.wrong(*dropped(work)) == [], text
        ends[said] += 1
    figure(
        f"many faults at the wire, open mirroring, {anyio_backend}", ", ".join(f"{n} {end}" for end, n in ends.items())
    )


@pytest.mark.parametrize("work", WORKS, ids=str)
async def test_a_writer_that_dies_at_any_call_leaves_the_old_rows_or_the_new(
    server: DfsServer, work: Changes, figure: Figure, anyio_backend: str
) -> None:
    ends: Counter[str] = Counter()
    old, new = sorted(PRIOR.items()), sorted(work.apply(PRIOR).items())
    for fault in ("crash before", "crash after"):
        number, shift = 0, anyio_backend == "trio"
        while True:
            mirror = await loaded(server, every=2)
            # Every fourth call, on one loop others than on the other; in a soak every call on both.
            stride = max(1, 4 // SOAK)
            gate = At(fault, stride * number + shift * (stride // 2))
            async with open_store(FaultDriver(mirror.driver(), gate)) as store:
                said = await attempt(lambda: work(store))
            mirror.settle(3)
            seen = mirror.rows()
            await repaired(mirror)
            # What was published in part is read as far as it is in order, and the rest comes: nobody sees a row twice.
            assert mirror.rows() in (old, new), (fault, gate.struck)
            assert said != "committed" or mirror.rows() == new
            assert mirror.wrong(*dropped(work)) == [], (fault, gate.struck)
            assert mirror.drops() == ["gone"] * (len(dropped(work)) if mirror.rows() == new else 0), gate.struck
            if mirror.rows() == old:
                assert seen == old, (fault, gate.struck)
            async with open_store(mirror.driver()) as store:
                await Changes("append", (("upsert", ((99, "next"),)),))(store)
            mirror.settle()
            assert mirror.rows() == sorted([*(new if mirror.rows() != [*old, (99, "next")] else old), (99, "next")])
            ends["old" if (99, "next") in (mirror.rows() or []) and seen == old else "new"] += 1
            if gate.struck is None:
                break
            number += 1
    figure(f"deaths over open mirroring, {work}, {anyio_backend}", f"{ends.total()}, all old or new")
    assert ends.total() > 15


# ------------------------------------------------------------------------------------------------------ names and metadata


async def test_indexes_go_on_after_what_was_read_is_gone_and_begin_at_1_after_a_drop(server: DfsServer) -> None:
    mirror = await loaded(server, last_stays=False, ready_after=1, removed_after=2)
    assert [name for name in mirror.names() if name.endswith(".parquet")] == []  # all read and removed
    async with open_store(mirror.driver()) as store:
        await Changes("append", (("insert", ((4, "d"),)),))(store)
        mirror.settle()
        await Changes("full_drop", (("insert", ((1, "x"),)),))(store)
        mirror.settle()
        await Changes("append", (("insert", ((2, "y"),)),))(store)
        remembered: Any = (await store.meta())["staged.last_index"]
        assert remembered["index"] == 2
    mirror.settle()
    assert [int(file.name[:20]) for file in mirror.replicator.record.applied] == [1, 2, 3, 1, 2]
    assert mirror.rows() == [(1, "x"), (2, "y")]
    assert mirror.wrong("t") == []


async def test_writers_at_once_take_their_indexes_one_after_another(server: DfsServer) -> None:
    mirror = await loaded(server)

    async def write(number: int) -> None:
        async with open_store(mirror.driver(period=10.0)) as store:
            files = tuple(("insert", ((10 * number + file, f"{number}"),)) for file in range(2))
            await Changes("append", files)(store)  # type: ignore[arg-type]

    async with anyio.create_task_group() as tasks:
        for number in range(1, 6):
            tasks.start_soon(write, number)
    mirror.settle()
    added = [(10 * number + file, f"{number}") for number in range(1, 6) for file in range(2)]
    assert mirror.rows() == sorted([*PRIOR.items(), *added])
    assert [int(file.name[:20]) for file in mirror.replicator.record.applied] == list(range(1, 13))
    assert mirror.wrong() == []


async def test_what_was_prepared_before_a_full_drop_is_appended_after_it(server: DfsServer) -> None:
    mirror = await loaded(server)
    async with open_store(mirror.driver(period=10.0)) as store, open_store(mirror.driver(period=10.0)) as other:
        tx = await store.begin("append")
        await tx.write_changes(table_of({4: "d"}), "insert")
        await tx.prepare()
        await WORKS[2](other)
        await tx.commit()
    mirror.settle()
    assert mirror.rows() == sorted([*WORKS[2].apply(PRIOR).items(), (4, "d")])
    assert mirror.wrong("t") == []


async def test_indexes_go_on_after_files_of_another_publisher_wherever_the_service_moved_them(
    server: DfsServer,
) -> None:
    mirror = await loaded(server, ready_after=3, removed_after=99)
    for place, index in (("", 7), ("_ProcessedFiles/", 8), ("_FilesReadyToDelete/", 9)):
        server.namespace.create(mirror.workspace, f"{ZONE}/t/{place}{index:020d}.parquet", b"theirs")
        server.before = lambda number: None
        async with open_store(mirror.driver()) as store:
            await Changes("append", (("insert", ((index, "d"),)),))(store)
        assert f"{index + 1:020d}.parquet" in mirror.names()


async def test_metadata_comes_first_is_written_once_and_cannot_change_but_by_a_full_drop(server: DfsServer) -> None:
    mirror = await loaded(server)
    found = server.namespace.find(mirror.workspace, f"{ZONE}/t/_metadata.json")
    for keys in (["id", "v"], []):
        async with open_store(mirror.driver(keys=keys)) as store:
            with pytest.raises(Conflict, match="cannot be changed but by a full_drop"):
                async with store.staged_write("append") as tx:
                    await tx.write_table(table_of({5: "e"}))
    async with open_store(mirror.driver(keys=None)) as store:
        await Changes("append", (("update", ((1, "A"),)),))(store)
    assert server.namespace.find(mirror.workspace, f"{ZONE}/t/_metadata.json").etag == found.etag
    async with open_store(mirror.driver(keys=["v"], upserts=True)) as store:
        await Changes("full_drop", (("insert", ((1, "x"),)),))(store)
    said = json.loads(server.namespace.read(mirror.workspace, f"{ZONE}/t/_metadata.json"))
    assert said == {"keyColumns": ["v"], "isUpsertDefaultRowMarker": True}
    mirror.settle()
    assert mirror.wrong("t") == []


async def test_a_table_that_is_not_there_needs_its_keys_said(server: DfsServer) -> None:
    mirror = Mirror(server)
    async with open_store(mirror.driver(keys=None)) as store:
        with pytest.raises(StagingError, match="pass keys="):
            async with store.staged_write("append") as tx:
                await tx.write_table(table_of({1: "a"}))
    async with open_store(mirror.driver(keys=[])) as store:
        with pytest.raises(InvalidInput, match="inserts only"):
            await Changes("append", (("upsert", ((1, "a"),)),))(store)
        await Changes("append", (("insert", ((1, "a"),)),))(store)
    mirror.settle()
    assert (mirror.rows(), mirror.wrong()) == ([(1, "a")], [])


async def test_files_by_update_time_keep_names_of_their_own(server: DfsServer) -> None:
    mirror = Mirror(server)
    async with open_store(mirror.driver(detection="update_time")) as store:
        for number in range(3):
            await Changes("append", (("upsert", ((number, "a"),)),))(store)
        assert await store.meta() == {}
    mirror.settle()
    assert (mirror.rows(), mirror.wrong()) == ([(0, "a"), (1, "a"), (2, "a")], [])
    assert all(name.startswith(("part-", "_")) for name in mirror.names())


async def test_who_publishes_is_said_once_for_all_tables_and_survives_a_drop(server: DfsServer) -> None:
    mirror = Mirror(server)
    for table, name in (("t", "first"), ("dbo.schema/u", "second")):
        async with open_store(mirror.driver(table, partner={"partnerName": name})) as store:
            await Changes("append", (("insert", ((1, "a"),)),))(store)
            await Changes("full_drop", (("insert", ((2, "b"),)),))(store)
    said = json.loads(server.namespace.read(mirror.workspace, f"{ZONE}/_partnerEvents.json"))
    assert said == {"partnerName": "first"}
    mirror.settle()
    assert mirror.rows("dbo.u") == [(2, "b")]
    assert mirror.wrong("t", "dbo.u") == []


# ------------------------------------------------------------------------------------------------------------- full_drop


async def test_a_full_drop_waits_until_the_table_is_gone_and_gets_past_a_busy_folder(server: DfsServer) -> None:
    mirror = await loaded(server, every=1, drop_after=25, busy=8)
    async with open_store(mirror.driver()) as store:
        await Changes("append", (("insert", ((4, "d"),)),))(store)  # keeps the folder busy
        await Changes("full_drop", (("insert", ((1, "x"),)),))(store)
    mirror.settle()
    assert mirror.rows() == [(1, "x")]
    assert [drop.why for drop in mirror.replicator.record.drops] == ["gone"]
    assert mirror.wrong("t") == []


async def test_a_full_drop_that_waits_too_long_is_incomplete_and_completed_by_recover(server: DfsServer) -> None:
    mirror = await loaded(server)
    server.before = lambda number: None  # the service stands still
    async with open_store(mirror.driver(drop_timeout=-1)) as store:
        with pytest.raises(CommitIncomplete, match="the service has not dropped it"):
            await Changes("full_drop", (("insert", ((1, "x"),)),))(store)
    assert [name for name in mirror.names() if not name.startswith("_")] == []
    mirror.settle()
    assert mirror.rows() is None
    async with open_store(mirror.driver(drop_timeout=-1)) as store:
        await store.recover()
    mirror.settle()
    assert (mirror.rows(), mirror.wrong("t")) == ([(1, "x")], [])


async def test_what_vanished_from_staging_is_no_success(server: DfsServer) -> None:
    mirror = await loaded(server)
    async with open_store(mirror.driver()) as store:
        tx = await store.begin("append")
        await tx.write_changes(table_of({4: "d"}), "insert")
        await tx.prepare()
        driver = mirror.driver()
        arranged = await driver.arrange(tx.id, tx.entries, await store.meta(), afresh=False)
        assert arranged is not None
        for name in mirror.server.namespace.paths(mirror.workspace):
            if "/sealed/" in name:
                server.namespace.delete(mirror.workspace, name)
        assert await driver.publish(tx.id, arranged.entries, {}) == ["lost"]
        await driver.aclose()
        await tx.rollback()


async def test_a_schema_and_a_landing_zone_are_no_tables(server: DfsServer) -> None:
    mirror = Mirror(server)
    for path in ("dbo.schema", "", "a/b"):
        async with open_store(mirror.driver(path)) as store:
            with pytest.raises(Unsupported, match="no table"):
                await store.begin("full_drop")
    zone = f"abfss://ws@onelake.dfs.fabric.microsoft.com/{ZONE}"
    assert type(open_store(zone, credential="sig=1")._driver) is OpenMirroringDriver


async def test_a_folder_that_somebody_made_anew_begins_at_1_again(server: DfsServer) -> None:
    mirror = await loaded(server)
    async with open_store(mirror.driver()) as store:
        await Changes("append", (("insert", ((4, "d"),)),))(store)
    server.namespace.delete(mirror.workspace, f"{ZONE}/t", recursive=True)
    mirror.settle()
    server.namespace.create(mirror.workspace, f"{ZONE}/t/_metadata.json", b'{"keyColumns":["id"]}')
    async with open_store(mirror.driver()) as store:
        await Changes("append", (("insert", ((5, "e"),)),))(store)
    mirror.settle()
    assert (mirror.rows(), mirror.wrong("t")) == ([(5, "e")], [])


async def test_a_full_drop_waits_a_fixed_time_where_that_is_asked() -> None:
    clock = [1_000_000_000.0]
    with DfsServer(onelake=True, now=lambda: clock[0]) as server:
        mirror = Mirror(server, every=1_000_000)
        async with open_store(mirror.driver()) as store:
            await Changes("append", (("insert", ((1, "a"),)),))(store)
        mirror.settle()

        def tick(number: int) -> None:
            clock[0] += 1
            if server.namespace.get(mirror.workspace, f"{ZONE}/t") is None:
                gone.append(clock[0])

        gone: list[float] = []
        server.before = tick
        async with open_store(mirror.driver(drop_wait=60.0)) as store:
            await Changes("full_drop", (("insert", ((1, "x"),)),))(store)
        assert 60 <= gone[-1] - gone[0] < 75


async def test_an_empty_full_drop_drops_the_table(server: DfsServer) -> None:
    mirror = await loaded(server)
    async with open_store(mirror.driver()) as store:
        async with store.staged_write("full_drop", allow_empty=True):
            pass
        mirror.settle()
        assert [name for name in mirror.names() if "." in name] == []
        await Changes("append", (("insert", ((1, "x"),)),))(store)
    mirror.settle()
    assert (mirror.rows(), mirror.wrong("t")) == ([(1, "x")], [])


async def test_rows_are_replaced_without_a_drop_by_deletes_and_upserts_in_one_batch(server: DfsServer) -> None:
    mirror = await loaded(server)
    async with open_store(mirror.driver()) as store:
        async with store.staged_write("append") as tx:
            await tx.replace_rows(
                table_of({3: "C", 4: "D"}), present=pyarrow.table({"id": pyarrow.array([1, 2, 3], "int32")})
            )
        mirror.settle()
        assert mirror.rows() == [(3, "C"), (4, "D")]
        async with store.staged_write("append") as tx:
            await tx.replace_rows(table_of({4: "d"}), present=table_of({3: None, 4: None}))
        mirror.settle()
        assert (mirror.rows(), mirror.wrong()) == ([(4, "d")], [])
        with pytest.raises(InvalidInput, match="'id' is missing"):
            async with store.staged_write("append") as tx:
                await tx.replace_rows(table_of({4: "d"}), present=pyarrow.table({"v": [1]}))


# ------------------------------------------------------------------------------------------------------------- refusals


ROWS = {"id": [1, 2], "v": ["a", "b"]}


@pytest.mark.parametrize(
    ("columns", "marker", "why"),
    [
        ({"v": ["a"]}, "insert", "key column 'id' is missing"),
        ({"id": [1, None], "v": ["a", "b"]}, "insert", "key column 'id' holds nulls"),
        (ROWS, "replace", "row_marker= is one of"),
        (ROWS, None, "a column '__rowMarker__' says"),
        ({**ROWS, "__rowMarker__": [0, 3]}, None, "is 0, 1, 2 or 4, not 3"),
        ({**ROWS, "__rowMarker__": [0, None]}, None, "is 0, 1, 2 or 4, not None"),
        ({**ROWS, "__rowMarker__": ["0", "1"]}, None, "a column of integers"),
        ({**ROWS, "__rowMarker__": [0, 1]}, "insert", "leave row_marker= out"),
        ({"id": pyarrow.array([], "int64")}, "insert", "no rows"),
        ({"id": [1], "v": [[1, 2]]}, "insert", "does not take"),
        ({"id": [1], "v": [timedelta(1)]}, "insert", "does not take"),
    ],
)
async def test_rows_that_the_service_would_stumble_over_are_refused_before_anything_is_published(
    server: DfsServer, columns: dict[str, list[Any]], marker: Any, why: str
) -> None:
    mirror = Mirror(server)
    async with open_store(mirror.driver()) as store:
        with pytest.raises(InvalidInput, match=why):
            async with store.staged_write("append") as tx:
                await tx.write_changes(pyarrow.table(columns), marker)
    assert mirror.names("") == []


async def test_a_marker_column_is_moved_to_the_end(server: DfsServer) -> None:
    mirror = await loaded(server)
    async with open_store(mirror.driver()) as store, store.staged_write("append") as tx:
        rows = {"__rowMarker__": [2, 4, 1], "id": [1, 5, 2], "v": [None, "e", "B"]}
        await tx.write_changes(pyarrow.table(rows))
    mirror.settle()
    assert (mirror.rows(), mirror.wrong()) == ([(2, "B"), (3, "c"), (5, "e")], [])


async def test_files_of_a_users_own_are_refused_under_names_that_are_not_the_sequences(server: DfsServer) -> None:
    mirror = await loaded(server)
    for name, data in (
        ("part.parquet", b"1"),
        (f"{7:020d}.parquet", b"1"),
        ("_metadata.json", b"{}"),
        (f"{3:020d}.parquet", b""),
    ):
        async with open_store(mirror.driver()) as store:
            with pytest.raises(StagingError, match=r"sequence's next name|is empty"):
                async with store.staged_write("append") as tx:
                    await tx.write(name, data)
    mirror.settle()
    assert (mirror.rows(), mirror.wrong()) == (sorted(PRIOR.items()), [])


async def test_what_was_published_is_never_changed(server: DfsServer) -> None:
    mirror = await loaded(server)
    async with open_store(mirror.driver()) as store:
        for mode in ("overwrite_files", "overwrite_partitions"):
            with pytest.raises(Unsupported, match="keeps what was published"):
                await store.begin(mode)
        with pytest.raises(InvalidInput, match="cannot be deleted"):
            async with store.staged_write("append") as tx:
                await tx.delete(f"{2:020d}.parquet")


async def test_a_landing_zone_is_opened_for_its_children_which_share_its_connections(server: DfsServer) -> None:
    mirror = Mirror(server)
    keys = {"orders": ["id"], "dbo.schema/lines": ["id", "v"]}
    async with open_mirror(mirror.url, keys=keys, credential=SAS, drop_poll=0.01) as zone:
        with pytest.raises(Unsupported, match="no table"):
            await zone.begin("append")
        for table in keys:
            await Changes("append", (("upsert", ((1, table),)),))(zone.child(table))
    mirror.settle()
    assert (mirror.rows("orders"), mirror.rows("dbo.lines")) == ([(1, "orders")], [(1, "dbo.schema/lines")])
    assert mirror.wrong() == []


def test_a_table_of_a_landing_zone_is_known_by_its_url() -> None:
    item = f"abfss://ws@onelake.dfs.fabric.microsoft.com/{ITEM}"
    for store in (
        open_store(f"{item}/Files/LandingZone/dbo.schema/t", credential="sig=1", keys=["id"]),
        open_mirror(item, schema="dbo", table="t", keys=["id"], credential="sig=1"),
        open_mirror(f"{item}/Files/LandingZone/", schema="dbo", table="t", keys=["id"], credential="sig=1"),
    ):
        assert type(store._driver) is OpenMirroringDriver
        assert store.url == f"{item}/Files/LandingZone/dbo.schema/t"


def test_options_that_make_no_sense_are_refused() -> None:
    url = f"abfss://ws@onelake.dfs.fabric.microsoft.com/{ITEM}"
    options: list[dict[str, Any]] = [{"keys": "id"}, {"detection": "time"}, {"scratch": "tmp"}]
    for wrong in options:
        with pytest.raises(InvalidInput):
            open_mirror(url, table="t", **wrong)


async def test_staging_lies_where_the_service_does_not_look(server: DfsServer) -> None:
    for scratch, place in (("_tmp", f"{ITEM}/Files/_tmp/t/"), ("_scratchPad", f"{ZONE}/_scratchPad/t/")):
        mirror = Mirror(server, every=1)
        async with open_store(mirror.driver(scratch=scratch)) as store:
            for work in (LOAD, *WORKS):
                with pytest.raises(StagedError):
                    async with store.staged_write(work.mode) as tx:
                        await tx.write_table(table_of({1: "a"}))
                        below = server.namespace.paths(mirror.workspace, place)
                        assert any("/staging/" in name for name in below)
                        raise StagingError("not now")
                await work(store)
                mirror.settle()
        assert mirror.rows() == [(7, "G"), (8, "H")]
        assert mirror.wrong("t") == []
