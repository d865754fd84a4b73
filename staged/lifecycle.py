"""A transaction from begin to finished, and how its block ends.

The block's own exception leaves it unchanged. Commit and rollback run in a task of their own that is waited out, so that a
cancellation finds either an undecided transaction, which is rolled back, or a decided one, which is completed.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from copy import deepcopy
from dataclasses import dataclass, replace
from numbers import Real
from types import TracebackType
from typing import TYPE_CHECKING, Literal, TypeVar

import anyio
from anyio import to_thread

from staged import commit, paths, planning, states
from staged._waitout import run_to_end
from staged.commit import Stop, Stopped, discard, look
from staged.control import Target, base_of, read_both, read_manifest, read_record, record_key, swap, write_manifest
from staged.driver import Lock
from staged.errors import (
    Busy,
    CommitIncomplete,
    CommitInDoubt,
    Conflict,
    DamagedRecord,
    Fate,
    Fenced,
    InvalidInput,
    StagedError,
    StagingError,
    StorageError,
    Unsupported,
    ValidationFailed,
    WrongState,
)
from staged.model import Entry, Finished, HeadState, Mode, Plan, Prepared, Receipt, RowMarker, TxRecord, TxState
from staged.observers import notify
from staged.planning import Work
from staged.records import check_key, check_meta
from staged.recovery import abort
from staged.staging import Staging
from staged.states import ENDED, Phase, advance

if TYPE_CHECKING:
    from staged.arrow import FileSystem, ParquetWriter

__all__ = ["Block", "Check", "Options", "Transaction"]

Check = Callable[[Sequence[Entry]], Awaitable[None] | None]
"""Looks at the staged entries before the lock; raises to refuse them."""

T = TypeVar("T")

_ENDING = (Phase.PREPARING, Phase.COMMITTING)
_FRESH = 60.0
"""Seconds for which what was sealed is taken to be there still: what is staged may expire, or be cleared away by a rule."""
"""Another call is at work and has run the checks: a second one waits for it, and finds what it came to."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a transaction was asked for; see `Store.staged_write`."""

    mode: Mode
    key: str | None = None
    meta: dict[str, object] | None = None
    partitions: tuple[str, ...] | None = None
    allow_empty: bool = False
    validate: tuple[Check, ...] = ()
    keep_old: int = 1
    lock_timeout: float = 60.0
    grace: float = 30.0

    def __post_init__(self) -> None:
        check_key(self.key)
        _check_meta(self.meta or {})
        if self.partitions is not None and self.mode is not Mode.OVERWRITE_PARTITIONS:
            raise InvalidInput(f"partitions= goes with mode 'overwrite_partitions', not {self.mode.value!r}.")
        for partition in self.partitions or ():
            paths.parse(partition)
        if type(self.allow_empty) is not bool:
            raise InvalidInput(f"allow_empty= is True or False, not {self.allow_empty!r}.")
        if type(self.keep_old) is not int or self.keep_old < 0:
            raise InvalidInput(f"keep_old= is a whole number that is not negative, not {self.keep_old!r}.")
        for name, seconds in (("lock_timeout", self.lock_timeout), ("grace", self.grace)):
            # What is not a number is not negative either; it is not at least zero.
            if isinstance(seconds, bool) or not isinstance(seconds, Real) or not float(seconds) >= 0:
                raise InvalidInput(f"{name}= is a number of seconds that is not negative, not {seconds!r}.")
        for check in self.validate:
            if not callable(check):
                raise InvalidInput(
                    f"A check of validate= is called with the staged entries; {check!r} cannot be called."
                )


