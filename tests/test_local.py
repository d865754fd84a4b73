"""What only a real directory can show: swaps, links, locks, syncs, and places that cannot be used."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
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


async def test_full_drop_swaps_the_tree_and_carries_the_targets_mode_along(tmp_path: Path) -> None:
    target = tmp_path / "target"
    store = open_store(target)
    await load(store, "full_drop", a="1")
    before = target.stat().st_ino
    target.chmod(0o2750)
    os.setxattr(target, "user.owner", b"me")
    await load(store, "full_drop", b="2")
    assert target.stat().st_ino != before
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


async def test_every_spelling_of_a_target_shares_one_control_area(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    await load(open_store(tmp_path / "link" / "target"), "append", a="1")
    await load(open_store(f"{tmp_path}/real//target/"), "append", b="1")
    await load(open_store(f"file://{tmp_path}/real/target"), "append", c="1")
    assert (await open_store(tmp_path / "real").child("target").status()).commits == 3
    (tmp_path / "alias").symlink_to("real/target")
    assert (await open_store(tmp_path / "alias").status()).commits == 3


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


def test_a_forked_child_does_not_keep_a_lock_alive(tmp_path: Path) -> None:
    program = f"""
import os, sys
from staged.drivers._posix import CountedLock
from staged.drivers.local import LocalDriver
take = lambda: CountedLock.take(os.open({str(tmp_path / "lock")!r}, os.O_RDWR | os.O_CREAT))
lock = take()
read, write = os.pipe()
ready, forked = os.pipe()
if os.fork() == 0:
    os.write(forked, b"x")
    os.read(read, 1)  # outlives the release
    os._exit(0)
os.read(ready, 1)
lock.release()
assert take() is not None, "the child kept it"
os.write(write, b"x")
"""
    subprocess.run([sys.executable, "-c", program], check=True)


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
