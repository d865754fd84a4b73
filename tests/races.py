"""What must be true of writers that raced, and a program that lets real processes race on one directory.

The program forks, and stays without threads itself. It prints one line of JSON for each race; race n of seed S is race 0 of
seed S + n.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from glob import glob

import anyio
import trio  # noqa: F401 - loaded once, before forking
from kills import in_child, lay, read_back

from staged import Conflict, StagedError, open_store
from staged.control import read_both, read_head
from staged.driver import Driver
from staged.drivers.local import LocalDriver
from staged.model import HeadState, LedgerEntry, Mode
from staged.planning import BLIND, REPLACING
from staged.store import Store
from staged.testing.exploration import Files, Work
from staged.testing.faults import FaultDriver, Moment

NAMES = ("a", "b", "p=0/x", "p=0/y", "p=1/x", "p=1/y")
NEVER = 1 << 62


@dataclass
class Attempt:
    """One try of a work, what it heard, and when, on the race's clock.

    Attributes:
        number: Of the work among those of its writer.
        began: Before it began.
        ended: After it ended, or was dead.
        epoch: Of a head that was read after it began.
        holder: The transaction that had that head.
        said: A receipt's phase, the outcome of an error, or "crash".
    """

    work: Work
    number: int = 0
    began: int = NEVER
    ended: int = NEVER
    id: str | None = None
    epoch: int = NEVER
    holder: str | None = None
    said: str = "crash"
    conflict: bool = False
    retry: bool = False

    async def have_begun(self, id: str, driver: Driver) -> None:
        """Note the transaction, and which commits come after its beginning."""
        head, _ = await read_head(driver)
        self.epoch, self.holder = head.epoch, None if head.state is HeadState.FREE else head.transaction
        self.id = id

    def refused(self, error: StagedError) -> None:
        """Note an error. A conflict is worth another try; work of unknown outcome only under a key."""
        self.said, self.conflict = error.outcome, isinstance(error, Conflict)
        self.retry = error.retryable if error.outcome == "untouched" else self.work.key is not None


def draw_work(chance: random.Random, writer: str) -> Work:
    """A work over few names, so that writers collide."""
    mode = chance.choice([*Mode, *sorted(BLIND | REPLACING)])
    names = [name for name in NAMES if mode is not Mode.OVERWRITE_PARTITIONS or "/" in name]
    files = sorted(chance.sample(names, chance.randint(1, 4)))
    deletes: list[str] = []
    if mode in BLIND and chance.random() < 0.3:
        deletes = chance.sample([name for name in NAMES if name not in files], 1)
    key = f"key-{chance.randint(0, 1)}" if chance.random() < 0.3 else None
    return Work(mode, tuple((name, f"{writer} {name}".encode()) for name in files), tuple(deletes), key)


def draw_prior(chance: random.Random) -> Files:
    return {name: b"prior" for name in NAMES if chance.random() < 0.2}


# -------------------------------------------------------------------------------------------------- what must be true


async def wrong_with(
    store: Store, prior: Files, attempts: Sequence[Attempt], target: Files, *, collected: bool = False
) -> list[str]:
    """What does not fit together after a race and a recovery.

    Args:
        collected: Outcomes may have been collected meanwhile.
    """
    head, ledger = await read_both(store._driver)
    begun = {attempt.id: attempt for attempt in attempts if attempt.id is not None}
    commits, wrong = [], []
    for commit in ledger.commits:
        if commit.transaction in begun:
            commits.append(_Commit(commit, begun[commit.transaction]))
        else:
            wrong.append(f"{commit} was committed by nobody")
    if head.state is not HeadState.FREE:
        wrong.append(f"after recover the head is {head.state.value}")
    wrong += [
        *_order(commits, prior, target),
        *_real_time(commits),
        *_lost_updates(commits),
        *_said(commits, attempts, nothing=not prior and all(not commit.after for commit in commits)),
    ]
    for attempt in begun.values():
        wrong += await _outcome(store, commits, attempt, collected)
    return wrong


@dataclass
class _Commit:
    entry: LedgerEntry
    attempt: Attempt
    before: Files = field(default_factory=dict)
    after: Files = field(default_factory=dict)

    @property
    def work(self) -> Work:
        return self.attempt.work

    def is_since(self, other: Attempt) -> bool:
        """Whether it was surely decided, or not completed, after another one began."""
        return self.entry.epoch > other.epoch or self.entry.transaction == other.holder


def _order(commits: Sequence[_Commit], prior: Files, target: Files) -> Iterator[str]:
    """The ledger is a serial order: applied one after another, its works make the target."""
    now = prior
    for commit in commits:
        commit.before = now
        after = commit.work.apply(now)
        if after is None or (commit.work.mode in (Mode.ERROR, Mode.IGNORE) and now):
            yield f"{commit.work} was committed although the target held {sorted(now)}"
        now = commit.after = now if after is None else after
    if now != target:
        yield f"the ledger says {now}, the target holds {target}"
    epochs = [commit.entry.epoch for commit in commits]
    if epochs != sorted(set(epochs)):
        yield f"the epochs {epochs} do not rise"
    keys = [commit.entry.key for commit in commits if commit.entry.key is not None]
    if len(keys) != len(set(keys)):
        yield f"a key was committed twice: {keys}"
    for commit in commits:
        if commit.entry.key != commit.work.key:
            yield f"{commit.work} was committed under the key {commit.entry.key}"


def _real_time(commits: Sequence[_Commit]) -> Iterator[str]:
    """What ended before another began comes before it."""
    for at, later in enumerate(commits):
        for earlier in commits[:at]:
            if later.attempt.ended < earlier.attempt.began:
                yield f"{later.work} ended before {earlier.work} began, but was committed after it"


def _lost_updates(commits: Sequence[_Commit]) -> Iterator[str]:
    """What keeps the names that it does not name undoes nothing that was committed since it began."""
    for at, later in enumerate(commits):
        work = later.work
        ours = {*work.deletes, *(name for name, _ in work.files if work.mode in BLIND)}
        for earlier in commits[:at]:
            touched = {name for name, _ in earlier.work.files}
            # A name to append that a full_drop removed is free.
            if earlier.work.mode is not Mode.FULL_DROP or work.mode is not Mode.APPEND or work.deletes:
                touched |= earlier.before.keys() - earlier.after.keys()
            if earlier.is_since(later.attempt) and not ours.isdisjoint(touched):
                yield f"{later.work} undid {sorted(ours & touched)} of {earlier.work}, committed since it began"


def _said(commits: Sequence[_Commit], attempts: Sequence[Attempt], *, nothing: bool) -> Iterator[str]:
    """What each writer heard is true."""
    keys = {commit.entry.key: commit.entry.transaction for commit in commits}
    ids = {commit.entry.transaction for commit in commits}
    for attempt in attempts:
        what = f"{attempt.work} heard {attempt.said!r}"
        if attempt.said == "committed" and attempt.id not in ids:
            yield f"{what}, but is not in the ledger"
        if attempt.said in ("untouched", "rolled_back", "done", "skipped") and attempt.id in ids:
            yield f"{what}, but is in the ledger"
        if attempt.said == "done" and keys.get(attempt.work.key) in (None, attempt.id):
            yield f"{what}, but nobody else committed its key"
        if attempt.said == "skipped" and nothing:
            yield f"{what}, but the target never held anything"


async def _outcome(store: Store, commits: Sequence[_Commit], attempt: Attempt, collected: bool) -> list[str]:
    """The store's answer about a transaction agrees with the ledger."""
    assert attempt.id is not None
    outcome = await store.outcome(attempt.id)
    if collected and outcome.state == "unknown":
        return []
    at = next((at for at, commit in enumerate(commits) if commit.attempt is attempt), None)
    if at is None:
        fits = outcome.state in ("rolled_back", "open", "prepared")
    else:
        previous = commits[at - 1].entry.transaction if at else None
        fits = (outcome.state, outcome.epoch, outcome.previous) == ("committed", commits[at].entry.epoch, previous)
    return [] if fits else [f"{attempt.work} heard {attempt.said!r}, and its outcome is {outcome}"]


