"""obstore: plain uploads in threads."""

from __future__ import annotations

import time

import obstore
from obstore.store import S3Store

from .job import Job, asked, tell


def main(job: Job) -> None:
    data = bytes(job.size)
    store = S3Store(job.place, endpoint=job.far, client_options={"allow_http": True})
    obstore.list(store).collect()

    began = time.perf_counter()
    job.at_once(lambda name: obstore.put(store, f"t/{name}", data), job.names)
    tell(whole=time.perf_counter() - began)


main(asked())
