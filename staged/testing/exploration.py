"""Every history of a small world: writers stopped, failed or interleaved at every single call of the driver.

The world is a memory store, a prior content and one or two pieces of work. An oracle on plain dicts says what the target may
hold. The exploration says what it came to hold; a difference is a bug in the protocol, and its history is printed.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

import anyio
import trio
import trio.testing

from staged.control import read_head, read_outcome
from staged.driver import Driver
from staged.drivers.memory import MemoryDriver, MemoryStorage, Swap
from staged.errors import StagedError, StorageError
from staged.model import HeadState, Mode
from staged.store import Store, open_store
from staged.testing.faults import Crash, FaultDriver, Gate, Moment
from staged.testing.faults import Plan as FaultPlan
from staged.testing.harness import Files, Harness, Step
from staged.testing.steps import StepName, step_after

__all__ = [
    "FAULT_MOMENTS",
    "KINDS",
    "PRIORS",
    "At",
    "Control",
    "Kind",
    "MemoryHarness",
    "Process",
    "Report",
    "Work",
    "World",
    "attempt",
    "crashes",
    "history",
    "interleavings",
    "replay",
    "run",
    "seeded",
    "works",
]

PRIORS: dict[str, Files] = {
    "none": {},
    "disjoint": {"old-1": b"1", "old-2": b"2"},
    "overlapping": {"p=0/f0": b"old", "p=1/f1": b"old", "old-3": b"3"},
    "partitions": {"p=0/old": b"0", "p=1/old": b"1", "p=9/old": b"9"},
}


@dataclass(frozen=True, slots=True)
class Work:
    """What one writer does: files to write and names to delete, under a mode and perhaps a key."""

    mode: Mode
    files: tuple[tuple[str, bytes], ...]
    deletes: tuple[str, ...] = ()
    key: str | None = None

    def __str__(self) -> str:
        return f"{self.mode.value}({', '.join(name for name, _ in self.files)})"

    async def __call__(self, store: Store, lock_timeout: float = 1000.0) -> str:
        """Do it; returns the transaction's phase on its receipt."""
        async with store.staged_write(self.mode, key=self.key, lock_timeout=lock_timeout) as tx:
            for name, data in self.files:
                await tx.write(name, data)
            for name in self.deletes:
                await tx.delete(name)
        return tx.receipt.phase

    def apply(self, target: Files) -> Files | None:
        """The oracle: the target after a commit, or None where a commit must refuse."""
        written = dict(self.files)
        if self.mode in (Mode.ERROR, Mode.IGNORE) and target:
            return None if self.mode is Mode.ERROR else target
        if self.mode is Mode.APPEND and written.keys() & target.keys():
            return None
        if any(name not in target for name in self.deletes):
            return None
        if self.mode is Mode.FULL_DROP:
            return written
        kept = {name: data for name, data in target.items() if name not in self.deletes}
        if self.mode is Mode.OVERWRITE_PARTITIONS:
            leaves = {name.rpartition("/")[0] for name in written}
            kept = {
                name: data for name, data in kept.items() if not any(name.startswith(f"{leaf}/") for leaf in leaves)
            }
        return kept | written


@dataclass(slots=True)
class Report:
    """What an exploration saw."""

    histories: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    cells: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)
    """By fault and by the step that it befell: how the histories ended of works that change the target."""

    def __str__(self) -> str:
        seen = ", ".join(f"{name}: {count:,}" for name, count in sorted(self.outcomes.items()))
        return f"{self.histories:,} histories ({seen}), {len(self.failures)} failures"

    def __add__(self, other: Report) -> Report:
        cells = {
            cell: self.cells.get(cell, Counter()) + other.cells.get(cell, Counter())
            for cell in self.cells | other.cells
        }
        outcomes = self.outcomes + other.outcomes
        return Report(self.histories + other.histories, outcomes, self.failures + other.failures, cells)


