"""Compute some days again and replace just these, all in one commit; a day that has no rows any more is emptied."""

from collections.abc import Sequence
from datetime import date

import polars
from anyio import to_thread

from staged import open_store


async def backfill(lake: str, days: Sequence[date], events: polars.LazyFrame) -> None:
    """Replace the partitions of these days by their events."""
    partitions = [f"day={day}" for day in days]
    wanted = events.filter(polars.col("day").is_in(days))
    async with (
        open_store(lake) as store,
        store.staged_write("overwrite_partitions", partitions=partitions, allow_empty=True) as tx,
        tx.dir() as directory,
    ):
        by_day = polars.PartitionBy(directory, key="day", include_key=False)
        await to_thread.run_sync(lambda: wanted.sink_parquet(by_day, mkdir=True))
