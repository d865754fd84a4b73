"""The picture of the README."""

from __future__ import annotations

import statistics

import matplotlib
from bench import Bench, Result

matplotlib.use("agg")
from matplotlib import pyplot as plt

SHOWN = {
    "staged full_drop": "staged, full_drop",
    "staged full_drop, synced, with preparation": "staged, full_drop, and the sync before it",
    "os.rename, one after another": "a loop of os.rename",
    "the same, synced": "a loop of os.rename, and the sync before it",
    "staged append": "staged, append",
    "staged append, synced, with preparation": "staged, append, and the sync before it",
    "shutil.move": "a loop of shutil.move",
    "fsspec transaction": "a transaction of fsspec",
    "fsspec transaction across devices": "a transaction of fsspec, across devices",
    "anyio.Path": "await anyio.Path.rename, each",
    "aiofiles": "await aiofiles.os.rename, each",
}
OURS, THEIRS = "#1f6f50", "#a8b0b8"


def draw(bench: Bench, path: str, count: int) -> None:
    """How long it takes until so many staged files are in place, shortest first."""
    group = f"commit of {count:,} files"
    shown = [result for result in bench.results if result.group == group and result.name in SHOWN]
    shown.sort(key=lambda result: statistics.median(result.values), reverse=True)
    figure, axes = plt.subplots(figsize=(8, 0.34 * len(shown) + 1.1))
    colours = [OURS if result.name.startswith("staged") else THEIRS for result in shown]
    axes.barh([SHOWN[result.name] for result in shown], [result.median for result in shown], color=colours, height=0.7)
    for row, result in enumerate(shown):
        axes.text(result.median * 1.08, row, _label(result), va="center", fontsize=10)
    axes.set_xscale("log")
    axes.margins(y=0.01)
    axes.set_xlim(shown[-1].median / 4, shown[0].median * 12)
    axes.tick_params(axis="y", length=0, labelsize=10)
    for label, result in zip(axes.get_yticklabels(), shown, strict=True):
        label.set_color(OURS if result.name.startswith("staged") else "black")
    axes.xaxis.set_visible(False)
    axes.spines[:].set_visible(False)
    figure.suptitle(f"From {count:,} staged files to {count:,} files in place (logarithmic scale)", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=200)


def _label(result: Result) -> str:
    seconds = result.median
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{seconds * 1000:,.{0 if seconds >= 0.01 else 1}f} ms"
