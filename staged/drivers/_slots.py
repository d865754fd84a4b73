"""A small record that is replaced in place, by turns in one of four slots of a file.

A slot is a line and a body: `slot <sequence> <length> <sha256>\n`. A write goes to the slot that is the oldest, so that a
torn one leaves the others; a reader takes the valid slot with the highest sequence. Writing in place needs no commit of the
file system's journal: on ext4 that is an order of magnitude faster than a new file renamed over the old.

Writers exclude each other by a lock of their own; readers need none.
"""

from __future__ import annotations

import hashlib
import os

from staged.errors import StorageError

__all__ = ["SLOTS", "current", "token", "write"]

SLOTS = 4
"""Writes after which the oldest is overwritten: until then a loss of power leaves an earlier one, synced or not."""
SLOT = 128 * 1024
"""Bytes from one slot to the next; the file is sparse."""
_LINE = 128
_MAGIC = b"slot "


def token(body: bytes) -> str:
    """What identifies a body: bodies carry a nonce, so that no two are equal."""
    return hashlib.sha256(body).hexdigest()


def current(file: int) -> tuple[int, bytes]:
    """How often the record was written, and its body; 0 and empty where it was not, or nothing of it can be read."""
    return max(_slot(file, number * SLOT) for number in range(SLOTS))


def write(file: int, body: bytes, sequence: int) -> None:
    """Write a body as the one of that sequence; not durable before the file is synced."""
    line = _MAGIC + f"{sequence} {len(body)} {token(body)}\n".encode()
    if len(body) > SLOT - _LINE:
        raise StorageError(f"A record of {len(body)} bytes is too large.")
    data = line.ljust(_LINE, b" ") + body
    if sequence == 1:
        # Room for what may follow, such as the end of a transaction that filled the disk.
        for number in range(SLOTS):
            os.posix_fallocate(file, number * SLOT, len(data) + 1024)
    if os.pwrite(file, data, sequence % SLOTS * SLOT) != len(data):
        raise StorageError("A record could not be written whole: the disk may be full.")


def _slot(file: int, at: int) -> tuple[int, bytes]:
    head = os.pread(file, 4096, at)
    words = head[:_LINE].split()
    if len(words) != 4 or not head.startswith(_MAGIC) or not words[1].isdigit() or not words[2].isdigit():
        return 0, b""
    length = int(words[2])
    body = head[_LINE : _LINE + length]
    if len(body) < length <= SLOT:
        body += os.pread(file, length - len(body), at + len(head))
    return (int(words[1]), body) if token(body).encode() == words[3] else (0, b"")
