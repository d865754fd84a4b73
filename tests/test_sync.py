"""The synchronous face: the same names and promises, a thread that ends, and Ctrl-C."""

from __future__ import annotations

import inspect
import io
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

import staged
from staged import InvalidInput, StagingError, WrongState, lifecycle, staging, sync
from staged import store as stores
from staged.drivers.local import LocalDriver
from staged.drivers.memory import MemoryDriver, MemoryStorage
from staged.model import Decided, Event, Finished, HeadState
from staged.states import Phase

TABLE = pa.table({"region": ["eu", "us"], "n": [1, 2]})


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


def local(target: Path, *observers: Callable[[Event], None]) -> sync.Store:
    return sync.open_store(LocalDriver(str(target), durability="none"), observers=observers)


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def leftovers(target: Path) -> list[str]:
    transactions = target.parent / "_staged" / target.name / "tx"
    return [path.name for path in transactions.iterdir()] if transactions.exists() else []


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """No thread of a store's is left behind."""
    before = set(threading.enumerate())
    yield
    left = [thread for thread in threading.enumerate() if thread not in before and "portal" in thread.name]
    assert left == []


# ---------------------------------------------------------------------------------------------------------- the same names

INTERNAL = {"begin", "resume", "release", "abandon"}  # of a transaction: for the store alone
RENAMED = {"aclose": "close"}


def public(cls: type) -> set[str]:
    return {name for name in dir(cls) if not name.startswith("_")}


@pytest.mark.parametrize(
    ("asynchronous", "synchronous", "without"),
    [
        (stores.Store, sync.Store, set[str]()),
        (lifecycle.Transaction, sync.Transaction, INTERNAL),
        (staging.StagedFile, sync.StagedFile, set[str]()),
    ],
)
def test_every_public_name_is_there_with_the_same_parameters(
    asynchronous: type, synchronous: type, without: set[str]
) -> None:
    assert {RENAMED.get(name, name) for name in public(asynchronous) - without} <= public(synchronous)
    assert inspect.signature(sync.open_store).parameters == inspect.signature(staged.open_store).parameters
    compared = 0
    for name in public(asynchronous) - without:
        ours, theirs = getattr(synchronous, RENAMED.get(name, name)), getattr(asynchronous, name)
        assert isinstance(ours, property) == isinstance(theirs, property), name
        if not isinstance(theirs, property):
            compared += 1
            parameters = [[*inspect.signature(each).parameters.values()][1:] for each in (ours, theirs)]
            if name == "put_stream":  # it takes what is synchronous
                parameters = [[each.replace(annotation="") for each in side] for side in parameters]
            assert parameters[0] == parameters[1], name
            assert not inspect.iscoroutinefunction(ours)
            assert ours.__doc__
    assert compared


# ---------------------------------------------------------------------------------------------------------- the same life


def test_one_of_everything_is_staged_and_committed(target: Path, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"source")
    with local(target) as store, store.staged_write("append", key="k", meta={"watermark": 7}) as tx:
        tx.write("text", "é")
        tx.put_file("file", source=tmp_path / "source")
        tx.put_stream("chunks", (bytes([n]) for n in range(3)))
        with open(tmp_path / "source", "rb") as source:
            tx.put_stream("stream", SimpleNamespace(read=source.read))  # no lines to iterate over
        with tx.open("piecewise") as file:
            assert file.write(b"ab") == 2
            file.write(b"c")
        with tx.path("d/path.parquet") as path:
            pl.DataFrame(TABLE).write_parquet(path)
            tx.count_rows("d/path.parquet", 2)
        with tx.dir("dir") as directory:
            pl.LazyFrame(TABLE).sink_parquet(f"{directory}/sunk.parquet")
        with tx.filesystem("fs") as filesystem:
            ds.write_dataset(TABLE, "", filesystem=filesystem, format="parquet", partitioning=["region"])
        tx.write_table(TABLE, "table.parquet")
        with tx.parquet_writer(TABLE.schema) as writer:
            for batch in TABLE.to_batches():
                writer.write(batch)
        assert len(tx.entries) == len(tx.plan().publish) == 11
        assert (tx.done, tx.skipped, tx.phase) == (False, False, Phase.STAGING)
        tx.meta["more"] = True
        with pytest.raises(WrongState):
            _ = tx.receipt
    assert (tx.receipt.phase, tx.receipt.id, tx.receipt.files) == ("committed", tx.id, 11)
    found = tree(target)
    parquet = {name: found.pop(name) for name in list(found) if name.endswith(".parquet")}
    assert found == {
        "text": "é".encode(),
        "file": b"source",
        "chunks": b"\0\1\2",
        "stream": b"source",
        "piecewise": b"abc",
    }
    assert {name.replace(tx.id, "…") for name in parquet} == {
        *("d/path.parquet", "dir/sunk.parquet", "table.parquet", "part-…-00000.parquet"),
        *("fs/eu/part-0.parquet", "fs/us/part-0.parquet"),
    }
    assert sum(pl.read_parquet(content).height for content in parquet.values()) == 10
    with local(target) as store:
        with store.staged_write("append", key="k") as again:
            again.write("text", b"2")
        assert again.receipt.phase == "done"
        with store.staged_write("append") as tx:
            tx.delete("text")
        assert store.meta() == {"watermark": 7, "more": True}
        assert store.status().commits == 2
        assert store.outcome(tx.id).state == "committed"
        assert store.capabilities().swaps_trees
        assert store.gc(older_than=timedelta(0)).collected
        assert (store.url, repr(store)) == (str(target), f"<staged.sync.Store {target}>")
    assert "text" not in tree(target)


