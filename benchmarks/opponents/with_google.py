"""By the SDK, in threads: plain uploads; uploads, copies and deletions; or moves of what is there, with nothing around them."""

from __future__ import annotations

import io
import time

from google.auth.credentials import AnonymousCredentials
from google.cloud.storage import Bucket, Client
from requests.adapters import HTTPAdapter

from .job import PIECE, Job, asked, tell


def bucket_of(job: Job, url: str, tasks: int) -> Bucket:
    client = Client("project", AnonymousCredentials(), client_options={"api_endpoint": url})  # type: ignore[no-untyped-call]
    client._http.mount("http://", HTTPAdapter(pool_maxsize=tasks))
    return client.bucket(job.place)


def upload(bucket: Bucket, job: Job, prefix: str) -> None:
    data = bytes(job.size)

    def put(name: str) -> None:
        # What is larger is sent in pieces.
        blob = bucket.blob(f"{prefix}/{name}", chunk_size=PIECE if job.size > PIECE else None)
        blob.upload_from_file(io.BytesIO(data), size=job.size)

    job.at_once(put, job.names)


def move(bucket: Bucket, job: Job) -> None:
    """As is written by hand: each is copied, and then all are deleted by as few requests as can be."""
    job.at_once(lambda name: bucket.copy_blob(bucket.blob(f"staging/{name}"), bucket, f"goal/{name}"), job.names)
    for at in range(0, job.files, 100):
        with bucket.client.batch():
            for name in job.names[at : at + 100]:
                bucket.delete_blob(f"staging/{name}")


def moves(bucket: Bucket, job: Job) -> float:
    """Seconds of the moves alone, on the conditions that ours have."""
    near, staged = bucket_of(job, job.near, 16), {}

    def put(name: str) -> None:
        blob = near.blob(f"staging/{name}")
        blob.upload_from_string(bytes(job.size))
        staged[name] = blob.generation

    def show(name: str) -> None:
        source = bucket.blob(f"staging/{name}")
        bucket.move_blob(source, name, if_generation_match=0, if_source_generation_match=staged[name])

    job.at_once(put, job.names)
    began = time.perf_counter()
    job.at_once(show, job.names)
    return time.perf_counter() - began


def main(job: Job) -> None:
    bucket = bucket_of(job, job.far, job.tasks)
    bucket.exists()
    if job.work == "moves":
        tell(whole=moves(bucket, job))
        return
    began = time.perf_counter()
    upload(bucket, job, "goal" if job.work == "uploads" else "staging")
    uploaded = time.perf_counter()
    if job.work == "uploads":
        tell(whole=uploaded - began)
        return
    move(bucket, job)
    ended = time.perf_counter()
    tell(whole=ended - began, commit=ended - uploaded)


main(asked())
