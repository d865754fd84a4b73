"""How long it takes to move staged files into place: ours beside everything that people use for it."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import aiofiles.os
import anyio
import fsspec
import pyarrow
import pyarrow.dataset
from bench import Bench

from staged import open_store
from staged.model import Event, Published

DATA = b"x" * 100
SMALL = 10_000
"""Opponents that await each file are not asked for more."""


def lay(directory: str, count: int) -> list[str]:
    """So many small files in a fresh directory; their names."""
    shutil.rmtree(directory, ignore_errors=True)
    os.makedirs(directory)
    names = [f"f{number:06d}" for number in range(count)]
    for name in names:
        with open(os.path.join(directory, name), "wb") as file:
            file.write(DATA)
    return names


@contextmanager
def sides(bench: Bench, count: int) -> Iterator[tuple[str, str, list[str]]]:
    """A source full of files, and an empty goal beside it."""
    with bench.scratch() as root:
        names = lay(f"{root}/source", count)
        os.makedirs(f"{root}/goal")
        yield f"{root}/source", f"{root}/goal", names


def bare(bench: Bench, count: int) -> float:
    with sides(bench, count) as (source, goal, names):
        started = time.perf_counter()
        for name in names:
            os.rename(f"{source}/{name}", f"{goal}/{name}")
        return time.perf_counter() - started


def bare_synced(bench: Bench, count: int) -> float:
    """One sync of the file system, the loop, and a sync of the touched directory."""
    with sides(bench, count) as (source, goal, names):
        started = time.perf_counter()
        os.sync()
        for name in names:
            os.rename(f"{source}/{name}", f"{goal}/{name}")
        fd = os.open(goal, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        return time.perf_counter() - started


def move(bench: Bench, count: int) -> float:
    with sides(bench, count) as (source, goal, names):
        started = time.perf_counter()
        for name in names:
            shutil.move(f"{source}/{name}", f"{goal}/{name}")
        return time.perf_counter() - started


def awaited(bench: Bench, count: int, rename: Callable[[str, str], Awaitable[object]]) -> float:
    with sides(bench, count) as (source, goal, names):

        async def run() -> float:
            started = time.perf_counter()
            for name in names:
                await rename(f"{source}/{name}", f"{goal}/{name}")
            return time.perf_counter() - started

        return anyio.run(run)


def with_fsspec(bench: Bench, count: int, elsewhere: str | None = None) -> float:
    """The end of a transaction of fsspec's local file system: each file moves from the temporary directory."""
    with bench.scratch() as root, bench.scratch(elsewhere) as temporary:
        fs = fsspec.filesystem("file", auto_mkdir=True, skip_instance_cache=True)
        before = tempfile.tempdir
        tempfile.tempdir = temporary
        try:
            fs.start_transaction()
            for number in range(count):
                with fs.open(f"{root}/goal/f{number:06d}", "wb") as file:
                    file.write(DATA)
            started = time.perf_counter()
            fs.end_transaction()
            return time.perf_counter() - started
        finally:
            tempfile.tempdir = before


def ours(bench: Bench, count: int, mode: str, durability: str, old: int = 0) -> float:
    """From the call of `commit` of what is prepared until everything is visible."""
    seen: list[float] = []

    def note(event: Event) -> None:
        if isinstance(event, Published):
            seen.append(time.perf_counter())

    async def run(target: str) -> float:
        async with open_store(target, durability=durability, observers=[note]) as store:
            tx = await store.begin(mode)
            async with tx.dir() as local:
                await anyio.to_thread.run_sync(lay, f"{local}/new", count)
            await tx.prepare()
            started = time.perf_counter()
            await tx.commit()
            # A full_drop is visible at its exchange; what follows is the next reader's business no more.
            return (seen[-1] if mode == "full_drop" else time.perf_counter()) - started

    with bench.scratch() as root:
        lay(f"{root}/target", old)
        return anyio.run(run, f"{root}/target")


def write_dataset(bench: Bench, count: int) -> float:
    """Writing the new files over the old: the whole of it, since nothing is staged."""
    with bench.scratch() as root:
        lay(f"{root}/target", 0)
        table = pyarrow.table({"n": list(range(count))})
        started = time.perf_counter()
        pyarrow.dataset.write_dataset(
            table,
            f"{root}/target",
            format="parquet",
            max_rows_per_file=1,
            max_rows_per_group=1,
            existing_data_behavior="delete_matching",
        )
        return time.perf_counter() - started


def run(bench: Bench) -> None:
    """All sizes, side by side."""
    for count in bench.sizes(100, 10_000, 100_000):
        base = bench.measure(f"commit {count:,}", "os.rename, one after another", lambda: bare(bench, count))
        bench.measure(f"commit {count:,}", "the same, synced", lambda: bare_synced(bench, count), base)
        for mode in ("append", "full_drop"):
            for durability in ("none", "full"):
                name = f"staged {mode}, durability {durability}"
                bench.measure(f"commit {count:,}", name, lambda: ours(bench, count, mode, durability), base)
        if count > SMALL:
            continue
        bench.measure(f"commit {count:,}", "shutil.move", lambda: move(bench, count), base)
        bench.measure(f"commit {count:,}", "aiofiles", lambda: awaited(bench, count, aiofiles.os.rename), base)
        each = lambda old, new: anyio.Path(old).rename(new)
        bench.measure(f"commit {count:,}", "anyio.Path", lambda: awaited(bench, count, each), base)
        bench.measure(f"commit {count:,}", "fsspec transaction", lambda: with_fsspec(bench, count), base)
        if bench.elsewhere:
            across = lambda: with_fsspec(bench, count, bench.elsewhere)
            bench.measure(f"commit {count:,}", "fsspec transaction across devices", across, base)
    few = bench.measure(
        "over an old tree", "full_drop over 100 files", lambda: ours(bench, 100, "full_drop", "full", 100)
    )
    for old in bench.sizes(10_000, 100_000):
        bench.measure(
            "over an old tree", f"over {old:,} files", lambda: ours(bench, 100, "full_drop", "full", old), few
        )
