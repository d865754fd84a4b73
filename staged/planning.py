"""From mode, staged entries and listing to a plan: pure functions, no I/O.

    check(...)    what is wrong whatever the target holds          before the lock
    scope(...)    what of the target must be known                 under the head
    make_plan(...) what to publish, to replace and to remove       under the head
    overlap(...)  whether a commit since the base touched our names

In every mode the plan publishes all that is staged first, and then removes exactly what it names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from staged.errors import Conflict, Exists, InvalidInput, StagingError
from staged.model import Capabilities, Entry, Listed, Mode, Plan
from staged.paths import RESERVED, fold, join, leads_out, parents

__all__ = [
    "BLIND",
    "REPLACING",
    "Scope",
    "Work",
    "check",
    "guarded",
    "is_content",
    "make_plan",
    "overlap",
    "partitions_of",
    "scope",
]

REPLACING = frozenset({Mode.OVERWRITE_PARTITIONS, Mode.FULL_DROP})
"""Modes in which what is not staged again is removed."""

BLIND = frozenset({Mode.APPEND, Mode.OVERWRITE_FILES})
"""Modes that keep what they do not name, and so must not undo what was committed since they began."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a transaction wants: everything that a plan depends on, but for the target."""

    mode: Mode
    entries: Collection[Entry]
    deletes: tuple[str, ...] = ()
    partitions: tuple[str, ...] | None = None
    allow_empty: bool = False


@dataclass(frozen=True, slots=True)
class Scope:
    """What of the target a plan must know: whole directories, and single names."""

    prefixes: tuple[str, ...] = ()
    names: frozenset[str] = frozenset()
    until_first_file: bool = False


def check(work: Work, store: Capabilities) -> None:
    """What is wrong with the staged set whatever the target holds.

    Raises:
        StagingError: A replacing mode without files, or names that exclude each other.
        InvalidInput: Deletes or partitions that contradict the mode or the staged files.
    """
    if not work.entries and work.mode in REPLACING and not work.allow_empty:
        raise StagingError(
            f"Nothing was staged, and mode {work.mode.value!r} would remove what is there. Pass allow_empty=True to mean it."
        )
    if work.deletes and store.adds_only:
        raise InvalidInput(f"{work.deletes[0]!r} cannot be deleted: this store keeps what was published as it is.")
    key: Callable[[str], str] = fold if store.folds else str
    staged = {key(entry.path) for entry in work.entries}
    if store.nests:
        for directory in _directories(staged):
            if directory in staged:
                raise StagingError(f"{directory!r} is staged as a file, and as a directory by what is staged below it.")
    replaced = partitions_of(work, key)
    for path in work.deletes:
        if key(path) in staged:
            raise InvalidInput(f"{path!r} is both written and deleted by this transaction.")
        if work.mode is Mode.FULL_DROP:
            raise InvalidInput(f"{path!r} needs no delete: mode 'full_drop' removes everything that is not staged.")
        if any(_is_below(key(path), partition) for partition in replaced):
            raise InvalidInput(f"{path!r} needs no delete: its partition is replaced.")


def partitions_of(work: Work, key: Callable[[str], str]) -> tuple[str, ...]:
    """The directories that `overwrite_partitions` replaces, as the store folds them; none for other modes.

    Raises:
        InvalidInput: A file lies outside every partition, or partitions lie in one another.
    """
    if work.mode is not Mode.OVERWRITE_PARTITIONS:
        return ()
    received = {key(directory) for directory in _received(work)}
    if "" in received:
        raise InvalidInput(
            "Mode 'overwrite_partitions' takes no files at the root: each must lie in a partition's directory."
        )
    chosen = sorted(received if work.partitions is None else set(map(key, work.partitions)))
    known = set(chosen)
    for partition in chosen:
        for above in parents(partition):
            if above in known:
                raise InvalidInput(f"The partition {partition!r} lies inside the partition {above!r}.")
    for directory in received:
        if directory not in known and known.isdisjoint(parents(directory)):
            raise InvalidInput(f"Files were staged in {directory!r}, outside the partitions that were named.")
    return tuple(chosen)


def scope(work: Work, store: Capabilities) -> Scope:
    """What of the target the plan of this work must know."""
    if work.mode is Mode.FULL_DROP:
        return Scope(prefixes=("",))
    if work.mode in (Mode.ERROR, Mode.IGNORE):
        return Scope(prefixes=("",), until_first_file=True)
    partitions: Collection[str] = ()
    if work.mode is Mode.OVERWRITE_PARTITIONS:
        partitions = _received(work) if work.partitions is None else work.partitions
    names = set(work.deletes)
    if work.mode in BLIND:
        names.update(entry.path for entry in work.entries)
        if store.nests:
            names |= _directories(names)
    names.update(_emptied(partitions))
    names.update(map(_head_of, _emptied(partitions)))
    return Scope(prefixes=tuple(partitions), names=frozenset(names))


def is_content(listed: Listed) -> bool:
    """Whether it makes a target other than empty: a directory does not, and no control area of a target below."""
    return not listed.is_dir and RESERVED not in listed.path.split("/")


