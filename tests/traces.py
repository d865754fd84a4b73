"""What the kernel saw of a process: the log of its file-system calls, read from the output of `strace -f -y -xx`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator

from disk import ROOT, Allocate, Attribute, Log, Names, Sync, Tree, Write

CALLS = (
    "open,openat,mkdir,mkdirat,rmdir,unlink,unlinkat,rename,renameat,renameat2,link,linkat,write,pwrite64,fallocate,"
    "fsync,fdatasync,syncfs,fchmod,fchown,fsetxattr,readlink,readlinkat"
)
"""What to trace: all that changes a file system, and the call that carries marks."""
MARK = "/mark/"
"""A link of that name, which is nowhere, is read where a process says that it promised something."""

_CALL = re.compile(r"(\d+) +(?:<\.\.\. (\w+) resumed>|(\w+)\()(.*)")
_RESULT = re.compile(r"(.*)\) += (-?\d+)")
_ARGUMENT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"|(-?\w+)<((?:[^>\\]|\\x[0-9a-f]{2})*)>|([^, ][^,]*)')


def read(lines: Iterable[str], root: str, base: Tree) -> Log:
    """The log of what happened below a directory."""
    log, offsets = Log(base, len(base.names)), dict[int, int]()
    for call, text, result in _calls(lines):
        arguments = [_Argument(*match) for match in _ARGUMENT.findall(text)]
        if call.startswith("readlink"):
            path = next(argument.text for argument in arguments if argument.is_string)
            if path.startswith(MARK):
                log.mark(path.removeprefix(MARK))
        elif result >= 0:
            _Call(log, root, offsets, call, arguments, result).apply()
    return log


def describe(log: Log) -> list[str]:
    """Every operation by path, but for marks and attributes, to be compared with another log of the same."""
    now, found = log.base.copy(), list[str]()
    paths = {ROOT: ""} | {node: path for path, node in now.walk(ROOT)}
    for operation in log.operations:
        if isinstance(operation, Names):
            places = [f"{paths[directory]}/{name}" for directory, name, _ in operation.changes]
            found.append(f"{operation.call} {' '.join(places)}")
        elif isinstance(operation, Write):
            found.append(f"write {paths[operation.node]} {operation.offset} {operation.data!r}")
        elif isinstance(operation, Sync):
            found.append(f"{operation.call} {'' if operation.node is None else paths[operation.node]}")
        elif isinstance(operation, Allocate):
            found.append(f"allocate {paths[operation.node]} {operation.size}")
        now.apply(operation)
        if isinstance(operation, Names):
            paths |= {node: f"/{path}" for path, node in now.walk(ROOT)}
    return found


def _calls(lines: Iterable[str]) -> Iterator[tuple[str, str, int]]:
    """Calls in order; a write counts from its start, and all else from its end: what a sync covers was done before it."""
    started: dict[str, str] = {}
    for line in lines:
        if (match := _CALL.match(line)) is None:
            continue
        process, resumed, call, rest = match.groups()
        if rest.endswith("<unfinished ...>"):
            started[process] = rest.removesuffix("<unfinished ...>")
            if call and "write" in call:
                yield call, started[process], 0
            continue
        text = started.pop(process, "") + rest if resumed else rest
        if resumed and "write" in resumed:
            continue
        if (done := _RESULT.match(text)) is not None:
            yield resumed or call, done[1], int(done[2])


class _Argument:
    """A string, a descriptor with the path that it has now, or anything else."""

    def __init__(self, string: str, fd: str, path: str, other: str) -> None:
        self.is_string = not (fd or path or other)
        self.fd = int(fd) if fd.isdigit() else None
        self.data = bytes.fromhex((string if self.is_string else path).replace("\\x", ""))
        self.text = other or self.data.decode(errors="surrogateescape")


class _Call:
    def __init__(
        self, log: Log, root: str, offsets: dict[int, int], call: str, arguments: list[_Argument], result: int
    ) -> None:
        self.log, self.root, self.offsets, self.call, self.result = log, root, offsets, call, result
        self.arguments = arguments
        self.text = " ".join(argument.text for argument in arguments if not argument.is_string)

    def _places(self) -> list[tuple[int, str] | None]:
        """The places that a call names: a string each, relative to the descriptor before it."""
        found: list[tuple[int, str] | None] = []
        for at, argument in enumerate(self.arguments):
            if argument.is_string:
                above = self.arguments[at - 1].text if at and "at" in self.call else "/"
                path = os.path.join(above, argument.text)
                inner = path.removeprefix(f"{self.root}/")
                directory, name = os.path.split(inner)
                node = None if inner == path else self.log.now.find(directory)
                found.append(None if node is None else (node, name))
        return found

    def _node(self) -> int | None:
        """The node of the first argument, a descriptor."""
        path = self.arguments[0].text.removesuffix(" (deleted)")
        if path == self.root:
            return ROOT
        inner = path.removeprefix(f"{self.root}/")
        return None if inner == path else self.log.now.find(inner)

    def apply(self) -> None:
        log, call = self.log, self.call
        if call.startswith("open"):
            self.offsets[self.result] = 0
            (place,) = self._places()
            if place is not None and "O_CREAT" in self.text and place[1] not in log.now.names[place[0]]:
                log.create("open", *place)
        elif call.startswith(("mkdir", "rmdir", "unlink")):
            (place,) = self._places()
            if place is not None and call.startswith("mkdir"):
                if place[1] not in log.now.names[place[0]]:  # else it is what was there before, being laid
                    log.create("mkdir", *place, is_directory=True)
            elif place is not None:
                log.remove("rmdir" if call == "rmdir" or "AT_REMOVEDIR" in self.text else "unlink", *place)
        elif call.startswith(("rename", "link")):
            one, two = self._places()
            if one is None or two is None:
                assert one is two, "a move across the edge of the world"
            elif "RENAME_EXCHANGE" in self.text:
                log.exchange(one, two)
            elif call.startswith("link"):
                log.link(one, two)
            else:
                log.rename("rename_new" if "RENAME_NOREPLACE" in self.text else "rename", one, two)
        elif (node := self._node()) is not None:
            self._change(node)

    def _change(self, node: int) -> None:
        log, call, fd = self.log, self.call, self.arguments[0].fd
        if call == "syncfs":
            log.sync(None, call)
        elif call.endswith("sync"):
            log.sync(node, call)
        elif call == "fallocate":
            log.allocate(node, int(self.arguments[2].text) + int(self.arguments[3].text))
        elif "write" in call:
            data = self.arguments[1].data
            offset = int(self.arguments[3].text) if call == "pwrite64" else self.offsets[fd or 0]
            if call == "write":
                self.offsets[fd or 0] = offset + len(data)
            log.write(node, offset, data, 0)
        else:
            log._add(Attribute(node, call, self.text))
