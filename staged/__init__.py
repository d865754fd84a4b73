"""Sets of files, written to storage all at once or not at all.

    from staged import open_store

    async with open_store("/lake/flights") as store:
        async with store.staged_write(mode="full_drop") as tx:
            await tx.write_table(table)
        print(tx.receipt)

A clean exit commits; an exception, a cancellation or a crash leaves the target as it was.
"""

from staged.errors import (
    Busy,
    CommitBlocked,
    CommitIncomplete,
    CommitInDoubt,
    Conflict,
    DamagedRecord,
    Exists,
    Fenced,
    InvalidInput,
    InvalidPath,
    StagedError,
    StagingError,
    StorageError,
    Unsupported,
    ValidationFailed,
    WrongState,
)
from staged.lifecycle import Transaction
from staged.mirroring import open_mirror
from staged.model import Entry, Mode, Outcome, Plan, Receipt, Recovered, Status
from staged.pinning import pinned
from staged.store import Store, open_store

__all__ = [
    "Busy",
    "CommitBlocked",
    "CommitInDoubt",
    "CommitIncomplete",
    "Conflict",
    "DamagedRecord",
    "Entry",
    "Exists",
    "Fenced",
    "InvalidInput",
    "InvalidPath",
    "Mode",
    "Outcome",
    "Plan",
    "Receipt",
    "Recovered",
    "StagedError",
    "StagingError",
    "Status",
    "StorageError",
    "Store",
    "Transaction",
    "Unsupported",
    "ValidationFailed",
    "WrongState",
    "open_mirror",
    "open_store",
    "pinned",
]
