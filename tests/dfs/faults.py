"""Faults at the wire, by plan or by seed: an answer lost, a connection cut, an error, a delay, a request that comes again.

A plan is one line, such as `"loses@7 replays@rename:0+3"`: the answer of the eighth request is lost, and the first rename
is applied once more three requests later. `str(plan)` is the line that plays it again.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal[
    "fails", "errs", "cuts", "loses", "throttles", "overloads", "delays", "lags", "repeats", "replays", "lates"
]
"""What befalls a request.

- `fails`: 500, and nothing was done.
- `errs`: it is done, and the answer is 500.
- `cuts`: nothing is done, and the connection is cut.
- `loses`: it is done, and the connection is cut.
- `throttles`, `overloads`: nothing is done; 429, or 503, and Retry-After so many seconds.
- `delays`: it is done only after so many milliseconds.
- `lags`: it is done at once, and answered after so many milliseconds.
- `repeats`: it arrives twice, and the second answer is the one that is heard.
- `replays`: it is done and answered, and arrives once more so many requests later.
- `lates`: the connection is cut, and it arrives so many requests later.
"""

FAULTS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: what befalls the request of that number, from 0, among all or among those of one verb."""

    kind: Kind
    number: int
    amount: int = 0
    verb: str = ""

    def __str__(self) -> str:
        where = f"{self.verb}:{self.number}" if self.verb else str(self.number)
        return f"{self.kind}@{where}" + (f"+{self.amount}" if self.amount else "")

    @classmethod
    def parse(cls, text: str) -> Fault:
        """A fault from its text."""
        name, _, rest = text.partition("@")
        where, _, amount = rest.partition("+")
        verb, _, number = where.rpartition(":")
        kind: Kind | None = next((kind for kind in FAULTS if kind == name), None)
        if kind is None or not number.isdigit() or not (amount or "0").isdigit():
            raise ValueError(f"{text!r} is no fault; one is such as 'loses@7' or 'replays@rename:0+3'.")
        return cls(kind, int(number), int(amount or 0), verb)


class Plan:
    """Faults by the request that they befall; `str` gives the text that makes it again."""

    def __init__(self, text: str = "") -> None:
        faults = [Fault.parse(word) for word in text.split()]
        self._faults = {(fault.verb, fault.number): fault for fault in faults}

    @classmethod
    def seeded(cls, seed: int, *, requests: int, rate: float, kinds: Sequence[Kind] = FAULTS) -> Plan:
        """A plan over the first so many requests, each befallen by something with a probability of `rate`."""
        chance = random.Random(seed)
        plan = cls()
        for number in range(requests):
            if chance.random() < rate:
                kind = chance.choice(kinds)
                late = chance.randrange(1, 30)
                amount = {"delays": 50, "lags": 50, "replays": late, "lates": late}.get(kind, 0)
                plan._faults["", number] = Fault(kind, number, amount)
        return plan

    def __str__(self) -> str:
        return " ".join(map(str, self._faults.values()))

    def at(self, number: int, verb: str, of_verb: int) -> Fault | None:
        """What befalls a request, by its number among all, and among those of its verb."""
        return self._faults.get((verb, of_verb)) or self._faults.get(("", number))
