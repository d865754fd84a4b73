"""Arrow and Parquet: the only module that imports pyarrow, loaded on use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anyio import to_thread

from staged.errors import InvalidInput, Unsupported

if TYPE_CHECKING:
    from staged.lifecycle import Transaction

try:
    import pyarrow
    import pyarrow.parquet
except ImportError as error:  # pragma: no cover - the test environment has it
    raise Unsupported("Tables need pyarrow: pip install 'staged[arrow]'.") from error

__all__ = ["write_table"]


async def write_table(transaction: Transaction, data: object, path: str, overwrite: bool) -> None:
    """Stage one Parquet file of whatever has `__arrow_c_stream__`, in a worker thread."""
    if not hasattr(data, "__arrow_c_stream__"):
        raise InvalidInput(f"{type(data).__name__} is not a table: it has no __arrow_c_stream__.")
    async with transaction.path(path, overwrite=overwrite) as local:
        rows = await to_thread.run_sync(_write, data, local)
        transaction.count_rows(path, rows)


def _write(data: Any, local: str) -> int:
    if isinstance(data, pyarrow.Table):
        pyarrow.parquet.write_table(data, local)
        return int(data.num_rows)
    reader = pyarrow.RecordBatchReader.from_stream(data)
    rows = 0
    with pyarrow.parquet.ParquetWriter(local, reader.schema) as writer:
        for batch in reader:
            writer.write_batch(batch)
            rows += batch.num_rows
    return rows
