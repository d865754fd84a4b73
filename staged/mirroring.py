"""Open Mirroring of Microsoft Fabric, opened by its names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from staged.observers import Callback, Observer, compose
from staged.store import Store

if TYPE_CHECKING:
    from azure.storage.filedatalake.aio import DataLakeServiceClient

    from staged.drivers._azure import Credential

__all__ = ["open_mirror"]


def open_mirror(
    url: str,
    *,
    table: str | None = None,
    schema: str | None = None,
    keys: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    detection: Literal["sequence", "update_time"] = "sequence",
    upserts: bool = False,
    partner: Mapping[str, object] | None = None,
    scratch: Literal["_tmp", "_scratchPad"] = "_tmp",
    drop_timeout: float = 900.0,
    drop_wait: float | None = None,
    drop_poll: float = 2.0,
    credential: Credential | None = None,
    client: DataLakeServiceClient | None = None,
    limit: int = 16,
    observers: Iterable[Observer | Callback] = (),
) -> Store:
    """Open a table of a mirrored database; this writes and probes nothing.

    Args:
        url: The database's item, `abfss://workspace@onelake.dfs.fabric.microsoft.com/item`, by names or GUIDs.
        table: The table; without one the store can only be asked for children, which share its connections:
            `store.child("orders")`, `store.child("dbo.schema/orders")`.
        schema: The table's schema.
        keys: The key columns of the table, or a mapping from such children to theirs. None takes those that are there.
        observers: As `open_store` takes them. All else is the driver's; see `OpenMirroringDriver`.

    Raises:
        InvalidInput: An argument is wrong.
        Unsupported: The Azure SDK is not installed (extra `adls`).
    """
    from staged.drivers.open_mirroring import OpenMirroringDriver

    base, question, sas = url.rstrip("/").partition("?")
    below = "/".join(part for part in (f"{schema}.schema" if schema else "", table or "") if part)
    path = f"{base.rstrip('/').removesuffix('/Files/LandingZone')}/Files/LandingZone/{below}".rstrip("/")
    driver = OpenMirroringDriver(
        f"{path}{question}{sas}",
        keys=keys,
        detection=detection,
        upserts=upserts,
        partner=partner,
        scratch=scratch,
        drop_timeout=drop_timeout,
        drop_wait=drop_wait,
        drop_poll=drop_poll,
        credential=credential,
        client=client,
        limit=limit,
    )
    return Store(driver, compose(observers))
