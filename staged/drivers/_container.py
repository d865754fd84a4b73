"""One container of Blob Storage: single requests through the SDK, each under the limit, and retried.

Whatever is refused for good is `Refused`. Identities are ETags, of which the service gives a new one to every write.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, suppress
from email.utils import parsedate_to_datetime
from secrets import token_hex
from time import monotonic
from typing import TYPE_CHECKING, Any, cast

from azure.storage.blob import BlobBlock, BlobProperties, BlockState
from azure.storage.blob.aio import BlobServiceClient, ContainerClient

from staged.driver import Record
from staged.drivers._azure import Location, bare, client_options, default_credential
from staged.drivers._blobs import (
    NOT_MET,
    SMALL,
    Requests,
    block_id,
    condition,
    download,
    put_together,
    send_block,
    upload,
)
from staged.drivers._cloud import MISSED, Refused, at_once, unless_missing
from staged.drivers._objects import WRITE, Look, Objects
from staged.model import Answer, Listed

if TYPE_CHECKING:
    from staged.drivers._azure import Credential

__all__ = ["Container"]

_PAGE = 5_000
"""Names of one page of a listing, the most that the service gives."""


class _Uncommitted(str):
    """The state of a block as the SDK asks for it, which compares the state's value with small letters and has it in others.

    Blocks that are merely told to be uncommitted are sent as the latest ones, be they committed or not.
    """

    value = "uncommitted"


_UNCOMMITTED = cast(BlockState, _Uncommitted(BlockState.UNCOMMITTED))


class Container(Requests[ContainerClient], Objects):
    """Single requests to one container.

    Args:
        client: A client of the caller's; else one is made of the credential, or of the environment.
    """

    def __init__(
        self, location: Location, credential: Credential | None, client: BlobServiceClient | None, limit: int
    ) -> None:
        super().__init__(location, credential, limit)
        self._client = client
        self._heard: tuple[float, float] | None = None

    def _open(self, *, trio: bool) -> ContainerClient:
        service, given, sas = self._client, self._credential, self._location.sas
        if service is None:
            if given is None and sas is None:
                given = default_credential(trio=trio)
                self._services.append(given)
            service = BlobServiceClient(self._location.account, **client_options(given, sas, trio=trio))
            self._services.append(service)
        return service.get_container_client(self._location.container)

    @property
    def now(self) -> float:
        """Seconds of the service's clock, by the last answer that told it."""
        if self._heard is None:
            raise RuntimeError("Nothing was asked of the service yet.")
        said, at = self._heard
        return said + monotonic() - at

    def _hear(self, answer: Any) -> None:
        # What stands between may answer without a date, or with none that is one.
        with suppress(KeyError, ValueError):
            self._heard = parsedate_to_datetime(answer.http_response.headers["Date"]).timestamp(), monotonic()

    async def is_hierarchical(self) -> bool:
        """Whether the account says that its namespace is hierarchical."""
        said = await self._send("looking at the account", lambda blobs: blobs.get_account_information())
        return bool(said["is_hns_enabled"])

    async def exists(self) -> bool:
        """Whether there is such a container."""

        async def look(blobs: ContainerClient) -> bool:
            async for _ in blobs.list_blobs(results_per_page=1):
                break
            return True

        what = f"looking at the container {self._location.container!r}"
        return await unless_missing(self._send(what, look)) is not None

    # ------------------------------------------------------------------------------------------------------------- blobs

    async def get(self, name: str) -> Record | None:
        found = await unless_missing(self._send(f"reading {name!r}", lambda blobs: download(blobs, name), urgent=True))
        return None if found is None else Record(*found)

    async def put(self, name: str, body: bytes, *, replaces: str | None) -> str | None:
        what = f"writing {name!r}"
        try:
            if len(body) <= SMALL:
                return await self._send(
                    what,
                    lambda blobs: upload(blobs, name, body, "", replaces, raw_response_hook=self._hear),
                    urgent=True,
                )
            await self.stage_block(name, block := block_id(token_hex(12), 0), body)
            return await self._send(
                what, lambda blobs: put_together(blobs, name, [BlobBlock(block)], "", replaces), urgent=True
            )
        except Refused as error:
            if error.code in NOT_MET:
                return None
            raise

    async def look(self, name: str) -> Look | None:
        def look(blobs: ContainerClient) -> Any:
            return blobs.get_blob_client(name).get_blob_properties(raw_response_hook=self._hear)

        found = await unless_missing(self._send(f"looking at {name!r}", look))
        if found is None:
            return None
        age = max(0.0, self.now - found.last_modified.timestamp())
        return Look(bare(found.etag), found.size, found.metadata.get(WRITE), age)

    async def pages(self, prefix: str) -> AsyncGenerator[list[Listed], None]:
        async with aclosing(self._pages(prefix, "metadata")) as pages:
            async for page in pages:
                yield list(map(_listed, page))

    async def _pages(self, prefix: str, include: str) -> AsyncGenerator[list[BlobProperties], None]:
        listing: list[AsyncIterator[AsyncIterator[BlobProperties]]] = []

        async def page(blobs: ContainerClient) -> list[BlobProperties] | None:
            # One listing, however often a page of it is asked for.
            if not listing:
                found = blobs.list_blobs(prefix, [include], results_per_page=_PAGE, raw_response_hook=self._hear)
                listing.append(found.by_page())
            try:
                return [found async for found in await anext(listing[0])]
            except StopAsyncIteration:
                return None

        while (found := await self._send(f"listing {prefix!r}", page)) is not None:
            yield found

    async def delete(self, names: Mapping[str, str | None]) -> Mapping[str, Answer]:
        # One by one, and many at once: the SDK sends no request for several of them on trio.
        answers = await at_once(list(names.items()), lambda item: self._delete(*item), self.limit.most)
        return dict(zip(names, answers, strict=True))

    async def _delete(self, name: str, identity: str | None) -> Answer:
        conditions = {} if identity is None else condition(identity)

        async def delete(blobs: ContainerClient) -> None:
            # A blob that has snapshots goes with them, or not at all.
            await blobs.delete_blob(name, delete_snapshots="include", **conditions)

        try:
            await self._send(f"deleting {name!r}", delete)
            return Answer.DONE
        except Refused as error:
            if error.status == 404:
                return Answer.ALREADY
            if error.status not in MISSED:
                raise
            refused = error
        there = await self.look(name)
        if there is not None and identity in (None, there.identity):
            raise refused  # for another reason, such as a lease
        return Answer.ALREADY if there is None else Answer.FOREIGN

    # ------------------------------------------------------------------------------------------------------------ blocks

    async def stage_block(self, name: str, block: str, body: bytes) -> None:
        """Send a block that shows nowhere until it is put together with others."""
        await self._send(
            f"writing {name!r}", lambda blobs: send_block(blobs, name, block, body, raw_response_hook=self._hear)
        )

    async def blocks(self, name: str) -> dict[str, int]:
        """The blocks of a name that are not committed, and their sizes."""

        try:
            found = await unless_missing(
                self._send(f"looking at the blocks of {name!r}", lambda blobs: self._ask(blobs, name))
            )
        except Refused as error:
            if error.code != "InvalidBlobType":  # of which there are no blocks
                raise
            found = None
        return found or {}

    async def _ask(self, blobs: ContainerClient, name: str) -> dict[str, int]:
        found = await blobs.get_blob_client(name).get_block_list("uncommitted", raw_response_hook=self._hear)
        return {block.id: block.size for block in found[1]}

    async def commit(self, name: str, blocks: Sequence[str], write: str, *, replaces: str | None) -> str:
        """Make a blob of blocks that are not committed, in place of that ETag or of none, and known by its write; its new ETag.

        Every other block of the name that is not committed is gone with that.

        Raises:
            Refused: With the status 404 where one of the blocks is gone.
        """
        named = [BlobBlock(block, _UNCOMMITTED) for block in blocks]
        try:
            return await self._send(
                f"completing {name!r}", lambda blobs: put_together(blobs, name, named, write, replaces)
            )
        except Refused as error:
            if error.code == "InvalidBlockList":
                raise Refused(str(error.args[0]), 404, error.code) from None
            raise

    async def commit_empty(self, name: str, blocks: Sequence[str], write: str, *, replaces: str | None) -> str:
        """Make an empty blob while these blocks, which are not put into it, are there; else as `commit`."""

        async def complete(blobs: ContainerClient) -> str:
            # Looked at anew each time that it is sent.
            if not (await self._ask(blobs, name)).keys() >= set(blocks):
                raise Refused(f"completing {name!r}", 404, "InvalidBlockList")
            return await put_together(blobs, name, [], write, replaces)

        return await self._send(f"completing {name!r}", complete)

    async def begun(self, prefix: str) -> AsyncGenerator[list[str], None]:
        """The names beginning so that have blocks, and were never committed."""
        async with aclosing(self._pages(prefix, "uncommittedblobs")) as pages:
            async for page in pages:
                # Of those the service tells no property but their names.
                yield [found.name for found in page if not found.size and not found.content_settings.content_type]


def _listed(found: BlobProperties) -> Listed:
    is_dir = (found.metadata or {}).get("hdi_isfolder") == "true"
    return Listed(found.name, found.size, bare(found.etag), is_dir)
