"""What must be on the disk when, as a checker over a log of file-system calls; and what must come of every loss of power.

Run as a program, it does one scenario for a tracer to watch.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from typing import Literal, TypeVar

import anyio
import traces
from disk import ROOT, Fate, File, Log, Mark, Names, Operation, Recorder, Tree, Write, lay
from kills import read_back

from staged import DamagedRecord, StagedError, open_store
from staged.drivers import _slots
from staged.drivers._posix import CountedLock
from staged.drivers.local import LocalDriver
from staged.lifecycle import Transaction
from staged.model import Head, HeadState, Ledger, Mode, PlanPart, Ref, TxRecord, TxState
from staged.records import ManifestPart, decode
from staged.store import Store
from staged.testing.exploration import Work
from staged.testing.faults import FaultDriver, Moment
from staged.testing.harness import Files

PLACE = "lake/flights"
"""The target, in a directory that the store has to make itself."""

T = TypeVar("T")
Life = Literal["block", "resumed", "rolled back"]


class InlineDriver(LocalDriver):
    """Works in the caller's thread: the same calls in the same order, ten times as many a second."""

    async def _run(self, work: Callable[[], T], *locks: str | CountedLock | None) -> T:
        with ExitStack() as stack:
            for lock in locks:
                held = self._held.get(lock) if isinstance(lock, str) else lock
                if held is not None:
                    stack.enter_context(held.work())
            try:
                return work()
            except OSError as error:
                raise self._mapped(error) from error


# --------------------------------------------------------------------------------------------------------------- scenarios


@dataclass(frozen=True)
class Scenario:
    """A first commit, and then a transaction that is looked at.

    Attributes:
        files: How many files it stages.
        inside: The control area lies in the target, and files are moved one by one.
        life: A block; or prepared by one store and committed, or rolled back, by another.
        paths: The files are written by somebody else, to real paths.
        spread: The directories that they lie in.
    """

    mode: Mode
    files: int = 2
    inside: bool = False
    life: Life = "block"
    paths: bool = False
    spread: int = 3

    def __str__(self) -> str:
        where = "inside" if self.inside else "beside"
        how = f"{self.life}{', real paths' if self.paths else ''}"
        return f"{self.mode.value}, {self.files} files in {self.spread} directories, {where}, {how}"

    @cached_property
    def first(self) -> Work:
        """The transaction before, which gives the head an earlier state and the target something to keep or lose."""
        if self.mode in (Mode.ERROR, Mode.IGNORE):
            return Work(Mode.APPEND, (), key="first")
        last = f"p={min(self.files, self.spread) - 1}/old"
        names = ("p=0/old", last, "p=x/old", "old") if self.mode is Mode.APPEND else ("p=0/f0", last, "p=x/old", "old")
        return Work(Mode.APPEND, tuple((name, b"old") for name in names))

    @cached_property
    def work(self) -> Work:
        files = tuple((f"p={n % self.spread}/f{n}", f"new {n} ".encode() * 99) for n in range(self.files))
        return Work(self.mode, files, deletes=("old",) if self.mode is Mode.OVERWRITE_FILES else ())

    @cached_property
    def contents(self) -> list[Files]:
        """The target after none, one and two commits."""
        first = self.first.apply({})
        second = None if first is None else self.work.apply(first)
        assert first is not None and second is not None and second != first
        return [{}, first, second]

    @property
    def area(self) -> str:
        """The control area."""
        return f"{PLACE}/_staged/_staged" if self.inside else f"{os.path.dirname(PLACE)}/_staged/flights"

    async def run(self, open_target: Callable[[], Store], mark: Callable[[str], None]) -> None:
        """Do it, and mark what was promised to the caller."""
        async with open_target() as store:
            await self.first(store)
            mark("committed 1")
        async with open_target() as store:
            if self.life == "block":
                async with store.staged_write(self.mode) as tx:
                    await self._stage(tx)
                mark("committed 2")
                return
            tx = await store.begin(self.mode)
            await self._stage(tx)
            await tx.prepare()
            mark(f"prepared {tx.id}")
        async with open_target() as store:
            tx = await store.resume(tx.id)
            if self.life == "resumed":
                await tx.commit()
                mark("committed 2")
            else:
                mark("gives up")
                await tx.rollback()

    async def _stage(self, tx: Transaction) -> None:
        if self.paths:
            async with tx.dir() as local:
                for name, data in self.work.files:
                    await anyio.Path(local, name).parent.mkdir(exist_ok=True)
                    await anyio.Path(local, name).write_bytes(data)
        else:
            for name, data in self.work.files:
                await tx.write(name, data)
        for name in self.work.deletes:
            await tx.delete(name)


