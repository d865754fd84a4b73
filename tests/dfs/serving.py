"""A service on a port of 127.0.0.1, in a thread with a loop of its own, so that any test and any process can use it.

What it answers is for its subclasses to say; what befalls its requests, and the record of them, are the same for all.
"""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

from aiohttp import web

from .faults import Fault, Plan

T = TypeVar("T")
Q = TypeVar("Q")


@dataclass(frozen=True, slots=True)
class Logged:
    """A request that was applied or befallen; `status` 0 says that it got no answer."""

    verb: str
    path: str
    status: int
    auth: str = ""
    fault: str = ""


class Answered(Protocol):
    """An answer as it goes over the wire."""

    status: int
    headers: dict[str, str]
    body: bytes
    chunked: bool

    @property
    def reason(self) -> str | None: ...


class Loopback(ABC, Generic[Q]):
    """Requests, one after the other, each answered whole by a service in memory; a context manager, of no use once ended.

    Args:
        plan: Faults, or their text.
        now: The clock.
        port: 0 takes a free one.

    Attributes:
        counts: Requests by verb, without those that a fault added.
        log: What came, in order.
        received: Bytes of the bodies that came.
        before: Called with each request's number before it is looked at, in the server's thread.
    """

    def __init__(self, *, plan: Plan | str, now: Callable[[], float], port: int) -> None:
        self.plan = Plan(plan) if isinstance(plan, str) else plan
        self.counts: Counter[str] = Counter()
        self.log: list[Logged] = []
        self.received = 0
        self.before: Callable[[int], None] = lambda number: None
        self.url = ""
        self._now = now
        self._port = port
        self._late: list[tuple[int, Q]] = []
        self._ready = threading.Event()
        self._broken: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    @abstractmethod
    async def _parsed(self, raw: web.Request) -> Q:
        """A request, from what came over the wire."""

    @abstractmethod
    def _logged(self, request: Q, status: int, fault: str) -> Logged:
        """A request's entry in the log; its verb is what faults and counts go by."""

    @abstractmethod
    def _answer(self, request: Q) -> Answered:
        """Apply a request, whole or not at all."""

    @abstractmethod
    def _failure(self, request: Q, status: int, headers: dict[str, str]) -> Answered:
        """An error that no request deserves: 429, 500 or 503."""

    def replay(self) -> None:
        """Let every replay arrive that is still under way, as it may after the death of its sender."""
        asyncio.run_coroutine_threadsafe(self._arrive(None), self._loop).result()

    def call(self, function: Callable[[], T]) -> T:
        """Call a function in the server's thread, between two requests."""

        async def called() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(called(), self._loop).result()

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        if self._broken is not None:
            raise self._broken
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and str(self.plan):
            error.add_note(f'It happened under: DfsServer(plan="{self.plan}")')
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
        application = web.Application(client_max_size=0)
        application.router.add_route("*", "/{rest:.*}", self._handle)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self._port).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._ready.set()
        try:
            await self._end.wait()
        finally:
            await runner.cleanup()

    async def _handle(self, raw: web.Request) -> web.StreamResponse:
        try:
            request = await self._parsed(raw)
            self.received += len(await raw.read())
            return await self._handled(raw, request)
        except Exception as error:
            self._broken = error  # a mistake in here, not a fault that was asked for
            raise

    async def _handled(self, raw: web.Request, request: Q) -> web.StreamResponse:
        verb = self._logged(request, 0, "").verb
        number, of_verb = self.counts.total(), self.counts[verb]
        self.counts[verb] += 1
        await self._arrive(number)
        self.before(number)
        fault = self.plan.at(number, verb, of_verb)
        answer = await self._befallen(fault, number, request)
        note = str(fault or "")
        if answer is None:
            self.log.append(self._logged(request, 0, note))
            if raw.transport is not None:
                raw.transport.abort()
            return web.Response()
        self.log.append(self._logged(request, answer.status, note))
        if fault is not None and fault.kind == "lags":
            await asyncio.sleep(fault.amount / 1000)
        response = _Response(answer)
        response.headers["Date"] = formatdate(self._now(), usegmt=True)
        return response

    async def _befallen(self, fault: Fault | None, number: int, request: Q) -> Answered | None:
        """The answer of a request under a fault; None cuts the connection."""
        kind, amount = (fault.kind, fault.amount) if fault is not None else ("", 0)
        if kind == "lates":
            self._late.append((number + amount, request))
        if kind in ("cuts", "lates"):
            return None
        if kind == "fails":
            return self._failure(request, 500, {})
        if kind in ("throttles", "overloads"):
            return self._failure(request, 429 if kind == "throttles" else 503, {"Retry-After": str(amount)})
        if kind == "delays":
            await asyncio.sleep(amount / 1000)
        answer = self._answer(request)
        if kind == "repeats":
            answer = self._answer(request)
        if kind == "replays":
            self._late.append((number + amount, request))
        if kind == "errs":
            return self._failure(request, 500, {})
        return None if kind == "loses" else answer

    async def _arrive(self, number: int | None) -> None:
        due = [request for at, request in self._late if number is None or at <= number]
        self._late = [(at, request) for at, request in self._late if number is not None and at > number]
        for request in due:
            self.log.append(self._logged(request, self._answer(request).status, "replayed"))


class _Response(web.Response):
    """An answer with the very headers that it states."""

    def __init__(self, answer: Answered) -> None:
        super().__init__(status=answer.status, reason=answer.reason, headers=answer.headers, body=answer.body)
        self._stated = answer
        if answer.chunked:
            self.enable_chunked_encoding()

    async def _prepare_headers(self) -> None:
        await super()._prepare_headers()
        # aiohttp keeps neither of these for HEAD and 304, and adds a type to what is empty.
        if self._stated.chunked:
            self.headers["Transfer-Encoding"] = "chunked"
        elif "Content-Length" in self._stated.headers:
            self.headers["Content-Length"] = self._stated.headers["Content-Length"]
        if "Content-Type" not in self._stated.headers:
            self.headers.popall("Content-Type", None)
