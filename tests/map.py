"""Draws what the exploration saw: the steps of a commit across, faults down, each cell by how its histories ended."""

from __future__ import annotations

import sys
from collections import Counter

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

from staged.testing.exploration import FAULT_MOMENTS, KINDS, PRIORS, Report, crashes, run, works
from staged.testing.steps import STEPS

COLOURS = {
    "refused": ("#e9c46a", "old: refused with an error that says so"),
    "old": ("#8ab6d6", "old: recover rolled it back"),
    "finished by recover": ("#57a773", "new: finished by recover"),
    "new": ("#2a6f4e", "new: reported as committed"),
    "wrong": ("#c1121f", "anything else"),
}


def draw(report: Report, path: str) -> None:
    """One row a fault, one column a step; each cell is divided as its histories ended, and says how many they were."""
    faults = list(FAULT_MOMENTS)
    figure, axes = plt.subplots(figsize=(11, 0.62 * len(faults) + 1.9), dpi=130)
    for (row, fault), (column, step) in ((f, s) for f in enumerate(faults) for s in enumerate(STEPS)):
        ended = report.cells.get((fault, step), Counter())
        total, left = sum(ended.values()), 0.0
        for result, (colour, _) in COLOURS.items():
            width = 0.94 * ended[result] / total if total else 0.0
            axes.barh(row, width, left=column + left, height=0.82, align="center", color=colour)
            left += width
        axes.text(column + 0.47, row, f"{total:,}" if total else "-", ha="center", va="center", fontsize=9)
    axes.set_xlim(-0.05, len(STEPS))
    axes.set_xticks([number + 0.47 for number in range(len(STEPS))], STEPS)
    axes.set_yticks(range(len(faults)), faults)
    axes.invert_yaxis()
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.axvline(STEPS.index("decide") + 0.97, color="black", linewidth=1, linestyle=":")
    kinds = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour, _ in COLOURS.values()]
    figure.legend(kinds, [text for _, text in COLOURS.values()], loc="lower center", ncol=5, frameon=False, fontsize=8)
    figure.suptitle(
        f"{sum(sum(cell.values()) for cell in report.cells.values()):,} commits with one fault each, by the step it befell",
        fontsize=11,
    )
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path)


if __name__ == "__main__":
    seen = run(lambda: crashes(KINDS[:1], works((1, 5)), PRIORS))
    seen += run(lambda: crashes(KINDS[1:], works((2,)), ["none", "overlapping"]))
    print(seen)
    draw(seen, sys.argv[1])
    sys.exit(1 if seen.failures else 0)
