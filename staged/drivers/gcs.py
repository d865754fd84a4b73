"""Google Cloud Storage.

A file is staged as an object of a name of its own in the control area, and published by moving it to its final name, in one
request and without a byte copied, on the condition of a generation. A move consumes what was staged: one that comes late
finds nothing. A generation is never given twice, so that removal is fenced as well.

    <parent>/_staged/<name>/staging/<id>/<write>   what a transaction stages
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from contextlib import aclosing
from secrets import token_hex
from typing import TYPE_CHECKING

import anyio

from staged.driver import LogHandle
from staged.drivers._cloud import Parts, mapped
from staged.drivers._gcs import GcsBucket, Session
from staged.drivers._objects import ObjectDriver, guarantees, prefix_of
from staged.errors import InvalidInput, StagingError, Unsupported
from staged.model import Answer, Capabilities, Entry
from staged.paths import join

if TYPE_CHECKING:
    from google.auth.credentials import Credentials
    from google.cloud.storage import Client as GoogleClient

__all__ = ["GcsDriver"]

_URL = re.compile(r"gs://([a-z0-9._-]+)(?:/(.*))?", re.DOTALL)
STAGING = "staging"
"""Where the transactions' staging lies in the control area."""
_LONGEST = 1_024
"""Bytes of a name."""
_RATE = 1.0
"""Seconds between two writes of one name, the most often that the service takes."""


