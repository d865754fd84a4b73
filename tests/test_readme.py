"""The README: each of its snippets runs as it stands, over a directory in place of /lake; its links lead somewhere."""

from __future__ import annotations

import ast
import inspect
import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import aclosing, closing
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import polars
import pyarrow as pa
import pytest
from anyio import to_thread
from dfs import DfsServer
from pyarrow.dataset import write_dataset
from recipes.etl import Entity

import staged.sync
from staged import Store, errors, open_store
from staged.drivers.memory import MemoryDriver
from staged.model import Receipt
from staged.testing.conformance import DriverConformance
from staged.testing.harness import Harness

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
# Those that install are what the continuous integration runs.
SHELL = [
    text for text in re.findall(r"^```shell\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL) if "pip" not in text
]
TABLE = pa.table({"n": [1, 2, 3]})


def first_lines(blocks: list[str]) -> list[str]:
    return [block.splitlines()[0] for block in blocks]


def elsewhere(text: str, root: Path) -> str:
    """The same, below a directory of the test."""
    return re.sub(r"(?<![\w.])/(?=(lake|tmp)\b)", f"{root}/", text)


async def what_it_uses(block: str, root: Path) -> dict[str, Any]:
    """The names that a snippet takes for granted, and the files."""

    async def chunks() -> Any:
        yield b"some"
        yield b"chunks"

    async def read() -> pa.Table:
        return TABLE

    lake = str(root / "lake" / "flights")
    (root / "tmp").mkdir()
    (root / "tmp" / "a.csv").write_text("a")
    async with open_store(lake) as store, store.staged_write("append") as tx:
        await tx.write_table(TABLE, "there.parquet")
        for path in re.findall(r'tx\.delete\("(.+?)"\)', block):
            await tx.write(path, b"old")
    return {
        **{"anyio": anyio, "closing": closing, "polars": polars, "sqlite3": sqlite3, "staged": staged, "Path": Path},
        **{"to_thread": to_thread, "open_store": open_store, "write_dataset": write_dataset, "Receipt": Receipt},
        **{"DriverConformance": DriverConformance, "Harness": Harness, "MyHarness": MemoryDriver},
        **{"table": TABLE, "frame": polars.DataFrame(TABLE), "batch": TABLE.to_batches()[0], "chunks": chunks()},
        **{"changed": pa.table({"id": [1], "v": ["a"]}), "gone": pa.table({"id": [2], "v": ["b"]})},
        **{"Any": Any, "Entity": Entity, "Store": Store, "aclosing": aclosing, "pyarrow": pa},
        **{"store": open_store(lake), "lake": lake, "at_once": 4, "tables": {"a": read, "b": read}},
    }


@pytest.fixture
def mirrored() -> Iterator[str]:
    """The address of a mirrored database."""
    with DfsServer(onelake=True) as server:
        server.add_item("workspace", "sales.MountedRelationalDatabase")
        yield f"{server.url}/workspace/sales.MountedRelationalDatabase?sig=1"


@pytest.mark.parametrize("block", PYTHON, ids=first_lines(PYTHON))
def test_every_python_snippet_runs(block: str, tmp_path: Path, mirrored: str) -> None:
    names = anyio.run(what_it_uses, block, tmp_path)
    block = re.sub(r"abfss://workspace@onelake[^\"]*", mirrored, block)
    code = compile(elsewhere(block, tmp_path), "README.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if code.co_flags & inspect.CO_COROUTINE:
        anyio.run(partial(eval, code, names))
    else:
        exec(code, names)
    tx = names.get("tx")
    assert tx is None or tx.receipt.phase == "committed"
    assert "ended" not in names or {receipt.phase for receipt in names["ended"].values()} == {"committed"}
    assert "directory" not in names or names["frame"]["n"].to_list() == [1, 2, 3]


@pytest.mark.parametrize("block", SHELL, ids=first_lines(SHELL))
def test_every_shell_snippet_runs_but_those_that_install(block: str, tmp_path: Path) -> None:
    (command := tmp_path / "bin" / "staged").parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m staged "$@"\n')
    command.chmod(0o755)
    for source in re.findall(r"staged put (\S+)", block):
        (tmp_path / source).mkdir(parents=True)
        (tmp_path / source / "a.csv").write_text("a")
    env = {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}"}
    ran = subprocess.run(
        ["sh", "-ec", elsewhere(block, tmp_path)], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert (tmp_path / "lake" / "flights" / "a.csv").read_text() == "a"


def test_every_link_leads_to_a_file_or_a_heading() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    headings = {f"#{heading.lower().replace(' ', '-')}" for heading in re.findall(r"^#+ (.+)$", README, re.MULTILINE)}
    assert len(links) > 6
    assert [link for link in links if link not in headings and not (ROOT / link).is_file()] == []


def test_every_error_that_a_user_can_meet_is_in_the_table() -> None:
    known = set(errors.__all__) - {"Fate", "StagedError", "InvalidPath"}
    section = README.split("\n## When something goes wrong\n")[1].split("\n## ")[0]
    assert known == {name for name in re.findall(r"`(\w+)`", section) if name in known}
