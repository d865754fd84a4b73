"""Many writers at once: whatever the schedule, the order of the ledger explains what they leave.

In memory the schedule is drawn too: every pause comes from the race's own seed, and with Hypothesis imported trio's scheduler
is deterministic (trio registers itself as its plugin). Then a race runs the same way each time, but for the random ids by
whose order `recover` and `gc` go.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from races import NAMES, Attempt, wrong_with

from staged.driver import Driver
from staged.errors import StagedError
from staged.model import Mode
from staged.planning import BLIND, REPLACING
from staged.store import Store
from staged.testing.exploration import KINDS, Work, World
from staged.testing.faults import FAULTS, Crash, Fault, Moment

SOAK = int(os.environ.get("STAGED_SOAK", "1"))
Figure = Callable[[str, str], None]
Helper = Literal["recover", "gc"]
Life = Callable[[Attempt, Store, Driver], Awaitable[str]]


@dataclass(frozen=True)
class Writer:
    """One writer.

    Attributes:
        delay: Seconds until it starts.
        plan: What befalls its calls; see `staged.testing.faults`.
        dies_at: The moment (before, within or after a call) at which its first process dies.
        tries: How often the work is done at most; after a crash only under a key.
        hand_over: One process prepares it, another one resumes and commits.
    """

    work: Work
    delay: float = 0.0
    plan: str = ""
    dies_at: int | None = None
    tries: int = 1
    hand_over: bool = False


@dataclass(frozen=True)
class Race:
    """Everything that a race depends on; `kind` is a name of `KINDS`."""

    kind: str
    prior: tuple[str, ...]
    writers: tuple[Writer, ...]
    helpers: tuple[Helper, ...]
    seed: int

    def __repr__(self) -> str:
        """As Python: an enumeration's own representation is none."""
        fields = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return re.sub(r"<(Mode.[A-Z_]+): [^>]*>", r"\1", f"Race({fields})")


@dataclass
class _Gate:
    """Pauses at every moment as chance will have it, and lets its process die at the drawn one."""

    chance: random.Random
    dies_at: int | None = None
    moments: int = 0
    dead: bool = False

    async def __call__(self, name: str, moment: Moment) -> None:
        if self.dead:
            raise Crash
        self.moments += 1
        if self.chance.random() < 0.5:
            await trio.lowlevel.checkpoint()
        else:
            await trio.sleep(self.chance.choice((0.0, 0.01, 0.1, 1.0)))
        if self.moments == self.dies_at:
            self.dead = True
            raise Crash


