"""What `_metadata.json` says, and what the rows of a data file do to a table."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

MARKER = "__rowMarker__"
INSERT, UPDATE, DELETE, UPSERT = MARKERS = (0, 1, 2, 4)
STRATEGIES = {"SequentialFileName": True, "LastUpdateTimeFileDetection": False}

Row = dict[str, Any]


class Rejected(Exception):
    """A file that the service does not take, and why."""


@dataclass(frozen=True, slots=True)
class Metadata:
    """What a table's `_metadata.json` says; as it stands here where there is none."""

    keys: tuple[str, ...] = ()
    sequential: bool = True
    upserts: bool = False

    @classmethod
    def parse(cls, data: bytes) -> Metadata:
        """The metadata of a file's bytes.

        Raises:
            Rejected: It is not valid. Which mistakes the service finds is assumed; fields that it knows no use for it
                lets pass.
        """
        try:
            told = json.loads(data)
        except ValueError:
            raise Rejected("_metadata.json is no JSON") from None
        if not isinstance(told, dict):
            raise Rejected("_metadata.json is no JSON object")
        keys, upserts = told.get("keyColumns", []), told.get("isUpsertDefaultRowMarker", False)
        strategy = told.get("fileDetectionStrategy", "SequentialFileName")
        if not isinstance(keys, list) or not all(isinstance(key, str) and key for key in keys):
            raise Rejected("keyColumns is no list of names")
        if not isinstance(strategy, str) or strategy not in STRATEGIES:
            raise Rejected(f"fileDetectionStrategy {strategy!r} is not known")
        if not isinstance(upserts, bool):
            raise Rejected("isUpsertDefaultRowMarker is neither true nor false")
        return cls(tuple(keys), STRATEGIES[strategy], upserts)


@dataclass(frozen=True, slots=True)
class Content:
    """A table's columns with their types, its rows, each with all columns, and how many rows were read for it."""

    columns: dict[str, pa.DataType] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    read: int = 0

    def after(self, data: bytes, metadata: Metadata) -> Content:
        """The content once a data file is applied.

        Raises:
            Rejected: The file is not valid; nothing of it is applied.
        """
        if not data:
            raise Rejected("the file has zero bytes")
        try:
            table = pq.read_table(pa.BufferReader(data))
        except (pa.ArrowException, OSError) as error:
            raise Rejected(f"the file is no Parquet file: {error}") from None
        markers = _markers(table, metadata)
        columns = self.columns | _columns(table, self.columns)
        blank: Row = dict.fromkeys(columns)
        rows: list[Row | None] = [blank | row for row in self.rows]
        places: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
        for at, row in enumerate(self.rows):
            places[_key(row, metadata)].append(at)
        for marker, given in zip(markers, table.to_pylist(), strict=True):
            given.pop(MARKER, None)
            there = places[_key(given, metadata)]
            if marker == INSERT or (marker != DELETE and not there):
                there.append(len(rows))
                rows.append(blank | given)
                continue
            # assumed: duplicates that inserts made are deleted together, and an update leaves one
            for at in there:
                rows[at] = None
            del there[0 if marker == DELETE else 1 :]
            for at in there:
                rows[at] = blank | given
        return Content(columns, [row for row in rows if row is not None], self.read + table.num_rows)


def _columns(table: pa.Table, known: dict[str, pa.DataType]) -> dict[str, pa.DataType]:
    columns = {name: kind for name, kind in zip(table.column_names, table.schema.types, strict=True) if name != MARKER}
    for name, kind in columns.items():
        if pa.types.is_nested(kind):
            raise Rejected(f"column {name!r} has the complex type {kind}")  # assumed: documented as to be JSON text
        if known.get(name, kind) != kind:
            raise Rejected(f"column {name!r} was {known[name]} and is {kind}")
    return columns


def _markers(table: pa.Table, metadata: Metadata) -> list[int]:
    """What is to be done with each row."""
    names = table.column_names
    if MARKER not in names:
        markers = [UPSERT if metadata.upserts else INSERT] * table.num_rows
    elif names[-1] != MARKER:
        raise Rejected(f"{MARKER} is not the last column")
    else:
        markers = table.column(MARKER).to_pylist()
    wrong = [marker for marker in markers if type(marker) is not int or marker not in MARKERS]
    if wrong:
        raise Rejected(f"{MARKER} is {wrong[0]!r}")
    if not metadata.keys and any(marker != INSERT for marker in markers):
        raise Rejected("rows are updated or deleted, and there are no keyColumns")
    if missing := [key for key in metadata.keys if key not in names]:
        raise Rejected(f"the key column {missing[0]!r} is missing")
    return markers


def _key(row: Row, metadata: Metadata) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in metadata.keys)
