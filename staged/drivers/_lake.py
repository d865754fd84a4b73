"""One file system of Data Lake Storage: single requests through the SDK, each under the limit, and retried.

Whatever is refused for good is `Refused`. Names are whole paths within the file system, identities are ETags.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from datetime import datetime
from email.utils import parsedate_to_datetime
from secrets import token_hex
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from azure.core import MatchConditions
from azure.storage.blob import BlobBlock
from azure.storage.blob.aio import BlobServiceClient, ContainerClient
from azure.storage.filedatalake.aio import DataLakeServiceClient, FileSystemClient

from staged.drivers._azure import Location, bare, client_options, default_credential, of, plain
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
from staged.drivers._cloud import Refused, unless_missing
from staged.drivers._objects import WRITE
from staged.model import Listed
from staged.paths import join

if TYPE_CHECKING:
    from azure.storage.filedatalake import PathProperties

    from staged.drivers._azure import Credential

__all__ = ["Lake"]

_ORPHANED = 4
"""How often a rename is tried of which it is said that the goal has no parent."""
_PAGE = 5_000
"""Names of one page of a listing, the most that the service gives."""


class _Clients(NamedTuple):
    """The two interfaces to one file system."""

    names: FileSystemClient
    blobs: ContainerClient


class Lake(Requests[_Clients]):
    """Single requests to one file system, each as the SDK makes it; whatever is refused is `Refused`."""

    def __init__(
        self,
        location: Location,
        credential: Credential | None,
        client: DataLakeServiceClient | None,
        limit: int,
        rename_options: Mapping[str, Any],
    ) -> None:
        super().__init__(location, credential, limit)
        self._rename_options, self._client = rename_options, client

    def _open(self, *, trio: bool) -> _Clients:
        names, sas = self._client, self._location.sas if self._client is None else None
        given = self._credential if names is None else of(names)
        account = self._location.account if names is None else names.url
        if names is not None and plain(given) is not given:
            names = None  # the caller's would leave the source of a rename unsigned
        elif names is None and given is None and sas is None:
            given = default_credential(trio=trio)
            self._services.append(given)
        if names is None:
            names = DataLakeServiceClient(account, **client_options(given, sas, trio=trio))
            self._services.append(names)
        blobs = BlobServiceClient(names.url.replace(".dfs.", ".blob.", 1), **client_options(given, sas, trio=trio))
        self._services.append(blobs)
        container = self._location.container
        return _Clients(names.get_file_system_client(container), blobs.get_container_client(container))

    async def is_hierarchical(self) -> bool:
        """Whether the account says that its namespace is hierarchical."""
        said = await self._send("looking at the account", lambda to: to.blobs.get_account_information())
        return bool(said["is_hns_enabled"])

    async def access(self, name: str) -> str | None:
        """The access control list of a directory, which only a hierarchical namespace has; None where there is no such thing."""
        found = await unless_missing(
            self._send(
                f"looking at the access control of {name!r}",
                lambda to: to.names.get_directory_client(name).get_access_control(),
            )
        )
        return None if found is None else str(found["acl"])

    async def set_access(self, name: str, acl: str) -> None:
        """Give a directory this access control list."""
        await self._send(
            f"setting the access control of {name!r}",
            lambda to: to.names.get_directory_client(name).set_access_control(acl=acl),
        )

    # ------------------------------------------------------------------------------------------------------------- bytes

    async def get(self, name: str) -> tuple[bytes, str] | None:
        """A blob whole, and its ETag."""
        return await unless_missing(self._send(f"reading {name!r}", lambda to: download(to.blobs, name), urgent=True))

    async def put(self, name: str, body: bytes, *, replaces: str | None) -> str | None:
        """Write a record in one step, its parents made, in place of that ETag or of none; its new ETag, or None where another
        is there. That may come of an earlier sending of the same."""
        try:
            return await self._put(name, body, "", replaces, urgent=True)
        except Refused as error:
            if error.code in NOT_MET:
                return None
            raise

    async def write(self, name: str, content: bytes | Sequence[str], write: str) -> str:
        """Write a blob over whatever an earlier write of ours left there, of these bytes or of blocks that were sent; its ETag.

        Args:
            write: By which it is told which of several sendings was applied; nobody else writes to that name.
        """
        replaces: str | None = None
        while True:
            try:
                if isinstance(content, bytes):
                    return await self._put(name, content, write, replaces)
                return await self._put_blocks(name, content, write, replaces)
            except Refused as error:
                # Blocks that were put together by an earlier sending are no longer to be had.
                if error.code not in (*NOT_MET, "InvalidBlockList"):
                    raise
                if (there := await self.head(name, write=write)) is not None:
                    return there.identity
                there = await self.head(name)
                if error.code == "InvalidBlockList" or (there.identity if there else None) == replaces:
                    raise
                replaces = there.identity if there is not None else None

    async def _put(self, name: str, body: bytes, write: str, replaces: str | None, *, urgent: bool = False) -> str:
        if len(body) > SMALL:
            await self.stage_block(name, block := block_id(token_hex(12), 0), body)
            return await self._put_blocks(name, [block], write, replaces)
        return await self._send(
            f"writing {name!r}", lambda to: upload(to.blobs, name, body, write, replaces), urgent=urgent
        )

    async def _put_blocks(self, name: str, blocks: Sequence[str], write: str, replaces: str | None) -> str:
        named = list(map(BlobBlock, blocks))
        return await self._send(f"writing {name!r}", lambda to: put_together(to.blobs, name, named, write, replaces))

    async def stage_block(self, name: str, block: str, body: bytes) -> None:
        """Send a block that shows nowhere until it is put together with others."""
        await self._send(f"writing {name!r}", lambda to: send_block(to.blobs, name, block, body))

    async def head(self, name: str, *, write: str | None = None) -> Listed | None:
        """A file or a directory by name; None where there is none, or none of that write."""
        found = await unless_missing(
            self._send(f"looking at {name!r}", lambda to: to.blobs.get_blob_client(name).get_blob_properties())
        )
        if found is None or (write is not None and found.metadata.get(WRITE) != write):
            return None
        return Listed(name, found.size, bare(found.etag), found.metadata.get("hdi_isfolder") == "true")

    async def age(self, name: str) -> float | None:
        """Seconds since it was last changed, by the service's own clock."""
        dates: list[str] = []

        async def look(to: _Clients) -> datetime:
            found = await to.blobs.get_blob_client(name).get_blob_properties(
                raw_response_hook=lambda answer: dates.append(answer.http_response.headers["Date"])
            )
            return found.last_modified

        changed = await unless_missing(self._send(f"looking at {name!r}", look))
        return None if changed is None else max(0.0, (parsedate_to_datetime(dates[-1]) - changed).total_seconds())

    # ------------------------------------------------------------------------------------------------------------- names

    async def pages(self, directory: str, *, recursive: bool = True) -> AsyncGenerator[list[Listed], None]:
        """What is below a directory, by whole names; nothing where there is no such directory."""
        listing: list[AsyncIterator[AsyncIterator[PathProperties]]] = []

        async def page(to: _Clients) -> list[Listed] | None:
            # One listing, however often a page of it is asked for.
            if not listing:
                listing.append(to.names.get_paths(directory or None, recursive=recursive, max_results=_PAGE).by_page())
            try:
                return [
                    Listed(below(found.name), found.content_length or 0, bare(found.etag), bool(found.is_directory))
                    async for found in await anext(listing[0])
                ]
            except StopAsyncIteration:
                return None

        def below(name: str) -> str:
            # OneLake may answer with names where GUIDs were asked for.
            return join(directory, "/".join(name.split("/")[depth:]))

        depth = len(directory.split("/")) if directory else 0
        found = await unless_missing(self._send(f"listing {directory!r}", page))
        while found is not None:
            yield found
            # What goes missing later is not the end of a listing.
            found = await self._send(f"listing {directory!r}", page)

    async def make_directory(self, name: str) -> None:
        """Make a directory and its parents; one that is there stays as it is."""

        async def make(to: _Clients) -> None:
            await to.names.get_directory_client(name).create_directory(match_condition=MatchConditions.IfMissing)

        try:
            await self._send(f"making {name!r}", make)
        except Refused as error:
            if error.status != 409:
                raise

    async def rename(
        self, source: str, identity: str, goal: str, replaces: str | None, made: set[str], *, urgent: bool = False
    ) -> None:
        """Rename what has this ETag onto what has that one, or onto nothing; `made` are parents that are known to be there."""
        conditions: dict[str, Any] = {
            "source_etag": f'"{identity}"',
            "source_match_condition": MatchConditions.IfNotModified,
            **condition(replaces),
            **self._rename_options,
        }

        async def rename(to: _Clients) -> None:
            # The SDK decodes the source's name before it encodes it, and forgets that a large tree may take several requests.
            file = to.names.get_file_client(quote(source))
            options = dict(conditions)
            answers: list[Any] = []
            while True:
                await file.rename_file(
                    f"{self._location.container}/{goal}", raw_response_hook=answers.append, **options
                )
                if not (more := answers[-1].http_response.headers.get("x-ms-continuation")):
                    return
                options["continuation"] = more

        what = f"renaming {source!r} to {goal!r}"
        for left in reversed(range(_ORPHANED)):
            try:
                await self._send(what, rename, urgent=urgent)
                return
            except Refused as error:
                if error.code != "RenameDestinationParentPathNotFound" or not left:
                    raise
            # It is also said of a parent that is there, under load (HADOOP-18242): then the source is, too.
            if (parent := goal.rpartition("/")[0]) not in made:
                await self.make_directory(parent)
                made.add(parent)

    async def delete(self, name: str, identity: str | None) -> bool:
        """Delete a file, or only what has this ETag; False where there is none."""
        conditions = {} if identity is None else condition(identity)

        async def delete(to: _Clients) -> bool:
            await to.names.get_file_client(name).delete_file(**conditions)
            return True

        return await unless_missing(self._send(f"deleting {name!r}", delete)) is not None

    async def delete_tree(self, name: str) -> None:
        """Delete a directory with all below it; one that is gone is fine."""

        async def delete(to: _Clients) -> None:
            await to.names.get_directory_client(name).delete_directory()

        await unless_missing(self._send(f"deleting {name!r}", delete))
