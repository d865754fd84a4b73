"""Writes, and recovers, in places that are full, closed, mounted or odd; prints one line of JSON for each place.

Run as a program in a mount namespace of its own: what it mounts ends with it. It stays without threads itself, so that
forking is safe.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import platform
import resource
import shutil
import stat
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field

import anyio
from anyio import to_thread

from staged import StagedError, open_store
from staged.drivers.local import LocalDriver
from staged.model import Mode
from staged.paths import RESERVED
from staged.testing.exploration import Files, Work
from staged.testing.faults import FaultDriver, Moment

SOAK = int(os.environ.get("STAGED_SOAK", "1"))
BIG = b"x" * 5_000
BACKENDS = ("asyncio", "trio")
PRIOR: Files = {"p=0/f0": b"old", "p=1/f1": b"old", "old-3": b"3"}
WORKS = (
    Work(Mode.APPEND, (("p=0/new", BIG), ("q/deep/new", BIG), ("top", BIG))),
    Work(Mode.OVERWRITE_FILES, (("p=0/f0", BIG), ("p=2/new", BIG)), deletes=("old-3",)),
    Work(Mode.OVERWRITE_PARTITIONS, (("p=0/new", BIG), ("p=1/f1", BIG))),
    Work(Mode.FULL_DROP, (("p=0/f0", BIG), ("new", BIG))),
)
FULL_DROP = WORKS[-1]

Act = Callable[[], object]


class Impossible(Exception):
    """This machine, or this user, cannot make such a place."""


def nothing() -> None:
    """No obstacle."""


@dataclass(slots=True)
class Case:
    """What one writer met, was told, and left."""

    name: str
    said: str = ""
    error: str = ""
    struck: str = ""
    wrong: list[str] = field(default_factory=list)

    def expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.wrong.append(otherwise)


class Trace:
    """A gate that acts once, at the n-th moment, and tells which call of the driver failed first."""

    def __init__(self, number: int, act: Act) -> None:
        self._number, self._act = number, act
        self._begun: list[str] = []
        self.count = 0

    async def __call__(self, name: str, moment: Moment) -> None:
        if self.count == self._number:
            await to_thread.run_sync(self._act)
        self.count += 1
        if moment == "before":
            self._begun.append(name)
        else:
            self._begun.remove(name)

    @property
    def struck(self) -> str:
        verb, _, key = (self._begun or [""])[0].partition(" ")
        if key.startswith("log/"):
            return "write plan" if "-plan-" in key else "write manifest"
        if verb in ("stage", "close", "write"):
            return "stage"
        kinds = {"head": "head", "tx/": "record", "ledger": "ledger", "outcome": "outcome"}
        return next((f"{verb} {kind}" for start, kind in kinds.items() if key.startswith(start)), verb)


class Place:
    """A target somewhere, the works that are done on it, and what came of them."""

    def __init__(self, root: str, *, below: str = "target", staging: str | None = None) -> None:
        self.root = root
        self.target = os.path.join(root, below)
        self.staging = staging
        self.cases: list[Case] = []

    def driver(self) -> LocalDriver:
        return LocalDriver(self.target, staging=self.staging)

    def fresh(self, prior: Files = PRIOR) -> None:
        """Files as somebody else wrote them, and nothing of ours."""
        for directory in (self.root, self.staging, self.target):
            for name in os.listdir(directory) if directory is not None and os.path.isdir(directory) else ():
                path = os.path.join(directory or "", name)
                if os.path.ismount(path):
                    continue
                with suppress(OSError):
                    shutil.rmtree(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)
        for name, data in prior.items():
            os.makedirs(os.path.dirname(f"{self.target}/{name}"), exist_ok=True)
            with open(f"{self.target}/{name}", "wb") as file:
                file.write(data)

    def read(self) -> Files:
        """The target as a reader finds it."""
        found = {}
        for directory, below, files in os.walk(self.target):
            if RESERVED in below:
                below.remove(RESERVED)
            for name in files:
                with open(os.path.join(directory, name), "rb") as file:
                    found[os.path.relpath(os.path.join(directory, name), self.target)] = file.read()
        return found

    async def commit(self, work: Work) -> None:
        """A commit without obstacles."""
        async with open_store(self.driver()) as store:
            await work(store)

    async def do(
        self,
        name: str,
        work: Work,
        *,
        prior: Files = PRIOR,
        impose: Act = nothing,
        lift: Act = nothing,
        moment: int = -1,
        wanted: str | None = None,
        doubt: bool = False,
    ) -> Case:
        """One writer under an obstacle, which may come at a moment of its commit; then recover under it; then all after it."""
        case = Case(f"{work.mode.value}, {name}")
        self.cases.append(case)
        new = work.apply(prior)
        assert new is not None
        trace = Trace(moment, impose)
        tx: list[str] = []
        before = _descriptors()
        try:
            if moment < 0:
                impose()
            with anyio.fail_after(60):
                await self._attempt(case, trace, work, tx)
        finally:
            lift()
        case.struck = trace.struck if case.error else ""
        seen = self.read()
        case.expect(case.said != "untouched" or seen == prior, f"told untouched, but there is {sorted(seen)}")
        case.expect(bool(case.error) or seen == new, f"told committed, but there is {sorted(seen)}")
        case.expect(doubt or case.said != "unknown", f"left in doubt: {case.error}")
        case.expect(wanted in (None, case.said), f"{case.said}, not {wanted}: {case.error}")
        try:
            impose()
            with anyio.fail_after(60), suppress(StagedError):
                async with open_store(self.driver()) as store:
                    await store.recover()
        finally:
            lift()
        case.expect(case.said != "untouched" or self.read() == prior, "a recover changed an untouched target")
        case.expect(_descriptors() == before, f"{_descriptors() - before} descriptors are left open")
        with anyio.fail_after(60):
            await self._aftermath(case, prior, new, tx)
        return case

    async def _attempt(self, case: Case, trace: Trace, work: Work, tx: list[str]) -> None:
        try:
            async with open_store(FaultDriver(self.driver(), trace)) as store:
                async with store.staged_write(work.mode, lock_timeout=0) as block:
                    tx.append(block.id)
                    for name, data in work.files:
                        await block.write(name, data)
                    for name in work.deletes:
                        await block.delete(name)
                case.said = block.receipt.phase
        except StagedError as error:
            case.said = error.outcome
            case.error = f"{type(error).__name__}: {error}"
            case.expect(bool(str(error)) and "None" not in str(error), f"unclear: {error}")

    async def _aftermath(self, case: Case, prior: Files, new: Files, tx: list[str]) -> None:
        """With the obstacle gone: old or new as the caller was told, nothing left, and the next writer is served."""
        async with open_store(self.driver()) as store:
            await store.recover()
            seen = self.read()
            allowed = {"untouched": [prior], "committed": [new], "unknown": [prior, new]}[case.said]
            case.expect(seen in allowed, f"told {case.said}, but after recover there is {sorted(seen)}")
            for id in tx:
                state = (await store.outcome(id)).state
                case.expect((state == "committed") == (seen == new), f"the outcome says {state}")
            case.expect((await store.status()).transactions == (), "a transaction is left")
            await Work(Mode.APPEND, (("next", b"next"),))(store, 0.0)
        case.expect(self.read() == seen | {"next": b"next"}, "the next writer's file is not there")


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# ------------------------------------------------------------------------------------------------------------ mounts, disks


def mount(*words: str) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Impossible(f"mount {words[1] if words[0] == '-t' else words[0]}: {done.stderr.strip()}")


def unmount(root: str) -> None:
    """Whatever is mounted below a directory."""
    with open("/proc/self/mounts") as mounts:
        places = [line.split()[1].replace("\\040", " ") for line in mounts]
    for place in reversed(places):
        if place.startswith(f"{root}/"):
            subprocess.run(["umount", place], check=True, capture_output=True)


def made(*parts: str) -> str:
    path = os.path.join(*parts)
    os.makedirs(path, exist_ok=True)
    return path


def disk(root: str, name: str, megabytes: int, *options: str) -> str:
    """A fresh ext4 in a file."""
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        raise Impossible("only root can mount a file system from a file, and mkfs.ext4 must be there")
    mount("-t", "tmpfs", "none", root)
    image = os.path.join(root, f"{name}.img")
    with open(image, "wb") as file:
        file.truncate(megabytes << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", *options, image], check=True, capture_output=True)
    at = made(root, name)
    mount("-o", "loop", image, at)
    return at


def fill(root: str, keep: int) -> None:
    """A neighbour's file takes all blocks but so many."""
    left = os.statvfs(root)
    file = os.open(f"{root}/filler", os.O_WRONLY | os.O_CREAT)
    try:
        size = os.fstat(file).st_size // left.f_frsize * left.f_frsize
        for blocks in (max(0, left.f_bavail - keep), 1, 1, 1):
            with suppress(OSError):
                if blocks and os.statvfs(root).f_bavail > keep:
                    os.posix_fallocate(file, size, blocks * left.f_frsize)
                    size += blocks * left.f_frsize
    finally:
        os.close(file)


