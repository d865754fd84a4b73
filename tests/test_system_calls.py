"""System calls that fail, stop halfway or are refused, in processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from staged import Busy, open_store
from staged.drivers.local import LocalDriver

Figure = Callable[[str, str], None]

FACTOR = os.environ.get("STAGED_SOAK", "1")
ENVIRONMENT = {**os.environ, "PYTHONWARNINGS": "ignore"}


@pytest.fixture
def strace() -> Callable[..., list[str]]:
    """A command that runs a Python whose system calls fail as told."""
    program = shutil.which("strace")
    inject = "--inject=utimensat:error=EIO"
    if program is None or subprocess.run([program, "-o", os.devnull, inject, "true"], check=False).returncode:
        pytest.skip("strace is not there, or may not trace")

    def command(call: str, error: str) -> list[str]:
        told = ["-f", "-qq", "-o", os.devnull, f"--trace={call}", f"--inject={call}:error={error}"]
        return [str(program), *told, sys.executable]

    return command


def cases(python: list[str], *arguments: object) -> list[dict[str, object]]:
    """Run the cases of `system_calls.py`; what they say, after none of them failed."""
    command = [*python, str(Path(__file__).with_name("system_calls.py")), *map(str, arguments), FACTOR]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    wrong = [line for line in lines if not line.get("ok")]
    assert run.returncode == 0, run.stderr[-2000:]
    assert not wrong, f"{wrong[:6]} {run.stderr[-2000:]}"
    return lines


def run(program: str, *arguments: object, python: list[str] | None = None) -> str:
    command = [*(python or [sys.executable]), "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def tree(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}


# ----------------------------------------------------------------------------------------------------------------- syncs


def test_a_sync_that_failed_is_never_taken_for_success_and_nothing_later_rests_on_it(
    tmp_path: Path, figure: Figure
) -> None:
    found = cases([sys.executable], "syncs", tmp_path / "root")
    figure("failing syncs", f"{len(found)}, after none of which anything was claimed that is not on the disk")
    assert len(found) >= 70


def test_a_sync_of_the_whole_file_system_that_failed_leaves_the_target_untouched(
    tmp_path: Path, strace: Callable[..., list[str]]
) -> None:
    program = """
import anyio, sys
from staged import StagingError, open_store
async def main():
    async with open_store(sys.argv[1]) as store:
        async with store.staged_write("append") as tx:
            await tx.write("old", "1")
        try:
            async with store.staged_write("append") as tx:
                for n in range(60):
                    await tx.write(f"new-{n}", "1")
        except StagingError as error:
            print(error.outcome, tx.phase.value)
anyio.run(main)
"""
    said = run(program, tmp_path / "target", python=strace("syncfs", "EIO"))
    assert said.split() == ["untouched", "rolled", "back"]
    assert tree(tmp_path / "target") == {"old": "1"}


# ---------------------------------------------------------------------------------------------------------- short writes


def test_a_write_that_falls_short_never_becomes_a_record_a_segment_or_a_staged_file(
    tmp_path: Path, figure: Figure
) -> None:
    found = cases([sys.executable], "disks", tmp_path / "root")
    said = Counter(str(line["said"]) for line in found)
    figure("full disks", f"{len(found)}, {', '.join(f'{count} {what}' for what, count in sorted(said.items()))}")
    assert len(found) >= 30
    assert {"committed", "incomplete", "untouched"} <= said.keys()


def test_what_the_system_takes_piece_by_piece_is_staged_whole(tmp_path: Path) -> None:
    program = """
import anyio, os, sys
from array import array
from staged import open_store
write = os.write

def piecemeal(file, data):
    return write(file, memoryview(data).cast("B")[:70_001])

