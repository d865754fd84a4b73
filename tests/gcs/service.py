"""What the JSON API answers over a store: paths, parameters, bodies and errors; no sockets.

Each verb names the page of Google's reference that its answers follow, below https://cloud.google.com/storage/docs.
"""

from __future__ import annotations

import json
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.message import Message
from email.parser import BytesParser
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote, urlencode, urlsplit

from .errors import Refused
from .store import Bucket, Conditions, Object, Store, Upload, check_hashes, merged

API, UPLOAD, DOWNLOAD, BATCH = "/storage/v1/", "/upload/storage/v1/", "/download/storage/v1/", "/batch/storage/v1"
BATCHED = 100
IN_NO_BATCH = ("batch", "cancel", "insert", "read", "start", "status", "upload")

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Request:
    """A request as it came; header names are in lower case, and `path` is still quoted."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = b""

    @classmethod
    def parse(cls, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Request:
        """A request from what came over the wire, or was in a batch."""
        path, _, query = target.partition("?")
        pairs = [pair.partition("=") for pair in query.replace("+", " ").split("&") if pair]
        lower = {name.lower(): value for name, value in headers.items()}
        return cls(method, path, {unquote(name): unquote(value) for name, _, value in pairs}, lower, body)

    @property
    def names(self) -> list[str]:
        """What lies on the path below `b`: bucket, `o`, object, what to do with it and so on."""
        path = next((self.path[len(root) :] for root in (API, UPLOAD, DOWNLOAD) if self.path.startswith(root)), "")
        return [unquote(name) for name in path.split("/")[1:]]

    @property
    def place(self) -> tuple[str, str]:
        """The bucket, and the object where one is named: by the path, a parameter or the metadata of an upload."""
        bucket, _, name = (*self.names, "", "", "")[:3]
        name = name or self.query.get("name", "")
        if not name and self.method == "POST" and self.path.startswith(UPLOAD):
            said = re.search(rb'"name": ?("(?:[^"\\]|\\.)*")', self.body[:65536])
            name = json.loads(said[1]) if said else ""
        return bucket, name

    @property
    def json(self) -> Json:
        """The body."""
        try:
            found = json.loads(self.body or b"{}")
        except ValueError:
            raise Refused("invalid", "Parse Error") from None
        return found if isinstance(found, dict) else {}

    @property
    def auth(self) -> str:
        """What kind of credential it carries, not which."""
        return self.headers.get("authorization", "").partition(" ")[0]

    def number(self, name: str) -> int | None:
        """A parameter's value."""
        text = self.query.get(name, "")
        if text and not text.isdigit():
            raise Refused("invalid", f"Invalid value for {name}: {text!r}")
        return int(text) if text else None

    def flag(self, name: str) -> bool:
        """Whether a parameter is set; Google's client for Python says `True`."""
        return self.query.get(name, "").lower() == "true"

    def conditions(self, prefix: str = "if") -> Conditions:
        """What is wanted of one end; `ifSource` of the other."""
        names = ("GenerationMatch", "GenerationNotMatch", "MetagenerationMatch", "MetagenerationNotMatch")
        return Conditions(*(self.number(f"{prefix}{name}") for name in names))


@dataclass(slots=True)
class Answer:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    reason: str | None = None
    chunked: bool = False


def route(request: Request) -> str:
    """The verb."""
    method, names, query = request.method, request.names, request.query
    if request.path == BATCH and method == "POST":
        return "batch"
    if request.path.startswith(UPLOAD) and len(names) == 2 and names[1] == "o":
        if "upload_id" in query:
            asks = request.headers.get("content-range", "").startswith("bytes */")
            sends = "status" if asks else "upload"
            # Some clients send POST here, which is undocumented and served.
            return {"PUT": sends, "POST": sends, "DELETE": "cancel"}.get(method, "unknown")
        if method != "POST":
            return "unknown"
        return "start" if query.get("uploadType") == "resumable" else "insert"
    if request.path in (f"{API}b", f"{API}b/"):
        return {"GET": "list_buckets", "POST": "create_bucket"}.get(method, "unknown")
    if len(names) == 1:
        return {"GET": "bucket", "DELETE": "delete_bucket"}.get(method, "unknown")
    if request.path.startswith(UPLOAD) or names[1:2] != ["o"]:
        return "unknown"
    if len(names) == 2 or names[2:] == [""]:
        return "list" if method == "GET" else "unknown"
    if len(names) == 3:
        if method == "GET":
            return "read" if query.get("alt") == "media" else "get"
        return {"DELETE": "delete", "PATCH": "patch", "PUT": "update"}.get(method, "unknown")
    verbs = {"rewriteTo": "rewrite", "copyTo": "copy", "moveTo": "move", "compose": "compose"}
    shapes = {"rewriteTo": 8, "copyTo": 8, "moveTo": 6, "compose": 4}
    return verbs[names[3]] if method == "POST" and len(names) == shapes.get(names[3]) else "unknown"


