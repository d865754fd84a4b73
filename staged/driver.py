"""The interface that a backend implements. Users never call it.

A driver serves one target. It knows nothing of modes, states, heads or plans: it moves bytes and small records, and it
answers truthfully. What every backend must do about lost answers, retries, takeovers and order stands once, above it.

Two places: the **target**, where readers look, and the **control area**, which they ignore. The control area holds
records and segments under keys such as `head` or `tx/<id>/record`, and each transaction's staging.

Contracts of every method:

- It may be called by many tasks at once, and does not block the event loop.
- It raises `StorageError`, with the SDK's error as its cause, and never a bare one. Then the request may have been
  applied or not: the caller finds out by reading.
- A repeat does no harm. SDKs and HTTP libraries replay requests underneath us.
- It never logs, stores or shows a credential; no error that it raises holds one, in its text or in that of a cause.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

from staged.model import Answer, Arranged, Capabilities, Entry, Listed, Trees

__all__ = ["Alive", "Driver", "Lock", "LogHandle", "Record", "Writer", "idle"]


@dataclass(frozen=True, slots=True)
class Record:
    """A small record as read: its body, and the token that a swap must name."""

    body: bytes
    token: str


LogHandle = Callable[[str], Awaitable[None]]
"""Makes a handle durable. Awaited before the first byte that could be orphaned under it."""


Alive = Callable[[], Awaitable[None]]
"""Awaited by a driver between two requests of a step that may take many, so that its caller can show signs of life."""


async def idle() -> None:
    """Nobody waits for a sign of life."""


class Lock(Protocol):
    """A lock that the death of its process drops at once."""

    def release(self) -> None:
        """Give it up. Work that still runs under it in a thread keeps it until it ends; no further work starts."""


class Writer(Protocol):
    """Writes one staged entry; nobody sees it before it is published."""

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Add bytes."""

    async def close(self) -> Entry:
        """End the entry, and return it."""
        ...

    async def abort(self) -> None:
        """Leave nothing of it; what the same path staged before stays."""


