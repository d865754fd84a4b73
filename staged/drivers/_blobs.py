"""What the Azure drivers share: requests through clients that are opened on use, and those that concern one blob.

Whatever is refused for good is `Refused`. Names are whole paths within the container, identities are ETags.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import anyio
from anyio import to_thread
from azure.core import MatchConditions
from azure.storage.blob import BlobBlock

from staged.drivers._azure import Closable, Location, bare, in_trio, once
from staged.drivers._cloud import Limit
from staged.drivers._objects import WRITE
from staged.errors import InvalidInput, StagedError, StorageError

if TYPE_CHECKING:
    from azure.storage.blob.aio import ContainerClient

    from staged.drivers._azure import Credential

__all__ = ["NOT_MET", "SMALL", "Requests", "block_id", "condition", "download", "put_together", "send_block", "upload"]

C = TypeVar("C")
T = TypeVar("T")

NOT_MET = frozenset(("ConditionNotMet", "BlobAlreadyExists", "PathAlreadyExists", "BlobNotFound"))
"""Codes that say that a condition of a write was not met."""
SMALL = 1 << 20
"""Bytes up to which a blob is written by one request: the transport would hold the event loop up with more in one piece."""


class Requests(ABC, Generic[C]):
    """Sends requests through clients that are opened with the first, each under the limit."""

    def __init__(self, location: Location, credential: Credential | None, limit: int) -> None:
        self.limit = Limit(limit)
        self._location, self._credential = location, credential
        self._opening = anyio.Lock()
        self._opened: C | None = None
        self._closed = False
        self._services: list[Closable] = []

    @abstractmethod
    def _open(self, *, trio: bool) -> C:
        """Make the clients, in a thread; what is to be closed with them is added to `_services`."""

    async def _send(self, what: str, request: Callable[[C], Awaitable[T]], *, urgent: bool = False) -> T:
        try:
            return await self._send_open(what, request, urgent)
        except Exception as error:
            if self._closed and not isinstance(error, StagedError):
                # A client that was closed meanwhile raises whatever it happens to stumble over.
                raise StorageError(f"{what}: the store was closed.") from None
            raise

    async def _send_open(self, what: str, request: Callable[[C], Awaitable[T]], urgent: bool) -> T:
        if self._closed:
            raise StorageError(f"{what}: the store is closed.")
        async with self._opening:
            if self._opened is None:
                # Clients belong to the running event loop; making one asks the operating system for its name, and waits.
                trio = in_trio()
                try:
                    self._opened = await to_thread.run_sync(lambda: self._open(trio=trio))
                except ValueError as error:
                    # As for a token credential over plain HTTP, which takes a SAS, a key or a connection string.
                    raise InvalidInput(
                        f"{self._location.account} cannot be opened with that credential: {error}"
                    ) from None
        clients = self._opened
        return await self.limit.send(lambda: once(what, lambda: request(clients)), urgent=urgent)

    async def aclose(self) -> None:
        """Close what was opened here."""
        self._closed = True
        services, self._services, self._opened = self._services, [], None
        async with AsyncExitStack() as closing:  # each, whatever becomes of another
            for service in services:
                closing.push_async_callback(service.close)


async def download(blobs: ContainerClient, name: str) -> tuple[bytes, str]:
    """A blob whole, and its ETag."""
    stream = await blobs.download_blob(name, max_concurrency=1)
    return await stream.readall(), bare(stream.properties.etag)


async def upload(
    blobs: ContainerClient, name: str, body: bytes, write: str, replaces: str | None, **options: Any
) -> str:
    """Write a blob by one request, in place of that ETag or of none; its new one."""
    done = await blobs.get_blob_client(name).upload_blob(
        body, length=len(body), overwrite=True, metadata=_said(write), **condition(replaces), **options
    )
    return bare(str(done["etag"]))


async def send_block(blobs: ContainerClient, name: str, block: str, body: bytes, **options: Any) -> None:
    """Send a block that shows nowhere until it is put together with others."""
    await blobs.get_blob_client(name).stage_block(block, io.BytesIO(body), length=len(body), **options)


async def put_together(
    blobs: ContainerClient, name: str, blocks: Sequence[BlobBlock], write: str, replaces: str | None
) -> str:
    """Make a blob of blocks, in place of that ETag or of none; its new one."""
    done = await blobs.get_blob_client(name).commit_block_list(
        list(blocks), metadata=_said(write), **condition(replaces)
    )
    return bare(str(done["etag"]))


def block_id(write: str, number: int) -> str:
    """Of one length for all that is ever written to a name, as the service asks."""
    return f"{write}{number:08d}"


def condition(etag: str | None) -> dict[str, Any]:
    """That something has this ETag, or is not there."""
    if etag is None:
        return {"match_condition": MatchConditions.IfMissing}
    return {"etag": f'"{etag}"', "match_condition": MatchConditions.IfNotModified}


def _said(write: str) -> dict[str, str] | None:
    return {WRITE: write} if write else None