class Service:
    """Answers requests.

    Args:
        token: The one bearer token that is let in; any, and none, by default.
        denied: Verbs that the caller may not use.
        part: What answers the parts of a batch; `answer` by default.
    """

    def __init__(
        self,
        store: Store,
        *,
        token: str | None = None,
        denied: Collection[str] = (),
        part: Callable[[Request], Answer] | None = None,
    ) -> None:
        self.store = store
        self.token = token
        self.denied = frozenset(denied)
        self.part = part or self.answer

    def answer(self, request: Request) -> Answer:
        """Apply a request, whole or not at all; of a batch, each part."""
        verb = route(request)
        try:
            if self.token is not None and request.headers.get("authorization") != f"Bearer {self.token}":
                raise Refused("authError" if request.auth else "required")
            if verb in self.denied:
                raise Refused("forbidden")
            answer: Answer = getattr(self, f"_{verb}")(request)
        except Refused as refused:
            answer = _json(refused.body, refused.status)
            answer.headers |= refused.headers
            if refused.status == 304:
                answer = Answer(304)
        return answer

    def _unknown(self, request: Request) -> Answer:
        raise Refused("notFound")

    # Buckets

    def _list_buckets(self, request: Request) -> Answer:
        """/json_api/v1/buckets/list"""
        return _json({"kind": "storage#buckets", "items": [_shown(found) for found in self.store.buckets.values()]})

    def _create_bucket(self, request: Request) -> Answer:
        """/json_api/v1/buckets/insert"""
        given = request.json
        versioned = bool(given.get("versioning", {}).get("enabled"))
        return _json(_shown(self.store.create_bucket(str(given.get("name", "")), versioned=versioned)))

    def _bucket(self, request: Request) -> Answer:
        """/json_api/v1/buckets/get"""
        return _json(_shown(self.store.bucket(request.place[0])))

    def _delete_bucket(self, request: Request) -> Answer:
        """/json_api/v1/buckets/delete"""
        self.store.delete_bucket(request.place[0])
        return Answer(204)

    # Objects

    def _list(self, request: Request) -> Answer:
        """/json_api/v1/objects/list; `fields` and `projection` are passed over."""
        query = request.query
        limit = request.number("maxResults")
        page = self.store.listing(
            request.place[0],
            prefix=query.get("prefix", ""),
            delimiter=query.get("delimiter", ""),
            start=query.get("startOffset", ""),
            end=query.get("endOffset", ""),
            token=_token(query.get("pageToken", "")),
            limit=limit or 1000,
            versions=request.flag("versions"),
            trailing=request.flag("includeTrailingDelimiter"),
        )
        found: Json = {"kind": "storage#objects"}
        if page.objects:
            found["items"] = [resource(each) for each in page.objects]
        if page.prefixes:
            found["prefixes"] = page.prefixes
        if page.token:
            found["nextPageToken"] = urlsafe_b64encode(page.token.encode()).decode()
        return _json(found)

    def _get(self, request: Request) -> Answer:
        """/json_api/v1/objects/get"""
        return _resource(self._wanted(request))

    def _read(self, request: Request) -> Answer:
        """/json_api/v1/objects/get with `alt=media`"""
        found = self._wanted(request)
        size = len(found.data)
        headers = {
            "Content-Type": found.content_type,
            "ETag": found.etag,
            "X-Goog-Generation": str(found.generation),
            "X-Goog-Metageneration": str(found.metageneration),
            "X-Goog-Hash": f"crc32c={found.content.crc32c}" + ("" if found.components else f",md5={found.content.md5}"),
            "X-Goog-Storage-Class": "STANDARD",
            "X-Goog-Stored-Content-Encoding": "identity",
            "X-Goog-Stored-Content-Length": str(size),
        }
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
        if match is None or not any(match.groups()):
            return Answer(200, headers, found.data)
        first, last = match.groups()
        begin = int(first) if first else max(size - int(last), 0)
        end = min(int(last) + 1, size) if first and last else size
        if begin >= end:
            raise Refused("requestedRangeNotSatisfiable", headers={"Content-Range": f"bytes */{size}"})
        return Answer(206, headers | {"Content-Range": f"bytes {begin}-{end - 1}/{size}"}, found.data[begin:end])

    def _wanted(self, request: Request) -> Object:
        """An object that satisfies the request's conditions, also those of its headers: /request-preconditions"""
        found = self.store.get(*request.place, generation=request.number("generation"), conditions=request.conditions())
        tags = {name: request.headers.get(name, "").split(", ") for name in ("if-match", "if-none-match")}
        tags = {name: [tag.strip('"') for tag in given if tag] for name, given in tags.items()}
        if tags["if-match"] and not {found.etag, "*"} & set(tags["if-match"]):
            raise Refused("conditionNotMet")
        if {found.etag, "*"} & set(tags["if-none-match"]):
            raise Refused("notModified")
        return found

    def _delete(self, request: Request) -> Answer:
        """/json_api/v1/objects/delete"""
        self.store.delete(*request.place, generation=request.number("generation"), conditions=request.conditions())
        return Answer(204)

    def _patch(self, request: Request, *, whole: bool = False) -> Answer:
        """/json_api/v1/objects/patch"""
        generation, conditions = request.number("generation"), request.conditions()
        changed = self.store.change(
            *request.place, request.json, whole=whole, generation=generation, conditions=conditions
        )
        return _resource(changed)

    def _update(self, request: Request) -> Answer:
        """/json_api/v1/objects/update"""
        return self._patch(request, whole=True)

    def _move(self, request: Request) -> Answer:
        """/json_api/v1/objects/move"""
        moved = self.store.move(
            *request.place,
            request.names[5],
            conditions=request.conditions(),
            source_conditions=request.conditions("ifSource"),
        )
        return _resource(moved)

    def _copy(self, request: Request) -> Answer:
        """/json_api/v1/objects/copy"""
        made = self.store.copy(
            request.place,
            (request.names[5], request.names[7]),
            request.json,
            generation=request.number("sourceGeneration"),
            conditions=request.conditions(),
            source_conditions=request.conditions("ifSource"),
        )
        return _resource(made)

    def _rewrite(self, request: Request) -> Answer:
        """/json_api/v1/objects/rewrite"""
        token, under_way, made = self.store.rewrite(
            request.place,
            (request.names[5], request.names[7]),
            request.json,
            token=request.query.get("rewriteToken", ""),
            most=request.number("maxBytesRewrittenPerCall"),
            generation=request.number("sourceGeneration"),
            conditions=request.conditions(),
            source_conditions=request.conditions("ifSource"),
        )
        told = {
            "kind": "storage#rewriteResponse",
            "totalBytesRewritten": str(under_way.written),
            "objectSize": str(len(under_way.source.data)),
            "done": made is not None,
        }
        return _json(told | ({"rewriteToken": token} if made is None else {"resource": resource(made)}))

    def _compose(self, request: Request) -> Answer:
        """/json_api/v1/objects/compose"""
        given = request.json
        sources = []
        for part in given.get("sourceObjects", []):
            wanted = part.get("objectPreconditions", {}).get("ifGenerationMatch")
            generation = part.get("generation")
            conditions = Conditions(None if wanted is None else int(wanted))
            sources.append((str(part.get("name")), None if generation is None else int(generation), conditions))
        properties = merged({}, given.get("destination", {}))
        return _resource(self.store.compose(*request.place, sources, properties, request.conditions()))

    # Uploads

    def _insert(self, request: Request) -> Answer:
        """/json_api/v1/objects/insert, /uploading-objects"""
        kind = request.headers.get("content-type", "application/octet-stream")
        given: Json = {}
        data = request.body
        if request.query.get("uploadType") == "multipart":
            first, second = _parts(kind, data, 2)
            given, data, kind = json.loads(first.body or b"{}"), second.body, second.kind
        check_hashes(data, _hashes(request) | given)
        properties = merged({"contentType": kind}, given)
        return _resource(self.store.put(*request.place, data, properties, conditions=request.conditions()))

    def _start(self, request: Request) -> Answer:
        """/performing-resumable-uploads#initiate-session"""
        given, headers = request.json, request.headers
        properties = merged({"contentType": headers.get("x-upload-content-type")}, given)
        hashes: Json = {key: given[key] for key in ("crc32c", "md5Hash") if key in given}
        upload = Upload(*request.place, properties, request.conditions(), hashes)
        if "x-upload-content-length" in headers:
            upload.total = int(headers["x-upload-content-length"])
        identity = self.store.start(upload)
        query = urlencode({"uploadType": "resumable", "name": upload.name, "upload_id": identity})
        address = f"http://{headers.get('host', '')}{request.path}?{query}"
        return Answer(200, {"Location": address, "X-GUploader-UploadID": identity})

    def _upload(self, request: Request) -> Answer:
        """/performing-resumable-uploads#chunked-upload"""
        identity, data = request.query["upload_id"], request.body
        match = re.fullmatch(r"bytes (\d+)-(\d+|\*)/(\d+|\*)", request.headers.get("content-range", "bytes 0-*/*"))
        if match is None or (match[2] != "*" and int(match[2]) - int(match[1]) + 1 != len(data)):
            raise Refused("invalid", "Failed to parse Content-Range header.")
        total = None if match[3] == "*" else int(match[3])
        if "content-range" not in request.headers:
            total = len(data)
        return self._progress(self.store.append(identity, data, int(match[1]), total, _hashes(request)))

    def _status(self, request: Request) -> Answer:
        """/performing-resumable-uploads#status-check; with the total that is there already, it ends the upload."""
        identity = request.query["upload_id"]
        upload = self.store.upload(identity)
        total = request.headers["content-range"].removeprefix("bytes */")
        if total == str(len(upload.data)):
            upload = self.store.append(identity, b"", len(upload.data), int(total), _hashes(request))
        return self._progress(upload)

    def _cancel(self, request: Request) -> Answer:
        """/performing-resumable-uploads#cancel-upload"""
        self.store.cancel(request.query["upload_id"])
        return Answer(499)

    @staticmethod
    def _progress(upload: Upload) -> Answer:
        """What is kept of an upload, or what came of it."""
        if upload.done is not None:
            return _resource(upload.done)
        return Answer(308, {"Range": f"bytes=0-{len(upload.data) - 1}"} if upload.data else {})

    # Batches

    def parts(self, request: Request) -> list[tuple[str, Request]]:
        """The requests of a batch, each with its `Content-ID`."""
        found = []
        for part in _parts(request.headers.get("content-type", ""), request.body):
            head, _, body = part.body.replace(b"\r\n", b"\n").partition(b"\n\n")
            line, _, headers = head.decode().strip().partition("\n")
            method, target, *_ = (*line.split(" "), "")
            # Clients also send whole addresses, of which the reference says that what they do is undefined.
            address = urlsplit(target)
            shared = {name: value for name, value in request.headers.items() if name == "authorization"}
            own = BytesParser().parsebytes(headers.encode() + b"\n\n")
            target = address.path + (f"?{address.query}" if address.query else "")
            found.append((part.identity, Request.parse(method, target, shared | dict(own.items()), body)))
        return found

    def _batch(self, request: Request) -> Answer:
        """/batch; each part is applied for itself, in their order."""
        parts = self.parts(request)
        if not 1 <= len(parts) <= BATCHED:
            raise Refused("invalid", f"A batch holds at most {BATCHED} calls.")
        lines = []
        for identity, part in parts:
            if route(part) in IN_NO_BATCH:
                answer = _json(Refused("invalid", "Not supported in a batch.").body, 400)
            else:
                answer = self.part(part)
            named = f"Content-ID: <response-{identity.strip('<>')}>\r\n" if identity else ""
            headers = answer.headers | {"Content-Length": str(len(answer.body))}
            lines.append(
                f"--batch_parts\r\nContent-Type: application/http\r\n{named}\r\n"
                f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}\r\n"
                + "".join(f"{name}: {value}\r\n" for name, value in headers.items())
                + f"\r\n{answer.body.decode()}\r\n"
            )
        body = "".join(lines) + "--batch_parts--\r\n"
        return Answer(200, {"Content-Type": 'multipart/mixed; boundary="batch_parts"'}, body.encode())


