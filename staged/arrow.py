"""Arrow and Parquet: the only module that imports pyarrow, loaded on use."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import anyio
from anyio import to_thread

from staged import paths
from staged.errors import InvalidInput, InvalidPath, StagingError, Unsupported, WrongState

if TYPE_CHECKING:
    from staged.lifecycle import Transaction
    from staged.model import RowMarker

try:
    import pyarrow
    import pyarrow.fs
    import pyarrow.parquet
except ImportError as error:  # pragma: no cover - the test environment has it
    raise Unsupported("Tables need pyarrow: pip install 'staged[arrow]'.") from error

FileSystem: TypeAlias = pyarrow.fs.FileSystem

__all__ = ["FileSystem", "ParquetWriter", "filesystem", "parquet_writer", "with_markers", "write_table"]


async def write_table(transaction: Transaction, data: object, path: str, overwrite: bool) -> None:
    """Stage one Parquet file of whatever has `__arrow_c_stream__`, in a worker thread."""
    _check_table(data)
    async with parquet_writer(transaction, None, path, overwrite) as writer:
        await writer.write(data)


# -------------------------------------------------------------------------------------------------------------- Parquet


class ParquetWriter:
    """One Parquet file being written into a transaction; see `Transaction.parquet_writer`.

    A write that fails or is cancelled may have added some of its rows: the file then takes no more, and is not staged.
    """

    def __init__(self, path: str, local: str, schema: pyarrow.Schema | None) -> None:
        self._path = path
        self._local = local
        self._schema = schema
        self._file: pyarrow.parquet.ParquetWriter | None = None
        self._rows = 0
        self._broken = False
        self._closed = False
        # Held by whichever worker thread is at the file: one may outlive its caller, who was cancelled.
        self._busy = threading.Lock()

    async def write(self, data: object) -> None:
        """Add the rows of a table, as row groups of its own, in a worker thread.

        Args:
            data: Anything with `__arrow_c_stream__`: a pyarrow batch, table or reader, a Polars or pandas frame. Other
                types than the schema's are cast where that loses nothing.

        Raises:
            InvalidInput: It is not a table, or does not fit the schema.
            WrongState: The block was left.
            StagingError: An earlier write failed.
        """
        _check_table(data)
        self._check_whole()
        try:
            await to_thread.run_sync(self._write, data)
        except BaseException:
            self._broken = True
            raise

    def _check_whole(self) -> None:
        if self._broken:
            raise StagingError(f"A write to {self._path!r} failed or was cancelled; nothing of the file is staged.")

    def _write(self, data: object) -> None:
        with self._busy:
            if self._closed:
                raise WrongState(f"{self._path!r} is not open.")
            # A reader of pyarrow's own raises its source's errors as they are.
            own = isinstance(data, pyarrow.Table | pyarrow.RecordBatchReader)
            source: Any = data if own else _reader(data)
            if self._schema is None:
                self._schema = source.schema
            fits = source.schema.equals(self._schema)
            if not fits:
                self._cast(source.schema.empty_table())  # also where there is no batch
            file = self._opened()
            if isinstance(source, pyarrow.Table):
                file.write_table(source if fits else self._cast(source))
                self._rows += source.num_rows
                return
            for batch in source:
                file.write_batch(batch if fits else self._cast(batch))
                self._rows += batch.num_rows

    def _cast(self, data: Any) -> Any:
        """The rows of a table or a batch, by the schema."""
        try:
            return data.cast(self._schema)
        except (ValueError, pyarrow.ArrowException) as error:
            raise InvalidInput(f"The rows do not fit the schema of {self._path!r}: {error}") from error

    def _opened(self) -> pyarrow.parquet.ParquetWriter:
        if self._file is None:
            self._file = pyarrow.parquet.ParquetWriter(self._local, self._schema)
        return self._file

    def _close(self) -> int:
        """End the file; returns its rows."""
        with self._busy:
            self._closed = True
            self._opened().close()
            return self._rows

    def _abort(self) -> None:
        with self._busy:
            self._closed = True
            if self._file is not None:
                with suppress(Exception):  # it is given up in any case
                    self._file.close()


@asynccontextmanager
async def parquet_writer(
    transaction: Transaction, schema: object | None, path: str, overwrite: bool
) -> AsyncIterator[ParquetWriter]:
    """Stage one Parquet file in pieces; without a schema the first piece's."""
    if schema is not None and not hasattr(schema, "__arrow_c_schema__"):
        raise InvalidInput(f"{type(schema).__name__} is not a schema: it has no __arrow_c_schema__.")
    async with transaction.path(path, overwrite=overwrite) as local:
        writer = ParquetWriter(path, local, None if schema is None else pyarrow.schema(schema))
        try:
            yield writer
            writer._check_whole()
            rows = await to_thread.run_sync(writer._close)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await to_thread.run_sync(writer._abort)
            raise
        transaction.count_rows(path, rows)


