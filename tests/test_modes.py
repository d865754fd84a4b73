"""Every mode does what its one line on the design page says, over memory and over a real directory."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from staged import Conflict, Exists, InvalidInput, StagedError, StagingError, open_store
from staged.drivers.local import LocalDriver
from staged.drivers.memory import MemoryDriver, MemoryStorage
from staged.model import Mode
from staged.store import Store
from staged.testing.exploration import Work

NAMES = st.sampled_from(["a", "b", "p=0/x", "p=0/y", "p=1/x", "p=1/deep/z"])
FILES = st.dictionaries(NAMES, st.binary(max_size=4), max_size=4)
Files = dict[str, bytes]


@contextmanager
def local(prior: Files) -> Iterator[tuple[Store, str]]:
    root = tempfile.mkdtemp()
    try:
        target = f"{root}/target"
        for name, data in prior.items():
            os.makedirs(os.path.dirname(f"{target}/{name}"), exist_ok=True)
            with open(f"{target}/{name}", "wb") as file:
                file.write(data)
        yield open_store(target, durability="none"), target
    finally:
        shutil.rmtree(root)


def read_back(target: str) -> Files:
    found = {}
    for directory, _, files in os.walk(target):
        for name in files:
            path = os.path.join(directory, name)
            with open(path, "rb") as file:
                found[os.path.relpath(path, target)] = file.read()
    return found


def expected(work: Work, prior: Files) -> Files | None:
    """The oracle, and what it leaves out: nothing staged under a replacing mode, files at the root of partitions."""
    if not work.files and work.mode in (Mode.FULL_DROP, Mode.OVERWRITE_PARTITIONS):
        return None
    directories = {name.rpartition("/")[0] for name, _ in work.files}
    if work.mode is Mode.OVERWRITE_PARTITIONS and (
        "" in directories or any(a != b and a.startswith(f"{b}/") for a in directories for b in directories)
    ):
        return None
    return work.apply(prior)


@settings(max_examples=150, deadline=None)
@given(mode=st.sampled_from(list(Mode)), staged=FILES, prior=FILES)
def test_every_mode_makes_of_a_target_what_the_oracle_says(mode: Mode, staged: Files, prior: Files) -> None:
    work = Work(mode, tuple(sorted(staged.items())))
    wanted = expected(work, prior)

    async def attempt(store: Store) -> StagedError | None:
        async with store:
            try:
                await work(store)
            except (Conflict, StagingError, InvalidInput) as error:
                assert error.outcome == "untouched"
                return error
            return None

    for swap in ("exchange", "renames", None):
        storage = MemoryStorage()
        for name, data in prior.items():
            storage.put(f"target/{name}", data)
        refused = anyio.run(attempt, open_store(MemoryDriver(storage=storage, swap=swap)))  # type: ignore[arg-type]
        assert (refused is None) == (wanted is not None), refused
        assert storage.below("target") == (prior if wanted is None else wanted)
    with local(prior) as (store, target):
        refused = anyio.run(attempt, store)
        assert (refused is None) == (wanted is not None), refused
        assert read_back(target) == (prior if wanted is None else wanted)


@pytest.fixture(params=["memory", "local"])
def store(request: pytest.FixtureRequest, tmp_path: os.PathLike[str]) -> Store:
    if request.param == "local":
        return open_store(LocalDriver(f"{tmp_path}/lake/target", durability="none"))
    return open_store(MemoryDriver(storage=MemoryStorage()))


pytestmark = pytest.mark.anyio


async def names(store: Store) -> set[str]:
    found: set[str] = set()
    async for page in store._driver.list():
        found.update(listed.path for listed in page if not listed.is_dir)
    return found


async def test_append_refuses_a_taken_name_before_the_decision(store: Store) -> None:
    async with store.staged_write("append") as tx:
        await tx.write("a", b"1")
    with pytest.raises(Exists) as caught:
        async with store.staged_write("append") as tx:
            await tx.write("a", b"2")
            await tx.write("b", b"2")
    assert caught.value.outcome == "untouched"
    assert caught.value.transaction == tx.id
    assert await names(store) == {"a"}


async def test_ignore_writes_nothing_on_a_full_target_and_says_so(store: Store) -> None:
    async with store.staged_write("ignore") as tx:
        await tx.write("a", b"1")
    assert not tx.skipped
    async with store.staged_write("ignore") as tx:
        await tx.write("b", b"1")
    assert tx.skipped
    assert tx.receipt.phase == "skipped"
    assert await names(store) == {"a"}


async def test_error_refuses_a_full_target_at_begin_and_leaves_no_transaction(store: Store) -> None:
    async with store.staged_write("error") as tx:
        await tx.write("a", b"1")
    with pytest.raises(Exists):
        async with store.staged_write("error"):
            pytest.fail("the block was entered")
    assert (await store.status()).transactions == ()


async def test_a_listed_partition_without_files_is_emptied(store: Store) -> None:
    async with store.staged_write("append") as tx:
        for day in range(3):
            await tx.write(f"day={day}/f", b"old")
    async with store.staged_write("overwrite_partitions", partitions=["day=0", "day=1"]) as tx:
        await tx.write("day=0/g", b"new")
    assert await names(store) == {"day=0/g", "day=2/f"}
    assert tx.receipt.removed == 2


async def test_files_outside_the_named_partitions_are_refused(store: Store) -> None:
    with pytest.raises(InvalidInput):
        async with store.staged_write("overwrite_partitions", partitions=["day=0"]) as tx:
            await tx.write("day=1/f", b"")
    assert await names(store) == set()


async def test_a_replacing_mode_with_nothing_staged_needs_allow_empty(store: Store) -> None:
    async with store.staged_write("append") as tx:
        await tx.write("a", b"1")
    with pytest.raises(StagingError):
        async with store.staged_write("full_drop"):
            pass
    assert await names(store) == {"a"}
    async with store.staged_write("overwrite", allow_empty=True) as tx:
        pass
    assert await names(store) == set()
    assert tx.receipt.phase == "committed"


async def test_a_delete_happens_with_the_commit_or_not_at_all(store: Store) -> None:
    async with store.staged_write("append") as tx:
        await tx.write("a", b"1")
        await tx.write("b", b"1")
    with pytest.raises(Conflict):
        async with store.staged_write("append") as tx:
            await tx.write("c", b"1")
            await tx.delete("a")
            await tx.delete("nowhere")
    assert await names(store) == {"a", "b"}
    async with store.staged_write("append") as tx:
        await tx.delete("a")
    assert await names(store) == {"b"}
    assert tx.receipt.removed == 1


async def test_the_plan_shows_what_a_commit_would_do_and_does_nothing(store: Store) -> None:
    async with store.staged_write("append") as tx:
        await tx.write("p/a", b"1")
        await tx.write("p/b", b"1")
    tx = await store.begin("overwrite_partitions")
    await tx.write("p/b", b"2")
    plan = await tx.plan()
    assert [entry.path for entry in plan.publish] == ["p/b"]
    assert list(plan.replaces) == ["p/b"]
    assert [listed.path for listed in plan.remove] == ["p/a"]
    assert await names(store) == {"p/a", "p/b"}
    await tx.rollback()


async def test_a_child_is_a_target_of_its_own_that_its_parent_will_not_destroy(store: Store) -> None:
    async with store.child("flights").staged_write("append") as tx:
        await tx.write("f", b"1")
    with pytest.raises(Conflict, match="control area"):
        async with store.staged_write("full_drop") as tx:
            await tx.write("a", b"1")
    assert "flights/f" in await names(store)
    async with store.staged_write("append") as tx:
        await tx.write("a", b"1")
    assert {"flights/f", "a"} <= await names(store)
