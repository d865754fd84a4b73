"""Writing into staging: bytes, files and streams, by many tasks at once, with no lock on the target.

Each transaction has its own staging; nobody sees it. A write that fails leaves nothing of itself, and what the same path
staged before stays. A write into a transaction that is done or skipped is checked, consumed and goes nowhere.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import stat
import tempfile
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Protocol, TypeVar

import anyio
from anyio import to_thread

from staged import paths
from staged._waitout import run_to_end
from staged.control import Target
from staged.driver import Writer
from staged.errors import InvalidInput, InvalidPath, StagedError, StagingError, StorageError, WrongState
from staged.model import Entry, Staged
from staged.observers import notify
from staged.records import HandlesPart, encode

__all__ = ["AsyncReadable", "Buffer", "StagedFile", "Staging"]

Buffer = bytes | bytearray | memoryview
_CHUNK = 1 << 20

T = TypeVar("T")


class AsyncReadable(Protocol):
    """An open asynchronous file, such as anyio's or aiofiles'."""

    def read(self, size: int, /) -> Awaitable[bytes]: ...


class StagedFile:
    """One staged file being written; a clean exit of its block stages it, an exception leaves nothing of it.

    A write that fails or is cancelled may have added any part of its bytes: the file then takes no more, and is not staged.
    """

    def __init__(self, staging: Staging, path: str, overwrite: bool) -> None:
        self._staging = staging
        self._path = path
        self._overwrite = overwrite
        self._writer: Writer | None = None
        self._broken = False
        # Parts of one file are counted: two tasks that write into it take turns.
        self._turn = anyio.Lock()

    async def write(self, data: Buffer) -> int:
        """Add bytes; returns how many.

        Raises:
            StagingError: The store failed; the target is untouched.
        """
        if self._writer is None:
            raise WrongState(f"{self._path!r} is not open.")
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise InvalidInput(f"{self._path!r} takes bytes, not {type(data).__name__}.")
        try:
            async with self._turn:
                self._staging._check_staging()
                self._check_whole()
                with self._staging._errors(self._path):
                    await self._writer.write(data)
        except BaseException:
            self._broken = True
            raise
        return memoryview(data).nbytes

    def _check_whole(self) -> None:
        if self._broken:
            raise StagingError(
                f"A write to {self._path!r} failed or was cancelled; nothing of the file is staged.",
                transaction=self._staging.id,
            )

    async def __aenter__(self) -> StagedFile:
        self._staging._open(self._path, self._overwrite)
        try:
            with self._staging._errors(self._path):
                self._writer = await self._staging._stage(self._path)
        except BaseException:
            self._staging._close(self._path)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        writer, self._writer = self._writer, None
        assert writer is not None
        try:
            if error is not None:
                await self._staging._abort(writer)
                return
            try:
                self._staging._check_staging()
                self._check_whole()
            except BaseException:
                await self._staging._abort(writer)
                raise
            await self._staging._finish(self._path, writer)
        finally:
            self._staging._close(self._path)


class Staging:
    """The staging half of a transaction.

    Attributes:
        id: The transaction's id, a string of hexadecimal digits.
    """

    def __init__(self, target: Target, tx: str, grace: float) -> None:
        self.id = tx
        self._target = target
        self._grace = grace
        self._entries: dict[str, Entry] = {}  # by folded path, so that twins are seen
        self._writing: set[str] = set()
        self._scratches = 0
        self._rows: dict[str, int] = {}
        self._nowhere = False
        self._handles = 0
        self._unlogged: list[str] = []
        self._logging = anyio.Lock()

    # ------------------------------------------------------------------------------------------------------- public verbs

    async def write(self, path: str, data: Buffer | str, *, overwrite: bool = False) -> None:
        """Stage one file of these bytes, or of this text as UTF-8.

        Args:
            path: Relative to the target; see `staged.paths.parse`.
            data: Its whole content.
            overwrite: Replace what this transaction staged at that path before.

        Raises:
            InvalidPath: The path is not one that every store takes, or is a case or Unicode twin of another.
            WrongState: The path is staged or being written already, or the transaction is past staging.
            StagingError: The store failed; the target is untouched.
        """
        if not isinstance(data, (bytes, bytearray, memoryview, str)):
            raise InvalidInput(f"{path!r} takes bytes or text, not {type(data).__name__}.")
        async with self.open(path, overwrite=overwrite) as file:
            await file.write(data.encode() if isinstance(data, str) else data)

    async def put_file(self, path: str, *, source: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Stage a copy of a local file. Raises as `write` does, and what opening the source raises."""
        async with await anyio.open_file(source, "rb") as file:
            await self.put_stream(path, file, overwrite=overwrite)

    async def put_stream(
        self, path: str, chunks: AsyncIterable[Buffer] | AsyncReadable, *, overwrite: bool = False
    ) -> None:
        """Stage what an asynchronous iterable of bytes yields, or what an open asynchronous file (anyio's, aiofiles')
        still has to read. Raises as `write` does, and whatever the source raises."""
        async with self.open(path, overwrite=overwrite) as file, aclosing(_chunks(chunks)) as parts:
            async for chunk in parts:
                await file.write(chunk)

    def open(self, path: str, *, overwrite: bool = False) -> StagedFile:
        """A file to write into: `async with tx.open("a.bin") as f: await f.write(…)`. Raises as `write` does."""
        return StagedFile(self, paths.parse(path), overwrite)

    @asynccontextmanager
    async def path(self, path: str, *, overwrite: bool = False) -> AsyncIterator[str]:
        """A real path, its parents made, for a library that writes to paths.

        A clean exit stages what is there; an exception discards it. The library must have closed the file by then: a
        writer that goes on would change what was sealed.

        Raises:
            StagingError: No file was written there, or the store failed. Else as `write`.
        """
        parsed = paths.parse(path)
        self._open(parsed, overwrite)
        try:
            async with self._scratch(parsed) as (root, moves):
                local = os.path.join(root, *parsed.split("/"))
                await _in_thread(lambda: os.makedirs(os.path.dirname(local), exist_ok=True))
                yield local
                if not await _in_thread(lambda: os.path.isfile(local)):
                    made = await _in_thread(lambda: os.path.isdir(local))
                    what = "A directory was written; use tx.dir for that" if made else "No file was written"
                    raise StagingError(f"{what}: {parsed!r}.", transaction=self.id)
                await self._adopt(root, moves, [parsed])
        finally:
            self._close(parsed)

    @asynccontextmanager
    async def dir(self, prefix: str = "", *, overwrite: bool = False) -> AsyncIterator[str]:
        """A real directory for a library that writes many files: each becomes a staged file below `prefix`.

        A clean exit stages what is there; an exception discards it. Raises as `path` does, then for each file found; an
        empty directory stages nothing.
        """
        async with self._scratch(prefix) as (root, moves):
            local = os.path.join(root, *paths.parse_prefix(prefix).split("/")) if prefix else root
            await _in_thread(lambda: os.makedirs(local, exist_ok=True))
            yield local
            with self._errors(prefix):
                found = [paths.parse(path) for path in await _in_thread(lambda: _walk(root))]
            opened: list[str] = []
            try:
                for path in found:
                    self._open(path, overwrite)
                    opened.append(path)
                await self._adopt(root, moves, found)
            finally:
                for path in opened:
                    self._close(path)

    def count_rows(self, path: str, rows: int) -> None:
        """Say how many rows a file has that is being written through `path` or `dir`, for the receipt."""
        self._rows[path] = rows

    # ------------------------------------------------------------------------------------------------------ for the above

    def _check_staging(self) -> None:
        """Raise `WrongState` unless the transaction still takes writes."""

    def _check_written(self) -> None:
        """Raise `WrongState` while a write is open."""
        if self._writing or self._scratches:
            what = repr(min(self._writing)) if self._writing else "A directory"
            raise WrongState(f"{what} is still being written by transaction {self.id}.", transaction=self.id)

    def _open(self, path: str, overwrite: bool) -> None:
        self._check_staging()
        folded = paths.fold(path)
        if folded in self._writing:
            raise WrongState(
                f"{path!r} is being written by another task of transaction {self.id}.", transaction=self.id
            )
        there = self._entries.get(folded)
        if there is not None and there.path != path:
            raise InvalidPath(
                f"{path!r} differs from the staged {there.path!r} in case or Unicode form only.", transaction=self.id
            )
        if there is not None and not overwrite:
            raise WrongState(
                f"{path!r} is staged already by transaction {self.id}; pass overwrite=True to replace it.",
                transaction=self.id,
            )
        for parent in paths.parents(folded):
            if (file := self._entries.get(parent)) is not None:
                raise StagingError(
                    f"{path!r} cannot be staged: {file.path!r} is staged as a file.", transaction=self.id
                )
        self._writing.add(folded)

    def _close(self, path: str) -> None:
        self._writing.discard(paths.fold(path))

    async def _stage(self, path: str) -> Writer:
        return _Nowhere(path) if self._nowhere else await self._target.driver.stage(self.id, path, self._log)

    async def _finish(self, path: str, writer: Writer) -> None:
        """Stage what was written; a failure leaves nothing of it."""
        closed = False

        async def finish() -> None:
            nonlocal closed
            with self._errors(path):
                entry = await writer.close()
                closed = True
                await self._add(entry)

        try:
            # What the same path staged before cannot be brought back once it is replaced.
            await (self._to_its_end(finish) if paths.fold(path) in self._entries else finish())
        except BaseException:
            if not closed:
                await self._abort(writer)
            raise

    async def _to_its_end(self, work: Callable[[], Awaitable[None]], grace: float | None = None) -> None:
        """Take a step that a cancellation must not find half taken; the cancellation is raised after it."""
        await run_to_end(work, grace=self._grace if grace is None else grace, on_cancel=lambda: None)

    async def _abort(self, writer: Writer) -> None:
        """Leave nothing of a write that failed; what cannot be removed now goes with the transaction's staging."""
        try:
            await self._to_its_end(writer.abort)
        except StagedError:
            pass

    async def _add(self, entry: Entry) -> None:
        if self._nowhere:
            return
        folded = paths.fold(entry.path)
        replaced = self._entries.get(folded)
        self._entries[folded] = entry
        if replaced is not None and replaced.handle != entry.handle:
            await self._target.driver.discard(self.id, [replaced.handle], whole=False)
        notify(self._target.observers, Staged(self.id, entry))

    async def _log(self, handle: str) -> None:
        """Make a handle durable; handles that arrive while one segment is being written share the next."""
        self._unlogged.append(handle)
        async with self._logging:
            if handle not in self._unlogged:
                return
            handles, self._unlogged = self._unlogged, []
            try:
                name = f"tx/{self.id}/handles-{self._handles}"
                self._handles += 1
                await self._target.driver.put_segment(name, encode(HandlesPart(tuple(handles))))
            except BaseException:
                # The others in this segment write it again under a name of its own.
                self._unlogged = [*handles, *self._unlogged]
                raise

    @asynccontextmanager
    async def _scratch(self, path: str) -> AsyncIterator[tuple[str, bool]]:
        """A fresh directory that is gone afterwards, and whether the store can move files out of it without copying."""
        self._check_staging()
        self._scratches += 1
        try:
            async with self._scratch_made(path) as made:
                yield made
        finally:
            self._scratches -= 1

    @asynccontextmanager
    async def _scratch_made(self, path: str) -> AsyncIterator[tuple[str, bool]]:
        with self._errors(path):
            own = None if self._nowhere else await self._target.driver.scratch(self.id)
        roots = [] if own is None else [own]

        async def make() -> None:
            roots.append(await to_thread.run_sync(lambda: tempfile.mkdtemp(prefix="staged-")))

        async def clear() -> None:
            for root in roots:
                await _in_thread(functools.partial(shutil.rmtree, root, ignore_errors=True))

        try:
            if own is None:
                await self._to_its_end(make, math.inf)
            yield roots[0], own is not None
        finally:
            # What lies in the store goes with the transaction's staging in any case; nobody else removes a temporary one.
            await self._to_its_end(clear, math.inf if own is None else None)

    async def _adopt(self, root: str, moves: bool, found: list[str]) -> None:
        """Stage files of a scratch directory, all or none."""
        self._check_staging()
        if self._nowhere or not found:
            return
        entries: list[Entry] = [] if moves else await self._upload_all(root, found)

        async def adopt() -> None:
            with self._errors(found[0]):
                for entry in entries or await self._target.driver.adopt(self.id, root, found):
                    await self._add(replace(entry, rows=self._rows.pop(entry.path, None)))

        await self._to_its_end(adopt)

    async def _upload_all(self, root: str, found: list[str]) -> list[Entry]:
        local = {path: os.path.join(root, *path.split("/")) for path in found}
        for path, source in local.items():
            # Opening a pipe would wait for ever, and a link may lead anywhere.
            if not stat.S_ISREG((await _in_thread(functools.partial(os.lstat, source))).st_mode):
                raise StagingError(f"{path!r} is not a regular file.", transaction=self.id)
        entries: list[Entry] = []

        async def discard() -> None:
            try:
                await self._target.driver.discard(self.id, [entry.handle for entry in entries], whole=False)
            except StagedError:
                pass  # it goes with the transaction's staging

        try:
            for path, source in local.items():
                entry = await self._upload(path, source)
                entries.append(entry)
        except BaseException:
            await self._to_its_end(discard)
            raise
        return entries

    async def _upload(self, path: str, local: str) -> Entry:
        with self._errors(path):
            writer = await self._stage(path)
            try:
                async with await anyio.open_file(local, "rb") as file:
                    while data := await file.read(_CHUNK):
                        await writer.write(data)
                return await writer.close()
            except BaseException:
                await self._abort(writer)
                raise

    @contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """A store that fails while staging leaves the target untouched, and the error says so."""
        try:
            yield
        except StorageError as error:
            raise StagingError(
                f"{path!r} could not be staged: {error} The target is untouched.",
                transaction=self.id,
                retryable=error.retryable,
            ) from error


