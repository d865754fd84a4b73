"""What the cloud drivers share: requests under one adaptive limit, retried; and work on many things at once.

A request that is sent again may have been applied before. Every request here is made so that this does no harm, and the
driver that sent it tells by identity what became of it.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import anyio
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_random_exponential

from staged.errors import StorageError

__all__ = ["MISSED", "Limit", "Parts", "Refused", "at_once", "hide_secrets", "mapped", "unless_missing"]

S = TypeVar("S")
T = TypeVar("T")

PATIENCE = 12.0
"""Seconds for which a request is made again, without those for which it waits for its turn."""
_URGENT = 18.0
"""Seconds after which an urgent request is given up: less than what the core allows for one."""
_LONGEST = 5.0
"""Seconds that one pause takes at most, whatever the service asks for."""
_LONGER = wait_random_exponential(multiplier=0.1, max=_LONGEST)
_TOO_MANY = frozenset({429, 503})
_PASSING = frozenset({408, 429, 500, 502, 503, 504})
_PASSING_CODES = frozenset({"ConditionalRequestConflict", "OperationAborted", "RequestTimeout", "SlowDown"})
"""What S3 says of a request that may succeed later, whatever its status."""
MISSED = frozenset({404, 409, 412})
"""What is answered where something is not, or not as, the condition said."""
_PART = 8 << 20
"""Bytes of one part of a file that is written in several."""
_PARTS = 4
"""Parts of one file that are sent at once."""


class Refused(Exception):
    """A request was refused, or not answered; holds nothing of the request but what it was for.

    Attributes:
        status: The HTTP status; 0 where no answer came.
        code: The service's own name for it.
        retry_after: Seconds for which the service asked to be left alone.
    """

    def __init__(self, what: str, status: int = 0, code: str = "", retry_after: float | None = None) -> None:
        super().__init__(what)
        self.status, self.code, self.retry_after = status, code, retry_after

    def __str__(self) -> str:
        return f"{self.args[0]}: {f'{self.status} {self.code}'.strip() if self.status else 'no answer'}."

    @property
    def passing(self) -> bool:
        """Whether the same request may succeed later."""
        return self.status == 0 or self.status in _PASSING or self.code in _PASSING_CODES


class Limit:
    """How many requests run at once: halved where the service throttles, grown back by one a round while it does not.

    Args:
        most: Never more than these.
    """

    def __init__(self, most: int = 16) -> None:
        self.most = most
        self._now = float(most)
        self._slots: anyio.CapacityLimiter | None = None
        self._shrunk = float("-inf")
        self._silent_until = float("-inf")

    async def send(self, request: Callable[[], Awaitable[T]], *, urgent: bool = False) -> T:
        """Make a request, and make it again where its failure may pass.

        Args:
            urgent: Whoever waits for it may lose the target: it goes ahead of all others, and ends in time.

        Raises:
            Refused: It lasts.
        """
        started, queued = anyio.current_time(), 0.0

        async def once() -> T:
            nonlocal queued
            if urgent:
                return await self._request(request)
            waits = anyio.current_time()
            if self._slots is None:
                self._slots = anyio.CapacityLimiter(int(self._now))
            # A slot belongs to the request: one task may well make two.
            async with _Slot(self._slots):
                if (silence := self._silent_until - anyio.current_time()) > 0:
                    await anyio.sleep(silence)
                queued += anyio.current_time() - waits
                return await self._request(request)

        retrying = AsyncRetrying(
            sleep=anyio.sleep,
            retry=retry_if_exception(lambda error: isinstance(error, Refused) and error.passing),
            stop=lambda _: anyio.current_time() - started - queued >= PATIENCE,
            wait=_wait,
            reraise=True,
        )
        with anyio.move_on_after(_URGENT if urgent else math.inf):
            return await retrying(once)
        raise Refused("an urgent request")

    async def _request(self, request: Callable[[], Awaitable[T]]) -> T:
        sent = anyio.current_time()
        try:
            answer = await request()
        except Refused as error:
            if error.status in _TOO_MANY:
                self._shrink(sent, min(_LONGEST, error.retry_after or 0.0))
            raise
        self._set(min(float(self.most), self._now + 1 / self._now))
        return answer

    def _shrink(self, sent: float, silence: float) -> None:
        now = anyio.current_time()
        self._silent_until = max(self._silent_until, now + silence)
        # Whatever was under way at the last halving says no more than that one did.
        if sent > self._shrunk:
            self._shrunk = now
            self._set(max(1.0, self._now / 2))

    def _set(self, now: float) -> None:
        self._now = now
        if self._slots is not None:
            self._slots.total_tokens = int(now)


class _Slot:
    def __init__(self, slots: anyio.CapacityLimiter) -> None:
        self._slots = slots

    async def __aenter__(self) -> None:
        await self._slots.acquire_on_behalf_of(self)

    async def __aexit__(self, *_: object) -> None:
        self._slots.release_on_behalf_of(self)


def _wait(state: RetryCallState) -> float:
    """At least as long as the service asked for, and ever longer."""
    error = state.outcome.exception() if state.outcome is not None else None
    asked = error.retry_after if isinstance(error, Refused) else None
    return min(_LONGEST, max(_LONGER(state), asked or 0.0))


@contextmanager
def mapped() -> Iterator[None]:
    """Raise what is refused as a driver does."""
    try:
        yield
    except Refused as error:
        raise StorageError(str(error), retryable=error.passing) from error


class _Hidden(logging.Filter):
    """urllib3 logs whole URLs at DEBUG, and with them a signature or an upload's id that needs no other credential."""

    _SECRET = re.compile(r"(?i)\b(sig|upload_id)=[^&\s\"']+")

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(
                self._SECRET.sub(r"\1=REDACTED", arg) if isinstance(arg, str) else arg for arg in record.args
            )
        return True


