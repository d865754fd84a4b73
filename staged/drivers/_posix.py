"""System calls that the standard library lacks, and walks that no symbolic link leads astray. Linux.

Every function is synchronous and takes directory descriptors; callers run them in worker threads.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from staged.errors import StorageError

__all__ = [
    "DIRECTORY",
    "FILE",
    "CountedLock",
    "birth_identity",
    "clear_directory",
    "exchange",
    "file_identity",
    "is_overlay",
    "may_rename",
    "mount_of",
    "open_below",
    "opened",
    "rename_new",
    "start_writing",
    "sync_file_system",
]

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
"""How a directory is opened: itself, never through a link."""

FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
"""How a file is opened to be read: itself, and without a wait where a stranger put a pipe."""

_NOREPLACE, _EXCHANGE = 1, 2
_AT_EMPTY_PATH, _STATX_INO, _STATX_BTIME, _STATX_MNT_ID = 0x1000, 0x100, 0x800, 0x1000
_OVERLAYFS_SUPER_MAGIC = 0x794C7630  # linux/magic.h
_libc = ctypes.CDLL(None, use_errno=True)


# ----------------------------------------------------------------------------------------------------------- system calls


def _renameat2(source: int, old: str, target: int, new: str, flags: int) -> int:
    """0, or the error number. See renameat2(2)."""
    if _libc.renameat2(source, os.fsencode(old), target, os.fsencode(new), flags) == 0:
        return 0
    return ctypes.get_errno()


def exchange(source: int, old: str, target: int, new: str) -> None:
    """Swap two names in one atomic step."""
    if error := _renameat2(source, old, target, new, _EXCHANGE):
        raise OSError(error, os.strerror(error), new)


def rename_new(source: int, old: str, target: int, new: str) -> int:
    """Rename only onto a free name; 0, or the error number (EEXIST: taken, ENOENT: the source is gone)."""
    error = _renameat2(source, old, target, new, _NOREPLACE)
    if error in (errno.EINVAL, errno.ENOSYS):
        return _link_new(source, old, target, new)
    return error


def _link_new(source: int, old: str, target: int, new: str) -> int:
    """The same for file systems without the flag, such as NFS: a hard link never replaces a name."""
    try:
        os.link(old, new, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
        os.unlink(old, dir_fd=source)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def sync_file_system(fd: int) -> None:
    """Make everything on the file system of this descriptor durable; see syncfs(2)."""
    if _libc.syncfs(fd) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def start_writing(fd: int) -> None:
    """Start writing a file's data to disk without waiting, so that one commit of the journal serves several files."""
    _libc.sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), 2)


class _Statx(ctypes.Structure):
    _fields_ = [
        ("mask", ctypes.c_uint32),
        ("_before_ino", ctypes.c_uint8 * 28),
        ("ino", ctypes.c_uint64),
        ("_before_btime", ctypes.c_uint8 * 40),
        ("btime_sec", ctypes.c_int64),
        ("btime_nsec", ctypes.c_uint32),
        ("_before_mount", ctypes.c_uint8 * 52),
        ("mount", ctypes.c_uint64),
        ("_rest", ctypes.c_uint8 * 104),
    ]


def birth_identity(fd: int) -> str | None:
    """What an inode keeps for life: its number and birth time; None where the file system does not know the latter.

    A device number is no part of it, as it may change from mount to mount.
    """
    found = _statx(fd, _STATX_INO | _STATX_BTIME)
    if not found.mask & _STATX_BTIME:
        return None
    return f"{found.ino:x}-{found.btime_sec:x}.{found.btime_nsec:x}"


def mount_of(fd: int) -> tuple[int, int]:
    """The device and the mount that a directory is on: a rename leads out of neither, not even to the same device."""
    found = _statx(fd, _STATX_MNT_ID)
    return os.fstat(fd).st_dev, found.mount if found.mask & _STATX_MNT_ID else 0


def _statx(fd: int, mask: int) -> _Statx:
    """See statx(2); an empty mask where the kernel does not know the call."""
    found = _Statx()
    if _libc.statx(fd, b"", _AT_EMPTY_PATH, mask, ctypes.byref(found)) != 0:
        found.mask = 0
    return found


def may_rename(directory: os.stat_result, entry: os.stat_result) -> bool:
    """Whether the sticky bit of a directory lets this process rename or remove one of its entries."""
    return not directory.st_mode & stat.S_ISVTX or os.geteuid() in (0, directory.st_uid, entry.st_uid)


def is_overlay(fd: int) -> bool:
    """Whether this is an overlay, which cannot rename a directory of its lower layer (EXDEV)."""
    found = (ctypes.c_long * 32)()
    return bool(_libc.fstatfs(fd, ctypes.byref(found)) == 0 and found[0] == _OVERLAYFS_SUPER_MAGIC)