Marker = Callable[[str], None]


def before(scenario: Scenario) -> Tree:
    """What was there, on the disk, before a scenario."""
    base = Tree()
    for number, name in enumerate(PLACE.split("/") if scenario.inside else ()):
        base.names[number][name], base.names[number + 1] = number + 1, {}
    return base


def record(
    scenario: Scenario,
    root: str,
    driver: type[LocalDriver] = InlineDriver,
    *,
    syncs: bool = False,
    marked: Callable[[Marker], Marker] = lambda mark: mark,
) -> Log:
    """The log of a scenario in a directory that is there and empty.

    Args:
        syncs: Make the disk's own syncs, too.
        marked: Wraps what notes a promise.
    """
    base = before(scenario)
    lay(base, root)
    recorder = Recorder(root, Log(base, len(base.names)), syncs=syncs, sites=True)
    mark = marked(recorder.log.mark)
    if scenario.inside:
        # As another process left it that was killed: nothing of it is on the disk.
        recorder.calls.makedirs(f"{root}/{scenario.area}")

    async def gate(name: str, moment: Moment) -> None:
        if moment == "after" and name in ("seal", "publish", "swap", "remove"):
            mark(name)

    def open_target() -> Store:
        return open_store(FaultDriver(driver(f"{root}/{PLACE}"), gate))

    with recorder.installed() as log:
        anyio.run(scenario.run, open_target, mark)
    return log


# ----------------------------------------------------------------------------------------------------------------- checker


