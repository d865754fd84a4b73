"""Cancellation at every await of every phase, in every way: old or new, never swallowed, and nobody after it waits."""

from __future__ import annotations

import itertools
import os
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from pathlib import Path

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from cancelling import (
    Backend,
    Canceller,
    Report,
    Scenario,
    Scene,
    Stopper,
    Way,
    World,
    scoped,
    stop_a_thread,
    sweep,
    timed,
)

from staged import Exists, StagingError, StorageError, open_store
from staged.commit import Stop, acquire
from staged.control import Target
from staged.drivers.local import LocalDriver
from staged.lifecycle import Transaction
from staged.model import Decided, Mode
from staged.store import Store
from staged.testing.exploration import KINDS, PRIORS, Kind, Work
from staged.testing.faults import Moment

Figure = Callable[[str, str], None]
SOAK = int(os.environ.get("STAGED_SOAK", "1"))

OLD = PRIORS["overlapping"]
WORKS = [
    (Work(Mode.APPEND, (("a", b"new"), ("b", b"new"))), "disjoint"),
    (Work(Mode.ERROR, (("p=0/f0", b"new"), ("a", b"new"))), "none"),
    (Work(Mode.IGNORE, (("p=0/f0", b"new"),)), "none"),
    (Work(Mode.OVERWRITE_FILES, (("p=0/f0", b"new"), ("a", b"new")), deletes=("old-3",), key="key"), "overlapping"),
    (Work(Mode.OVERWRITE_PARTITIONS, (("p=0/f0", b"new"), ("p=1/f0", b"new"))), "partitions"),
    (Work(Mode.FULL_DROP, (("p=0/f0", b"new"), ("a", b"new"))), "overlapping"),
]
REPLACE, DROP = WORKS[3][0], WORKS[5][0]


class Mine(Exception):
    """A user's own exception."""


async def stage(scene: Scene, store: Store, work: Work) -> None:
    """A block."""
    async with store.staged_write(work.mode, grace=scene.grace, key=work.key) as tx:
        scene.transactions.append(tx)
        scene.gate.phase = "staging"
        for name, data in work.files:
            await tx.write(name, data)
        for name in work.deletes:
            await tx.delete(name)
        scene.gate.phase = "prepare"


def blocks() -> list[Scenario]:
    """A block that commits, for each mode, and one below a target that has a control area of its own."""
    found = []
    for work, prior in WORKS:

        async def run(scene: Scene, work: Work = work) -> None:
            await stage(scene, scene.store, work)

        found.append(Scenario(work.mode.value, PRIORS[prior], work.apply(PRIORS[prior]), run))

    async def child(scene: Scene) -> None:
        await stage(scene, scene.store.child("below"), DROP)

    old = {"top": b"old", "below/p=0/f0": b"old", "below/z": b"old"}
    new = {"top": b"old", **{f"below/{name}": data for name, data in DROP.files}}
    return [*found, Scenario("child", old, new, child, child="below")]


# ---------------------------------------------------------------------------------------------------- what does not commit


async def every_verb(scene: Scene) -> None:
    """Everything that stages, and then a user's own exception."""
    mine = Mine()
    source = f"{scene.world.root}/source"
    await anyio.Path(scene.world.root).mkdir(parents=True, exist_ok=True)
    await anyio.Path(source).write_bytes(b"source")

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(2):
            await scene.gate("the source", "before")
            yield b"x" * 600_000

    try:
        async with scene.store.staged_write("append", grace=scene.grace) as tx:
            scene.transactions.append(tx)
            scene.gate.phase = "staging"
            await tx.write("a", b"1")
            await tx.write("a", b"2", overwrite=True)
            await tx.put_stream("d/b", chunks())
            await tx.put_file("d/c", source=source)
            async with tx.path("e") as local:
                await anyio.Path(local).write_bytes(b"e")
            async with tx.dir("f", overwrite=True) as local:
                await anyio.Path(f"{local}/g").write_bytes(b"g")
                await anyio.Path(f"{local}/h").write_bytes(b"h")
            async with tx.open("i") as file:
                await file.write(b"1")
                scene.gate.phase = "rollback"
                raise mine
    except Mine as error:
        assert error is mine
        assert not hasattr(error, "__notes__")