# ------------------------------------------------------------------------------------------------------------------ walks


@contextmanager
def opened(path: str | int, *parts: str, create: bool = False) -> Iterator[int]:
    """A directory below another, by its path or descriptor; see `open_below`."""
    fd = open_below(path, parts, create=create)
    try:
        yield fd
    finally:
        os.close(fd)


def open_below(path: str | int, parts: Sequence[str], *, create: bool = False) -> int:
    """Open a directory component by component, none of which may be a link.

    Raises:
        FileNotFoundError: A part is missing, and `create` is false.
        NotADirectoryError: A part is a file or a link (or OSError with ELOOP).
    """
    fd = os.open(path, DIRECTORY) if isinstance(path, str) else os.dup(path)
    try:
        for part in parts:
            if part in ("", ".", ".."):
                raise OSError(errno.EINVAL, "is not a name below a directory", part)
            try:
                deeper = os.open(part, DIRECTORY, dir_fd=fd)
            except FileNotFoundError:
                if not create:
                    raise
                try:
                    os.mkdir(part, dir_fd=fd)
                except FileExistsError:
                    pass
                deeper = os.open(part, DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = deeper
        return fd
    except BaseException:
        os.close(fd)
        raise


def clear_directory(fd: int) -> None:
    """Remove everything below a directory, following no link and crossing no mount."""
    found = os.fstat(fd)
    device = found.st_dev
    if found.st_mode & stat.S_IRWXU != stat.S_IRWXU:
        with suppress(PermissionError):
            os.fchmod(fd, stat.S_IRWXU)  # one that was closed to its own owner
    with os.scandir(fd) as entries:
        names = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_dir in names:
        try:
            if is_dir:
                with opened(fd, name) as below:
                    if os.fstat(below).st_dev != device:
                        raise OSError(errno.EBUSY, "is a mount point and was left alone", name)
                    clear_directory(below)
                os.rmdir(name, dir_fd=fd)
            else:
                os.unlink(name, dir_fd=fd)
        except FileNotFoundError:
            pass  # somebody else removes the same


def file_identity(found: os.stat_result) -> str:
    """What a file keeps when it is renamed, and loses when it is written again. Only regular files have one."""
    kind = "" if stat.S_ISREG(found.st_mode) else "!"
    return f"{kind}{found.st_ino:x}-{found.st_mtime_ns:x}"


# ------------------------------------------------------------------------------------------------------------------ locks


def _flock(kind: int) -> bytes:
    """A struct flock over the whole file; see fcntl(2)."""
    return struct.pack("@hhqqi4x", kind, os.SEEK_SET, 0, 0, 0)


_locks: weakref.WeakSet[CountedLock] = weakref.WeakSet()


class CountedLock:
    """An open-file-description lock, held as long as anybody works under it.

    The kernel drops it when the process dies. A worker thread that outlives its caller keeps it until its work ends, and
    work that has not started when it is released never starts. A forked child drops its copy.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._users = 0
        self._closed = False
        self._draining = False
        self._condition = threading.Condition()
        _locks.add(self)

    @classmethod
    def take(cls, fd: int) -> CountedLock | None:
        """Lock a file, and own its descriptor; None where another open file description has the lock."""
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK))
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        return cls(fd)

    @contextmanager
    def work(self) -> Iterator[None]:
        """Work under the lock; raises `StorageError` once it is released."""
        with self._condition:
            if self._closed:
                raise StorageError("The lock that this work was to run under is released.")
            self._users += 1
        try:
            yield
        finally:
            with self._condition:
                self._users -= 1
                self._condition.notify_all()
                if self._closed and self._users == 0 and not self._draining:
                    self._close()

    def wait_idle(self) -> None:
        """Wait for what runs now: work of callers that were cancelled."""
        with self._condition:
            while self._users > 0:
                self._condition.wait()

    def drain(self) -> None:
        """Let no further work start, and wait for what runs. The lock stays held until `release`."""
        with self._condition:
            self._closed = self._draining = True
            while self._users > 0:
                self._condition.wait()

    def release(self) -> None:
        """Give the lock up; a no-op the second time."""
        with self._condition:
            self._closed, self._draining = True, False
            if self._users == 0:
                self._close()

    def _close(self, *, in_child: bool = False) -> None:
        if self._fd >= 0:
            if not in_child:
                # A child that is being forked may have a copy of the descriptor: closing ours would not unlock.
                fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK))
            os.close(self._fd)
            self._fd = -1


def _drop_in_child() -> None:
    for lock in list(_locks):
        # The mutex may have been held by a thread that does not exist in the child: it is not asked for.
        lock._closed = True
        lock._close(in_child=True)


os.register_at_fork(after_in_child=_drop_in_child)
