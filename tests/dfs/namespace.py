"""A hierarchical namespace in memory: file systems, directories, files, ETags, conditions; no HTTP.

Every operation is applied whole or refused whole, and costs what its path and its answer cost, whatever else is stored.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice

from .errors import Refused
from .leases import Lease, admit

DEEPEST = 60  # segments; the 61st is refused (recorded)


@dataclass(slots=True)
class Node:
    """What a file and a directory have in common; a rename keeps all of it."""

    etag: str
    created: float
    modified: float
    metadata: dict[str, str] = field(default_factory=dict)
    lease: Lease | None = None
    owner: str = "$superuser"
    group: str = "$superuser"
    acl: str = "user::rw-,group::r--,other::---"
    expires: float | None = None

    @property
    def permissions(self) -> str:
        entries = dict(entry.rsplit(":", 1) for entry in self.acl.split(","))
        return "".join(entries[f"{who}:"] for who in ("user", "group", "other"))


@dataclass(slots=True)
class File(Node):
    """A file; `pending` holds what was appended and not flushed, by position."""

    data: bytes = b""
    content_type: str = "application/octet-stream"
    pending: dict[int, bytes] = field(default_factory=dict)
    by_blob: bool = False


@dataclass(slots=True)
class Directory(Node):
    """A directory; `names` are its children's, sorted, so that a page of a listing is found without sorting."""

    children: dict[str, Node] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)

    @property
    def defaults(self) -> list[str]:
        """Entries of access control that what is made here begins with (documented; never recorded)."""
        return [entry[8:] for entry in self.acl.split(",") if entry.startswith("default:")]

    def put(self, name: str, node: Node) -> None:
        if name not in self.children:
            insort(self.names, name)
        self.children[name] = node

    def take(self, name: str) -> Node:
        del self.names[bisect_left(self.names, name)]
        return self.children.pop(name)


