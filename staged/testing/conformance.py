"""Every contract of the driver interface and every promise of the project, as tests that a driver's author inherits.

    class TestMyDriver(DriverConformance):
        def harness(self, directory: Path) -> Harness:
            return MyHarness(directory)

What a driver declares that it cannot do is tested too: the declared weakness must be the only one. Tests cannot be
overridden, left out or skipped by the subclass. `STAGED_SOAK=10` makes each property run ten times as many examples.
"""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from staged.driver import Driver
from staged.errors import Conflict, Exists, StagingError, Unsupported
from staged.model import Answer, Capabilities, Entry, Guarantee, Listed, Mode
from staged.planning import REPLACING
from staged.states import new_id
from staged.store import open_store
from staged.testing.exploration import FAULT_MOMENTS, PRIORS, At, Kind, Work, attempt, history, replay, works
from staged.testing.faults import Fault, FaultDriver, Moment, Plan
from staged.testing.faults import Kind as FaultKind
from staged.testing.harness import Files, Harness

__all__ = ["DriverConformance"]

F = TypeVar("F", bound=Callable[..., Any])
SOAK = int(os.environ.get("STAGED_SOAK", "1"))


def _examples(count: int) -> Callable[[F], F]:
    """So many examples of a property; slow stores and slow machines are no failure."""
    checks = [HealthCheck.too_slow, HealthCheck.differing_executors, HealthCheck.function_scoped_fixture]
    return settings(max_examples=count * SOAK, deadline=None, suppress_health_check=checks, database=None)


NAMES = st.sampled_from(["a", "b", "d/a", "d/b", "d/e/a", "ü", "with space"])
BODIES = st.one_of(st.binary(min_size=1, max_size=200), st.just(bytes(range(256)) * 250))
WORKS = st.sampled_from(list(works((1, 3))))
QUICK: tuple[FaultKind, ...] = ("fails", "loses", "repeats", "replays")


