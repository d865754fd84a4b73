"""Acquire, decide, publish, remove, finish. Recovery walks the same steps.

Between two calls to the driver the process may die, be stopped for an hour, or lose an answer. Read each function with
one question: if nothing after this line ever runs, what does the next process find, and is it old or new?
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TypeVar

import anyio

from staged import planning, states
from staged.control import (
    HEAD,
    SEGMENT,
    Target,
    log_prefix,
    outcome_key,
    plan_key,
    read,
    read_head,
    read_ledger,
    read_manifest,
    read_names,
    read_outcome,
    read_parts,
    read_record,
    record_key,
    swap,
    write_manifest,
    write_parts,
)
from staged.driver import Alive, Driver, Lock, idle
from staged.errors import (
    Busy,
    CommitBlocked,
    CommitIncomplete,
    CommitInDoubt,
    Conflict,
    DamagedRecord,
    Fenced,
    StagedError,
    StagingError,
    StorageError,
)
from staged.model import (
    Answer,
    Capabilities,
    Entry,
    Head,
    HeadState,
    Ledger,
    LedgerEntry,
    Listed,
    Manifest,
    Mode,
    Outcome,
    Plan,
    PlanHeader,
    PlanPart,
    Published,
    Receipt,
    Ref,
    Removed,
    Resolve,
    Trees,
    TxRecord,
    TxState,
)
from staged.model import Decided as DecidedEvent
from staged.observers import notify
from staged.planning import Work
from staged.records import HandlesPart, check_meta, encode

__all__ = [
    "Held",
    "Stop",
    "Stopped",
    "acquire",
    "commit",
    "discard",
    "discard_staged",
    "look",
    "make_plan",
    "quietly",
    "settle",
]

KEPT_COMMITS = 1_000
"""Commits, and so keys, that the ledger remembers."""
_BATCH = 250
"""Entries of one publish where the head must be renewed in between."""
_REMOVED = 1_000
"""Entries of one removal there, which may be a single request."""
_RACES = 100
"""Lost races for the head after which the target counts as busy."""
_REQUEST_TIMEOUT = 20.0
"""Seconds within which a driver's single request ends: no step is started later than that before a lease could lapse."""

_log = logging.getLogger("staged")
_T = TypeVar("_T")


class Stopped(Exception):
    """The caller was cancelled before the decision; internal."""


class Stop:
    """A caller's wish to end before the decision, seen between two driver calls. No call is ever torn off halfway."""

    def __init__(self) -> None:
        self.requested = False
        self._event = anyio.Event()

    def request(self) -> None:
        self.requested = True
        self._event.set()

    def check(self) -> None:
        if self.requested:
            raise Stopped

    async def sleep(self, seconds: float) -> None:
        with anyio.move_on_after(seconds):
            await self._event.wait()
        self.check()


class Held:
    """Possession of the head: its content as we last wrote it, and the token that the next swap must name."""

    def __init__(self, target: Target, head: Head, token: str | None, lock: Lock | None) -> None:
        self.target = target
        self.head = head
        self.lock = lock
        self._token = token
        self._renewed = anyio.current_time()

    async def move(self, head: Head, *, durable: bool = False) -> bool:
        """Swap the head; False where it is no longer ours. See `control.swap` for what is raised."""
        sent = anyio.current_time()
        token = await swap(self.target.driver, HEAD, head, self._token, durable=durable)
        if token is None:
            return False
        self.head, self._token, self._renewed = head, token, sent
        return True

    def adopt(self, head: Head, token: str | None) -> None:
        """Go on with a head that we wrote, as it was read back."""
        self.head, self._token = head, token

    async def is_ours(self) -> bool:
        """Whether the head is still as we wrote it."""
        return (await read_head(self.target.driver))[1] == self._token

    async def check(self) -> None:
        """Raise `Fenced` unless the head is still as we wrote it."""
        if not await self.is_ours():
            tx = self.head.transaction
            raise Fenced(
                f"Another process took the head from transaction {tx}. Ask store.outcome({tx!r}).", transaction=tx
            )

    async def renew(self) -> None:
        """Show a sign of life in good time, where death is told by silence; raise `Fenced` where it came too late."""
        store = self.target.store
        if store.fence == "lock":
            return
        if anyio.current_time() - self._renewed < (store.period - min(_REQUEST_TIMEOUT, store.period / 2)) / 2:
            return
        if not await self.move(states.renew(self.head)):
            await self.check()

    def release(self) -> None:
        """Drop the operating system's lock, where there is one."""
        if self.lock is not None:
            self.lock.release()