class _Course:
    """One run of a race."""

    def __init__(self, race: Race, world: World) -> None:
        self.race = race
        self.world = world
        self.chance = random.Random(race.seed)
        self.clock = itertools.count()
        self.attempts: list[Attempt] = []

    async def run(self) -> list[str]:
        """Race, recover, and tell what is wrong; then collect everything."""
        async with trio.open_nursery() as nursery:
            for writer in self.race.writers:
                nursery.start_soon(self._write, writer)
            for helper in self.race.helpers:
                nursery.start_soon(self._help, helper)
        last = self.world.process(_calm)
        await last.store.recover()
        seen = await self.world.harness.files()
        prior = dict.fromkeys(self.race.prior, b"prior")
        wrong = await wrong_with(last.store, prior, self.attempts, seen, collected="gc" in self.race.helpers)
        await last.store.gc(older_than=timedelta(0))
        await self.world.end(last)
        if await self.world.harness.files() != seen:
            wrong.append("gc changed the target")
        left = set(await self.world.leftovers())
        if "gc" in self.race.helpers:
            # Collected while it was alive, and dead between logging a handle and opening it: nobody can find that.
            left -= {f"_staged/target/{attempt.id}" for attempt in self.attempts if attempt.said == "crash"}
        if left:
            wrong.append(f"after gc there is left {left}")
        return wrong

    async def _write(self, writer: Writer) -> None:
        await trio.sleep(writer.delay)
        gate, plan = _Gate(self.chance, writer.dies_at), writer.plan
        for _ in range(writer.tries):
            attempt = Attempt(writer.work, began=next(self.clock))
            self.attempts.append(attempt)
            for life in (_prepare, _resume) if writer.hand_over else (_block,):
                await self._process(gate, plan, attempt, life)
                plan = ""
                if attempt.said != "prepared":
                    break
            attempt.ended = next(self.clock)
            if not attempt.retry:
                return

    async def _process(self, gate: _Gate, plan: str, attempt: Attempt, life: Life) -> None:
        """A process from its start to its end, which may come early."""
        gate.dead = False
        process = self.world.process(gate, plan)
        attempt.said = "crash"
        attempt.retry = attempt.work.key is not None
        try:
            with trio.move_on_after(500.0):  # somebody kills what hangs
                attempt.said = await life(attempt, process.store, process.driver)
                attempt.retry = False
        except Crash:
            pass
        except StagedError as error:
            attempt.refused(error)
        finally:
            await self.world.end(process)

    async def _help(self, helper: Helper) -> None:
        """Recover, or collect everything, now and again while the writers write."""
        for _ in range(5):
            await trio.sleep(self.chance.choice((0.1, 1.0, 10.0, 50.0)))
            process = self.world.process(_Gate(self.chance))
            try:
                await (process.store.recover() if helper == "recover" else process.store.gc(older_than=timedelta(0)))
            except StagedError:
                pass
            finally:
                await self.world.end(process)


async def _race(race: Race) -> tuple[list[Attempt], list[str]]:
    kind = next(kind for kind in KINDS if kind.name == race.kind)
    course = _Course(race, await World.of(kind, dict.fromkeys(race.prior, b"prior")))
    wrong = await course.run()
    return course.attempts, wrong


async def _calm(name: str, moment: Moment) -> None:
    pass


async def _block(attempt: Attempt, store: Store, driver: Driver) -> str:
    work = attempt.work
    async with store.staged_write(work.mode, key=work.key, lock_timeout=1000.0) as tx:
        await attempt.have_begun(tx.id, driver)
        for name, data in work.files:
            await tx.write(name, data)
        for name in work.deletes:
            await tx.delete(name)
    return tx.receipt.phase


async def _prepare(attempt: Attempt, store: Store, driver: Driver) -> str:
    work = attempt.work
    tx = await store.begin(work.mode, key=work.key)
    await attempt.have_begun(tx.id, driver)
    for name, data in work.files:
        await tx.write(name, data)
    for name in work.deletes:
        await tx.delete(name)
    await tx.prepare()
    if tx.done or tx.skipped:
        return tx.receipt.phase
    await tx.release()
    return "prepared"


async def _resume(attempt: Attempt, store: Store, driver: Driver) -> str:
    assert attempt.id is not None
    tx = await store.resume(attempt.id, lock_timeout=1000.0)
    return (await tx.commit()).phase


# ----------------------------------------------------------------------------------------------------------- what is drawn


@st.composite
def _writers(draw: st.DrawFn, number: int) -> Writer:
    mode = draw(st.sampled_from([*sorted(BLIND | REPLACING), *Mode]))
    names = [name for name in NAMES if mode is not Mode.OVERWRITE_PARTITIONS or "/" in name]
    files = draw(st.sets(st.sampled_from(names), min_size=1, max_size=4))
    others = [name for name in NAMES if name not in files]
    deletes = draw(st.sets(st.sampled_from(others), max_size=1)) if mode in BLIND else set()
    work = Work(
        mode,
        tuple((name, f"{number} {name}".encode()) for name in sorted(files)),
        tuple(sorted(deletes)),
        draw(st.sampled_from([None, None, None, "key", "other"])),
    )
    return Writer(
        work,
        delay=draw(st.sampled_from([0.0, 0.0, 1.0, 5.0, 20.0])),
        plan=draw(_plans()),
        # Of about ninety moments the head is held from the fortieth on, and the commit decided from the sixtieth.
        dies_at=draw(st.sampled_from([None] * 60 + [*range(1, 100)][::3] + [*range(40, 80)])),
        tries=draw(st.integers(1, 3)),
        hand_over=draw(st.booleans()),
    )


