"""How long it takes until staged files are in place: ours beside everything that people use for it.

In each run so many files are written first, which is not measured. Then the clock runs until all are where they belong.
Without durability all of them were synced before, so that no disk writes them meanwhile; with it, none. They are empty:
bytes would add the same to both sides of a ratio, and some disks take milliseconds to free those of each file afterwards.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import aiofiles.os
import anyio
import fsspec
from bench import Bench, Run, sync

from staged import open_store
from staged.model import Event, Published

ROUNDS = {100: 15, 10_000: 3, 100_000: 1}


def lay(directory: str, count: int, directories: int = 0) -> list[str]:
    """So many empty files in a directory, or spread over so many below it; their names."""
    os.makedirs(directory, exist_ok=True)
    for number in range(directories):
        os.mkdir(f"{directory}/d{number:03d}")
    names = [(f"d{number % directories:03d}/" if directories else "") + f"f{number:06d}" for number in range(count)]
    for name in names:
        with open(f"{directory}/{name}", "wb"):
            pass
    return names


@contextmanager
def sides(bench: Bench, count: int, *, synced: bool = True) -> Iterator[tuple[str, str, list[str]]]:
    """A source full of files, and an empty goal beside it."""
    with bench.scratch() as root:
        os.mkdir(f"{root}/goal")
        sync(root)
        names = lay(f"{root}/source", count)
        if synced:
            sync(root)
        yield f"{root}/source", f"{root}/goal", names


# ------------------------------------------------------------------------------------------------------------- opponents


def bare(bench: Bench, count: int) -> float:
    with sides(bench, count) as (source, goal, names):
        started = time.perf_counter()
        for name in names:
            os.rename(f"{source}/{name}", f"{goal}/{name}")
        return time.perf_counter() - started


def bare_synced(bench: Bench, count: int) -> float:
    """One sync of the file system, the loop, and a sync of the touched directory."""
    with sides(bench, count, synced=False) as (source, goal, names):
        started = time.perf_counter()
        sync(source)
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


async def with_anyio(old: str, new: str) -> None:
    await anyio.Path(old).rename(new)


def with_fsspec(bench: Bench, count: int, elsewhere: str | None = None) -> float:
    """The end of a transaction of fsspec's local file system: each file moves from the temporary directory."""
    with bench.scratch() as root, bench.scratch(elsewhere) as temporary:
        fs = fsspec.filesystem("file", skip_instance_cache=True)
        before, tempfile.tempdir = tempfile.tempdir, temporary
        try:
            fs.start_transaction()
            for number in range(count):
                with fs.open(f"{root}/f{number:06d}", "wb"):
                    pass
            sync(root)
            started = time.perf_counter()
            fs.end_transaction()
            return time.perf_counter() - started
        finally:
            tempfile.tempdir = before


# ------------------------------------------------------------------------------------------------------------------ ours


def ours(
    bench: Bench,
    count: int,
    mode: str,
    durability: str,
    *,
    below: str = "",
    old: int = 0,
    old_directories: int = 0,
    keep_old: int = 1,
) -> dict[str, float]:
    """Each step of a commit: its preparation; from there until all is visible; from there until nothing is left to do.

    Args:
        below: The files are staged in this directory, which the target does not have.
        old: So many files are in the target before.
    """
    visible = 0.0

    def note(event: Event) -> None:
        nonlocal visible
        if isinstance(event, Published):
            visible = time.perf_counter()

    async def run(target: str) -> dict[str, float]:
        async with open_store(target, durability=durability, observers=[note]) as store:
            tx = await store.begin(mode, keep_old=keep_old)
            async with tx.dir() as local:
                await anyio.to_thread.run_sync(lay, f"{local}/{below}", count)
            if durability == "none":
                await anyio.to_thread.run_sync(sync, target)
            started = time.perf_counter()
            await tx.prepare()
            prepared = time.perf_counter()
            await tx.commit()
            ended = time.perf_counter()
        return {
            "prepare": prepared - started,
            "visible": visible - prepared,
            "after": ended - visible,
            "commit": ended - prepared,
            "whole": ended - started,
        }

    with bench.scratch() as root:
        lay(f"{root}/target", old, old_directories)
        sync(root)
        return anyio.run(run, f"{root}/target")


def append(bench: Bench, count: int, durability: str, below: str = "") -> dict[str, float]:
    took = ours(bench, count, "append", durability, below=below)
    return {"": took["commit"], ", with preparation": took["whole"]}


def full_drop(bench: Bench, count: int, durability: str) -> dict[str, float]:
    took = ours(bench, count, "full_drop", durability)
    return {"": took["visible"], ", with preparation": took["prepare"] + took["visible"]}


