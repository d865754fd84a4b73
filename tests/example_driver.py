"""A target in a dict of whole keys, the driver that the README shows."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence

from staged.driver import Driver, LogHandle, Record
from staged.errors import StagingError
from staged.model import Answer, Capabilities, Entry, Listed, Mode
from staged.states import new_id

Shelf = dict[str, tuple[str, bytes, float]]  # identity, content, time of writing


class DictDriver(Driver):
    def __init__(self, shelf: Shelf, name: str = "target", period: float = 30.0) -> None:
        self.shelf, self.name, self.period, self.url = shelf, name, period, f"dict:{name}"
        above, _, last = f"/{name}".rpartition("/")
        self.control = f"{above}/_staged/{last}/".lstrip("/")

    def put(self, key: str, data: bytes) -> str:
        identity = new_id()
        self.shelf[key] = (identity, data, time.monotonic())
        return identity

    def identity(self, key: str) -> str | None:
        return self.shelf[key][0] if key in self.shelf else None

    async def probe(self) -> Capabilities:
        promised = dict.fromkeys(Mode, frozenset({"serialised", "fenced", "no_gap"}))
        return Capabilities("consumed", swaps_trees=False, nests=False, period=self.period, guarantees=promised)

    def child(self, path: str) -> DictDriver:
        return DictDriver(self.shelf, f"{self.name}/{path}", self.period)

    async def read(self, key: str) -> Record | None:
        found = self.shelf.get(self.control + key)
        return Record(found[1], found[0]) if found else None

    async def cas(self, key: str, body: bytes, token: str | None, *, durable: bool) -> str | None:
        return self.put(self.control + key, body) if self.identity(self.control + key) == token else None

    async def put_segment(self, key: str, body: bytes) -> bool:
        return await self.cas(key, body, None, durable=False) is not None

    async def list_control(self, prefix: str) -> Sequence[str]:
        return [key[len(self.control) :] for key in self.shelf if key.startswith(self.control + prefix)]

    async def delete_control(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.shelf.pop(self.control + key, None)

    async def age(self, key: str) -> float | None:
        found = self.shelf.get(self.control + key)
        return time.monotonic() - found[2] if found else None

    async def stage(self, tx: str, path: str, log: LogHandle) -> DictWriter:
        handle = f"staged-{tx}-{new_id()}"
        await log(handle)
        return DictWriter(self, path, handle)

    async def seal(self, tx: str, entries: Collection[Entry]) -> None:
        for entry in entries:
            if self.identity(self.control + entry.handle) != entry.identity:
                raise StagingError(f"{entry.path!r} is no longer staged as it was recorded.")

    async def discard(self, tx: str, handles: Collection[str], *, whole: bool) -> None:
        await self.delete_control(list(handles))

    async def list(
        self, prefix: str = "", names: Collection[str] | None = None
    ) -> AsyncGenerator[Sequence[Listed], None]:
        start, below = f"{self.name}/", f"{self.name}/{prefix}/" if prefix else f"{self.name}/"
        found = {key[len(start) :]: one for key, one in self.shelf.items() if key.startswith(below)}
        yield [Listed(path, len(one[1]), one[0]) for path, one in found.items() if names is None or path in names]

    async def publish(self, tx: str, entries: Sequence[Entry], replaces: Mapping[str, str]) -> Sequence[Answer]:
        answers = []
        for entry in entries:
            source, goal = self.control + entry.handle, f"{self.name}/{entry.path}"
            there = self.identity(goal)
            if source not in self.shelf:
                answers.append(Answer.ALREADY if there == entry.identity else Answer.LOST)
            elif there not in (None, replaces.get(entry.path)):
                answers.append(Answer.FOREIGN)
            else:
                self.shelf[goal] = self.shelf.pop(source)
                answers.append(Answer.DONE)
        return answers

    async def remove(self, entries: Sequence[Listed]) -> Sequence[Answer]:
        answers = []
        for entry in entries:
            there = self.identity(f"{self.name}/{entry.path}")
            answers.append({None: Answer.ALREADY, entry.identity: Answer.DONE}.get(there, Answer.FOREIGN))
            if answers[-1] is Answer.DONE:
                del self.shelf[f"{self.name}/{entry.path}"]
        return answers


class DictWriter:
    def __init__(self, driver: DictDriver, path: str, handle: str) -> None:
        self.driver, self.path, self.handle, self.data = driver, path, handle, bytearray()

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        self.data += data

    async def close(self) -> Entry:
        identity = self.driver.put(self.driver.control + self.handle, bytes(self.data))
        return Entry(self.path, len(self.data), identity, self.handle)

    async def abort(self) -> None:
        await self.driver.delete_control([self.handle])
