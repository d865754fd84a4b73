"""Cancels a piece of work at the n-th moment of its driver's calls, in every way its event loop knows, and checks the rest."""

from __future__ import annotations

import asyncio
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import anyio
import anyio.lowlevel
import anyio.to_thread
import trio
import trio.testing

from staged import Busy, StagedError, StorageError, open_store
from staged.driver import Driver
from staged.drivers.local import LocalDriver
from staged.drivers.memory import MemoryDriver
from staged.lifecycle import Transaction
from staged.model import Decided, Event, Head, Prepared
from staged.observers import Observer
from staged.records import decode
from staged.states import ENDED, Phase
from staged.store import Store
from staged.testing.exploration import Kind, MemoryHarness, Work
from staged.testing.faults import Crash, FaultDriver, Gate, Moment
from staged.testing.harness import Files

_NEXT = {"next": b"next"}
Backend = Literal["asyncio", "trio"]
Way = Literal[
    "scope",
    "timeout",
    "cancel",
    "twice",
    "thrice",
    "every moment after",
    "scope, then cancel",
    "shutdown",
    "hang",
    "no grace",
    "store fails",
]
"""How the work is cancelled, on what occasion. "shutdown": its loop ends. "hang": the store never answers, so that the
grace runs out. "store fails": from then on every further call fails."""

WAYS: tuple[tuple[Backend, Way], ...] = (
    ("asyncio", "scope"),
    ("asyncio", "timeout"),
    ("asyncio", "cancel"),
    ("asyncio", "twice"),
    ("asyncio", "thrice"),
    ("asyncio", "every moment after"),
    ("asyncio", "scope, then cancel"),
    ("asyncio", "shutdown"),
    ("asyncio", "hang"),
    ("asyncio", "no grace"),
    ("asyncio", "store fails"),
    ("trio", "scope"),
    ("trio", "shutdown"),
    ("trio", "hang"),
    ("trio", "no grace"),
    ("trio", "store fails"),
)
TORN: frozenset[Way] = frozenset({"hang", "no grace", "store fails"})
"""Ways after which the work cannot have ended itself."""


class Ended(Exception):
    """The main function of a loop fails while others still work."""


# ------------------------------------------------------------------------------------------------------------ the canceller


class Canceller:
    """A gate that cancels at the n-th moment, and goes on only after the cancellation had time to arrive.

    Attributes:
        phase: What the work is about; it says so itself.
        moments: Every moment so far with its phase.
        struck: The one at which it was cancelled.
        armed: Moments count.
    """

    def __init__(self, number: int, way: Way) -> None:
        self.number = number
        self.way = way
        self.phase = "begin"
        self.moments: list[tuple[str, str]] = []
        self.struck: tuple[str, str] | None = None
        self.struck_natively = False
        self.armed = True
        self.cancel: Callable[[], object] = lambda: None
        self.cancel_again: Callable[[], object] = lambda: None

    async def __call__(self, name: str, moment: Moment) -> None:
        if not self.armed:
            return
        self.moments.append((self.phase, f"{moment} {name}"))
        after = len(self.moments) - self.number
        if after == 0:
            self.struck = self.moments[-1]
            self.cancel()
            if self.way == "hang":
                await anyio.sleep_forever()
            await _let_it_arrive()
        again = (
            (after == 0 and self.way in ("twice", "thrice", "scope, then cancel"))
            or (after == 1 and self.way == "thrice")
            or (after > 0 and self.way == "every moment after")
        )
        if self.struck is not None and again:
            self.struck_natively = True
            self.cancel_again()
            await _let_it_arrive()
        if self.struck is not None and self.way == "store fails" and moment == "before" and after > 0:
            raise StorageError("The store is gone.")

    def hear(self, event: Event) -> None:
        """Tell the phases of a commit apart."""
        if isinstance(event, Prepared):
            self.phase = "commit"
        elif isinstance(event, Decided):
            self.phase = "completion"

    def decision(self, moment: Moment) -> int:
        """The number of this moment of the one swap that decides, in a history that was not cancelled."""
        name = f"{moment} {'swap head' if moment == 'within' else 'cas head'}"
        return max(n for n, at in enumerate(self.moments, 1) if at == ("commit", name))


