"""What a user opens: one target on one backend."""

from __future__ import annotations

import importlib
import inspect
import operator
import os
import platform
import re
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import get_args

from staged import paths, states, urls
from staged._waitout import run_to_end
from staged.commit import look
from staged.control import HEAD, Target, read_both, read_record, record_key
from staged.driver import Driver
from staged.errors import DamagedRecord, InvalidInput, StagedError, StagingError, StorageError, Unsupported, WrongState
from staged.lifecycle import Block, Check, Options, Transaction
from staged.model import (
    Capabilities,
    Guarantee,
    HeadState,
    Mode,
    Outcome,
    Recovered,
    Resolve,
    Status,
    TransactionStatus,
)
from staged.observers import Callback, Observer, compose
from staged.records import is_id
from staged.recovery import collect, recover
from staged.states import ENDED, Phase

__all__ = ["Store", "load_driver", "open_store"]

# What a URL begins with -> module and class of its driver, loaded on use, and the extra that it needs.
_DRIVERS = (
    (r"file://", "staged.drivers.local", "LocalDriver", ""),
    (r"memory://", "staged.drivers.memory", "MemoryDriver", ""),
    (
        r"(abfss?://[^/]*@|https://)[a-z0-9-]*onelake\.dfs\.fabric\.microsoft\.com/.*/Files/LandingZone([/?]|$)",
        "staged.drivers.open_mirroring",
        "OpenMirroringDriver",
        "adls",
    ),
    (
        r"(abfss?://[^/]*@|https://)[a-z0-9-]*onelake\.dfs\.fabric\.microsoft\.com/",
        "staged.drivers.onelake",
        "OneLakeDriver",
        "adls",
    ),
    (r"abfss?://|https://[a-z0-9-]+\.dfs\.", "staged.drivers.adls", "AdlsDriver", "adls"),
    (
        r"wasbs?://|https://[a-z0-9-]+(\.z\d+)?\.blob\.|https?://[^/]+/devstoreaccount1/",
        "staged.drivers.azure_blob",
        "AzureBlobDriver",
        "blob",
    ),
    (r"s3a?://", "staged.drivers.s3", "S3Driver", "s3"),
    (r"gs://", "staged.drivers.gcs", "GcsDriver", "gcs"),
)
_SCHEMES = "file, memory, abfss, wasbs, https, s3, gs"


def open_store(
    target: str | os.PathLike[str] | Driver, *, observers: Iterable[Observer | Callback] = (), **options: object
) -> Store:
    """Open a store; this writes and probes nothing.

    Args:
        target: A directory (`/lake/flights`, `file:///lake/flights`), another backend's URL, or a driver.
        observers: Called with each event; see `staged.model.Event`. A `Callback` of fsspec's is taken as well.
        options: The driver's own, checked by name: `durability="full"` or `"none"`, `staging=` (local).

    Returns:
        A store; close it with `async with` or `aclose`.

    Raises:
        InvalidInput: The URL or an option is wrong.
        Unsupported: There is no driver for the URL.
    """
    if isinstance(target, Driver):
        if options:
            raise InvalidInput(f"A driver is configured already; {', '.join(options)} cannot be passed with it.")
        return Store(target, compose(observers))
    driver_class, argument = _driver_of(*urls.split(target))
    known = [parameter for parameter in inspect.signature(driver_class).parameters if parameter != "path"]
    for option in options:
        if option not in known:
            raise InvalidInput(f"There is no option {option!r} for this store; its options are {', '.join(known)}.")
    return Store(driver_class(argument, **options), compose(observers))


def _driver_of(scheme: str, rest: str) -> tuple[Callable[..., Driver], str]:
    """The driver of a URL or a path, and its first argument."""
    # A host is the same in capitals.
    host, _, path = rest.partition("/")
    url = f"{scheme or 'file'}://{host.lower()}/{path}"
    for pattern, module, name, extra in _DRIVERS:
        if re.match(pattern, url):
            driver = load_driver(module, name, extra)
            return driver, rest if scheme in ("", "file", "memory") else f"{scheme}://{rest}"
    which = " of that host" if scheme in ("abfs", "abfss", "http", "https") else ""
    raise Unsupported(f"There is no driver for {scheme}:// URLs{which}; there are drivers for {_SCHEMES}.")