def test_a_life_without_a_block_goes_on_in_another_store(target: Path) -> None:
    with local(target) as first:
        tx = first.begin("append")
        tx.write("a", b"1")
        tx.prepare()
        thrown = first.begin("append")
        thrown.write("b", b"1")
        thrown.rollback()
    assert thrown.phase is Phase.ROLLED_BACK
    with local(target) as second:
        assert second.recover().prepared == (tx.id,)
        resumed = second.resume(tx.id)
        assert resumed.commit().files == 1
        assert resumed.commit() == resumed.receipt
    assert tree(target) == {"a": b"1"}


def test_an_exception_leaves_the_block_as_it_is_and_the_target_as_it_was(target: Path) -> None:
    mine = KeyError("mine")
    blocks: list[Callable[[sync.Transaction], AbstractContextManager[object]]] = [
        lambda tx: tx.path("p"),
        lambda tx: tx.dir("d"),
        lambda tx: tx.open("o"),
        lambda tx: tx.filesystem("f"),
        lambda tx: tx.parquet_writer(TABLE.schema, "w"),
    ]
    with local(target) as store:
        for block in blocks:
            with pytest.raises(KeyError) as caught, store.staged_write("append") as tx:
                tx.write("a", b"1")
                with block(tx):
                    raise mine
            assert caught.value is mine
            assert tx.receipt.phase == "rolled_back"
        with pytest.raises(StopIteration), store.staged_write("append") as tx:
            raise StopIteration
    assert not target.exists()
    assert leftovers(target) == []


def test_a_source_that_breaks_off_leaves_nothing_and_what_is_no_source_is_refused(target: Path) -> None:
    closed: list[bool] = []

    def breaks() -> Iterator[bytes]:
        yield b"1"
        raise ConnectionError("broke off")

    def of_text() -> Iterator[Any]:
        try:
            yield "text"
        finally:
            closed.append(True)

    with local(target) as store, store.staged_write("append") as tx:
        with pytest.raises(ConnectionError):
            tx.put_stream("a", breaks())
        wrong: Any
        for wrong in (io.StringIO("text"), ["text"]):
            with pytest.raises(InvalidInput):
                tx.put_stream("a", wrong)
        source = of_text()
        with pytest.raises(InvalidInput):
            tx.put_stream("a", source)
        assert closed, "a generator is not left half run"
        with pytest.raises(StagingError), tx.path("nothing"):
            pass
        assert tx.entries == ()
        tx.write("a", b"1")
    assert tree(target) == {"a": b"1"}


def test_whatever_a_check_raises_ends_its_call_alone(target: Path) -> None:
    def exits(entries: object) -> None:
        raise SystemExit

    with local(target) as store:
        with pytest.raises(SystemExit), store.staged_write("append", validate=[exits]) as tx:
            tx.write("a", b"1")
        assert tx.receipt.phase == "rolled_back"
        with store.staged_write("append") as tx:
            tx.write("a", b"2")
    assert tree(target) == {"a": b"2"}