# -------------------------------------------------------------------------------------------------------------- acquire


async def acquire(target: Target, transaction: str, owner: str, timeout: float, stop: Stop) -> Held:
    """Hold the head for a transaction; what a dead writer decided is completed on the way.

    Raises:
        Busy: A live process held it for `timeout` seconds, or a decided commit is blocked.
    """
    deadline = anyio.current_time() + timeout
    held = await _take(target, owner, deadline, stop)
    try:
        for _ in range(_RACES):
            head = held.head
            if head.state is HeadState.COMMITTED:
                try:
                    await _complete_other(held, owner, None)
                except Fenced:
                    pass  # somebody else completes it: look again
                except CommitIncomplete as error:
                    raise StagingError(
                        f"An earlier commit must be completed first. {error} This transaction changed nothing.",
                        transaction=transaction,
                        retryable=not isinstance(error, CommitBlocked),
                    ) from error
            elif await held.move(states.hold(head, transaction, owner)):
                return held
            held = await _again(held, owner, deadline, stop)
        raise _outraced(transaction)
    except BaseException:
        held.release()
        raise


async def settle(target: Target, owner: str, resolve: Resolve | None, timeout: float, stop: Stop) -> str | None:
    """Leave no dead writer's head behind: complete what was decided, free what was not.

    Returns:
        The transaction that was completed, if one was.

    Raises:
        Busy: A live process holds the head.
        CommitBlocked: Something foreign is in the way, and `resolve` does not say what to do about it.
    """
    if (await read_head(target.driver))[0].state is HeadState.FREE:
        return None
    deadline = anyio.current_time() + timeout
    held = await _take(target, owner, deadline, stop)
    try:
        for _ in range(_RACES):
            state = held.head.state
            if state is HeadState.FREE:
                return None
            if state is HeadState.COMMITTED and (finished := await _complete_other(held, owner, resolve)):
                return finished
            if state is HeadState.HELD and await held.move(states.abandon(held.head)):
                return None
            held = await _again(held, owner, deadline, stop)
        raise _outraced(held.head.transaction)
    finally:
        held.release()


async def _take(target: Target, owner: str, deadline: float, stop: Stop) -> Held:
    """Read the head at a moment when nobody alive holds it: by the lock, or by its silence for a whole period."""
    lock: Lock | None = None
    pause = 0.001
    if target.store.fence == "lock":
        while (lock := await target.driver.lock("lock")) is None:
            await _pause(deadline, pause, stop)
            pause = min(2 * pause, 0.05)
    try:
        head, token = await read_head(target.driver)
        silent_since = anyio.current_time()
        while lock is None and head.state is not HeadState.FREE and head.owner != owner:
            if anyio.current_time() - silent_since >= target.store.period:
                break
            await _pause(deadline, target.store.period / 20, stop)
            before, (head, token) = token, await read_head(target.driver)
            if token != before:
                silent_since = anyio.current_time()
        stop.check()
        return Held(target, head, token, lock)
    except BaseException:
        if lock is not None:
            lock.release()
        raise


async def _again(held: Held, owner: str, deadline: float, stop: Stop) -> Held:
    """After a lost race: look at the head anew, under the same lock where there is one."""
    if held.lock is not None:
        stop.check()
        head, token = await read_head(held.target.driver)
        return Held(held.target, head, token, held.lock)
    return await _take(held.target, owner, deadline, stop)


def _outraced(transaction: str | None) -> Busy:
    return Busy(
        "The head was changed by others at every attempt to take it. Nothing was changed.", transaction=transaction
    )


async def _pause(deadline: float, seconds: float, stop: Stop) -> None:
    left = deadline - anyio.current_time()
    if left <= 0:
        raise Busy(
            "Another process holds the target, and lives or died just now; the wait for it timed out. Nothing was changed."
        )
    await stop.sleep(min(seconds, left))


# --------------------------------------------------------------------------------------------------------------- decide