async def begin(scene: Scene) -> None:
    """Only the way into a block that then finds nothing to do."""
    async with scene.store.staged_write("ignore", grace=scene.grace):
        scene.gate.armed = False


async def refused_by_a_check(scene: Scene) -> None:
    """A check that waits, and raises."""

    async def check(entries: object) -> None:
        scene.gate.phase = "validation"
        await scene.gate("check", "before")
        scene.gate.phase = "rollback"
        raise Mine

    try:
        async with scene.store.staged_write("append", grace=scene.grace, validate=[check]) as tx:
            scene.transactions.append(tx)
            scene.gate.phase = "staging"
            await tx.write("a", b"1")
    except Mine:
        raise AssertionError("raised as it is") from None
    except StagingError:
        pass


async def refused_by_the_target(scene: Scene) -> None:
    """A conflict, found under the head."""
    try:
        await stage(scene, scene.store, Work(Mode.APPEND, (("old-3", b"new"),)))
    except Exists:
        pass


async def done_before(world: World) -> None:
    await Work(Mode.OVERWRITE_FILES, (("old-3", OLD["old-3"]),), key="key")(world.store())


async def nothing_to_do(scene: Scene) -> None:
    """A key that was committed before: writes go nowhere."""
    await stage(scene, scene.store, REPLACE)


# ----------------------------------------------------------------------------------------------------------- without a block


async def calls(scene: Scene) -> None:
    """begin, prepare, commit, and a store that closes over what is still open."""
    async with scene.store as store:
        tx = await store.begin(DROP.mode, grace=scene.grace)
        scene.transactions.append(tx)
        scene.gate.phase = "staging"
        for name, data in DROP.files:
            await tx.write(name, data)
        scene.gate.phase = "prepare"
        await tx.prepare()
        await tx.commit()
        scene.gate.phase = "begin"
        scene.transactions.append(await store.begin("append", grace=scene.grace))
        scene.transactions.append(await store.begin("append", grace=scene.grace))
        await scene.transactions[-1].write("b", b"2")
        scene.gate.phase = "close"


async def leave_prepared(world: World) -> None:
    async with world.store() as store:
        tx = await store.begin(DROP.mode)
        for name, data in DROP.files:
            await tx.write(name, data)
        await tx.prepare()
    world.prepared = tx.id


async def resume(scene: Scene) -> None:
    async with scene.store as store:
        scene.gate.phase = "resume"
        tx = await store.resume(scene.world.prepared, grace=scene.grace)
        scene.transactions.append(tx)
        scene.gate.phase = "commit"
        await tx.commit()
        scene.gate.phase = "close"


# ------------------------------------------------------------------------------------------------------- recover, gc, waiting


async def leave_ruins(world: World) -> None:
    """One process that died while staging, and one after its decision."""
    await world.dies(Work(Mode.APPEND, (("x", b"x"), ("y", b"y"))), "close y")
    await world.dies(REPLACE, "publish")


async def recover(scene: Scene) -> None:
    scene.gate.phase = "recover"
    await scene.store.recover()


async def leave_rubbish(world: World) -> None:
    """Commits, trees put aside, and what is prepared, dead or both."""
    for _ in range(2):
        await Work(Mode.FULL_DROP, tuple(OLD.items()))(world.store())
    await world.dies(Work(Mode.APPEND, (("x", b"x"), ("y", b"y"))), "close y")
    await leave_prepared(world)


async def gc(scene: Scene) -> None:
    scene.gate.phase = "gc"
    await scene.store.gc(older_than=timedelta(0))


