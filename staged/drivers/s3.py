"""Amazon S3, and what speaks its language.

There is no rename: a file is staged as a multipart upload at its final key, which shows nothing until it is completed. A
commit completes each by one request, and no byte is copied. Completing consumes the upload: a request that comes late finds
none. That it answers 200 proves nothing (a repeat may answer so and do nothing; an upload that is older than a deletion of
its key may complete and never be visible), so that a listing is looked through in the end.

Equal bytes have equal ETags, so that what is ours is told by the write in an object's metadata. Removal is conditioned on
the ETag; what is sent late can take only what has the very bytes that were to be removed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from secrets import token_hex
from typing import TYPE_CHECKING

import anyio

from staged.driver import LogHandle
from staged.drivers._bucket import Bucket, Part
from staged.drivers._cloud import Parts, Refused, mapped
from staged.drivers._objects import ObjectDriver, alike, guarantees, prefix_of
from staged.drivers._threads import TIMEOUT
from staged.errors import InvalidInput, StagingError, Unsupported
from staged.model import Answer, Capabilities, Entry, Listed
from staged.paths import join

if TYPE_CHECKING:
    from boto3.session import Session
    from mypy_boto3_s3.client import S3Client

__all__ = ["S3Driver"]

_NAMED = 16
"""Parts of a file up to which its record names them; those of larger ones are asked for again."""
_ENDED = 20
"""Transactions that ended of which it is remembered what is gone."""
_URL = re.compile(r"s3a?://([a-z0-9.-]+)(?:/(.*))?", re.DOTALL)


@dataclass(slots=True)
class _Uploads:
    """The uploads of one transaction that this process knows: path by id.

    Attributes:
        ended: They were discarded: whatever is begun late is aborted.
        told: The ETag that was told when one was completed, be it true or not.
        gone: Those that were seen to be completed, or aborted.
    """

    begun: dict[str, str] = field(default_factory=dict)
    ended: bool = False
    told: dict[str, str] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)

    def note(self, path: str, upload: str) -> bool:
        """A request answered that it began an upload; False where it is no longer wanted."""
        self.begun[upload] = path
        return not self.ended


class S3Driver(ObjectDriver):
    """One target in a bucket.

    Args:
        path: `s3://bucket/prefix`; the prefix is taken as it is written, with or without a slash at its end.
        client: A client of boto3 of the caller's, which stays open. Make it with `Config(retries={"total_max_attempts": 1})`:
            an upload that it begins twice leaves an empty one behind.
        session: A session of boto3, in place of a client; by default that of the environment.
        endpoint_url: Where the service is, if it is not Amazon's.
        limit: At most so many requests at once; fewer while the service throttles.
        period: Seconds of silence after which a writer that commits is taken for dead.
    """

    _objects: Bucket

    def __init__(
        self,
        path: str,
        *,
        client: S3Client | None = None,
        session: Session | None = None,
        endpoint_url: str | None = None,
        limit: int = 16,
        period: float = 30.0,
    ) -> None:
        found = _URL.fullmatch(path)
        if found is None:
            raise InvalidInput("A URL of S3 is s3://bucket/prefix.")
        if client is not None and (session is not None or endpoint_url is not None):
            raise InvalidInput("A client has a session and an endpoint of its own; pass either.")
        name, prefix = found[1], prefix_of(found[2] or "")
        if name.endswith("--x-s3"):
            raise Unsupported("Directory buckets list uploads in a way of their own; they are not supported.")
        super().__init__(Bucket(name, client, session, endpoint_url, limit), f"s3://{name}", prefix, period)
        self._transactions: dict[str, _Uploads] = {}

    async def probe(self) -> Capabilities:
        with mapped():
            if not await self._objects.exists(self._key("")):
                raise Unsupported(f"There is no bucket for {self.url}; create it first.")
            await self._objects.probe(self._key(f"probe/{token_hex(12)}"))
        return Capabilities(
            fence="time",
            swaps_trees=False,
            nests=False,
            strict_overlap=True,
            period=self._period,
            guarantees=guarantees(
                conditions=self._objects.honours_writes,
                removal="equal" if self._objects.honours_deletions else "anything",
            ),
        )

    # ----------------------------------------------------------------------------------------------------------- staging

    async def stage(self, tx: str, path: str, log: LogHandle) -> _Writer:
        uploads = self._transactions.setdefault(tx, _Uploads())
        write, name = token_hex(12), join(self._path, path)
        with mapped():
            upload = await self._objects.create_upload(name, write, lambda begun: uploads.note(path, begun))
        await log(_handle(upload, path))
        return _Writer(self._objects, path, name, upload, write)

    async def seal(self, tx: str, entries: Collection[Entry]) -> None:
        left = {_upload_of(entry.handle): entry for entry in entries}
        names = [join(self._path, entry.path) for entry in entries]
        pages_left = 1 + len(names) // self._objects.limit.most
        with mapped():
            try:
                async with aclosing(self._objects.uploads(alike(names))) as pages:
                    while left and pages_left and (page := await anext(pages, None)) is not None:
                        for _, upload in page:
                            left.pop(upload, None)
                        pages_left -= 1
            except Refused as error:
                if error.passing:
                    raise
            # A listing may lag behind, be long, or not be allowed.
            staged = await self._at_once(left.values(), lambda entry: self._is_staged(tx, entry))
        gone = [entry for entry, there in zip(left.values(), staged, strict=True) if not there]
        if gone:
            raise StagingError(f"{gone[0].path!r} is no longer staged: its upload was aborted or completed.")

    async def discard(self, tx: str, handles: Collection[str], *, whole: bool) -> None:
        doomed = {_upload_of(handle): handle.split(" ", 2)[2] for handle in handles}
        uploads = self._transactions.get(tx)
        if whole and uploads is not None:
            uploads.ended = True
            doomed |= uploads.begun
        if uploads is not None:
            doomed = {upload: path for upload, path in doomed.items() if upload not in uploads.gone}
        with mapped():
            await self._at_once(
                doomed.items(), lambda upload: self._objects.abort(join(self._path, upload[1]), upload[0])
            )
        if uploads is not None:
            uploads.gone.update(doomed)
        # What ended is discarded again and again: that it is gone is remembered for a while.
        for old in [one for one, known in self._transactions.items() if known.ended][:-_ENDED]:
            del self._transactions[old]

    # -------------------------------------------------------------------------------------------------------- the target

    async def publish(self, tx: str, entries: Sequence[Entry], replaces: Mapping[str, str]) -> Sequence[Answer]:
        uploads = self._transactions.setdefault(tx, _Uploads())
        names = {join(self._path, entry.path): entry for entry in entries}
        answers: dict[str, Answer | None] = {}

        async def tell(name: str) -> None:
            answers[name] = await self._tell(tx, names[name], name, replaces.get(names[name].path))

        with mapped():
            # An upload is completed over whatever is there: that must be what it replaces.
            there = await self._find(names)
            await self._at_once(
                [name for name, found in there.items() if found.identity != replaces.get(names[name].path)], tell
            )
            free = [name for name in names if answers.get(name) is None]
            said = await super().publish(tx, [names[name] for name in free], replaces)
            answers.update(zip(free, said, strict=True))
            # That a completion answered 200 proves nothing.
            done = {name for name, answer in answers.items() if answer is Answer.DONE}
            there = await self._find(done)
            doubtful = [
                name
                for name in done
                if name not in there or there[name].identity != uploads.told.get(_upload_of(names[name].handle))
            ]
            await self._at_once(doubtful, tell)
            for name in doubtful:
                if answers[name] is None:
                    raise Refused(f"completing {name!r}: it was said to be done, and was not", 500)
        uploads.gone.update(
            _upload_of(names[name].handle)
            for name, answer in answers.items()
            if answer in (Answer.DONE, Answer.ALREADY)
        )
        ours = {name for name in done if answers[name] is Answer.ALREADY}
        return [Answer.DONE if name in ours else answers[name] or Answer.LOST for name in names]

    async def _show(self, tx: str, entry: Entry, name: str, replaced: str | None) -> None:
        upload, parts = _upload_of(entry.handle), _parts_of(entry.handle)
        told = self._transactions.setdefault(tx, _Uploads()).told
        try:
            if parts:
                told[upload] = await self._objects.complete(name, upload, parts)
                return
        except Refused as error:
            # A part that arrived twice may have another ETag than the one that was told.
            if error.code != "InvalidPart":
                raise
        there = await self._objects.parts(name, upload)
        if there is None or there[1] != entry.size:
            raise Refused(f"completing {name!r}", 404, "NoSuchUpload")
        told[upload] = await self._objects.complete(name, upload, there[0])

    async def _is_staged(self, tx: str, entry: Entry) -> bool:
        there = await self._objects.parts(join(self._path, entry.path), _upload_of(entry.handle))
        return there is not None and there[1] == entry.size

    async def remove(self, entries: Sequence[Listed]) -> Sequence[Answer]:
        unanswered = self._objects.unanswered
        answers = await super().remove(entries)
        if self._objects.unanswered != unanswered:
            # Such a request may still be under way, and must not meet what is written to these names next.
            await anyio.sleep(min(2.0 * TIMEOUT, self._period / 2))
        return answers


class _Writer:
    """Sends one staged file as the parts of an upload."""

    def __init__(self, bucket: Bucket, path: str, name: str, upload: str, write: str) -> None:
        self._bucket, self._path, self._name, self._upload, self._write = bucket, path, name, upload, write
        self._parts = Parts(self._send)

    async def _send(self, number: int, body: bytes) -> Part:
        return await self._bucket.upload_part(self._name, self._upload, number + 1, body)

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        with mapped():
            await self._parts.write(data)

    async def close(self) -> Entry:
        if self._parts.rest() or not self._parts.sent:
            with mapped():
                await self._parts.flush()
        handle = _handle(self._upload, self._path, self._parts.sent)
        return Entry(self._path, self._parts.size, self._write, handle)

    async def abort(self) -> None:
        with mapped():
            await self._bucket.abort(self._name, self._upload)


# A handle is the upload's id, its parts as far as they are known, and its path.


def _handle(upload: str, path: str, parts: Sequence[Part] = ()) -> str:
    named = parts if len(parts) <= _NAMED else ()
    return f"{upload} {','.join(map(_named, named))} {path}"


def _named(part: Part) -> str:
    sums = [f":{key}={value}" for key, value in part.items() if key.startswith("Checksum")]
    return f"{part['ETag']}{''.join(sums)}"


def _upload_of(handle: str) -> str:
    return handle.split(" ", 1)[0]


def _parts_of(handle: str) -> list[Part]:
    named = handle.split(" ", 2)[1]
    parts: list[Part] = []
    for number, text in enumerate(named.split(",") if named else (), 1):
        etag, *sums = text.split(":")
        parts.append({"PartNumber": number, "ETag": etag, **dict(sum_.split("=", 1) for sum_ in sums)})
    return parts