class DriverConformance:
    """Inherit it, and write `harness`."""

    pytestmark = pytest.mark.anyio

    def harness(self, directory: Path) -> Harness:
        """A fresh target that nobody has written yet; `directory` is empty and its own.

        Where death is told by silence (`Capabilities.period`), make the period a fraction of a second.
        """
        raise NotImplementedError

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        for name, promise in vars(DriverConformance).items():
            if name != "harness" and not name.startswith("__") and inspect.getattr_static(cls, name) is not promise:
                raise TypeError(
                    f"{cls.__name__} overrides {name!r}: a driver keeps every promise or declares its weakness."
                )
        if "__test__" in vars(cls):
            raise TypeError(f"{cls.__name__} cannot be left out by __test__.")

    @pytest.fixture
    async def kind(self, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Kind]:
        """As many targets of this driver as a property needs."""
        made: list[Harness] = []

        def make() -> Harness:
            made.append(self.harness(tmp_path_factory.mktemp("target")))
            return made[-1]

        yield Kind(type(self).__name__, make)
        for harness in made:
            await harness.aclose()

    @pytest.fixture
    async def target(self, kind: Kind) -> Harness:
        """One target of this driver."""
        return kind.make()

    # ------------------------------------------------------------------------------------------------------------ records

    async def test_a_record_is_swapped_only_by_whoever_names_its_token(self, target: Harness) -> None:
        driver = await _probed(target)
        assert await driver.read("head") is None
        assert await driver.cas("head", b"1", "no such token", durable=True) is None
        assert await driver.read("head") is None
        first = await driver.cas("head", b"1", None, durable=True)
        assert first is not None
        assert await driver.cas("head", b"2", None, durable=True) is None
        second = await driver.cas("head", b"2", first, durable=True)
        assert second not in (None, first)
        assert await driver.cas("head", b"3", first, durable=True) is None
        found = await target.process().read("head")
        assert found is not None
        assert (found.body, found.token) == (b"2", second)

    async def test_of_many_swaps_of_one_record_one_wins(self, target: Harness) -> None:
        drivers = [await _probed(target) for _ in range(4)]
        token = None
        for round_ in range(5):
            won: list[tuple[bytes, str]] = []

            async def swap(driver: Driver, body: bytes, token: str | None = token, won: Any = won) -> None:
                if (new := await driver.cas("head", body, token, durable=False)) is not None:
                    won.append((body, new))

            async with anyio.create_task_group() as tasks:
                for number, driver in enumerate(drivers * 2):
                    tasks.start_soon(swap, driver, f"{round_}-{number}".encode())
            assert len(won) == 1
            body, token = won[0]
            found = await drivers[0].read("head")
            assert found is not None
            assert (found.body, found.token) == (body, token)

    @_examples(8)
    @given(
        st.lists(
            st.tuples(
                st.sampled_from(
                    ["head", "tx/1/record", "tx/1/handles-0", "tx/11/handles-0", "log/1-plan-0", "outcome/1"]
                ),
                st.sampled_from(["put", "put", "delete"]),
                BODIES,
            ),
            max_size=12,
        )
    )
    async def test_records_and_segments_behave_like_a_dict(
        self, kind: Kind, steps: list[tuple[str, str, bytes]]
    ) -> None:
        driver = await _probed(kind.make())
        model: dict[str, bytes] = {}
        for number, (key, verb, data) in enumerate(steps):
            body = data + str(number).encode()  # no two bodies are equal
            if verb == "delete":
                await driver.delete_control([key])
                model.pop(key, None)
            elif key == "head" or key.endswith("record"):
                found = await driver.read(key)
                assert await driver.cas(key, body, found.token if found else None, durable=False) is not None
                model[key] = body
            else:
                assert await driver.put_segment(key, body) is (key not in model)
                model.setdefault(key, body)
            for name in ("head", "tx/1/record", "tx/1/handles-0", "log/1-plan-0", "outcome/1"):
                read = await driver.read(name)
                assert (read.body if read else None) == model.get(name)
        for prefix in ("tx/", "tx/1/", "tx/1/handles-", "log/1-", "log/", "outcome/", "he"):
            assert sorted(await driver.list_control(prefix)) == sorted(key for key in model if key.startswith(prefix))

    async def test_a_segment_of_megabytes_is_read_back_whole(self, target: Harness) -> None:
        driver = await _probed(target)
        body = os.urandom(3 << 20)
        assert await driver.put_segment("log/1-plan-0", body)
        found = await target.process().read("log/1-plan-0")
        assert found is not None
        assert found.body == body

    async def test_age_is_by_the_stores_clock_and_a_swap_makes_a_record_young(self, target: Harness) -> None:
        driver = await _probed(target)
        assert await driver.age("head") is None
        token = await driver.cas("head", b"1", None, durable=False)
        await anyio.sleep(0.05 + 2 * target.resolution)
        before = await driver.age("head")
        await driver.cas("head", b"2", token, durable=False)
        after = await driver.age("head")
        assert before is not None and after is not None
        assert 0 <= after < before < 3600

    async def test_a_lock_has_one_holder_and_death_drops_it(self, target: Harness) -> None:
        first, second = await _probed(target), await _probed(target)
        if (await first.probe()).fence != "lock":
            # Declared: death is told by silence. Whoever is silent for a period is overtaken, and cannot go on.
            await self._overtakes_the_silent(target)
            return
        held = await first.lock("lock")
        assert held is not None
        assert await second.lock("lock") is None
        assert await first.lock("lock") is None
        other = await second.lock("tx/1/lease")
        assert other is not None
        held.release()
        held.release()
        again = await second.lock("lock")
        assert again is not None
        await target.kill(second)
        once_more = await first.lock("lock")
        assert once_more is not None
        once_more.release()

    async def _overtakes_the_silent(self, target: Harness) -> None:
        stopped, go_on = anyio.Event(), anyio.Event()
        said: dict[str, str] = {}
        seen: dict[str, bytes] = {}

        async def stall(name: str, moment: Moment) -> None:
            if name == "publish" and moment == "before":
                stopped.set()
                await go_on.wait()

        async def write(name: str, store_driver: Driver) -> None:
            said[name] = await attempt(lambda: Work(Mode.APPEND, ((name, name.encode()),))(open_store(store_driver)))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(write, "stalled", FaultDriver(target.process(), stall))
            await stopped.wait()
            await write("next", target.process())
            assert said["next"] == "committed"
            seen = await target.files()
            assert seen == {"stalled": b"stalled", "next": b"next"}  # it was decided: the next one completed it
            go_on.set()
        assert said["stalled"] in ("committed", "unknown")
        assert await target.files() == seen

    # ------------------------------------------------------------------------------------------------------------ staging

    async def test_what_is_staged_is_invisible_and_recorded_as_it_is(self, target: Harness) -> None:
        driver, tx = await _probed(target), new_id()
        entry = await _stage(driver, tx, "d/a", b"12345")
        assert (entry.path, entry.size) == ("d/a", 5)
        assert await target.files() == {}
        assert await _list(driver) == []
        await driver.seal(tx, [entry])

    async def test_equal_bytes_staged_twice_have_identities_of_their_own(self, target: Harness) -> None:
        driver = await _probed(target)
        entries = [await _stage(driver, new_id(), "a", b"same") for _ in range(5)]
        assert len({entry.identity for entry in entries}) == 5

    async def test_many_files_of_many_transactions_are_staged_at_once(self, target: Harness) -> None:
        driver, ids = await _probed(target), [new_id(), new_id()]
        made: dict[str, list[Entry]] = {tx: [] for tx in ids}

        async def stage(tx: str, number: int) -> None:
            made[tx].append(await _stage(driver, tx, f"d{number % 3}/f{number}", f"{tx}-{number}".encode()))

        async with anyio.create_task_group() as tasks:
            for tx, number in itertools.product(ids, range(10)):
                tasks.start_soon(stage, tx, number)
        for tx in ids:
            await driver.seal(tx, made[tx])
        answers = await driver.publish(ids[0], made[ids[0]], {})
        assert set(answers) == {Answer.DONE}
        assert await target.files() == {f"d{n % 3}/f{n}": f"{ids[0]}-{n}".encode() for n in range(10)}
        if (await driver.probe()).keeps_staged:
            await driver.seal(ids[1], made[ids[1]])
        else:
            # Declared: the same names were published.
            with pytest.raises(StagingError):
                await driver.seal(ids[1], made[ids[1]])

    async def test_an_aborted_write_leaves_nothing_and_what_was_staged_before_stays(self, target: Harness) -> None:
        driver, tx = await _probed(target), new_id()
        entry = await _stage(driver, tx, "a", b"before")
        writer = await driver.stage(tx, "a", _nowhere)
        await writer.write(b"torn")
        await writer.abort()
        await driver.seal(tx, [entry])
        assert await driver.publish(tx, [entry], {}) == [Answer.DONE]
        assert await target.files() == {"a": b"before"}

    async def test_seal_refuses_staging_that_is_not_as_recorded(self, target: Harness) -> None:
        driver, tx = await _probed(target), new_id()
        first, second = await _stage(driver, tx, "a", b"1"), await _stage(driver, tx, "b", b"2")
        await driver.discard(tx, [second.handle], whole=False)
        with pytest.raises(StagingError):
            await driver.seal(tx, [first, second])
        await driver.seal(tx, [first])

    async def test_what_a_dead_process_staged_is_discarded_by_its_logged_handles(self, target: Harness) -> None:
        driver, tx = await _probed(target), new_id()
        logged: list[str] = []

        async def log(handle: str) -> None:
            logged.append(handle)

        done = await _stage(driver, tx, "done", b"1", log)
        torn = await driver.stage(tx, "torn", log)
        await torn.write(b"2" * 100_000)
        await target.kill(driver)
        other = await _probed(target)
        for _ in range(2):  # and a repeat does no harm
            await other.discard(tx, {*logged, done.handle}, whole=True)
        assert await target.leftovers() == []
        assert await target.files() == {}

    async def test_a_scratch_directory_is_adopted_file_by_file(self, target: Harness) -> None:
        driver, tx = await _probed(target), new_id()
        root = await driver.scratch(tx)
        if root is None:
            # Declared: files are uploaded. A transaction's `dir` gives them just the same.
            root_less = open_store(driver)
            async with root_less.staged_write("append") as block, block.dir("d") as local:
                await anyio.Path(local, "a").write_bytes(b"1")
            assert await target.files() == {"d/a": b"1"}
            return
        await anyio.Path(root, "d").mkdir()
        await anyio.Path(root, "d", "a").write_bytes(b"1")
        await anyio.Path(root, "b").write_bytes(b"22")
        entries = await driver.adopt(tx, root, ["d/a", "b"])
        assert [(entry.path, entry.size) for entry in entries] == [("d/a", 1), ("b", 2)]
        await driver.seal(tx, entries)
        assert await driver.publish(tx, entries, {}) == [Answer.DONE, Answer.DONE]
        assert await target.files() == {"d/a": b"1", "b": b"22"}

    # --------------------------------------------------------------------------------------------------------- the target

    @_examples(6)
    @given(st.dictionaries(NAMES, st.binary(max_size=50), max_size=6))
    async def test_a_listing_shows_what_is_there_and_nothing_of_ours(self, kind: Kind, files: Files) -> None:
        target = kind.make()
        driver = await _probed(target)
        await driver.cas("head", b"1", None, durable=False)
        await _stage(driver, new_id(), "staged", b"1")
        for path, data in files.items():
            await target.put(path, data)
        listed = await _list(driver)
        assert {one.path: one.size for one in listed} == {path: len(data) for path, data in files.items()}
        below = {one.path for one in await _list(driver, "d")}
        assert below == {path for path in files if path.startswith("d/")}
        named = {one.path for one in await _list(driver, names={"a", "d/a", "not there"})}
        assert named == files.keys() & {"a", "d/a"}
        assert await _list(driver, "nothing/here") == []

    async def test_publish_takes_free_names_once_and_leaves_strangers(self, target: Harness) -> None:
        driver, tx = await _probed(target), new_id()
        mine, blocked = await _stage(driver, tx, "d/mine", b"mine"), await _stage(driver, tx, "taken", b"mine")
        await driver.seal(tx, [mine, blocked])
        await target.put("taken", b"stranger")
        # Declared: what was staged at that name may be gone with it.
        kept = (await driver.probe()).keeps_staged
        blocked_is = Answer.FOREIGN if kept else Answer.LOST
        assert await driver.publish(tx, [mine, blocked], {}) == [Answer.DONE, blocked_is]
        assert await target.process().publish(tx, [mine, blocked], {}) == [Answer.ALREADY, blocked_is]
        assert await target.files() == {"d/mine": b"mine", "taken": b"stranger"}
        await target.delete("taken")
        freed_is = Answer.DONE if kept else Answer.LOST
        assert await driver.publish(tx, [mine, blocked], {}) == [Answer.ALREADY, freed_is]
        await target.delete("d/mine")
        assert await driver.publish(tx, [mine], {}) == [Answer.LOST]

    async def test_publish_replaces_exactly_the_file_that_was_named(self, target: Harness) -> None:
        driver, tx = await _probed(target), new_id()
        await target.put("a", b"old")
        old = {one.path: one.identity for one in await _list(driver)}
        entry = await _stage(driver, tx, "a", b"new")
        await driver.seal(tx, [entry])
        await target.put("a", b"a stranger's")
        kept = (await driver.probe()).keeps_staged
        assert await driver.publish(tx, [entry], old) == [Answer.FOREIGN if kept else Answer.LOST]
        assert await target.files() == {"a": b"a stranger's"}
        now = {one.path: one.identity for one in await _list(driver)}
        assert now["a"] != old["a"]
        if not kept:
            entry = await _stage(driver, tx, "a", b"new")
        assert await driver.publish(tx, [entry], now) == [Answer.DONE]
        assert await driver.publish(tx, [entry], now) == [Answer.ALREADY]
        assert await target.files() == {"a": b"new"}

    async def test_publish_takes_the_name_of_a_file_that_was_to_be_replaced_and_is_gone(self, target: Harness) -> None:
        driver, tx = await _probed(target), new_id()
        await target.put("d/a", b"old")
        old = {one.path: one.identity for one in await _list(driver)}
        entry = await _stage(driver, tx, "d/a", b"new")
        await driver.seal(tx, [entry])
        await target.delete("d/a")
        kept = (await driver.probe()).keeps_staged
        assert await driver.publish(tx, [entry], old) == [Answer.DONE if kept else Answer.LOST]
        assert await target.files() == ({"d/a": b"new"} if kept else {})

    async def test_remove_takes_exactly_what_was_listed(self, target: Harness) -> None:
        driver = await _probed(target)
        for name in ("a", "d/b", "c"):
            await target.put(name, b"1")
        listed = sorted(await _list(driver), key=lambda one: one.path)
        await target.put("a", b"a stranger's")
        await target.delete("c")
        assert await driver.remove(listed) == [Answer.FOREIGN, Answer.ALREADY, Answer.DONE]
        assert await driver.remove(listed) == [Answer.FOREIGN, Answer.ALREADY, Answer.ALREADY]
        assert await target.files() == {"a": b"a stranger's"}

    async def test_a_late_repeat_of_any_change_finds_nothing_to_do(self, target: Harness) -> None:
        driver, tx, later = await _probed(target), new_id(), new_id()
        await target.put("old", b"old")
        listed = await _list(driver)
        entry = await _stage(driver, tx, "a", b"first")
        await driver.seal(tx, [entry])
        await driver.publish(tx, [entry], {})
        await driver.remove(listed)
        successor = await _stage(driver, later, "a", b"second")
        await driver.seal(later, [successor])
        now = {one.path: one.identity for one in await _list(driver)}
        await driver.publish(later, [successor], now)
        await target.put("old", b"anew")
        assert await driver.publish(tx, [entry], {}) == [Answer.LOST]
        assert await driver.remove(listed) == [Answer.FOREIGN]
        await driver.discard(tx, [entry.handle], whole=True)
        assert await target.files() == {"a": b"second", "old": b"anew"}

    async def test_trees_are_swapped_by_identity_once(self, target: Harness) -> None:
        driver, tx = await _probed(target), new_id()
        await target.put("old", b"old")
        entry = await _stage(driver, tx, "d/new", b"new")
        await driver.seal(tx, [entry])
        if not (await driver.probe()).swaps_trees:
            # Declared: a full_drop moves files one by one, and then no listing is promised to show one generation.
            guarantees = (await driver.probe()).guarantees
            assert "one_generation" not in guarantees.get(Mode.FULL_DROP, frozenset())
            return
        trees = await driver.trees(tx)
        assert await driver.swap(tx, trees, f"{1:016d}-{tx}") is Answer.DONE
        assert await target.files() == {"d/new": b"new"}
        assert await target.process().swap(tx, trees, f"{1:016d}-{tx}") is Answer.ALREADY
        assert await target.files() == {"d/new": b"new"}
        next_tx = new_id()
        await driver.seal(next_tx, [await _stage(driver, next_tx, "next", b"next")])
        assert await driver.swap(next_tx, await driver.trees(next_tx), f"{2:016d}-{next_tx}") is Answer.DONE
        assert await driver.swap(tx, trees, f"{1:016d}-{tx}") in (Answer.FOREIGN, Answer.LOST)
        assert await target.files() == {"next": b"next"}
        assert await driver.trim(1, 0.0) == 1
        assert await driver.trim(0, 0.0) == 1
        for one in (tx, next_tx):
            await driver.discard(one, [entry.handle], whole=True)
        assert await target.leftovers() == []

    async def test_names_are_folded_exactly_where_that_is_declared(self, target: Harness) -> None:
        driver = await _probed(target)
        await target.put("Name", b"1")
        folds = (await driver.probe()).folds
        assert bool(await _list(driver, names={"name"})) is folds
        store = open_store(target.process())
        if folds:
            with pytest.raises(Exists):
                await Work(Mode.APPEND, (("name", b"2"),))(store)
        else:
            await Work(Mode.APPEND, (("name", b"2"),))(store)

    async def test_a_child_is_a_target_of_its_own_that_its_parent_does_not_destroy(self, target: Harness) -> None:
        store = open_store(target.process())
        child = store.child("below/child")
        await Work(Mode.FULL_DROP, (("c", b"c"),))(child)
        await Work(Mode.APPEND, (("p", b"p"),))(store)
        assert await target.files() == {"below/child/c": b"c", "p": b"p"}
        with pytest.raises(Conflict):
            await Work(Mode.FULL_DROP, (("q", b"q"),))(store)
        for partition in ("below", "below/child", "below/child/part"):
            with pytest.raises(Conflict):
                await Work(Mode.OVERWRITE_PARTITIONS, ((f"{partition}/q", b"q"),))(store)
        await Work(Mode.OVERWRITE_PARTITIONS, (("below/other/q", b"q"),))(store)
        await Work(Mode.OVERWRITE_FILES, (("p", b"p"),), deletes=("below/other/q",))(store)
        await Work(Mode.FULL_DROP, (("d", b"d"),))(child)
        assert await target.files() == {"below/child/d": b"d", "p": b"p"}

    # ---------------------------------------------------------------------------------------------------------- promises

    @_examples(15)
    @given(WORKS, st.sampled_from(sorted(PRIORS)), st.sampled_from(sorted(FAULT_MOMENTS)), st.integers(0, 60))
    async def test_one_fault_at_any_call_leaves_old_or_new_and_recover_leaves_nothing_else(
        self, kind: Kind, work: Work, prior: str, fault: Any, number: int
    ) -> None:
        _, wrong = await history(kind, work, PRIORS[prior], At(fault, number), None)
        assert not wrong

    @_examples(10)
    @given(WORKS, st.sampled_from(sorted(PRIORS)), st.integers(0, 40), st.integers(0, 20))
    async def test_a_crash_within_recover_is_recovered_by_the_next(
        self, kind: Kind, work: Work, prior: str, number: int, again: int
    ) -> None:
        _, wrong = await history(kind, work, PRIORS[prior], At("crash after", number), At("crash after", again))
        assert not wrong

    @_examples(15)
    @given(WORKS, st.sampled_from(sorted(PRIORS)), st.integers(0, 2**32 - 1))
    async def test_many_faults_at_once_leave_old_or_new(self, kind: Kind, work: Work, prior: str, seed: int) -> None:
        plan = Plan.seeded(seed, calls=100, rate=0.08, kinds=QUICK)
        _, wrong = await replay(kind, work, PRIORS[prior], plan)
        assert not wrong, f"{wrong} under the plan {str(plan)!r}"

    @_examples(3)
    @given(WORKS.filter(lambda work: not work.deletes))
    async def test_a_swap_whose_answer_is_lost_or_that_is_sent_twice_is_no_failure(
        self, kind: Kind, work: Work
    ) -> None:
        async def commit(kind_of_fault: FaultKind, swap: int) -> bool:
            target = kind.make()
            plan = _AtSwap(kind_of_fault, swap)
            plan.driver = FaultDriver(target.process(), plan=plan)
            assert await work(open_store(plan.driver)) == "committed", (kind_of_fault, swap)
            assert await target.files() == work.apply({}), (kind_of_fault, swap)
            return plan.seen > swap

        for fault in ("loses", "repeats"):
            swap = 0
            while await commit(fault, swap):
                swap += 1
            assert swap > 4

    @_examples(10)
    @given(WORKS, st.sampled_from(sorted(PRIORS)))
    async def test_a_reader_at_any_moment_sees_what_is_promised_for_the_mode(
        self, kind: Kind, work: Work, prior: str
    ) -> None:
        target = kind.make()
        old = PRIORS[prior]
        new = work.apply(old)
        for name, data in old.items():
            await target.put(name, data)
        promised = (await (await _probed(target)).probe()).guarantees[work.mode]
        seen: list[Files] = []

        async def look(_: str, __: Moment = "within") -> None:
            files = await target.files()
            if not seen or files != seen[-1]:
                seen.append(files)

        said = await attempt(lambda: work(open_store(FaultDriver(target.process(look), look))))
        await look("")
        if new is None:
            assert said == "untouched"
            assert seen == [old]
            return
        assert said in ("committed", "skipped")
        assert seen[-1] == new
        for files in seen:
            # Whatever is promised: only old and new bytes, each under its own name.
            assert files.items() <= old.items() | new.items()
            if "no_gap" in promised:
                assert old.keys() & new.keys() <= files.keys()
                assert not old.keys() - files.keys() or new.keys() <= files.keys(), "removed before all was published"
            if "one_generation" in promised:
                assert files in (old, new) or ("no_gap" not in promised and not files)

    async def test_commits_on_one_target_come_one_after_another(self, target: Harness) -> None:
        said: list[str] = []

        async def write(number: int) -> None:
            work = Work(Mode.APPEND, ((f"own-{number}", b"1"), *((("same", b"1"),) if number < 2 else ())))
            said.append(await attempt(lambda: work(open_store(target.process()))))

        async with anyio.create_task_group() as tasks:
            for number in range(4):
                tasks.start_soon(write, number)
        assert sorted(said) == ["committed", "committed", "committed", "untouched"]
        status = await open_store(target.process()).status()
        assert (status.commits, len(await target.files())) == (3, 4)

    async def test_a_key_is_committed_once_and_meta_comes_with_its_data(self, target: Harness) -> None:
        store = open_store(target.process())
        for number in range(2):
            async with store.staged_write("append", key="k", meta={"n": number}) as tx:
                await tx.write(f"f{number}", b"1")
            assert tx.done is (number == 1)
        assert await target.files() == {"f0": b"1"}
        assert await open_store(target.process()).meta() == {"n": 0}

    async def test_what_was_prepared_survives_its_process_recover_and_is_resumed(self, target: Harness) -> None:
        driver = target.process()
        tx = await open_store(driver).begin("append")
        await tx.write("a", b"1")
        await tx.prepare()
        await target.kill(driver)
        store = open_store(target.process())
        recovered = await store.recover()
        assert recovered.rolled_back == ()
        resumed = await store.resume(tx.id)
        await resumed.commit()
        assert await target.files() == {"a": b"1"}
        assert (await store.outcome(tx.id)).state == "committed"

    async def test_what_is_not_promised_is_refused_by_require_and_nothing_is_begun(self, target: Harness) -> None:
        store = open_store(target.process())
        capabilities = await store.capabilities()
        every: Collection[Guarantee] = ("serialised", "fenced", "no_gap", "one_generation")
        for mode, guarantee in itertools.product(Mode, every):
            if guarantee in capabilities.guarantees.get(mode, frozenset()):
                tx = await store.begin(mode, require=[guarantee], allow_empty=True)
                await tx.rollback()
            else:
                with pytest.raises(Unsupported):
                    await store.begin(mode, require=[guarantee])
        await store.gc(older_than=timedelta(0))
        assert await target.leftovers() == []

    async def test_looking_at_the_plan_changes_nothing_about_the_commit(self, kind: Kind) -> None:
        for mode in (Mode.APPEND, Mode.FULL_DROP):
            target = kind.make()
            await target.put("old", b"old")
            async with open_store(target.process()) as store, store.staged_write(mode, allow_empty=True) as tx:
                await tx.plan()
                await tx.write("new", b"new")
                await tx.plan()
            assert await target.files() == {"new": b"new"} | ({"old": b"old"} if mode is Mode.APPEND else {})

    async def test_an_exception_in_the_block_is_unchanged_and_leaves_nothing(self, target: Harness) -> None:
        await target.put("old", b"old")
        store = open_store(target.process())
        for mode in set(Mode) - {Mode.ERROR}:
            with pytest.raises(ZeroDivisionError):
                async with store.staged_write(mode) as tx:
                    await tx.write("d/new", b"new")
                    raise ZeroDivisionError
        assert await target.files() == {"old": b"old"}
        assert (await store.status()).transactions == ()
        await store.gc(older_than=timedelta(0))
        assert await target.leftovers() == []

    async def test_only_replacing_modes_ask_for_allow_empty(self, target: Harness) -> None:
        await target.put("d/old", b"old")
        for mode in Mode:
            said = await attempt(lambda mode=mode: Work(mode, ())(open_store(target.process())))  # type: ignore[misc]
            refused = mode in REPLACING or mode is Mode.ERROR
            assert said == ("untouched" if refused else "skipped" if mode is Mode.IGNORE else "committed"), mode
        assert await target.files() == {"d/old": b"old"}


