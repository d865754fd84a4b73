"""Trees of files by directory descriptors, from worker threads: walked, published, compared. No link is followed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import TypeVar

from staged import paths
from staged.drivers import _posix
from staged.drivers._area import exists, unlink
from staged.drivers._posix import file_identity, opened
from staged.model import Answer, Entry, Listed
from staged.paths import RESERVED

__all__ = [
    "by_directory",
    "identity",
    "identity_at",
    "look",
    "move_new",
    "nested_control",
    "publish_into",
    "remove_one",
    "status_of",
    "walk",
]

T = TypeVar("T")


def identity(fd: int) -> str:
    return _posix.birth_identity(fd) or ""


def identity_at(fd: int, name: str) -> str | None:
    """The identity of a directory; None where there is none; a file or a link is a stranger."""
    try:
        with opened(fd, name) as below:
            return identity(below)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            return "not a directory"
        raise


def walk(
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
                yield from walk(below, directories, skip, f"{path}/")
        except FileNotFoundError:
            continue  # gone since it was listed


def move_new(tree: int, target: int, directories: list[str], touched: set[str]) -> set[str]:
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
                touched.add("/".join(up))  # what is in it was synced when it was sealed
                moved.add(directory)
            if error != errno.EEXIST:
                break
    return moved


def publish_into(
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
        here = look(goal, name) if expected is not None else None
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
        if exists(source, name):
            if look(goal, name) != entry.identity:
                return Answer.FOREIGN
            unlink(source, name)  # a hard link stood in for the rename, and its process died before the second half
            return Answer.DONE
    return Answer.ALREADY if look(goal, name) == entry.identity else Answer.LOST


def look(fd: int, name: str) -> str | None:
    try:
        return file_identity(os.stat(name, dir_fd=fd, follow_symlinks=False))
    except FileNotFoundError:
        return None


def status_of(fd: int, path: str) -> os.stat_result | None:
    """The status of a file below a directory, no part of whose path is a link."""
    *above, name = path.split("/")
    try:
        with opened(fd, *above) as below:
            return os.stat(name, dir_fd=below, follow_symlinks=False)
    except OSError:
        return None


def remove_one(fd: int, entry: Listed) -> Answer:
    name = entry.path.rpartition("/")[2]
    here = look(fd, name)
    if here is None:
        return Answer.ALREADY
    if here != entry.identity:
        return Answer.FOREIGN
    unlink(fd, name)
    return Answer.DONE


def nested_control(fd: int, at: str) -> str | None:
    """The path of a control area below a directory. One without subdirectories, as its link count tells, is not listed."""
    if os.fstat(fd).st_nlink == 2:
        return None
    with os.scandir(fd) as entries:
        below = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    if RESERVED in below:
        return f"{at}{RESERVED}"
    for name in below:
        with opened(fd, name) as deeper:
            if (found := nested_control(deeper, f"{at}{name}/")) is not None:
                return found
    return None


def by_directory(items: Iterable[T], path: Callable[[T], str]) -> list[tuple[str, list[T]]]:
    groups: dict[str, list[T]] = {}
    for item in items:
        groups.setdefault(path(item).rpartition("/")[0], []).append(item)
    return sorted(groups.items())
