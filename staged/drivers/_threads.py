"""Requests through a synchronous SDK: in worker threads, each under the limit, and retried."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import anyio
from anyio import to_thread

from staged.drivers._cloud import Limit
from staged.errors import StorageError

__all__ = ["TIMEOUT", "Client", "Threads"]

T = TypeVar("T")

TIMEOUT = 8
"""Seconds without an answer after which a request counts as lost: it is sent again within the time that the core allows."""


class Client(Protocol):
    """A client of an SDK, safe for many threads."""

    def close(self) -> None: ...


C = TypeVar("C", bound=Client)


class Threads(Generic[C]):
    """Sends the requests of one client, on either event loop.

    Args:
        limit: How many run at once.
        make: Makes the client, in a thread, when it is first needed.
        once: Calls what sends a request; whatever the SDK raises is `Refused`.
        given: The caller's client, in place of one that is made; it stays open.
    """

    def __init__(
        self,
        limit: Limit,
        make: Callable[[], C],
        once: Callable[[str, Callable[[], object]], object],
        given: C | None = None,
    ) -> None:
        self._limit, self._make, self._once, self._given = limit, make, once, given
        self._opening = anyio.Lock()
        self._closed = False
        self.client: C | None = given
        # What runs at once is the limit's business; a request that must not wait finds a thread as well.
        self._threads: anyio.CapacityLimiter | None = None

    async def send(self, what: str, request: Callable[[C], T], *, urgent: bool = False) -> T:
        """Send a request, and send it again where its failure may pass.

        Raises:
            Refused: It lasts.
        """
        if self._closed:
            raise StorageError(f"{what}: the store is closed.")
        async with self._opening:
            client = self.client if self.client is not None else await self._in_thread(what, self._make)
            self.client = client
        return await self._limit.send(lambda: self._in_thread(what, lambda: request(client)), urgent=urgent)

    async def _in_thread(self, what: str, work: Callable[[], T]) -> T:
        def once() -> T:
            answers: list[T] = []
            self._once(what, lambda: answers.append(work()))
            return answers[0]

        if self._threads is None:
            self._threads = anyio.CapacityLimiter(math.inf)
        # Whoever is cancelled leaves a request to its thread: it is then one whose answer was lost.
        return await to_thread.run_sync(once, abandon_on_cancel=True, limiter=self._threads)

    def close(self) -> None:
        """Send nothing more, and close the client that was made here."""
        self._closed = True
        client, self.client = self.client, None
        if client is not None and client is not self._given:
            client.close()
