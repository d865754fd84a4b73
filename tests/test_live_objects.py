"""The conformance class against a real bucket or container, where one is named; and that this way of running it works."""

from __future__ import annotations

import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from secrets import token_hex
from typing import Any
from urllib.parse import urlsplit

import azurite
import pytest
from anyio import to_thread
from azure.storage.blob import BlobBlock
from azurite import AzuriteServer
from gcs import GcsServer
from s3 import S3Server

from staged.driver import Driver
from staged.drivers._azure import Location
from staged.drivers.azure_blob import AzureBlobDriver
from staged.drivers.gcs import GcsDriver
from staged.drivers.s3 import S3Driver
from staged.testing.conformance import DriverConformance
from staged.testing.harness import Files, Harness, Step

SECONDS = 5.0


class Bucket(ABC):
    """A bucket by its SDK and the environment's credential, behind the drivers' back; the calls block.

    Attributes:
        prefix: What the URL names below the bucket.
    """

    prefix: str

    @abstractmethod
    def driver(self, path: str) -> Driver: ...

    @abstractmethod
    def names(self, prefix: str) -> list[str]: ...

    @abstractmethod
    def read(self, name: str) -> bytes: ...

    @abstractmethod
    def write(self, name: str, data: bytes) -> None: ...

    @abstractmethod
    def delete(self, name: str) -> None: ...

    def pending(self, prefix: str) -> list[str]:
        """What is staged and shows in no listing."""
        return []

    def clear(self, prefix: str) -> None:
        for name in self.names(prefix):
            self.delete(name)


class S3Bucket(Bucket):
    """Of `s3://bucket/prefix`."""

    def __init__(self, url: str) -> None:
        self._name, self.prefix = urlsplit(url).netloc, urlsplit(url).path.strip("/")

    @cached_property
    def _client(self) -> Any:
        import boto3

        return boto3.client("s3")

    def driver(self, path: str) -> Driver:
        return S3Driver(f"s3://{self._name}/{path}", period=SECONDS)

    def names(self, prefix: str) -> list[str]:
        found = self._client.list_objects_v2(Bucket=self._name, Prefix=prefix)
        return [one["Key"] for one in found.get("Contents", ())]

    def read(self, name: str) -> bytes:
        data: bytes = self._client.get_object(Bucket=self._name, Key=name)["Body"].read()
        return data

    def write(self, name: str, data: bytes) -> None:
        self._client.put_object(Bucket=self._name, Key=name, Body=data)

    def delete(self, name: str) -> None:
        self._client.delete_object(Bucket=self._name, Key=name)

    def pending(self, prefix: str) -> list[str]:
        found = self._client.list_multipart_uploads(Bucket=self._name, Prefix=prefix)
        return [one["Key"] for one in found.get("Uploads", ())]

    def clear(self, prefix: str) -> None:
        super().clear(prefix)
        for one in self._client.list_multipart_uploads(Bucket=self._name, Prefix=prefix).get("Uploads", ()):
            self._client.abort_multipart_upload(Bucket=self._name, Key=one["Key"], UploadId=one["UploadId"])


class GcsBucket(Bucket):
    """Of `gs://bucket/prefix`."""

    def __init__(self, url: str) -> None:
        self._name, self.prefix = urlsplit(url).netloc, urlsplit(url).path.strip("/")

    @cached_property
    def _bucket(self) -> Any:
        from google.cloud.storage import Client

        return Client(project="staged").bucket(self._name)

    def driver(self, path: str) -> Driver:
        return GcsDriver(f"gs://{self._name}/{path}", period=SECONDS)

    def names(self, prefix: str) -> list[str]:
        return [blob.name for blob in self._bucket.list_blobs(prefix=prefix)]

    def read(self, name: str) -> bytes:
        data: bytes = self._bucket.blob(name).download_as_bytes()
        return data

    def write(self, name: str, data: bytes) -> None:
        self._bucket.blob(name).upload_from_string(data)

    def delete(self, name: str) -> None:
        self._bucket.blob(name).delete()