def load_driver(module: str, name: str, extra: str) -> Callable[..., Driver]:
    """A driver's class; raises `Unsupported` where the extra that it needs is not installed."""
    try:
        driver: Callable[..., Driver] = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as missing:
        if not extra or (missing.name or "").startswith("staged"):
            raise
        raise Unsupported(f"This store needs {missing.name}: pip install 'staged[{extra}]'") from missing
    return driver


class Store:
    """One target on one backend. Safe for many tasks at once, and for many processes."""

    def __init__(self, driver: Driver, observers: tuple[Observer, ...] = ()) -> None:
        self._driver = driver
        self._observers = observers
        self._target: Target | None = None
        self._open: set[Transaction] = set()
        self._closed = False

    def __repr__(self) -> str:
        return f"<staged.Store {self.url}>"

    @property
    def url(self) -> str:
        """The target, without any secret."""
        return self._driver.url

    # ----------------------------------------------------------------------------------------------------- transactions

    def staged_write(
        self,
        mode: Mode | str,
        *,
        key: str | None = None,
        meta: dict[str, object] | None = None,
        partitions: Iterable[str] | None = None,
        allow_empty: bool = False,
        validate: Iterable[Check] = (),
        require: Iterable[Guarantee] = (),
        keep_old: int = 1,
        lock_timeout: float = 60.0,
        grace: float = 30.0,
    ) -> Block:
        """A block of staged work: `async with store.staged_write("full_drop") as tx:`.

        A clean exit commits; an exception, a cancellation or a crash leaves the target as it was. Until the decision,
        readers see the old set; what they see of the change itself is the store's guarantee for the mode.

        Args:
            mode: `append` (new names only), `error` (the target must be empty), `ignore` (nothing is written where the
                target holds something), `overwrite_files` (staged names replace their namesakes), `overwrite_partitions`
                (each partition is replaced) or `full_drop`, also called `overwrite` (the staged set becomes the whole
                target).
            key: Names the work, at most 256 characters. A key that is among the last 1,000 committed makes the block do
                nothing; then `tx.done` is true.
            meta: Small facts, committed with the data and merged into `store.meta()`; at most 16 KiB in all.
            partitions: The directories to replace, for `overwrite_partitions`; one without files is emptied. By default
                the directories that received files.
            allow_empty: Let a replacing mode remove everything with nothing staged in its place.
            validate: Checks over the staged entries, before the lock; each may be async, and refuses by raising.
            require: Guarantees without which nothing is begun.
            keep_old: How many swapped-out trees stay for those who still read them.
            lock_timeout: Seconds to wait for another writer's commit; `math.inf` to wait without end.
            grace: Seconds for which a cancellation waits for a commit that is decided; `math.inf` likewise.

        Raises:
            InvalidInput: An argument is wrong.
            Unsupported: The store cannot give what `require` asks (on entering).
            StagedError: On leaving; see `outcome` on it.
        """
        options = _options(mode, key, meta, partitions, allow_empty, validate, keep_old, lock_timeout, grace)
        asked = _guarantees(require)
        return Block(lambda: self._begin(options, asked, block=True))

    async def begin(
        self,
        mode: Mode | str,
        *,
        key: str | None = None,
        meta: dict[str, object] | None = None,
        partitions: Iterable[str] | None = None,
        allow_empty: bool = False,
        validate: Iterable[Check] = (),
        require: Iterable[Guarantee] = (),
        keep_old: int = 1,
        lock_timeout: float = 60.0,
        grace: float = 30.0,
    ) -> Transaction:
        """The same without a block: then call `prepare`, `commit` or `rollback`. What is prepared survives this process."""
        options = _options(mode, key, meta, partitions, allow_empty, validate, keep_old, lock_timeout, grace)
        return await self._begin(options, _guarantees(require), block=False)

    async def resume(self, id: str, *, lock_timeout: float = 60.0, grace: float = 30.0) -> Transaction:
        """Take over a prepared transaction, from this process or a dead one; then call `commit` or `rollback`.

        Raises:
            Busy: Another live process has it.
            WrongState: It is not prepared: it ended, or was never here.
        """
        options = Options(Mode.APPEND, lock_timeout=lock_timeout, grace=grace)
        target = await self._probed()
        owner = self._new_owner()
        return await self._track(lambda: Transaction.resume(target, options, _id(id), owner), grace)

    # ------------------------------------------------------------------------------------------------------------ looking

    async def status(self) -> Status:
        """The state of the target, and every transaction that has not ended. Changes nothing."""
        if await self._is_new():
            return Status(head=HeadState.FREE, epoch=0, committing=None, commits=0, last=None)
        driver = self._driver
        head, ledger = await read_both(driver)
        ids = sorted({key.split("/")[1] for key in await driver.list_control("tx/")})
        found: list[TransactionStatus | None] = []
        damaged: list[str] = []
        for tx in filter(is_id, ids):
            try:
                found.append(await self._status_of(tx))
            except DamagedRecord:
                damaged.append(tx)
        return Status(
            head=head.state,
            epoch=head.epoch,
            committing=head.transaction if head.state is HeadState.COMMITTED else None,
            commits=len(ledger.commits),
            last=ledger.commits[-1] if ledger.commits else None,
            transactions=tuple(status for status in found if status is not None),
            damaged=tuple(damaged),
        )

    async def outcome(self, id: str) -> Outcome:
        """How a transaction ended, or stands: the head is asked first, then its outcome. Changes nothing."""
        tx = _id(id)
        self._check_open()
        return await look(self._driver, tx)

    async def meta(self) -> dict[str, object]:
        """The merged meta of all commits."""
        self._check_open()
        _, ledger = await read_both(self._driver)
        return dict(ledger.meta)

    async def capabilities(self) -> Capabilities:
        """What this store can do and promise; probes it, as the first transaction does."""
        return (await self._probed()).store

    # ---------------------------------------------------------------------------------------------------------- repairing

    async def recover(self, *, resolve: Resolve | None = None) -> Recovered:
        """Complete what a dead process decided, and roll back what it left undecided.

        Live transactions and those that a caller prepared are left alone.

        Args:
            resolve: What to do where a foreign thing blocks a decided commit: "keep" that thing, or "replace" it.
                Where staged files are gone, either goes on without them, and removes nothing in their favour.

        Raises:
            CommitBlocked: Something foreign is in the way, and `resolve` was not given.
        """
        if resolve not in (None, "keep", "replace"):
            raise InvalidInput(f'resolve is "keep" or "replace", not {resolve!r}.')
        if await self._is_new():
            return Recovered()
        return await recover(await self._probed(), self._new_owner(), resolve=resolve)

    async def gc(self, *, older_than: timedelta = timedelta(days=7)) -> Recovered:
        """Recover, and then collect what is old: abandoned and prepared transactions, outcomes, trees put aside.

        Args:
            older_than: The age, by the store's own clock, at which something is old; zero is allowed.
        """
        if not isinstance(older_than, timedelta) or older_than < timedelta(0):
            raise InvalidInput("older_than is a timedelta that is not negative.")
        if await self._is_new():
            return Recovered()
        target = await self._probed()
        seconds = older_than.total_seconds()
        recovered = await recover(target, self._new_owner(), older_than=seconds)
        return replace(recovered, collected=await collect(target, seconds))

    # ------------------------------------------------------------------------------------------------------------ closing

    def child(self, path: str) -> Store:
        """Another target below this one, sharing client, credential and limit; its own head, staging and guarantees."""
        return Store(self._driver.child(paths.parse(path)), self._observers)

    async def aclose(self) -> None:
        """Release what is prepared for others to resume, roll back what is open, and close the driver."""
        if self._closed:
            return
        self._closed = True
        failed: BaseException | None = None
        for close in (*(transaction.abandon for transaction in self._open), self._driver.aclose):
            try:
                await close()
            except Exception as error:
                failed = failed or error
            except BaseException as error:
                failed = error  # a cancellation is raised once the others are closed as well
        if failed is not None:
            raise failed

    async def __aenter__(self) -> Store:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.aclose()
        except StagedError as failed:
            if error is None:
                raise
            error.add_note(f"staged: closing the store failed: {failed}")

    # ------------------------------------------------------------------------------------------------------ for the above

    def _check_open(self) -> None:
        if self._closed:
            raise WrongState("The store is closed.")

    async def _probed(self) -> Target:
        self._check_open()
        if self._target is None:
            self._target = Target(self._driver, await self._driver.probe(), self._observers)
        return self._target

    async def _is_new(self) -> bool:
        """Whether nobody ever wrote here: then looking leaves no trace of itself."""
        self._check_open()
        return (
            self._target is None
            and await self._driver.read(HEAD) is None
            and not await self._driver.list_control("tx/")
            and not await self._driver.list_control("outcome/")
        )

    def _new_owner(self) -> str:
        """Each transaction has an owner of its own, so that two of one process are two for the head as well."""
        return f"{platform.node()}:{os.getpid()}:{states.new_id()}"

    async def _begin(self, options: Options, require: frozenset[Guarantee], *, block: bool) -> Transaction:
        try:
            target = await self._probed()
            if target.store.adds_only and options.mode not in target.store.guarantees:
                raise Unsupported(
                    f"{self.url} keeps what was published as it is, and has no mode {options.mode.value!r}. Nothing was begun."
                )
            missing = require - target.store.guarantees.get(options.mode, frozenset())
            if missing:
                raise Unsupported(
                    f"{self.url} does not promise {', '.join(sorted(missing))} for mode {options.mode.value!r}. Nothing was "
                    "begun."
                )
            return await self._track(
                lambda: Transaction.begin(target, options, self._new_owner(), block=block), options.grace
            )
        except StorageError as error:
            raise StagingError(f"Nothing was begun. {error}", retryable=error.retryable) from error

    async def _track(self, make: Callable[[], Awaitable[Transaction]], grace: float) -> Transaction:
        """Begin in a task of its own: a caller that is cancelled meanwhile leaves no transaction behind."""
        made: list[Transaction] = []

        async def begin() -> None:
            made.append(await make())

        try:
            await run_to_end(begin, grace=grace, on_cancel=lambda: None)
        except BaseException as error:
            for transaction in made:
                await (transaction.release() if transaction.phase is Phase.PREPARED else transaction._leave(error))
            raise
        self._open = {transaction for transaction in self._open if transaction.phase not in ENDED}
        self._open.add(made[0])
        return made[0]

    async def _status_of(self, tx: str) -> TransactionStatus | None:
        driver = self._driver
        if await read_record(driver, tx) is None:
            return None
        alive: bool | None = None
        age: float | None = None
        try:
            age = await driver.age(record_key(tx))
            if (await self._probed()).store.fence == "lock":
                # The lock is given back at once; asking is all that a look may do.
                lock = await driver.lock(f"tx/{tx}/lease")
                alive = lock is None
                if lock is not None:
                    lock.release()
        except (StorageError, Unsupported):
            pass  # where nothing can be written, nobody can tell
        if (found := await read_record(driver, tx)) is None:
            return None
        record = found[0]
        return TransactionStatus(tx, record.state, record.mode, record.owner, record.block, alive, age, record.key)


