"""One bucket of S3: single requests through boto3 in worker threads, each under the limit, and retried.

Whatever is refused for good is `Refused`. Identities are ETags: two objects of equal bytes may share one.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar

from botocore.config import Config
from botocore.exceptions import ClientError, HTTPClientError, NoCredentialsError, PartialCredentialsError
from botocore.exceptions import ConnectionError as NotConnected
from botocore.parsers import ResponseParserError

from staged.driver import Record
from staged.drivers._cloud import Limit, Refused, at_once, unless_missing
from staged.drivers._objects import WRITE, Look, Objects, honoured
from staged.drivers._threads import TIMEOUT, Threads
from staged.model import Answer, Listed

if TYPE_CHECKING:
    from boto3.session import Session
    from mypy_boto3_s3.client import S3Client

__all__ = ["Bucket", "Part"]

T = TypeVar("T")
Part = dict[str, Any]
"""A part as completing an upload names it."""

_DELETES = 1_000
"""Keys of one request that deletes, the most that the service takes."""
_UNSPEAKABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML cannot hold, and so no request that names several keys."""
_CONDITIONS = frozenset(("PreconditionFailed", "NoSuchKey"))
"""Codes that say that a condition of a write or of a deletion was not met."""
_LATER = frozenset(
    ("InternalError", "SlowDown", "ServiceUnavailable", "OperationAborted", "ConditionalRequestConflict")
)
"""What is said of a single key that may be deleted later."""
_ABORTS = 5
"""Aborts of one upload."""
_NO_SUMS = frozenset(("ChecksumType", "ChecksumAlgorithm"))
_UNANSWERED = (HTTPClientError, NotConnected, ResponseParserError)
"""Nobody knows whether such a request was applied."""


