"""A directory on a local disk. Linux: renameat2, open-file-description locks, syncfs.

    <parent>/_staged/<name>/          the control area, 0700, on the target's file system
        head  ledger-…  outcome/…  log/…  tx/<id>/record
        lock  cas                     held over a commit; held over one swap of a record
        tx/<id>/lease                 held by the transaction's process: its death drops it
        tx/<id>/tree/                 the staged set, as it will be: a full_drop exchanges it with the target
        tx/<id>/part/  scratch-…/     files being written
        old/<epoch>-<id>/             trees that were swapped out

Where the parent cannot be used (a mount point, no permission) all this lies in `<target>/_staged/_staged/`, and sets are
moved file by file. Every path is walked component by component, so that no symbolic link leads out.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import os
import stat
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

from anyio import to_thread

from staged import paths
from staged.driver import Driver, LogHandle, Record
from staged.drivers import _posix, _slots
from staged.drivers._posix import CountedLock, file_identity, opened
from staged.errors import Conflict, InvalidInput, StagedError, StagingError, StorageError, Unsupported
from staged.model import Answer, Capabilities, Entry, Guarantee, Listed, Mode, Trees
from staged.paths import RESERVED, fold

__all__ = ["LocalDriver"]

T = TypeVar("T")

_FEW = 32
"""Files or directories that are synced one by one; more are synced with their whole file system."""
_BUFFER = 1 << 20
"""Bytes of a file that are kept until a worker thread is asked to write them."""
_STAGING = frozenset({"tree", "part"})


@dataclass(frozen=True, slots=True)
class _Site:
    """Where things are, found once: `above` and `name` are the target, `control` the parts below `root`."""

    above: str
    name: str
    root: str
    control: tuple[str, ...]

    @property
    def inside(self) -> bool:
        """The control area lies in the target."""
        return self.control == (RESERVED, RESERVED)


class LocalDriver(Driver):
    """A local directory.

    Args:
        path: The target; it need not exist, and a symbolic link is resolved once.
        durability: "full" survives power loss: what the decision rests on is synced before it. "none" leaves that to the
            system and survives the death of the process only.
        staging: A directory on the same file system to hold the control area instead; every writer must name the same.
    """

    def __init__(
        self, path: str, *, durability: Literal["full", "none"] = "full", staging: str | os.PathLike[str] | None = None
    ) -> None:
        if sys.platform != "linux":
            raise Unsupported("The local driver needs Linux.")
        if durability not in ("full", "none"):
            raise InvalidInput(f'durability is "full" or "none", not {durability!r}.')
        if not path or "\0" in path:
            raise InvalidInput("A local target is the path of a directory.")
        self.url = _absolute(path)
        self._durable = durability == "full"
        self._staging = None if staging is None else _absolute(os.fspath(staging))
        self._found: _Site | None = None
        self._finding = threading.Lock()
        self._folds = False
        self._held: dict[str, CountedLock] = {}
        self._unsynced: list[str] = []
        self._numbers = itertools.count()

    def child(self, path: str) -> LocalDriver:
        durability: Literal["full", "none"] = "full" if self._durable else "none"
        return LocalDriver(os.path.join(self.url, path), durability=durability, staging=self._staging)

    async def _run(self, work: Callable[[], T], *locks: str) -> T:
        """Run work in a thread, under the locks of these names as far as this process holds them now."""
        held = [lock for name in locks if (lock := self._held.get(name)) is not None]

        def run() -> T:
            with ExitStack() as stack:
                for lock in held:
                    stack.enter_context(lock.work())
                try:
                    return work()
                except OSError as error:
                    raise _mapped(error) from error

        return await to_thread.run_sync(run, abandon_on_cancel=True)

    # ------------------------------------------------------------------------------------------------------ where it is

    @property
    def _site(self) -> _Site:
        with self._finding:
            if self._found is None:
                self._found = self._find()
            return self._found

    def _find(self) -> _Site:
        """Look, and make nothing."""
        target = os.path.realpath(self.url)
        above, name = os.path.split(target)
        if RESERVED in target.split("/"):
            raise Unsupported(f"{self.url!r} lies in a control area.")
        if os.path.lexists(target) and not os.path.isdir(target):
            raise Unsupported(f"{self.url!r} is a file; a target is a directory.")
        return _Site(above, name, *self._choose(target, above, name))

    def _choose(self, target: str, above: str, name: str) -> tuple[str, tuple[str, ...]]:
        """The control area that is there; else beside the target, or in it where the parent cannot hold it."""
        if self._staging is not None:
            if os.path.commonpath([os.path.realpath(self._staging), target]) == target:
                raise InvalidInput(f"staging={self._staging!r} lies in the target, which a full_drop replaces.")
            return self._staging, (RESERVED, f"{name}-{hashlib.sha256(target.encode()).hexdigest()[:16]}")
        beside, inside = (RESERVED, name), (RESERVED, RESERVED)
        if os.path.exists(os.path.join(above, *beside, "head")):
            return above, beside
        mounted = os.path.ismount(target)
        closed = os.path.isdir(above) and not os.access(above, os.W_OK | os.X_OK)
        if mounted or closed or os.path.exists(os.path.join(target, *inside, "head")):
            return target, inside
        return above, beside

    def _probe(self) -> Capabilities:
        """Make the control area, and try there what the file system can do."""
        site = self._site
        os.makedirs(site.above, exist_ok=True)
        os.makedirs(site.root, exist_ok=True)
        if os.stat(site.root).st_dev != os.stat(site.above).st_dev and not site.inside:
            raise Unsupported(f"staging={self._staging!r} is on another file system than {self.url!r}.")
        try:
            with self._control(create=True) as fd:
                os.fchmod(fd, 0o700)
                swaps, folds = self._try(fd)
        except PermissionError as error:
            raise Unsupported(
                f"{self.url!r} cannot be written: there is no room for its control area ({error})."
            ) from error
        always: frozenset[Guarantee] = frozenset({"serialised", "fenced", "no_gap"})
        guarantees = dict.fromkeys(Mode, always)
        if swaps := swaps and not site.inside:
            guarantees[Mode.FULL_DROP] = always | {"one_generation"}
        self._folds = folds
        return Capabilities(fence="lock", swaps_trees=swaps, folds=folds, guarantees=guarantees)

    def _try(self, control: int) -> tuple[bool, bool]:
        """Whether trees can be exchanged and recognised, and whether names are folded."""
        swaps = not _posix.is_overlay(control) and _posix.birth_identity(control) is not None
        scratch = f"probe-{os.getpid()}-{threading.get_ident()}"
        with opened(control, scratch, create=True) as fd:
            for directory in ("a", "B"):
                os.mkdir(directory, dir_fd=fd)
            try:
                _posix.exchange(fd, "a", fd, "B")
            except OSError:
                swaps = False
            folds = _exists(fd, "b")
            _posix.clear_directory(fd)
        os.rmdir(scratch, dir_fd=control)
        return swaps, folds

    @contextmanager
    def _control(self, *parts: str, create: bool = False) -> Iterator[int]:
        site = self._site
        with opened(site.root, *site.control, *parts, create=create) as fd:
            yield fd

    @contextmanager
    def _target(self, *parts: str) -> Iterator[int]:
        site = self._site
        with opened(site.above, site.name, *parts) as fd:
            yield fd

    async def probe(self) -> Capabilities:
        return await self._run(self._probe)

    # ------------------------------------------------------------------------------------------------ the control area

    async def read(self, key: str) -> Record | None:
        return await self._run(lambda: self._read(key))

    def _read(self, key: str) -> Record | None:
        *parts, name = key.split("/")
        try:
            with self._control(*parts) as fd:
                file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
        except FileNotFoundError:
            return None
        with open(file, "rb", buffering=0) as reader:
            body = _slots.read(reader.fileno()) if _is_swapped(key) else reader.readall()
            if not body and os.fstat(file).st_size:
                body = b"damaged"  # there was a record, and nothing of it can be read: the decoder refuses it
        return Record(body, _slots.token(body)) if body else None

    async def cas(self, key: str, body: bytes, token: str | None, *, durable: bool) -> str | None:
        return await self._run(lambda: self._cas(key, body, token, durable), *(["lock"] if key == "head" else []))

    def _cas(self, key: str, body: bytes, token: str | None, durable: bool) -> str | None:
        *parts, name = key.split("/")
        with self._control() as fd:
            lock = CountedLock.take(_lock_file(fd, "cas"), wait=True)
        assert lock is not None
        with ExitStack() as stack:
            stack.callback(lock.release)
            fd = stack.enter_context(self._control(*parts, create=True))
            created = not _exists(fd, name)
            file = _lock_file(fd, name)
            stack.callback(os.close, file)
            found = _slots.read(file)
            if (_slots.token(found) if found else None) != token:
                return None
            if durable and self._durable:
                self._sync_segments()
            _slots.write(file, body)
            if durable:
                self._sync(file)
                if created:
                    self._sync(fd)
            return _slots.token(body)

    async def put_segment(self, key: str, body: bytes) -> bool:
        return await self._run(lambda: self._put_segment(key, body))

    def _put_segment(self, key: str, body: bytes) -> bool:
        *parts, name = key.split("/")
        temporary = f"{name}.{os.getpid()}-{next(self._numbers)}.tmp"
        with self._control(*parts, create=True) as fd:
            if _exists(fd, name):
                return False
            file = os.open(
                temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=fd
            )
            with open(file, "wb", buffering=0) as writer:
                writer.write(body)
            error = _posix.rename_new(fd, temporary, fd, name)
            if error:
                _unlink(fd, temporary)
                if error != errno.EEXIST:
                    raise OSError(error, os.strerror(error), key)
                return False
            self._unsynced.append(key)
        return True

    def _sync_segments(self) -> None:
        """Make the segments durable that were put since the last time."""
        count = len(self._unsynced)
        directories: set[str] = set()
        with ExitStack() as stack:
            files = []
            for key in self._unsynced[:count]:
                *parts, name = key.split("/")
                try:
                    fd = stack.enter_context(self._control(*parts))
                    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
                except FileNotFoundError:
                    continue  # deleted meanwhile
                stack.callback(os.close, file)
                files.append(file)
                directories.add("/".join(parts))
            for file in files:
                _posix.start_writing(file)
            for file in files:
                os.fsync(file)
            for directory in sorted(directories):
                os.fsync(stack.enter_context(self._control(*filter(None, directory.split("/")))))
        del self._unsynced[:count]

    async def list_control(self, prefix: str) -> list[str]:
        return await self._run(lambda: self._list_control(prefix))

    def _list_control(self, prefix: str) -> list[str]:
        *parts, start = prefix.split("/")
        found: list[str] = []
        try:
            with self._control(*parts) as fd:
                self._collect(fd, "/".join([*parts, ""]), start, found)
        except FileNotFoundError:
            pass
        return sorted(found)

    def _collect(self, fd: int, at: str, start: str, found: list[str]) -> None:
        with os.scandir(fd) as entries:
            for entry in entries:
                name = entry.name
                if not name.startswith(start) or name.endswith(".tmp"):
                    continue
                if not entry.is_dir(follow_symlinks=False):
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

    async def delete_control(self, keys: Sequence[str]) -> None:
        await self._run(lambda: self._delete_control(keys))

    def _delete_control(self, keys: Sequence[str]) -> None:
        for directory, group in itertools.groupby(keys, key=lambda key: key.rpartition("/")[0]):
            parts = directory.split("/") if directory else []
            try:
                with self._control(*parts) as fd:
                    for key in group:
                        _unlink(fd, key.rpartition("/")[2])
                if len(parts) > 1:
                    with self._control(*parts[:-1]) as fd:
                        os.rmdir(parts[-1], dir_fd=fd)
            except FileNotFoundError:
                pass
            except OSError as error:
                if error.errno != errno.ENOTEMPTY:
                    raise

    async def age(self, key: str) -> float | None:
        return await self._run(lambda: self._age(key))

    def _age(self, key: str) -> float | None:
        *parts, name = key.split("/")
        try:
            with self._control(*parts) as fd:
                return max(0.0, self._now() - os.stat(name, dir_fd=fd, follow_symlinks=False).st_mtime)
        except FileNotFoundError:
            return None

    def _now(self) -> float:
        """The file system's own clock, which need not be this machine's."""
        with self._control() as fd:
            file = os.open("clock", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=fd)
            try:
                os.utime(file)
                return os.fstat(file).st_mtime
            finally:
                os.close(file)

    async def lock(self, key: str) -> _Held | None:
        lock = await self._run(lambda: self._lock(key))
        if lock is None:
            return None
        self._held[key] = lock
        return _Held(self._held, key, lock)

    def _lock(self, key: str) -> CountedLock | None:
        *parts, name = key.split("/")
        with self._control(*parts, create=True) as fd:
            file = _lock_file(fd, name)
            lock = CountedLock.take(file)
            # Whoever had it may have deleted the file meanwhile: then this locks nothing.
            if lock is not None and os.fstat(file).st_nlink == 0:
                lock.release()
                return None
            return lock

    # ----------------------------------------------------------------------------------------------------------- staging

    async def stage(self, tx: str, path: str, log: LogHandle) -> _Writer:
        return _Writer(self, tx, path, f"{next(self._numbers)}")

    async def seal(self, tx: str, entries: Collection[Entry]) -> None:
        await self._run(lambda: self._seal(tx, {entry.path: entry for entry in entries}), _lease(tx))

    def _seal(self, tx: str, recorded: dict[str, Entry]) -> None:
        directories: list[str] = []
        with self._control("tx", tx, "tree", create=True) as tree:
            seen = 0
            for path, found in _walk(tree, directories):
                entry = recorded.get(path)
                if entry is None:
                    raise StagingError(f"{path!r} lies in the staging but was not staged.")
                if (found.st_size, file_identity(found)) != (entry.size, entry.identity):
                    raise StagingError(f"{path!r} changed after it was staged.")
                seen += 1
            if seen != len(recorded):
                raise StagingError("A staged file is gone.")
            self._take_after_target(tree)
            if not self._durable:
                return
            if len(recorded) + len(directories) > _FEW:
                _posix.sync_file_system(tree)
                return
            for path in recorded:
                *above, name = path.split("/")
                with opened(tree, *above) as fd:
                    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
                    try:
                        os.fsync(file)
                    finally:
                        os.close(file)
            for directory in ("", *directories):
                with opened(tree, *filter(None, directory.split("/"))) as fd:
                    os.fsync(fd)

    def _take_after_target(self, tree: int) -> None:
        """Give the staged tree the target's mode, owner and extended attributes: an exchange carries them along."""
        try:
            with self._target() as target:
                model = os.fstat(target)
                if (model.st_uid, model.st_gid) != (os.fstat(tree).st_uid, os.fstat(tree).st_gid):
                    os.fchown(tree, model.st_uid, model.st_gid)
                os.fchmod(tree, stat.S_IMODE(model.st_mode))
                for name in os.listxattr(target):
                    os.setxattr(tree, name, os.getxattr(target, name))
        except FileNotFoundError:
            pass
        except PermissionError:
            pass  # an owner that we may not give away stays ours
        except OSError as error:
            if error.errno != errno.ENOTSUP:
                raise

    async def discard(self, tx: str, handles: Collection[str], *, whole: bool) -> None:
        await self._run(lambda: self._discard(tx, handles, whole), *([] if whole else [_lease(tx)]))

    def _discard(self, tx: str, handles: Collection[str], whole: bool) -> None:
        if whole and (lease := self._held.get(_lease(tx))) is not None:
            lease.drain()  # a thread that outlived its caller may still be writing here
        try:
            with self._control("tx", tx) as fd:
                if whole:
                    for name in os.listdir(fd):
                        if name in _STAGING or name.startswith("scratch-"):
                            _remove_tree(fd, name)
                    return
                for handle in handles:
                    *above, name = handle.split("/")
                    with opened(fd, "tree", *above) as directory:
                        _unlink(directory, name)
        except FileNotFoundError:
            pass

    async def scratch(self, tx: str) -> str | None:
        return await self._run(lambda: self._scratch(tx), _lease(tx))

    def _scratch(self, tx: str) -> str:
        name = f"scratch-{next(self._numbers)}"
        with self._control("tx", tx, create=True) as fd:
            os.mkdir(name, dir_fd=fd)
        site = self._site
        return os.path.join(site.root, *site.control, "tx", tx, name)

    async def adopt(self, tx: str, root: str, paths: Sequence[str]) -> Sequence[Entry]:
        return await self._run(lambda: self._adopt(tx, os.path.basename(root), paths), _lease(tx))

    def _adopt(self, tx: str, scratch: str, found: Sequence[str]) -> Sequence[Entry]:
        entries = []
        with self._control("tx", tx) as fd:
            for path in found:
                *above, name = path.split("/")
                with opened(fd, scratch, *above) as source, opened(fd, "tree", *above, create=True) as tree:
                    seen = os.stat(name, dir_fd=source, follow_symlinks=False)
                    if not stat.S_ISREG(seen.st_mode):
                        raise StagingError(f"{path!r} is not a regular file.")
                    os.rename(name, name, src_dir_fd=source, dst_dir_fd=tree)
                    entries.append(Entry(path, seen.st_size, file_identity(seen), path))
        return entries

    # -------------------------------------------------------------------------------------------------------- the target

    async def list(
        self, prefix: str = "", names: Collection[str] | None = None
    ) -> AsyncGenerator[Sequence[Listed], None]:
        yield await self._run(lambda: self._list(prefix) if names is None else self._look_up(names))

    def _list(self, prefix: str) -> Sequence[Listed]:
        directories: list[str] = []
        found: list[Listed] = []
        try:
            with self._target(*filter(None, prefix.split("/"))) as fd:
                own = f"{RESERVED}/{RESERVED}" if self._site.inside and not prefix else None
                for path, seen in _walk(fd, directories, own):
                    found.append(Listed(paths.join(prefix, path), seen.st_size, file_identity(seen)))
                if own is not None and RESERVED in directories:
                    directories.remove(RESERVED)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return found + [Listed(paths.join(prefix, path), 0, "", is_dir=True) for path in directories]

    def _look_up(self, names: Collection[str]) -> Sequence[Listed]:
        found: list[Listed] = []
        for directory, group in _by_directory(names, lambda name: name):
            wanted = {name.rpartition("/")[2] for name in group}
            try:
                with self._target(*filter(None, directory.split("/"))) as fd:
                    if self._folds:
                        folded = {fold(name) for name in wanted}
                        wanted = {name for name in os.listdir(fd) if fold(name) in folded}
                    elif len(wanted) > _FEW:
                        wanted &= set(os.listdir(fd))
                    for name in sorted(wanted):
                        try:
                            seen = os.stat(name, dir_fd=fd, follow_symlinks=False)
                        except FileNotFoundError:
                            continue
                        is_dir = stat.S_ISDIR(seen.st_mode)
                        identity = "" if is_dir else file_identity(seen)
                        found.append(Listed(paths.join(directory, name), seen.st_size, identity, is_dir))
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
        return found

    async def publish(self, tx: str, entries: Sequence[Entry], replaces: Mapping[str, str]) -> Sequence[Answer]:
        return await self._run(lambda: self._publish(tx, entries, replaces), "lock", _lease(tx))

    def _publish(self, tx: str, entries: Sequence[Entry], replaces: Mapping[str, str]) -> Sequence[Answer]:
        answers: dict[str, Answer] = {}
        touched: set[str] = set()
        site = self._site
        with opened(site.above, site.name, create=True) as target, ExitStack() as stack:
            try:
                tree = stack.enter_context(self._control("tx", tx, "tree"))
            except FileNotFoundError:
                tree = None
            grouped = _by_directory(entries, lambda entry: entry.path)
            moved = set() if tree is None else _move_new(tree, target, [directory for directory, _ in grouped], touched)
            for directory, group in grouped:
                if directory in moved:
                    answers.update((entry.path, Answer.DONE) for entry in group)
                else:
                    answers.update(_publish_into(tree, target, directory, group, replaces))
                    touched.update((directory, *paths.parents(directory)) if directory else ("",))
            if self._durable:
                self._sync_directories(target, touched)
                with opened(site.above) as fd:
                    os.fsync(fd)
        return [answers[entry.path] for entry in entries]

    async def remove(self, entries: Sequence[Listed]) -> Sequence[Answer]:
        return await self._run(lambda: self._remove(entries), "lock")

    def _remove(self, entries: Sequence[Listed]) -> Sequence[Answer]:
        answers: dict[str, Answer] = {}
        touched: set[str] = set()
        for directory, group in _by_directory(entries, lambda entry: entry.path):
            try:
                with self._target(*filter(None, directory.split("/"))) as fd:
                    for entry in group:
                        answers[entry.path] = _remove_one(fd, entry)
                touched.add(directory)
            except (FileNotFoundError, NotADirectoryError):
                answers.update((entry.path, Answer.ALREADY) for entry in group)
        try:
            with self._target() as target:
                for directory in sorted(touched - {""}, key=lambda path: -path.count("/")):
                    self._prune(target, directory)
                if self._durable:
                    self._sync_directories(target, touched)
        except FileNotFoundError:
            pass
        return [answers[entry.path] for entry in entries]

    def _prune(self, target: int, directory: str) -> None:
        """Remove directories that the removal left empty."""
        for path in (directory, *paths.parents(directory)):
            *above, name = path.split("/")
            try:
                with opened(target, *above) as fd:
                    os.rmdir(name, dir_fd=fd)
            except OSError:
                return

    def _sync_directories(self, target: int, directories: Collection[str]) -> None:
        if len(directories) > _FEW:
            _posix.sync_file_system(target)
            return
        for directory in directories:
            try:
                with opened(target, *filter(None, directory.split("/"))) as fd:
                    os.fsync(fd)
            except FileNotFoundError:
                continue  # pruned: the directory above is synced as well

    def _sync(self, fd: int) -> None:
        if self._durable:
            os.fsync(fd)

    # --------------------------------------------------------------------------------------------------------- tree swap

    async def trees(self, tx: str) -> Trees:
        return await self._run(lambda: self._trees(tx), _lease(tx))

    def _trees(self, tx: str) -> Trees:
        with self._control("tx", tx, "tree", create=True) as fd:
            new = _identity(fd)
        try:
            with self._target() as fd:
                nested = _nested_control(fd, "")
                if nested is not None:
                    raise Conflict(
                        f"The target holds {nested!r}, the control area of another target, which a full_drop would carry away.",
                        retryable=False,
                    )
                return Trees(new, _identity(fd))
        except FileNotFoundError:
            return Trees(new, None)

    async def swap(self, tx: str, trees: Trees, old: str) -> Answer:
        return await self._run(lambda: self._swap(tx, trees, old), "lock")

    def _swap(self, tx: str, trees: Trees, old: str) -> Answer:
        site = self._site
        with opened(site.above) as above, self._control("tx", tx, create=True) as fd:
            target, staged = _identity_at(above, site.name), _identity_at(fd, "tree")
            if target == trees.new:
                self._put_aside(fd, staged, trees, old)
                return Answer.ALREADY
            if staged != trees.new:
                return Answer.LOST
            if target is None:
                if error := _posix.rename_new(fd, "tree", above, site.name):
                    if error == errno.EEXIST:
                        return Answer.FOREIGN
                    raise OSError(error, os.strerror(error), site.name)
            elif target != trees.target:
                return Answer.FOREIGN
            else:
                # The head's lock is held over the look above and this: a second exchange would undo the first.
                _posix.exchange(fd, "tree", above, site.name)
            self._sync(above)
            self._sync(fd)
            self._put_aside(fd, trees.target if target is not None else None, trees, old)
        return Answer.DONE

    def _put_aside(self, fd: int, staged: str | None, trees: Trees, old: str) -> None:
        if staged is None or staged != trees.target:
            return
        with self._control("old", create=True) as aside:
            if error := _posix.rename_new(fd, "tree", aside, old):
                raise OSError(error, os.strerror(error), old)

    async def trim(self, keep: int, older_than: float) -> int:
        return await self._run(lambda: self._trim(keep, older_than))

    def _trim(self, keep: int, older_than: float) -> int:
        removed = 0
        try:
            with self._control("old") as fd:
                names = sorted(os.listdir(fd))
                for name in names[: max(0, len(names) - keep)]:
                    try:
                        with opened(fd, name) as tree:
                            # Renaming it to here was its last change of status.
                            if older_than and self._now() - os.fstat(tree).st_ctime < older_than:
                                continue
                            fcntl.flock(tree, fcntl.LOCK_EX | fcntl.LOCK_NB)
                            _posix.clear_directory(tree)
                        os.rmdir(name, dir_fd=fd)
                        removed += 1
                    except (BlockingIOError, FileNotFoundError):
                        continue  # pinned by a reader, or removed by another process
        except FileNotFoundError:
            pass
        return removed


