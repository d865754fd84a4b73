"""What the transaction itself costs: empty ones, tiny ones, many at once, many entries, and the import."""

from __future__ import annotations

import subprocess
import sys
import time
import tracemalloc

import anyio
from bench import Bench

from staged import open_store
from staged.drivers.memory import MemoryDriver, MemoryStorage
from staged.model import Entry


def empty(bench: Bench) -> float:
    """Seconds of one transaction over the memory driver that does nothing but commit."""

    async def run(count: int) -> float:
        async with open_store(MemoryDriver("target", storage=MemoryStorage())) as store:
            started = time.perf_counter()
            for _ in range(count):
                async with store.staged_write("append"):
                    pass
            return (time.perf_counter() - started) / count

    return anyio.run(run, 300)


def tiny(bench: Bench, durability: str, count: int) -> float:
    """Seconds of each of many transactions of one small file, one after another."""

    async def run(target: str) -> float:
        async with open_store(target, durability=durability) as store:
            started = time.perf_counter()
            for number in range(count):
                async with store.staged_write("append") as tx:
                    await tx.write(f"f{number:06d}", b"x" * 100)
            return (time.perf_counter() - started) / count

    with bench.scratch() as root:
        return anyio.run(run, f"{root}/target")


def children(bench: Bench, count: int, at_once: bool) -> float:
    """Seconds to reload so many child stores, a few files each."""

    async def reload(store: object, name: str) -> None:
        async with store.child(name).staged_write("full_drop") as tx:  # type: ignore[attr-defined]
            for number in range(5):
                await tx.write(f"f{number}", b"x" * 10_000)

    async def run(target: str) -> float:
        async with open_store(target) as store:
            started = time.perf_counter()
            if at_once:
                async with anyio.create_task_group() as tasks:
                    for number in range(count):
                        tasks.start_soon(reload, store, f"t{number}")
            else:
                for number in range(count):
                    await reload(store, f"t{number}")
            return time.perf_counter() - started

    with bench.scratch() as root:
        return anyio.run(run, f"{root}/target")


def memory(bench: Bench, count: int) -> float:
    """Bytes that one of so many staged entries takes in its transaction."""

    async def run() -> float:
        async with open_store(MemoryDriver("target", storage=MemoryStorage())) as store:
            tx = await store.begin("append")
            tracemalloc.start()
            for number in range(count):
                path = f"year=2026/month={number % 12}/part-{number:08d}.parquet"
                await tx._add(Entry(path, 123_456, f"{number:x}-{number * 7:x}", path))
            held = tracemalloc.get_traced_memory()[0]
            tracemalloc.stop()
            await tx.rollback()
            return held / count

    return anyio.run(run)


def importing(bench: Bench, what: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", what], check=True)
    return time.perf_counter() - started


def run(bench: Bench) -> None:
    """Each by itself; the quickest to tell first."""
    base = bench.measure("import", "python, nothing", lambda: importing(bench, "pass"))
    bench.measure("import", "import anyio", lambda: importing(bench, "import anyio"), base)
    bench.measure("import", "import staged", lambda: importing(bench, "import staged"), base)
    bench.measure("a transaction", "empty, over memory", lambda: empty(bench))
    count = bench.sizes(1_000, 10_000)[-1]
    for durability in ("none", "full"):
        name = f"one file, the mean of {count:,}, durability {durability}"
        bench.measure("a transaction", name, lambda: tiny(bench, durability, count))
    base = bench.measure("40 child stores", "one after another", lambda: children(bench, 40, at_once=False))
    bench.measure("40 child stores", "at once", lambda: children(bench, 40, at_once=True), base)
    entries = bench.sizes(10_000, 100_000)[-1] * 10
    bench.measure("memory", f"each of {entries:,} staged entries", lambda: memory(bench, entries), unit="bytes")
