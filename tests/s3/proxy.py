"""A proxy before a server of S3, in a thread with a loop of its own: it counts, records, delays, and fails by plan."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Self
from urllib.parse import quote
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from aiohttp import ClientError, ClientSession, ClientTimeout, DummyCookieJar, TCPConnector, web
from multidict import CIMultiDict
from yarl import URL

from .faults import Fault, Kind, Plan
from .operations import Asked, asked, document, texts

_HOP = {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade", "expect"}
_NOT_ADDED = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
CHUNK = 1 << 18
_CUTS: tuple[Kind, ...] = ("cut", "late", "later")
_REFUSALS: dict[Kind, tuple[int, str, str]] = {
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "internal": (500, "InternalError", "We encountered an internal error. Please try again."),
    "internal_applied": (500, "InternalError", "We encountered an internal error. Please try again."),
    "error_in_200": (200, "InternalError", "We encountered an internal error. Please try again."),
    "error_in_200_applied": (200, "InternalError", "We encountered an internal error. Please try again."),
    "conflict_409": (
        409,
        "ConditionalRequestConflict",
        "The conditional request cannot succeed due to a conflicting operation against this resource.",
    ),
    "no_such_upload": (
        404,
        "NoSuchUpload",
        "The specified upload does not exist. The upload ID may be invalid, or the upload may have been aborted or completed.",
    ),
}
_APPLIED: tuple[Kind, ...] = ("lost", "doubled", "internal_applied", "error_in_200_applied", "no_such_upload")


@dataclass(frozen=True, slots=True)
class Record:
    """A request that came, or that a fault let arrive later.

    Attributes:
        keys: Its key; those of a DeleteObjects are in its body.
        conditions: Its headers that state a condition, by names in lower case.
        source: What it copies.
        status: What was answered; 0 says that the connection was cut.
        fault: What befell it; "arrived" is a late one when it is applied.
    """

    operation: str
    bucket: str
    keys: tuple[str, ...]
    upload: str
    part: str
    conditions: tuple[tuple[str, str], ...]
    source: str
    status: int
    fault: str

    @property
    def key(self) -> str:
        """Its key, or the first of them."""
        return self.keys[0] if self.keys else ""


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    target: str
    headers: CIMultiDict[str]
    asked: Asked
    keys: tuple[str, ...]
    body: bytes | None  # None as long as it is to be read


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    reason: str
    headers: CIMultiDict[str]
    body: bytes


class S3Proxy:
    """A proxy before an endpoint in path style; a context manager, of no use once it has ended.

    A subclass before another service says what a request asks for, and how that service refuses.

    Args:
        upstream: The endpoint.
        plan: Faults, or their text; they are counted from when the plan is set.
        delay: Seconds that each request takes longer.
        throttle: Every so many requests one is told to slow down; 0 for none.
        drops: Headers that are not passed on: a server that does not know of conditions.

    Attributes:
        url: Its own endpoint.
        counts: Requests by operation, without those that a fault added.
        traffic: Bytes of bodies as they came over the wire, "up" to the server and "down" from it.
        log: What came, in order of the answers.
        before: Called with each request's number before it is passed on, in the proxy's thread.
    """

    streamed: Collection[str] = ("GetObject",)
    """Operations whose answers are passed on as they come."""

    def __init__(
        self, upstream: str, *, plan: Plan | str = "", delay: float = 0, throttle: int = 0, drops: Collection[str] = ()
    ) -> None:
        self.drops = drops
        self.plan = Plan(plan) if isinstance(plan, str) else plan
        self.delay, self.throttle = delay, throttle
        self.counts: Counter[str] = Counter()
        self.traffic: Counter[str] = Counter()
        self.log: list[Record] = []
        self.before: Callable[[int], None] = lambda number: None
        self.url = ""
        self._upstream = upstream
        self._number = 0
        self._late: list[tuple[int | None, Request]] = []
        self._timers: set[asyncio.Task[None]] = set()
        self._ready = threading.Event()
        self._broken: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def replay(self) -> None:
        """Let every late request arrive that is still under way, as it may after the death of its sender."""
        asyncio.run_coroutine_threadsafe(self._arrive(None), self._loop).result()

    def clear(self) -> None:
        """Begin to number, to count and to record anew; only while nothing is late."""
        self._number = 0
        self.counts.clear()
        self.traffic.clear()
        self.log.clear()

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        if self._broken is not None:
            raise self._broken
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and str(self.plan):
            error.add_note(f'It happened under: {type(self).__name__}(plan="{self.plan}")')
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()
        if error is None and self._broken is not None:
            raise self._broken

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as error:
            self._broken = error
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        runner = web.ServerRunner(web.Server(self._handle, access_log=None, auto_decompress=False), shutdown_timeout=0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._session = ClientSession(
            auto_decompress=False,
            connector=TCPConnector(limit=0),
            cookie_jar=DummyCookieJar(),
            skip_auto_headers=_NOT_ADDED,
            timeout=ClientTimeout(total=None),
        )
        self._session._retry_connection = False  # what was asked for once is sent once
        self._ready.set()
        try:
            await self._end.wait()
        finally:
            for timer in self._timers:
                timer.cancel()
            await runner.cleanup()
            await self._session.close()

    async def _handle(self, raw: web.BaseRequest) -> web.StreamResponse:
        try:
            if raw.headers.get("Expect", "").lower() == "100-continue":
                await raw.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                raw.writer.output_size = 0  # the answer is still to come
            return await self._handled(raw)
        except (ClientError, ConnectionError, web.RequestPayloadError):
            return _cut(raw)  # the client or the server has gone
        except Exception as error:
            self._broken = error  # a mistake in here, not a fault that was asked for
            raise

    async def _handled(self, raw: web.BaseRequest) -> web.StreamResponse:
        request = await self._parsed(raw)
        for name in self.drops:
            request.headers.popall(name, None)
        self.traffic["up"] += len(request.body or b"")
        self._number += 1
        number = self._number
        self.counts[request.asked.operation] += 1
        fault = self.plan.next(request.asked.operation, request.keys)
        if fault is None and self.throttle and number % self.throttle == 0:
            fault = Fault("slow_down", number - 1)
        await self._arrive(number)
        self.before(number - 1)
        if self.delay:
            await asyncio.sleep(self.delay)
        if fault is None:
            return await self._passed(raw, request)
        if request.body is None:
            request = replace(request, body=await raw.content.read())
            self.traffic["up"] += len(request.body or b"")
        answer = await self._befallen(fault, number, request)
        self._note(request, answer.status if answer is not None else 0, str(fault))
        return await self._answered(raw, answer) if answer is not None else _cut(raw)

    async def _passed(self, raw: web.BaseRequest, request: Request) -> web.StreamResponse:
        """The server's answer to a request that nothing befalls; both bodies are passed on as they come."""
        data = _streamed(raw, self.traffic) if request.body is None else request.body or None
        try:
            response = await self._session.request(
                request.method, self._at(request.target), headers=request.headers, data=data, allow_redirects=False
            )
        except (ClientError, ConnectionError):
            self._note(request, 0, "")
            raise
        async with response:
            headers = kept(response.headers)
            if request.asked.operation not in self.streamed:
                answer = Answer(response.status, response.reason or "", headers, await response.read())
                self._note(request, response.status, "")
                return await self._answered(raw, answer, head=request.method == "HEAD")
            self._note(request, response.status, "")
            streamed = web.StreamResponse(status=response.status, reason=response.reason, headers=headers)
            await streamed.prepare(raw)
            async for chunk in response.content.iter_any():
                self.traffic["down"] += len(chunk)
                await streamed.write(chunk)
            await streamed.write_eof()
            return streamed

    async def _answered(self, raw: web.BaseRequest, answer: Answer, head: bool = False) -> web.StreamResponse:
        self.traffic["down"] += len(answer.body)
        if not head:
            answer.headers.popall("Content-Length", None)
            return web.Response(
                status=answer.status, reason=answer.reason or None, headers=answer.headers, body=answer.body or None
            )
        # The length that it states is not that of what follows.
        response = web.StreamResponse(status=answer.status, reason=answer.reason or None, headers=answer.headers)
        await response.prepare(raw)
        await response.write_eof()
        return response

    async def _befallen(self, fault: Fault, number: int, request: Request) -> Answer | None:
        """The answer to a request under a fault; None cuts the connection."""
        kind = fault.kind
        if kind == "late":
            self._late.append((number + fault.amount if fault.amount else None, request))
        if kind == "later":
            self._late.append((None, request))
            timer = asyncio.create_task(self._arrive_after(fault.amount / 1000, request))
            self._timers.add(timer)
            timer.add_done_callback(self._timers.discard)
        if kind in _CUTS:
            return None
        if kind == "vanishes":
            return await self._vanished(request)
        if kind == "denied":
            return await self._denied(request, {key for key in request.keys if fault.concerns(key)})
        answer = None
        for _ in range((kind in _APPLIED) + (kind == "doubled")):
            answer = await self._sent(request)
        if kind not in _REFUSALS:
            return None if kind == "lost" else answer
        refusal = self._refused(kind, request)
        if kind == "slow_down" and fault.amount:
            refusal.headers["Retry-After"] = str(fault.amount)
        return refusal

    async def _sent(self, request: Request) -> Answer:
        async with self._session.request(
            request.method,
            self._at(request.target),
            headers=request.headers,
            data=request.body or None,
            allow_redirects=False,
        ) as response:
            return Answer(response.status, response.reason or "", kept(response.headers), await response.read())

    async def _vanished(self, request: Request) -> Answer:
        """The answer to the completion of an upload that is aborted instead; what the server refuses it refuses."""
        assert request.asked.operation == "CompleteMultipartUpload" and request.body is not None
        aborted = await self._sent(replace(request, method="DELETE", headers=CIMultiDict(), body=b""))
        if aborted.status >= 300:
            return aborted
        tags = [tag.strip('"') for tag in texts(request.body, "ETag")]
        tag = f"{hashlib.md5(b''.join(map(bytes.fromhex, tags))).hexdigest()}-{len(tags)}"
        bucket, key = request.asked.bucket, request.asked.key
        return document_answer(
            200,
            f'<CompleteMultipartUploadResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Location>{escape(f'{self._upstream}/{bucket}/{quote(key)}')}</Location><Bucket>{escape(bucket)}</Bucket>"
            f"<Key>{escape(key)}</Key><ETag>&quot;{tag}&quot;</ETag></CompleteMultipartUploadResult>",
        )

    async def _denied(self, request: Request, keys: Collection[str]) -> Answer:
        """The answer to a DeleteObjects that leaves some keys alone."""
        assert request.asked.operation == "DeleteObjects" and request.body is not None
        wanted = document(request.body)
        for one in wanted.findall("Object"):
            if one.findtext("Key") in keys:
                wanted.remove(one)
        result = ElementTree.Element("DeleteResult")
        if wanted.find("Object") is not None:
            answer = await self._sent(_instead(request, ElementTree.tostring(wanted)))
            if answer.status != 200:
                return answer
            result = document(answer.body)
        for key in request.keys:
            if key in keys:
                error = ElementTree.SubElement(result, "Error")
                for name, text in ("Key", key), ("Code", "AccessDenied"), ("Message", "Access Denied"):
                    ElementTree.SubElement(error, name).text = text
        return document_answer(200, ElementTree.tostring(result, encoding="unicode"))

    async def _arrive_after(self, seconds: float, request: Request) -> None:
        await asyncio.sleep(seconds)
        await self._arrive(None, request)

    async def _arrive(self, number: int | None, only: Request | None = None) -> None:
        """Let arrive what is due by that number, or a request that is late, or all of them."""

        def due(at: int | None, request: Request) -> bool:
            if only is not None:
                return request is only
            return number is None or (at is not None and at <= number)

        now = [request for at, request in self._late if due(at, request)]
        self._late = [(at, request) for at, request in self._late if not due(at, request)]
        for request in now:
            with suppress(ClientError, ConnectionError):  # the server has gone
                self._note(request, (await self._sent(request)).status, "arrived")

    async def _parsed(self, raw: web.BaseRequest) -> Request:
        return await _parsed(raw)

    def _refused(self, kind: Kind, request: Request) -> Answer:
        return _refused(kind, request)

    def _at(self, target: str) -> URL:
        return URL(self._upstream + target, encoded=True)

    def _note(self, request: Request, status: int, fault: str) -> None:
        what, headers = request.asked, request.headers
        record = Record(
            operation=what.operation,
            bucket=what.bucket,
            keys=request.keys,
            upload=what.query.get("uploadId", ""),
            part=what.query.get("partNumber", ""),
            conditions=tuple(
                (name.lower(), value)
                for name, value in headers.items()
                if name.lower().startswith(("if-", "x-amz-if-", "x-amz-copy-source-if-"))
            ),
            source=headers.get("x-amz-copy-source", ""),
            status=status,
            fault=fault,
        )
        self.log.append(record)


