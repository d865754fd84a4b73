"""Azure Data Lake Storage Gen2: accounts with a hierarchical namespace.

Bytes are written by the Blob API, where one request writes a whole file or nothing and takes a condition; names are moved by
the Data Lake API, where one request renames a file or a tree. A rename keeps the ETag, so that the ETag of a staged file, or
of the staged tree, tells for ever whether it was published, however often a request was sent and whatever was answered.

    <parent>/_staged/<name>/head, tx/<id>.record, log/…, outcome/…   records and segments, one blob each
    <parent>/_staged/<name>/staging/<id>/tree/…                      what a transaction stages
    <parent>/_staged/<name>/staging/<id>/sealed/…                    the same once it is sealed
    <parent>/_staged/<name>/old/<commit>/tree/…                      trees that were swapped out
    <parent>/_staged/<name>/foreign/…                                what a stranger put into the gap of a swap
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from secrets import token_hex
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
from azure.storage.filedatalake.aio import DataLakeServiceClient

from staged.driver import Alive, Driver, LogHandle, Record, idle
from staged.drivers._azure import Location
from staged.drivers._blobs import block_id
from staged.drivers._cloud import MISSED, Parts, Refused, at_once, mapped
from staged.drivers._lake import Lake
from staged.errors import Conflict, StagingError, StorageError, Unsupported
from staged.model import Answer, Capabilities, Entry, Guarantee, Listed, Mode, Trees
from staged.paths import RESERVED, join

if TYPE_CHECKING:
    from staged.drivers._azure import Credential

__all__ = ["STAGING", "AdlsDriver"]

S = TypeVar("S")
T = TypeVar("T")

_TRIES = 4
"""Looks at the trees of a swap: two renames, and as many strangers in between."""
_PLAIN = "user::rwx,group::r-x,other::---"
"""The access control list of a directory for which none was ever set."""
STAGING = "staging"
"""Where the transactions' staging lies in the control area."""

_log = logging.getLogger("staged")


