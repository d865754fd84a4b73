"""gcsfs: uploads of one transaction, written in threads; it finishes them one after another when the transaction ends."""

from __future__ import annotations

import time

from gcsfs import GCSFileSystem

from .job import PIECE, Job, asked, tell


def main(job: Job) -> None:
    data = memoryview(bytes(job.size))
    system = GCSFileSystem(endpoint_url=job.far, token="anon", skip_instance_cache=True)
    system.ls(job.place)

    def put(name: str) -> None:
        with system.open(f"{job.place}/t/{name}", "wb") as file:
            for at in range(0, job.size, PIECE):
                file.write(data[at : at + PIECE])

    began = time.perf_counter()
    with system.transaction:
        job.at_once(put, job.names)
        written = time.perf_counter()
    ended = time.perf_counter()
    assert len(system.ls(f"{job.place}/t", refresh=True)) == job.files
    tell(whole=ended - began, commit=ended - written)


main(asked())
