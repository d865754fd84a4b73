"""What only a real directory can show: swaps, links, locks, syncs, and places that cannot be used."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from staged import (
    CommitBlocked,
    DamagedRecord,
    InvalidInput,
    StagedError,
    StagingError,
    Unsupported,
    open_store,
    pinned,
)
from staged.drivers._posix import CountedLock
from staged.drivers._slots import SLOT
from staged.drivers.local import LocalDriver
from staged.errors import StorageError
from staged.model import Decided, Prepared
from staged.store import Store
from staged.testing.faults import FaultDriver, Moment

pytestmark = pytest.mark.anyio


def tree(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}


async def read(root: Path) -> dict[str, str]:
    return await anyio.to_thread.run_sync(tree, root)


async def load(store: Store, mode: str, **files: str) -> None:
    async with store.staged_write(mode) as tx:
        for name, text in files.items():
            await tx.write(name, text)


# --------------------------------------------------------------------------------------------------------------- swaps


async def test_full_drop_swaps_the_tree_and_carries_the_targets_mode_owner_and_attributes_along(tmp_path: Path) -> None:
    target = tmp_path / "target"
    store = open_store(target)
    await load(store, "full_drop", a="1")
    before = target.stat().st_ino
    target.chmod(0o2750)
    os.setxattr(target, "user.owner", b"me")
    os.setxattr(target, "user.empty", b"")
    owner = (4_001, 4_002) if os.geteuid() == 0 else (os.geteuid(), os.getgroups()[-1])
    os.chown(target, *owner)
    target.chmod(0o2750)  # giving a directory away clears its bits
    await load(store, "full_drop", b="2")
    assert target.stat().st_ino != before
    assert (target.stat().st_uid, target.stat().st_gid) == owner
    assert os.getxattr(target, "user.empty") == b""
    assert stat.S_IMODE(target.stat().st_mode) == 0o2750
    assert os.getxattr(target, "user.owner") == b"me"
    assert await read(target) == {"b": "2"}
    assert stat.S_IMODE((tmp_path / "_staged" / "target").stat().st_mode) == 0o700


async def test_a_pinned_reader_sees_one_generation_whole_however_often_it_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "target"
    store = open_store(target, durability="none")
    await load(store, "full_drop", a="0", b="0")

    def wander(done: threading.Event, seen: list[set[str]]) -> None:
        while not done.is_set():
            with pinned(target) as directory:
                names = os.listdir(directory)
                seen.append({Path(directory, name).read_text() for name in names})

    done, seen = threading.Event(), list[set[str]]()
    pin = pinned(target)
    first = await anyio.to_thread.run_sync(pin.__enter__)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, wander, done, seen)
            for n in range(1, 30):
                await load(store, "full_drop", a=str(n), b=str(n))
            done.set()
        # What the other reader had pinned at the last commit goes with one more.
        await load(store, "full_drop", a="30", b="30")
        assert await anyio.Path(first, "a").read_text() == "0", "the pinned tree was removed"
    finally:
        await anyio.to_thread.run_sync(pin.__exit__, None, None, None)
    assert all(len(generation) == 1 for generation in seen)
    assert len({min(generation) for generation in seen}) > 1
    old = tmp_path / "_staged" / "target" / "old"
    assert len(await anyio.to_thread.run_sync(os.listdir, old)) == 2, "the pinned tree, and keep_old=1"
    await store.gc(older_than=timedelta(0))
    assert await anyio.to_thread.run_sync(os.listdir, old) == []


async def test_append_moves_a_wholly_new_directory_as_one_and_merges_into_one_that_is_there(tmp_path: Path) -> None:
    target = tmp_path / "target"
    store = open_store(target)
    async with store.staged_write("append") as tx:
        for n in range(5):
            await tx.write(f"p=0/deep/f{n}", "0")
        await tx.write("p=1/f", "0")
    async with store.staged_write("append") as tx:
        await tx.write("p=0/deep/g", "1")
        await tx.write("p=0/new/g", "1")
        await tx.write("p=2/f", "1")
    assert await read(target) == {
        **{f"p=0/deep/f{n}": "0" for n in range(5)},
        "p=1/f": "0",
        "p=0/deep/g": "1",
        "p=0/new/g": "1",
        "p=2/f": "1",
    }


# --------------------------------------------------------------------------------------------------- places and strangers


async def test_a_target_whose_parent_cannot_be_written_holds_its_control_area_and_moves_entries(tmp_path: Path) -> None:
    target = tmp_path / "target"
    (target / "_staged" / "_staged").mkdir(parents=True)
    (target / "_staged" / "_staged" / "head").touch()
    store = open_store(target)
    assert not (await store.capabilities()).swaps_trees
    await load(store, "full_drop", a="1", b="1")
    await load(store, "full_drop", b="2")
    await load(store, "append", c="3")
    files = {name: text for name, text in (await read(target)).items() if not name.startswith("_staged/")}
    assert files == {"b": "2", "c": "3"}
    assert not (tmp_path / "_staged").exists()
    with pytest.raises(Unsupported):
        async with store.staged_write("full_drop", require=["one_generation"]):
            pytest.fail("the block was entered")


async def test_a_target_that_is_a_file_or_lies_in_a_control_area_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(Unsupported, match="is a file"):
        await open_store(tmp_path / "file").capabilities()
    with pytest.raises(Unsupported, match="control area"):
        await open_store(tmp_path / "_staged" / "x").capabilities()
    with pytest.raises(InvalidInput, match="lies in the target"):
        await open_store(tmp_path / "t", staging=str(tmp_path / "t" / "staging")).capabilities()
    with pytest.raises(InvalidInput, match="durability"):
        open_store(tmp_path, durability="some")
    with pytest.raises(InvalidInput, match="nonsense"):
        open_store(tmp_path, nonsense=1)


@pytest.mark.parametrize("name", ["my lake", "100%25", "ö", "a?b#c", "\udcff", "~"])
async def test_the_file_url_of_a_path_names_that_path(tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    assert open_store(target.as_uri()).url == open_store(target.as_uri().replace("file:", "FILE:")).url == str(target)
    await load(open_store(target.as_uri()), "append", a="1")
    assert await read(target) == {"a": "1"}


@pytest.mark.parametrize("url", ["file:rel", "file:/abs", "file://rel", "file://host/x", "file:x:///y", "FILE:rel"])
def test_a_file_url_that_names_no_absolute_path_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match="absolute"):
        open_store(url)
    with pytest.raises(InvalidInput, match="absolute"), pinned(url):
        pytest.fail("the block was entered")


def test_a_directory_is_pinned_under_every_name_that_a_store_opens_it_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "my lake"
    target.mkdir()
    for name in (target, str(target), "my lake", "~/my lake", target.as_uri()):
        with pinned(name) as directory:
            assert os.path.samefile(directory, target), name
    for name in ("memory://x", "://x"):
        with pytest.raises((InvalidInput, Unsupported)), pinned(name):
            pytest.fail("the block was entered")


async def test_every_spelling_of_a_target_shares_one_control_area(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    await load(open_store(tmp_path / "link" / "target"), "append", a="1")
    await load(open_store(f"{tmp_path}/real//target/"), "append", b="1")
    await load(open_store(f"file://{tmp_path}/real/target"), "append", c="1")
    assert (await open_store(tmp_path / "real").child("target").status()).commits == 3
    (tmp_path / "alias").symlink_to("real/target")
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "real" / "below").symlink_to(tmp_path / "elsewhere" / "deep")
    monkeypatch.chdir(tmp_path / "real")
    spellings = [
        "target",
        "./target/",
        "../link/target",
        "below/../../real/target",
        "target/../target",
        "//" + os.getcwd() + "/target",
    ]
    spellings += [str(tmp_path / "alias"), f"{tmp_path}/elsewhere/../alias/"]
    stores = [await anyio.to_thread.run_sync(open_store, spelling) for spelling in spellings]
    monkeypatch.chdir(tmp_path)  # a relative target is the one that it was when the store was opened
    for number, store in enumerate(stores):
        assert (await store.status()).commits == 3 + number, store.url
        await load(store, "append", **{f"n{number}": "1"})
    areas = [str(path.relative_to(tmp_path)) async for path in anyio.Path(tmp_path).rglob("_staged")]
    assert areas == ["real/_staged"]
    assert os.listdir(tmp_path / "real" / "_staged") == ["target"]


async def test_a_symbolic_link_in_the_target_or_the_staging_never_leads_out(tmp_path: Path) -> None:
    target, outside = tmp_path / "target", tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    store = open_store(target)
    await load(store, "append", a="1")
    (target / "link").symlink_to(outside)
    (target / "dangling").symlink_to(outside / "nowhere")
    with pytest.raises(StagedError) as caught:
        async with store.staged_write("append") as tx:
            await tx.write("link/x", "1")
    assert caught.value.outcome == "untouched"
    with pytest.raises(StagedError) as caught:
        async with store.staged_write("append") as tx, tx.path("b") as local:
            await anyio.Path(local).symlink_to(outside / "kept")
    assert caught.value.outcome == "untouched"
    async with store.staged_write("overwrite_partitions", partitions=["p"], allow_empty=True):
        pass
    async with store.staged_write("full_drop") as tx:
        await tx.write("z", "1")
    await store.gc(older_than=timedelta(0))
    assert await read(outside) == {"kept": "kept"}


async def test_a_partition_that_is_a_link_or_a_file_is_refused_before_the_decision(tmp_path: Path) -> None:
    target, outside = tmp_path / "target", tmp_path / "outside"
    (outside / "p").mkdir(parents=True)
    (outside / "kept").write_text("kept")
    (outside / "p" / "kept").write_text("kept")
    store = open_store(target)
    await load(store, "append", **{"real/x": "1", "file": "1"})
    (target / "link").symlink_to(outside)
    (target / "loop").symlink_to("loop")
    (target / "inner").symlink_to("real")
    before = await read(target)
    for partition in ("link", "link/p", "loop", "inner", "file", "file/p"):
        for empty in (True, False):
            with pytest.raises(StagedError) as caught:
                async with store.staged_write("overwrite_partitions", partitions=[partition], allow_empty=True) as tx:
                    if not empty:
                        await tx.write(f"{partition}/new", "1")
            assert (caught.value.outcome, caught.value.retryable) == ("untouched", False), partition
            assert (await read(target), await read(outside)) == (before, {"kept": "kept", "p/kept": "kept"})
    assert (await store.status()).commits == 1
    assert {path.name for path in target.iterdir()} == {"real", "file", "link", "loop", "inner"}


async def test_a_link_swapped_in_for_a_directory_while_writing_never_leads_out(tmp_path: Path) -> None:
    target, outside = tmp_path / "target", tmp_path / "outside"
    outside.mkdir()
    (target / "d").mkdir(parents=True)
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            for make in (lambda: (target / "d").symlink_to(outside), lambda: (target / "d").mkdir(exist_ok=True)):
                try:
                    (target / "d").unlink() if (target / "d").is_symlink() else os.rename(
                        target / "d", tmp_path / "away"
                    )
                except OSError:
                    pass
                try:
                    make()
                except OSError:
                    pass
                subprocess.run(["rm", "-rf", tmp_path / "away"], check=True)

    store = open_store(target, durability="none")
    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for n in range(60):
            try:
                await load(store, "append", **{f"d/f{n}": "1"})
            except StagedError:
                await store.recover(resolve="keep")
    finally:
        done.set()
        await anyio.to_thread.run_sync(thread.join)
    assert list(outside.iterdir()) == []


async def test_a_foreign_file_in_the_way_blocks_a_decided_commit_until_somebody_says_what_to_do(tmp_path: Path) -> None:
    for resolve, wanted in (("keep", "foreign"), ("replace", "ours")):
        target = tmp_path / resolve
        target.mkdir()

        async def intrude(name: str, moment: Moment, target: Path = target) -> None:
            if (name, moment) == ("publish", "before"):
                await anyio.Path(target / "d").mkdir(exist_ok=True)
                await anyio.Path(target / "d" / "a").write_text("foreign")

        store = open_store(FaultDriver(LocalDriver(str(target)), intrude))
        with pytest.raises(CommitBlocked) as caught:
            async with store.staged_write("append") as tx:
                await tx.write("d/a", "ours")
                await tx.write("b", "ours")
        assert caught.value.paths == ("d/a",)
        assert caught.value.outcome == "committed"
        assert tx.receipt.phase == "committing"
        with pytest.raises(StagedError, match="must be completed first"):
            await load(open_store(target), "append", c="1")
        with pytest.raises(CommitBlocked):
            await open_store(target).recover()
        assert (await open_store(target).recover(resolve=resolve)).finished == (tx.id,)  # type: ignore[arg-type]
        text = await anyio.Path(target / "d" / "a").read_text()
        assert (text, await anyio.Path(target / "b").read_text()) == (wanted, "ours")
        outcome = await open_store(target).outcome(tx.id)
        assert outcome.receipt is not None
        assert outcome.receipt.left == (resolve == "keep")
        await load(open_store(target), "append", c="1")


async def test_a_record_whose_first_writes_were_lost_is_none_and_one_that_was_durable_and_is_damaged_is_refused(
    tmp_path: Path,
) -> None:
    def lose(head: Path, left: bytes) -> None:
        head.parent.mkdir(parents=True)
        with head.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, 4 * SLOT)
            file.seek(2 * SLOT)
            file.write(left)

    for left in (b"", b"slot 1 9 torn"):
        target = tmp_path / f"target{len(left)}"
        head = tmp_path / "_staged" / target.name / "head"
        await anyio.to_thread.run_sync(lose, head, left)
        assert (await open_store(target).status()).epoch == 0
        await load(open_store(target), "append", a="1")
        assert await read(target) == {"a": "1"}
        head.write_bytes(b"?" * 4 * SLOT)
        with pytest.raises(DamagedRecord):
            await open_store(target).status()


async def test_a_staged_file_that_changes_or_appears_behind_our_back_is_refused_before_the_decision(
    tmp_path: Path,
) -> None:
    target = tmp_path / "target"
    store = open_store(target)
    staging = tmp_path / "_staged" / "target" / "tx"
    for disturb in ("change", "add", "remove"):
        with pytest.raises(StagingError):
            async with store.staged_write("append") as tx:
                await tx.write("a", "1")
                tree_path = anyio.Path(staging / tx.id / "tree")
                if disturb == "change":
                    await (tree_path / "a").write_text("2")
                elif disturb == "add":
                    await (tree_path / "b").write_text("2")
                else:
                    await (tree_path / "a").unlink()
    assert not target.exists()


# ---------------------------------------------------------------------------------------------------------------- locks


async def test_a_thread_that_outlives_its_caller_keeps_the_lock_and_none_starts_after_release(tmp_path: Path) -> None:
    path = tmp_path / "lock"

    def take() -> CountedLock | None:
        return CountedLock.take(os.open(path, os.O_RDWR | os.O_CREAT))

    lock = take()
    assert lock is not None
    assert take() is None, "a second open of the same file in one process must not pass"
    with lock.work():
        lock.release()
        assert take() is None, "released while work runs under it"
    again = take()
    assert again is not None
    again.release()
    with pytest.raises(StorageError), lock.work():
        pytest.fail("work started after release")


def test_a_lock_that_is_released_is_free_although_a_copy_of_its_descriptor_is_still_open(tmp_path: Path) -> None:
    def opened() -> int:
        return os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)

    file = opened()
    copy = os.dup(file)  # as a child has one that is being forked right now
    lock = CountedLock.take(file)
    assert lock is not None
    lock.release()
    again = CountedLock.take(opened())
    assert again is not None
    again.release()
    os.close(copy)


def test_a_forked_child_has_no_lock_of_its_parents_can_unlock_none_and_keeps_none_alive(tmp_path: Path) -> None:
    program = f"""
