"""Damaged, foreign and hostile records in a local control area: nothing outside it and the target is ever touched."""

from __future__ import annotations

import copy
import functools
import itertools
import os
import stat
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import anyio
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_records import forge

from staged import DamagedRecord, StagedError, open_store
from staged.drivers import _slots
from staged.drivers.local import LocalDriver
from staged.model import Mode
from staged.records import digest_of
from staged.testing.exploration import Files, Work
from staged.testing.faults import Crash, FaultDriver, Moment

T = TypeVar("T")
Figure = Callable[[str, str], None]

SOAK = int(os.environ.get("STAGED_SOAK", "1"))
PRIOR: Files = {"p=0/f0": b"old", "p=1/f1": b"old", "old-3": b"3"}
CALLS = 1_500
"""Calls of the driver that all verbs together may make here; a record that asks for more is refused."""


# ------------------------------------------------------------------------------------------------------- what a crash left


async def crash(target: Path, work: Work, at: str) -> None:
    """Do the work in a process that dies before a call."""
    dead = False

    async def gate(name: str, moment: Moment) -> None:
        nonlocal dead
        dead = dead or (at != "" and moment == "before" and name.startswith(at))
        if dead:
            raise Crash

    try:
        await work(open_store(FaultDriver(LocalDriver(str(target), durability="none"), gate)))
    except Crash:
        return
    assert at == "", f"there was no call {at}"


APPEND = Work(Mode.APPEND, (("p=0/new", b"ours"), ("q/new", b"ours")), key="key")
FILES = Work(Mode.OVERWRITE_FILES, (("p=0/f0", b"ours"), ("top", b"ours")), deletes=("old-3",))
DROP = Work(Mode.FULL_DROP, (("p=0/f0", b"ours"), ("top", b"ours")))
STATES: dict[str, tuple[Work, str]] = {
    "open": (APPEND, "seal"),
    "prepared": (FILES, "lock lock"),
    "held": (FILES, "put_segment ledger"),
    "an append is decided": (APPEND, "publish"),
    "files to overwrite are decided": (FILES, "publish"),
    "a full_drop is decided": (DROP, "swap"),
    "published, not removed": (FILES, "remove"),
    "swapped, not free": (DROP, "put_segment outcome"),
    "finished": (APPEND, ""),
}


