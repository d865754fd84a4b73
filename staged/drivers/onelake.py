"""Microsoft OneLake: the same driver under OneLake's rules.

A file system is a workspace, and a path begins with an item and one of its folders, such as `sales.Lakehouse/Files`, or with
the GUIDs of both. Items and their folders are managed by Fabric: nothing is created, renamed or deleted there. There are no
leases, and none are used. Whether conditions are honoured is not documented: it is tried when the first transaction begins,
and where they are not, commits are declared neither serialised nor fenced.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from secrets import token_hex
from types import MappingProxyType
from typing import Any

from staged.drivers._cloud import Refused, mapped
from staged.drivers.adls import AdlsDriver
from staged.errors import Unsupported
from staged.model import Capabilities, Mode

__all__ = ["OneLakeDriver"]

_PROBES = "probe"
"""Where in the control area it is tried what the service does."""
_MANAGED = 2
"""Levels that Fabric manages: the item, and its folders such as `Files` and `Tables`."""


class OneLakeDriver(AdlsDriver):
    """One target in an item of a workspace.

    Args:
        path: `abfss://workspace@onelake.dfs.fabric.microsoft.com/item.Lakehouse/Files/path`, or the same as `https://`, by
            names or by GUIDs. The other arguments are those of `AdlsDriver`.
    """

    # Which query parameters of a rename are taken is not documented; without a mode a file or tree goes to a free name too.
    rename_options: Mapping[str, Any] = MappingProxyType({"mode": None})

    def _can_be_renamed(self, path: str) -> bool:
        return len(path.split("/")) > _MANAGED

    async def _check(self) -> None:
        parts = self._path.split("/")
        if len(parts) < _MANAGED:
            raise Unsupported(
                f"{self.url} is no place for files: name an item and its folder, such as x.Lakehouse/Files."
            )
        folder = await self._lake.head("/".join(parts[:_MANAGED]))
        if folder is None:
            raise Unsupported(f"There is no such item or folder in the workspace: {'/'.join(parts[:_MANAGED])}.")

    async def _take_over_access(self, tree: str) -> None:
        pass  # Who may do what is Fabric's business, and is not of single directories.

    async def probe(self) -> Capabilities:
        found = await super().probe()
        place = f"{self._control}/{_PROBES}/{token_hex(12)}"
        with mapped():
            try:
                if not await self._renames_keep_etags(place):
                    raise Unsupported(f"{self.url} gives what is renamed another ETag: nothing could be told by it.")
                honoured = await self._honours_conditions(place)
                swaps = honoured and await self._honours_conditions_of_trees(place)
            finally:
                await self._lake.delete_tree(place)
        if honoured and (swaps or not found.swaps_trees):
            return found
        if honoured:
            # A swap could put one tree into another: trees are moved file by file.
            guarantees = {**found.guarantees, Mode.FULL_DROP: found.guarantees[Mode.APPEND]}
            return replace(found, swaps_trees=False, guarantees=guarantees)
        weaker = {mode: given - {"serialised", "fenced"} for mode, given in found.guarantees.items()}
        return replace(found, guarantees=weaker)

    async def _renames_keep_etags(self, place: str) -> bool:
        """Whether a file and a directory are known again after a rename."""
        await self._lake.write(f"{place}/old/file", b"1", token_hex(12))
        await self._lake.make_directory(f"{place}/new")
        for name in ("old/file", "old"):
            before = await self._lake.head(f"{place}/{name}")
            goal = f"{place}/new/{name.partition('/')[2] or 'directory'}"
            if before is None:
                return False
            await self._try_rename(f"{place}/{name}", before.identity, goal)
            after = await self._lake.head(goal)
            if after is None or after.identity != before.identity:
                return False
        return True

    async def _honours_conditions(self, place: str) -> bool:
        """Try each kind of condition that a commit rests on, over files of its own."""
        one, other, lake = f"{place}/one", f"{place}/other", self._lake
        first, second = [await lake.write(name, b"1", token_hex(12)) for name in (one, other)]
        if await lake.put(one, b"2", replaces=None) or await lake.put(one, b"2", replaces=second):
            return False
        tries: list[Callable[[], Awaitable[object]]] = [
            lambda: lake.rename(one, first, other, None, set()),
            lambda: lake.rename(one, first, other, first, set()),
            lambda: lake.rename(one, second, f"{place}/moved", None, set()),
            lambda: lake.delete(one, second),
        ]
        for attempt in tries:
            try:
                await attempt()
            except Refused as error:
                if error.status not in (409, 412):
                    raise
            else:
                return False
        return True

    async def _honours_conditions_of_trees(self, place: str) -> bool:
        """Whether a directory goes neither onto another nor into it, and not where it is not the one that was meant."""
        for name in ("from", "onto"):
            await self._lake.write(f"{place}/trees/{name}/file", b"1", token_hex(12))
        source, there = [await self._lake.head(f"{place}/trees/{name}") for name in ("from", "onto")]
        if source is None or there is None:
            return False
        for identity, goal in ((source.identity, "onto"), (there.identity, "free")):
            await self._try_rename(f"{place}/trees/from", identity, f"{place}/trees/{goal}")
            if await self._lake.head(f"{place}/trees/from") is None:
                return False
        return True

    async def trim(self, keep: int, older_than: float) -> int:
        if keep == 0:
            with mapped():
                await self._forget_probes(older_than)
        return await super().trim(keep, older_than)

    async def _forget_probes(self, older_than: float) -> None:
        # One that runs just now takes seconds.
        for name in await self._names(f"{self._control}/{_PROBES}", trees=True):
            probe = f"{self._control}/{_PROBES}/{name}"
            if (await self._lake.age(probe) or 0.0) >= max(older_than, 60.0):
                await self._lake.delete_tree(probe)