async def main():
    deep = memoryview(array("d", range(150_000))).cast("B").cast("d", [300, 100, 5])
    async with open_store(sys.argv[1]).staged_write("append") as tx:
        os.write = piecemeal
        async with tx.open("a") as file:
            await file.write(b"first")
            await file.write(deep)
            await file.write(b"last")
    with open(sys.argv[1] + "/a", "rb") as file:
        assert file.read() == b"first" + deep.tobytes() + b"last"
    assert tx.receipt.bytes == deep.nbytes + 9

anyio.run(main)
"""
    run(program, tmp_path / "target")


# -------------------------------------------------------------------------------------------------- what a kernel may lack


def test_where_renames_cannot_be_told_not_to_replace_links_stand_in_for_them_and_replace_nothing(
    tmp_path: Path, figure: Figure, strace: Callable[..., list[str]]
) -> None:
    found = cases(strace("renameat2", "EINVAL"), "links", tmp_path / "root")
    figure("without renameat2", f"{sum('link' in line for line in found)} kills between link and unlink")
    assert sum(line.get("said") == "exit status -9" for line in found) >= 4
    assert any(line.get("said") == "committed" for line in found)
    assert any("stranger" in line for line in found)


def test_a_file_system_without_extended_attributes_is_served(tmp_path: Path, strace: Callable[..., list[str]]) -> None:
    program = """
import anyio, sys
from staged import open_store
async def main():
    for name in ("a", "b"):
        async with open_store(sys.argv[1]).staged_write("full_drop") as tx:
            await tx.write(name, "1")
anyio.run(main)
"""
    run(program, tmp_path / "target", python=strace("flistxattr", "EOPNOTSUPP"))
    assert tree(tmp_path / "target") == {"b": "1"}


# --------------------------------------------------------------------------------------------------------- cancelled work


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
@pytest.mark.parametrize("cancelled", ["before the lock is taken", "after it"])
def test_a_task_that_is_cancelled_while_a_thread_takes_a_lock_for_it_leaks_none(
    tmp_path: Path, loop: str, cancelled: str
) -> None:
    program = """
import anyio, fcntl, os, sys, threading, time
from staged.drivers.local import LocalDriver
target, loop, cancelled = sys.argv[1:]
taking, go_on = threading.Event(), threading.Event()
take = fcntl.fcntl

def slow(file, operation, how):
    ours = os.readlink(f"/proc/self/fd/{file}").endswith("/lock") and not taking.is_set()
    if ours and cancelled == "before the lock is taken":
        taking.set()
        go_on.wait()
    taken = take(file, operation, how)
    if ours:
        taking.set()
        go_on.wait()
    return taken

async def main():
    driver, other = LocalDriver(target), LocalDriver(target)
    await driver.probe()
    fcntl.fcntl = slow
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(driver.lock, "lock")
        while not taking.is_set():
            await anyio.sleep(0.001)
        tasks.cancel_scope.cancel()
    go_on.set()
    for _ in range(1_000):
        if (lock := await other.lock("lock")) is not None:
            return
        await anyio.sleep(0.005)
    sys.exit("nobody has it, and nobody gets it")

anyio.run(main, backend=loop)
"""
    run(program, tmp_path / "target", loop, cancelled)


@pytest.mark.parametrize("mode", ["append", "full_drop"])
@pytest.mark.parametrize("late", ["write", "write anew", "dir"])
def test_what_a_thread_goes_on_to_stage_after_its_caller_was_cancelled_is_recorded_or_never_committed(
    tmp_path: Path, mode: str, late: str
) -> None:
    program = """
import asyncio, os, sys, threading, time
from staged import StagingError, open_store

target, mode, late = sys.argv[1:]
renaming, decided = threading.Event(), threading.Event()
rename = os.rename

def slow(source, name, **directories):
    if name == "late" and not renaming.is_set():
        renaming.set()
        decided.wait(0.5)
    rename(source, name, **directories)

os.rename = slow

async def stage(tx):
    if late == "dir":
        async with tx.dir() as local:
            with open(local + "/late", "w") as file:
                file.write("cancelled")
    else:
        await tx.write("late", "cancelled")

