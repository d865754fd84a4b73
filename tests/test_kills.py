"""SIGKILL on a real file system: whatever it hits, recover leaves old or new, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from staged.testing.steps import STEPS

SOAK = int(os.environ.get("STAGED_SOAK", "1"))


def test_a_writer_killed_at_any_call_or_moment_leaves_old_or_new_and_recover_clears_the_rest(
    tmp_path: Path, figure: Callable[[str, str], None]
) -> None:
    # What is after a call is before the next, but for work in memory.
    moments = "before after" if SOAK > 1 else "before"
    kills = str(Path(__file__).with_name("kills.py"))
    program = [sys.executable, kills, f"{tmp_path}/kills", "1", f"{100 * SOAK}", moments]
    run = subprocess.run(
        program, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONWARNINGS": "ignore"}
    )
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    wrong = [line for line in lines if not line.get("ok", False)]
    assert run.returncode == 0, run.stderr[-2000:]
    assert not wrong, f"{wrong[:5]} {run.stderr[-2000:]}"
    steps = Counter(line["step"] for line in lines if line["killed"])
    by_step = ", ".join(f"{step} {steps[step]:,}" for step in STEPS)
    figure("SIGKILL", f"{steps.total():,} kills ({by_step}), all left old or new and were recovered")
    assert steps.total() >= 200 + 50 * SOAK
    assert all(steps[step] for step in STEPS), by_step