# ------------------------------------------------------------------------------------------------------------------- run


def commits(bench: Bench, count: int) -> None:
    """One size, side by side."""
    contenders: dict[str, Run] = {
        "os.rename, one after another": lambda: bare(bench, count),
        "the same, synced": lambda: bare_synced(bench, count),
        "shutil.move": lambda: move(bench, count),
        "aiofiles": lambda: awaited(bench, count, aiofiles.os.rename),
        "anyio.Path": lambda: awaited(bench, count, with_anyio),
        "fsspec transaction": lambda: with_fsspec(bench, count),
        "staged append": lambda: append(bench, count, "none"),
        "staged append into a new directory": lambda: append(bench, count, "none", "new"),
        "staged append, synced": lambda: append(bench, count, "full"),
        "staged full_drop": lambda: full_drop(bench, count, "none"),
        "staged full_drop, synced": lambda: full_drop(bench, count, "full"),
    }
    if bench.elsewhere is not None:
        contenders["fsspec transaction across devices"] = lambda: with_fsspec(bench, count, bench.elsewhere)
    rounds = 3 if bench.quick else ROUNDS[count]
    # The smaller sizes have warmed up what there is to warm up.
    bench.compare(group(count), contenders, rounds, base="os.rename, one after another", warm_up=count == 100)


def old_trees(bench: Bench, old: int) -> None:
    """A full_drop over a large tree, which it then removes, beside `rm -rf`."""

    def over(count: int, old: int, directories: int = 0) -> dict[str, float]:
        took = ours(bench, count, "full_drop", "none", old=old, old_directories=directories, keep_old=0)
        return {": visible": took["visible"], ": old tree removed": took["after"]}

    def remove(directories: int = 0) -> float:
        with bench.scratch() as root:
            lay(f"{root}/tree", old, directories)
            sync(root)
            started = time.perf_counter()
            subprocess.run(["rm", "-rf", f"{root}/tree"], check=True)
            return time.perf_counter() - started

    contenders: dict[str, Run] = {
        "100 over 100": lambda: over(100, 100),
        "as many over them": lambda: over(old, old),
        "100 over them in 100 directories": lambda: over(100, old, 100),
        "rm -rf of them": remove,
        "rm -rf of them in 100 directories": lambda: remove(100),
    }
    bench.compare(f"full_drop over {old:,} old files", contenders, 3, base="rm -rf of them", warm_up=False)


def group(count: int) -> str:
    return f"commit of {count:,} files"


def run(bench: Bench) -> None:
    """All sizes, side by side."""
    sizes = [100, 10_000] if bench.quick else [100, 10_000, 100_000]
    for count in sizes:
        commits(bench, count)
    if bench.elsewhere is None:
        bench.note("No directory on another device was found: fsspec's transaction across devices was left out.")
    largest = sizes[-1]
    old_trees(bench, largest)
    for how in ("staged full_drop", "staged full_drop, synced"):
        budget = f"{how} of {largest:,} files until visible, to 100 files"
        bench.hold(budget, (group(largest), how), (group(100), how), at_most=2)
    hundred = group(100_000)
    budget = "staged full_drop of 100,000 files until visible: so many times faster than os.rename"
    bench.hold(budget, (hundred, "os.rename, one after another"), (hundred, "staged full_drop"), at_least=500)
    over = f"full_drop over {largest:,} old files"
    removals = {
        "as many over them": "rm -rf of them",
        "100 over them in 100 directories": "rm -rf of them in 100 directories",
    }
    for what, removal in removals.items():
        budget = f"full_drop, {what} ({largest:,} old files), until visible, to 100 over 100"
        bench.hold(budget, (over, f"{what}: visible"), (over, "100 over 100: visible"), at_most=2)
        budget = f"full_drop, {what} ({largest:,} old files), removing these, to rm -rf"
        bench.hold(budget, (over, f"{what}: old tree removed"), (over, removal), at_most=1.1)
    for count in sizes[1:]:
        at = group(count)
        budget = f"staged append of {count:,} files, commit alone, to os.rename"
        bench.hold(budget, (at, "staged append"), (at, "os.rename, one after another"), at_most=1.15)
        budget = f"staged append of {count:,} files: so many times faster than aiofiles"
        bench.hold(budget, (at, "aiofiles"), (at, "staged append"), at_least=3)
        budget = f"staged append of {count:,} files, durable, with its syncfs, to the same loop"
        bench.hold(budget, (at, "staged append, synced, with preparation"), (at, "the same, synced"), at_most=1.3)