@st.composite
def _plans(draw: st.DrawFn) -> str:
    """Mostly no fault, else some, or an outage. A commit makes about thirty calls; silence is waited out for thirty seconds."""
    some = draw(st.sampled_from([0, 0, 0, 1, 3, "outage"]))
    if some == "outage":
        start, kinds = draw(st.integers(0, 35)), st.sampled_from(["fails", "loses"])
        return " ".join(str(Fault(draw(kinds), start + call)) for call in range(draw(st.integers(2, 10))))
    faults = []
    for call in sorted(draw(st.sets(st.integers(0, 40), min_size=some, max_size=some))):
        kind = draw(st.sampled_from(FAULTS))
        amount = {"delays": 100, "replays": draw(st.integers(1, 30))}.get(kind, 0)
        faults.append(str(Fault(kind, call, amount)))
    return " ".join(faults)


@st.composite
def _races(draw: st.DrawFn) -> Race:
    return Race(
        kind=draw(st.sampled_from([kind.name for kind in KINDS])),
        prior=tuple(sorted(draw(st.sets(st.sampled_from(NAMES), max_size=3)))),
        writers=tuple(draw(_writers(number)) for number in range(draw(st.integers(2, 8)))),
        helpers=tuple(draw(st.lists(st.sampled_from(["recover", "gc"]), max_size=2))),
        seed=draw(st.integers(0, 1 << 32)),
    )


def test_many_writers_that_stop_fail_and_stall_leave_what_one_serial_order_of_the_committed_ones_makes(
    figure: Figure,
) -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=100 * SOAK, deadline=None, print_blob=True, suppress_health_check=list(HealthCheck))
    @given(race=_races())
    def every_race(race: Race) -> None:
        attempts, wrong = trio.run(_race, race, clock=trio.testing.MockClock(autojump_threshold=0))
        seen["schedules"] += 1
        seen["writers"] += len(race.writers)
        seen["attempts"] += len(attempts)
        seen["conflicts"] += sum(attempt.conflict for attempt in attempts)
        seen.update(attempt.said for attempt in attempts)
        assert not wrong, "\n".join([*wrong, f"To repeat it: @example({race!r})"])

    every_race()
    figure("many writers, drawn schedules", ", ".join(f"{count:,} {name}" for name, count in seen.items()))
    assert min(seen[name] for name in ("committed", "conflicts", "crash", "done")) > 0


def test_processes_that_race_on_a_directory_and_are_killed_leave_what_the_ledgers_order_makes(
    tmp_path: Path, figure: Figure
) -> None:
    seed = random.randrange(1 << 32)
    program = [
        sys.executable,
        str(Path(__file__).with_name("races.py")),
        f"{tmp_path}/races",
        str(seed),
        str(12 * SOAK),
    ]
    run = subprocess.run(
        program, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONWARNINGS": "ignore"}
    )
    races = [json.loads(line) for line in run.stdout.splitlines()]
    assert run.returncode == 0, run.stderr[-2000:]
    for number, race in enumerate(races):
        assert not race["wrong"], (
            f"{race['wrong']}; races alike: {program[0]} tests/races.py DIRECTORY {seed + number} 1"
        )
    sums = {name: sum(race[name] for race in races) for name in ("attempts", "committed", "conflicts", "killed")}
    figure("processes that race", f"{len(races)} races, {', '.join(f'{count} {name}' for name, count in sums.items())}")
    assert len(races) == 12 * SOAK
    assert min(sums.values()) > 0