async def _parsed(raw: web.BaseRequest) -> Request:
    # As it was sent: a path that is unquoted and quoted anew is another key.
    target, headers = raw.raw_path, kept(raw.headers)
    what = asked(raw.method, target, {name.lower(): value for name, value in headers.items()})
    keys: tuple[str, ...] = (what.key,) if what.key else ()
    small = (raw.content_length or 0) <= CHUNK and "Transfer-Encoding" not in raw.headers
    body = await raw.content.read() if small or what.operation == "DeleteObjects" else None
    if what.operation == "DeleteObjects":
        keys = tuple(texts(body or b"", "Key"))
    return Request(raw.method, target, headers, what, keys, body)


async def _streamed(raw: web.BaseRequest, traffic: Counter[str]) -> AsyncIterator[bytes]:
    async for chunk in raw.content.iter_any():
        traffic["up"] += len(chunk)
        yield chunk


def _instead(request: Request, body: bytes) -> Request:
    """A request with another body, and what states of the body what it is."""
    stale = ("content-", "x-amz-checksum-", "x-amz-sdk-checksum-")
    kept = [(name, value) for name, value in request.headers.items() if not name.lower().startswith(stale)]
    digest = base64.b64encode(hashlib.md5(body).digest()).decode()
    return replace(request, headers=CIMultiDict([*kept, ("Content-MD5", digest)]), body=body)


def kept(headers: Mapping[str, str]) -> CIMultiDict[str]:
    """The headers that are not about the connection."""
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in _HOP)


def document_answer(status: int, xml: str) -> Answer:
    headers = CIMultiDict({"Content-Type": "application/xml", "x-amz-request-id": "FAULT"})
    return Answer(status, "", headers, f'<?xml version="1.0" encoding="UTF-8"?>\n{xml}'.encode())


def _refused(kind: Kind, request: Request) -> Answer:
    status, code, message = _REFUSALS[kind]
    key = escape(request.asked.key)
    answer = document_answer(
        status,
        f"<Error><Code>{code}</Code><Message>{message}</Message><Key>{key}</Key><RequestId>FAULT</RequestId></Error>",
    )
    # What answers HEAD has no body.
    return replace(answer, body=b"") if request.method == "HEAD" else answer


def _cut(raw: web.BaseRequest) -> web.Response:
    if raw.transport is not None:
        raw.transport.abort()
    return web.Response()