class Checker:
    """Holds a log against the promises of the order of syncs; `wrong` says where it breaks one.

    Whatever it asks of the disk, it asks of what is there for certain: of what was synced, by name and by content.
    """

    def __init__(self, log: Log, area: str) -> None:
        self.log = log
        self.target = PLACE
        self.area = area
        self.wrong: list[str] = []
        self.seen: set[str] = set()
        self._skip = "_staged" if area.startswith(f"{PLACE}/") else None
        self._now = log.base
        self._run()

    def _run(self) -> None:
        now = self._now = self.log.base.copy()
        self._at = {node: (directory, name) for directory, names in now.names.items() for name, node in names.items()}
        for index, operation in enumerate(self.log.operations):
            if isinstance(operation, Write):
                path = self._path(*self._at[operation.node])
                if path == f"{self.area}/head":
                    self._check_head(index, operation)
                elif path.endswith("/record"):
                    self._check_record(index, operation, path)
            elif isinstance(operation, Mark):
                self._check_mark(index, operation.text)
            elif isinstance(operation, Names):
                self._check_names(index, operation)
                self._at.update({node: (directory, name) for directory, name, node in operation.changes if node})
            now.apply(operation)
        self.end = self._target_of(now)

    def _fail(self, index: int, what: str) -> None:
        self.wrong.append(f"call {index}: {what}")

    # ------------------------------------------------------------------------------------------------------------ moments

    def _check_head(self, index: int, write: Write) -> None:
        """A swap of the head is about to be written."""
        disk = self.log.durable(index)
        head, before = decode(Head, write.data[128:], "head"), head_of(self._now, self.area)
        self._check_torn(index, write)
        there, torn = head_in(disk.files[write.node]), head_in(_torn(disk.files[write.node], write))
        if (there.ledger, there.state is HeadState.COMMITTED) != (torn.ledger, torn.state is HeadState.COMMITTED):
            self._fail(index, f"a torn write of {head.state} to the head would take {there.state} back")
        if head.state is HeadState.COMMITTED and before.state is HeadState.HELD:
            self.seen.add("decision")
            self._check_decision(index, disk, head)
        elif head.state is HeadState.FREE and before.state is HeadState.COMMITTED:
            self.seen.add("freed")
            if self._target_of(disk) != self._target_of(self._now):
                self._fail(index, "the head is freed before the target is on the disk")
            self._same(index, "freed", disk, f"outcome/{before.transaction}")
            node = disk.find(self.target)
            if any(found == node for _, found in disk.walk(disk.find(self.area))):
                self._fail(index, "the head is freed while the new tree may be in two places")

    def _check_record(self, index: int, write: Write, path: str) -> None:
        """A swap of a transaction's record is about to be written."""
        self._check_torn(index, write)
        file = self.log.durable(index).files[write.node]
        there, torn = record_in(file), record_in(_torn(file, write))
        promised = there is not None and not there.block and there.state is not TxState.OPEN
        if promised and (torn is None or there is None or torn.state is not there.state):
            self.seen.add("swapped")
            self._fail(index, f"a torn write to {path} would take back what was promised")

    def _check_torn(self, index: int, write: Write) -> None:
        """Torn, the write leaves a record that can be read, or what counts as none."""
        durable = write.offset < 2 * _slots.SLOT
        if durable and not _current(_torn(self.log.durable(index).files[write.node], write)):
            self._fail(index, "a torn write would leave nothing but a damaged record")

    def _check_decision(self, index: int, disk: Tree, head: Head) -> None:
        """All that COMMITTED rests on is on the disk, and the target is as it was."""
        assert head.plan is not None and head.ledger is not None
        for ref in (head.plan, head.ledger):
            self._check_segments(index, disk, ref)
        first = decode(PlanPart, self._segments(head.plan)[0], "plan").header
        assert first is not None
        self._check_staged(index, "decided", disk, first.transaction, first.manifest.entries)
        if first.trees is not None:
            tree = f"tx/{first.transaction}/tree"
            self._same(index, "decided", disk, tree)
            node = self._now.find(f"{self.area}/{tree}")
            assert node is not None
            if disk.attributes.get(node) != self.log.now.attributes.get(node):
                self._fail(index, f"decided, but the mode of {tree} is not on the disk")
        if self._target_of(disk) != self._target_of(self._now):
            self._fail(index, "decided, but the target as it was is not on the disk")

    def _check_staged(self, index: int, when: str, disk: Tree, tx: str, manifest: Ref) -> None:
        self._check_segments(index, disk, manifest)
        for body in self._segments(manifest):
            for entry in decode(ManifestPart, body, "manifest").entries:
                self.seen.add("staged")
                self._same(index, when, disk, f"tx/{tx}/tree/{entry.path}")

    def _check_segments(self, index: int, disk: Tree, ref: Ref) -> None:
        for number in range(ref.count):
            self.seen.add("segment")
            self._same(index, "decided", disk, f"{ref.key}-{number}")

    def _segments(self, ref: Ref) -> list[bytes]:
        nodes = [self._now.find(f"{self.area}/{ref.key}-{number}") for number in range(ref.count)]
        return [bytes(self._now.files[node]) for node in nodes if node is not None]

    def _same(self, index: int, when: str, disk: Tree, path: str) -> None:
        """A path of the control area is there for programs, and on the disk as it is for them."""
        now, there = self._now.find(f"{self.area}/{path}"), disk.find(f"{self.area}/{path}")
        if now is None or now != there:
            self._fail(index, f"{when}, but the name {path} is not on the disk")
        elif now in self._now.files and self._now.files[now].key() != disk.files[now].key():
            self._fail(index, f"{when}, but the data of {path} is not on the disk")

    def _check_mark(self, index: int, text: str) -> None:
        disk = self.log.durable(index)
        if text.startswith("prepared "):
            tx = text.removeprefix("prepared ")
            self.seen.add("prepared")
            found = record_of(disk, self.area, tx)
            if found is None or found.state is not TxState.PREPARED or found.manifest is None:
                self._fail(index, "prepared, but its record is not on the disk")
            else:
                self._check_staged(index, "prepared", disk, tx, found.manifest.entries)
        elif text == "seal":
            for path, _ in self._now.walk(self._now.find(f"{self.area}/tx")):
                if path.split("/")[1:2] == ["tree"]:
                    self._same(index, text, disk, f"tx/{path}")
        elif text in ("publish", "swap", "remove"):
            self.seen.add(text)
            if self._target_of(disk) != self._target_of(self._now):
                self._fail(index, f"the driver's {text} returned, but the target is not on the disk")
        elif text.startswith("committed "):
            self.seen.add("acknowledged")
            if head_of(disk, self.area).nonce != head_of(self._now, self.area).nonce:
                self._fail(index, "acknowledged, but the head is not on the disk")
            if self._target_of(disk) != self._target_of(self._now):
                self._fail(index, "acknowledged, but the target is not on the disk")

    def _check_names(self, index: int, operation: Names) -> None:
        paths = [self._path(directory, name) for directory, name, _ in operation.changes]
        if any(self._is_target(path) for path in paths):
            self.seen.add("published")
            disk = self.log.durable(index)
            if head_of(disk, self.area).state is not HeadState.COMMITTED:
                self._fail(
                    index, f"{operation.call} of {paths[-1]} in the target, and nothing on the disk says COMMITTED"
                )
        elif paths[-1].startswith(f"{self.area}/outcome/") and operation.call == "rename_new":
            node = operation.changes[-1][2]
            if node is not None and self._now.files[node].key() != self.log.durable(index).files[node].key():
                self._fail(index, f"{paths[-1]} is named before its data is on the disk")
        elif operation.call in ("unlink", "rmdir") and not _is_passing(paths[0]):
            self._check_deletion(index, paths[0])

    def _check_deletion(self, index: int, path: str) -> None:
        """Something of the control area is about to go."""
        self.seen.add("deleted")
        disk = self.log.durable(index)
        head = head_of(disk, self.area)
        if head.state is HeadState.COMMITTED:
            self._fail(index, f"{path} is deleted, and nothing on the disk says that the commit is complete")
        parts = path.removeprefix(f"{self.area}/").split("/")
        if parts[0] == "tx" and len(parts) > 2:
            found = record_of(disk, self.area, parts[1])
            waits = found is not None and found.state is TxState.PREPARED and not found.block
            if waits and parts[1] not in committed(disk, self.area):
                self._fail(index, f"{path} is deleted, and on the disk its transaction still waits for its caller")

    # ------------------------------------------------------------------------------------------------------------- places

    def _target_of(self, tree: Tree) -> dict[str, object]:
        """The target by name and inode, with the content of its files."""
        found = tree.walk(tree.find(self.target), skip=self._skip)
        return {"": tree.find(self.target)} | {
            path: (node, tree.files[node].key() if node in tree.files else None) for path, node in found
        }

    def _path(self, directory: int, name: str) -> str:
        """The path of a name as it is now."""
        path = name
        while directory != ROOT:
            directory, name = self._at[directory]
            path = f"{name}/{path}"
        return path

    def _is_target(self, path: str) -> bool:
        inner = path == self.target or path.startswith(f"{self.target}/")
        return inner and not f"{path}/".startswith(f"{self.target}/_staged/")


