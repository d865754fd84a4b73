"""Load many entities, a few at once, and keep a journal; a run that is killed and started again loads each of them once.

A run is over, or given up, before the next one begins.
"""

from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import anyio
import pyarrow
import pyarrow.compute

from staged import StagedError, Store


@dataclass(frozen=True)
class Entity:
    """A table of the source.

    Attributes:
        mode: "append" for what is new since the watermark, "full_drop" for everything anew.
        batches: Gives the rows after a watermark, piece by piece.
        watermark: The column that only ever grows.
        allow_empty: Whether a full_drop without rows empties the table; else it is an error.
    """

    name: str
    mode: str
    batches: Callable[[int], AsyncGenerator[pyarrow.Table, None]]
    watermark: str = "id"
    allow_empty: bool = False


async def load(entity: Entity, store: Store, run: str) -> None:
    """Make one attempt: one commit of the rows, the watermark and the journal's line; of a failed one nothing is left."""
    meta: dict[str, Any] = await store.meta()
    seen = meta.get("watermark", 0) if entity.mode == "append" else 0
    key = f"{entity.name}-{run}"
    async with store.staged_write(entity.mode, key=key, allow_empty=entity.allow_empty) as tx:
        if tx.done:  # by this run, before it was started again
            return
        rows = 0
        async with aclosing(entity.batches(seen)) as batches:
            async for batch in batches:
                if batch.num_rows:
                    await tx.write_table(batch)
                    rows += batch.num_rows
                    seen = max(seen, pyarrow.compute.max(batch[entity.watermark]).as_py())
        line = {"run": run, "entity": entity.name, "mode": entity.mode, "phase": "committed" if rows else "empty"}
        tx.meta.update(watermark=seen, journal={**line, "rows": rows, "watermark": seen})


async def note(store: Store, journal: Store) -> None:
    """Copy the line of an entity's last commit to the journal, unless it is there."""
    line: Any = (await store.meta()).get("journal")
    if line is not None:
        async with journal.staged_write("append", key=f"{line['entity']}-{line['run']}") as tx:
            await tx.write_table(pyarrow.Table.from_pylist([line]))


async def run_all(
    run: str, entities: Iterable[Entity], stores: Mapping[str, Store], journal: Store, at_once: int = 4, tries: int = 3
) -> dict[str, Exception]:
    """Load each entity into the store of its name; why those failed that failed at every try."""
    failed: dict[str, Exception] = {}
    limit = anyio.CapacityLimiter(at_once)

    async def one(entity: Entity) -> None:
        store = stores[entity.name]
        async with limit:
            for attempt in range(1, tries + 1):
                try:
                    await note(store, journal)  # of a run that died before it came to that
                    await load(entity, store, run)
                    await note(store, journal)
                    return
                except Exception as error:
                    if attempt == tries or not is_worth_another_try(error):
                        failed[entity.name] = error
                        return
                await anyio.sleep(attempt / 4)

    async with anyio.create_task_group() as tasks:
        for entity in entities:
            tasks.start_soon(one, entity)
    return failed


def is_worth_another_try(error: Exception) -> bool:
    """Whether it passes. The key makes it harmless to try again what may have been committed."""
    return not isinstance(error, StagedError) or error.retryable or error.outcome != "untouched"
