"""Amazon S3, against servers that are real."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from anyio import to_thread
from s3 import S3Server

from staged.driver import Driver
from staged.drivers.s3 import S3Driver
from staged.testing.conformance import DriverConformance
from staged.testing.harness import Files, Harness, Step

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

_NUMBERS = itertools.count()


class S3Harness(Harness):
    """A target of its own in a bucket.

    Args:
        client: Behind the drivers' back.
        path: Its prefix; empty where the target is a bucket of its own. By default a new one.
        sent: The client of the drivers, if it is another; they keep it open.
        lossy: Answers may be lost: an upload that was begun, and of which nobody was told, has no parts and stays.
    """

    def __init__(
        self,
        client: S3Client,
        bucket: str,
        path: str | None = None,
        *,
        sent: S3Client | None = None,
        period: float = 0.5,
        lossy: bool = False,
    ) -> None:
        self.lossy = lossy
        path = f"lake/target-{next(_NUMBERS)}" if path is None else path
        self.client, self.sent, self.bucket, self.path, self.period = client, sent or client, bucket, path, period
        above, _, name = path.rpartition("/")
        self.control = f"{above}/_staged/{name or '_staged'}/".lstrip("/")

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.path}"

    def process(self, step: Step | None = None) -> Driver:
        return S3Driver(self.url, client=self.sent, period=self.period)

    async def kill(self, driver: Driver) -> None:
        pass

    @property
    def _start(self) -> str:
        return f"{self.path}/" if self.path else ""

    def content(self) -> Files:
        found = self.client.list_objects_v2(Bucket=self.bucket, Prefix=self._start).get("Contents", ())
        names = [one["Key"] for one in found if "_staged" not in one["Key"].split("/")]
        read = {name: self.client.get_object(Bucket=self.bucket, Key=name)["Body"].read() for name in names}
        return {name[len(self._start) :]: data for name, data in read.items()}

    def uploads(self) -> list[str]:
        found = self.client.list_multipart_uploads(Bucket=self.bucket, Prefix=self._start)
        return [one["Key"] for one in found.get("Uploads", ()) if not self.lossy or self._has_parts(one)]

    def _has_parts(self, upload: Any) -> bool:
        said = self.client.list_parts(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])
        return bool(said.get("Parts"))

    async def files(self) -> Files:
        return await to_thread.run_sync(self.content)

    async def put(self, path: str, data: bytes) -> None:
        await to_thread.run_sync(
            lambda: self.client.put_object(Bucket=self.bucket, Key=f"{self._start}{path}", Body=data)
        )

    async def delete(self, path: str) -> None:
        await to_thread.run_sync(lambda: self.client.delete_object(Bucket=self.bucket, Key=f"{self._start}{path}"))

    async def leftovers(self) -> list[str]:
        return await to_thread.run_sync(self.uploads)


class _Served(DriverConformance):
    """On a server that is started once."""

    service = "ministack"
    root = False

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _server(cls) -> Iterator[None]:
        with S3Server(cls.service) as cls.server:
            cls.client = cls.server.client()
            cls.bucket = "" if cls.root else cls.server.bucket()
            yield

    def harness(self, directory: Path) -> Harness:
        cls = type(self)
        return S3Harness(cls.client, cls.bucket or cls.server.bucket(), "" if cls.root else None)


class TestMinistack(_Served):
    """A prefix of a bucket."""
