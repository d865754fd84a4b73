"""What the two endpoints answer over one namespace: verbs, headers, bodies and errors, by API version; no sockets."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate, parsedate_to_datetime
from time import gmtime, strftime
from typing import Literal
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from . import leases
from .errors import ERRORS, ON_BLOB, Refused
from .namespace import Conditions, Directory, File, Namespace, Node, kind, md5, segments
from .onelake import OneLake

# The first version that does so, of those that were recorded; where between two recordings it began is not known.
TYPE_OF_EXISTING = "2023-08-03"
SPACE_IN_JSON_TYPE = "2021-06-08"
ENCRYPTED_ON_CREATE = "2020-02-10"
NOT_ENCRYPTED_ON_FLUSH = "2020-02-10"
NO_304_ON_FLUSH = "2023-01-03"
ETAG_ON_RENAME = "2023-01-03"
DELETE_TYPE = "2021-04-10"
OWNER_ON_HEAD = "2021-04-10"
ACL_ON_HEAD = "2024-08-04"
EXPIRY_IN_LIST = "2023-01-03"
NEWEST = "2026-06-06"

Endpoint = Literal["dfs", "blob"]


@dataclass(frozen=True, slots=True)
class Request:
    """A request as it came; header names are in lower case, but `metadata` keeps theirs."""

    method: str
    filesystem: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    metadata: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def version(self) -> str:
        return self.headers.get("x-ms-version", NEWEST)

    @property
    def place(self) -> tuple[str, str]:
        return self.filesystem, self.path

    @property
    def auth(self) -> str:
        """What kind of credential it carries, not which."""
        return "sas" if "sig" in self.query else self.headers.get("authorization", "").partition(" ")[0]


@dataclass(slots=True)
class Answer:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    code: str = ""
    chunked: bool = False

    @property
    def reason(self) -> str | None:
        return ERRORS[self.code][1] if self.code else None


def route(request: Request) -> tuple[str, Endpoint]:
    """The verb, and the endpoint that it belongs to: told by what is asked, since both have one address here.

    A host such as `account.blob.core.windows.net` decides where a request is the same on both.
    """
    query, headers, method = request.query, request.headers, request.method
    blob_host, dfs_host = ".blob." in headers.get("host", ""), ".dfs." in headers.get("host", "")
    comp, restype, action = query.get("comp"), query.get("restype"), query.get("action")
    if restype == "account" and comp == "properties":
        return "account", "blob"
    if not request.filesystem:
        return ("list_filesystems", "blob") if comp == "list" and method == "GET" else ("unknown", "blob")
    if restype == "container" or query.get("resource") == "filesystem":
        at: Endpoint = "blob" if restype else "dfs"
        if method == "GET" and at == "dfs":
            return "list", at
        if method == "GET" and comp == "list":
            return "list_blobs", at
        verbs = {"PUT": "create_filesystem", "DELETE": "delete_filesystem"}
        if comp is None and method in ("PUT", "DELETE", "GET", "HEAD"):
            return verbs.get(method, "filesystem_properties"), at
        return "unknown", at
    if method == "PATCH":
        known = {
            "append": "append",
            "flush": "flush",
            "setAccessControl": "set_access",
            "setAccessControlRecursive": "set_access_recursive",
        }
        return known.get(action or "", "unknown"), "dfs"
    if method == "POST":
        return ("lease", "dfs") if "x-ms-lease-action" in headers else ("unknown", "dfs")
    if method == "PUT" and comp is not None:
        known = {"lease": "lease", "metadata": "set_metadata", "block": "put_block", "blocklist": "put_block_list"}
        known |= {"expiry": "set_expiry", "undelete": "undelete"}
        return known.get(comp, "unknown"), "blob"
    if method == "PUT":
        if "x-ms-rename-source" in headers:
            return "rename", "dfs"
        if "resource" in query:
            return "create", "dfs"
        if "x-ms-copy-source" in headers:
            return "copy_blob", "blob"
        return ("put_blob", "blob") if "x-ms-blob-type" in headers else ("unknown", "dfs")
    if method == "DELETE":
        # Without a parameter it is the same on both; Data Lake clients delete files so.
        return ("delete_blob", "blob") if blob_host or "x-ms-delete-snapshots" in headers else ("delete", "dfs")
    if method == "HEAD":
        if action == "getAccessControl":
            return "get_access", "dfs"
        return ("status", "dfs") if dfs_host or action == "getStatus" else ("head", "blob")
    if method == "GET" and comp is None:
        return "read", "dfs" if dfs_host else "blob"
    return "unknown", "blob"


class Service:
    """Answers requests.

    Args:
        conditions: Whether conditions and what they ask are looked at; a service that ignores them overwrites.
        token: The one bearer token that is accepted; any, and none, by default.
        anonymous: Whether a request without a credential is let in.
        rejects: Query parameters for which a request is refused.
        denied: Verbs that the caller may not use.
        hierarchical: Whether the account has a hierarchical namespace; without one only that much is answered.
    """

    def __init__(
        self,
        namespace: Namespace,
        *,
        onelake: OneLake | None = None,
        conditions: bool = True,
        token: str | None = None,
        anonymous: bool = True,
        rejects: frozenset[str] = frozenset(),
        denied: Collection[str] = (),
        hierarchical: bool = True,
    ) -> None:
        self.namespace = namespace
        self.onelake = onelake
        self.conditions = conditions
        self.token = token
        self.anonymous = anonymous
        self.rejects = rejects
        self.denied = frozenset(denied)
        self.hierarchical = hierarchical

    def answer(self, request: Request) -> Answer:
        """Apply a request, whole or not at all."""
        verb, endpoint = route(request)
        rejected: list[str] = []
        try:
            self._authenticate(request)
            if verb in self.denied:
                raise Refused("AuthorizationPermissionMismatch")  # documented
            if self.rejects & set(request.query):
                raise Refused("UnsupportedQueryParameter")
            if self.onelake is not None:
                request, rejected = self.onelake.admit(verb, request)
            answer: Answer = getattr(self, f"_{verb}")(request, endpoint)
        except Refused as refused:
            answer = self._refusal(refused, request, endpoint)
        answer = self._dressed(answer, request, endpoint)
        if self.onelake is not None and "x-ms-permissions" in answer.headers:
            answer.headers["x-ms-permissions"] = "---------"  # documented
        if rejected:
            answer.headers["x-ms-rejected-headers"] = ",".join(rejected)
        return answer

    def failure(self, request: Request, code: str, extra: dict[str, str] | None = None) -> Answer:
        """An error that no request deserves, such as 500 and 503."""
        endpoint = route(request)[1]
        return self._dressed(self._refusal(Refused(code, extra=extra), request, endpoint), request, endpoint)

    def _dressed(self, answer: Answer, request: Request, endpoint: Endpoint) -> Answer:
        """An answer with what every answer has."""
        answer.headers["x-ms-request-id"] = str(uuid.uuid4())
        if answer.status == 401:  # which comes from before the storage service (recorded)
            answer.headers["Server"] = "Microsoft-HTTPAPI/2.0"
        else:
            server = "Windows-Azure-HDFS" if endpoint == "dfs" else "Windows-Azure-Blob"
            answer.headers |= {"Server": f"{server}/1.0 Microsoft-HTTPAPI/2.0", "x-ms-version": request.version}
        if "x-ms-client-request-id" in request.headers:
            answer.headers["x-ms-client-request-id"] = request.headers["x-ms-client-request-id"]
        return answer

    def _authenticate(self, request: Request) -> None:
        given = request.headers.get("authorization")
        if self.token is not None and given != f"Bearer {self.token}":
            where = "https://login.microsoftonline.com/00000000-0000-0000-0000-000000000000/oauth2/authorize"
            challenge = f"Bearer authorization_uri={where} resource_id=https://storage.azure.com"
            raise Refused("InvalidAuthenticationInfo", extra={"WWW-Authenticate": challenge})
        if not self.anonymous and not request.auth:
            raise Refused("NoAuthenticationInformation")  # never recorded; documented

    def _refusal(self, refused: Refused, request: Request, endpoint: Endpoint) -> Answer:
        code = ON_BLOB.get(refused.code, refused.code) if endpoint == "blob" else refused.code
        status, message = ERRORS[code]
        status = refused.status or status
        headers = {"x-ms-error-code": code} | refused.extra
        if request.version < TYPE_OF_EXISTING or endpoint == "blob":
            headers.pop("x-ms-existing-resource-type", None)
        if status == 304:
            return Answer(304, headers | ({"Content-Length": "0"} if endpoint == "blob" else {}), code=code)
        if request.method == "HEAD":
            return Answer(status, headers, code=code, chunked=True)
        utc = strftime("%Y-%m-%dT%H:%M:%S", gmtime(self.namespace.now()))
        message += f"\nRequestId:{uuid.uuid4()}\nTime:{utc}.0000000Z"
        if endpoint == "dfs":
            error: dict[str, object] = {"code": code, "message": message}
            if refused.header is not None:
                error["detail"] = dict(zip(("HeaderName", "HeaderValue"), refused.header, strict=True))
            body = json.dumps({"error": error}, separators=(",", ":")).encode()
            headers["Content-Type"] = _json_type(request)
        else:
            detail = zip(("HeaderName", "HeaderValue"), refused.header or (), strict=False)
            inner = "".join(f"<{tag}>{escape(text)}</{tag}>" for tag, text in detail)
            body = _xml(f"<Error><Code>{code}</Code><Message>{escape(message)}</Message>{inner}</Error>")
            headers["Content-Type"] = "application/xml"
        return Answer(status, headers, body, code)

    def _conditions(self, request: Request, prefix: str = "", lease: str = "x-ms-lease-id") -> Conditions:
        def header(name: str) -> str | None:
            return request.headers.get(prefix + name) or None

        held = request.headers.get(lease) or None  # an empty one is ignored (recorded)
        if not self.conditions:
            return Conditions(lease=held)
        return Conditions(
            header("if-match"),
            header("if-none-match"),
            _time(header("if-modified-since")),
            _time(header("if-unmodified-since")),
            held,
        )

    # File systems

    def _unknown(self, request: Request, endpoint: Endpoint) -> Answer:
        raise Refused("UnsupportedHttpVerb")

    def _account(self, request: Request, endpoint: Endpoint) -> Answer:
        # never recorded; documented (Blob service, Get Account Information)
        kind = {"x-ms-sku-name": "Standard_LRS", "x-ms-account-kind": "StorageV2"}
        return Answer(200, kind | {"x-ms-is-hns-enabled": str(self.hierarchical).lower()})

    def _create_filesystem(self, request: Request, endpoint: Endpoint) -> Answer:
        # never recorded through dfs: every client uses blob; so for the next two
        made = self.namespace.create_filesystem(request.filesystem, dict(request.metadata))
        return Answer(201, _changed(made.etag, made.modified))

    def _delete_filesystem(self, request: Request, endpoint: Endpoint) -> Answer:
        self.namespace.delete_filesystem(request.filesystem)
        return Answer(202)

    def _filesystem_properties(self, request: Request, endpoint: Endpoint) -> Answer:
        found = self.namespace.filesystem(request.filesystem)
        headers = _changed(found.etag, found.modified) | {
            "x-ms-lease-state": "available",
            "x-ms-lease-status": "unlocked",
            "x-ms-has-immutability-policy": "false",
            "x-ms-has-legal-hold": "false",
            "x-ms-default-encryption-scope": "$account-encryption-key",
            "x-ms-deny-encryption-scope-override": "false",
            "x-ms-namespace-enabled": "true",
        }
        return Answer(200, headers | _meta(found.metadata))

    def _list_filesystems(self, request: Request, endpoint: Endpoint) -> Answer:
        items = "".join(
            f"<Container><Name>{escape(name)}</Name><Properties>"
            f'<Last-Modified>{_date(found.modified)}</Last-Modified><Etag>"{found.etag}"</Etag>'
            "<LeaseStatus>unlocked</LeaseStatus><LeaseState>available</LeaseState>"
            "<DefaultEncryptionScope>$account-encryption-key</DefaultEncryptionScope>"
            "<DenyEncryptionScopeOverride>false</DenyEncryptionScopeOverride>"
            "<HasImmutabilityPolicy>false</HasImmutabilityPolicy><HasLegalHold>false</HasLegalHold>"
            "<ImmutableStorageWithVersioningEnabled>false</ImmutableStorageWithVersioningEnabled>"
            "</Properties></Container>"
            for name, found in sorted(self.namespace.filesystems.items())
            if name.startswith(request.query.get("prefix", ""))
        )
        return _xml_answer(f'<EnumerationResults ServiceEndpoint="/"><Containers>{items}</Containers><NextMarker />')

    # Paths, on dfs

    def _create(self, request: Request, endpoint: Endpoint) -> Answer:
        resource = request.query["resource"]
        if resource not in ("file", "directory"):
            raise Refused("InvalidQueryParameterValue")
        made = self.namespace.create(
            *request.place,
            directory=resource == "directory",
            metadata=_properties(request),
            conditions=self._conditions(request),
        )
        _content_type(made, request, "x-ms-content-type")
        encrypted = {"x-ms-request-server-encrypted": "true"} if request.version >= ENCRYPTED_ON_CREATE else {}
        return Answer(201, _changed(made.etag, made.modified) | encrypted)

    def _rename(self, request: Request, endpoint: Endpoint) -> Answer:
        source = _source(request.headers["x-ms-rename-source"])
        if request.auth == "sas" and "sig=" not in request.headers["x-ms-rename-source"]:
            raise Refused("AuthorizationPermissionMismatch")  # never recorded; reported of a source that is not signed
        mode = request.query.get("mode", "posix")
        if mode not in ("legacy", "posix"):
            raise Refused("InvalidQueryParameterValue")
        token = request.query.get("continuation", "")
        # never recorded: a rename in more than one request; nothing moves before the last one
        if more := self.namespace.more(*source, token):
            return Answer(201, {"x-ms-continuation": more})
        node = self.namespace.rename(
            source,
            request.place,
            legacy=mode == "legacy",
            conditions=self._conditions(request),
            source_conditions=self._conditions(request, "x-ms-source-", "x-ms-source-lease-id"),
        )
        return Answer(201, _changed(node.etag, node.modified) if request.version >= ETAG_ON_RENAME else {})

    def _append(self, request: Request, endpoint: Endpoint) -> Answer:
        file = self.namespace.file(*request.place)
        headers = {"x-ms-request-server-encrypted": "true"}
        conditions, position = self._conditions(request), _number(request, "position")
        action = request.headers.get("x-ms-lease-action", "")
        if action.startswith("acquire"):
            lease = self._acquired(file, request)
            self.namespace.append(*request.place, position, request.body, Conditions(lease=conditions.lease))
            file.lease = lease
        else:
            self.namespace.append(*request.place, position, request.body, conditions)
        if action == "auto-renew" and file.lease is not None:
            now = self.namespace.now()
            # never recorded: when it is renewed; only that right after its acquisition it is not
            due = file.lease.until - now < file.lease.seconds / 2
            file.lease = leases.renew(file.lease, conditions.lease, now) if due else file.lease
            headers["x-ms-lease-renewed"] = str(due).lower()
        if request.query.get("flush") == "true":
            held = file.lease.id if file.lease is not None and action else conditions.lease
            self.namespace.flush(*request.place, position + len(request.body), conditions=Conditions(lease=held))
            headers |= _changed(file.etag, file.modified)
            if action in ("release", "acquire-release"):
                file.lease = None
        return Answer(202, headers)

    def _flush(self, request: Request, endpoint: Endpoint) -> Answer:
        try:
            file = self.namespace.flush(
                *request.place,
                _number(request, "position"),
                retain=request.query.get("retainUncommittedData") == "true",
                conditions=self._conditions(request),
            )
        except Refused as refused:
            star = refused.code == "ConditionNotMet" and request.headers.get("if-none-match") == "*"
            if star and request.version < NO_304_ON_FLUSH:
                raise Refused("ConditionNotMet", status=304) from None
            raise
        _content_type(file, request, "x-ms-content-type")
        if request.headers.get("x-ms-lease-action") == "release":
            file.lease = None  # never recorded
        encrypted = "false" if request.version >= NOT_ENCRYPTED_ON_FLUSH else "true"  # "false" it is (recorded)
        return Answer(200, _changed(file.etag, file.modified) | {"x-ms-request-server-encrypted": encrypted})

    def _delete(self, request: Request, endpoint: Endpoint) -> Answer:
        paginated, recursive = request.query.get("paginated") == "true", request.query.get("recursive") == "true"
        token = request.query.get("continuation", "")
        # never recorded: a token; the specification says that the next request goes on, and here the last one deletes
        if recursive and (paginated or token) and (more := self.namespace.more(*request.place, token)):
            return Answer(200, {"x-ms-continuation": more})
        conditions = self._conditions(request)
        deletion = self.namespace.delete(*request.place, recursive=recursive, conditions=conditions)
        headers = {"x-ms-continuation": ""} if paginated else {}
        if request.version >= DELETE_TYPE:
            headers["x-ms-delete-type-permanent"] = str(deletion is None).lower()
            headers |= {"x-ms-deletion-id": deletion} if deletion is not None else {}
        return Answer(200, headers)

    def _list(self, request: Request, endpoint: Endpoint) -> Answer:
        if "recursive" not in request.query:
            raise Refused("MissingRequiredQueryParameter")  # never recorded; the specification requires it
        limit = _number(request, "maxResults", 5000)
        if limit < 1:
            raise Refused("OutOfRangeQueryParameterValue")  # never recorded; documented
        found, token = self.namespace.listing(
            request.filesystem,
            request.query.get("directory", ""),
            recursive=request.query["recursive"] == "true",
            limit=min(limit, 5000),
            token=request.query.get("continuation", ""),
        )
        entries = [_entry(path, node, request) for path, node in found]
        body = json.dumps({"paths": entries}, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
        headers = {"Content-Type": _json_type(request)} | ({"x-ms-continuation": token} if token else {})
        return Answer(200, headers, body, chunked=True)

    def _status(self, request: Request, endpoint: Endpoint) -> Answer:
        node = self.namespace.find(*request.place)
        self._reading(node, request)
        headers = (
            _changed(node.etag, node.modified)
            | _access(node, request)
            | {
                "x-ms-creation-time": _date(node.created),
                "x-ms-server-encrypted": "true",
                "Content-Length": str(len(node.data) if isinstance(node, File) else 0),
            }
        )
        if "action" not in request.query:
            # never recorded: HEAD on dfs without an action, which the specification calls all properties
            values = {name: base64.b64encode(value.encode()).decode() for name, value in node.metadata.items()}
            headers["x-ms-properties"] = ",".join(f"{name}={value}" for name, value in values.items())
            headers |= self._lease_headers(node)
        return Answer(200, headers)

    def _get_access(self, request: Request, endpoint: Endpoint) -> Answer:
        if not self.hierarchical:
            # the code was never recorded; Hadoop's client takes 400 for the answer of a flat namespace
            raise Refused("InvalidQueryParameterValue")
        node = self.namespace.find(*request.place)
        self._reading(node, request)
        access = {"x-ms-owner": node.owner, "x-ms-group": node.group, "x-ms-permissions": node.permissions}
        return Answer(200, _changed(node.etag, node.modified) | access | {"x-ms-acl": node.acl})

    def _set_access(self, request: Request, endpoint: Endpoint) -> Answer:
        node = self.namespace.find(*request.place)
        self._conditions(request).check(node)
        node.owner = request.headers.get("x-ms-owner", node.owner)
        node.group = request.headers.get("x-ms-group", node.group)
        node.acl = request.headers.get("x-ms-acl", node.acl)
        return Answer(200, _changed(node.etag, node.modified) | {"x-ms-namespace-enabled": "true"})

    def _set_access_recursive(self, request: Request, endpoint: Endpoint) -> Answer:
        limit, token = _number(request, "maxRecords", 2000), request.query.get("continuation", "")
        nodes = [] if token else [self.namespace.find(*request.place)]
        found, more = self.namespace.listing(*request.place, recursive=True, limit=limit - len(nodes), token=token)
        nodes += [node for _, node in found]
        for node in nodes:
            node.acl = request.headers.get("x-ms-acl", node.acl)
        directories = sum(isinstance(node, Directory) for node in nodes)
        counts: dict[str, object] = {"directoriesSuccessful": directories, "failedEntries": [], "failureCount": 0}
        body = json.dumps(counts | {"filesSuccessful": len(nodes) - directories}, separators=(",", ":")).encode()
        headers = {"x-ms-namespace-enabled": "true"} | ({"x-ms-continuation": more} if more else {})
        return Answer(200, headers | {"Content-Type": _json_type(request)}, body + b"\n", chunked=True)

    # Leases, on both

    def _lease(self, request: Request, endpoint: Endpoint) -> Answer:
        node, now = self.namespace.find(*request.place), self.namespace.now()
        self._conditions(request).check(node)
        action, given = request.headers.get("x-ms-lease-action"), request.headers.get("x-ms-lease-id")
        status, headers = 200, _changed(node.etag, node.modified)
        if action == "acquire":
            node.lease, status = self._acquired(node, request), 201
        elif action == "renew":
            node.lease = leases.renew(node.lease, given, now)
        elif action == "change":
            node.lease = leases.change(node.lease, given, request.headers.get("x-ms-proposed-lease-id", ""), now)
        elif action == "release":
            leases.held(node.lease, given)
            node.lease = None
        elif action == "break":
            period = request.headers.get("x-ms-lease-break-period")
            node.lease, left = leases.broken(node.lease, int(period) if period is not None else None, now)
            return Answer(202, headers | {"x-ms-lease-time": str(left)})
        else:
            raise Refused("InvalidHeaderValue", header=("x-ms-lease-action", action or ""))
        return Answer(status, headers | ({"x-ms-lease-id": node.lease.id} if node.lease is not None else {}))

    def _acquired(self, node: Node, request: Request) -> leases.Lease:
        seconds = leases.duration(request.headers.get("x-ms-lease-duration"))
        proposed = request.headers.get("x-ms-proposed-lease-id") or str(uuid.uuid4())
        return leases.acquire(node.lease, proposed, seconds, self.namespace.now())

    def _lease_headers(self, node: Node) -> dict[str, str]:
        state = leases.state_of(node.lease, self.namespace.now())
        status = "locked" if state in ("leased", "breaking") else "unlocked"
        headers = {"x-ms-lease-state": state, "x-ms-lease-status": status}
        if state == "leased" and node.lease is not None:
            headers["x-ms-lease-duration"] = "infinite" if node.lease.seconds == leases.FOREVER else "fixed"
        return headers

    # Paths, on blob

    def _reading(self, node: Node, request: Request) -> None:
        """Let a read through; what has not changed is 304."""
        conditions = self._conditions(request)
        try:
            conditions.check(node)
        except Refused:
            unchanged = conditions.match is None and conditions.unmodified_since is None
            raise Refused("ConditionNotMet", status=304 if unchanged else None) from None
        leases.admit(node.lease, conditions.lease, self.namespace.now(), reading=True)

    def _blob_headers(self, node: Node, request: Request) -> dict[str, str]:
        marker = {"hdi_isfolder": "true"} if isinstance(node, Directory) else {}
        return {
            **_changed(node.etag, node.modified),
            **_access(node, request),
            **self._lease_headers(node),
            **_meta(node.metadata | marker),
            "Accept-Ranges": "bytes",
            "Content-Type": node.content_type if isinstance(node, File) else "application/octet-stream",
            "x-ms-blob-type": "BlockBlob",
            "x-ms-creation-time": _date(node.created),
            "x-ms-server-encrypted": "true",
            "x-ms-access-tier": "Hot",
            "x-ms-access-tier-inferred": "true",
        }

    def _head(self, request: Request, endpoint: Endpoint) -> Answer:
        node = self.namespace.find(*request.place)
        self._reading(node, request)
        size = str(len(node.data) if isinstance(node, File) else 0)
        return Answer(200, self._blob_headers(node, request) | {"Content-Length": size})

    def _read(self, request: Request, endpoint: Endpoint) -> Answer:
        node = self.namespace.find(*request.place)
        self._reading(node, request)
        if not isinstance(node, File):
            raise Refused("OperationNotSupportedOnDirectory")  # never recorded
        headers, size = self._blob_headers(node, request), len(node.data)
        wanted = request.headers.get("x-ms-range", request.headers.get("range", ""))
        if not wanted.startswith("bytes="):
            return Answer(200, headers, node.data)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last or size), size - 1)
        if start >= size:  # never recorded for an empty file
            raise Refused("InvalidRange", extra={"Content-Range": f"bytes */{size}"})
        return Answer(206, headers | {"Content-Range": f"bytes {start}-{end}/{size}"}, node.data[start : end + 1])

    def _set_metadata(self, request: Request, endpoint: Endpoint) -> Answer:
        conditions = self._conditions(request)
        node = self.namespace.set_metadata(*request.place, dict(request.metadata), conditions)
        return Answer(200, _changed(node.etag, node.modified) | {"x-ms-request-server-encrypted": "true"})

    def _put_blob(self, request: Request, endpoint: Endpoint) -> Answer:
        if request.headers["x-ms-blob-type"] != "BlockBlob":
            raise Refused("BlobOperationNotSupported")
        made = self.namespace.create(
            *request.place,
            request.body,
            by_blob=True,
            metadata=dict(request.metadata),
            conditions=self._conditions(request),
        )
        _content_type(made, request, "x-ms-blob-content-type")
        written = {"Content-MD5": md5(request.body), "x-ms-request-server-encrypted": "true"}
        return Answer(201, _changed(made.etag, made.modified) | written)

    def _copy_blob(self, request: Request, endpoint: Endpoint) -> Answer:
        # never recorded: on a hierarchical account; as the specification says, and done at once
        filesystem, _, path = unquote(urlsplit(request.headers["x-ms-copy-source"]).path).strip("/").partition("/")
        data = self.namespace.read(filesystem, path)
        made = self.namespace.create(*request.place, data, by_blob=True, conditions=self._conditions(request))
        copied = {"x-ms-copy-id": str(uuid.uuid4()), "x-ms-copy-status": "success"}
        return Answer(202, _changed(made.etag, made.modified) | copied)

    def _put_block(self, request: Request, endpoint: Endpoint) -> Answer:
        self.namespace.put_block(*request.place, request.query["blockid"], request.body)
        return Answer(201, {"Content-MD5": md5(request.body), "x-ms-request-server-encrypted": "true"})

    def _put_block_list(self, request: Request, endpoint: Endpoint) -> Answer:
        made = self.namespace.put_block_list(
            *request.place,
            [block.text or "" for block in ElementTree.fromstring(request.body)],
            metadata=dict(request.metadata),
            conditions=self._conditions(request),
        )
        return Answer(201, _changed(made.etag, made.modified) | {"x-ms-request-server-encrypted": "true"})

    def _delete_blob(self, request: Request, endpoint: Endpoint) -> Answer:
        # never recorded: a directory; reported as refused unless it is empty
        if "x-ms-delete-snapshots" in request.headers and isinstance(self.namespace.get(*request.place), Directory):
            raise Refused("OperationNotSupportedOnDirectory")
        deletion = self.namespace.delete(*request.place, conditions=self._conditions(request))
        return Answer(202, {"x-ms-delete-type-permanent": str(deletion is None).lower()})

    def _set_expiry(self, request: Request, endpoint: Endpoint) -> Answer:
        file, option = self.namespace.file(*request.place), request.headers.get("x-ms-expiry-option")
        value = request.headers.get("x-ms-expiry-time", "")
        if option not in ("Absolute", "NeverExpire"):
            # never recorded: times that are relative
            raise Refused("InvalidHeaderValue", header=("x-ms-expiry-option", option or ""))
        file.expires = _time(value) if option == "Absolute" else None
        return Answer(200, _changed(file.etag, file.modified))

    def _undelete(self, request: Request, endpoint: Endpoint) -> Answer:
        deletion = request.headers.get("x-ms-undelete-source", "").partition("deletionid=")[2]
        node = self.namespace.undelete(*request.place, deletion)
        return Answer(200, {"x-ms-resource-type": kind(node), "x-ms-creation-time": _date(node.created)})

    def _list_blobs(self, request: Request, endpoint: Endpoint) -> Answer:
        # never recorded: the Blob listing of this account type, but for deleted paths
        prefix, token = request.query.get("prefix", ""), ""
        if request.query.get("showonly") == "deleted":
            blobs = [
                f"<Blob><Name>{escape(kept.place[1])}</Name><DeletionId>{deletion}</DeletionId><Deleted>true</Deleted>"
                f"{_xml_properties(kept.node, _deleted(kept.at))}<OrMetadata /></Blob>"
                for deletion, kept in self.namespace.deleted.items()
                if kept.place[0] == request.filesystem and kept.place[1].startswith(prefix)
            ]
        else:
            recursive = "delimiter" not in request.query
            found, token = self.namespace.listing(
                request.filesystem,
                prefix.rpartition("/")[0],
                recursive=recursive,
                limit=min(_number(request, "maxresults", 5000), 5000),
                token=request.query.get("marker", ""),
                prefix=prefix,
            )
            blobs = [
                f"<BlobPrefix><Name>{escape(path)}/</Name></BlobPrefix>"
                if isinstance(node, Directory) and not recursive
                else f"<Blob><Name>{escape(path)}</Name>{_xml_properties(node)}<OrMetadata /></Blob>"
                for path, node in found
            ]
        return _xml_answer(
            f'<EnumerationResults ServiceEndpoint="/" ContainerName="{escape(request.filesystem)}">'
            f"<Prefix>{escape(prefix)}</Prefix><Blobs>{''.join(blobs)}</Blobs><NextMarker>{token}</NextMarker>"
        )


def _date(seconds: float) -> str:
    return formatdate(seconds, usegmt=True)


def _time(text: str | None) -> float | None:
    return parsedate_to_datetime(text).timestamp() if text else None


def _filetime(seconds: float) -> str:
    return str(int((seconds + 11_644_473_600) * 10_000_000))


def _changed(etag: str, modified: float) -> dict[str, str]:
    return {"ETag": f'"{etag}"', "Last-Modified": _date(modified)}


def _meta(metadata: Mapping[str, str]) -> dict[str, str]:
    return {f"x-ms-meta-{name}": value for name, value in metadata.items()}


def _access(node: Node, request: Request) -> dict[str, str]:
    if request.version < OWNER_ON_HEAD:
        return {}
    access = {"x-ms-owner": node.owner, "x-ms-group": node.group, "x-ms-permissions": node.permissions}
    access["x-ms-resource-type"] = kind(node)
    return access | ({"x-ms-acl": node.acl} if request.version >= ACL_ON_HEAD else {})


def _entry(path: str, node: Node, request: Request) -> dict[str, str]:
    """One path of a listing; all values are strings, and files have no isDirectory (recorded)."""
    entry = {
        "contentLength": str(len(node.data) if isinstance(node, File) else 0),
        "creationTime": _filetime(node.created),
        "etag": node.etag,
        "group": node.group,
        "lastModified": _date(node.modified),
        "name": path,
        "owner": node.owner,
        "permissions": node.permissions,
    }
    if request.version >= EXPIRY_IN_LIST:
        entry["expiryTime"] = "0" if node.expires is None else _filetime(node.expires)
    return entry | ({"isDirectory": "true"} if isinstance(node, Directory) else {})


def _content_type(node: Node, request: Request, header: str) -> None:
    if isinstance(node, File):
        node.content_type = request.headers.get(header) or node.content_type


def _properties(request: Request) -> dict[str, str]:
    """The metadata of `name=base64,name=base64`."""
    pairs = [pair.strip().partition("=") for pair in request.headers.get("x-ms-properties", "").split(",")]
    return {name: base64.b64decode(value).decode() for name, _, value in pairs if name}


def _number(request: Request, name: str, default: int | None = None) -> int:
    text = request.query.get(name, "" if default is None else str(default))
    if not text.isdigit():
        raise Refused("InvalidQueryParameterValue" if text else "MissingRequiredQueryParameter")
    return int(text)


def _source(header: str) -> tuple[str, str]:
    """Where a rename comes from; what follows a question mark is its SAS."""
    raw = header.partition("?")[0]
    filesystem, *names = segments(unquote(raw)) or [""]
    if not raw.startswith("/") or not raw.isascii() or " " in raw or not names:
        raise Refused("InvalidSourceUri")  # never recorded; reported for a raw space
    return filesystem, "/".join(names)


def _json_type(request: Request) -> str:
    return f"application/json;{' ' if request.version >= SPACE_IN_JSON_TYPE else ''}charset=utf-8"


def _xml(inner: str) -> bytes:
    return b"\xef\xbb\xbf" + f'<?xml version="1.0" encoding="utf-8"?>{inner}'.encode()


def _xml_answer(inner: str) -> Answer:
    return Answer(200, {"Content-Type": "application/xml"}, _xml(f"{inner}</EnumerationResults>"), chunked=True)


def _deleted(at: float) -> str:
    # Six days are left of seven as soon as the first has begun (recorded).
    return f"<DeletedTime>{_date(at)}</DeletedTime><RemainingRetentionDays>6</RemainingRetentionDays>"


def _xml_properties(node: Node, more: str = "") -> str:
    size = len(node.data) if isinstance(node, File) else 0
    return (
        f"<Properties><Creation-Time>{_date(node.created)}</Creation-Time>"
        f"<Last-Modified>{_date(node.modified)}</Last-Modified><Etag>{node.etag}</Etag>"
        f"<ResourceType>{kind(node)}</ResourceType><Content-Length>{size}</Content-Length>"
        f"<BlobType>BlockBlob</BlobType>{more}</Properties>"
    )
