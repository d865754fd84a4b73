"""Finish or undo what a dead process left; collect what is old.

Who may do what: anybody may complete what was decided. What was not decided is rolled back by its owner, by whoever proves
its owner dead (the operating system's lock), or by `gc` once it is old. What a caller prepared waits for a caller.
"""

from __future__ import annotations

import re
from dataclasses import replace

from staged import states
from staged.commit import Stop, discard, discard_staged, look, settle
from staged.control import Target, outcome_key, read_head, read_outcome, read_record, record_key, swap
from staged.driver import Lock
from staged.errors import Busy, DamagedRecord, Fenced, StorageError
from staged.model import HeadState, Outcome, Receipt, Recovered, Resolve, TxState
from staged.records import encode, is_id

__all__ = ["abort", "collect", "recover"]

_NUMBER = re.compile(r"[0-9]{1,20}")
_ATTEMPTS = 10
"""Lost races after which a rollback gives up: each is a step that another process made."""


async def abort(target: Target, tx: str, owner: str, *, sole: bool, own: bool = False) -> Outcome:
    """Roll an undecided transaction back, or find how it ended.

    The order is the proof: the record's token first, then the head, then the outcome, then ABORTED by a swap of that token.
    Since an acquirer stamps the record, a swap that succeeds says that nobody acquired meanwhile, and that nobody will.

    Args:
        sole: Nobody else can be at work on it, so that an ABORTED found there may be completed.
        own: Only as its owner.

    Raises:
        Fenced: Another process owns it by now, and only its owner was to roll it back.
    """
    for _ in range(_ATTEMPTS):
        found = await read_record(target.driver, tx)
        if found is None:
            return await look(target.driver, tx)
        record, token = found
        if own and record.owner != owner:
            raise Fenced(f"Another process resumed transaction {tx}. Ask store.outcome({tx!r}).", transaction=tx)
        head, _ = await read_head(target.driver)
        if head.transaction == tx and head.state is HeadState.COMMITTED:
            return Outcome(tx, "committing", epoch=head.epoch)
        if head.transaction == tx:
            await settle(target, owner, None, 0.0, Stop())
            continue
        ended = await read_outcome(target.driver, tx)
        if ended is not None and ended.state == "committed":
            return ended
        if record.state is TxState.ABORTED:
            if not sole:
                return Outcome(tx, "rolled_back")
        elif (
            await swap(
                target.driver,
                record_key(tx),
                replace(record, state=TxState.ABORTED, nonce=states.new_id()),
                token,
                durable=not record.block,
            )
            is None
        ):
            continue
        outcome = Outcome(tx, "rolled_back", Receipt(tx, record.mode, "rolled_back", key=record.key))
        # Its bytes first: on a full disk they make room for its outcome.
        keys = await discard_staged(target, tx)
        await target.driver.put_segment(outcome_key(tx), encode(outcome))
        await discard(target, tx, log=True, keys=keys)
        return outcome
    raise Busy(f"Transaction {tx} is being changed by another process; it was not rolled back.", transaction=tx)


