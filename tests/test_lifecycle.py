"""The life of a transaction: how blocks end, what outlives a process, what is done only once."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Literal

import aiofiles
import anyio
import anyio.lowlevel
import numpy
import pytest
import trio
import trio.testing

from staged import (
    Busy,
    Conflict,
    Fenced,
    InvalidInput,
    InvalidPath,
    StagedError,
    StagingError,
    StorageError,
    Unsupported,
    ValidationFailed,
    WrongState,
    open_store,
)
from staged.control import Target
from staged.drivers.local import LocalDriver
from staged.drivers.memory import MemoryDriver, MemoryStorage
from staged.lifecycle import Transaction
from staged.model import Decided, Entry, Event, Finished, Prepared, Published, Staged
from staged.recovery import abort, collect
from staged.states import Phase
from staged.store import Store
from staged.testing.faults import FaultDriver, Moment

pytestmark = pytest.mark.anyio


class World:
    """One target that several processes open."""

    def __init__(self, kind: str, root: str) -> None:
        self.kind, self.root, self.storage = kind, root, MemoryStorage()

    def process(self, observers: tuple[Callable[[Event], None], ...] = ()) -> Store:
        if self.kind == "local":
            return open_store(LocalDriver(f"{self.root}/target", durability="none"), observers=observers)
        return open_store(MemoryDriver(storage=self.storage), observers=observers)

    def files(self) -> dict[str, bytes]:
        if self.kind == "memory":
            return self.storage.below("target")
        found = {}
        for directory, _, files in os.walk(f"{self.root}/target"):
            for name in files:
                path = os.path.join(directory, name)
                with open(path, "rb") as file:
                    found[os.path.relpath(path, f"{self.root}/target")] = file.read()
        return found

    def leftovers(self) -> list[str]:
        """Staging that belongs to no transaction that could still be resumed."""
        if self.kind == "memory":
            return [*self.storage.uploads, *(key for key in self.storage.records if "/tx/" in key), *self.storage.locks]
        transactions = f"{self.root}/_staged/target/tx"
        return os.listdir(transactions) if os.path.isdir(transactions) else []


@pytest.fixture(params=["memory", "local"])
def world(request: pytest.FixtureRequest, tmp_path: os.PathLike[str]) -> World:
    return World(request.param, str(tmp_path))


# ------------------------------------------------------------------------------------------------------ how a block ends


async def test_an_exception_of_the_users_leaves_the_block_unchanged_and_the_target_as_it_was(world: World) -> None:
    store = world.process()
    mine = KeyError("mine")
    with pytest.raises(KeyError) as caught:
        async with store.staged_write("append") as tx:
            await tx.write("a", b"1")
            raise mine
    assert caught.value is mine
    assert not hasattr(mine, "__notes__")
    assert tx.receipt.phase == "rolled_back"
    assert (await anyio.to_thread.run_sync(world.files), await anyio.to_thread.run_sync(world.leftovers)) == ({}, [])


async def test_a_cancelled_block_rolls_back_and_goes_on_being_cancelled(world: World) -> None:
    store = world.process()
    with anyio.CancelScope() as scope:
        async with store.staged_write("append") as tx:
            await tx.write("a", b"1")
            scope.cancel()
            await anyio.sleep(1)
    assert scope.cancelled_caught
    assert tx.receipt.phase == "rolled_back"
    assert (await anyio.to_thread.run_sync(world.files), await anyio.to_thread.run_sync(world.leftovers)) == ({}, [])


async def test_a_cancellation_after_the_decision_completes_and_is_raised(world: World) -> None:
    with anyio.CancelScope() as scope:

        def cancel(event: Event) -> None:
            if isinstance(event, Decided):
                scope.cancel()

        async with world.process((cancel,)).staged_write("append") as tx:
            await tx.write("a", b"1")
    assert scope.cancelled_caught
    assert tx.receipt.phase == "committed"
    assert await anyio.to_thread.run_sync(world.files) == {"a": b"1"}


async def test_a_cancellation_before_the_decision_leaves_the_target_as_it_was(world: World) -> None:
    with anyio.CancelScope() as scope:

        def cancel(event: Event) -> None:
            if isinstance(event, Prepared):
                scope.cancel()

        async with world.process((cancel,)).staged_write("append") as tx:
            await tx.write("a", b"1")
    assert scope.cancelled_caught
    # Over memory nothing is ever waited for: the commit is over before a cancellation can be delivered.
    ended = {"local": ("rolled_back", {}), "memory": ("committed", {"a": b"1"})}[world.kind]
    assert (tx.receipt.phase, await anyio.to_thread.run_sync(world.files)) == ended
    assert await anyio.to_thread.run_sync(world.leftovers) == []


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_native_cancellation_twice_changes_nothing_about_it(world: World) -> None:
    cancels: list[asyncio.Task[None]] = []

    def cancel(event: Event) -> None:
        if isinstance(event, (Decided, Published)):
            cancels[0].cancel()

    receipts = []

    async def work() -> None:
        async with world.process((cancel,)).staged_write("append") as tx:
            receipts.append(tx)
            await tx.write("a", b"1")

    cancels.append(asyncio.create_task(work()))
    with pytest.raises(asyncio.CancelledError):
        await cancels[0]
    assert receipts[0].receipt.phase == "committed"
    assert await anyio.to_thread.run_sync(world.files) == {"a": b"1"}


async def test_waiting_for_a_busy_target_ends_at_once_when_cancelled(world: World) -> None:
    first, second = world.process(), world.process()
    held = await first._driver.probe()
    lock = await first._driver.lock("lock")
    assert held.fence == "lock"
    assert lock is not None
    with anyio.move_on_after(0.2) as scope:
        async with second.staged_write("append", lock_timeout=600) as tx:
            await tx.write("a", b"1")
    assert scope.cancelled_caught
    assert tx.receipt.phase == "rolled_back"
    with pytest.raises(Busy):
        async with second.staged_write("append", lock_timeout=0) as tx:
            await tx.write("a", b"1")
    assert tx.receipt.phase == "rolled_back"
    lock.release()


async def test_a_finished_transaction_refuses_writes_and_closes_twice_without_harm(world: World) -> None:
    store = world.process()
    tx = await store.begin("append")
    await tx.write("a", b"1")
    receipt = await tx.commit()
    assert await tx.commit() == receipt
    with pytest.raises(WrongState):
        await tx.write("b", b"1")
    with pytest.raises(WrongState):
        await tx.rollback()
    other = await store.begin("append")
    await other.rollback()
    await other.rollback()
    with pytest.raises(WrongState):
        await other.commit()
    await store.aclose()
    await store.aclose()
    assert await anyio.to_thread.run_sync(world.files) == {"a": b"1"}


async def test_the_receipt_is_refused_until_the_end(world: World) -> None:
    async with world.process().staged_write("append") as tx:
        with pytest.raises(WrongState):
            _ = tx.receipt


async def test_a_receipt_counts_as_staging_what_came_before_the_end_of_the_block(world: World) -> None:
    store = world.process()
    with pytest.raises(ZeroDivisionError):
        async with store.staged_write("append") as failed:
            await failed.write("a", b"1")
            raise ZeroDivisionError
    assert failed.receipt.staging_seconds, "a block that failed was staging until then"
    assert not failed.receipt.commit_seconds
    async with store.staged_write("append") as committed:
        await committed.write("a", b"1")
    assert committed.receipt.staging_seconds
    assert committed.receipt.commit_seconds
    prepared = await store.begin("append")
    await prepared.write("b", b"1")
    await prepared.prepare()
    await store.aclose()
    resumed = await world.process().resume(prepared.id)
    receipt = await resumed.commit()
    assert receipt.staging_seconds is None, "another process knows"
    assert receipt.commit_seconds is not None


# ------------------------------------------------------------------------------------------------------------- staging


async def test_many_tasks_stage_at_once(world: World) -> None:
    async with world.process().staged_write("append") as tx, anyio.create_task_group() as tasks:
        for n in range(50):
            tasks.start_soon(tx.write, f"d{n % 3}/f{n}", str(n))
    assert tx.receipt.files == 50
    assert await anyio.to_thread.run_sync(world.files) == {f"d{n % 3}/f{n}": str(n).encode() for n in range(50)}


async def test_a_path_staged_twice_is_an_error_unless_it_overwrites(world: World) -> None:
    store = world.process()
    async with store.staged_write("append") as tx:
        await tx.write("a", b"1")
        with pytest.raises(WrongState):
            await tx.write("a", b"2")
        with pytest.raises(InvalidPath):
            await tx.write("A", b"2")
        await tx.write("a", b"3", overwrite=True)
    assert await anyio.to_thread.run_sync(world.files) == {"a": b"3"}
    assert tx.receipt.files == 1


async def test_finishing_while_a_write_is_open_is_an_error_before_the_decision(world: World) -> None:
    store = world.process()
    with pytest.raises(WrongState):
        async with store.staged_write("append") as tx:
            await tx.open("a").__aenter__()
    assert tx.receipt.phase == "rolled_back"
    assert await anyio.to_thread.run_sync(world.files) == {}


async def test_finishing_while_a_real_path_or_directory_is_open_is_an_error_before_the_decision(world: World) -> None:
    for opened in ("path", "dir"):
        with pytest.raises(WrongState) as caught:
            async with world.process().staged_write("append") as tx:
                await tx.write("b", b"1")
                still_open = tx.path("d/a") if opened == "path" else tx.dir("d")
                local = await still_open.__aenter__()
                await anyio.Path(local if opened == "path" else f"{local}/a").write_bytes(b"1")
        assert (caught.value.outcome, tx.receipt.phase) == ("untouched", "rolled_back")
        # Whoever had it open ends later, and stages nothing any more.
        with pytest.raises(StagedError):
            await still_open.__aexit__(None, None, None)
        assert await anyio.to_thread.run_sync(world.files) == {}
        assert await anyio.to_thread.run_sync(world.leftovers) == []


async def test_a_write_that_another_task_opens_after_the_checks_is_never_committed_unchecked(world: World) -> None:
    finished = anyio.Event()

    async def check(entries: Sequence[Entry]) -> None:
        assert [entry.path for entry in entries] == ["a"]
        tasks.start_soon(write_late)
        await anyio.sleep(0.01)

    async def write_late() -> None:
        late = tx.open("late")
        while True:
            try:
                await late.__aenter__()
                break
            except WrongState:  # the checks run
                await anyio.lowlevel.checkpoint()
        await late.write(b"1")
        await finished.wait()
        with pytest.raises(StagedError):
            await late.__aexit__(None, None, None)

    async with anyio.create_task_group() as tasks:
        with pytest.raises(WrongState, match="still being written") as caught:
            async with world.process().staged_write("full_drop", validate=[check]) as tx:
                await tx.write("a", b"1")
        finished.set()
    assert (caught.value.outcome, tx.receipt.phase) == ("untouched", "rolled_back")
    assert await anyio.to_thread.run_sync(world.files) == {}
    assert await anyio.to_thread.run_sync(world.leftovers) == []


async def test_a_write_that_fails_leaves_nothing_and_what_was_staged_before_stays(world: World) -> None:
    async def breaks() -> AsyncIterator[bytes]:
        yield b"x" * (3 << 20)
        raise OSError("source")

    async with world.process().staged_write("append") as tx:
        await tx.write("a", b"1")
        with pytest.raises(OSError, match="source"):
            await tx.put_stream("a", breaks(), overwrite=True)
        with pytest.raises(OSError, match="source"):
            await tx.put_stream("b", breaks())
        with pytest.raises(ZeroDivisionError):
            async with tx.path("c") as local:
                await anyio.Path(local).write_bytes(b"half")
                raise ZeroDivisionError
    assert await anyio.to_thread.run_sync(world.files) == {"a": b"1"}


async def test_bytes_text_files_streams_and_paths_are_staged_alike(world: World, tmp_path: os.PathLike[str]) -> None:
    source = anyio.Path(tmp_path) / "source"
    data = os.urandom(2_500_000)
    await source.write_bytes(data)

    async def chunks() -> AsyncIterator[bytes]:
        for at in range(0, len(data), 300_000):
            yield data[at : at + 300_000]

    async with world.process().staged_write("append") as tx:
        await tx.write("text", "é")
        await tx.put_file("d/file", source=source)
        await tx.put_stream("d/stream", chunks())
        async with await anyio.open_file(source, "rb") as file:
            await tx.put_stream("d/anyio", file)
        async with tx.path("e/path.bin") as local:
            await anyio.Path(local).write_bytes(data)
        async with tx.dir("many") as directory:
            await (anyio.Path(directory) / "x").mkdir()
            await (anyio.Path(directory) / "x" / "one").write_bytes(data)
    files = await anyio.to_thread.run_sync(world.files)
    assert files.pop("text") == "é".encode()
    assert files == dict.fromkeys(["d/file", "d/stream", "d/anyio", "e/path.bin", "many/x/one"], data)


async def test_all_bytes_of_an_array_are_staged_whatever_its_items_and_dimensions(world: World) -> None:
    small = memoryview(bytes(range(96))).cast("B").cast("i", [2, 3, 4])
    large = memoryview(array("d", range(300_000)))
    deep = large.cast("B").cast("d", [300, 100, 10])
    views: dict[str, list[memoryview]] = {"small": [small], "large": [large], "deep": [small, deep, small]}  # type: ignore[list-item]
    async with world.process().staged_write("append") as tx:
        for name, chosen in views.items():
            async with tx.open(name) as file:
                for view in chosen:
                    assert await file.write(view) == view.nbytes
    wanted = {"small": small.tobytes(), "large": large.tobytes()}
    wanted["deep"] = wanted["small"] + wanted["large"] + wanted["small"]
    assert await anyio.to_thread.run_sync(world.files) == wanted
    assert tx.receipt.bytes == sum(map(len, wanted.values()))


@pytest.mark.parametrize(
    "refused", ["a link", "a link to nowhere", "a pipe", "a bad name", "below a staged file", "staged"]
)
async def test_a_directory_with_one_file_that_is_refused_stages_nothing_of_it(world: World, refused: str) -> None:
    if (world.kind, refused) == ("memory", "below a staged file"):
        pytest.skip("Only a real directory cannot hold it; elsewhere the plan refuses it.")
    async with world.process().staged_write("append") as tx:
        await tx.write("d/kept", b"1")
        await tx.write("m", b"1")
        with pytest.raises(StagedError):
            async with tx.dir() as local:
                root = anyio.Path(local)
                for name in ("a", "d/a", "z"):
                    await (root / name).parent.mkdir(exist_ok=True)
                    await (root / name).write_bytes(b"2")
                match refused:
                    case "a link":
                        await (root / "n").symlink_to("a")
                    case "a link to nowhere":
                        await (root / "n").symlink_to("nowhere")
                    case "a pipe":
                        await anyio.to_thread.run_sync(os.mkfifo, root / "n")
                    case "a bad name":
                        await (root / "con").write_bytes(b"2")
                    case "below a staged file":
                        await (root / "m").mkdir()
                        await (root / "m" / "x").write_bytes(b"2")
                    case "staged":
                        await (root / "m").write_bytes(b"2")
        assert [entry.path for entry in tx.entries] == ["d/kept", "m"]
    assert await anyio.to_thread.run_sync(world.files) == {"d/kept": b"1", "m": b"1"}
    assert await anyio.to_thread.run_sync(world.leftovers) == []


async def test_a_directory_of_which_one_file_cannot_be_uploaded_stages_nothing_of_it() -> None:
    async def gate(name: str, moment: Moment) -> None:
        if (name, moment) == ("close z", "before"):
            raise StorageError("out of reach")

    storage = MemoryStorage()
    async with open_store(FaultDriver(MemoryDriver(storage=storage), gate)).staged_write("append") as tx:
        await tx.write("kept", b"1")
        with pytest.raises(StagingError, match="out of reach"):
            async with tx.dir() as local:
                for name in ("a", "m", "z"):
                    await anyio.Path(local, name).write_bytes(b"2")
    assert storage.below("target") == {"kept": b"1"}
    assert storage.uploads == {}


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_an_open_file_of_aiofiles_is_a_stream(world: World, tmp_path: os.PathLike[str]) -> None:
    source = anyio.Path(tmp_path) / "source"
    await source.write_bytes(b"a\nb\n" * 1000)
    async with aiofiles.open(source, "rb") as file, world.process().staged_write("append") as tx:
        await tx.put_stream("a", file)
    assert await anyio.to_thread.run_sync(world.files) == {"a": b"a\nb\n" * 1000}


async def test_a_check_that_refuses_leaves_the_target_untouched(world: World) -> None:
    async def no_big_files(entries: object) -> None:
        raise ValueError("too big")

    with pytest.raises(ValidationFailed, match=r"no_big_files.*too big") as caught:
        async with world.process().staged_write("append", validate=[no_big_files]) as tx:
            await tx.write("a", b"1")
    assert isinstance(caught.value.__cause__, ValueError)
    assert tx.receipt.phase == "rolled_back"


async def test_a_cancellation_inside_a_check_rolls_back(world: World) -> None:
    async def slow(entries: Sequence[Entry]) -> None:
        checking.set()
        await anyio.sleep_forever()

    async def run(end: Callable[[], Awaitable[object]]) -> None:
        await end()

    store = world.process()
    for step in ("prepare", "commit"):
        checking = anyio.Event()
        tx = await store.begin("append", validate=[slow])
        await tx.write("a", b"1")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run, getattr(tx, step))
            await checking.wait()
            tasks.cancel_scope.cancel()
        assert tx.receipt.phase == "rolled_back"
        assert await anyio.to_thread.run_sync(world.leftovers) == []
    async with store.staged_write("append", lock_timeout=0) as tx:
        await tx.write("b", b"1")
    assert await anyio.to_thread.run_sync(world.files) == {"b": b"1"}


# --------------------------------------------------------------------------------------------------- across processes


async def test_what_a_caller_prepared_is_left_alone_by_recover_and_resumed_by_another_process(world: World) -> None:
    first = world.process()
    tx = await first.begin("append", key="k", meta={"watermark": 7})
    await tx.write("d/a", b"1")
    await tx.write("b", b"2")
    await tx.prepare()
    second = world.process()
    with pytest.raises(Busy):
        await second.resume(tx.id)
    assert (await second.recover()).alive == (tx.id,)
    await first.aclose()
    assert (await second.recover()).prepared == (tx.id,)
    assert (await second.outcome(tx.id)).state == "prepared"
    resumed = await second.resume(tx.id)
    receipt = await resumed.commit()
    assert (receipt.files, receipt.key) == (2, "k")
    assert await anyio.to_thread.run_sync(world.files) == {"d/a": b"1", "b": b"2"}
    assert await second.meta() == {"watermark": 7}
    with pytest.raises(WrongState):
        await second.resume(tx.id)


async def test_a_prepared_transaction_survives_a_busy_target_and_commits_later(world: World) -> None:
    store, other = world.process(), world.process()
    tx = await store.begin("append", lock_timeout=0)
    await tx.write("a", b"1")
    await tx.prepare()
    await other.capabilities()
    lock = await other._driver.lock("lock")
    assert lock is not None
    with pytest.raises(Busy):
        await tx.commit()
    lock.release()
    await tx.commit()
    assert await anyio.to_thread.run_sync(world.files) == {"a": b"1"}


async def test_ignore_on_a_full_target_ends_as_skipped_without_a_block_too(world: World) -> None:
    store = world.process()
    early = [await store.begin("ignore") for _ in range(2)]
    async with store.staged_write("append") as tx:
        await tx.write("a", b"1")
    late = [await store.begin("ignore") for _ in range(2)]
    assert [tx.skipped for tx in (*early, *late)] == [False, False, True, True]
    for tx, prepares in zip((*early, *late), (True, False, True, False), strict=True):
        await tx.write("b", b"1")
        if prepares:
            empty_then = not tx.skipped
            await tx.prepare()
            assert tx.phase is (Phase.PREPARED if empty_then else Phase.ROLLED_BACK)
        receipt = await tx.commit()
        assert (receipt.phase, receipt.files, tx.skipped) == ("skipped", 0, True)
        assert await tx.commit() == receipt
        with pytest.raises(WrongState):
            await tx.write("c", b"1")
    assert await anyio.to_thread.run_sync(world.files) == {"a": b"1"}
    assert await anyio.to_thread.run_sync(world.leftovers) == []
    assert (await store.status()).commits == 1


async def test_work_done_twice_under_one_key_is_done_once(world: World) -> None:
    store = world.process()
    for attempt in range(2):
        async with store.staged_write("append", key="2026-11-23T05", meta={"n": attempt}) as tx:
            await tx.write(f"a{attempt}", b"1")
        assert tx.done == bool(attempt)
        assert tx.receipt.phase == ("done" if attempt else "committed")
    assert await anyio.to_thread.run_sync(world.files) == {"a0": b"1"}
    assert await store.meta() == {"n": 0}
    # Begun before the other's commit: found under the head.
    late = await store.begin("append", key="k")
    await late.write("late", b"1")
    async with store.staged_write("append", key="k") as tx:
        await tx.write("early", b"1")
    assert (await late.commit()).phase == "done"
    assert late.done
    assert await anyio.to_thread.run_sync(world.files) == {"a0": b"1", "early": b"1"}


async def test_an_append_that_another_commit_overtook_on_its_names_is_a_conflict(world: World) -> None:
    store = world.process()
    slow = await store.begin("overwrite_files")
    await slow.write("a", b"slow")
    async with store.staged_write("overwrite_files") as tx:
        await tx.write("a", b"fast")
    with pytest.raises(Conflict) as caught:
        await slow.commit()
    assert caught.value.retryable
    assert await anyio.to_thread.run_sync(world.files) == {"a": b"fast"}


async def test_a_delete_of_a_file_that_another_commit_replaced_since_is_a_conflict_and_no_lost_update(
    world: World,
) -> None:
    store = world.process()
    async with store.staged_write("append") as tx:
        await tx.write("p/a", b"1")
        await tx.write("q/b", b"1")
    for mode in ("append", "overwrite_files", "overwrite_partitions"):
        slow = await store.begin(mode)
        await slow.write("p/new", b"slow")
        await slow.delete("q/b")
        async with store.staged_write("overwrite_files") as tx:
            await tx.write("q/b", mode.encode())
        with pytest.raises(Conflict) as caught:
            await slow.commit()
        assert (caught.value.outcome, slow.receipt.phase) == ("untouched", "rolled_back")
        assert await anyio.to_thread.run_sync(world.files) == {"p/a": b"1", "q/b": mode.encode()}


async def test_names_of_the_stores_own_in_the_meta_are_refused_whenever_they_are_set(world: World) -> None:
    store = world.process()
    with pytest.raises(InvalidInput, match="store's own"):
        await store.begin("append", meta={"staged.last_index": 7})
    with pytest.raises(InvalidInput, match="store's own"):
        async with store.staged_write("append") as tx:
            tx.meta["staged.last_index"] = 7
    assert tx.phase is Phase.ROLLED_BACK
    assert await store.meta() == {}


async def test_the_meta_is_committed_as_it_was_prepared(world: World) -> None:
    store = world.process()
    tx = await store.begin("append", meta={"n": [1]})
    tx.meta["more"] = True
    await tx.prepare()
    tx.meta.update({"n": [2], "staged.last_index": 7})
    await tx.commit()
    assert await store.meta() == {"n": [1], "more": True}


async def test_meta_that_grows_too_large_by_merging_is_refused_with_the_target_untouched(world: World) -> None:
    store = world.process()
    for name in ("first", "second"):
        async with store.staged_write("append", meta={name: "x" * 7_000}) as tx:
            await tx.write(name, b"1")
    kept = await store.meta()
    blocks = await store.begin("append", meta={"third": "x" * 7_000})
    await blocks.write("third", b"1")
    with pytest.raises(InvalidInput, match="16384") as caught:
        await blocks.commit()
    assert (caught.value.outcome, caught.value.transaction) == ("untouched", blocks.id)
    assert blocks.receipt.phase == "rolled_back"
    assert await anyio.to_thread.run_sync(world.files) == {"first": b"1", "second": b"1"}
    assert await store.meta() == kept
    assert await anyio.to_thread.run_sync(world.leftovers) == []
    async with store.staged_write("append", lock_timeout=0, meta={"first": "x" * 8_000}) as tx:
        await tx.write("third", b"1")
    assert (await store.meta()).keys() == {"first", "second"}


async def test_gc_at_zero_leaves_the_target_and_nothing_else_but_keeps_the_keys(world: World) -> None:
    store = world.process()
    for n in range(3):
        async with store.staged_write("full_drop", key=f"k{n}") as tx:
            await tx.write(f"a{n}", b"1")
    stale = await store.begin("append")
    await stale.write("b", b"1")
    await stale.prepare()
    await store.aclose()
    store = world.process()
    collected = await store.gc(older_than=timedelta(0))
    assert stale.id in collected.rolled_back
    assert (await anyio.to_thread.run_sync(world.files), await anyio.to_thread.run_sync(world.leftovers)) == (
        {"a2": b"1"},
        [],
    )
    async with store.staged_write("full_drop", key="k0") as tx:
        pass
    assert tx.done
    assert (await store.outcome(stale.id)).state == "unknown"


async def test_require_refuses_what_the_store_does_not_promise_before_anything_is_begun(world: World) -> None:
    store = world.process()
    with pytest.raises(Unsupported, match="one_generation"):
        async with store.staged_write("append", require=["one_generation"]):
            pytest.fail("the block was entered")
    async with store.staged_write("full_drop", require=["one_generation", "fenced"]) as tx:
        await tx.write("a", b"1")


async def test_observers_hear_everything_in_order_and_one_that_fails_harms_nothing(world: World) -> None:
    heard: list[Event] = []

    def fails(event: Event) -> None:
        raise RuntimeError

    async with world.process((fails, heard.append)).staged_write("append") as tx:
        await tx.write("a", b"12")
        await tx.write("b", b"3")
    kinds = [type(event) for event in heard]
    assert kinds == [Staged, Staged, Prepared, Decided, Published, Finished]
    assert isinstance(heard[2], Prepared)
    assert (heard[2].files, heard[2].bytes) == (2, 3)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "nope"},
        {"mode": "append", "key": ""},
        {"mode": "append", "key": "x" * 257},
        {"mode": "append", "meta": {"a": object()}},
        {"mode": "append", "meta": {"a": "x" * 20_000}},
        {"mode": "append", "partitions": ["a"]},
        {"mode": "overwrite_partitions", "partitions": ["../a"]},
        {"mode": "overwrite_partitions", "partitions": 5},
        {"mode": "overwrite_partitions", "partitions": [5]},
        *({"mode": "append", "keep_old": value} for value in (-1, True, 1.5, "1", None, numpy.True_)),
        *({"mode": "append", "allow_empty": value} for value in (None, 1, "no", numpy.True_)),
        *({"mode": "append", "lock_timeout": value} for value in (-1, True, math.nan, "1", None)),
        *({"mode": "append", "grace": value} for value in (-1, True, math.nan, "1", None)),
    ],
)
async def test_a_wrong_option_is_refused_before_anything_is_begun(world: World, options: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        world.process().staged_write(**options)  # type: ignore[arg-type]


async def test_numbers_and_strings_of_other_libraries_make_records_that_are_read_back(world: World) -> None:
    store = world.process()
    key, path = numpy.str_("k"), numpy.str_("a")
    tx = await store.begin("append", key=key, keep_old=numpy.int64(2), lock_timeout=numpy.float32(9), grace=math.inf)  # type: ignore[arg-type]
    await tx.write(path, b"1")
    assert (await world.process().status()).transactions[0].key == "k"
    await tx.commit()
    assert await anyio.to_thread.run_sync(world.files) == {"a": b"1"}
    assert (await store.status()).damaged == ()


async def test_what_is_refused_says_why(world: World) -> None:
    store = world.process()

    def refuse(entries: Sequence[Entry]) -> None:
        raise KeyError

    with pytest.raises(StagingError, match="'Y' is staged as a file"):
        async with store.staged_write("append") as tx:
            with pytest.raises(InvalidInput, match="'a' takes bytes or text, not int"):
                await tx.write("a", 3)  # type: ignore[arg-type]
            await tx.write("Y", b"1")
            await tx.write("y/z", b"1")
    with pytest.raises(ValidationFailed, match=r"KeyError\(\)"):
        async with store.staged_write("append", validate=[refuse]) as tx:
            await tx.write("a", b"1")
    assert await anyio.to_thread.run_sync(world.files) == {}


async def test_a_closed_store_refuses_work(world: World) -> None:
    store = world.process()
    open_one = await store.begin("append")
    await open_one.write("a", b"1")
    await store.aclose()
    assert open_one.receipt.phase == "rolled_back"
    with pytest.raises(WrongState):
        await store.begin("append")
    assert await anyio.to_thread.run_sync(world.leftovers) == []


class _Closes(MemoryDriver):
    closed = False

    async def aclose(self) -> None:
        self.closed = True


@pytest.mark.parametrize("failing", range(3))
async def test_closing_a_store_goes_on_after_one_transaction_that_could_not_be_rolled_back(failing: int) -> None:
    async def gate(name: str, moment: Moment) -> None:
        if name == f"read tx/{stuck}/record":
            raise StorageError("out of reach")

    storage, stuck = MemoryStorage(), ""
    driver = _Closes(storage=storage)
    store = open_store(FaultDriver(driver, gate))
    open_ones = [await store.begin("append") for _ in range(3)]
    prepared = await store.begin("append")
    await prepared.prepare()
    stuck = open_ones[failing].id
    with pytest.raises(StorageError, match="out of reach"):
        await store.aclose()
    assert driver.closed
    assert [tx.phase is Phase.ROLLED_BACK for tx in open_ones] == [n != failing for n in range(3)]
    other = open_store(MemoryDriver(storage=storage))
    assert (await other.recover()).rolled_back == (stuck,), "its lease was not given back"
    await (await other.resume(prepared.id)).rollback()


async def test_closing_a_store_while_being_cancelled_still_leaves_nothing_open(world: World) -> None:
    with anyio.CancelScope() as scope:
        async with world.process() as store:
            open_ones = [await store.begin("append") for _ in range(3)]
            prepared = await store.begin("append")
            await prepared.prepare()
            scope.cancel()
            await anyio.sleep(1)
    assert scope.cancelled_caught
    assert [tx.phase for tx in open_ones] == [Phase.ROLLED_BACK] * 3
    await (await world.process().resume(prepared.id)).rollback()
    assert await anyio.to_thread.run_sync(world.leftovers) == []


async def test_errors_of_staging_leave_the_block_usable(world: World) -> None:
    async with world.process().staged_write("append") as tx:
        with pytest.raises(InvalidPath):
            await tx.write("../a", b"1")
        with pytest.raises(StagingError):
            async with tx.path("nothing"):
                pass
        with pytest.raises(StagedError):
            await tx.put_stream("b", 5)  # type: ignore[arg-type]
        await tx.write("a", b"1")
    assert await anyio.to_thread.run_sync(world.files) == {"a": b"1"}


@pytest.mark.parametrize("fence", ["lock", "consumed"])
def test_a_writer_that_is_cancelled_ends_wherever_the_store_hangs(fence: Literal["lock", "consumed"]) -> None:
    async def write(number: int, first: float) -> int:
        """The call of that number takes so long, all later ones for ever; the writer is cancelled. The number of calls."""
        calls = 0

        async def gate(name: str, moment: Moment) -> None:
            nonlocal calls
            calls += moment == "before"
            if moment == "before" and calls > number:
                await anyio.sleep(first if calls == number + 1 else 10_000)

        driver = FaultDriver(MemoryDriver(storage=MemoryStorage(), fence=fence), gate)
        with anyio.move_on_after(100):
            async with open_store(driver).staged_write("append") as tx:
                await tx.write("a", b"1")
        assert anyio.current_time() < 1_000, f"the writer waits for call {calls}"
        return calls

    for first in (10_000, 110):  # before or after it the writer is cancelled
        for number in itertools.count():
            if trio.run(write, number, first, clock=trio.testing.MockClock(autojump_threshold=0)) <= number:
                break
        assert number > 20


async def test_what_a_live_transaction_stages_while_gc_takes_it_apart_goes_with_its_own_rollback() -> None:
    storage = MemoryStorage()

    async def collect(step: str) -> None:
        if step == "stage a":  # the handle is on record, the upload is not there yet
            await open_store(MemoryDriver(storage=storage, fence="consumed")).gc(older_than=timedelta(0))

    store = open_store(MemoryDriver(storage=storage, fence="consumed", step=collect))
    with pytest.raises(StagingError) as caught:
        async with store.staged_write("append") as tx:
            await tx.write("a", b"1")
    assert caught.value.outcome == "untouched"
    assert storage.below("target") == {}
    await store.gc(older_than=timedelta(0))
    assert storage.uploads == {}


@pytest.mark.parametrize("pauses", [{"list ": 20.0}, {"list ": 20.0, "put_segment ledger-": 20.0}], ids=["one", "two"])
def test_a_holder_that_is_slow_but_shows_signs_of_life_is_waited_for(pauses: dict[str, float]) -> None:
    storage = MemoryStorage()

    def store(gate: Callable[[str, Moment], Awaitable[None]] | None = None) -> Store:
        driver = MemoryDriver(storage=storage, fence="consumed", period=30.0)
        return open_store(driver if gate is None else FaultDriver(driver, gate))

    async def slow(name: str, moment: Moment) -> None:
        if moment == "before":
            await trio.sleep(next((wait for call, wait in pauses.items() if name.startswith(call)), 0.0))

    async def write(store: Store, name: str) -> None:
        async with store.staged_write("append") as tx:
            await tx.write(name, b"1")
        ids.append(tx.id)

    async def race() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write, store(slow), "slow")
            await trio.sleep(1.0)
            nursery.start_soon(write, store(), "quick")

    ids: list[str] = []
    trio.run(race, clock=trio.testing.MockClock(autojump_threshold=0))
    assert storage.below("target") == {"slow": b"1", "quick": b"1"}
    last = anyio.run(store().status).last
    assert last is not None
    assert [last.transaction] == ids[1:]


@pytest.mark.parametrize("last", ["read outcome/", "cas tx/"])
async def test_a_rollback_that_comes_after_its_transaction_was_acquired_fails_and_discards_nothing(last: str) -> None:
    storage = MemoryStorage()
    publishing, collected = anyio.Event(), anyio.Event()
    seen: set[str] = set()
    aborting = False

    def store(gate: Callable[[str, Moment], Awaitable[None]]) -> Store:
        return open_store(FaultDriver(MemoryDriver(storage=storage, fence="consumed"), gate))

    async def decided(name: str, moment: Moment) -> None:
        if name == "publish" and moment == "before":
            publishing.set()
            await collected.wait()

    async def late(name: str, moment: Moment) -> None:
        nonlocal aborting
        # What it wants to roll back it reads twice: to tell what it is, and to abort it.
        if moment == "before":
            aborting = aborting or (name.startswith("read tx/") and name in seen)
            seen.add(name)
        if name.startswith(last) and moment == "before" and aborting and not publishing.is_set():
            tasks.start_soon(tx.commit)
            await publishing.wait()

    tx = await store(decided).begin("append")
    await tx.write("a", b"1")
    await tx.prepare()
    async with anyio.create_task_group() as tasks:
        found = await store(late).gc(older_than=timedelta(0))
        assert publishing.is_set()
        assert found.rolled_back == ()
        collected.set()
    assert tx.receipt.phase == "committed"
    assert storage.below("target") == {"a": b"1"}


async def test_whoever_resumed_a_transaction_last_is_the_only_one_who_commits_it() -> None:
    storage = MemoryStorage()
    first, second = (open_store(MemoryDriver(storage=storage, fence="consumed")) for _ in range(2))
    tx = await first.begin("append")
    await tx.write("a", b"1")
    await tx.prepare()
    resumed = await second.resume(tx.id)
    with pytest.raises(StagingError, match="resumed"):
        await tx.commit()
    assert storage.below("target") == {}
    assert (await resumed.commit()).phase == "committed"
    assert storage.below("target") == {"a": b"1"}


async def test_a_commit_that_another_process_made_meanwhile_is_found_and_not_called_a_failure() -> None:
    storage = MemoryStorage()
    first, second = (open_store(MemoryDriver(storage=storage, fence="consumed")) for _ in range(2))
    tx = await first.begin("append")
    await tx.write("a", b"1")
    await tx.prepare()
    await (await second.resume(tx.id)).commit()
    assert (await tx.commit()).phase == "committed"
    assert storage.below("target") == {"a": b"1"}


class LateDecision(MemoryDriver):
    """The store takes no decision and says so, but the request is still under way."""

    def __init__(self, storage: MemoryStorage) -> None:
        super().__init__(storage=storage, fence="consumed", period=0.01)
        self.late: list[tuple[str, bytes, str | None]] = []

    async def cas(self, key: str, body: bytes, token: str | None, *, durable: bool) -> str | None:
        if key == "head" and b'"committed"' in body:
            self.late.append((key, body, token))
            raise StorageError("no answer")
        return await super().cas(key, body, token, durable=durable)


async def test_a_decision_that_was_given_up_cannot_arrive_late() -> None:
    storage = MemoryStorage()
    driver = LateDecision(storage)
    tx = await open_store(driver).begin("append")
    await tx.write("a", b"1")
    await tx.prepare()
    with pytest.raises(StagedError) as raised:
        await tx.commit()
    assert raised.value.outcome == "untouched"
    assert driver.late
    other = MemoryDriver(storage=storage, fence="consumed", period=0.01)
    for key, body, token in driver.late:
        assert await other.cas(key, body, token, durable=True) is None
    assert (await open_store(other).recover()).finished == ()
    assert storage.below("target") == {}


async def test_nothing_is_published_on_a_decision_that_was_only_read_back() -> None:
    calls: list[str] = []
    silent = 0

    async def gate(name: str, moment: Moment) -> None:
        nonlocal silent
        if name.startswith("put_segment ledger-"):
            silent = 4
        elif (
            silent
            and moment == "after"
            and name in ("cas head", "read head")
            and not (silent < 4 and name == "cas head")
        ):
            silent -= 1
            raise StorageError("no answer")
        if moment == "after":
            calls.append(name)

    driver = FaultDriver(MemoryDriver(storage=MemoryStorage()), gate)
    async with open_store(driver).staged_write("append") as tx:
        await tx.write("a", b"1")
    assert tx.receipt.phase == "committed"
    assert silent == 0
    before = calls[: calls.index("publish")]
    assert before[-2:] == ["read head", "cas head"], "it was not written once more"


class Paused:
    """A process on a store that tells death by silence; it pauses before a call until it is let go."""

    def __init__(self, storage: MemoryStorage, at: str, *, period: float = 0.02) -> None:
        self.at, self.reached, self.go = at, anyio.Event(), anyio.Event()
        self.driver = FaultDriver(MemoryDriver(storage=storage, fence="consumed", period=period), self._gate)
        self.store = open_store(self.driver)

    async def _gate(self, name: str, moment: Moment) -> None:
        if moment == "before" and name.startswith(self.at) and not self.reached.is_set():
            self.reached.set()
            await self.go.wait()


async def prepared(store: Store) -> Transaction:
    tx = await store.begin("append")
    await tx.write("a", b"1")
    await tx.prepare()
    return tx


async def test_a_decided_commit_is_told_from_a_prepared_one_while_it_is_published() -> None:
    storage = MemoryStorage()
    writer, other = Paused(storage, "publish"), MemoryDriver(storage=storage, fence="consumed")
    tx = await prepared(writer.store)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tx.commit)
        await writer.reached.wait()
        assert (await open_store(other).outcome(tx.id)).state == "committing"
        # A rollback says so at once, and waits for nobody.
        target = Target(other, await other.probe())
        assert (await abort(target, tx.id, "another", sole=False)).state == "committing"
        writer.go.set()
    assert storage.below("target") == {"a": b"1"}


async def test_a_writer_that_was_overtaken_while_it_published_is_told_that_it_was_fenced() -> None:
    storage = MemoryStorage()
    writer = Paused(storage, "publish")
    other = open_store(MemoryDriver(storage=storage, fence="consumed", period=0.02))
    tx = await prepared(writer.store)
    async with anyio.create_task_group() as tasks:

        async def late() -> None:
            with pytest.raises(Fenced):
                await tx.commit()

        tasks.start_soon(late)
        await writer.reached.wait()
        assert (await other.recover()).finished == (tx.id,)
        # What was published is gone by now, as a late publish finds it.
        async with other.staged_write("overwrite_files") as later:
            await later.write("a", b"2")
        writer.go.set()
    assert (await other.outcome(tx.id)).state == "committed"
    assert storage.below("target") == {"a": b"2"}


async def test_what_holds_the_head_is_not_rolled_back_under_its_hands() -> None:
    storage = MemoryStorage()
    writer = Paused(storage, "put_segment ledger-", period=30.0)
    other = MemoryDriver(storage=storage, fence="consumed")
    tx = await prepared(writer.store)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tx.commit)
        await writer.reached.wait()
        target = Target(other, await other.probe())
        with pytest.raises(Busy):
            await abort(target, tx.id, "another", sole=False)
        writer.go.set()
    assert tx.receipt.phase == "committed"
    assert storage.below("target") == {"a": b"1"}


async def test_what_was_committed_is_never_called_rolled_back() -> None:
    storage = MemoryStorage()
    writer = Paused(storage, "list_control tx/")  # all is done but for the clean-up
    other = MemoryDriver(storage=storage, fence="consumed")
    tx = await prepared(writer.store)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tx.commit)
        await writer.reached.wait()
        target = Target(other, await other.probe())
        assert (await abort(target, tx.id, "another", sole=True)).state == "committed"
        writer.go.set()
    assert (await open_store(other).outcome(tx.id)).state == "committed"
    assert storage.below("target") == {"a": b"1"}


async def test_a_transaction_is_rolled_back_only_by_whoever_resumed_it_last() -> None:
    storage = MemoryStorage()
    first, second = (open_store(MemoryDriver(storage=storage, fence="consumed")) for _ in range(2))
    tx = await prepared(first)
    resumed = await second.resume(tx.id)
    with pytest.raises(StagedError):
        await tx.rollback()
    assert (await resumed.commit()).phase == "committed"
    assert storage.below("target") == {"a": b"1"}


async def test_a_key_whose_commit_is_not_complete_is_not_done_yet() -> None:
    storage = MemoryStorage()
    writer = Paused(storage, "publish", period=30.0)
    other = open_store(MemoryDriver(storage=storage, fence="consumed"))
    first = await writer.store.begin("append", key="k")
    await first.write("a", b"1")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(first.commit)
        await writer.reached.wait()
        second = await other.begin("append", key="k")
        assert not second.done
        await second.write("b", b"2")
        writer.go.set()
    assert (await second.commit()).phase == "done"
    assert storage.below("target") == {"a": b"1"}


async def test_staging_that_was_spoilt_while_nobody_had_it_is_refused_before_the_decision() -> None:
    storage = MemoryStorage()
    first, second = (open_store(MemoryDriver(storage=storage, fence="consumed")) for _ in range(2))
    tx = await prepared(first)
    storage.uploads.clear()
    resumed = await second.resume(tx.id)
    with pytest.raises(StagingError) as raised:
        await resumed.commit()
    assert raised.value.outcome == "untouched"
    assert (await second.status()).commits == 0


@pytest.mark.parametrize("verb", ["prepare", "commit"])
async def test_a_write_that_slips_in_between_the_checks_and_the_commit_is_an_error(verb: str) -> None:
    store = open_store(MemoryDriver(storage=MemoryStorage()))
    checking, done = anyio.Event(), anyio.Event()

    async def check(entries: Sequence[Entry]) -> None:
        checking.set()
        await anyio.lowlevel.checkpoint()

    async def slip_in() -> None:
        await checking.wait()
        while True:
            try:
                async with tx.open("late"):
                    await done.wait()
                return
            except WrongState:
                await anyio.lowlevel.checkpoint()

    tx = await store.begin("append", validate=[check])
    await tx.write("a", b"1")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(slip_in)
        with pytest.raises(WrongState, match="still being written"):
            await getattr(tx, verb)()
        done.set()
    assert (await tx.commit()).files == 2


async def test_what_was_kept_out_of_the_target_never_gets_in_late() -> None:
    storage = MemoryStorage()
    writer = Paused(storage, "publish")
    tx = await prepared(writer.store)
    clearer = Paused(storage, f"list_control tx/{tx.id}/")  # the head is free, nothing is cleaned up
    async with anyio.create_task_group() as tasks:

        async def late() -> None:
            with suppress(StagedError):
                await tx.commit()
            clearer.go.set()

        tasks.start_soon(late)
        await writer.reached.wait()
        storage.put("target/a", b"theirs")
        tasks.start_soon(partial(clearer.store.recover, resolve="keep"))
        await clearer.reached.wait()
        del storage.files["target/a"]
        writer.go.set()
    assert storage.below("target") == {}


async def test_a_call_that_comes_too_late_says_what_is_known_of_the_data() -> None:
    store = open_store(MemoryDriver(storage=MemoryStorage()))
    tx = await prepared(store)
    await tx.commit()
    for late in (lambda: tx.write("b", b"2"), tx.rollback, tx.plan, lambda: store.resume(tx.id)):
        with pytest.raises(WrongState) as raised:
            await late()
        assert raised.value.outcome == "committed"
        assert raised.value.transaction == tx.id
    undone = await prepared(open_store(MemoryDriver(storage=MemoryStorage())))
    await undone.rollback()
    for late in (lambda: undone.write("b", b"2"), undone.plan, undone.commit):
        with pytest.raises(WrongState) as raised:
            await late()
        assert raised.value.outcome == "untouched"


async def test_gc_leaves_the_plan_of_a_commit_whose_head_could_not_be_freed() -> None:
    storage, ended = MemoryStorage(), False

    async def gate(name: str, moment: Moment) -> None:
        nonlocal ended
        ended = ended or name.startswith("put_segment outcome/")
        if ended and moment == "before" and name == "cas head":
            raise StorageError("no answer")

    def process() -> MemoryDriver:
        return MemoryDriver(storage=storage, fence="consumed", period=0.01)

    tx = await prepared(open_store(FaultDriver(process(), gate)))
    await tx.commit()
    other = process()
    assert await collect(Target(other, await other.probe()), 0.0) == 0
    assert (await open_store(other).recover()).finished == (tx.id,)
    assert storage.below("target") == {"a": b"1"}
