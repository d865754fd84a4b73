"""The control area of a local target, from worker threads: records, segments and locks in one directory."""

from __future__ import annotations

import errno
import itertools
import os
import secrets
import stat
import threading
import time
from collections.abc import Iterable, Iterator, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager

from staged.driver import Record
from staged.drivers import _posix, _slots
from staged.drivers._posix import FILE, CountedLock, opened
from staged.errors import StorageError

__all__ = ["ControlArea", "exists", "remove_tree", "unlink"]

_SLICE = 64
"""Segments that are open at a time while they are synced."""
_WAIT = 20.0
"""Seconds to wait for another process's swap of the same record, which takes milliseconds unless it is stopped."""
_MAX_SEGMENT = 256 << 20
"""Bytes of a segment, well above 10,000 entries of the longest names; nothing larger is read into memory."""
_DAMAGED = b"damaged"
"""Stands for a record of which nothing can be read: the decoder refuses it."""


class ControlArea:
    """One control area.

    Args:
        root: A directory that exists, or will.
        parts: The area's place below it; no part may be a link.
        durable: Sync what must survive a loss of power.
    """

    def __init__(self, root: str, parts: tuple[str, ...], *, durable: bool) -> None:
        self.root = root
        self.parts = parts
        self._durable = durable
        self._unsynced: list[str] = []
        self._broken = False
        self._synced = b""
        self._syncing = threading.Lock()

    @contextmanager
    def opened(self, *parts: str, create: bool = False) -> Iterator[int]:
        """A directory of the area."""
        with opened(self.root, *self.parts, *parts, create=create) as fd:
            yield fd

    # ------------------------------------------------------------------------------------------------------------ records

    def read(self, key: str) -> Record | None:
        *parts, name = key.split("/")
        try:
            with self.opened(*parts) as fd:
                body = self._read(fd, name, swapped=_is_swapped(key))
        except FileNotFoundError:
            return None
        return Record(body, _slots.token(body)) if body else None

    def _read(self, fd: int, name: str, *, swapped: bool) -> bytes:
        try:
            file = os.open(name, FILE, dir_fd=fd)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):
                return _DAMAGED  # a link, or a socket
            raise
        try:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode) or found.st_size > _MAX_SEGMENT:
                return _DAMAGED
            if swapped:
                return _slots.current(_slots.read(file)) or (_DAMAGED if _slots.was_durable(file) else b"")
            with open(file, "rb", buffering=0, closefd=False) as reader:
                return reader.readall() or b""
        finally:
            os.close(file)

    def cas(self, key: str, body: bytes, token: str | None, *, durable: bool) -> str | None:
        *parts, name = key.split("/")
        with ExitStack() as stack:
            try:
                fd = stack.enter_context(self.opened(*parts, create=token is None))
                file = self._locked(stack, fd, name, create=token is None)
            except FileNotFoundError:
                return None
            slots = _slots.read(file)
            found = _slots.current(slots)
            if (_slots.token(found) if found else None) != token:
                return None
            if durable and self._durable:
                self._sync_segments()
                # Torn, the write must leave a record: the last durable one, if it is known to be on the disk, or else any.
                if found and (not (last := _slots.durable(slots)) or last != self._synced):
                    os.fdatasync(file)
            _slots.write(file, body, slots, durable=durable)
            if durable and self._durable:
                os.fdatasync(file)
                self._synced = body
            if durable:
                self.sync_directories(["/".join(parts)])
            return _slots.token(body)

    def _locked(self, stack: ExitStack, fd: int, name: str, *, create: bool) -> int:
        """A record's file, while nobody else swaps it."""
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        deadline = time.monotonic() + _WAIT
        while True:
            file = os.open(name, flags, 0o600, dir_fd=fd)
            lock = CountedLock.take(file)
            if lock is not None and os.fstat(file).st_nlink:
                stack.callback(lock.release)
                return file
            if lock is not None:
                lock.release()  # deleted meanwhile
            elif time.monotonic() > deadline:
                raise StorageError(f"Another process holds the record {name!r} and does not go on.", retryable=True)
            time.sleep(0.001)

    def put_segment(self, key: str, body: bytes) -> bool:
        if len(body) > _MAX_SEGMENT:
            raise StorageError(f"The segment {key!r} would have {len(body)} bytes; at most {_MAX_SEGMENT} fit.")
        *parts, name = key.split("/")
        with self.opened(*parts, create=True) as fd:
            if exists(fd, name):
                return False
            with self._temporary(fd, name) as (temporary, file):
                with open(file, "wb", closefd=False) as writer:
                    writer.write(body)
                if self._durable and key.startswith("outcome/"):
                    # It is looked up with nothing durable to vouch for it: half of one must never have its name.
                    os.fsync(file)
                error = _posix.rename_new(fd, temporary, fd, name)
            if error not in (0, errno.EEXIST):
                raise OSError(error, os.strerror(error), key)
            if error == 0:
                self._unsynced.append(key)
            return error == 0

    @contextmanager
    def _temporary(self, fd: int, name: str) -> Iterator[tuple[str, int]]:
        """A new file under a name of its own, locked so that no `sweep` takes it for a dead process's."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        while True:
            temporary = f"{name}.{secrets.token_hex(4)}.tmp"
            file = os.open(temporary, flags, 0o600, dir_fd=fd)
            lock = CountedLock.take(file)
            if lock is not None and os.fstat(file).st_nlink:
                break
            if lock is not None:
                lock.release()  # swept between its creation and the lock
        try:
            yield temporary, file
        finally:
            unlink(fd, temporary)
            lock.release()

    def _sync_segments(self) -> None:
        """Make durable what was put since the last time.

        A sync that failed once tells nothing when it is repeated: the system may have dropped the pages. After one nothing
        may be decided any more that rests on them.
        """
        with self._syncing:
            if self._broken:
                raise StorageError("An earlier sync of this store failed; nothing more is decided. Open it anew.")
            count = len(self._unsynced)
            self._broken = True
            for at in range(0, count, _SLICE):
                self._sync_some(self._unsynced[at : min(at + _SLICE, count)])
            self.sync_directories({key.rpartition("/")[0] for key in self._unsynced[:count]})
            self._broken = False
            del self._unsynced[:count]

    def _sync_some(self, keys: Sequence[str]) -> None:
        with ExitStack() as stack:
            files: list[int] = []
            for key in keys:
                *parts, name = key.split("/")
                try:
                    with self.opened(*parts) as fd:
                        files.append(os.open(name, FILE, dir_fd=fd))
                    stack.callback(os.close, files[-1])
                except FileNotFoundError:
                    continue  # deleted meanwhile
            for file in files:
                _posix.start_writing(file)
            for file in files:
                os.fsync(file)

    def sync_directories(self, keys: Iterable[str]) -> None:
        """Sync these directories of the area and all above them."""
        if not self._durable:
            return
        above = {"", *keys, *(key.rpartition("/")[0] for key in keys)}
        for key in sorted(above, key=len, reverse=True):
            try:
                with self.opened(*filter(None, key.split("/"))) as fd:
                    os.fsync(fd)
            except FileNotFoundError:
                continue  # its transaction ended meanwhile

    # ------------------------------------------------------------------------------------------------- listing, deleting

    def list(self, prefix: str) -> Sequence[str]:
        *parts, start = prefix.split("/")
        found: list[str] = []
        try:
            with self.opened(*parts) as fd:
                self._collect(fd, "/".join([*parts, ""]), start, found)
        except FileNotFoundError:
            pass
        return sorted(found)

    def _collect(self, fd: int, at: str, start: str, found: MutableSequence[str]) -> None:
        with os.scandir(fd) as entries:
            named = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        for name, is_dir in named:
            if not name.startswith(start) or name.endswith(".tmp"):
                continue
            if not is_dir:
                if at != "tx/":  # a file there is nobody's
                    found.append(f"{at}{name}")
            elif at == "tx/":
                before = len(found)
                try:
                    with opened(fd, name) as below:
                        self._collect(below, f"{at}{name}/", "", found)
                except FileNotFoundError:
                    continue
                if len(found) == before:
                    found.append(f"{at}{name}/")  # its process died before it wrote anything

    def delete(self, keys: Sequence[str]) -> None:
        for directory, group in itertools.groupby(keys, key=lambda key: key.rpartition("/")[0]):
            parts = directory.split("/") if directory else []
            try:
                with self.opened(*parts) as fd:
                    for key in group:
                        unlink(fd, key.rpartition("/")[2])
                if len(parts) > 1:
                    with self.opened(*parts[:-1]) as fd:
                        os.rmdir(parts[-1], dir_fd=fd)
            except FileNotFoundError:
                pass
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise

    def sweep(self) -> None:
        """Delete what a process left that died within a single call here; its lock tells that it did."""
        for parts in ((), ("log",), ("outcome",)):
            try:
                with self.opened(*parts) as fd:
                    for name in os.listdir(fd):
                        if name.endswith(".tmp"):
                            self._sweep_one(fd, name)
            except FileNotFoundError:
                continue

    def _sweep_one(self, fd: int, name: str) -> None:
        try:
            lock = CountedLock.take(os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd))
        except OSError:
            return  # gone, or nothing that we made
        if lock is not None:
            unlink(fd, name)
            lock.release()

    # --------------------------------------------------------------------------------------------------- clock and locks

    def age(self, key: str) -> float | None:
        *parts, name = key.split("/")
        try:
            with self.opened(*parts) as fd:
                return max(0.0, self.now() - os.stat(name, dir_fd=fd, follow_symlinks=False).st_mtime)
        except FileNotFoundError:
            return None

    def now(self) -> float:
        """The file system's own clock, which need not be this machine's."""
        with self.opened() as fd:
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            file = os.open("clock", flags, 0o600, dir_fd=fd)
            try:
                os.utime(file)
                return os.fstat(file).st_mtime
            finally:
                os.close(file)

    def lock(self, key: str) -> CountedLock | None:
        *parts, name = key.split("/")
        with self.opened(*parts, create=True) as fd:
            try:
                file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=fd)
            except FileNotFoundError:
                return None  # its directory was deleted by whoever had it
            lock = CountedLock.take(file)
            # Whoever had it may have deleted the file meanwhile: then this locks nothing.
            if lock is not None and os.fstat(file).st_nlink == 0:
                lock.release()
                return None
            return lock


def exists(fd: int, name: str) -> bool:
    """Whether a directory has this name, be it a file, a directory or a link."""
    try:
        os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def unlink(fd: int, name: str) -> None:
    """Remove a file; one that is gone is fine."""
    try:
        os.unlink(name, dir_fd=fd)
    except FileNotFoundError:
        pass


def remove_tree(fd: int, name: str) -> None:
    """Remove a directory and all below it, following no link and crossing no mount."""
    with opened(fd, name) as below:
        _posix.clear_directory(below)
    os.rmdir(name, dir_fd=fd)


def _is_swapped(key: str) -> bool:
    """Whether a key is of a record that is swapped in place, not of a segment that is written once."""
    return key == "head" or key.endswith("/record")