def resource(found: Object) -> Json:
    """An object as the API shows it: /json_api/v1/objects#resource"""
    place = f"{found.bucket}/{found.name}/{found.generation}"
    shown: Json = {
        "kind": "storage#object",
        "id": place,
        "bucket": found.bucket,
        "name": found.name,
        "generation": str(found.generation),
        "metageneration": str(found.metageneration),
        "size": str(len(found.data)),
        "crc32c": found.content.crc32c,
        "etag": found.etag,
        "storageClass": "STANDARD",
        "timeCreated": _time(found.created),
        "timeFinalized": _time(found.created),
        "updated": _time(found.updated),
        "contentType": found.content_type,
        **found.properties,
    }
    if found.components:
        return shown | {"componentCount": found.components}
    shown["md5Hash"] = found.content.md5
    return shown | ({} if found.deleted is None else {"timeDeleted": _time(found.deleted)})


def failure(reason: str, status: int, headers: dict[str, str]) -> Answer:
    """An error that no request deserves, such as 500 and 503."""
    answer = _json(Refused(reason, status=status).body, status)
    answer.headers |= headers
    return answer


def _resource(found: Object) -> Answer:
    answer = _json(resource(found))
    answer.headers["ETag"] = found.etag
    return answer


def _shown(bucket: Bucket) -> Json:
    """A bucket as the API shows it: /json_api/v1/buckets#resource"""
    return {
        "kind": "storage#bucket",
        "id": bucket.name,
        "name": bucket.name,
        "metageneration": str(bucket.metageneration),
        "location": "EU",
        "locationType": "multi-region",
        "storageClass": "STANDARD",
        "timeCreated": _time(bucket.created),
        "versioning": {"enabled": bucket.versioned},
        "hierarchicalNamespace": {"enabled": False},
    }