class _Writer:
    """Collects up to a mebibyte before it asks for a thread, so that a small file costs one hop."""

    def __init__(self, driver: LocalDriver, tx: str, path: str, number: str) -> None:
        self._driver, self._tx, self._path, self._number = driver, tx, path, number
        self._buffer = bytearray()
        self._file = -1
        self._busy = threading.Lock()

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        if len(self._buffer) + len(data) <= _BUFFER:
            self._buffer += data
            return
        buffered, self._buffer = self._buffer, bytearray()
        await self._driver._run(lambda: self._flush(buffered, data), _lease(self._tx))

    def _flush(self, *chunks: bytes | bytearray | memoryview) -> None:
        with self._busy:
            if self._file < 0:
                with self._driver._control("tx", self._tx, "part", create=True) as fd:
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                    self._file = os.open(self._number, flags, 0o666, dir_fd=fd)
            for chunk in chunks:
                view = memoryview(chunk)
                while view:
                    view = view[os.write(self._file, view) :]

    async def close(self) -> Entry:
        return await self._driver._run(self._finish, _lease(self._tx))

    def _finish(self) -> Entry:
        self._flush(self._buffer)
        with self._busy, self._driver._control("tx", self._tx) as fd:
            *above, name = self._path.split("/")
            with opened(fd, "part") as part, opened(fd, "tree", *above, create=True) as tree:
                os.rename(self._number, name, src_dir_fd=part, dst_dir_fd=tree)
            seen = os.fstat(self._file)
            os.close(self._file)
            self._file = -1
        return Entry(self._path, seen.st_size, file_identity(seen), self._path)

    async def abort(self) -> None:
        await self._driver._run(self._undo)

    def _undo(self) -> None:
        with self._busy:
            if self._file >= 0:
                os.close(self._file)
                self._file = -1
            try:
                with self._driver._control("tx", self._tx, "part") as fd:
                    _unlink(fd, self._number)
            except FileNotFoundError:
                pass