class BlobContainer(Bucket):
    """Of `https://account.blob.core.windows.net/container/prefix`, with a SAS or by the environment's credential."""

    def __init__(self, url: str) -> None:
        self._place = Location.parse_blob(url)
        self.prefix = self._place.path

    @cached_property
    def _container(self) -> Any:
        from azure.identity import DefaultAzureCredential
        from azure.storage.blob import ContainerClient

        credential: Any = self._place.sas or DefaultAzureCredential()
        return ContainerClient(self._place.account, self._place.container, credential=credential)

    def driver(self, path: str) -> Driver:
        query = f"?{self._place.sas}" if self._place.sas else ""
        return AzureBlobDriver(f"{self._place.account}/{self._place.container}/{path}{query}", period=SECONDS)

    def names(self, prefix: str) -> list[str]:
        return [blob.name for blob in self._container.list_blobs(prefix)]

    def read(self, name: str) -> bytes:
        data: bytes = self._container.download_blob(name).readall()
        return data

    def write(self, name: str, data: bytes) -> None:
        # As the service does and Azurite does only here, what is staged at that name is discarded.
        blob, block = self._container.get_blob_client(name), "f" * 56
        if data:
            blob.stage_block(block, data)
        blob.commit_block_list([BlobBlock(block)] if data else [])

    def delete(self, name: str) -> None:
        self._container.delete_blob(name)


class LiveHarness(Harness):
    """A target of its own below a URL, which is removed in the end."""

    resolution = 1.0

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._root = f"{bucket.prefix}/{token_hex(8)}".lstrip("/")
        self._start = f"{self._root}/target/"
        self._open = AsyncExitStack()

    def process(self, step: Step | None = None) -> Driver:
        driver = self._bucket.driver(f"{self._root}/target")
        self._open.push_async_callback(driver.aclose)
        return driver

    async def kill(self, driver: Driver) -> None:
        pass

    async def files(self) -> Files:
        def read() -> Files:
            names = self._bucket.names(self._start)
            return {name[len(self._start) :]: self._bucket.read(name) for name in names}

        return await to_thread.run_sync(read)

    async def put(self, path: str, data: bytes) -> None:
        await to_thread.run_sync(self._bucket.write, f"{self._start}{path}", data)

    async def delete(self, path: str) -> None:
        await to_thread.run_sync(self._bucket.delete, f"{self._start}{path}")

    async def leftovers(self) -> list[str]:
        def look() -> list[str]:
            return self._bucket.names(f"{self._root}/_staged/target/staging/") + self._bucket.pending(self._start)

        return await to_thread.run_sync(look)

    async def aclose(self) -> None:
        await to_thread.run_sync(self._bucket.clear, f"{self._root}/")
        await self._open.aclose()


KINDS: dict[str, type[S3Bucket] | type[GcsBucket] | type[BlobContainer]] = {
    "S3": S3Bucket,
    "GCS": GcsBucket,
    "BLOB": BlobContainer,
}
NAMED = {kind: url for kind in KINDS if (url := os.environ.get(f"STAGED_LIVE_{kind}"))}

if NAMED:

    class TestLive(DriverConformance):
        @pytest.fixture(autouse=True, params=NAMED)
        def _bucket(self, request: pytest.FixtureRequest) -> None:
            self.bucket = KINDS[request.param](NAMED[request.param])

        def harness(self, directory: Path) -> Harness:
            return LiveHarness(self.bucket)


@contextmanager
def served(kind: str) -> Iterator[tuple[str, dict[str, str]]]:
    """A URL on a server of the tests, and what the environment says of it."""
    if kind == "S3":
        with S3Server() as server:
            secrets = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
            yield f"s3://{server.bucket()}/below/it", {"AWS_ENDPOINT_URL": server.url, **secrets}
    elif kind == "GCS":
        with GcsServer() as service:
            service.call(lambda: service.store.create_bucket("bucket"))
            yield "gs://bucket/below/it", {"STORAGE_EMULATOR_HOST": service.url}
    else:
        if why := azurite.missing():
            pytest.skip(why)
        with AzuriteServer() as blobs:
            container = blobs.container()
            yield f"{container.url}/below/it?{blobs.signature(container.container_name)}", {}


@pytest.mark.parametrize("kind", KINDS)
def test_the_suite_runs_against_any_url_and_leaves_nothing_there(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(kind) as (url, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv(f"STAGED_LIVE_{kind}", url)
        there = KINDS[kind](url)
        there.write("below/a stranger's", b"1")
        some = "names_its_token or of_ours or free_names or exactly_the_file or by_identity or its_data"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k"]
        wanted = f"TestLive and asyncio and ({some})"
        ran = subprocess.run([*command, wanted], check=False, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout
        assert "passed" in ran.stdout
        assert there.names("") == ["below/a stranger's"]
        assert not there.pending("")