def fill_inodes(root: str, keep: int) -> None:
    """A neighbour's empty files take all inodes but so many."""
    directory = made(root, "fillers")
    for number in range(os.statvfs(root).f_ffree - keep):
        with suppress(OSError):
            os.close(os.open(f"{directory}/{os.getpid()}-{number}-{keep}", os.O_CREAT | os.O_WRONLY))


def empty(root: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(f"{root}/filler")
    shutil.rmtree(f"{root}/fillers", ignore_errors=True)


def moments(work: Work, stride: int = 12) -> range:
    """Moments of a commit: each work has its own, so that together they see nearly all."""
    return range(stride // 4 * WORKS.index(work), 48, max(1, stride // SOAK))


async def scarce(place: Place, take: Callable[[str, int], None], levels: Iterable[int]) -> None:
    """So much is left from the start, on a first commit or a later one; or nothing from one moment on."""
    root = place.root
    for work in WORKS:
        for keep in levels:
            if SOAK == 1 and (keep + WORKS.index(work)) % 2:
                continue
            for first in (True, False) if SOAK > 1 else (keep // 2 % 2 == 0,):
                place.fresh()
                if not first:
                    await place.commit(Work(Mode.OVERWRITE_FILES, (("old-3", b"3"),)))
                which = f"{'first' if first else 'later'} commit, {keep} left"
                await place.do(which, work, impose=lambda k=keep: take(root, k), lift=lambda: empty(root))
        for moment in moments(work):
            place.fresh()
            name = f"full from moment {moment} on"
            await place.do(name, work, impose=lambda: take(root, 0), lift=lambda: empty(root), moment=moment)


async def full_disk(root: str) -> Place:
    mount("-t", "tmpfs", "-o", "size=1m", "none", root)
    place = Place(root)
    await scarce(place, fill, range(0, 14))
    return place


async def full_ext4(root: str) -> Place:
    place = Place(disk(root, "disk", 2, "-b", "1024", "-N", "256"))
    await scarce(place, fill, range(0, 48, max(1, 5 // SOAK)))
    return place


async def few_inodes(root: str) -> Place:
    mount("-t", "tmpfs", "-o", "size=4m,nr_inodes=60", "none", root)
    place = Place(root)
    await scarce(place, fill_inodes, range(0, 26, max(1, 3 // SOAK)))
    return place


# ------------------------------------------------------------------------------------------------------ rights and limits


def drop_rights() -> None:
    """Be an ordinary user, root or not; for this thread and those that it starts."""
    ctypes.CDLL(None).capset(struct.pack("@Ii", 0x20080522, 0), bytes(24))


async def closed(root: str) -> Place:
    """Directories that may not be written, from the start or from a moment on."""
    place = in_memory(root, below="above/target")
    drop_rights()
    above, target = os.path.dirname(place.target), place.target

    def set_mode(paths: Iterable[str], mode: int) -> None:
        for path in paths:
            with suppress(FileNotFoundError):
                os.chmod(path, mode)

    for shut in ((above,), (target,), (f"{target}/p=0",), (f"{target}/p=1",), (above, target)):
        for work in WORKS:
            for moment in (-1, *moments(work, 24)):
                place.fresh()
                names = " and ".join(path.removeprefix(root) for path in shut)
                await place.do(
                    f"{names} closed from moment {moment} on",
                    work,
                    impose=lambda shut=shut: set_mode(shut, 0o555),
                    lift=lambda: set_mode([at for at, _, _ in os.walk(root)], 0o755),  # one may have been moved aside
                    moment=moment,
                )
    return place


async def few_descriptors(root: str) -> Place:
    """All descriptors but so many are taken by somebody else in the process, from the start or from a moment on."""
    place = in_memory(root)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    taken: list[int] = []

    def take(keep: int) -> None:
        with suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        for _ in range(keep):
            os.close(taken.pop())

    def give_back() -> None:
        while taken:
            os.close(taken.pop())

    for work in WORKS:
        for moment, levels in (
            (-1, range(WORKS.index(work) % 2, 12, 2)),
            *((moment, (0, 4)) for moment in moments(work, 16)),
        ):
            for keep in levels:
                place.fresh()
                name = f"{keep} descriptors from moment {moment} on"
                await place.do(name, work, impose=lambda k=keep: take(k), lift=give_back, moment=moment, doubt=True)
    return place


async def small_files(root: str) -> Place:
    """A limit on the size of files, around every size that there is."""
    place = in_memory(root)
    limit, (soft, hard) = resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)
    for work in WORKS:
        for size in (0, 200, 4_999, 131_072, 131_800, 140_000):
            for before in (0, 1, 2) if SOAK > 1 else (WORKS.index(work) % 3,):  # the head goes to either slot
                place.fresh()
                for _ in range(before):
                    await place.commit(Work(Mode.OVERWRITE_FILES, (("old-3", b"3"),)))
                await place.do(
                    f"files of at most {size} bytes",
                    work,
                    impose=lambda size=size: resource.setrlimit(limit, (size, hard)),
                    lift=lambda: resource.setrlimit(limit, (soft, hard)),
                )
    return place


async def sticky(root: str) -> Place:
    """Another user's target in a directory like /tmp, and another user's files in a directory like it."""
    place = in_memory(root)
    if os.geteuid() != 0 or _in_user_namespace():
        raise Impossible("only root can be two other users")
    place.fresh()
    await place.commit(FULL_DROP)  # all is imported while it can be
    for name, path in (("the parent", root), ("the target", place.target), ("a directory", f"{place.target}/p=0")):
        for work in WORKS:
            place.fresh()
            for at, _, files in os.walk(root):
                os.chmod(at, 0o1777 if at == path else 0o777)
                for file in (at, *(os.path.join(at, file) for file in files)):
                    os.chown(file, 1, 1)
            wanted = None
            if name == "the parent":
                wanted = "untouched" if work.mode is Mode.FULL_DROP else "committed"
            await place.do(
                f"{name} is sticky and another user's",
                work,
                impose=lambda: os.setresuid(65534, 65534, 0),
                lift=lambda: os.setresuid(0, 0, 0),
                wanted=wanted,
            )
    return place


def _in_user_namespace() -> bool:
    with open("/proc/self/uid_map") as map:
        return map.read().split() != ["0", "0", "4294967295"]


async def immutable(root: str) -> Place:
    """What even root may not change, from the start or from a moment on."""
    place = in_memory(root)
    place.fresh()
    flags = {"immutable": 0x10, "append-only": 0x20}

    def flag(path: str, value: int) -> None:
        with suppress(FileNotFoundError):
            file = os.open(path, os.O_RDONLY)
            try:
                fcntl.ioctl(file, 0x40086602, struct.pack("@l", value))  # FS_IOC_SETFLAGS
            finally:
                os.close(file)

    def lift() -> None:
        for at, _, files in os.walk(root):
            for path in (at, *(os.path.join(at, file) for file in files)):
                flag(path, 0)

    try:
        flag(place.target, flags["immutable"])
        lift()
    except OSError as error:
        raise Impossible(f"no file can be made immutable: {error}") from error
    for at in ("", "p=0", "p=0/f0", "old-3"):
        for name, value in flags.items() if SOAK > 1 or not at.endswith(("f0", "3")) else (("immutable", 0x10),):
            for work in WORKS:
                for moment in (-1, *moments(work, 40)):
                    place.fresh()
                    await place.do(
                        f"target/{at} {name} from moment {moment} on",
                        work,
                        impose=lambda at=at, value=value: flag(os.path.join(place.target, at), value),
                        lift=lift,
                        moment=moment,
                    )
    return place


async def inherited(root: str) -> Place:
    """A target with a setgid bit, a sticky bit, a default ACL and attributes of its own keeps them through every work."""
    place = in_memory(root)
    acl = struct.pack("@I", 2) + b"".join(
        struct.pack("@HHI", *entry)
        for entry in ((1, 7, 2**32 - 1), (4, 5, 2**32 - 1), (8, 7, 0), (16, 7, 2**32 - 1), (32, 0, 2**32 - 1))
    )
    marks = {"user.mark": b"mine", "system.posix_acl_default": acl}
    for work in WORKS:
        place.fresh()
        try:
            for name, value in marks.items():
                os.setxattr(place.target, name, value)
        except OSError as error:
            raise Impossible(f"no attributes here: {error}") from error
        os.chmod(place.target, 0o3770)
        case = await place.do("setgid, sticky, a default ACL", work, wanted="committed")
        found = {name: os.getxattr(place.target, name) for name in marks}
        case.expect(found == marks, f"the target's attributes became {found}")
        case.expect(stat.S_IMODE(os.stat(place.target).st_mode) == 0o3770, "the target's mode changed")
    return place


# ------------------------------------------------------------------------------------------------------------------ mounts


async def read_only(root: str) -> Place:
    """Everything is mounted read-only, or the parent, or the target."""
    mount("-t", "tmpfs", "none", root)
    place = Place(root, below="above/target")
    above, target = os.path.dirname(place.target), place.target
    for path in (root, above, target):
        os.makedirs(target, exist_ok=True)
        mount("--bind", path, path)

    def remount(how: str, *places: str) -> None:
        for at in places:
            mount("-o", f"remount,bind,{how}", at)

    for name, places in (("everything", (root, above, target)), ("the parent", (above,)), ("the target", (target,))):
        for work in WORKS:
            place.fresh()
            await place.do(
                f"{name} mounted read-only",
                work,
                impose=lambda places=places: remount("ro", *places),
                lift=lambda places=places: remount("rw", *places),
            )
    return place


async def mounted(root: str) -> Place:
    """The target is a mount; or becomes one, or gets one below it, once it has a control area beside it."""
    mount("-t", "tmpfs", "none", root)
    cases = []
    for name, source in (("another", ("-t", "tmpfs", "none")), ("its own", ("--bind", made(root, "elsewhere")))):
        place = Place(made(root, name))
        mount(*source, made(place.target))
        await all_works(place, f"the target is a mount of {name} file system", swaps=False)
        cases += place.cases
        unmount(root)
        for path in (place.target, f"{place.target}/p=0"):
            for work in WORKS:
                place = Place(made(root, name))
                place.fresh()
                await place.commit(Work(Mode.OVERWRITE_FILES, (("old-3", b"3"),)))
                await place.do(
                    f"{name} file system mounted over {path.removeprefix(root)}",
                    work,
                    impose=lambda path=path, source=source: mount(*source, path),
                    lift=lambda: unmount(root),
                    wanted="untouched",
                )
                cases += place.cases
    place.cases = cases
    return place


async def staged_elsewhere(root: str) -> Place:
    """`staging=` on the same file system, on another, and on another mount of the same."""
    mount("-t", "tmpfs", "none", root)
    cases = []
    for name, wanted in (("same", "committed"), ("another", "untouched"), ("bind", "untouched")):
        staging = made(root, "areas", name)
        if name == "another":
            mount("-t", "tmpfs", "none", staging)
        elif name == "bind":
            mount("--bind", made(root, "elsewhere"), staging)
        place = Place(made(root, name), staging=staging)
        for work in WORKS:
            place.fresh()
            case = Case(f"{work.mode.value}, staging on the {name} file system")
            await place._attempt(case, Trace(-1, nothing), work, [])
            case.expect(case.said == wanted, f"{case.said}, not {wanted}")
            case.expect(place.read() == (work.apply(PRIOR) if wanted == "committed" else PRIOR), "it is something else")
            cases.append(case)
    place.cases = cases
    return place


# ------------------------------------------------------------------------------------------------------------ file systems


async def all_works(
    place: Place, name: str, *, swaps: bool | None = None, lays: Callable[[], Files] | None = None
) -> None:
    """Every work commits: on a stranger's files, and on what an earlier commit left."""
    for work in WORKS:
        place.fresh()
        case = await place.do(name, work, wanted="committed")
        place.fresh()
        await place.commit(FULL_DROP)
        await place.commit(Work(Mode.OVERWRITE_FILES, tuple(PRIOR.items())))
        prior = dict(FULL_DROP.files) | PRIOR
        await place.do(f"{name}, after other commits", work, prior=prior, wanted="committed")
        if swaps is not None:
            async with open_store(place.driver()) as store:
                found = (await store.capabilities()).swaps_trees
            case.expect(found == swaps, f"trees are {'' if found else 'not '}swapped")


async def tmpfs(root: str) -> Place:
    mount("-t", "tmpfs", "none", root)
    place = Place(root)
    await all_works(place, "tmpfs")
    return place


async def ramfs(root: str) -> Place:
    """No birth times, no extended attributes, no end of space."""
    mount("-t", "ramfs", "none", root)
    place = Place(root)
    await all_works(place, "ramfs", swaps=False)
    return place


async def ext4(root: str) -> Place:
    place = Place(disk(root, "disk", 8))
    await all_works(place, "ext4", swaps=True)
    return place


async def ext2(root: str) -> Place:
    """No journal, no birth times, times in whole seconds."""
    place = Place(disk(root, "disk", 8, "-t", "ext2", "-I", "128"))
    await all_works(place, "ext2", swaps=False)
    return place


async def overlay(root: str) -> Place:
    """The target's files come from the lower layer, as those of a container's image do."""
    mount("-t", "tmpfs", "none", root)
    lower = Place(made(root, "lower"))
    lower.fresh()
    cases = []
    for number, work in enumerate(WORKS):
        upper, scratch, at = (made(root, f"{name}-{number}") for name in ("upper", "work", "merged"))
        mount("-t", "overlay", "-o", f"lowerdir={lower.root},upperdir={upper},workdir={scratch}", "none", at)
        place = Place(at)
        await place.do("overlay", work, wanted="committed")
        cases += place.cases
    place.cases = cases
    return place


def deny(calls: dict[str, int], *, flags_only: bool) -> None:
    """Let system calls fail with these errors; `renameat2` only where it has flags. See seccomp(2)."""
    numbers = {
        "x86_64": {"renameat2": 316, "linkat": 265, "audit": 0xC000003E},
        "aarch64": {"renameat2": 276, "linkat": 37, "audit": 0xC00000B7},
    }.get(platform.machine())
    if numbers is None:
        raise Impossible(f"the numbers of system calls on {platform.machine()} are not known here")
    load, equal, answer = 0x20, 0x15, 0x06
    code = [(load, 0, 0, 4), (equal, 1, 0, numbers["audit"]), (answer, 0, 0, 0x7FFF0000)]
    for name, error in calls.items():
        refuse = (answer, 0, 0, 0x00050000 | error)
        if flags_only and name == "renameat2":
            code += [(load, 0, 0, 0), (equal, 0, 3, numbers[name]), (load, 0, 0, 48), (equal, 1, 0, 0), refuse]
        else:
            code += [(load, 0, 0, 0), (equal, 0, 1, numbers[name]), refuse]
    code.append((answer, 0, 0, 0x7FFF0000))
    program = ctypes.create_string_buffer(b"".join(struct.pack("@HBBI", *line) for line in code))
    header = ctypes.create_string_buffer(struct.pack("@HxxxxxxP", len(code), ctypes.addressof(program)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) != 0 or libc.prctl(22, 2, header, 0, 0) != 0:
        raise Impossible(f"seccomp: {os.strerror(ctypes.get_errno())}")


async def no_rename_flags(root: str) -> Place:
    """A file system that can neither exchange names nor rename onto a free name only, as over NFS."""
    place = in_memory(root)
    deny({"renameat2": errno.EINVAL}, flags_only=True)
    await all_works(place, "no flags of renameat2", swaps=False)
    return place


async def no_links_either(root: str) -> Place:
    """And hard links neither: then no name can be taken without a race, and nothing is begun."""
    place = in_memory(root)
    deny({"renameat2": errno.EINVAL, "linkat": errno.EPERM}, flags_only=True)
    for work in WORKS:
        place.fresh()
        case = Case(f"{work.mode.value}, no way to take a free name")
        await place._attempt(case, Trace(-1, nothing), work, [])
        case.expect(case.said == "untouched" and place.read() == PRIOR, f"{case.said}: {case.error}")
        place.cases.append(case)
    return place


def in_memory(root: str, below: str = "target") -> Place:
    """A place that is fast, and synced all the same."""
    with suppress(Impossible):
        mount("-t", "tmpfs", "none", root)
    return Place(root, below=below)


PLACES = {
    place.__name__.replace("_", "-"): place
    for place in (
        sticky, immutable, inherited, full_disk, full_ext4, few_inodes, closed, few_descriptors, small_files, read_only, mounted, staged_elsewhere,
        tmpfs, ramfs, ext4, ext2, overlay, no_rename_flags, no_links_either,
    )
}  # fmt: skip


def main(root: str) -> None:
    """Every place in a process of its own, on one event loop or the other."""
    for number, (name, place) in enumerate(PLACES.items()):
        for backend in BACKENDS if SOAK > 1 else (BACKENDS[number % 2],):
            child = os.fork()
            if child == 0:
                try:
                    made(root, f"{name}-{backend}")
                    cases = [
                        asdict(case) for case in anyio.run(place, f"{root}/{name}-{backend}", backend=backend).cases
                    ]
                    print(json.dumps({"place": name, "cases": cases}), flush=True)
                except Impossible as reason:
                    print(json.dumps({"place": name, "impossible": str(reason)}), flush=True)
                except BaseException:
                    print(json.dumps({"place": name, "failed": traceback.format_exc()}), flush=True)
                os._exit(0)
            os.waitpid(child, 0)


if __name__ == "__main__":
    main(sys.argv[1])
