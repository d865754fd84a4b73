"""Staging tables beside pyarrow, and overwriting a table beside pyarrow's and Delta's ways."""

from __future__ import annotations

import time
from collections.abc import Callable

import anyio
import deltalake
import pyarrow
import pyarrow.compute
import pyarrow.dataset
import pyarrow.parquet
from bench import Bench, Run, sync
from moves import lay

from staged import open_store


def table_of(rows: int) -> pyarrow.Table:
    chance = [pyarrow.compute.random(rows, initializer=seed) for seed in (1, 2)]
    return pyarrow.table(
        {
            "n": pyarrow.array(range(rows)),
            "x": chance[0],
            "k": pyarrow.compute.floor(pyarrow.compute.multiply(chance[1], 1000)).cast("int64"),
        }
    )


# ---------------------------------------------------------------------------------------------------------------- staging


def direct(bench: Bench, table: pyarrow.Table) -> float:
    with bench.scratch() as root:
        sync(root)
        started = time.perf_counter()
        pyarrow.parquet.write_table(table, f"{root}/a.parquet")
        return time.perf_counter() - started


def in_thread(bench: Bench, table: pyarrow.Table) -> float:
    """The same as an async program does it."""

    async def run(path: str) -> float:
        await anyio.to_thread.run_sync(sync, bench.root)
        started = time.perf_counter()
        await anyio.to_thread.run_sync(pyarrow.parquet.write_table, table, path)
        return time.perf_counter() - started

    with bench.scratch() as root:
        return anyio.run(run, f"{root}/a.parquet")


def staging(bench: Bench, table: pyarrow.Table) -> float:
    async def run(target: str) -> float:
        async with open_store(target) as store:
            tx = await store.begin("append")
            await anyio.to_thread.run_sync(sync, bench.root)
            started = time.perf_counter()
            await tx.write_table(table, "a.parquet")
            took = time.perf_counter() - started
            await tx.rollback()
            return took

    with bench.scratch() as root:
        return anyio.run(run, f"{root}/target")


def stage(bench: Bench, rows: int, rounds: int) -> None:
    """One size of a table."""
    table = table_of(rows)
    contenders: dict[str, Run] = {
        "pyarrow.parquet.write_table": lambda: direct(bench, table),
        "the same in a worker thread": lambda: in_thread(bench, table),
        "staged write_table": lambda: staging(bench, table),
    }
    group, base = f"staging {rows:,} rows", "pyarrow.parquet.write_table"
    bench.compare(group, contenders, rounds, base=base)
    bench.hold(f"{group}, to pyarrow directly", (group, "staged write_table"), (group, base), at_most=1.05)


# ------------------------------------------------------------------------------------------------------------- overwriting


def second(bench: Bench, write: Callable[[str], object], old: int = 0) -> float:
    """The second of two writes, which overwrites; or the first, over so many files."""
    with bench.scratch() as root:
        if old:
            lay(f"{root}/target", old)
        else:
            write(f"{root}/target")
        sync(root)
        started = time.perf_counter()
        write(f"{root}/target")
        return time.perf_counter() - started


def with_dataset(table: pyarrow.Table, directory: str, rows: int | None = None) -> None:
    """All of it in one file, or in files of so many rows."""
    limits = {} if rows is None else {"max_rows_per_file": rows, "max_rows_per_group": rows}
    pyarrow.dataset.write_dataset(
        table, directory, format="parquet", existing_data_behavior="delete_matching", **limits
    )


def with_delta(table: pyarrow.Table, directory: str, by: list[str] | None = None) -> None:
    deltalake.write_deltalake(directory, table, mode="overwrite", partition_by=by)


def with_staged(table: pyarrow.Table, target: str, durability: str, rows: int | None = None) -> None:
    """The very files of `with_dataset`, written into a transaction."""

    async def run() -> None:
        async with (
            open_store(target, durability=durability) as store,
            store.staged_write("full_drop") as tx,
            tx.dir() as local,
        ):
            await anyio.to_thread.run_sync(with_dataset, table, local, rows)

    anyio.run(run)


def overwrite(bench: Bench, rows: int) -> None:
    """A table in one file."""
    table = table_of(rows)
    contenders: dict[str, Run] = {
        "write_dataset, delete_matching": lambda: second(bench, lambda at: with_dataset(table, at)),
        "deltalake, overwrite": lambda: second(bench, lambda at: with_delta(table, at)),
        "staged full_drop": lambda: second(bench, lambda at: with_staged(table, at, "none")),
        "staged full_drop, synced": lambda: second(bench, lambda at: with_staged(table, at, "full")),
    }
    group = f"overwriting a table of {rows:,} rows, from the first byte on"
    bench.compare(group, contenders, 3 if bench.quick else 7, base="write_dataset, delete_matching")


def overwrite_files(bench: Bench, count: int) -> None:
    """A table in many files: what commits is no step of its own in pyarrow and Delta, so the whole is measured."""
    table = pyarrow.table({"n": list(range(count)), "part": list(range(count))})
    contenders: dict[str, Run] = {
        "write_dataset, delete_matching": lambda: second(bench, lambda at: with_dataset(table, at, 1), count),
        "deltalake, overwrite, as many partitions": lambda: second(bench, lambda at: with_delta(table, at, ["part"])),
        "staged full_drop": lambda: second(bench, lambda at: with_staged(table, at, "none", 1), count),
    }
    if count <= 1_000:  # what was synced takes long to remove
        contenders["staged full_drop, synced"] = lambda: second(
            bench, lambda at: with_staged(table, at, "full", 1), count
        )
    group = f"overwriting a table of {count:,} files, from the first byte on"
    bench.compare(group, contenders, 3, base="write_dataset, delete_matching", warm_up=count == 100)


def run(bench: Bench) -> None:
    """Staging alone, then a whole overwrite."""
    stage(bench, 1_000, 5 if bench.quick else 25)
    stage(bench, 500_000 if bench.quick else 5_000_000, 3 if bench.quick else 7)
    overwrite(bench, 100_000 if bench.quick else 1_000_000)
    for count in (100, 1_000) if bench.quick else (100, 10_000):
        overwrite_files(bench, count)
    bench.note("Not run: pyarrow's and Delta's overwrite in 100,000 files, which takes minutes each time.")