async def _let_it_arrive() -> None:
    for _ in range(6):
        await anyio.lowlevel.checkpoint()


def run(backend: Backend, way: Way, gate: Canceller, work: Callable[[], Awaitable[None]], *, virtual: bool) -> str:
    """Run the work in a loop of its own, cancelled by the gate in this way; "returned" or "cancelled", as its caller hears.

    Args:
        virtual: The clock jumps whenever everybody sleeps; for work without threads, under trio.
    """
    said: list[str] = []
    if backend == "trio":
        clock = trio.testing.MockClock(autojump_threshold=0) if virtual else None
        try:
            trio.run(_shut_down_trio if way == "shutdown" else scoped, gate, work, said, clock=clock)
        except BaseExceptionGroup as errors:
            _, others = errors.split(Ended)
            if others is not None:
                raise others.exceptions[0] from errors
    elif way in ("scope", "hang", "no grace"):
        asyncio.run(scoped(gate, work, said))
    elif way == "timeout":
        asyncio.run(timed(gate, work, said))
    else:
        asyncio.run(_natively(way, gate, work, said))
    return said[0]


async def scoped(gate: Canceller, work: Callable[[], Awaitable[None]], said: list[str]) -> None:
    """Run the work within a scope of anyio's."""
    with anyio.CancelScope() as scope:
        gate.cancel = scope.cancel
        await work()
    said.append("cancelled" if scope.cancelled_caught else "returned")


async def _shut_down_trio(gate: Canceller, work: Callable[[], Awaitable[None]], said: list[str]) -> None:
    """The main function fails, and what still runs is cancelled."""
    end = trio.Event()
    gate.cancel = end.set

    async def victim() -> None:
        try:
            await work()
            said.append("returned")
        except trio.Cancelled:
            said.append("cancelled")
            raise
        finally:
            end.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(victim)
        await end.wait()
        if not said:
            raise Ended


async def timed(gate: Canceller, work: Callable[[], Awaitable[None]], said: list[str]) -> None:
    """Run the work within a timeout of asyncio's."""
    try:
        async with asyncio.timeout(None) as timeout:
            gate.cancel = lambda: timeout.reschedule(0.0)
            await work()
        said.append("returned")
    except TimeoutError:
        said.append("cancelled")


async def _natively(way: Way, gate: Canceller, work: Callable[[], Awaitable[None]], said: list[str]) -> None:
    caught: list[bool] = []  # by a scope, before the native cancellation came

    async def victim() -> None:
        if way == "scope, then cancel":
            with anyio.CancelScope() as scope:
                gate.cancel = scope.cancel
                await work()
            if not gate.struck_natively:
                caught.append(scope.cancelled_caught)
        else:
            await work()

    def note(task: asyncio.Task[None]) -> None:
        said.append("cancelled" if task.cancelled() or any(caught) else "returned")

    task = asyncio.create_task(victim())
    task.add_done_callback(note)
    gate.cancel = gate.cancel_again = task.cancel
    end = asyncio.Event()
    if way == "shutdown":
        gate.cancel = end.set
    task.add_done_callback(lambda _: end.set())
    await end.wait()
    # On a shutdown the loop ends here, and cancels every task that there is.
    if task.done() and said == ["returned"]:
        task.result()


# ---------------------------------------------------------------------------------------------------------------- the world


