"""A small record that is replaced in place, in one of four slots of a file.

A slot is a line and a body: `slot <sequence> <length> <sha256>\n`. A reader takes the valid slot with the highest sequence.
Two slots take by turns what must be durable, and the other two what need not be: whatever a torn write destroys, it is never
the last one that was durable. Writing in place needs no commit of the file system's journal: on ext4 that is an order of
magnitude faster than a new file renamed over the old.

Writers exclude each other by a lock of their own; readers need none.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence

from staged.errors import StorageError

__all__ = ["current", "durable", "read", "token", "was_durable", "write"]

SLOT = 128 * 1024
"""Bytes from one slot to the next; the file is sparse."""
_DURABLE, _PASSING = (0, 1), (2, 3)
_LINE = 128
_BLOCK = 4096
_DIGITS = 18
_MAGIC = b"slot "

Slots = Sequence[tuple[int, bytes]]
"""The sequence and body of each slot; 0 and empty where it was not written, or cannot be read."""


def token(body: bytes) -> str:
    """What identifies a body: bodies carry a nonce, so that no two are equal."""
    return hashlib.sha256(body).hexdigest()


def read(file: int) -> Slots:
    """All slots."""
    return [_slot(file, number * SLOT) for number in (*_DURABLE, *_PASSING)]


def current(slots: Slots) -> bytes:
    """The body that counts; empty where there is none."""
    return max(slots)[1]


def durable(slots: Slots) -> bytes:
    """The last body that was written to be durable; empty where there is none yet."""
    return max(slots[number] for number in _DURABLE)[1]


def was_durable(file: int) -> bool:
    """Whether a body was ever written to be durable, be it readable now or not.

    Where none was, and none can be read, a loss of power took the first writes back: there is no record.
    """
    return any(any(os.pread(file, _LINE, number * SLOT)) for number in _DURABLE)


def write(file: int, body: bytes, slots: Slots, *, durable: bool) -> None:
    """Write a body as the current one; not durable before the file is synced.

    Args:
        slots: What was read.
        durable: It must survive a loss of power. One that is readable without it must be on the disk already: the caller
            sees to that. The first of all is written as one that need not, since none is.
    """
    sequence, found = max(slots)
    line = _MAGIC + f"{sequence + 1} {len(body)} {token(body)}\n".encode()
    if len(body) > SLOT - _LINE:
        raise StorageError(f"A record of {len(body)} bytes is too large.")
    data = line.ljust(_LINE, b" ") + body
    if not found:
        # Room for what may follow, such as the end of a transaction that filled the disk.
        for number in (*_DURABLE, *_PASSING):
            os.posix_fallocate(file, number * SLOT, len(data) + 1024)
    _, number = min((slots[number][0], number) for number in (_DURABLE if durable and found else _PASSING))
    if os.pwrite(file, data, number * SLOT) != len(data):
        raise StorageError("A record could not be written whole: the disk may be full.")


def _slot(file: int, at: int) -> tuple[int, bytes]:
    head = os.pread(file, _BLOCK, at)
    words = head[:_LINE].split()
    if len(words) != 4 or not head.startswith(_MAGIC) or not words[1].isdigit() or not words[2].isdigit():
        return 0, b""
    if len(words[1]) > _DIGITS:
        return 0, b""  # the line of its successor could outgrow its place
    length = int(words[2])
    body = head[_LINE : _LINE + length]
    if len(body) < length <= SLOT:
        body += os.pread(file, length - len(body), at + len(head))
    return (int(words[1]), body) if token(body).encode() == words[3] else (0, b"")