def _is_passing(path: str) -> bool:
    """Whether a path is of something that nobody is promised: half a segment, a probe."""
    return path.endswith(".tmp") or "/probe-" in path or "/scratch-" in path or "/part" in path


def head_in(file: File) -> Head:
    """The head in a file, as a reader finds it."""
    body = _current(file)
    return decode(Head, body, "head") if body else Head()


def head_of(tree: Tree, area: str) -> Head:
    """The head that is found on a disk."""
    node = tree.find(f"{area}/head")
    return Head() if node is None else head_in(tree.files[node])


def record_in(file: File) -> TxRecord | None:
    """The record of a transaction in a file, as a reader finds it."""
    body = _current(file)
    return decode(TxRecord, body, "record") if body else None


def record_of(tree: Tree, area: str, tx: str) -> TxRecord | None:
    """The record of a transaction that is found on a disk."""
    node = tree.find(f"{area}/tx/{tx}/record")
    return None if node is None else record_in(tree.files[node])


def _torn(file: File, write: Write) -> File:
    """A file after a write to it that left nothing readable."""
    return file.written(replace(write, data=b"?" * len(write.data)), "kept", random.Random())


def _current(file: File) -> bytes:
    """The body that counts in a file of four slots."""
    return max(_slot(file, number * _slots.SLOT) for number in range(4))[1]


