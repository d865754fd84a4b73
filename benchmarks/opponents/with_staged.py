"""Ours: files staged by a task each, and committed; `full_drop` removes as many others that are there."""

from __future__ import annotations

import os
import time

import anyio

from staged import Transaction, open_store
from staged.driver import Driver

from .job import PIECE, Job, asked, tell

RATED = "append, rated"


def driver(job: Job, url: str) -> Driver:
    """The store's."""
    place = f"{job.place}/lake/t"
    if job.kind == "S3":
        from staged.drivers.s3 import S3Driver

        return S3Driver(f"s3://{place}", endpoint_url=url, limit=job.tasks)
    if job.kind == "GCS":
        from google.auth.credentials import AnonymousCredentials

        from staged.drivers.gcs import GcsDriver

        # What waits for the service's rate is told apart: the others write no name twice.
        rate = 1.0 if job.work == RATED else 0.0
        credential = AnonymousCredentials()  # type: ignore[no-untyped-call]
        return GcsDriver(f"gs://{place}", credential=credential, api_endpoint=url, limit=job.tasks, rate=rate)
    from azure.core.credentials import AzureNamedKeyCredential

    from staged.drivers.azure_blob import AzureBlobDriver

    key = AzureNamedKeyCredential(os.environ["AZURE_STORAGE_ACCOUNT"], os.environ["AZURE_STORAGE_KEY"])
    return AzureBlobDriver(f"{url}/{place}", credential=key, limit=job.tasks)


async def stage(tx: Transaction, names: list[str], data: memoryview) -> None:
    async def put(name: str) -> None:
        async with tx.open(name) as file:
            for at in range(0, len(data), PIECE):
                await file.write(data[at : at + PIECE])

    async with anyio.create_task_group() as tasks:
        for name in names:
            tasks.start_soon(put, name)


async def run(job: Job) -> None:
    data = memoryview(bytes(job.size))
    if job.work == "full_drop":
        async with open_store(driver(job, job.near)) as store, store.staged_write("append") as tx:
            await stage(tx, [f"old/{name}" for name in job.names], data)
    async with open_store(driver(job, job.far)) as store:
        await store.status()  # opens the client, and its first connection
        began = time.perf_counter()
        tx = await store.begin(job.work.partition(",")[0])
        await stage(tx, job.names, data)
        staged = time.perf_counter()
        await tx.prepare()
        prepared = time.perf_counter()
        await tx.commit()
        ended = time.perf_counter()
        tell(whole=ended - began, prepare=prepared - staged, commit=ended - prepared)


anyio.run(run, asked())
