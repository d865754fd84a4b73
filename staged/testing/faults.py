"""A driver around any driver, whose every call can be stopped, failed or lost."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from typing import Literal, TypeVar

from staged.driver import Driver, Lock, LogHandle, Record, Writer
from staged.model import Answer, Capabilities, Entry, Listed, Trees

__all__ = ["Crash", "FaultDriver", "Gate", "Moment"]

T = TypeVar("T")

Moment = Literal["before", "after", "within"]
"""Of a call: before anything happened, after it was applied but before its caller hears of it, or between two changes."""

Gate = Callable[[str, Moment], Awaitable[None]]
"""Awaited at each moment with the call's name. Raising `StorageError` fails the call (after: its answer is lost)."""


class Crash(BaseException):
    """The process died here: nothing of it runs any more, and no handler of the code under test catches it."""


class FaultDriver(Driver):
    """Passes every call on, and asks a gate before and after it."""

    def __init__(self, inner: Driver, gate: Gate) -> None:
        self.inner = inner
        self.url = inner.url
        self._gate = gate

    async def _through(self, name: str, call: Awaitable[T]) -> T:
        try:
            await self._gate(name, "before")
        except BaseException:
            close = getattr(call, "close", None)  # a coroutine that is never awaited would complain
            if close is not None:
                close()
            raise
        result = await call
        await self._gate(name, "after")
        return result

    async def probe(self) -> Capabilities:
        return await self._through("probe", self.inner.probe())

    def child(self, path: str) -> Driver:
        return FaultDriver(self.inner.child(path), self._gate)

    async def aclose(self) -> None:
        await self.inner.aclose()

    async def read(self, key: str) -> Record | None:
        return await self._through(f"read {key}", self.inner.read(key))

    async def cas(self, key: str, body: bytes, token: str | None, *, durable: bool) -> str | None:
        return await self._through(f"cas {key}", self.inner.cas(key, body, token, durable=durable))

    async def put_segment(self, key: str, body: bytes) -> bool:
        return await self._through(f"put_segment {key}", self.inner.put_segment(key, body))

    async def list_control(self, prefix: str) -> Sequence[str]:
        return await self._through(f"list_control {prefix}", self.inner.list_control(prefix))

    async def delete_control(self, keys: Sequence[str]) -> None:
        await self._through("delete_control", self.inner.delete_control(keys))

    async def age(self, key: str) -> float | None:
        return await self._through(f"age {key}", self.inner.age(key))

    async def lock(self, key: str) -> Lock | None:
        return await self._through(f"lock {key}", self.inner.lock(key))

    async def stage(self, tx: str, path: str, log: LogHandle) -> Writer:
        return _FaultWriter(self, await self._through(f"stage {path}", self.inner.stage(tx, path, log)), path)

    async def seal(self, tx: str, entries: Collection[Entry]) -> None:
        await self._through("seal", self.inner.seal(tx, entries))

    async def discard(self, tx: str, handles: Collection[str], *, whole: bool) -> None:
        await self._through("discard", self.inner.discard(tx, handles, whole=whole))

    async def scratch(self, tx: str) -> str | None:
        return await self._through("scratch", self.inner.scratch(tx))

    async def adopt(self, tx: str, root: str, paths: Sequence[str]) -> Sequence[Entry]:
        return await self._through("adopt", self.inner.adopt(tx, root, paths))

    async def list(
        self, prefix: str = "", names: Collection[str] | None = None
    ) -> AsyncGenerator[Sequence[Listed], None]:
        await self._gate(f"list {prefix}", "before")
        async with aclosing(self.inner.list(prefix, names)) as pages:
            async for page in pages:
                yield page
        await self._gate(f"list {prefix}", "after")

    async def publish(self, tx: str, entries: Sequence[Entry], replaces: Mapping[str, str]) -> Sequence[Answer]:
        return await self._through("publish", self.inner.publish(tx, entries, replaces))

    async def remove(self, entries: Sequence[Listed]) -> Sequence[Answer]:
        return await self._through("remove", self.inner.remove(entries))

    async def trees(self, tx: str) -> Trees:
        return await self._through("trees", self.inner.trees(tx))

    async def swap(self, tx: str, trees: Trees, old: str) -> Answer:
        return await self._through("swap", self.inner.swap(tx, trees, old))

    async def trim(self, keep: int, older_than: float) -> int:
        return await self._through("trim", self.inner.trim(keep, older_than))


class _FaultWriter:
    def __init__(self, driver: FaultDriver, inner: Writer, path: str) -> None:
        self._driver, self._inner, self._path = driver, inner, path

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        await self._driver._through(f"write {self._path}", self._inner.write(data))

    async def close(self) -> Entry:
        return await self._driver._through(f"close {self._path}", self._inner.close())

    async def abort(self) -> None:
        await self._driver._through(f"abort {self._path}", self._inner.abort())
