"""Azurite in a process of its own."""

from __future__ import annotations

import itertools
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Self

from azure.core.credentials import AzureNamedKeyCredential
from azure.storage.blob import BlobServiceClient, ContainerClient, ContainerSasPermissions, generate_container_sas

HERE = Path(__file__).parent
ACCOUNT = "devstoreaccount1"
KEY = AzureNamedKeyCredential(
    ACCOUNT, "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
)
"""The account that Azurite has, and everybody knows."""

_MAIN = HERE / "node_modules/azurite/dist/src/blob/main.js"
_OPTIONS = "--inMemoryPersistence --extentMemoryLimit 2048 --disableTelemetry --silent --skipApiVersionCheck --blobHost 127.0.0.1"
_STARTS_WITHIN = 60.0
_NUMBERS = itertools.count()


def missing() -> str:
    """Why it cannot be started here, if that is so."""
    if shutil.which("node") is None:
        return "Azurite needs node"
    return "" if _MAIN.exists() else f"Azurite is not installed: npm ci --ignore-scripts in {HERE}"


class AzuriteServer:
    """Azurite on a free port of 127.0.0.1, with nothing in it; a context manager.

    Attributes:
        url: Where it is; the account's name comes first in every path.
        pid: Its process.
    """

    def __init__(self) -> None:
        self.url, self.pid = "", 0
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="azurite-"))
            said = stack.enter_context(open(f"{directory}/said", "w+b"))
            # Another process may take a port between the choice and its use.
            for _ in range(5):
                port = _free_port()
                process = stack.enter_context(_started(port, directory, said))
                stack.callback(process.kill)  # asked to end it waits for connections that are open
                if _answers(process, port):
                    break
            else:
                said.seek(0)
                raise RuntimeError(f"Azurite does not start: {said.read().decode(errors='replace')[-2000:]}")
            self.url, self.pid = f"http://127.0.0.1:{port}", process.pid
            self._service = stack.enter_context(
                BlobServiceClient(f"{self.url}/{ACCOUNT}", credential=KEY, retry_total=0)
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def container(self) -> ContainerClient:
        """A new container."""
        return self._service.create_container(f"container-{next(_NUMBERS)}")

    def signature(self, container: str) -> str:
        """A shared access signature for all that is done in a container."""
        return generate_container_sas(
            ACCOUNT,
            container,
            account_key=KEY.named_key.key,
            permission=ContainerSasPermissions(read=True, write=True, delete=True, list=True, create=True, add=True),
            expiry=datetime.now(UTC) + timedelta(hours=1),
        )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _started(port: int, directory: str, said: IO[bytes]) -> subprocess.Popen[bytes]:
    command = ["node", "--require", str(HERE / "ends.js"), str(_MAIN), *_OPTIONS.split(), "--blobPort", str(port)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=said, cwd=directory)


def _answers(process: subprocess.Popen[bytes], port: int) -> bool:
    """Whether it answers before it ends, and soon enough."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + _STARTS_WITHIN
    while process.poll() is None and time.monotonic() < end:
        try:
            opener.open(f"http://127.0.0.1:{port}/", timeout=5).close()
        except urllib.error.HTTPError as error:
            error.close()
            return process.poll() is None
        except OSError:
            time.sleep(0.05)
    return False
