"""S3."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Self

import objects
from bench import Bench
from objects import Opponent

from stores import Proxied


class S3(Proxied):
    """MiniStack."""

    kind, unit = "S3", "completions"
    by_hand = Opponent("with_boto3", "completions")
    writers: Mapping[str, Opponent] = {
        "s3fs, a transaction": Opponent("with_s3fs", needs=("s3fs",)),
        "boto3, uploads, copies and deletions": Opponent("with_boto3", "moves"),
        "boto3, no transaction": Opponent("with_boto3", "uploads"),
        "obstore, no transaction": Opponent("with_obstore", needs=("obstore",)),
    }
    base = "boto3, no transaction"
    # Its table is in memory as a whole.
    overwriters: Mapping[str, Opponent] = {
        "awswrangler, overwrite": Opponent("with_awswrangler", needs=("awswrangler",), largest=1 << 20)
    }
    environment: Mapping[str, str] = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }
    removes = 1_000

    def __enter__(self) -> Self:
        from s3 import S3Proxy, S3Server

        with ExitStack() as stack:
            self._server = stack.enter_context(S3Server("ministack"))
            self.proxy = stack.enter_context(S3Proxy(self._server.url))
            self.near, self.far = self._server.url, self.proxy.url
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def place(self) -> str:
        return self._server.bucket()

    def drop(self, place: str) -> None:
        client = self._server.client()
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=place):
            if found := page.get("Contents"):
                client.delete_objects(Bucket=place, Delete={"Objects": [{"Key": one["Key"]} for one in found]})
        client.delete_bucket(Bucket=place)

    def copies(self) -> int:
        return self.proxy.counts["CopyObject"] + self.proxy.counts["UploadPartCopy"]

    def removals(self) -> int:
        removed = [record.keys for record in self.proxy.log if record.operation in ("DeleteObject", "DeleteObjects")]
        return sum(any("_staged" not in key.split("/") for key in keys) for keys in removed)


def run(bench: Bench) -> None:
    objects.run(bench, S3(), large=True)