import os, signal, sys, time
from staged.drivers._posix import CountedLock
from staged.errors import StorageError
take = lambda: CountedLock.take(os.open({str(tmp_path / "lock")!r}, os.O_RDWR | os.O_CREAT))
lock = take()
forked, outlived = os.pipe(), os.pipe()
if (child := os.fork()) == 0:
    try:
        with lock.work():
            os.write(forked[1], b"the child works under it")
    except StorageError:
        pass
    lock.release()
    lock.release()
    os.write(forked[1], b".")
    os.close(outlived[1])
    os.read(outlived[0], 1)  # until the parent dies
    for _ in range(1_000):
        if (again := take()) is not None:
            break
        time.sleep(0.005)
    os.write(1, b"taken" if again is not None else b"kept alive by the child of a dead parent")
    os._exit(0)
assert os.read(forked[0], 100) == b"."
assert take() is None, "the child unlocked it"
os.kill(os.getpid(), signal.SIGKILL)
"""
    died = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=False)
    assert (died.returncode, died.stdout) == (-signal.SIGKILL, b"taken")


async def test_recover_never_touches_a_live_transaction_and_clears_a_dead_one_at_once(tmp_path: Path) -> None:
    target = tmp_path / "target"
    live = await open_store(target).begin("append")
    await live.write("a", "1")
    program = f"""