def committed(tree: Tree, area: str) -> set[str]:
    """The transactions that the ledger of a disk's head names, as far as that ledger is on the disk."""
    ledger = head_of(tree, area).ledger
    node = None if ledger is None else tree.find(f"{area}/{ledger.key}-0")
    try:
        return (
            set()
            if node is None
            else {commit.transaction for commit in decode(Ledger, bytes(tree.files[node]), "ledger").commits}
        )
    except DamagedRecord:
        return set()


def _slot(file: File, at: int) -> tuple[int, bytes]:
    line = file.at(at, 128)
    words = line.split()
    if len(words) != 4 or words[0] != b"slot":
        return 0, b""
    body = file.at(at + 128, int(words[2]))
    return (int(words[1]), body) if _slots.token(body).encode() == words[3] else (0, b"")


# ------------------------------------------------------------------------------------------------------------ loss of power

NAMED: dict[str, tuple[Fate, Fate]] = {
    "nothing was kept": ("lost", "lost"),
    "everything was kept": ("kept", "kept"),
    "names were kept, data not": ("kept", "lost"),
    "data was kept, names not": ("lost", "kept"),
    "names were kept, data is zeros": ("kept", "zeros"),
    "names were kept, data is garbage": ("kept", "garbage"),
    "names were kept, data is torn": ("kept", "torn"),
    "names were kept, data is short": ("kept", "short"),
}
"""The fate of every name and of all data that were not synced."""


def fates(kind: str) -> Callable[[int, Operation], Fate]:
    """What becomes of what was not synced: by a name above, or by the seed of a dice."""
    if kind in NAMED:
        names, data = NAMED[kind]
        return lambda _, operation: data if isinstance(operation, Write) else names
    dice = random.Random(kind)
    often = dice.choice((0.2, 0.5, 0.8, 0.95))

    def throw(_: int, operation: Operation) -> Fate:
        if dice.random() < often:
            return "kept"
        return dice.choice(("lost", "short", "zeros", "garbage", "torn")) if isinstance(operation, Write) else "lost"

    return throw


@dataclass(frozen=True)
class Verdict:
    """What came of one disk.

    Attributes:
        decided: How many commits were decided on it.
        prepared: The transactions that waited there for their caller.
        log: What recovering from it did.
    """

    decided: int
    prepared: tuple[str, ...]
    wrong: tuple[str, ...]
    log: Log


async def judge(scenario: Scenario, log: Log, root: str) -> Verdict:
    """Start a new process on a disk: it must find old or new, and be able to go on.

    Args:
        log: Its end is what is on the disk, and is gone on from.
        root: Where to lay it.
    """
    decided, wrong, prepared = len(committed(log.now, scenario.area)), list[str](), tuple[str, ...]()
    complete = head_of(log.now, scenario.area).state is not HeadState.COMMITTED
    os.mkdir(root)
    lay(log.now, root)
    recorder, target = Recorder(root, log), f"{root}/{PLACE}"
    expected = scenario.contents[decided]

    def check(when: str, expected: Files) -> None:
        found = {name: data for name, data in read_back(target).items() if not name.startswith("_staged/")}
        if found != expected:
            short = {path: data[:9] for path, data in found.items()}
            wrong.append(f"{decided} commits are decided, but {when} there is {short}")

    with recorder.installed():
        try:
            async with open_store(InlineDriver(target)) as store:
                if complete:
                    check("before recover", expected)
                done = await store.recover()
                log.mark(f"committed {decided}")
                prepared, until = done.prepared, len(log)
                check("after recover", expected)
                if done.damaged:
                    wrong.append(f"damaged: {done.damaged}")
                for tx in prepared:
                    await (await store.resume(tx)).commit()
                    expected = scenario.contents[decided + 1]
                check("after resuming what was prepared", expected)
                async with store.staged_write("append", lock_timeout=0) as tx:
                    await tx.write("next", b"next")
                check("after the next writer", expected | {"next": b"next"})
                await store.gc(older_than=timedelta(0))
                if left := leftovers(log.now, scenario.area):
                    wrong.append(f"after gc there is left {left}")
        except StagedError as error:
            until = len(log)
            wrong.append(f"{type(error).__name__}: {error}")
    shutil.rmtree(root)
    return Verdict(decided, prepared, tuple(wrong), log.until(until))


