"""Leases: their states, and what may be done to a leased file or directory by whom."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .errors import Refused

State = Literal["available", "leased", "breaking", "broken", "expired"]
FOREVER = math.inf


@dataclass(slots=True)
class Lease:
    """A lease as it was last acquired, changed, renewed or broken; what became of it since, its state says."""

    id: str
    seconds: float
    until: float
    broken: float | None = None

    def state(self, now: float) -> State:
        if self.broken is not None:
            return "breaking" if now < self.broken else "broken"
        return "leased" if now < self.until else "expired"


def state_of(lease: Lease | None, now: float) -> State:
    return "available" if lease is None else lease.state(now)


def admit(lease: Lease | None, given: str | None, now: float, *, reading: bool = False) -> None:
    """Let a request with this lease id through.

    Raises:
        Refused: It has no id where one is needed, or the wrong one.
    """
    if state_of(lease, now) in ("leased", "breaking"):
        if given is None and not reading:
            raise Refused("LeaseIdMissing")  # never recorded for append and rename; recorded for delete
        if given is not None and lease is not None and given != lease.id:
            raise Refused("LeaseIdMismatch")
    elif given is not None:
        raise Refused("LeaseLost" if lease is not None and lease.id == given else "LeaseNotPresent")


def duration(text: str | None) -> float:
    """A lease's length from its header.

    Raises:
        Refused: It is out of range.
    """
    if text == "-1":
        return FOREVER
    if text is None or not text.isdigit() or not 15 <= int(text) <= 60:
        raise Refused("InvalidHeaderValue", header=("x-ms-lease-duration", text or ""))
    return float(text)


def acquire(lease: Lease | None, proposed: str, seconds: float, now: float) -> Lease:
    # never recorded: a second acquire; the specification's table of lease actions by state
    state = state_of(lease, now)
    if lease is not None and state == "breaking":
        raise Refused("LeaseIsBreakingAndCannotBeAcquired" if lease.id == proposed else "LeaseAlreadyPresent")
    if lease is not None and state == "leased" and lease.id != proposed:
        raise Refused("LeaseAlreadyPresent")
    return Lease(proposed, seconds, now + seconds)


def held(lease: Lease | None, given: str | None) -> Lease:
    # never recorded: renew, change or release with a wrong id, or without a lease
    if lease is None:
        raise Refused("LeaseNotPresentWithLeaseOperation")
    if given != lease.id:
        raise Refused("LeaseIdMismatchWithLeaseOperation")
    return lease


def renew(lease: Lease | None, given: str | None, now: float) -> Lease:
    lease = held(lease, given)
    if lease.broken is not None:
        raise Refused("LeaseIsBrokenAndCannotBeRenewed")
    return Lease(lease.id, lease.seconds, now + lease.seconds)


def change(lease: Lease | None, given: str | None, proposed: str, now: float) -> Lease:
    if lease is not None and lease.id == proposed:
        return lease
    lease = held(lease, given)
    if lease.state(now) == "breaking":
        raise Refused("LeaseIsBreakingAndCannotBeChanged")
    if lease.state(now) != "leased":
        raise Refused("LeaseNotPresentWithLeaseOperation")
    return Lease(proposed, lease.seconds, lease.until)


def broken(lease: Lease | None, period: int | None, now: float) -> tuple[Lease, int]:
    """The lease as it is once broken, and the seconds until then."""
    if lease is None:
        raise Refused("LeaseNotPresentWithLeaseOperation")
    end = lease.broken if lease.broken is not None else lease.until
    left = max(0.0, end - now)
    if period is not None:
        left = min(left, period)
    elif left == FOREVER:
        left = 0.0
    # never recorded: a finite lease without a period; the specification lets it run out
    return Lease(lease.id, lease.seconds, lease.until, now + left), math.ceil(left)
