"""What the drivers of object stores share: where things are, records, listings, and what publishing and removing answer.

Object stores have no directories and no rename of a tree: names are moved, completed and removed one by one, each under a
condition where the store has one. What is ours is told by the write that made it, which its metadata names.

    <parent>/_staged/<name>/head, tx/<id>/record, log/…, outcome/…   records and segments, one object each
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal, Self, TypeVar

from staged import paths
from staged.driver import Driver, Record
from staged.drivers._cloud import MISSED, Limit, Refused, at_once, mapped
from staged.errors import InvalidInput, InvalidPath
from staged.model import Answer, Entry, Guarantee, Listed, Mode
from staged.paths import RESERVED, join

__all__ = ["ALWAYS", "WRITE", "Look", "ObjectDriver", "Objects", "alike", "guarantees", "honoured", "prefix_of"]

S = TypeVar("S")
T = TypeVar("T")

WRITE = "staged"
"""The name of the metadata that says by which write an object came to be."""
ALWAYS: frozenset[Guarantee] = frozenset(("serialised", "fenced", "no_gap"))
"""What is promised of every mode where all conditions are honoured and removal is conditional as well."""


@dataclass(frozen=True, slots=True)
class Look:
    """One object as it is: its identity and size, by which write it came to be, and seconds since, by the store's clock."""

    identity: str
    size: int
    write: str | None
    age: float


class Objects(ABC):
    """Single requests to one bucket, each under the limit, and retried; what is refused for good is `Refused`.

    Names are whole keys; an identity is what a condition on an object names: an ETag or a generation.
    """

    limit: Limit

    @abstractmethod
    async def get(self, name: str) -> Record | None:
        """An object whole, and its identity."""

    @abstractmethod
    async def put(self, name: str, body: bytes, *, replaces: str | None) -> str | None:
        """Write a small object in place of that identity or of none; its new one, or None where another is there. That may
        come of an earlier sending of the same."""

    @abstractmethod
    async def look(self, name: str) -> Look | None:
        """What has this name."""

    @abstractmethod
    def pages(self, prefix: str) -> AsyncGenerator[list[Listed], None]:
        """The objects whose names begin so."""

    @abstractmethod
    async def delete(self, names: Mapping[str, str | None]) -> Mapping[str, Answer]:
        """Delete what has these names, if it has that identity still: DONE, ALREADY or FOREIGN for each."""

    @abstractmethod
    async def aclose(self) -> None:
        """Close what was opened here."""