class Lake:
    """A target after some commits and a crash; beside it another target, and files that are nobody's."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.target = root / "lake" / "target"
        self.area = root / "lake" / "_staged" / "target"
        self.other = root / "lake" / "other"

    async def lay(self, work: Work, at: str) -> None:
        for directory in (self.root / "canary", self.root / "lake" / "canary", self.target):
            for name, data in PRIOR.items():
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                (directory / name).write_bytes(data)
        await Work(Mode.FULL_DROP, (("p=0/f0", b"other"),))(open_store(self.other, durability="none"))
        await crash(self.other, APPEND, "publish")
        await crash(self.target, FILES, "")
        for name, data in PRIOR.items():
            (self.target / name).write_bytes(data)
        await crash(self.target, work, at)
        assert self.listed()

    def outside(self) -> dict[str, object]:
        """Everything but the target and its control area, as it must stay."""
        found: dict[str, object] = {}
        for directory, below, files in os.walk(self.root):
            below[:] = [name for name in below if Path(directory, name) not in (self.target, self.area)]
            for name in (*below, *files):
                path = Path(directory, name)
                status = path.lstat()
                if stat.S_ISDIR(status.st_mode):
                    found[str(path)] = status.st_ino
                else:
                    found[str(path)] = (status.st_ino, status.st_mtime_ns, path.read_bytes())
        return found

    def listed(self) -> list[str]:
        """The records and segments, in the order in which they refer to one another."""
        found = [str(path.relative_to(self.area)) for path in self.area.rglob("*") if path.is_file()]
        kinds = ("log/", "tx/", "ledger-", "outcome/", "head")
        found = [key for key in found if key.startswith(kinds) and "/tree/" not in key and not key.endswith("lease")]
        return sorted(
            found, key=lambda key: (next(n for n, kind in enumerate(kinds) if key.startswith(kind)), "-plan-" in key)
        )

    def body(self, key: str) -> bytes:
        if not swapped(key):
            return (self.area / key).read_bytes()
        with open(self.area / key, "rb") as file:
            return _slots.current(_slots.read(file.fileno()))

    def put(self, key: str, body: bytes) -> None:
        path = self.area / key
        path.parent.mkdir(parents=True, exist_ok=True)
        if not swapped(key):
            path.write_bytes(body)
            return
        path.touch()
        with open(path, "r+b") as file:
            if len(body) <= 100_000:
                _slots.write(file.fileno(), body, _slots.read(file.fileno()), durable=True)

    def load(self, key: str) -> tuple[str, Any]:
        header, _, text = self.body(key).partition(b"\n")
        return header.split()[2].decode(), msgspec.json.decode(text)

    def save(self, key: str, kind: str, value: object) -> None:
        self.put(key, forge(kind, msgspec.json.encode(value)))

    def sign(self) -> None:
        """Let every reference carry the digest of what it refers to: nothing gives the hostile records away."""
        for key in self.listed():
            try:
                kind, value = self.load(key)
            except (msgspec.MsgspecError, IndexError, RecursionError):
                continue
            for _, at in nodes(value):
                if isinstance(at, dict) and at.keys() == {"key", "count", "digest"} and isinstance(at["key"], str):
                    names = [
                        f"{at['key']}-{number}" for number in range(at["count"] if at["count"] in range(20) else 1)
                    ]
                    try:
                        at["digest"] = digest_of([self.body(name) for name in names])
                    except (OSError, ValueError):
                        continue
            self.save(key, kind, value)

    async def face(self) -> Counter[str]:
        """Everything that reads those records: each verb ends, well or in an error of ours, after a bounded number of calls."""
        calls = 0

        async def count(name: str, moment: Moment) -> None:
            nonlocal calls
            calls += 1
            assert calls < CALLS, "a record made a verb go on and on"

        said: Counter[str] = Counter()
        ids = {part for key in self.listed() for part in key.replace("-", "/").split("/") if len(part) == 24}
        verbs: list[Callable[[Any], Any]] = [
            lambda store: store.status(),
            lambda store: store.meta(),
            *(functools.partial(lambda id, store: store.outcome(id), id) for id in sorted(ids)),
            lambda store: store.recover(),
            lambda store: store.recover(resolve="keep"),
            lambda store: store.recover(resolve="replace"),
            *(functools.partial(resume, id) for id in sorted(ids)),
            lambda store: store.gc(older_than=timedelta(0)),
            lambda store: Work(Mode.APPEND, (("next", b"next"),))(store, 0.0),
            lambda store: Work(Mode.FULL_DROP, (("last", b"last"),))(store, 0.0),
        ]
        for verb in verbs:
            driver = LocalDriver(str(self.target), durability="none")
            with anyio.fail_after(60):
                try:
                    async with open_store(FaultDriver(driver, count)) as store:
                        await verb(store)
                    said["fine"] += 1
                except StagedError as error:
                    said[type(error).__name__] += 1
        return said


async def resume(id: str, store: Any) -> None:
    tx = await store.resume(id, lock_timeout=0.0)
    await tx.commit()


def swapped(key: str) -> bool:
    return key == "head" or key.endswith("/record")


def nodes(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value within a JSON value, with the way to it."""
    yield at, value
    for name, inner in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from nodes(inner, (*at, name))


def changed(value: Any, way: tuple[Any, ...], new: Any) -> Any:
    if not way:
        return new
    whole = copy.deepcopy(value)
    at = whole
    for name in way[:-1]:
        at = at[name]
    at[way[-1]] = new
    return whole


def face(work: Work, at: str, backend: str, spoil: Callable[[Lake], None]) -> Counter[str]:
    """Lay a lake, spoil its records, let everything face them, and look whether anything outside changed."""

    async def run() -> Counter[str]:
        with tempfile.TemporaryDirectory() as root:
            lake = Lake(Path(root))
            await lake.lay(work, at)
            spoil(lake)
            before = lake.outside()
            said = await lake.face()
            after = lake.outside()
            assert after == before, {
                path for path in before.keys() | after.keys() if before.get(path) != after.get(path)
            }
        return said

    said: Counter[str] = anyio.run(run, backend=backend)
    return said


# ------------------------------------------------------------------------------------------------------------------ fuzzed

BACKENDS = st.sampled_from(["asyncio", "trio"])
NUMBERS_DRAWN = st.lists(st.integers(0, 2**16), min_size=40, max_size=40)


class Pick:
    """Chooses by numbers that were drawn before: ids and times differ from run to run, and nothing may depend on them."""

    def __init__(self, numbers: list[int]) -> None:
        self._numbers = itertools.cycle(numbers)

    def one(self, options: Sequence[T]) -> T:
        return options[next(self._numbers) % len(options)]

    def up_to(self, most: int) -> int:
        return next(self._numbers) % (most + 1)