class _Held:
    """A lock that this process holds; released once."""

    def __init__(self, held: dict[str, CountedLock], key: str, lock: CountedLock) -> None:
        self._held, self._key, self._lock = held, key, lock

    def release(self) -> None:
        if self._held.get(self._key) is self._lock:
            del self._held[self._key]
        self._lock.release()


# ---------------------------------------------------------------------------------------------------------------- helpers


def _absolute(path: str) -> str:
    """Made absolute when the store is opened; links are resolved on first use, in a thread."""
    return path.rstrip("/") or "/" if path.startswith("/") else os.path.join(os.getcwd(), path.rstrip("/"))


def _lease(tx: str) -> str:
    return f"tx/{tx}/lease"


def _mapped(error: OSError) -> StagedError:
    """An error of the operating system, mapped once; what was applied is not known."""
    passing = error.errno in (errno.EINTR, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.ESTALE)
    return StorageError(f"{error.strerror or error}: {error.filename!r}.", retryable=passing)


def _is_swapped(key: str) -> bool:
    """Whether a key is of a record that is swapped in place, not of a segment that is written once."""
    return key == "head" or key.endswith("/record")


def _lock_file(fd: int, name: str) -> int:
    return os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=fd)


def _exists(fd: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _unlink(fd: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=fd)
    except FileNotFoundError:
        pass


def _remove_tree(fd: int, name: str) -> None:
    with opened(fd, name) as below:
        _posix.clear_directory(below)
    os.rmdir(name, dir_fd=fd)


def _identity(fd: int) -> str:
    return _posix.birth_identity(fd) or ""


def _identity_at(fd: int, name: str) -> str | None:
    """The identity of a directory; None where there is none; a file or a link is a stranger."""
    try:
        with opened(fd, name) as below:
            return _identity(below)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            return "not a directory"
        raise


def _walk(
    fd: int, directories: list[str], skip: str | None = None, at: str = ""
) -> Iterator[tuple[str, os.stat_result]]:
    """Every file below a directory with its status; directories are added to a list. No link is followed."""
    with os.scandir(fd) as entries:
        found = list(entries)
    for entry in found:
        path = f"{at}{entry.name}"
        if path == skip:
            continue
        try:
            if not entry.is_dir(follow_symlinks=False):
                yield path, entry.stat(follow_symlinks=False)
                continue
            directories.append(path)
            with opened(fd, entry.name) as below:
                yield from _walk(below, directories, skip, f"{path}/")
        except FileNotFoundError:
            continue  # gone since it was listed


def _by_directory(items: Iterable[T], path: Callable[[T], str]) -> list[tuple[str, list[T]]]:
    groups: dict[str, list[T]] = {}
    for item in items:
        groups.setdefault(path(item).rpartition("/")[0], []).append(item)
    return sorted(groups.items())


def _move_new(tree: int, target: int, directories: list[str], touched: set[str]) -> set[str]:
    """Move whole staged directories that the target does not have yet; the directories whose files came along."""
    moved: set[str] = set()
    whole: set[str] = set()
    for directory in directories:
        if not directory:
            continue
        above = [*reversed(paths.parents(directory)), directory]
        if any(path in whole for path in above):
            moved.add(directory)
            continue
        for path in above:
            *up, name = path.split("/")
            try:
                with opened(tree, *up) as source, opened(target, *up) as goal:
                    error = _posix.rename_new(source, name, goal, name)
            except OSError:
                break  # gone from the staging, or a file is in the way: entry by entry
            if error == 0:
                whole.add(path)
                touched.update(("/".join(up), path))
                moved.add(directory)
            if error != errno.EEXIST:
                break
    return moved


def _publish_into(
    tree: int | None, target: int, directory: str, group: list[Entry], replaces: Mapping[str, str]
) -> dict[str, Answer]:
    parts = list(filter(None, directory.split("/")))
    with ExitStack() as stack:
        source: int | None = None
        if tree is not None:
            try:
                source = stack.enter_context(opened(tree, *parts))
            except FileNotFoundError:
                pass
        try:
            goal = stack.enter_context(opened(target, *parts, create=source is not None))
        except FileNotFoundError:
            return {entry.path: Answer.LOST for entry in group}
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            return {entry.path: Answer.FOREIGN for entry in group}
        return {entry.path: _publish_one(source, goal, entry, replaces.get(entry.path)) for entry in group}


def _publish_one(source: int | None, goal: int, entry: Entry, expected: str | None) -> Answer:
    name = entry.path.rpartition("/")[2]
    if source is not None:
        here = _look(goal, name) if expected is not None else None
        if here is None:
            error = _posix.rename_new(source, name, goal, name)
            if error == 0:
                return Answer.DONE
            if error not in (errno.ENOENT, errno.EEXIST):
                raise OSError(error, os.strerror(error), entry.path)
        elif here == expected:
            try:
                os.rename(name, name, src_dir_fd=source, dst_dir_fd=goal)
                return Answer.DONE
            except FileNotFoundError:
                pass
        if _exists(source, name):
            return Answer.FOREIGN
    return Answer.ALREADY if _look(goal, name) == entry.identity else Answer.LOST


def _look(fd: int, name: str) -> str | None:
    try:
        return file_identity(os.stat(name, dir_fd=fd, follow_symlinks=False))
    except FileNotFoundError:
        return None


def _remove_one(fd: int, entry: Listed) -> Answer:
    name = entry.path.rpartition("/")[2]
    here = _look(fd, name)
    if here is None:
        return Answer.ALREADY
    if here != entry.identity:
        return Answer.FOREIGN
    _unlink(fd, name)
    return Answer.DONE


def _nested_control(fd: int, at: str) -> str | None:
    """The path of a control area below a directory. One without subdirectories, as its link count tells, is not listed."""
    if os.fstat(fd).st_nlink == 2:
        return None
    with os.scandir(fd) as entries:
        below = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    if RESERVED in below:
        return f"{at}{RESERVED}"
    for name in below:
        with opened(fd, name) as deeper:
            if (found := _nested_control(deeper, f"{at}{name}/")) is not None:
                return found
    return None