def works(files: Sequence[int] = (1, 2, 5)) -> Iterator[Work]:
    """One piece of work for each mode and number of files; under `overwrite_files` with a delete as well."""
    for mode, count in itertools.product(Mode, files):
        yield Work(mode, tuple((f"p={n % 3}/f{n}", f"{mode.value}-{n}".encode()) for n in range(count)))
    yield Work(Mode.OVERWRITE_FILES, (("new", b"new"),), deletes=("old-1",))
    yield Work(Mode.APPEND, (("keyed", b"keyed"),), key="key")


# ----------------------------------------------------------------------------------------------------- one writer, crashes

Fault = Literal["crash before", "crash after", "crash within", "answer lost", "fails"]
FAULT_MOMENTS: dict[Fault, Moment] = {
    "crash before": "before",
    "crash after": "after",
    "crash within": "within",
    "answer lost": "after",
    "fails": "before",
}


class At:
    """A gate that lets one fault happen at the n-th moment of its kind, and counts the moments."""

    def __init__(self, fault: Fault | None = None, number: int = -1) -> None:
        self.fault: Fault | None = fault
        self.number = number
        self.counts: Counter[str] = Counter()
        self.dead = False
        self.struck: str | None = None
        self.step: StepName = "begin"
        self.struck_at: StepName = "begin"

    async def __call__(self, name: str, moment: Moment) -> None:
        if self.dead:
            raise Crash
        if moment == "before":
            self.step = step_after(self.step, name)
        self.counts[moment] += 1
        if self.fault is None or moment != FAULT_MOMENTS[self.fault] or self.counts[moment] != self.number + 1:
            return
        self.struck, self.struck_at = name, self.step
        if self.fault in ("answer lost", "fails"):
            raise StorageError(f"{self.fault} at {name}", retryable=True)
        self.dead = True
        raise Crash