FUZZ = settings(
    max_examples=40 * SOAK, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
WAYS_OUT = (
    "../canary/old-3", "../../canary/old-3", "../other/p=0/f0", "..", ".", "", "/", "_staged/other/head", "p=0/../../canary/old-3",
    "p=0", "p=0/f0/x", "old-3", "old-3/", "x\\0", "x" * 300, "q/" * 600 + "x", "head", "tx", "log/x",
)  # fmt: skip
NUMBERS = (-1, 0, 1, 2, 7, 10_000, 2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1, -(2**63))


def hostile(pick: Pick, lake: Lake, value: Any) -> Any:
    """Something else of the same type, or of another."""
    keys = lake.listed()
    names = [*WAYS_OUT, *keys, *(key.rpartition("-")[0] for key in keys), str(lake.root / "canary/old-3")]
    names += [part for key in keys for part in key.replace("-", "/").split("/")]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return pick.one(NUMBERS)
    if isinstance(value, str) or value is None:
        return pick.one([pick.one(names), pick.one(names), pick.one(names), None, "\0", pick.one(NUMBERS)])
    if isinstance(value, list):
        return pick.one([[], value * 2 or [pick.one(names)], list(reversed(value)), value * 500])
    new = pick.one(names)
    return pick.one([{}, {**value, new: new}, dict.fromkeys([new, *value], new), None])


def spoil(pick: Pick, lake: Lake) -> None:
    """Up to three changes to sound records, and all of them signed again, or not."""
    for _ in range(1 + pick.up_to(2)):
        keys = lake.listed()
        if not keys:
            return
        key = pick.one(keys)
        how = pick.one(["value", "value", "value", "value", "other", "cut", "noise", "newer", "gone"])
        body = lake.body(key)
        if how == "value":
            try:
                kind, value = lake.load(key)
            except (msgspec.MsgspecError, IndexError):
                continue
            way, node = pick.one(list(nodes(value)))
            lake.save(key, kind, changed(value, way, hostile(pick, lake, node)))
        elif how == "other":
            lake.put(key, lake.body(pick.one(keys)))
        elif how == "cut":
            lake.put(key, body[: pick.up_to(len(body))])
        elif how == "noise":
            lake.put(key, bytes(pick.up_to(255) for _ in range(pick.up_to(20))) + body[pick.up_to(len(body)) :])
        elif how == "newer":
            lake.put(key, body.replace(b"staged 1 ", b"staged 2 ", 1))
        else:
            (lake.area / key).unlink()
    if pick.up_to(4):
        lake.sign()


@pytest.mark.anyio
@pytest.mark.parametrize("segment", ["log/", "ledger-"])
async def test_nothing_is_decided_on_a_segment_whose_name_was_taken(segment: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    inner = LocalDriver(str(target), durability="none")
    taken: list[str] = []

    async def take(name: str, moment: Moment) -> None:
        verb, _, key = name.partition(" ")
        if verb == "put_segment" and moment == "before" and key.startswith(segment) and not taken:
            taken.append(key)
            assert await inner.put_segment(key, b"another's")

    await crash(target, DROP, "")
    with pytest.raises(StagedError) as raised:
        await APPEND(open_store(FaultDriver(inner, take)))
    assert taken
    assert raised.value.outcome == "untouched"
    assert {path.name for path in target.rglob("*") if path.is_file()} == {"f0", "top"}
    assert await APPEND(open_store(target)) == "committed"


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["manifest", "plan"])
async def test_a_sound_segment_of_another_commit_is_not_taken_for_the_one_that_was_decided(
    kind: str, tmp_path: Path
) -> None:
    lake = Lake(tmp_path)
    await lake.lay(FILES, "publish")
    mine, other = sorted(
        (key for key in lake.listed() if f"-{kind}-" in key), key=lambda key: os.stat(lake.area / key).st_mtime_ns
    )[::-1]
    lake.put(mine, lake.body(other))

    def seen() -> object:
        return lake.outside(), {path: path.read_bytes() for path in lake.target.rglob("*") if path.is_file()}

    before = seen()
    async with open_store(lake.target) as store:
        with pytest.raises(DamagedRecord, match="digest"):
            await store.recover()
    assert seen() == before


def test_whatever_the_records_say_nothing_outside_is_touched_and_every_error_is_one_of_ours(figure: Figure) -> None:
    said: Counter[str] = Counter()
    lakes = 0

    @FUZZ
    @given(st.sampled_from(sorted(STATES)), BACKENDS, NUMBERS_DRAWN)
    def check(state: str, backend: str, numbers: list[int]) -> None:
        nonlocal lakes
        lakes += 1
        said.update(face(*STATES[state], backend, functools.partial(spoil, Pick(numbers))))

    check()
    figure("hostile records", f"{lakes} lakes, {tell(said)}, 0 touched outside")


def tell(said: Counter[str]) -> str:
    return f"{said.total()} calls ({', '.join(f'{name} {count}' for name, count in said.most_common())})"


# ----------------------------------------------------------------------------------------------------------------- crafted


def edit(lake: Lake, part: str, change: Callable[[Any], object]) -> None:
    """Change every record whose key has this part, and sign them all."""
    keys = [key for key in lake.listed() if part in key]
    assert keys
    for key in keys:
        kind, value = lake.load(key)
        change(value)
        lake.save(key, kind, value)
    lake.sign()


def entries_at(path: str) -> Callable[[Lake], None]:
    """What is staged is to be published there."""

    def change(value: Any) -> None:
        value["entries"][0]["path"] = path

    return lambda lake: edit(lake, "-manifest-", change)


def handles_at(path: str) -> Callable[[Lake], None]:
    """What is staged is to be discarded there, once a stranger keeps it out of its place."""

    def change(value: Any) -> None:
        for entry in value["entries"]:
            entry["handle"] = path

    def spoil(lake: Lake) -> None:
        (lake.target / "p=0" / "new").write_text("foreign")
        edit(lake, "-manifest-", change)

    return spoil


def removes_at(path: str) -> Callable[[Lake], None]:
    """A file of the right identity is to be removed there."""

    def spoil(lake: Lake) -> None:
        status = (lake.target.parent / "canary" / "old-3").stat()
        identity = f"{status.st_ino:x}-{status.st_mtime_ns:x}"
        edit(
            lake,
            "-plan-",
            lambda value: value["remove"].append({"path": path, "size": 1, "identity": identity, "is_dir": False}),
        )

    return spoil


def replaces_at(path: str) -> Callable[[Lake], None]:
    def spoil(lake: Lake) -> None:
        status = (lake.target.parent / "canary" / "old-3").stat()
        identity = f"{status.st_ino:x}-{status.st_mtime_ns:x}"
        edit(lake, "-plan-", lambda value: value["replaces"].update({path: identity}))
        entries_at(path)(lake)

    return spoil


def refers_to(part: str, **ref: object) -> Callable[[Lake], None]:
    """Every reference in those records leads elsewhere."""

    def change(value: Any) -> None:
        for _, at in nodes(value):
            if isinstance(at, dict) and "digest" in at:
                at.update(ref)

    return lambda lake: edit(lake, part, change)


def numbers(part: str, name: str, number: int) -> Callable[[Lake], None]:
    def change(value: Any) -> None:
        for _, at in nodes(value):
            if isinstance(at, dict) and name in at:
                at[name] = number

    return lambda lake: edit(lake, part, change)


def trees(**identities: str) -> Callable[[Lake], None]:
    """The trees to swap are somebody else's."""
    return lambda lake: edit(
        lake, "-plan-", lambda value: value["header"] and (value["header"]["trees"] or {}).update(identities)
    )


def link(where: str, to: str) -> Callable[[Lake], None]:
    """A link stands where a directory or a record was."""

    def spoil(lake: Lake) -> None:
        for path in lake.root.glob(where):
            path.rename(path.with_name(f"{path.name}.away"))
            path.symlink_to(lake.root / to)

    return spoil


def adds(key: str, kind: str, value: object) -> Callable[[Lake], None]:
    return lambda lake: lake.save(key, kind, value)


def plants(name: str) -> Callable[[Lake], None]:
    """A file of a strange name lies among the records."""

    def spoil(lake: Lake) -> None:
        path = lake.area / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"stranger")
        os.utime(path, (1, 1))

    return spoil


