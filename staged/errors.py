"""Every error of `staged`, grouped by what a handler would do.

    StagedError
    ├── InvalidInput           fix the call: nothing was written by it
    │   └── InvalidPath        the path is not one that every store takes
    ├── WrongState             the transaction or the store is past that point
    ├── Unsupported            this store cannot do or promise it
    ├── StorageError           the store itself failed; raised by drivers
    ├── StagingError           the target is untouched: fix, or run again
    │   ├── ValidationFailed   a check of `validate=` refused the staged files
    │   └── Conflict           another commit came between: run again
    │       └── Exists         a name is taken, or the target is not empty
    ├── Busy                   another process holds it: wait, or ask `outcome(id)`
    ├── Fenced                 another process took over: ask `outcome(id)`
    ├── CommitInDoubt          unknown whether decided: `outcome(id)`, or `recover()`
    ├── CommitIncomplete       decided, not all published: `recover()`
    │   └── CommitBlocked      a foreign thing is in the way: `recover(resolve=…)`
    └── DamagedRecord          a control record cannot be trusted: nothing was done with it

`outcome` says what is known of the target: "untouched" (this call changed nothing in it), "committed" (the decision is
durable) or "unknown". `retryable` says whether the same work may succeed when it is simply run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

__all__ = [
    "Busy",
    "CommitBlocked",
    "CommitInDoubt",
    "CommitIncomplete",
    "Conflict",
    "DamagedRecord",
    "Exists",
    "Fate",
    "Fenced",
    "InvalidInput",
    "InvalidPath",
    "StagedError",
    "StagingError",
    "StorageError",
    "Unsupported",
    "ValidationFailed",
    "WrongState",
]

Fate = Literal["untouched", "committed", "unknown"]


class StagedError(Exception):
    """The root of the tree.

    Attributes:
        outcome: What is known of the target.
        retryable: Whether running the same work again may succeed.
        transaction: The id of the transaction concerned, or None.
    """

    outcome: Fate = "untouched"
    retryable: bool = False

    def __init__(self, message: str = "", *, transaction: str | None = None, retryable: bool | None = None) -> None:
        super().__init__(message)
        self.transaction = transaction
        if retryable is not None:
            self.retryable = retryable


class InvalidInput(StagedError, ValueError):
    """An argument is wrong; nothing was written by the call."""


class InvalidPath(InvalidInput):
    """A relative path is not one that every common file system takes."""


class WrongState(StagedError):
    """The transaction or the store is past the point where this call makes sense."""


class Unsupported(StagedError):
    """This store, or this platform, cannot do or promise what was asked."""


class StorageError(StagedError):
    """The store failed or refused; whether the request was applied is not known.

    Drivers raise it for their SDK's errors, mapped once. `retryable` tells a passing fault from a lasting one.
    """

    outcome: Fate = "unknown"


class StagingError(StagedError):
    """The transaction ended before its decision; the target is untouched."""


class ValidationFailed(StagingError):
    """A check of `validate=` refused the staged files."""


class Conflict(StagingError):
    """Another commit came between, or the target does not fit the mode; run the block again."""

    retryable = True

    @classmethod
    def covering(cls, path: str) -> Conflict:
        """The commit would carry away the control area of another target, found at this path."""
        return cls(
            f"The target holds {path!r}, the control area of another target, which this commit would carry away. Write that "
            "target through its own store, such as store.child(…), or remove its control area if it is no longer used.",
            retryable=False,
        )


class Exists(Conflict):
    """A name to be added is taken, or a target that must be empty is not."""

    retryable = False


class Busy(StagedError):
    """Another live process holds the target or the transaction."""

    retryable = True


class Fenced(StagedError):
    """Another process took over; it finishes the work. Ask `store.outcome(id)`."""

    outcome: Fate = "unknown"


class CommitInDoubt(StagedError):
    """It is not known whether the decision was made, and nothing was cleaned up.

    Ask `store.outcome(id)`, or let `store.recover()` settle it.
    """

    outcome: Fate = "unknown"


class CommitIncomplete(StagedError):
    """The decision is durable, but not all is published yet; `store.recover()`, or the next writer, completes it."""

    outcome: Fate = "committed"
    retryable = False


class CommitBlocked(CommitIncomplete):
    """Decided, but something that is not ours is in the way; `store.recover(resolve="keep")` or `"replace"`.

    Attributes:
        paths: What is blocked, relative to the target.
    """

    def __init__(self, message: str = "", *, paths: Sequence[str] = (), transaction: str | None = None) -> None:
        super().__init__(message, transaction=transaction)
        self.paths = tuple(paths)


class DamagedRecord(StagedError):
    """A control record is damaged, foreign or from a newer version; it was not acted upon."""

    outcome: Fate = "unknown"