class Bucket(Objects):
    """Single requests to one bucket.

    Args:
        client: A client of the caller's; else one is made of the session, or of the environment.
    """

    def __init__(
        self, name: str, client: S3Client | None, session: Session | None, endpoint_url: str | None, limit: int
    ) -> None:
        self.limit = Limit(limit)
        self._name, self._session, self._endpoint_url = name, session, endpoint_url
        self._sdk = Threads(self.limit, self._make_client, _once, client)
        self._send = self._sdk.send
        self.honours_writes = self.honours_deletions = True
        self._probed = False
        self._deletes_many = True
        self.unanswered = 0
        """Deletions of which it is not known whether they are still under way."""

    def _make_client(self) -> S3Client:
        from boto3.session import Session

        config = Config(
            # A replay would start uploads that nobody knows of.
            retries={"total_max_attempts": 1},
            connect_timeout=TIMEOUT,
            read_timeout=TIMEOUT,
            max_pool_connections=self.limit.most + 4,
        )
        session = self._session or Session()
        return session.client("s3", endpoint_url=self._endpoint_url, config=config)

    async def aclose(self) -> None:
        self._sdk.close()

    # ----------------------------------------------------------------------------------------------------------- objects

    async def exists(self, prefix: str) -> bool:
        """Whether there is such a bucket; looked at by a listing that begins so, since no other may be allowed."""

        def list_one(s3: S3Client) -> bool:
            s3.list_objects_v2(Bucket=self._name, Prefix=prefix, MaxKeys=1)
            return True

        return bool(await unless_missing(self._send(f"looking at the bucket {self._name!r}", list_one)))

    async def probe(self, place: str) -> None:
        """Try whether conditions are honoured, at a free name, where the service is not Amazon's own."""
        host = self._sdk.client.meta.endpoint_url if self._sdk.client is not None else ""
        if not self._probed and not re.fullmatch(r"https://[^/]+\.amazonaws\.com(\.cn)?/?", host):
            self.honours_writes, self.honours_deletions = await honoured(self, place)
        self._probed = True

    async def get(self, name: str) -> Record | None:
        def get(s3: S3Client) -> Record:
            found = s3.get_object(Bucket=self._name, Key=name)
            return Record(found["Body"].read(), _bare(found["ETag"]))

        return await unless_missing(self._send(f"reading {name!r}", get, urgent=True))

    async def put(self, name: str, body: bytes, *, replaces: str | None) -> str | None:
        condition: Any = {"IfNoneMatch": "*"} if replaces is None else {"IfMatch": f'"{replaces}"'}

        def put(s3: S3Client) -> str:
            return _bare(s3.put_object(Bucket=self._name, Key=name, Body=body, **condition)["ETag"])

        try:
            return await self._send(f"writing {name!r}", put, urgent=True)
        except Refused as error:
            if error.code in _CONDITIONS:
                return None
            raise

    async def look(self, name: str) -> Look | None:
        def look(s3: S3Client) -> Look:
            found = s3.head_object(Bucket=self._name, Key=name)
            now = parsedate_to_datetime(found["ResponseMetadata"]["HTTPHeaders"]["date"])
            age = (now - found["LastModified"]).total_seconds()
            return Look(
                _bare(found["ETag"]), found.get("ContentLength", 0), found["Metadata"].get(WRITE), max(0.0, age)
            )

        return await unless_missing(self._send(f"looking at {name!r}", look))

    async def pages(self, prefix: str) -> AsyncGenerator[list[Listed], None]:
        more: Any = {}

        def page(s3: S3Client) -> list[Listed]:
            nonlocal more
            found = s3.list_objects_v2(Bucket=self._name, Prefix=prefix, **more)
            more = {"ContinuationToken": found["NextContinuationToken"]} if found["IsTruncated"] else None
            return [Listed(one["Key"], one["Size"], _bare(one["ETag"])) for one in found.get("Contents", ())]

        while more is not None:
            yield await self._send(f"listing {prefix!r}", page)

    async def delete(self, names: Mapping[str, str | None]) -> Mapping[str, Answer]:
        if not self.honours_deletions and any(names.values()):
            return await self._delete_looked_at(names)
        alone = [name for name in names if _UNSPEAKABLE.search(name) or not self._deletes_many]
        others = [name for name in names if name not in set(alone)]
        chunks = [others[at : at + _DELETES] for at in range(0, len(others), _DELETES)]
        most = self.limit.most
        found = await at_once(chunks, lambda chunk: self._delete_some(chunk, names), most)
        found += await at_once(alone, lambda name: self._delete_one(name, names[name]), most)
        refused = {name: code for codes in found for name, code in codes.items()}
        for name, code in refused.items():
            if code not in _CONDITIONS:
                raise Refused(f"deleting {name!r}", 403 if code == "AccessDenied" else 400, code)
        looked = await at_once(list(refused), self.look, most)
        answers = dict.fromkeys(names, Answer.DONE)
        answers |= {
            name: Answer.ALREADY if there is None else Answer.FOREIGN
            for name, there in zip(refused, looked, strict=True)
        }
        return answers

    async def _delete_looked_at(self, names: Mapping[str, str | None]) -> Mapping[str, Answer]:
        """Delete what was looked at just before, where that can be no condition."""
        looked = await at_once(list(names), self.look, self.limit.most)
        answers: dict[str, Answer] = {}
        for (name, identity), there in zip(names.items(), looked, strict=True):
            if there is None or there.identity != identity:
                answers[name] = Answer.ALREADY if there is None else Answer.FOREIGN
        return {**await self.delete({name: None for name in names if name not in answers}), **answers}

    async def _delete_some(self, chunk: Sequence[str], names: Mapping[str, str | None]) -> dict[str, str]:
        """Delete by one request; of those refused, the code. What may succeed later is tried again."""
        left, refused = list(chunk), {}

        def delete(s3: S3Client) -> None:
            nonlocal left
            objects: Any = [
                {"Key": name} if names[name] is None else {"Key": name, "ETag": f'"{names[name]}"'} for name in left
            ]
            with self._counted():
                said = s3.delete_objects(Bucket=self._name, Delete={"Objects": objects, "Quiet": True})
            left, last = [], ""
            for error in said.get("Errors", ()):
                if error.get("Code") in _LATER:
                    left.append(error["Key"])
                    last = error["Code"]
                else:
                    refused[error["Key"]] = error.get("Code", "")
            if left:
                raise Refused(f"deleting {left[0]!r}", 503, last)

        try:
            await self._send(f"deleting {left[0]!r} and others", delete)
        except Refused as error:
            if error.status not in (400, 501):
                raise
            # Not every service takes such a request, or the ETags or the checksum in it.
            self._deletes_many = False
            for codes in await at_once(left, lambda name: self._delete_one(name, names[name]), self.limit.most):
                refused |= codes
        return refused

    async def _delete_one(self, name: str, identity: str | None) -> dict[str, str]:
        condition: Any = {} if identity is None else {"IfMatch": f'"{identity}"'}

        def delete(s3: S3Client) -> None:
            with self._counted():
                s3.delete_object(Bucket=self._name, Key=name, **condition)

        try:
            await self._send(f"deleting {name!r}", delete)
        except Refused as error:
            if error.code not in _CONDITIONS:
                raise
            return {name: error.code}
        return {}

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """Count a deletion that was not answered."""
        try:
            yield
        except _UNANSWERED:
            self.unanswered += 1
            raise

    # ----------------------------------------------------------------------------------------------------------- uploads

    async def create_upload(self, name: str, write: str, note: Callable[[str], bool]) -> str:
        """Begin an upload that this write will be known by; its id.

        Args:
            note: Told, in a thread, of each upload that was begun. Where it answers False, nobody waits any longer, and the
                upload is aborted.
        """

        def create(s3: S3Client) -> str:
            said = s3.create_multipart_upload(Bucket=self._name, Key=name, Metadata={WRITE: write})
            if not note(said["UploadId"]):
                s3.abort_multipart_upload(Bucket=self._name, Key=name, UploadId=said["UploadId"])
            return said["UploadId"]

        return await self._send(f"writing {name!r}", create)

    async def upload_part(self, name: str, upload: str, number: int, body: bytes) -> Part:
        """Send a part, from 1, that shows nowhere until the upload is completed; as completing it names it."""

        def send(s3: S3Client) -> Part:
            said = s3.upload_part(Bucket=self._name, Key=name, UploadId=upload, PartNumber=number, Body=body)
            return _part(number, said)

        return await self._send(f"writing {name!r}", send)

    async def parts(self, name: str, upload: str) -> tuple[list[Part], int] | None:
        """The parts of an upload, and their bytes; None where it was completed or aborted."""
        found: list[Part] = []
        size = 0
        more: Any = {}

        def page(s3: S3Client) -> None:
            nonlocal more, size
            said = s3.list_parts(Bucket=self._name, Key=name, UploadId=upload, **more)
            found.extend(_part(part["PartNumber"], part) for part in said.get("Parts", ()))
            size += sum(part["Size"] for part in said.get("Parts", ()))
            more = {"PartNumberMarker": said["NextPartNumberMarker"]} if said["IsTruncated"] else None

        while more is not None:
            try:
                await self._send(f"looking at the upload of {name!r}", page)
            except Refused as error:
                if error.code == "NoSuchUpload":
                    return None
                raise
        return found, size

    async def complete(self, name: str, upload: str, parts: Sequence[Part]) -> str:
        """Complete an upload over whatever has its name; the ETag that is told, be it true or not."""
        body: Any = {"Parts": list(parts)}

        def complete(s3: S3Client) -> str:
            said = s3.complete_multipart_upload(Bucket=self._name, Key=name, UploadId=upload, MultipartUpload=body)
            return _bare(said.get("ETag", ""))

        return await self._send(f"completing {name!r}", complete)

    async def abort(self, name: str, upload: str) -> None:
        """Abort an upload, and look until it is gone: a part under way at that moment may have kept it."""

        def abort(s3: S3Client) -> None:
            s3.abort_multipart_upload(Bucket=self._name, Key=name, UploadId=upload)

        for _ in range(_ABORTS):
            try:
                await self._send(f"aborting the upload of {name!r}", abort)
            except Refused as error:
                if error.code != "NoSuchUpload":
                    raise
            if await self.parts(name, upload) is None:
                return
        raise Refused(f"aborting the upload of {name!r}", 500)

    async def uploads(self, prefix: str) -> AsyncGenerator[list[tuple[str, str]], None]:
        """Uploads that were begun and not ended, of names that begin so: name and id."""
        more: Any = {}

        def page(s3: S3Client) -> list[tuple[str, str]]:
            nonlocal more
            said = s3.list_multipart_uploads(Bucket=self._name, Prefix=prefix, **more)
            more = (
                {"KeyMarker": said["NextKeyMarker"], "UploadIdMarker": said["NextUploadIdMarker"]}
                if said["IsTruncated"]
                else None
            )
            return [(one["Key"], one["UploadId"]) for one in said.get("Uploads", ())]

        while more is not None:
            yield await self._send(f"listing uploads below {prefix!r}", page)


