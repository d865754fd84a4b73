"""The same names for synchronous code: `with staged.sync.open_store("/lake/flights") as store:`.

A store runs an event loop in a thread of its own, which its children share; each call waits there for its end. So it works
under a running loop as well, such as Jupyter's. Ctrl-C is a cancellation: before the decision the block is rolled back, after
it the commit is completed. Observers, and the checks of `validate=`, are called in that thread.
"""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, closing
from functools import partial, wraps
from types import TracebackType
from typing import TYPE_CHECKING, Concatenate, Generic, ParamSpec, Protocol, TypeVar, runtime_checkable

import anyio
from anyio.from_thread import BlockingPortal, start_blocking_portal

from staged import lifecycle, mirroring, staging
from staged import store as stores
from staged.driver import Driver
from staged.errors import WrongState
from staged.model import Entry, Receipt
from staged.observers import Callback, Observer
from staged.staging import Buffer
from staged.states import Phase

if TYPE_CHECKING:
    from staged.arrow import ParquetWriter as AsyncParquetWriter

__all__ = ["Block", "ParquetWriter", "Readable", "StagedFile", "Store", "Transaction", "open_mirror", "open_store"]

A_co = TypeVar("A_co", covariant=True)
P = ParamSpec("P")
T = TypeVar("T")
U = TypeVar("U")

_CHUNK = 1 << 20


def open_store(
    target: str | os.PathLike[str] | Driver, *, observers: Iterable[Observer | Callback] = (), **options: object
) -> Store:
    """Open a store, as `staged.open_store` does; close it with `with` or `close`."""
    return Store(_Loop(), stores.open_store(target, observers=observers, **options))


def _opened(opener: Callable[P, stores.Store]) -> Callable[P, Store]:
    @wraps(opener)
    def call(*args: P.args, **kwargs: P.kwargs) -> Store:
        return Store(_Loop(), opener(*args, **kwargs))

    return call


open_mirror = _opened(mirroring.open_mirror)


@runtime_checkable
class Readable(Protocol):
    """An open binary file."""

    def read(self, size: int, /) -> bytes: ...


class _Call(Generic[T]):
    """Work in a loop, for a thread that may be interrupted at any moment, also while it hands the work over."""

    def __init__(self, work: Callable[[], Awaitable[T]]) -> None:
        self.ended: Future[T] = Future()
        self._work = work
        self._scope: anyio.CancelScope | None = None
        self._given_up = False
        self._lock = threading.Lock()

    async def run(self) -> None:
        with anyio.CancelScope() as scope:
            with self._lock:
                if self._given_up:
                    return
                self._scope = scope
            try:
                result = await self._work()
            except BaseException as error:
                self.ended.set_exception(error)
                if isinstance(error, anyio.get_cancelled_exc_class()):
                    raise  # all else is the caller's, and would end the loop for the others
            else:
                self.ended.set_result(result)

    def give_up(self) -> anyio.CancelScope | None:
        """Let it not begin any more; the scope to cancel where it runs already."""
        with self._lock:
            self._given_up = True
            return None if self.ended.done() else self._scope


class _Loop:
    """An event loop in a thread of its own, from the first call until `stop`."""

    def __init__(self) -> None:
        self._portal: BlockingPortal | None = None
        self._thread = ExitStack()
        self._lock = threading.Lock()
        self.stopped = False

    def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run work to its end. Ctrl-C cancels it and is raised after its end; a second one is raised at once."""
        portal = self._started()
        call = _Call(work)
        try:
            portal.start_task_soon(call.run)
            return call.ended.result()
        except BaseException as error:
            if (scope := call.give_up()) is not None:
                portal.start_task_soon(scope.cancel)
                for note in getattr(call.ended.exception(), "__notes__", ()):
                    error.add_note(note)
            raise

    def _started(self) -> BlockingPortal:
        with self._lock:
            if self.stopped:
                raise WrongState("The store is closed.")
            if self._portal is None:
                self._portal = _aside(lambda: self._thread.enter_context(start_blocking_portal()))
            return self._portal

    def stop(self) -> None:
        with self._lock:
            self.stopped = True
        _aside(self._thread.close)


def _aside(work: Callable[[], T]) -> T:
    """Run work in a thread of its own, where no Ctrl-C can tear it."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result()