# ---------------------------------------------------------------------------------------------------------------- helpers


class _AtSwap(Plan):
    """A fault at the swap of that number, whatever calls come between: how many signs of life there are is a matter of time."""

    driver: FaultDriver

    def __init__(self, kind: FaultKind, number: int) -> None:
        super().__init__()
        self._kind: FaultKind = kind
        self._number, self.seen = number, 0

    def at(self, call: int) -> Fault | None:
        if not self.driver.calls[call].startswith("cas "):
            return None
        self.seen += 1
        return Fault(self._kind, call) if self.seen == self._number + 1 else None


async def _probed(target: Harness) -> Driver:
    driver = target.process()
    capabilities: Capabilities = await driver.probe()
    assert set(capabilities.guarantees) <= set(Mode)
    return driver


async def _nowhere(handle: str) -> None:
    """A log for what no test will lose."""


async def _stage(
    driver: Driver, tx: str, path: str, data: bytes, log: Callable[[str], Awaitable[None]] = _nowhere
) -> Entry:
    writer = await driver.stage(tx, path, log)
    half = len(data) // 2
    await writer.write(data[:half])
    await writer.write(memoryview(data)[half:])
    return await writer.close()


async def _list(driver: Driver, prefix: str = "", names: Collection[str] | None = None) -> list[Listed]:
    return [one async for page in driver.list(prefix, names) for one in page if not one.is_dir]
