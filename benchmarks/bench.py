"""Medians of several runs, as ratios to one of them within one run; a table, JSON and a picture."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True, slots=True)
class Result:
    """One thing measured.

    Attributes:
        value: The median of the runs, in `unit`.
        ratio: To the base of its group, or None for the base itself.
        budget: The ratio that it is not to exceed, where there is one.
    """

    group: str
    name: str
    value: float
    low: float
    high: float
    unit: str = "s"
    ratio: float | None = None
    budget: float | None = None

    @property
    def within(self) -> bool | None:
        return None if self.budget is None or self.ratio is None else self.ratio <= self.budget


@dataclass(slots=True)
class Bench:
    """A run of the benchmarks.

    Args:
        root: Where files are written.
        elsewhere: A directory on another device, or None.
        repeat: Runs of each, of which the median counts.
        largest: Sizes above this are left out.
    """

    root: str
    elsewhere: str | None = None
    repeat: int = 3
    largest: int = 100_000
    results: list[Result] = field(default_factory=list)

    def sizes(self, *sizes: int) -> list[int]:
        return [size for size in sizes if size <= self.largest]

    @contextmanager
    def scratch(self, root: str | None = None) -> Iterator[str]:
        """A fresh directory that is gone afterwards."""
        made = tempfile.mkdtemp(prefix="staged-bench-", dir=root or self.root)
        try:
            yield made
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def measure(
        self,
        group: str,
        name: str,
        run: Callable[[], float],
        base: Result | None = None,
        *,
        unit: str = "s",
        budget: float | None = None,
    ) -> Result:
        """Run it several times; each run returns what it took."""
        values = [run() for _ in range(self.repeat)]
        value = statistics.median(values)
        ratio = value / base.value if base is not None and base.value else None
        result = Result(group, name, value, min(values), max(values), unit, ratio, budget)
        self.results.append(result)
        print(self._line(result), flush=True)
        return result

    @staticmethod
    def _line(result: Result) -> str:
        ratio = "" if result.ratio is None else f"{result.ratio:8.2f} x"
        verdict = {
            None: "",
            True: f"  (budget {result.budget} x: held)",
            False: f"  (budget {result.budget} x: NOT HELD)",
        }
        shown = f"{result.value:12,.4f} {result.unit}"
        return f"{result.group:24} {result.name:44} {shown} {ratio}{verdict[result.within]}"

    def save(self, path: str) -> None:
        with open(path, "w", encoding="utf-8") as file:
            json.dump([asdict(result) for result in self.results], file, indent=1)
            file.write("\n")

    def draw(self, path: str, group: str) -> None:
        """One group as bars, shortest first."""
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot as plt

        chosen = sorted((result for result in self.results if result.group == group), key=lambda result: result.value)
        figure, axes = plt.subplots(figsize=(9, 0.36 * len(chosen) + 1.2), dpi=130)
        colours = ["#2a6f4e" if result.name.startswith("staged") else "#9aa5b1" for result in chosen]
        axes.barh([result.name for result in chosen], [result.value * 1000 for result in chosen], color=colours)
        for row, result in enumerate(chosen):
            ratio = "" if result.ratio is None else f"  ({result.ratio:.2g} x)"
            axes.text(result.value * 1000, row, f" {result.value * 1000:,.1f} ms{ratio}", va="center", fontsize=8)
        axes.set_xscale("log")
        axes.set_xlim(right=max(result.value for result in chosen) * 8000)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"{group} files, milliseconds (log scale), and ratio to a bare loop of os.rename", fontsize=10)
        figure.tight_layout()
        figure.savefig(path)


def on_another_device(root: str) -> str | None:
    """A directory that can be written, on another device than this one."""
    for path in ("/dev/shm", tempfile.gettempdir()):
        if os.access(path, os.W_OK) and os.stat(path).st_dev != os.stat(root).st_dev:
            return path
    return None