# ------------------------------------------------------------------------------------------------------ real processes


def works_of(writer: int, seed: int) -> list[Work]:
    """What a writer's process does, one after another."""
    chance = random.Random(f"{seed} {writer}")
    return [draw_work(chance, f"{writer}.{number}") for number in range(3)]


def write(root: str, writer: int, seed: int, barrier: int) -> None:
    """A writer's process. What it does and hears is noted where a kill does not reach it."""
    chance = random.Random(f"{seed} {writer} faults")
    dies_at = chance.randint(1, 150) if chance.random() < 0.3 else 0
    moments = 0

    async def gate(name: str, moment: Moment) -> None:
        nonlocal moments
        moments += 1
        if moments == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if chance.random() < 0.1:
            await anyio.sleep(chance.uniform(0.0, 0.005))

    def note(attempt: Attempt) -> None:
        told = {name: value for name, value in asdict(attempt).items() if name != "work"}
        log.write(json.dumps(told).encode() + b"\n")

    async def attempt_at(work: Work, number: int, store: Store, driver: LocalDriver) -> Attempt:
        attempt = Attempt(work, number, began=time.monotonic_ns())
        note(attempt)
        try:
            async with store.staged_write(work.mode, key=work.key) as tx:
                await attempt.have_begun(tx.id, driver)
                note(attempt)
                for name, data in work.files:
                    await tx.write(name, data)
                for name in work.deletes:
                    await tx.delete(name)
            attempt.said = tx.receipt.phase
        except StagedError as error:
            attempt.refused(error)
        attempt.ended = time.monotonic_ns()
        note(attempt)
        return attempt

    async def run() -> None:
        driver = LocalDriver(f"{root}/target", durability="none")
        async with open_store(FaultDriver(driver, gate)) as store:
            for number, work in enumerate(works_of(writer, seed)):
                if (await attempt_at(work, number, store, driver)).retry:
                    await attempt_at(work, number, store, driver)

    with open(f"{root}/log-{writer}", "wb", buffering=0) as log:
        os.read(barrier, 1)  # all start at once, when the other end is closed
        anyio.run(run, backend=chance.choice(["asyncio", "trio"]))


