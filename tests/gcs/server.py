"""Google Cloud Storage's JSON API on a port of 127.0.0.1."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from itertools import count

from aiohttp import web
from dfs.faults import Plan
from dfs.serving import Logged, Loopback

from .service import Answer, Request, Service, failure, route
from .store import Store


class GcsServer(Loopback[Request]):
    """Google Cloud Storage in memory; a context manager, of no use once it has ended.

    A client is sent to it with `client_options={"api_endpoint": server.url}`, or by `STORAGE_EMULATOR_HOST`. What is
    counted and what faults befall are requests: a batch is one, whatever is in it. The log has its parts too, and those
    that a fault of the verb `part` befalls get its error instead of being done: `fails`, `throttles`, `overloads`.

    Args:
        conditions: Whether conditions are looked at; a service that ignores them overwrites.
        rate: Writes a second that one object's name takes.
        absent: What a condition on an object that is not there comes to, where there must be one: 404 or 412.
        page: Results that one page of a listing has at most.
        rewritten: Bytes that one call of a rewrite gets through; all by default.
        keeps: Bytes that one request of a resumable upload gets kept at most; all by default.
        token: The one bearer token that is let in; any by default.
        denied: Verbs that nobody may use.
        plan: Faults, or their text.
        now: The clock.

    Attributes:
        store: What is stored, to be looked into while no request is under way.
    """

    def __init__(
        self,
        *,
        conditions: bool = True,
        rate: float | None = None,
        absent: int = 404,
        page: int = 1000,
        rewritten: int | None = None,
        keeps: int | None = None,
        token: str | None = None,
        denied: Collection[str] = (),
        plan: Plan | str = "",
        now: Callable[[], float] = time.time,
        port: int = 0,
    ) -> None:
        super().__init__(plan=plan, now=now, port=port)
        self.store = Store(
            now, conditions=conditions, rate=rate, absent=absent, page=page, rewritten=rewritten, keeps=keeps
        )
        self.service = Service(self.store, token=token, denied=denied, part=self._part)
        self._parts = count()

    async def _parsed(self, raw: web.Request) -> Request:
        return Request.parse(raw.method, raw.raw_path, raw.headers, await raw.read())

    def _logged(self, request: Request, status: int, fault: str) -> Logged:
        return Logged(route(request), "/".join(filter(None, request.place)), status, request.auth, fault)

    def _answer(self, request: Request) -> Answer:
        return self.service.answer(request)

    def _part(self, request: Request) -> Answer:
        """A part of a batch, applied or befallen."""
        fault = self.plan.at(-1, "part", next(self._parts))
        statuses = {"fails": 500, "errs": 500, "throttles": 429, "overloads": 503}
        answer = None
        if fault is None or fault.kind not in statuses or fault.kind == "errs":
            answer = self.service.answer(request)
        if fault is not None and fault.kind in statuses:
            answer = self._failure(request, statuses[fault.kind], {})
        assert answer is not None
        self.log.append(self._logged(request, answer.status, str(fault or "") or "batched"))
        return answer

    def _failure(self, request: Request, status: int, headers: dict[str, str]) -> Answer:
        return failure("rateLimitExceeded" if status == 429 else "backendError", status, headers)