async def commit(
    target: Target, record: TxRecord, work: Work, manifest: Manifest, *, timeout: float, stop: Stop
) -> Receipt:
    """Commit a prepared transaction. On return it ended: committed, done, skipped.

    Raises:
        Stopped, Busy, Conflict and other errors whose `outcome` is "untouched": undecided; the head was given back, and
            the caller rolls back.
        CommitInDoubt, Fenced: Not known here whether it was decided; nothing was cleaned up.
        CommitIncomplete: Decided, not completed.
    """
    held = await acquire(target, record.id, record.owner, timeout, stop)
    try:
        decided = await _decide(held, record, work, manifest, stop)
        if isinstance(decided, Receipt):
            return decided
        receipt = await _complete(held, decided, None)
    finally:
        held.release()
    await _clean_up(target, decided)
    return receipt


async def _decide(held: Held, record: TxRecord, work: Work, manifest: Manifest, stop: Stop) -> _Decided | Receipt:
    """Everything under the head up to the decision. An error gives the head back: the target is untouched."""
    driver, epoch = held.target.driver, held.head.epoch
    try:
        stamped = await _stamp(held, record)
        if (outcome := await read_outcome(driver, record.id)) is not None and outcome.state == "committed":
            await _give_back(held)
            return outcome.receipt or Receipt(record.id, record.mode, "committed")
        if not stamped:
            raise StagingError(f"Transaction {record.id} was rolled back by another process.", transaction=record.id)
        ledger = await read_ledger(driver, held.head)
        if record.key is not None and any(commit.key == record.key for commit in ledger.commits):
            await _give_back(held)
            return Receipt(record.id, record.mode, "done", key=record.key)
        stop.check()
        # Named by the attempt too: a loss of power may take back an epoch, and leave its segments behind, half-written.
        attempt = held.head.nonce[:8]
        afresh = record.mode is Mode.FULL_DROP
        arranged = await driver.arrange(record.id, tuple(work.entries), ledger.meta, held.renew, afresh=afresh)
        if arranged is not None:
            work = replace(work, entries=arranged.entries)
            manifest = await write_manifest(driver, record.id, arranged.entries, f"{epoch}-{attempt}")
            record = replace(record, meta={**record.meta, **arranged.meta})
        await _check_overlap(held, record, work, ledger)
        plan = await make_plan(held.target, record.id, work, held.renew)
        if plan.skipped:
            await _give_back(held)
            return Receipt(record.id, record.mode, "skipped", key=record.key)
        stop.check()
        await held.renew()
        decided = _Decided.of(epoch, record, plan, manifest, held.head.ledger, ledger)
        commit = LedgerEntry(epoch, record.id, attempt, record.key)
        plan_ref = await write_parts(driver, plan_key(commit), decided.parts())
        ledger_ref = await write_parts(driver, f"ledger-{epoch}-{attempt}", [_next_ledger(ledger, record, commit)])
        await held.renew()
        stop.check()
    except (Fenced, DamagedRecord) as error:
        # A stalled holder finds anything: what it looks for may have been superseded. It is undecided by us all the same.
        await _give_back(held)
        if isinstance(error, DamagedRecord) and await held.is_ours():
            raise
        raise StagingError(
            f"Transaction {record.id} lost the head before its decision: {error} Run it again.",
            transaction=record.id,
            retryable=True,
        ) from error
    except Exception:
        await _give_back(held)
        raise
    await _swap_decision(held, plan_ref, ledger_ref)
    notify(held.target.observers, DecidedEvent(record.id, epoch, len(plan.publish), len(plan.remove)))
    return decided


async def _stamp(held: Held, record: TxRecord) -> bool:
    """Rewrite our record under the head: an ABORTED that somebody sends late then names an older token, and fails."""
    driver = held.target.driver
    found = await read_record(driver, record.id)
    if found is None or found[0].state is not TxState.PREPARED:
        return False
    if found[0].owner != record.owner:
        raise Fenced(f"Another process resumed transaction {record.id}.", transaction=record.id)
    stamped = replace(found[0], stamp=held.head.epoch, nonce=states.new_id())
    return await swap(driver, record_key(record.id), stamped, found[1], durable=False) is not None


