"""The pictures of the README; `python benchmarks/picture.py JSON... --out FILE` draws the stores of runs that were saved."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping

import matplotlib
from bench import Result

matplotlib.use("agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

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
STORES = {
    "S3": "S3, {} files",
    "GCS": "Google Cloud Storage, {} files",
    "Blob": "Azure Blob Storage, {} files",
    "ADLS": "ADLS, {} files that were staged before",
}
# What is measured without its waits, where it waits by default.
WITHOUT_WAITS = {("GCS", "staged append, 16 at once"): "staged append, with rate=0"}
_SMALL = re.compile(r"(\w+) behind 20 ms: ([\d,]+) files(?: of 4 KiB)?")
_LEFT_OUT = ("4 at once", " alone, ", "N x ", ", prepare", ", commit")
OURS, THEIRS = "#1f6f50", "#a8b0b8"


def draw(results: Iterable[Result], path: str, count: int) -> None:
    """How long it takes until so many staged files are in place, shortest first."""
    group = f"commit of {count:,} files"
    shown = {SHOWN[one.name]: one.median for one in results if one.group == group and one.name in SHOWN}
    figure, axes = plt.subplots(figsize=(8, 0.34 * len(shown) + 1.1))
    _bars(axes, shown)
    axes.set_xscale("log")
    axes.set_xlim(min(shown.values()) / 4, max(shown.values()) * 12)
    figure.suptitle(f"From {count:,} staged files to {count:,} files in place (logarithmic scale)", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=200)


def draw_stores(results: Iterable[Result], path: str) -> None:
    """How long small files take on each store behind 20 ms, shortest first."""
    found: dict[str, dict[str, float]] = {}
    for one in results:
        group = _SMALL.fullmatch(one.group)
        if group is not None and not any(part in one.name for part in _LEFT_OUT):
            title = STORES[group[1]].format(group[2])
            name = one.name.removesuffix(", whole")
            found.setdefault(title, {})[WITHOUT_WAITS.get((group[1], name), name)] = one.median
    # One bar is compared with nothing.
    shown = {title: bars for title, bars in found.items() if len(bars) > 1}
    rows = [len(bars) + 1 for bars in shown.values()]
    figure, grid = plt.subplots(
        len(shown), figsize=(8, 0.34 * sum(rows) + 0.6), height_ratios=rows, sharex=True, squeeze=False
    )
    for axes, (title, bars) in zip(grid[:, 0], shown.items(), strict=True):
        _bars(axes, bars)
        axes.set_title(title, fontsize=11, loc="left")
    grid[0, 0].set_xlim(0, 1.12 * max(max(bars.values()) for bars in shown.values()))
    figure.suptitle("Until small files are staged and committed, where each request takes 20 ms longer", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=200)


def _bars(axes: Axes, shown: Mapping[str, float]) -> None:
    """Seconds, longest at the bottom."""
    names = sorted(shown, key=shown.__getitem__, reverse=True)
    colours = [OURS if name.startswith("staged") else THEIRS for name in names]
    axes.barh(names, [shown[name] for name in names], color=colours, height=0.7)
    for row, name in enumerate(names):
        end, said = (shown[name], row), _label(shown[name])
        axes.annotate(said, end, xytext=(4, 0), textcoords="offset points", va="center", fontsize=10)
    axes.margins(y=0.01)
    axes.tick_params(axis="y", length=0, labelsize=10)
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        label.set_color(OURS if name.startswith("staged") else "black")
    axes.xaxis.set_visible(False)
    axes.spines[:].set_visible(False)


def _label(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{seconds * 1000:,.{0 if seconds >= 0.01 else 1}f} ms"


def main() -> None:
    options = argparse.ArgumentParser(description="Draw the stores of runs that were saved.")
    options.add_argument("saved", nargs="+", help="what --json wrote")
    options.add_argument("--out", default="stores.png", help="where to draw them")
    chosen = options.parse_args()
    results = []
    for path in chosen.saved:
        with open(path, encoding="utf-8") as file:
            results += [Result(**one) for one in json.load(file)["results"]]
    draw_stores(results, chosen.out)


if __name__ == "__main__":
    main()
