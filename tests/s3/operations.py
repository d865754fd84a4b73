"""What a request of S3 asks for, by its method, its path and its query."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote
from xml.etree import ElementTree

# By the method, and what of the query or the headers is there; the first that fits.
_OF_KEYS = [
    ("GET", "uploadId", "ListParts"),
    ("GET", "tagging", "GetObjectTagging"),
    ("GET", "attributes", "GetObjectAttributes"),
    ("GET", "", "GetObject"),
    ("HEAD", "", "HeadObject"),
    ("PUT", "tagging", "PutObjectTagging"),
    ("PUT", "renameObject", "RenameObject"),
    ("PUT", "uploadId x-amz-copy-source", "UploadPartCopy"),
    ("PUT", "uploadId", "UploadPart"),
    ("PUT", "x-amz-copy-source", "CopyObject"),
    ("PUT", "", "PutObject"),
    ("POST", "uploads", "CreateMultipartUpload"),
    ("POST", "uploadId", "CompleteMultipartUpload"),
    ("DELETE", "uploadId", "AbortMultipartUpload"),
    ("DELETE", "tagging", "DeleteObjectTagging"),
    ("DELETE", "", "DeleteObject"),
]
_OF_BUCKETS = [
    ("GET", "uploads", "ListMultipartUploads"),
    ("GET", "versions", "ListObjectVersions"),
    ("GET", "versioning", "GetBucketVersioning"),
    ("GET", "location", "GetBucketLocation"),
    ("GET", "lifecycle", "GetBucketLifecycleConfiguration"),
    ("GET", "list-type", "ListObjectsV2"),
    ("GET", "", "ListObjects"),
    ("HEAD", "", "HeadBucket"),
    ("PUT", "versioning", "PutBucketVersioning"),
    ("PUT", "lifecycle", "PutBucketLifecycleConfiguration"),
    ("PUT", "", "CreateBucket"),
    ("POST", "delete", "DeleteObjects"),
    ("DELETE", "", "DeleteBucket"),
]


@dataclass(frozen=True, slots=True)
class Asked:
    """What a request asks for."""

    operation: str
    bucket: str
    key: str
    query: Mapping[str, str]


def asked(method: str, target: str, headers: Mapping[str, str]) -> Asked:
    """What a request asks for, from its raw target; header names are in lower case."""
    path, _, search = target.partition("?")
    bucket, _, key = path.lstrip("/").partition("/")
    query = dict(parse_qsl(search, keep_blank_values=True))
    names = query.keys() | headers.keys()
    for verb, there, operation in _OF_KEYS if key else _OF_BUCKETS:
        if verb == method and names.issuperset(there.split()):
            return Asked(operation if bucket else "ListBuckets", unquote(bucket), unquote(key), query)
    return Asked(method, unquote(bucket), unquote(key), query)


def document(body: bytes) -> ElementTree.Element:
    """A document, without the namespaces of its names."""
    root = ElementTree.fromstring(body)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    return root


def texts(body: bytes, name: str) -> list[str]:
    """The texts of a document's elements of a name."""
    return [element.text or "" for element in document(body).iter(name)]