class AdlsDriver(Driver):
    """One target in a file system of an account.

    Args:
        path: `abfss://filesystem@account.dfs.core.windows.net/path`, or the same as `https://`; it may carry a SAS.
        credential: As the Azure SDK takes it: a token credential of `azure.identity.aio`, a SAS, an account key. By default
            `DefaultAzureCredential`. For trio a token credential needs a transport of its own.
        client: A client of the caller's, which stays open, in place of a credential.
        limit: At most so many requests at once; fewer while the service throttles.
        period: Seconds of silence after which a writer that commits is taken for dead.
    """

    rename_options: Mapping[str, Any] = MappingProxyType({})
    """What else the SDK is told at a rename."""
    own: Collection[str] = ()
    """Names under which the driver itself stages something once a transaction is sealed."""

    def __init__(
        self,
        path: str,
        *,
        credential: Credential | None = None,
        client: DataLakeServiceClient | None = None,
        limit: int = 16,
        period: float = 30.0,
    ) -> None:
        self._location = Location.parse(path)
        self._lake = Lake(self._location, credential, client, limit, self.rename_options)
        self._period, self._owner = period, True
        self._place(self._location.path)

    def _place(self, path: str) -> None:
        """Where the target and its control area are in the file system."""
        self._path = path
        self.url = f"abfss://{self._location.container}@{self._location.account.partition('://')[2]}/{path}"
        above, _, name = path.rpartition("/")
        self._inside = not self._can_be_renamed(path)
        self._control = join(path, f"{RESERVED}/{RESERVED}") if self._inside else join(above, f"{RESERVED}/{name}")
        self._never_made: frozenset[str] = frozenset()
        self._begun: set[str] = set()
        self._sealed: set[str] = set()
        self._beginning = anyio.Lock()

    def _can_be_renamed(self, path: str) -> bool:
        return bool(path)

    async def probe(self) -> Capabilities:
        with mapped():
            await self._check()
            there = await self._lake.head(self._path) if self._path else None
        if there is not None and not there.is_dir:
            raise Unsupported(f"{self.url} is a file; a target is a directory.")
        always: frozenset[Guarantee] = frozenset(("serialised", "fenced", "no_gap"))
        guarantees = dict.fromkeys(Mode, always)
        if not self._inside:
            # Between the two renames there is no target; and a listing of several pages may straddle them.
            guarantees[Mode.FULL_DROP] = always - {"no_gap"}
        return Capabilities(fence="consumed", swaps_trees=not self._inside, period=self._period, guarantees=guarantees)

    async def _check(self) -> None:
        """Raise `Unsupported` where this is no place for a target."""
        try:
            hierarchical = True
            if await self._lake.access("/") is None:
                raise Unsupported(f"There is no file system for {self.url}; create it first.")
        except Refused as error:
            if error.status == 403:
                hierarchical = await self._is_hierarchical()
            elif error.status == 400:
                hierarchical = False
            else:
                raise
        if not hierarchical:
            raise Unsupported(f"The account of {self.url} has no hierarchical namespace.")

    async def _is_hierarchical(self) -> bool:
        """What the account says of itself, for those who may not read access control lists."""
        try:
            return await self._lake.is_hierarchical()
        except Refused as error:
            if error.status != 403:
                raise
            _log.warning("Whether the account of %s has a hierarchical namespace may not be asked.", self.url)
            return True

    def child(self, path: str) -> AdlsDriver:
        child = object.__new__(type(self))
        vars(child).update(vars(self), _owner=False)
        child._place(join(self._path, path))
        return child

    async def aclose(self) -> None:
        if self._owner:
            await self._lake.aclose()

    # ------------------------------------------------------------------------------------------------ the control area

    def _key(self, key: str) -> str:
        # Each kind of record lies in one directory, so that none is left empty by what ended.
        kind, slash, rest = key.partition("/")
        return f"{self._control}/{kind}{slash}{rest.replace('/', '.')}"

    async def read(self, key: str) -> Record | None:
        with mapped():
            found = await self._lake.get(self._key(key))
        return None if found is None else Record(*found)

    async def cas(self, key: str, body: bytes, token: str | None, *, durable: bool) -> str | None:
        with mapped():
            return await self._lake.put(self._key(key), body, replaces=token)

    async def put_segment(self, key: str, body: bytes) -> bool:
        return await self.cas(key, body, None, durable=False) is not None

    async def list_control(self, prefix: str) -> Sequence[str]:
        kind, slash, _ = prefix.partition("/")
        with mapped():
            if slash:
                names = await self._names(f"{self._control}/{kind}")
                keys = [f"{kind}/{name.replace('.', '/')}" for name in names]
            else:
                keys = await self._names(self._control)
            if kind == "tx" and slash:
                # Staging whose record is gone is found by what lies there.
                keys += [f"tx/{name}/{STAGING}" for name in await self._names(f"{self._control}/{STAGING}", trees=True)]
        return sorted(key for key in keys if key.startswith(prefix))

    async def _names(self, directory: str, *, trees: bool = False) -> list[str]:
        """The names of the files, or of the directories, in a directory of the control area."""
        async with aclosing(self._lake.pages(directory, recursive=False)) as pages:
            return [found.path.rpartition("/")[2] async for page in pages for found in page if found.is_dir == trees]

    async def delete_control(self, keys: Sequence[str]) -> None:
        await self._delete_all([self._key(key) for key in keys if not key.endswith(f"/{STAGING}")])

    async def age(self, key: str) -> float | None:
        with mapped():
            return await self._lake.age(self._key(key))

    # ----------------------------------------------------------------------------------------------------------- staging

    def _tree(self, tx: str, *, sealed: bool) -> str:
        # What is sealed lies elsewhere than what is written: a request that comes late finds no name that counts.
        return f"{self._control}/{STAGING}/{tx}/{'sealed' if sealed else 'tree'}"

    async def stage(self, tx: str, path: str, log: LogHandle) -> _Writer:
        async with self._beginning:
            if tx not in self._begun:
                with mapped():
                    await self._take_over_access(self._tree(tx, sealed=False))
                self._begun.add(tx)
        # What is staged is found by its place: nothing is to be logged.
        return _Writer(self, tx, path)

    async def _take_over_access(self, tree: str) -> None:
        """Let a staging tree grant what the target does: files take over its defaults, and a swap puts it in place."""
        try:
            acl = await self._lake.access(self._path or "/")
            if acl is not None and acl != _PLAIN:
                await self._lake.make_directory(tree)
                await self._lake.set_access(tree, acl)
        except Refused as error:
            if error.status != 403:
                raise
            _log.warning("The access control of %s may not be taken over: %s", self.url, error)

    async def seal(self, tx: str, entries: Collection[Entry]) -> None:
        tree, sealed = self._tree(tx, sealed=False), self._tree(tx, sealed=True)
        left = {join(sealed, entry.path): entry for entry in entries}
        with mapped():
            there = await self._lake.head(tree) if await self._lake.head(sealed) is None else None
            if there is not None and (refused := await self._try_rename(tree, there.identity, sealed)) is not None:
                again = await self._lake.head(tree)
                if again is not None and again.identity == there.identity:
                    raise StorageError(f"{refused} What is staged is where it was.", retryable=True)
            self._sealed.add(tx)
            async with aclosing(self._lake.pages(sealed)) as pages:
                staged = [found async for page in pages for found in page if not found.is_dir]
        for found in staged:
            entry = left.pop(found.path, None)
            if entry is None and found.path in {join(sealed, name) for name in self.own}:
                continue
            if entry is None:
                raise StagingError(f"The staging holds {found.path!r}, which was not recorded.")
            if (entry.identity, entry.size) != (found.identity, found.size):
                raise StagingError(f"{entry.path!r} is no longer staged as it was recorded.")
        if left:
            raise StagingError(f"{next(iter(left.values())).path!r} is no longer staged.")

    async def discard(self, tx: str, handles: Collection[str], *, whole: bool) -> None:
        if not whole:
            tree = self._tree(tx, sealed=tx in self._sealed)
            await self._delete_all([join(tree, handle) for handle in handles])
            return
        self._begun.discard(tx)
        self._sealed.discard(tx)
        with mapped():
            await self._lake.delete_tree(f"{self._control}/{STAGING}/{tx}")

    async def _delete_all(self, names: Sequence[str]) -> None:
        with mapped():
            await self._at_once(names, lambda name: self._lake.delete(name, None))

    async def _at_once(self, items: Collection[S], work: Callable[[S], Awaitable[T]]) -> list[T]:
        return await at_once(list(items), work, self._lake.limit.most)

    # -------------------------------------------------------------------------------------------------------- the target

    async def list(
        self, prefix: str = "", names: Collection[str] | None = None
    ) -> AsyncGenerator[Sequence[Listed], None]:
        with mapped():
            if names is None:
                async with aclosing(self._lake.pages(join(self._path, prefix))) as pages:
                    async for page in pages:
                        yield [self._below(found) for found in page if not self._is_ours(found.path)]
            else:
                yield [self._below(found) for found in await self._find({join(self._path, name) for name in names})]

    async def _find(self, names: Collection[str]) -> Sequence[Listed]:
        """What has one of these names: a page of a listing costs one request, and so does a name."""
        found: dict[str, Listed] = {}
        left = 1 + len(names) // self._lake.limit.most
        async with aclosing(self._lake.pages(self._path)) as pages:
            async for page in pages:
                found |= {listed.path: listed for listed in page if listed.path in names}
                left -= 1
                if not left:
                    break
            else:
                return tuple(found.values())
        looked = await self._at_once(names, self._lake.head)
        return [listed for listed in looked if listed is not None]

    def _below(self, listed: Listed) -> Listed:
        return replace(listed, path=listed.path[len(self._path) + 1 if self._path else 0 :])

    def _is_ours(self, path: str) -> bool:
        # The control areas of other targets below lie beside ours, and are not.
        return self._inside and (path == join(self._path, RESERVED) or f"{path}/".startswith(f"{self._control}/"))

    async def publish(self, tx: str, entries: Sequence[Entry], replaces: Mapping[str, str]) -> Sequence[Answer]:
        made = set(self._never_made)
        self._sealed.add(tx)

        async def publish(entry: Entry) -> Answer:
            source, goal = join(self._tree(tx, sealed=True), entry.handle), join(self._path, entry.path)
            replaced = replaces.get(entry.path)
            try:
                await self._lake.rename(source, entry.identity, goal, replaced, made)
                return Answer.DONE
            except Refused as error:
                if error.status not in MISSED:
                    raise
                refused = error
            # Whatever was answered, and to which of several sendings: where things lie now is what counts.
            there = await self._lake.head(goal)
            if there is not None and there.identity == entry.identity:
                return Answer.ALREADY
            staged = await self._lake.head(source)
            if staged is None or staged.identity != entry.identity:
                return Answer.LOST
            if there is not None and there.identity != replaced:
                return Answer.FOREIGN
            if there is not None or replaced is None:
                raise refused  # for another reason, such as a lease
            # Somebody removed what it was to replace.
            await self._lake.rename(source, entry.identity, goal, None, made)
            return Answer.DONE

        with mapped():
            return await self._at_once(entries, publish)

    async def remove(self, entries: Sequence[Listed]) -> Sequence[Answer]:
        async def remove(entry: Listed) -> Answer:
            name = join(self._path, entry.path)
            try:
                return Answer.DONE if await self._lake.delete(name, entry.identity) else Answer.ALREADY
            except Refused as error:
                if error.status not in MISSED:
                    raise
                refused = error
            there = await self._lake.head(name)
            if there is not None and there.identity == entry.identity:
                raise refused  # for another reason, such as a lease
            return Answer.ALREADY if there is None else Answer.FOREIGN

        with mapped():
            return await self._at_once(entries, remove)

    # --------------------------------------------------------------------------------------------------------- tree swap

    async def trees(self, tx: str, alive: Alive = idle) -> Trees:
        sealed = self._tree(tx, sealed=True)
        with mapped():
            new, target = await self._lake.head(sealed), await self._lake.head(self._path)
            # Not sealed yet, when a plan is only looked at.
            new = new or await self._lake.head(self._tree(tx, sealed=False))
            if new is None and tx in self._sealed:  # nothing was staged
                await self._take_over_access(sealed)
                await self._lake.make_directory(sealed)
                new = await self._lake.head(sealed)
            if target is not None and (nested := await self._nested(alive)) is not None:
                raise Conflict.covering(nested)
        if new is None and tx in self._sealed:
            raise StorageError(f"The staging of transaction {tx} is gone.")
        return Trees("" if new is None else new.identity, None if target is None else target.identity)

    async def _nested(self, alive: Alive) -> str | None:
        """Something in the control area of another target below, if there is one."""
        async with aclosing(self._lake.pages(self._path)) as pages:
            async for page in pages:
                await alive()
                for found in map(self._below, page):
                    if RESERVED in found.path.split("/"):
                        return found.path
        return None

    async def swap(self, tx: str, trees: Trees, old: str, alive: Alive = idle) -> Answer:
        sealed, answer = self._tree(tx, sealed=True), Answer.ALREADY
        refused: Refused | None = None
        with mapped():
            for _ in range(_TRIES):
                target, staged = await self._lake.head(self._path), await self._lake.head(sealed)
                if target is not None and target.identity == trees.new:
                    return answer
                if staged is None or staged.identity != trees.new:
                    return Answer.LOST
                if target is not None:
                    aside = await self._aside(target, trees, old, alive)
                    if aside is None:
                        return Answer.FOREIGN
                    refused = await self._try_rename(self._path, target.identity, aside)
                # Nothing between the two renames, and ahead of all others: readers find no target meanwhile.
                refused = await self._try_rename(sealed, trees.new, self._path, urgent=True) or refused
                answer = Answer.DONE
            if refused is not None:
                raise refused
        return Answer.FOREIGN

    async def _aside(self, target: Listed, trees: Trees, old: str, alive: Alive) -> str | None:
        """Where to put what is in the target's place; None where it was not to be replaced."""
        # In a directory made for it, whose age is that of the swap: a tree keeps its own.
        aside = f"{self._control}/old/{old}/tree"
        if target.identity == trees.target:
            if await self._nested(alive) is not None:
                return None  # a target that was begun below since the plan was made would be carried away
            await self._lake.make_directory(f"{self._control}/old/{old}")
            return aside
        moved = await self._lake.head(aside)
        if moved is None or moved.identity != trees.target:
            return None
        # A stranger came while there was no target.
        foreign = f"{self._control}/foreign/{token_hex(12)}"
        _log.warning("Something foreign came to %s during a commit; it is kept at %s.", self.url, foreign)
        return foreign

    async def _try_rename(self, source: str, identity: str, goal: str, *, urgent: bool = False) -> Refused | None:
        """Rename, and return what was answered instead, if anything: the caller looks where things are."""
        try:
            await self._lake.rename(source, identity, goal, None, set(), urgent=urgent)
        except Refused as error:
            if error.status not in MISSED:
                raise
            return error
        return None

    async def trim(self, keep: int, older_than: float) -> int:
        with mapped():
            old = [
                f"{self._control}/old/{name}" for name in sorted(await self._names(f"{self._control}/old", trees=True))
            ]
            doomed = old[: max(0, len(old) - keep)]
            if older_than:
                ages = await self._at_once(doomed, self._lake.age)
                doomed = [name for name, age in zip(doomed, ages, strict=True) if age is not None and age >= older_than]
            await self._at_once(doomed, self._lake.delete_tree)
        return len(doomed)


class _Writer:
    """Writes one staged file: in one request where it is small, else in blocks of which nothing shows until the last one."""

    def __init__(self, driver: AdlsDriver, tx: str, path: str) -> None:
        self._lake, self._path = driver._lake, path
        self._name = join(driver._tree(tx, sealed=False), path)
        self._id = token_hex(12)
        self._blocks = Parts(self._send)
        self._sent = False

    async def _send(self, number: int, body: bytes) -> str:
        block = block_id(self._id, number)
        await self._lake.stage_block(self._name, block, body)
        return block

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        with mapped():
            await self._blocks.write(data)

    async def close(self) -> Entry:
        if self._blocks.sent and self._blocks.rest():
            with mapped():
                await self._blocks.flush()
        self._sent = True
        with mapped():
            identity = await self._lake.write(self._name, self._blocks.sent or self._blocks.rest(), self._id)
        # Found again by its path, in whichever tree its transaction is.
        return Entry(self._path, self._blocks.size, identity, self._path)

    async def abort(self) -> None:
        # Blocks that were never put together are nowhere to be seen, and expire.
        if self._sent:
            with mapped():
                there = await self._lake.head(self._name, write=self._id)
                if there is not None:
                    await self._lake.delete(self._name, there.identity)
