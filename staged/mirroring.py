"""Open Mirroring of Microsoft Fabric, opened by its names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from staged.observers import Callback, Observer, compose
from staged.store import Store, load_driver

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
    credential: object = None,
    client: object = None,
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
        observers: As `open_store` takes them. All else is the driver's; see `OpenMirroringDriver`
            (`credential` and `client` are those of the Azure SDK).

    Raises:
        InvalidInput: An argument is wrong.
        Unsupported: The Azure SDK is not installed (extra `adls`).
    """
    base, question, sas = url.rstrip("/").partition("?")
    below = "/".join(part for part in (f"{schema}.schema" if schema else "", table or "") if part)
    path = f"{base.rstrip('/').removesuffix('/Files/LandingZone')}/Files/LandingZone/{below}".rstrip("/")
    driver = load_driver("staged.drivers.open_mirroring", "OpenMirroringDriver", "adls")(
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
