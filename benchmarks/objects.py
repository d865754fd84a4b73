"""Object stores, near and behind 20 ms: ours beside what people do by hand and with libraries, over the servers of the tests.

Ours and each of the others is a program in `opponents`, so that none shares a process with the server's proxy; what needs
libraries of its own has an environment of its own below `.nox`, made on first use. `N x R / C` is what so many completions
take, so many at once, if nothing else took time; R is that of one after another by the SDK, its own work included.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cache
from typing import Protocol

from bench import Bench, Run
from opponents.job import Job

HERE = os.path.dirname(os.path.abspath(__file__))
PROJECT = os.path.dirname(HERE)
# The servers are those of the tests.
sys.path.append(os.path.join(PROJECT, "tests"))
ENVIRONMENTS = os.path.join(PROJECT, ".nox", "opponents")
ROUND_TRIP = 0.020
SMALL = 4 << 10


@dataclass(frozen=True, slots=True)
class Opponent:
    """A program in `opponents`.

    Attributes:
        needs: What to install in an environment of its own; with none it runs in this one.
        largest: Bytes of a file up to which it takes part.
    """

    program: str
    work: str = ""
    needs: tuple[str, ...] = ()
    largest: float = float("inf")


@cache
def python_of(opponent: Opponent) -> str | None:
    """The interpreter that has what it needs, or None where that cannot be installed."""
    if not opponent.needs:
        return sys.executable
    home = os.path.join(ENVIRONMENTS, opponent.program)
    python, mark = os.path.join(home, "bin", "python"), os.path.join(home, "installed")
    if not os.path.exists(mark):
        make = [sys.executable, "-m", "venv", "--clear", home]
        install = [python, "-m", "pip", "install", "--quiet", *opponent.needs]
        if any(subprocess.run(command, check=False).returncode for command in (make, install)):
            return None
        with open(mark, "w", encoding="utf-8"):
            pass
    return python


OURS = {mode: Opponent("with_staged", mode) for mode in ("append", "full_drop")}


class Store(Protocol):
    """A store's server behind a proxy that delays, refuses and counts.

    Attributes:
        kind: Its name.
        near: The server's URL.
        far: The proxy's URL.
        unit: The request that puts one staged file in place.
        by_hand: Those requests alone, by the SDK.
        writers: Others that write files, by what they do.
        base: The one of them that the others are divided by: it does no more than upload.
        overwriters: Others that overwrite what is there.
        environment: What the programs need in theirs.
        removes: How many files one request of ours removes.
    """

    kind: str
    near: str
    far: str
    unit: str
    by_hand: Opponent
    writers: Mapping[str, Opponent]
    base: str
    overwriters: Mapping[str, Opponent]
    environment: Mapping[str, str]
    removes: int

    def place(self) -> str:
        """A new bucket."""

    def drop(self, place: str) -> None:
        """Delete it with all that is in it."""

    def behave(self, delay: float, throttle: int) -> None:
        """Count from now on, delay each request by so many seconds, and refuse one in so many; 0 for none."""

    def requests(self) -> Counter[str]:
        """How many came, by operation."""

    def copies(self) -> int:
        """How many of them copied bytes."""

    def removals(self) -> int:
        """How many of them removed files of a target."""

    def sent(self) -> int:
        """Bytes that were sent to the server."""


def play(
    store: Store, opponent: Opponent, files: int, size: int, *, tasks: int = 16, delay: float = 0.0, throttle: int = 0
) -> Mapping[str, float]:
    """Let a program do its work in a fresh place; the seconds of the whole, and of its parts."""
    python = python_of(opponent)
    assert python is not None
    place = store.place()
    try:
        store.behave(delay, throttle)
        job = Job(store.kind, store.near, store.far, place, files, size, tasks, opponent.work)
        said = subprocess.run(
            [python, "-m", f"opponents.{opponent.program}", json.dumps(asdict(job))],
            cwd=HERE,
            env={**os.environ, **store.environment},
            stdout=subprocess.PIPE,
            check=True,
        )
    finally:
        store.drop(place)
    seconds: dict[str, float] = json.loads(said.stdout)
    return {f", {part}": took for part, took in seconds.items()}


def those(bench: Bench, opponents: Mapping[str, Opponent], size: int) -> dict[str, Opponent]:
    """The opponents that take part."""
    there = {}
    for name, opponent in opponents.items():
        if size > opponent.largest:
            continue
        if python_of(opponent) is not None:
            there[name] = opponent
        elif (missing := f"Missing, since it could not be installed: {', '.join(opponent.needs)}.") not in bench.notes:
            bench.note(missing)
    return there


def about(store: Store, delay: float) -> str:
    return f"{store.kind} behind {delay * 1000:g} ms" if delay else store.kind


def told(files: int, size: int) -> str:
    each = f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
    return f"{files:,} file{'s' if files > 1 else ''} of {each}"


def append(bench: Bench, store: Store, delay: float, files: int, size: int, rounds: int) -> None:
    """Files staged and committed, and the commit alone beside what it cannot do without."""

    def ours(tasks: int) -> Run:
        return lambda: play(store, OURS["append"], files, size, tasks=tasks, delay=delay)

    def theirs(opponent: Opponent) -> Run:
        return lambda: play(store, opponent, files, size, delay=delay)

    def one_by_one() -> Mapping[str, float]:
        some = min(files, 100)
        took = play(store, store.by_hand, some, size, tasks=1, delay=delay)[", whole"] / some
        return {"": took, ", N x R / 16": files * took / 16, ", N x R / 4": files * took / 4}

    contenders: dict[str, Run] = {f"staged append, {tasks} at once": ours(tasks) for tasks in (16, 4)}
    contenders |= {name: theirs(opponent) for name, opponent in those(bench, store.writers, size).items()}
    alone = f"{store.unit} alone"
    if size <= SMALL:
        contenders |= {f"{alone}, 16 at once": theirs(store.by_hand), f"{alone}, one after another": one_by_one}
    if size <= SMALL and delay:
        contenders |= {
            f"N x {delay * 1000:g} ms / 16": lambda: files * delay / 16,
            f"N x {delay * 1000:g} ms / 4": lambda: files * delay / 4,
        }
    group = f"{about(store, delay)}: {told(files, size)}"
    bench.compare(group, contenders, rounds, base=f"{store.base}, whole", warm_up=False)
    if size <= SMALL and delay:
        for tasks in (16, 4):
            bench.hold(
                f"{store.kind} commit of {files:,} files, {tasks} at once, to N x R / C",
                (group, f"staged append, {tasks} at once, commit"),
                (group, f"{alone}, one after another, N x R / {tasks}"),
                at_most=1.15,
            )


def overwrite(bench: Bench, store: Store, files: int, rounds: int) -> None:
    """Files in place of as many others, and the requests that these are removed by."""
    group = f"{about(store, ROUND_TRIP)}: {files:,} files in place of {files:,}"

    def run(opponent: Opponent) -> Run:
        return lambda: play(store, opponent, files, SMALL, delay=ROUND_TRIP)

    others = OURS | those(bench, store.overwriters, SMALL)
    names = {"append": "staged append, nothing removed", "full_drop": "staged full_drop"}
    contenders = {names.get(name, name): run(opponent) for name, opponent in others.items()}
    bench.compare(group, contenders, rounds, base="staged append, nothing removed, whole", warm_up=False)

    def removals() -> float:
        play(store, OURS["full_drop"], files, SMALL)
        return store.removals()

    counted = f"{group}, requests that remove"
    bench.compare(counted, {"staged full_drop": removals}, 1, unit="requests", warm_up=False)
    bench.hold(
        f"{store.kind} requests that remove {files:,} files",
        (counted, "staged full_drop"),
        at_most=-(-files // store.removes),
    )


def requests(bench: Bench, store: Store, files: int) -> None:
    """By operation, for many files and for few: the difference is what files cost, and the rest what a transaction does.

    The store is opened as well, with its probe of what the server honours.
    """

    def run(files: int) -> Run:
        def counted() -> Mapping[str, float]:
            play(store, OURS["append"], files, SMALL)
            found = {f", {operation}": float(number) for operation, number in sorted(store.requests().items())}
            return found | {", all": sum(found.values()), ", those that copy": store.copies()}

        return counted

    group = f"{store.kind}: requests of an append"
    contenders = {f"{number:,} files": run(number) for number in (10, files)}
    bench.compare(group, contenders, 1, unit="requests", warm_up=False)
    bench.hold(f"{store.kind} copies in an append", (group, f"{files:,} files, those that copy"), at_most=0)


def traffic(bench: Bench, store: Store, files: int, size: int, most: float) -> None:
    """Bytes sent, records included, beside those of the files."""

    def sent() -> float:
        play(store, OURS["append"], files, size)
        return store.sent()

    what = f"bytes of {told(files, size)}"
    contenders: dict[str, Run] = {"in the files": lambda: files * size, "sent": sent}
    group = f"{store.kind}: {what}"
    bench.compare(group, contenders, 1, base="in the files", unit="bytes", warm_up=False)
    bench.hold(f"{store.kind} bytes sent, to the {what}", (group, "sent"), (group, "in the files"), at_most=most)


def throttle(bench: Bench, store: Store, files: int, rounds: int) -> None:
    """Of a store that refuses a fifth of all requests and asks for no pause."""
    contenders: dict[str, Run] = {
        "staged append": lambda: play(store, OURS["append"], files, SMALL, delay=ROUND_TRIP),
        "the same, throttled": lambda: play(store, OURS["append"], files, SMALL, delay=ROUND_TRIP, throttle=5),
    }
    group = f"{about(store, ROUND_TRIP)}: {files:,} files, a fifth of the requests refused"
    bench.compare(group, contenders, rounds, base="staged append, whole", warm_up=False)


def measure(bench: Bench, store: Store, files: int, few: int, large: int, rounds: int) -> None:
    """One store: so many small files, and so few, if any, of that many bytes."""
    for delay in ROUND_TRIP, 0.0:
        append(bench, store, delay, files, SMALL, rounds)
        if few:
            append(bench, store, delay, few, large, rounds)
    overwrite(bench, store, files, rounds)
    requests(bench, store, files)
    traffic(bench, store, files, SMALL, 1.5)
    traffic(bench, store, 1, large, 1.01)
    throttle(bench, store, files, rounds)


def run(bench: Bench, opened: AbstractContextManager[Store], *, large: bool = False) -> None:
    """One store in the sizes of this run, with large files or with small ones alone."""
    with opened as store:
        if bench.quick:
            measure(bench, store, 100, 2 * large, 16 << 20, 1)
        else:
            measure(bench, store, 1_000, 20 * large, 64 << 20, 3)