async def main():
    store = open_store(target, observers=[lambda event: decided.set() if type(event).__name__ == "Decided" else None])
    try:
        async with store.staged_write(mode) as tx:
            await tx.write("a", "1")
            staging = asyncio.create_task(stage(tx))
            while not renaming.is_set():
                await asyncio.sleep(0.001)
            while not staging.done():  # the first cancels the write, the next what takes it back
                staging.cancel()
                await asyncio.sleep(0.001)
            if late == "write anew":
                await tx.write("late", "new")
        print(tx.receipt.files)
    except StagingError as error:
        print(error.outcome)
    await asyncio.sleep(0.6)  # until all threads have ended

asyncio.run(main())
"""
    said = run(program, tmp_path / "target", mode, late).strip()
    # The files of a directory are adopted to the end, and recorded: then the cancellation is raised.
    committed = {"a": "1"} | {"write": {}, "write anew": {"late": "new"}, "dir": {"late": "cancelled"}}[late]
    assert (said, tree(tmp_path / "target")) == (str(len(committed)), committed)


# ---------------------------------------------------------------------------------------------------------------- stopped


def test_a_process_that_is_stopped_within_a_swap_of_the_head_keeps_others_waiting_and_harms_nothing(
    tmp_path: Path,
) -> None:
    program = """
import anyio, os, signal, sys, threading
from staged import open_store
pwrite, swaps = os.pwrite, 0

