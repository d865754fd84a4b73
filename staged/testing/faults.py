"""A driver around any driver, whose every call can be stopped, failed, lost, delayed or repeated.

By a gate: a function of yours, awaited before and after each call, that does what it likes. By plan: `"loses@7 replays@9+3"`
loses the answer of the eighth call, and repeats the tenth three calls later. By seed: faults at random, the same every time;
`str(driver.plan)` is the plan that they came to, in one line that plays them again.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal, TypeVar

import anyio

from staged.driver import Alive, Driver, Lock, LogHandle, Record, Writer, idle
from staged.errors import InvalidInput, StagedError, StorageError
from staged.model import Answer, Arranged, Capabilities, Entry, Listed, Trees

__all__ = ["FAULTS", "Crash", "Fault", "FaultDriver", "Gate", "Kind", "Moment", "Plan"]

T = TypeVar("T")

Moment = Literal["before", "after", "within"]
"""Of a call: before anything happened, after it was applied but before its caller hears of it, or between two changes."""

Gate = Callable[[str, Moment], Awaitable[None]]
"""Awaited at each moment with the call's name. Raising `StorageError` fails the call (after: its answer is lost)."""

Kind = Literal["fails", "loses", "hangs", "delays", "repeats", "replays"]
"""What befalls a call.

- `fails`: an error, and nothing was done.
- `loses`: it is done, and its answer is lost: an error.
- `hangs`: nothing is done, and no answer comes.
- `delays`: it starts only after so many seconds.
- `repeats`: an SDK sends it twice, and the second answer is the one that counts.
- `replays`: it is done, and a network sends it once more so many calls later.
"""

FAULTS: tuple[Kind, ...] = ("fails", "loses", "hangs", "delays", "repeats", "replays")


class Crash(BaseException):
    """The process died here: nothing of it runs any more, and no handler of the code under test catches it."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: what befalls the call of that number (from 0); `amount` is seconds for `delays`, calls for `replays`."""

    kind: Kind
    call: int
    amount: int = 0

    def __str__(self) -> str:
        return f"{self.kind}@{self.call}" + (f"+{self.amount}" if self.amount else "")

    @classmethod
    def parse(cls, text: str) -> Fault:
        """A fault from its text.

        Raises:
            InvalidInput: It is not one.
        """
        name, _, rest = text.partition("@")
        call, _, amount = rest.partition("+")
        kind: Kind | None = next((kind for kind in FAULTS if kind == name), None)
        if kind is None or not call.isdigit() or not (amount or "0").isdigit():
            raise InvalidInput(f"{text!r} is no fault; one is such as 'loses@7' or 'replays@9+3'.")
        return cls(kind, int(call), int(amount or 0))


class Plan:
    """Faults by the number of the call that they befall; `str` gives the text that makes it again."""

    def __init__(self, text: str = "") -> None:
        self._faults = {fault.call: fault for fault in map(Fault.parse, text.split())}

    @classmethod
    def seeded(cls, seed: int, *, calls: int, rate: float, kinds: Sequence[Kind] = FAULTS) -> Plan:
        """A plan over the first `calls` calls, each befallen by something with a probability of `rate`."""
        chance = random.Random(seed)
        plan = cls()
        for call in range(calls):
            if chance.random() < rate:
                kind = chance.choice(kinds)
                amount = {"delays": chance.choice((1, 20, 100)), "replays": chance.randrange(1, 30)}.get(kind, 0)
                plan._faults[call] = Fault(kind, call, amount)
        return plan

    def __str__(self) -> str:
        return " ".join(map(str, self._faults.values()))

    def at(self, call: int) -> Fault | None:
        """What befalls a call."""
        return self._faults.get(call)


async def _pass(name: str, moment: Moment) -> None:
    """The gate that is always open."""