_hidden = _Hidden()


def hide_secrets() -> None:
    """Keep what a URL may hold from the log."""
    logging.getLogger("urllib3.connectionpool").addFilter(_hidden)


class Parts(Generic[T]):
    """Cuts what is written into parts, and sends several at once.

    Args:
        send: Sends the part of that number, counted from 0.
        at_once: So many at a time.

    Attributes:
        sent: What `send` returned for each part, in their order.
        size: Bytes written.
    """

    def __init__(self, send: Callable[[int, bytes], Awaitable[T]], at_once: int = _PARTS) -> None:
        self._send, self._at_once = send, at_once
        self._data = bytearray()
        self.sent: list[T] = []
        self.size = 0

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Add bytes, and send the parts that are full."""
        self._data += data
        self.size += memoryview(data).nbytes
        # Some services want all parts of one size, none takes more than ten thousand: those beyond 60 GiB are larger.
        part = _PART << max(0, len(self.sent) - 7_500) // 500
        if len(self._data) >= part:
            await self._cut(part, len(self._data) // part)

    async def flush(self) -> None:
        """Send what is left as the last part."""
        await self._cut(len(self._data), 1)

    def rest(self) -> bytes:
        """What was not sent yet."""
        return bytes(self._data)

    async def _cut(self, part: int, count: int) -> None:
        bodies = [bytes(self._data[at * part : (at + 1) * part]) for at in range(count)]
        del self._data[: count * part]
        first = len(self.sent)
        self.sent += await at_once(
            list(enumerate(bodies, first)), lambda numbered: self._send(*numbered), self._at_once
        )


async def at_once(items: Sequence[S], work: Callable[[S], Awaitable[T]], tasks: int) -> list[T]:
    """Work on all items, so many at a time; the results in their order. The first error ends it, and is raised as itself."""
    results: dict[int, T] = {}
    waiting = iter(enumerate(items))

    async def run() -> None:
        for number, item in waiting:
            results[number] = await work(item)

    try:
        async with anyio.create_task_group() as group:
            for _ in range(min(tasks, len(items))):
                group.start_soon(run)
    except ExceptionGroup as several:
        raise several.exceptions[0] from None
    return [results[number] for number in range(len(items))]


async def unless_missing(request: Awaitable[T]) -> T | None:
    """The answer, or None where there is no such thing."""
    try:
        return await request
    except Refused as error:
        if error.status != 404:
            raise
        return None
