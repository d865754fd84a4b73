"""Reload many tables every night, a few at once: one that fails stays as it was, and stops no other."""

from collections.abc import Awaitable, Callable, Mapping

import anyio
import pyarrow

from staged import Receipt, open_store


async def reload_all(
    lake: str, tables: Mapping[str, Callable[[], Awaitable[pyarrow.Table]]], at_once: int = 4
) -> dict[str, Receipt | Exception]:
    """Replace each table, a directory below the lake, by what its function returns; how each of them ended."""
    ended: dict[str, Receipt | Exception] = {}
    limit = anyio.CapacityLimiter(at_once)

    async with open_store(lake) as store, anyio.create_task_group() as tasks:

        async def reload(name: str) -> None:
            try:
                async with limit, store.child(name) as table, table.staged_write("full_drop") as tx:
                    await tx.write_table(await tables[name]())
                ended[name] = tx.receipt
            except Exception as error:
                ended[name] = error

        for name in tables:
            tasks.start_soon(reload, name)
    return ended
