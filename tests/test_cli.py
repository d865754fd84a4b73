"""The command: what a shell user is promised, through real runs over real directories."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import anyio
import pytest
from click.testing import CliRunner, Result

from staged import cli, open_store
from staged.cli import commands, main, parse_duration
from staged.drivers.local import LocalDriver
from staged.errors import CommitInDoubt
from staged.model import Status, TxState

# A load that kills its own process at an event: `python -c … TARGET EVENT MODE NAME`.
KILLED = """
import os, signal, sys, anyio
from staged import open_store

target, event, mode, name = sys.argv[1:]

def die(happened):
    if type(happened).__name__ == event:
        os.kill(os.getpid(), signal.SIGKILL)

async def load():
    async with open_store(target, observers=[die]) as store, store.staged_write(mode) as tx:
        await tx.write(name, b"new")

anyio.run(load)
"""

# The command. A shell that starts tests in the background lets them ignore Ctrl-C.
INTERRUPTIBLE = """
import signal
from staged import cli

signal.signal(signal.SIGINT, signal.default_int_handler)
cli.main()
"""

# The same, with a Ctrl-C at the moment of the decision.
INTERRUPTED = """
import os, signal
from staged import cli

signal.signal(signal.SIGINT, signal.default_int_handler)

def interrupt(event):
    if type(event).__name__ == "Decided":
        os.kill(os.getpid(), signal.SIGINT)

