"""Open Mirroring of Microsoft Fabric: a table's folder in the landing zone of a mirrored database, which the service reads.

The folder is read while it is written, so the order is part of the commit: `_metadata.json` first, then the files from the
highest index down, so that all of a batch becomes readable when its lowest index is there. Indexes are given under the head:
they begin at 1, have no gap and are never used again. The service moves what it has read away; a staged file that is neither
staged nor in its place was published and read.

A full_drop puts the folder aside, waits until the service has dropped the table, and then begins anew at 1.

    Files/LandingZone/[<schema>.schema/]<table>/…                 the target
    Files/_tmp/[<schema>.schema/]<table>/…                        its control area, as of any lake

Facts: "Open mirroring landing zone requirements and format" and "Best practices for open mirroring", Microsoft Learn, 2026.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Literal

import anyio
import msgspec
from azure.storage.filedatalake.aio import DataLakeServiceClient

from staged.driver import Alive, Record, idle
from staged.drivers._cloud import Refused, mapped
from staged.drivers.adls import STAGING
from staged.drivers.onelake import OneLakeDriver
from staged.errors import Conflict, InvalidInput, StagingError, StorageError, Unsupported
from staged.model import Answer, Arranged, Capabilities, Entry, Listed, Mode, Trees

if TYPE_CHECKING:
    from staged.drivers._azure import Credential

__all__ = ["OpenMirroringDriver"]

METADATA = "_metadata.json"
PARTNER = "_partnerEvents.json"
LAST_INDEX = "staged.last_index"
"""The name in a commit's meta under which the last index given is remembered."""
_ZONE = "Files/LandingZone"
_HEAD = "head"
"""The record that is there as soon as there is a commit."""
_TABLES = "Files/Monitoring/tables.json"
"""Where the service lists its tables."""
_READ = ("", "/_ProcessedFiles", "/_FilesReadyToDelete")
"""Where the service leaves files of a table, in the order in which it moves them."""
_INDEXED = re.compile(r"[0-9]{20}\..+")
_OURS = re.compile(r"part-[0-9a-f]+-[0-9]+\.parquet")
_TABLE = re.compile(r"([^/.]+\.schema/)?(?![^/]*\.schema$)[^/_.][^/]*")


_log = logging.getLogger("staged")


class _Metadata(msgspec.Struct, frozen=True, omit_defaults=True):
    """The content of `_metadata.json` that matters here."""

    keyColumns: tuple[str, ...] = ()
    fileDetectionStrategy: Literal["SequentialFileName", "LastUpdateTimeFileDetection"] = "SequentialFileName"
    isUpsertDefaultRowMarker: bool = False


class _Listed(msgspec.Struct, frozen=True):
    sourceTableName: str
    sourceSchemaName: str | None = None


class _Monitored(msgspec.Struct, frozen=True):
    tables: list[_Listed]


