"""Readers that never straddle two generations of a local target."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from staged.urls import local_path

__all__ = ["pinned"]


@contextmanager
def pinned(path: str | os.PathLike[str]) -> Iterator[str]:
    """The directory at a path as it is now, for a reader of this process that must never straddle two generations.

    Yields a path (`/proc/self/fd/…`) to list and open files below, which means nothing to another process. It goes on
    meaning the same tree while commits swap the target, and the tree is not removed while it is pinned. Only a `full_drop`
    that swaps trees makes generations; other modes change the tree in place. Linux.

    Args:
        path: Named as for `open_store`: `/lake/flights`, `~/flights`, `file:///lake/flights`.

    Raises:
        InvalidInput: It is the URL of another store.
        FileNotFoundError: There is no such directory.
    """
    import fcntl  # not on every platform that can import this package

    path = local_path(path)
    while True:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            # Between open and lock it may have been swapped out, and then removed.
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                yield f"/proc/self/fd/{fd}"
                return
        finally:
            os.close(fd)