class Transaction(Staging):
    """One block of staged work. Made by `Store.staged_write`, `Store.begin` and `Store.resume`.

    Many tasks may stage at once. `prepare`, `commit` and `rollback` are each idempotent; a finished transaction refuses
    new writes and closes twice without harm.

    Attributes:
        id: A string of hexadecimal digits.
        done: Its key was committed before: writes go nowhere, and the commit does nothing.
        skipped: Its mode is `ignore` and the target holds something: likewise.
    """

    def __init__(self, target: Target, options: Options, record: TxRecord, token: str, lease: Lock | None) -> None:
        super().__init__(target, record.id, options.grace)
        self.done = False
        self.skipped = False
        self._options = options
        self._record = record
        self._meta = record.meta
        self._token = token
        self._lease = lease
        self._phase = Phase.STAGING
        self._receipt: Receipt | None = None
        self._deletes: list[str] = []
        self._attempt = states.new_id()[:8]
        self._numbers = 0
        self._sealed_at = -math.inf
        self._validating = False
        self._abandoned = False
        self._ending = anyio.Lock()
        self._began: float | None = anyio.current_time()
        self._staged_at: float | None = None

    # ------------------------------------------------------------------------------------------------------------- begin

    @classmethod
    async def begin(cls, target: Target, options: Options, owner: str, *, block: bool) -> Transaction:
        """Take a lease, write the record, and look whether there is anything to do."""
        driver = target.driver
        tx, lease = states.new_id(), None
        # A recoverer may try the lease of a transaction that it sees before its record: then another id is free.
        while target.store.fence == "lock" and (lease := await driver.lock(f"tx/{tx}/lease")) is None:
            tx = states.new_id()
        try:
            head, ledger = await read_both(driver)
            record = TxRecord(
                id=tx,
                owner=owner,
                mode=options.mode,
                state=TxState.OPEN,
                block=block,
                base=base_of(head, ledger),
                key=options.key,
                meta=dict(options.meta or {}),
                partitions=options.partitions,
                allow_empty=options.allow_empty,
                keep_old=options.keep_old,
                nonce=states.new_id(),
            )
            token = await swap(driver, record_key(tx), record, None, durable=False)
            if token is None:
                raise StagingError(
                    "The record of a new transaction is taken; run again.", transaction=tx, retryable=True
                )
        except BaseException:
            if lease is not None:
                lease.release()
            raise
        self = cls(target, options, record, token, lease)
        # One that is still being completed is no commit yet: acquiring completes it, and then finds the key.
        completing = head.transaction if head.state is HeadState.COMMITTED else None
        self.done = options.key is not None and any(
            commit.key == options.key and commit.transaction != completing for commit in ledger.commits
        )
        if not self.done and completing is None and options.mode in (Mode.ERROR, Mode.IGNORE):
            await self._or_roll_back(self._look_at_target)
        self._nowhere = self.done or self.skipped
        return self

    @classmethod
    async def resume(cls, target: Target, options: Options, tx: str, owner: str) -> Transaction:
        """Take over a prepared transaction."""
        driver = target.driver
        lease = None
        if target.store.fence == "lock" and (lease := await driver.lock(f"tx/{tx}/lease")) is None:
            raise Busy(f"Another live process has transaction {tx}.", transaction=tx)
        try:
            found = await read_record(driver, tx)
            if found is None or found[0].state is not TxState.PREPARED or found[0].manifest is None:
                if found is None and lease is not None:
                    await discard(target, tx)
                state = (await look(target.driver, tx)).state
                wrong = WrongState(f"Transaction {tx} is {state}; only a prepared one can be resumed.", transaction=tx)
                fates: dict[str, Fate] = {"committed": "committed", "committing": "committed", "unknown": "unknown"}
                wrong.outcome = fates.get(state, "untouched")
                raise wrong
            record = replace(found[0], owner=owner, nonce=states.new_id())
            # After a loss of power no owner lives, and the record as it was prepared is the one to resume.
            token = await swap(driver, record_key(tx), record, found[1], durable=False)
            if token is None:
                raise Busy(f"Another process took transaction {tx} first.", transaction=tx)
            options = replace(
                options, mode=record.mode, key=record.key, partitions=record.partitions, allow_empty=record.allow_empty
            )
            self = cls(target, options, record, token, lease)
            self._entries = {paths.fold(entry.path): entry for entry in await read_manifest(driver, found[0].manifest)}
            self._deletes = list(record.deletes)
            self._phase = Phase.PREPARED
            self._began, self._staged_at = None, self._began
            return self
        except BaseException:
            if lease is not None:
                lease.release()
            raise

    # ----------------------------------------------------------------------------------------------------------- staging

    async def delete(self, path: str) -> None:
        """Remove a file of the target with the commit.

        Raises:
            InvalidInput: This transaction writes that path, or its mode removes it anyway (raised on commit).
            Conflict: The target has no such file (raised on commit).
        """
        self._check_staging()
        if paths.parse(path) not in self._deletes and not self._nowhere:
            self._deletes.append(path)

    async def write_table(self, data: object, path: str | None = None, *, overwrite: bool = False) -> None:
        """Stage one Parquet file of a table.

        Args:
            data: Anything with `__arrow_c_stream__`: a pyarrow table or reader, a Polars, pandas or DuckDB frame.
            path: Where; without it a unique name that carries the transaction's id.

        Raises:
            Unsupported: pyarrow is not installed (extra `arrow`). Else as `write`.
        """
        from staged import arrow

        if self._target.store.keys is not None:
            data = arrow.with_markers(data, None, self._target.store.keys)
        await arrow.write_table(self, data, self._new_name() if path is None else path, overwrite)

    async def write_changes(self, data: object, row_marker: RowMarker | None = None) -> None:
        """Stage one file of rows that are inserted, updated or deleted, for Open Mirroring.

        Args:
            data: Anything with `__arrow_c_stream__`.
            row_marker: What is done with each row; None where a column `__rowMarker__` says so, by 0 (insert), 1 (update),
                2 (delete) or 4 (upsert). It is written as the last column.

        Raises:
            InvalidInput: A key column is missing or holds nulls, a marker is wrong, a column's type is one that the service
                does not take, or there is no row.
            Unsupported: The store takes no changes, or pyarrow is not installed (extra `arrow`). Else as `write`.
        """
        from staged import arrow

        marked = arrow.with_markers(data, row_marker or "column", self._keys())
        await arrow.write_table(self, marked, self._new_name(), False)

    async def replace_rows(self, data: object, *, present: object) -> None:
        """Make a table of Open Mirroring hold exactly these rows without dropping it: deletes and upserts in one batch.

        Args:
            data: The rows, anything with `__arrow_c_stream__`.
            present: The keys that the table has now, such as a query of it gives; other columns do not count.

        Raises:
            InvalidInput, Unsupported: As `write_changes`; also where the table has no key columns.
        """
        from staged import arrow

        rows, gone = await to_thread.run_sync(arrow.replacement, data, present, self._keys())
        if gone.num_rows:
            await self.write_changes(gone, "delete")
        if rows.num_rows:
            await self.write_changes(rows, "upsert")

    def _keys(self) -> tuple[str, ...]:
        """The key columns of a store that takes changes; raises `Unsupported` for any other."""
        if (keys := self._target.store.keys) is None:
            raise Unsupported("Only an Open Mirroring store takes changes; see staged.open_mirror.")
        return keys

    def parquet_writer(
        self, schema: object, path: str | None = None, *, overwrite: bool = False
    ) -> AbstractAsyncContextManager[ParquetWriter]:
        """One Parquet file, written in pieces: `async with tx.parquet_writer(schema) as w: await w.write(batch)`.

        A clean exit stages it with its rows; an exception leaves nothing of it.

        Args:
            schema: Anything with `__arrow_c_schema__`, such as a pyarrow schema.
            path: Where; without it a unique name that carries the transaction's id.

        Raises:
            Unsupported: pyarrow is not installed (extra `arrow`). Else as `write`.
        """
        from staged import arrow

        if schema is None:
            raise InvalidInput("parquet_writer needs a schema, such as table.schema.")
        return arrow.parquet_writer(self, schema, self._new_name() if path is None else path, overwrite)

    def filesystem(self, prefix: str = "", *, overwrite: bool = False) -> AbstractAsyncContextManager[FileSystem]:
        """A `pyarrow.fs.FileSystem`, for pyarrow.dataset, pandas and Polars: each file becomes a staged one below `prefix`.

        It is synchronous, for use in a worker thread; its paths are relative, and parsed like all others. A clean exit
        stages what is there; an exception discards it.

        Raises:
            Unsupported: pyarrow is not installed (extra `arrow`).
            WrongState: A file of it is still open for writing. Else as `dir`.
        """
        from staged import arrow

        return arrow.filesystem(self, prefix, overwrite)

    async def plan(self) -> Plan:
        """What a commit would do now; another commit may change it.

        Raises:
            Conflict, Exists, InvalidInput, StagingError: What the commit would raise now.
            WrongState: It has ended.
        """
        if self._phase in ENDED:
            raise self._wrong(f"Transaction {self.id} is {self._phase.value}; there is nothing left to plan.")
        work = self._work()
        planning.check(work, self._target.store)
        return await commit.make_plan(self._target, self.id, work)

    @property
    def meta(self) -> dict[str, object]:
        """The facts that are committed with the data; may be changed until the transaction is prepared."""
        return self._meta

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What is staged so far."""
        return tuple(self._entries.values())

    # ----------------------------------------------------------------------------------------------------------- the end

    @property
    def receipt(self) -> Receipt:
        """What the transaction came to.

        Raises:
            WrongState: It has not ended.
        """
        if self._receipt is None:
            raise WrongState(
                f"Transaction {self.id} is {self._phase.value}; there is no receipt yet.", transaction=self.id
            )
        return self._receipt

    @property
    def phase(self) -> Phase:
        """Where it stands, as this process sees it."""
        return self._phase

    async def prepare(self) -> None:
        """Validate, seal and write down what is staged. Then it survives this process, for `Store.resume`.

        Where it is done or skipped there is nothing to prepare, and it ends.

        Raises:
            ValidationFailed: A check refused it. It was rolled back.
            StagingError, InvalidInput: It cannot be committed as it is. It was rolled back.
            WrongState: It is past that, or a write is open.
        """
        if self._phase is Phase.PREPARED or self._is_over():
            return
        if self._phase not in _ENDING:
            await self._validate()
        await self._to_end(self._prepare_once)

    async def commit(self) -> Receipt:
        """Make everything visible, all or nothing; returns the receipt. A second call returns it again.

        Raises:
            StagedError: See `outcome` on it. Whatever left the target untouched was rolled back, but for a prepared
                transaction that only found the target busy or the store failing: that stays prepared.
        """
        if not self._is_over():
            if self._phase not in (Phase.PREPARED, *_ENDING):
                await self._validate()
            await self._to_end(self._commit_once)
        return self.receipt

    async def rollback(self) -> None:
        """Discard everything staged; the target is untouched. Nothing happens where it is rolled back already.

        Raises:
            WrongState: It was committed, or its end is not known here.
            StorageError: The store failed; what is left is cleaned up by `recover` or `gc`.
        """
        await self._to_end(lambda stop: self._roll_back("rolled_back"))

    async def release(self) -> None:
        """Leave a prepared transaction for others to resume."""
        self._advance(Phase.RELEASED)
        self._let_go()

    # ------------------------------------------------------------------------------------------------------ for the above

    async def abandon(self) -> None:
        """Let go of it since its store closes: what is prepared can be resumed, what is not is rolled back."""
        try:
            if self._phase is Phase.PREPARED:
                await self.release()
            elif self._phase is Phase.STAGING:
                self._abandoned = True
                await self.rollback()
        finally:
            self._give_up()

    async def _leave(self, error: BaseException) -> None:
        """Roll back what has not ended, because of an error, which stays the one that is raised."""
        if self._phase in ENDED:
            return
        try:
            await self.rollback()
        except StagedError as failed:
            error.add_note(f"staged: rolling back transaction {self.id} failed: {failed}")
        finally:
            self._give_up()

    def _give_up(self) -> None:
        """Let go where the grace was over before the end began; `recover` rolls back what nobody holds."""
        if self._phase not in ENDED and not self._ending.locked():
            self._phase = Phase.IN_DOUBT
            self._let_go()

    def _check_staging(self) -> None:
        if self._phase is not Phase.STAGING or self._validating:
            now = "validating" if self._validating else self._phase.value
            raise self._wrong(f"Transaction {self.id} is {now} and takes no more writes.")

    def _wrong(self, message: str) -> WrongState:
        """An error that says what is known of the target."""
        wrong = WrongState(message, transaction=self.id)
        if self._phase in (Phase.COMMITTED, Phase.INCOMPLETE):
            wrong.outcome = "committed"
        elif self._phase in (Phase.COMMITTING, Phase.IN_DOUBT):
            wrong.outcome = "unknown"
        return wrong

    def _advance(self, phase: Phase) -> None:
        try:
            self._phase = advance(self._phase, phase)
        except WrongState as error:
            raise self._wrong(f"Transaction {self.id}: {error}") from None

    def _new_name(self) -> str:
        """A name that no other transaction uses: an append never collides, and no reader mixes two generations."""
        self._numbers += 1
        return f"part-{self.id}-{self._numbers - 1:05d}.parquet"

    def _work(self) -> Work:
        options = self._options
        return Work(options.mode, self._entries.values(), tuple(self._deletes), options.partitions, options.allow_empty)

    async def _to_end(self, work: Callable[[Stop], Awaitable[T]]) -> T:
        """Make one step after another, each in a task of its own that is waited out."""
        stop = Stop()

        async def alone() -> T:
            async with self._ending:
                return await work(stop)

        return await run_to_end(alone, grace=self._options.grace, on_cancel=stop.request)

    async def _prepare_once(self, stop: Stop) -> None:
        if self._phase is not Phase.PREPARED and not self._is_over():
            self._check_staging()
            self._check_written()
            await self._or_roll_back(lambda: self._prepare(stop))

    async def _commit_once(self, stop: Stop) -> None:
        if not self._is_over():
            if self._phase is not Phase.PREPARED:
                self._check_staging()
                self._check_written()
            await self._or_roll_back(lambda: self._commit(stop))

    def _is_over(self) -> bool:
        """Whether it ended in a way that a second call of commit or prepare simply finds."""
        return self._receipt is not None and self._receipt.phase in ("committed", "done", "skipped")

    async def _or_roll_back(self, step: Callable[[], Awaitable[None]]) -> None:
        """Take a step towards the commit; what fails before the decision is rolled back."""
        try:
            await step()
        except (CommitInDoubt, Fenced):
            if self._phase not in ENDED:
                self._end(Phase.IN_DOUBT, None)
            raise
        except CommitIncomplete:
            self._end(Phase.INCOMPLETE, Receipt(self.id, self._options.mode, "committing", key=self._options.key))
            raise
        except Exception as error:
            if self._phase not in ENDED:
                await self._undo(error)
            if isinstance(error, StagedError):
                error.transaction = error.transaction or self.id
                if self._phase in (Phase.ROLLED_BACK, Phase.PREPARED):
                    error.outcome = "untouched"
            if isinstance(error, StorageError):
                raise StagingError(
                    f"Transaction {self.id} was not committed: {error} The target is untouched.",
                    transaction=self.id,
                    retryable=error.retryable,
                ) from error
            if not isinstance(error, Stopped):
                raise
        except BaseException:
            # Torn off: the loop ends, or the grace is over. What is durable tells the next one what to do.
            if self._phase not in ENDED:
                self._phase = Phase.IN_DOUBT
            self._let_go()
            raise

    async def _undo(self, error: Exception) -> None:
        """After a failure before the decision: what a caller prepared waits for another try, all else is rolled back."""
        if self._phase is Phase.COMMITTING and _passes(error) and not self._record.block:
            self._advance(Phase.PREPARED)
            return
        try:
            await self._roll_back("rolled_back")
        except StagedError as failed:
            error.add_note(f"staged: rolling back transaction {self.id} failed: {failed} recover() or gc() cleans up.")

    async def _look_at_target(self) -> None:
        """`error` and `ignore` look at begin, and decide again under the head."""
        self.skipped = (await commit.make_plan(self._target, self.id, Work(self._options.mode, ()))).skipped

    async def _validate(self) -> None:
        """Run the caller's checks, in the caller's task; whatever ends them rolls back. Nothing is staged meanwhile."""
        self._check_staging()
        self._check_written()
        self._staged_at = anyio.current_time()
        self._validating = True
        try:
            for check in () if self._nowhere else self._options.validate:
                await self._run_check(check)
        except BaseException as error:
            try:
                await self._to_end(lambda stop: self._roll_back("rolled_back"))
            except StagedError as failed:
                error.add_note(f"staged: rolling back transaction {self.id} failed: {failed}")
            raise
        finally:
            self._validating = False

    async def _run_check(self, check: Check) -> None:
        name = getattr(check, "__name__", type(check).__name__)
        try:
            checked: object = check(self.entries)
            if isinstance(checked, Awaitable):
                checked = await checked
        except Exception as error:
            raise ValidationFailed(
                f"The check {name!r} refused the staged files ({str(error) or repr(error)}). The target is untouched.",
                transaction=self.id,
            ) from error
        if checked is not None:
            raise ValidationFailed(
                f"The check {name!r} returned {checked!r}; a check refuses by raising, and returns None. The target is "
                "untouched.",
                transaction=self.id,
            )

    async def _prepare(self, stop: Stop) -> None:
        if self._nowhere:
            await self._roll_back("done" if self.done else "skipped")
            return
        self._advance(Phase.PREPARING)
        driver = self._target.driver
        _check_meta(self._meta)
        meta = deepcopy(self._meta)  # what is changed from now on was checked by nobody
        planning.check(self._work(), self._target.store)
        await driver.seal(self.id, self._entries.values())
        stop.check()
        manifest = await write_manifest(driver, self.id, self.entries, self._attempt)
        stop.check()
        record = replace(
            self._record,
            state=TxState.PREPARED,
            meta=meta,
            deletes=tuple(self._deletes),
            manifest=manifest,
            nonce=states.new_id(),
        )
        token = await swap(driver, record_key(self.id), record, self._token, durable=not record.block)
        if token is None:
            raise StagingError(f"Transaction {self.id} was rolled back by another process.", transaction=self.id)
        self._record, self._token, self._sealed_at = record, token, anyio.current_time()
        self._advance(Phase.PREPARED)
        notify(self._target.observers, Prepared(self.id, manifest.files, manifest.bytes))

    async def _commit(self, stop: Stop) -> None:
        if self._phase is Phase.STAGING:
            await self._prepare(stop)
        if self._phase is Phase.ROLLED_BACK:
            return
        self._advance(Phase.COMMITTING)
        if anyio.current_time() - self._sealed_at > _FRESH:
            await self._target.driver.seal(self.id, self._entries.values())
        manifest = self._record.manifest
        assert manifest is not None
        receipt = await commit.commit(
            self._target, self._record, self._work(), manifest, timeout=self._options.lock_timeout, stop=stop
        )
        if receipt.phase == "committed":
            self._end(Phase.COMMITTED, receipt)
        else:
            self.done, self.skipped = receipt.phase == "done", receipt.phase == "skipped"
            await self._roll_back("done" if self.done else "skipped")

    async def _roll_back(self, why: Literal["rolled_back", "done", "skipped"]) -> None:
        """Undo what is undecided; find out how it ended where another process was faster."""
        if self._phase is Phase.ROLLED_BACK:
            return
        self._advance(Phase.ROLLING_BACK)
        mode, key = self._options.mode, self._options.key
        try:
            outcome = await abort(self._target, self.id, self._record.owner, sole=self._lease is not None, own=True)
        except BaseException:
            self._end(Phase.IN_DOUBT, None)
            raise
        if outcome.state in ("committed", "committing"):
            self._end(Phase.IN_DOUBT, outcome.receipt)
            raise Fenced(f"Transaction {self.id} is {outcome.state} by another process.", transaction=self.id)
        if self._lease is None and (self._entries or self._handles):
            # No lock kept others from rolling it back earlier: what was staged since then only we can find.
            await commit.quietly(
                self._target.driver.discard(self.id, [entry.handle for entry in self._entries.values()], whole=True)
            )
            await commit.quietly(discard(self._target, self.id))
        self._end(Phase.ROLLED_BACK, Receipt(self.id, mode, why, key=key))

    def _end(self, phase: Phase, receipt: Receipt | None) -> None:
        self._advance(phase)
        if receipt is not None:
            now = anyio.current_time()
            staged_at = now if self._staged_at is None else self._staged_at
            staging = None if self._began is None else staged_at - self._began
            self._receipt = replace(receipt, staging_seconds=staging, commit_seconds=now - staged_at)
            notify(self._target.observers, Finished(self.id, self._receipt))
        self._let_go()

    def _let_go(self) -> None:
        if self._lease is not None:
            self._lease.release()
            self._lease = None


def _check_meta(meta: dict[str, object]) -> None:
    """Raise `InvalidInput` for a caller's meta that cannot be kept, or that takes a name of the store's own."""
    check_meta(meta)
    if any(name.startswith("staged.") for name in meta):
        raise InvalidInput("Names in the meta that begin with 'staged.' are the store's own.")


def _passes(error: Exception) -> bool:
    """Whether a later try may succeed with the very files that are prepared."""
    if isinstance(error, StagingError) and not isinstance(error, Conflict):
        return error.retryable or isinstance(error.__cause__, CommitIncomplete)
    return isinstance(error, (Busy, StorageError, DamagedRecord, Stopped))


class Block:
    """`async with` around staged work: a clean exit commits, an exception or a cancellation rolls back."""

    def __init__(self, begin: Callable[[], Awaitable[Transaction]]) -> None:
        self._begin = begin
        self._transaction: Transaction | None = None

    async def __aenter__(self) -> Transaction:
        if self._transaction is not None:
            raise WrongState("A staged_write block is used once; ask the store for another.")
        self._transaction = await self._begin()
        return self._transaction

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        transaction = self._transaction
        assert transaction is not None
        if error is None and transaction._abandoned:
            raise WrongState(
                f"Transaction {transaction.id} was rolled back, since its store was closed within its block. The target is "
                "untouched.",
                transaction=transaction.id,
            )
        if transaction.phase in ENDED:
            return
        if error is None:
            try:
                await transaction.commit()
            except BaseException as refused:
                await transaction._leave(refused)
                if transaction.phase is Phase.COMMITTED:
                    refused.add_note(f"staged: transaction {transaction.id} is committed all the same.")
                raise
        else:
            await transaction._leave(error)