@dataclass(slots=True)
class Filesystem:
    """A file system, or container; its ETag is not its root directory's."""

    etag: str
    modified: float
    root: Directory
    metadata: dict[str, str] = field(default_factory=dict)
    # Blocks that are not committed, by path; they belong to the name, not to a file.
    blocks: dict[str, dict[str, bytes]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a request wants of one end: its ETag, its time of change, and its lease."""

    match: str | None = None
    none_match: str | None = None
    modified_since: float | None = None
    unmodified_since: float | None = None
    lease: str | None = None

    def check(self, node: Node | None, code: str = "ConditionNotMet", exists: str | None = None) -> None:
        """Hold the conditions against what is there.

        Args:
            code: What is raised where they are not met.
            exists: What is raised where `If-None-Match: *` meets something.
        """
        if self.none_match == "*" and node is not None:
            raise Refused(exists or code)
        etag = None if node is None else node.etag
        # Conditions take an ETag with quotes and without (recorded).
        met = (
            (self.match is None or (etag is not None and self.match.strip('"') in ("*", etag)))
            and (self.none_match is None or self.none_match.strip('"') != etag)
            # Times have no fractions on the wire; "modified since" is strictly later (recorded).
            and (self.modified_since is None or (node is not None and int(node.modified) > self.modified_since))
            and (self.unmodified_since is None or (node is not None and int(node.modified) <= self.unmodified_since))
        )
        if not met:
            raise Refused(code)


ALWAYS = Conditions()
Place = tuple[str, str]
"""A file system's name and a path in it, without a leading slash."""


@dataclass(frozen=True, slots=True)
class Deleted:
    """What a soft delete keeps."""

    place: Place
    node: Node
    at: float


class Namespace:
    """All file systems of an account.

    Args:
        now: The clock, in seconds since 1970; all times and leases go by it.
        soft_delete: Keep what is deleted, so that it can be undeleted.
        page: Paths that one request of a recursive delete or a directory rename looks at; more take a continuation.

    Attributes:
        conditions_of_goal: Conditions of a rename onto a directory are about what it would become in that directory.
        parent_first: A rename is told of a missing parent of its goal before it is told of a missing source.
        busy: What a service over the storage has in use: it is neither deleted nor renamed, nor is what is above it.
    """

    def __init__(
        self, now: Callable[[], float] = time.time, *, soft_delete: bool = False, page: int | None = None
    ) -> None:
        self.now = now
        self.soft_delete = soft_delete
        self.page = page
        self.filesystems: dict[str, Filesystem] = {}
        self.deleted: dict[str, Deleted] = {}
        self.busy: set[Place] = set()
        self.conditions_of_goal = False
        self.parent_first = False
        self._etags = (f"0x8DC{number:012X}" for number in count(1))
        self._deletions = (str(133_000_000_000_000_000 + number) for number in count(1))

    # File systems

    def create_filesystem(self, name: str, metadata: dict[str, str] | None = None) -> Filesystem:
        if name in self.filesystems:
            raise Refused("FilesystemAlreadyExists")
        etag, root = next(self._etags), self._directory(None)
        self.filesystems[name] = Filesystem(etag, self.now(), root, metadata or {})
        return self.filesystems[name]

    def delete_filesystem(self, name: str) -> None:
        self.filesystem(name)
        del self.filesystems[name]

    def filesystem(self, name: str) -> Filesystem:
        try:
            return self.filesystems[name]
        except KeyError:
            raise Refused("FilesystemNotFound") from None

    # Looking

    def get(self, filesystem: str, path: str = "") -> Node | None:
        """What is at a path; an element of the path that is a file has nothing below it."""
        node: Node | None = self.filesystem(filesystem).root
        for name in segments(path):
            node = node.children.get(name) if isinstance(node, Directory) else None
        return node

    def find(self, filesystem: str, path: str = "", code: str = "PathNotFound") -> Node:
        node = self.get(filesystem, path)
        if node is None:
            raise Refused(code)
        return node

    def file(self, filesystem: str, path: str) -> File:
        node = self.find(filesystem, path)
        if not isinstance(node, File):
            raise Refused("PathConflict")  # never recorded
        return node

    def read(self, filesystem: str, path: str) -> bytes:
        """The committed bytes of a file."""
        return self.file(filesystem, path).data

    def paths(self, filesystem: str, directory: str = "") -> list[str]:
        """Every path below a directory, in the order of a listing."""
        return [path for path, _ in self.walk(filesystem, directory)]

    def walk(
        self, filesystem: str, directory: str = "", *, recursive: bool = True, after: str = ""
    ) -> Iterator[tuple[str, Node]]:
        """Depth first, parents before their children, siblings by name (recorded); from behind `after` on."""
        node = self.find(filesystem, directory)
        if not isinstance(node, Directory):
            raise Refused("PathNotFound")  # never recorded: the directory of a listing is a file
        skip = segments(after)[len(segments(directory)) :]
        return _walk(node, "/".join(segments(directory)), recursive, skip)

    def listing(
        self, filesystem: str, directory: str, *, recursive: bool, limit: int, token: str, prefix: str = ""
    ) -> tuple[list[tuple[str, Node]], str]:
        """A page, and the token of the next one, which is empty at the end."""
        below = self.walk(filesystem, directory, recursive=recursive, after=_untoken(token))
        walk = (entry for entry in below if entry[0].startswith(prefix))
        found = list(islice(walk, limit))
        more = len(found) == limit and next(walk, None) is not None
        return found, _token(found[-1][0]) if more else ""

    def more(self, filesystem: str, path: str, token: str) -> str:
        """The token of the next request where one request is not enough for a tree; empty where it is."""
        if self.page is None or not isinstance(self.get(filesystem, path), Directory):
            return ""
        return self.listing(filesystem, path, recursive=True, limit=self.page, token=token)[1]

    # Changing

    def create(
        self,
        filesystem: str,
        path: str,
        data: bytes = b"",
        *,
        directory: bool = False,
        by_blob: bool = False,
        metadata: dict[str, str] | None = None,
        conditions: Conditions = ALWAYS,
    ) -> Node:
        """Make a file or a directory and its missing parents; a file over a file replaces it."""
        node = self.get(filesystem, path)
        try:
            conditions.check(node, exists="PathAlreadyExists")
        except Refused as refused:
            if refused.code == "PathAlreadyExists":
                refused.extra["x-ms-existing-resource-type"] = kind(node)
            raise
        if len(segments(path)) > DEEPEST:
            raise Refused("PathIsTooDeep")
        if node is not None:
            admit(node.lease, conditions.lease, self.now())
            if isinstance(node, Directory) != directory:
                raise Refused("PathConflict")  # never recorded; reported with this text
            if directory:
                # never recorded: it stays, with its children, and counts as changed
                self._touch(node)
                node.metadata = metadata or {}
                return node
        elif conditions.lease is not None:
            raise Refused("LeaseNotPresent")  # never recorded
        parent, name = self._parent(filesystem, path, make=True)
        new: Node = self._directory(parent) if directory else self._file(parent, data, by_blob)
        new.metadata = metadata or {}
        # never recorded: a leased file replaced with its id stays leased, as with a rename onto it (recorded)
        new.lease = node.lease if node is not None else None
        parent.put(name, new)
        return new

    def append(self, filesystem: str, path: str, position: int, data: bytes, conditions: Conditions = ALWAYS) -> File:
        """Keep bytes until a flush; nothing is checked before it, and nothing changes that can be seen (recorded)."""
        file = self.file(filesystem, path)
        admit(file.lease, conditions.lease, self.now())
        if not data:
            raise Refused("InvalidHeaderValue", header=("Content-Length", "0"))
        file.pending[position] = data  # never recorded: a second append at one position replaces the first
        return file

    def flush(
        self, filesystem: str, path: str, position: int, *, retain: bool = False, conditions: Conditions = ALWAYS
    ) -> File:
        """Commit what was appended, which must reach from the file's end to `position` without a gap."""
        file = self.file(filesystem, path)
        conditions.check(file)
        admit(file.lease, conditions.lease, self.now())
        if file.by_blob:
            raise Refused("InvalidFlushOperation")  # never recorded; documented
        data, rest = [file.data], dict(sorted(file.pending.items()))
        end = len(file.data)
        while end < position and end in rest:
            data.append(rest.pop(end))
            end += len(data[-1])
        # never recorded: what was left over from an append below the end makes a flush not contiguous
        if end != position or (rest and not retain):
            raise Refused("InvalidFlushPosition")
        file.data, file.pending = b"".join(data), rest
        self._touch(file)
        return file

    def rename(
        self,
        source: Place,
        target: Place,
        *,
        legacy: bool = False,
        conditions: Conditions = ALWAYS,
        source_conditions: Conditions = ALWAYS,
    ) -> Node:
        """Move a file or a directory, with its ETag, times and lease; what is in the way is replaced where it may be.

        Args:
            legacy: Onto an existing directory: replace it, not move into it, which is the default (reported).
        """
        if self.parent_first:
            self._parent(*target, make=False)
        node = self.find(*source, code="SourcePathNotFound")
        source_conditions.check(node, "SourceConditionNotMet")
        admit(node.lease, source_conditions.lease, self.now())
        there = self.get(*target)
        # never recorded: whether If-None-Match: * is about what is named, or about where the source would come to be
        into = self.conditions_of_goal and isinstance(there, Directory) and not legacy and there is not node
        named = self.get(target[0], f"{target[1]}/{segments(source[1])[-1]}") if into else there
        conditions.check(named, exists="PathAlreadyExists")  # never recorded: that it is refused so
        if there is not None and conditions.lease is not None:
            admit(there.lease, conditions.lease, self.now())
        elif conditions.lease is not None:
            raise Refused("LeaseNotPresent")  # never recorded
        if isinstance(there, Directory) and not legacy and there is not node:
            target = (target[0], f"{target[1]}/{segments(source[1])[-1]}")
            there = self.get(*target)
        if isinstance(node, Directory):
            if source[0] == target[0] and segments(target[1])[: len(segments(source[1]))] == segments(source[1]):
                raise Refused("InvalidRenameSourcePath")  # never recorded; documented
        elif there is node:
            return node  # never recorded: a file onto itself
        if there is not None and isinstance(there, Directory) != isinstance(node, Directory):
            raise Refused("InvalidSourceOrDestinationResourceType")  # never recorded; documented
        if isinstance(there, Directory) and there.children:
            raise Refused("DirectoryNotEmpty")  # never recorded; reported
        parent, name = self._parent(*target, make=False)
        self._remove(*source)
        if there is not None and conditions.lease is not None:
            node.lease = there.lease
        # never recorded: a destination's lease that was not named is broken (documented), so it goes with what it held
        parent.put(name, node)
        return node

    def delete(
        self, filesystem: str, path: str, *, recursive: bool = False, conditions: Conditions = ALWAYS
    ) -> str | None:
        """Delete a file or a tree at once; the deletion's id where it is kept."""
        node = self.find(filesystem, path)
        conditions.check(node)
        admit(node.lease, conditions.lease, self.now())
        if isinstance(node, Directory) and node.children and not recursive:
            raise Refused("DirectoryNotEmpty")
        self._remove(filesystem, path)
        if not self.soft_delete:
            return None
        deletion = next(self._deletions)
        self.deleted[deletion] = Deleted((filesystem, path), node, self.now())
        return deletion

    def undelete(self, filesystem: str, path: str, deletion: str) -> Node:
        kept = self.deleted.get(deletion)
        if kept is None or kept.place != (filesystem, path):
            raise Refused("PathNotFound")  # never recorded
        if self.get(filesystem, path) is not None:
            raise Refused("PathAlreadyExists")  # never recorded
        parent, name = self._parent(filesystem, path, make=True)
        parent.put(name, self.deleted.pop(deletion).node)
        return kept.node

    def set_metadata(
        self, filesystem: str, path: str, metadata: dict[str, str], conditions: Conditions = ALWAYS
    ) -> Node:
        node = self.find(filesystem, path)
        conditions.check(node)
        admit(node.lease, conditions.lease, self.now())
        node.metadata = metadata
        self._touch(node)
        return node

    def put_block(self, filesystem: str, path: str, block: str, data: bytes) -> None:
        self._of_blob(filesystem, path)
        self.filesystem(filesystem).blocks.setdefault(path, {})[block] = data

    def put_block_list(
        self,
        filesystem: str,
        path: str,
        blocks: Sequence[str],
        *,
        metadata: dict[str, str] | None = None,
        conditions: Conditions = ALWAYS,
    ) -> Node:
        """Commit blocks as a file; blocks that are not in the list are discarded. Committed blocks are not kept apart."""
        self._of_blob(filesystem, path)
        kept = self.filesystem(filesystem).blocks
        try:
            data = b"".join(kept.get(path, {})[block] for block in blocks)
        except KeyError:
            raise Refused("InvalidBlockList") from None
        node = self.create(filesystem, path, data, by_blob=True, metadata=metadata, conditions=conditions)
        kept.pop(path, None)
        return node

    def _of_blob(self, filesystem: str, path: str) -> None:
        node = self.get(filesystem, path)
        if node is not None and not (isinstance(node, File) and node.by_blob):
            raise Refused("BlobOperationNotSupported")

    def _file(self, parent: Directory, data: bytes, by_blob: bool) -> File:
        now = self.now()
        file = File(next(self._etags), now, now, data=data, by_blob=by_blob)
        if defaults := parent.defaults:
            file.acl = ",".join(defaults)
        return file

    def _directory(self, parent: Directory | None) -> Directory:
        now = self.now()
        made = Directory(next(self._etags), now, now, acl="user::rwx,group::r-x,other::---")
        if parent is not None and (defaults := parent.defaults):
            made.acl = ",".join([*defaults, *(f"default:{entry}" for entry in defaults)])
        return made

    def _touch(self, node: Node) -> None:
        node.etag, node.modified = next(self._etags), self.now()

    def _parent(self, filesystem: str, path: str, *, make: bool) -> tuple[Directory, str]:
        """A path's parent, made if it may be, and its name; the parent's ETag stays (recorded)."""
        node: Node = self.filesystem(filesystem).root
        *above, name = segments(path) or [""]
        if not name:
            raise Refused("PathConflict")  # never recorded: the root made, replaced or removed
        for part in above:
            assert isinstance(node, Directory)
            if part not in node.children:
                if not make:
                    raise Refused("RenameDestinationParentPathNotFound")
                node.put(part, self._directory(node))
            node = node.children[part]
            if isinstance(node, File):
                raise Refused("PathConflict" if make else "InvalidDestinationPath")  # never recorded; documented
        assert isinstance(node, Directory)
        return node, name

    def _remove(self, filesystem: str, path: str) -> None:
        gone = segments(path)
        if any(where == filesystem and segments(used)[: len(gone)] == gone for where, used in self.busy):
            raise Refused("LeaseAlreadyPresent")  # never recorded; that a delete may fail is documented
        parent, name = self._parent(filesystem, path, make=False)
        parent.take(name)


def segments(path: str) -> list[str]:
    """A path's names; leading, trailing and doubled slashes do not count."""
    return [name for name in path.split("/") if name]


def kind(node: Node | None) -> str:
    return "directory" if isinstance(node, Directory) else "file"


def md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def _walk(directory: Directory, base: str, recursive: bool, skip: Sequence[str]) -> Iterator[tuple[str, Node]]:
    start = 0
    if skip:
        start = bisect_left(directory.names, skip[0])
        node = directory.children.get(skip[0])
        if node is not None:
            start += 1
            if recursive and isinstance(node, Directory):
                yield from _walk(node, f"{base}/{skip[0]}" if base else skip[0], recursive, skip[1:])
    for index in range(start, len(directory.names)):
        name = directory.names[index]
        path, node = f"{base}/{name}" if base else name, directory.children[name]
        yield path, node
        if recursive and isinstance(node, Directory):
            yield from _walk(node, path, recursive, ())


def _token(path: str) -> str:
    # Real tokens are base64, whose "+", "/" and "=" have to be quoted in a query.
    return base64.b64encode(b"\xfb\xef\xff" + path.encode()).decode()


def _untoken(token: str) -> str:
    try:
        return base64.b64decode(token, validate=True)[3:].decode()
    except (binascii.Error, UnicodeDecodeError):
        raise Refused("InvalidQueryParameterValue") from None  # never recorded
