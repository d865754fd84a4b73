"""Every history of a small world, over each kind of store that the protocol knows."""

from __future__ import annotations

from collections.abc import Callable

from staged.model import Mode
from staged.testing.exploration import KINDS, PRIORS, Report, Work, crashes, interleavings, run, seeded, works

Figure = Callable[[str, str], None]


def _check(report: Report, least: int, name: str, figure: Figure) -> None:
    figure(name, str(report))
    assert not report.failures, "\n".join(report.failures[:20])
    assert report.histories >= least
    assert len(report.outcomes) > 1, "the exploration saw only one kind of end"


def test_a_writer_stopped_or_failed_at_any_call_leaves_old_or_new_and_nothing_else(figure: Figure) -> None:
    report = run(lambda: crashes(KINDS[:1], works((1, 5)), PRIORS))
    report += run(lambda: crashes(KINDS[1:], works((2,)), ["none", "overlapping"]))
    _check(report, 10_000, "one fault at every call", figure)


def test_recover_stopped_at_any_call_is_completed_by_the_next_recover(figure: Figure) -> None:
    tasks = [task for task in works((2,)) if task.mode is Mode.FULL_DROP]
    report = run(lambda: crashes(KINDS, tasks, ["overlapping"], twice=True))
    _check(report, 5_000, "a crash, then a crash at every call of recover", figure)


def test_many_faults_at_once_lost_hanging_late_and_doubled_calls_leave_old_or_new(figure: Figure) -> None:
    report = run(lambda: seeded(KINDS, works((3,)), ["none", "overlapping"], range(20)))
    _check(report, 1_280, "many faults by seed", figure)


OLD = PRIORS["disjoint"]
DROP = Work(Mode.FULL_DROP, (("a", b"A"), ("b", b"A")))
DROP_TOO = Work(Mode.FULL_DROP, (("a", b"B"), ("c", b"B")))
APPEND = Work(Mode.APPEND, (("x", b"X"),))
APPEND_SAME = Work(Mode.APPEND, (("x", b"Y"), ("y", b"Y")))
REPLACE = Work(Mode.OVERWRITE_FILES, (("old-1", b"O"),))
REPLACE_TOO = Work(Mode.OVERWRITE_FILES, (("old-1", b"P"),), deletes=("old-2",))


def test_two_writers_in_any_order_of_calls_end_in_a_serial_order(figure: Figure) -> None:
    pairs = [(DROP, APPEND, OLD), (DROP, DROP_TOO, OLD), (APPEND, APPEND_SAME, OLD), (REPLACE, REPLACE_TOO, OLD)]
    report = run(lambda: interleavings([KINDS[0]], pairs[:2], stride=40))
    report += run(lambda: interleavings(KINDS[2:], pairs, stride=7))
    _check(report, 3_000, "two writers, and a stalled one that wakes up after it was fenced", figure)


def test_a_writer_and_a_recoverer_in_any_order_of_calls_lose_nothing(figure: Figure) -> None:
    report = run(lambda: interleavings(KINDS, [(DROP, None, OLD), (APPEND, None, OLD)], stride=3))
    _check(report, 500, "a writer and a recoverer", figure)
