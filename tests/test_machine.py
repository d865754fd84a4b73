"""A store against a model on plain dicts: any sequence of public calls does what the pages about modes and outcomes say."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import anyio
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from test_conformance import LocalHarness

from staged import Busy, Conflict, Exists, Fenced, InvalidInput, InvalidPath, StagedError, StagingError, WrongState
from staged.control import read_head
from staged.lifecycle import Transaction
from staged.model import Capabilities, HeadState, Mode, Receipt
from staged.planning import BLIND, REPLACING
from staged.testing.exploration import MemoryHarness, Process, World
from staged.testing.faults import Crash, Moment
from staged.testing.harness import Files, Harness

SOAK = int(os.environ.get("STAGED_SOAK", "1"))
Figure = Callable[[str, str], None]
Refusal = type[StagedError]
T = TypeVar("T")

NAMES = ["a", "b", "p=0/x", "p=0/y", "p=1/x", "p=1/deep/z"]
TWIN = "A"
PARTITIONS = ["p=0", "p=1", "p=1/deep"]
KEYS = ["first", "second"]

KINDS: dict[str, Callable[[str], Harness]] = {
    "exchange under a lock": lambda root: MemoryHarness(),
    "two renames, fenced by consuming": lambda root: MemoryHarness(fence="consumed", swap="renames", period=0.02),
    "entries, fenced by consuming": lambda root: MemoryHarness(fence="consumed", swap=None, period=0.02),
    "directory": lambda root: LocalHarness(Path(root)),
    "directory, entries": lambda root: LocalHarness(Path(root), inside=True),
}


class Died(Exception):
    """The process of a call died in it."""


@dataclass(eq=False)
class Tx:
    """A transaction in the model.

    Attributes:
        base: How many commits were finished when it began.
        state: What is durable of it. "committed" from the decision on.
        handle: The object that owns it, until its process dies.
        phase: What that object says of itself; "done" and "skipped" end as "rolled back" does.
        nowhere: How it will end, if its writes go nowhere.
        gone: Collected although its owner lives.
        collected: Nothing tells its outcome any more.
        dirty: A process died in it after its end: something of its staging may be left.
    """

    id: str
    mode: Mode
    block: bool
    base: int
    process: int
    handle: Transaction | None
    key: str | None = None
    meta: dict[str, object] = field(default_factory=dict)
    partitions: tuple[str, ...] | None = None
    allow_empty: bool = False
    entries: Files = field(default_factory=dict)
    deletes: list[str] = field(default_factory=list)
    state: Literal["open", "prepared", "committed", "rolled_back"] = "open"
    phase: Literal["staging", "prepared", "released", "committed", "rolled_back", "done", "skipped", "in doubt"] = (
        "staging"
    )
    nowhere: Literal["done", "skipped"] | None = None
    gone: bool = False
    collected: bool = False
    dirty: bool = False

    @property
    def is_undecided(self) -> bool:
        return self.state in ("open", "prepared")

    @property
    def is_owned(self) -> bool:
        return self.handle is not None and self.phase in ("staging", "prepared")


@dataclass
class Commit:
    """What a later one must know of it: the names that it touched, and whether its plan is still on record."""

    tx: Tx
    names: set[str]
    whole: bool
    on_record: bool = True


@dataclass(frozen=True)
class Wish:
    """What a transaction is begun with, and what is staged at once."""

    mode: Mode
    block: bool
    key: str | None
    fact: int | None
    partitions: tuple[str, ...] | None
    allow_empty: bool
    files: Files
    deletes: tuple[str, ...]


_ANY = st.integers(0, 19)
_WISHES = st.builds(
    Wish,
    mode=st.sampled_from([*sorted(BLIND | REPLACING) * 2, *Mode]),
    block=st.booleans(),
    key=st.sampled_from([*[None] * 6, *KEYS]),
    fact=st.none() | st.integers(0, 9),
    partitions=st.none() | st.none() | st.lists(st.sampled_from(PARTITIONS), max_size=2, unique=True).map(tuple),
    allow_empty=st.booleans(),
    files=st.dictionaries(st.sampled_from(NAMES), st.binary(max_size=3), max_size=3),
    deletes=st.sampled_from([*[()] * 6, ("a",), ("p=0/x",)]),
)


class Machine(RuleBasedStateMachine):
    """Two processes over one target, that begin, stage, commit, die, recover and collect; and strangers."""

    seen: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.files: Files = {}
        self.commits: list[Commit] = []
        self.meta: dict[str, object] = {}
        self.pending: Tx | None = None  # decided, and not completed
        self.known: list[Tx] = []
        self.overtaken: list[tuple[Tx, Transaction, int]] = []  # objects whose transaction another process resumed
        self.child_is_there = False
        self.dies_in = 0
        self.dead = False
        self.root = tempfile.mkdtemp()

    @initialize(
        kind=st.sampled_from(sorted(KINDS)),
        backend=st.sampled_from(["asyncio", "trio"]),
        first=_WISHES,
        second=_WISHES,
        third=_WISHES,
    )
    def start(self, kind: str, backend: str, first: Wish, second: Wish, third: Wish) -> None:
        self.opened: AbstractContextManager[BlockingPortal] = start_blocking_portal(backend)
        self.portal = self.opened.__enter__()
        self.world = World(KINDS[kind](self.root))
        self.processes = [self.new_process(), self.new_process()]
        self.watcher = self.world.process(_calm)
        self.store: Capabilities = self.call(self.watcher.driver.probe)
        self.locks = self.store.fence == "lock"
        self.begin(0, first, "commit")
        self.begin(0, second, "wait")
        self.begin(1, third, "wait")

    def teardown(self) -> None:
        if hasattr(self, "portal"):
            for process in (*self.processes, self.watcher):
                self.portal.call(self.world.end, process)
            self.opened.__exit__(None, None, None)
        shutil.rmtree(self.root)
        self.seen["sequences"] += 1

    # ------------------------------------------------------------------------------------------------------ for the rules

    def call(self, work: Callable[..., Awaitable[T]], *args: object) -> T:
        async def run() -> T:
            try:
                return await work(*args)
            except Crash:
                raise Died from None

        return self.portal.call(run)

    def expect(
        self, refusal: Refusal | None, work: Callable[..., Awaitable[T]], *args: object, of: Tx | None = None
    ) -> T | None:
        """Call, and hear exactly this refusal, or none; the result. What the refusal tells of the target is true."""
        try:
            result = self.call(work, *args)
        except StagedError as error:
            assert type(error) is refusal, f"{type(error).__name__} instead of {refusal}: {error}"
            known = "committed" if of is not None and of.state == "committed" else "untouched"
            collected = error.outcome == "unknown" and "is unknown; only a prepared one" in str(error)
            assert (
                error.outcome in ("untouched", known)
                or collected
                or refusal is Fenced
                or (of and of.phase == "in doubt")
            )
            self.seen["refusals"] += 1
            return None
        assert refusal is None, f"no {refusal}"
        return result

    def new_process(self) -> Process:
        async def gate(name: str, moment: Moment) -> None:
            if self.dead:
                raise Crash
            if self.dies_in:
                self.dies_in -= 1
                if not self.dies_in:
                    self.dead = True
                    raise Crash

        return self.world.process(gate)

    def die(self, number: int) -> None:
        """What is left of a process: nothing but what is durable."""
        self.call(self.world.end, self.processes[number])
        self.processes[number] = self.new_process()
        self.dead, self.dies_in = False, 0
        for tx in self.known:
            if tx.process == number:
                tx.handle = None
        self.overtaken = [one for one in self.overtaken if one[2] != number]
        self.seen["crashes"] += 1

    def outcome(self, tx: Tx) -> str:
        return self.call(self.watcher.store.outcome, tx.id).state

    def find_pending(self) -> None:
        """Whether somebody completed what was pending, where the model leaves that open."""
        if self.pending is not None and self.outcome(self.pending) != "committing":
            self.pending = None

    # ---------------------------------------------------------------------------------------------------------- the model

    def check(self, tx: Tx) -> Refusal | None:
        """What is wrong with what is staged, whatever the target holds."""
        if not tx.entries and tx.mode in REPLACING and not tx.allow_empty:
            return StagingError
        replaced = set(self.partitions_of(tx))
        if tx.mode is Mode.OVERWRITE_PARTITIONS:
            received = {_directory(name) for name in tx.entries}
            nested = any(one.startswith(f"{other}/") for one in replaced for other in replaced)
            outside = any(not _is_below(f"{directory}/", replaced) for directory in received)
            if "" in received or nested or outside:
                return InvalidInput
        for name in tx.deletes:
            if name in tx.entries or tx.mode is Mode.FULL_DROP or _is_below(name, replaced):
                return InvalidInput
        return None

    def partitions_of(self, tx: Tx) -> tuple[str, ...]:
        if tx.mode is not Mode.OVERWRITE_PARTITIONS:
            return ()
        return tuple(map(_directory, tx.entries)) if tx.partitions is None else tx.partitions

    def conflicts(self, tx: Tx) -> bool:
        """Whether a commit since its base touched what it must not undo, or can no longer be told."""
        guarded = {*tx.deletes, *(tx.entries if tx.mode in BLIND else ())}
        for commit in self.commits[tx.base :] if guarded else ():
            if not commit.on_record or not guarded.isdisjoint(commit.names):
                return True
            if commit.whole and (tx.mode is not Mode.APPEND or tx.deletes):
                return True
        return False

    def plan(self, tx: Tx) -> Refusal | Literal["skipped"] | Files:
        """The target after a commit, or why there is none."""
        if tx.mode in (Mode.ERROR, Mode.IGNORE) and self.files:
            return Exists if tx.mode is Mode.ERROR else "skipped"
        if tx.mode is Mode.FULL_DROP:
            return Conflict if self.child_is_there else dict(tx.entries)
        if not self.files.keys() >= set(tx.deletes):
            return Conflict
        if tx.mode not in (Mode.OVERWRITE_FILES, Mode.OVERWRITE_PARTITIONS) and not tx.entries.keys().isdisjoint(
            self.files
        ):
            return Exists
        gone = {name for name in self.files if name in tx.deletes or _is_below(name, self.partitions_of(tx))}
        return {name: data for name, data in self.files.items() if name not in gone} | tx.entries

    def decide(self, tx: Tx) -> Refusal | Literal["done", "skipped"] | Files:
        """What becomes of a commit, once what is pending is completed."""
        if tx.key is not None and any(commit.tx.key == tx.key for commit in self.commits):
            return "done"
        return Conflict if self.conflicts(tx) else self.plan(tx)

    def applied(self, tx: Tx, after: Files) -> None:
        whole = tx.mode is Mode.FULL_DROP and self.store.swaps_trees
        removed = set() if whole else self.files.keys() - after.keys()
        self.commits.append(Commit(tx, {*tx.entries, *removed}, whole))
        self.meta.update(tx.meta)
        self.files = after
        tx.state = "committed"
        self.seen["commits"] += 1

    # ------------------------------------------------------------------------------------------------------------- staging

    @rule(process=st.integers(0, 1), wish=_WISHES, then=st.sampled_from(["wait", "commit", "commit", "prepare"]))
    def begin(self, process: int, wish: Wish, then: str) -> None:
        tx = self.begin_and_stage(process, wish)
        if tx is not None and then != "wait":
            self.end_one(tx, then, 0)

    def pick(self, which: int) -> Tx | None:
        """A transaction, mostly one that somebody owns."""
        owned = [tx for tx in self.known if tx.is_owned]
        some = owned if owned and which % 4 else self.known
        return some[-1 - which % len(some)] if some else None

    def begin_and_stage(self, process: int, wish: Wish) -> Tx | None:
        """Begin, and stage all that is wished for; None where it was refused."""
        named = wish.partitions if wish.mode is Mode.OVERWRITE_PARTITIONS else None
        meta: dict[str, object] = {} if wish.fact is None else {f"fact {wish.fact % 3}": wish.fact}
        store = self.processes[process].store
        options: dict[str, Any] = {"key": wish.key, "meta": meta, "partitions": named, "allow_empty": wish.allow_empty}

        async def begin() -> Transaction:
            if wish.block:
                return await store.staged_write(wish.mode, **options).__aenter__()
            return await store.begin(wish.mode, **options)

        finished = [commit for commit in self.commits if commit.tx is not self.pending]
        tx = Tx("", wish.mode, wish.block, len(finished), process, None, wish.key, meta, named, wish.allow_empty)
        self.known.append(tx)
        if wish.key is not None and any(commit.tx.key == wish.key for commit in finished):
            tx.nowhere = "done"
        elif wish.mode in (Mode.ERROR, Mode.IGNORE) and self.pending is None and self.files:
            if wish.mode is Mode.ERROR:
                with pytest.raises(Exists) as caught:
                    self.call(begin)
                tx.id, tx.state, tx.phase = caught.value.transaction or "", "rolled_back", "rolled_back"
                return None
            tx.nowhere = "skipped"
        tx.handle = self.call(begin)
        tx.id = tx.handle.id
        assert (tx.handle.done, tx.handle.skipped) == (tx.nowhere == "done", tx.nowhere == "skipped")
        self.seen["transactions"] += 1
        for name, data in wish.files.items():
            self.write(tx, name, data, overwrite=False, how="write")
        for name in wish.deletes:
            self.delete(tx, name)
        return tx

    @rule(
        which=_ANY,
        name=st.sampled_from([*NAMES, TWIN]),
        data=st.binary(max_size=3),
        overwrite=st.booleans(),
        how=st.sampled_from(["write", "stream", "open", "path", "dir", "fail", "delete"]),
    )
    def stage(self, which: int, name: str, data: bytes, overwrite: bool, how: str) -> None:
        if (tx := self.pick(which)) is None:
            return
        if how == "fail":
            self.write_and_fail(tx, name)
        elif how == "delete":
            self.delete(tx, name)
        else:
            self.write(tx, name, data, overwrite, how)

    def write(self, tx: Tx, name: str, data: bytes, overwrite: bool, how: str) -> None:
        if (handle := tx.handle) is None:
            return
        twin = {"a": TWIN, TWIN: "a"}.get(name)
        refusal: Refusal | None = None
        if tx.phase != "staging" or (twin not in tx.entries and name in tx.entries and not overwrite):
            refusal = WrongState
        elif twin in tx.entries:
            refusal = InvalidPath
        self.expect(refusal, partial(_write, handle, how, name, data, overwrite), of=tx)
        if refusal is None and tx.nowhere is None:
            tx.entries[name] = data

    def write_and_fail(self, tx: Tx, name: str) -> None:
        if tx.handle is None or tx.phase != "staging" or {"a", TWIN} & {name, *tx.entries}:
            return

        async def source() -> AsyncIterator[bytes]:
            yield b"half"
            raise KeyError(name)

        with pytest.raises(KeyError):
            self.call(partial(tx.handle.put_stream, name, source(), overwrite=True))

    def delete(self, tx: Tx, name: str) -> None:
        if tx.handle is None:
            return
        refusal = None if tx.phase == "staging" else WrongState
        self.expect(refusal, tx.handle.delete, name, of=tx)
        if refusal is None and tx.nowhere is None and name not in tx.deletes:
            tx.deletes.append(name)

    def look_at_plan(self, tx: Tx) -> None:
        if (
            self.pending is not None
            or tx.handle is None
            or tx.phase not in ("staging", "prepared")
            or tx.nowhere
            or tx.state == "committed"
        ):
            return
        after = self.check(tx) or self.plan(tx)
        plan = self.expect(after if isinstance(after, type) else None, tx.handle.plan)
        if plan is not None:
            assert plan.skipped == (after == "skipped")
        if plan is not None and isinstance(after, dict):
            assert {entry.path for entry in plan.publish} == tx.entries.keys()
            if plan.trees is None:
                assert {listed.path for listed in plan.remove} == self.files.keys() - after.keys()
                assert plan.replaces.keys() == self.files.keys() & tx.entries.keys()

    # ------------------------------------------------------------------------------------------------------- how they end

    @rule(
        which=_ANY,
        how=st.sampled_from([*["commit"] * 4, *["commit and die"] * 3, "plan", "prepare", "roll back", "release"]),
        moment=st.integers(1, 60),
    )
    def end(self, which: int, how: str, moment: int) -> None:
        if (tx := self.pick(which)) is not None:
            self.end_one(tx, how, moment)

    def end_one(self, tx: Tx, how: str, moment: int) -> None:
        if how == "plan":
            self.look_at_plan(tx)
        elif how == "prepare":
            self.prepare(tx)
        elif how == "roll back":
            self.roll_back(tx)
        elif how == "release":
            self.release(tx)
        else:
            self.commit(tx, moment if how == "commit and die" else 0)

    def prepare(self, tx: Tx) -> None:
        if tx.handle is None:
            return
        self.expect(self.to_prepared(tx), tx.handle.prepare, of=tx)

    def to_prepared(self, tx: Tx) -> Refusal | None:
        """Prepare in the model."""
        if tx.phase in ("prepared", "committed", "done", "skipped"):
            return None
        if tx.phase != "staging":
            return WrongState
        if tx.nowhere is not None:
            tx.phase, tx.state = tx.nowhere, "rolled_back"
            return None
        refusal = self.check(tx) or (StagingError if tx.gone else None)
        if refusal is None:
            tx.phase, tx.state = "prepared", "prepared"
        else:
            tx.phase, tx.state = "rolled_back", "rolled_back"
        return refusal

    def commit(self, tx: Tx, moment: int) -> None:
        """Commit; or let the process die at a moment of it."""
        if (handle := tx.handle) is None or (tx.state == "committed" and tx.collected):
            return
        receipt = handle.receipt if tx.phase in ("committed", "done", "skipped") else None
        before = (tx.phase, tx.state)
        refusal = self.to_prepared(tx)
        if refusal is not None or tx.phase != "prepared" or receipt is not None:
            if moment and before[0] == "staging":
                tx.phase, tx.state = before  # its end is told by other tests
                return
            again = self.expect(refusal, handle.commit, of=tx)
            assert receipt is None or again == receipt
            assert again is None or again.phase == tx.phase
            return
        after: Refusal | Literal["done", "skipped"] | Files | None
        if tx.state == "committed":
            after = None  # decided by a process that died; this one resumed it
        elif tx.gone:
            after = StagingError
        else:
            after = self.decide(tx)
        self.dies_in = moment
        try:
            found = self.expect(after if isinstance(after, type) else None, handle.commit)
        except Died:
            self.die(tx.process)
            self.find_out(tx, after)
            return
        self.dies_in = 0
        if tx.gone:
            self.find_pending()
        else:
            self.pending = None
        if isinstance(after, dict):
            self.check_receipt(tx, found, after)
            self.applied(tx, after)
        if tx.state == "committed":
            tx.phase = "committed"
        else:
            tx.phase, tx.state = after if isinstance(after, str) else "rolled_back", "rolled_back"
        assert found is None or found.phase == tx.phase

    def find_out(self, tx: Tx, after: Refusal | Literal["done", "skipped"] | Files | None) -> None:
        """What became of a commit whose process died."""
        self.find_pending()
        now = self.outcome(tx)
        if tx.gone or tx.state == "committed":
            return
        tx.dirty = True
        if now in ("committed", "committing"):
            assert isinstance(after, dict), f"{after} was to be expected, and it is {now}"
            self.applied(tx, after)
            self.pending = tx if now == "committing" else None
        elif now == "rolled_back":
            assert not isinstance(after, dict), f"it was to be committed, and it is {now}"
            tx.state = "rolled_back"
        else:
            assert now in ("open", "prepared"), now
            tx.state, tx.dirty = now, False  # type: ignore[assignment]

    def check_receipt(self, tx: Tx, receipt: Receipt | None, after: Files) -> None:
        assert receipt is not None
        sums = (len(tx.entries), sum(map(len, tx.entries.values())), tx.key, tx.mode, tx.id, 0)
        assert (receipt.files, receipt.bytes, receipt.key, receipt.mode, receipt.id, receipt.left) == sums
        if not (tx.mode is Mode.FULL_DROP and self.store.swaps_trees):
            replaced = self.files.keys() & tx.entries.keys()
            assert receipt.removed == len(self.files.keys() - after.keys()) + len(replaced)

    def roll_back(self, tx: Tx) -> None:
        if tx.handle is None or (tx.state == "committed" and tx.collected):
            return
        if tx.phase not in ("staging", "prepared"):
            ended = tx.phase in ("rolled_back", "done", "skipped")
            self.expect(None if ended else WrongState, tx.handle.rollback, of=tx)
        elif tx.state == "committed":
            self.expect(Fenced, tx.handle.rollback)
            tx.phase = "in doubt"
        elif self.is_held_by_dead(tx):
            self.expect(Busy, tx.handle.rollback)
            tx.phase = "in doubt"
        else:
            self.expect(None, tx.handle.rollback)
            tx.phase, tx.state = "rolled_back", "rolled_back"

    def is_held_by_dead(self, tx: Tx) -> bool:
        """Whether an earlier owner died with the head, and only silence will tell."""
        head, _ = self.call(read_head, self.watcher.driver)
        return not self.locks and head.state is HeadState.HELD and head.transaction == tx.id

    def release(self, tx: Tx) -> None:
        if tx.handle is None:
            return
        self.expect(None if tx.phase == "prepared" else WrongState, tx.handle.release, of=tx)
        if tx.phase == "prepared":
            tx.phase = "released"

    @rule(which=_ANY, process=st.integers(0, 1))
    def resume(self, which: int, process: int) -> None:
        prepared = [tx for tx in self.known if tx.state == "prepared" and not tx.is_owned]
        tx = prepared[which % len(prepared)] if prepared else self.pick(which)
        if tx is None or (tx.state == "committed" and tx is not self.pending):
            return
        refusal: Refusal | None = None
        if self.locks and tx.is_owned:
            refusal = Busy
        elif tx.state not in ("prepared", "committed"):
            refusal = WrongState
        handle = self.expect(refusal, self.processes[process].store.resume, tx.id)
        if handle is not None:
            if tx.handle is not None and tx.is_owned:
                self.overtaken.append((tx, tx.handle, tx.process))
            tx.handle, tx.process, tx.phase = handle, process, "prepared"

    @precondition(lambda self: self.overtaken)
    @rule()
    def commit_what_was_overtaken(self) -> None:
        """It is refused, and harms nothing of the new owner's."""
        tx, handle, _ = self.overtaken.pop()
        if tx.state == "prepared":
            self.expect(StagingError, handle.commit)
            self.find_pending()

    # -------------------------------------------------------------------------------------------------------- all at once

    @rule(
        process=st.integers(0, 1),
        what=st.sampled_from(["look", "look", "recover", "recover", "collect", "crash", "close"]),
    )
    def do(self, process: int, what: str) -> None:
        calls = {
            "look": self.look,
            "recover": self.recover,
            "collect": self.collect,
            "crash": self.die,
            "close": self.close,
        }
        calls[what](process)

    def close(self, process: int) -> None:
        store = self.processes[process].store
        self.call(store.aclose)
        for tx in self.known:
            if tx.process == process and tx.handle is not None:
                if tx.phase == "prepared":
                    tx.phase = "released"
                elif tx.phase == "staging":
                    tx.phase, tx.state = "rolled_back", "rolled_back"
        self.expect(WrongState, store.begin, "append")
        self.expect(WrongState, store.recover)
        self.processes[process] = self.new_process()
        self.overtaken = [one for one in self.overtaken if one[2] != process]

    def recover(self, process: int) -> None:
        recovered = self.call(self.processes[process].store.recover)
        assert recovered.damaged == ()
        if self.pending is not None:
            assert self.pending.id in recovered.finished
        self.pending = None
        for tx in self.known:
            if self.locks and tx.is_undecided and not tx.is_owned and (tx.block or tx.state == "open"):
                tx.state = "rolled_back"
                assert tx.id in recovered.rolled_back
            elif tx.is_undecided and tx.state == "prepared" and not tx.is_owned and not tx.block:
                assert tx.id in recovered.prepared
            elif tx.is_undecided and self.locks:
                assert tx.id in recovered.alive
            # Where only silence tells who is dead, one that died in its rollback waits for gc.
            tx.dirty = tx.dirty and not self.locks and tx.state == "rolled_back"

    def collect(self, process: int) -> None:
        self.call(partial(self.processes[process].store.gc, older_than=timedelta(0)))
        self.pending = None
        for tx in self.known:
            if tx.is_undecided and not (self.locks and tx.is_owned):
                tx.gone = tx.is_owned
                tx.state = "rolled_back"
            tx.collected = tx.collected or not tx.is_undecided
            tx.dirty = False
        for commit in self.commits:
            commit.on_record = False

    # ----------------------------------------------------------------------------------------------------- strangers, looks

    @precondition(lambda self: self.pending is None)
    @rule(name=st.sampled_from([*NAMES, "sub"]), data=st.none() | st.binary(max_size=3))
    def stranger(self, name: str, data: bytes | None) -> None:
        if name == "sub":
            if len(self.commits) > 4:
                self.child(0)
        elif data is not None:
            self.call(self.world.harness.put, name, data)
            self.files[name] = data
        elif name in self.files:
            self.call(self.world.harness.delete, name)
            del self.files[name]

    def child(self, process: int) -> None:
        """Write into another target, below this one."""
        name = f"c{sum(name.startswith('sub/') for name in self.files)}"
        store = self.processes[process].store.child("sub")

        async def write() -> None:
            async with store.staged_write("append") as tx:
                await tx.write(name, b"child")

        self.call(write)
        self.child_is_there = True
        self.files[f"sub/{name}"] = b"child"

    def look(self, process: int) -> None:
        store = self.processes[process].store
        assert self.call(store.meta) == self.meta
        status = self.call(store.status)
        assert status.commits == len(self.commits)
        assert status.committing == (self.pending.id if self.pending else None)
        assert (status.last.transaction if status.last else None) == (self.commits[-1].tx.id if self.commits else None)
        assert status.damaged == ()
        skip = {tx.id for tx in self.known if tx.dirty or tx.gone}
        found = {one.id: (one.state, one.alive) for one in status.transactions if one.id not in skip}
        alive = {True: True, False: False} if self.locks else {True: None, False: None}
        assert found == {tx.id: (tx.state, alive[tx.is_owned]) for tx in self.known if tx.is_undecided}

    @invariant()
    def the_target_is_the_models(self) -> None:
        if self.pending is None:
            assert self.call(self.world.harness.files) == self.files

    @invariant()
    def every_outcome_is_the_models(self) -> None:
        async def outcomes() -> dict[str, str]:
            return {tx.id: (await self.watcher.store.outcome(tx.id)).state for tx in self.known}

        def of(tx: Tx) -> str:
            return "committing" if tx is self.pending else "unknown" if tx.collected else tx.state

        assert self.call(outcomes) == {tx.id: of(tx) for tx in self.known}

    @invariant()
    def what_ended_left_no_staging(self) -> None:
        keys = self.call(self.watcher.driver.list_control, "tx/")
        found = {key.split("/")[1] for key in keys}
        if isinstance(self.world.harness, MemoryHarness):
            found |= {key.rpartition("/")[2] for key in self.world.harness.storage.uploads}
        kept = {tx.id for tx in self.known if tx.is_undecided or tx.dirty or (tx.gone and tx.phase == "staging")}
        assert found <= kept, f"{found - kept} ended, and left staging"


