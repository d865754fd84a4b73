"""What travels between the modules: frozen, slotted, and without behaviour beyond a sum or a lookup."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from staged.errors import InvalidInput

__all__ = [
    "Answer",
    "Arranged",
    "Capabilities",
    "Decided",
    "Entry",
    "Event",
    "Finished",
    "Guarantee",
    "Head",
    "HeadState",
    "Ledger",
    "LedgerEntry",
    "Listed",
    "Manifest",
    "Mode",
    "Outcome",
    "Plan",
    "PlanHeader",
    "PlanPart",
    "Prepared",
    "Published",
    "Receipt",
    "Recovered",
    "Ref",
    "Removed",
    "Resolve",
    "RowMarker",
    "Staged",
    "Status",
    "TransactionStatus",
    "Trees",
    "TxRecord",
    "TxState",
]

Guarantee = Literal["serialised", "fenced", "no_gap", "one_generation"]
"""What a store may promise for a mode.

- `serialised`: commits on one target come one after another, in one order.
- `fenced`: a writer that lost its turn cannot publish late.
- `no_gap`: whoever lists the target sees, at any moment, each old name or what replaces it.
- `one_generation`: one listing shows the old set or the new one, never a mixture.
"""

Resolve = Literal["keep", "replace"]
"""What `recover` does about a foreign thing in the way of a decided commit: leave it, or put ours in its place."""


RowMarker = Literal["insert", "update", "delete", "upsert"]
"""What Open Mirroring does with a row: add it unseen, or update, delete or update-or-add the one with its keys."""


class Mode(StrEnum):
    """What a commit does to the target."""

    APPEND = "append"
    ERROR = "error"
    IGNORE = "ignore"
    OVERWRITE_FILES = "overwrite_files"
    OVERWRITE_PARTITIONS = "overwrite_partitions"
    FULL_DROP = "full_drop"

    @classmethod
    def parse(cls, mode: str) -> Mode:
        """The mode of that name; `overwrite` is `full_drop`.

        Raises:
            InvalidInput: There is no such mode.
        """
        try:
            return cls.FULL_DROP if mode == "overwrite" else cls(mode)
        except ValueError:
            names = ", ".join(member.value for member in cls)
            raise InvalidInput(f"There is no mode {mode!r}; the modes are {names}.") from None


# ---------------------------------------------------------------------------------------------- the target and staging


@dataclass(frozen=True, slots=True)
class Entry:
    """One staged file.

    Attributes:
        path: Where it will be, relative to the target.
        size: Bytes.
        identity: What the driver recognises it by after it was published: never shared by two writes.
        handle: What the driver finds and discards it by before that.
        rows: Rows, where the writer knows them.
    """

    path: str
    size: int
    identity: str
    handle: str
    rows: int | None = None


@dataclass(frozen=True, slots=True)
class Listed:
    """One thing that a listing of the target found."""

    path: str
    size: int
    identity: str
    is_dir: bool = False


@dataclass(frozen=True, slots=True)
class Trees:
    """The two trees of a swap, by identity; `target` is None where there is none yet."""

    new: str
    target: str | None


class Answer(StrEnum):
    """What became of one entry that was published or removed.

    `DONE`: by this call. `ALREADY`: by an earlier one. `FOREIGN`: something that is not ours is there, and was left.
    `LOST`: our staged thing is gone and what is at its name is not ours. `PENDING`: begun, and to be asked for again.
    """

    DONE = "done"
    ALREADY = "already"
    FOREIGN = "foreign"
    LOST = "lost"
    PENDING = "pending"


@dataclass(frozen=True, slots=True)
class Arranged:
    """Staged files under the names that their store gives them, in the order in which they are published.

    Attributes:
        meta: What it remembers with the commit.
    """

    entries: tuple[Entry, ...]
    meta: dict[str, object]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What one store can do, as its driver found it.

    Attributes:
        fence: How a writer that lost its turn is kept from acting late: by an operating-system `lock` that its death
            drops, because every step has `consumed` its source, or by `time` alone.
        swaps_trees: The whole target can be replaced by its tree's identity.
        clears: Such a swap only puts the old tree aside: what is new is published by entries after it.
        adds_only: What was published is never changed: no modes that replace files or partitions, and no deletes.
        keys: The key columns of a store that takes rows marked as inserted, updated or deleted; None elsewhere.
        folds: Names that differ only in case or Unicode form are one name.
        nests: A file's name cannot be a directory's at the same time, as in a file system.
        strict_overlap: Every mode conflicts with what was committed since it began (S3, Azure Blob).
        keeps_staged: What is staged outlives what a stranger writes to its name; where it does not (Azure Blob), it is LOST.
        period: Seconds after which a holder whose head did not change is taken for dead, where `fence` is not `lock`.
        guarantees: What a mode promises to concurrent readers and writers.
    """

    fence: Literal["lock", "consumed", "time"]
    swaps_trees: bool
    clears: bool = False
    adds_only: bool = False
    keys: tuple[str, ...] | None = None
    folds: bool = False
    nests: bool = True
    strict_overlap: bool = False
    keeps_staged: bool = True
    period: float = 30.0
    guarantees: Mapping[Mode, frozenset[Guarantee]] = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------------ control records


