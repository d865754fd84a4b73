"""One bucket of Google Cloud Storage: single requests through its client in worker threads, each under the limit, and retried.

Whatever is refused for good is `Refused`. Identities are generations, which no two writes share.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import requests
from google.api_core.exceptions import GoogleAPICallError
from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError, TransportError
from google.cloud.exceptions import GoogleCloudError
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
from requests.adapters import HTTPAdapter

from staged.driver import Record
from staged.drivers._cloud import MISSED, Limit, Refused, at_once, hide_secrets, unless_missing
from staged.drivers._objects import WRITE, Look, Objects, honoured
from staged.drivers._threads import TIMEOUT, Threads
from staged.model import Answer, Listed

if TYPE_CHECKING:
    from google.auth.credentials import Credentials
    from google.cloud.storage import Bucket as GoogleBucket
    from google.cloud.storage import Client as GoogleClient

__all__ = ["GcsBucket", "Session"]

T = TypeVar("T")

_ALONE: dict[str, Any] = {"retry": None, "timeout": TIMEOUT}
"""What every request is made with: the client's own retries would hide what became of it."""
_GOOGLES = "https://storage.googleapis.com"
_MISSING = frozenset((404, 412))


class GcsBucket(Objects):
    """Single requests to one bucket.

    Args:
        client: A client of the caller's; else one is made of the credentials, or of the environment.
    """

    def __init__(
        self,
        name: str,
        client: GoogleClient | None,
        credentials: Credentials | None,
        api_endpoint: str | None,
        limit: int,
    ) -> None:
        self.limit = Limit(limit)
        self._name, self._credentials, self._api_endpoint = name, credentials, api_endpoint
        self._sdk: Threads[GoogleClient] = Threads(self.limit, self._make_client, _once, client)
        self.honours = (True, True)
        hide_secrets()
        self.moves = True
        """Whether the bucket takes a move; else a copy and a deletion."""
        self._probed = False

    def _make_client(self) -> GoogleClient:
        from google.cloud.storage import Client

        options = {"api_endpoint": self._api_endpoint} if self._api_endpoint else None
        # No request here is of a project.
        client = Client(project="staged", credentials=self._credentials, client_options=options)
        pool = HTTPAdapter(pool_maxsize=self.limit.most + 4)
        for scheme in ("https://", "http://"):
            client._http.mount(scheme, pool)
        return client

    async def _send(self, what: str, request: Callable[[GoogleBucket], T], *, urgent: bool = False) -> T:
        return await self._sdk.send(what, lambda client: request(client.bucket(self._name)), urgent=urgent)

    async def aclose(self) -> None:
        self._sdk.close()

    # ----------------------------------------------------------------------------------------------------------- objects

    async def exists(self) -> bool:
        """Whether there is such a bucket."""

        def list_one(bucket: GoogleBucket) -> bool:
            next(iter(bucket.list_blobs(max_results=1, **_ALONE)), None)
            return True

        return bool(await unless_missing(self._send(f"looking at the bucket {self._name!r}", list_one)))

    async def probe(self, place: str) -> None:
        """Try whether conditions are honoured, at a free name, where the service is not Google's own."""
        client = self._sdk.client
        if not self._probed and client is not None and _base(client) != _GOOGLES:
            self.honours = await honoured(self, place)
        self._probed = True

    async def get(self, name: str) -> Record | None:
        def get(bucket: GoogleBucket) -> Record:
            blob = bucket.blob(name)
            # Bytes and generation come of one answer.
            body = blob.download_as_bytes(raw_download=True, single_shot_download=True, **_ALONE)
            return Record(body, str(blob.generation))

        return await unless_missing(self._send(f"reading {name!r}", get, urgent=True))

    async def put(self, name: str, body: bytes, *, replaces: str | None) -> str | None:
        if replaces is not None and not replaces.isdigit():
            return None  # it is nothing's generation
        try:
            return await self._insert(name, body, "", int(replaces or 0), urgent=True)
        except Refused as error:
            if error.status in _MISSING:
                return None
            raise

    async def write(self, name: str, body: bytes, write: str) -> str:
        """Write an object of a name that nobody else writes; its generation."""
        try:
            return await self._insert(name, body, write, 0)
        except Refused as error:
            # By an earlier sending of the same.
            if error.status not in _MISSING or (there := await self.look(name)) is None or there.write != write:
                raise
            return there.identity

    async def _insert(self, name: str, body: bytes, write: str, generation: int, *, urgent: bool = False) -> str:
        def insert(bucket: GoogleBucket) -> str:
            blob = bucket.blob(name)
            blob.metadata = {WRITE: write} if write else None
            if not write:
                # A bucket that everybody may read is cached, and a record must not be.
                blob.cache_control = "no-store"
            blob.upload_from_string(
                body, content_type="application/octet-stream", if_generation_match=generation, **_ALONE
            )
            return str(blob.generation)

        return await self._send(f"writing {name!r}", insert, urgent=urgent)

    async def look(self, name: str) -> Look | None:
        def look(bucket: GoogleBucket) -> Look:
            # The client does not tell the time of an answer, which is the service's clock.
            client = bucket.client
            url = f"{_base(client)}/storage/v1/b/{quote(self._name)}/o/{quote(name, safe='')}"
            answer = client._http.get(url, timeout=TIMEOUT)
            if answer.status_code != 200:
                raise Refused(f"looking at {name!r}", answer.status_code, _reason(answer), _after(answer.headers))
            blob = bucket.blob(name)
            blob._set_properties(answer.json())
            now = parsedate_to_datetime(answer.headers["Date"])
            age = max(0.0, (now - (blob.updated or now)).total_seconds())
            return Look(str(blob.generation), blob.size or 0, (blob.metadata or {}).get(WRITE), age)

        return await unless_missing(self._send(f"looking at {name!r}", look))

    async def pages(self, prefix: str) -> AsyncGenerator[list[Listed], None]:
        more: str | None = ""
        while more is not None:
            found, _, more = await self._page(prefix, more, None)
            yield found

    async def directories(self, prefix: str) -> list[str]:
        """The names of the directories below a prefix that ends in a slash."""
        names: list[str] = []
        more: str | None = ""
        while more is not None:
            _, below, more = await self._page(prefix, more, "/")
            names += [name[len(prefix) : -1] for name in below]
        return names

    async def _page(self, prefix: str, more: str, delimiter: str | None) -> tuple[list[Listed], list[str], str | None]:
        def page(bucket: GoogleBucket) -> tuple[list[Listed], list[str], str | None]:
            pages = bucket.list_blobs(
                prefix=prefix,
                page_token=more or None,
                delimiter=delimiter,
                fields="items(name,size,generation),prefixes,nextPageToken",
                **_ALONE,
            )
            found = [Listed(one.name, one.size or 0, str(one.generation)) for one in next(pages.pages, ())]
            return found, list(pages.prefixes), pages.next_page_token

        return await self._send(f"listing {prefix!r}", page)

    async def delete(self, names: Mapping[str, str | None]) -> Mapping[str, Answer]:
        async def delete(name: str) -> Answer:
            identity = names[name]

            def request(bucket: GoogleBucket) -> None:
                bucket.blob(name).delete(if_generation_match=int(identity) if identity else None, **_ALONE)

            try:
                await self._send(f"deleting {name!r}", request)
                return Answer.DONE
            except Refused as error:
                if error.status not in MISSED:
                    raise
                refused = error
            there = await self.look(name)
            if there is not None and identity in (None, there.identity):
                raise refused  # for another reason, such as a hold
            return Answer.ALREADY if there is None else Answer.FOREIGN

        answers = await at_once(list(names), delete, self.limit.most)
        return dict(zip(names, answers, strict=True))

    async def move(self, source: str, generation: str, goal: str, replaces: str | None) -> None:
        """Move what has this generation onto what has that one or onto nothing, in one step where the bucket can."""
        conditions: dict[str, Any] = {
            "if_generation_match": int(replaces or 0),
            "if_source_generation_match": int(generation),
            **_ALONE,
        }
        if self.moves:
            try:
                await self._send(
                    f"moving {source!r} to {goal!r}",
                    lambda bucket: bucket.move_blob(bucket.blob(source), goal, **conditions),
                )
                return
            except Refused as error:
                if error.status not in (400, 405, 501):
                    raise
        token: str | None = None

        def rewrite(bucket: GoogleBucket) -> None:
            # In as many calls as it takes; what is sent again goes on where the last one came to.
            nonlocal token
            while True:
                token, _, _ = bucket.blob(goal).rewrite(bucket.blob(source), token, **conditions)
                if token is None:
                    return

        await self._send(f"copying {source!r} to {goal!r}", rewrite)
        self.moves = False
        # The source is gone before anything else is done: a copy that comes late finds none.
        await self.delete({source: None})

    # --------------------------------------------------------------------------------------------------- resumable uploads

    async def begin_upload(self, name: str, write: str) -> Session:
        """Begin to write an object of a name that nobody else writes in several requests, of which nothing shows before the
        last. What is begun and not ended expires."""

        def begin(bucket: GoogleBucket) -> str:
            blob = bucket.blob(name)
            blob.metadata = {WRITE: write}
            how: Any = {"if_generation_match": 0, "checksum": None, **_ALONE}
            return str(blob.create_resumable_upload_session("application/octet-stream", **how))

        return Session(self, name, await self._send(f"writing {name!r}", begin))

    async def continue_upload(self, session: Session, body: bytes, *, last: bool) -> None:
        """Send the next bytes of an upload; again after an answer that was lost, from where the service has come."""
        start, end = session.sent, session.sent + len(body)
        size = end if last else None
        asked = False

        def send(bucket: GoogleBucket) -> None:
            nonlocal asked
            http = bucket.client._http
            have = session.ask(http, None, size) if asked else start
            asked = True
            while have is not None and (have < end or last):
                if not start <= have <= end:
                    raise Refused(f"writing {session.name!r}: the service has lost what was sent", 410)
                came = session.ask(http, (have, body[have - start :]), size)
                if came is not None and came <= have:
                    raise Refused(f"writing {session.name!r}")  # nothing was kept
                have = came

        await self._send(f"writing {session.name!r}", send)
        session.sent = end

    async def cancel_upload(self, session: Session) -> None:
        """Give an upload up."""
        await self._send(f"writing {session.name!r}", lambda bucket: session.cancel(bucket.client._http))


