"""Loss of power: what a promise rests on is on the disk before it is made, and whatever else is lost, old or new is left."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import get_args

import anyio
import pytest
import traces
from disk import Log, Mark, Names, Recorder, Sync, Write
from syncs import NAMED, PLACE, Checker, InlineDriver, Life, Scenario, Sweep, before, head_of, record, record_of

from staged.model import Head, Mode, TxRecord, TxState
from staged.records import encode
from staged.states import new_id

Figure = Callable[[str, str], None]

SOAK = int(os.environ.get("STAGED_SOAK", "1"))

ALL = [
    *(
        Scenario(mode, files, inside, life)
        for mode in Mode
        for files in (2, 33)
        for inside in (False, True)
        for life in get_args(Life)
    ),
    # More directories than are synced one by one.
    Scenario(Mode.FULL_DROP, 40, inside=True, spread=40),
    Scenario(Mode.APPEND, 40, spread=40),
    Scenario(Mode.APPEND, 3, paths=True),
    Scenario(Mode.OVERWRITE_FILES, 40, paths=True),
]
SOME = [
    Scenario(Mode.APPEND),
    Scenario(Mode.APPEND, inside=True, life="resumed"),
    Scenario(Mode.APPEND, 3, paths=True),
    Scenario(Mode.ERROR),
    Scenario(Mode.IGNORE, life="resumed"),
    Scenario(Mode.OVERWRITE_FILES, inside=True),
    Scenario(Mode.OVERWRITE_FILES, life="rolled back"),
    Scenario(Mode.OVERWRITE_PARTITIONS),
    Scenario(Mode.OVERWRITE_PARTITIONS, 33, inside=True),
    Scenario(Mode.FULL_DROP),
    Scenario(Mode.FULL_DROP, life="resumed"),
    Scenario(Mode.FULL_DROP, life="rolled back"),
    Scenario(Mode.FULL_DROP, inside=True),
    Scenario(Mode.FULL_DROP, 40, inside=True, spread=40),
]
"""Each way of publishing, and each way of ending, at least once."""


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A directory that costs no disk where there is one: what is on the disk is told by the log."""
    shared = "/dev/shm"
    where = shared if os.access(shared, os.W_OK) else str(tmp_path)
    with tempfile.TemporaryDirectory(dir=where, prefix="staged-syncs-") as path:
        yield Path(path)


def recorded(scenario: Scenario, root: Path) -> Log:
    """The log of a scenario; each is recorded in a directory of its own."""
    place = root / f"{len(list(root.iterdir()))}"
    place.mkdir()
    return record(scenario, str(place))


# ------------------------------------------------------------------------------------------------------------- in order


def test_all_that_a_promise_rests_on_is_on_the_disk_before_it_is_made(memory: Path, figure: Figure) -> None:
    syncs, calls = 0, 0
    for scenario in ALL:
        log = recorded(scenario, memory)
        checker = Checker(log, scenario.area)
        assert checker.wrong == [], f"{scenario}: {checker.wrong[:5]}"
        looked = {"decision", "segment", "freed", "acknowledged", "deleted"}
        if scenario.life != "rolled back" or scenario.first.files:
            looked |= {"staged", "publish", "published"}
        if scenario.life != "block":
            looked |= {"staged", "prepared"}
        if scenario.life != "rolled back" and scenario.mode is Mode.FULL_DROP:
            looked |= {"remove"} if scenario.inside else {"swap"}
        assert looked <= checker.seen, f"{scenario}: the checker saw only {checker.seen}"
        syncs += sum(isinstance(operation, Sync) for operation in log.operations)
        calls += len(log)
    figure(
        "order of syncs", f"{len(ALL)} transactions, {calls:,} file-system calls, {syncs:,} syncs, each promise checked"
    )


