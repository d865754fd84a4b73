"""The Data Lake server of the tests answers as the real service was recorded to, and fails at the wire as it is told to."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit
from xml.etree import ElementTree

import pytest
from dfs import Conditions, DfsServer, Fault, File, Plan
from dfs.errors import ERRORS
from dfs.faults import FAULTS

Figure = Callable[[str, str], None]
Json = dict[str, Any]

# Each is a situation that the live service was recorded in: what was there before (`given`, `first`), the request, the
# answer, and what was seen after. Values in braces are filled in, those in parentheses are kinds: see `World`.
FACTS: list[Json] = json.loads((Path(__file__).parent / "azure" / "dfs_facts.json").read_text())
GUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
DATE = re.compile(r"(Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT")
KINDS = {
    "varies": ".*",
    "quoted": '"0x8D[0-9A-F]+"',
    "bare etag": "0x8D[0-9A-F]+",
    "date": DATE.pattern,
    "number": r"\d+",
    "token": "[A-Za-z0-9+/]+=*",
    "challenge": "Bearer authorization_uri=https://login.microsoftonline.com/[^/]+/oauth2/authorize "
    "resource_id=https://storage.azure.com",
}


@dataclass
class Heard:
    """An answer as it came over the wire."""

    status: int
    reason: str
    headers: dict[str, str]
    body: bytes

    def header(self, name: str) -> str | None:
        # The case of metadata names is theirs; all others are compared without it.
        if name.startswith("x-ms-meta-"):
            return self.headers.get(name)
        return {key.lower(): value for key, value in self.headers.items()}.get(name.lower())


class Wire:
    """A client that adds nothing and repeats nothing."""

    def __init__(self, server: DfsServer) -> None:
        self._address = urlsplit(server.url).netloc

    def ask(
        self,
        method: str,
        path: str,
        query: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
        body: str | bytes = b"",
    ) -> Heard:
        connection = http.client.HTTPConnection(self._address, timeout=10)
        try:
            search = "&".join(f"{name}={quote(value, safe='')}" for name, value in (query or {}).items())
            data = body.encode() if isinstance(body, str) else body
            sent = {"Content-Length": str(len(data))} if method not in ("GET", "HEAD") else {}
            connection.request(method, path + ("?" + search if search else ""), data or None, sent | (headers or {}))
            answer = connection.getresponse()
            return Heard(answer.status, answer.reason, dict(answer.getheaders()), answer.read())
        finally:
            connection.close()


@dataclass
class World:
    """A server in which one fact is set up, asked and compared."""

    server: DfsServer
    clock: list[float]
    guid: str = field(default_factory=lambda: str(uuid.uuid4()))
    first: dict[str, dict[str, str]] = field(default_factory=dict)
    before: dict[str, dict[str, str]] = field(default_factory=dict)
    told: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def judge(self, fact: Json) -> list[str]:
        """What is not as it was recorded; nothing where the fact holds."""
        namespace = self.server.namespace
        namespace.filesystems.clear()
        namespace.deleted.clear()
        for name in ("fs", "fs1"):
            namespace.create_filesystem(name)
        for line in fact.get("given", []):
            self._give(line)
        self.first = self.before = self._seen()
        for request in fact.get("first", []):
            self._learn(self._ask(request, fact["request"].get("version")))
        self.before = self._seen()
        heard = self._ask(fact["request"])
        self._learn(heard)
        self._compare(fact["request"], fact["answer"], heard)
        for later in fact.get("then", []):
            again = self._ask(later["request"], fact["request"].get("version"))
            self._compare(later["request"], later["answer"], again)
        return self.wrong

    def _give(self, line: str) -> None:
        """`file /fs/name text`, `directory`, `append ... position text`, `lease ... seconds`, `break ... seconds`."""
        match = re.fullmatch(r"(\w+) (/(\w+)/(.*?))(?: (-?\d+|[^ /]*)(?: (\w+))?)?", line)
        assert match is not None, line
        verb, path, filesystem, name, *rest = match.groups()
        namespace, (value, data) = self.server.namespace, rest
        if verb == "append":
            namespace.append(filesystem, name, int(value), data.encode())
        elif verb == "files":
            for number in range(int(value)):
                namespace.create(filesystem, f"{name}/{number}")
        elif verb in ("lease", "break"):
            acquire = {"x-ms-lease-action": "acquire", "x-ms-lease-duration": value or ""}
            end = {"x-ms-lease-action": "break"} | ({"x-ms-lease-break-period": value} if value else {})
            headers = (acquire | {"x-ms-proposed-lease-id": str(uuid.uuid4())}) if verb == "lease" else end
            assert Wire(self.server).ask("PUT", quote(path), {"comp": "lease"}, headers).status in (201, 202), line
        else:
            node = namespace.create(filesystem, name, directory=verb == "directory")
            if isinstance(node, File):
                node.data = (value or "").encode()

    def _seen(self) -> dict[str, dict[str, str]]:
        """ETag, times and lease of every path."""
        return {
            f"/{name}/{path}".rstrip("/"): {
                "ETag": f'"{node.etag}"',
                "Last-Modified": formatdate(node.modified, usegmt=True),
                "x-ms-creation-time": formatdate(node.created, usegmt=True),
                "lease": node.lease.id if node.lease is not None else "",
            }
            for name, filesystem in self.server.namespace.filesystems.items()
            for path, node in [("", filesystem.root), *self.server.namespace.walk(name)]
        }

    def _ask(self, request: Json, version: str | None = None) -> Heard:
        # Whatever changes, changes at another second.
        self.clock[0] += 5
        fill = self._fill
        headers = {name: fill(value) for name, value in request.get("headers", {}).items()}
        headers["x-ms-version"] = str(request.get("version", version))
        query = {name: fill(value) for name, value in request.get("query", {}).items()}
        return Wire(self.server).ask(request["method"], request["path"], query, headers, request.get("body", ""))

    def _learn(self, heard: Heard) -> None:
        names = {"token": "x-ms-continuation", "deletion": "x-ms-deletion-id", "etag": "ETag"}
        self.told |= {key: value for key, name in names.items() if (value := heard.header(name)) is not None}

    def _fill(self, text: str) -> str:
        def value(match: re.Match[str]) -> str:
            what, _, path = match[1].partition(" ")
            known = self.before.get(path, {})
            return {
                "etag": known.get("ETag", "").strip('"'),
                "lease": known.get("lease", ""),
                "modified": known.get("Last-Modified", ""),
                "guid": self.guid,
                "tomorrow": formatdate(self.clock[0] + 86_400, usegmt=True),
                "yesterday": formatdate(self.clock[0] - 86_400, usegmt=True),
                **{key: self.told.get(key, "") for key in ("token", "deletion")},
            }[what]

        return re.sub(r"\{([a-z]+(?: [^}]*)?)\}", value, text)

    def _is(self, name: str, kind: str, value: str | None) -> bool:
        """Whether a value is of the recorded kind: itself, in braces what was there, in parentheses a pattern."""
        if kind == "(absent)":
            return value is None
        if value is None:
            return False
        what, _, path = kind.strip("()").partition(" ")
        if kind.startswith("(same ") or kind.startswith("(first "):
            return value == (self.first if what == "first" else self.before)[path][name]
        if kind.startswith("(new "):
            return bool(re.fullmatch('"0x8D[0-9A-F]+"' if name == "ETag" else DATE, value)) and (
                value != self.before.get(path, {}).get(name)
            )
        if kind == "(answered)":
            return value == self.told["etag"]
        if kind.startswith("("):
            return bool(re.fullmatch(KINDS[kind.strip("()")], value))
        return value == self._fill(kind)

    def _expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.wrong.append(otherwise)

    def _compare(self, request: Json, answer: Json, heard: Heard) -> None:
        self._expect(heard.status == answer["status"], f"status {heard.status}, not {answer['status']}")
        code = answer.get("code")
        self._expect(heard.header("x-ms-error-code") == code, f"{heard.header('x-ms-error-code')}, not {code}")
        for name, kind in answer.get("headers", {}).items():
            value = heard.header(name)
            self._expect(self._is(name, kind, value), f"{name} is {value!r}, not {kind!r}")
        if heard.status != 401:
            server = {"dfs": "Windows-Azure-HDFS/1.0", "blob": "Windows-Azure-Blob/1.0"}[request["endpoint"]]
            self._expect(
                (heard.header("Server") or "").startswith(server), f"it is not {request['endpoint']} that answers"
            )
        self._compare_body(request, answer, heard)

    def _compare_body(self, request: Json, answer: Json, heard: Heard) -> None:
        text = heard.body.decode("utf-8-sig")
        code = answer.get("code")
        if code is not None:
            self._expect(heard.reason == ERRORS[code][1], f"the reason is {heard.reason!r}")
        if code is not None and request["method"] != "HEAD" and heard.status != 304:
            self._compare_error(request["endpoint"], answer, heard)
        elif heard.status == 304 or request["method"] == "HEAD":
            self._expect(not heard.body, "it has a body")
        if "body" in answer:
            self._expect(text == answer["body"], f"the body is {text!r}")
        if "json" in answer:
            self._expect(json.loads(text) == answer["json"] and text.endswith("\n"), f"the body is {text!r}")
        if "names" in answer:
            entries = json.loads(text)["paths"]
            self._expect([entry["name"] for entry in entries] == answer["names"], f"the listing is {text}")
            self._expect(text.endswith("\n"), "the listing has no newline")
            for name, kind in answer.get("entry", {}).items():
                self._expect(self._is(name, kind, entries[0].get(name)), f"{name} of {entries[0]} is not {kind}")
            if answer.get("members") == "all":
                self._expect(set(entries[0]) == set(answer["entry"]), f"other members: {entries[0]}")
        for where, kinds in answer.get("xml", {}).items():
            self._expect(heard.body.startswith(b"\xef\xbb\xbf"), "no BOM")
            found = [element.text or "" for element in ElementTree.fromstring(text).findall(where)]
            same = len(found) == len(kinds) and all(map(self._is, [where] * len(found), kinds, found))
            self._expect(same, f"{where} is {found}, not {kinds}")

    def _compare_error(self, endpoint: str, answer: Json, heard: Heard) -> None:
        text = heard.body.decode("utf-8-sig")
        if endpoint == "dfs":
            error = json.loads(text)["error"]
            code, message, detail = error["code"], error["message"], error.get("detail")
            self._expect("\n" not in text, "the error has lines")
        else:
            self._expect(heard.body.startswith(b"\xef\xbb\xbf<?xml version"), "no BOM")
            root = ElementTree.fromstring(text)
            code, message = root.findtext("Code"), root.findtext("Message") or ""
            detail = {child.tag: child.text for child in root if child.tag.startswith("Header")} or None
        self._expect(code == answer["code"], f"the body says {code}")
        first, request_id, moment = message.split("\n")
        self._expect(first == answer.get("message", first), f"the message is {first!r}")
        self._expect(bool(GUID.fullmatch(request_id.removeprefix("RequestId:"))), request_id)
        self._expect(bool(re.fullmatch(r"Time:\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{7}Z", moment)), moment)
        self._expect(detail == answer.get("detail"), f"the detail is {detail}")


def test_every_recorded_fact_holds(figure: Figure) -> None:
    """Status, error code, every header that was recorded, body, and what is seen afterwards."""
    clock = [1_750_000_000.5]
    wrong: dict[str, list[str]] = {}
    skipped = {fact["id"]: fact["unsupported"] for fact in FACTS if "unsupported" in fact}
    with ExitStack() as stack:
        servers: dict[str, DfsServer] = {}
        for fact in FACTS:
            if fact["id"] in skipped:
                continue
            options = fact.get("server", {})
            key = json.dumps(options)
            if key not in servers:
                servers[key] = stack.enter_context(DfsServer(now=lambda: clock[0], **options))
            if found := World(servers[key], clock).judge(fact):
                wrong[fact["id"]] = found
    asked = len(FACTS) - len(skipped)
    figure("recorded facts of Data Lake Storage", f"{asked - len(wrong)} of {asked} hold, {len(skipped)} unsupported")
    assert not wrong, json.dumps(wrong, indent=1)


def test_every_fact_has_its_own_name_and_a_source() -> None:
    assert len({fact["id"] for fact in FACTS}) == len(FACTS)
    assert all(fact["source"].startswith("Azure/") for fact in FACTS)


@pytest.fixture
def server() -> Iterator[DfsServer]:
    with DfsServer() as server:
        server.namespace.create_filesystem("fs")
        yield server


LEGACY, STAR = {"mode": "legacy"}, {"If-None-Match": "*"}
APPEND, FLUSH = {"action": "append", "position": "0"}, {"action": "flush", "position": "1"}


def rename(server: DfsServer, source: str, target: str, query: dict[str, str] = LEGACY, **headers: str) -> Heard:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Wire(server).ask("PUT", f"/fs/{target}", query, {"x-ms-rename-source": f"/fs/{source}"} | named)


def code(heard: Heard) -> tuple[int, str | None]:
    return heard.status, heard.header("x-ms-error-code")


def test_a_rename_onto_something_is_refused_where_it_must_find_nothing(server: DfsServer) -> None:
    for name in ("a", "b"):
        server.namespace.create("fs", name, name.encode())
    assert code(rename(server, "a", "b", If_None_Match="*")) == (409, "PathAlreadyExists")
    assert rename(server, "a", "c", If_None_Match="*").status == 201
    assert server.namespace.paths("fs") == ["b", "c"]


def test_a_directory_is_moved_into_the_one_that_is_there_unless_the_mode_is_legacy(server: DfsServer) -> None:
    server.namespace.create("fs", "new/f")
    server.namespace.create("fs", "old/g")
    assert code(rename(server, "new", "old")) == (409, "DirectoryNotEmpty")
    assert rename(server, "new", "old", {}).status == 201
    assert server.namespace.paths("fs") == ["old", "old/g", "old/new", "old/new/f"]


def test_a_rename_goes_nowhere_that_is_not_there_or_is_of_another_kind_or_within_itself(server: DfsServer) -> None:
    server.namespace.create("fs", "d/f")
    server.namespace.create("fs", "e", directory=True)
    before = server.namespace.paths("fs")
    assert code(rename(server, "d/f", "none/f")) == (404, "RenameDestinationParentPathNotFound")
    assert code(rename(server, "d/f", "e")) == (409, "InvalidSourceOrDestinationResourceType")
    assert code(rename(server, "e", "d/f")) == (409, "InvalidSourceOrDestinationResourceType")
    assert code(rename(server, "d", "d/sub")) == (409, "InvalidRenameSourcePath")
    assert code(rename(server, "d", "d")) == (409, "InvalidRenameSourcePath")
    assert code(rename(server, "e", "d/f/x")) == (409, "InvalidDestinationPath")
    assert code(rename(server, "d f", "g")) == (400, "InvalidSourceUri")
    assert server.namespace.paths("fs") == before


def test_pages_of_a_listing_come_to_all_of_it_while_it_changes(server: DfsServer) -> None:
    wanted = [f"d{high}/{low:02}" for high in range(4) for low in range(30)]
    for path in wanted:
        server.namespace.create("fs", path)
    query, found = {"resource": "filesystem", "recursive": "true", "maxResults": "7"}, []
    while True:
        heard = Wire(server).ask("GET", "/fs", query)
        found += [entry["name"] for entry in json.loads(heard.body)["paths"]]
        token = heard.header("x-ms-continuation")
        if token is None:
            break
        server.namespace.delete("fs", found[-1], recursive=True)
        query["continuation"] = token
    # What a page ended with was deleted: where that was a directory, what it held was never listed.
    assert [path for path in found if "/" in path] == [path for path in wanted if path in found]
    assert len(found) == len(set(found)) > 90


def test_a_large_tree_is_deleted_and_renamed_in_several_requests_and_at_once() -> None:
    with DfsServer(page=10) as server:
        server.namespace.create_filesystem("fs")
        for number in range(35):
            server.namespace.create("fs", f"d/{number}")
        tokens: list[str] = []
        for verb, path, query in (
            ("PUT", "/fs/e", dict(LEGACY)),
            ("DELETE", "/fs/e", {"recursive": "true", "paginated": "true"}),
        ):
            while True:
                heard = Wire(server).ask(verb, path, query, {"x-ms-rename-source": "/fs/d"} if verb == "PUT" else {})
                token = heard.header("x-ms-continuation")
                if not token:
                    break
                tokens.append(token)
                assert len(server.namespace.paths("fs")) == 36
                query["continuation"] = token
        assert len(tokens) == 6
        assert server.namespace.paths("fs") == []


def test_two_requests_make_a_small_file_appear_whole(server: DfsServer) -> None:
    heard = Wire(server).ask("PUT", "/fs/stage/a", {}, {"x-ms-blob-type": "BlockBlob"} | STAR, b"data")
    server.namespace.create("fs", "to", directory=True)
    assert heard.status == 201
    assert rename(server, "stage/a", "to/a", If_None_Match="*").header("ETag") == heard.header("ETag")
    assert server.namespace.read("fs", "to/a") == b"data"
    assert server.counts == {"put_blob": 1, "rename": 1}


def test_a_file_of_one_endpoint_is_not_written_piecewise_through_the_other(server: DfsServer) -> None:
    server.namespace.create("fs", "dfs")
    server.namespace.create("fs", "blob", by_blob=True)
    assert code(Wire(server).ask("PUT", "/fs/dfs", {"comp": "block", "blockid": "YQ=="}, {}, b"x")) == (
        409,
        "BlobOperationNotSupported",
    )
    blocks = "<BlockList></BlockList>"
    assert Wire(server).ask("PUT", "/fs/dfs", {"comp": "blocklist"}, {}, blocks).status == 409
    assert Wire(server).ask("PATCH", "/fs/blob", APPEND, {}, b"x").status == 202
    assert code(Wire(server).ask("PATCH", "/fs/blob", FLUSH)) == (409, "InvalidFlushOperation")


def test_blocks_make_a_file_in_the_order_of_their_list(server: DfsServer) -> None:
    for name, data in (("YQ==", b"a"), ("Yg==", b"b"), ("Yw==", b"c")):
        assert Wire(server).ask("PUT", "/fs/f", {"comp": "block", "blockid": name}, {}, data).status == 201
    assert server.namespace.get("fs", "f") is None
    blocks = "<BlockList><Latest>Yg==</Latest><Uncommitted>YQ==</Uncommitted></BlockList>"
    assert Wire(server).ask("PUT", "/fs/f", {"comp": "blocklist"}, {}, blocks).status == 201
    assert server.namespace.read("fs", "f") == b"ba"
    assert code(Wire(server).ask("PUT", "/fs/f", {"comp": "blocklist"}, {}, blocks)) == (400, "InvalidBlockList")


def test_the_blob_listing_has_prefixes_delimiters_and_pages(server: DfsServer) -> None:
    for path in ("a/b", "a/c/d", "ab", "b"):
        server.namespace.create("fs", path)

    def names(**query: str) -> list[list[str | None]]:
        pages: list[list[str | None]] = []
        marker = ""
        while marker or not pages:
            asked = {"restype": "container", "comp": "list", "marker": marker} | query
            root = ElementTree.fromstring(Wire(server).ask("GET", "/fs", asked).body.decode("utf-8-sig"))
            pages.append([name.text for name in root.findall(".//Name")])
            marker = root.findtext("NextMarker") or ""
        return pages

    assert names() == [["a", "a/b", "a/c", "a/c/d", "ab", "b"]]
    assert names(prefix="a", maxresults="3") == [["a", "a/b", "a/c"], ["a/c/d", "ab"]]
    assert names(prefix="a/", delimiter="/") == [["a/b", "a/c/"]]


def test_a_mistake_of_the_server_s_own_is_not_taken_for_the_service_s_answer() -> None:
    with pytest.raises(TypeError), DfsServer() as server:
        server.namespace.filesystems = None  # type: ignore[assignment]
        Wire(server).ask("HEAD", "/fs/a")


def test_a_lease_runs_out_by_the_server_s_clock() -> None:
    clock = [1_750_000_000.0]
    with DfsServer(now=lambda: clock[0]) as server:
        server.namespace.create_filesystem("fs")
        server.namespace.create("fs", "a")
        acquire = {"x-ms-lease-action": "acquire", "x-ms-lease-duration": "15"}
        held = Wire(server).ask("PUT", "/fs/a", {"comp": "lease"}, acquire).header("x-ms-lease-id") or ""
        assert code(Wire(server).ask("PUT", "/fs/a", {"comp": "lease"}, acquire)) == (409, "LeaseAlreadyPresent")
        assert code(Wire(server).ask("POST", "/fs/a", {}, acquire)) == (409, "LeaseAlreadyPresent")
        assert code(Wire(server).ask("PATCH", "/fs/a", APPEND, {}, b"x")) == (412, "LeaseIdMissing")
        assert Wire(server).ask("PUT", "/fs/a", {"resource": "file"}, {"x-ms-lease-id": held}).status == 201
        assert Wire(server).ask("HEAD", "/fs/a").header("x-ms-lease-state") == "leased"
        clock[0] += 15
        late = {"x-ms-lease-id": held}
        assert code(Wire(server).ask("PATCH", "/fs/a", APPEND, late, b"x")) == (412, "LeaseLost")
        assert Wire(server).ask("PATCH", "/fs/a", APPEND, {}, b"x").status == 202
        assert Wire(server).ask("PUT", "/fs/a", {"comp": "lease"}, acquire).status == 201


def under_fault(server: DfsServer) -> tuple[str, list[str]]:
    """What a rename is told, and what is there then."""
    try:
        heard = rename(server, "a", "b")
        said = f"{heard.status} {heard.header('Retry-After') or ''}".strip()
    except (ConnectionError, http.client.HTTPException):
        said = "cut"
    return said, server.namespace.paths("fs")


@pytest.mark.parametrize(
    ("plan", "said", "left"),
    [
        ("fails@rename:0", "500", ["a"]),
        ("errs@rename:0", "500", ["b"]),
        ("cuts@rename:0", "cut", ["a"]),
        ("loses@rename:0", "cut", ["b"]),
        ("throttles@rename:0+3", "429 3", ["a"]),
        ("overloads@rename:0+2", "503 2", ["a"]),
        ("delays@rename:0+50", "201", ["b"]),
        ("lags@0+50", "201", ["b"]),
        ("repeats@0", "404", ["b"]),
        ("replays@0+1", "201", ["b"]),
        ("lates@0+1", "cut", ["a"]),
        ("loses@1 loses@create:0", "201", ["b"]),
    ],
)
def test_each_fault_does_what_its_name_says(plan: str, said: str, left: list[str]) -> None:
    with DfsServer(plan=plan) as server:
        server.namespace.create_filesystem("fs")
        server.namespace.create("fs", "a")
        began = time.monotonic()
        assert under_fault(server) == (said, left)
        if "+50" in plan:
            assert time.monotonic() - began >= 0.05
        assert [(entry.verb, entry.fault) for entry in server.log][:1] == [("rename", plan if "1 " not in plan else "")]
        assert str(server.plan) == plan


def test_every_fault_has_been_tried() -> None:
    marks = test_each_fault_does_what_its_name_says.pytestmark  # type: ignore[attr-defined]
    assert {row[0].partition("@")[0] for row in marks[0].args[1]} == set(FAULTS)


def test_a_replay_comes_after_as_many_requests_and_finds_what_is_there_then() -> None:
    with DfsServer(plan="replays@0+2") as server:
        server.namespace.create_filesystem("fs")
        server.namespace.create("fs", "a", b"first")
        rename(server, "a", "b")
        server.namespace.create("fs", "a", b"second")
        Wire(server).ask("HEAD", "/fs/b")
        assert server.namespace.read("fs", "b") == b"first"
        Wire(server).ask("HEAD", "/fs/b")
        assert server.namespace.read("fs", "b") == b"second"
        assert [entry.fault for entry in server.log] == ["replays@0+2", "", "replayed", ""]


def test_a_late_request_is_applied_after_its_sender_gave_it_up() -> None:
    with DfsServer(plan="lates@0+2") as server:
        server.namespace.create_filesystem("fs")
        server.namespace.create("fs", "a")
        assert under_fault(server) == ("cut", ["a"])
        Wire(server).ask("HEAD", "/fs/a")
        assert server.namespace.paths("fs") == ["a"]
        Wire(server).ask("HEAD", "/fs/a")
        assert server.namespace.paths("fs") == ["b"]


def test_what_is_made_in_a_directory_begins_with_its_defaults(server: DfsServer) -> None:
    acl = (
        "user::rwx,group::r-x,other::---,default:user::rwx,default:group::r-x,default:group:etl:r-x,default:other::---"
    )
    server.namespace.create("fs", "d", directory=True).acl = acl
    made = server.namespace.create("fs", "d/e/f")
    below = server.namespace.find("fs", "d/e")
    assert made.acl == "user::rwx,group::r-x,group:etl:r-x,other::---"
    assert below.acl == f"{made.acl},{','.join(f'default:{entry}' for entry in made.acl.split(','))}"


def test_what_is_still_under_way_can_be_let_in() -> None:
    with DfsServer(plan="replays@0+99") as server:
        server.namespace.create_filesystem("fs")
        server.namespace.create("fs", "a")
        rename(server, "a", "b")
        server.replay()
        assert [(entry.verb, entry.status) for entry in server.log] == [("rename", 201), ("rename", 404)]


def test_a_seed_gives_one_plan_and_its_text_gives_it_again() -> None:
    plan = str(Plan.seeded(7, requests=50, rate=0.3))
    assert plan == str(Plan.seeded(7, requests=50, rate=0.3)) == str(Plan(plan)) != ""
    assert plan != str(Plan.seeded(8, requests=50, rate=0.3))
    for text in ("loses", "wins@3", "loses@x", "loses@rename:", "replays@3+x"):
        with pytest.raises(ValueError, match="is no fault"):
            Fault.parse(text)


def test_a_failure_under_faults_tells_the_line_that_repeats_it() -> None:
    with pytest.raises(AssertionError) as caught, DfsServer(plan="loses@7 replays@rename:0+3"):
        raise AssertionError
    assert caught.value.__notes__ == ['It happened under: DfsServer(plan="loses@7 replays@rename:0+3")']


@pytest.fixture
def onelake() -> Iterator[DfsServer]:
    with DfsServer(onelake=True) as server:
        server.add_item("ws", "sales.Lakehouse")
        yield server


ITEM = "/ws/sales.Lakehouse"
FILE = {"resource": "file"}


def test_onelake_keeps_items_and_their_first_level_as_they_are(onelake: DfsServer) -> None:
    before = onelake.namespace.paths("ws")
    for path in ("/ws/new.Lakehouse", f"{ITEM}/new", "/ws/new.Lakehouse/Files/a", f"{ITEM}/None/a"):
        assert Wire(onelake).ask("PUT", path, FILE).status in (403, 404), path
    for path in (ITEM, f"{ITEM}/Files"):
        assert Wire(onelake).ask("DELETE", path, {"recursive": "true"}).status == 403, path
        assert Wire(onelake).ask("PUT", f"{ITEM}/Files/x", {}, {"x-ms-rename-source": path}).status == 403, path
        assert Wire(onelake).ask("HEAD", path).status == 200, path
    assert onelake.namespace.paths("ws") == before
    assert Wire(onelake).ask("PUT", f"{ITEM}/Files/a", FILE).status == 201
    assert Wire(onelake).ask("PUT", f"{ITEM}/Files/b", {}, {"x-ms-rename-source": f"{ITEM}/Files/a"}).status == 201
    assert onelake.namespace.paths("ws", "sales.Lakehouse/Files") == ["sales.Lakehouse/Files/b"]


def test_onelake_takes_guids_for_both_the_workspace_and_the_item_or_for_neither() -> None:
    with DfsServer(onelake=True) as server:
        workspace, item = server.add_item("ws", "sales.Lakehouse")
        assert Wire(server).ask("PUT", f"/{workspace}/{item}/Files/a", FILE).status == 201
        source = {"x-ms-rename-source": f"/{workspace}/{item}/Files/a"}
        assert Wire(server).ask("PUT", f"/{workspace}/{item}/Files/b", {}, source).status == 201
        assert Wire(server).ask("HEAD", f"{ITEM}/Files/b").status == 200
        for path in (f"/{workspace}/sales.Lakehouse/Files/a", f"/ws/{item}/Files/a"):
            assert Wire(server).ask("PUT", path, FILE).status in (400, 404), path


def test_onelake_refuses_parameters_ignores_headers_and_knows_no_leases(onelake: DfsServer) -> None:
    heard = Wire(onelake).ask("PUT", f"{ITEM}/Files/a", FILE, {"x-ms-owner": "me", "x-ms-permissions": "rwxrwxrwx"})
    assert (heard.status, heard.header("x-ms-rejected-headers")) == (201, "x-ms-owner,x-ms-permissions")
    shown = Wire(onelake).ask("HEAD", f"{ITEM}/Files/a")
    assert (shown.header("x-ms-owner"), shown.header("x-ms-permissions")) == ("$superuser", "---------")
    moved = {"x-ms-rename-source": f"{ITEM}/Files/a"}
    for method, query, headers in (
        ("PUT", LEGACY, moved),
        ("PATCH", {"action": "setAccessControl"}, {"x-ms-owner": "me"}),
        ("PUT", {"comp": "lease"}, {"x-ms-lease-action": "acquire", "x-ms-lease-duration": "15"}),
    ):
        assert Wire(onelake).ask(method, f"{ITEM}/Files/b", query, headers).status == 400
    assert Wire(onelake).ask("PUT", "/ws2", {"restype": "container"}).status == 405
    assert Wire(onelake).ask("DELETE", "/ws", {"restype": "container"}).status == 405
    assert Wire(onelake).ask("HEAD", "/ws", {"restype": "container"}).status == 200


def test_a_server_that_ignores_conditions_overwrites() -> None:
    with DfsServer(onelake=True, conditions=False) as server:
        server.add_item("ws", "sales.Lakehouse")
        server.namespace.create("ws", "sales.Lakehouse/Files/a", b"old")
        assert Wire(server).ask("PUT", f"{ITEM}/Files/a", FILE, STAR).status == 201
        assert server.namespace.read("ws", "sales.Lakehouse/Files/a") == b""


def test_that_credentials_are_sent_can_be_seen_and_demanded() -> None:
    with DfsServer(anonymous=False) as server:
        server.namespace.create_filesystem("fs")
        assert code(Wire(server).ask("PUT", "/fs/a", FILE)) == (401, "NoAuthenticationInformation")
        assert Wire(server).ask("PUT", "/fs/a", FILE, {"Authorization": "Bearer secret"}).status == 201
        assert Wire(server).ask("PUT", "/fs/a", FILE | {"sv": "2024-08-04", "sig": "secret"}).status == 201
        assert [entry.auth for entry in server.log] == ["", "Bearer", "sas"]
        assert "secret" not in str(server.log)


def test_what_is_stored_can_be_looked_at_and_changed_behind_the_service(server: DfsServer) -> None:
    made = server.namespace.create("fs", "d/a", b"x")
    heard = Wire(server).ask("HEAD", "/fs/d/a")
    assert (heard.header("ETag"), heard.header("Content-Length")) == (f'"{made.etag}"', "1")
    server.namespace.rename(("fs", "d/a"), ("fs", "b"), conditions=Conditions(none_match="*"))
    assert Wire(server).ask("HEAD", "/fs/d/a").status == 404


def test_what_is_called_runs_between_requests_in_the_servers_thread(server: DfsServer) -> None:
    called: list[tuple[int, int, bool]] = []

    def note(number: int) -> None:
        called.append((number, threading.get_ident(), server.namespace.get("fs", "a") is None))

    server.before = note
    for _ in range(2):
        Wire(server).ask("PUT", "/fs/a", FILE)
    thread = server.call(threading.get_ident)
    assert thread != threading.get_ident()
    assert called == [(0, thread, True), (1, thread, False)]


def test_what_is_in_use_is_neither_deleted_nor_renamed_nor_is_what_is_above_it(server: DfsServer) -> None:
    server.namespace.create("fs", "d/used/a")
    server.namespace.create("fs", "d/used2")
    server.namespace.busy.add(("fs", "d/used"))
    refused = (409, "LeaseAlreadyPresent")
    for path in ("/fs/d/used", "/fs/d"):
        assert code(Wire(server).ask("DELETE", path, {"recursive": "true"})) == refused
        assert code(Wire(server).ask("PUT", "/fs/e", {}, {"x-ms-rename-source": path})) == refused
    assert Wire(server).ask("PUT", "/fs/d/used/b", {}, {"x-ms-rename-source": "/fs/d/used/a"}).status == 201
    assert Wire(server).ask("DELETE", "/fs/d/used2").status == 200
    server.namespace.busy.clear()
    assert Wire(server).ask("DELETE", "/fs/d/used", {"recursive": "true"}).status == 200


def test_it_serves_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "tests.dfs", "--port", "0", "--plan", "loses@rename:0"]
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        address = urlsplit(process.stdout.readline().strip())
        assert address.hostname == "127.0.0.1"
        connection = http.client.HTTPConnection(address.netloc, timeout=10)
        connection.request("PUT", "/fs?restype=container")
        assert connection.getresponse().status == 201
        connection.close()
        process.stdin.close()
        assert process.wait(10) == 0


def test_what_a_request_costs_does_not_grow_with_what_is_stored(server: DfsServer, figure: Figure) -> None:
    def rate() -> float:
        began = time.perf_counter()
        for number in range(500):
            server.namespace.create("fs", f"t/{number}", b"x")
            server.namespace.listing("fs", "big", recursive=True, limit=10, token="")
            server.namespace.rename(("fs", f"t/{number}"), ("fs", f"u{number}"))
            server.namespace.delete("fs", f"u{number}")
        return 500 / (time.perf_counter() - began)

    server.namespace.create("fs", "big", directory=True)
    few = rate()
    for number in range(50_000):
        server.namespace.create("fs", f"big/{number % 100}/{number}")
    many = rate()
    figure("Data Lake server", f"{few:,.0f} rounds/s with nothing stored, {many:,.0f} with 50,000 files")
    assert many > few / 10
