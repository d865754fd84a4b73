"""The states, in theory and as tables; no I/O.

**The head** is one record per target. All its changes are compare-and-swaps, and each is one of these functions:

    FREE(e)          --hold-->      HELD(A, e+1)         A may plan
    HELD(A, e)       --hold-->      HELD(B, e+1)         A is dead: B takes over; A's next swap fails
    HELD(A, e)       --free-->      FREE(e)              A gives up, or nobody's behalf: see abandon
    HELD(A, e)       --abandon-->   FREE(e+1)            A is dead, and B only wants it out of the way
    HELD(A, e)       --decide-->    COMMITTED(A, e)      THE decision
    COMMITTED(A, e)  --adopt-->     COMMITTED(A, e+1)    A's process is dead: another owner completes A
    COMMITTED(A, e)  --free-->      FREE(e)              A is complete, its outcome durable
    any held         --renew-->     itself               a sign of life: only the nonce changes

Nothing leads from COMMITTED(A) to anything but A's completion, and nothing but `decide` leads into it. Every takeover
raises the epoch, so what a stalled owner still believes about the head is no longer its content.

**The transaction**, as its own process sees it, walks a line with one fork. Every call names the phases that it may be
made in; an illegal call raises and changes nothing.

    STAGING -> PREPARING -> PREPARED -> COMMITTING -> COMMITTED
       |           |            |            |\\-> IN_DOUBT     (not known whether decided)
       |           |            |            \\--> INCOMPLETE   (decided; the next one completes it)
       \\-----------+------------+-> ROLLING_BACK -> ROLLED_BACK
                                \\-> RELEASED                   (prepared, left for others to resume)
"""

from __future__ import annotations

import secrets
from dataclasses import replace
from enum import Enum

from staged.errors import WrongState
from staged.model import Head, HeadState, Ref

__all__ = ["ENDED", "Phase", "abandon", "adopt", "advance", "decide", "free", "hold", "new_id", "renew"]


def new_id() -> str:
    """96 random bits, in 24 hexadecimal digits: the id of a transaction, an owner or a nonce."""
    return secrets.token_hex(12)


def hold(head: Head, transaction: str | None, owner: str) -> Head:
    """Take a head that is free, or whose holder is dead, before its decision."""
    _require(head, HeadState.FREE, HeadState.HELD)
    return replace(
        head,
        epoch=head.epoch + 1,
        state=HeadState.HELD,
        transaction=transaction,
        owner=owner,
        plan=None,
        nonce=new_id(),
    )


def decide(head: Head, plan: Ref, ledger: Ref) -> Head:
    """The decision: from here on only completion is possible."""
    _require(head, HeadState.HELD)
    return replace(head, state=HeadState.COMMITTED, plan=plan, ledger=ledger, nonce=new_id())


def adopt(head: Head, owner: str) -> Head:
    """Take over the completion of a decided commit whose owner is dead."""
    _require(head, HeadState.COMMITTED)
    return replace(head, epoch=head.epoch + 1, owner=owner, nonce=new_id())


def abandon(head: Head) -> Head:
    """Put an undecided head whose holder is dead back to FREE, on nobody's behalf."""
    _require(head, HeadState.HELD)
    return replace(free(head), epoch=head.epoch + 1)


def free(head: Head) -> Head:
    """Give the head back: undecided by its own holder, or complete."""
    _require(head, HeadState.HELD, HeadState.COMMITTED)
    return replace(head, state=HeadState.FREE, transaction=None, owner=None, plan=None, nonce=new_id())


def renew(head: Head) -> Head:
    """The same head under a fresh nonce: a sign of life."""
    _require(head, HeadState.HELD, HeadState.COMMITTED)
    return replace(head, nonce=new_id())


def _require(head: Head, *states: HeadState) -> None:
    if head.state not in states:
        raise WrongState(f"A head that is {head.state.value} cannot make this step.")


class Phase(Enum):
    """Where a transaction stands, as its own process sees it."""

    STAGING = "staging"
    PREPARING = "preparing"
    PREPARED = "prepared"
    COMMITTING = "committing"
    COMMITTED = "committed"
    INCOMPLETE = "incomplete"
    IN_DOUBT = "in doubt"
    ROLLING_BACK = "rolling back"
    ROLLED_BACK = "rolled back"
    RELEASED = "released"


_NEXT: dict[Phase, frozenset[Phase]] = {
    Phase.STAGING: frozenset({Phase.PREPARING, Phase.ROLLING_BACK}),
    Phase.PREPARING: frozenset({Phase.PREPARED, Phase.ROLLING_BACK, Phase.IN_DOUBT}),
    Phase.PREPARED: frozenset({Phase.COMMITTING, Phase.ROLLING_BACK, Phase.RELEASED}),
    Phase.COMMITTING: frozenset(
        {Phase.COMMITTED, Phase.INCOMPLETE, Phase.IN_DOUBT, Phase.ROLLING_BACK, Phase.PREPARED}
    ),
    Phase.ROLLING_BACK: frozenset({Phase.ROLLED_BACK, Phase.IN_DOUBT}),
    # What is known only grows: a commit in doubt, or incomplete, may be found to have ended.
    Phase.IN_DOUBT: frozenset({Phase.COMMITTED, Phase.ROLLED_BACK}),
    Phase.INCOMPLETE: frozenset({Phase.COMMITTED}),
    Phase.COMMITTED: frozenset(),
    Phase.ROLLED_BACK: frozenset(),
    Phase.RELEASED: frozenset(),
}

ENDED = frozenset({Phase.COMMITTED, Phase.ROLLED_BACK, Phase.RELEASED, Phase.IN_DOUBT, Phase.INCOMPLETE})
"""Phases in which a transaction takes no more work."""


def advance(now: Phase, then: Phase) -> Phase:
    """The phase after a step.

    Raises:
        WrongState: The table has no such step.
    """
    if then not in _NEXT[now]:
        raise WrongState(f"A transaction that is {now.value} cannot become {then.value}.")
    return then