class OpenMirroringDriver(OneLakeDriver):
    """One table of a landing zone.

    Args:
        path: `abfss://workspace@onelake.dfs.fabric.microsoft.com/item/Files/LandingZone/table`, or with `schema.schema/`
            before the table. A landing zone itself can only be opened for its children.
        keys: The key columns; none for rows that are only ever inserted. Where the table is there, they may be left out,
            and may not be others. For a landing zone, a mapping from a child's path to its keys.
        detection: How the service finds files: by "sequence", or by "update_time", where names are free and order is none.
        upserts: Rows without a marker are upserts, not inserts.
        partner: What `_partnerEvents.json` says if the landing zone has none yet.
        scratch: Where the control areas lie: "_tmp" beside the landing zone, or its "_scratchPad".
        drop_timeout: Seconds for which a full_drop waits for the service to drop the table.
        drop_wait: Wait so many seconds instead, and do not ask the service.
        drop_poll: Seconds between two looks.

    The others are those of `AdlsDriver`.
    """

    own = frozenset({METADATA})

    def __init__(
        self,
        path: str,
        *,
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
        period: float = 30.0,
    ) -> None:
        if (
            isinstance(keys, str)
            or detection not in ("sequence", "update_time")
            or scratch not in ("_tmp", "_scratchPad")
        ):
            raise InvalidInput(
                'keys= is a list of columns, detection= is "sequence" or "update_time", scratch= "_tmp" or "_scratchPad".'
            )
        self._all_keys = keys
        self._detection, self._upserts, self._scratch = detection, upserts, scratch
        self._drop_timeout, self._drop_wait, self._drop_poll = drop_timeout, drop_wait, drop_poll
        try:
            self._announcement = None if partner is None else msgspec.json.encode(dict(partner))
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"partner= cannot be written as JSON: {error}") from error
        super().__init__(path, credential=credential, client=client, limit=limit, period=period)

    def _place(self, path: str) -> None:
        super()._place(path)
        self._item, zone, table = path.partition(f"/{_ZONE}")
        self._zone, self._table = f"{self._item}{zone}", table.lstrip("/")
        if not zone:
            raise InvalidInput(f"{self.url} is not in a landing zone, such as item/{_ZONE}/table.")
        places = [f"{self._item}/Files/_tmp/{self._table}", f"{self._zone}/_scratchPad/{self._table}"]
        self._control, self._other = places if self._scratch == "_tmp" else reversed(places)
        # A request that comes late would make a table again that was dropped.
        self._never_made = frozenset((self._path,))
        keys = self._all_keys.get(self._table) if isinstance(self._all_keys, Mapping) else self._all_keys
        self._keys = None if keys is None else tuple(keys)
        self._probed_keys = self._keys or ()

    async def probe(self) -> Capabilities:
        if not _TABLE.fullmatch(self._table):
            raise Unsupported(f"{self.url} is no table of a landing zone: name one, or open a child.")
        with mapped():
            await self._check_other()
        found = await super().probe()
        with mapped():
            there = await self._metadata()
        self._probed_keys = there.keyColumns if there is not None else ()
        if self._keys is not None:
            self._probed_keys = self._keys
        refused = {Mode.OVERWRITE_FILES, Mode.OVERWRITE_PARTITIONS}
        if not found.swaps_trees or "fenced" not in found.guarantees[Mode.FULL_DROP]:
            # A late rename could carry the new folder away, and drop the table.
            refused.add(Mode.FULL_DROP)
        guarantees = {mode: given for mode, given in found.guarantees.items() if mode not in refused}
        return replace(
            found, swaps_trees=True, clears=True, adds_only=True, keys=self._probed_keys, guarantees=guarantees
        )

    async def read(self, key: str) -> Record | None:
        found = await super().read(key)
        if found is None and key == _HEAD:
            with mapped():
                await self._check_other()
        return found

    async def _check_other(self) -> None:
        """Raise `Unsupported` where commits are kept in the other place: neither would know of the other's."""
        if await self._lake.head(f"{self._other}/{_HEAD}") is not None:
            raise Unsupported(
                f"The commits of {self.url} are kept in {self._other}; open it with that scratch=. Nothing was changed."
            )

    # ------------------------------------------------------------------------------------------------------ names and order

    async def arrange(
        self, tx: str, entries: Sequence[Entry], meta: Mapping[str, object], alive: Alive = idle, *, afresh: bool
    ) -> Arranged | None:
        with mapped():
            if afresh and self._drop_wait is None and not await self._can_tell_drops():
                raise StagingError(
                    f"The service says nothing of its tables for {self.url}; pass drop_wait=, the seconds to wait instead."
                )
            said = await self._metadata()
            first = [] if not entries or self._agrees(said, afresh=afresh) else [await self._stage_metadata(tx, said)]
            there = None if afresh else await self._lake.head(self._path)
            last = 0 if there is None else await self._last_index(meta, there.identity)
            folder = there or await self._new_folder(tx)
        for entry in entries:
            if entry.size == 0:
                raise StagingError(f"{entry.path!r} is empty: the service would wait for another file of that name.")
        if self._detection == "update_time":
            for entry in entries:
                if not _OURS.fullmatch(entry.path):
                    raise StagingError(f"{entry.path!r} may have been used before; leave names to the store.")
            return Arranged((*first, *entries), {})
        named = [_named(entry, index) for index, entry in enumerate(entries, last + 1)]
        remembered = {"index": last + len(named), "folder": folder.identity}
        # The lowest last: the service waits for it, and finds all of them.
        return Arranged((*first, *reversed(named)), {LAST_INDEX: remembered})

    async def _metadata(self) -> _Metadata | None:
        """What the table's `_metadata.json` says."""
        found = await self._lake.get(f"{self._path}/{METADATA}")
        if found is None:
            return None
        try:
            return msgspec.json.decode(found[0], type=_Metadata)
        except msgspec.MsgspecError as error:
            raise StorageError(f"{METADATA} of {self.url} is not what the service takes: {error}") from error

    def _wanted(self, keys: tuple[str, ...]) -> _Metadata:
        strategies: dict[str, Any] = {"sequence": "SequentialFileName", "update_time": "LastUpdateTimeFileDetection"}
        return _Metadata(keys, strategies[self._detection], self._upserts)

    def _agrees(self, there: _Metadata | None, *, afresh: bool) -> bool:
        """Whether the table has the metadata that is asked for; False where it has none, or will have none."""
        if there is None and self._keys is None:
            raise StagingError(f"{self.url} has no {METADATA} yet: pass keys=[…], or keys=[] for rows without keys.")
        if there is None or afresh:
            return False
        wanted = self._wanted(self._keys if self._keys is not None else there.keyColumns)
        if there != wanted or there.keyColumns != self._probed_keys:
            raise Conflict(
                f"The {METADATA} of {self.url} says {_said(there)}, and was opened with {_said(wanted)}. That cannot be "
                "changed but by a full_drop; where another process changed it, open the store again.",
                retryable=False,
            )
        return True

    async def _last_index(self, meta: Mapping[str, object], folder: str) -> int:
        """The last index that was ever given in this folder."""
        # In the order in which files move on, so that none is missed on its way.
        names = [name for place in _READ for name in await self._names(f"{self._path}{place}")]
        indexes = [int(name[:20]) for name in names if _INDEXED.fullmatch(name)]
        match meta.get(LAST_INDEX):
            # A folder that somebody else made anew begins at 1 again.
            case {"index": int(index), "folder": str(remembered)} if remembered == folder:
                indexes.append(index)
        return max(indexes, default=0)

    async def _stage_metadata(self, tx: str, there: _Metadata | None) -> Entry:
        keys = self._keys if self._keys is not None else there.keyColumns if there is not None else ()
        body = msgspec.json.encode(self._wanted(keys))
        identity = await self._lake.write(f"{self._tree(tx, sealed=True)}/{METADATA}", body, token_hex(12))
        return Entry(METADATA, len(body), identity, METADATA, rows=0)

    # -------------------------------------------------------------------------------------------------------------- publish

    async def publish(self, tx: str, entries: Sequence[Entry], replaces: Mapping[str, str]) -> Sequence[Answer]:
        await self._announce()
        first = 1 if entries and entries[0].path == METADATA else 0
        if first:
            await self._place_folder(tx)
        last = max(first, len(entries) - 1)
        answers: list[Answer] = []
        for batch in (entries[:first], entries[first:last], entries[last:]):
            if stuck := [answer for answer in answers if answer in (Answer.FOREIGN, Answer.LOST)]:
                # What comes later in this order would let the service read past what is missing.
                answers += stuck[:1] * len(batch)
                continue
            try:
                found = await super().publish(tx, batch, replaces)
            except StorageError as error:
                with mapped():
                    if await self._lake.head(self._path) is not None:
                        raise
                raise StorageError(
                    f"Somebody deleted the folder of {self.url}. Make an empty one, run recover(), and then a full_drop."
                ) from error
            answers += [
                Answer.ALREADY if answer is Answer.LOST and await self._is_read(entry) else answer
                for entry, answer in zip(batch, found, strict=True)
            ]
        return answers

    async def _is_read(self, entry: Entry) -> bool:
        """Whether there is evidence that the service has read a file that is neither staged nor in its place."""
        if entry.path == METADATA:
            return False
        with mapped():
            if await self._lake.head(f"{self._path}/{entry.path}") is not None:
                return False
            for place in _READ[1:]:
                there = await self._lake.head(f"{self._path}{place}/{entry.path}")
                if there is not None and there.identity == entry.identity:
                    return True
            # It is removed after seven days; what comes later in the sequence was not read before it.
            moved = [name for place in _READ[1:] for name in await self._names(f"{self._path}{place}")]
        return self._detection == "sequence" and any(_INDEXED.fullmatch(name) and name > entry.path for name in moved)

    async def _announce(self) -> None:
        """Say who publishes, if nobody did; the file belongs to all tables, and no commit depends on it."""
        if self._announcement is not None:
            try:
                await self._lake.put(f"{self._zone}/{PARTNER}", self._announcement, replaces=None)
            except Refused as error:
                _log.warning("%s could not be written: %s", PARTNER, error)

    # ---------------------------------------------------------------------------------------------------------- full_drop

    def _folder(self, tx: str) -> str:
        return f"{self._control}/{STAGING}/{tx}/folder"

    async def _new_folder(self, tx: str) -> Listed:
        """The table's next folder, staged while it is empty: by its identity it is known wherever it is."""
        name = self._folder(tx)
        if (there := await self._lake.head(name)) is None:
            await self._lake.make_directory(name)
            there = await self._lake.head(name)
        if there is None:
            raise StorageError(f"The staging of transaction {tx} is gone.")
        return there

    async def _place_folder(self, tx: str) -> None:
        """Give the table its first folder; it is moved and not made, so that this cannot happen again."""
        with mapped():
            new = None if await self._lake.head(self._path) is not None else await self._lake.head(self._folder(tx))
            # What is refused is seen by the files, which need it.
            if new is not None:
                await self._try_rename(new.path, new.identity, self._path)

    async def trees(self, tx: str, alive: Alive = idle) -> Trees:
        with mapped():
            new, target = await self._new_folder(tx), await self._lake.head(self._path)
        return Trees(new.identity, None if target is None else target.identity)

    async def swap(self, tx: str, trees: Trees, old: str, alive: Alive = idle) -> Answer:
        kept, new = f"{self._control}/old/{old}", self._folder(tx)
        why, since = "", kept
        with mapped():
            target = await self._lake.head(self._path)
            if target is not None and target.identity == trees.new:
                return Answer.ALREADY
            if target is not None and target.identity != trees.target:
                return Answer.FOREIGN
            staged = await self._lake.head(new)
            if staged is None or staged.identity != trees.new:
                return Answer.LOST
            if target is not None:
                await self._lake.make_directory(kept)
                if (refused := await self._try_rename(self._path, target.identity, f"{kept}/tree")) is not None:
                    why = f"its folder could not be put aside ({refused})"
            else:
                # Made when the folder was first seen to be gone: by its age it is known how long that is.
                since = f"{kept}/gone"
                await self._lake.make_directory(since)
                if not await self._is_dropped(await self._waited(since), was_there=trees.target is not None):
                    why = "the service has not dropped it"
                elif (refused := await self._try_rename(new, trees.new, self._path)) is not None:
                    why = f"its new folder could not be put in place ({refused})"
            if why and await self._waited(since) > self._drop_timeout:
                raise StorageError(
                    f"The full_drop of {self.url} waits since {self._drop_timeout:g} seconds: {why}.", retryable=True
                )
        until = anyio.current_time() + (self._drop_poll if why else 0)
        while (left := until - anyio.current_time()) > 0:
            await anyio.sleep(min(left, self._period / 8))
            await alive()
        return Answer.PENDING

    async def _can_tell_drops(self) -> bool:
        """Whether the service will say when the table is gone, or there is none to go."""
        there = await self._lake.head(f"{self._item}/{_TABLES}")
        return there is not None or await self._lake.head(self._path) is None

    async def _waited(self, since: str) -> float:
        return await self._lake.age(since) or 0.0

    async def _is_dropped(self, gone: float, *, was_there: bool) -> bool:
        """Whether the service no longer has the table, whose folder is gone for so many seconds."""
        if self._drop_wait is not None:
            return gone >= self._drop_wait
        tables = f"{self._item}/{_TABLES}"
        found, age = await self._lake.get(tables), await self._lake.age(tables)
        if found is None or age is None:
            return not was_there
        if was_there and age > gone:
            return False  # written before
        try:
            told = msgspec.json.decode(found[0], type=_Monitored)
        except msgspec.MsgspecError:
            return False  # it is being written
        schema, _, table = self._table.rpartition(".schema/")
        return all((listed.sourceSchemaName or "", listed.sourceTableName) != (schema, table) for listed in told.tables)


def _said(metadata: _Metadata) -> str:
    return msgspec.json.encode(metadata).decode()


def _named(entry: Entry, index: int) -> Entry:
    """An entry under its index."""
    name = f"{index:020d}.parquet"
    if entry.path != name and not _OURS.fullmatch(entry.path):
        raise StagingError(
            f"{entry.path!r} is not the sequence's next name, which is {name!r}; leave names to the store."
        )
    return replace(entry, path=name)
