"""Rounds in which all contenders take turns, their medians and ratios, and the budgets that these are held against."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

Run = Callable[[], float | Mapping[str, float]]
"""One run from a fresh state: what it took, or several figures of it by what is added to its name."""


@dataclass(frozen=True, slots=True)
class Result:
    """One thing measured.

    Attributes:
        values: One for each round, in `unit`.
        ratio: The median of its ratios to the base of its group, round by round; None where there is no base.
    """

    group: str
    name: str
    values: list[float]
    unit: str
    median: float
    ratio: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """A budget and the figure that was measured."""

    budget: str
    limit: str
    figure: float
    holds: bool


@dataclass(slots=True)
class Bench:
    """A run of the benchmarks.

    Args:
        root: Where files are written.
        elsewhere: A directory on another device, or None.
        quick: Fewer rounds and smaller sizes.
        rounds: No more of them than these.
    """

    root: str
    elsewhere: str | None
    quick: bool
    rounds: int = 1_000
    results: list[Result] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def scratch(self, root: str | None = None) -> Iterator[str]:
        """A fresh directory that is gone afterwards."""
        made = tempfile.mkdtemp(dir=root or self.root)
        try:
            yield made
        finally:
            shutil.rmtree(made)

    def compare(
        self,
        group: str,
        contenders: Mapping[str, Run],
        rounds: int,
        *,
        base: str | None = None,
        unit: str = "s",
        warm_up: bool = True,
    ) -> None:
        """Let all run in each round, so that what drifts befalls all alike; each round starts with another of them.

        Args:
            base: The name of the figure that the others are divided by.
            warm_up: Whether a round that is not counted comes first.
        """
        values: dict[str, list[float]] = {}
        order = list(contenders)
        rounds = min(rounds, self.rounds)
        for number in range(-1 if warm_up else 0, rounds):
            at = number % len(order)
            for name in order[at:] + order[:at]:
                # The collector stays on, as in any program; each finds it with nothing to do.
                gc.collect()
                took = contenders[name]()
                for suffix, value in took.items() if isinstance(took, Mapping) else [("", took)]:
                    if number >= 0:
                        values.setdefault(name + suffix, []).append(value)
        measured = []
        for name in sorted(values, key=lambda name: [name.startswith(start) for start in order].index(True)):
            ratio = None if base is None else ratio_of(values[name], values[base])
            measured.append(Result(group, name, values[name], unit, statistics.median(values[name]), ratio))
        self.results += measured
        print(f"\n{group} ({rounds} round{'s' if rounds > 1 else ''})")
        for result in measured:
            print(_line(result), flush=True)

    def find(self, group: str, name: str) -> Result | None:
        return next((result for result in self.results if (result.group, result.name) == (group, name)), None)

    def hold(
        self,
        budget: str,
        figure: tuple[str, str],
        of: tuple[str, str] | None = None,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> None:
        """Hold a figure, or its ratio to another one, against a budget; what was not measured is passed over.

        Args:
            figure: Its group and name.
            of: Those of what it is divided by.
        """
        result, other = self.find(*figure), None if of is None else self.find(*of)
        if result is None or (of is not None and other is None):
            self.note(f"Not measured in this run: {budget}.")
            return
        value = result.median
        if other is not None:
            same = result.group == other.group
            value = ratio_of(result.values, other.values) if same else result.median / other.median
        unit = "x" if other is not None else result.unit
        if at_most is not None:
            verdict = Verdict(budget, f"<= {at_most:g} {unit}", value, value <= at_most)
        else:
            assert at_least is not None
            verdict = Verdict(budget, f">= {at_least:g} {unit}", value, value >= at_least)
        self.verdicts.append(verdict)

    def note(self, text: str) -> None:
        """Say what is missing from this run."""
        self.notes.append(text)

    def conclude(self) -> None:
        """Print the budgets, and what is missing."""
        print("\nBudgets")
        for verdict in self.verdicts:
            said = "holds" if verdict.holds else "MISSES"
            print(f"  {said:6}  {verdict.figure:10,.3g}  {verdict.limit:10}  {verdict.budget}")
        for note in self.notes:
            print(f"\n{note}")

    def save(self, path: str) -> None:
        """Write everything as JSON."""
        system = {
            "python": platform.python_version(),
            "kernel": platform.release(),
            "cpus": os.cpu_count(),
            "load": os.getloadavg(),
            "quick": self.quick,
        }
        whole = {
            "system": system,
            "results": [asdict(result) for result in self.results],
            "budgets": [asdict(verdict) for verdict in self.verdicts],
            "notes": self.notes,
        }
        with open(path, "w", encoding="utf-8") as file:
            json.dump(whole, file, indent=1)
            file.write("\n")


def ratio_of(values: list[float], base: list[float]) -> float:
    """The median of the ratios within each round."""
    return statistics.median(value / other for value, other in zip(values, base, strict=True))


def sync(directory: str) -> None:
    """Make everything on the file system of a directory durable: syncfs(2), which Python lacks."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(fd) != 0:
            raise OSError(ctypes.get_errno(), "syncfs", directory)
    finally:
        os.close(fd)


def on_another_device(root: str) -> str | None:
    """A directory that can be written, on another device than this one."""
    for path in ("/dev/shm", tempfile.gettempdir(), os.path.expanduser("~")):
        if os.access(path, os.W_OK) and os.stat(path).st_dev != os.stat(root).st_dev:
            return path
    return None


def _line(result: Result) -> str:
    shown, low, high = (_shown(value, result.unit) for value in (result.median, min(result.values), max(result.values)))
    ratio = "" if result.ratio is None else f"{result.ratio:10,.3g} x"
    return f"  {result.name:52} {shown:>12}  [{low:>11} .. {high:>11}] {ratio}"


def _shown(value: float, unit: str) -> str:
    return f"{value * 1000:,.2f} ms" if unit == "s" else f"{value:,.0f} {unit}"