def leftovers(tree: Tree, area: str) -> list[str]:
    """What is left in a control area besides the head, the ledger that it names, locks, empty directories and the probe."""
    ledger = head_of(tree, area).ledger
    kept = {"head", "lock", "clock", f"{ledger.key}-0" if ledger else "", "probe", "probe/a", "probe/B"}
    empty = {"tx", "log", "outcome", "old"}
    return [
        path
        for path, node in tree.walk(tree.find(area))
        if path not in kept and not (path in empty and not tree.names[node])
    ]


class Sweep:
    """Losses of power, each disk that they leave judged once; counts, and what was wrong."""

    def __init__(self, scenario: Scenario, root: str) -> None:
        self.scenario = scenario
        self.losses = 0
        self.verdicts: dict[object, Verdict] = {}
        self.wrong: list[str] = []
        self._root = root

    async def lose(self, log: Log, at: int, kind: str) -> Verdict:
        """Lose power after the first `at` calls of a log."""
        self.losses += 1
        tree = log.left(at, fates(f"{kind} {at}" if kind not in NAMED else kind), at)
        if (verdict := self.verdicts.get(key := tree.key())) is None:
            place = f"{self._root}/{len(self.verdicts)}"
            verdict = self.verdicts[key] = await judge(self.scenario, Log(tree, log.next), place)
            self.wrong += [f"{self._where(log, at, kind)}: {wrong}" for wrong in verdict.wrong]
        self._hold(verdict, log, at, kind)
        return verdict

    async def kill(self, log: Log, at: int) -> Verdict:
        """Kill the process after the first `at` calls of a log, and let another recover: nothing is lost, or more on the disk."""
        verdict = await judge(self.scenario, log.until(at), f"{self._root}/killed-{at}")
        self.wrong += [f"{self._where(log, at, 'killed')}: {wrong}" for wrong in verdict.wrong]
        self._hold(verdict, log, at, "killed")
        return verdict

    def _hold(self, verdict: Verdict, log: Log, at: int, kind: str) -> None:
        """Hold a disk against what was promised before."""
        marks = [operation.text for operation in log.operations[:at] if isinstance(operation, Mark)]
        acknowledged = max((int(text.split()[1]) for text in marks if text.startswith("committed ")), default=0)
        if verdict.decided < max(acknowledged, len(committed(log.durable(at), self.scenario.area))):
            self.wrong.append(f"{self._where(log, at, kind)}: only {verdict.decided} commits are left")
        waiting = [text.removeprefix("prepared ") for text in marks if text.startswith("prepared ")]
        if "gives up" not in marks and verdict.decided < 2 and not set(waiting) <= set(verdict.prepared):
            self.wrong.append(f"{self._where(log, at, kind)}: prepared, but {verdict.prepared} are left to resume")

    def _where(self, log: Log, at: int, kind: str) -> str:
        return (
            f"{self.scenario}: {kind} after call {at} of {len(log)}, {log.operations[at - 1] if at else 'none'!s:.160}"
        )


# ------------------------------------------------------------------------------------------------------------- for a tracer


def main(root: str, text: str) -> None:
    """Record a scenario with real syncs, tell a tracer what is promised, and print what was recorded."""
    mode, files, inside, life, paths, spread = json.loads(text)
    scenario = Scenario(Mode(mode), files, inside, life, paths, spread)

    def told(mark: Marker) -> Marker:
        def tell(text: str) -> None:
            mark(text)
            with suppress(OSError):
                os.readlink(f"{traces.MARK}{text}")

        return tell

    print(json.dumps(traces.describe(record(scenario, root, LocalDriver, syncs=True, marked=told))))


if __name__ == "__main__":
    main(*sys.argv[1:])
