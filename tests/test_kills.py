"""SIGKILL on a real file system: whatever it hits, recover leaves old or new, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def test_a_writer_killed_at_any_call_or_moment_leaves_old_or_new_and_recover_clears_the_rest(
    tmp_path: Path, figure: Callable[[str, str], None]
) -> None:
    program = [sys.executable, str(Path(__file__).with_name("kills.py")), f"{tmp_path}/kills", "1", "100"]
    run = subprocess.run(
        program, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONWARNINGS": "ignore"}
    )
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    cases = [line for line in lines if "at" in line]
    wrong = [line for line in lines if not line.get("ok", False)]
    assert run.returncode == 0, run.stderr[-2000:]
    assert not wrong, f"{wrong[:5]} {run.stderr[-2000:]}"
    kills = [line for line in cases if line.get("killed", True)]
    figure("SIGKILL", f"{len(kills)} kills, {len(kills) - len(wrong)} left old or new and were recovered")
    assert len(kills) >= 300