class GcsDriver(ObjectDriver):
    """One target in a bucket.

    Args:
        path: `gs://bucket/prefix`; the prefix is taken as it is written, with or without a slash at its end.
        client: A `google.cloud.storage.Client` of the caller's, which stays open.
        credential: Of `google.auth`, in place of a client; by default that of the environment.
        api_endpoint: Where the service is, if it is not Google's.
        limit: At most so many requests at once; fewer while the service throttles.
        period: Seconds of silence after which a writer that commits is taken for dead.
        rate: Seconds between two writes of one record; the service refuses more than one a second.
    """

    _objects: GcsBucket

    def __init__(
        self,
        path: str,
        *,
        client: GoogleClient | None = None,
        credential: Credentials | None = None,
        api_endpoint: str | None = None,
        limit: int = 16,
        period: float = 30.0,
        rate: float = _RATE,
    ) -> None:
        found = _URL.fullmatch(path)
        if found is None:
            raise InvalidInput("A URL of Google Cloud Storage is gs://bucket/prefix.")
        if client is not None and (credential is not None or api_endpoint is not None):
            raise InvalidInput("A client has a credential and an endpoint of its own; pass either.")
        name, prefix = found[1], prefix_of(found[2] or "")
        super().__init__(GcsBucket(name, client, credential, api_endpoint, limit), f"gs://{name}", prefix, period)
        self._rate = rate
        self._written: dict[str, float] = {}

    async def probe(self) -> Capabilities:
        with mapped():
            if not await self._objects.exists():
                raise Unsupported(f"There is no bucket for {self.url}; create it first.")
            await self._objects.probe(self._key(f"probe/{token_hex(12)}"))
        conditions, removal = self._objects.honours
        return Capabilities(
            fence="consumed",
            swaps_trees=False,
            nests=False,
            period=self._period,
            guarantees=guarantees(conditions=conditions, removal="nothing" if removal else "anything"),
        )

    # ------------------------------------------------------------------------------------------------ the control area

    async def cas(self, key: str, body: bytes, token: str | None, *, durable: bool) -> str | None:
        # A name that was written within the last second is not written again: else the service would refuse it.
        name = self._key(key)
        if token is not None and (wait := self._written.get(name, -math.inf) + self._rate - anyio.current_time()) > 0:
            await anyio.sleep(wait)
        new = await super().cas(key, body, token, durable=durable)
        now = anyio.current_time()
        self._written = {one: at for one, at in self._written.items() if at > now - self._rate} | {name: now}
        return new

    async def list_control(self, prefix: str) -> Sequence[str]:
        if not prefix.startswith("tx/"):
            return [key for key in await super().list_control(prefix) if not key.startswith(f"{STAGING}/")]
        with mapped():
            # Staging whose record is gone is found by what lies there.
            staged = await self._objects.directories(self._key(f"{STAGING}/"))
        keys = [f"tx/{name}/{STAGING}" for name in staged]
        return sorted([*await super().list_control(prefix), *(key for key in keys if key.startswith(prefix))])

    async def delete_control(self, keys: Sequence[str]) -> None:
        await super().delete_control([key for key in keys if not key.endswith(f"/{STAGING}")])

    # ----------------------------------------------------------------------------------------------------------- staging

    def _staged(self, tx: str, handle: str = "") -> str:
        # A handle is the write, and the generation that it got.
        return self._key(f"{STAGING}/{tx}/{handle.partition(' ')[0]}")

    async def stage(self, tx: str, path: str, log: LogHandle) -> _Writer:
        # What is staged is found by its place: nothing is to be logged.
        if len(join(self._path, path).encode()) > _LONGEST:
            raise InvalidInput(f"{path!r} is too long a name: with the target's, the service takes {_LONGEST} bytes.")
        write = token_hex(12)
        return _Writer(self._objects, path, self._staged(tx, write), write)

    async def seal(self, tx: str, entries: Collection[Entry]) -> None:
        with mapped():
            async with aclosing(self._objects.pages(self._staged(tx))) as pages:
                staged = {found.path: found.size async for page in pages for found in page}
        for entry in entries:
            if staged.get(self._staged(tx, entry.handle)) != entry.size:
                raise StagingError(f"{entry.path!r} is no longer staged as it was recorded.")

    async def discard(self, tx: str, handles: Collection[str], *, whole: bool) -> None:
        with mapped():
            if not whole:
                await self._objects.delete({self._staged(tx, handle): None for handle in handles})
                return
            async with aclosing(self._objects.pages(self._staged(tx))) as pages:
                async for page in pages:
                    await self._objects.delete({found.path: None for found in page})

    # -------------------------------------------------------------------------------------------------------- the target

    async def _show(self, tx: str, entry: Entry, name: str, replaced: str | None) -> None:
        await self._objects.move(self._staged(tx, entry.handle), entry.handle.partition(" ")[2], name, replaced)

    async def _tell(self, tx: str, entry: Entry, name: str, replaced: str | None) -> Answer | None:
        answer = await super()._tell(tx, entry, name, replaced)
        if answer is Answer.ALREADY:
            # After a copy its source may be there still.
            await self._objects.delete({self._staged(tx, entry.handle): None})
        return answer

    async def _is_staged(self, tx: str, entry: Entry) -> bool:
        there = await self._objects.look(self._staged(tx, entry.handle))
        return there is not None and there.identity == entry.handle.partition(" ")[2]


class _Writer:
    """Writes one staged file: in one request where it is small, else in several of which nothing shows before the last."""

    def __init__(self, bucket: GcsBucket, path: str, name: str, write: str) -> None:
        self._bucket, self._path, self._name, self._write = bucket, path, name, write
        self._session: Session | None = None
        # The parts of an upload are sent one after another.
        self._parts = Parts(self._send, at_once=1)

    async def _send(self, number: int, body: bytes) -> None:
        if self._session is None:
            self._session = await self._bucket.begin_upload(self._name, self._write)
        await self._bucket.continue_upload(self._session, body, last=False)

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        with mapped():
            await self._parts.write(data)

    async def close(self) -> Entry:
        with mapped():
            if self._session is None:
                generation = await self._bucket.write(self._name, self._parts.rest(), self._write)
            else:
                await self._bucket.continue_upload(self._session, self._parts.rest(), last=True)
                there = await self._bucket.look(self._name)
                generation = there.identity if there is not None and there.write == self._write else "0"
        return Entry(self._path, self._parts.size, self._write, f"{self._write} {generation}")

    async def abort(self) -> None:
        with mapped():
            try:
                if self._session is not None:
                    await self._bucket.cancel_upload(self._session)
            finally:
                await self._bucket.delete({self._name: None})
