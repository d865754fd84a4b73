"""`python benchmarks [--quick] [--rounds N] [--only PART] [--json FILE] [--picture FILE] [--directory DIR]`: all, side by side."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import tempfile
import time

from bench import Bench, on_another_device

# Modules, loaded on use: not every part needs what another compares with.
PARTS = ("overhead", "moves", "tables", "lakes", "stores.s3", "stores.gcs", "stores.blob")
STORES = ("lakes", "s3", "gcs", "blob")
NAMES = {path.rpartition(".")[2]: path for path in PARTS}
PROJECT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def main() -> None:
    """Run all benchmarks."""
    options = argparse.ArgumentParser(prog="benchmarks", description="Everything, side by side in one run.")
    options.add_argument("--quick", action="store_true", help="smaller sizes and fewer rounds")
    options.add_argument("--rounds", type=int, default=1_000, help="at most so many")
    options.add_argument("--only", choices=NAMES, help="one part of them")
    options.add_argument("--json", help="where to write the results")
    options.add_argument("--picture", help="where to draw how long commits take, or a store's")
    options.add_argument("--directory", default=PROJECT, help="where to write files; by default in the project")
    chosen = options.parse_args()
    if chosen.picture and chosen.only not in (None, "moves", *STORES):
        options.error(f"There are pictures of the parts moves, {', '.join(STORES)}.")
    # Whoever ends it early leaves no files behind either.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=chosen.directory) as root:
        bench = Bench(root, on_another_device(root), chosen.quick, chosen.rounds)
        for name, path in NAMES.items():
            if chosen.only in (None, name):
                importlib.import_module(path).run(bench)
        bench.conclude()
    print(f"\nAll of it took {(time.monotonic() - started) / 60:.1f} minutes.")
    if chosen.json:
        bench.save(chosen.json)
    if chosen.picture:
        from picture import draw, draw_stores

        if chosen.only in STORES:
            draw_stores(bench.results, chosen.picture)
        else:
            draw(bench.results, chosen.picture, 10_000)


if __name__ == "__main__":
    main()