real = cli.open_store
cli.open_store = lambda url, *, observers=(), **options: real(url, observers=[*observers, interrupt], **options)
cli.main()
"""


def staged(*words: str | Path) -> Result:
    """Run the command in this process."""
    result = CliRunner().invoke(commands(), [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


def python(*words: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a Python process to its end."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **env})


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def fill(directory: Path, files: dict[str, bytes]) -> Path:
    """Write files below a directory."""
    for name, data in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return directory


def kill_load(target: Path, event: str, mode: str = "full_drop", name: str = "new.txt") -> None:
    """A load in a process of its own that dies at an event."""
    died = python("-c", KILLED, target, event, mode, name)
    assert died.returncode == -signal.SIGKILL, died.stderr


@contextmanager
def held(target: Path) -> Iterator[None]:
    """Another live writer holds the target, as long as the block lasts."""
    lock = anyio.run(LocalDriver(str(target)).lock, "lock")
    assert lock is not None
    try:
        yield
    finally:
        lock.release()


async def status_of(target: Path) -> Status:
    async with open_store(target) as store:
        return await store.status()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return fill(tmp_path / "source", {"a.txt": b"a", "deep/er/b.txt": b"bb", "deep/c.txt": b"", "[red]x.txt": b"x"})


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return fill(tmp_path / "target", {"old.txt": b"old"})


# ---------------------------------------------------------------------------------------------------------------- put


def test_put_loads_a_directory_all_or_nothing(source: Path, target: Path) -> None:
    result = staged("put", source, target, "--mode", "full_drop", "--json")
    assert result.exit_code == 0, result.stderr
    assert tree(target) == tree(source)
    receipt = json.loads(result.stdout)
    assert (receipt["phase"], receipt["files"], receipt["bytes"]) == ("committed", 4, 4)
    # One of the names is taken: none of the others may appear.
    fill(source, {"more.txt": b"more", "deep/more.txt": b"more"})
    refused = staged("put", source, target, "--mode", "append")
    assert refused.exit_code == 1
    assert refused.stderr.startswith("Error: ") and refused.stderr.count("\n") == 1
    assert "more.txt" not in tree(target) and len(tree(target)) == 4


def test_put_loads_more_files_than_it_stages_at_once(tmp_path: Path, target: Path) -> None:
    source = fill(tmp_path / "many", {f"{number:03}.txt": b"%d" % number for number in range(100)})
    assert staged("put", source, target, "--mode", "overwrite", "--durability", "none").exit_code == 0
    assert tree(target) == tree(source)


def test_put_puts_a_file_under_its_name_beside_a_directorys_files(source: Path, target: Path) -> None:
    result = staged("put", source / "deep" / "er" / "b.txt", source / "deep", target, "--mode", "append")
    assert result.exit_code == 0, result.stderr
    assert tree(target) == {"old.txt": b"old", "b.txt": b"bb", "er/b.txt": b"bb", "c.txt": b""}


def test_put_prints_a_receipt_that_reads_like_what_happened(source: Path, target: Path) -> None:
    result = staged("put", source, target, "--mode", "append", "--key", "[bold]monday[/bold]")
    assert result.exit_code == 0
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if len(line.split()) > 1)
    assert (lines["phase"].strip(), lines["files"].strip()) == ("committed", "4")
    assert lines["key"].strip() == "[bold]monday[/bold]", "a key is shown as it is, not as markup"


def test_put_under_one_key_works_once(source: Path, target: Path) -> None:
    first = staged("put", source, target, "--mode", "full_drop", "--key", "monday", "--json")
    fill(source, {"a.txt": b"changed"})
    second = staged("put", source, target, "--mode", "full_drop", "--key", "monday", "--json")
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert json.loads(second.stdout)["phase"] == "done"
    assert tree(target)["a.txt"] == b"a"


def test_put_writes_nothing_where_the_mode_says_ignore(source: Path, target: Path) -> None:
    result = staged("put", source, target, "--mode", "ignore", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["phase"] == "skipped"
    assert tree(target) == {"old.txt": b"old"}


def test_put_replaces_the_partitions_that_it_names(tmp_path: Path) -> None:
    target = fill(tmp_path / "t", {"day=1/x": b"1", "day=2/x": b"2", "day=3/x": b"3"})
    source = fill(tmp_path / "s", {"day=1/y": b"new"})
    words = ("put", source, target, "--mode", "overwrite_partitions", "--partition", "day=1", "--partition", "day=2")
    assert staged(*words).exit_code == 0
    assert tree(target) == {"day=1/y": b"new", "day=3/x": b"3"}


def test_put_empties_a_target_only_when_it_is_told_to(tmp_path: Path, target: Path) -> None:
    (empty := tmp_path / "empty").mkdir()
    refused = staged("put", empty, target, "--mode", "full_drop")
    assert refused.exit_code == 1 and tree(target) == {"old.txt": b"old"}
    assert staged("put", empty, target, "--mode", "full_drop", "--allow-empty").exit_code == 0
    assert tree(target) == {}


def test_put_refuses_two_sources_for_one_path(source: Path, target: Path) -> None:
    result = staged("put", source / "a.txt", source, target, "--mode", "append")
    assert result.exit_code == 1
    assert "would both become 'a.txt'" in result.stderr
    assert tree(target) == {"old.txt": b"old"}


def test_put_refuses_what_it_could_not_load_whole(source: Path, target: Path) -> None:
    os.mkfifo(source / "pipe")
    pipe = staged("put", source, target, "--mode", "append")
    os.unlink(source / "pipe")
    os.symlink(target, source / "link")
    link = staged("put", source, target, "--mode", "append")
    os.unlink(source / "link")
    os.symlink(source / "nowhere", source / "dangling")
    dangling = staged("put", source, target, "--mode", "append")
    assert [result.exit_code for result in (pipe, link, dangling)] == [1, 1, 1]
    assert "not a regular file" in pipe.stderr and "symbolic link" in link.stderr and "nowhere" not in dangling.stdout
    assert tree(target) == {"old.txt": b"old"}


def test_a_source_that_fails_in_the_middle_leaves_the_target_untouched_and_its_own_error(
    source: Path, target: Path
) -> None:
    # Linux lets one open its own memory, and refuses to read its first page.
    result = staged("put", source, "/proc/self/mem", target, "--mode", "full_drop", "--json")
    assert result.exit_code == 1
    fault = json.loads(result.stderr)
    assert fault["error"] == "OSError" and "Input/output error" in fault["message"]
    assert fault["outcome"] == "untouched"
    assert tree(target) == {"old.txt": b"old"}
    assert json.loads(staged("status", target, "--json").stdout)["transactions"] == []


def test_put_shows_progress_on_a_terminal_and_keeps_stdout_for_the_receipt(source: Path, target: Path) -> None:
    words = ("-m", "staged", "put", source, target, "--mode", "append", "--json")
    shown = python(*words, FORCE_COLOR="1", COLUMNS="100")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["files"] == 4
    assert "4/4 files" in shown.stderr
    quiet = python(*words[:-2], "overwrite_files", "--json")
    assert quiet.stderr == ""


def test_the_progress_bar_moves_within_a_file(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counted: list[tuple[int, float]] = []
    progress = pytest.importorskip("rich.progress").Progress
    advance = progress.advance

    def note(self: Any, task: Any, size: float = 1) -> None:
        advance(self, task, size)
        counted.append((self.tasks[0].fields["files"], self.tasks[0].completed))

    monkeypatch.setattr(progress, "advance", note)
    (source / "big.bin").write_bytes(bytes(5_000_000))
    assert staged("put", source / "big.bin", target, "--mode", "append").exit_code == 0
    assert [files for files, _ in counted] == [0] * len(counted)
    assert len(counted) > 3 and counted[-1][1] == 5_000_000


# ------------------------------------------------------------------------------------------------- looking and repairing


def test_recover_rolls_back_what_a_dead_process_had_not_decided(target: Path) -> None:
    kill_load(target, "Prepared")
    status = json.loads(staged("status", target, "--json").stdout)
    (dead,) = status["transactions"]
    assert (dead["state"], dead["alive"], status["committing"]) == ("prepared", False, None)
    assert dead["id"] in staged("status", target).stdout
    recovered = staged("recover", target, "--json")
    assert recovered.exit_code == 0
    assert json.loads(recovered.stdout)["rolled_back"] == [dead["id"]]
    assert tree(target) == {"old.txt": b"old"}
    outcome = staged("outcome", target, dead["id"], "--json")
    assert (outcome.exit_code, json.loads(outcome.stdout)["state"]) == (0, "rolled_back")


def test_recover_completes_what_a_dead_process_had_decided(target: Path) -> None:
    kill_load(target, "Decided")
    tx = json.loads(staged("status", target, "--json").stdout)["committing"]
    assert json.loads(staged("outcome", target, tx, "--json").stdout)["state"] == "committing"
    recovered = staged("recover", target)
    assert recovered.exit_code == 0 and tx in recovered.stdout
    assert tree(target) == {"new.txt": b"new"}
    assert "committed" in staged("outcome", target, tx).stdout


def test_recover_recursively_finds_every_target_below(tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    for name, event in (("a", "Decided"), ("deep/b", "Prepared"), ("deep/er/c", "Staged")):
        kill_load(fill(lake / name, {"old.txt": b"old"}), event)
    result = staged("recover", lake, "--recursive", "--json")
    assert result.exit_code == 0, result.stderr
    targets = {entry["target"]: entry for entry in json.loads(result.stdout)["targets"]}
    assert set(targets) == {str(lake / "a"), str(lake / "deep/b"), str(lake / "deep/er/c")}
    assert [len(targets[str(lake / name)]["finished"]) for name in ("a", "deep/b", "deep/er/c")] == [1, 0, 0]
    assert [len(targets[str(lake / name)]["rolled_back"]) for name in ("a", "deep/b", "deep/er/c")] == [0, 1, 1]
    assert tree(lake / "a") == {"new.txt": b"new"}
    assert tree(lake / "deep/b") == tree(lake / "deep/er/c") == {"old.txt": b"old"}
    assert staged("recover", lake / "a", "--recursive").stdout.count("target") == 1, "a target itself is found as well"


def test_recover_recursively_goes_on_after_a_target_that_fails(tmp_path: Path) -> None:
    first, second = (fill(tmp_path / "lake" / name, {"old.txt": b"old"}) for name in "ab")
    kill_load(first, "Decided", "append")
    fill(first, {"new.txt": b"foreign"})
    kill_load(second, "Decided")
    result = staged("recover", tmp_path / "lake", "--recursive", "--json")
    assert result.exit_code == 4
    assert json.loads(result.stderr)["error"] == "CommitBlocked"
    assert tree(second) == {"new.txt": b"new"}


def test_recover_recursively_is_refused_for_what_is_not_a_local_directory(tmp_path: Path) -> None:
    assert staged("recover", "memory://x", "--recursive").exit_code == 2
    assert staged("recover", tmp_path / "absent", "--recursive").exit_code == 2


def test_status_cuts_nothing_off_on_a_narrow_terminal(target: Path) -> None:
    kill_load(target, "Staged", "overwrite_partitions", "p/new.txt")
    kill_load(target, "Prepared")
    found = anyio.run(status_of, target)
    for columns in ("40", "60", "200"):
        shown = python("-m", "staged", "status", target, COLUMNS=columns).stdout
        assert max(map(len, shown.splitlines())) <= int(columns)
        for tx in found.transactions:
            for value in (tx.id, tx.state.value, tx.mode.value, tx.owner.rpartition(":")[0]):
                assert value in "".join(shown.split()), (columns, value)


def test_status_tells_what_is_left_for_recover_from_what_lives_or_waits_to_be_resumed(target: Path) -> None:
    async def leave() -> str:
        async with open_store(target) as store:
            waiting = await store.begin("append")
            await waiting.prepare()
            await waiting.release()
            living = await store.begin("append")
            shown = staged_status()
            await living.rollback()
            return shown

    def staged_status() -> str:
        return python("-m", "staged", "status", target).stdout

    assert "staged recover" not in anyio.run(leave)
    kill_load(target, "Staged")
    assert "not ended 2 dead 1, to be cleaned up by `staged recover`" in " ".join(staged_status().split())


def test_recover_says_where_nobody_ever_wrote(source: Path, target: Path) -> None:
    assert "nobody has written here" in staged("recover", target).stdout
    assert staged("put", source, target, "--mode", "append").exit_code == 0
    assert "nobody" not in staged("recover", target).stdout


def test_gc_collects_what_is_old_and_nothing_younger(source: Path, target: Path) -> None:
    for _ in range(2):
        tx = json.loads(staged("put", source, target, "--mode", "full_drop", "--json").stdout)["id"]
    assert json.loads(staged("gc", target, "--json").stdout)["collected"] == 0
    collected = staged("gc", target, "--older-than", "0", "--json")
    assert collected.exit_code == 0 and json.loads(collected.stdout)["collected"] > 0
    assert tree(target) == tree(source)
    asked = staged("outcome", target, tx)
    assert asked.exit_code == 3 and "unknown" in asked.stdout, "nothing is left that could tell"


def test_commands_say_in_json_what_they_say_in_tables(source: Path, target: Path) -> None:
    tx = json.loads(staged("put", source, target, "--mode", "append", "--key", "k", "--json").stdout)["id"]
    for words in (("status", target), ("outcome", target, tx), ("recover", target), ("gc", target)):
        table, as_json = staged(*words), staged(*words, "--json")
        assert (table.exit_code, as_json.exit_code) == (0, 0)
        assert isinstance(json.loads(as_json.stdout), dict)
        assert table.stdout.strip() and not table.stdout.lstrip().startswith("{")


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("0", timedelta(0)),
        ("30s", timedelta(seconds=30)),
        ("15m", timedelta(minutes=15)),
        ("12h", timedelta(hours=12)),
        ("7d", timedelta(days=7)),
        ("90", timedelta(seconds=90)),
    ],
)
def test_a_duration_is_read_as_it_is_written(text: str, duration: timedelta) -> None:
    assert parse_duration(text) == duration


@pytest.mark.parametrize("text", ["", "d", "-1d", "1.5h", "7 d", "7D", "1w", "9" * 30 + "d", "٣d"])
def test_a_duration_that_is_not_one_is_wrong_usage(text: str, target: Path) -> None:
    result = staged("gc", target, f"--older-than={text}")
    assert result.exit_code == 2 and "duration" in result.stderr


# --------------------------------------------------------------------------------------------------------- exit codes


def test_wrong_usage_exits_with_2(source: Path, target: Path) -> None:
    for words in (
        ("put", source, target),
        ("put", source, target, "--mode", "replace"),
        ("put", source / "absent", target, "--mode", "append"),
        ("recover", target, "--resolve", "both"),
        ("nonsense",),
    ):
        assert staged(*words).exit_code == 2, words


def test_an_error_that_left_the_target_untouched_exits_with_1_and_says_so_in_json(source: Path, target: Path) -> None:
    fill(target, {"a.txt": b"theirs"})
    result = staged("put", source, target, "--mode", "append", "--json")
    assert result.exit_code == 1 and result.stdout == ""
    fault = json.loads(result.stderr)
    assert list(fault) == ["error", "message", "outcome", "transaction"]
    assert (fault["error"], fault["outcome"]) == ("Exists", "untouched")
    assert fault["transaction"] is not None and "a.txt" in fault["message"]


def test_a_record_that_cannot_be_trusted_exits_with_3(source: Path, target: Path) -> None:
    assert staged("put", source, target, "--mode", "append").exit_code == 0
    (target.parent / "_staged" / target.name / "head").write_bytes(b"garbage")
    result = staged("status", target, "--json")
    assert result.exit_code == 3
    assert json.loads(result.stderr)["error"] == "DamagedRecord"


@pytest.mark.parametrize(("resolve", "left"), [("keep", b"foreign"), ("replace", b"new")])
def test_a_blocked_commit_exits_with_4_until_it_is_resolved(target: Path, resolve: str, left: bytes) -> None:
    kill_load(target, "Decided", "append")
    fill(target, {"new.txt": b"foreign"})
    blocked = staged("recover", target)
    assert blocked.exit_code == 4 and "new.txt" in blocked.stderr
    assert staged("recover", target, "--resolve", resolve).exit_code == 0
    assert tree(target) == {"old.txt": b"old", "new.txt": left}


def test_a_busy_target_exits_with_5(source: Path, target: Path) -> None:
    assert staged("status", target).exit_code == 0
    with held(target):
        result = staged("put", source, target, "--mode", "append", "--lock-timeout", "0")
    assert result.exit_code == 5
    assert tree(target) == {"old.txt": b"old"}
    assert staged("put", source, target, "--mode", "append", "--lock-timeout", "0").exit_code == 0


def test_an_error_of_a_load_names_its_file_the_state_of_the_target_and_the_next_step(
    source: Path, target: Path
) -> None:
    unreadable = staged("put", source, "/proc/self/mem", target, "--mode", "full_drop").stderr
    assert "'/proc/self/mem'. The target is untouched." in unreadable
    fill(target, {"a.txt": b"theirs"})
    taken = staged("put", source, target, "--mode", "append").stderr
    assert "'a.txt'" in taken and taken.endswith(" The target is untouched.\n")
    with held(target):
        busy = staged("put", source, target, "--mode", "append", "--lock-timeout", "0").stderr
    assert "Nothing was changed. Try again later." in busy
    partitions = staged("put", source, target, "--mode", "append", "--partition", "p").stderr
    assert "--partition goes with mode 'overwrite_partitions'" in partitions


def test_no_error_speaks_of_python_to_who_uses_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    said = CommitInDoubt("Ask store.outcome('0123456789abcdef01234567') later, or run recover().")
    assert cli._report(said, as_json=False) == 3
    assert capsys.readouterr().err == (
        "Error: Ask `staged outcome URL 0123456789abcdef01234567` later, or run `staged recover`.\n"
    )


def test_an_error_of_one_target_of_many_names_it(tmp_path: Path) -> None:
    blocked = fill(tmp_path / "lake" / "a", {"old.txt": b"old"})
    kill_load(blocked, "Decided", "append")
    fill(blocked, {"new.txt": b"foreign"})
    assert staged("recover", tmp_path / "lake", "--recursive").stderr.startswith(f"Error: {blocked}: Transaction ")


def test_an_error_is_wrapped_between_words_on_a_terminal_and_one_line_elsewhere(source: Path, target: Path) -> None:
    fill(target, {"a.txt": b"theirs"})
    words = ("-m", "staged", "put", source / "a.txt", target, "--mode", "append")
    assert python(*words, COLUMNS="30").stderr.count("\n") == 1
    shown = python(*words, FORCE_COLOR="1", COLUMNS="30").stderr
    lines = shown[shown.index("Error: ") :].splitlines()
    assert len(lines) > 1 and max(map(len, lines)) <= 30
    assert "The target is untouched." in " ".join(map(str.strip, lines))


def test_ctrl_c_rolls_back_says_so_and_exits_with_130(source: Path, target: Path) -> None:
    assert staged("status", target).exit_code == 0
    command = [sys.executable, "-c", INTERRUPTIBLE, "put", str(source), str(target), "--mode", "full_drop"]
    with held(target):
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        # It is interrupted when everything is staged and it waits for its turn.
        while not any(tx.state is TxState.PREPARED for tx in anyio.run(status_of, target).transactions):
            assert running.poll() is None, running.communicate()
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate()
    assert (running.returncode, out) == (130, "")
    assert "rolled back" in err and err.count("\n") == 1
    assert tree(target) == {"old.txt": b"old"}
    assert anyio.run(status_of, target).transactions == ()


def test_ctrl_c_after_the_decision_completes_the_commit_and_says_so(source: Path, target: Path) -> None:
    result = python("-c", INTERRUPTED, "put", source, target, "--mode", "full_drop", "--json")
    assert result.returncode == 0, result.stderr
    assert "completed" in result.stderr
    assert json.loads(result.stdout)["phase"] == "committed"
    assert tree(target) == tree(source)


# ------------------------------------------------------------------------------------------------------------- the rest


def test_help_lists_the_exit_codes(source: Path) -> None:
    text = staged("--help").stdout
    for code in ("0", "1", "2", "3", "4", "5", "130"):
        assert any(line.split()[:1] == [code] for line in text.splitlines()), code


def test_help_cuts_nothing_off_on_a_narrow_terminal() -> None:
    wide = " ".join(staged("--help").stdout.split())
    assert "Load files and directories into a store, all or nothing." in wide and "…" not in wide
    for words in ((), ("put",), ("status",), ("outcome",), ("recover",), ("gc",), ("demo",)):
        narrow = python("-m", "staged", *words, "--help", COLUMNS="50").stdout
        assert "..." not in narrow.replace("[ARGS]...", "").replace("SOURCE...", "")
        assert max(map(len, narrow.splitlines())) <= 50, words


def test_the_package_runs_as_a_module() -> None:
    helped = python("-m", "staged", "--help")
    assert helped.returncode == 0
    assert helped.stdout.startswith("Usage: staged ")


def test_a_missing_extra_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("click", "rich"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, module, None)
            with pytest.raises(SystemExit) as ended:
                main()
        assert ended.value.code == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and module in error and "pip install 'staged[cli]'" in error


def test_a_file_url_is_a_directory(source: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/by-url"
    assert staged("put", source, url, "--mode", "error").exit_code == 0
    assert tree(tmp_path / "by-url") == tree(source)
    assert staged("recover", url, "--recursive").exit_code == 0


def test_a_url_without_a_driver_is_one_clear_error(source: Path) -> None:
    result = staged("put", source, "gopher://x/y", "--mode", "append")
    assert result.exit_code == 1 and result.stderr.startswith("Error: There is no driver for gopher")


def test_commands_run_one_after_another_in_one_process(source: Path, tmp_path: Path) -> None:
    runs = [partial(staged, "put", source, tmp_path / name, "--mode", "error") for name in ("x", "y")]
    assert [run().exit_code for run in runs] == [0, 0]


# ----------------------------------------------------------------------------------- what goes wrong beside the commands


def damage(target: Path) -> str:
    """A transaction that died, whose record is garbage since."""
    kill_load(target, "Staged")
    [tx] = [tx.id for tx in anyio.run(status_of, target).transactions]
    for file in (target.parent / "_staged" / target.name / "tx" / tx).glob("record*"):
        file.write_bytes(b"garbage")
    return tx


def test_a_damaged_record_is_named_and_exits_with_4_whatever_else_was_repaired(target: Path) -> None:
    tx = damage(target)
    assert staged("status", target).exit_code == 0
    for words in (("recover", target), ("recover", target, "--recursive"), ("gc", target, "--older-than", "0")):
        result = staged(*words)
        assert result.exit_code == 4 and tx in result.stderr and result.stderr.startswith("Error: "), words
        fault = json.loads(staged(*words, "--json").stderr)
        assert (fault["error"], fault["transaction"]) == ("DamagedRecord", tx)


@contextmanager
def as_nobody() -> Iterator[None]:
    """This process as a user who may not do everything."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(was)