def test_a_durable_swap_is_on_the_disk_by_its_name_and_whole_without_any_segment(memory: Path) -> None:
    tx = new_id()
    opened = TxRecord(id=tx, owner="me", mode=Mode.APPEND, state=TxState.OPEN, block=False, base=0, nonce=new_id())

    async def swap(driver: InlineDriver) -> None:
        await driver.probe()
        await driver.cas("head", encode(Head(epoch=7, nonce=new_id())), None, durable=True)
        await driver.cas(f"tx/{tx}/record", encode(opened), None, durable=True)

    recorder = Recorder(str(memory))
    with recorder.installed() as log:
        anyio.run(swap, InlineDriver(f"{memory}/{PLACE}"))
    disk, area = log.durable(len(log)), Scenario(Mode.APPEND).area
    assert head_of(disk, area).epoch == 7
    assert record_of(disk, area, tx) == opened


NOBODYS = {
    # The name of the directory for old trees: nobody is promised an old tree after a loss of power.
    "cas > _sync_segments > sync_directories: AREA",
    # Before a swap that must be durable, where it is not known that the earlier one is: its process may have been killed
    # between its write and its sync. See the test that kills it there.
    "cas: AREA/head",
    "cas: AREA/tx/ID/record",
}
"""Syncs of which some that find work are not missed in an order of events without a death."""


def test_no_sync_that_finds_work_can_be_left_out_unnoticed(memory: Path, figure: Figure) -> None:
    scenarios = ALL if SOAK > 1 else [SOME[5], SOME[7], SOME[9], SOME[11], SOME[2]]
    left: Counter[str] = Counter()
    idle = noticed = 0
    for scenario in scenarios:
        log = recorded(scenario, memory)
        for index, operation in enumerate(log.operations):
            if not isinstance(operation, Sync):
                continue
            if log.is_idle(index):
                idle += 1
            elif Checker(log.without(index), scenario.area).wrong:
                noticed += 1
            else:
                left[operation.site.replace(scenario.area, "AREA")] += 1
    assert left.keys() <= NOBODYS, left
    assert noticed > 20 * len(scenarios)
    figure("syncs left out", f"{noticed:,} noticed, {sum(left.values())} nobody's, {idle:,} that had nothing to do")


# ------------------------------------------------------------------------------------------------------------- by chance


def cases(log: Log, name: str, kinds: int, least: int = 0) -> list[tuple[int, str]]:
    """Every call after which power may be lost, with every kind of loss, in an order of chance that is always the same."""
    found = [(at, kind) for at in range(least, len(log) + 1) for kind in [*NAMED, *(f"dice {n}" for n in range(kinds))]]
    random.Random(name).shuffle(found)
    return found


def report(sweeps: list[Sweep], kind: str, figure: Figure) -> None:
    wrong = [what for sweep in sweeps for what in sweep.wrong]
    verdicts = [verdict for sweep in sweeps for verdict in sweep.verdicts.values()]
    decided = Counter(verdict.decided for verdict in verdicts)
    waiting = sum(bool(verdict.prepared) for verdict in verdicts)
    figure(
        kind,
        f"{sum(sweep.losses for sweep in sweeps):,} losses of power left {len(verdicts):,} different disks: "
        f"{decided[0]:,} before any commit, {decided[1]:,} old, {decided[2]:,} new, {waiting:,} of them with a prepared "
        f"transaction; {len(wrong)} wrong",
    )
    assert not wrong, "\n".join(wrong[:10])
    assert decided[1] and decided[2], "the sweep saw only one kind of end"


def swept(memory: Path, scenarios: list[Scenario], sweep_one: Callable[[Sweep, Log], Awaitable[None]]) -> list[Sweep]:
    """A sweep of each scenario. One loop does: what reaches the disk does not depend on it."""
    sweeps = []
    for number, scenario in enumerate(scenarios):
        log = recorded(scenario, memory)
        (place := memory / f"sweep-{number}").mkdir()
        sweeps.append(Sweep(scenario, str(place)))
        anyio.run(sweep_one, sweeps[-1], log)
    return sweeps


