"""`python memory.py TARGET COUNT`: bytes of this process for each file of a transaction, as JSON."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys

import anyio

from staged import open_store


def now(what: str) -> int:
    """Bytes of this process: `VmRSS` now, or `VmHWM` at the peak."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(f"{what}:"))


def lay(directory: str, count: int) -> None:
    """So many empty files, a hundred directories of them."""
    for number in range(count):
        below = f"{directory}/year=2026/month={number % 100:02d}"
        if number < 100:
            os.makedirs(below)
        with open(f"{below}/part-{number:08d}.parquet", "wb"):
            pass


async def main(target: str, count: int) -> None:
    """Stage, prepare and commit."""
    async with open_store(target, durability="none") as store:
        async with store.staged_write("append") as tx:
            await tx.write("first", b"")  # threads and modules are there from here on
        before = now("VmRSS")
        tx = await store.begin("full_drop")
        async with tx.dir() as local:
            await anyio.to_thread.run_sync(lay, local, count)
        staged = now("VmRSS") - before
        await tx.commit()
        peak = now("VmHWM") - before
    print(json.dumps({", staged": staged / count, ", at its peak": peak / count}))


if __name__ == "__main__":
    anyio.run(main, sys.argv[1], int(sys.argv[2]))
