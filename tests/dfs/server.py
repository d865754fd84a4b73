"""The service on a port of 127.0.0.1, in a thread with a loop of its own, so that any test and any process can use it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from email.utils import formatdate
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import unquote

from aiohttp import web

from .faults import Fault, Plan
from .namespace import Namespace, segments
from .onelake import OneLake
from .service import Answer, Request, Service, route

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Logged:
    """A request that was applied or befallen; `status` 0 says that it got no answer."""

    verb: str
    path: str
    status: int
    auth: str = ""
    fault: str = ""


class DfsServer:
    """Data Lake Storage Gen2, or OneLake, in memory; a context manager, of no use once it has ended.

    Both endpoints have the one address `url`, as clients take it from an address without `.dfs.`.

    Args:
        onelake: OneLake's rules; items are made by `add_item`.
        conditions: Whether `If-Match` and its like are looked at.
        rejects: Query parameters that are refused; on OneLake `mode` by default, which it may not take (unverified).
        soft_delete: Keep what is deleted.
        page: Paths that one request of a recursive delete or a directory rename gets through; all by default.
        anonymous: Whether requests without a credential are let in.
        token: The one bearer token that is let in; any by default.
        denied: Verbs that nobody may use.
        hierarchical: Whether the account has a hierarchical namespace; without one it only says so.
        plan: Faults, or their text.
        now: The clock.

    Attributes:
        namespace: What is stored, to be looked into while no request is under way.
        counts: Requests by verb, without those that a fault added.
        log: What came, in order.
        before: Called with each request's number before it is looked at, in the server's thread.
    """

    def __init__(
        self,
        *,
        onelake: bool = False,
        conditions: bool = True,
        rejects: Collection[str] | None = None,
        soft_delete: bool = False,
        page: int | None = None,
        anonymous: bool = True,
        token: str | None = None,
        denied: Collection[str] = (),
        hierarchical: bool = True,
        plan: Plan | str = "",
        now: Callable[[], float] = time.time,
        port: int = 0,
    ) -> None:
        self.namespace = Namespace(now, soft_delete=soft_delete, page=page)
        self.onelake = OneLake(self.namespace) if onelake else None
        self.service = Service(
            self.namespace,
            onelake=self.onelake,
            conditions=conditions,
            token=token,
            anonymous=anonymous,
            denied=denied,
            hierarchical=hierarchical,
            rejects=frozenset(rejects if rejects is not None else ["mode"] if onelake else []),
        )
        self.plan = Plan(plan) if isinstance(plan, str) else plan
        self.counts: Counter[str] = Counter()
        self.log: list[Logged] = []
        self.before: Callable[[int], None] = lambda number: None
        self.url = ""
        self._port = port
        self._late: list[tuple[int, Request]] = []
        self._ready = threading.Event()
        self._broken: Exception | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def add_item(self, workspace: str, item: str) -> tuple[str, str]:
        """Make an item of OneLake, such as `sales.Lakehouse`; the GUIDs of its workspace and its own."""
        assert self.onelake is not None
        return self.onelake.add_item(workspace, item)

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
            return await self._handled(raw, await _parsed(raw))
        except Exception as error:
            self._broken = error  # a mistake in here, not a fault that was asked for
            raise

    async def _handled(self, raw: web.Request, request: Request) -> web.StreamResponse:
        verb, _ = route(request)
        number, of_verb = self.counts.total(), self.counts[verb]
        self.counts[verb] += 1
        await self._arrive(number)
        self.before(number)
        fault = self.plan.at(number, verb, of_verb)
        answer = await self._befallen(fault, number, request)
        note = str(fault or "")
        if answer is None:
            self._log(verb, request, 0, note)
            if raw.transport is not None:
                raw.transport.abort()
            return web.Response()
        self._log(verb, request, answer.status, note)
        if fault is not None and fault.kind == "lags":
            await asyncio.sleep(fault.amount / 1000)
        response = _Response(answer)
        response.headers["Date"] = formatdate(self.namespace.now(), usegmt=True)
        return response

    async def _befallen(self, fault: Fault | None, number: int, request: Request) -> Answer | None:
        """The answer of a request under a fault; None cuts the connection."""
        kind, amount = (fault.kind, fault.amount) if fault is not None else ("", 0)
        if kind == "lates":
            self._late.append((number + amount, request))
        if kind in ("cuts", "lates"):
            return None
        if kind == "fails":
            return self.service.failure(request, "InternalError")
        if kind in ("throttles", "overloads"):
            code = "TooManyRequests" if kind == "throttles" else "ServerBusy"
            return self.service.failure(request, code, {"Retry-After": str(amount)})
        if kind == "delays":
            await asyncio.sleep(amount / 1000)
        answer = self.service.answer(request)
        if kind == "repeats":
            answer = self.service.answer(request)
        if kind == "replays":
            self._late.append((number + amount, request))
        if kind == "errs":
            return self.service.failure(request, "InternalError")
        return None if kind == "loses" else answer

    async def _arrive(self, number: int | None) -> None:
        due = [request for at, request in self._late if number is None or at <= number]
        self._late = [(at, request) for at, request in self._late if number is not None and at > number]
        for request in due:
            self._log(route(request)[0], request, self.service.answer(request).status, "replayed")

    def _log(self, verb: str, request: Request, status: int, fault: str) -> None:
        self.log.append(Logged(verb, f"{request.filesystem}/{request.path}", status, request.auth, fault))


class _Response(web.Response):
    """An answer with the very headers that it states."""

    def __init__(self, answer: Answer) -> None:
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


async def _parsed(raw: web.Request) -> Request:
    target, _, query = raw.raw_path.partition("?")
    # A quoted slash separates (recorded).
    filesystem, *names = segments(unquote(target)) or [""]
    pairs = [pair.partition("=") for pair in query.split("&") if pair]
    metadata = {name[10:]: value for name, value in raw.headers.items() if name.lower().startswith("x-ms-meta-")}
    return Request(
        raw.method,
        filesystem,
        "/".join(names),
        {unquote(name): unquote(value) for name, _, value in pairs},
        {name.lower(): value for name, value in raw.headers.items()},
        metadata,
        await raw.read(),
    )