class _Nowhere:
    """Takes the writes of a transaction that is done or skipped."""

    def __init__(self, path: str) -> None:
        self._path = path

    async def write(self, data: Buffer) -> None:
        pass

    async def close(self) -> Entry:
        return Entry(self._path, 0, "", "")

    async def abort(self) -> None:
        pass


async def _chunks(source: AsyncIterable[Buffer] | AsyncReadable) -> AsyncGenerator[Buffer, None]:
    # An open file is asked for blocks: iterating it would split it into lines.
    if (reader := getattr(source, "read", None)) is not None:
        while True:
            read = reader(_CHUNK)
            if not isinstance(read, Awaitable):
                raise InvalidInput(
                    f"{type(source).__name__} is a synchronous file; open it with anyio.open_file, or use put_file."
                )
            if not (data := await read):
                return
            yield data
    elif isinstance(source, AsyncGenerator):
        async with aclosing(source):
            async for chunk in source:
                yield chunk
    elif isinstance(source, AsyncIterable):
        async for chunk in source:
            yield chunk
    else:
        raise InvalidInput(
            f"{type(source).__name__} is neither an asynchronous iterable nor an open asynchronous file."
        )


async def _in_thread(work: Callable[[], T]) -> T:
    """Work on a real directory, which a store that hangs may keep from ending: whoever is cancelled leaves it to its thread."""
    return await to_thread.run_sync(work, abandon_on_cancel=True)


def _walk(root: str) -> list[str]:
    """Every file below a directory, as relative POSIX paths. Links are not followed: `adopt` refuses them."""

    def unreadable(error: OSError) -> None:
        raise StorageError(f"{error.strerror}: {error.filename!r}.") from error

    found: list[str] = []
    for directory, below, files in os.walk(root, onerror=unreadable):
        at = os.path.relpath(directory, root).replace(os.sep, "/")
        names = files + [name for name in below if os.path.islink(os.path.join(directory, name))]
        found += names if at == "." else [f"{at}/{name}" for name in names]
    return sorted(found)