def test_a_loss_of_power_after_any_call_leaves_old_or_new_and_whoever_comes_next_goes_on(
    memory: Path, figure: Figure
) -> None:
    async def sweep_one(sweep: Sweep, log: Log) -> None:
        for at, kind in cases(log, str(sweep.scenario), 4 * SOAK)[: 85 * SOAK]:
            await sweep.lose(log, at, kind)

    report(swept(memory, ALL if SOAK > 1 else SOME, sweep_one), "loss of power", figure)


def test_power_that_is_lost_again_while_a_loss_is_recovered_from_loses_nothing_more(
    memory: Path, figure: Figure
) -> None:
    async def sweep_one(sweep: Sweep, log: Log) -> None:
        # Where something is decided and not complete, recovery has most to do.
        later = next(at for at, operation in enumerate(log.operations) if operation == Mark("seal"))
        for at, kind in cases(log, f"{sweep.scenario} first", 4, later)[: 12 * SOAK]:
            first = await sweep.lose(log, at, kind)
            for again, how in cases(first.log, f"{sweep.scenario} {at} {kind}", 4)[: 5 * SOAK]:
                await sweep.lose(first.log, again, how)

    report(swept(memory, [SOME[9], SOME[12], SOME[1]], sweep_one), "loss of power in recovery", figure)


def test_a_process_killed_after_any_call_is_recovered_from_though_power_is_lost_next(
    memory: Path, figure: Figure
) -> None:
    async def sweep_one(sweep: Sweep, log: Log) -> None:
        head = log.now.find(f"{sweep.scenario.area}/head")
        changes = [at for at, operation in enumerate(log.operations, 1) if isinstance(operation, (Names, Write))]
        swaps = [at for at in changes if isinstance(write := log.operations[at - 1], Write) and write.node == head]
        # First where a decided commit is taken over, from its decision to the end; then anywhere.
        points = [at for at in changes if swaps[-2] <= at <= swaps[-1]][: 16 * SOAK]
        points += random.Random(str(sweep.scenario)).sample(changes, min(len(changes), 8 * SOAK))
        for at in points:
            killed = await sweep.kill(log, at)
            await sweep.lose(killed.log, len(killed.log), "nothing was kept")
            for then, how in cases(killed.log, f"{sweep.scenario} {at}", 4, at)[: 3 * SOAK]:
                await sweep.lose(killed.log, then, how)

    report(swept(memory, [SOME[9], SOME[7], SOME[12]], sweep_one), "loss of power after a kill", figure)


# ---------------------------------------------------------------------------------------------------------- as it happens


@pytest.mark.skipif(SOAK <= 1, reason="traces real processes: `nox -s soak`, or STAGED_SOAK above 1")
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("scenario", SOME, ids=str)
def test_the_kernel_sees_the_calls_that_are_recorded_in_their_order(scenario: Scenario, tmp_path: Path) -> None:
    root, trace = tmp_path / "root", tmp_path / "trace"
    root.mkdir()
    asked = json.dumps(astuple(scenario))
    program = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("syncs.py")), str(root), asked]
    strace = ["strace", "-f", "-y", "-xx", "-s", "1000000", "-e", f"trace={traces.CALLS}", "-o", str(trace)]
    done = subprocess.run([*strace, *program], capture_output=True, text=True, check=False)
    if "ptrace" in done.stderr and "not permitted" in done.stderr:
        pytest.skip("processes may not be traced here")
    assert done.returncode == 0, done.stderr[-2000:]
    with trace.open(errors="surrogateescape") as lines:
        log = traces.read(lines, os.path.realpath(root), before(scenario))
    assert traces.describe(log) == json.loads(done.stdout)
    checker = Checker(log, scenario.area)
    assert checker.wrong == []
    assert {"decision", "freed", "acknowledged"} <= checker.seen