class Session:
    """A resumable upload; its address is a secret, since it needs no other credential.

    Attributes:
        sent: Bytes that the service has.
    """

    def __init__(self, bucket: GcsBucket, name: str, address: str) -> None:
        self._bucket, self.name, self._address = bucket, name, address
        self.sent = 0

    def ask(self, http: requests.Session, rest: tuple[int, bytes] | None, size: int | None) -> int | None:
        """Send bytes from a place on, or nothing; where the service has come to, None once the object is there."""
        start, body = rest if rest is not None else (0, b"")
        told = f"{start}-{start + len(body) - 1}" if body else "*"
        headers = {"Content-Range": f"bytes {told}/{'*' if size is None else size}"}
        answer = http.put(self._address, data=body, headers=headers, timeout=TIMEOUT)
        if answer.status_code in (200, 201):
            return None
        if answer.status_code != 308:
            raise Refused(f"writing {self.name!r}", answer.status_code, _reason(answer), _after(answer.headers))
        kept = answer.headers.get("Range", "")
        return int(kept.rpartition("-")[2]) + 1 if kept else 0

    def cancel(self, http: requests.Session) -> None:
        """Have what was sent forgotten."""
        answer = http.delete(self._address, timeout=TIMEOUT)
        if answer.status_code not in (204, 404, 410, 499):
            raise Refused(f"writing {self.name!r}", answer.status_code, _reason(answer), _after(answer.headers))


