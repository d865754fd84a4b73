"""Events, to whoever listens: logs and traces are made from them here, progress bars by those who show them."""

from __future__ import annotations

import inspect
import logging
import sys
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol, runtime_checkable

from staged.errors import InvalidInput
from staged.model import Decided, Event, Finished, Prepared, Published, Receipt, Removed, Staged

__all__ = ["Callback", "Observer", "compose", "notify"]

Observer = Callable[[Event], None]
"""Called with each event, in the event loop; it must not block."""

_log = logging.getLogger("staged")

_doubted: set[str] = set()
"""Observers that were warned of."""


@runtime_checkable
class Callback(Protocol):
    """What an `fsspec.callbacks.Callback` offers: it is told of each staged file, and of their number on prepare."""

    def set_size(self, size: int) -> object: ...

    def relative_update(self, inc: int = 1) -> object: ...


def compose(observers: Iterable[Observer | Callback]) -> tuple[Observer, ...]:
    """A store's observers: its log and its traces, then what the caller passed.

    Raises:
        InvalidInput: One is neither callable nor a callback, or a class, or an `async def`; or they are no list.
    """
    if isinstance(observers, str) or not isinstance(observers, Iterable):
        raise InvalidInput(f"observers= is a list of observers, not {observers!r}.")
    return (_write_log, _trace, *map(_observer, observers))


def notify(observers: Sequence[Observer], event: Event) -> None:
    """Hand an event to every observer; one that fails is logged, never raised."""
    for observer in observers:
        try:
            returned: object = observer(event)
            if returned is not None:
                _doubt(observer, returned)
        except Exception:
            _log.exception("An observer failed on %s.", type(event).__name__)


def _doubt(observer: Observer, returned: object) -> None:
    """Warn, once for each observer, of one that only seems to be called: its work would be in what it returned."""
    if inspect.iscoroutine(returned):
        returned.close()
    elif not (callable(returned) or isinstance(returned, Awaitable)):
        return
    name = getattr(observer, "__qualname__", type(observer).__qualname__)
    if name not in _doubted:
        _doubted.add(name)
        _log.warning(
            "The observer %s returns a %s, which nobody calls or awaits: an observer does its work when it is called.",
            name,
            type(returned).__name__,
        )


def _observer(observer: Observer | Callback) -> Observer:
    if isinstance(observer, type):
        raise InvalidInput(
            f"An observer is called with each event; {observer.__qualname__} is a class: pass an instance."
        )
    if isinstance(observer, Callback):
        return _tell(observer)
    if not callable(observer):
        raise InvalidInput(f"An observer is called with each event; {observer!r} cannot be called.")
    if inspect.iscoroutinefunction(observer) or inspect.iscoroutinefunction(type(observer).__call__):
        raise InvalidInput(f"An observer is called, not awaited; {observer!r} is an async def.")
    return observer


def _tell(callback: Callback) -> Observer:
    staged = 0

    def observe(event: Event) -> None:
        nonlocal staged
        if isinstance(event, Staged):
            staged += 1
            callback.relative_update(1)
        elif isinstance(event, Prepared):
            callback.set_size(staged)

    return observe


def _write_log(event: Event) -> None:
    """One line an event, without handles, keys and meta: those may tell what is nobody else's business."""
    match event:
        case Staged(tx, entry):
            _log.debug("Transaction %s staged %r, %d bytes.", tx, entry.path, entry.size)
        case Prepared(tx, files, size):
            _log.debug("Transaction %s is prepared: %d files, %d bytes.", tx, files, size)
        case Decided(tx, epoch, publish, remove):
            _log.info("Transaction %s is decided, epoch %d: %d to publish, %d to remove.", tx, epoch, publish, remove)
        case Published(tx, entries):
            _log.debug("Transaction %s published %d.", tx, entries)
        case Removed(tx, entries):
            _log.debug("Transaction %s removed %d.", tx, entries)
        case Finished(tx, receipt):
            _log.info("Transaction %s is %s: %d files, %d bytes.", tx, receipt.phase, receipt.files, receipt.bytes)


def _trace(event: Event) -> None:
    """A span for a transaction that ended, around one for its staging and one for its commit."""
    # Whoever collects spans has loaded OpenTelemetry's API already: nothing is imported for those who do not.
    api = sys.modules.get("opentelemetry.trace")
    if api is None or not isinstance(event, Finished):
        return
    receipt = event.receipt
    end = time.time_ns()
    staged = end - round(1e9 * (receipt.commit_seconds or 0.0))
    begin = staged - round(1e9 * (receipt.staging_seconds or 0.0))
    tracer = api.get_tracer("staged")
    whole = tracer.start_span("staged.transaction", start_time=begin, attributes=_attributes(receipt))
    if receipt.phase not in ("committed", "done", "skipped"):
        whole.set_status(api.Status(api.StatusCode.ERROR, receipt.phase))
    inside = api.set_span_in_context(whole)
    if begin < staged:
        tracer.start_span("staged.stage", inside, start_time=begin).end(staged)
    if staged < end:
        tracer.start_span("staged.commit", inside, start_time=staged).end(end)
    whole.end(end)


def _attributes(receipt: Receipt) -> dict[str, str | int]:
    return {
        "staged.id": receipt.id,
        "staged.mode": receipt.mode.value,
        "staged.files": receipt.files,
        "staged.bytes": receipt.bytes,
        "staged.phase": receipt.phase,
    }
