"""Forks writers that are killed with SIGKILL at a moment of their own choosing, and processes that recover after them.

Run as a program, it stays without threads itself, so that forking is safe. For each case it prints one line of JSON.
"""

from __future__ import annotations

import glob
import json
import mmap
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable

import anyio

from staged import StagedError, open_store
from staged.drivers.local import LocalDriver
from staged.model import Mode
from staged.testing.exploration import PRIORS, Work, works
from staged.testing.faults import FaultDriver, Moment
from staged.testing.harness import Files
from staged.testing.steps import STEPS, StepName, step_after

MOMENTS: tuple[Moment, ...] = ("before", "after")


def read_back(target: str) -> Files:
    """The target as a reader finds it."""
    found = {}
    for directory, _, files in os.walk(target):
        for name in files:
            with open(os.path.join(directory, name), "rb") as file:
                found[os.path.relpath(os.path.join(directory, name), target)] = file.read()
    return found


def lay(root: str, prior: Files) -> str:
    """A fresh target with its prior content."""
    shutil.rmtree(root, ignore_errors=True)
    target = f"{root}/target"
    os.makedirs(root)
    for name, data in prior.items():
        os.makedirs(os.path.dirname(f"{target}/{name}"), exist_ok=True)
        with open(f"{target}/{name}", "wb") as file:
            file.write(data)
    return target


def in_child(work: Callable[[], object]) -> int:
    """Run in a forked child; the exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Victim:
    """A writer that is killed at a call of its own choosing, and the step that it was at when it died.

    Args:
        moment: When at the call.
        number: Which call, counted from 1.
        delay: Seconds that it has left from there.
    """

    def __init__(self, moment: Moment, number: int, delay: float | None = None) -> None:
        self.moment, self.number, self.delay = moment, number, delay
        # Shared with the child: the step that it is at.
        self._step = mmap.mmap(-1, 1)

    @property
    def step(self) -> StepName:
        return STEPS[self._step[0]]

    def write(self, target: str, work: Work) -> None:
        """Do the work, and die."""
        start, started = os.pipe()
        victim = os.getpid()
        if self.delay is not None and os.fork() == 0:
            os.close(started)
            if os.read(start, 1):
                time.sleep(self.delay)
                # Until the writer is waited for nobody else has its number; once it is, somebody else is our parent.
                if os.getppid() == victim:
                    os.kill(victim, signal.SIGKILL)
            os._exit(0)
        count = 0

        async def gate(name: str, at: Moment) -> None:
            nonlocal count
            if at == "before":
                self._step[0] = STEPS.index(step_after(self.step, name))
            count += at == self.moment
            if count == self.number and at == self.moment:
                if self.delay is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                os.write(started, b"x")

        async def run() -> None:
            async with open_store(FaultDriver(LocalDriver(target, durability="none"), gate)) as store:
                await work(store)

        anyio.run(run)


def check(target: str, prior: Files, new: Files) -> None:
    """Recover in a new process: old or new, nothing left, and the next writer is served."""

    async def run() -> None:
        decided = False
        async with open_store(target, durability="none") as store:
            status = await store.status()
            decided = status.committing is not None or status.commits > 0
            before = read_back(target)
            if not decided:
                assert before == prior, f"undecided, but the target holds {before}"
            await store.recover()
            after = read_back(target)
            assert after == (new if decided else prior), f"decided={decided}, but after recover there is {after}"
            left = glob.glob(f"{os.path.dirname(target)}/_staged/target/tx/*")
            assert left == [], f"after recover there is left {left}"
            async with store.staged_write("append", lock_timeout=0) as tx:
                await tx.write("next", b"next")
        assert read_back(target) == after | {"next": b"next"}

    try:
        anyio.run(run)
    except (AssertionError, StagedError) as error:
        print(json.dumps({"failure": f"{type(error).__name__}: {error}"}), flush=True)
        raise


def prior_of(task: Work) -> Files:
    """A target on which the work changes something, and removes something if its mode does."""
    empty = task.mode in (Mode.ERROR, Mode.IGNORE)
    names = {Mode.OVERWRITE_PARTITIONS: "partitions", Mode.FULL_DROP: "overlapping"}
    return PRIORS["none" if empty else "disjoint" if task.deletes else names.get(task.mode, "overlapping")]


def main(root: str, seed: int, random_kills: int, moments: str) -> None:
    """These moments of every call for each work; then so many at random, as many of each step, with a moment left to live."""
    tasks = [task for task in works((3,)) if task.apply(prior_of(task)) not in (None, prior_of(task))]
    calls: dict[StepName, list[tuple[Work, int]]] = {step: [] for step in STEPS}

    def kill(task: Work, victim: Victim, at: str) -> int:
        prior = prior_of(task)
        target, new = lay(root, prior), task.apply(prior)
        assert new is not None
        status = in_child(lambda: victim.write(target, task))
        assert status in (0, -signal.SIGKILL), status
        if status or victim.delay is not None:
            ok = in_child(lambda: check(target, prior, new)) == 0
            found = {"task": str(task), "at": at, "step": victim.step, "killed": status < 0, "ok": ok}
            print(json.dumps(found), flush=True)
        return status

    for task in tasks:
        for moment in (moment for moment in MOMENTS if moment in moments.split()):
            for number in range(1, 200):
                victim = Victim(moment, number)
                if kill(task, victim, f"{moment} call {number}") == 0:
                    break
                calls[victim.step].append((task, number))
    chance = random.Random(seed)
    for count in range(random_kills):
        task, number = chance.choice(calls[STEPS[count % len(STEPS)]])
        delay = chance.uniform(0.0, 0.002)
        kill(task, Victim("before", number, delay), f"random {count}: {delay:.6f} s after call {number}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