def _json(value: Json, status: int = 200) -> Answer:
    return Answer(status, {"Content-Type": "application/json; charset=UTF-8"}, json.dumps(value).encode())


def _time(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _token(text: str) -> str:
    try:
        return urlsafe_b64decode(text).decode()
    except ValueError:
        raise Refused("invalid", "Invalid page token.") from None


def _hashes(request: Request) -> Json:
    """What `X-Goog-Hash` says of the whole object."""
    names = {"crc32c": "crc32c", "md5": "md5Hash"}
    pairs = [pair.strip().partition("=") for pair in request.headers.get("x-goog-hash", "").split(",")]
    return {names[name]: value for name, _, value in pairs if name in names}


@dataclass(frozen=True, slots=True)
class _Part:
    kind: str
    identity: str
    body: bytes


def _parts(kind: str, body: bytes, wanted: int | None = None) -> list[_Part]:
    """The parts of a multipart body, whose bytes are left as they are."""
    message = Message()
    message["Content-Type"] = kind
    boundary = str(message.get_param("boundary", "") or "").encode()
    found = []
    # Each boundary is at a line's start, and takes the line's end before it.
    for piece in (
        re.split(rb"(?:^|\r?\n)--" + re.escape(boundary) + rb"(?=--|[ \t]*\r?\n)", body)[1:] if boundary else []
    ):
        if piece.startswith(b"--"):
            break
        match = re.match(rb"[ \t]*\r?\n(.*?\r?\n)?\r?\n", piece, re.DOTALL)
        if match is None:
            raise Refused("invalid", "Malformed multipart body.")
        headers = BytesParser().parsebytes(match[1] or b"")
        kind = headers.get("Content-Type", "application/octet-stream")
        found.append(_Part(kind, headers.get("Content-ID", ""), piece[match.end() :]))
    if wanted is not None and len(found) != wanted:
        raise Refused("invalid", "Malformed multipart body.")
    return found