def make_plan(work: Work, listing: Iterable[Listed], store: Capabilities) -> Plan:
    """What a commit of this work does to a target that holds what was listed in its scope.

    Raises:
        Exists: A name to add is taken; mode `error` and the target is not empty.
        Conflict: A file stands where a directory must be, or the other way round; a file to delete is not there; the plan
            would cover another target's control area.
    """
    key: Callable[[str], str] = fold if store.folds else str
    listing = list(listing)
    found = {key(listed.path): listed for listed in listing}
    if work.mode in (Mode.ERROR, Mode.IGNORE):
        held = next(filter(is_content, found.values()), None)
        if held is not None and work.mode is Mode.IGNORE:
            return Plan(skipped=True)
        if held is not None:
            raise Exists(f"The target is not empty: it holds {held.path!r}. Mode 'error' changes nothing then.")
    partitions = partitions_of(work, key)
    removable = _removable(work, listing, partitions, key)
    if store.nests:
        _check_nesting(work, partitions, found, key)
    replaces: dict[str, str] = {}
    for entry in work.entries:
        namesake = found.get(key(entry.path))
        if namesake is None:
            continue
        if namesake.is_dir:
            raise Conflict(
                f"{entry.path!r} is a directory in the target; a file cannot take its name.", retryable=False
            )
        if work.mode not in (*REPLACING, Mode.OVERWRITE_FILES):
            raise Exists(f"{entry.path!r} exists in the target; mode {work.mode.value!r} only adds new names.")
        replaces[entry.path] = namesake.identity
        removable.pop(namesake.path, None)
    return Plan(publish=tuple(work.entries), replaces=replaces, remove=tuple(removable.values()))


def _removable(
    work: Work, found: Collection[Listed], partitions: tuple[str, ...], key: Callable[[str], str]
) -> dict[str, Listed]:
    """Everything that the plan removes unless a staged file takes its name."""
    deletes = {key(path): path for path in work.deletes}
    replaced, heads = set(partitions), set(map(_head_of, _emptied(partitions)))
    removable: dict[str, Listed] = {}
    for listed in found:
        name = key(listed.path)
        covered = work.mode is Mode.FULL_DROP or not replaced.isdisjoint(parents(name))
        if (covered and RESERVED in listed.path.split("/")) or name in heads:
            raise Conflict.covering(listed.path)
        if listed.is_dir:
            continue
        if covered and leads_out(listed.path):
            raise Conflict(
                f"{listed.path!r} is in the way, and has a name that nobody could remove after a crash; remove it first.",
                retryable=False,
            )
        if covered or name in deletes:
            removable[listed.path] = listed
            deletes.pop(name, None)
    if deletes:
        raise Conflict(
            f"{next(iter(deletes.values()))!r} is to be deleted, but the target has no such file.", retryable=False
        )
    return removable


def _check_nesting(
    work: Work, partitions: Collection[str], found: dict[str, Listed], key: Callable[[str], str]
) -> None:
    for directory in _directories(entry.path for entry in work.entries) | _emptied(partitions):
        at = found.get(key(directory))
        if at is not None and not at.is_dir:
            raise Conflict(f"{at.path!r} is a file in the target; files cannot lie below it.", retryable=False)


def guarded(work: Work, store: Capabilities) -> list[str]:
    """Our names that no commit since our base may have touched: what we write, unless we replace it all, and delete."""
    if store.adds_only:
        return []  # names are given under the head
    written = [entry.path for entry in work.entries] if work.mode in BLIND or store.strict_overlap else []
    return [*written, *work.deletes]


def overlap(work: Work, store: Capabilities, touched: Collection[str], *, whole: bool) -> str | None:
    """A guarded name of ours that a commit since our base touched; None where we may follow it.

    Args:
        touched: The names that it wrote or removed.
        whole: It replaced the whole target, so that any name may have been removed. A name to append is then free.
    """
    key: Callable[[str], str] = fold if store.folds else str
    ours = {key(name): name for name in guarded(work, store)}
    if whole and ours and (work.mode is not Mode.APPEND or work.deletes):
        return next(reversed(ours.values()))
    return next((ours[name] for name in map(key, touched) if name in ours), None)


def _received(work: Work) -> set[str]:
    """The directories that directly received a staged file."""
    return {entry.path.rpartition("/")[0] for entry in work.entries}


def _directories(names: Iterable[str]) -> set[str]:
    """Every directory above one of these names."""
    above: set[str] = set()
    for leaf in {name.rpartition("/")[0] for name in names}:
        if leaf and leaf not in above:
            above.add(leaf)
            above.update(parents(leaf))
    return above


def _emptied(partitions: Iterable[str]) -> set[str]:
    """The partitions, and every directory above one of them."""
    return {above for partition in partitions for above in (partition, *parents(partition))}


def _head_of(directory: str) -> str:
    """Where the head is of a target of its own that this directory may be."""
    above, _, name = directory.rpartition("/")
    return join(above, f"{RESERVED}/{name}/head")


def _is_below(path: str, directory: str) -> bool:
    return path.startswith(directory + "/")
