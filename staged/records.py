"""Strict encoding of everything in the control area.

A record is one line of header and one of JSON:

    staged 1 head 0f4c…(sha256 of the second line)
    {"epoch":7,"state":"free",…}

Whoever reads one trusts nothing: the magic word, the version, the kind and the digest must be right, the JSON must have
exactly the declared fields in the written form, and every path in it passes the same parser as a user's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from staged import paths
from staged.errors import DamagedRecord, InvalidInput, StagedError
from staged.model import Entry, Head, Ledger, Listed, Outcome, PlanPart, Ref, TxRecord

__all__ = [
    "MAX_KEY",
    "MAX_META",
    "MAX_RECORD",
    "HandlesPart",
    "ManifestPart",
    "check_key",
    "check_meta",
    "decode",
    "digest_of",
    "encode",
    "is_id",
]

VERSION = 1
MAX_RECORD = 64 * 1024
"""Bytes of a record that is swapped; immutable segments may be larger."""
MAX_KEY = 256
"""Characters of a transaction's key."""
MAX_META = 16 * 1024
"""Bytes of the merged meta as JSON."""
MAX_DEPTH = 100
"""Levels of nesting in it, so that it can be read from any stack."""

_ID = re.compile(r"[0-9a-f]{24}")
_IDS = re.compile(rf"{_ID.pattern}(?:,{_ID.pattern})*")
_NUMBER = re.compile(rb"[1-9][0-9]{0,8}")


@dataclass(frozen=True, slots=True)
class ManifestPart:
    """One segment of what a transaction staged."""

    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class HandlesPart:
    """Handles made durable before their first byte, so that whoever cleans up can find what was orphaned."""

    handles: tuple[str, ...]


_KINDS: dict[type, str] = {
    Head: "head",
    Ledger: "ledger",
    TxRecord: "transaction",
    PlanPart: "plan",
    ManifestPart: "manifest",
    HandlesPart: "handles",
    Outcome: "outcome",
}

T = TypeVar("T")


def is_id(text: str) -> bool:
    """Whether this is a transaction's id: only what can be parsed is ever collected."""
    return _ID.fullmatch(text) is not None


def digest_of(bodies: list[bytes]) -> str:
    """One digest over the segments of a value, in order."""
    whole = hashlib.sha256()
    for body in bodies:
        whole.update(hashlib.sha256(body).digest())
    return whole.hexdigest()


def encode(value: object) -> bytes:
    """A record as bytes; raises `InvalidInput` where it names something that UTF-8 cannot carry."""
    try:
        text = msgspec.json.encode(value)
    except UnicodeEncodeError as error:
        raise InvalidInput(f"{error.object!r} cannot be recorded: its name is not UTF-8. Rename it.") from error
    return f"staged {VERSION} {_KINDS[type(value)]} {hashlib.sha256(text).hexdigest()}\n".encode() + text + b"\n"