async def recover(
    target: Target, owner: str, *, resolve: Resolve | None = None, older_than: float | None = None
) -> Recovered:
    """Complete what was decided, roll back what nobody alive owns, leave the rest alone.

    Args:
        older_than: Seconds of silence after which an undecided transaction is rolled back, whoever it belongs to and
            however it was prepared, unless a lock shows it alive.

    Raises:
        CommitBlocked: A decided commit is blocked, and `resolve` does not say what to do.
    """
    alive: list[str] = []
    finished: list[str] = []
    failed: StorageError | None = None
    try:
        # A live holder is not waited for; where death is told by silence, a period of it must be, however slow the store.
        wait = 0.0 if target.store.fence == "lock" else 3 * target.store.period
        done = await settle(target, owner, resolve, wait, Stop())
        finished += [done] if done else []
    except Busy:
        head, _ = await read_head(target.driver)
        alive += [head.transaction] if head.transaction else []
    fates: dict[str, list[str]] = {
        "committed": finished,
        "rolled_back": [],
        "prepared": [],
        "alive": alive,
        "damaged": [],
    }
    for tx in sorted({key.split("/")[1] for key in await target.driver.list_control("tx/")}):
        if not is_id(tx) or tx in alive:
            continue
        lock = await target.driver.lock(f"tx/{tx}/lease") if target.store.fence == "lock" else None
        if lock is None and target.store.fence == "lock":
            alive.append(tx)
            continue
        try:
            fate = await _recover_one(target, tx, owner, lock, older_than)
        except Busy:
            fate = "alive"
        except DamagedRecord:
            fate = "damaged"
        except StorageError as error:
            # What fails for one is no reason to leave the others.
            fate, failed = None, failed or error
        finally:
            if lock is not None:
                lock.release()
        if fate is not None:
            fates.setdefault(fate, alive).append(tx)
    if failed is not None:
        raise failed
    return Recovered(
        finished=tuple(dict.fromkeys(finished)),
        rolled_back=tuple(fates["rolled_back"]),
        prepared=tuple(fates["prepared"]),
        alive=tuple(alive),
        damaged=tuple(fates["damaged"]),
    )


async def _recover_one(target: Target, tx: str, owner: str, lock: Lock | None, older_than: float | None) -> str | None:
    """What became of one transaction; None where only a trace of it was cleaned up."""
    found = await read_record(target.driver, tx)
    outcome = await read_outcome(target.driver, tx)
    if outcome is not None and outcome.state == "committed":
        await discard(target, tx)
        return "committed"
    old = older_than is not None and await _is_older(target, record_key(tx), older_than)
    if found is None:
        # It died between its lease and its record, or in the last step of its clean-up.
        if lock is not None or older_than is not None:
            await discard(target, tx, log=outcome is None)
        return None
    record = found[0]
    dead = lock is not None and (record.block or record.state is not TxState.PREPARED)
    if not dead and not old:
        return "prepared" if record.state is TxState.PREPARED and not record.block else "alive"
    return (await abort(target, tx, owner, sole=lock is not None or old)).state


async def collect(target: Target, older_than: float) -> int:
    """Delete old outcomes with their manifests and plans, superseded ledgers and old trees; the number of deletions."""
    driver = target.driver
    doomed: list[str] = []
    logs: dict[str, list[str]] = {}
    for key in await driver.list_control("log/"):
        logs.setdefault(key.removeprefix("log/").partition("-")[0], []).append(key)
    outcomes = {key.removeprefix("outcome/") for key in await driver.list_control("outcome/")}
    head, _ = await read_head(driver)
    for tx in sorted(logs.keys() | outcomes):
        # One whose head could not be freed is cleaned up already, and yet to be completed once more.
        if not is_id(tx) or tx == head.transaction:
            continue
        try:
            # A live transaction has a record; one that ended wrote its outcome before its record went.
            if await read_record(driver, tx) is not None:
                continue
            ended = await read_outcome(driver, tx) is not None
        except DamagedRecord:
            continue
        keys = logs.get(tx, [])
        if (keys or ended) and await _is_older(target, outcome_key(tx) if ended else keys[0], older_than):
            doomed += [*keys, outcome_key(tx)]
    # Nobody writes a ledger of an epoch that is over.
    over = head.epoch if head.state is HeadState.FREE else head.epoch - 1
    for key in await driver.list_control("ledger-"):
        ledger, _, _ = key.rpartition("-")
        epoch = key.split("-")[1]
        superseded = head.ledger is None or ledger != head.ledger.key
        if _NUMBER.fullmatch(epoch) and int(epoch) <= over and superseded and await _is_older(target, key, older_than):
            doomed.append(key)
    await driver.delete_control(doomed)
    # A commit that is under way may still need what it put aside.
    keep = 1 if head.state is HeadState.COMMITTED else 0
    return len(doomed) + await driver.trim(keep, older_than)


async def _is_older(target: Target, key: str, seconds: float) -> bool:
    age = await target.driver.age(key)
    return age is not None and age >= seconds