async def _swap_decision(held: Held, plan: Ref, ledger: Ref) -> None:
    """The decision. An unknown outcome is settled by moving the head away: a late swap then finds another token."""
    tx, undecided = held.head.transaction or "", held.head
    try:
        if await held.move(states.decide(undecided, plan, ledger), durable=True):
            return
    except StorageError as error:
        try:
            if await held.move(states.free(undecided)):
                refused = StorageError(f"The store did not take the decision: {error}", retryable=True)
                refused.outcome = "untouched"
                raise refused from error
        except (StorageError, DamagedRecord) as unanswered:
            if unanswered.outcome == "untouched":
                raise
            # neither swap was answered: read
    try:
        head, token = await read_head(held.target.driver)
        if head.state is HeadState.COMMITTED and head.owner == undecided.owner and head.plan == plan:
            held.adopt(head, token)
            # It is there, but nothing said that it is durable: the target waits until a write of ours is.
            if await held.move(states.renew(head), durable=True):
                return
        if head.state is HeadState.HELD and head.owner == undecided.owner:
            raise StorageError("The head is still held, and a late swap may yet decide it.")
        outcome = await look(held.target.driver, tx)
    except (StorageError, DamagedRecord) as error:
        raise CommitInDoubt(
            f"It is not known whether transaction {tx} was decided: {error} Nothing was cleaned up. Ask store.outcome({tx!r}) "
            "later, or run recover().",
            transaction=tx,
        ) from error
    raise Fenced(
        f"Another process took the head from transaction {tx}, which is {outcome.state}. Ask store.outcome({tx!r}).",
        transaction=tx,
    )


async def look(driver: Driver, tx: str) -> Outcome:
    """How a transaction stands: the head is read first, then the outcome, then the record."""
    head, _ = await read_head(driver)
    if head.transaction == tx and head.state is HeadState.COMMITTED:
        return Outcome(tx, "committing", epoch=head.epoch)
    if (outcome := await read_outcome(driver, tx)) is not None:
        return outcome
    if (found := await read_record(driver, tx)) is None:
        # It may have ended between the two reads: its outcome is written before its record goes.
        return await read_outcome(driver, tx) or Outcome(tx, "unknown")
    state = found[0].state
    if state is TxState.ABORTED:
        return Outcome(tx, "rolled_back", Receipt(tx, found[0].mode, "rolled_back", key=found[0].key))
    return Outcome(tx, "open" if state is TxState.OPEN else "prepared")


async def _give_back(held: Held) -> None:
    """Free an undecided head. Where that fails the next writer takes it over: an undecided head is no harm."""
    await quietly(held.move(states.free(held.head)))


async def make_plan(target: Target, tx: str, work: Work, alive: Alive = idle) -> Plan:
    """List what the plan must know of the target, and make it; raises what `planning.make_plan` raises."""
    if work.mode is Mode.FULL_DROP and target.store.swaps_trees:
        return Plan(publish=tuple(work.entries), trees=await target.driver.trees(tx, alive))
    scope = planning.scope(work, target.store)
    listing: list[Listed] = []
    for prefix in scope.prefixes:
        async with aclosing(target.driver.list(prefix)) as pages:
            async for page in pages:
                await alive()
                listing += page
                if scope.until_first_file and any(map(planning.is_content, page)):
                    break
    if scope.names:
        async with aclosing(target.driver.list(names=scope.names)) as pages:
            async for page in pages:
                await alive()
                listing += page
    return planning.make_plan(work, listing, target.store)


async def _check_overlap(held: Held, record: TxRecord, work: Work, ledger: Ledger) -> None:
    """Raise `Conflict` where a commit since the base touched our names, or can no longer be told."""
    if not planning.guarded(work, held.target.store):
        return
    lost = record.base < ledger.floor
    for commit in ledger.commits:
        if lost or commit.epoch <= record.base:
            continue
        try:
            found = await read_names(held.target.driver, commit)
        except DamagedRecord:
            found = None  # gc takes a plan apart while we read it
        if found is None:
            lost = True
            break
        names, whole = found
        name = planning.overlap(work, held.target.store, names, whole=whole)
        if name is not None:
            raise Conflict(
                f"{name!r} was touched by transaction {commit.transaction}, committed after this one began. The target is "
                "untouched by this one; run it again.",
                transaction=record.id,
            )
        await held.renew()
    if lost:
        raise Conflict(
            "What was committed since this transaction began is no longer on record. The target is untouched by this one; "
            "run it again.",
            transaction=record.id,
        )


def _next_ledger(ledger: Ledger, record: TxRecord, commit: LedgerEntry) -> Ledger:
    commits = (*ledger.commits, commit)
    forgotten = commits[: max(0, len(commits) - KEPT_COMMITS)]
    meta = {**ledger.meta, **record.meta}
    check_meta(meta)
    return Ledger(commits[len(forgotten) :], meta, forgotten[-1].epoch if forgotten else ledger.floor)