# ----------------------------------------------------------------------------------------------- from asynchronous names


class _Face(Generic[A_co]):
    """Something asynchronous, and the loop that it runs in."""

    def __init__(self, loop: _Loop, inner: A_co) -> None:
        self._loop = loop
        self._inner = inner


class Block(Generic[T]):
    """`with` around what is entered and left asynchronously."""

    def __init__(self, loop: _Loop, manager: AbstractAsyncContextManager[T]) -> None:
        self._loop = loop
        self._manager = manager
        self._entered: list[T] = []

    def __enter__(self) -> T:
        try:
            self._loop.run(self._enter)
        except BaseException as error:
            if self._entered:  # Ctrl-C, when it was entered already
                self.__exit__(type(error), error, error.__traceback__)
            raise
        return self._entered[0]

    async def _enter(self) -> None:
        self._entered.append(await self._manager.__aenter__())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.run(lambda: self._manager.__aexit__(kind, error, trace))


def _method(method: Callable[Concatenate[A_co, P], Awaitable[T]]) -> Callable[Concatenate[_Face[A_co], P], T]:
    """The synchronous face of a method."""

    @wraps(method)
    def call(self: _Face[A_co], /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._loop.run(lambda: method(self._inner, *args, **kwargs))

    return call


def _block(
    method: Callable[Concatenate[A_co, P], AbstractAsyncContextManager[T]],
) -> Callable[Concatenate[_Face[A_co], P], Block[T]]:
    """The synchronous face of a method whose result is used in `async with`."""

    @wraps(method)
    def call(self: _Face[A_co], /, *args: P.args, **kwargs: P.kwargs) -> Block[T]:
        return Block(self._loop, method(self._inner, *args, **kwargs))

    return call


def _faced_block(
    method: Callable[Concatenate[A_co, P], AbstractAsyncContextManager[U]], face: Callable[[_Loop, U], T]
) -> Callable[Concatenate[_Face[A_co], P], Block[T]]:
    """The same, where the block is given something that has a face as well."""

    @asynccontextmanager
    async def faced(loop: _Loop, manager: AbstractAsyncContextManager[U]) -> AsyncIterator[T]:
        async with manager as inner:
            yield face(loop, inner)

    @wraps(method)
    def call(self: _Face[A_co], /, *args: P.args, **kwargs: P.kwargs) -> Block[T]:
        return Block(self._loop, faced(self._loop, method(self._inner, *args, **kwargs)))

    return call


# ------------------------------------------------------------------------------------------------------------ the faces


class StagedFile(_Face[staging.StagedFile]):
    """See `staged.staging.StagedFile`."""

    write = _method(staging.StagedFile.write)


class ParquetWriter:
    """See `staged.arrow.ParquetWriter`."""

    def __init__(self, loop: _Loop, inner: AsyncParquetWriter) -> None:
        self._loop = loop
        self._inner = inner

    def write(self, data: object) -> None:
        """Add the rows of a table, as row groups of its own. Raises as the asynchronous one does."""
        self._loop.run(lambda: self._inner.write(data))


class Transaction(_Face[lifecycle.Transaction]):
    """See `staged.Transaction`; many threads may stage at once."""

    write = _method(lifecycle.Transaction.write)
    put_file = _method(lifecycle.Transaction.put_file)
    write_table = _method(lifecycle.Transaction.write_table)
    write_changes = _method(lifecycle.Transaction.write_changes)
    replace_rows = _method(lifecycle.Transaction.replace_rows)
    delete = _method(lifecycle.Transaction.delete)
    plan = _method(lifecycle.Transaction.plan)
    prepare = _method(lifecycle.Transaction.prepare)
    commit = _method(lifecycle.Transaction.commit)
    rollback = _method(lifecycle.Transaction.rollback)
    path = _block(lifecycle.Transaction.path)
    dir = _block(lifecycle.Transaction.dir)
    filesystem = _block(lifecycle.Transaction.filesystem)
    open = _faced_block(lifecycle.Transaction.open, StagedFile)
    parquet_writer = _faced_block(lifecycle.Transaction.parquet_writer, ParquetWriter)

    def put_stream(self, path: str, chunks: Iterable[Buffer] | Readable, *, overwrite: bool = False) -> None:
        """Stage what an iterable of bytes yields, or what an open binary file still has to read. Raises as `write` does,
        and whatever the source raises."""
        with self.open(path, overwrite=overwrite) as file, ExitStack() as stack:
            if isinstance(chunks, Generator):
                stack.enter_context(closing(chunks))
            # An open file is asked for blocks: iterating it would split it into lines.
            for chunk in iter(partial(chunks.read, _CHUNK), b"") if isinstance(chunks, Readable) else chunks:
                file.write(chunk)

    def count_rows(self, path: str, rows: int) -> None:
        """Say how many rows a file has that is being written through `path` or `dir`, for the receipt."""
        self._inner.count_rows(path, rows)

    @property
    def id(self) -> str:
        """A string of hexadecimal digits."""
        return self._inner.id

    @property
    def done(self) -> bool:
        """Its key was committed before: writes go nowhere, and the commit does nothing."""
        return self._inner.done

    @property
    def skipped(self) -> bool:
        """Its mode is `ignore` and the target holds something: likewise."""
        return self._inner.skipped

    @property
    def meta(self) -> dict[str, object]:
        """The facts that are committed with the data; may be changed until the transaction is prepared."""
        return self._inner.meta

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What is staged so far."""
        return self._inner.entries

    @property
    def phase(self) -> Phase:
        """Where it stands, as this process sees it."""
        return self._inner.phase

    @property
    def receipt(self) -> Receipt:
        """What the transaction came to; raises `WrongState` where it has not ended."""
        return self._inner.receipt


def _transaction(
    method: Callable[Concatenate[stores.Store, P], Awaitable[lifecycle.Transaction]],
) -> Callable[Concatenate[Store, P], Transaction]:
    @wraps(method)
    def call(self: Store, /, *args: P.args, **kwargs: P.kwargs) -> Transaction:
        return Transaction(self._loop, self._loop.run(lambda: method(self._inner, *args, **kwargs)))

    return call


class Store(_Face[stores.Store]):
    """See `staged.Store`; safe for many threads at once."""

    staged_write = _faced_block(stores.Store.staged_write, Transaction)
    begin = _transaction(stores.Store.begin)
    resume = _transaction(stores.Store.resume)
    status = _method(stores.Store.status)
    outcome = _method(stores.Store.outcome)
    meta = _method(stores.Store.meta)
    capabilities = _method(stores.Store.capabilities)
    recover = _method(stores.Store.recover)
    gc = _method(stores.Store.gc)

    def __init__(self, loop: _Loop, inner: stores.Store, *, shares: bool = False) -> None:
        super().__init__(loop, inner)
        self._shares = shares

    def __repr__(self) -> str:
        return f"<staged.sync.Store {self.url}>"

    @property
    def url(self) -> str:
        """The target, without any secret."""
        return self._inner.url

    def child(self, path: str) -> Store:
        """Another target below this one; it works until this store is closed."""
        return Store(self._loop, self._inner.child(path), shares=True)

    def close(self) -> None:
        """Release what is prepared for others to resume, roll back what is open, and end the thread."""
        self._close(self._inner.aclose)

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(lambda: self._inner.__aexit__(kind, error, trace))

    def _close(self, work: Callable[[], Awaitable[None]]) -> None:
        if self._loop.stopped:
            return
        try:
            self._loop.run(work)
        finally:
            if not self._shares:
                self._loop.stop()
