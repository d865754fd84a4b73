"""Forks writers that are killed with SIGKILL at a moment of their own choosing, and processes that recover after them.

Run as a program, it stays without threads itself, so that forking is safe. For each case it prints one line of JSON.
"""

from __future__ import annotations

import glob
import json
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
from staged.testing.exploration import PRIORS, Work, works
from staged.testing.faults import FaultDriver, Moment
from staged.testing.harness import Files

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


def write(target: str, work: Work, moment: Moment, number: int) -> None:
    """Do the work, and die at the n-th moment."""
    count = 0

    async def gate(name: str, at: Moment) -> None:
        nonlocal count
        count += at == moment
        if count == number and at == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    async def run() -> None:
        async with open_store(FaultDriver(LocalDriver(target, durability="none"), gate)) as store:
            await work(store)

    anyio.run(run)


def write_until(target: str, work: Work, seconds: float) -> None:
    """Do the work with a killer in the background."""
    killer = os.fork()
    if killer == 0:
        time.sleep(seconds)
        os.kill(os.getppid(), signal.SIGKILL)
        os._exit(0)

    async def run() -> None:
        async with open_store(target, durability="none") as store:
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


def main(root: str, seed: int, random_kills: int) -> None:
    """Every moment of every call for some works, then so many random moments."""
    prior = PRIORS["overlapping"]
    tasks = [task for task in works((3,)) if (new := task.apply(prior)) is not None and new != prior]
    for task in tasks:
        for moment in MOMENTS:
            for number in range(1, 200):
                target = lay(root, prior)
                status = in_child(lambda: write(target, task, moment, number))  # noqa: B023 - run at once
                if status == 0:
                    break
                assert status == -signal.SIGKILL, status
                new = task.apply(prior)
                assert new is not None
                ok = in_child(lambda: check(target, prior, new)) == 0  # noqa: B023
                print(json.dumps({"task": str(task), "at": f"{moment} call {number}", "ok": ok}), flush=True)
    chance = random.Random(seed)
    for number in range(random_kills):
        task = chance.choice(tasks)
        target = lay(root, prior)
        status = in_child(lambda: write_until(target, task, chance.uniform(0.0, 0.05)))  # noqa: B023
        new = task.apply(prior)
        assert new is not None
        ok = in_child(lambda: check(target, prior, new)) == 0  # noqa: B023
        print(json.dumps({"task": str(task), "at": f"random {number}", "killed": status < 0, "ok": ok}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
