"""Run to the end whatever cancels us: the only code that knows which event loop runs.

A shielded scope does not stop native asyncio cancellation (`task.cancel`, `asyncio.timeout`), so work that must reach an
end runs in a task of its own, and its caller waits that task out.
"""

from __future__ import annotations

import contextvars
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio

__all__ = ["run_to_end"]

T = TypeVar("T")


async def run_to_end(work: Callable[[], Awaitable[T]], *, grace: float, on_cancel: Callable[[], None]) -> T:
    """Run `work` in a task of its own and wait for its end.

    When the caller is cancelled, `on_cancel` is called once, `work` has `grace` seconds more and is then cancelled itself,
    and the cancellation is raised after its end. Further cancellations change nothing.
    """
    # Each loop is imported only where it runs already.
    if anyio.get_cancelled_exc_class().__module__.startswith("asyncio"):
        return await _asyncio(work, grace, on_cancel)
    return await _trio(work, grace, on_cancel)


async def _asyncio(work: Callable[[], Awaitable[T]], grace: float, on_cancel: Callable[[], None]) -> T:
    import asyncio

    async def run() -> T:
        return await work()

    task = asyncio.create_task(run())
    cancelled: asyncio.CancelledError | None = None
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError as error:
        cancelled = error
    if cancelled is None:
        return task.result()
    on_cancel()
    deadline: float | None = anyio.current_time() + grace
    with anyio.CancelScope(shield=True):
        while not task.done():
            left = None if deadline is None else deadline - anyio.current_time()
            if left is not None and left <= 0:
                task.cancel()
                deadline = left = None
            try:
                await asyncio.wait([task], timeout=left)
            except asyncio.CancelledError as error:
                # The shield holds off anyio's cancellations: this one is native, and no scope of anyio's may take it.
                cancelled = error
    _note(cancelled, None if task.cancelled() else task.exception())
    try:
        raise cancelled
    finally:
        del cancelled  # it holds this frame


async def _trio(work: Callable[[], Awaitable[T]], grace: float, on_cancel: Callable[[], None]) -> T:
    import trio

    results: list[T] = []
    errors: list[BaseException] = []
    done = trio.Event()
    scope = anyio.CancelScope(shield=True)

    async def run() -> None:
        try:
            with scope:
                results.append(await work())
        except trio.Cancelled:
            raise  # the loop itself shuts down
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    context: contextvars.Context = contextvars.copy_context()
    spawn: Any = trio.lowlevel.spawn_system_task
    spawn(run, context=context)
    try:
        await done.wait()
    except trio.Cancelled as cancelled:
        on_cancel()
        scope.deadline = anyio.current_time() + grace
        with anyio.CancelScope(shield=True):
            await done.wait()
        _note(cancelled, errors[0] if errors else None)
        raise
    if errors:
        raise errors[0]
    return results[0]


def _note(cancelled: BaseException, error: BaseException | None) -> None:
    """The cancellation goes on; what the work came to is told with it."""
    if error is not None:
        cancelled.add_note(f"staged: {type(error).__name__}: {error}")