def _check_table(data: object) -> None:
    if not hasattr(data, "__arrow_c_stream__"):
        collect = " Call .collect() on it, and pass what that returns." if hasattr(data, "collect") else ""
        raise InvalidInput(f"{type(data).__name__} is not a table: it has no __arrow_c_stream__.{collect}")


def _reader(data: object) -> pyarrow.RecordBatchReader:
    try:
        return pyarrow.RecordBatchReader.from_stream(data)
    except pyarrow.ArrowInvalid as error:
        raise InvalidInput(
            f"{type(data).__name__} is not read as a table: {error}. Pass a table, not a column, such as series.to_frame()."
        ) from error


# -------------------------------------------------------------------------------------------------------------- changes

MARKER = "__rowMarker__"
_MARKERS = {"insert": 0, "update": 1, "delete": 2, "upsert": 4}


def with_markers(
    data: object, row_marker: RowMarker | Literal["column"] | None, keys: Sequence[str]
) -> pyarrow.RecordBatchReader:
    """Rows as Open Mirroring takes them, looked at while they are read.

    Args:
        row_marker: What is done with each row; "column" where a column says so, None where it may.

    Raises:
        InvalidInput: See `Transaction.write_changes`; also from the reader.
    """
    _check_table(data)
    whole: Any = data if isinstance(data, pyarrow.Table) else None
    source = _reader(data) if whole is None else whole.to_reader()
    names = source.schema.names
    if row_marker not in (*_MARKERS, "column", None):
        raise InvalidInput(f"row_marker= is one of {', '.join(_MARKERS)}, not {row_marker!r}.")
    marked = MARKER in names
    if marked and row_marker in _MARKERS:
        raise InvalidInput(f"The rows have a column {MARKER!r} already; leave row_marker= out.")
    if row_marker == "column" and not marked:
        raise InvalidInput(f"Without row_marker= a column {MARKER!r} says what is done with each row.")
    for name in {name for name in names if names.count(name) > 1}:
        raise InvalidInput(f"There are {names.count(name)} columns {name!r}.")
    for key in keys:
        if key not in names:
            raise InvalidInput(f"The key column {key!r} is missing.")
    if not keys and (row_marker in ("update", "delete", "upsert")):
        raise InvalidInput("A table without key columns takes inserts only.")
    fields = [field for field in source.schema if field.name != MARKER]
    for field in fields:
        if not _is_taken(field.type):
            raise InvalidInput(f"The column {field.name!r} has the type {field.type}, which the service does not take.")
    if marked and not pyarrow.types.is_integer(source.schema.field(MARKER).type):
        raise InvalidInput(f"{MARKER!r} is a column of integers, not of {source.schema.field(MARKER).type}.")
    with_marker = marked or row_marker in _MARKERS
    schema = pyarrow.schema([*fields, *([pyarrow.field(MARKER, pyarrow.int32())] if with_marker else [])])
    batches = _marked(source, schema, None if row_marker in ("column", None) else _MARKERS[row_marker], keys)
    return pyarrow.RecordBatchReader.from_batches(schema, batches)


def replacement(data: object, present: object, keys: Sequence[str]) -> tuple[pyarrow.Table, pyarrow.Table]:
    """The rows of `data`, and one with nulls besides its keys for each of `present` that is not among them.

    Raises:
        InvalidInput: There are no key columns, or one is missing.
    """
    if not keys:
        raise InvalidInput("The rows of a table without key columns cannot be told apart; use full_drop.")
    for table in (data, present):
        _check_table(table)
    rows, there = _reader(data).read_all(), _reader(present).read_all()
    for key in keys:
        if key not in rows.column_names or key not in there.column_names:
            raise InvalidInput(f"The key column {key!r} is missing.")
    keyed = there.select(list(keys)).cast(pyarrow.schema([rows.schema.field(key) for key in keys]))
    gone = keyed.join(rows.select(list(keys)), list(keys), join_type="left anti")
    columns = [
        gone.column(name) if name in keys else pyarrow.nulls(gone.num_rows, rows.schema.field(name).type)
        for name in rows.column_names
    ]
    return rows, pyarrow.table(columns, names=rows.column_names)


def _marked(source: Any, schema: Any, marker: int | None, keys: Sequence[str]) -> Iterator[Any]:
    rows = 0
    for batch in source:
        rows += batch.num_rows
        for key in keys:
            if batch.column(key).null_count:
                raise InvalidInput(f"The key column {key!r} holds nulls.")
        columns = [batch.column(name) for name in schema.names if name != MARKER]
        if marker is not None:
            columns.append(pyarrow.array([marker] * batch.num_rows, pyarrow.int32()))
        elif MARKER in schema.names:
            given = batch.column(MARKER)
            wrong = sorted({value for value in given.unique().to_pylist() if value not in _MARKERS.values()}, key=str)
            if wrong:
                raise InvalidInput(f"{MARKER!r} is 0, 1, 2 or 4, not {wrong[0]!r}.")
            if not keys and any(value != 0 for value in given.unique().to_pylist()):
                raise InvalidInput("A table without key columns takes inserts only.")
            columns.append(given.cast(pyarrow.int32()))
        yield pyarrow.RecordBatch.from_arrays(columns, schema=schema)
    if not rows:
        raise InvalidInput("There are no rows to write.")


