"""Plans against an oracle on plain dicts, on stores that nest, that are flat, and that fold names."""

from __future__ import annotations

import itertools
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from staged.errors import Conflict, Exists, InvalidInput, StagedError, StagingError
from staged.model import Capabilities, Entry, Listed, Mode, Plan
from staged.paths import RESERVED, fold, parents
from staged.planning import BLIND, REPLACING, Work, check, make_plan, overlap, scope

Figure = Callable[[str, str], None]
Files = dict[str, str]

NESTING = Capabilities(fence="lock", swaps_trees=False)
FLAT = replace(NESTING, nests=False)
FOLDING = replace(NESTING, folds=True)
STORES = {"nesting": NESTING, "flat": FLAT, "folding": FOLDING}

FIRST = Mode.ERROR, Mode.IGNORE


def entry(path: str) -> Entry:
    return Entry(path, 1, f"new {path}", "handle")


def listed(*names: str, directories: Collection[str] = ()) -> list[Listed]:
    """A listing of these files and directories."""
    files = [Listed(path, 1, f"old {path}") for path in names]
    return files + [Listed(path, 0, "", is_dir=True) for path in directories]


def plan(work: Work, listing: Collection[Listed], store: Capabilities) -> Plan:
    """What a transaction does: check before the lock, then plan under the head."""
    check(work, store)
    return make_plan(work, listing, store)


def below(path: str, directory: str) -> bool:
    return path.startswith(f"{directory}/")


def _key(store: Capabilities) -> Callable[[str], str]:
    return fold if store.folds else str


# -------------------------------------------------------------------------------------------------------- the oracle


@dataclass(frozen=True)
class Case:
    """Work over a target: its files and, where the store has any, its directories."""

    work: Work
    files: tuple[str, ...]
    directories: tuple[str, ...]

    @property
    def listing(self) -> list[Listed]:
        return listed(*self.files, directories=self.directories)


def oracle(case: Case, store: Capabilities) -> Files | None:
    """The target after a commit, by name as the store sees it; None where the commit must be refused."""
    key, work, mode = _key(store), case.work, case.work.mode
    old = {key(path): f"old {path}" for path in case.files}
    new = {key(entry.path): entry.identity for entry in work.entries}
    drops = {key(path) for path in work.deletes}
    partitions: set[str] = set()
    if mode is Mode.OVERWRITE_PARTITIONS:
        received = {path.rpartition("/")[0] for path in new}
        partitions = received if work.partitions is None else set(map(key, work.partitions))

    def replaced(path: str) -> bool:
        return mode is Mode.FULL_DROP or any(below(path, partition) for partition in partitions)

    if (
        (mode in REPLACING and not new and not work.allow_empty)
        or (store.nests and any(below(one, other) for one in new for other in new))
        or any(path in new or replaced(path) for path in drops)
        or any(below(one, other) for one in partitions for other in partitions)
        or (mode is Mode.OVERWRITE_PARTITIONS and not all("/" in path and replaced(path) for path in new))
    ):
        return None
    content = [path for path in old if RESERVED not in path.split("/")]
    if mode is Mode.IGNORE and content:
        return old
    if (
        (mode is Mode.ERROR and content)
        or (mode is Mode.APPEND and new.keys() & old.keys())
        or not drops <= old.keys()
        or any(replaced(path) and RESERVED in path.split("/") for path in old)
        or (store.nests and new.keys() & {key(path) for path in case.directories})
        or (store.nests and any(below(one, other) for one in new for other in old))
        or (store.nests and any(one == other or below(one, other) for one in partitions for other in old))
    ):
        return None
    return {path: identity for path, identity in old.items() if not replaced(path) and path not in drops} | new


def carried_out(found: Plan, case: Case, store: Capabilities) -> Files:
    """The target after a plan, as a driver carries it out: it publishes, then removes, each by identity."""
    key = _key(store)
    target = {key(path): f"old {path}" for path in case.files}
    for staged in found.publish:
        assert target.get(key(staged.path)) == found.replaces.get(staged.path), "it takes a name that it did not expect"
        target[key(staged.path)] = staged.identity
    for gone in found.remove:
        assert target.pop(key(gone.path), None) == gone.identity, "it removes what is not the one listed"
    return target


