"""Open Mirroring where several things come together: whoever is late, stopped, blocked or waiting loses and doubles no row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import aclosing
from functools import partial

import pytest
from dfs import DfsServer
from mirror import LOAD, WORKS, ZONE, Changes, Mirror, table_of

from staged import CommitBlocked, CommitIncomplete, open_store
from staged.model import Resolve
from staged.testing.faults import FaultDriver, Gate, Moment

pytestmark = pytest.mark.anyio

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
