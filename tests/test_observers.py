"""What is made of events: logs, traces and progress bars; and that none of them tears a transaction."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest
from fsspec.callbacks import Callback
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from rich.console import Console
from rich.progress import Progress

import staged.sync
from staged import InvalidInput, observers, open_store
from staged.drivers.memory import MemoryDriver, MemoryStorage
from staged.model import Decided, Event
from staged.observers import Observer
from staged.progress import rich_progress
from staged.store import Store

pytestmark = pytest.mark.anyio


def memory(*told: Observer | Callback, storage: MemoryStorage | None = None) -> Store:
    return open_store(MemoryDriver(storage=storage or MemoryStorage()), observers=told)


async def load(store: Store, mode: str = "append", files: int = 3, **options: Any) -> str:
    """Three files of three bytes."""
    async with store.staged_write(mode, **options) as tx:
        for number in range(files):
            await tx.write(f"d/{number}", b"abc")
    return tx.id


async def fail(store: Store) -> str:
    with pytest.raises(ZeroDivisionError):
        async with store.staged_write("append") as tx:
            await tx.write("half", b"abc")
            raise ZeroDivisionError
    return tx.id


# ------------------------------------------------------------------------------------------------------------------ log


async def test_each_event_is_one_line_and_what_decides_or_ends_is_information(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "staged")
    heard: list[Event] = []
    store = memory(heard.append)
    await load(store)
    async with store.staged_write("append") as tx:
        await tx.delete("d/0")
    await fail(store.child("below"))
    lines = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "staged"]
    assert len(lines) == len(heard), "one line an event, for a child's too"
    for event, (level, line) in zip(heard, lines, strict=True):
        assert level == ("INFO" if type(event).__name__ in ("Decided", "Finished") else "DEBUG")
        assert event.transaction in line
        assert "\n" not in line
    said = " ".join(line for _, line in lines)
    for words in (
        "'d/0', 3 bytes",
        "prepared: 3 files, 9 bytes",
        "committed: 3 files, 9 bytes",
        "rolled_back",
        "removed 1",
    ):
        assert words in said


async def test_the_log_tells_neither_keys_nor_meta_nor_handles(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "staged")
    store = memory()
    async with store.staged_write("append", key="sesame", meta={"token": "hush"}) as tx:
        await tx.write("a", b"abc")
        (entry,) = tx.entries
    said = caplog.text
    assert tx.id in said
    for secret in ("sesame", "token", "hush", entry.handle, entry.identity):
        assert secret not in said.replace(tx.id, "")


# --------------------------------------------------------------------------------------------------------------- fsspec


async def test_a_callback_of_fsspec_counts_staged_files_towards_their_number() -> None:
    seen: list[tuple[int | None, int]] = []
    callback = Callback(hooks={"see": lambda size, value, **_: seen.append((size, value))})
    store = memory(callback)
    await load(store)
    assert seen == [(None, 1), (None, 2), (None, 3), (3, 3)]
    await load(store, "full_drop", 2)
    assert (callback.size, callback.value) == (5, 5)


@pytest.mark.parametrize("wrong", [5, "print", None])
def test_what_is_neither_called_nor_a_callback_is_no_observer(wrong: Any) -> None:
    with pytest.raises(InvalidInput, match="observer"):
        memory(wrong)


async def waits(event: Event) -> None:
    raise AssertionError


class Waits:
    async def __call__(self, event: Event) -> None:
        raise AssertionError


@pytest.mark.parametrize("wrong", [waits, Waits(), partial(waits), Waits().__call__, Waits, Callback])
def test_what_would_be_called_and_do_nothing_is_no_observer(wrong: Any) -> None:
    with pytest.raises(InvalidInput, match="observer"):
        memory(wrong)


@pytest.mark.parametrize("wrong", [print, "print", 5, None, Callback()])
def test_observers_are_a_list(wrong: Any) -> None:
    for open_one in (open_store, staged.sync.open_store):
        with pytest.raises(InvalidInput, match="list of observers"):
            open_one("memory://x", observers=wrong)


async def test_an_observer_that_returns_what_would_do_its_work_is_warned_of_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING, "staged")
    monkeypatch.setattr(observers, "_doubted", set())

    def factory(event: Event) -> Observer:
        return lambda event: None

    def wrapper(event: Event) -> object:
        return waits(event)

    await load(memory(rich_progress, factory, wrapper, lambda event: 5))  # type: ignore[arg-type, list-item]
    await load(memory(factory))  # type: ignore[arg-type]
    said = [record.getMessage() for record in caplog.records]
    for name in ("rich_progress", "factory", "wrapper"):
        assert sum(f"{name} returns a " in line for line in said) == 1, name
    assert len(said) == 3


# -------------------------------------------------------------------------------------------------------------- tracing


@pytest.fixture(scope="module")
def exported() -> Iterator[InMemorySpanExporter]:
    """What this process exports; a process has one provider, for ever."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    yield exporter
    provider.shutdown()


@pytest.fixture
def spans(exported: InMemorySpanExporter) -> Iterator[InMemorySpanExporter]:
    exported.clear()
    yield exported
    exported.clear()


def by_name(spans: Sequence[ReadableSpan]) -> dict[str, ReadableSpan]:
    assert len({span.name for span in spans}) == len(spans)
    return {span.name: span for span in spans}


