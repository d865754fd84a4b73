"""Places where writing fails: one clear error before the decision, or a commit that the next one completes; never a mix."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import places
import pytest

from staged import StagedError, open_store
from staged.drivers._posix import CountedLock
from staged.drivers.memory import MemoryDriver, MemoryStorage
from staged.model import Mode
from staged.paths import fold
from staged.testing.exploration import Work

Figure = Callable[[str, str], None]

Told = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def told() -> Told:
    """What came of every place; those that need mounts are impossible where none can be made."""
    mounts = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-r", "-m"]
    try:
        alone = subprocess.run([*mounts, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        alone = False
    found: Told = {}
    # Other users must be able to enter it, unlike pytest's own.
    with tempfile.TemporaryDirectory(prefix="places-", ignore_cleanup_errors=True) as root:
        os.chmod(root, 0o755)
        command = [*(mounts if alone else []), sys.executable, places.__file__, root]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600 * places.SOAK, check=False)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        answer = json.loads(line)
        found.setdefault(answer["place"], []).append(answer)
    return found


@pytest.mark.parametrize("place", places.PLACES)
def test_an_obstacle_ends_in_one_clear_error_before_the_decision_or_in_a_commit_that_is_completed_once_it_is_gone(
    place: str, told: Told, figure: Figure
) -> None:
    for answer in told[place]:
        assert "failed" not in answer, answer["failed"]
        if "impossible" in answer:
            pytest.skip(answer["impossible"])
    cases = [case for answer in told[place] for case in answer["cases"]]
    ends = Counter(
        f"{case['said']} ({case['error'].partition(':')[0]})" if case["error"] else "committed" for case in cases
    )
    calls = Counter(case["struck"] for case in cases if case["struck"])
    wrong = [(case["name"], case["wrong"], case["error"]) for case in cases if case["wrong"]]
    counts = "; first failing: ".join(
        ", ".join(f"{what} {count}" for what, count in sorted(counter.items())) for counter in (ends, calls) if counter
    )
    figure(f"place {place}", f"{len(cases)} commits, {len(wrong)} wrong; {counts}")
    assert not wrong


# --------------------------------------------------------------------------------------------------------- odd targets


async def write(target: Path) -> None:
    store = open_store(target, durability="none")
    async with store, store.staged_write("append", lock_timeout=0) as tx:
        await tx.write("d/a", "1")


def dangle(root: Path) -> Path:
    (root / "link").symlink_to(root / "deep" / "real")
    return root / "deep" / "real"


def below_a_file(root: Path) -> Path:
    (root / "file").write_text("x")
    return root / "file" / "target"


def loop(root: Path) -> Path:
    (root / "loop").symlink_to(root / "loop")
    return root / "loop"


def pipe(root: Path) -> Path:
    os.mkfifo(root / "pipe")
    return root / "pipe"


def unix_socket(root: Path) -> Path:
    os.mknod(root / "socket", stat.S_IFSOCK | 0o600)
    return root / "socket"


def file(root: Path) -> Path:
    (root / "file").write_text("x")
    return root / "file"


def longest_name(root: Path) -> Path:
    return root / ("n" * 255)


def name_too_long(root: Path) -> Path:
    return root / ("n" * 256)


def path_too_long(root: Path) -> Path:
    return root.joinpath(*["n" * 250] * 20)


def deep(root: Path) -> Path:
    return root.joinpath("a", "b", "c", "d", "e", "target")


@pytest.mark.anyio
@pytest.mark.parametrize("make", [file, pipe, unix_socket, loop, below_a_file, name_too_long, path_too_long])
async def test_a_target_that_cannot_be_a_directory_is_one_clear_error_and_changes_nothing(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    target = await anyio.to_thread.run_sync(make, tmp_path)
    before = await anyio.to_thread.run_sync(files, tmp_path)
    for ask in (write, look, repair):
        with anyio.fail_after(20):
            try:
                await ask(target)
            except StagedError as error:
                assert "None" not in str(error)
                assert ask is not write or error.outcome == "untouched"
            else:
                assert ask is not write
    assert await anyio.to_thread.run_sync(files, tmp_path) == before


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if not path.is_dir())


async def look(target: Path) -> None:
    async with open_store(target) as store:
        await store.status()


async def repair(target: Path) -> None:
    async with open_store(target) as store:
        await store.recover()
        await store.gc(older_than=timedelta(0))


@pytest.mark.anyio
@pytest.mark.parametrize("make", [dangle, longest_name, deep])
async def test_a_target_that_is_not_there_yet_is_made_wherever_it_may_be(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    target = make(tmp_path)
    await write(tmp_path / "link" if make is dangle else target)
    assert (target / "d" / "a").read_text() == "1"
    await look(target)


@pytest.mark.anyio
async def test_a_pipe_a_link_or_a_directory_in_place_of_a_control_record_neither_hangs_nor_leads_out(
    tmp_path: Path, figure: Figure, anyio_backend: str
) -> None:
    outside = tmp_path / "outside"
    outside.write_text("outside")
    asked, half = 0, places.BACKENDS.index(anyio_backend)
    every = [(where, what) for where in CONTROL for what in INTRUDERS]
    for number, (where, what) in enumerate(every if places.SOAK > 1 else every[half::2]):
        target = tmp_path / f"t{number}"
        store = open_store(target, durability="none")
        await write(target)
        prepared = await store.begin("append")
        await prepared.write("prepared", "1")
        await prepared.prepare()
        await prepared.release()
        area = tmp_path / "_staged" / target.name
        await anyio.to_thread.run_sync(INTRUDERS[what], area, where, outside)
        for ask in (look, repair, write):
            asked += 1
            with anyio.fail_after(20):
                try:
                    await ask(target)
                except StagedError as error:
                    assert "None" not in str(error), (where, what)
        assert outside.read_text() == "outside", (where, what)
        assert (target / "d" / "a").read_text() == "1", (where, what)
    figure(f"intruders in a control area, {anyio_backend}", f"{asked} calls, none hung, none led out")


def _put(area: Path, where: str, make: Callable[[Path], object]) -> None:
    for path in area.glob(where):
        if path.is_dir():
            path.rename(path.with_name(f"{path.name}-away"))
        else:
            path.unlink()
        make(path)


CONTROL = (
    "head",
    "lock",
    "clock",
    "ledger-*",
    "log",
    "log/*manifest*",
    "tx",
    "tx/*",
    "tx/*/record",
    "tx/*/lease",
    "tx/*/tree",
)
INTRUDERS: dict[str, Callable[[Path, str, Path], None]] = {
    "a pipe": lambda area, where, outside: _put(area, where, os.mkfifo),
    "a link": lambda area, where, outside: _put(area, where, lambda path: path.symlink_to(outside)),
    "a link to a directory": lambda area, where, outside: _put(
        area, where, lambda path: path.symlink_to(outside.parent)
    ),
    "a directory": lambda area, where, outside: _put(area, where, Path.mkdir),
    "nothing": lambda area, where, outside: _put(area, where, lambda path: None),
    "a terabyte": lambda area, where, outside: _put(area, where, _terabyte),
}


def _terabyte(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


@pytest.mark.anyio
async def test_what_another_process_may_be_writing_right_now_survives_every_clean_up(tmp_path: Path) -> None:
    target = tmp_path / "target"
    await write(target)
    area = tmp_path / "_staged" / "target"
    alive, dead = area / "log" / "x.1-0.tmp", area / "log" / "x.1-1.tmp"
    for path in (alive, dead):
        path.touch()
    writing = CountedLock.take(os.open(alive, os.O_RDWR))
    assert writing is not None
    async with open_store(target) as store:
        async with store.staged_write("full_drop", keep_old=0) as tx:
            await tx.write("b", "2")
        await store.gc(older_than=timedelta(0))
        assert (alive.exists(), dead.exists()) == (True, False)
        writing.release()
        await store.gc(older_than=timedelta(0))
    assert not alive.exists()


# ------------------------------------------------------------------------------------------------------- folded names


NAMES = ("a", "A", "p=0/f", "P=0/F", "p=0/g", "P=1/f", "q/é", "Q/E\u0301")


@pytest.mark.anyio
@pytest.mark.parametrize("swap", ["exchange", None])
async def test_on_a_store_that_folds_names_every_mode_does_what_it_does_to_the_folded_names(
    swap: str | None, figure: Figure
) -> None:
    done = refused = 0
    for mode in Mode:
        for prior in ((), ("A",), ("p=0/f", "P=1/f"), ("P=0/g", "Q/é", "other")):
            for names in (("a",), ("P=0/f", "P=1/F"), ("q/E\u0301", "p=0/new")):
                if mode is Mode.OVERWRITE_PARTITIONS and not all("/" in name for name in names):
                    continue
                for delete in ((), prior[:1]) if mode in (Mode.APPEND, Mode.OVERWRITE_FILES) else ((),):
                    storage = MemoryStorage()
                    for name in prior:
                        storage.put(f"target/{name}", b"old")
                    work = Work(
                        mode, tuple((name, b"new") for name in names), tuple(name.swapcase() for name in delete)
                    )
                    folded = Work(mode, tuple((fold(name), b"new") for name in names), tuple(map(fold, delete)))
                    wanted = folded.apply({fold(name): b"old" for name in prior})
                    if any(fold(name) in map(fold, names) for name in delete):
                        wanted = None
                    store = open_store(MemoryDriver(storage=storage, folds=True, swap=swap))  # type: ignore[arg-type]
                    try:
                        await work(store)
                    except StagedError as error:
                        assert wanted is None and error.outcome == "untouched", (work, prior, error)
                        refused += 1
                        wanted = {fold(name): b"old" for name in prior}
                    else:
                        done += 1
                    found = {fold(name): data for name, data in storage.below("target").items()}
                    assert found == wanted, (work, prior)
                    assert len(found) == len(storage.below("target")), "twins on a store that folds"
    figure(f"folded names, {swap or 'entries'}", f"{done} commits, {refused} refused, as the oracle says")
