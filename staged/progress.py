"""Progress bars for observers of a store. rich is the caller's: nothing of it is imported here."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Literal

from staged.model import Decided, Event, Finished, Prepared, Staged
from staged.observers import Observer

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["rich_progress"]


def rich_progress(
    progress: Progress, *, title: str = "", total: int | None = None, unit: Literal["bytes", "files"] = "bytes"
) -> Observer:
    """Show what a store does in a `rich.progress.Progress`: a bar for each transaction.

    A bar's description says where the transaction stands; its field `files` counts what is staged.

    Args:
        progress: What to show it in, with any columns.
        title: Put before the description.
        total: How much will be staged, where that is known; then the first bar is there at once.
        unit: What the bars measure.
    """
    files = Counter[str]()
    tasks: dict[str, TaskID] = {}

    def describe(state: str) -> str:
        return f"{title}: {state}" if title else state

    def add() -> TaskID:
        return progress.add_task(describe("staging"), total=total, files=0)

    waiting = [] if total is None else [add()]

    def observe(event: Event) -> None:
        tx = event.transaction
        if tx not in tasks:
            tasks[tx] = waiting.pop() if waiting else add()
        task = tasks[tx]
        match event:
            case Staged(entry=entry):
                files[tx] += 1
                progress.update(task, advance=entry.size if unit == "bytes" else 1, files=files[tx])
            case Prepared():
                size = event.bytes if unit == "bytes" else event.files
                progress.update(task, description=describe("waiting for the commit"), completed=size, total=size)
            case Decided():
                progress.update(task, description=describe("publishing"))
            case Finished(receipt=receipt):
                progress.update(task, description=describe(receipt.phase.replace("_", " ")))
                progress.stop_task(task)
                del tasks[tx], files[tx]

    return observe