async def test_a_transaction_is_a_span_around_its_staging_and_its_commit(spans: InMemorySpanExporter) -> None:
    with trace.get_tracer("test").start_as_current_span("mine") as mine:
        tx = await load(memory(), "full_drop")
    found = by_name(spans.get_finished_spans())
    assert set(found) == {"mine", "staged.transaction", "staged.stage", "staged.commit"}
    whole, stage, commit = (found[f"staged.{name}"] for name in ("transaction", "stage", "commit"))
    assert dict(whole.attributes or {}) == {
        "staged.id": tx,
        "staged.mode": "full_drop",
        "staged.files": 3,
        "staged.bytes": 9,
        "staged.phase": "committed",
    }
    assert whole.status.status_code is StatusCode.UNSET
    assert whole.parent == mine.get_span_context()
    assert stage.parent == commit.parent == whole.context
    times = [whole.start_time, stage.start_time, stage.end_time, commit.start_time, commit.end_time, whole.end_time]
    assert times == sorted(times, key=lambda time: time or 0)
    assert (whole.start_time, stage.end_time, whole.end_time) == (stage.start_time, commit.start_time, commit.end_time)
    assert stage.start_time != stage.end_time != commit.end_time


async def test_only_what_did_not_come_to_its_end_is_an_error_in_traces(spans: InMemorySpanExporter) -> None:
    store = memory()
    await load(store, key="k")
    await load(store, key="k")
    await load(store, "ignore")
    await fail(store)
    whole = [span for span in spans.get_finished_spans() if span.name == "staged.transaction"]
    assert [(span.attributes or {})["staged.phase"] for span in whole] == [
        "committed",
        "done",
        "skipped",
        "rolled_back",
    ]
    assert [span.status.status_code is StatusCode.ERROR for span in whole] == [False, False, False, True]
    assert whole[3].status.description == "rolled_back"


def test_a_span_of_the_synchronous_face_belongs_to_its_callers(spans: InMemorySpanExporter) -> None:
    with (
        trace.get_tracer("test").start_as_current_span("mine") as mine,
        staged.sync.open_store(MemoryDriver(storage=MemoryStorage())) as store,
        store.staged_write("append") as tx,
    ):
        tx.write("a", b"abc")
    assert by_name(spans.get_finished_spans())["staged.transaction"].parent == mine.get_span_context()


TRANSACTION = """
import json, sys
if sys.argv[1] == "absent":
    sys.modules["opentelemetry"] = sys.modules["opentelemetry.trace"] = None
import anyio
from staged import open_store

async def load():
    async with open_store("memory://x") as store, store.staged_write("append") as tx:
        await tx.write("a", b"1")
    return tx.receipt.phase

print(json.dumps([anyio.run(load), sorted(name for name, module in sys.modules.items() if module is not None)]))
"""


@pytest.mark.parametrize("api", ["absent", "not used"])
def test_who_collects_no_spans_pays_nothing_for_them(api: str) -> None:
    ran = subprocess.run([sys.executable, "-c", TRANSACTION, api], capture_output=True, text=True, check=True)
    phase, loaded = json.loads(ran.stdout)
    assert (phase, ran.stderr) == ("committed", "")
    assert not [name for name in loaded if name.startswith(("opentelemetry", "rich", "fsspec"))]


# ------------------------------------------------------------------------------------------------------------- progress


async def test_each_transaction_is_a_bar_that_tells_where_it_stands() -> None:
    progress = Progress(console=Console(file=io.StringIO()))
    seen: list[tuple[str, float, float | None]] = []

    def see(event: Event) -> None:
        task = progress.tasks[-1]
        seen.append((task.description, task.completed, task.total))

    store = memory(rich_progress(progress, title="Load"), see)
    assert progress.tasks == []
    await load(store)
    assert seen == [
        ("Load: staging", 3, None),
        ("Load: staging", 6, None),
        ("Load: staging", 9, None),
        ("Load: waiting for the commit", 9, 9),
        ("Load: publishing", 9, 9),
        ("Load: publishing", 9, 9),
        ("Load: committed", 9, 9),
    ]
    await fail(store)
    assert [(task.description, task.completed, task.fields["files"]) for task in progress.tasks] == [
        ("Load: committed", 9, 3),
        ("Load: rolled back", 3, 1),
    ]
    assert all(task.stop_time is not None for task in progress.tasks)


async def test_a_bar_of_a_known_total_is_there_at_once_and_counts_files_where_asked() -> None:
    progress = Progress(console=Console(file=io.StringIO()))
    store = memory(rich_progress(progress, total=4, unit="files"))
    (task,) = progress.tasks
    assert (task.description, task.completed, task.total) == ("staging", 0, 4)
    await load(store)
    assert (task.description, task.completed, task.total) == ("committed", 3, 3)
    await fail(store)
    assert [task.completed for task in progress.tasks] == [3, 1]


# -------------------------------------------------------------------------------------------------------------- failing


class BrokenCallback(Callback):
    def relative_update(self, inc: int = 1) -> None:
        raise RuntimeError("no callback")


def broken_progress() -> Observer:
    progress = Progress(console=Console(file=io.StringIO()))
    observer = rich_progress(progress, total=1)
    progress.remove_task(progress.tasks[0].id)
    return observer


async def test_an_observer_of_any_kind_that_fails_is_logged_and_tears_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.ERROR, "staged")

    def fails(event: Event) -> None:
        if isinstance(event, Decided):
            raise RuntimeError("no observer")

    heard: list[Event] = []
    storage = MemoryStorage()
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", sys)  # an API without any of its names
    await load(memory(fails, BrokenCallback(), broken_progress(), heard.append, storage=storage))
    assert len(storage.below("target")) == 3
    assert len(heard) == 7
    reasons = {str(record.exc_info[1]) for record in caplog.records if record.exc_info}
    for reason in ("no observer", "no callback", "has no attribute 'get_tracer'"):
        assert any(reason in found for found in reasons), reason
    assert any(isinstance(record.exc_info[1], KeyError) for record in caplog.records if record.exc_info), "the bar's"
