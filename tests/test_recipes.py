"""The programs of tests/recipes, which the README quotes, keep what they promise."""

from __future__ import annotations

import re
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any

import anyio.lowlevel
import httpx
import polars as pl
import pyarrow as pa
import pytest
import uvicorn
from anyio import to_thread
from recipes import backfill_days, incremental_append, nightly_reload, upload_endpoint

from staged import sync

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "tests" / "recipes"
README = (ROOT / "README.md").read_text()


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    return tmp_path / "lake"


def test_every_recipe_that_the_readme_quotes_is_part_of_a_program_that_is_tested_and_every_program_is_linked() -> None:
    section = re.split(r"^## ", README.split("\n## Recipes\n")[1], flags=re.MULTILINE)[0]
    quoted = re.findall(r"\(tests/recipes/(\w+)\.py\)[^`]*?```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(quoted) == section.count("```python") > 0
    for name, block in quoted:
        program = (RECIPES / f"{name}.py").read_text()
        assert any("\n" + textwrap.indent(block, " " * depth) in program for depth in (0, 4, 8)), name
    linked = re.findall(r"\(tests/recipes/(\w+)\.py\)", section)
    assert sorted(linked) == sorted(path.stem for path in RECIPES.glob("*.py"))


# ---------------------------------------------------------------------------------------------------------------- reload


@pytest.mark.anyio
async def test_one_failing_table_of_forty_stays_as_it_was_and_the_others_are_new(tmp_path: Path) -> None:
    lake, now, most = str(tmp_path / "lake"), 0, 0

    def source(name: str, generation: int) -> Callable[[], Any]:
        async def read() -> pa.Table:
            nonlocal now, most
            now, most = now + 1, max(most, now + 1)
            await anyio.lowlevel.checkpoint()
            now -= 1
            if (name, generation) == ("t13", 2):
                raise ConnectionError("broke off")
            return pa.table({"generation": [generation]})

        return read

    names = [f"t{number}" for number in range(40)]
    for generation in (1, 2):
        ended = await nightly_reload.reload_all(lake, {name: source(name, generation) for name in names}, at_once=4)
        assert set(ended) == set(names)
    found = {name: await to_thread.run_sync(pl.read_parquet, f"{lake}/{name}") for name in names}
    assert {name: frame["generation"].to_list() for name, frame in found.items()} == {
        name: [1] if name == "t13" else [2] for name in names
    }
    assert [name for name, end in ended.items() if isinstance(end, ConnectionError)] == ["t13"]
    assert sum(getattr(end, "phase", None) == "committed" for end in ended.values()) == 39
    assert 1 < most <= 4


# ---------------------------------------------------------------------------------------------------------------- append

# Once it has loaded all that it needs, it dies before its n-th access to files.
DIES = """
import os, signal, sys
from recipes.incremental_append import append_new

def hook(event, args):
    global left
    if event == "open" or event.startswith(("os.", "fcntl.")):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

left, database, lake, trial = int(sys.argv[1]), *sys.argv[2:]
append_new(database, trial, at_most=4)
sys.addaudithook(hook)
append_new(database, lake, at_most=4)
print(int(sys.argv[1]) - left)
"""


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """Ten events."""
    with closing(sqlite3.connect(tmp_path / "events.db")) as source:
        source.execute("CREATE TABLE events (id INTEGER PRIMARY KEY, value TEXT)")
        source.executemany("INSERT INTO events (value) VALUES (?)", [(f"v{number}",) for number in range(10)])
        source.commit()
    return tmp_path / "events.db"


def appended(lake: Path) -> bool:
    """Whether the lake has every event, once."""
    return pl.read_parquet(lake).sort("id").rows() == [(number + 1, f"v{number}") for number in range(10)]


def test_a_run_that_is_killed_and_started_again_until_it_ends_appends_every_row_once(
    tmp_path: Path, database: Path, lake: Path, figure: Callable[[str, str], None]
) -> None:
    def run(at: int, lake: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", DIES, str(at), str(database), str(lake), str(tmp_path / f"trial{at}")]
        return subprocess.run(command, cwd=RECIPES.parent, capture_output=True, text=True, check=False, timeout=60)

    accesses = int(run(10**9, tmp_path / "whole").stdout)
    at = kills = decided = 0
    while (ended := run(at := at + accesses // 28, lake)).returncode == -signal.SIGKILL:
        kills += 1
        with sync.open_store(lake) as store:
            decided += store.status().committing is not None
    assert ended.returncode == 0, ended.stderr
    assert appended(lake)
    assert kills > 5
    figure("incremental append", f"killed {kills} times, {decided} of them when a batch was decided; every row once")


def test_two_runs_at_once_append_every_row_once(database: Path, lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, both, met = pl.read_database, threading.Barrier(2, timeout=60), threading.local()

    def meets_the_other(query: str, source: Any) -> pl.DataFrame:
        rows = read(query, source)
        if not hasattr(met, "other"):
            met.other = both.wait()
        return rows

    monkeypatch.setattr(incremental_append.polars, "read_database", meets_the_other)
    with ThreadPoolExecutor() as threads:
        runs = [threads.submit(incremental_append.append_new, str(database), str(lake), 4) for _ in range(2)]
    for run in runs:
        run.result()
    assert appended(lake)


# -------------------------------------------------------------------------------------------------------------- backfill


@pytest.mark.anyio
async def test_a_backfill_replaces_its_days_empties_those_without_rows_and_touches_no_other(tmp_path: Path) -> None:
    lake, days = str(tmp_path / "lake"), [date(2026, 11, number) for number in range(1, 6)]
    await backfill_days.backfill(lake, days, pl.LazyFrame({"day": days * 2, "n": range(10)}))
    new = pl.LazyFrame({"day": [days[1], days[3], days[4]], "n": [100, 300, 400]})
    await backfill_days.backfill(lake, days[1:4], new)
    found = await to_thread.run_sync(lambda: pl.read_parquet(lake, hive_partitioning=True).select("day", "n").rows())
    assert sorted(found) == [(days[0], 0), (days[0], 5), (days[1], 100), (days[3], 300), (days[4], 4), (days[4], 9)]


@pytest.mark.anyio
async def test_a_backfill_of_days_of_which_none_has_rows_empties_them_all(tmp_path: Path) -> None:
    lake, days = str(tmp_path / "lake"), [date(2026, 11, number) for number in range(1, 4)]
    events = pl.LazyFrame({"day": days, "n": range(3)})
    await backfill_days.backfill(lake, days, events)
    await backfill_days.backfill(lake, days[1:], events.clear())
    found = await to_thread.run_sync(lambda: pl.read_parquet(lake, hive_partitioning=True).select("day", "n").rows())
    assert found == [(days[0], 0)]


# --------------------------------------------------------------------------------------------------------------- uploads


@pytest.fixture
def server(lake: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    monkeypatch.setenv("LAKE", str(lake))
    config = uvicorn.Config(upload_endpoint.app, port=0, ws="none", log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started or not thread.is_alive())
    port = server.servers[0].sockets[0].getsockname()[1]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        yield client
    server.should_exit = True
    thread.join()


def until(holds: Callable[[], bool]) -> None:
    while not holds():
        time.sleep(0.01)


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_uploads_are_taken_in_whole_and_a_form_all_or_nothing(server: httpx.Client, lake: Path) -> None:
    sent = b"x" * 3_000_000
    answer = server.put(
        "/files/raw/big.bin", content=(sent[start : start + 65_536] for start in range(0, len(sent), 65_536))
    )
    assert (answer.status_code, answer.json()) == (201, {"bytes": len(sent)})
    for phase in ("committed", "done"):
        form = [("files", ("a.csv", b"1")), ("files", ("d/b.csv", b"2"))]
        answer = server.post("/batches", files=form, headers={"Idempotency-Key": "k"})
        assert (answer.status_code, answer.json()) == (201, {"phase": phase})
    expected = {"raw/big.bin": sent, "a.csv": b"1", "d/b.csv": b"2"}
    assert tree(lake) == expected
    for key, name, status in (("l", "../../etc/passwd", 400), ("m", "a.csv", 409)):
        form = [("files", ("c.csv", b"3")), ("files", (name, b"4"))]
        answer = server.post("/batches", files=form, headers={"Idempotency-Key": key})
        assert (answer.status_code, answer.json()["outcome"]) == (status, "untouched")
    assert tree(lake) == expected


def test_of_a_client_that_goes_away_halfway_nothing_is_left(server: httpx.Client, lake: Path) -> None:
    staging = lake.parent / "_staged" / "lake" / "tx"
    with socket.create_connection((server.base_url.host, server.base_url.port)) as client:
        client.sendall(b"PUT /files/a.bin HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\n\r\n" + bytes(1_000_000))
        until(lambda: any(path.stat().st_size > 100_000 for path in staging.rglob("*") if path.is_file()))
    until(lambda: not any(staging.iterdir()))
    assert not lake.exists()
    with sync.open_store(lake) as store:
        assert (store.status().commits, store.status().transactions) == (0, ())
