"""SIGKILL and SIGSTOP of real processes that write to a cloud store over the wire."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import azurite
import pytest
from azurite import AzuriteServer
from cloud_kills import CHANGES, NEXT, NEXT_CHANGES, PRIOR, WORKS
from dfs import DfsServer
from gcs import GcsServer
from mirror import LOAD, Mirror
from s3 import S3Server
from test_adls import AdlsHarness
from test_azure_blob import BlobHarness
from test_gcs import GcsHarness
from test_s3 import S3Harness

from staged import open_store

SOAK = int(os.environ.get("STAGED_SOAK", "1"))
CALLS = 45


def cases(store: str) -> list[str]:
    found = [
        f"{name},{number},{moment}"
        for shift, name in enumerate(WORKS)
        for number in range(1, CALLS)
        for at, moment in enumerate(("before", "after"))
        if SOAK > 1 or (2 * number + at + shift) % 11 == 0
    ]
    stops = [("append", call) for call in ("seal", "put_segment ledger-", "publish", "put_segment outcome")]
    at_last = ("swap",) if store in ("adls", "onelake") else ("publish", "remove")
    stops += [("drop", call) for call in ("put_segment ledger-", *at_last, "put_segment outcome")]
    return found + [f"stops,{call},{work}" for work, call in stops]


def ran(store: str, words: list[str], endpoint: str = "") -> tuple[dict[str, dict[str, Any]], str]:
    """What the program told of each case, and the end of what it said besides."""
    program = [sys.executable, str(Path(__file__).with_name("cloud_kills.py")), store, *words]
    own = os.environ | {"STAGED_ENDPOINT": endpoint}
    run = subprocess.run(program, capture_output=True, text=True, check=False, env=own)
    assert run.returncode == 0, run.stderr[-3000:]
    return {line["case"]: line for line in map(json.loads, run.stdout.splitlines())}, run.stderr[-3000:]


@contextmanager
def served(store: str) -> Iterator[tuple[Callable[[], Any], str]]:
    """What makes a target on a server, and where that is, if a target's URL does not say it."""
    if store == "s3":
        with S3Server() as server:
            yield partial(S3Harness, server.client(), server.bucket(), lossy=True), server.url
    elif store == "gcs":
        with GcsServer() as service:
            yield partial(GcsHarness, service), service.url
    elif store == "azure_blob":
        if why := azurite.missing():
            pytest.skip(why)
        with AzuriteServer() as blobs:
            yield partial(BlobHarness, blobs.container()), ""
    else:
        with DfsServer(onelake=store == "onelake") as lake:
            yield partial(AdlsHarness, lake), ""


@pytest.mark.parametrize("store", ["adls", "onelake", "s3", "gcs", "azure_blob"])
def test_processes_killed_stopped_and_overtaken_leave_old_or_new_and_lose_or_double_nothing(
    store: str, figure: Callable[[str, str], None]
) -> None:
    ends: Counter[str] = Counter()
    with served(store) as (target, endpoint):
        harnesses = {case: target() for case in cases(store)}
        for harness in harnesses.values():
            for name, data in PRIOR.items():
                anyio.run(harness.put, name, data)
        words = [f"{case}={harness.url}" for case, harness in harnesses.items()]
        lines, said = ran(store, words, endpoint)
        assert lines.keys() == harnesses.keys()
        for case, harness in harnesses.items():
            line, content = lines[case], harness.content()
            name = case.partition(",")[0]
            assert line["recovered"], (line, said)
            assert not anyio.run(harness.leftovers), line
            if name == "stops":
                written = WORKS[case.rpartition(",")[2]].apply(PRIOR)
                assert written is not None
                # Who was overtaken before its decision is told so, and its files are not there; after it they are, once.
                undecided = line["first"] == 3
                assert line["asleep"] and line["second"] == 0, line
                assert line["first"] in (0, 2, 3), line
                assert content == NEXT.apply(PRIOR if undecided else written), line
                ends["overtaken, " + ("untouched" if undecided else "completed by the other")] += 1
            else:
                assert content in (PRIOR, WORKS[name].apply(PRIOR)), line
                ends[f"{'killed' if line['killed'] else 'ran'}, {'old' if content == PRIOR else 'new'}"] += 1
    figure(f"processes over {store}", ", ".join(f"{count} {end}" for end, count in sorted(ends.items())))
    assert ends["killed, old"] > 2
    assert ends["killed, new"] > 2


