"""Forks writers whose system calls fail: syncs that report an error, files that cannot grow, renames of an old kernel.

Run as a program, it stays without threads itself, so that forking is safe. For each case it prints one line of JSON.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import random
import resource
import signal
import stat
import sys
from collections.abc import Awaitable, Callable

import anyio
from kills import check as recovered
from kills import in_child, lay, read_back

from staged import CommitBlocked, CommitIncomplete, StagedError, open_store
from staged.drivers import _slots
from staged.drivers.local import LocalDriver
from staged.model import Decided, Event, Head, Mode, Published, Removed
from staged.records import decode
from staged.states import Phase
from staged.store import Store
from staged.testing.exploration import Work
from staged.testing.faults import FaultDriver, Moment
from staged.testing.harness import Files

PRIOR: Files = {"p=0/old": b"old", "p=0/a": b"old", "p=1/b": b"old", "q/deep/c": b"old", "q/d": b"old"}
LARGE = random.Random(1).randbytes(1_200_000)
WORKS = (
    Work(Mode.FULL_DROP, (("a", b"A"), ("p=0/b", b"B"))),
    Work(Mode.APPEND, (("p=0/new", b"A"), ("p=2/deep/new", b"B"))),
    Work(Mode.OVERWRITE_FILES, (("p=0/a", b"A"), ("p=1/new", b"B")), deletes=("q/deep/c",)),
    Work(Mode.OVERWRITE_PARTITIONS, (("p=0/a", b"A"),)),
)


def say(**line: object) -> None:
    print(json.dumps(line), flush=True)


Way = Callable[[Work, Store], Awaitable[object]]
SAID = ("committed", "incomplete", "untouched", "unknown", "nothing failed")


async def attempt(work: Callable[[], Awaitable[object]]) -> str:
    """What a caller hears."""
    try:
        await work()
    except CommitIncomplete:
        return "incomplete"
    except StagedError as error:
        return error.outcome
    return "committed"


def allowed(said: str, old: Files, new: Files) -> list[Files]:
    """What the target may hold after recover."""
    return [new] if said in ("committed", "incomplete") else [old] if said == "untouched" else [old, new]


def heard(writer: Callable[[], str]) -> str:
    """Run a writer in a child; what it heard, or its failure."""
    status = in_child(lambda: os._exit(SAID.index(writer()) + 10))
    return SAID[status - 10] if 10 <= status < 10 + len(SAID) else f"exit status {status}"


def check(target: str, states: list[Files]) -> None:
    """In a process of its own: recover leaves one of these states and nothing else, and the next writer is served."""

    async def run() -> None:
        async with open_store(target, durability="none") as store:
            await store.recover()
            seen = read_back(target)
            assert seen in states, f"after recover there is {[(name, len(data)) for name, data in seen.items()]}"
            left = glob.glob(f"{os.path.dirname(target)}/_staged/target/tx/*")
            assert left == [], f"after recover there is left {left}"
            async with store.staged_write("append", lock_timeout=0) as tx:
                await tx.write("next", b"next")
            assert read_back(target) == seen | {"next": b"next"}

    try:
        anyio.run(run)
    except (AssertionError, StagedError) as error:
        say(failure=f"{type(error).__name__}: {error}")
        raise


# ----------------------------------------------------------------------------------------------------------------- syncs


class Disk:
    """Knows what is on the disk by the syncs that were made; some of them fail.

    A sync that fails marks the pages clean all the same: what is not written anew is lost, whatever a later sync says.
    """

    def __init__(self, root: str, fails: Callable[[int], bool]) -> None:
        self.calls = 0
        self._fails = fails
        self._safe: set[tuple[int, str]] = set()
        self._lost: set[tuple[int, str]] = set()
        self._names: dict[int, set[tuple[str, int]]] = {}
        for directory, _, files in os.walk(root):
            self._names[os.stat(directory).st_ino] = self._listing(directory)
            self._safe.update(self._content(f"{directory}/{name}") for name in files)
        os.fsync = os.fdatasync = self.sync  # type: ignore[assignment]

    @staticmethod
    def _content(path: str) -> tuple[int, str]:
        with open(path, "rb") as file:
            return os.fstat(file.fileno()).st_ino, hashlib.sha256(file.read()).hexdigest()

    @staticmethod
    def _listing(path: str) -> set[tuple[str, int]]:
        with os.scandir(path) as entries:
            return {(entry.name, entry.inode()) for entry in entries}

    def sync(self, fd: int) -> None:
        path, found = f"/proc/self/fd/{fd}", os.fstat(fd)
        self.calls += 1
        failed = self._fails(self.calls)
        if not stat.S_ISDIR(found.st_mode):
            (self._lost if failed else self._safe).add(self._content(path))
        elif not failed:
            self._names[found.st_ino] = self._listing(path)
        if failed:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def missing(self, root: str, path: str, *, removals: bool = False) -> list[str]:
        """What of a path below the root, and of all below it, is not on the disk; removals too if asked."""
        at, wrong = root, list[str]()
        for part in path.split("/"):
            if (part, os.stat(f"{at}/{part}").st_ino) not in self._names.get(os.stat(at).st_ino, set()):
                wrong.append(f"the name {part} in {at}")
            at = f"{at}/{part}"
        return wrong + self._missing_below(at, removals)

    def _missing_below(self, path: str, removals: bool) -> list[str]:
        if not os.path.isdir(path):
            content = self._content(path)
            return [] if content in self._safe and content not in self._lost else [f"the content of {path}"]
        names, synced = self._listing(path), self._names.get(os.stat(path).st_ino, set())
        wrong = [] if names <= synced and not (removals and names != synced) else [f"the names in {path}"]
        return wrong + [what for name, _ in names for what in self._missing_below(f"{path}/{name}", removals)]


async def resumed(work: Work, store: Store) -> None:
    """Prepare the work, hand it over to this store, and commit it until it is over."""
    async with open_store(store.url) as other:
        tx = await other.begin(work.mode)
        for name, data in work.files:
            await tx.write(name, data)
        await tx.prepare()
    tx = await store.resume(tx.id)
    for _ in range(2):
        try:
            await tx.commit()
        except StagedError:
            if tx.phase is not Phase.PREPARED:
                raise
    await tx.commit()


def commit_twice(target: str, work: Work, fails: Callable[[int], bool], first: Way) -> str:
    """Commit while syncs fail, then again in the same store, then recover: all that is claimed is on the disk by then."""
    root, area = os.path.dirname(target), "_staged/target"
    wrong: list[str] = []
    struck = healed = False

    def strikes(number: int) -> bool:
        nonlocal struck
        struck = struck or (not healed and fails(number))
        return not healed and fails(number)

    disk = Disk(root, strikes)

    def claimed(event: Event) -> None:
        if isinstance(event, Decided):
            with open(f"{root}/{area}/head", "rb") as file:
                head = decode(Head, _slots.current(_slots.read(file.fileno())), "head")
            assert head.plan is not None
            assert head.ledger is not None
            needed = [f"{area}/{name}" for name in ("head", f"{head.ledger.key}-0", f"{head.plan.key}-0")]
            needed += [
                os.path.relpath(path, root) for path in glob.glob(f"{root}/{area}/log/{event.transaction}-manifest-*")
            ]
            needed.append(f"{area}/tx/{event.transaction}/tree")
            wrong.extend(f"decided without {what}" for path in needed for what in disk.missing(root, path))
        elif isinstance(event, (Published, Removed)):
            # With the decision it rests on, whoever made it.
            lacking = disk.missing(root, f"{area}/head")
            lacking += disk.missing(root, "target", removals=isinstance(event, Removed))
            wrong.extend(f"{type(event).__name__} without {what}" for what in lacking)

    async def run() -> None:
        nonlocal healed
        store = open_store(target, observers=[claimed])
        said = await attempt(lambda: first(work, store))
        seen, new = read_back(target), work.apply(PRIOR)
        assert new is not None
        assert seen == PRIOR or said != "untouched", "reported untouched, but the target changed"
        assert seen == new or said != "committed", "reported committed, but it is not there"
        second = Work(Mode.APPEND, (("second", b"2"),))
        again = await attempt(lambda: second(store))
        healed = True
        async with open_store(target, observers=[claimed]) as other:
            await other.recover()
        states = [
            state for first in allowed(said, PRIOR, new) for state in allowed(again, first, first | {"second": b"2"})
        ]
        seen = read_back(target)
        assert seen in states, f"{said}, then {again}, and there is {seen}"
        assert not wrong, wrong

    try:
        anyio.run(run)
    except AssertionError as error:
        say(failure=str(error))
        raise
    return "committed" if struck else "nothing failed"


def syncs(root: str, factor: int) -> None:
    """The n-th sync fails, for every n; then every sync from there on. With factor 1 only some of them in the first commit."""
    ways: list[tuple[Work, Way, int, int]] = [
        (WORKS[0], Work.__call__, 1, 1),
        (WORKS[1], Work.__call__, 8, 12),
        (WORKS[1], resumed, 2, 12),
        (WORKS[2], Work.__call__, 1, 12),
        (WORKS[3], Work.__call__, 8, 12),
    ]
    for at, (work, way, one, all_on) in enumerate(ways):
        for name, stride in (("one", one), ("all from there", all_on)):
            for number in range(1 + at % stride, 27 if factor == 1 else 200, max(1, stride // factor)):
                fails = number.__eq__ if name == "one" else number.__le__
                target = lay(root, PRIOR)
                said = heard(lambda: commit_twice(target, work, fails, way))  # noqa: B023 - run at once
                if said == "nothing failed":
                    break
                say(work=str(work), sync=number, fails=name, ok=said == "committed")


# ------------------------------------------------------------------------------------------------------------- full disks


def commit_on_a_full_disk(target: str, work: Work, calls: tuple[str, ...], number: int, limit: int) -> str:
    """During the n-th of such calls of the driver no file grows beyond the limit; what the caller hears."""
    count, struck, free = 0, False, resource.getrlimit(resource.RLIMIT_FSIZE)

    async def gate(name: str, moment: Moment) -> None:
        nonlocal count, struck
        resource.setrlimit(resource.RLIMIT_FSIZE, free)
        if moment == "before" and name.partition(" ")[0] in calls:
            if count == number:
                struck = True
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, free[1]))
            count += 1

    async def run() -> str:
        store = open_store(FaultDriver(LocalDriver(target, durability="none"), gate))
        said = await attempt(lambda: work(store))
        resource.setrlimit(resource.RLIMIT_FSIZE, free)
        return said if struck else "nothing failed"

    return anyio.run(run)


def disks(root: str, factor: int) -> None:
    """At every call that writes, the disk is full at some place of a record, of a segment or of a staged file."""
    slot, large = 128 * 1024, Work(Mode.FULL_DROP, (("large", LARGE), ("small", b"s" * 2_000)))
    ways = [
        (WORKS[2], ("cas", "put_segment"), 100),
        (large, ("write", "close"), 1_000),
        (large, ("write", "close"), 1_100_000),
    ]
    # A record has four places, by turns.
    ways += [
        (WORKS[2], ("cas",), at * slot + some) for at in (1, 2, 3) for some in (60, 400)[: 1 if factor == 1 else 2]
    ]
    for work, calls, limit in ways:
        new = work.apply(PRIOR)
        assert new is not None
        for number in range(100):
            target = lay(root, PRIOR)
            said = heard(lambda: commit_on_a_full_disk(target, work, calls, number, limit))  # noqa: B023 - run at once
            if said == "nothing failed":
                break
            states = allowed(said, PRIOR, new) if said in SAID else []
            ok = in_child(lambda: check(target, states)) == 0  # noqa: B023
            say(work=str(work), call=number, limit=limit, said=said, ok=ok)


# ------------------------------------------------------------------------------------- renames that may replace what is there


def links(root: str, factor: int) -> None:
    """Run where renameat2 fails: killed between the two halves of what stands in for it, and with a stranger in the way."""
    link = os.link
    for work in WORKS[2:3] if factor == 1 else WORKS[1:3]:
        new = work.apply(PRIOR)
        assert new is not None
        for number in range(1, 100):
            target, count = lay(root, PRIOR), 0

            def killed(*names: str, **directories: int) -> None:
                nonlocal count
                link(*names, **directories)  # type: ignore[arg-type]
                count += 1
                if count == number:  # noqa: B023 - run at once
                    os.kill(os.getpid(), signal.SIGKILL)

            def writer() -> str:
                os.link = killed  # type: ignore[assignment]
                return anyio.run(attempt, lambda: work(open_store(target, durability="none")))  # noqa: B023

            said = heard(writer)
            ok = in_child(lambda: recovered(target, PRIOR, new)) == 0  # noqa: B023
            say(work=str(work), link=number, said=said, ok=ok)
            if said == "committed":
                break
    target = lay(root, PRIOR)
    ok = in_child(lambda: anyio.run(meet_a_stranger, target)) == 0
    say(stranger="p=2/deep/new", ok=ok)


async def meet_a_stranger(target: str) -> None:
    async def intrude(name: str, moment: Moment) -> None:
        if (name, moment) == ("publish", "before"):
            await anyio.Path(f"{target}/p=2/deep").mkdir(parents=True)
            await anyio.Path(f"{target}/p=2/deep/new").write_bytes(b"foreign")

    store = open_store(FaultDriver(LocalDriver(target, durability="none"), intrude))
    assert not (await store.capabilities()).swaps_trees, "renameat2 works"
    try:
        await WORKS[1](store)
    except CommitBlocked as error:
        assert error.paths == ("p=2/deep/new",)
    else:
        raise AssertionError("not blocked")
    await open_store(target).recover(resolve="keep")
    assert read_back(target) == PRIOR | {"p=0/new": b"A", "p=2/deep/new": b"foreign"}


if __name__ == "__main__":
    anyio.run(anyio.sleep, 0)  # loads the loop once for all children
    {"syncs": syncs, "disks": disks, "links": links}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