@dataclass(frozen=True, slots=True)
class Ref:
    """A value written as one or more immutable segments: `<key>-0` to `<key>-<count-1>`, and a digest over them all."""

    key: str
    count: int
    digest: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a transaction staged, written down: where, and the sums for its receipt."""

    entries: Ref
    files: int
    rows: int | None
    bytes: int


class HeadState(StrEnum):
    """`FREE`: nobody commits. `HELD`: somebody plans to. `COMMITTED`: decided, to be completed by anybody."""

    FREE = "free"
    HELD = "held"
    COMMITTED = "committed"


@dataclass(frozen=True, slots=True)
class Head:
    """The one record per target whose compare-and-swap decides."""

    epoch: int = 0
    state: HeadState = HeadState.FREE
    transaction: str | None = None
    owner: str | None = None
    plan: Ref | None = None
    ledger: Ref | None = None
    nonce: str = ""


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One commit: the epoch at which it was decided, its transaction, the attempt that names its plan, and its key."""

    epoch: int
    transaction: str
    attempt: str
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Ledger:
    """The last commits, oldest first, and the merged meta; `floor` is the epoch of the newest commit it forgot."""

    commits: tuple[LedgerEntry, ...] = ()
    meta: dict[str, object] = field(default_factory=dict)
    floor: int = 0


class TxState(StrEnum):
    """The durable state of a transaction that has not ended."""

    OPEN = "open"
    PREPARED = "prepared"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True)
class TxRecord:
    """What a transaction leaves for others to find, from begin until it ended.

    Attributes:
        block: A lexical block owns it: nobody will resume it once its process is dead.
        base: The epoch of the last finished commit when it began.
        stamp: The epoch of its owner's last acquisition; makes a late ABORTED fail.
    """

    id: str
    owner: str
    mode: Mode
    state: TxState
    block: bool
    base: int
    stamp: int = 0
    key: str | None = None
    meta: dict[str, object] = field(default_factory=dict)
    partitions: tuple[str, ...] | None = None
    allow_empty: bool = False
    keep_old: int = 1
    deletes: tuple[str, ...] = ()
    manifest: Manifest | None = None
    nonce: str = ""


@dataclass(frozen=True, slots=True)
class PlanHeader:
    """The constant part of a decided plan; the manifest it names holds what is published."""

    transaction: str
    mode: Mode
    epoch: int
    key: str | None
    previous: str | None
    manifest: Manifest
    keep_old: int
    trees: Trees | None
    parts: int = 1


