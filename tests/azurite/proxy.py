"""A proxy before Azurite: as the one before a server of S3, with the operations and the refusals of Blob Storage."""

from __future__ import annotations

from email.utils import formatdate, parsedate_to_datetime
from urllib.parse import parse_qsl, unquote

from aiohttp import web
from multidict import CIMultiDict
from s3.faults import Kind
from s3.operations import Asked
from s3.proxy import CHUNK, Answer, Request, S3Proxy, kept

# By the method and the value of `comp`.
_OF_BLOBS = {
    ("GET", "blocklist"): "GetBlockList",
    ("GET", ""): "GetBlob",
    ("HEAD", ""): "GetBlobProperties",
    ("PUT", "block"): "PutBlock",
    ("PUT", "blocklist"): "PutBlockList",
    ("PUT", "metadata"): "SetBlobMetadata",
    ("PUT", ""): "PutBlob",
    ("DELETE", ""): "DeleteBlob",
}
_OF_CONTAINERS = {("GET", "list"): "ListBlobs", ("POST", "batch"): "Batch", ("PUT", ""): "CreateContainer"}
_REFUSALS: dict[Kind, tuple[int, str]] = {
    "slow_down": (503, "ServerBusy"),
    "internal": (500, "InternalError"),
    "internal_applied": (500, "InternalError"),
}


class BlobProxy(S3Proxy):
    """A proxy before Azurite; see `S3Proxy`.

    Attributes:
        ahead: Seconds by which the service's clock is ahead, as it tells it.
    """

    streamed = ("GetBlob",)
    ahead = 0

    async def _parsed(self, raw: web.BaseRequest) -> Request:
        target, headers = raw.raw_path, kept(raw.headers)
        path, _, search = target.partition("?")
        _, _, rest = path.lstrip("/").partition("/")
        container, _, blob = map(unquote, rest.partition("/"))
        query = dict(parse_qsl(search, keep_blank_values=True))
        kinds = _OF_BLOBS if blob else _OF_CONTAINERS
        operation = kinds.get((raw.method, query.get("comp", "")), raw.method)
        if operation == "PutBlob" and "x-ms-copy-source" in headers:
            operation = "CopyBlob"
        small = (raw.content_length or 0) <= CHUNK and "Transfer-Encoding" not in raw.headers
        body = await raw.content.read() if small else None
        what = Asked(operation, container, blob, query)
        return Request(raw.method, target, headers, what, (blob,) if blob else (), body)

    def _refused(self, kind: Kind, request: Request) -> Answer:
        status, code = _REFUSALS[kind]
        headers = CIMultiDict({"Content-Type": "application/xml", "x-ms-error-code": code})
        body = f'<?xml version="1.0" encoding="utf-8"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'
        return Answer(status, "", headers, b"" if request.method == "HEAD" else body.encode())

    async def _answered(self, raw: web.BaseRequest, answer: Answer, head: bool = False) -> web.StreamResponse:
        if self.ahead and "Date" in answer.headers:
            told = parsedate_to_datetime(answer.headers["Date"]).timestamp() + self.ahead
            answer.headers["Date"] = formatdate(told, usegmt=True)
        return await super()._answered(raw, answer, head)
