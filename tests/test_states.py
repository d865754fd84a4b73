"""The tables of states: every step and every step that must not be, without any I/O."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from staged import states
from staged.errors import WrongState
from staged.model import Head, HeadState, Ref
from staged.records import is_id
from staged.states import ENDED, Phase, abandon, adopt, advance, decide, free, hold, new_id, renew

Figure = Callable[[str, str], None]
Step = Callable[[Head], Head]

FREE, HELD, COMMITTED = HeadState.FREE, HeadState.HELD, HeadState.COMMITTED
A, B = "a" * 24, "b" * 24
PLAN, LEDGER, OLDER = Ref("plan", 1, "p"), Ref("ledger-7", 1, "l"), Ref("ledger-3", 1, "o")

HEADS = {
    FREE: Head(7, FREE, ledger=OLDER, nonce="n"),
    HELD: Head(7, HELD, A, "owner-a", ledger=OLDER, nonce="n"),
    COMMITTED: Head(7, COMMITTED, A, "owner-a", PLAN, LEDGER, nonce="n"),
}
STEPS: dict[str, Step] = {
    "hold": lambda head: hold(head, B, "owner-b"),
    "decide": lambda head: decide(head, PLAN, LEDGER),
    "adopt": lambda head: adopt(head, "owner-b"),
    "abandon": abandon,
    "free": free,
    "renew": renew,
}
# What is allowed, written down a second time: step -> {state before: head after}; `nonce` is looked at apart.
ALLOWED: dict[str, dict[HeadState, Head]] = {
    "hold": {state: Head(8, HELD, B, "owner-b", None, OLDER) for state in (FREE, HELD)},
    "decide": {HELD: Head(7, COMMITTED, A, "owner-a", PLAN, LEDGER)},
    "adopt": {COMMITTED: Head(8, COMMITTED, A, "owner-b", PLAN, LEDGER)},
    "abandon": {HELD: Head(8, FREE, ledger=OLDER)},
    "free": {HELD: Head(7, FREE, ledger=OLDER), COMMITTED: Head(7, FREE, ledger=LEDGER)},
    "renew": {HELD: HEADS[HELD], COMMITTED: HEADS[COMMITTED]},
}
TAKEOVERS = {"hold", "adopt", "abandon"}


@pytest.mark.parametrize("state", HeadState)
@pytest.mark.parametrize("step", STEPS)
def test_every_step_of_the_head_does_what_the_table_says_or_raises_and_changes_nothing(
    step: str, state: HeadState
) -> None:
    head, before = HEADS[state], replace(HEADS[state])
    expected = ALLOWED[step].get(state)
    if expected is None:
        with pytest.raises(WrongState):
            STEPS[step](head)
    else:
        after = STEPS[step](head)
        assert replace(after, nonce="") == replace(expected, nonce="")
        assert after.nonce not in ("", head.nonce)
    assert head == before


def test_the_table_drawn_in_the_docstring_is_the_table() -> None:
    drawn = set()
    for before, step, after, more in re.findall(
        r"^    (\w+)\(.*?e\)\s+--(\w+)-->\s+(\w+)\(.*?e(\+1)?\)", states.__doc__ or "", re.MULTILINE
    ):
        drawn.add((HeadState[before], step, HeadState[after], bool(more)))
    real = {
        (state, step, after.state, after.epoch > HEADS[state].epoch)
        for step, rows in ALLOWED.items()
        for state, after in rows.items()
        if step != "renew"
    }
    assert drawn == real


def test_any_walk_of_the_head_keeps_the_rules_of_takeover_and_decision(figure: Figure) -> None:
    rng = random.Random(7)
    steps = 0
    for walk in range(500):
        head = Head()
        seen = {head}
        nonces: set[str] = set()
        decided: set[int] = set()
        for number in range(60):
            name = rng.choice(list(STEPS))
            tx, owner = f"tx-{walk}-{number}", f"owner-{rng.randrange(3)}"
            chosen: Step = {
                "hold": lambda now, tx=tx, owner=owner: hold(now, tx, owner),
                "adopt": lambda now, owner=owner: adopt(now, owner),
                "decide": lambda now, number=number: decide(now, PLAN, Ref(f"ledger-{number}", 1, "")),
            }.get(name, STEPS[name])  # type: ignore[misc]
            try:
                after = chosen(head)
            except WrongState:
                assert head.state not in ALLOWED[name]
                continue
            steps += 1
            assert head.state in ALLOWED[name]
            assert after not in seen, "what a stalled owner believes came true again"
            assert after.nonce not in nonces
            assert after.epoch == head.epoch + (name in TAKEOVERS)
            if after.state is COMMITTED and head.state is not COMMITTED:
                assert name == "decide"
                assert after.epoch not in decided, "two decisions at one epoch"
                decided.add(after.epoch)
            if head.state is COMMITTED:
                assert after.state is FREE or (after.state is COMMITTED and after.transaction == head.transaction)
                assert after.ledger == head.ledger
                assert after.state is FREE or after.plan == head.plan
            if after.state is FREE:
                assert (after.transaction, after.owner, after.plan) == (None, None, None)
            if name != "decide":
                assert after.ledger == head.ledger, "only a decision changes what was committed"
            head = after
            seen.add(after)
            nonces.add(after.nonce)
    figure("states", f"{steps:,} legal steps of the head in 500 walks")
    assert steps > 10_000


# ------------------------------------------------------------------------------------------------------- the transaction

NEXT = {
    now: {then for then in Phase if not _raises}  # filled in below
    for now in Phase
    for _raises in [True]
}
