"""Faults between a client of S3 and the server, by plan.

A plan is one line, such as `"lost@PutObject:0 slow_down@UploadPart:2+1"`: the answer of the first PutObject is lost, and
the third UploadPart is told to come again in a second. `str(plan)` is the line that plays it again.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args
from urllib.parse import quote, unquote

Kind = Literal[
    "lost",
    "cut",
    "late",
    "later",
    "slow_down",
    "internal",
    "internal_applied",
    "error_in_200",
    "error_in_200_applied",
    "conflict_409",
    "no_such_upload",
    "vanishes",
    "doubled",
    "denied",
]
"""What befalls a request.

- `lost`: it is applied, and the connection is cut.
- `cut`: it is not applied, and the connection is cut.
- `late`: the connection is cut, and it is applied before the request that comes so many later, or by `S3Proxy.replay`;
  only so if the amount is 0.
- `later`: the connection is cut, and it is applied after so many milliseconds, or by `S3Proxy.replay`.
- `slow_down`: it is not applied; 503 SlowDown, and Retry-After so many seconds unless the amount is 0.
- `internal`, `internal_applied`: 500 InternalError; it is not applied, or it is.
- `error_in_200`, `error_in_200_applied`: 200, and the body is an InternalError; it is not applied, or it is.
- `conflict_409`: it is not applied; 409 ConditionalRequestConflict.
- `no_such_upload`: it is applied, and answered with 404 NoSuchUpload.
- `vanishes`: an upload that is completed is aborted instead, and the answer says that all went well.
- `doubled`: it is applied twice, and the second answer is the one that is heard.
- `denied`: the keys of a DeleteObjects that match are not deleted; AccessDenied for each of them in the answer.
"""

FAULTS: tuple[Kind, ...] = get_args(Kind)
ANYWHERE: tuple[Kind, ...] = ("lost", "cut", "late", "slow_down", "internal", "internal_applied", "doubled")
"""What can befall any request."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What befalls the request of that number, from 0, among those of an operation and of keys like the pattern."""

    kind: Kind
    number: int
    amount: int = 0
    operation: str = ""
    key: str = ""

    def __str__(self) -> str:
        where = self.operation + (f"/{quote(self.key, safe='/*?[]!')}" if self.key else "")
        where = f"{where}:{self.number}" if where else str(self.number)
        return f"{self.kind}@{where}" + (f"+{self.amount}" if self.amount else "")

    @classmethod
    def parse(cls, text: str) -> Fault:
        """A fault from its text."""
        name, _, rest = text.partition("@")
        where, _, numbers = rest.rpartition(":")
        number, _, amount = numbers.partition("+")
        operation, _, key = where.partition("/")
        kind: Kind | None = next((kind for kind in FAULTS if kind == name), None)
        if kind is None or not number.isdigit() or not (amount or "0").isdigit():
            raise ValueError(f"{text!r} is no fault; one is such as 'lost@7' or 'denied@DeleteObjects/*/f1:0'.")
        return cls(kind, int(number), int(amount or 0), operation, unquote(key))

    def concerns(self, key: str) -> bool:
        """Whether it is meant for this key."""
        return not self.key or fnmatchcase(key, self.key)

    def matches(self, operation: str, keys: Collection[str]) -> bool:
        """Whether a request is one of those that are counted for it."""
        return self.operation in ("", operation) and (not self.key or any(map(self.concerns, keys)))


class Plan:
    """Faults by the request that they befall, counted from when the plan is made; `str` gives the text of it."""

    def __init__(self, text: str = "") -> None:
        self.faults = [Fault.parse(word) for word in text.split()]
        self._seen: Counter[Fault] = Counter()

    @classmethod
    def seeded(cls, seed: int, *, requests: int, rate: float, kinds: Sequence[Kind] = ANYWHERE) -> Plan:
        """A plan over the first so many requests, each befallen by something with a probability of `rate`."""
        chance = random.Random(seed)
        plan = cls()
        for number in range(requests):
            if chance.random() < rate:
                kind = chance.choice(kinds)
                plan.faults.append(Fault(kind, number, chance.randrange(1, 30) if kind == "late" else 0))
        return plan

    def __str__(self) -> str:
        return " ".join(map(str, self.faults))

    def next(self, operation: str, keys: Collection[str]) -> Fault | None:
        """What befalls the request that came now: the first of the plan's faults whose turn it is."""
        due = None
        for fault in self.faults:
            if fault.matches(operation, keys):
                if self._seen[fault] == fault.number and due is None:
                    due = fault
                self._seen[fault] += 1
        return due
