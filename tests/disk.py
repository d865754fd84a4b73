"""The local driver's file-system calls in order, and every tree that a loss of power may leave of them.

    recorder = Recorder(root)            stands where the driver's modules call the operating system
    recorder.log                         what was called: names, data, attributes, syncs, by inode
    log.durable(at), log.left(at, fate)  what is on the disk after the first `at` calls
    lay(tree, root)                      that, as a real directory, for a new Recorder to answer from

What a disk keeps is the worst that POSIX allows, but for three things that every journal gives and without which nothing
could be moved at all: a rename happens as one; what is moved into a directory comes with that directory's own name; and an
operation comes with the one that it undoes. All else that was not synced may be kept, lost, or torn at 512 bytes, in any
order.
"""

from __future__ import annotations

import builtins
import os
import random
import re
import shutil
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from staged import staging
from staged.drivers import _area, _posix, _slots, _trees, local

ROOT = 0
"""The node of the directory in which everything happens. It was there before, and stays."""
SECTOR = 512
"""Bytes that a disk writes whole, or not."""
_NUMBERS = 1 << 40
"""Recorded inode numbers start here: no real one is equal to any of them."""
NEVER = sys.maxsize
_EVEN = random.Random(0)
"""For fates that leave nothing to chance."""


# ------------------------------------------------------------------------------------------------------------------ trees


