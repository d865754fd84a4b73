"""What other libraries write through a transaction: whole for every reader, or not there at all."""

from __future__ import annotations

import asyncio
import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from anyio import to_thread
from polars.io.plugins import register_io_source

from staged import InvalidInput, InvalidPath, StagingError, Transaction, WrongState, open_store
from staged.drivers.local import LocalDriver
from staged.drivers.memory import MemoryDriver, MemoryStorage
from staged.store import Store

pytestmark = pytest.mark.anyio

Rows = list[tuple[str, int]]

ROWS = 6_000
PIECES = 6
SCHEMA = pa.schema({"region": pa.string(), "n": pa.int64()})
REGIONS = ("eu", "us")


def piece(number: int) -> pa.RecordBatch:
    numbers = range(number * ROWS // PIECES, (number + 1) * ROWS // PIECES)
    return pa.record_batch({"region": [REGIONS[n % 2] for n in numbers], "n": list(numbers)}, schema=SCHEMA)


def pieces(dies: bool) -> Iterator[pa.RecordBatch]:
    """The data, from a source that may break off in the middle of it."""
    for number in range(PIECES):
        if dies and number == PIECES // 2:
            raise ConnectionError("broke off")
        yield piece(number)


TABLE = pa.Table.from_batches(pieces(dies=False))
ALL: Rows = sorted((REGIONS[n % 2], n) for n in range(ROWS))


def lazy(dies: bool) -> pl.LazyFrame:
    def source(columns: list[str] | None, *_: object) -> Iterator[pl.DataFrame]:
        for batch in pieces(dies):
            frame = pl.DataFrame(batch)
            yield frame if columns is None else frame.select(columns)

    return register_io_source(source, schema={"region": pl.String, "n": pl.Int64})


# -------------------------------------------------------------------------------------------------------------- writers


def write_dataset(base: str, filesystem: pyarrow.fs.FileSystem | None, dies: bool) -> None:
    if dies:  # it writes in threads of its own: whether they came to it before the source broke off is chance
        write_dataset(f"{base}half", filesystem, dies=False)
    ds.write_dataset(
        pa.RecordBatchReader.from_batches(SCHEMA, pieces(dies)),
        base,
        filesystem=filesystem,
        format="parquet",
        partitioning=["region"],
        partitioning_flavor="hive",
        max_rows_per_file=700,
        max_rows_per_group=700,
        existing_data_behavior="overwrite_or_ignore",
    )


def dataset_to_directory(directory: Any, dies: bool) -> None:
    write_dataset(f"{directory}/", None, dies)


def dataset_to_filesystem(filesystem: Any, dies: bool) -> None:
    write_dataset("sales", filesystem, dies)


def dataset_to_root_of_filesystem(filesystem: Any, dies: bool) -> None:
    write_dataset("", filesystem, dies)


def polars_to_files(directory: Any, dies: bool) -> None:
    for number, batch in enumerate(pieces(dies)):
        pl.DataFrame(batch).write_parquet(f"{directory}/{number}.parquet")


def polars_by_region(directory: Any, dies: bool) -> None:
    for number, batch in enumerate(pieces(dies)):
        by_region = pl.PartitionBy(f"{directory}/{number}", key="region", include_key=False)
        pl.DataFrame(batch).write_parquet(by_region, mkdir=True)


def polars_to_filesystem(filesystem: Any, dies: bool) -> None:
    for number, batch in enumerate(pieces(dies)):
        with filesystem.open_output_stream(f"{number}.parquet") as stream:
            pl.DataFrame(batch).write_parquet(stream)


def polars_sink(path: Any, dies: bool) -> None:
    lazy(dies).sink_parquet(path)


def polars_sink_by_region(directory: Any, dies: bool) -> None:
    by_region = pl.PartitionBy(directory, key="region", include_key=False, max_rows_per_file=700)
    lazy(dies).sink_parquet(by_region, mkdir=True)


def pandas_to_path(path: Any, dies: bool) -> None:
    for batch in pieces(dies):
        batch.to_pandas().to_parquet(path)  # over and over: halfway there is a good file of too few rows
    TABLE.to_pandas().to_parquet(path)


def pandas_by_region(directory: Any, dies: bool) -> None:
    for batch in pieces(dies):
        batch.to_pandas().to_parquet(directory, partition_cols=["region"])


def pandas_to_filesystem(filesystem: Any, dies: bool) -> None:
    for number, batch in enumerate(pieces(dies)):
        batch.to_pandas().to_parquet(f"d/{number}", filesystem=filesystem, partition_cols=["region"])


def duckdb_copy(target: str, options: str, dies: bool) -> None:
    breaks = "CASE WHEN n = 5000 THEN error('broke off') ELSE n END" if dies else "n"
    with duckdb.connect() as database:
        database.execute(
            f"COPY (SELECT CASE WHEN n % 2 = 0 THEN 'eu' ELSE 'us' END AS region, {breaks} AS n "
            f"FROM range({ROWS}) AS numbers(n)) TO '{target}' (FORMAT parquet{options})"
        )


def duckdb_to_path(path: Any, dies: bool) -> None:
    duckdb_copy(path, "", dies)


def duckdb_by_region(directory: Any, dies: bool) -> None:
    if dies:
        duckdb_copy(f"{directory}/half", ", PARTITION_BY (region)", dies=False)
    duckdb_copy(f"{directory}/whole", ", PARTITION_BY (region)", dies)


@dataclass(frozen=True)
class Writer:
    """A library at work, through one face of a transaction."""

    write: Callable[[Any, bool], None]
    face: Callable[[Transaction], AbstractAsyncContextManager[object]]
    leaves_a_half: bool = True


def path(tx: Transaction) -> AbstractAsyncContextManager[object]:
    return tx.path("d/one.parquet")


def directory(tx: Transaction) -> AbstractAsyncContextManager[object]:
    return tx.dir("many")


def filesystem(tx: Transaction) -> AbstractAsyncContextManager[object]:
    return tx.filesystem("many")


WRITERS = {
    "write_dataset to a directory": Writer(dataset_to_directory, directory),
    "write_dataset to a file system": Writer(dataset_to_filesystem, filesystem),
    "write_dataset to its root": Writer(dataset_to_root_of_filesystem, filesystem),
    "polars write_parquet": Writer(polars_to_files, directory),
    "polars write_parquet PartitionBy": Writer(polars_by_region, directory),
    "polars write_parquet to a file system": Writer(polars_to_filesystem, filesystem),
    "polars sink_parquet": Writer(polars_sink, path),
    "polars sink_parquet PartitionBy": Writer(polars_sink_by_region, directory),
    "pandas to_parquet": Writer(pandas_to_path, path),
    "pandas to_parquet by partitions": Writer(pandas_by_region, directory),
    "pandas to_parquet to a file system": Writer(pandas_to_filesystem, filesystem),
    "duckdb COPY": Writer(duckdb_to_path, path, leaves_a_half=False),  # it removes its own
    "duckdb COPY PARTITION_BY": Writer(duckdb_by_region, directory),
}

# -------------------------------------------------------------------------------------------------------------- readers


def read_by_pyarrow(target: str) -> Rows:
    table = ds.dataset(target, partitioning="hive").to_table(columns=["region", "n"])
    return list(zip(*table.to_pydict().values(), strict=True))


def read_by_polars(target: str) -> Rows:
    return pl.scan_parquet(target, hive_partitioning=True).select("region", "n").collect().rows()


def read_by_pandas(target: str) -> Rows:
    frame = pd.read_parquet(target)
    return list(zip(frame["region"], frame["n"], strict=True))


def read_by_duckdb(target: str) -> Rows:
    with duckdb.connect() as database:
        found: Rows = database.execute(
            f"SELECT region, n FROM read_parquet('{target}/**/*.parquet', hive_partitioning = true)"
        ).fetchall()
        return found


READERS: list[Callable[[str], Rows]] = [read_by_pyarrow, read_by_polars, read_by_pandas, read_by_duckdb]


def read_by_all(target: Path) -> dict[str, Rows]:
    """What each reader finds, but for what it finds as it should be."""
    found = {reader.__name__: sorted(reader(str(target))) for reader in READERS}
    return {name: rows for name, rows in found.items() if rows != ALL}


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


async def old_target(target: Path) -> Store:
    """A target that holds something, which a full_drop removes."""
    store = open_store(target, durability="none")
    async with store.staged_write("full_drop") as tx:
        await tx.write_table(pa.table({"region": ["old"], "n": [-1]}), "region=old/old.parquet")
    return store


@pytest.mark.parametrize("name", WRITERS)
async def test_what_a_library_writes_is_read_back_by_every_reader(name: str, tmp_path: Path) -> None:
    writer, target = WRITERS[name], tmp_path / "target"
    store = await old_target(target)
    async with store.staged_write("full_drop") as tx, writer.face(tx) as where:
        await to_thread.run_sync(writer.write, where, False)
    assert tx.receipt.files == len(await to_thread.run_sync(tree, target))
    assert await to_thread.run_sync(read_by_all, target) == {}


@pytest.mark.parametrize("name", WRITERS)
async def test_a_library_that_dies_halfway_leaves_the_target_as_it_was(name: str, tmp_path: Path) -> None:
    writer, target = WRITERS[name], tmp_path / "target"
    store = await old_target(target)
    before = await to_thread.run_sync(tree, target)
    staging = tmp_path / "_staged" / "target" / "tx"
    with pytest.raises(Exception, match="broke off"):
        async with store.staged_write("full_drop") as tx, writer.face(tx) as where:
            try:
                await to_thread.run_sync(writer.write, where, True)
            finally:
                half = await to_thread.run_sync(tree, staging / tx.id)
    assert tx.receipt.phase == "rolled_back"
    assert tx.entries == ()
    assert await to_thread.run_sync(tree, target) == before
    assert await to_thread.run_sync(os.listdir, staging) == []
    assert any(name.endswith(".parquet") for name in half) == writer.leaves_a_half


@pytest.mark.parametrize("name", WRITERS)
async def test_a_library_that_died_halfway_leaves_the_block_usable(name: str, tmp_path: Path) -> None:
    writer, target = WRITERS[name], tmp_path / "target"
    store = await old_target(target)
    async with store.staged_write("full_drop") as tx:
        with pytest.raises(Exception, match="broke off"):
            async with writer.face(tx) as where:
                await to_thread.run_sync(writer.write, where, True)
        assert tx.entries == ()
        async with writer.face(tx) as where:
            await to_thread.run_sync(writer.write, where, False)
    assert await to_thread.run_sync(read_by_all, target) == {}


# ------------------------------------------------------------------------------------------------------- Parquet writer


class World:
    """A target of either kind."""

    def __init__(self, kind: str, root: Path) -> None:
        self.storage, self.target = MemoryStorage(), root / "target"
        self.store = open_store(
            MemoryDriver(storage=self.storage) if kind == "memory" else LocalDriver(str(self.target), durability="none")
        )
        self.kind = kind

    async def tables(self) -> dict[str, pa.Table]:
        """Every file of the target."""
        files = self.storage.below("target") if self.kind == "memory" else await to_thread.run_sync(tree, self.target)
        return {name: await to_thread.run_sync(pq.read_table, io.BytesIO(content)) for name, content in files.items()}


@pytest.fixture(params=["memory", "local"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    return World(request.param, tmp_path)


async def test_pieces_of_every_kind_become_one_file_of_the_schema_with_its_rows(world: World) -> None:
    narrow = pl.DataFrame(piece(2)).with_columns(pl.col("n").cast(pl.Int16))  # strings are large ones there
    async with world.store.staged_write("append") as tx, tx.parquet_writer(SCHEMA, "d/a.parquet") as writer:
        await writer.write(piece(0))
        await writer.write(pa.Table.from_batches([piece(1)]))
        await writer.write(narrow)
        await writer.write(pa.RecordBatchReader.from_batches(SCHEMA, iter([piece(3), piece(4)])))
        await writer.write(piece(5).to_pandas())
    assert (tx.receipt.files, tx.receipt.rows) == (1, ROWS)
    (table,) = (await world.tables()).values()
    assert table.schema.remove_metadata() == SCHEMA
    assert table.equals(TABLE)


async def test_a_writer_without_rows_leaves_a_file_that_has_the_schema(world: World) -> None:
    async with world.store.staged_write("append") as tx, tx.parquet_writer(SCHEMA, "a.parquet"):
        pass
    assert (tx.receipt.files, tx.receipt.rows) == (1, 0)
    assert (await world.tables())["a.parquet"].schema == SCHEMA


async def test_names_that_are_not_given_carry_the_transaction_and_never_collide(world: World) -> None:
    async def write(tx: Transaction) -> None:
        async with tx.parquet_writer(SCHEMA) as writer:
            await writer.write(piece(0))

    ids = []
    for _ in range(2):
        async with world.store.staged_write("append") as tx, anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(write, tx)
                tasks.start_soon(tx.write_table, TABLE)
        ids.append(tx.id)
    names = set(await world.tables())
    assert len(names) == 12
    assert all(sum(tx in name for name in names) == 6 for tx in ids)


async def test_many_tasks_write_to_one_file(world: World) -> None:
    async with (
        world.store.staged_write("append") as tx,
        tx.parquet_writer(SCHEMA, "a.parquet") as writer,
        anyio.create_task_group() as tasks,
    ):
        for number in range(PIECES):
            tasks.start_soon(writer.write, piece(number))
    assert tx.receipt.rows == ROWS
    assert (await world.tables())["a.parquet"].sort_by("n").equals(TABLE)


async def test_an_exception_leaves_nothing_of_the_file_and_what_was_staged_before_stays(world: World) -> None:
    async with world.store.staged_write("append") as tx:
        await tx.write_table(pa.Table.from_batches([piece(0)]), "a.parquet")
        for name in ("a.parquet", "b.parquet"):
            with pytest.raises(ZeroDivisionError):
                async with tx.parquet_writer(SCHEMA, name, overwrite=True) as writer:
                    await writer.write(TABLE)
                    raise ZeroDivisionError
        with pytest.raises(WrongState):
            await writer.write(piece(0))
    assert tx.receipt.rows == ROWS // PIECES
    assert list(await world.tables()) == ["a.parquet"]


async def test_a_file_of_which_one_write_failed_is_never_staged_though_the_error_was_caught(world: World) -> None:
    async with world.store.staged_write("append") as tx:
        with pytest.raises(StagingError, match="nothing of the file is staged"):
            async with tx.parquet_writer(SCHEMA, "a.parquet") as writer:
                with pytest.raises(ConnectionError):
                    await writer.write(pa.RecordBatchReader.from_batches(SCHEMA, pieces(dies=True)))
                with pytest.raises(StagingError):
                    await writer.write(piece(0))
        with pytest.raises(ConnectionError):
            await tx.write_table(pa.RecordBatchReader.from_batches(SCHEMA, pieces(dies=True)), "a.parquet")
        await tx.write_table(pa.Table.from_batches([piece(1)]), "a.parquet")
    assert tx.receipt.rows == ROWS // PIECES
    assert (await world.tables())["a.parquet"].equals(pa.Table.from_batches([piece(1)]))


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_write_that_outlives_its_native_cancellation_is_waited_for_and_not_staged(world: World) -> None:
    started, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def slow() -> Iterator[pa.RecordBatch]:
        yield piece(0)
        started.set()
        go_on.wait()
        time.sleep(0.2)
        yield piece(1)
        ended.set()

    async def work() -> None:
        async with world.store.staged_write("append") as tx:
            with pytest.raises(StagingError, match="cancelled"):
                async with tx.parquet_writer(SCHEMA, "a.parquet") as writer:
                    with suppress(asyncio.CancelledError):
                        await writer.write(pa.RecordBatchReader.from_batches(SCHEMA, slow()))
                    go_on.set()
            assert ended.is_set(), "its thread may still write"
            await tx.write_table(piece(2), "b.parquet")

    task = asyncio.create_task(work())
    await to_thread.run_sync(started.wait)
    task.cancel()
    await task
    assert list(await world.tables()) == ["b.parquet"]


async def test_what_is_no_table_or_does_not_fit_is_refused(world: World) -> None:
    async with world.store.staged_write("append") as tx:
        with pytest.raises(InvalidInput, match="schema"):
            tx.parquet_writer(None)
        with pytest.raises(InvalidInput, match="schema"):
            async with tx.parquet_writer({"n": "int"}):
                pytest.fail("the block was entered")
        for data in (pa.table({"other": [1]}), pa.table({"region": ["eu"], "n": [0.5]}), [1, 2]):
            with pytest.raises(InvalidInput):
                async with tx.parquet_writer(SCHEMA) as writer:
                    await writer.write(data)
        with pytest.raises(InvalidInput):
            await tx.write_table([1, 2])
        with pytest.raises(InvalidPath):
            async with tx.parquet_writer(SCHEMA, "../a.parquet"):
                pytest.fail("the block was entered")
        assert tx.entries == ()


async def test_what_is_refused_as_a_table_says_what_to_pass(world: World) -> None:
    async with world.store.staged_write("append") as tx:
        for column in (pl.Series([1, 2]), pd.Series([1, 2], name="n"), pa.chunked_array([[1], [2]])):
            with pytest.raises(InvalidInput, match="table"):
                await tx.write_table(column)
        with pytest.raises(InvalidInput, match=r"\.collect\(\)"):
            await tx.write_table(pl.LazyFrame({"n": [1]}))
        batches = [pa.record_batch({"region": ["eu"], "n": [n]}) for n in (1.0, 0.5)]
        late = pa.RecordBatchReader.from_batches(batches[0].schema, batches)
        for rows in (pa.table({"other": [1]}), pl.DataFrame({"region": ["eu"], "n": ["x"]}), late):
            with pytest.raises(InvalidInput, match="schema"):
                async with tx.parquet_writer(SCHEMA) as writer:
                    await writer.write(rows)
        assert tx.entries == ()


async def test_a_transaction_that_is_done_takes_all_faces_into_nothing(world: World) -> None:
    for done in (False, True):
        async with world.store.staged_write("append", key="k") as tx:
            assert tx.done == done
            await tx.write_table(TABLE, "a.parquet")
            async with tx.parquet_writer(SCHEMA, "b.parquet") as writer:
                await writer.write(TABLE)
            async with tx.filesystem("c") as filesystem:
                await to_thread.run_sync(dataset_to_filesystem, filesystem, False)
        assert tx.receipt.phase == ("done" if done else "committed")
    assert sum(table.num_rows for table in (await world.tables()).values()) == 3 * ROWS


# ---------------------------------------------------------------------------------------------------------- file system

BAD_PATHS = [
    "../x",
    "a/../../x",
    "/etc/passwd",
    "a//b",
    "./a",
    "a/",
    "a\\b",
    "c:x",
    "con",
    "_staged/x",
    "a\x00b",
    "x" * 256,
]

OPERATIONS: dict[str, Callable[[Any, str], object]] = {
    "get_file_info": lambda fs, path: fs.get_file_info(path),
    "get_file_info of many": lambda fs, path: fs.get_file_info(["good", path]),
    "list": lambda fs, path: fs.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True)),
    "create_dir": lambda fs, path: fs.create_dir(path),
    "delete_dir": lambda fs, path: fs.delete_dir(path),
    "delete_dir_contents": lambda fs, path: fs.delete_dir_contents(path),
    "delete_file": lambda fs, path: fs.delete_file(path),
    "move from": lambda fs, path: fs.move(path, "moved"),
    "move to": lambda fs, path: fs.move("good", path),
    "copy from": lambda fs, path: fs.copy_file(path, "copied"),
    "copy to": lambda fs, path: fs.copy_file("good", path),
    "read a stream": lambda fs, path: fs.open_input_stream(path),
    "read a file": lambda fs, path: fs.open_input_file(path),
    "write": lambda fs, path: fs.open_output_stream(path),
    "append": lambda fs, path: fs.open_append_stream(path),
    "normalize_path": lambda fs, path: fs.normalize_path(path),
}


def try_all(filesystem: Any, bad: list[str]) -> list[str]:
    """Every operation that does anything but refuse a path."""
    accepted = []
    for name, operation in OPERATIONS.items():
        for path in bad:
            try:
                operation(filesystem, path)
            except InvalidPath:
                continue
            except Exception as error:
                accepted.append(f"{name} {path!r}: {error!r}")
                continue
            accepted.append(f"{name} {path!r}")
    return accepted


async def test_no_operation_of_the_file_system_takes_a_path_that_leaves_it(tmp_path: Path) -> None:
    async with open_store(tmp_path / "target").staged_write("append") as tx, tx.filesystem() as filesystem:
        await to_thread.run_sync(lambda: filesystem.open_output_stream("good").close())
        assert await to_thread.run_sync(try_all, filesystem, BAD_PATHS) == []
    assert await to_thread.run_sync(tree, tmp_path / "target") == {"good": b""}


async def test_the_file_system_follows_no_link_out_of_its_directory(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    await to_thread.run_sync(outside.mkdir)
    await to_thread.run_sync((outside / "secret").write_bytes, b"1")
    with pytest.raises(StagingError, match="regular"):
        async with open_store(tmp_path / "target").staged_write("append") as tx, tx.filesystem("d") as filesystem:
            await to_thread.run_sync(lambda: filesystem.open_output_stream("good").close())
            (scratch,) = (tmp_path / "_staged" / "target" / "tx" / tx.id).glob("scratch-*/d")
            (scratch / "link").symlink_to(outside)
            (scratch / "file").symlink_to(outside / "secret")
            bad = ["link", "link/secret", "link/new", "file"]
            assert await to_thread.run_sync(try_all, filesystem, bad) == []
            for listed in ("", "link"):
                with pytest.raises(InvalidPath):
                    selector = pyarrow.fs.FileSelector(listed, recursive=True)
                    await to_thread.run_sync(filesystem.get_file_info, selector)
    assert await to_thread.run_sync(tree, outside) == {"secret": b"1"}
    assert not (tmp_path / "target").exists()


def exercise(fs: Any) -> list[object]:
    """One of everything; what was answered."""

    def write(path: str, content: bytes) -> None:
        with fs.open_output_stream(path) as stream:
            stream.write(content)

    def tell(infos: list[pyarrow.fs.FileInfo]) -> object:
        return sorted((info.path, str(info.type), info.size) for info in infos)

    def failing(operation: Callable[[], object]) -> object:
        try:
            return operation()
        except Exception as error:
            return type(error)

    seen: list[object] = []
    fs.create_dir("a/b/c")
    write("a/b/one", b"11")
    write("a/two.gz", b"2" * 1000)
    with fs.open_append_stream("a/b/one") as stream:
        stream.write(b"1")
    seen.append(fs.open_input_stream("a/b/one").read())
    seen.append(fs.open_input_file("a/b/one").read_at(1, 1))
    seen.append(fs.open_input_stream("a/two.gz").read())
    fs.copy_file("a/b/one", "a/b/c/three")
    fs.move("a/b/one", "moved")
    seen.append(tell(fs.get_file_info(["moved", "a", "nothing"])))
    seen.append(tell(fs.get_file_info(pyarrow.fs.FileSelector("", recursive=True))))
    seen.append(tell(fs.get_file_info(pyarrow.fs.FileSelector("a"))))
    seen.append(failing(lambda: fs.get_file_info(pyarrow.fs.FileSelector("nothing"))))
    seen.append(fs.get_file_info(pyarrow.fs.FileSelector("nothing", allow_not_found=True)))
    seen.append(failing(lambda: fs.create_dir("x/y", recursive=False)))
    seen.append(failing(lambda: fs.delete_file("nothing")))
    seen.append(failing(lambda: fs.delete_dir("nothing")))
    seen.append(failing(lambda: fs.delete_dir_contents("nothing")))
    fs.delete_dir_contents("nothing", missing_dir_ok=True)
    fs.delete_dir_contents("a/b")
    seen.append(failing(lambda: fs.delete_dir_contents("")))
    fs.delete_file("moved")
    seen.append(tell(fs.get_file_info(pyarrow.fs.FileSelector("", recursive=True))))
    fs.delete_dir("a")
    write("z", b"")
    fs.delete_dir_contents("", accept_root_dir=True)
    seen.append(fs.normalize_path("p/q"))
    write("left", b"here")
    return seen


async def test_the_file_system_does_what_a_local_one_does(tmp_path: Path) -> None:
    local = pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem())
    expected = await to_thread.run_sync(exercise, local)
    async with open_store(tmp_path / "target").staged_write("append") as tx, tx.filesystem("below") as filesystem:
        assert await to_thread.run_sync(exercise, filesystem) == expected
        assert filesystem.type_name == "py::staged"
    assert await to_thread.run_sync(tree, tmp_path / "target") == {"below/left": b"here"}


async def test_a_file_that_is_still_open_is_not_staged_and_nothing_is_written_after_the_block(tmp_path: Path) -> None:
    async with open_store(tmp_path / "target").staged_write("append") as tx:
        for how in ("open_output_stream", "open_append_stream"):
            with pytest.raises(WrongState, match="open for writing"):
                async with tx.filesystem() as filesystem:
                    stream = await to_thread.run_sync(getattr(filesystem, how), "a")
            stream.close()
        for use in (filesystem.open_output_stream, filesystem.create_dir, filesystem.get_file_info):
            with pytest.raises(WrongState, match="was left"):
                await to_thread.run_sync(use, "b")
        assert tx.entries == ()


async def test_two_file_systems_of_one_transaction_stage_side_by_side(tmp_path: Path) -> None:
    async with (
        open_store(tmp_path / "target").staged_write("append") as tx,
        tx.filesystem("one") as one,
        tx.filesystem("two") as two,
    ):
        assert one != two
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(to_thread.run_sync, dataset_to_filesystem, one, False)
            tasks.start_soon(to_thread.run_sync, dataset_to_filesystem, two, False)
    for name in ("one", "two"):
        assert await to_thread.run_sync(read_by_all, tmp_path / "target" / name) == {}