def _options(
    mode: Mode | str,
    key: str | None,
    meta: dict[str, object] | None,
    partitions: Iterable[str] | None,
    allow_empty: bool,
    validate: Iterable[Check],
    keep_old: int,
    lock_timeout: float,
    grace: float,
) -> Options:
    chosen = Mode.parse(mode)
    if isinstance(partitions, str):
        raise InvalidInput(f"partitions= is a list of directories, such as [{partitions!r}], not a str.")
    if not isinstance(validate, Iterable):
        raise InvalidInput("validate= is a list of checks.")
    if not isinstance(partitions, Iterable | None):
        raise InvalidInput(f"partitions= is a list of directories, not {partitions!r}.")
    # What is no str is refused with the options, as a path.
    named = None if partitions is None else tuple(p.rstrip("/") if isinstance(p, str) else p for p in partitions)
    # Records take no subclasses: numpy's str and int among others.
    if isinstance(key, str):
        key = str.__str__(key)
    if not isinstance(keep_old, bool):
        with suppress(TypeError):
            keep_old = operator.index(keep_old)
    return Options(chosen, key, meta, named, allow_empty, tuple(validate), keep_old, lock_timeout, grace)


def _guarantees(require: Iterable[Guarantee]) -> frozenset[Guarantee]:
    known = get_args(Guarantee)
    if isinstance(require, str) or not (asked := frozenset(require)) <= frozenset(known):
        raise InvalidInput(f"require= is a list of some of {', '.join(known)}, not {require!r}.")
    return asked


def _id(text: str) -> str:
    if not isinstance(text, str) or not is_id(text):
        raise InvalidInput(f"{text!r} is not the id of a transaction.")
    return text
