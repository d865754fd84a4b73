"""Buckets and objects in memory: generations, conditions, versions, uploads and rewrites under way; no HTTP.

Every operation is applied whole or refused whole, and costs what its name and its answer cost, whatever else is stored.
"""

from __future__ import annotations

import base64
import hashlib
import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count, takewhile
from typing import Any

import google_crc32c

from .errors import Refused

LONGEST = 1024  # bytes of a name, https://cloud.google.com/storage/docs/objects#naming
QUANTUM = 256 * 1024  # of an upload's chunks, https://cloud.google.com/storage/docs/performing-resumable-uploads
COMPOSED = 32  # objects at a time, https://cloud.google.com/storage/docs/json_api/v1/objects/compose
# What a writer may set.
WRITABLE = (
    *("cacheControl", "contentDisposition", "contentEncoding", "contentLanguage", "contentType", "customTime"),
    *("metadata", "storageClass"),
)

Properties = Mapping[str, Any]


def crc32c(data: bytes) -> str:
    """As the service writes it: big-endian, in base64."""
    return base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()


def md5(data: bytes) -> str:
    """As the service writes it."""
    return base64.b64encode(hashlib.md5(data).digest()).decode()


@dataclass(frozen=True)
class Content:
    """An object's bytes, which others may share; each hash is worked out once."""

    data: bytes

    @cached_property
    def crc32c(self) -> str:
        return crc32c(self.data)

    @cached_property
    def md5(self) -> str:
        return md5(self.data)


@dataclass(frozen=True, slots=True)
class Object:
    """One generation of an object, at one metageneration; a change of either is another of these.

    Attributes:
        properties: What its writer set: `WRITABLE`.
        components: How many objects it was composed of; 0 where it was not.
        deleted: When it ceased to be live, where it is kept.
    """

    bucket: str
    name: str
    content: Content
    generation: int
    created: float
    updated: float
    metageneration: int = 1
    properties: Properties = field(default_factory=dict)
    components: int = 0
    deleted: float | None = None

    @property
    def data(self) -> bytes:
        return self.content.data

    @property
    def etag(self) -> str:
        return base64.b64encode(f"{self.generation}/{self.metageneration}".encode()).decode()

    @property
    def content_type(self) -> str:
        return str(self.properties.get("contentType", "application/octet-stream"))


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a request wants of the live object: its generation, 0 for none, and its metageneration.

    https://cloud.google.com/storage/docs/request-preconditions
    """

    generation: int | None = None
    not_generation: int | None = None
    metageneration: int | None = None
    not_metageneration: int | None = None

    def check(self, found: Object | None) -> None:
        """Hold the conditions against what is there."""
        generation = found.generation if found is not None else 0
        metageneration = found.metageneration if found is not None else None
        if self.generation not in (None, generation) or self.metageneration not in (None, metageneration):
            raise Refused("conditionNotMet")
        # They fail where nothing is there; that it is with this status then is undocumented.
        if self.not_generation is not None and generation in (0, self.not_generation):
            raise Refused("notModified")
        if self.not_metageneration is not None and metageneration in (None, self.not_metageneration):
            raise Refused("notModified")


ALWAYS = Conditions()


@dataclass(slots=True)
class Bucket:
    """A bucket; `names` are its live objects', sorted, so that a page of a listing is found without sorting.

    Attributes:
        versioned: Keep what is replaced or deleted.
        refuses_move: The status that `moveTo` is answered with; 0 where it moves.
        kept: Generations that are no longer live, by name, oldest first.
    """

    name: str
    created: float
    versioned: bool = False
    refuses_move: int = 0
    metageneration: int = 1
    objects: dict[str, Object] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    kept: dict[str, list[Object]] = field(default_factory=dict)

    def generations(self, name: str) -> list[Object]:
        """All of an object's, oldest first."""
        live = self.objects.get(name)
        return [*self.kept.get(name, ()), *([live] if live is not None else ())]


@dataclass(slots=True)
class Upload:
    """A resumable upload; `total` is None as long as nobody said it.

    Attributes:
        hashes: What its data should come to.
        done: What came of it.
        cancelled: That it was given up.
    """

    bucket: str
    name: str
    properties: Properties
    conditions: Conditions
    hashes: Properties = field(default_factory=dict)
    data: bytearray = field(default_factory=bytearray)
    total: int | None = None
    done: Object | None = None
    cancelled: bool = False


