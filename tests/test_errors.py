"""The tree of errors: its shape, what each error says, and that it survives a process boundary."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable

import pytest

import staged
from staged import errors
from staged.errors import CommitBlocked, Fate, StagedError

ERRORS: list[type[StagedError]] = [getattr(errors, name) for name in errors.__all__ if name != "Fate"]


def _above(kind: type[StagedError]) -> str | None:
    """The error of ours that this one is a kind of."""
    ours = [base.__name__ for base in kind.__bases__ if issubclass(base, StagedError)]
    assert len(ours) == (kind is not StagedError)
    return ours[0] if ours else None


def _drawn(text: str) -> dict[str, str | None]:
    """The tree in a docstring, as name -> the name above it."""
    tree: dict[str, str | None] = {}
    path: list[str] = []
    for indent, name in re.findall(r"^    ((?:[│ ]   )*[├└]── )?([A-Z]\w+)(?:  .*)?$", text, re.MULTILINE):
        depth = len(indent) // 4
        path[depth:] = [name]
        tree[name] = path[depth - 1] if depth else None
    return tree


def test_the_tree_drawn_in_the_docstring_is_the_tree() -> None:
    assert _drawn(errors.__doc__ or "") == {kind.__name__: _above(kind) for kind in ERRORS}


def test_every_error_of_the_module_is_public_here_and_in_the_package() -> None:
    defined = {
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, BaseException)
    }
    assert defined == {kind.__name__ for kind in ERRORS}
    assert defined - set(staged.__all__) == set()
    assert all(getattr(staged, kind.__name__) is kind for kind in ERRORS)


@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_says_what_became_of_the_target_and_whether_to_retry(kind: type[StagedError]) -> None:
    error = kind("message")
    assert error.outcome in Fate.__args__
    assert isinstance(error.retryable, bool)
    assert error.transaction is None
    assert str(error) == "message"
    assert kind.__doc__


def test_what_is_known_of_the_target_is_what_the_tree_promises() -> None:
    known: dict[Fate, set[str]] = {"untouched": set(), "committed": set(), "unknown": set()}
    for kind in ERRORS:
        known[kind.outcome].add(kind.__name__)
    assert known["committed"] == {"CommitIncomplete", "CommitBlocked"}
    assert known["unknown"] == {"StorageError", "Fenced", "CommitInDoubt", "DamagedRecord"}
    assert {kind.__name__ for kind in ERRORS if kind.retryable} == {"Conflict", "Busy"}


def test_only_an_instance_is_made_retryable() -> None:
    for kind in ERRORS:
        if kind is not CommitBlocked:
            before = kind.retryable
            assert kind("x", retryable=not before).retryable is not before
            assert kind.retryable is before
            assert kind("x").retryable is before


COPIES: dict[str, Callable[[StagedError], StagedError]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{
        f"pickle {protocol}": lambda error, protocol=protocol: pickle.loads(pickle.dumps(error, protocol))  # type: ignore[misc]
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
    },
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_survives_copying_and_pickling_with_all_it_carries(kind: type[StagedError], way: str) -> None:
    if kind is CommitBlocked:
        error: StagedError = CommitBlocked("message", paths=["a", "b/c"], transaction="0" * 24)
    else:
        error = kind("message", transaction="0" * 24, retryable=not kind.retryable)
    error.add_note("a note")
    again = COPIES[way](error)
    assert type(again) is kind
    assert again is not error
    assert str(again) == "message"
    assert again.transaction == "0" * 24
    assert again.retryable is error.retryable
    assert again.outcome == error.outcome
    assert again.__notes__ == ["a note"]
    if isinstance(again, CommitBlocked):
        assert again.paths == ("a", "b/c")


def test_a_wrong_argument_is_a_value_error_too() -> None:
    assert [kind.__name__ for kind in ERRORS if issubclass(kind, ValueError)] == ["InvalidInput", "InvalidPath"]