import anyio, os, signal
from staged import open_store
async def main():
    async with open_store({str(target)!r}).staged_write("append") as tx:
        await tx.write("dead", "1")
        print(tx.id, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
anyio.run(main)
"""
    died = await anyio.run_process([sys.executable, "-c", program], check=False)
    dead = died.stdout.decode().strip()
    store = open_store(target)
    status = {transaction.id: transaction.alive for transaction in (await store.status()).transactions}
    assert status == {live.id: True, dead: False}
    recovered = await store.recover()
    assert (recovered.alive, recovered.rolled_back) == ((live.id,), (dead,))
    assert (await store.outcome(dead)).state == "rolled_back"
    await live.commit()
    assert await read(target) == {"a": "1"}


async def test_one_damaged_record_of_a_transaction_does_not_keep_the_others_from_being_recovered(
    tmp_path: Path,
) -> None:
    target = tmp_path / "target"
    program = f"""
import anyio, os, signal
from staged import open_store
async def main():
    store = open_store({str(target)!r})
    for _ in range(5):
        tx = await store.staged_write("append").__aenter__()
        await tx.write("dead", "1")
        print(tx.id)
    print(flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
anyio.run(main)
"""
    died = await anyio.run_process([sys.executable, "-c", program], check=False)
    ids = sorted(died.stdout.decode().split())
    damaged = {ids[0]: b"damaged", ids[2]: b"slot 1 3 0\n" * 100}
    for tx, garbage in damaged.items():
        await anyio.Path(tmp_path / "_staged" / "target" / "tx" / tx / "record").write_bytes(garbage)
    store = open_store(target)
    status = await store.status()
    assert set(status.damaged) == damaged.keys()
    assert {transaction.id for transaction in status.transactions} == set(ids) - damaged.keys()
    recovered = await store.recover()
    assert set(recovered.rolled_back) == set(ids) - damaged.keys()
    assert set(recovered.damaged) == damaged.keys()
    assert set((await store.gc(older_than=timedelta(0))).damaged) == damaged.keys(), "nothing is known of them"
    await load(store, "append", a="1")
    assert await read(target) == {"a": "1"}


async def leftovers(area: anyio.Path) -> set[str]:
    """What a process leaves in the control area that died within a single call."""
    return {str(path.relative_to(area)) async for path in area.rglob("*.tmp")}


async def test_gc_sweeps_what_a_call_left_that_was_killed_halfway_and_nothing_of_one_that_lives(tmp_path: Path) -> None:
    target, area = tmp_path / "target", anyio.Path(tmp_path / "_staged" / "target")
    store = open_store(target)
    await load(store, "full_drop", a="1")
    locks: list[CountedLock] = []
    for directory in (area, area / "log", area / "outcome"):
        for name in ("dead", "live"):
            await (directory / f"{name}-0.0123abcd.tmp").write_bytes(b"half")
        lock = CountedLock.take(os.open(directory / "live-0.0123abcd.tmp", os.O_RDWR))
        assert lock is not None
        locks.append(lock)
    before, laid = await read(target), await leftovers(area)
    assert len(laid) == 6
    await store.recover()
    assert await leftovers(area) == laid, "only gc sweeps"
    for age in (timedelta(days=1), timedelta(0)):
        await store.gc(older_than=age)
        assert await leftovers(area) == {name for name in laid if "live" in name}
    for lock in locks:
        lock.release()
    await store.gc()
    assert await leftovers(area) == set()
    assert await read(target) == before
    await load(store, "append", b="1")


async def test_loop_shutdown_in_a_commit_leaves_old_or_new_and_no_lock(tmp_path: Path) -> None:
    program = """
import asyncio, sys
from staged import open_store
from staged.model import Decided, Prepared
async def main():
    loop = asyncio.get_running_loop()
    def stop(event):
        if type(event).__name__ == sys.argv[2]:
            loop.stop()
    async with open_store(sys.argv[1], observers=[stop]).staged_write("append") as tx:
        await tx.write("a", "1")
try:
    asyncio.run(main())
except RuntimeError as error:
    print(error)
"""
    for event, wanted in ((Prepared, {}), (Decided, {"a": "1"})):
        target = tmp_path / event.__name__
        done = await anyio.run_process(
            [sys.executable, "-W", "ignore", "-c", program, str(target), event.__name__], check=False
        )
        assert b"stopped before" in done.stdout, done
        store = open_store(target)
        await store.recover()
        assert await read(target) == wanted if target.exists() else wanted == {}
        await load(store, "append", b="2")
        assert await read(target) == wanted | {"b": "2"}


async def blocked_by(target: Path, act: Callable[[], Awaitable[object]]) -> None:
    """Something happens to the target between the decision of a full_drop and its swap."""

    async def gate(name: str, moment: Moment) -> None:
        if (name, moment) == ("swap", "before"):
            await act()

    store = open_store(FaultDriver(LocalDriver(str(target), durability="none"), gate))
    with pytest.raises(CommitBlocked):
        async with store.staged_write("full_drop") as tx:
            await tx.write("new", b"new")


async def test_a_strangers_directory_in_the_targets_place_is_not_swapped_away(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()

    async def replace() -> None:
        await anyio.Path(target).rename(tmp_path / "away")
        await anyio.Path(target).mkdir()
        await anyio.Path(target / "theirs").write_bytes(b"theirs")

    await blocked_by(target, replace)
    assert await anyio.to_thread.run_sync(tree, target) == {"theirs": "theirs"}


async def test_a_target_that_was_begun_below_meanwhile_is_not_swapped_away(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()

    async def begin_below() -> None:
        async with open_store(target).child("below").staged_write("append") as tx:
            await tx.write("theirs", b"theirs")

    await blocked_by(target, begin_below)
    assert (target / "below" / "theirs").read_bytes() == b"theirs"


async def test_a_store_whose_staging_lies_elsewhere_has_no_children_that_it_could_not_see(tmp_path: Path) -> None:
    with pytest.raises(Unsupported):
        open_store(tmp_path / "lake", staging=str(tmp_path / "elsewhere")).child("flights")