def scoped(case: Case, store: Capabilities) -> list[Listed]:
    """The part of the listing that the scope of the work asks a driver for."""
    key, wanted = _key(store), scope(case.work, store)
    prefixes, names = [key(prefix) for prefix in wanted.prefixes], {key(name) for name in wanted.names}
    found = [
        there
        for there in case.listing
        if key(there.path) in names or any(not prefix or below(key(there.path), prefix) for prefix in prefixes)
    ]
    files = [there for there in found if not there.is_dir]
    first = next((number for number, there in enumerate(files, 1) if RESERVED not in there.path.split("/")), len(files))
    return [there for there in found if there.is_dir] + files[:first] if wanted.until_first_file else found


# ------------------------------------------------------------------------------------------------------------- cases


def _consistent(names: Collection[str]) -> list[str]:
    """These names without those that cannot be beside an earlier one in a file system."""
    kept: list[str] = []
    for name in names:
        if not any(fold(name) == fold(other) or below(name, other) or below(other, name) for other in kept):
            kept.append(name)
    return kept


def _up_to_three(parts: Collection[str]) -> list[str]:
    """Every path of one to three of these parts."""
    return ["/".join(chosen) for count in (1, 2, 3) for chosen in itertools.product(parts, repeat=count)]


@st.composite
def cases(draw: st.DrawFn, store: Capabilities) -> Case:
    """Few names, so that they meet; on a folding store in several spellings."""
    mode = draw(st.sampled_from(Mode))
    parts = ["a", "b", "p=0", "p=1", "é"]
    spelt = [*parts, "A", "P=0", "É", "e\u0301"] if store.folds else parts
    names, plain = st.sampled_from(_up_to_three(spelt)), st.sampled_from(_up_to_three(parts))
    spell = draw(st.sampled_from([str, str.upper, lambda path: unicodedata.normalize("NFD", path)]))
    there = draw(st.lists(plain, unique=True, max_size=6))
    if mode in FIRST and draw(st.booleans()):
        there = []
    if draw(st.integers(0, 9)) == 0:
        there.append(draw(plain) + f"/{RESERVED}/y/head")
    files = _consistent(there) if store.nests else there
    if store.folds:
        # Consistent spelling, but for the control area's name, which is ours.
        files = [
            "".join((spell(above), mark, rest)) for above, mark, rest in (path.partition(RESERVED) for path in files)
        ]
    directories = {above for path in files for above in parents(path)} if store.nests else set()
    if store.nests and not files:
        directories = set(draw(st.lists(st.sampled_from(parts), max_size=1)))
    staged = draw(st.lists(names, unique_by=_key(store), max_size=5))
    known = st.sampled_from(files) | names if files else names
    partitions = None
    if mode is Mode.OVERWRITE_PARTITIONS:
        if draw(st.integers(0, 3)):
            staged = [path for path in staged if "/" in path]
        if draw(st.booleans()):
            partitions = tuple(draw(st.lists(names, unique=True, max_size=3)))
            inside = [f"{partition}/{draw(st.sampled_from(parts))}" for partition in partitions]
            staged = draw(st.sampled_from([staged, list({_key(store)(path): path for path in inside}.values())]))
    deletes = draw(st.lists(known, unique=True, max_size=2)) if draw(st.integers(0, 2)) == 0 else []
    deletes = [path for path in deletes if RESERVED not in path]
    work = Work(mode, [entry(path) for path in staged], tuple(deletes), partitions, draw(st.booleans()))
    return Case(work, tuple(files), tuple(sorted(directories)))