def stops(file, data, at):
    global swaps
    swaps += os.readlink(f"/proc/self/fd/{file}").endswith("/head")
    if swaps == int(sys.argv[2]):
        swaps += 1
        pwrite(file, data[: len(data) // 2], at)
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # this thread goes no further
    return pwrite(file, data, at)

os.pwrite = stops

async def main():
    async with open_store(sys.argv[1]).staged_write("full_drop") as tx:
        await tx.write("new", "1")

anyio.run(main)
"""

    async def load(target: Path, name: str, timeout: float) -> None:
        async with open_store(target).staged_write("append", lock_timeout=timeout) as tx:
            await tx.write(name, "1")

    async def meet(target: Path, writer: int, swap: int, then: signal.Signals) -> None:
        _, status = await anyio.to_thread.run_sync(os.waitpid, writer, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        assert tree(target) == ({"old": "1"} if swap < 3 else {"new": "1"})
        store = open_store(target)
        assert ((await store.status()).committing is not None) == (swap == 3)
        with pytest.raises(Busy) as caught:
            await load(target, "next", 0.1)
        assert caught.value.outcome == "untouched"
        driver = LocalDriver(str(target))
        before = await driver.read("head")
        assert before is not None
        swapped: list[str | None] = []

        async def contend() -> None:
            swapped.append(await driver.cas("head", before.body + b" ", before.token, durable=False))

        if then is signal.SIGCONT:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(contend)
                await anyio.sleep(0.2)
                assert swapped == [], "it passed one that is stopped within its swap"
                os.kill(writer, then)
            assert swapped == [None]
        else:
            os.kill(writer, then)
        await anyio.to_thread.run_sync(os.waitpid, writer, 0)
        await load(target, "next", 60.0)
        decided = swap == 3 or then is signal.SIGCONT
        assert tree(target) == ({"new": "1"} if decided else {"old": "1"}) | {"next": "1"}

    for swap, then in ((1, signal.SIGKILL), (2, signal.SIGCONT), (2, signal.SIGKILL), (3, signal.SIGCONT)):
        target = tmp_path / f"{swap}-{then.name}"
        anyio.run(load, target, "old", 0)
        child = subprocess.Popen([sys.executable, "-c", program, str(target), str(swap)], env=ENVIRONMENT)
        try:
            anyio.run(meet, target, child.pid, swap, then)
        finally:
            child.kill()
            child.wait()


def test_a_process_that_is_killed_before_its_first_write_of_a_record_leaves_a_target_that_is_served(
    tmp_path: Path,
) -> None:
    program = """
import anyio, os, signal, sys
from staged import open_store
pwrite = os.pwrite

def dies(file, data, at):
    if os.readlink(f"/proc/self/fd/{file}").endswith(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return pwrite(file, data, at)

os.pwrite = dies

async def main():
    async with open_store(sys.argv[1]).staged_write("append") as tx:
        await tx.write("new", "1")

anyio.run(main)
"""

    async def recover(target: Path) -> None:
        async with open_store(target) as store:
            recovered = await store.recover()
            assert recovered.damaged == ()
            assert (await store.status()).transactions == ()
            async with store.staged_write("append", lock_timeout=0) as tx:
                await tx.write("next", "1")

    for record in ("record", "head"):
        target = tmp_path / record
        command = [sys.executable, "-c", program, str(target), f"/{record}"]
        died = subprocess.run(command, check=False, env=ENVIRONMENT)
        assert died.returncode == -signal.SIGKILL
        anyio.run(recover, target)
        assert tree(target) == {"next": "1"}
        assert list((tmp_path / "_staged" / record / "tx").iterdir()) == []


# ------------------------------------------------------------------------------------------------------------ permissions

ORDINARY = """
import ctypes, os
def ordinary():
    # Root without its capabilities: the permissions of what it owns bind it.
    if os.geteuid() == 0:
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(header, none) == 0
"""


@pytest.mark.parametrize("closed", ["the target", "a directory that receives a file", "the parent"])
def test_a_target_that_cannot_be_written_is_refused_before_the_decision(tmp_path: Path, closed: str) -> None:
    program = (
        ORDINARY
        + """
import anyio, sys
from staged import StagedError, open_store
async def main():
    ordinary()
    store = open_store(sys.argv[1])
    for mode in sys.argv[2:]:
        try:
            async with store.staged_write(mode) as tx:
                await tx.write("d/new", "1")
        except StagedError as error:
            status = await store.status()
            print(mode, error.outcome, tx.phase.value, status.commits, status.committing, len(status.transactions))
anyio.run(main)
"""
    )
    target = tmp_path / "parent" / "target"
    shut = {"the target": target, "a directory that receives a file": target / "d", "the parent": target.parent}[closed]
    modes = {
        "the target": ["append", "overwrite_files", "full_drop"],
        "a directory that receives a file": ["append", "overwrite_files"],
        "the parent": ["full_drop"],
    }[closed]

    async def load(name: str) -> None:
        async with open_store(target).staged_write("append", lock_timeout=0) as tx:
            await tx.write(name, "1")

    anyio.run(load, "d/old")
    shut.chmod(0o500)
    try:
        said = run(program, target, *modes).splitlines()
    finally:
        shut.chmod(0o700)
    assert said == [f"{mode} untouched rolled back 1 None 0" for mode in modes]
    assert tree(target) == {"d/old": "1"}
    assert list((target.parent / "_staged" / "target" / "tx").iterdir()) == []
    anyio.run(load, "d/new")


def test_staging_that_was_closed_to_its_own_owner_is_cleaned_up_all_the_same(tmp_path: Path) -> None:
    program = (
        ORDINARY
        + """
import anyio, sys
from staged import open_store
async def main():
    ordinary()
    try:
        async with open_store(sys.argv[1]).staged_write("append") as tx, tx.dir() as local:
            os.makedirs(local + "/closed/below")
            os.chmod(local + "/closed/below", 0o500)
            os.chmod(local + "/closed", 0o500)
            raise ZeroDivisionError
    except ZeroDivisionError as error:
        print(tx.phase.value, *getattr(error, "__notes__", ()))
anyio.run(main)
"""
    )
    assert run(program, tmp_path / "target") == "rolled back\n"
    assert list((tmp_path / "_staged" / "target" / "tx").iterdir()) == []
