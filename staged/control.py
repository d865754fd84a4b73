"""The control area, read and changed through lost answers: what staging, commit and recovery share.

head                       the one record that decides; swapped, never deleted
ledger-<epoch>-…           immutable: the last commits and the merged meta; named by the head
tx/<id>/record             a transaction that has not ended; swapped
tx/<id>/handles-<n>        immutable: handles made durable before their first byte
log/<id>-manifest-…-<n>    immutable: what the transaction staged
log/<id>-plan-<epoch>-…    immutable: what its commit does; named by epoch and attempt, so that no earlier one's is taken
                           for it
outcome/<id>               immutable: how it ended
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from staged.driver import Driver
from staged.errors import DamagedRecord, InvalidInput, StorageError
from staged.model import (
    Capabilities,
    Entry,
    Head,
    HeadState,
    Ledger,
    LedgerEntry,
    Manifest,
    Outcome,
    PlanPart,
    Ref,
    TxRecord,
)
from staged.observers import Observer
from staged.records import MAX_RECORD, ManifestPart, decode, digest_of, encode
from staged.states import new_id

__all__ = [
    "HEAD",
    "Target",
    "base_of",
    "log_prefix",
    "outcome_key",
    "plan_key",
    "read",
    "read_both",
    "read_head",
    "read_ledger",
    "read_manifest",
    "read_names",
    "read_outcome",
    "read_parts",
    "read_record",
    "record_key",
    "swap",
    "write_manifest",
    "write_parts",
]

HEAD = "head"
SEGMENT = 10_000
"""Entries of one segment."""
_ATTEMPTS = 3

T = TypeVar("T")
Swapped = Head | TxRecord


@dataclass(frozen=True, slots=True)
class Target:
    """What every step works on: a driver, what it can do, and who wants to hear of it."""

    driver: Driver
    store: Capabilities
    observers: tuple[Observer, ...] = ()


def record_key(tx: str) -> str:
    return f"tx/{tx}/record"


def outcome_key(tx: str) -> str:
    return f"outcome/{tx}"


def log_prefix(tx: str) -> str:
    return f"log/{tx}-"


def plan_key(commit: LedgerEntry) -> str:
    return f"{log_prefix(commit.transaction)}plan-{commit.epoch}-{commit.attempt}"


async def read(driver: Driver, key: str, kind: type[T]) -> tuple[T, str] | None:
    """A record and its token, strictly decoded; None where there is none."""
    record = await driver.read(key)
    return None if record is None else (decode(kind, record.body, key), record.token)


async def swap(driver: Driver, key: str, value: Swapped, token: str | None, *, durable: bool = True) -> str | None:
    """Compare-and-swap a record, and settle lost answers by reading back: its fresh nonce makes the body unique.

    Returns:
        The new token, or None where the record is no longer the one named.

    Raises:
        StorageError: Unresolved: the old record is still there, or nothing could be read, and the swap may land late.
    """
    body = _record(key, value)
    failed: StorageError | None = None
    for _ in range(_ATTEMPTS):
        try:
            swapped = await driver.cas(key, body, token, durable=durable)
            if swapped is not None:
                return swapped
        except StorageError as error:
            failed = error
        try:
            found = await driver.read(key)
        except StorageError as error:
            failed = error
            continue
        if found is not None and found.body == body:
            if failed is None or not durable:
                return found.token
            # It is there, but not known to be durable: a failed sync may have dropped it. Write it once more.
            body, token, failed = _record(key, replace(value, nonce=new_id())), found.token, None
        elif (found.token if found else None) != token:
            return None
    raise failed or StorageError(f"The record {key!r} does not take a swap although its token is current.")


def _record(key: str, value: Swapped) -> bytes:
    body = encode(value)
    if len(body) > MAX_RECORD:
        raise InvalidInput(
            f"The record {key!r} would have {len(body)} bytes; at most {MAX_RECORD} fit: name fewer deletes."
        )
    return body


async def read_head(driver: Driver) -> tuple[Head, str | None]:
    """The head and its token; a target that was never written has a free head of epoch 0 and no token."""
    found = await read(driver, HEAD, Head)
    return (Head(), None) if found is None else found


async def read_ledger(driver: Driver, head: Head) -> Ledger:
    """The ledger that a head names; for whoever holds that head, so that nobody supersedes it meanwhile."""
    return Ledger() if head.ledger is None else (await read_parts(driver, head.ledger, Ledger))[0]


async def read_both(driver: Driver) -> tuple[Head, Ledger]:
    """The head and its ledger, for whoever does not hold the head."""
    head, token = await read_head(driver)
    while True:
        try:
            return head, await read_ledger(driver, head)
        except DamagedRecord:
            # A ledger goes once a later commit superseded it; then the head has changed too.
            before, (head, token) = token, await read_head(driver)
            if token == before:
                raise


def base_of(head: Head, ledger: Ledger) -> int:
    """The epoch of the last finished commit: one that is still being completed counts as later."""
    commits = [
        commit.epoch
        for commit in ledger.commits
        if not (head.state is HeadState.COMMITTED and commit.transaction == head.transaction)
    ]
    return max(commits, default=ledger.floor)


async def write_parts(driver: Driver, key: str, parts: Sequence[object]) -> Ref:
    """Write a value as immutable segments.

    Raises:
        DamagedRecord: A segment of that name exists with another content.
    """
    bodies = [encode(part) for part in parts]
    for number, body in enumerate(bodies):
        name = f"{key}-{number}"
        if not await driver.put_segment(name, body):
            found = await driver.read(name)
            if found is None or found.body != body:
                raise DamagedRecord(f"The segment {name!r} exists with another content.")
    return Ref(key, len(bodies), digest_of(bodies))


async def read_parts(driver: Driver, ref: Ref, kind: type[T]) -> list[T]:
    """Read a value that `write_parts` wrote, and hold it against its digest."""
    bodies = []
    for number in range(ref.count):
        found = await driver.read(f"{ref.key}-{number}")
        if found is None:
            raise DamagedRecord(f"The segment {ref.key}-{number!r} is missing.")
        bodies.append(found.body)
    if digest_of(bodies) != ref.digest:
        raise DamagedRecord(f"The segments {ref.key!r} are not the ones that were written: their digest does not fit.")
    return [decode(kind, body, ref.key) for body in bodies]


async def write_manifest(driver: Driver, tx: str, entries: Sequence[Entry], attempt: str) -> Manifest:
    """Write down what a transaction staged."""
    slices = [ManifestPart(tuple(entries[at : at + SEGMENT])) for at in range(0, len(entries), SEGMENT)]
    rows = [entry.rows for entry in entries]
    return Manifest(
        entries=await write_parts(driver, f"{log_prefix(tx)}manifest-{attempt}", slices),
        files=len(entries),
        rows=None if None in rows else sum(row or 0 for row in rows),
        bytes=sum(entry.size for entry in entries),
    )


async def read_manifest(driver: Driver, manifest: Manifest) -> list[Entry]:
    """What a transaction staged."""
    return [entry for part in await read_parts(driver, manifest.entries, ManifestPart) for entry in part.entries]


async def read_names(driver: Driver, commit: LedgerEntry) -> tuple[set[str], bool] | None:
    """The names that a commit wrote or removed, and whether it replaced the whole target; None where its plan is gone."""
    key = plan_key(commit)
    first = await read(driver, f"{key}-0", PlanPart)
    if first is None or (header := first[0].header) is None:
        return None
    names = {entry.path for entry in await read_manifest(driver, header.manifest)}
    names.update(listed.path for listed in first[0].remove)
    for number in range(1, header.parts):
        if (part := await read(driver, f"{key}-{number}", PlanPart)) is None:
            return None
        names.update(listed.path for listed in part[0].remove)
    return names, header.trees is not None


async def read_outcome(driver: Driver, tx: str) -> Outcome | None:
    """How a transaction ended, if it did."""
    found = await read(driver, outcome_key(tx), Outcome)
    return None if found is None else found[0]


async def read_record(driver: Driver, tx: str) -> tuple[TxRecord, str] | None:
    """The record of a transaction that has not ended, and its token."""
    return await read(driver, record_key(tx), TxRecord)
