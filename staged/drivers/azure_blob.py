"""Azure Blob Storage: accounts without a hierarchical namespace.

There is no rename: a file is staged as blocks of its final name, which show nowhere until they are put together. A commit
puts each together by one request, and no byte is copied. That consumes the blocks: a request that comes late finds none.

Blocks that are not committed belong to the blob's name, and not to whoever sent them. Any other write to that name discards
them, which is looked for before the decision; afterwards their file counts as lost. None of them can be discarded alone: what
a transaction leaves behind is invisible, and the service deletes it a week after the last block was sent to that name.

Two things are not fenced by that. An empty file has a block, too, that is not put into it, but is discarded with it: between
looking for that block and writing the file, whoever was overtaken can bring an empty file back that was removed meanwhile, and
discards what a later transaction staged at that name. And since blocks cannot be discarded, of two recoveries at once, one of
which leaves a stranger's file in place and one of which replaces it, the one that was overtaken may still do so.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import aclosing
from secrets import token_hex
from typing import TYPE_CHECKING

from azure.storage.blob.aio import BlobServiceClient

from staged.driver import Alive, LogHandle, idle
from staged.drivers._azure import Location
from staged.drivers._blobs import block_id
from staged.drivers._cloud import Parts, Refused, mapped
from staged.drivers._container import Container
from staged.drivers._objects import ObjectDriver, alike, guarantees
from staged.errors import Conflict, StagingError, Unsupported
from staged.model import Capabilities, Entry
from staged.paths import join

if TYPE_CHECKING:
    from staged.drivers._azure import Credential

__all__ = ["AzureBlobDriver"]

_KEPT = 6 * 86_400
"""Seconds after which nothing is decided any more: what is staged is kept for a week, and must be put together in that time."""
_ASKED = 250
"""Names that are asked about between two signs of life."""
_TRUSTED = 10.0
"""Seconds for which what was seen at sealing is taken for true."""

_log = logging.getLogger("staged")


class AzureBlobDriver(ObjectDriver):
    """One target in a container of an account.

    Args:
        path: `https://account.blob.core.windows.net/container/path`, or `wasbs://container@account.blob.core.windows.net/path`;
            it may carry a SAS. At an address of numbers, as Azurite has, the account's name comes before the container.
        credential: As the Azure SDK takes it: a token credential of `azure.identity.aio`, a SAS, an account key. By default
            `DefaultAzureCredential`. For trio a token credential needs a transport of its own.
        client: A client of the caller's, which stays open, in place of a credential.
        limit: At most so many requests at once; fewer while the service throttles.
        period: Seconds of silence after which a writer that commits is taken for dead.
    """

    _objects: Container

    def __init__(
        self,
        path: str,
        *,
        credential: Credential | None = None,
        client: BlobServiceClient | None = None,
        limit: int = 16,
        period: float = 30.0,
    ) -> None:
        location = Location.parse_blob(path)
        super().__init__(
            Container(location, credential, client, limit),
            f"{location.account}/{location.container}",
            location.path,
            period,
        )
        self._discarded: dict[str, set[str]] = {}
        self._sealed: dict[str, float] = {}

    async def probe(self) -> Capabilities:
        with mapped():
            if not await self._objects.exists():
                raise Unsupported(f"There is no container for {self.url}; create it first.")
            if await self._is_hierarchical():
                raise Unsupported(
                    f"The account of {self.url} has a hierarchical namespace: open it as abfss://, where whole trees are moved."
                )
        return Capabilities(
            fence="consumed",
            swaps_trees=False,
            nests=False,
            strict_overlap=True,
            keeps_staged=False,
            period=self._period,
            guarantees=guarantees(conditions=True, removal="nothing"),
        )

    async def _is_hierarchical(self) -> bool:
        try:
            return await self._objects.is_hierarchical()
        except Refused as error:
            if error.status != 403:
                raise
            _log.warning("Whether the account of %s has a hierarchical namespace may not be asked.", self.url)
            return False

    # ----------------------------------------------------------------------------------------------------------- staging

    async def stage(self, tx: str, path: str, log: LogHandle) -> _Writer:
        # What is staged cannot be discarded, and expires: nothing is to be logged.
        return _Writer(self._objects, tx, path, join(self._path, path))

    async def seal(self, tx: str, entries: Collection[Entry], alive: Alive = idle) -> None:
        discarded = self._discarded.get(tx, set())
        left = {join(self._path, entry.path): entry for entry in entries if entry.handle not in discarded}
        gone = [entry for entry in entries if entry.handle in discarded]
        pages_left = 1 + len(left) // self._objects.limit.most
        with mapped():
            # What was never committed since its blocks were sent has them still: a page of a listing costs one request, and so
            # does a name.
            async with aclosing(self._objects.begun(alike(list(left)))) as pages:
                while left and pages_left and (page := await anext(pages, None)) is not None:
                    for name in page:
                        left.pop(name, None)
                    pages_left -= 1
            asked = list(left.values())
            for at in range(0, len(asked), _ASKED):
                await alive()
                some = asked[at : at + _ASKED]
                staged = await self._at_once(some, lambda entry: self._is_staged(tx, entry))
                gone += [entry for entry, is_staged in zip(some, staged, strict=True) if not is_staged]
        if gone:
            raise Conflict(
                f"{gone[0].path!r} is no longer staged: its blocks are gone, as when something else is written to that name. "
                "Run it again."
            )
        self._check_age(entries)
        if entries:
            self._sealed[tx] = self._objects.now

    async def arrange(
        self, tx: str, entries: Sequence[Entry], meta: Mapping[str, object], alive: Alive = idle, *, afresh: bool
    ) -> None:
        # Between sealing and this there may be days.
        if self._objects.now - self._sealed.get(tx, 0.0) > _TRUSTED:
            await self.seal(tx, entries, alive)

    def _check_age(self, entries: Collection[Entry]) -> None:
        """Raise where the service may discard what is staged before it is put together."""
        for entry in entries:
            if self._objects.now - _since(entry.handle) > _KEPT:
                raise StagingError(
                    f"{entry.path!r} was staged more than six days ago, and what is staged is kept for seven. "
                    "The target is untouched; write it again."
                )

    async def discard(self, tx: str, handles: Collection[str], *, whole: bool) -> None:
        # Blocks go only with a write to their name, which readers would see, or when they expire.
        if whole:
            self._discarded.pop(tx, None)
            self._sealed.pop(tx, None)
        else:
            self._discarded.setdefault(tx, set()).update(handles)

    # -------------------------------------------------------------------------------------------------------- the target

    async def _show(self, tx: str, entry: Entry, name: str, replaced: str | None) -> None:
        blocks = _blocks(tx, entry)
        if entry.size:
            await self._objects.commit(name, blocks, entry.identity, replaces=replaced)
        else:
            await self._objects.commit_empty(name, blocks, entry.identity, replaces=replaced)

    async def _is_staged(self, tx: str, entry: Entry) -> bool:
        return (await self._objects.blocks(join(self._path, entry.path))).keys() >= set(_blocks(tx, entry))


class _Writer:
    """Sends one staged file as blocks."""

    def __init__(self, container: Container, tx: str, path: str, name: str) -> None:
        self._container, self._tx, self._path, self._name = container, tx, path, name
        self._write = token_hex(12)
        self._blocks = Parts(self._send)
        self._since: float | None = None

    async def _send(self, number: int, body: bytes) -> None:
        try:
            await self._container.stage_block(self._name, block_id(f"{self._tx}{self._write}", number), body)
        except Refused as error:
            if error.code != "InvalidBlobOrBlock":
                raise
            raise StagingError(
                f"{self._path!r} cannot be staged: another program is writing a file of that name, or left its blocks there, "
                "which are gone a week after the last."
            ) from error
        if self._since is None:
            self._since = self._container.now

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        with mapped():
            await self._blocks.write(data)

    async def close(self) -> Entry:
        with mapped():
            if self._blocks.rest():
                await self._blocks.flush()
            elif not self._blocks.sent:
                await self._send(0, b"-")  # the service takes no empty block
        count = max(1, len(self._blocks.sent))
        return Entry(self._path, self._blocks.size, self._write, f"{self._write} {count} {int(self._since or 0)}")

    async def abort(self) -> None:
        pass


# A handle is the write, the number of its blocks, and when the first was sent, by the service's clock.


def _blocks(tx: str, entry: Entry) -> list[str]:
    write, count, _ = entry.handle.split(" ")
    return [block_id(f"{tx}{write}", number) for number in range(int(count))]


def _since(handle: str) -> float:
    return float(handle.rpartition(" ")[2])
