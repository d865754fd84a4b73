"""The steps of the protocol, told from the calls that a driver gets."""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["STEPS", "StepName", "step_after"]

StepName = Literal["begin", "stage", "prepare", "acquire", "plan", "decide", "publish", "remove", "finish", "cleanup"]

STEPS: tuple[StepName, ...] = get_args(StepName)

# The calls that open a step, by how their names begin, and the steps from which they do.
_OPENS: tuple[tuple[str, tuple[StepName, ...], StepName], ...] = (
    ("stage ", ("begin",), "stage"),
    ("scratch", ("begin",), "stage"),
    ("seal", ("begin", "stage"), "prepare"),
    ("lock lock", ("prepare",), "acquire"),
    ("read head", ("prepare",), "acquire"),
    ("read tx/", ("acquire",), "plan"),
    ("cas head", ("plan",), "decide"),
    ("publish", ("decide",), "publish"),
    ("swap", ("decide",), "publish"),
    ("remove", ("decide", "publish"), "remove"),
    ("put_segment outcome/", ("decide", "publish", "remove"), "finish"),
    ("list_control tx/", ("finish",), "cleanup"),
)


def step_after(step: StepName, call: str) -> StepName:
    """The step that a commit is at when its driver gets this call."""
    for name, now, then in _OPENS:
        if step in now and call.startswith(name):
            return then
    return step
