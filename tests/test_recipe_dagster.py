"""The recipe for Dagster; `nox -s recipes` runs it in an environment of its own."""

from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

dagster = pytest.importorskip("dagster")

from recipes.dagster_lake import LakeIOManager  # noqa: E402

DAYS = dagster.StaticPartitionsDefinition(["day=1", "day=2"])
ROWS = {"n": [1, 2]}


@dagster.asset
def numbers() -> pl.DataFrame:
    return pl.DataFrame(ROWS)


@dagster.asset
def doubled(numbers: pl.DataFrame) -> pl.DataFrame:
    return numbers * 2


@dagster.asset(partitions_def=DAYS)
def daily(context: dagster.AssetExecutionContext) -> pl.DataFrame:
    return pl.DataFrame({"of": [context.partition_key]})


@dagster.asset(partitions_def=DAYS)
def copied(daily: pl.DataFrame) -> pl.DataFrame:
    return daily


def materialize(lake: Path, *assets: object, partition: str | None = None) -> bool:
    resources = {"io_manager": LakeIOManager(root=str(lake))}
    result = dagster.materialize(list(assets), resources=resources, partition_key=partition, raise_on_error=False)
    return result.success


def test_assets_are_handed_on_and_read_by_anyone(tmp_path: Path) -> None:
    for _ in range(2):
        assert materialize(tmp_path, numbers, doubled)
        assert pl.read_parquet(tmp_path / "doubled").to_dict(as_series=False) == {"n": [2, 4]}
        assert len(list((tmp_path / "doubled").iterdir())) == 1


def test_a_partition_is_replaced_and_the_others_stay(tmp_path: Path) -> None:
    for partition in ("day=1", "day=2", "day=1"):
        assert materialize(tmp_path, daily, copied, partition=partition)
    assert sorted(pl.read_parquet(tmp_path / "copied")["of"]) == ["day=1", "day=2"]


def test_a_materialization_that_breaks_off_leaves_the_asset_as_it_was(tmp_path: Path) -> None:
    assert materialize(tmp_path, numbers)
    batch = pa.record_batch({"n": [3]})

    def breaks() -> Iterator[pa.RecordBatch]:
        yield batch
        raise ConnectionError("broke off")

    @dagster.asset(name="numbers")
    def broken():
        return pa.RecordBatchReader.from_batches(batch.schema, breaks())

    assert not materialize(tmp_path, broken)
    assert pl.read_parquet(tmp_path / "numbers").to_dict(as_series=False) == ROWS
    assert not list((tmp_path / "_staged" / "numbers" / "tx").iterdir())
