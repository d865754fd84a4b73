"""The recipe for Prefect; `nox -s recipes` runs it in an environment of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from staged import sync

prefect = pytest.importorskip("prefect")

from prefect.testing.utilities import prefect_test_harness  # noqa: E402
from recipes.prefect_lake import load  # noqa: E402

ROWS = pl.DataFrame({"n": [1, 2]})


def test_a_task_that_is_tried_again_after_its_commit_appends_its_rows_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave, died = sync.Store.__exit__, []

    def dies_once(self: sync.Store, *error: Any) -> None:
        leave(self, *error)
        if not died:
            died.append(self.url)
            raise ConnectionError("died")

    monkeypatch.setattr(sync.Store, "__exit__", dies_once)
    with prefect_test_harness():
        assert load(str(tmp_path), {"a": ROWS, "b": ROWS}) == ["done", "committed"]
        assert load(str(tmp_path), {"a": ROWS}) == ["committed"]
    assert died
    assert pl.read_parquet(tmp_path / "a")["n"].to_list() == [1, 2, 1, 2]
    assert pl.read_parquet(tmp_path / "b")["n"].to_list() == [1, 2]
