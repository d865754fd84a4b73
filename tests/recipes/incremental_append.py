"""Append what is new in a database; a scheduler may kill this at any moment, and starts it again until it ends well."""

import sqlite3
import sys
from contextlib import closing

import polars

import staged.sync


def append_new(database: str, lake: str, at_most: int = 10_000) -> None:
    """Append the events that the lake does not have yet, in batches of whole files."""
    with closing(sqlite3.connect(database)) as source, staged.sync.open_store(lake) as store:
        while True:
            seen = store.meta().get("watermark", 0)
            query = f"SELECT * FROM events WHERE id > {seen} ORDER BY id LIMIT {at_most}"
            rows = polars.read_database(query, source)
            if rows.is_empty():
                return
            # The watermark is decided together with the rows; of two runs at once, the key lets only one append a batch.
            with store.staged_write("append", key=f"after {seen}", meta={"watermark": rows["id"].max()}) as tx:
                tx.write_table(rows)


if __name__ == "__main__":
    append_new(*sys.argv[1:])
