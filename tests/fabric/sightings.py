"""What the replicator saw and did, poll by poll, and what in it no publisher should have let it see."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

INDEXED = re.compile(r"(?!0{20})[0-9]{20}\.parquet")

Why = Literal["gone", "replaced"]
Kind = Literal["zero bytes", "no metadata", "changed", "reused", "name", "gap", "rejected", "dropped"]
"""What was found.

- `zero bytes`: a data file of zero bytes under a final name.
- `no metadata`: a data file while there was no `_metadata.json`.
- `changed`: a data file that was seen with another ETag before, and was not rejected then.
- `reused`: a data file under a name that had been processed: with another ETag, or again after it was gone.
- `name`: a data file whose name the service does not look for.
- `gap`: an index that is missing at the last poll, while a later one is there.
- `rejected`: a file that is not valid.
- `dropped`: a table that was dropped.
"""


@dataclass(frozen=True, slots=True)
class SeenFile:
    name: str
    size: int
    etag: str


@dataclass(frozen=True, slots=True)
class Seen:
    """A table's folder as one poll found it, with every file right in it.

    Args:
        folder: The folder's ETag.
        metadata: Whether there was a `_metadata.json`.
        sequential: Whether names are indexes.
        awaited: The name that is missing while a later one is there.
    """

    poll: int
    table: str
    folder: str
    files: tuple[SeenFile, ...]
    metadata: bool
    sequential: bool
    awaited: str = ""


@dataclass(frozen=True, slots=True)
class Applied:
    """A data file that was processed."""

    poll: int
    table: str
    folder: str
    name: str
    etag: str


@dataclass(frozen=True, slots=True)
class Failure:
    """A file that was rejected."""

    poll: int
    table: str
    folder: str
    name: str
    etag: str
    reason: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """A table that was dropped, since its folder was gone, or another one had its name."""

    poll: int
    table: str
    folder: str
    why: Why


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that a publisher did wrong; `poll` is the first one that saw it."""

    kind: Kind
    poll: int
    table: str
    name: str = ""
    more: str = ""


@dataclass(slots=True)
class Record:
    """Everything that the replicator ever saw and did, in order."""

    seen: list[Seen] = field(default_factory=list)
    applied: list[Applied] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    drops: list[Dropped] = field(default_factory=list)

    def fail(self, failure: Failure) -> None:
        """Note a failure; the same one at later polls is no news."""
        if not any(replace(failure, poll=known.poll) == known for known in self.failures):
            self.failures.append(failure)

    def findings(self, last_poll: int, dropped: Collection[str]) -> list[Finding]:
        """What is wrong, in the order of the polls, each once."""
        found = [*self._of_files(), *self._gaps(last_poll)]
        found += [Finding("rejected", one.poll, one.table, one.name, one.reason) for one in self.failures]
        drops = [one for one in self.drops if one.table not in dropped]
        found += [Finding("dropped", one.poll, one.table, more=one.why) for one in drops]
        return sorted(found, key=lambda finding: finding.poll)

    def _gaps(self, last_poll: int) -> Iterator[Finding]:
        for seen in self.seen:
            if seen.poll == last_poll and seen.awaited:
                yield Finding("gap", seen.poll, seen.table, seen.awaited)

    def _of_files(self) -> Iterator[Finding]:
        told: set[tuple[object, ...]] = set()
        for folder in dict.fromkeys((seen.table, seen.folder) for seen in self.seen):
            for finding, etag in self._of_folder([seen for seen in self.seen if (seen.table, seen.folder) == folder]):
                key = (folder, finding.kind, finding.name, etag)
                if key not in told:
                    told.add(key)
                    yield finding

    def _of_folder(self, sights: Sequence[Seen]) -> Iterator[tuple[Finding, str]]:
        """The findings in what was seen of one folder, each as often as it was seen."""
        table, folder = sights[0].table, sights[0].folder
        applied = {one.name: one for one in self.applied if (one.table, one.folder) == (table, folder)}
        failed = {one.etag for one in self.failures if (one.table, one.folder) == (table, folder)}
        before: dict[str, SeenFile] = {}
        absent: set[str] = set()
        for seen in sights:
            files = [file for file in seen.files if not file.name.startswith("_")]
            if files and not seen.metadata:
                yield Finding("no metadata", seen.poll, table), ""
            for file in files:
                if file.size == 0:
                    yield Finding("zero bytes", seen.poll, table, file.name), ""
                if not (INDEXED.fullmatch(file.name) if seen.sequential else file.name.endswith(".parquet")):
                    yield Finding("name", seen.poll, table, file.name), ""
                last, done = before.get(file.name), applied.get(file.name)
                if done is not None and done.poll < seen.poll:
                    if done.etag != file.etag or file.name in absent:
                        yield Finding("reused", seen.poll, table, file.name), file.etag
                elif last is not None and last.size and last.etag != file.etag and last.etag not in failed:
                    yield Finding("changed", seen.poll, table, file.name), file.etag
                before[file.name] = file
            absent |= set(before) - {file.name for file in files}
