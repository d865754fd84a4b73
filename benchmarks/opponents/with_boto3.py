"""By the SDK, in threads: plain uploads; uploads, copies and deletions; or completions of uploads with nothing around them."""

from __future__ import annotations

import io
import time
from typing import TYPE_CHECKING

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config

from .job import PIECE, Job, asked, tell

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client


def client(url: str, tasks: int) -> S3Client:
    return boto3.client("s3", endpoint_url=url, config=Config(max_pool_connections=tasks))


def upload(s3: S3Client, job: Job, prefix: str) -> None:
    """The threads are those of the files: a file's own would be made anew for each."""
    data, config = bytes(job.size), TransferConfig(use_threads=False)

    def put(name: str) -> None:
        if job.size <= PIECE:
            s3.put_object(Bucket=job.place, Key=f"{prefix}/{name}", Body=data)
        else:
            s3.upload_fileobj(io.BytesIO(data), job.place, f"{prefix}/{name}", Config=config)

    job.at_once(put, job.names)


def move(s3: S3Client, job: Job) -> None:
    """As is written by hand: each is copied, and then all are deleted by as few requests as can be."""

    def copy(name: str) -> None:
        source = {"Bucket": job.place, "Key": f"staging/{name}"}
        s3.copy_object(Bucket=job.place, Key=f"goal/{name}", CopySource=source)  # type: ignore[arg-type]

    job.at_once(copy, job.names)
    for at in range(0, job.files, 1_000):
        objects = [{"Key": f"staging/{name}"} for name in job.names[at : at + 1_000]]
        s3.delete_objects(Bucket=job.place, Delete={"Objects": objects, "Quiet": True})  # type: ignore[typeddict-item]


def complete(s3: S3Client, job: Job) -> float:
    """Seconds of the completions alone."""
    near, uploads = client(job.near, 16), {}

    def begin(name: str) -> None:
        upload = near.create_multipart_upload(Bucket=job.place, Key=name)["UploadId"]
        part = near.upload_part(Bucket=job.place, Key=name, UploadId=upload, PartNumber=1, Body=b"x" * job.size)
        uploads[name] = upload, part["ETag"]

    def end(name: str) -> None:
        upload, etag = uploads[name]
        parts = {"Parts": [{"ETag": etag, "PartNumber": 1}]}
        s3.complete_multipart_upload(Bucket=job.place, Key=name, UploadId=upload, MultipartUpload=parts)  # type: ignore[arg-type]

    job.at_once(begin, job.names)
    began = time.perf_counter()
    job.at_once(end, job.names)
    return time.perf_counter() - began


def main(job: Job) -> None:
    s3 = client(job.far, job.tasks)
    s3.head_bucket(Bucket=job.place)
    if job.work == "completions":
        tell(whole=complete(s3, job))
        return
    began = time.perf_counter()
    upload(s3, job, "goal" if job.work == "uploads" else "staging")
    uploaded = time.perf_counter()
    if job.work == "uploads":
        tell(whole=uploaded - began)
        return
    move(s3, job)
    ended = time.perf_counter()
    tell(whole=ended - began, commit=ended - uploaded)


main(asked())
