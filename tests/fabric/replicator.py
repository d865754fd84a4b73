"""The replicator: one poll looks at every table's folder, takes what is new, tidies up, and reports."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import gmtime, strftime

from dfs import DfsServer, Directory, File, Namespace

from .rows import Content, Metadata, Rejected, Row
from .sightings import INDEXED, Applied, Dropped, Failure, Finding, Record, Seen, SeenFile, Why

METADATA = "_metadata.json"
PROCESSED, READY = "_ProcessedFiles", "_FilesReadyToDelete"
SCHEMA = ".schema"


@dataclass(slots=True)
class Table:
    """A replicated table.

    Attributes:
        folder: The ETag of the folder that it is read from.
        error: Why it has failed; empty while it replicates.
        done: The ETags of the files that were processed, by name, in order.
        moved: The poll that moved a processed file away, by its name.
    """

    path: str
    folder: str
    content: Content = field(default_factory=Content)
    keys: tuple[str, ...] = ()
    error: str = ""
    done: dict[str, str] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict)
    bytes_read: int = 0
    synced: float | None = None
    missing: int = 0
    busy_until: int = 0

    @property
    def rows(self) -> list[Row]:
        return self.content.rows

    @property
    def status(self) -> str:
        return "Failed" if self.error else "Replicating"

    @property
    def next(self) -> str:
        """The name that comes next in the sequence."""
        return f"{len(self.done) + 1:020}.parquet"


class Replicator:
    """Mirrors the landing zone of one mirrored database.

    It looks and changes only within `poll`, which is one step: call it, as this class, while no request is under way,
    or let the server do so, by `DfsServer.call`, `before_requests` or `beside`. Times are counted in polls.

    Args:
        drop_after: Polls that miss a table's folder and keep the table; the next one drops it.
        ready_after: Polls after which a processed file goes on from `_ProcessedFiles` to `_FilesReadyToDelete`.
        removed_after: Polls after which it is removed; seven days, as the service counts.
        last_stays: Whether the file that was processed last stays where it is until there is a later one.
        busy: Polls for which a table's folder is in use, beginning with one that processed a file.

    Attributes:
        tables: The replicated tables, such as `orders` or `dbo.orders`.
        record: All that was seen and done.
    """

    def __init__(
        self,
        namespace: Namespace,
        workspace: str,
        item: str,
        *,
        drop_after: int = 0,
        ready_after: int = 2,
        removed_after: int = 4,
        last_stays: bool = True,
        busy: int = 0,
    ) -> None:
        self.namespace = namespace
        self.workspace = workspace
        self.files = f"{item}/Files"
        self.drop_after = drop_after
        self.ready_after = ready_after
        self.removed_after = removed_after
        self.last_stays = last_stays
        self.busy = busy
        self.polls = 0
        self.tables: dict[str, Table] = {}
        self.record = Record()
        self._held: set[tuple[str, str]] = set()
        self._make(f"{self.files}/LandingZone")

    def violations(self, dropped: Collection[str] = ()) -> list[Finding]:
        """What a publisher did wrong; `dropped` are the tables that it meant to drop."""
        return self.record.findings(self.polls, dropped)

    # When it polls

    def before_requests(self, *, every: int, first: int = 0) -> Callable[[int], None]:
        """For `DfsServer.before`: poll before the request of that number, from 0, and each so many requests later."""

        def poll(number: int) -> None:
            if number >= first and (number - first) % every == 0:
                self.poll()

        return poll

    @contextmanager
    def beside(self, server: DfsServer, seconds: float) -> Iterator[None]:
        """Poll at intervals, between the server's requests."""
        ended = threading.Event()

        def run() -> None:
            while not ended.wait(seconds):
                server.call(self.poll)

        with ThreadPoolExecutor(1) as thread:
            running = thread.submit(run)
            try:
                yield
            finally:
                ended.set()
        running.result()

    # One poll

    def poll(self) -> None:
        """Look at all tables once."""
        self.polls += 1
        folders = dict(self._folders())
        for name, (path, folder) in folders.items():
            self._look(name, path, folder)
        for name, table in list(self.tables.items()):
            if name not in folders:
                table.missing += 1
                if table.missing > self.drop_after:
                    self._drop(name, "gone")
        self.namespace.busy -= self._held
        self._held = {(self.workspace, table.path) for table in self.tables.values() if self.polls < table.busy_until}
        self.namespace.busy |= self._held
        self._report()

    def _folders(self) -> Iterator[tuple[str, tuple[str, Directory]]]:
        """The tables' folders; that each is a table, whatever is in it, is assumed."""
        for name, path, directory in self._directories(f"{self.files}/LandingZone"):
            schema = name.removesuffix(SCHEMA)
            if schema == name:
                yield name, (path, directory)
            else:
                for table, below, folder in self._directories(path):
                    yield f"{schema}.{table}", (below, folder)

    def _directories(self, path: str) -> Iterator[tuple[str, str, Directory]]:
        above = self.namespace.get(self.workspace, path)
        assert isinstance(above, Directory), f"{path} is no directory"
        for name, node in above.children.items():
            if isinstance(node, Directory) and not name.startswith("_"):
                yield name, f"{path}/{name}", node

    def _look(self, name: str, path: str, folder: Directory) -> None:
        """Take what is new in a table's folder."""
        if name in self.tables and self.tables[name].folder != folder.etag:
            self._drop(name, "replaced")  # assumed: the same poll begins anew
        table = self.tables.setdefault(name, Table(path, folder.etag))
        table.missing, table.error, awaited = 0, "", ""
        files = {name: node for name, node in folder.children.items() if isinstance(node, File)}
        seen = tuple(SeenFile(name, len(file.data), file.etag) for name, file in files.items())
        metadata = Metadata()
        try:
            metadata = self._metadata(table, files.get(METADATA))
        except Rejected as rejected:
            self._fail(name, METADATA, files.get(METADATA), str(rejected))
        else:
            awaited = self._take(name, table, metadata, files)
        there = METADATA in files
        self.record.seen.append(Seen(self.polls, name, folder.etag, seen, there, metadata.sequential, awaited))
        self._tidy(table)

    def _metadata(self, table: Table, file: File | None) -> Metadata:
        metadata = Metadata() if file is None else Metadata.parse(file.data)
        if table.keys and metadata.keys != table.keys:
            raise Rejected("keyColumns has changed")  # assumed: so, too, where the file is gone
        table.keys = metadata.keys
        return metadata

    def _take(self, name: str, table: Table, metadata: Metadata, files: dict[str, File]) -> str:
        """Apply the data files that are due; the name that is missing while a later one is there."""
        if metadata.sequential:
            while (due := table.next) in files and self._apply(name, table, metadata, due, files[due]):
                pass
            later = any(INDEXED.fullmatch(other) and other > due for other in files)
            return due if later and due not in files else ""
        new = [other for other in files if not other.startswith("_") and other.endswith(".parquet")]
        # Equal times, which are whole seconds, have no order: theirs is the one that nobody expects.
        new.sort(reverse=True)
        for due in sorted(new, key=lambda other: int(files[other].modified)):
            if due not in table.done:
                self._apply(name, table, metadata, due, files[due])  # assumed: the others do not wait for a bad one
        return ""

    def _apply(self, name: str, table: Table, metadata: Metadata, due: str, file: File) -> bool:
        try:
            content = table.content.after(file.data, metadata)
        except Rejected as rejected:
            self._fail(name, due, file, str(rejected))
            return False
        table.content = content
        table.done[due] = file.etag
        table.bytes_read += len(file.data)
        table.synced = self.namespace.now()
        table.busy_until = self.polls + self.busy
        self.record.applied.append(Applied(self.polls, name, table.folder, due, file.etag))
        return True

    def _fail(self, name: str, file_name: str, file: File | None, reason: str) -> None:
        table = self.tables[name]
        table.error = f"{file_name}: {reason}"
        etag = "" if file is None else file.etag
        self.record.fail(Failure(self.polls, name, table.folder, file_name, etag, reason))

    def _drop(self, name: str, why: Why) -> None:
        table = self.tables.pop(name)
        self.record.drops.append(Dropped(self.polls, name, table.folder, why))

    def _tidy(self, table: Table) -> None:
        """Move processed files on; from the one folder to the other is assumed, the pages name both."""
        last = next(reversed(table.done), None)
        for name, etag in table.done.items():
            here = self.namespace.get(self.workspace, f"{table.path}/{name}")
            kept = self.last_stays and name == last
            if here is not None and here.etag == etag and name not in table.moved and not kept:
                self._move(table.path, f"{table.path}/{PROCESSED}", name)
                table.moved[name] = self.polls
        for name, poll in table.moved.items():
            age = self.polls - poll
            if age >= self.ready_after:
                self._move(f"{table.path}/{PROCESSED}", f"{table.path}/{READY}", name)
            ready = f"{table.path}/{READY}/{name}"
            if age >= self.removed_after and self.namespace.get(self.workspace, ready) is not None:
                self.namespace.delete(self.workspace, ready)

    def _move(self, source: str, target: str, name: str) -> None:
        """Move a file, where it still is."""
        if self.namespace.get(self.workspace, f"{source}/{name}") is not None:
            self._make(target)
            self.namespace.rename((self.workspace, f"{source}/{name}"), (self.workspace, f"{target}/{name}"))

    def _make(self, path: str) -> None:
        if self.namespace.get(self.workspace, path) is None:
            self.namespace.create(self.workspace, path, directory=True)

    def _report(self) -> None:
        """Write both files of `Files/Monitoring`.

        The place, the outer list and the names of schema and table are those that Microsoft's toolbox reads; the rest
        is as the REST interface answers, and `lastSyncTimeUtc` is assumed in its place.
        """
        tables = []
        for name, table in sorted(self.tables.items()):
            above = table.path.split("/")[-2]
            schema = above.removesuffix(SCHEMA) if above.endswith(SCHEMA) else ""
            synced = table.synced and strftime("%Y-%m-%dT%H:%M:%SZ", gmtime(table.synced))
            metrics = {
                "processedBytes": table.bytes_read,
                "processedRows": table.content.read,
                "lastSyncTimeUtc": synced,
            }
            entry = {
                "sourceSchemaName": schema,
                "sourceTableName": name.removeprefix(f"{schema}."),
                "status": table.status,
                "metrics": metrics,
            }
            tables.append(entry | ({"error": {"message": table.error}} if table.error else {}))
        self._write("tables.json", {"tables": tables})
        self._write("replicator.json", {"status": "Running"})

    def _write(self, name: str, told: object) -> None:
        self.namespace.create(self.workspace, f"{self.files}/Monitoring/{name}", json.dumps(told).encode())
