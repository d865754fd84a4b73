"""Open Mirroring where several things come together: whoever is late, stopped, blocked or waiting loses and doubles no row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import aclosing

import pytest
from dfs import DfsServer
from mirror import LOAD, WORKS, ZONE, Changes, Mirror, table_of

from staged import CommitIncomplete, open_store

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


async def recovered(mirror: Mirror) -> None:
    """What another process does, and what the service does then."""
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
