"""Data Lake Storage behind 20 ms: ours beside what people do by hand and with adlfs, over the server that the tests use.

What is told is the time until all is in place; staging is not measured. `N x R / C` is what so many renames take at that
round trip, so many at once, if nothing else took time: not the requests around them, nor this machine's processor.
"""

from __future__ import annotations

import os
import time
from itertools import count

import anyio
from azure.core.credentials import AzureNamedKeyCredential
from azure.storage.blob.aio import BlobServiceClient
from azure.storage.filedatalake.aio import DataLakeServiceClient
from bench import Bench, Run
from proxy import delayed, started

from staged import open_store
from staged.drivers.adls import AdlsDriver

TESTS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tests")
ROUND_TRIP = 0.020
KEY = AzureNamedKeyCredential("account", "a2V5")
_numbers = count()


class Lake:
    """A server, and its address behind the delay."""

    def __init__(self, near: str, far: str) -> None:
        self.near, self.far = near, far

    def filesystem(self) -> str:
        """A fresh one."""
        name = f"fs{next(_numbers)}"

        async def make() -> None:
            async with DataLakeServiceClient(self.near, credential=KEY, retry_total=0) as service:
                await service.create_file_system(name)

        anyio.run(make)
        return name

    def lay(self, filesystem: str, files: int) -> list[str]:
        """Files in a directory `source`, and an empty directory `goal`."""

        async def lay() -> None:
            async with (
                BlobServiceClient(self.near, credential=KEY, retry_total=0) as service,
                DataLakeServiceClient(self.near, credential=KEY, retry_total=0) as names,
            ):
                container = service.get_container_client(filesystem)
                limit = anyio.CapacityLimiter(16)

                async def put(name: str) -> None:
                    async with limit:
                        await container.upload_blob(f"source/{name}", b"x" * 100)

                async with anyio.create_task_group() as tasks:
                    for name in found:
                        tasks.start_soon(put, name)
                await names.get_file_system_client(filesystem).create_directory("goal")

        found = [f"f{number:05d}" for number in range(files)]
        anyio.run(lay)
        return found


def ours(lake: Lake, mode: str, files: int, limit: int) -> float:
    """Seconds of a commit of prepared files."""
    filesystem = lake.filesystem()

    async def run() -> float:
        near = AdlsDriver(f"{lake.near}/{filesystem}/lake/t", credential=KEY, limit=limit)
        async with open_store(near) as store:
            async with store.staged_write("append") as first:
                await first.write("first", b"x")
            tx = await store.begin(mode)
            async with anyio.create_task_group() as tasks:
                for number in range(files):
                    tasks.start_soon(tx.write, f"f{number:05d}", b"x" * 100)
            await tx.prepare()
        async with open_store(AdlsDriver(f"{lake.far}/{filesystem}/lake/t", credential=KEY, limit=limit)) as store:
            await store.status()  # opens the client, and its first connection
            resumed = await store.resume(tx.id)
            began = time.perf_counter()
            await resumed.commit()
            return time.perf_counter() - began

    return anyio.run(run)


def by_hand(lake: Lake, files: int, tasks: int) -> float:
    """Seconds of renames by the SDK, so many at once, with nothing around them."""
    filesystem = lake.filesystem()
    names = lake.lay(filesystem, files)

    async def run() -> float:
        async with DataLakeServiceClient(lake.far, credential=KEY, retry_total=0) as service:
            client = service.get_file_system_client(filesystem)
            await client.get_file_client("source").exists()
            waiting = iter(names)

            async def work() -> None:
                for name in waiting:
                    await client.get_file_client(f"source/{name}").rename_file(f"{filesystem}/goal/{name}")

            began = time.perf_counter()
            async with anyio.create_task_group() as group:
                for _ in range(tasks):
                    group.start_soon(work)
            return time.perf_counter() - began

    return anyio.run(run)


def adlfs(lake: Lake, files: int) -> float:
    """Seconds of the first half of its `mv`, the copies; the deletions after it are batches, which the server does not take."""
    from adlfs import AzureBlobFileSystem

    filesystem = lake.filesystem()
    names = lake.lay(filesystem, files)
    connection = f"BlobEndpoint={lake.far};AccountName=account;AccountKey=a2V5"
    system = AzureBlobFileSystem(connection_string=connection, skip_instance_cache=True)
    began = time.perf_counter()
    system.copy([f"{filesystem}/source/{name}" for name in names], [f"{filesystem}/goal/{name}" for name in names])
    return time.perf_counter() - began


def run(bench: Bench) -> None:
    files = 100 if bench.quick else 1_000
    rounds = 2 if bench.quick else 3
    with started("-m", "dfs", cwd=TESTS) as near, delayed(near, ROUND_TRIP) as far:
        lake = Lake(near, far)
        group = f"ADLS behind 20 ms: {files:,} files"
        contenders: dict[str, Run] = {
            "staged append, 4 at once": lambda: ours(lake, "append", files, 4),
            "staged append, 16 at once": lambda: ours(lake, "append", files, 16),
            "staged full_drop, 16 at once": lambda: ours(lake, "full_drop", files, 16),
            "renames by hand, 4 at once": lambda: by_hand(lake, files, 4),
            "renames by hand, 16 at once": lambda: by_hand(lake, files, 16),
            "renames by hand, one after another": lambda: by_hand(lake, files, 1),
            "adlfs mv, its copies alone": lambda: adlfs(lake, files),
            "N x R / 4": lambda: files * ROUND_TRIP / 4,
            "N x R / 16": lambda: files * ROUND_TRIP / 16,
        }
        bench.compare(group, contenders, rounds, base="renames by hand, 16 at once", warm_up=False)
        for tasks in (4, 16):
            bench.hold(
                f"ADLS append of {files:,} files, {tasks} at once, to N x R / C",
                (group, f"staged append, {tasks} at once"),
                (group, f"N x R / {tasks}"),
                at_most=1.15,
            )
        few = "ADLS behind 20 ms: 10 files"
        bench.compare(few, {"staged full_drop": lambda: ours(lake, "full_drop", 10, 16)}, rounds, warm_up=False)
        bench.hold(
            f"ADLS full_drop of {files:,} files, to that of 10",
            (group, "staged full_drop, 16 at once"),
            (few, "staged full_drop"),
            at_most=2,
        )
    with started("-m", "dfs", "--plan", " ".join(f"throttles@{n * 5 + 3}" for n in range(4_000)), cwd=TESTS) as near:
        lake = Lake(near, near)
        # Of a store that refuses a fifth of all requests and asks for no pause.
        bench.compare(
            f"ADLS that throttles a fifth of the requests: {files:,} files",
            {"staged append, 16 at once": lambda: ours(lake, "append", files, 16)},
            1,
            warm_up=False,
        )
