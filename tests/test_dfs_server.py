"""The Data Lake server of the tests answers as the real service was recorded to, and fails at the wire as it is told to."""

from __future__ import annotations

import http.client
import json
import re
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit
from xml.etree import ElementTree

from dfs import DfsServer, File
from dfs.errors import ERRORS

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
        headers["x-ms-version"] = request.get("version", version)
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