@dataclass(frozen=True, slots=True)
class File:
    """The content of a file: its sectors, and none where nothing was ever written."""

    size: int = 0
    sectors: Mapping[int, bytes] = field(default_factory=dict)
    mtime: int = 0

    def __bytes__(self) -> bytes:
        return self.at(0, self.size)

    def at(self, offset: int, length: int) -> bytes:
        """Some of its bytes."""
        first, last = offset // SECTOR, -(-(offset + length) // SECTOR)
        whole = b"".join(self.sectors.get(number, bytes(SECTOR)) for number in range(first, last))
        return whole[offset - first * SECTOR :][: max(0, min(length, self.size - offset))]

    def written(self, write: Write, fate: Fate, chance: random.Random) -> File:
        """With a write that met this fate."""
        offset, data = write.offset, write.data
        if fate == "lost":
            return self
        if fate == "short":
            data = data[: chance.randrange(len(data) + 1) // SECTOR * SECTOR]
        size = max(self.size, offset + len(data))
        sectors = dict(self.sectors)
        for number in range(offset // SECTOR, -(-(offset + len(data)) // SECTOR)):
            start = max(offset, number * SECTOR)
            piece = data[start - offset : (number + 1) * SECTOR - offset]
            if fate == "zeros" or (fate == "torn" and chance.random() < 0.5):
                continue  # what was there before, or a hole
            if fate == "garbage":
                piece = chance.randbytes(len(piece))
            old = sectors.get(number, bytes(SECTOR))
            within = start - number * SECTOR
            sectors[number] = old[:within] + piece + old[within + len(piece) :]
        return File(size, sectors, write.mtime)

    def key(self) -> object:
        return self.size, self.mtime, tuple(sorted(self.sectors.items()))


@dataclass(slots=True)
class Tree:
    """What a file system holds: names by directory, content by file, and attributes, all by the number of the inode."""

    names: dict[int, dict[str, int]] = field(default_factory=lambda: {ROOT: {}})
    files: dict[int, File] = field(default_factory=dict)
    attributes: dict[int, dict[str, Any]] = field(default_factory=dict)

    def find(self, path: str, node: int | None = ROOT) -> int | None:
        """The node at a path below another."""
        for part in filter(None, path.split("/")):
            if node is None:
                return None
            node = self.names.get(node, {}).get(part)
        return node

    def walk(self, node: int | None, at: str = "", skip: str | None = None) -> Iterator[tuple[str, int]]:
        """Every path below a directory with its node."""
        for name, below in (
            sorted(self.names.get(ROOT if node is None else node, {}).items()) if node is not None else ()
        ):
            if f"{at}{name}" != skip:
                yield f"{at}{name}", below
                yield from self.walk(below, f"{at}{name}/", skip)

    def content(self, path: str, skip: str | None = None) -> dict[str, bytes | None]:
        """Every path below another with its bytes; None for directories."""
        found = self.walk(self.find(path), skip=skip)
        return {name: None if node in self.names else bytes(self.files[node]) for name, node in found}

    def copy(self) -> Tree:
        return Tree(
            {node: dict(names) for node, names in self.names.items()},
            dict(self.files),
            {node: dict(values) for node, values in self.attributes.items()},
        )

    def apply(self, operation: Operation, fate: Fate = "kept", chance: random.Random = _EVEN) -> None:
        """Let an operation happen, as far as its fate lets it."""
        if isinstance(operation, Names) and fate == "kept":
            for directory, name, node in operation.changes:
                names = self.names.setdefault(directory, {})
                if node is None:
                    names.pop(name, None)
                else:
                    names[name] = node
        elif isinstance(operation, Write):
            self.files[operation.node] = self.files[operation.node].written(operation, fate, chance)
        elif isinstance(operation, Allocate) and fate == "kept":
            file = self.files[operation.node]
            self.files[operation.node] = replace(file, size=max(file.size, operation.size))
        elif isinstance(operation, Attribute) and fate == "kept":
            self.attributes.setdefault(operation.node, {})[operation.name] = operation.value

    def key(self) -> object:
        """Equal for trees that are the same to whoever looks at them."""
        return tuple(
            (path, node, self.files[node].key() if node in self.files else None, str(self.attributes.get(node)))
            for path, node in self.walk(ROOT)
        )


# -------------------------------------------------------------------------------------------------------------- operations


@dataclass(frozen=True, slots=True)
class Names:
    """Names of directories that change as one: each of `changes` is (directory, name, what it now names, or None).

    Attributes:
        undoes: Calls whose names these were: it is not kept without them.
        into: Calls that named the directories into which something is moved.
    """

    call: str
    changes: tuple[tuple[int, str, int | None], ...]
    undoes: tuple[int, ...] = ()
    into: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Write:
    node: int
    offset: int
    data: bytes
    mtime: int


@dataclass(frozen=True, slots=True)
class Allocate:
    """Room for data, which reads as zeros; the file is at least this long. No data, but what the file system knows of it."""

    node: int
    size: int


@dataclass(frozen=True, slots=True)
class Attribute:
    node: int
    name: str
    value: Any


@dataclass(frozen=True, slots=True)
class Sync:
    """fsync or fdatasync of a node, or (None) of the whole file system; `site` tells who called it, and of what."""

    node: int | None
    call: str
    site: str = ""


@dataclass(frozen=True, slots=True)
class Mark:
    """The caller's own: something was promised here."""

    text: str


Operation = Names | Write | Allocate | Attribute | Sync | Mark
Fate = Literal["kept", "lost", "short", "zeros", "garbage", "torn"]
"""Of a write; names and attributes are kept or lost."""
Fates = Callable[[int, Operation], Fate]
"""The fate of each operation that was not synced."""


class Log:
    """Operations in order over a tree that was on the disk before; `now` is the tree as programs see it."""

    def __init__(self, base: Tree | None = None, first: int = 1) -> None:
        self.base = Tree() if base is None else base
        self.operations: list[Operation] = []
        self.next = first
        self.now = self.base.copy()
        self._named: dict[tuple[int, str], int] = {}
        self._placed: dict[int, tuple[int, int]] = {}
        self._durable: list[int] = []
        self._disks: dict[int, Tree] = {}

    def __len__(self) -> int:
        return len(self.operations)

    # ---------------------------------------------------------------------------------------------------------- recording

    def mark(self, text: str) -> None:
        self._add(Mark(text))

    def create(self, call: str, directory: int, name: str, *, is_directory: bool = False, mtime: int = 0) -> int:
        node, self.next = self.next, self.next + 1
        # That an inode is empty is no operation of its own: it comes with its first name.
        for tree in (self.base, self.now):
            if is_directory:
                tree.names[node] = {}
            else:
                tree.files[node] = File(mtime=mtime)
        self._names(call, [(directory, name, node)])
        return node

    def rename(self, call: str, source: tuple[int, str], target: tuple[int, str]) -> None:
        self._names(call, [(*source, None), (*target, self.now.names[source[0]][source[1]])], source, into=(target[0],))

    def exchange(self, one: tuple[int, str], two: tuple[int, str]) -> None:
        names = self.now.names
        changes = [(*one, names[two[0]][two[1]]), (*two, names[one[0]][one[1]])]
        self._names("exchange", changes, one, two, into=(one[0], two[0]))

    def link(self, source: tuple[int, str], target: tuple[int, str]) -> None:
        self._names("link", [(*target, self.now.names[source[0]][source[1]])], source, into=(target[0],))

    def remove(self, call: str, directory: int, name: str) -> None:
        self._names(call, [(directory, name, None)], (directory, name))

    def write(self, node: int, offset: int, data: bytes, mtime: int) -> None:
        self._add(Write(node, offset, data, mtime))

    def allocate(self, node: int, size: int) -> None:
        self._add(Allocate(node, size))

    def set(self, node: int, name: str, value: object) -> None:
        self._add(Attribute(node, name, value))

    def sync(self, node: int | None, call: str, site: str = "") -> None:
        self._add(Sync(node, call, site))

    def _names(
        self,
        call: str,
        changes: Sequence[tuple[int, str, int | None]],
        *sources: tuple[int, str],
        into: Sequence[int] = (),
    ) -> None:
        undoes = tuple(self._named[source] for source in sources if source in self._named)
        placed: list[int] = []
        for directory in into:
            above = directory
            while above in self._placed:
                at, above = self._placed[above]
                placed.append(at)
        self._add(Names(call, tuple(changes), undoes, tuple(placed)))

    def _add(self, operation: Operation) -> None:
        if isinstance(operation, Names):
            for directory, name, node in operation.changes:
                self._named[directory, name] = len(self.operations)
                if node is not None:
                    self._placed[node] = len(self.operations), directory
        self.operations.append(operation)
        self.now.apply(operation)

    # ----------------------------------------------------------------------------------------------------------- persisting

    def without(self, index: int) -> Log:
        """The same with one sync left out, as if the driver had forgotten it."""
        log = self.until(len(self))
        log.operations[index] = Mark("")
        return log

    def until(self, at: int) -> Log:
        """The first `at` operations, to go on from: what a process leaves that is killed there."""
        log = Log(self.base.copy(), self.next)
        for operation in self.operations[:at]:
            log._add(operation)
        return log

    def is_idle(self, index: int) -> bool:
        """Whether a sync finds everything synced already."""
        return self.durable(index) == self.durable(index + 1)

    def durable_from(self) -> list[int]:
        """For each operation the number of calls after which it is on the disk whatever happens."""
        if len(self._durable) == len(self.operations):
            return self._durable
        found = [NEVER] * len(self.operations)
        for index, sync in enumerate(self.operations):
            if not isinstance(sync, Sync):
                continue
            for earlier in range(index):
                if found[earlier] == NEVER and _covers(sync, self.operations[earlier]):
                    found[earlier] = index + 1
        self._durable = found
        return found

    def durable(self, at: int) -> Tree:
        """What is on the disk for certain after the first `at` calls: of a rename too only the name that was synced."""
        since = self.durable_from()
        while at > 0 and not isinstance(self.operations[at - 1], Sync):
            at -= 1
        if at in self._disks:
            return self._disks[at]
        synced: dict[int | None, int] = {}
        for index in range(at):
            if isinstance(operation := self.operations[index], Sync):
                synced[operation.node] = index
        everything = synced.get(None, -1)
        tree = self._disks[at] = self.base.copy()
        for index in range(at):
            operation = self.operations[index]
            if since[index] > at:
                continue
            if isinstance(operation, Names):
                sure = [change for change in operation.changes if max(synced.get(change[0], -1), everything) > index]
                operation = replace(operation, changes=tuple(sure))
            tree.apply(operation)
        return tree

    def left(self, at: int, fates: Fates, seed: int = 0) -> Tree:
        """What is on the disk if the power fails after the first `at` calls, and what was not synced meets these fates."""
        since = self.durable_from()
        met: list[Fate] = ["kept"] * at
        for index in reversed(range(at)):
            operation = self.operations[index]
            if since[index] > at and met[index] == "kept" and not isinstance(operation, (Sync, Mark)):
                met[index] = fates(index, operation)
        needed: set[int] = set()
        for index in reversed(range(at)):
            operation = self.operations[index]
            if not isinstance(operation, Names):
                continue
            if index in needed:
                met[index] = "kept"
            if met[index] == "kept":
                needed.update(operation.undoes)
                if since[index] > at:
                    needed.update(operation.into)
        tree = self.base.copy()
        chance = random.Random(seed)
        for index in range(at):
            tree.apply(self.operations[index], met[index], chance)
        return tree


def _covers(sync: Sync, operation: Operation) -> bool:
    """Whether a sync makes an earlier operation durable."""
    if isinstance(operation, (Sync, Mark)):
        return False
    if sync.node is None:
        return True
    if isinstance(operation, Names):
        # It happens as one: with either of its directories.
        return any(directory == sync.node for directory, _, _ in operation.changes)
    if isinstance(operation, Attribute) and sync.call == "fdatasync":
        return False
    return operation.node == sync.node


def lay(tree: Tree, root: str) -> None:
    """Make a tree real, in a directory that is there and empty."""
    for path, node in tree.walk(ROOT):
        at = f"{root}/{path}"
        values = tree.attributes.get(node, {})
        if node in tree.names:
            os.mkdir(at)
            os.chmod(at, values.get("mode", 0o755))
            continue
        content = tree.files[node]
        fd = os.open(at, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            for number, data in content.sectors.items():
                os.pwrite(fd, data, number * SECTOR)
            os.ftruncate(fd, content.size)
            os.utime(fd, ns=(content.mtime, content.mtime))
        finally:
            os.close(fd)


# --------------------------------------------------------------------------------------------------------------- recording


class Recorder:
    """Passes the driver's calls to the operating system on, and writes down those that change something.

    Plans name files and trees by inode number, time of change and time of birth, and neither number nor birth can be given
    to a tree that is laid anew. So the recorder answers with numbers of its own, in place of inode number and birth, from
    the first call on; whoever looks at a laid tree through a new recorder is given the same.

    Args:
        root: The directory in which everything happens.
        log: What happened there before, and what is there.
        syncs: Pass syncs on too. What they make durable is told by the log; only who watches from outside needs them.
        sites: Note who calls for each sync.
    """

    def __init__(self, root: str, log: Log | None = None, *, syncs: bool = False, sites: bool = False) -> None:
        self.root = os.path.realpath(root)
        self.log = Log() if log is None else log
        self.calls = _Os(self)
        self._syncs = syncs
        self._sites = sites
        self._lock = threading.RLock()
        self._nodes: dict[int, int] = {}
        self._offsets: dict[int, int] = {}

    @contextmanager
    def installed(self) -> Iterator[Log]:
        """Stand where the driver, and the staging of real paths, call the operating system."""
        calls, libc = self.calls, _Libc(self)
        swapped = [
            *((module, "os", calls) for module in (local, _area, _posix, _slots, _trees, staging)),
            (_area, "open", self._open_file),
            (_posix, "_libc", libc),
            (staging, "shutil", _Shutil(calls)),
        ]
        before = [(module, name, module.__dict__.get(name)) for module, name, _ in swapped]
        for module, name, new in swapped:
            setattr(module, name, new)
        try:
            yield self.log
        finally:
            for module, name, old in before:
                if old is None:
                    delattr(module, name)
                else:
                    setattr(module, name, old)

    # ----------------------------------------------------------------------------------------------------------- finding

    def _at(self, path: Any, dir_fd: int | None) -> tuple[int, str] | None:
        """The directory and the name that a call means; None for what lies outside."""
        path = os.fspath(path)
        if dir_fd is not None and not path.startswith("/"):
            directory = self._nodes.get(dir_fd)
            return None if directory is None else (directory, path)
        if not path.startswith(f"{self.root}/"):
            return None
        *above, name = path[len(self.root) + 1 :].split("/")
        node, real = ROOT, self.root
        for part in above:
            found = self._known(node, part, f"{real}/{part}")
            if found is None:
                return None
            node, real = found, f"{real}/{part}"
        return node, name

    def _known(self, directory: int, name: str, real: str) -> int | None:
        """The node of a name. What somebody else put there is written down as it is found: made just now, not synced."""
        node = self.log.now.names[directory].get(name)
        if node is not None:
            return node
        try:
            seen = os.lstat(real)
        except FileNotFoundError:
            return None
        if stat.S_ISDIR(seen.st_mode):
            return self.log.create("mkdir", directory, name, is_directory=True)
        node = self.log.create("open", directory, name)
        if stat.S_ISREG(seen.st_mode):
            with builtins.open(real, "rb") as file:
                self.log.write(node, 0, file.read(), seen.st_mtime_ns)
        return node

    def _node(self, path: Any, dir_fd: int | None) -> int | None:
        if path == self.root:
            return ROOT
        at = self._at(path, dir_fd)
        if at is None:
            return None
        real = f"/proc/self/fd/{dir_fd}/{path}" if dir_fd is not None else os.fspath(path)
        return self._known(*at, real)

    def _seen(self, found: os.stat_result, node: int | None) -> os.stat_result | _Seen:
        return found if node is None else _Seen(found, _NUMBERS + node)

    # ------------------------------------------------------------------------------------------------------------- calls

    def _open_file(self, file: int, mode: str, buffering: int = -1, closefd: bool = True) -> Any:
        if mode == "rb":
            return builtins.open(file, mode, buffering=buffering, closefd=closefd)
        return _WholeFile(self.calls, file, closefd)


class _Seen:
    """A status with a number of ours."""

    def __init__(self, found: os.stat_result, number: int) -> None:
        self._found = found
        self.st_ino = number

    def __getattr__(self, name: str) -> Any:
        return getattr(self._found, name)


class _DirEntry:
    def __init__(self, recorder: Recorder, fd: int, entry: os.DirEntry[str]) -> None:
        self._recorder, self._fd, self._entry = recorder, fd, entry
        self.name = entry.name

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        return self._entry.is_dir(follow_symlinks=follow_symlinks)

    def stat(self, *, follow_symlinks: bool = True) -> Any:
        with self._recorder._lock:
            found = self._entry.stat(follow_symlinks=follow_symlinks)
            return self._recorder._seen(found, self._recorder._node(self.name, self._fd))


class _WholeFile:
    """A new file that is written in one go."""

    def __init__(self, calls: _Os, fd: int, closefd: bool) -> None:
        self._calls, self._fd, self._closefd = calls, fd, closefd

    def __enter__(self) -> _WholeFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._closefd:
            self._calls.close(self._fd)

    def write(self, data: bytes) -> None:
        assert self._calls.write(self._fd, data) == len(data)

    def flush(self) -> None:
        pass

    def fileno(self) -> int:
        return self._fd


class _Os:
    """What the driver knows as `os`."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._log = recorder.log

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        recorder = self._recorder
        with recorder._lock:
            fd = os.open(path, flags, mode, dir_fd=dir_fd)
            recorder._offsets[fd] = 0
            directory = recorder._nodes.get(dir_fd) if dir_fd is not None else None
            node = None if directory is None else self._log.now.names[directory].get(path)
            if node is None:
                at = recorder._at(path, dir_fd)
                if at is not None and flags & os.O_CREAT and at[1] not in self._log.now.names[at[0]]:
                    node = self._log.create("open", *at, mtime=os.fstat(fd).st_mtime_ns)
                else:
                    node = recorder._node(path, dir_fd)
            if node is None:
                recorder._nodes.pop(fd, None)
            else:
                recorder._nodes[fd] = node
            return fd

    def dup(self, fd: int) -> int:
        recorder = self._recorder
        with recorder._lock:
            new = os.dup(fd)
            recorder._nodes.pop(new, None)
            if fd in recorder._nodes:
                recorder._nodes[new] = recorder._nodes[fd]
            return new

    def close(self, fd: int) -> None:
        with self._recorder._lock:
            self._recorder._nodes.pop(fd, None)
            os.close(fd)

    def mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        with self._recorder._lock:
            at = self._recorder._at(path, dir_fd)
            os.mkdir(path, mode, dir_fd=dir_fd)
            if at is not None:
                self._log.create("mkdir", *at, is_directory=True)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        if not os.path.isdir(path):
            self.makedirs(os.path.dirname(path), exist_ok=True)
            self.mkdir(path)
        elif not exist_ok:
            raise FileExistsError(path)

    def rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._remove("rmdir", path, dir_fd)

    def unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        self._remove("unlink", path, dir_fd)

    def _remove(self, call: Literal["rmdir", "unlink"], path: Any, dir_fd: int | None) -> None:
        with self._recorder._lock:
            known = self._recorder._node(path, dir_fd)
            at = self._recorder._at(path, dir_fd)
            getattr(os, call)(path, dir_fd=dir_fd)
            if at is not None and known is not None:
                self._log.remove(call, *at)

    def rename(self, source: Any, target: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        self._move(
            "rename",
            lambda: os.rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd),
            (source, src_dir_fd),
            (target, dst_dir_fd),
        )

    def link(
        self,
        source: Any,
        target: Any,
        *,
        src_dir_fd: int | None = None,
        dst_dir_fd: int | None = None,
        follow_symlinks: bool = True,
    ) -> None:
        self._move(
            "link",
            lambda: os.link(
                source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd, follow_symlinks=follow_symlinks
            ),
            (source, src_dir_fd),
            (target, dst_dir_fd),
        )

    def _move(
        self, call: str, move: Callable[[], object], source: tuple[Any, int | None], target: tuple[Any, int | None]
    ) -> bool:
        recorder = self._recorder
        with recorder._lock:
            recorder._node(*source)
            one, two = recorder._at(*source), recorder._at(*target)
            if call == "exchange":
                recorder._node(*target)
            if move():
                return False
            assert one is not None and two is not None, f"{call} of {source} to {target}"
            if call == "exchange":
                self._log.exchange(one, two)
            elif call == "link":
                self._log.link(one, two)
            else:
                self._log.rename(call, one, two)
            return True

    def write(self, fd: int, data: Any) -> int:
        with self._recorder._lock:
            length = os.write(fd, data)
            self._wrote(fd, self._recorder._offsets[fd], bytes(data[:length]))
            self._recorder._offsets[fd] += length
            return length

    def pwrite(self, fd: int, data: bytes, offset: int) -> int:
        with self._recorder._lock:
            length = os.pwrite(fd, data, offset)
            self._wrote(fd, offset, data[:length])
            return length

    def _wrote(self, fd: int, offset: int, data: bytes) -> None:
        if (node := self._recorder._nodes.get(fd)) is not None and data:
            self._log.write(node, offset, data, os.fstat(fd).st_mtime_ns)

    def posix_fallocate(self, fd: int, offset: int, length: int) -> None:
        with self._recorder._lock:
            os.posix_fallocate(fd, offset, length)
            if (node := self._recorder._nodes.get(fd)) is not None:
                self._log.allocate(node, offset + length)

    def fsync(self, fd: int) -> None:
        self._sync("fsync", fd)

    def fdatasync(self, fd: int) -> None:
        self._sync("fdatasync", fd)

    def _sync(self, call: Literal["fsync", "fdatasync"], fd: int) -> None:
        with self._recorder._lock:
            if self._recorder._syncs:
                getattr(os, call)(fd)
            if (node := self._recorder._nodes.get(fd)) is not None:
                self._log.sync(node, call, _site(self._recorder, node))

    def stat(self, path: Any, *, dir_fd: int | None = None, follow_symlinks: bool = True) -> Any:
        with self._recorder._lock:
            found = os.stat(path, dir_fd=dir_fd, follow_symlinks=follow_symlinks)
            return self._recorder._seen(found, self._recorder._node(path, dir_fd))

    def fstat(self, fd: int) -> Any:
        return self._recorder._seen(os.fstat(fd), self._recorder._nodes.get(fd))

    @contextmanager
    def scandir(self, fd: int) -> Iterator[Iterator[_DirEntry]]:
        with os.scandir(fd) as entries:
            yield (_DirEntry(self._recorder, fd, entry) for entry in entries)

    def fchmod(self, fd: int, mode: int) -> None:
        with self._recorder._lock:
            os.fchmod(fd, mode)
            self._set(fd, "mode", mode)

    def fchown(self, fd: int, owner: int, group: int) -> None:
        with self._recorder._lock:
            os.fchown(fd, owner, group)
            self._set(fd, "owner" if group == -1 else "group", max(owner, group))

    def setxattr(self, fd: int, name: str, value: bytes) -> None:
        with self._recorder._lock:
            os.setxattr(fd, name, value)
            self._set(fd, f"xattr {name}", value)

    def _set(self, fd: int, name: str, value: object) -> None:
        if (node := self._recorder._nodes.get(fd)) is not None:
            self._log.set(node, name, value)


class _Shutil:
    def __init__(self, calls: _Os) -> None:
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        return getattr(shutil, name)

    def rmtree(self, path: str, ignore_errors: bool = False) -> None:
        for at, directories, files in os.walk(path, topdown=False):
            for name in files:
                self._calls.unlink(f"{at}/{name}")
            for name in directories:
                self._calls.rmdir(f"{at}/{name}")
        if os.path.isdir(path):
            self._calls.rmdir(path)


class _Libc:
    """What the driver knows as the C library."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._libc = _posix._libc

    def __getattr__(self, name: str) -> Any:
        return getattr(self._libc, name)

    def renameat2(self, source: int, old: bytes, target: int, new: bytes, flags: int) -> int:
        call = "exchange" if flags == _posix._EXCHANGE else "rename_new"
        done = self._recorder.calls._move(
            call,
            lambda: self._libc.renameat2(source, old, target, new, flags),
            (os.fsdecode(old), source),
            (os.fsdecode(new), target),
        )
        return 0 if done else -1

    def syncfs(self, fd: int) -> int:
        with self._recorder._lock:
            done: int = self._libc.syncfs(fd) if self._recorder._syncs else 0
            if done == 0:
                self._recorder.log.sync(None, "syncfs", _site(self._recorder, None))
            return done

    def statx(self, fd: int, path: bytes, flags: int, mask: int, found: Any) -> int:
        done: int = self._libc.statx(fd, path, flags, mask, found)
        if done == 0 and (node := self._recorder._nodes.get(fd)) is not None:
            status = found._obj
            status.ino, status.btime_sec, status.btime_nsec = _NUMBERS + node, node, 0
            status.mask |= _posix._STATX_BTIME
        return done

    def fstatfs(self, fd: int, found: Any) -> int:
        result: int = self._libc.fstatfs(fd, found)
        return result


def _site(recorder: Recorder, node: int | None) -> str:
    """Who calls for a sync, from the driver's method down, and of what, with ids left out."""
    if not recorder._sites:
        return ""
    frame, callers = sys._getframe(2), list[str]()
    while frame is not None:
        if "/staged/drivers/" in frame.f_code.co_filename and frame.f_code.co_name not in callers:
            callers.append(frame.f_code.co_name)
        frame = frame.f_back  # type: ignore[assignment]
    path = "" if node is None else next((at for at, found in recorder.log.now.walk(ROOT) if found == node), "?")
    path = re.sub(r"\.[0-9a-f]{8}\.tmp$", "", re.sub(r"[0-9a-f]{24}", "ID", path))
    path = re.sub(r"(plan|ledger)-\d+", r"\1-EPOCH", re.sub(r"-[0-9a-f]{8}-\d+$", "-N", path))
    return f"{' > '.join(reversed([name for name in callers if not name.startswith('<')]))}: {path or '.'}"
