"""MiniStack and Moto, each in a process of its own, and what they do as S3 does."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from typing import IO, TYPE_CHECKING, Self

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

SERVERS = ("ministack", "moto")

# Ends with the process that it was started by, also when that one is killed: then its standard input ends.
_RUN = """
import os, runpy, shutil, sys, threading
def end():
    os.read(0, 1)
    shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)
    os._exit(0)
threading.Thread(target=end, daemon=True).start()
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
_STARTS_WITHIN = 60.0
_NUMBERS = itertools.count()


class S3Server:
    """One of the servers on a free port of 127.0.0.1, with nothing in it; a context manager.

    Attributes:
        kind: Which of `SERVERS`.
        url: Its endpoint, for addresses in path style.
        pid: Its process.
    """

    def __init__(self, kind: str = "ministack") -> None:
        assert kind in SERVERS
        self.kind, self.url, self.pid = kind, "", 0
        self._stack = ExitStack()
        self._clients: dict[tuple[str, int], S3Client] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="s3-"))
            said = stack.enter_context(open(f"{directory}/said", "w+b"))
            # Another process may take a port between the choice and its use.
            for _ in range(5):
                port = _free_port()
                process = stack.enter_context(_started(self.kind, port, directory, said))
                stack.callback(_stop, process)
                if _answers(process, port, "/_ministack/health" if self.kind == "ministack" else "/moto-api/"):
                    break
            else:
                said.seek(0)
                raise RuntimeError(f"{self.kind} does not start: {said.read().decode(errors='replace')[-2000:]}")
            self.url, self.pid = f"http://127.0.0.1:{port}", process.pid
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def client(self, url: str = "", *, attempts: int = 1) -> S3Client:
        """The client of it, or of a proxy before it, that sends a request so many times at most; for any thread."""
        client = self._clients.get((url, attempts))
        if client is None:
            client = self._clients[url, attempts] = client_of(url or self.url, attempts=attempts)
            self._stack.callback(client.close)
        return client

    def bucket(self, *, versioned: bool = False) -> str:
        """The name of a new bucket."""
        name = f"bucket-{next(_NUMBERS)}"
        self.client().create_bucket(Bucket=name)
        if versioned:
            self.client().put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
        return name


def client_of(url: str, *, attempts: int = 1) -> S3Client:
    """A client of an endpoint in path style that sends each request so many times at most."""
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="CANARY",
        config=Config(
            s3={"addressing_style": "path"},
            retries={"total_max_attempts": attempts, "mode": "standard"},
            connect_timeout=10,
            read_timeout=30,
            max_pool_connections=32,
            proxies={},
        ),
    )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _started(kind: str, port: int, directory: str, said: IO[bytes]) -> subprocess.Popen[bytes]:
    arguments = ["ministack"] if kind == "ministack" else ["moto.server", "-H", "127.0.0.1", "-p", str(port)]
    own = {"BIND_HOST": "127.0.0.1", "GATEWAY_PORT": str(port), "LOG_LEVEL": "WARNING", "SERVICES": "s3"}
    own |= {"TMPDIR": directory, "S3_PERSIST": "0", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "CANARY"}
    command = [sys.executable, "-c", _RUN, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=said, env=os.environ | own)


def _answers(process: subprocess.Popen[bytes], port: int, path: str) -> bool:
    """Whether it answers before it ends, and soon enough."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + _STARTS_WITHIN
    while process.poll() is None and time.monotonic() < end:
        try:
            with opener.open(f"http://127.0.0.1:{port}{path}", timeout=5):
                return process.poll() is None
        except OSError:
            time.sleep(0.02)
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()


_BOTH = frozenset(SERVERS)
_MINISTACK = frozenset({"ministack"})
_MOTO = frozenset({"moto"})
_NONE: frozenset[str] = frozenset()
HONOURS: dict[str, frozenset[str]] = {
    "a put on the condition that nothing is there": _BOTH,
    "a put on the condition that an etag is there": _BOTH,
    "one of many puts on one condition wins": _MINISTACK,
    "one of many completions on one condition wins": _MINISTACK,
    "a put finds nothing behind a delete marker": _BOTH,
    "a completion on the condition that nothing is there": _BOTH,
    "a completion on the condition that an etag is there": _MINISTACK,
    "a completion that was refused can be tried again": _BOTH,
    "a completion that is sent again is answered again": _BOTH,
    "a completion of an upload that is gone is no such upload": _MINISTACK,
    "a completion of parts that are not there is refused": _BOTH,
    "a completion of no parts is refused": _MOTO,
    "a part but the last that is too small is refused": _MOTO,
    "a part of an upload that is gone is no such upload": _MINISTACK,
    "an upload of a key that is deleted meanwhile appears": _BOTH,
    "an upload that is aborted is gone": _BOTH,
    "an upload that is completed cannot be aborted": _BOTH,
    "metadata of an upload is that of its object": _BOTH,
    "uploads are listed by prefix": _BOTH,
    "uploads are listed in the order of their keys": _MINISTACK,
    "uploads are listed in pages": _MINISTACK,
    "uploads are listed from behind a key": _NONE,
    "parts are listed in pages": _BOTH,
    "a copy on the condition that nothing is there": _NONE,
    "a copy on the condition that an etag is there": _NONE,
    "a copy on the condition of its source's etag": _MINISTACK,
    "a part is copied on the condition of its source's etag": _MINISTACK,
    "a copy keeps metadata or is given others": _BOTH,
    "a copy onto itself that changes nothing is refused": _MOTO,
    "a read on the condition that an etag is there": _BOTH,
    "a delete on the condition that an etag is there": _BOTH,
    "a delete of many on the condition of their etags": _MINISTACK,
    "a delete of many that is quiet tells of errors alone": _MINISTACK,
    "a delete of what is not there succeeds": _BOTH,
    "any key is listed in pages as it was given": _MINISTACK,
    "a listing is in the order of bytes": _BOTH,
    "a listing of a level has what is below as prefixes": _BOTH,
    "a body that is not of its checksum is refused": _MINISTACK,
    "a key of more than 1024 bytes is refused": _NONE,
    "metadata of more than 2 KiB are refused": _NONE,
    "a bucket that is not there is no such bucket": _BOTH,
    "versions have ids and a delete is a marker": _BOTH,
    "a version is read and deleted for itself": _BOTH,
    "a completion in a versioned bucket tells its version": _BOTH,
}
"""For each promise of S3 the servers that keep it; Moto has no lock, and no key with a line feed."""


def honours(kind: str, promise: str) -> bool:
    """Whether a server keeps a promise of S3."""
    return kind in HONOURS[promise]
