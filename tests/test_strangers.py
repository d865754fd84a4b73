"""Others who write into the target, or into the control area, at any moment of a commit, without asking anybody.

A stranger acts once, before the n-th call of the driver. What the target then holds must be explained by one of two
orders: the stranger was first, or we were. Bytes that a stranger wrote are gone only where that is declared:

- the plan had seen them, and the mode replaces what it finds,
- somebody said `resolve="replace"`,
- a tree swap carried them aside together with the old tree, where `keep_old` and `gc` look after them.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import anyio
import anyio.to_thread
import pytest

from staged import CommitBlocked, CommitIncomplete, StagedError, open_store
from staged.driver import Driver
from staged.drivers.local import LocalDriver
from staged.drivers.memory import MemoryDriver, MemoryStorage
from staged.model import Mode
from staged.testing.exploration import Files, Work
from staged.testing.faults import FaultDriver, Moment

pytestmark = pytest.mark.anyio

T = TypeVar("T")
Figure = Callable[[str, str], None]
Replaced = Callable[[Path, Path], None]
Spoil = Literal["delete", "truncate", "garbage"]
SPOILS: tuple[Spoil, ...] = ("delete", "truncate", "garbage")
Place = Literal["beside", "inside"]
PLACES: tuple[Place, ...] = ("beside", "inside")

SOAK = int(os.environ.get("STAGED_SOAK", "1"))
KINDS: dict[str, Callable[[MemoryStorage], MemoryDriver]] = {
    "exchange under a lock": lambda storage: MemoryDriver(storage=storage),
    "entries under a lock": lambda storage: MemoryDriver(storage=storage, swap=None),
    "two renames, fenced by consuming": lambda storage: MemoryDriver(
        storage=storage, fence="consumed", swap="renames", period=0.0
    ),
    "entries, fenced by consuming": lambda storage: MemoryDriver(
        storage=storage, fence="consumed", swap=None, period=0.0
    ),
}
PRIOR: Files = {"p=0/f0": b"old", "p=1/f1": b"old", "old-3": b"3"}
FOREIGN = b"foreign"
WORKS = (
    Work(Mode.APPEND, (("p=0/new", b"ours"), ("top", b"ours"))),
    Work(Mode.OVERWRITE_FILES, (("p=0/f0", b"ours"), ("top", b"ours")), deletes=("old-3",)),
    Work(Mode.OVERWRITE_PARTITIONS, (("p=0/new", b"ours"), ("p=2/new", b"ours"))),
    Work(Mode.FULL_DROP, (("p=0/f0", b"ours"), ("top", b"ours"))),
    Work(Mode.ERROR, (("p=0/new", b"ours"), ("top", b"ours"))),
)


def prior_of(work: Work) -> Files:
    return {} if work.mode is Mode.ERROR else PRIOR


# ----------------------------------------------------------------------------------------------------------- the worlds


class World:
    """A target with its prior content, which processes and strangers share."""

    def driver(self) -> Driver:
        raise NotImplementedError

    def read(self) -> Files:
        raise NotImplementedError

    def aside(self) -> list[bytes]:
        """What lies in trees that were swapped out."""
        raise NotImplementedError

    def put(self, name: str, data: bytes) -> None:
        raise NotImplementedError

    def delete(self, name: str) -> None:
        raise NotImplementedError

    def records(self) -> list[str]:
        """The keys in the control area, with the files that are staged."""
        raise NotImplementedError

    def spoil(self, key: str, how: Spoil) -> None:
        raise NotImplementedError

    async def call(self, work: Callable[[], object]) -> None:
        work()


class InMemory(World):
    def __init__(self, kind: str, prior: Files) -> None:
        self.kind = kind
        self.storage = MemoryStorage()
        for name, data in prior.items():
            self.storage.put(f"target/{name}", data)

    def driver(self) -> MemoryDriver:
        return KINDS[self.kind](self.storage)

    def read(self) -> Files:
        return self.storage.below("target")

    def aside(self) -> list[bytes]:
        return [blob.data for tree in self.storage.aside.values() for blob in tree.values()]

    def put(self, name: str, data: bytes) -> None:
        self.storage.put(f"target/{name}", data)

    def delete(self, name: str) -> None:
        self.storage.files.pop(f"target/{name}", None)

    def records(self) -> list[str]:
        staged = [f"staged {tx}" for tx, uploads in self.storage.uploads.items() if uploads]
        return [*self.storage.records, *staged]

    def spoil(self, key: str, how: Spoil) -> None:
        if key.startswith("staged "):
            del self.storage.uploads[key.removeprefix("staged ")]
            return
        body, _, age = self.storage.records.pop(key)
        bad = {"truncate": body[: len(body) // 2], "garbage": b"garbage"}
        if how != "delete":
            self.storage.records[key] = (bad[how], self.storage.new_identity(), age)


class OnDisk(World):
    """A local directory with its control area beside it, or inside it: then sets are moved file by file."""

    def __init__(self, root: Path, place: Place, prior: Files) -> None:
        self.target = root / "target"
        self.area = self.target / "_staged" / "_staged" if place == "inside" else root / "_staged" / "target"
        for name, data in prior.items():
            self.put(name, data)
        if place == "inside":
            self.area.mkdir(parents=True)

    def driver(self) -> LocalDriver:
        return LocalDriver(str(self.target), durability="none")

    def _files(self, root: Path) -> Iterator[Path]:
        for directory, _, names in os.walk(root):
            yield from (Path(directory, name) for name in names)

    def read(self) -> Files:
        found = {path.relative_to(self.target).as_posix(): path.read_bytes() for path in self._files(self.target)}
        return {name: data for name, data in found.items() if not name.startswith("_staged/")}

    def aside(self) -> list[bytes]:
        return [path.read_bytes() for path in self._files(self.area / "old")]

    def put(self, name: str, data: bytes) -> None:
        path = self.target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(".new").write_bytes(data)  # another inode, as an editor writes
        path.with_name(".new").rename(path)

    def delete(self, name: str) -> None:
        (self.target / name).unlink(missing_ok=True)

    def records(self) -> list[str]:
        return [str(path.relative_to(self.area)) for path in self._files(self.area)]

    def spoil(self, key: str, how: Spoil) -> None:
        path = self.area / key
        if how == "delete":
            path.unlink()
        elif how == "truncate":
            os.truncate(path, path.stat().st_size // 2)
        else:
            path.write_bytes(b"garbage")

    async def call(self, work: Callable[[], object]) -> None:
        await anyio.to_thread.run_sync(work)


# ---------------------------------------------------------------------------------------------------------- one history


class Stranger:
    """A gate that lets somebody act before the n-th call, and remembers the calls."""

    def __init__(self, world: World, number: int, act: Callable[[], object]) -> None:
        self._world, self._number, self.act = world, number, act
        self.calls: list[str] = []

    async def __call__(self, name: str, moment: Moment) -> None:
        if moment != "before":
            return
        if len(self.calls) == self._number:
            await self._world.call(self.act)
        self.calls.append(name)

    @property
    def acted(self) -> bool:
        return len(self.calls) > self._number

    @property
    def seen(self) -> bool:
        """Whether the plan was made from a look at the target that came later."""
        return any(call.startswith(("list ", "trees")) for call in self.calls[self._number :])


@dataclass(slots=True)
class Told:
    """What the writer was told."""

    said: str
    error: StagedError | None = None
    tx: str | None = None


async def attempt(driver: Driver, work: Work) -> Told:
    told = Told("committed")
    try:
        async with open_store(driver).staged_write(work.mode, lock_timeout=1) as tx:
            told.tx = tx.id
            for name, data in work.files:
                await tx.write(name, data)
            for name in work.deletes:
                await tx.delete(name)
    except StagedError as error:
        told.said, told.error = error.outcome, error
    return told


# ------------------------------------------------------------------------------------- strangers who write into the target


@dataclass(frozen=True, slots=True)
class Act:
    """What a stranger does to the target, and the same on plain dicts."""

    name: str
    do: Callable[[World], object]
    apply: Callable[[Files], Files]
    writes: bool = True


def put(name: str) -> Act:
    return Act(f"puts {name}", lambda world: world.put(name, FOREIGN), lambda files: files | {name: FOREIGN})


def delete(name: str) -> Act:
    def without(files: Files) -> Files:
        return {there: data for there, data in files.items() if there != name}

    return Act(f"deletes {name}", lambda world: world.delete(name), without, writes=False)


def acts(work: Work) -> list[Act]:
    """Under a name that is published, on a file that is replaced, removed or kept, and beside them all."""
    names = dict.fromkeys([work.files[0][0], work.files[-1][0], *prior_of(work), "p=0/strange", "strange"])
    return [*map(put, names), *map(delete, prior_of(work))]


def orders(work: Work, act: Act) -> tuple[list[Files], Files]:
    """What the target may hold after a commit, and what after none."""
    prior = prior_of(work)
    mild = replace(work, deletes=())  # a file to delete that is gone already is as good as deleted
    after_us = [act.apply(new) for new in (work.apply(prior),) if new is not None]
    before_us = [new for kind in (work, mild) if (new := kind.apply(act.apply(prior))) is not None]
    return after_us + before_us, act.apply(prior)


async def check(world: World, work: Work, act: Act, number: int, resolve: Literal["keep", "replace"]) -> str | None:
    """One history; how it ended, or None where the commit has no such call."""
    stranger = Stranger(world, number, lambda: act.do(world))
    told = await attempt(FaultDriver(world.driver(), stranger), work)
    if not stranger.acted:
        return None
    where = f"{work}, before {stranger.calls[number]} a stranger {act.name}: {told.error}"
    committed, untouched = orders(work, act)
    store = open_store(world.driver())
    if isinstance(told.error, CommitBlocked):
        assert FOREIGN in world.read().values(), where
        with pytest.raises(CommitBlocked):
            await store.recover()
        assert FOREIGN in world.read().values(), where
        recovered = await store.recover(resolve=resolve)
        assert recovered.finished == (told.tx,), where
        if resolve == "replace":  # as if the mode were to replace namesakes
            committed = [*committed, untouched | dict(work.files)]
    else:
        await store.recover()
    seen = world.read()
    assert seen in {"untouched": [untouched], "committed": committed}[told.said], f"{where}: {seen}"
    if act.writes and FOREIGN not in seen.values():
        replaced = isinstance(told.error, CommitBlocked) and resolve == "replace"
        assert stranger.seen or replaced or FOREIGN in world.aside(), f"{where}: lost silently"
    if isinstance(told.error, CommitBlocked) and resolve == "keep":
        assert FOREIGN in seen.values(), where
    if told.tx is not None:
        state = (await store.outcome(told.tx)).state
        assert (state == "committed") == (told.said == "committed"), where
    assert await attempt(world.driver(), Work(Mode.APPEND, (("next", b""),))) is not None
    assert world.read() == seen | {"next": b""}, where
    if isinstance(told.error, CommitBlocked):
        return f"blocked, {resolve}"
    return told.said if told.error is None else f"{told.said} ({type(told.error).__name__})"


async def calls_of(make: Callable[[], World], work: Work) -> list[str]:
    """The calls of a commit that nobody disturbs."""
    world = make()
    nobody = Stranger(world, -1, lambda: None)
    await attempt(FaultDriver(world.driver(), nobody), work)
    return nobody.calls


def moments(calls: list[str]) -> list[int]:
    """Before a commit looks at the target, and every call from then on until nothing more is done to it."""
    sealed = calls.index("seal")
    look = next(at for at, call in enumerate(calls) if at > sealed and call.startswith(("list ", "trees")))
    last = max(at for at, call in enumerate(calls) if call in ("publish", "remove", "swap"))
    return [1, sealed, *range(look, last + 2)]


def share(every: Iterable[T], stride: int, backend: str) -> Iterator[T]:
    """One of so many, the same in every run; the two event loops take different ones."""
    mixed = list(every)
    random.Random(20261123).shuffle(mixed)
    size = len(mixed) * SOAK // stride
    return iter(mixed[-size:] if backend == "trio" else mixed[:size])


async def stand(make: Callable[[Work], World], stride: int, backend: str) -> Counter[str]:
    """Every work, act and moment, or a share of them."""
    ends: Counter[str] = Counter()
    calls = {work: await calls_of(partial(make, work), work) for work in WORKS}
    every = ((work, act, number) for work in WORKS for act in acts(work) for number in moments(calls[work]))
    for work, act, number in share(every, stride, backend):
        end = await check(make(work), work, act, number, "keep")
        assert end is not None
        ends[end] += 1
        if end == "blocked, keep":
            assert await check(make(work), work, act, number, "replace") == "blocked, replace"
            ends["blocked, replace"] += 1
    return ends


def tell(ends: Counter[str]) -> str:
    return (
        f"{ends.total():,} histories ({', '.join(f'{end}: {count:,}' for end, count in sorted(ends.items()))}), 0 lost"
    )


@pytest.mark.parametrize("kind", KINDS)
async def test_a_stranger_in_a_store_in_memory_is_first_or_second_and_never_overwritten_silently(
    kind: str, anyio_backend: str, figure: Figure
) -> None:
    ends = await stand(lambda work: InMemory(kind, prior_of(work)), 8, anyio_backend)
    figure(f"strangers, {kind}, {anyio_backend}", tell(ends))
    assert ends["blocked, keep"]


@pytest.mark.parametrize("place", PLACES)
async def test_a_stranger_in_a_local_directory_is_first_or_second_and_never_overwritten_silently(
    place: Place, tmp_path: Path, anyio_backend: str, figure: Figure
) -> None:
    ends = await stand(lambda work: OnDisk(fresh(tmp_path), place, prior_of(work)), 14, anyio_backend)
    figure(f"strangers, control area {place} a local directory, {anyio_backend}", tell(ends))
    assert ends["blocked, keep"]


def fresh(root: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=root))


# ------------------------------------------------------------------------------- strangers who take a directory's place


def by_a_directory(path: Path, outside: Path) -> None:
    path.mkdir()
    (path / "strange").write_bytes(FOREIGN)


def by_a_file(path: Path, outside: Path) -> None:
    path.write_bytes(FOREIGN)


def by_a_link(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def by_nothing(path: Path, outside: Path) -> None:
    pass


def state_of(path: Path) -> dict[str, tuple[int, int, bytes]]:
    """Everything below a path that is not ours to touch, with its inode and time."""
    found = {}
    for file in (path, *sorted(path.rglob("*"))):
        status = file.lstat()
        data = file.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        found[str(file)] = (status.st_ino, status.st_mtime_ns, data)
    return found


@pytest.mark.parametrize("place", PLACES)
async def test_whatever_takes_the_place_of_a_directory_is_left_alone_until_somebody_says_replace(
    place: Place, tmp_path: Path, anyio_backend: str, figure: Figure
) -> None:
    ends: Counter[str] = Counter()
    calls = {work: await calls_of(lambda: OnDisk(fresh(tmp_path), place, PRIOR), work) for work in WORKS[:4]}
    every = (
        (work, number, at, replaced)
        for work in WORKS[:4]
        for number in moments(calls[work])
        for at in ("", "p=0")
        for replaced in (by_nothing, by_a_directory, by_a_file, by_a_link)
    )
    for work, number, at, replaced in share(every, 14, anyio_backend):
        root = fresh(tmp_path)
        world, outside = OnDisk(root, place, PRIOR), root / "outside"
        lay(outside)
        path = world.target / at if at else world.target
        away = root / "away"

        def act(path: Path = path, away: Path = away, replaced: Replaced = replaced, outside: Path = outside) -> None:
            path.rename(away)
            replaced(path, outside)

        stranger = Stranger(world, number, act)
        kept = await anyio.to_thread.run_sync(state_of, outside)
        told = await attempt(FaultDriver(world.driver(), stranger), work)
        where = f"{work}, before {stranger.calls[number]} {path.name} was replaced {replaced.__name__}: {told}"
        assert await anyio.to_thread.run_sync(state_of, outside) == kept, where
        if replaced is not by_nothing and not stranger.seen and told.said == "committed":
            # It came after the look at the target: it is in its place, or went aside with the tree, or was removed by name.
            there = [path.read_bytes()] if replaced is by_a_file and path.is_file() else [*world.read().values()]
            assert replaced is by_a_link or FOREIGN in there or FOREIGN in world.aside(), f"{where}: lost silently"
        if told.said == "untouched" and replaced is not by_nothing:
            assert path.is_symlink() or path.is_file() or (path / "strange").read_bytes() == FOREIGN, where
        for resolve in (None, "keep"):
            with suppress(StagedError):
                await open_store(world.driver()).recover(resolve=resolve)  # type: ignore[arg-type]
            assert await anyio.to_thread.run_sync(state_of, outside) == kept, where
        # The stranger goes away again, and what was decided is completed.
        await anyio.to_thread.run_sync(put_back, path, away)
        await open_store(world.driver()).recover(resolve="replace")
        if (
            told.tx is not None and told.said != "unknown" and (at or place == "beside")
        ):  # else the outcome went with it
            state = (await open_store(world.driver()).outcome(told.tx)).state
            assert (state == "committed") == (told.said == "committed"), where
        assert (await attempt(world.driver(), Work(Mode.APPEND, (("next", b""),)))).error is None, where
        assert await anyio.to_thread.run_sync(state_of, outside) == kept, where
        ends[told.said if told.error is None else f"{told.said} ({type(told.error).__name__})"] += 1
    figure(f"replaced directories, control area {place} a local directory, {anyio_backend}", tell(ends))


async def test_a_foreign_tree_with_another_targets_control_area_is_not_even_replaced(tmp_path: Path) -> None:
    world = OnDisk(tmp_path, "beside", PRIOR)
    calls = await calls_of(lambda: OnDisk(fresh(tmp_path), "beside", PRIOR), WORKS[3])

    def act() -> None:
        world.target.rename(tmp_path / "away")
        inner = OnDisk(tmp_path / "target", "beside", {"a": FOREIGN})
        inner.area.mkdir(parents=True)

    told = await attempt(FaultDriver(world.driver(), Stranger(world, calls.index("swap"), act)), WORKS[3])
    assert isinstance(told.error, CommitBlocked)
    with pytest.raises(CommitIncomplete, match="control area of another target") as caught:
        await open_store(world.driver()).recover(resolve="replace")
    assert caught.value.outcome == "committed"
    assert world.read() == {"target/a": FOREIGN}
    await anyio.to_thread.run_sync(put_back, world.target, tmp_path / "away")
    assert (await open_store(world.driver()).recover()).finished == (told.tx,)
    assert world.read() == WORKS[3].apply(PRIOR)


def lay(outside: Path) -> None:
    """What a link must not lead to: the same names as in the target."""
    for name in (*PRIOR, "f0", "new", "top", "strange"):
        (outside / name).parent.mkdir(parents=True, exist_ok=True)
        (outside / name).write_bytes(b"outside")


def put_back(path: Path, away: Path) -> None:
    if not away.exists():
        return
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    away.rename(path)


# ---------------------------------------------------------------------------- strangers who write into the control area


def spoils(world: World, how: Spoil, which: int, sealed: bool) -> list[str]:
    """Spoil one thing, or everything; but no staged file after it was sealed: what is private is not looked at twice."""
    keys = sorted(key for key in world.records() if not key.endswith(("lock", "lease", "clock")))
    if sealed:
        keys = [key for key in keys if not key.startswith("staged ") and "/tree/" not in key and "old/" not in key]
    chosen = keys if which < 0 else keys[which : which + 1]
    for key in chosen:
        with suppress(FileNotFoundError):
            world.spoil(key, how)
    return chosen


async def spoil(make: Callable[[Work], World], stride: int, backend: str) -> Counter[str]:
    ends: Counter[str] = Counter()
    calls = {work: await calls_of(partial(make, work), work) for work in WORKS}
    every = (
        (work, how, which, number)
        for work in WORKS
        for how in SPOILS
        for which in range(-1, 6)
        for number in range(len(calls[work]))
    )
    for work, how, which, number in share(every, stride, backend):
        world, prior, new = make(work), prior_of(work), work.apply(prior_of(work))
        spoiled: list[str] = []
        stranger = Stranger(world, number, lambda: None)

        def act(world: World = world, how: Spoil = how, which: int = which, stranger: Stranger = stranger) -> None:
            spoiled.extend(spoils(world, how, which, "seal" in stranger.calls))  # noqa: B023 - of this history

        stranger.act = act
        with anyio.fail_after(60):
            told = await attempt(FaultDriver(world.driver(), stranger), work)
            where = f"{work}, before {stranger.calls[number]} a stranger did {how} {spoiled}: {told}"
            for resolve in (None, ("keep", "replace")[number % 2]):
                seen = world.read()
                assert told.said != "untouched" or seen == prior, f"{where}: {seen}"
                assert told.error is not None or seen == new, f"{where}: {seen}"
                assert new is not None and seen.items() <= prior.items() | new.items(), f"{where}: {seen}"
                with suppress(StagedError):
                    await open_store(world.driver()).recover(resolve=resolve)  # type: ignore[arg-type]
            with suppress(StagedError):
                await open_store(world.driver()).gc(older_than=timedelta(0))
            seen = world.read()
            after = await attempt(world.driver(), Work(Mode.APPEND, (("next", b""),)))
            assert world.read() == (seen if after.error else seen | {"next": b""}), where
        ends[told.said if told.error is None else f"{told.said} ({type(told.error).__name__})"] += 1
    return ends


@pytest.mark.parametrize("kind", KINDS)
async def test_whoever_spoils_the_control_area_of_a_store_in_memory_never_makes_a_mix_that_is_called_whole(
    kind: str, anyio_backend: str, figure: Figure
) -> None:
    ends = await spoil(lambda work: InMemory(kind, prior_of(work)), 80, anyio_backend)
    figure(f"spoiled control areas, {kind}, {anyio_backend}", tell(ends))


@pytest.mark.parametrize("place", PLACES)
async def test_whoever_spoils_a_local_control_area_never_makes_a_mix_that_is_called_whole(
    place: Place, tmp_path: Path, anyio_backend: str, figure: Figure
) -> None:
    ends = await spoil(lambda work: OnDisk(fresh(tmp_path), place, prior_of(work)), 130, anyio_backend)
    figure(f"spoiled control areas, {place} a local directory, {anyio_backend}", tell(ends))