async def wait(scene: Scene) -> None:
    """A commit that waits for another one."""
    driver = scene.world.driver()
    other = await acquire(Target(driver, await driver.probe()), "0" * 24, "other", 0.0, Stop())
    scene.released.append(other.release)
    scene.gate.armed = False
    async with scene.store.staged_write("append", grace=scene.grace) as tx:
        scene.transactions.append(tx)
        scene.gate.armed, scene.gate.phase = True, "prepare"


OTHERS = [
    Scenario("begin", OLD, None, begin),
    Scenario("every verb", OLD, None, every_verb, threads=True),
    Scenario("a check that refuses", OLD, None, refused_by_a_check),
    Scenario("a conflict", OLD, None, refused_by_the_target),
    Scenario("a key that is done", OLD, None, nothing_to_do, before=done_before),
    Scenario("calls", OLD, DROP.apply(OLD), calls, keeps=True),
    Scenario("resume", OLD, DROP.apply(OLD), resume, before=leave_prepared, keeps=True),
    Scenario("recover", OLD, REPLACE.apply(OLD), recover, before=leave_ruins, decided=True, period=0.001),
    Scenario("gc", OLD, None, gc, before=leave_rubbish, period=0.001),
    Scenario("waiting for another one", OLD, None, wait, period=0.2, most=20),
]


# --------------------------------------------------------------------------------------------------------------------- tests


def check(report: Report, least: int, name: str, figure: Figure) -> None:
    figure(f"cancellation, {name}", str(report))
    assert not report.failures, "\n".join(report.failures[:20])
    assert report.histories >= least


