"""Runs the recipe of an ETL, dies where it is told to, and is started again until it ends; a line of JSON for each death.

    python tests/etl_runs.py KIND CASE=URL…

A case is such as `any:20+40`, which dies at the 20th call of a driver in its first life, at the 60th in the next, and so on
until a life gets through; or `journal:5`, which dies once, at the 5th call for the journal. Both for each of two runs. Run as
a program, it has no threads itself, so that forking is safe.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import pyarrow
from kinds import Row, root_of
from recipes import etl

from staged import Store, open_store
from staged.testing.faults import FaultDriver, Moment

RUNS = ("1", "2")
APPENDED = tuple(f"a{number}" for number in range(9))
DROPPED = tuple(f"d{number}" for number in range(3))
ENTITIES = APPENDED + DROPPED
EMPTY = {("a1", "2"), ("d1", "2")}
"""What has nothing, or nothing new, in a run."""
BREAKING = {("a0", "1"), ("a4", "1"), ("d2", "1"), ("a2", "2"), ("d0", "2")}
"""Whose source breaks off at its first reading."""
KEYS = {**{name: ["id"] for name in ENTITIES}, "journal": ["run", "entity"]}
PERIOD = 0.3
TRIES = 6

Gate = Callable[[str, str, Moment], Awaitable[None]]


def source(name: str, run: str) -> list[Row]:
    """What the source holds of an entity at the time of a run."""
    count = 3 + int(name[1:])
    if name in APPENDED:
        count += 4 if run == "2" and (name, run) not in EMPTY else 0
        return [{"id": number + 1, "v": f"{name}, {number}"} for number in range(count)]
    return [] if (name, run) in EMPTY else [{"id": number + 1, "v": f"{name}, run {run}"} for number in range(count)]


def batches(name: str, run: str, broken: set[str]) -> Callable[[int], AsyncGenerator[pyarrow.Table, None]]:
    """A source that gives three rows at a time."""

    async def give(after: int) -> AsyncGenerator[pyarrow.Table, None]:
        rows = [row for row in source(name, run) if row["id"] > after]
        for start in range(0, len(rows), 3):
            await anyio.lowlevel.checkpoint()
            yield pyarrow.Table.from_pylist(rows[start : start + 3])
            if (name, run) in BREAKING and name not in broken:
                broken.add(name)
                raise ConnectionError(f"The source of {name} broke off.")

    return give


def entities(run: str) -> list[etl.Entity]:
    """The dozen, as the recipe takes them; in a new process they break again."""
    broken: set[str] = set()
    return [
        etl.Entity(name, "append" if name in APPENDED else "full_drop", batches(name, run, broken), allow_empty=True)
        for name in ENTITIES
    ]


def lines() -> list[Row]:
    """What the journal holds after both runs, sorted."""
    found = []
    for run in RUNS:
        for name in ENTITIES:
            last = len(source(name, run))
            before = len(source(name, "1")) if name in APPENDED and run == "2" else 0
            mode, phase = "append" if name in APPENDED else "full_drop", "committed" if last > before else "empty"
            told = {"phase": phase, "rows": last - before, "watermark": last}
            found.append({"run": run, "entity": name, "mode": mode, **told})
    return found


async def free(name: str, call: str, moment: Moment) -> None:
    """The gate that is always open."""


@asynccontextmanager
async def opened(kind: str, url: str, gate: Gate = free) -> AsyncIterator[Mapping[str, Store]]:
    """A store for each entity, and one for the journal, over one connection."""
    root = root_of(kind, url, period=PERIOD, **({"keys": KEYS} if kind == "open_mirroring" else {}))
    try:
        yield {name: open_store(FaultDriver(root.child(name), partial(gate, name))) for name in KEYS}
    finally:
        await root.aclose()


async def load(kind: str, url: str, run: str, gate: Gate = free) -> None:
    """One run in one process."""
    async with opened(kind, url, gate) as stores:
        failed = await etl.run_all(run, entities(run), stores, stores["journal"], tries=TRIES)
    for error in failed.values():
        raise error


async def clean(kind: str, url: str) -> None:
    """What is done after deaths: gc recovers first."""
    async with opened(kind, url) as stores, anyio.create_task_group() as tasks:
        for store in stores.values():
            tasks.start_soon(partial(store.gc, older_than=timedelta(0)))


def dies(where: str, number: int, moment: Moment) -> Gate:
    """Die before or after the call of that number; say so first."""
    counts = {"before": 0, "after": 0}

    async def gate(name: str, call: str, now: Moment) -> None:
        if where in ("any", name):
            counts[now] = counts.get(now, 0) + 1
            if now == moment and counts[now] == number:
                told = json.dumps({"name": name, "call": call, "moment": moment, "number": number})
                os.write(1, f"{told}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)

    return gate


def fork(work: Callable[[], Any]) -> int:
    """Do this work in a child; its exit status, negative for a signal."""
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(kind: str, words: list[str]) -> int:
    # What is loaded here need not be loaded in each life.
    root_of(kind, words[0].partition("=")[2])
    importlib.import_module("staged.arrow")
    if kind != "local":
        importlib.import_module("azure.core.pipeline.transport._aiohttp")
    for word in words:
        case, _, url = word.partition("=")
        where, _, numbers = case.partition(":")
        first, _, stride = numbers.partition("+")
        for run in RUNS:
            at, moment = int(first), "before"
            while True:
                gate = dies(where, at, "before" if moment == "before" else "after")
                ended = fork(lambda: anyio.run(load, kind, url, run, gate))  # noqa: B023 - done at once
                if ended != -signal.SIGKILL:
                    break
                at, moment = at + int(stride) if stride else 1_000_000, "after" if moment == "before" else "before"
            if ended:
                return ended
        if fork(lambda: anyio.run(clean, kind, url)):  # noqa: B023
            return 1
        print(json.dumps({"ended": case}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