def _is_taken(kind: Any) -> bool:
    """Whether Open Mirroring takes a type: complex ones are to be written as text."""
    types = pyarrow.types
    refused = (types.is_nested, types.is_null, types.is_duration, types.is_interval, types.is_float16)
    return not any(is_such(kind) for is_such in refused)


# ---------------------------------------------------------------------------------------------------------- file system


@asynccontextmanager
async def filesystem(transaction: Transaction, prefix: str, overwrite: bool) -> AsyncIterator[FileSystem]:
    """A `pyarrow.fs.FileSystem` over a directory of `Transaction.dir`; nothing of it reaches the event loop."""
    async with transaction.dir(prefix, overwrite=overwrite) as local:
        below = await to_thread.run_sync(_Below, local)
        try:
            yield pyarrow.fs.PyFileSystem(below)
            below.check_written()
        finally:
            below.close()


class _Below(pyarrow.fs.FileSystemHandler):  # type: ignore[misc]  # pyarrow has no types
    """The files below one directory, by parsed paths that follow no link; closed with its block."""

    def __init__(self, root: str) -> None:
        self._root = os.path.realpath(root)
        self._inner = pyarrow.fs.SubTreeFileSystem(self._root, pyarrow.fs.LocalFileSystem())
        self._written: list[pyarrow.NativeFile] = []
        self._tracking = threading.Lock()  # pyarrow opens files from threads of its own
        self._closed = False

    def close(self) -> None:
        self._closed = True

    def check_written(self) -> None:
        """Raise `WrongState` while a file is open for writing: it would change after it was staged."""
        if any(not file.closed for file in self._written):
            raise WrongState("A file of tx.filesystem is still open for writing; close it within the block.")

    def _parse(self, path: str) -> str:
        parsed = paths.parse_prefix(path)
        if self._closed:
            raise WrongState("The block of this file system was left.")
        local = os.path.join(self._root, parsed) if parsed else self._root
        if os.path.realpath(local) != local:
            raise InvalidPath(f"{path!r} leads through a symbolic link.")
        return parsed

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    __hash__ = object.__hash__

    def get_type_name(self) -> str:
        return "staged"

    def normalize_path(self, path: str) -> str:
        return self._parse(path)

    def get_file_info(self, asked: list[str]) -> list[pyarrow.fs.FileInfo]:
        return [self._inner.get_file_info(self._parse(path)) for path in asked]

    def get_file_info_selector(self, selector: pyarrow.fs.FileSelector) -> list[pyarrow.fs.FileInfo]:
        below = pyarrow.fs.FileSelector(
            self._parse(selector.base_dir), allow_not_found=selector.allow_not_found, recursive=selector.recursive
        )
        found: list[pyarrow.fs.FileInfo] = self._inner.get_file_info(below)
        for info in found:
            self._parse(info.path)
        return found

    def create_dir(self, path: str, recursive: bool) -> None:
        self._inner.create_dir(self._parse(path), recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self._inner.delete_dir(self._parse(path))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self._inner.delete_dir_contents(self._parse(path), missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        self._inner.delete_dir_contents(self._parse(""), accept_root_dir=True)

    def delete_file(self, path: str) -> None:
        self._inner.delete_file(self._parse(path))

    def move(self, src: str, dest: str) -> None:
        self._inner.move(self._parse(src), self._parse(dest))

    def copy_file(self, src: str, dest: str) -> None:
        self._inner.copy_file(self._parse(src), self._parse(dest))

    def open_input_stream(self, path: str) -> pyarrow.NativeFile:
        return self._inner.open_input_stream(self._parse(path), compression=None)

    def open_input_file(self, path: str) -> pyarrow.NativeFile:
        return self._inner.open_input_file(self._parse(path))

    def open_output_stream(self, path: str, metadata: object) -> pyarrow.NativeFile:
        return self._track(self._inner.open_output_stream(self._parse(path), compression=None))

    def open_append_stream(self, path: str, metadata: object) -> pyarrow.NativeFile:
        return self._track(self._inner.open_append_stream(self._parse(path), compression=None))

    def _track(self, file: pyarrow.NativeFile) -> pyarrow.NativeFile:
        with self._tracking:
            self._written = [other for other in self._written if not other.closed] + [file]
        return file
