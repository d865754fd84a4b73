"""Who else comes by while a commit is under way: calls of the same transaction, other writers, gc; at every call."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from staged import CommitIncomplete, StagedError, StagingError, StorageError, WrongState, open_store
from staged.driver import Driver
from staged.drivers.local import LocalDriver
from staged.drivers.memory import MemoryDriver, MemoryStorage
from staged.lifecycle import Transaction
from staged.model import Receipt
from staged.states import Phase
from staged.store import Store
from staged.testing.faults import FaultDriver, Gate, Moment

pytestmark = pytest.mark.anyio

STRIDE = {"memory": 1, "local": max(1, 5 // int(os.environ.get("STAGED_SOAK", "1")))}
"""Over a real directory only each so many-th call is tried, unless there is time."""


class World:
    """One target that several processes open; their drivers are asked through gates."""

    def __init__(self, kind: str, root: str) -> None:
        self.kind, self.root, self.storage = kind, root, MemoryStorage()

    def driver(self) -> Driver:
        if self.kind == "memory":
            return MemoryDriver(storage=self.storage)
        return LocalDriver(f"{self.root}/target", durability="none")

    def process(self, gate: Gate | None = None) -> Store:
        return open_store(self.driver() if gate is None else FaultDriver(self.driver(), gate))

    def _files(self) -> dict[str, bytes]:
        found = {}
        for directory, _, files in os.walk(f"{self.root}/target"):
            for name in files:
                path = os.path.join(directory, name)
                with open(path, "rb") as file:
                    found[os.path.relpath(path, f"{self.root}/target")] = file.read()
        return found

    async def files(self) -> dict[str, bytes]:
        return self.storage.below("target") if self.kind == "memory" else await anyio.to_thread.run_sync(self._files)


@pytest.fixture(params=["memory", "local"])
def world(request: pytest.FixtureRequest, tmp_path: os.PathLike[str]) -> World:
    return World(request.param, str(tmp_path))


async def load(store: Store, mode: str, **files: bytes) -> None:
    async with store.staged_write(mode) as tx:
        for name, data in files.items():
            await tx.write(name, data)


class At:
    """Does something before the n-th call; lets every call fail from one of these on, or from when it is told to."""

    def __init__(
        self, number: int = -1, work: Callable[[], Awaitable[None]] | None = None, dies_at: tuple[str, ...] = ()
    ) -> None:
        self.number, self.work, self.calls, self.dead, self._dies_at = number, work, list[str](), False, dies_at

    async def __call__(self, name: str, moment: Moment) -> None:
        if moment == "before":
            self.calls.append(name)
            if len(self.calls) == self.number + 1 and self.work is not None:
                await self.work()
        self.dead = self.dead or name in self._dies_at
        if self.dead:
            raise StorageError("a dead process does nothing more")


# ---------------------------------------------------------------------------------------- calls of the same transaction


@pytest.mark.parametrize("second", ["prepare", "commit", "rollback"])
async def test_a_call_that_comes_while_a_commit_is_under_way_waits_for_it_and_changes_nothing(
    tmp_path: os.PathLike[str], second: str
) -> None:
    number, calls = 0, 1
    while number < calls:
        world = World("memory", str(tmp_path))
        await load(world.process(), "append", old=b"1")
        said: list[object] = []

        async def call(tx: Transaction, said: list[object] = said) -> None:
            try:
                said.append(await getattr(tx, second)())
            except WrongState as error:
                said.append(error)

        async def come_by() -> None:
            tasks.start_soon(call, tx)  # noqa: B023 - those of this round
            for _ in range(5):
                await anyio.lowlevel.checkpoint()

        gate = At(-1, come_by)
        store = world.process(gate)
        tx = await store.begin("full_drop")
        await tx.write("new", b"1")
        gate.number, before = len(gate.calls) + number, len(gate.calls)
        async with anyio.create_task_group() as tasks:
            receipt = await tx.commit()
        calls = len(gate.calls) - before
        assert (receipt.phase, receipt.files, tx.phase) == ("committed", 1, Phase.COMMITTED)
        wanted = {"prepare": type(None), "commit": Receipt, "rollback": WrongState}[second]
        assert [type(answer) for answer in said] == [wanted], gate.calls[before + number]
        assert said[0] == receipt or second != "commit"
        assert await world.files() == {"new": b"1"}
        assert world.storage.uploads == {}
        assert (await store.status()).transactions == ()
        number += 1
    assert number > 20


# --------------------------------------------------------------------------------------------------------- other writers


async def decided(world: World, mode: str, **files: bytes) -> str:
    """Leave a commit that is decided and not published, as a process that died then would; its transaction."""

    async def fail(name: str, moment: Moment) -> None:
        if name in ("publish", "swap"):
            raise StorageError("the process is about to die")

    with pytest.raises(CommitIncomplete) as caught:
        await load(world.process(fail), mode, **files)
    assert caught.value.transaction is not None
    return caught.value.transaction


@pytest.mark.parametrize("mode", ["append", "full_drop"])
async def test_nobody_else_gets_the_lock_while_a_writer_completes_a_dead_ones_commit_and_then_makes_its_own(
    world: World, mode: str
) -> None:
    await load(world.process(), "append", old=b"0")
    dead = await decided(world, mode, a=b"1")
    other = world.driver()
    await other.probe()
    calls: list[str] = []
    free: set[int] = set()

    async def gate(name: str, moment: Moment) -> None:
        if (lock := await other.lock("lock")) is not None:
            lock.release()
            free.add(len(calls))
        calls.append(f"{moment} {name}")

    async with world.process(gate).staged_write("append") as tx:
        await tx.write("b", b"2")
    taken, ended = calls.index("after lock lock"), calls.index(f"after put_segment outcome/{tx.id}")
    assert f"after put_segment outcome/{dead}" in calls[taken:ended], "the dead one's was not completed on the way"
    assert [calls[at] for at in range(taken, ended) if at in free] == []
    assert {0, len(calls) - 1} <= free
    assert await world.files() == ({"old": b"0"} if mode == "append" else {}) | {"a": b"1", "b": b"2"}


# -------------------------------------------------------------------------------------------------------------------- gc


@pytest.mark.parametrize("then", ["goes on", "dies at once", "dies once it is decided"])
@pytest.mark.parametrize("mode", ["overwrite_files", "full_drop"])
async def test_gc_at_zero_at_any_call_of_a_commit_takes_nothing_that_its_completion_needs(
    world: World, mode: str, then: str
) -> None:
    await load(world.process(), "append", old=b"0", a=b"0")
    seen: Counter[str] = Counter()
    numbers = [-1]  # at none, to count them
    for number in numbers:
        at = At(dies_at=("publish", "swap") if then == "dies once it is decided" else ())

        async def collect(at: At = at) -> None:
            recovered = await world.process().gc(older_than=timedelta(0))
            assert recovered.rolled_back == (), "it lives"
            at.dead = then == "dies at once"

        at.work = collect
        tx = await world.process(at).begin(mode)
        await tx.write("a", f"{number}".encode())
        await tx.write(f"n{number}", b"1")
        old = await world.files()
        new = (old if mode != "full_drop" else {}) | {"a": f"{number}".encode(), f"n{number}": b"1"}
        before = len(at.calls)
        at.number = before + number
        try:
            receipt = await tx.commit()
            wanted = "committed"
            assert receipt.phase == wanted
        except StagedError as error:
            assert at.dead, f"gc at {at.calls[at.number]} did it: {error!r}"
            wanted = error.outcome
        if number < 0:
            numbers += range(0, len(at.calls) - before, STRIDE[world.kind])
        await world.process().recover()
        if wanted == "unknown":
            wanted = (await world.process().outcome(tx.id)).state
        seen[wanted] += 1
        assert await world.files() == (new if wanted == "committed" else old), (wanted, at.calls[at.number])
        await world.process().gc(older_than=timedelta(0))
        assert await world.files() == (new if wanted == "committed" else old)
    assert numbers[-1] >= 10
    assert (seen["committed"] == seen.total()) == (then != "dies at once"), seen


@pytest.mark.parametrize("mode", ["overwrite_files", "full_drop"])
async def test_a_commit_that_is_decided_and_dies_while_gc_is_at_any_call_keeps_its_plan_and_its_manifest(
    world: World, mode: str
) -> None:
    await load(world.process(), "append", old=b"0")
    number, calls = 0, 1
    while number < calls:
        tx = ""

        async def decide() -> None:
            nonlocal tx
            tx = await decided(world, mode, **{f"n{number}": b"1"})  # noqa: B023 - at once

        at, old = At(number, decide), await world.files()
        await world.process(at).gc(older_than=timedelta(0))
        calls = max(calls, len(at.calls))
        if tx:
            await world.process().recover()
            assert await world.files() == (old if mode != "full_drop" else {}) | {f"n{number}": b"1"}, at.calls[number]
        number += STRIDE[world.kind]
    assert number > 5


async def test_segments_that_an_earlier_attempt_at_the_same_epoch_left_do_no_harm(world: World) -> None:
    """A loss of power may take back the head, and leave what was written for it behind, whole or not."""
    await load(world.process(), "append", old=b"0")
    store = world.process()
    tx = await store.begin("overwrite_files")
    await tx.write("old", b"1")
    await tx.prepare()
    head = await store._driver.read("head")
    assert head is not None
    epochs = []

    async def dies_undecided(name: str, moment: Moment) -> None:
        if moment == "after" and name.startswith("put_segment ledger-"):
            epochs.append(name.split("-")[1])
            raise StorageError("the process is about to die")

    for damage in (None, b"", b"half of i"):
        await store.aclose()
        store = world.process(dies_undecided)
        with pytest.raises(StagingError):
            await (await store.resume(tx.id)).commit()
        driver = world.driver()
        now = await driver.read("head")
        assert now is not None
        assert await driver.cas("head", head.body, now.token, durable=True)
        if damage is not None:
            segments = [*await driver.list_control("ledger-"), *await driver.list_control(f"log/{tx.id}-plan-")]
            for segment in segments:
                if f"-{epochs[-1]}-" in segment:
                    await driver.delete_control([segment])
                    assert await driver.put_segment(segment, damage)
    await store.aclose()
    receipt = await (await world.process().resume(tx.id)).commit()
    assert receipt.phase == "committed"
    assert len(set(epochs)) == 1, "not the same epoch"
    assert (await world.process().status()).epoch == int(epochs[0])
    assert await world.files() == {"old": b"1"}
    await load(world.process(), "append", next=b"1")
    await world.process().gc(older_than=timedelta(0))
    await load(world.process(), "append", last=b"1")
    assert await world.files() == {"old": b"1", "next": b"1", "last": b"1"}


LOCK_OF_A_DELETED_FILE = """
import os, sys, anyio
from staged.drivers.local import LocalDriver

async def main():
    driver = LocalDriver(sys.argv[1], durability="none")
    await driver.probe()
    (await driver.lock("lock")).release()
    armed = [True]

    def delete(event, args):
        if event == "fcntl.fcntl" and armed:
            armed.clear()
            os.unlink(sys.argv[2])

    sys.addaudithook(delete)
    print(await driver.lock("lock") is None, armed, await driver.lock("lock") is None)

anyio.run(main)
"""


def test_a_lock_is_not_held_on_a_file_that_was_deleted_before_it_was_taken(tmp_path: Path) -> None:
    """Whoever comes next would lock another file of that name."""
    program = [
        sys.executable,
        "-c",
        LOCK_OF_A_DELETED_FILE,
        str(tmp_path / "target"),
        f"{tmp_path}/_staged/target/lock",
    ]
    run = subprocess.run(program, capture_output=True, text=True, check=False)
    assert run.stdout == "True [] False\n", run.stderr