def decode(kind: type[T], body: bytes, key: str) -> T:
    """A record from bytes.

    Args:
        kind: What it must be.
        body: Its bytes.
        key: Its name in the control area, for the message.

    Raises:
        DamagedRecord: It is damaged, of another kind, from a newer version, or holds what was never written.
    """
    header, newline, text = body.partition(b"\n")
    words = header.split(b" ")
    if not newline or len(words) != 4 or words[0] != b"staged" or not _NUMBER.fullmatch(words[1]):
        raise DamagedRecord(
            f"The control record {key!r} is not one of ours, or is truncated. Nothing was done with it."
        )
    if int(words[1]) > VERSION:
        raise DamagedRecord(
            f"The control record {key!r} has version {int(words[1])}; this is version {VERSION}. Upgrade `staged`."
        )
    if words[2].decode(errors="replace") != _KINDS[kind]:
        raise DamagedRecord(f"The control record {key!r} is of another kind: {words[2]!r}, not {_KINDS[kind]!r}.")
    if not text.endswith(b"\n") or hashlib.sha256(text[:-1]).hexdigest().encode() != words[3]:
        raise DamagedRecord(f"The control record {key!r} is damaged: its digest does not fit.")
    try:
        value = msgspec.json.decode(text[:-1], type=kind)
        # Written in exactly one form: an unknown, doubled or reordered field does not survive the way back.
        if msgspec.json.encode(value) != text[:-1]:
            raise DamagedRecord(f"The control record {key!r} is not in the form that it is written in.")
        _check(value)
    except (msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise DamagedRecord(f"The control record {key!r} cannot be decoded: {error}") from error
    except StagedError as error:
        if isinstance(error, DamagedRecord):
            raise
        raise DamagedRecord(f"The control record {key!r} names what cannot be: {error}") from error
    return value


def check_key(key: str | None) -> None:
    """Raise `InvalidInput` for a key that is empty, over 256 characters, or no UTF-8."""
    if key is not None and not (isinstance(key, str) and 0 < len(key) <= MAX_KEY and _is_text(key)):
        raise InvalidInput(f"A key has 1 to {MAX_KEY} characters that can be written as UTF-8.")


def check_meta(meta: dict[str, object]) -> None:
    """Raise `InvalidInput` for a meta that JSON cannot carry as it is, or that is over 16 KiB."""
    if not isinstance(meta, dict) or not all(isinstance(name, str) for name in meta):
        raise InvalidInput("The meta is a dict with str for keys.")
    if _depth(meta) > MAX_DEPTH:
        raise InvalidInput(f"The meta is nested more than {MAX_DEPTH} levels deep.")
    try:
        text = msgspec.json.encode(meta)
        same = msgspec.json.decode(text) == meta
    except (TypeError, ValueError, msgspec.MsgspecError, RecursionError) as error:
        raise InvalidInput(f"The meta cannot be written as JSON: {error}") from error
    if len(text) > MAX_META:
        raise InvalidInput(f"The meta has {len(text)} bytes as JSON; it may have {MAX_META}.")
    if not same:
        raise InvalidInput("The meta does not survive JSON: use strings, numbers, booleans, None, lists and dicts.")


def _depth(value: object) -> int:
    """Levels of nesting, at most one more than is allowed; without recursion, since that is what it guards."""
    depth, level = 0, [value]
    while level and depth <= MAX_DEPTH:
        depth += 1
        inner = [item.values() if isinstance(item, dict) else item for item in level]
        level = [
            item for items in inner if not isinstance(items, str) and isinstance(items, Iterable) for item in items
        ]
    return depth


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check(value: object) -> None:
    """Every id and path in a record is parsed as if a stranger had written it."""
    if isinstance(value, ManifestPart):
        for entry in value.entries:
            _check_entry(entry)
    elif isinstance(value, PlanPart):
        for path in value.replaces:
            paths.parse(path)
        for listed in value.remove:
            _check_listed(listed)
        if value.header is not None:
            _check_id(value.header.transaction)
            _check_ref(value.header.manifest.entries, least=0)
    elif isinstance(value, TxRecord):
        _check_id(value.id)
        if value.manifest is not None:
            _check_ref(value.manifest.entries, least=0)
        for path in (*value.deletes, *(value.partitions or ())):
            paths.parse(path)
    elif isinstance(value, Head):
        for ref in filter(None, (value.plan, value.ledger)):
            _check_ref(ref, least=1)
        if value.transaction is not None:
            _check_id(value.transaction)
    elif isinstance(value, Ledger):
        ids = [commit.transaction for commit in value.commits]
        # A thousand at a look; none holds a comma, or there would be more of them.
        if ids and (_IDS.fullmatch(joined := ",".join(ids)) is None or joined.count(",") != len(ids) - 1):
            raise DamagedRecord("The ledger names what is not the id of a transaction.")
    elif isinstance(value, Outcome):
        _check_id(value.id)


def _check_id(text: str) -> None:
    if not is_id(text):
        raise DamagedRecord(f"{text!r} is not the id of a transaction.")


def _check_ref(ref: Ref, least: int) -> None:
    if any(part in ("", ".", "..") for part in ref.key.split("/")) or "\0" in ref.key or ref.count < least:
        raise DamagedRecord(f"{ref.key!r} is not the name of a control record.")


def _check_entry(entry: Entry) -> None:
    paths.parse(entry.path)
    if entry.size < 0:
        raise DamagedRecord(f"{entry.path!r} has the size {entry.size}.")


def _check_listed(listed: Listed) -> None:
    # What a listing found may have a name that we would not write; it must still not lead out of the target.
    if paths.leads_out(listed.path) or paths.RESERVED in listed.path.split("/"):
        raise DamagedRecord(f"{listed.path!r} leads out of the target, or into a control area.")