async def _write(tx: Transaction, how: str, name: str, data: bytes, overwrite: bool) -> None:
    if how == "write":
        await tx.write(name, data, overwrite=overwrite)
    elif how == "stream":

        async def source() -> AsyncIterator[bytes]:
            for at in range(len(data)):
                yield data[at : at + 1]

        await tx.put_stream(name, source(), overwrite=overwrite)
    elif how == "open":
        async with tx.open(name, overwrite=overwrite) as file:
            await file.write(data)
            for end in (tx.prepare, tx.commit):
                with pytest.raises(WrongState):
                    await end()
    elif how == "path":
        async with tx.path(name, overwrite=overwrite) as local:
            await anyio.Path(local).write_bytes(data)
    else:
        async with tx.dir(_directory(name), overwrite=overwrite) as local:
            await anyio.Path(local, name.rpartition("/")[2]).write_bytes(data)


def _directory(name: str) -> str:
    return name.rpartition("/")[0]


def _is_below(name: str, directories: Collection[str]) -> bool:
    return any(name.startswith(f"{directory}/") for directory in directories)


async def _calm(name: str, moment: Moment) -> None:
    pass


def test_any_sequence_of_calls_does_what_the_model_says(figure: Figure) -> None:
    Machine.seen.clear()
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=100 * SOAK,
            stateful_step_count=30,
            deadline=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    figure("calls against a model", ", ".join(f"{count:,} {name}" for name, count in sorted(Machine.seen.items())))
