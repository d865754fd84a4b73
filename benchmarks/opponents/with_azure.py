"""By the SDK, in threads: plain uploads; uploads, copies and deletions; or block lists of what is staged, alone."""

from __future__ import annotations

import os
import time

from azure.core import MatchConditions
from azure.core.credentials import AzureNamedKeyCredential
from azure.core.pipeline.transport import RequestsTransport
from azure.storage.blob import BlobBlock, BlobServiceClient, ContainerClient
from requests import Session
from requests.adapters import HTTPAdapter

from .job import PIECE, Job, asked, tell


def container_of(job: Job, url: str, tasks: int) -> ContainerClient:
    session = Session()
    session.mount("http://", HTTPAdapter(pool_maxsize=tasks))
    service = BlobServiceClient(
        url,
        credential=AzureNamedKeyCredential(os.environ["AZURE_STORAGE_ACCOUNT"], os.environ["AZURE_STORAGE_KEY"]),
        transport=RequestsTransport(session=session, session_owner=False),
        max_single_put_size=PIECE,
        max_block_size=PIECE,
    )
    return service.get_container_client(job.place)


def upload(container: ContainerClient, job: Job, prefix: str) -> None:
    data = bytes(job.size)
    job.at_once(lambda name: container.upload_blob(f"{prefix}/{name}", data, overwrite=True), job.names)


def move(container: ContainerClient, job: Job) -> None:
    """As is written by hand: each is copied, and then all are deleted by as few requests as can be."""

    def copy(name: str) -> None:
        source = container.get_blob_client(f"staging/{name}").url
        # Within an account it is done when it is answered.
        assert container.get_blob_client(f"goal/{name}").start_copy_from_url(source)["copy_status"] == "success"

    job.at_once(copy, job.names)
    for at in range(0, job.files, 256):
        container.delete_blobs(*[f"staging/{name}" for name in job.names[at : at + 256]])


def complete(container: ContainerClient, job: Job) -> float:
    """Seconds of the block lists alone, on the condition that ours have."""
    near = container_of(job, job.near, 16)
    data, blocks = bytes(job.size), [BlobBlock("f" * 56)]

    def end(name: str) -> None:
        container.get_blob_client(name).commit_block_list(blocks, match_condition=MatchConditions.IfMissing)

    job.at_once(lambda name: near.get_blob_client(name).stage_block("f" * 56, data), job.names)
    began = time.perf_counter()
    job.at_once(end, job.names)
    return time.perf_counter() - began


def main(job: Job) -> None:
    container = container_of(job, job.far, job.tasks)
    container.exists()
    if job.work == "completions":
        tell(whole=complete(container, job))
        return
    began = time.perf_counter()
    upload(container, job, "goal" if job.work == "uploads" else "staging")
    uploaded = time.perf_counter()
    if job.work == "uploads":
        tell(whole=uploaded - began)
        return
    move(container, job)
    ended = time.perf_counter()
    tell(whole=ended - began, commit=ended - uploaded)


main(asked())