def test_many_threads_stage_at_once(target: Path) -> None:
    with local(target) as store, store.staged_write("append") as tx:
        threads = [threading.Thread(target=tx.write, args=(f"f{n}", str(n))) for n in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert tree(target) == {f"f{n}": str(n).encode() for n in range(20)}


# ------------------------------------------------------------------------------------------------------------- the thread


def test_children_share_the_thread_of_their_store_until_it_closes(tmp_path: Path) -> None:
    seen: set[int] = set()
    before = threading.active_count()
    with local(tmp_path, lambda event: seen.add(threading.get_ident())) as parent:
        children = [parent.child(f"t{n}") for n in range(5)]
        assert threading.active_count() == before, "opening a store starts nothing"
        for child in children:
            with child, child.staged_write("full_drop") as tx:
                tx.write("a", b"1")
        assert len(seen) == 1
        assert threading.get_ident() not in seen
        late = parent.child("late")
    for use in (parent.status, late.status, lambda: late.begin("append")):
        with pytest.raises(WrongState, match="closed"):
            use()
    parent.close()
    late.close()
    assert [f"t{n}/a" in tree(tmp_path) for n in range(5)] == [True] * 5


def test_a_store_closed_within_a_block_rolls_it_back(target: Path) -> None:
    store = local(target)
    with pytest.raises(WrongState), store.staged_write("append") as tx:
        tx.write("a", b"1")
        store.close()
    assert tx.phase is Phase.ROLLED_BACK
    assert not target.exists()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_it_works_under_a_running_loop(target: Path, backend: str) -> None:
    store = local(target)

    async def cell(name: str) -> str:  # of a notebook
        with store.staged_write("append") as tx:
            tx.write(name, b"1")
        return tx.receipt.phase

    assert [anyio.run(cell, name, backend=backend) for name in "ab"] == ["committed", "committed"]
    store.close()
    assert tree(target) == {"a": b"1", "b": b"1"}


def test_an_observer_that_calls_the_store_itself_is_refused_instead_of_waiting_for_ever() -> None:
    refused: list[Exception] = []

    def call(event: Event) -> None:
        if isinstance(event, Finished):
            try:
                store.status()
            except RuntimeError as error:
                refused.append(error)

    store = sync.open_store(MemoryDriver(storage=MemoryStorage()), observers=[call])
    with store, store.staged_write("append") as tx:
        tx.write("a", b"1")
    assert len(refused) == 1


# ----------------------------------------------------------------------------------------------------------------- Ctrl-C


@pytest.fixture
def interrupt() -> Iterator[Callable[[], None]]:
    """A Ctrl-C; whoever started the tests may have let them ignore it."""
    main = threading.main_thread().ident
    assert main is not None
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.pthread_kill(main, signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_a_block_rolls_back(target: Path, interrupt: Callable[[], None]) -> None:
    with local(target) as store:
        with pytest.raises(KeyboardInterrupt), store.staged_write("append") as tx:
            tx.write("a", b"1")
            interrupt()
            threading.Event().wait()
        assert tx.receipt.phase == "rolled_back"
        assert store.status().transactions == ()
    assert not target.exists()
    assert leftovers(target) == []


def test_ctrl_c_while_a_call_waits_cancels_it_before_it_is_raised(target: Path, interrupt: Callable[[], None]) -> None:
    cancelled: list[bool] = []

    async def waits(entries: object) -> None:
        interrupt()
        try:
            await anyio.sleep_forever()
        finally:
            cancelled.append(True)

    with local(target) as store:
        with pytest.raises(KeyboardInterrupt), store.staged_write("append", validate=[waits]) as tx:
            tx.write("a", b"1")
        assert cancelled
        assert tx.receipt.phase == "rolled_back"
        with store.staged_write("append") as tx:
            tx.write("a", b"2")
    assert tree(target) == {"a": b"2"}


def test_ctrl_c_after_the_decision_is_raised_when_the_commit_is_complete(
    target: Path, interrupt: Callable[[], None]
) -> None:
    def at_the_decision(event: Event) -> None:
        if isinstance(event, Decided):
            interrupt()

    with local(target, at_the_decision) as store:
        with pytest.raises(KeyboardInterrupt) as caught, store.staged_write("append") as tx:
            tx.write("a", b"1")
        assert tx.receipt.phase == "committed"
        assert caught.value.__notes__ == [f"staged: transaction {tx.id} is committed all the same."]
        assert store.status().head is HeadState.FREE
    assert tree(target) == {"a": b"1"}


def test_a_block_that_was_entered_before_ctrl_c_could_keep_it_from_that_is_left(
    target: Path, interrupt: Callable[[], None]
) -> None:
    came, left = threading.Event(), []

    def handle(*_: object) -> None:
        came.set()
        raise KeyboardInterrupt

    @asynccontextmanager
    async def manager() -> AsyncIterator[None]:
        interrupt()
        came.wait()
        try:
            yield
        except KeyboardInterrupt as error:
            left.append(error)
            raise

    signal.signal(signal.SIGINT, handle)
    with local(target) as store, pytest.raises(KeyboardInterrupt) as caught, sync.Block(store._loop, manager()):
        pytest.fail("the block was entered")
    assert left == [caught.value]


def test_a_second_ctrl_c_does_not_wait(target: Path, interrupt: Callable[[], None]) -> None:
    first, go_on = threading.Event(), threading.Event()

    def handle(*_: object) -> None:
        first.set()
        raise KeyboardInterrupt

    def blocks(entries: object) -> None:  # the store's own thread: it cannot be cancelled
        interrupt()
        first.wait()
        interrupt()
        go_on.wait(30)

    signal.signal(signal.SIGINT, handle)
    with local(target) as store:
        tx = store.begin("append", validate=[blocks])
        tx.write("a", b"1")
        with pytest.raises(KeyboardInterrupt):
            tx.prepare()
        assert tx.phase == Phase.STAGING, "it was not waited for"
        go_on.set()
    assert tx.phase.value == "rolled back"
    assert not target.exists()


def test_a_call_that_ctrl_c_ended_before_its_turn_came_does_nothing(
    target: Path, interrupt: Callable[[], None]
) -> None:
    busy, go_on = threading.Event(), threading.Event()
    main = threading.main_thread().ident
    assert main is not None

    def handing_over() -> bool:
        return any(
            frame.f_code.co_name == "start_task_soon" for frame, _ in traceback.walk_stack(sys._current_frames()[main])
        )

    def blocks(entries: object) -> None:  # the store's own thread: whoever calls meanwhile waits for a turn
        busy.set()
        while not handing_over():
            time.sleep(0)
        interrupt()
        go_on.wait(30)

    with local(target) as store:
        first, second = store.begin("append", validate=[blocks]), store.begin("append")
        preparing = threading.Thread(target=first.prepare)
        preparing.start()
        busy.wait()
        with pytest.raises(KeyboardInterrupt):
            second.write("late", b"1")
        go_on.set()
        preparing.join()
        store.status()
        assert second.entries == ()
        second.commit()
    assert tree(target) == {}


def test_ctrl_c_at_any_moment_leaves_one_whole_generation_and_a_store_that_works(
    target: Path, interrupt: Callable[[], None], figure: Callable[[str, str], None]
) -> None:
    def load(generation: int) -> None:
        with local(target) as store, store.staged_write("full_drop") as tx:
            for name in "ab":
                tx.write(name, str(generation))

    load(0)
    began = time.monotonic()
    load(0)
    whole = time.monotonic() - began
    ended, committed, generation = 0, 0, 0
    attempts = 40 * int(os.environ.get("STAGED_SOAK", "1"))
    for attempt in range(1, attempts + 1):
        timer = threading.Timer(1.2 * whole * random.random(), interrupt)
        try:
            timer.start()
            load(attempt)
            ended += 1
            timer.join()
        except KeyboardInterrupt:
            pass
        finally:
            timer.join()
        (found,) = {int(content) for content in tree(target).values()}
        assert len(tree(target)) == 2
        assert found in (generation, attempt)
        committed += found == attempt
        generation = found
    load(attempts + 1)
    assert set(tree(target).values()) == {str(attempts + 1).encode()}
    figure(
        "Ctrl-C",
        f"{attempts - ended} of {attempts} blocks interrupted, {committed - ended} of them committed, never a mixture",
    )
    assert ended < attempts
