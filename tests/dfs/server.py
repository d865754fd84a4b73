"""Data Lake Storage Gen2, or OneLake, on a port of 127.0.0.1."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from urllib.parse import unquote

from aiohttp import web

from .faults import Plan
from .namespace import Namespace, segments
from .onelake import OneLake
from .service import Answer, Request, Service, route
from .serving import Logged, Loopback


class DfsServer(Loopback[Request]):
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
        super().__init__(plan=plan, now=now, port=port)
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

    def add_item(self, workspace: str, item: str) -> tuple[str, str]:
        """Make an item of OneLake, such as `sales.Lakehouse`; the GUIDs of its workspace and its own."""
        assert self.onelake is not None
        return self.onelake.add_item(workspace, item)

    async def _parsed(self, raw: web.Request) -> Request:
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

    def _logged(self, request: Request, status: int, fault: str) -> Logged:
        return Logged(route(request)[0], f"{request.filesystem}/{request.path}", status, request.auth, fault)

    def _answer(self, request: Request) -> Answer:
        return self.service.answer(request)

    def _failure(self, request: Request, status: int, headers: dict[str, str]) -> Answer:
        code = {429: "TooManyRequests", 500: "InternalError", 503: "ServerBusy"}[status]
        return self.service.failure(request, code, headers)