@dataclass(slots=True)
class Rewrite:
    """A copy under way: what of it was written."""

    source: Object
    place: tuple[str, str]
    written: int = 0


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a listing; `token` asks for the next."""

    objects: list[Object]
    prefixes: list[str]
    token: str


class Store:
    """All buckets of a project.

    Args:
        now: The clock, in seconds since 1970.
        conditions: Whether conditions are looked at; a store that ignores them overwrites.
        rate: Writes a second that one name takes; more are refused.
        absent: The status where something is wanted of an object's generation, and no such object is there to be read,
            changed, deleted or moved: 404, or 412 as clients report of reads. Undocumented.
        page: Results that one page of a listing has at most.
        rewritten: Bytes that one call of a rewrite gets through; all by default.
        keeps: Bytes that one request of a resumable upload gets kept at most; all by default.
    """

    def __init__(
        self,
        now: Callable[[], float] = time.time,
        *,
        conditions: bool = True,
        rate: float | None = None,
        absent: int = 404,
        page: int = 1000,
        rewritten: int | None = None,
        keeps: int | None = None,
    ) -> None:
        self.now = now
        self.conditions = conditions
        self.rate = rate
        self.absent = absent
        self.page = page
        self.rewritten = rewritten
        self.keeps = keeps
        self.buckets: dict[str, Bucket] = {}
        self.uploads: dict[str, Upload] = {}
        self.rewrites: dict[str, Rewrite] = {}
        self._generation = 0
        self._numbers = count(1)
        self._wrote: dict[tuple[str, str], float] = {}

    # Buckets

    def create_bucket(self, name: str, *, versioned: bool = False, refuses_move: int = 0) -> Bucket:
        if name in self.buckets:
            raise Refused("conflict", "The requested bucket name is not available.")
        self.buckets[name] = Bucket(name, self.now(), versioned, refuses_move)
        return self.buckets[name]

    def bucket(self, name: str) -> Bucket:
        if name not in self.buckets:
            raise Refused("notFound", "The specified bucket does not exist.")
        return self.buckets[name]

    def delete_bucket(self, name: str) -> None:
        bucket = self.bucket(name)
        if bucket.names or any(bucket.kept.values()):
            raise Refused("conflict", "The bucket you tried to delete is not empty.")
        del self.buckets[name]

    # Objects

    def get(self, bucket: str, name: str, *, generation: int | None = None, conditions: Conditions = ALWAYS) -> Object:
        """An object, live or of that generation, that satisfies the conditions."""
        found = self.find(bucket, name, generation)
        if found is None:
            status = self.absent if conditions.generation else 404
            text = f"No such object: {bucket}/{name}" if status == 404 else ""
            raise Refused("notFound" if status == 404 else "conditionNotMet", text)
        self._check(conditions, found)
        return found

    def find(self, bucket: str, name: str, generation: int | None = None) -> Object | None:
        """An object, live or of that generation; None where it is not."""
        known = self.bucket(bucket)
        if generation is None:
            return known.objects.get(name)
        return next((found for found in known.generations(name) if found.generation == generation), None)

    def put(
        self,
        bucket: str,
        name: str,
        data: bytes = b"",
        properties: Properties | None = None,
        *,
        conditions: Conditions = ALWAYS,
        components: int = 0,
    ) -> Object:
        """Write an object: a new generation."""
        return self._put(bucket, name, Content(data), properties or {}, conditions, components)

    def change(
        self,
        bucket: str,
        name: str,
        changes: Properties,
        *,
        whole: bool = False,
        generation: int | None = None,
        conditions: Conditions = ALWAYS,
    ) -> Object:
        """Change an object's properties, or set them as a whole: a new metageneration."""
        found = self.get(bucket, name, generation=generation, conditions=conditions)
        self._admit(bucket, name)
        properties = merged({} if whole else found.properties, changes)
        changed = replace(found, metageneration=found.metageneration + 1, updated=self.now(), properties=properties)
        known = self.buckets[bucket]
        if known.objects.get(name) is found:
            known.objects[name] = changed
        else:
            known.kept[name][known.kept[name].index(found)] = changed
        return changed

    def delete(self, bucket: str, name: str, *, generation: int | None = None, conditions: Conditions = ALWAYS) -> None:
        """Delete an object; in a versioned bucket it is kept, unless its generation is named."""
        found = self.get(bucket, name, generation=generation, conditions=conditions)
        self._admit(bucket, name)
        known = self.buckets[bucket]
        if known.objects.get(name) is not found:
            known.kept[name].remove(found)
        else:
            self._take(known, name, keep=generation is None)

    def move(
        self,
        bucket: str,
        source: str,
        target: str,
        *,
        conditions: Conditions = ALWAYS,
        source_conditions: Conditions = ALWAYS,
    ) -> Object:
        """Rename an object, in one step: a new generation there, and none here."""
        known = self.bucket(bucket)
        if known.refuses_move:
            text = "The bucket does not support moving objects."  # undocumented
            raise Refused("invalid" if known.refuses_move == 400 else "notImplemented", text, status=known.refuses_move)
        if source == target:
            raise Refused("invalid", "The source and destination object names must be different.")
        # Which of several refusals comes first is undocumented.
        found = self.get(bucket, source, conditions=source_conditions)
        self._check(conditions, self.find(bucket, target))
        self._admit(bucket, source, target)
        moved = self._write(bucket, target, found.content, found.properties, found.components)
        self._take(known, source, keep=True)  # in a versioned bucket: undocumented
        return moved

    def copy(
        self,
        source: tuple[str, str],
        target: tuple[str, str],
        changes: Properties | None = None,
        *,
        generation: int | None = None,
        conditions: Conditions = ALWAYS,
        source_conditions: Conditions = ALWAYS,
    ) -> Object:
        """Write an object as another is: a new generation."""
        found = self.get(*source, generation=generation, conditions=source_conditions)
        properties = merged(found.properties, changes or {})
        return self._put(*target, found.content, properties, conditions, found.components)

    def rewrite(
        self,
        source: tuple[str, str],
        target: tuple[str, str],
        changes: Properties | None = None,
        *,
        token: str = "",
        most: int | None = None,
        generation: int | None = None,
        conditions: Conditions = ALWAYS,
        source_conditions: Conditions = ALWAYS,
    ) -> tuple[str, Rewrite, Object | None]:
        """Copy so much of an object as one call does: a token for the next, what was done, and what came of it."""
        found = self.get(*source, generation=generation, conditions=source_conditions)
        self._check(conditions, self.find(*target))
        if not token:
            token = f"rewrite-{next(self._numbers)}"
            self.rewrites[token] = Rewrite(found, target)
        under_way = self.rewrites.get(token)
        if under_way is None or (under_way.source.generation, under_way.place) != (found.generation, target):
            raise Refused("invalid", "The rewrite token does not belong to this source and destination.")
        step = min(number for number in (self.rewritten, most, len(found.data)) if number is not None)
        under_way.written = min(under_way.written + step, len(found.data))
        if under_way.written < len(found.data):
            return token, under_way, None
        made = self.copy(source, target, changes, generation=generation, conditions=conditions)
        del self.rewrites[token]
        return "", under_way, made

    def compose(
        self,
        bucket: str,
        name: str,
        sources: Sequence[tuple[str, int | None, Conditions]],
        properties: Properties,
        conditions: Conditions = ALWAYS,
    ) -> Object:
        """Write an object as others are, one after the other; each by its name, its generation and what is wanted."""
        if not 1 <= len(sources) <= COMPOSED:
            raise Refused("invalid", f"The number of source components must be between 1 and {COMPOSED}.")
        found = [
            self.get(bucket, part, generation=generation, conditions=wanted) for part, generation, wanted in sources
        ]
        components = sum(part.components or 1 for part in found)
        data = b"".join(part.data for part in found)
        return self.put(bucket, name, data, properties, conditions=conditions, components=components)

    # Resumable uploads

    def start(self, upload: Upload) -> str:
        """Begin an upload; its conditions are looked at when it ends."""
        self.bucket(upload.bucket)
        _named(upload.name)
        identity = f"upload-{next(self._numbers)}"
        self.uploads[identity] = upload
        return identity

    def upload(self, identity: str) -> Upload:
        """An upload that was begun and not given up."""
        if identity not in self.uploads:
            raise Refused("notFound", "The upload session does not exist.")
        if self.uploads[identity].cancelled:
            raise Refused("invalid", "The upload session was cancelled.", status=499)
        return self.uploads[identity]

    def append(self, identity: str, data: bytes, begin: int, total: int | None, hashes: Properties) -> Upload:
        """Take in a chunk, or what of it is new; with the last byte the object is written."""
        upload = self.upload(identity)
        if upload.done is not None:
            return upload
        if total is not None and upload.total not in (None, total):
            raise Refused("invalid", "The total size differs from what was said before.")
        end = begin + len(data)
        if begin > len(upload.data) or (total is not None and end > total):
            raise Refused("invalid", "The chunk does not continue what was kept.")
        if end != total:
            if len(data) < QUANTUM:
                raise Refused("invalid", f"A chunk is of {QUANTUM} bytes or more, except for the last.")
            end -= end % QUANTUM
        if self.keeps is not None:
            end = min(end, len(upload.data) + self.keeps)
        upload.total = total if total is not None else upload.total
        upload.data += data[len(upload.data) - begin : max(end - begin, 0)]
        if len(upload.data) == upload.total:
            check_hashes(bytes(upload.data), {**upload.hashes, **hashes})
            upload.done = self.put(
                upload.bucket, upload.name, bytes(upload.data), upload.properties, conditions=upload.conditions
            )
        return upload

    def cancel(self, identity: str) -> None:
        self.upload(identity).cancelled = True

    # Looking

    def listing(
        self,
        bucket: str,
        *,
        prefix: str = "",
        delimiter: str = "",
        start: str = "",
        end: str = "",
        token: str = "",
        limit: int = 1000,
        versions: bool = False,
        trailing: bool = False,
    ) -> Page:
        """A page of a listing in the order of the names; a token is the last name, or prefix, that was told."""
        known = self.bucket(bucket)
        names = known.names
        if versions:
            names = sorted({*names, *(name for name, kept in known.kept.items() if kept)})
        objects: list[Object] = []
        prefixes: list[str] = []
        place = max(bisect_left(names, max(prefix, start)), _past(names, token[1:], token[:1]))
        token, limit = "", min(limit, self.page)
        while place < len(names) and (name := names[place]).startswith(prefix) and not (end and name >= end):
            if len(objects) + len(prefixes) >= limit:
                return Page(objects, prefixes, token)
            cut = name.find(delimiter, len(prefix)) if delimiter else -1
            run = name[: cut + len(delimiter)] if cut >= 0 else ""
            if run:
                prefixes.append(run)
            if not run or (trailing and run == name):
                objects += known.generations(name) if versions else [known.objects[name]]
            token = f"p{run}" if run else f"n{name}"
            place = _past(names, run or name, token[0])
        return Page(objects, prefixes, "")

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        """Names of all live objects that begin so."""
        names = self.buckets[bucket].names
        return list(takewhile(lambda name: name.startswith(prefix), names[bisect_left(names, prefix) :]))

    def read(self, bucket: str, name: str) -> bytes:
        """A live object's bytes."""
        return self.buckets[bucket].objects[name].data

    # How it is done

    def _check(self, conditions: Conditions, found: Object | None) -> None:
        if self.conditions:
            conditions.check(found)

    def _admit(self, bucket: str, *names: str) -> None:
        """Count a write of each name, or refuse it as one too many."""
        if self.rate is None:
            return
        now = self.now()
        for name in names:
            if now < self._wrote.get((bucket, name), float("-inf")) + 1 / self.rate:
                raise Refused(
                    "rateLimitExceeded",
                    f"The object {bucket}/{name} exceeded the rate limit for object mutation operations "
                    "(create, update, and delete). Please reduce your request rate. "
                    "See https://cloud.google.com/storage/docs/gcs429.",
                )
        self._wrote |= dict.fromkeys(((bucket, name) for name in names), now)

    def _put(
        self, bucket: str, name: str, content: Content, properties: Properties, conditions: Conditions, components: int
    ) -> Object:
        self._check(conditions, self.find(bucket, name))
        self._admit(bucket, name)
        return self._write(bucket, name, content, properties, components)

    def _write(self, bucket: str, name: str, content: Content, properties: Properties, components: int) -> Object:
        _named(name)
        known, now = self.bucket(bucket), self.now()
        # Microseconds, as they look; that they increase is more than is promised.
        self._generation = max(self._generation + 1, int(now * 1_000_000))
        if name in known.objects:
            self._take(known, name, keep=True)
        insort(known.names, name)
        known.objects[name] = Object(
            bucket, name, content, self._generation, now, now, properties=dict(properties), components=components
        )
        return known.objects[name]

    def _take(self, bucket: Bucket, name: str, *, keep: bool) -> None:
        del bucket.names[bisect_left(bucket.names, name)]
        taken = bucket.objects.pop(name)
        if keep and bucket.versioned:
            bucket.kept.setdefault(name, []).append(replace(taken, deleted=self.now()))


