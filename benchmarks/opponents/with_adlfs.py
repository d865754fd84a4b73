"""adlfs: what it calls a transaction, written in threads; each file is there once it is closed, and its end does nothing."""

from __future__ import annotations

import os
import time

from adlfs import AzureBlobFileSystem

from .job import PIECE, Job, asked, tell


def main(job: Job) -> None:
    data = memoryview(bytes(job.size))
    account, key = os.environ["AZURE_STORAGE_ACCOUNT"], os.environ["AZURE_STORAGE_KEY"]
    connection = f"BlobEndpoint={job.far};AccountName={account};AccountKey={key}"
    system = AzureBlobFileSystem(connection_string=connection, skip_instance_cache=True)
    system.ls(job.place)

    def put(name: str) -> None:
        with system.open(f"{job.place}/t/{name}", "wb") as file:
            for at in range(0, job.size, PIECE):
                file.write(data[at : at + PIECE])

    began = time.perf_counter()
    with system.transaction:
        job.at_once(put, job.names)
    ended = time.perf_counter()
    assert len(system.ls(f"{job.place}/t", refresh=True)) == job.files
    tell(whole=ended - began)


main(asked())