def _agree(case: Case, store: Capabilities) -> str:
    """Hold one plan against the oracle; what it came to."""
    expected = oracle(case, store)
    key, whole = _key(store), case.listing
    before = list(whole)
    try:
        found = plan(case.work, whole, store)
    except StagedError as error:
        assert expected is None, f"refused, though the oracle allows it: {error}"
        assert error.outcome == "untouched"
        with pytest.raises(type(error)):
            check(case.work, store)
            make_plan(case.work, scoped(case, store), store)
        return f"{case.work.mode.value}: refused"
    assert expected is not None, "planned, though the oracle refuses it"
    assert whole == before
    assert carried_out(found, case, store) == expected
    narrow = plan(case.work, scoped(case, store), store)
    assert (narrow.publish, narrow.replaces, set(narrow.remove)) == (found.publish, found.replaces, set(found.remove))
    if found.skipped:
        assert found == Plan(skipped=True)
        return f"{case.work.mode.value}: skipped"
    assert found.publish == tuple(case.work.entries)
    assert found.trees is None
    old = {key(there.path) for there in whole if not there.is_dir}
    new = {key(staged.path) for staged in case.work.entries}
    removed = {key(gone.path) for gone in found.remove}
    assert len(removed) == len(found.remove)
    assert {key(path) for path in found.replaces} == old & new
    assert set(found.remove) <= {there for there in whole if not there.is_dir}
    if case.work.mode is Mode.FULL_DROP:
        assert removed == old - new
    elif case.work.mode is Mode.OVERWRITE_PARTITIONS:
        chosen = case.work.partitions
        partitions = {path.rpartition("/")[0] for path in new} if chosen is None else set(map(key, chosen))
        inside = {path for path in old if any(below(path, partition) for partition in partitions)}
        assert removed == (inside - new) | set(map(key, case.work.deletes))
        assert all(any(below(path, partition) for partition in partitions) for path in new)
    else:
        assert removed == set(map(key, case.work.deletes))
    return f"{case.work.mode.value}: planned"


@pytest.mark.parametrize("name", STORES)
def test_every_plan_does_what_the_oracle_does_or_is_refused_where_it_refuses(name: str, figure: Figure) -> None:
    store = STORES[name]
    seen: Counter[str] = Counter()

    @settings(max_examples=800, deadline=None, derandomize=True, database=None)
    @given(cases(store))
    def compare(case: Case) -> None:
        seen[_agree(case, store)] += 1

    compare()
    planned = sum(count for what, count in seen.items() if "refused" not in what)
    figure(f"plans, {name} store", f"{seen.total():,} against the oracle, {planned:,} of them planned")
    expected = {f"{mode.value}: {what}" for mode in Mode for what in ("planned", "refused")} | {"ignore: skipped"}
    assert seen.keys() == expected
    assert planned > 250


def _small(parts: tuple[str, ...], store: Capabilities) -> Iterator[Case]:
    """Every piece of work over every target of up to two files, of names that meet in every way."""
    names = [*parts, *("/".join(pair) for pair in itertools.permutations(parts, 2))]
    sets = [list(chosen) for count in range(3) for chosen in itertools.combinations(names, count)]
    for files in (chosen for chosen in sets if _consistent(chosen) == chosen):
        directories = tuple(sorted({above for path in files for above in parents(path)})) if store.nests else ()
        for staged, mode, delete in itertools.product(sets, Mode, [None, *names[:3]]):
            work = Work(mode, [entry(path) for path in staged], (delete,) if delete else ())
            yield Case(work, tuple(files), directories)


@pytest.mark.parametrize("name", ["nesting", "flat"])
def test_every_small_case_agrees_with_the_oracle(name: str, figure: Figure) -> None:
    seen = Counter(_agree(case, STORES[name]) for case in _small(("a", "b", "c"), STORES[name]))
    refused = sum(count for what, count in seen.items() if "refused" in what)
    figure(f"small plans, {name} store", f"{seen.total():,}, which is all there are; {refused:,} of them refused")
    assert seen.total() > 40_000


# ------------------------------------------------------------------------------------------------ stores that fold names


def test_on_a_folding_store_a_directory_in_another_case_than_a_staged_file_is_refused() -> None:
    # Found out only while publishing, it would block a commit that is decided already.
    with pytest.raises(StagingError):
        check(Work(Mode.APPEND, [entry("a"), entry("A/b")]), FOLDING)
    check(Work(Mode.APPEND, [entry("a"), entry("A/b")]), NESTING)


def test_on_a_folding_store_a_delete_in_another_case_than_a_staged_file_is_refused() -> None:
    work = Work(Mode.OVERWRITE_FILES, [entry("A")], deletes=("a",))
    with pytest.raises(InvalidInput):
        plan(work, listed("A"), FOLDING)


def test_two_listed_names_that_fold_alike_are_both_removed() -> None:
    # Our fold is coarser than any store's: ext4 keeps "x²" and "x2" apart even where it folds case.
    found = plan(Work(Mode.FULL_DROP, [entry("new")]), listed("x²", "x2"), FOLDING)
    assert {gone.path for gone in found.remove} == {"x²", "x2"}