class MemoryHarness(Harness):
    """A target in memory, of one kind of store; see `MemoryDriver`."""

    def __init__(
        self,
        *,
        fence: Literal["lock", "consumed"] = "lock",
        swap: Swap | None = "exchange",
        folds: bool = False,
        period: float = 30.0,
    ) -> None:
        self.storage = MemoryStorage()
        self.fence: Literal["lock", "consumed"] = fence
        self.swap: Swap | None = swap
        self._make = functools.partial(
            MemoryDriver, "target", storage=self.storage, fence=fence, swap=swap, folds=folds, period=period
        )

    def process(self, step: Step | None = None) -> MemoryDriver:
        return self._make(step=step)

    async def kill(self, driver: Driver) -> None:
        self.storage.kill(driver)

    async def files(self) -> Files:
        return self.storage.below("target")

    async def put(self, path: str, data: bytes) -> None:
        self.storage.put(f"target/{path}", data)

    async def delete(self, path: str) -> None:
        del self.storage.files[f"target/{path}"]

    async def leftovers(self) -> list[str]:
        return [*self.storage.uploads, *self.storage.aside, *self.storage.locks]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of store: a name, and how a fresh target of it is made."""

    name: str
    make: Callable[[], Harness]


KINDS = (
    Kind("exchange under a lock", functools.partial(MemoryHarness, fence="lock", swap="exchange")),
    Kind("entries under a lock", functools.partial(MemoryHarness, fence="lock", swap=None)),
    Kind("two renames, fenced by consuming", functools.partial(MemoryHarness, fence="consumed", swap="renames")),
    Kind("entries, fenced by consuming", functools.partial(MemoryHarness, fence="consumed", swap=None)),
    Kind("cleared first, fenced by consuming", functools.partial(MemoryHarness, fence="consumed", swap="clears")),
)


class World:
    """A target with its prior content, and processes that come and go."""

    def __init__(self, harness: Harness) -> None:
        self.harness = harness

    @classmethod
    async def of(cls, kind: Kind, prior: Files) -> World:
        """A fresh world of a kind that strangers have laid these files into."""
        world = cls(kind.make())
        for name, data in prior.items():
            await world.harness.put(name, data)
        return world

    def process(self, gate: Gate, plan: FaultPlan | str = "") -> Process:
        """A new process with its own store."""

        async def within(name: str) -> None:
            await gate(name, "within")

        driver = self.harness.process(within)
        faults = FaultDriver(driver, gate, plan)
        return Process(open_store(faults), driver, faults)

    async def end(self, process: Process) -> None:
        """Let a process die."""
        await self.harness.kill(process.driver)

    async def control(self) -> Control:
        """What the durable records say, read by a process of its own."""
        driver = self.harness.process()
        head = (await read_head(driver))[0]
        records = [
            key for prefix in ("tx/", "log/", "outcome/", "ledger-") for key in await driver.list_control(prefix)
        ]
        outcomes = [await read_outcome(driver, key.split("/")[1]) for key in records if key.startswith("outcome/")]
        await self.harness.kill(driver)
        committed = any(outcome is not None and outcome.state == "committed" for outcome in outcomes)
        named = f"{head.ledger.key}-0" if head.ledger else None
        return Control(head.state is HeadState.COMMITTED or committed, [key for key in records if key != named])

    async def leftovers(self) -> list[str]:
        """What is left besides the target, the head and the ledger that it names."""
        return [*(await self.control()).records, *await self.harness.leftovers()]


@dataclass(frozen=True, slots=True)
class Process:
    """One process of a world: its store, its driver, and the faults around that."""

    store: Store
    driver: Driver
    faults: FaultDriver


@dataclass(frozen=True, slots=True)
class Control:
    """Whether, by the durable records alone, a decision was made; and which records there are besides head and ledger."""

    decided: bool
    records: list[str]


async def attempt(work: Callable[[], Awaitable[str]]) -> str:
    """What a caller hears: a phase, `untouched`, `committed` or `unknown` of an error, or `crash`."""
    try:
        return await work()
    except Crash:
        return "crash"
    except StagedError as error:
        return error.outcome


async def history(kind: Kind, work: Work, prior: Files, gate: At, again: At | None) -> tuple[str, list[str]]:
    """One history: the work with a fault, then recover, perhaps with a fault of its own, then recover again."""
    world = await World.of(kind, prior)
    process = world.process(gate)
    said = await attempt(functools.partial(work, process.store))
    await world.end(process)
    return await _judge(world, work, prior, said, again)


async def _judge(
    world: World,
    work: Work,
    prior: Files,
    said: str,
    again: At | None = None,
    late: Callable[[], Awaitable[None]] | None = None,
) -> tuple[str, list[str]]:
    """Hold what is there against what may be there, then recover, look again, go on writing, and collect."""
    wrong: list[str] = []
    new = work.apply(prior)
    allowed = [prior] if new is None else [prior, new]
    seen, decided = await world.harness.files(), (await world.control()).decided
    if not decided and seen != prior:
        wrong.append(f"undecided, but the target holds {seen}")
    promised = (await world.harness.process().probe()).guarantees.get(work.mode, frozenset())
    if "one_generation" in promised and seen not in (*allowed, *([] if "no_gap" in promised else [{}])):
        wrong.append(f"a reader sees {seen}")
    for recovery in (again, At()):
        if recovery is not None:
            process = world.process(recovery)
            await attempt(functools.partial(_recover, process.store))
            await world.end(process)
    if late is not None:
        await late()
    seen = await world.harness.files()
    if seen not in allowed:
        wrong.append(f"after recover: neither old nor new, but {seen}")
    if said == "committed" and seen != new:
        wrong.append("acknowledged as committed, but it is not there")
    if said in ("untouched", "rolled_back") and seen != prior:
        wrong.append(f"reported {said}, but the target changed")
    if decided and new is not None and seen != new:
        wrong.append("decided, but not completed by recover")
    process = world.process(At())
    following = await attempt(functools.partial(Work(Mode.APPEND, (("next", b"next"),)), process.store))
    if following != "committed" or await world.harness.files() != seen | {"next": b"next"}:
        wrong.append(f"the next writer: {following}, {await world.harness.files()}")
    await process.store.gc(older_than=timedelta(0))
    await world.end(process)
    if left := await world.leftovers():
        wrong.append(f"after gc there is left: {left}")
    if wrong:
        result = "wrong"
    elif seen == new != prior:
        result = "new" if said == "committed" else "finished by recover"
    else:
        result = "refused" if said in ("untouched", "rolled_back") else "old"
    return result, wrong


async def _recover(store: Store) -> str:
    await store.recover()
    return "recovered"


async def crashes(
    kinds: Iterable[Kind], tasks: Iterable[Work], priors: Iterable[str], *, twice: bool = False
) -> Report:
    """Each work by prior by kind, with each fault at each moment; with `twice`, also each crash at each moment of recover."""
    report = Report()
    faults: tuple[Fault, ...] = ("crash before", "crash after", "crash within", "answer lost", "fails")
    seconds: tuple[Fault, ...] = ("crash before", "crash within")
    tasks, priors = list(tasks), list(priors)
    for kind, work, prior in itertools.product(kinds, tasks, priors):
        count = At()
        result, wrong = await history(kind, work, PRIORS[prior], count, None)
        _note(report, f"{kind.name}: {work} on {prior}, no fault", result, wrong)
        for fault in faults:
            if twice and not fault.startswith("crash"):
                continue
            for number in range(count.counts[FAULT_MOMENTS[fault]]):
                if not twice:
                    gate = At(fault, number)
                    result, wrong = await history(kind, work, PRIORS[prior], gate, None)
                    _note(report, f"{kind.name}: {work} on {prior}, {fault} {number}", result, wrong)
                    if work.apply(PRIORS[prior]) not in (None, PRIORS[prior]):
                        report.cells.setdefault((fault, gate.struck_at), Counter())[result] += 1
                    continue
                for second in seconds:
                    for at in itertools.count():
                        again = At(second, at)
                        result, wrong = await history(kind, work, PRIORS[prior], At(fault, number), again)
                        line = f"{kind.name}: {work} on {prior}, {fault} {number}, recover {second} {at}"
                        _note(report, line, result, wrong)
                        if again.struck is None:
                            break
    return report


async def seeded(kinds: Iterable[Kind], tasks: Iterable[Work], priors: Iterable[str], seeds: Iterable[int]) -> Report:
    """Each work by prior by kind, with many faults at once, drawn by seed; a writer that hangs is given up after an hour.

    The line of a failure holds the plan of its faults: `replay` plays it again.
    """
    report = Report()
    for (kind, work, prior), seed in itertools.product(
        itertools.product(list(kinds), list(tasks), list(priors)), list(seeds)
    ):
        plan = FaultPlan.seeded(seed, calls=150, rate=0.06)
        result, wrong = await replay(kind, work, PRIORS[prior], plan)
        _note(report, f"{kind.name}: {work} on {prior}, plan {str(plan)!r}", result, wrong)
    return report


async def replay(kind: Kind, work: Work, prior: Files, plan: FaultPlan | str) -> tuple[str, list[str]]:
    """One history of a writer under a plan of faults: how it ended, and what is wrong with that."""
    world = await World.of(kind, prior)
    process = world.process(At(), plan)
    said = "unknown"
    with anyio.move_on_after(3600.0):
        said = await attempt(functools.partial(work, process.store))
    await world.end(process)
    # Under a lock the system ends what a dead process had under way; over a network it may arrive after everything else.
    locked = (await world.harness.process().probe()).fence == "lock"
    return await _judge(world, work, prior, said, late=None if locked else process.faults.arrive)


def _note(report: Report, line: str, result: str, wrong: list[str]) -> None:
    report.histories += 1
    report.outcomes[result] += 1
    report.failures += [f"{line}: {what}" for what in wrong]


# ---------------------------------------------------------------------------------------------------- two actors, call by call


class _Turns:
    """Lets one actor at a time make one call; everything else waits at its gate."""

    def __init__(self) -> None:
        self._waiting: dict[str, trio.Event] = {}
        self.made: Counter[str] = Counter()
        self.running = True

    def gate(self, actor: str) -> Gate:
        async def pause(name: str, moment: Moment) -> None:
            if self.running and moment != "after":
                self._waiting[actor] = event = trio.Event()
                await event.wait()
                self.made[actor] += 1

        return pause

    async def let(self, actor: str, calls: float, ended: Callable[[], bool], patience: float) -> None:
        """Let an actor make so many calls, or until it ended, or slept for longer than `patience` seconds."""
        waited = 0.0
        while calls > 0 and not ended():
            await trio.testing.wait_all_tasks_blocked()
            if (event := self._waiting.pop(actor, None)) is not None:
                event.set()
                calls -= 1
                waited = 0.0
            elif ended() or waited >= patience:
                return
            else:
                await trio.sleep(1.0)
                waited += 1.0


async def _pair(
    kind: Kind, first: Work, second: Work | None, prior: Files, at: int, then: float
) -> tuple[dict[str, str], list[str], Counter[str]]:
    """A runs `at` calls, B runs `then` calls, A runs to its end, B runs to its end. `second` None recovers instead."""
    world = await World.of(kind, prior)
    locked = (await world.harness.process().probe()).fence == "lock"
    turns = _Turns()
    said: dict[str, str] = {}

    async def actor(name: str, work: Callable[[Store], Awaitable[str]], store: Store) -> None:
        said[name] = await attempt(lambda: work(store))

    a, b = world.process(turns.gate("A")).store, world.process(turns.gate("B")).store
    async with trio.open_nursery() as nursery:
        nursery.start_soon(actor, "A", first, a)
        nursery.start_soon(actor, "B", second or _recover, b)
        # Under a lock nobody overtakes a stopped holder; elsewhere it is overtaken after a period of silence.
        patience = 1.0 if locked else 100.0
        await turns.let("A", at, lambda: "A" in said, 0.0)
        await turns.let("B", then, lambda: "B" in said, patience)
        await turns.let("A", math.inf, lambda: "A" in said, patience)
        await turns.let("B", math.inf, lambda: "B" in said, patience)
        await turns.let("A", math.inf, lambda: "A" in said, 2000.0)
        turns.running = False
        for event in turns._waiting.values():
            event.set()
    wrong: list[str] = []
    process = world.process(At())
    last = process.store
    await last.recover()
    seen = await world.harness.files()
    committed = (await last.status()).commits
    tasks = {"A": first} | ({"B": second} if second else {})
    sure = [name for name in tasks if said[name] == "committed"]
    maybe = [name for name in tasks if said[name] == "unknown"]
    possible: list[Files] = []
    for extra in range(len(maybe) + 1):
        for names in itertools.combinations(maybe, extra):
            for order in itertools.permutations([*sure, *names]):
                state: Files | None = prior
                for name in order:
                    state = None if state is None else tasks[name].apply(state)
                if state is not None and len(order) == committed:
                    possible.append(state)
    if seen not in possible:
        wrong.append(f"no serial order explains {seen}: {said}, {committed} committed")
    await last.gc(older_than=timedelta(0))
    await world.end(process)
    if left := await world.leftovers():
        wrong.append(f"after gc there is left: {left}")
    return said, wrong, turns.made


async def interleavings(
    kinds: Iterable[Kind], pairs: Iterable[tuple[Work, Work | None, Files]], *, stride: int = 1
) -> Report:
    """Each pair on each kind: A is stopped at each of its calls while B runs, wholly or up to each `stride`-th of its calls."""
    report = Report()
    for kind, (first, second, prior) in itertools.product(list(kinds), list(pairs)):
        _, _, made = await _pair(kind, first, second, prior, 10**9, math.inf)
        for at in range(made["A"] + 1):
            for then in (math.inf, *range(at % stride, made["B"] + 1, stride)):
                said, wrong, _ = await _pair(kind, first, second, prior, at, then)
                line = f"{kind.name}: A={first} B={second or 'recover'}, A stops at {at}, B at {then}"
                _note(report, line, "+".join(sorted(said.values())), wrong)
    return report


def run(exploration: Callable[[], Awaitable[Report]]) -> Report:
    """Run an exploration in a world whose clock jumps whenever everybody sleeps."""
    result: Report = trio.run(exploration, clock=trio.testing.MockClock(autojump_threshold=0))
    return result
