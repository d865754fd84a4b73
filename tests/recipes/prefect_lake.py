"""Append in a task of Prefect that is tried again: what an earlier try committed before it died is not appended twice."""

import polars
from prefect import flow, runtime, task

import staged.sync


@task(retries=3)
def append(lake: str, name: str, rows: polars.DataFrame) -> str:
    """Append rows to one table of the lake, once for each run of the flow, however often that is tried."""
    with (
        staged.sync.open_store(lake) as store,
        store.child(name) as table,
        table.staged_write("append", key=f"flow run {runtime.flow_run.id}") as tx,
    ):
        tx.write_table(rows)
    return tx.receipt.phase


@flow(retries=1)
def load(lake: str, tables: dict[str, polars.DataFrame]) -> list[str]:
    """Append to all tables; how each came out."""
    return [append(lake, name, rows) for name, rows in tables.items()]