def test_recover_recursively_names_the_targets_that_are_closed_to_this_user(source: Path) -> None:
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        lake = Path(root, "lake")
        for name in "ab":
            assert staged("put", source, lake / name, "--mode", "append").exit_code == 0
        area = lake / "_staged"
        assert staged("recover", lake, "--recursive").exit_code == 0
        area.chmod(0o755)
        for name in "ab":
            (area / name).chmod(0o700 if os.geteuid() == 0 else 0)
        with as_nobody():
            results = [
                staged("recover", lake, "--recursive"),
                staged("status", lake / "a"),
                staged("recover", lake / "a"),
            ]
        (area / "a").chmod(0o700)
        (area / "b").chmod(0o700)
    assert [result.exit_code for result in results] == [1, 1, 1], "nothing is in doubt"
    for name in "ab":
        assert f"Error: {lake / name}: " in results[0].stderr


def test_the_command_refuses_a_store_that_is_gone_with_its_process(source: Path) -> None:
    for words in (("put", source, "memory://x", "--mode", "append"), ("status", "memory://x"), ("gc", "MEMORY://x")):
        result = staged(*words)
        assert result.exit_code == 1 and "memory://" in result.stderr and result.stdout == ""


def test_output_that_cannot_be_written_is_one_message(source: Path, target: Path) -> None:
    for words in (
        ("status", target),
        ("status", target, "--json"),
        ("recover", target.parent, "--recursive"),
        ("put", source, target, "--mode", "full_drop"),
    ):
        command = [sys.executable, "-m", "staged", *map(str, words)]
        with open("/dev/full", "w") as full:
            ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert ended.returncode == 1
        assert ended.stderr.count("\n") == 1 and "No space left" in ended.stderr, ended.stderr
        assert "untouched" not in ended.stderr


