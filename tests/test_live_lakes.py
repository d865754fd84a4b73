"""The conformance class against a real account, where one is named; and that this way of running it works."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from secrets import token_hex

import pytest
from azure.core.exceptions import ResourceNotFoundError
from azure.storage.filedatalake.aio import DataLakeServiceClient, FileSystemClient
from dfs import DfsServer

from staged.driver import Driver
from staged.drivers._azure import Location, client_options, default_credential, in_trio
from staged.drivers.adls import AdlsDriver
from staged.drivers.onelake import OneLakeDriver
from staged.testing.conformance import DriverConformance
from staged.testing.harness import Files, Harness, Step


class LiveHarness(Harness):
    """A target in a directory of its own below a URL, which is removed in the end.

    Args:
        url: With a SAS, or the environment's credential is used.
    """

    resolution = 1.0

    def __init__(self, url: str) -> None:
        place = Location.parse(url)
        self._place, self._root = place, f"{place.path}/{token_hex(8)}".lstrip("/")
        onelake = "onelake" in place.account or ".Lakehouse/" in place.path
        self._kind = OneLakeDriver if onelake else AdlsDriver
        self._open = AsyncExitStack()
        self._files: FileSystemClient | None = None

    def process(self, step: Step | None = None) -> Driver:
        query = f"?{self._place.sas}" if self._place.sas else ""
        url = f"{self._place.account}/{self._place.container}/{self._root}/target{query}"
        driver = self._kind(url, period=5.0)
        self._open.push_async_callback(driver.aclose)
        return driver

    async def kill(self, driver: Driver) -> None:
        pass

    async def _names(self) -> FileSystemClient:
        if self._files is None:
            credential = None if self._place.sas else default_credential(trio=in_trio())
            if credential is not None:
                self._open.push_async_callback(credential.close)
            options = client_options(credential, self._place.sas, trio=in_trio())
            service = DataLakeServiceClient(self._place.account, **options)
            self._open.push_async_callback(service.close)
            self._files = service.get_file_system_client(self._place.container)
        return self._files

    async def _below(self, directory: str) -> list[str]:
        names = await self._names()
        try:
            return [
                found.name
                async for found in names.get_paths(f"{self._root}/{directory}", recursive=True)
                if not found.is_directory
            ]
        except ResourceNotFoundError:
            return []

    async def files(self) -> Files:
        names, start = await self._names(), len(f"{self._root}/target/")
        return {
            name[start:]: await (await names.get_file_client(name).download_file()).readall()
            for name in await self._below("target")
        }

    async def put(self, path: str, data: bytes) -> None:
        file = (await self._names()).get_file_client(f"{self._root}/target/{path}")
        # An upload of nothing makes nothing.
        await (file.upload_data(data, overwrite=True) if data else file.create_file())

    async def delete(self, path: str) -> None:
        await (await self._names()).get_file_client(f"{self._root}/target/{path}").delete_file()

    async def leftovers(self) -> list[str]:
        return [name for kind in ("staging", "old") for name in await self._below(f"_staged/target/{kind}")]

    async def aclose(self) -> None:
        try:
            await (await self._names()).get_directory_client(self._root).delete_directory()
        except ResourceNotFoundError:
            pass
        await self._open.aclose()


if url := os.environ.get("STAGED_LIVE_ADLS"):

    class TestLive(DriverConformance):
        def harness(self, directory: Path) -> Harness:
            assert url is not None
            return LiveHarness(url)


@pytest.mark.parametrize("onelake", [False, True], ids=["adls", "onelake"])
def test_the_suite_runs_against_any_url_and_leaves_nothing_there(onelake: bool) -> None:
    with DfsServer(onelake=onelake, anonymous=False) as server:
        prefix = "x.Lakehouse/Files/it" if onelake else "below/it"
        if onelake:
            server.add_item("fs", "x.Lakehouse")
        else:
            server.namespace.create_filesystem("fs")
        server.namespace.create("fs", prefix, directory=True)
        before = server.namespace.paths("fs")
        url = f"{server.url}/fs/{prefix}?sv=2024-01-01&sig=CANARY"
        some = "names_its_token or of_ours or free_names or exactly_the_file or by_identity or its_data"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k"]
        environment = os.environ | {"STAGED_LIVE_ADLS": url}
        wanted = f"TestLive and asyncio and ({some})"
        ran = subprocess.run([*command, wanted], check=False, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout
        assert server.counts["rename"] > 10
        assert server.namespace.paths("fs") == before