def foreign_plan(lake: Lake) -> None:
    """The head names the plan of the other target's transaction, which lies beside ours now."""
    area = lake.target.parent / "_staged" / "other"
    for path in (area / "log").iterdir():
        (lake.area / "log" / path.name).write_bytes(path.read_bytes())
    plan = next(
        path.name for path in (area / "log").iterdir() if "-plan-" in path.name and path.name not in APPEND.files
    )
    refers_to("head", key=f"log/{plan.rpartition('-')[0]}")(lake)


DECIDED = ("an append is decided", "files to overwrite are decided", "a full_drop is decided")
OUT = ("../canary/old-3", "p=0/../../canary/old-3", "_staged/other/head", "/etc/hostname", "p=0//new", "canary/old-3")
CRAFTED: list[tuple[str, str, Callable[[Lake], None]]] = [
    *((f"publishes at {path}", state, entries_at(path)) for path in OUT for state in DECIDED),
    *((f"discards at {path}", "an append is decided", handles_at(path)) for path in OUT),
    *((f"removes at {path}", state, removes_at(path)) for path in OUT for state in (*DECIDED, "published, not removed")),
    *((f"replaces at {path}", state, replaces_at(path)) for path in OUT for state in DECIDED),
    *((f"{part} counts {count}", state, refers_to(part, count=count)) for part in ("head", "-plan-", "record")
      for count in (0, -1, 2, 10**12, 2**64 - 1) for state in ("an append is decided",)),
    *((f"{part} refers to {key}", "an append is decided", refers_to(part, key=key)) for part in ("head", "-plan-", "record")
      for key in ("head", "../other/head", "log/../../other/head", "/etc/hostname", "outcome/x", "")),
    *((f"{name} of {part} is {number}", state, numbers(part, name, number))
      for part, name in (("head", "epoch"), ("-plan-", "epoch"), ("-plan-", "keep_old"), ("-plan-", "parts"), ("ledger", "epoch"),
                         ("ledger", "floor"), ("record", "base"), ("record", "keep_old"), ("-manifest-", "size"))
      for number in (-1, 2**53, 2**63 - 1, 2**64 - 1) for state in ("an append is decided",)),
    ("swaps strangers", "a full_drop is decided", trees(new="1-1.1", target="2-2.2")),
    ("swaps what is not there", "a full_drop is decided", trees(new="", target="")),
    ("swaps where files were planned", "an append is decided", lambda lake: edit(
        lake, "-plan-", lambda value: value["header"].update(trees={"new": "1-1.1", "target": None}))),
    ("the plan of another target", "an append is decided", foreign_plan),
    *((f"a link for {where}", state, link(where, to)) for state in ("an append is decided", "a full_drop is decided", "open")
      for where, to in (("lake/_staged/target", "lake/_staged/other"), ("lake/_staged/target/tx/*", "canary"),
                        ("lake/_staged/target/tx/*/tree", "canary"), ("lake/_staged/target/tx/*/tree/p=0", "canary/p=0"),
                        ("lake/_staged/target/log", "canary"), ("lake/_staged/target/outcome", "canary"),
                        ("lake/_staged/target/old", "canary"), ("lake/_staged/target/old/*", "canary"),
                        ("lake/target/p=0", "canary/p=0"))),
    *((f"a record {key}", "finished", adds(key, "outcome", {})) for key in ("outcome/x", "tx/x/record", "log/x-0", "ledger-1-0")),
    *((f"a file {name}", "finished", plants(name)) for name in (
        "ledger-²-a-0", "ledger-٣-a-0", "ledger--0", "ledger-9-0", "log/-0", "log/x", "outcome/..x", "tx/y", "tx/" + "a" * 24,
        "tx/" + "a" * 24 + "/tree/x", "old/x", "old/" + "1" * 16 + "-" + "a" * 24, "x.tmp", "log/x.tmp", "probe-x", "\udcff",
        "tx/\udcff/record", "outcome/\udcff", "log/\udcff-0", "ledger-\udcff",
    )),
]  # fmt: skip


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_no_crafted_record_or_link_leads_out_of_the_target_and_its_control_area(backend: str, figure: Figure) -> None:
    said: Counter[str] = Counter()
    chosen = CRAFTED if SOAK > 1 else CRAFTED[("asyncio", "trio").index(backend) :: 2]
    for name, state, spoil in chosen:
        try:
            said.update(face(*STATES[state], backend, spoil))
        except BaseException as error:
            error.add_note(f"{name}, {state}")
            raise
    figure(f"crafted records, {backend}", f"{len(chosen)} lakes, {tell(said)}, 0 touched outside")


def test_a_count_or_a_size_without_end_costs_neither_memory_nor_time(figure: Figure) -> None:
    def spoil(lake: Lake) -> None:
        refers_to("head", count=2**62)(lake)
        refers_to("record", count=2**62)(lake)
        for key in [key for key in lake.listed() if not swapped(key)]:
            os.truncate(lake.area / key, 1 << 40)

    tracemalloc.start()
    try:
        said = face(*STATES["an append is decided"], "trio", spoil)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    figure("records without end", f"{tell(said)}, at most {peak / 2**20:.0f} MiB")
    assert peak < 64 * 2**20
    assert said["DamagedRecord"] > 3