def test_processes_stopped_and_overtaken_over_a_landing_zone_lose_and_double_no_row(
    figure: Callable[[str, str], None],
) -> None:
    calls = {
        "append": ("put_segment ledger-", "publish", "publish+8"),
        "drop": ("swap", "swap+40", "publish", "publish+8"),
    }
    ends: Counter[str] = Counter()
    with DfsServer(onelake=True) as server:
        mirrors = {f"stops,{call},{name}": Mirror(server) for name in calls for call in calls[name]}

        def look(number: int) -> None:
            if number % 3 == 0:
                for mirror in mirrors.values():
                    mirror.replicator.poll()

        async def load() -> None:
            for mirror in mirrors.values():
                async with open_store(mirror.driver()) as store:
                    await LOAD(store)

        anyio.run(load)
        server.before = look
        lines, said = ran(
            "open_mirroring", [f"{case}={mirror.url}/Files/LandingZone/t" for case, mirror in mirrors.items()]
        )
        assert lines.keys() == mirrors.keys()
        for case, mirror in mirrors.items():
            line, work = lines[case], CHANGES[case.rpartition(",")[2]]
            mirror.settle()
            assert line["recovered"], (line, said)
            assert (line["asleep"] or "+" in case) and line["second"] == 0, (line, said)
            assert line["first"] in (0, 2, 3), (line, said)
            undecided = line["first"] == 3
            rows = LOAD.apply({}) if undecided else work.apply(LOAD.apply({}))
            assert mirror.rows() == sorted(NEXT_CHANGES.apply(rows).items()), (line, said)
            drops = ["gone"] if work.mode == "full_drop" and not undecided else []
            assert (mirror.drops(), mirror.wrong(*(["t"] if drops else []))) == (drops, []), (line, said)
            ends["ran" if not line["asleep"] else "untouched" if undecided else "completed"] += 1
    figure("processes over open mirroring", ", ".join(f"{count} {end}" for end, count in sorted(ends.items())))
    assert ends["completed"] > 3


WRITERS, COMMITS = 4, 6


@pytest.mark.parametrize("store", ["adls", "onelake", "s3", "gcs", "azure_blob"])
def test_processes_that_race_for_one_target_commit_one_after_another_and_none_is_lost(
    store: str, figure: Callable[[str, str], None]
) -> None:
    with served(store) as (target, endpoint):
        harness = target()
        program = [sys.executable, str(Path(__file__).with_name("cloud_races.py")), store, harness.url]
        own = os.environ | {"STAGED_ENDPOINT": endpoint}
        racing = [
            subprocess.Popen([*program, f"w{number}", str(COMMITS)], stdout=subprocess.PIPE, text=True, env=own)
            for number in range(WRITERS)
        ]
        lines = [json.loads(line) for one in racing for line in one.communicate(timeout=300)[0].splitlines()]
        assert [one.returncode for one in racing] == [0] * WRITERS
        assert len(lines) == WRITERS * COMMITS
        said = Counter(line["said"] for line in lines)
        files: dict[str, bytes] = harness.content()

        async def look() -> tuple[int, list[str]]:
            async with open_store(harness.process()) as opened:
                status = await opened.status()
                order: list[str] = []
                last = status.last.transaction if status.last is not None else None
                while last is not None:  # from the newest to the first
                    order.append(last)
                    last = (await opened.outcome(last)).previous
                await opened.gc(older_than=timedelta(0))
                return status.commits, order

        count, order = anyio.run(look)
        # Nobody else was told that all is well than who committed; who was overtaken may have been completed by another.
        committed = [line for line in lines if line["id"] in order]
        assert count == len(committed) == len(order)
        assert {line["id"] for line in lines if line["said"] == "committed"} <= set(order)
        assert not set(order) & {line["id"] for line in lines if line["said"] == "untouched"}
        assert files.keys() - {"everybody's"} == {line["file"] for line in committed}
        overwrites = {line["id"] for line in committed if line["mode"] == "overwrite_files"}
        assert files["everybody's"].decode() == next(one for one in order if one in overwrites)
        assert not anyio.run(harness.leftovers)
    figure(
        f"processes that race over {store}",
        f"{len(committed)} of {len(lines)} committed, in one order; told {dict(said)}",
    )
    assert len(committed) >= COMMITS
