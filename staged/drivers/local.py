"""A directory on a local disk. Linux: renameat2, open-file-description locks, syncfs.

    <parent>/_staged/<name>/          the control area, 0700, on the target's file system
        head  ledger-…  outcome/…  log/…  tx/<id>/record
        lock                          held over a commit
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
import re
import stat
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Literal, TypeVar

from anyio import to_thread

from staged import paths
from staged.driver import Alive, Driver, LogHandle, Record, idle
from staged.drivers import _posix
from staged.drivers._area import ControlArea, exists, remove_tree, unlink
from staged.drivers._posix import FILE, CountedLock, file_identity, opened
from staged.drivers._trees import (
    by_directory,
    identity,
    identity_at,
    move_new,
    nested_control,
    publish_into,
    remove_one,
    status_of,
    walk,
)
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
_OLD = re.compile(r"[0-9]{16}-[0-9a-f]{24}")


@dataclass(frozen=True, slots=True)
class _Site:
    """Where things are, found once: the target is `name` in `above`."""

    above: str
    name: str
    area: ControlArea

    @property
    def inside(self) -> bool:
        """The control area lies in the target."""
        return self.area.parts == (RESERVED, RESERVED)


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
        self._numbers = itertools.count()

    def child(self, path: str) -> LocalDriver:
        if self._staging is not None:
            # Nothing in the target would tell that there is one below, and a commit would carry it away.
            raise Unsupported("A store whose staging lies elsewhere has no children; open it without staging=.")
        durability: Literal["full", "none"] = "full" if self._durable else "none"
        return LocalDriver(os.path.join(self.url, path), durability=durability)

    async def _run(self, work: Callable[[], T], *locks: str | CountedLock | None) -> T:
        """Run work in a thread, under these locks, or those of these names as far as this process holds them now."""
        found = (self._held.get(lock) if isinstance(lock, str) else lock for lock in locks)
        held = [lock for lock in found if lock is not None]

        def run() -> T:
            with ExitStack() as stack:
                for lock in held:
                    stack.enter_context(lock.work())
                try:
                    return work()
                except OSError as error:
                    raise self._mapped(error) from error

        return await to_thread.run_sync(run, abandon_on_cancel=True)

    def _mapped(self, error: OSError) -> StagedError:
        """An error of the operating system, mapped once; what was applied is not known."""
        passing = error.errno in (errno.EINTR, errno.EAGAIN, errno.EBUSY, errno.ETIMEDOUT, errno.ESTALE)
        at = f" at {error.filename!r}" if isinstance(error.filename, str) else ""  # a descriptor tells nobody anything
        return StorageError(f"{self.url}: {error.strerror or error}{at}.", retryable=passing)

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
        if not name:
            raise Unsupported("The root directory cannot be a target.")
        if RESERVED in target.split("/"):
            raise Unsupported(f"{self.url!r} lies in a control area.")
        for path in (target, above):
            if os.path.lexists(path) and not os.path.isdir(path):
                raise Unsupported(f"{self.url!r} cannot be a target: {path!r} is a file, not a directory.")
        root, parts = self._choose(target, above, name)
        return _Site(above, name, ControlArea(root, parts, durable=self._durable))

    def _choose(self, target: str, above: str, name: str) -> tuple[str, tuple[str, ...]]:
        """The control area that is there; else beside the target, or in it where the parent cannot hold it."""
        if self._staging is not None:
            if os.path.commonpath([os.path.realpath(self._staging), target]) == target:
                raise InvalidInput(f"staging={self._staging!r} lies in the target, which a full_drop replaces.")
            return self._staging, (RESERVED, f"{name}-{hashlib.sha256(target.encode()).hexdigest()[:16]}")
        beside, inside = (RESERVED, name), (RESERVED, RESERVED)
        # One that is there is the only one, even for a user whom it shuts out: two heads would serialise nothing.
        is_beside = os.path.lexists(os.path.join(above, *beside))
        is_inside = os.path.lexists(os.path.join(target, *inside))
        mounted = _is_mounted(target, above)
        if is_beside and (is_inside or mounted):
            raise Unsupported(
                f"{self.url!r} has a control area beside it, {os.path.join(above, *beside)!r}, though "
                f"{'it is a mount point' if mounted else 'another lies in it'}: for some writers it is a mount point, and "
                "for others it is or was a directory. Let all see it alike, and remove the control area that is not used, "
                "while nobody writes."
            )
        closed = os.path.isdir(above) and not os.access(above, os.W_OK | os.X_OK)
        if is_inside or mounted or (closed and not is_beside):
            return target, inside
        return above, beside

    def _probe(self) -> Capabilities:
        """Make the control area, and try there what the file system can do."""
        with self._finding:
            self._found = self._find()  # anew: the area may have been made elsewhere since somebody only looked
        site = self._site
        root = site.area.root
        self._make_directory(site.above)
        self._make_directory(root)
        mounted = _is_mounted(os.path.join(site.above, site.name), site.above)
        home = os.path.join(site.above, site.name) if mounted else site.above
        if _is_mounted(root, home):
            raise Unsupported(
                f"staging={self._staging!r} is on another file system, or another mount, than {self.url!r}."
            )
        try:
            with site.area.opened(create=True) as fd:
                os.fchmod(fd, 0o700)
                swaps, folds = self._try(fd)
        except PermissionError as error:
            raise Unsupported(
                f"{self.url!r} cannot be written: its control area is closed to this user ({error})."
            ) from error
        for parts in ((), site.area.parts[:-1]):
            with opened(root, *parts) as fd:
                self._sync(fd)
        always: list[Guarantee] = ["serialised", "fenced", "no_gap"]
        guarantees = dict.fromkeys(Mode, frozenset(always))
        if swaps := swaps and not site.inside and not mounted:
            guarantees[Mode.FULL_DROP] = frozenset([*always, "one_generation"])
        self._folds = folds
        return Capabilities(fence="lock", swaps_trees=swaps, folds=folds, guarantees=guarantees)

    def _make_directory(self, path: str) -> None:
        """Make a directory and those above it, each synced into the one above: what is in it is no safer than its name."""
        if os.path.isdir(path):
            return
        above = os.path.realpath(os.path.dirname(path))
        self._make_directory(above)
        os.makedirs(path, exist_ok=True)
        with opened(above) as fd:
            self._sync(fd)

    def _try(self, control: int) -> tuple[bool, bool]:
        """Whether trees can be exchanged and recognised, and whether names are folded."""
        swaps = not _posix.is_overlay(control) and _posix.birth_identity(control) is not None
        with opened(control, "probe", create=True) as fd:
            # Whoever else tries the same has the same result: what is there already is as good.
            for directory in ("a", "B"):
                with suppress(FileExistsError):
                    os.mkdir(directory, dir_fd=fd)
            try:
                _posix.exchange(fd, "a", fd, "B")
            except OSError:
                swaps = False
            return swaps, exists(fd, "b")

    @contextmanager
    def _target(self, *parts: str) -> Iterator[int]:
        site = self._site
        with opened(site.above, site.name, *parts) as fd:
            yield fd

    def _check_target(self) -> None:
        """What a plan is made from is the directory that was found, or none; nothing can be published over what is not one."""
        try:
            with self._target():
                pass
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            raise Conflict(
                f"{self.url!r} is no longer a directory: a file or a link took its place.", retryable=False
            ) from error

    async def probe(self) -> Capabilities:
        return await self._run(self._probe)

    # ------------------------------------------------------------------------------------------------ the control area

    async def read(self, key: str) -> Record | None:
        return await self._run(lambda: self._site.area.read(key))

    async def cas(self, key: str, body: bytes, token: str | None, *, durable: bool) -> str | None:
        locks = ["lock"] if key == "head" else []
        return await self._run(lambda: self._site.area.cas(key, body, token, durable=durable), *locks)

    async def put_segment(self, key: str, body: bytes) -> bool:
        return await self._run(lambda: self._site.area.put_segment(key, body))

    async def list_control(self, prefix: str) -> Sequence[str]:
        return await self._run(lambda: self._site.area.list(prefix))

    async def delete_control(self, keys: Sequence[str]) -> None:
        await self._run(lambda: self._site.area.delete(keys))

    async def age(self, key: str) -> float | None:
        return await self._run(lambda: self._site.area.age(key))

    async def lock(self, key: str) -> _Held | None:
        handover = threading.Lock()
        taken: list[CountedLock] = []
        abandoned = False

        def take() -> None:
            lock = self._site.area.lock(key)
            with handover:
                if lock is not None and abandoned:
                    lock.release()
                elif lock is not None:
                    taken.append(lock)

        try:
            await self._run(take)
        except BaseException:
            # The thread may still be taking it: then it gives it back itself.
            with handover:
                abandoned = True
            for lock in taken:
                lock.release()
            raise
        if not taken:
            return None
        self._held[key] = taken[0]
        return _Held(self._held, key, taken[0])

    # ----------------------------------------------------------------------------------------------------------- staging

    async def stage(self, tx: str, path: str, log: LogHandle) -> _Writer:
        return _Writer(self, tx, path, f"{next(self._numbers)}")

    async def seal(self, tx: str, entries: Collection[Entry]) -> None:
        lease = self._held.get(_lease(tx))

        def seal() -> None:
            if lease is not None:
                lease.wait_idle()  # a write whose caller was cancelled may still land
            self._seal(tx, {entry.path: entry for entry in entries})

        await self._run(seal)

    def _seal(self, tx: str, recorded: dict[str, Entry]) -> None:
        directories: list[str] = []
        with self._site.area.opened("tx", tx, "tree", create=True) as tree:
            seen = 0
            for path, found in walk(tree, directories):
                entry = recorded.get(path)
                if entry is None:
                    raise StagingError(f"{path!r} lies in the staging but was not staged.")
                if (found.st_size, file_identity(found)) != (entry.size, entry.identity):
                    raise StagingError(f"{path!r} changed after it was staged.")
                seen += 1
            if seen != len(recorded):
                raise StagingError("A staged file is gone.")
            self._check_places(tree, directories)
            self._take_after_target(tree)
            try:
                self._sync_staged(tx, tree, recorded, directories)
            except OSError as error:
                # A sync that failed tells nothing when it is repeated: the files must be written anew.
                raise StagingError(f"The staged files could not be made durable: {error}.") from error

    def _sync_staged(self, tx: str, tree: int, recorded: Collection[str], directories: Collection[str]) -> None:
        if not self._durable:
            return
        if len(recorded) + len(directories) > _FEW:
            _posix.sync_file_system(tree)
            return
        for path in recorded:
            *above, name = path.split("/")
            with opened(tree, *above) as fd:
                file = os.open(name, FILE, dir_fd=fd)
                try:
                    os.fsync(file)
                finally:
                    os.close(file)
        for directory in ("", *directories):
            with opened(tree, *filter(None, directory.split("/"))) as fd:
                os.fsync(fd)
        self._site.area.sync_directories([f"tx/{tx}"])

    def _take_after_target(self, tree: int) -> None:
        """Give the staged tree the target's mode, owner and extended attributes: an exchange carries them along."""
        with ExitStack() as stack:
            try:
                target = stack.enter_context(self._target())
            except FileNotFoundError:
                return
            model = os.fstat(target)
            for owner, group in ((model.st_uid, -1), (-1, model.st_gid)):
                with suppress(PermissionError):  # an owner that we may not give away stays ours
                    os.fchown(tree, owner, group)
            os.fchmod(tree, stat.S_IMODE(model.st_mode))
            try:
                for name in os.listxattr(target):
                    with suppress(PermissionError):
                        os.setxattr(tree, name, os.getxattr(target, name))
            except OSError as error:
                if error.errno != errno.ENOTSUP:
                    raise

    def _check_places(self, tree: int, directories: Collection[str]) -> None:
        """Refuse before the decision what the target's directories would refuse after it."""
        site, mount = self._site, _posix.mount_of(tree)
        for parts in ((), (site.name,), *((site.name, *path.split("/")) for path in directories)):
            try:
                with opened(site.above, *parts) as fd:
                    writable = os.access(".", os.W_OK | os.X_OK, dir_fd=fd)
                    apart = bool(parts) and _posix.mount_of(fd) != mount
            except OSError:
                continue  # not there, or in the way: the plan sees to that
            if apart:
                raise StagingError(
                    f"{'/'.join((site.above, *parts))!r} is mounted apart from the control area: nothing can be moved there."
                )
            if not writable and (parts or not site.inside):
                raise StagingError(f"{'/'.join((site.above, *parts))!r} cannot be written.")

    async def discard(self, tx: str, handles: Collection[str], *, whole: bool) -> None:
        await self._run(lambda: self._discard(tx, handles, whole), *([] if whole else [_lease(tx)]))

    def _discard(self, tx: str, handles: Collection[str], whole: bool) -> None:
        if whole and (lease := self._held.get(_lease(tx))) is not None:
            lease.drain()  # a thread that outlived its caller may still be writing here
        try:
            with self._site.area.opened("tx", tx) as fd:
                if whole:
                    for name in os.listdir(fd):
                        if name in _STAGING or name.startswith("scratch-"):
                            remove_tree(fd, name)
                    return
                for handle in map(paths.parse, handles):
                    *above, name = handle.split("/")
                    with opened(fd, "tree", *above) as directory:
                        unlink(directory, name)
        except FileNotFoundError:
            pass

    async def scratch(self, tx: str) -> str | None:
        return await self._run(lambda: self._scratch(tx), _lease(tx))

    def _scratch(self, tx: str) -> str:
        name = f"scratch-{next(self._numbers)}"
        with self._site.area.opened("tx", tx, create=True) as fd:
            os.mkdir(name, dir_fd=fd)
        area = self._site.area
        return os.path.join(area.root, *area.parts, "tx", tx, name)

    async def adopt(self, tx: str, root: str, paths: Sequence[str]) -> Sequence[Entry]:
        return await self._run(lambda: self._adopt(tx, os.path.basename(root), paths), _lease(tx))

    def _adopt(self, tx: str, scratch: str, found: Sequence[str]) -> Sequence[Entry]:
        with self._site.area.opened("tx", tx) as fd, opened(fd, scratch) as source:
            seen = {path: status_of(source, path) for path in found}
            for path, status in seen.items():
                if status is None or not stat.S_ISREG(status.st_mode):
                    raise StagingError(f"{path!r} is not a regular file.")
            grouped = by_directory(found, str)
            with opened(fd, "tree", create=True) as tree:
                self._check_fits(tree, grouped)
            for directory, group in grouped:
                parts = list(filter(None, directory.split("/")))
                with opened(source, *parts) as below, opened(fd, "tree", *parts, create=True) as tree:
                    for path in group:
                        name = path.rpartition("/")[2]
                        os.rename(name, name, src_dir_fd=below, dst_dir_fd=tree)
            return [Entry(path, status.st_size, file_identity(status), path) for path, status in seen.items() if status]

    @staticmethod
    def _check_fits(tree: int, grouped: Sequence[tuple[str, Sequence[str]]]) -> None:
        """Refuse, before anything is moved, what would be a file and a directory at once."""
        for directory, group in grouped:
            try:
                with opened(tree, *filter(None, directory.split("/"))) as fd:
                    for path in group:
                        here = status_of(fd, path.rpartition("/")[2])
                        if here is not None and stat.S_ISDIR(here.st_mode):
                            raise StagingError(f"{path!r} is a directory of what is staged already.")
            except FileNotFoundError:
                continue
            except NotADirectoryError as error:
                raise StagingError(f"{directory!r} lies below a file that is staged already.") from error

    # -------------------------------------------------------------------------------------------------------- the target

    async def list(
        self, prefix: str = "", names: Collection[str] | None = None
    ) -> AsyncGenerator[Sequence[Listed], None]:
        def look() -> Sequence[Listed]:
            self._check_target()
            return self._list(prefix) if names is None else self._look_up(names)

        yield await self._run(look)

    def _list(self, prefix: str) -> Sequence[Listed]:
        directories: list[str] = []
        found: list[Listed] = []
        try:
            with self._target(*filter(None, prefix.split("/"))) as fd:
                own = f"{RESERVED}/{RESERVED}" if self._site.inside and not prefix else None
                for path, seen in walk(fd, directories, own):
                    found.append(Listed(paths.join(prefix, path), seen.st_size, file_identity(seen)))
                if own is not None and RESERVED in directories:
                    directories.remove(RESERVED)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return found + [Listed(paths.join(prefix, path), 0, "", is_dir=True) for path in directories]

    def _look_up(self, names: Collection[str]) -> Sequence[Listed]:
        found: list[Listed] = []
        for directory, group in by_directory(names, lambda name: name):
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
                tree = stack.enter_context(self._site.area.opened("tx", tx, "tree"))
            except FileNotFoundError:
                tree = None
            grouped = by_directory(entries, lambda entry: entry.path)
            moved = set() if tree is None else move_new(tree, target, [directory for directory, _ in grouped], touched)
            for directory, group in grouped:
                if directory in moved:
                    answers.update((entry.path, Answer.DONE) for entry in group)
                else:
                    answers.update(publish_into(tree, target, directory, group, replaces))
                    touched.add(directory)
            with opened(site.above) as fd:
                self._sync(fd)
            self._sync_directories(target, touched)
        return [answers[entry.path] for entry in entries]

    async def remove(self, entries: Sequence[Listed]) -> Sequence[Answer]:
        return await self._run(lambda: self._remove(entries), "lock")

    def _remove(self, entries: Sequence[Listed]) -> Sequence[Answer]:
        answers: dict[str, Answer] = {}
        touched: set[str] = set()
        for directory, group in by_directory(entries, lambda entry: entry.path):
            try:
                with self._target(*filter(None, directory.split("/"))) as fd:
                    for entry in group:
                        answers[entry.path] = remove_one(fd, entry)
                touched.add(directory)
            except (FileNotFoundError, NotADirectoryError):
                answers.update((entry.path, Answer.ALREADY) for entry in group)
                touched.add(directory)  # who pruned it may have died before the directory above was synced
        try:
            with self._target() as target:
                for directory in sorted(touched - {""}, key=lambda path: -path.count("/")):
                    self._prune(target, directory)
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
        """Sync directories of the target and all above them: one may be new, or pruned.

        From the top down: what was moved into a new directory is never on the disk before that directory's name is.
        """
        if not self._durable:
            return
        above = {"", *directories, *(path for directory in directories for path in paths.parents(directory))}
        if len(above) > _FEW:
            _posix.sync_file_system(target)
            return
        for directory in sorted(above, key=len):
            try:
                with opened(target, *filter(None, directory.split("/"))) as fd:
                    os.fsync(fd)
            except FileNotFoundError:
                continue  # pruned: the directory above is synced as well

    def _sync(self, fd: int) -> None:
        if self._durable:
            os.fsync(fd)

    # --------------------------------------------------------------------------------------------------------- tree swap

    async def trees(self, tx: str, alive: Alive = idle) -> Trees:
        return await self._run(lambda: self._trees(tx), _lease(tx))

    def _trees(self, tx: str) -> Trees:
        self._check_target()
        site = self._site
        with site.area.opened("tx", tx, "tree", create=True) as fd:
            new = identity(fd)
        try:
            with opened(site.above) as above, self._target() as fd:
                if not _posix.may_rename(os.fstat(above), os.fstat(fd)):
                    raise StagingError(
                        f"{self.url!r} is another user's, in a directory whose sticky bit lets nobody else move it aside."
                    )
                if (nested := nested_control(fd, "")) is not None:
                    raise Conflict.covering(nested)
                return Trees(new, identity(fd))
        except FileNotFoundError:
            return Trees(new, None)

    async def swap(self, tx: str, trees: Trees, old: str, alive: Alive = idle) -> Answer:
        return await self._run(lambda: self._swap(tx, trees, old), "lock")

    def _swap(self, tx: str, trees: Trees, old: str) -> Answer:
        site = self._site
        with opened(site.above) as above, self._site.area.opened("tx", tx, create=True) as fd:
            target, staged = identity_at(above, site.name), identity_at(fd, "tree")
            if target == trees.new:
                self._sync(above)
                self._put_aside(fd, staged, trees, old)
                self._sync(fd)
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
                with self._target() as now:
                    if nested_control(now, "") is not None:
                        return Answer.FOREIGN  # another target was begun below since the plan was made
                try:
                    # The head's lock is held over the look above and this: a second exchange would undo the first.
                    _posix.exchange(fd, "tree", above, site.name)
                except OSError as error:
                    if error.errno in (errno.EXDEV, errno.EBUSY):
                        return Answer.FOREIGN  # something is mounted there
                    raise
            self._sync(above)
            self._sync(fd)
            self._put_aside(fd, trees.target if target is not None else None, trees, old)
        return Answer.DONE

    def _put_aside(self, fd: int, staged: str | None, trees: Trees, old: str) -> None:
        if staged is None or staged != trees.target:
            return
        with self._site.area.opened("old", create=True) as aside:
            if error := _posix.rename_new(fd, "tree", aside, old):
                raise OSError(error, os.strerror(error), old)

    async def trim(self, keep: int, older_than: float) -> int:
        return await self._run(lambda: self._trim(keep, older_than))

    def _trim(self, keep: int, older_than: float) -> int:
        removed = 0
        if keep == 0:
            self._site.area.sweep()
        try:
            with self._site.area.opened("old") as fd:
                names = sorted(filter(_OLD.fullmatch, os.listdir(fd)))
                for name in names[: max(0, len(names) - keep)]:
                    try:
                        with opened(fd, name) as tree:
                            # Renaming it to here was its last change of status.
                            if older_than and self._site.area.now() - os.fstat(tree).st_ctime < older_than:
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
        # The lease as it is now: once it is released nothing of this writer lands any more.
        self._lease = driver._held.get(_lease(tx))
        self._buffer = bytearray()
        self._file = -1
        self._busy = threading.Lock()
        self._given_up = self._placed = False

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        if len(self._buffer) + memoryview(data).nbytes <= _BUFFER:
            self._buffer += data
            return
        buffered, self._buffer = self._buffer, bytearray()
        await self._driver._run(lambda: self._flush(buffered, data), self._lease)

    def _flush(self, *chunks: bytes | bytearray | memoryview) -> None:
        with self._busy:
            if self._given_up:
                raise StorageError(f"The write of {self._path!r} was given up.")
            if self._file < 0:
                with self._driver._site.area.opened("tx", self._tx, "part", create=True) as fd:
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                    self._file = os.open(self._number, flags, 0o666, dir_fd=fd)
            for chunk in chunks:
                view = memoryview(chunk).cast("B")
                while view:
                    view = view[os.write(self._file, view) :]

    async def close(self) -> Entry:
        try:
            return await self._driver._run(self._finish, self._lease)
        except BaseException:
            self._given_up = True  # the thread may not have come that far
            raise

    def _finish(self) -> Entry:
        self._flush(self._buffer)
        with self._busy, self._driver._site.area.opened("tx", self._tx) as fd:
            *above, name = self._path.split("/")
            with opened(fd, "part") as part, opened(fd, "tree", *above, create=True) as tree:
                if self._given_up:
                    raise StorageError(f"The write of {self._path!r} was given up.")
                os.rename(self._number, name, src_dir_fd=part, dst_dir_fd=tree)
                self._placed = True
            seen = os.fstat(self._file)
            os.close(self._file)
            self._file = -1
        return Entry(self._path, seen.st_size, file_identity(seen), self._path)

    async def abort(self) -> None:
        await self._driver._run(self._undo)

    def _undo(self) -> None:
        with self._busy:
            self._given_up = True  # a thread of a caller that was cancelled may come only now
            if self._file >= 0:
                os.close(self._file)
                self._file = -1
            *above, name = self._path.split("/")
            parts, file = (["tree", *above], name) if self._placed else (["part"], self._number)
            try:
                with self._driver._site.area.opened("tx", self._tx, *parts) as fd:
                    unlink(fd, file)
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
    path = os.path.expanduser(path)
    return path.rstrip("/") or "/" if path.startswith("/") else os.path.join(os.getcwd(), path.rstrip("/"))


def _lease(tx: str) -> str:
    return f"tx/{tx}/lease"


def _is_mounted(path: str, above: str) -> bool:
    """Whether two directories that exist lie on different mounts, so that nothing can be renamed from one to the other."""
    try:
        with opened(path) as fd, opened(above) as other:
            return _posix.mount_of(fd) != _posix.mount_of(other)
    except OSError:
        return False