class World:
    """A storage with its prior content, and processes that open it; without a kind a real directory."""

    def __init__(self, kind: Kind | None, prior: Files, root: str) -> None:
        self.kind = kind
        self.root = root
        memory = MemoryHarness() if kind is None else kind.make()
        assert isinstance(memory, MemoryHarness)
        self.memory = memory
        self.storage = memory.storage
        self.prepared = ""
        for name, data in prior.items():
            if kind is not None:
                self.storage.put(f"target/{name}", data)
            else:
                os.makedirs(os.path.dirname(f"{root}/target/{name}"), exist_ok=True)
                with open(f"{root}/target/{name}", "wb") as file:
                    file.write(data)

    def driver(self, gate: Gate | None = None, period: float = 0.001) -> Driver:
        """A process of its own; by default one for which a silent one is dead at once."""
        if self.kind is None:
            driver: Driver = LocalDriver(f"{self.root}/target", durability="none")
        else:

            async def within(name: str) -> None:
                if gate is not None:
                    await gate(name, "within")

            driver = MemoryDriver(
                storage=self.storage, fence=self.memory.fence, swap=self.memory.swap, period=period, step=within
            )
        return driver if gate is None else FaultDriver(driver, gate)

    def store(self, *observers: Observer) -> Store:
        return open_store(self.driver(), observers=observers)

    async def dies(self, work: Callable[[Store], Awaitable[object]], at: str) -> None:
        """A process that dies just before this call."""
        dead = False

        async def gate(name: str, moment: Moment) -> None:
            nonlocal dead
            dead = dead or (name == at and moment == "before")
            if dead:
                raise Crash

        driver = self.driver(gate)
        try:
            await work(open_store(driver))
        except Crash:
            pass
        assert dead, f"it never called {at}"
        if isinstance(driver, FaultDriver) and isinstance(driver.inner, MemoryDriver):
            self.storage.kill(driver.inner)

    def files(self) -> Files:
        """The target as a reader finds it."""
        if self.kind is not None:
            return self.storage.below("target")
        found = {}
        for directory, below, names in os.walk(f"{self.root}/target"):
            below[:] = [name for name in below if name != "_staged"]
            for name in names:
                path = os.path.join(directory, name)
                with open(path, "rb") as file:
                    found[os.path.relpath(path, f"{self.root}/target")] = file.read()
        return found

    def unfinished(self) -> list[str]:
        """What there is of transactions that have not ended, and locks."""
        if self.kind is not None:
            records = [key for key in self.storage.records if "/tx/" in key]
            return [*records, *self.storage.uploads, *self.storage.locks]
        return [
            os.path.join(at, name)
            for at, below, names in os.walk(self.root)
            if at.endswith("/tx") or "/tx/" in at
            for name in [*below, *names]
        ]

    def left(self) -> list[str]:
        """What there is besides the targets, their heads and the ledgers that those name."""
        if self.kind is None:
            return list(self._left_on_disk())
        records = self.storage.records
        heads = {key: decode(Head, records[key][0], key) for key in records if key.endswith("/head")}
        kept = {f"{key.removesuffix('head')}{head.ledger.key}-0" for key, head in heads.items() if head.ledger}
        others = [key for key in records if key not in kept and key not in heads]
        return [*others, *self.storage.uploads, *self.storage.locks, *self.storage.aside]

    def _left_on_disk(self) -> Iterator[str]:
        for area, _, names in os.walk(self.root):
            if "/_staged" not in area:
                continue
            if "/tx/" in area or "/old/" in area:
                yield area
            ledgers = sorted(name for name in names if name.startswith("ledger-"))
            kept = {"head", "lock", "clock", *ledgers[-1:]}
            yield from (os.path.join(area, name) for name in names if name not in kept)


# ---------------------------------------------------------------------------------------------------------------- histories