def merged(properties: Properties, changes: Properties) -> dict[str, Any]:
    """Properties with changes; null takes one away, and what is not the writer's to set is passed over."""
    changed = dict(properties)
    for name in WRITABLE:
        if name == "metadata" and isinstance(changes.get(name), dict):
            changed[name] = {**changed.get(name, {}), **changes[name]}
            changed[name] = {key: value for key, value in changed[name].items() if value is not None}
        elif name in changes:
            changed[name] = changes[name]
    return {name: value for name, value in changed.items() if value is not None}


def check_hashes(data: bytes, said: Properties) -> None:
    """Refuse data that are not what their sender says."""
    for name, of in (("crc32c", crc32c), ("md5Hash", md5)):
        if said.get(name) not in (None, of(data)):
            raise Refused("invalid", f'Provided {name} "{said[name]}" doesn\'t match calculated {name} "{of(data)}".')


def _past(names: list[str], last: str, kind: str) -> int:
    """The place after a name (`n`), or after all that begin so (`p`); the first without a kind."""
    if not kind:
        return 0
    return bisect_right(names, last, key=lambda name: name[: len(last)] if kind == "p" else name)


def _named(name: str) -> None:
    """Refuse what is no name, https://cloud.google.com/storage/docs/objects#naming."""
    if not name:
        raise Refused("required", "Required parameter: name", status=400)
    if name in (".", "..") or "\r" in name or "\n" in name or len(name.encode()) > LONGEST:
        raise Refused("invalid", f"Invalid object name: {name!r}")