def test_a_block_cancelled_at_any_await_ends_old_or_new_and_its_caller_hears_of_it(
    figure: Figure, tmp_path: Path
) -> None:
    report = Report()
    for scenario in blocks():
        for kind in KINDS:
            sweep(report, scenario, kind, str(tmp_path), every=max(1, 30 // SOAK))
    check(report, 1_000, "blocks", figure)


def test_all_else_cancelled_at_any_await_keeps_the_same_promises(figure: Figure, tmp_path: Path) -> None:
    report = Report()
    for scenario in OTHERS:
        every = {"begin": 3, "every verb": 60}.get(scenario.name, 30)
        for kind in KINDS[:1] if scenario.threads else KINDS:
            sweep(report, scenario, kind, str(tmp_path), every=max(1, every // SOAK))
    check(report, 1_000, "all else", figure)


def test_on_a_directory_as_well(figure: Figure, tmp_path: Path) -> None:
    report = Report()
    chosen = {"append", "full_drop", "child", "every verb", "calls", "recover"}
    for scenario in [*blocks(), *OTHERS]:
        if SOAK > 1 or scenario.name in chosen:
            sweep(report, scenario, None, str(tmp_path), every=max(1, 60 // SOAK))
    check(report, 60, "on a directory", figure)


# ------------------------------------------------------------------------------------------- a block that goes on afterwards


async def write(tx: Transaction) -> None:
    await tx.write("a", b"second" * 300_000, overwrite=True)


async def write_piecewise(tx: Transaction) -> None:
    async with tx.open("a", overwrite=True) as file:
        for _ in range(3):
            await file.write(b"second" * 100_000)


async def put_stream(tx: Transaction) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"second" * 100_000

    await tx.put_stream("a", chunks(), overwrite=True)


async def write_to_a_path(tx: Transaction) -> None:
    async with tx.path("a", overwrite=True) as local:
        await anyio.Path(local).write_bytes(b"second" * 300_000)


async def write_to_a_directory(tx: Transaction) -> None:
    async with tx.dir(overwrite=True) as local:
        await anyio.Path(f"{local}/a").write_bytes(b"second" * 300_000)
        await anyio.Path(f"{local}/b").write_bytes(b"second" * 300_000)


VERBS = [write, write_piecewise, put_stream, write_to_a_path, write_to_a_directory]


def goes_on(
    backend: Backend,
    way: Way,
    number: int,
    kind: Kind | None,
    root: str,
    verb: Callable[[Transaction], Awaitable[None]],
) -> tuple[Canceller, str]:
    """A block in which one verb is cancelled at the n-th moment; whether it was, and what the target then holds of it."""
    world = World(kind, {}, root)
    gate = Canceller(number, way)
    gate.armed = False
    heard: list[str] = []

    async def block() -> None:
        try:
            async with open_store(world.driver(gate)).staged_write("append", grace=0.02) as tx:
                await tx.write("a", b"first")
                gate.armed = True

                async def work() -> None:
                    await verb(tx)

                if way == "timeout":
                    await timed(gate, work, heard)
                else:
                    await scoped(gate, work, heard)
                gate.armed = False
                await tx.write("z", b"z")
        except StagingError as error:
            assert error.outcome == "untouched"
            heard.append("refused")
        assert tx.receipt.phase == ("rolled_back" if "refused" in heard else "committed")

    anyio.run(block, backend=backend)
    files = world.files()
    expected = {
        "a": b"second" * 300_000,
        **({"b": b"second" * 300_000} if verb is write_to_a_directory else {}),
        "z": b"z",
    }
    if "refused" in heard:
        found = "refused" if not files else "refused, but there"
    else:
        found = "new" if files == expected else "old" if files == {"a": b"first", "z": b"z"} else f"torn: {files}"
    if (gate.struck is not None) != ("cancelled" in heard) or (gate.struck is None and found != "new"):
        found += f", but {heard}"
    return gate, found


def test_a_write_that_is_cancelled_is_staged_whole_or_not_at_all_and_its_block_goes_on(
    figure: Figure, tmp_path: Path
) -> None:
    found: Counter[str] = Counter()
    ways: list[tuple[Backend, Way]] = [("asyncio", "timeout"), ("trio", "hang")]
    for verb, kind, (backend, way) in itertools.product(VERBS, [KINDS[0], None], ways):
        for number in itertools.count(1):
            root = f"{tmp_path}/{verb.__name__}-{kind is None}-{backend}-{way}-{number}"
            gate, ended = goes_on(backend, way, number, kind, root, verb)
            if gate.struck is None:
                assert ended == "new"
                break
            found[ended] += 1
            # An upload whose answer was lost, or that the store did not end within the grace, is refused with the commit.
            sure = way != "hang" and not gate.struck[1].startswith("after stage")
            assert ended in (("old", "new") if sure else ("old", "new", "refused")), (root, gate.struck, ended)
    assert found["old"] > 100
    assert found["new"] > 20
    figure("cancellation, of a write in a block that goes on", ", ".join(f"{n} {end}" for end, n in found.items()))


@pytest.mark.anyio
@pytest.mark.parametrize("kind", [KINDS[0], None], ids=["memory", "directory"])
async def test_a_file_that_lost_a_write_to_a_cancellation_takes_no_more_and_is_not_staged(
    kind: Kind | None, tmp_path: Path
) -> None:
    world = await anyio.to_thread.run_sync(lambda: World(kind, {}, str(tmp_path)))

    async def gate(name: str, moment: Moment) -> None:
        if (name, moment) == ("write a", "after"):
            await anyio.lowlevel.checkpoint()

    async with open_store(world.driver(gate)).staged_write("append") as tx:
        await tx.write("a", b"whole")
        with pytest.raises(StagingError, match="nothing of the file is staged"):
            async with tx.open("a", overwrite=True) as file:
                await file.write(b"1" * 600_000)
                with anyio.CancelScope() as scope:
                    scope.cancel()
                    await file.write(b"2" * 600_000)
                assert scope.cancelled_caught
                with pytest.raises(StagingError):
                    await file.write(b"3")
    assert await anyio.to_thread.run_sync(world.files) == {"a": b"whole"}


# --------------------------------------------------------------------------------------- threads that outlive their callers


def test_a_thread_that_outlives_its_caller_never_writes_into_the_target_or_a_later_transaction(
    figure: Figure, tmp_path: Path
) -> None:
    """Stopped at any of its system calls: of a staged write, an adoption, a lock, a decision, a publication, a rollback."""
    every = max(1, 80 // SOAK)
    found: Counter[str] = Counter()
    works = [WORKS[0], WORKS[3], WORKS[5]]
    backends: list[Backend] = ["asyncio", "trio"]
    for (work, prior), backend, only in itertools.product(works, backends, (None, "lock", "lease", "head")):
        first = 1 if only else random.Random(f"{work} {backend}").randint(1, every)
        for number in range(first, 10**6, every if only is None else max(1, 4 // SOAK)):
            root = f"{tmp_path}/{work.mode}-{backend}-{only}-{number}"
            stopper = Stopper(number, only=only)
            grace = 0.03 * (number % 2)
            ended, wrong = stop_a_thread(backend, stopper, work, PRIORS[prior], root, grace=grace)
            assert not wrong, (work, backend, number, stopper.stopped, wrong)
            if stopper.stopped is None:
                break
            found[ended] += 1
    ends = ", ".join(f"{count} {name}" for name, count in sorted(found.items()))
    figure("cancellation, with a thread stopped at a system call", f"{found.total()} stops: {ends}")
    assert found.total() >= 30


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_thread_that_still_publishes_keeps_the_lock_from_the_next_one(backend: Backend, tmp_path: Path) -> None:
    for work, prior in (WORKS[0], WORKS[3], WORKS[5]):
        stopper = Stopper(1, after=Decided)
        root = f"{tmp_path}/{work.mode}"
        ended, wrong = stop_a_thread(backend, stopper, work, PRIORS[prior], root, grace=0.0, patient=True)
        assert not wrong
        assert stopper.stopped is not None
        assert ended == "new, the next one busy"


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_adoption_that_outlives_its_caller_and_the_rest_of_the_block_never_lands_in_the_target(
    backend: Backend, tmp_path: Path
) -> None:
    """The block goes on without waiting for it, and commits: alone, or refused because of what it did not record."""
    world = World(None, OLD, str(tmp_path))
    stopper = Stopper(1, only="late")  # the rename into the staged tree
    stopped = threading.Event()
    stopper.strike = stopped.set

    async def block() -> None:
        async with world.store().staged_write("full_drop", grace=0.0) as tx:
            await tx.write("a", b"new")
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(cancel, scope)
                    async with tx.path("late") as local:
                        await anyio.Path(local).write_bytes(b"late")
                        stopper.begin()
            threading.Timer(0.1, stopper.go).start()

    async def cancel(scope: anyio.CancelScope) -> None:
        await anyio.to_thread.run_sync(stopped.wait)
        scope.cancel()

    async def wait_for_the_thread() -> None:
        while (await world.store().gc(older_than=timedelta(0))).alive:  # noqa: ASYNC110 - asked, not told
            await anyio.sleep(0.01)

    expected = {"a": b"new"}
    with stopper:
        try:
            anyio.run(block, backend=backend)
        except StagingError:
            expected = OLD
        anyio.run(wait_for_the_thread)
    assert stopper.stopped is not None
    assert world.files() == expected
    assert world.left() == []


@pytest.mark.anyio
async def test_a_thread_that_comes_after_the_abort_of_its_write_leaves_nothing(tmp_path: Path) -> None:
    driver = LocalDriver(f"{tmp_path}/target", durability="none")

    async def log(handle: str) -> None:
        pass

    await driver.probe()
    writer = await driver.stage("0" * 24, "a", log)
    await writer.abort()
    with pytest.raises(StorageError):
        await writer.write(b"x" * (2 << 20))
    with pytest.raises(StorageError):
        await writer.close()
    found = await anyio.to_thread.run_sync(lambda: [path for path in tmp_path.rglob("*") if path.is_file()])
    assert found == []