def _base(client: GoogleClient) -> str:
    return str(getattr(client._connection, "API_BASE_URL", ""))


def _once(what: str, request: Callable[[], object]) -> object:
    """Make one request through the client; what fails is `Refused`, with the service's status and reason, and nothing of the
    request."""
    try:
        return request()
    except GoogleAPICallError as error:
        refused = _refused(what, error)
    except InvalidResponse as error:
        refused = Refused(what, error.response.status_code, _reason(error.response), _after(error.response.headers))
    except (requests.RequestException, TransportError, DataCorruption):
        refused = Refused(what)
    except DefaultCredentialsError as error:
        refused = Refused(f"{what}: {error}", 401)
    except GoogleAuthError as error:
        # Its text may hold what a token was asked for with, or the token.
        passing = error.retryable or isinstance(error.__cause__, TransportError)
        refused = Refused(f"{what}: {type(error).__name__}", 0 if passing else 401)
    except Refused:
        raise
    except Exception as error:
        cut = type(error).__module__.startswith("urllib3")
        refused = Refused(what) if cut else Refused(f"{what}: {type(error).__name__}", 400)
    # Raised here, so that nothing leads from it to the client's error, which holds the request with its credential.
    raise refused


def _refused(what: str, error: GoogleCloudError) -> Refused:
    response = error.response
    reason = str(error.errors[0].get("reason", "")) if error.errors and isinstance(error.errors[0], dict) else ""
    headers: Mapping[str, str] = response.headers if isinstance(response, requests.Response) else {}
    status = 429 if reason in ("rateLimitExceeded", "userRateLimitExceeded") else int(error.code or 0)
    return Refused(what, status, reason, _after(headers))


def _after(headers: Mapping[str, str]) -> float | None:
    after = headers.get("Retry-After", "")
    return float(after) if after.isdigit() else None


def _reason(response: requests.Response) -> str:
    try:
        errors = response.json()["error"].get("errors") or [{}]
        return str(errors[0].get("reason", ""))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return ""