# -------------------------------------------------------------------------------------------------- what must be refused

CONTROL = f"x/{RESERVED}/y/head"


@pytest.mark.parametrize("store", STORES.values(), ids=STORES)
@pytest.mark.parametrize(
    "listing",
    [
        listed("x/f", CONTROL),
        listed("x/f", directories=["x", f"x/{RESERVED}"]),
        listed(CONTROL, directories=parents(CONTROL)),
    ],
)
def test_a_plan_that_covers_another_targets_control_area_is_refused(store: Capabilities, listing: list[Listed]) -> None:
    covering = [
        Work(Mode.FULL_DROP, [entry("new")]),
        Work(Mode.FULL_DROP, [], allow_empty=True),
        Work(Mode.OVERWRITE_PARTITIONS, [entry("x/new")]),
        Work(Mode.OVERWRITE_PARTITIONS, [entry("z/new")], partitions=("x", "z")),
    ]
    for work in covering:
        with pytest.raises(Conflict, match="control area of another target") as caught:
            plan(work, listing, store)
        assert not caught.value.retryable
    beside = [
        Work(Mode.OVERWRITE_PARTITIONS, [entry("x/p/new")]),
        Work(Mode.OVERWRITE_PARTITIONS, [entry("z/new")]),
        Work(Mode.APPEND, [entry("x/new")]),
        Work(Mode.OVERWRITE_FILES, [entry("x/new")]),
    ]
    for work in beside:
        assert plan(work, listing, store).remove == ()


def test_a_control_area_in_the_target_itself_is_not_dropped() -> None:
    with pytest.raises(Conflict, match="control area"):
        plan(Work(Mode.FULL_DROP, [entry("new")]), listed(f"{RESERVED}/child/head"), NESTING)


@pytest.mark.parametrize("mode", [Mode.APPEND, Mode.OVERWRITE_FILES, Mode.OVERWRITE_PARTITIONS, Mode.FULL_DROP])
def test_a_file_where_a_directory_must_be_is_refused_and_the_other_way_round(mode: Mode) -> None:
    file_in_the_way = listed("p/a", directories=["p"])
    directory_in_the_way = listed("p/a/b/c", directories=["p", "p/a", "p/a/b"])
    for staged, listing in (("p/a/b", file_in_the_way), ("p/a/b/c", file_in_the_way), ("p/a/b", directory_in_the_way)):
        with pytest.raises(Conflict) as caught:
            plan(Work(mode, [entry(staged)]), listing, NESTING)
        assert not caught.value.retryable
        assert not isinstance(caught.value, Exists)
    with pytest.raises(StagingError, match="staged as a file, and as a directory"):
        check(Work(mode, [entry("p/a"), entry("p/a/b/c")]), NESTING)
    flat = [there for there in file_in_the_way if not there.is_dir]
    for staged in ("p/a/b", "p/a/b/c"):
        assert plan(Work(mode, [entry(staged)]), flat, FLAT).publish
    check(Work(mode, [entry("p/a"), entry("p/a/b")], partitions=("p",)), FLAT)


@pytest.mark.parametrize("mode", Mode)
def test_nothing_staged_is_refused_by_replacing_modes_unless_it_is_meant(mode: Mode) -> None:
    work = Work(mode, [])
    if mode in (Mode.OVERWRITE_PARTITIONS, Mode.FULL_DROP):
        with pytest.raises(StagingError, match="allow_empty=True"):
            check(work, NESTING)
    else:
        assert plan(work, [], NESTING) == Plan()
    meant = replace(work, allow_empty=True)
    found = plan(meant, listed("a", "p/b", directories=["p"]) if mode not in FIRST else [], NESTING)
    assert {gone.path for gone in found.remove} == ({"a", "p/b"} if mode is Mode.FULL_DROP else set())


def test_a_listed_partition_without_rows_is_emptied() -> None:
    there = listed("p=0/a", "p=0/d/b", "p=1/a", "p=10/a", "c", directories=["p=0", "p=0/d", "p=1", "p=10"])
    for staged, allow_empty in ([], True), ([entry("p=1/new")], False):
        work = Work(Mode.OVERWRITE_PARTITIONS, staged, partitions=("p=0", "p=1", "p=2"), allow_empty=allow_empty)
        assert {gone.path for gone in plan(work, there, NESTING).remove} == {"p=0/a", "p=0/d/b", "p=1/a"}


