"""What the transaction itself costs: empty ones, tiny ones, many at once, many entries, and the import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import anyio
from bench import Bench, Run, sync

from staged import Store, open_store
from staged.drivers.memory import MemoryDriver, MemoryStorage

DATA = b"x" * 100
MEMORY = os.path.join(os.path.dirname(__file__), "memory.py")


def empty() -> float:
    """Seconds of one transaction over the memory driver that does nothing but commit."""

    async def run(count: int) -> float:
        async with open_store(MemoryDriver("target", storage=MemoryStorage())) as store:
            started = time.perf_counter()
            for _ in range(count):
                async with store.staged_write("append"):
                    pass
            return (time.perf_counter() - started) / count

    return anyio.run(run, 200)


class Tiny:
    """Transactions of one small file, one after another on one target: each run makes so many more, and tells the mean."""

    def __init__(self, directory: str, durability: str, count: int) -> None:
        self._target = f"{directory}/ours-{durability}"
        self._plain = f"{directory}/plain-{durability}"
        self._durability = durability
        self._count = count
        self._made = 0
        self._renamed = 0
        os.mkdir(self._plain)

    def ours(self) -> float:
        return anyio.run(self._ours)

    async def _ours(self) -> float:
        async with open_store(self._target, durability=self._durability) as store:
            async with store.staged_write("append"):
                pass  # opens what is opened once
            sync(self._plain)
            started = time.perf_counter()
            for number in range(self._made, self._made + self._count):
                async with store.staged_write("append") as tx:
                    await tx.write(f"f{number:06d}", DATA)
            took = time.perf_counter() - started
        self._made += self._count
        return took / self._count

    def plain(self) -> float:
        """Each written beside its place, and renamed; with durability the file and its directory are synced."""
        sync(self._plain)
        started = time.perf_counter()
        for number in range(self._renamed, self._renamed + self._count):
            with open(f"{self._plain}/.new", "wb") as file:
                file.write(DATA)
                file.flush()
                if self._durability == "full":
                    os.fsync(file.fileno())
            os.rename(f"{self._plain}/.new", f"{self._plain}/f{number:06d}")
            if self._durability == "full":
                fd = os.open(self._plain, os.O_RDONLY)
                os.fsync(fd)
                os.close(fd)
        self._renamed += self._count
        return (time.perf_counter() - started) / self._count


def tiny(bench: Bench, durability: str, count: int) -> None:
    """So many in ten rounds; whether the last ones cost what the first ones did."""
    with bench.scratch() as directory:
        transactions = Tiny(directory, durability, count // 10)
        group = f"one of {count:,} tiny transactions, durability {durability}"
        contenders: dict[str, Run] = {"write and rename": transactions.plain, "staged append": transactions.ours}
        bench.compare(group, contenders, 10, base="write and rename", warm_up=False)
        result = bench.find(group, "staged append")
        assert result is not None
        print(f"  the last tenth took {result.values[-1] / result.values[0]:.2f} times what the first took")


def children(bench: Bench, durability: str, at_once: bool) -> float:
    """Seconds to reload forty child stores, five files each."""

    async def reload(store: Store, name: str) -> None:
        async with store.child(name).staged_write("full_drop") as tx:
            for number in range(5):
                await tx.write(f"f{number}", DATA * 100)

    async def run(target: str) -> float:
        async with open_store(target, durability=durability) as store:
            started = time.perf_counter()
            if at_once:
                async with anyio.create_task_group() as tasks:
                    for number in range(40):
                        tasks.start_soon(reload, store, f"t{number}")
            else:
                for number in range(40):
                    await reload(store, f"t{number}")
            return time.perf_counter() - started

    with bench.scratch() as root:
        sync(root)
        return anyio.run(run, f"{root}/target")


def forty(bench: Bench, durability: str) -> None:
    """Forty child stores, all at once and one after another."""
    contenders: dict[str, Run] = {
        "one after another": lambda: children(bench, durability, at_once=False),
        "at once": lambda: children(bench, durability, at_once=True),
    }
    group = f"40 child stores, durability {durability}"
    bench.compare(group, contenders, 2 if bench.quick else 5, base="one after another")


def memory(bench: Bench, count: int) -> dict[str, float]:
    """Bytes of a process for each of so many staged files, in a process of its own."""
    with bench.scratch() as root:
        command = [sys.executable, MEMORY, f"{root}/target", str(count)]
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE)
        found: dict[str, float] = json.loads(told.stdout)
        return found


def importing(what: str) -> float:
    """Seconds of an import alone, in a fresh interpreter."""
    program = f"import time; started = time.perf_counter(); import {what}; print(time.perf_counter() - started)"
    return float(subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE).stdout)


def run(bench: Bench) -> None:
    """Each by itself."""
    group = "an empty transaction"
    bench.compare(group, {"over the memory driver": empty}, 5)
    bench.hold("an empty transaction over the memory driver", (group, "over the memory driver"), at_most=0.001)
    tiny(bench, "none", 1_000 if bench.quick else 10_000)
    tiny(bench, "full", 100 if bench.quick else 1_000)
    for durability in ("none", "full"):
        forty(bench, durability)
    count = 100_000 if bench.quick else 1_000_000
    group = f"memory for each of {count:,} staged files"
    bench.compare(group, {"a full_drop": lambda: memory(bench, count)}, 1, unit="bytes", warm_up=False)
    for when in (", staged", ", at its peak"):
        bench.hold(f"{group}{when}", (group, f"a full_drop{when}"), at_most=1024)
    group = "import"
    imports: dict[str, Run] = {"import anyio": lambda: importing("anyio"), "import staged": lambda: importing("staged")}
    bench.compare(group, imports, 5 if bench.quick else 15)
    bench.hold("import staged", (group, "import staged"), at_most=0.05)
