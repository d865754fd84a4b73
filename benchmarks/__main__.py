"""`python benchmarks [--quick] [--json FILE] [--picture FILE] [--directory DIR]`: everything, side by side in one run."""

from __future__ import annotations

import argparse
import os
import tempfile

import moves
import overhead
import tables
from bench import Bench, on_another_device


def main() -> None:
    """Run all benchmarks."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="smaller sizes, one run each")
    options.add_argument("--only", choices=["moves", "tables", "overhead"], help="one part of them")
    options.add_argument("--json", help="where to write the results")
    options.add_argument("--picture", help="where to draw the commit of 10,000 files")
    options.add_argument("--directory", default=tempfile.gettempdir(), help="where to write files")
    chosen = options.parse_args()
    os.makedirs(chosen.directory, exist_ok=True)
    bench = Bench(
        chosen.directory,
        on_another_device(chosen.directory),
        repeat=1 if chosen.quick else 3,
        largest=10_000 if chosen.quick else 100_000,
    )
    for name, part in (("overhead", overhead), ("moves", moves), ("tables", tables)):
        if chosen.only in (None, name):
            part.run(bench)
    if chosen.json:
        bench.save(chosen.json)
    if chosen.picture:
        bench.draw(chosen.picture, "commit 10,000")


main()
