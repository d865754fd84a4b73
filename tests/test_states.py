"""The tables of states: every step and every step that must not be, without any I/O."""

from __future__ import annotations

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


def _next(now: Phase) -> set[Phase]:
    """The phases that the table lets follow."""
    found = set()
    for then in Phase:
        try:
            assert advance(now, then) is then
        except WrongState as error:
            assert now.value in str(error) and then.value in str(error)
        else:
            found.add(then)
    return found


NEXT = {now: _next(now) for now in Phase}


def _reach(start: Phase) -> set[Phase]:
    """Every phase that may come later."""
    seen: set[Phase] = set()
    todo = [start]
    while todo:
        fresh = NEXT[todo.pop()] - seen
        seen |= fresh
        todo += fresh
    return seen


# The line and its fork, as drawn in the docstring.
DRAWN = [
    (Phase.STAGING, Phase.PREPARING),
    (Phase.PREPARING, Phase.PREPARED),
    (Phase.PREPARED, Phase.COMMITTING),
    (Phase.COMMITTING, Phase.COMMITTED),
    (Phase.COMMITTING, Phase.IN_DOUBT),
    (Phase.COMMITTING, Phase.INCOMPLETE),
    *((now, Phase.ROLLING_BACK) for now in (Phase.STAGING, Phase.PREPARING, Phase.PREPARED, Phase.COMMITTING)),
    (Phase.ROLLING_BACK, Phase.ROLLED_BACK),
    (Phase.PREPARED, Phase.RELEASED),
]


def test_every_drawn_step_of_a_transaction_is_possible() -> None:
    assert [(now, then) for now, then in DRAWN if then not in NEXT[now]] == []


def test_no_phase_follows_itself_and_every_phase_can_be_reached_and_left_for_an_end() -> None:
    assert all(now not in then for now, then in NEXT.items())
    assert _reach(Phase.STAGING) == set(Phase) - {Phase.STAGING}
    assert all(_reach(now) & ENDED for now in set(Phase) - ENDED)


def test_an_ended_transaction_takes_no_more_work() -> None:
    assert {Phase.COMMITTED, Phase.ROLLED_BACK, Phase.RELEASED, Phase.IN_DOUBT, Phase.INCOMPLETE} == ENDED
    for end in ENDED:
        assert NEXT[end] <= ENDED
    for end in (Phase.COMMITTED, Phase.ROLLED_BACK, Phase.RELEASED):
        assert NEXT[end] == set(), "what is known for sure does not change"


def test_only_a_commit_leads_to_committed_and_a_decided_one_never_back() -> None:
    assert {now for now in Phase if Phase.COMMITTED in NEXT[now]} == {
        Phase.COMMITTING,
        Phase.INCOMPLETE,
        Phase.IN_DOUBT,
    }
    assert _reach(Phase.INCOMPLETE) == {Phase.COMMITTED}
    assert NEXT[Phase.ROLLING_BACK] == {Phase.ROLLED_BACK, Phase.IN_DOUBT}
    assert all(Phase.STAGING not in then for then in NEXT.values())


def test_new_ids_are_ids_and_never_repeat() -> None:
    ids = [new_id() for _ in range(10_000)]
    assert all(map(is_id, ids))
    assert len(set(ids)) == len(ids)