class ObjectDriver(Driver):
    """One target in a bucket. A subclass adds how its store stages and publishes.

    Args:
        objects: The bucket, shared with the targets below.
        address: The bucket for messages, such as `s3://bucket`.
        path: The target in it; empty where it is the whole bucket.
        period: Seconds of silence after which a writer that commits is taken for dead.
    """

    def __init__(self, objects: Objects, address: str, path: str, period: float) -> None:
        self._objects, self._address, self._period, self._owner = objects, address, period, True
        self._place(path)

    def _place(self, path: str) -> None:
        """Where the target and its control area are in the bucket."""
        self._path = path
        self.url = f"{self._address}/{path}"
        above, _, name = path.rpartition("/")
        self._control = join(above, f"{RESERVED}/{name or RESERVED}")

    def child(self, path: str) -> Self:
        child = object.__new__(type(self))
        vars(child).update(vars(self), _owner=False)
        child._place(join(self._path, path))
        return child

    async def aclose(self) -> None:
        if self._owner:
            await self._objects.aclose()

    # ------------------------------------------------------------------------------------------------ the control area

    def _key(self, key: str) -> str:
        return f"{self._control}/{key}"

    async def read(self, key: str) -> Record | None:
        with mapped():
            return await self._objects.get(self._key(key))

    async def cas(self, key: str, body: bytes, token: str | None, *, durable: bool) -> str | None:
        with mapped():
            return await self._objects.put(self._key(key), body, replaces=token)

    async def put_segment(self, key: str, body: bytes) -> bool:
        return await self.cas(key, body, None, durable=False) is not None

    async def list_control(self, prefix: str) -> Sequence[str]:
        start = len(self._key(""))
        with mapped():
            async with aclosing(self._objects.pages(self._key(prefix))) as pages:
                return sorted([found.path[start:] async for page in pages for found in page])

    async def delete_control(self, keys: Sequence[str]) -> None:
        with mapped():
            await self._objects.delete(dict.fromkeys(map(self._key, keys)))

    async def age(self, key: str) -> float | None:
        with mapped():
            found = await self._objects.look(self._key(key))
        return None if found is None else found.age

    # -------------------------------------------------------------------------------------------------------- the target

    async def list(
        self, prefix: str = "", names: Collection[str] | None = None
    ) -> AsyncGenerator[Sequence[Listed], None]:
        with mapped():
            if names is not None:
                found = await self._find({join(self._path, name) for name in names})
                yield [self._below(listed) for listed in found.values()]
                return
            start = join(self._path, prefix)
            async with aclosing(self._objects.pages(f"{start}/" if start else "")) as pages:
                async for page in pages:
                    yield [self._below(listed) for listed in page if not self._is_ours(listed.path)]

    def _below(self, listed: Listed) -> Listed:
        path = listed.path[len(self._path) + 1 if self._path else 0 :]
        if listed.size == 0 and path.endswith("/"):
            # What tools put where a directory is to be seen; it makes no target full, and is nobody's data.
            return replace(listed, path=path.rstrip("/"), is_dir=True)
        return replace(listed, path=path)

    def _is_ours(self, name: str) -> bool:
        # The control areas of other targets below lie beside ours, and are not; the target's own marker is no file of it.
        return name.startswith(f"{self._control}/") or name == f"{self._path}/"

    async def _find(self, names: Collection[str]) -> dict[str, Listed]:
        """What has one of these names. A page of a listing costs one request, and so does a name."""
        groups = [list(group) for _, group in groupby(sorted(names), lambda name: name.rpartition("/")[0])]
        # The names of one directory, as far as they are alike, on few pages; what is not found there, by name.
        listed: dict[str, Listed] = {}
        left: set[str] = set()

        async def search(group: list[str]) -> None:
            # One more, which tells that there are no more.
            pages_left = 2 + len(group) // self._objects.limit.most if len(group) > 1 else 0
            left.update(group)
            async with aclosing(self._objects.pages(alike(group))) as pages:
                while pages_left:
                    page = await anext(pages, None)
                    if page is None:
                        left.difference_update(group)
                        return
                    listed.update((found.path, found) for found in page)
                    pages_left -= 1

        async def look(name: str) -> None:
            if (found := await self._objects.look(name)) is not None:
                listed[name] = Listed(name, found.size, found.identity)

        await self._at_once(groups, search)
        await self._at_once(left - listed.keys(), look)
        return {name: listed[name] for name in names if name in listed}

    async def publish(self, tx: str, entries: Sequence[Entry], replaces: Mapping[str, str]) -> Sequence[Answer]:
        async def publish(entry: Entry) -> Answer:
            name = join(self._path, entry.path)
            replaced = replaces.get(entry.path)
            while True:
                try:
                    await self._show(tx, entry, name, replaced)
                    return Answer.DONE
                except Refused as error:
                    if error.status not in MISSED:
                        raise
                    # Whatever was answered, and to which of several sendings: what is there now is what counts.
                    answer = await self._tell(tx, entry, name, replaced)
                    if answer is not None:
                        return answer
                    if replaced is None or await self._objects.look(name) is not None:
                        raise  # for another reason, such as a lease
                # Somebody removed what it was to replace: the name is free.
                replaced = None

        with mapped():
            return await self._at_once(entries, publish)

    async def _tell(self, tx: str, entry: Entry, name: str, replaced: str | None) -> Answer | None:
        """What became of an entry; None where nothing is in its way."""
        # In this order: whoever publishes it meanwhile consumes what is staged.
        staged = await self._is_staged(tx, entry)
        there = await self._objects.look(name)
        if there is not None and there.write == entry.identity:
            return Answer.ALREADY
        if not staged:
            return Answer.LOST
        return Answer.FOREIGN if there is not None and there.identity != replaced else None

    @abstractmethod
    async def _show(self, tx: str, entry: Entry, name: str, replaced: str | None) -> None:
        """Publish one entry, in place of that identity or of none where the store takes such a condition.

        Raises:
            Refused: With a status in `MISSED` where it is not staged, or another thing is there.
        """

    @abstractmethod
    async def _is_staged(self, tx: str, entry: Entry) -> bool:
        """Whether an entry can still be published."""

    async def remove(self, entries: Sequence[Listed]) -> Sequence[Answer]:
        with mapped():
            answers = await self._objects.delete({join(self._path, one.path): one.identity for one in entries})
        return [answers[join(self._path, entry.path)] for entry in entries]

    async def _at_once(self, items: Collection[S], work: Callable[[S], Awaitable[T]]) -> Sequence[T]:
        return await at_once(list(items), work, self._objects.limit.most)


async def honoured(objects: Objects, place: str) -> tuple[bool, bool]:
    """Whether conditions of writes, and those of deletions, are honoured; tried at a free name."""
    await objects.put(place, b"1", replaces=None)
    other = await objects.put(f"{place}-other", b"2", replaces=None)
    # Read back: an answer that was lost is no sign of anything.
    there = await objects.get(place)
    try:
        for replaced in (None, other):
            await objects.put(place, b"3", replaces=replaced)
        writes = there is not None and await objects.get(place) == there
        try:
            await objects.delete({place: other})
        except Refused as error:
            if error.status not in (400, 501):
                raise
            return writes, False
        return writes, await objects.get(place) is not None
    finally:
        await objects.delete({place: None, f"{place}-other": None})


def prefix_of(written: str) -> str:
    """The prefix of a URL, with or without a slash at its end; no message shows it, since it may hold a credential.

    Raises:
        InvalidInput: It is none that a target can have.
    """
    prefix = written.removesuffix("/")
    try:
        paths.parse_prefix(prefix)
    except InvalidPath:
        prefix = "?"
    if "?" in prefix:
        raise InvalidInput(
            "The URL's path is not one that a store takes: parts that every file system takes, and no query."
        )
    return prefix


def alike(names: Sequence[str]) -> str:
    """What all these names begin with, be it within a part of them."""
    return os.path.commonprefix(names)  # noqa: RUF071


def guarantees(
    *, conditions: bool, removal: Literal["nothing", "equal", "anything"]
) -> dict[Mode, frozenset[Guarantee]]:
    """What an object store promises for each mode.

    Args:
        conditions: It honours those on which commits rest.
        removal: What a removal that comes late can take: "nothing"; "equal" bytes, where identities are of bytes; or
            "anything" of that name, where the condition of a removal is not honoured.
    """
    promised = {mode: ALWAYS if conditions else ALWAYS - {"serialised", "fenced"} for mode in Mode}
    broken: dict[str, frozenset[Guarantee]] = {
        "nothing": frozenset(),
        "equal": frozenset(("fenced",)),
        "anything": frozenset(("serialised", "fenced")),
    }
    for mode in (Mode.OVERWRITE_PARTITIONS, Mode.FULL_DROP):
        promised[mode] -= broken[removal]
    return promised
