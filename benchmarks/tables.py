"""Staging tables beside pyarrow, and overwriting a table beside pyarrow's and Delta's ways."""

from __future__ import annotations

import time
from collections.abc import Callable

import anyio
import numpy
import pyarrow
import pyarrow.dataset
import pyarrow.parquet
from bench import Bench

from staged import open_store


def table_of(rows: int) -> pyarrow.Table:
    chance = numpy.random.default_rng(7)
    return pyarrow.table({"n": numpy.arange(rows), "x": chance.random(rows), "k": chance.integers(0, 1000, rows)})


def direct(bench: Bench, table: pyarrow.Table) -> float:
    with bench.scratch() as root:
        started = time.perf_counter()
        pyarrow.parquet.write_table(table, f"{root}/a.parquet")
        return time.perf_counter() - started


def staging(bench: Bench, table: pyarrow.Table) -> float:
    async def run(target: str) -> float:
        async with open_store(target) as store:
            tx = await store.begin("append")
            started = time.perf_counter()
            await tx.write_table(table, "a.parquet")
            took = time.perf_counter() - started
            await tx.rollback()
            return took

    with bench.scratch() as root:
        return anyio.run(run, f"{root}/target")


def overwrite(bench: Bench, table: pyarrow.Table, durability: str) -> float:
    async def run(target: str) -> float:
        async with open_store(target, durability=durability) as store:
            for _ in range(2):
                started = time.perf_counter()
                async with store.staged_write("full_drop") as tx:
                    await tx.write_table(table, "a.parquet")
            return time.perf_counter() - started

    with bench.scratch() as root:
        return anyio.run(run, f"{root}/target")


def twice(bench: Bench, write: Callable[[str], object]) -> float:
    """The second of two writes, which overwrites."""
    with bench.scratch() as root:
        for _ in range(2):
            started = time.perf_counter()
            write(f"{root}/target")
        return time.perf_counter() - started


def run(bench: Bench) -> None:
    """Staging alone, then a whole overwrite."""
    import deltalake

    for rows in bench.sizes(1_000, 100_000) + ([5_000_000] if bench.largest >= 100_000 else []):
        table = table_of(rows)
        base = bench.measure(f"stage {rows:,} rows", "pyarrow.parquet.write_table", lambda: direct(bench, table))
        budget = 1.05 if rows > 1_000_000 else None
        bench.measure(f"stage {rows:,} rows", "staged write_table", lambda: staging(bench, table), base, budget=budget)

    def write_dataset(path: str) -> None:
        pyarrow.dataset.write_dataset(table, path, format="parquet", existing_data_behavior="delete_matching")

    table = table_of(1_000_000)
    group = "overwrite 1,000,000 rows"
    base = bench.measure(group, "write_dataset, delete_matching", lambda: twice(bench, write_dataset))
    bench.measure(group, "staged full_drop, durability none", lambda: overwrite(bench, table, "none"), base)
    bench.measure(group, "staged full_drop, durability full", lambda: overwrite(bench, table, "full"), base)
    delta = lambda path: deltalake.write_deltalake(path, table, mode="overwrite")
    bench.measure(group, "deltalake, overwrite", lambda: twice(bench, delta), base)