@dataclass(slots=True)
class Scene:
    """What a scenario works with.

    Attributes:
        transactions: Those that it began, for the checks.
        released: Called before the next one is to be served: what other processes hold meanwhile.
    """

    world: World
    store: Store
    gate: Canceller
    grace: float
    transactions: list[Transaction] = field(default_factory=list)
    released: list[Callable[[], None]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Scenario:
    """A piece of work to cancel.

    Attributes:
        new: The target after it; None where it must leave it as it is.
        before: What other processes did before; that is not cancelled.
        decided: The decision was made before: whatever happens, the target ends up new.
        keeps: What it prepared may stay, for others to resume.
        child: The target below the store's that it works on.
        threads: It works in threads over any driver, so that no clock may jump.
        period: Seconds of silence after which it takes another one for dead.
        most: The last moment to cancel at; it never ends without.
    """

    name: str
    prior: Files
    new: Files | None
    work: Callable[[Scene], Awaitable[None]]
    before: Callable[[World], Coroutine[Any, Any, None]] | None = None
    decided: bool = False
    keeps: bool = False
    child: str = ""
    threads: bool = False
    period: float = 30.0
    most: int | None = None

    @property
    def after(self) -> Files:
        """The target if it succeeds."""
        return self.prior if self.new is None else self.new

    @property
    def next(self) -> Files:
        """What the next writer adds."""
        return {f"{self.child}/next" if self.child else "next": b"next"}


@dataclass(slots=True)
class Report:
    """What was seen: histories that were cancelled, by the phase; how they ended; what was wrong."""

    histories: int = 0
    sweeps: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {count:,}" for name, count in self.phases.items())
        ends = " and ".join(f"{count:,} {name}" for name, count in sorted(self.ends.items(), reverse=True))
        return f"{self.histories:,} places x ways ({phases}): {ends}, {len(self.failures)} swallowed, mixed, stuck or left over"

    def note(self, history: str, wrong: list[str]) -> None:
        self.failures += [f"{history}: {what}" for what in wrong]


def sweep(report: Report, scenario: Scenario, kind: Kind | None, root: str, *, every: int) -> None:
    """Cancel a scenario in each way at each `every`-th moment, from a first one that differs from way to way."""
    where = f"{scenario.name} on {kind.name if kind is not None else 'a directory'}"
    report.sweeps += 1
    root = f"{root}/{report.sweeps}"
    calm = None
    if scenario.most is None:
        calm, wrong = _history("asyncio", "cancel", 0, scenario, kind, f"{root}/calm", None)
        report.note(f"{where}, not cancelled", wrong)
    for backend, way in WAYS:
        first = random.Random(f"{report.sweeps} {backend} {way}").randint(1, every)
        for number in range(first, 1 + (scenario.most or 10**9), every):
            scene, wrong = _history(backend, way, number, scenario, kind, f"{root}/{backend}-{way}-{number}", calm)
            if scene.gate.struck is None:
                report.note(f"{where}, {backend}, not cancelled", wrong)
                break
            phase, moment = scene.gate.struck
            report.histories += 1
            report.phases[phase] += 1
            files = scene.world.files()
            report.ends["old" if files == scenario.prior | scenario.next else "new"] += 1
            report.note(f"{where}, {backend}, {way} {number} ({phase}: {moment})", wrong)


def _history(
    backend: Backend, way: Way, number: int, scenario: Scenario, kind: Kind | None, root: str, calm: Scene | None
) -> tuple[Scene, list[str]]:
    """One history: cancelled at the n-th moment, looked at, and the target given to the next ones.

    Args:
        calm: The same without a cancellation.
    """
    world = World(kind, scenario.prior, root)
    if scenario.before is not None:
        asyncio.run(scenario.before(world))
    gate = Canceller(number, way)
    # Over a virtual clock nobody waits for the default grace.
    virtual = backend == "trio" and kind is not None and not scenario.threads
    grace = 0.0 if way == "no grace" else 0.02 if way == "hang" and not virtual else 30.0
    scene = Scene(world, open_store(world.driver(gate, scenario.period), observers=[gate.hear]), gate, grace)

    async def work() -> None:
        try:
            await scenario.work(scene)
        finally:
            gate.armed = False

    try:
        said = run(backend, way, gate, work, virtual=virtual)
    except Exception as error:
        said = f"raised {error!r}"
    wrong = [] if said == ("returned" if gate.struck is None else "cancelled") else [f"it {said}"]
    torn = way in TORN or (way, backend) == ("shutdown", "asyncio")
    wrong += _look(scene, scenario, torn)
    for release in scene.released:
        release()
    wrong += asyncio.run(_go_on(scene, scenario, _expected(scenario, scene, calm, torn)))
    return scene, wrong


def _expected(scenario: Scenario, scene: Scene, calm: Scene | None, torn: bool) -> Files:
    """What the target must hold at last; the moment tells."""
    if scenario.new is None:
        return scenario.prior
    if scenario.decided or calm is None or scene.gate.struck is None:
        return scenario.new
    # Who is torn off has decided once the swap was applied; who is waited out, once it was asked for.
    decision = calm.gate.decision("after" if torn and scene.gate.way != "store fails" else "before")
    return scenario.prior if scene.gate.number < decision else scenario.new


def _look(scene: Scene, scenario: Scenario, torn: bool) -> list[str]:
    """At once, before anybody cleans up."""
    wrong: list[str] = []
    world, seen = scene.world, scene.world.files()
    if not torn and not scenario.decided and seen not in (scenario.prior, scenario.after):
        wrong.append(f"neither old nor new, but {seen}")
    for number, tx in enumerate(scene.transactions):
        committed = number == 0 and seen == scenario.new
        if tx.phase not in ENDED:
            wrong.append(f"the transaction is still {tx.phase.value}")
        elif torn or (scenario.keeps and tx.phase is Phase.RELEASED):
            continue
        elif tx.phase not in (Phase.COMMITTED, Phase.ROLLED_BACK):
            wrong.append(f"the transaction is {tx.phase.value}")
        elif (tx.receipt.phase == "committed") != committed:
            wrong.append(f"the receipt says {tx.receipt.phase}, but the target holds {seen}")
    if not torn and not scenario.before and not scenario.keeps and not scene.released and (left := world.unfinished()):
        wrong.append(f"there is left of it {left}")
    if world.kind is not None and not scene.released and world.storage.locks:
        wrong.append(f"locks are held: {[*world.storage.locks]}")
    return wrong


async def _go_on(scene: Scene, scenario: Scenario, expected: Files) -> list[str]:
    """The next ones are served, a writer, recover and gc; and everybody was told the truth."""
    wrong: list[str] = []
    world = scene.world
    store = world.store() if not scenario.child else world.store().child(scenario.child)
    expected = expected | scenario.next
    try:
        says = [(await store.outcome(tx.id)).state for tx in scene.transactions[:1]]
        if scene.gate.number % 2:
            await store.recover()
        # Silence must be waited for; what ends with its holder must not.
        wait = 5.0 if world.kind is not None and world.memory.fence != "lock" else 0.0
        async with store.staged_write("append", lock_timeout=wait) as tx:
            await tx.write("next", b"next")
        if (seen := world.files()) != expected:
            wrong.append(f"expected {expected}, but there is {seen}")
        if scenario.new is not None and any(
            (said in ("committed", "committing")) != (seen == scenario.new | scenario.next) for said in says
        ):
            wrong.append(f"its outcome was {says[0]}, but the target holds {seen}")
        await store.recover()
        await store.gc(older_than=timedelta(0))
        if world.files() != seen:
            wrong.append(f"gc changed the target to {world.files()}")
    except StagedError as error:
        wrong.append(f"the next one: {error!r}")
    if left := world.left():
        wrong.append(f"after gc there is left {left}")
    return wrong


# ------------------------------------------------------------------------------------------------- threads that are stopped


class Stopper:
    """Stops a worker thread just before its n-th system call on files, until it is let go.

    Args:
        only: Count only those that name this file first.
        after: Count only from this event on.

    Attributes:
        stopped: What the thread was about to do.
        strike: Called, from that thread, when it stops.
    """

    def __init__(self, number: int, *, only: str | None = None, after: type[Event] | None = None) -> None:
        self.number = number
        self.only = only
        self.after = after
        self.count = 0
        self.stopped: str | None = None
        self.strike: Callable[[], object] = lambda: None
        self.armed = False
        self._go = threading.Event()
        self._counting = threading.Lock()

    def go(self) -> None:
        """Let it go on."""
        self._go.set()

    def begin(self) -> None:
        """Count from now on, unless an event is waited for."""
        self.armed = self.after is None

    def hear(self, event: Event) -> None:
        self.armed = self.armed or (self.after is not None and isinstance(event, self.after))

    def __enter__(self) -> Stopper:
        global _stopper  # noqa: PLW0603 - an audit hook can be added, but never removed
        if not _hooked:
            _hooked.append(True)
            sys.addaudithook(_audit)
        _stopper = self
        return self

    def __exit__(self, *_: object) -> None:
        global _stopper  # noqa: PLW0603
        _stopper = None
        self.go()

    def called(self, event: str, args: tuple[object, ...]) -> None:
        with self._counting:
            self.count += 1
            mine = self.count == self.number
        if mine:
            self.stopped = f"{event} {args[:1]!r}"
            self.strike()
            self._go.wait()


def _library(path: str, data: bytes) -> None:
    try:
        with open(path, "wb") as file:
            file.write(data)
    except FileNotFoundError:
        pass  # its directory went with the block


_stopper: Stopper | None = None
_hooked: list[bool] = []


def _audit(event: str, args: tuple[object, ...]) -> None:
    stopper = _stopper
    if (
        stopper is not None
        and stopper.armed
        and (stopper.only is None or args[:1] == (stopper.only,))
        and (event == "open" or event.startswith(("os.", "fcntl.")))
        and threading.get_ident() != threading.main_thread().ident
    ):
        stopper.called(event, args)


def stop_a_thread(
    backend: Backend, stopper: Stopper, work: Work, prior: Files, root: str, *, grace: float, patient: bool = False
) -> tuple[str, list[str]]:
    """Cancel a block whose thread is stopped, let it leave, and let the thread go on under the next ones.

    Args:
        patient: Let the next one come to its end before.

    Returns:
        How it ended, and what was wrong.
    """
    world = World(None, prior, root)
    transactions: list[Transaction] = []
    said: list[str] = []
    wrong: list[str] = []

    async def block() -> None:
        async with world.store(stopper.hear).staged_write(work.mode, grace=grace) as tx:
            transactions.append(tx)
            for name, data in work.files[:-1]:
                await tx.write(name, data)
            # The last one comes from a library that writes to a path, in a thread which it leaves behind.
            name, data = work.files[-1]
            async with tx.path(name) as local:
                await anyio.to_thread.run_sync(_library, local, data, abandon_on_cancel=True)
            for name in work.deletes:
                await tx.delete(name)

    async def victim() -> None:
        with anyio.CancelScope() as scope:
            if backend == "trio":
                token = trio.lowlevel.current_trio_token()
                stopper.strike = lambda: token.run_sync_soon(scope.cancel)
            else:
                loop = asyncio.get_running_loop()
                stopper.strike = lambda: loop.call_soon_threadsafe(scope.cancel)
            stopper.begin()
            await block()
        stopper.armed = False
        said.append("cancelled" if scope.cancelled_caught else "returned")

    async def following(timeout: float) -> None:
        async with world.store().staged_write("append", lock_timeout=timeout) as tx:
            await tx.write("next", b"next")

    def next_one() -> None:
        try:
            asyncio.run(following(0.0))
            said.append("served")
        except Busy:
            said.append("busy")
        except Exception as error:
            wrong.append(f"the next one: {error!r}")

    with stopper:
        anyio.run(victim, backend=backend)
        if said != ["returned" if stopper.stopped is None else "cancelled"]:
            wrong.append(f"it {said[0]}")
        # It is served at once, or has to wait for what the thread holds.
        served = threading.Thread(target=next_one)
        served.start()
        served.join(None if patient else 0.02)
        before = world.files()
        stopper.go()
        served.join()
    if "busy" in said:
        try:
            asyncio.run(following(20.0))
        except StagedError as error:
            wrong.append(f"the next one, once the thread had ended: {error!r}")
    new = work.apply(prior)
    assert new is not None
    deadline = time.monotonic() + 10

    async def clean_up() -> None:
        store = world.store()
        says = [(await store.outcome(tx.id)).state for tx in transactions]
        seen = world.files()
        if seen not in (prior | _NEXT, new | _NEXT):
            wrong.append(f"neither old nor new, but {seen}, and {before} before the thread went on")
        if says and (says[0] in ("committed", "committing")) != (seen == new | _NEXT):
            wrong.append(f"its outcome is {says[0]}, but the target holds {seen}")
        # What holds no lock may still be about to end.
        while True:
            await store.recover()
            await store.gc(older_than=timedelta(0))
            left = world.left()
            if not left or time.monotonic() > deadline:
                break
            await anyio.sleep(0.01)
        if left:
            wrong.append(f"after gc there is left {left}")
        if world.files() != seen:
            wrong.append(f"the target changed to {world.files()}")

    asyncio.run(clean_up())
    ended = "new" if world.files() == new | _NEXT else "old"
    return f"{ended}, the next one {said[-1]}", wrong
