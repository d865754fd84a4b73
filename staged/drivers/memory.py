"""A store in memory: no threads, no clock of its own, the same every time. For simulation, and for trying things out.

Several drivers over one `MemoryStorage` play several processes. What real backends differ in can be chosen, so that the
protocol is explored for each of their kinds before their drivers are written.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from staged import paths
from staged.driver import Alive, Driver, LogHandle, Record, idle
from staged.errors import Conflict, InvalidInput, InvalidPath, StagingError
from staged.model import Answer, Arranged, Capabilities, Entry, Guarantee, Listed, Mode, Trees
from staged.paths import RESERVED, fold, join

__all__ = ["MemoryDriver", "MemoryStorage", "Swap"]

Swap = Literal["exchange", "renames", "clears"]

_PAGE = 1_000


@dataclass(frozen=True, slots=True)
class _Blob:
    data: bytes
    identity: str


@dataclass(slots=True)
class _Upload:
    """A staged file; `blob` is None while it is being written."""

    path: str
    blob: _Blob | None = None


@dataclass(slots=True)
class MemoryStorage:
    """What outlives a process: everything that the drivers over it share, keyed by whole paths."""

    files: dict[str, _Blob] = field(default_factory=dict)
    records: dict[str, tuple[bytes, str, float]] = field(default_factory=dict)
    uploads: dict[str, dict[str, _Upload]] = field(default_factory=dict)
    trees: dict[str, str] = field(default_factory=dict)
    aside: dict[str, dict[str, _Blob]] = field(default_factory=dict)
    locks: dict[str, object] = field(default_factory=dict)
    count: int = 0

    def new_identity(self) -> str:
        """An identity that was never given before."""
        self.count += 1
        return f"i{self.count}"

    def put(self, path: str, data: bytes) -> None:
        """Write a file as a stranger would."""
        self.files[path] = _Blob(data, self.new_identity())

    def below(self, prefix: str) -> dict[str, bytes]:
        """The files below a directory, as a reader sees them."""
        start = join(prefix, "")
        start = f"{prefix}/" if prefix else start
        return {path[len(start) :]: blob.data for path, blob in self.files.items() if path.startswith(start)}

    def kill(self, driver: Driver) -> None:
        """What the operating system does when a process dies: drop its locks."""
        self.locks = {key: holder for key, holder in self.locks.items() if holder is not driver}


_named: dict[str, MemoryStorage] = {}


class MemoryDriver(Driver):
    """One process's view of a target in memory.

    Args:
        path: The target; `memory://name/…` shares one storage per first part within this process.
        storage: Instead of the shared one.
        fence: "lock" drops a dead process's hold at once; "consumed" tells death by silence.
        swap: How trees are swapped: in one step ("exchange", as local), in two ("renames", as ADLS), by putting the old
            one aside only ("clears", as Open Mirroring), or not at all.
        folds: Names that differ only in case or Unicode form are one.
        period: Seconds of silence after which a holder is taken for dead.
        step: Awaited before each single change, so that a simulation can stop in the middle of a bulk call.
    """

    def __init__(
        self,
        path: str = "target",
        *,
        storage: MemoryStorage | None = None,
        fence: Literal["lock", "consumed"] = "lock",
        swap: Swap | None = "exchange",
        folds: bool = False,
        period: float = 30.0,
        step: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        try:
            self._path = paths.parse(path.strip("/"))
        except InvalidPath:
            # What is wrong is not shown: the URL of another store may have come here, with a credential in it.
            raise InvalidInput("A target in memory has a plain path, such as memory://name/target.") from None
        self.url = f"memory://{self._path}"
        self._storage = storage if storage is not None else _named.setdefault(self._path.split("/")[0], MemoryStorage())
        self._fence: Literal["lock", "consumed"] = fence
        self._swap: Swap | None = swap
        self._folds = folds
        self._period = period
        self._step_hook = step
        above, _, name = self._path.rpartition("/")
        self._control = join(above, f"{RESERVED}/{name}")

    async def probe(self) -> Capabilities:
        always: list[Guarantee] = ["serialised", "fenced", "no_gap"]
        guarantees = dict.fromkeys(Mode, frozenset(always))
        if self._swap == "exchange":
            guarantees[Mode.FULL_DROP] = frozenset([*always, "one_generation"])
        elif self._swap == "renames":
            guarantees[Mode.FULL_DROP] = frozenset({"serialised", "fenced", "one_generation"})
        elif self._swap == "clears":
            guarantees[Mode.FULL_DROP] = frozenset({"serialised", "fenced"})
        return Capabilities(
            fence=self._fence,
            swaps_trees=self._swap is not None,
            clears=self._swap == "clears",
            folds=self._folds,
            period=self._period,
            guarantees=guarantees,
        )

    def child(self, path: str) -> MemoryDriver:
        return MemoryDriver(
            join(self._path, path),
            storage=self._storage,
            fence=self._fence,
            swap=self._swap,
            folds=self._folds,
            period=self._period,
            step=self._step_hook,
        )

    async def _step(self, what: str) -> None:
        if self._step_hook is not None:
            await self._step_hook(what)

    # ------------------------------------------------------------------------------------------------ the control area

    def _key(self, key: str) -> str:
        return f"{self._control}/{key}"

    async def read(self, key: str) -> Record | None:
        found = self._storage.records.get(self._key(key))
        return None if found is None else Record(found[0], found[1])

    async def cas(self, key: str, body: bytes, token: str | None, *, durable: bool) -> str | None:
        await self._step(f"swap {key}")
        found = self._storage.records.get(self._key(key))
        if (found[1] if found else None) != token:
            return None
        new = self._storage.new_identity()
        self._storage.records[self._key(key)] = (body, new, time.monotonic())
        return new

    async def put_segment(self, key: str, body: bytes) -> bool:
        await self._step(f"put {key}")
        if self._key(key) in self._storage.records:
            return False
        self._storage.records[self._key(key)] = (body, self._storage.new_identity(), time.monotonic())
        return True

    async def list_control(self, prefix: str) -> Sequence[str]:
        start, wanted = self._key(""), self._key(prefix)
        return sorted(key[len(start) :] for key in self._storage.records if key.startswith(wanted))

    async def delete_control(self, keys: Sequence[str]) -> None:
        for key in keys:
            await self._step(f"delete {key}")
            self._storage.records.pop(self._key(key), None)

    async def age(self, key: str) -> float | None:
        found = self._storage.records.get(self._key(key))
        return None if found is None else time.monotonic() - found[2]

    async def lock(self, key: str) -> _Lock | None:
        name = self._key(key)
        if name in self._storage.locks:
            return None
        self._storage.locks[name] = self
        return _Lock(self._storage, name, self)

    # ----------------------------------------------------------------------------------------------------------- staging

    def _uploads(self, tx: str) -> dict[str, _Upload]:
        return self._storage.uploads.get(self._key(tx), {})

    async def stage(self, tx: str, path: str, log: LogHandle) -> _Writer:
        handle = self._storage.new_identity()
        await log(handle)
        await self._step(f"stage {path}")
        self._storage.uploads.setdefault(self._key(tx), {})[handle] = _Upload(path)
        return _Writer(self, tx, path, handle)

    async def seal(self, tx: str, entries: Collection[Entry]) -> None:
        staged = self._uploads(tx)
        for entry in entries:
            upload = staged.get(entry.handle)
            if upload is None or upload.blob is None or upload.blob.identity != entry.identity:
                raise StagingError(f"{entry.path!r} is no longer staged as it was recorded.")
        if len(staged) != len(entries):
            raise StagingError("The staging holds what was not recorded.")

    async def arrange(
        self, tx: str, entries: Sequence[Entry], meta: Mapping[str, object], alive: Alive = idle, *, afresh: bool
    ) -> Arranged | None:
        # An order of its own, for one kind of store, so that what is arranged is explored as well.
        return Arranged(tuple(reversed(entries)), {}) if self._swap == "clears" else None

    async def discard(self, tx: str, handles: Collection[str], *, whole: bool) -> None:
        staged = self._uploads(tx)
        # Only what is named is found again, as with uploads that no listing shows.
        for handle in sorted(handles):
            await self._step(f"discard {handle}")
            staged.pop(handle, None)
        if not staged:
            self._storage.uploads.pop(self._key(tx), None)

    # -------------------------------------------------------------------------------------------------------- the target

    def _folded(self, path: str) -> str:
        return fold(path) if self._folds else path

    def _at(self, path: str) -> tuple[str, _Blob | None]:
        """Where a name is, as the store folds it."""
        whole = join(self._path, path)
        if self._folds and whole not in self._storage.files:
            whole = next((there for there in self._storage.files if fold(there) == fold(whole)), whole)
        return whole, self._storage.files.get(whole)

    async def list(
        self, prefix: str = "", names: Collection[str] | None = None
    ) -> AsyncGenerator[Sequence[Listed], None]:
        start = self._folded(f"{join(self._path, prefix)}/")
        base = len(self._path) + 1
        below = {path for path in self._storage.files if self._folded(path).startswith(start)}
        files = {path[base:]: self._storage.files[path] for path in below}
        found = [Listed(path, len(blob.data), blob.identity) for path, blob in sorted(files.items())]
        found += [
            Listed(key[base:], 0, "") for key in sorted(self._storage.records) if self._folded(key).startswith(start)
        ]
        found += [
            Listed(path, 0, "", is_dir=True) for path in sorted({up for path in files for up in paths.parents(path)})
        ]
        if names is not None:
            wanted = set(map(self._folded, names))
            found = [listed for listed in found if self._folded(listed.path) in wanted]
        for at in range(0, len(found), _PAGE):
            yield found[at : at + _PAGE]

    async def publish(self, tx: str, entries: Sequence[Entry], replaces: Mapping[str, str]) -> Sequence[Answer]:
        return [await self._publish(self._uploads(tx), entry, replaces.get(entry.path)) for entry in entries]

    async def _publish(self, staged: dict[str, _Upload], entry: Entry, expected: str | None) -> Answer:
        await self._step(f"publish {entry.path}")
        whole, there = self._at(entry.path)
        upload = staged.get(entry.handle)
        if upload is None or upload.blob is None:
            return Answer.ALREADY if there is not None and there.identity == entry.identity else Answer.LOST
        if there is not None and there.identity != expected:
            return Answer.FOREIGN
        self._storage.files[whole] = upload.blob
        staged.pop(entry.handle, None)
        return Answer.DONE

    async def remove(self, entries: Sequence[Listed]) -> Sequence[Answer]:
        return [await self._remove(entry) for entry in entries]

    async def _remove(self, entry: Listed) -> Answer:
        await self._step(f"remove {entry.path}")
        whole, there = self._at(entry.path)
        if there is None:
            return Answer.ALREADY
        if there.identity != entry.identity:
            return Answer.FOREIGN
        del self._storage.files[whole]
        return Answer.DONE

    # --------------------------------------------------------------------------------------------------------- tree swap

    def _tree(self) -> str | None:
        if self._path in self._storage.trees:
            return self._storage.trees[self._path]
        return "first" if self._storage.below(self._path) else None

    async def trees(self, tx: str, alive: Alive = idle) -> Trees:
        nested = next((key for key in self._storage.records if key.startswith(f"{self._path}/")), None)
        if nested is not None:
            raise Conflict.covering(nested)
        return Trees(f"tree-{tx}", self._tree())

    async def swap(self, tx: str, trees: Trees, old: str, alive: Alive = idle) -> Answer:
        await self._step("swap: the old tree aside")
        answer = self._swap_to_do(tx, trees)
        if answer is not None:
            return answer
        if self._tree() is not None:
            self._storage.aside[self._key(f"old/{old}")] = self._take()
            if self._swap == "clears":
                return Answer.PENDING
            if self._swap == "renames":
                await self._step("swap: the new tree in")
                answer = self._swap_to_do(tx, trees)
                if answer is not None:
                    return answer
        staged = {} if self._swap == "clears" else self._storage.uploads.pop(self._key(tx), {})
        self._storage.files.update(
            {join(self._path, upload.path): upload.blob for upload in staged.values() if upload.blob}
        )
        self._storage.trees[self._path] = trees.new
        self._storage.trees[self._key(f"swapped/{tx}")] = trees.new
        return Answer.DONE

    def _swap_to_do(self, tx: str, trees: Trees) -> Answer | None:
        """None where the swap, or its second half, is still to do."""
        now = self._tree()
        if now == trees.new:
            return Answer.ALREADY
        if self._key(f"swapped/{tx}") in self._storage.trees:
            return Answer.LOST
        return Answer.FOREIGN if now not in (None, trees.target) else None

    def _take(self) -> dict[str, _Blob]:
        start = f"{self._path}/"
        taken = {path: blob for path, blob in self._storage.files.items() if path.startswith(start)}
        for path in taken:
            del self._storage.files[path]
        self._storage.trees.pop(self._path, None)
        return taken

    async def trim(self, keep: int, older_than: float) -> int:
        start = self._key("old/")
        old = sorted(key for key in self._storage.aside if key.startswith(start))
        doomed = old[: max(0, len(old) - keep)]
        for key in doomed:
            await self._step(f"trim {key}")
            self._storage.aside.pop(key, None)
        return len(doomed)


class _Lock:
    def __init__(self, storage: MemoryStorage, name: str, holder: MemoryDriver) -> None:
        self._storage, self._name, self._holder = storage, name, holder

    def release(self) -> None:
        if self._storage.locks.get(self._name) is self._holder:
            del self._storage.locks[self._name]


class _Writer:
    def __init__(self, driver: MemoryDriver, tx: str, path: str, handle: str) -> None:
        self._driver, self._tx, self._path, self._handle = driver, tx, path, handle
        self._data = bytearray()

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        self._data += data

    async def close(self) -> Entry:
        await self._driver._step(f"close {self._path}")
        blob = _Blob(bytes(self._data), self._driver._storage.new_identity())
        upload = self._driver._uploads(self._tx).get(self._handle)
        if upload is None:
            raise StagingError(f"The upload of {self._path!r} was discarded.")
        upload.blob = blob
        return Entry(self._path, len(blob.data), blob.identity, self._handle)

    async def abort(self) -> None:
        await self._driver.discard(self._tx, [self._handle], whole=False)