def _bare(etag: str) -> str:
    return etag.strip('"')


def _part(number: int, said: Mapping[str, Any]) -> Part:
    # A checksum that was sent with a part is asked for again when the upload is completed.
    sums = {key: value for key, value in said.items() if key.startswith("Checksum") and key not in _NO_SUMS}
    return {"PartNumber": number, "ETag": _bare(said["ETag"]), **sums}


def _once(what: str, request: Callable[[], object]) -> object:
    """Make one request through the SDK; what fails is `Refused`, with the service's status and code, and nothing of the request."""
    try:
        return request()
    except ClientError as error:
        refused = _refused(what, error)
    except (NoCredentialsError, PartialCredentialsError) as error:
        refused = Refused(f"{what}: {error}", 401)
    except _UNANSWERED:
        refused = Refused(what)
    except Refused:
        raise
    except Exception as error:
        # Whatever is wrong with an option or an answer may hold a credential.
        cut = type(error).__module__.startswith("urllib3")
        refused = Refused(what) if cut else Refused(f"{what}: {type(error).__name__}", 400)
    # Raised here, so that nothing leads from it to the SDK's error, which holds the answer.
    raise refused


def _refused(what: str, error: ClientError) -> Refused:
    said: Mapping[str, Any] = error.response
    about = said.get("ResponseMetadata", {})
    after = str(about.get("HTTPHeaders", {}).get("retry-after", ""))
    code, status = str(said.get("Error", {}).get("Code", "")), int(about.get("HTTPStatusCode", 0))
    # The SDK leaves an error in an answer that began with 200 with that status.
    return Refused(what, 500 if status < 300 else status, code, float(after) if after.isdigit() else None)