# ------------------------------------------------------------------------------------------- publish, remove and finish


@dataclass(frozen=True, slots=True)
class _Decided:
    """A plan that is decided, by us or by the process whose work we complete; `ledger` is the one it supersedes."""

    header: PlanHeader
    plan: Plan
    ledger: Ref | None = None

    @classmethod
    def of(
        cls, epoch: int, record: TxRecord, plan: Plan, manifest: Manifest, superseded: Ref | None, ledger: Ledger
    ) -> _Decided:
        """The plan of a transaction, about to be decided at an epoch."""
        header = PlanHeader(
            transaction=record.id,
            mode=record.mode,
            epoch=epoch,
            key=record.key,
            previous=ledger.commits[-1].transaction if ledger.commits else None,
            manifest=manifest,
            keep_old=record.keep_old,
            trees=plan.trees,
            parts=max(1, -(-max(len(plan.replaces), len(plan.remove)) // SEGMENT)),
        )
        return cls(header, plan, superseded)

    def parts(self) -> list[PlanPart]:
        """The segments to write: the constant part in the first."""
        replaces = list(self.plan.replaces.items())
        cuts = [slice(at * SEGMENT, (at + 1) * SEGMENT) for at in range(self.header.parts)]
        return [
            PlanPart(self.header if at == 0 else None, dict(replaces[cut]), self.plan.remove[cut])
            for at, cut in enumerate(cuts)
        ]

    def receipt(self, left: Sequence[Entry], foreign: int) -> Receipt:
        """What the commit came to, the same whoever completes it.

        Args:
            left: What was not published.
            foreign: The number of files that were not removed.
        """
        header, plan = self.header, self.plan
        rows = [entry.rows for entry in left]
        unknown = header.manifest.rows is None or None in rows
        swapped = header.trees is not None and header.trees.target is not None
        return Receipt(
            id=header.transaction,
            mode=header.mode,
            phase="committed",
            files=header.manifest.files - len(left),
            rows=None if unknown else (header.manifest.rows or 0) - sum(row or 0 for row in rows),
            bytes=header.manifest.bytes - sum(entry.size for entry in left),
            removed=None if swapped else len(plan.remove) + len(plan.replaces) - foreign,
            key=header.key,
            left=len(left) + foreign,
        )


async def _load(target: Target, head: Head) -> _Decided:
    """The decided plan that a head names, held against its digest."""
    if head.plan is None:
        raise DamagedRecord("The head is committed but names no plan.", transaction=head.transaction)
    parts = await read_parts(target.driver, head.plan, PlanPart)
    header = parts[0].header
    if header is None or header.transaction != head.transaction:
        raise DamagedRecord("The plan belongs to another transaction than the head.", transaction=head.transaction)
    entries = await read_manifest(target.driver, header.manifest)
    replaces = {path: identity for part in parts for path, identity in part.replaces.items()}
    remove = tuple(listed for part in parts for listed in part.remove)
    return _Decided(header, Plan(tuple(entries), replaces, remove, header.trees))


async def _complete_other(held: Held, owner: str, resolve: Resolve | None) -> str | None:
    """Complete what a dead writer decided; None where somebody else was faster."""
    # Durable, since it may have died before its decision was.
    if not await held.move(states.adopt(held.head, owner), durable=True):
        return None
    try:
        decided = await _load(held.target, held.head)
    except DamagedRecord:
        await held.check()
        raise
    if await _is_finished(held.target, decided.header.transaction):
        await quietly(held.move(states.free(held.head), durable=True))
    else:
        if held.target.store.fence == "time" and decided.plan.remove:
            # A removal of the other may be under way, and must not meet what is written to these names later.
            await anyio.sleep(min(_REQUEST_TIMEOUT, held.target.store.period / 2))
        await _complete(held, decided, resolve)
    # Under the same lock, which whoever called us goes on with.
    await _clean_up(held.target, decided)
    return decided.header.transaction


async def _is_finished(target: Target, tx: str) -> bool:
    """Whether all is published and removed, and only the head was not freed; what was staged may be gone by now."""
    try:
        outcome = await read_outcome(target.driver, tx)
    except DamagedRecord:
        return False
    return outcome is not None and outcome.state == "committed"


async def _complete(held: Held, decided: _Decided, resolve: Resolve | None) -> Receipt:
    """Publish, remove, write the outcome, free the head. Every step can be repeated by anybody."""
    target, header = held.target, decided.header
    driver, tx = target.driver, header.transaction
    try:
        left: Sequence[Entry] = ()
        foreign = 0
        if header.trees is not None:
            left = await _swap_trees(held, decided, header.trees, resolve)
        if header.trees is None or (target.store.clears and not left):
            left, lost = await _publish(held, decided.plan, resolve)
            if lost:
                foreign = len(decided.plan.remove)  # what was to take its place is gone: it is not removed for nothing
            else:
                foreign = await _remove(held, decided.plan.remove, resolve)
        receipt = decided.receipt(left, foreign)
        await driver.put_segment(
            outcome_key(tx), encode(Outcome(tx, "committed", receipt, header.previous, header.epoch))
        )
    except (StorageError, DamagedRecord, StagingError) as error:
        # What a driver refuses before a decision, such as to move another target's control area, is no refusal after it.
        raise CommitIncomplete(
            f"Transaction {tx} is decided but not completed: {error} Run recover(), or let the next writer complete it.",
            transaction=tx,
        ) from error
    # From here on all is published and the outcome durable: what fails is left to the next writer.
    await quietly(held.move(states.free(held.head), durable=True))
    return receipt


async def _clean_up(target: Target, decided: _Decided) -> None:
    """Discard what a completed commit needs no more; what fails is left to recover and gc."""
    await quietly(discard(target, decided.header.transaction))
    # The head that names the later ledger is durable since the decision.
    if decided.ledger is not None:
        await quietly(target.driver.delete_control([f"{decided.ledger.key}-0"]))
    if decided.header.trees is not None:
        await quietly(target.driver.trim(decided.header.keep_old, 0.0))


async def _swap_trees(held: Held, decided: _Decided, trees: Trees, resolve: Resolve | None) -> Sequence[Entry]:
    """Swap the trees; what was left out because something foreign is in the target's place."""
    driver, header = held.target.driver, decided.header
    resolve = None if held.target.store.adds_only else resolve
    aside = f"{header.epoch:016d}-{header.transaction}"
    answer = await _swap(held, trees, aside)
    if answer in (Answer.FOREIGN, Answer.LOST):
        await held.check()
        if resolve == "replace" and answer is Answer.FOREIGN:
            now = await driver.trees(header.transaction, held.renew)
            answer = await _swap(held, Trees(trees.new, now.target), aside)
        elif resolve is not None:
            # What is kept out is discarded before the head is freed: nobody may publish it later.
            await driver.discard(header.transaction, [entry.handle for entry in decided.plan.publish], whole=True)
            return decided.plan.publish
    if answer in (Answer.FOREIGN, Answer.LOST):
        raise _blocked(held, ["."], lost=answer is Answer.LOST)
    if not held.target.store.clears:
        notify(held.target.observers, Published(header.transaction, header.manifest.files))
    return ()


async def _swap(held: Held, trees: Trees, aside: str) -> Answer:
    """Swap the trees, however long it takes."""
    driver, tx = held.target.driver, held.head.transaction or ""
    while (answer := await driver.swap(tx, trees, aside, held.renew)) is Answer.PENDING:
        await held.renew()
    return answer


async def _publish(held: Held, plan: Plan, resolve: Resolve | None) -> tuple[Sequence[Entry], bool]:
    """Publish all entries; those left out because something foreign is in their place, or gone, and whether any is gone."""
    target, tx = held.target, held.head.transaction or ""
    resolve = None if target.store.adds_only else resolve  # nothing may be left out, and nothing replaced
    left: list[Entry] = []
    lost = False
    for batch in _batches(plan.publish, target.store, _BATCH):
        await held.renew()
        stuck = _stuck(batch, await target.driver.publish(tx, batch, plan.replaces))
        if stuck:
            await held.check()
            if resolve == "replace":
                retry = [entry for entry, _ in stuck]
                async with aclosing(target.driver.list(names=[entry.path for entry in retry])) as pages:
                    there = {listed.path: listed.identity async for page in pages for listed in page}
                stuck = _stuck(retry, await target.driver.publish(tx, retry, there))
            foreign = [entry for entry, answer in stuck if answer is Answer.FOREIGN]
            if stuck and (resolve is None or (resolve == "replace" and foreign)):
                raise _blocked(held, [entry.path for entry, _ in stuck], lost=not foreign)
            # What is kept out is discarded before the head is freed: nobody may publish it later.
            await target.driver.discard(tx, [entry.handle for entry in foreign], whole=False)
            left += [entry for entry, _ in stuck]
            lost = lost or len(foreign) < len(stuck)
        notify(target.observers, Published(tx, len(batch) - len(stuck)))
    return left, lost


async def _remove(held: Held, entries: Sequence[Listed], resolve: Resolve | None) -> int:
    """Remove exactly the planned entries; the number left because they are no longer the ones listed.

    What may not be removed stays under `resolve="keep"`.
    """
    target = held.target
    left = 0
    for batch in _batches(entries, target.store, _REMOVED):
        await held.renew()
        try:
            answers = await target.driver.remove(batch)
        except StorageError as error:
            if resolve != "keep" or error.retryable:
                raise
            answers = [await _remove_or_leave(held, entry) for entry in batch]
        foreign = sum(answer is Answer.FOREIGN for answer in answers)
        if foreign:
            await held.check()
            left += foreign
        notify(target.observers, Removed(held.head.transaction or "", len(batch) - foreign))
    return left


async def _remove_or_leave(held: Held, entry: Listed) -> Answer:
    await held.renew()
    try:
        return (await held.target.driver.remove([entry]))[0]
    except StorageError as error:
        if error.retryable:
            raise
        _log.warning("%r could not be removed, and is left: %s", entry.path, error)
        return Answer.FOREIGN


def _batches(entries: Sequence[_T], store: Capabilities, most: int) -> list[Sequence[_T]]:
    """All at once under a lock; in slices where a sign of life is due in between."""
    size = len(entries) if store.fence == "lock" else most
    return [entries[at : at + size] for at in range(0, len(entries), max(1, size))]


def _stuck(batch: Sequence[Entry], answers: Sequence[Answer]) -> list[tuple[Entry, Answer]]:
    return [
        (entry, answer) for entry, answer in zip(batch, answers, strict=True) if answer in (Answer.FOREIGN, Answer.LOST)
    ]


def _blocked(held: Held, paths: Sequence[str], *, lost: bool) -> CommitBlocked:
    tx = held.head.transaction
    what = "staged files of it are gone" if lost else "something that is not ours is in the way"
    if held.target.store.adds_only:
        how = "Put back what is gone" if lost else "Take that away"
        how += ", and run recover(): nothing can be left out here, and nothing replaced."
    else:
        how = 'Run recover(resolve="keep") to '
        how += (
            "go on without them; nothing is removed then."
            if lost
            else 'leave that in place, or recover(resolve="replace").'
        )
    return CommitBlocked(
        f"Transaction {tx} is decided, but {what}: {', '.join(map(repr, paths[:5]))}{' …' if len(paths) > 5 else ''}. "
        f"Nothing of it was overwritten. {how}",
        paths=paths,
        transaction=tx,
    )


async def discard(target: Target, tx: str, *, log: bool = False, keys: Sequence[str] | None = None) -> None:
    """Discard the staging of a transaction that ended, then its control data, the record last: a crash leaves a trace.

    Args:
        log: Its manifest and plan go too: nothing was committed.
        keys: Its control data, where its staged bytes are discarded already.
    """
    keys = await discard_staged(target, tx) if keys is None else keys
    if log:
        await target.driver.delete_control(await target.driver.list_control(log_prefix(tx)))
    record = record_key(tx)
    await target.driver.delete_control([*(key for key in keys if key != record), record])


async def discard_staged(target: Target, tx: str) -> Sequence[str]:
    """Discard the staged bytes of a transaction that ended; returns the keys of its control data, which stay."""
    keys = await target.driver.list_control(f"tx/{tx}/")
    handles: set[str] = set()
    for key in keys:
        if key.startswith(f"tx/{tx}/handles-") and (found := await read(target.driver, key, HandlesPart)) is not None:
            handles.update(found[0].handles)
    await target.driver.discard(tx, handles, whole=True)
    return keys


async def quietly(step: Awaitable[_T]) -> _T | None:
    """Take a step that the next writer, recover or gc makes up for where it fails; None then."""
    try:
        return await step
    except StagedError as error:
        _log.warning("Something was left for the next writer, recover or gc: %s", error)
        return None