def noted(root: str, writer: int, seed: int, dead: int) -> list[Attempt]:
    """The attempts of a writer, as far as it came."""
    works = works_of(writer, seed)
    with open(f"{root}/log-{writer}", "rb") as log:
        told = {attempt["began"]: attempt for attempt in map(json.loads, log)}
    return [
        Attempt(**{**attempt, "work": works[attempt["number"]], "ended": min(attempt["ended"], dead)})
        for attempt in told.values()
    ]


def check(root: str, prior: Files, attempts: Sequence[Attempt], killed: int, *, collected: bool) -> None:
    """Recover in a new process, and print what is wrong."""

    async def run() -> None:
        async with open_store(f"{root}/target", durability="none") as store:
            await store.recover()
            seen = read_back(f"{root}/target")
            wrong = await wrong_with(store, prior, attempts, seen, collected=collected)
            commits = (await store.status()).commits
            await store.gc(older_than=timedelta(0))
            if read_back(f"{root}/target") != seen:
                wrong.append("gc changed the target")
            area = f"{root}/_staged/target"
            left = [path for kind in ("tx", "log", "outcome", "old") for path in glob(f"{area}/{kind}/*")]
            if left or len(glob(f"{area}/ledger-*")) > 1:
                wrong.append(f"after gc there is left {left}")
        told = {"attempts": len(attempts), "conflicts": sum(attempt.conflict for attempt in attempts)}
        print(json.dumps({"committed": commits, "killed": killed, **told, "wrong": wrong}), flush=True)

    anyio.run(run)


def help_along(root: str, collect: bool, barrier: int) -> None:
    """A process that recovers, or collects everything, again and again while others write."""

    async def run() -> None:
        async with open_store(f"{root}/target", durability="none") as store:
            for _ in range(8):
                await anyio.sleep(0.02)
                try:
                    await (store.gc(older_than=timedelta(0)) if collect else store.recover())
                except StagedError:
                    pass

    os.read(barrier, 1)
    anyio.run(run)


def fork(work: Callable[[], None]) -> int:
    """Start work in a child, whose number it returns."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    return child


def race(root: str, seed: int) -> None:
    """One race of 4 to 8 processes, of which some are killed between two calls, and some at any moment."""
    chance = random.Random(seed)
    prior = draw_prior(chance)
    lay(root, prior)
    start, go = os.pipe()

    def child(work: Callable[[], None]) -> int:
        def begin() -> None:
            os.close(go)
            work()

        return fork(begin)

    children: dict[int, int] = {}
    for writer in range(chance.randint(4, 8)):
        open(f"{root}/log-{writer}", "xb").close()
        children[child(lambda: write(root, writer, seed, start))] = writer  # noqa: B023 - run at once
    helper = chance.choice(["recover", "gc", None])
    helping = [child(lambda: help_along(root, helper == "gc", start))] if helper else []
    os.close(start)
    os.close(go)
    for writing in children:
        if chance.random() < 0.3:
            time.sleep(chance.uniform(0.0, 0.2))
            os.kill(writing, signal.SIGKILL)  # a process that ended is there until it is waited for
    attempts: list[Attempt] = []
    killed = 0
    for writing, writer in children.items():
        status = os.waitstatus_to_exitcode(os.waitpid(writing, 0)[1])
        assert status in (0, -signal.SIGKILL), status
        killed += status < 0
        attempts += noted(root, writer, seed, time.monotonic_ns())
    for other in helping:
        assert os.waitpid(other, 0)[1] == 0
    status = in_child(lambda: check(root, prior, attempts, killed, collected=helper == "gc"))
    assert status == 0, f"the check of race {seed} ended with {status}"


def main(root: str, seed: int, races: int) -> None:
    for number in range(races):
        race(root, seed + number)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