class FaultDriver(Driver):
    """Passes every call on; a gate and a plan decide what befalls it.

    Args:
        gate: Awaited before and after each call.
        plan: Faults by number of call, or their text. Locks and staged writers are not repeated or replayed: they are no
            requests that a network could send again.

    Attributes:
        calls: The names of all calls so far.
    """

    def __init__(self, inner: Driver, gate: Gate = _pass, plan: Plan | str = "") -> None:
        self.inner = inner
        self.url = inner.url
        self.plan = Plan(plan) if isinstance(plan, str) else plan
        self.calls: list[str] = []
        self._gate = gate
        self._late: list[tuple[int, Callable[[], Awaitable[object]]]] = []

    async def _through(self, name: str, call: Callable[[], Awaitable[T]], *, sent: bool = True) -> T:
        """Make a call; `sent` says that it is a request, which may be sent again."""
        await self._gate(name, "before")
        number = len(self.calls)
        self.calls.append(name)
        await self._replay(number)
        fault = self.plan.at(number)
        kind = fault.kind if fault is not None else None
        if kind == "fails":
            raise StorageError(f"Call {number}, {name}, fails.", retryable=True)
        if kind == "hangs":
            await anyio.sleep_forever()
        if fault is not None and kind == "delays":
            await anyio.sleep(fault.amount)
        result = await call()
        if sent and kind == "repeats":
            result = await call()
        if sent and fault is not None and kind == "replays":
            self._late.append((number + fault.amount, call))
        if kind == "loses":
            raise StorageError(f"The answer of call {number}, {name}, is lost.", retryable=True)
        await self._gate(name, "after")
        return result

    async def arrive(self) -> None:
        """Let every replay arrive that is still under way, as it may after the death of its sender."""
        await self._replay(None)

    async def _replay(self, number: int | None) -> None:
        due = [call for at, call in self._late if number is None or at <= number]
        self._late = [(at, call) for at, call in self._late if number is not None and at > number]
        for call in due:
            try:
                await call()
            except StagedError:
                pass  # nobody waits for this answer

    async def probe(self) -> Capabilities:
        return await self._through("probe", self.inner.probe)

    def child(self, path: str) -> Driver:
        return FaultDriver(self.inner.child(path), self._gate)

    async def aclose(self) -> None:
        await self.inner.aclose()

    async def read(self, key: str) -> Record | None:
        return await self._through(f"read {key}", lambda: self.inner.read(key))

    async def cas(self, key: str, body: bytes, token: str | None, *, durable: bool) -> str | None:
        return await self._through(f"cas {key}", lambda: self.inner.cas(key, body, token, durable=durable))

    async def put_segment(self, key: str, body: bytes) -> bool:
        return await self._through(f"put_segment {key}", lambda: self.inner.put_segment(key, body))

    async def list_control(self, prefix: str) -> Sequence[str]:
        return await self._through(f"list_control {prefix}", lambda: self.inner.list_control(prefix))

    async def delete_control(self, keys: Sequence[str]) -> None:
        await self._through("delete_control", lambda: self.inner.delete_control(keys))

    async def age(self, key: str) -> float | None:
        return await self._through(f"age {key}", lambda: self.inner.age(key))

    async def lock(self, key: str) -> Lock | None:
        lock: Lock | None = None

        async def take() -> None:
            nonlocal lock
            lock = await self.inner.lock(key)

        try:
            await self._through(f"lock {key}", take, sent=False)
        except BaseException:
            # A call that raises holds nothing: a driver gives back what its caller will not hear of.
            if lock is not None:
                lock.release()
            raise
        return lock

    async def stage(self, tx: str, path: str, log: LogHandle) -> Writer:
        inner = await self._through(f"stage {path}", lambda: self.inner.stage(tx, path, log), sent=False)
        return _FaultWriter(self, inner, path)

    async def seal(self, tx: str, entries: Collection[Entry]) -> None:
        await self._through("seal", lambda: self.inner.seal(tx, entries))

    async def discard(self, tx: str, handles: Collection[str], *, whole: bool) -> None:
        await self._through("discard", lambda: self.inner.discard(tx, handles, whole=whole))

    async def arrange(
        self, tx: str, entries: Sequence[Entry], meta: Mapping[str, object], alive: Alive = idle, *, afresh: bool
    ) -> Arranged | None:
        return await self._through("arrange", lambda: self.inner.arrange(tx, entries, meta, alive, afresh=afresh))

    async def scratch(self, tx: str) -> str | None:
        return await self._through("scratch", lambda: self.inner.scratch(tx), sent=False)

    async def adopt(self, tx: str, root: str, paths: Sequence[str]) -> Sequence[Entry]:
        return await self._through("adopt", lambda: self.inner.adopt(tx, root, paths), sent=False)

    async def list(
        self, prefix: str = "", names: Collection[str] | None = None
    ) -> AsyncGenerator[Sequence[Listed], None]:
        async def pages() -> list[Sequence[Listed]]:
            async with aclosing(self.inner.list(prefix, names)) as found:
                return [page async for page in found]

        for page in await self._through(f"list {prefix}", pages):
            yield page

    async def publish(self, tx: str, entries: Sequence[Entry], replaces: Mapping[str, str]) -> Sequence[Answer]:
        return await self._through("publish", lambda: self.inner.publish(tx, entries, replaces))

    async def remove(self, entries: Sequence[Listed]) -> Sequence[Answer]:
        return await self._through("remove", lambda: self.inner.remove(entries))

    async def trees(self, tx: str, alive: Alive = idle) -> Trees:
        return await self._through("trees", lambda: self.inner.trees(tx, alive))

    async def swap(self, tx: str, trees: Trees, old: str, alive: Alive = idle) -> Answer:
        return await self._through("swap", lambda: self.inner.swap(tx, trees, old, alive))

    async def trim(self, keep: int, older_than: float) -> int:
        return await self._through("trim", lambda: self.inner.trim(keep, older_than))


class _FaultWriter:
    def __init__(self, driver: FaultDriver, inner: Writer, path: str) -> None:
        self._driver, self._inner, self._path = driver, inner, path

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        await self._driver._through(f"write {self._path}", lambda: self._inner.write(data), sent=False)

    async def close(self) -> Entry:
        return await self._driver._through(f"close {self._path}", self._inner.close, sent=False)

    async def abort(self) -> None:
        await self._driver._through(f"abort {self._path}", self._inner.abort, sent=False)