def test_ctrl_c_beside_the_work_ends_with_130_and_no_traceback(
    target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cli, "_show", interrupt)
        result = staged("status", target)
    assert (result.exit_code, result.stderr) == (130, "Interrupted.\n")
    with monkeypatch.context() as patch:
        patch.setattr("builtins.__import__", interrupt)
        with pytest.raises(SystemExit) as ended:
            main()
    assert ended.value.code == 130


def test_a_slip_in_a_path_is_told_from_nothing_to_do(tmp_path: Path) -> None:
    result = staged("recover", tmp_path / "absent", "--recursive")
    assert result.exit_code == 2 and "no such directory" in result.stderr
    assert "nobody has written here" in staged("gc", tmp_path / "absent").stdout


def test_the_command_tells_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", {"staged": "1.2.3"}.__getitem__)
    assert staged("--version").stdout == "staged 1.2.3\n"


def test_a_target_whose_control_area_lies_elsewhere_is_served_by_naming_that_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    target, where = str(tmp_path / "target"), ["--staging", str(tmp_path / "elsewhere")]
    put = CliRunner().invoke(commands(), ["put", str(tmp_path / "file"), target, "--mode", "append", *where, "--json"])
    assert put.exit_code == 0, put.stderr
    id = json.loads(put.stdout)["id"]
    for line, found in (
        (["status", target], '"commits":1'),
        (["outcome", target, id], '"committed"'),
        (["recover", target], "{"),
        (["gc", target], "{"),
    ):
        ran = CliRunner().invoke(commands(), [*line, *where, "--json"])
        assert ran.exit_code == 0, ran.stderr
        assert found in ran.stdout.replace(" ", "")
    assert not (tmp_path / "_staged").exists()