@dataclass(frozen=True, slots=True)
class PlanPart:
    """One segment of a plan: namesakes to replace, by identity, and what to remove. The first carries the header."""

    header: PlanHeader | None = None
    replaces: dict[str, str] = field(default_factory=dict)
    remove: tuple[Listed, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What a commit does: publish all that is staged, over the namesakes it expects, then remove exactly these.

    Attributes:
        trees: The two trees to swap; then `replaces` and `remove` are empty.
        skipped: Nothing happens: the mode is `ignore` and the target holds something.
    """

    publish: tuple[Entry, ...] = ()
    replaces: Mapping[str, str] = field(default_factory=dict)
    remove: tuple[Listed, ...] = ()
    trees: Trees | None = None
    skipped: bool = False


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a finished transaction hands back.

    Attributes:
        id: The transaction.
        mode: Its mode.
        phase: "committed"; "rolled_back"; "done" (its key was committed before: nothing was published); "skipped"
            (mode `ignore`, the target holds something); or "committing" (decided, and left for the next to complete).
        files: Files published.
        rows: Their rows, None where a writer did not say.
        bytes: Their bytes.
        removed: Files removed or replaced, None where a whole tree was swapped out.
        key: Its key.
        left: Entries neither published nor removed because something foreign stood in their place.
        staging_seconds: From begin to the end of the block, None where this process does not know.
        commit_seconds: From there, or from its resumption, until the commit was visible, None where this process does
            not know.
    """

    id: str
    mode: Mode
    phase: Literal["committed", "rolled_back", "done", "skipped", "committing"]
    files: int = 0
    rows: int | None = 0
    bytes: int = 0
    removed: int | None = 0
    key: str | None = None
    left: int = 0
    staging_seconds: float | None = None
    commit_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a transaction ended, as durable fact: the content of `outcome/<id>`, or what `store.outcome` found.

    Attributes:
        state: "committed"; "rolled_back"; "committing" (decided, not completed); "open" or "prepared" (not ended, not
            decided); "unknown" (no trace: never begun here, or collected by `gc`).
        previous: The transaction committed before it.
        epoch: The epoch of its decision.
    """

    id: str
    state: Literal["committed", "rolled_back", "committing", "open", "prepared", "unknown"]
    receipt: Receipt | None = None
    previous: str | None = None
    epoch: int | None = None


# --------------------------------------------------------------------------------------------------- what callers ask for


@dataclass(frozen=True, slots=True)
class TransactionStatus:
    """One transaction that has not ended; `alive` is None where a store cannot tell, `age` in seconds since its last step."""

    id: str
    state: TxState
    mode: Mode
    owner: str
    block: bool
    alive: bool | None
    age: float | None
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Status:
    """The state of a target, read without changing it."""

    head: HeadState
    epoch: int
    committing: str | None
    commits: int
    last: LedgerEntry | None
    transactions: tuple[TransactionStatus, ...] = ()
    damaged: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Recovered:
    """What `recover` or `gc` did: ids of transactions, and of those that it left alone.

    Attributes:
        damaged: Transactions whose record cannot be read; nothing was done with them.
        collected: How many control records and old trees were deleted.
    """

    finished: tuple[str, ...] = ()
    rolled_back: tuple[str, ...] = ()
    prepared: tuple[str, ...] = ()
    alive: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()
    collected: int = 0


# --------------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Staged:
    """One entry was staged."""

    transaction: str
    entry: Entry


@dataclass(frozen=True, slots=True)
class Prepared:
    """Everything is staged and sealed; the commit begins."""

    transaction: str
    files: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Decided:
    """The decision is durable: from here on only completion is possible."""

    transaction: str
    epoch: int
    publish: int
    remove: int


@dataclass(frozen=True, slots=True)
class Published:
    """So many entries became visible in this step."""

    transaction: str
    entries: int


@dataclass(frozen=True, slots=True)
class Removed:
    """So many old entries were removed in this step."""

    transaction: str
    entries: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The transaction ended."""

    transaction: str
    receipt: Receipt


Event = Staged | Prepared | Decided | Published | Removed | Finished