@pytest.mark.parametrize("mode", Mode)
def test_a_delete_that_makes_no_sense_is_refused(mode: Mode) -> None:
    there = [] if mode in FIRST else listed("old", "p/old", "p/d/old", directories=["p", "p/d"])
    staged = [entry("p/new")]
    for path, error in {"p/new": InvalidInput, "absent": Conflict, "p/d": Conflict}.items():
        wrong = InvalidInput if mode is Mode.FULL_DROP or (mode is Mode.OVERWRITE_PARTITIONS and "/" in path) else error
        with pytest.raises(wrong) as caught:
            plan(Work(mode, staged, (path,)), there, NESTING)
        assert type(caught.value) is wrong
    work = Work(mode, staged, ("p/d/old",))
    if mode in REPLACING:
        with pytest.raises(InvalidInput, match="needs no delete"):
            check(work, NESTING)
    elif mode not in FIRST:
        assert [gone.path for gone in plan(work, there, NESTING).remove] == ["p/d/old"]


def test_partitions_that_contradict_the_staged_files_are_refused() -> None:
    for staged, partitions, why in (
        (["new"], None, "at the root"),
        (["p/a", "p/q/b"], None, "lies inside"),
        (["p/q/r/b"], ("p", "p/q/r"), "lies inside"),
        (["p/a", "z/a"], ("p",), "outside the partitions"),
        (["pp/a"], ("p",), "outside the partitions"),
    ):
        with pytest.raises(InvalidInput, match=why):
            check(Work(Mode.OVERWRITE_PARTITIONS, [entry(path) for path in staged], (), partitions), NESTING)


def test_a_taken_name_is_an_exists_error_and_a_full_target_too() -> None:
    for mode in (Mode.APPEND, Mode.ERROR):
        with pytest.raises(Exists, match="'a'") as caught:
            plan(Work(mode, [entry("a")]), listed("a"), NESTING)
        assert not caught.value.retryable
    assert plan(Work(Mode.IGNORE, [entry("a")]), listed("b"), NESTING) == Plan(skipped=True)


@pytest.mark.parametrize("mode", FIRST)
def test_a_target_of_empty_directories_is_empty(mode: Mode) -> None:
    assert plan(Work(mode, [entry("d/a")]), listed(directories=["d", "e"]), NESTING).publish == (entry("d/a"),)


# ---------------------------------------------------------------------------------------------------------------- overlap

NAMES = ["a", "A", "b", "é", "e\u0301", "p/a"]
PIECES = [
    Work(mode, [entry(path) for path in staged], deletes)
    for mode in Mode
    for count in range(3)
    for staged in itertools.combinations(NAMES, count)
    for deletes in ((), ("b",), ("É",))
]


def _touched(work: Work) -> set[str]:
    return {staged.path for staged in work.entries} | set(work.deletes)


def _guarded(work: Work, strict: bool) -> set[str]:
    """What no other commit may have touched: a delete in every mode, a written name where it does not replace all."""
    return _touched(work) if work.mode in BLIND or strict else set(work.deletes)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", STORES)
def test_a_commit_overlaps_exactly_with_those_that_touched_a_name_it_guards(name: str, strict: bool) -> None:
    store = replace(STORES[name], strict_overlap=strict)
    key = _key(store)
    for ours, since in itertools.product(PIECES, PIECES):
        found = overlap(ours, store, _touched(since), whole=False)
        guarded = _guarded(ours, strict)
        shared = {key(path) for path in guarded} & {key(path) for path in _touched(since)}
        assert (found is not None) == bool(shared)
        assert found is None or (found in guarded and key(found) in shared)


@pytest.mark.parametrize("strict", [False, True])
def test_a_replaced_target_is_in_the_way_of_all_but_new_names(strict: bool) -> None:
    store = replace(NESTING, strict_overlap=strict)
    for work in PIECES:
        guarded = _guarded(work, strict)
        apart = overlap(work, store, ["elsewhere"], whole=True)
        assert (apart is not None) == (bool(guarded) and (work.mode is not Mode.APPEND or bool(work.deletes)))
        assert apart is None or apart in guarded
        same = overlap(work, store, [*_touched(work), "elsewhere"], whole=True)
        assert (same is not None) == bool(guarded)