class Driver(ABC):
    """One target on one backend."""

    url: str
    """The target for messages, without any secret."""

    def __reduce__(self) -> NoReturn:
        """A driver is neither pickled nor copied: it may hold a credential, and holds what only this process has."""
        raise TypeError(f"A {type(self).__name__} cannot be pickled; open the store anew.")

    # -------------------------------------------------------------------------------------------------- what it can do

    @abstractmethod
    async def probe(self) -> Capabilities:
        """What this store can do. Called on the first transaction; opening a store probes and writes nothing.

        Raises:
            Unsupported: The target cannot be served at all, such as a file where a directory must be.
        """

    @abstractmethod
    def child(self, path: str) -> Driver:
        """Another target below this one, sharing its client, credential and limit. `path` is parsed already."""

    async def aclose(self) -> None:
        """Close what the driver itself opened; a caller's own client stays open."""

    # ------------------------------------------------------------------------------------------------ the control area

    @abstractmethod
    async def read(self, key: str) -> Record | None:
        """A record or segment whole, as one write left it; None where there is none."""

    @abstractmethod
    async def cas(self, key: str, body: bytes, token: str | None, *, durable: bool) -> str | None:
        """Put a record in place of the one that has this token (None: of none), in one atomic step.

        Every body carries a fresh nonce, so that no two are equal.

        Args:
            durable: On return this, and every segment put before, survives a loss of power. Without it the record in
                place after a loss of power may be the earlier one, but never a damaged one.

        Returns:
            The new token, or None where the record in place is not the one named. A None may come from a replay of a
            request that was applied: the caller reads back.
        """

    @abstractmethod
    async def put_segment(self, key: str, body: bytes) -> bool:
        """Put an immutable segment, durable with the next durable `cas`; False where there is one already, which stays."""

    @abstractmethod
    async def list_control(self, prefix: str) -> Sequence[str]:
        """The keys of all records and segments that start with a prefix, which ends in `/` or within a name."""

    @abstractmethod
    async def delete_control(self, keys: Sequence[str]) -> None:
        """Delete records and segments; one that is gone is fine."""

    @abstractmethod
    async def age(self, key: str) -> float | None:
        """Seconds since a record was last written, by the store's own clock; None where there is none."""

    async def lock(self, key: str) -> Lock | None:
        """Try to take a lock; None where a live holder has it. Only asked where `fence` is `lock`."""
        raise NotImplementedError

    # ----------------------------------------------------------------------------------------------------------- staging

    @abstractmethod
    async def stage(self, tx: str, path: str, log: LogHandle) -> Writer:
        """Open a writer for one entry of a transaction. `path` is parsed, and no other writer has it open."""

    @abstractmethod
    async def seal(self, tx: str, entries: Collection[Entry]) -> None:
        """Check that a transaction's staging holds exactly these entries as recorded, and make them durable.

        It comes before the first `trees` or `publish`, and may come again; nothing is staged after it.

        Raises:
            StagingError: One is missing or changed, or the staging holds what was not recorded.
        """

    @abstractmethod
    async def discard(self, tx: str, handles: Collection[str], *, whole: bool) -> None:
        """Discard these staged things; with `whole` all else of the transaction's staging too. What is gone is fine."""

    async def arrange(
        self, tx: str, entries: Sequence[Entry], meta: Mapping[str, object], alive: Alive = idle, *, afresh: bool
    ) -> Arranged | None:
        """Name and order what is to be published, where that is the store's own business; None where it is the caller's.

        Called under the head, before the plan is made, and again where that attempt failed.

        Args:
            entries: What was staged, in the order in which it was.
            meta: What earlier commits remember.
            alive: To be awaited often where it takes long, so that nobody takes its process for dead.
            afresh: Nothing of what is in the target now will stay.

        Raises:
            StagingError, Conflict: The store would not take it.
        """
        return None

    async def scratch(self, tx: str) -> str | None:
        """A fresh real directory from which `adopt` moves files into staging without copying; None where there is none."""
        return None

    async def adopt(self, tx: str, root: str, paths: Sequence[str]) -> Sequence[Entry]:
        """Move the files `root/<path>` of a `scratch` directory into staging, each over what was staged there before."""
        raise NotImplementedError

    # -------------------------------------------------------------------------------------------------------- the target

    @abstractmethod
    def list(self, prefix: str = "", names: Collection[str] | None = None) -> AsyncGenerator[Sequence[Listed], None]:
        """What is below a directory of the target, in pages, without any control area of this target.

        Args:
            prefix: A directory, or the empty string for the whole target.
            names: Only what has one of these names (as the store folds them), be it file or directory. The driver may
                look each up or list, whichever is cheaper.
        """

    @abstractmethod
    async def publish(self, tx: str, entries: Sequence[Entry], replaces: Mapping[str, str]) -> Sequence[Answer]:
        """Make staged entries visible under their final names, durable when it returns.

        Each consumes its source, so that a late repeat finds nothing to do. An entry whose path is in `replaces` takes
        the place of the file with that identity; any other takes only a free name.

        Returns:
            For each entry DONE, ALREADY (it is there, by identity), FOREIGN (another thing is at its name; ours is still
            staged) or LOST (ours is neither staged nor there).
        """

    @abstractmethod
    async def remove(self, entries: Sequence[Listed]) -> Sequence[Answer]:
        """Remove exactly these files, each only if it is still the one listed: DONE, ALREADY or FOREIGN."""

    async def trees(self, tx: str, alive: Alive = idle) -> Trees:
        """The identities of a transaction's staged tree and of the target's, for `swap`; only where trees are swapped.

        Raises:
            Conflict: The target holds another target's control area, which a swap would carry away.
        """
        raise NotImplementedError

    async def swap(self, tx: str, trees: Trees, old: str, alive: Alive = idle) -> Answer:
        """Put the staged tree in the target's place and the target's aside under the name `old`; durable on return.

        Decided by identity: the target is new: ALREADY, and the old one is put aside if that is still to do; the target is
        the old one and the new one is staged: it is done; else FOREIGN or LOST, and nothing is changed. What takes longer
        than a request answers PENDING after a while, and is called again.
        """
        raise NotImplementedError

    async def trim(self, keep: int, older_than: float) -> int:
        """Remove trees that `swap` put aside, but for the newest `keep` and those younger than `older_than` seconds.

        `old` names sort by age. A tree that a live reader has pinned stays. Returns how many were removed.
        """
        return 0
