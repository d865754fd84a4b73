"""Events, to whoever listens: progress bars, logs and traces are made from them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from staged.model import Event

__all__ = ["Observer", "notify"]

Observer = Callable[[Event], None]
"""Called with each event, in the event loop; it must not block."""

_log = logging.getLogger("staged")


def notify(observers: Sequence[Observer], event: Event) -> None:
    """Hand an event to every observer; one that fails is logged, never raised."""
    for observer in observers:
        try:
            observer(event)
        except Exception:
            _log.exception("An observer failed on %s.", type(event).__name__)
