"""The servers of S3 do as S3 does where `HONOURS` says so, and the proxy before them fails as it is told to."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from botocore.exceptions import ClientError, HTTPClientError
from botocore.exceptions import ConnectionError as NoConnection
from s3 import FAULTS, HONOURS, SERVERS, Fault, Plan, Record, S3Proxy, S3Server, client_of, honours

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

Answer = dict[str, Any]
NEVER = '"00000000000000000000000000000000"'
KEYS = ["..", "a b", "a+b", "dir/", "new\nline", "per%25", "q?x=1", "x&<y>", "ä/ö"]


def said(call: Callable[..., Any], **arguments: Any) -> str:
    """What a call is answered with: "ok", the error's code, or "cut"."""
    try:
        call(**arguments)
    except ClientError as error:
        return error.response["Error"]["Code"]
    except (HTTPClientError, NoConnection):
        return "cut"
    return "ok"


class World:
    """A bucket of a server, and the calls that the promises are made of; each gives what it is answered with."""

    def __init__(self, server: S3Server, client: S3Client, *, versioned: bool = False) -> None:
        self.server, self.client, self.bucket = server, client, server.bucket(versioned=versioned)

    def put(self, key: str = "k", body: bytes = b"", **more: Any) -> str:
        return said(self.client.put_object, Bucket=self.bucket, Key=key, Body=body, **more)

    def tag(self, key: str = "k", body: bytes = b"") -> str:
        """The tag of what is put now."""
        return self.client.put_object(Bucket=self.bucket, Key=key, Body=body)["ETag"]

    def upload(self, key: str = "k", *parts: bytes, **more: Any) -> Answer:
        """An upload that only needs to be completed."""
        upload = self.client.create_multipart_upload(Bucket=self.bucket, Key=key, **more)["UploadId"]
        what: Answer = {"Bucket": self.bucket, "Key": key, "UploadId": upload}
        tags = [
            {"PartNumber": number, "ETag": self.client.upload_part(**what, PartNumber=number, Body=part)["ETag"]}
            for number, part in enumerate(parts or [b"part"], 1)
        ]
        return what | {"MultipartUpload": {"Parts": tags}}

    def complete(self, upload: Answer, **more: Any) -> str:
        return said(self.client.complete_multipart_upload, **upload, **more)

    def abort(self, upload: Answer) -> str:
        return said(self.client.abort_multipart_upload, **without_parts(upload))

    def copy(self, key: str = "copy", source: str = "k", **more: Any) -> str:
        return said(
            self.client.copy_object,
            Bucket=self.bucket,
            Key=key,
            CopySource={"Bucket": self.bucket, "Key": source},
            **more,
        )

    def delete(self, key: str = "k", **more: Any) -> str:
        return said(self.client.delete_object, Bucket=self.bucket, Key=key, **more)

    def head(self, key: str = "k") -> Any:
        return self.client.head_object(Bucket=self.bucket, Key=key)

    def there(self, key: str = "k") -> bool:
        return said(self.client.head_object, Bucket=self.bucket, Key=key) == "ok"

    def uploads(self, **more: Any) -> list[str]:
        found = self.client.list_multipart_uploads(Bucket=self.bucket, **more)
        return [upload["Key"] for upload in found.get("Uploads", [])]

    def versions(self, key: str = "k") -> int:
        return len(self.client.list_object_versions(Bucket=self.bucket, Prefix=key).get("Versions", []))

    def race(self, call: Callable[[S3Client, int], str], racers: int = 8) -> list[str]:
        """What each of many is answered with that do the same at the same time, in order."""
        start = threading.Barrier(racers)

        def run(number: int) -> str:
            start.wait()
            return call(self.client, number)

        with ThreadPoolExecutor(racers) as pool:
            return sorted(pool.map(run, range(racers)))


def without_parts(upload: Answer) -> Answer:
    return {name: value for name, value in upload.items() if name != "MultipartUpload"}


@pytest.fixture
def world(s3_server: S3Server) -> World:
    return World(s3_server, s3_server.client())


Promise = Callable[[World], bool]
PROMISES: dict[str, Promise] = {}
ONE_WINS = ["PreconditionFailed"] * 7 + ["ok"]


def promise(name: str) -> Callable[[Promise], Promise]:
    def kept(check: Promise) -> Promise:
        PROMISES[name] = check
        return check

    return kept


@pytest.mark.parametrize("name", HONOURS)
def test_a_server_keeps_the_promises_that_it_is_said_to_keep_and_no_other(s3_server: S3Server, name: str) -> None:
    versioned = "version" in name or "marker" in name
    world = World(s3_server, s3_server.client(), versioned=versioned)
    if name.startswith("one of many") and not honours(s3_server.kind, name):
        pytest.skip("One may win by chance.")
    assert PROMISES[name](world) == honours(s3_server.kind, name)


def test_every_promise_is_looked_at() -> None:
    assert PROMISES.keys() == HONOURS.keys()


@promise("a put on the condition that nothing is there")
def _(world: World) -> bool:
    return [world.put(IfNoneMatch="*"), world.put(IfNoneMatch="*")] == ["ok", "PreconditionFailed"]


@promise("a put on the condition that an etag is there")
def _(world: World) -> bool:
    tag = world.tag()
    answers = [world.put(body=b"2", IfMatch=tag), world.put(body=b"3", IfMatch=tag), world.put("absent", IfMatch=tag)]
    return answers == ["ok", "PreconditionFailed", "NoSuchKey"]


@promise("one of many puts on one condition wins")
def _(world: World) -> bool:
    def put(body: bytes, **condition: str) -> Callable[[S3Client, int], str]:
        def call(client: S3Client, number: int) -> str:
            return said(client.put_object, Bucket=world.bucket, Key="k", Body=body + b"%d" % number, **condition)

        return call

    first = world.race(put(b"first", IfNoneMatch="*"))
    return [first, world.race(put(b"second", IfMatch=world.head()["ETag"]))] == [ONE_WINS, ONE_WINS]


@promise("one of many completions on one condition wins")
def _(world: World) -> bool:
    uploads = [world.upload() for _ in range(8)]

    def complete(client: S3Client, number: int) -> str:
        return said(client.complete_multipart_upload, **uploads[number], IfNoneMatch="*")

    return world.race(complete) == ONE_WINS


@promise("a put finds nothing behind a delete marker")
def _(world: World) -> bool:
    tag = world.tag()
    world.delete()
    return [world.put(IfMatch=tag), world.put(IfNoneMatch="*")] == ["NoSuchKey", "ok"]


@promise("a completion on the condition that nothing is there")
def _(world: World) -> bool:
    answers = [world.complete(world.upload(), IfNoneMatch="*") for _ in range(2)]
    return answers == ["ok", "PreconditionFailed"]


@promise("a completion on the condition that an etag is there")
def _(world: World) -> bool:
    tag = world.tag()
    answers = [world.complete(world.upload(), IfMatch=tag) for _ in range(2)]
    return answers == ["ok", "PreconditionFailed"]


@promise("a completion that was refused can be tried again")
def _(world: World) -> bool:
    world.put()
    upload = world.upload()
    world.complete(upload, IfNoneMatch="*")
    world.delete()
    return world.uploads() == ["k"] and world.complete(upload, IfNoneMatch="*") == "ok" and world.there()


@promise("a completion that is sent again is answered again")
def _(world: World) -> bool:
    upload = world.upload()
    return [world.complete(upload, IfNoneMatch="*") for _ in range(2)] == ["ok", "ok"]


@promise("a completion of an upload that is gone is no such upload")
def _(world: World) -> bool:
    upload = world.upload()
    world.abort(upload)
    return world.complete(upload) == "NoSuchUpload"


@promise("a completion of parts that are not there is refused")
def _(world: World) -> bool:
    upload = world.upload()
    return world.complete(upload | {"MultipartUpload": {"Parts": [{"PartNumber": 1, "ETag": NEVER}]}}) == "InvalidPart"


@promise("a completion of no parts is refused")
def _(world: World) -> bool:
    return world.complete(world.upload() | {"MultipartUpload": {"Parts": []}}) == "MalformedXML"


@promise("a part but the last that is too small is refused")
def _(world: World) -> bool:
    return world.complete(world.upload("k", b"small", b"last")) == "EntityTooSmall"


@promise("a part of an upload that is gone is no such upload")
def _(world: World) -> bool:
    upload = world.upload()
    world.abort(upload)
    return said(world.client.upload_part, **without_parts(upload), PartNumber=2, Body=b"") == "NoSuchUpload"


@promise("an upload of a key that is deleted meanwhile appears")
def _(world: World) -> bool:
    world.put()
    upload = world.upload()
    world.delete()
    return world.complete(upload, IfNoneMatch="*") == "ok" and world.there()


@promise("an upload that is aborted is gone")
def _(world: World) -> bool:
    upload = world.upload()
    answers = [world.abort(upload), world.abort(upload), said(world.client.list_parts, **without_parts(upload))]
    return answers == ["ok", "NoSuchUpload", "NoSuchUpload"] and world.uploads() == []


@promise("an upload that is completed cannot be aborted")
def _(world: World) -> bool:
    upload = world.upload()
    world.complete(upload)
    return world.uploads() == [] and world.abort(upload) == "NoSuchUpload" and world.there()


@promise("metadata of an upload is that of its object")
def _(world: World) -> bool:
    world.complete(world.upload(Metadata={"one": "1"}, ContentType="text/x"))
    return (world.head()["Metadata"], world.head()["ContentType"]) == ({"one": "1"}, "text/x")


@promise("uploads are listed by prefix")
def _(world: World) -> bool:
    for key in ("a/1", "b/2", "b/1", "b/2", "c"):
        world.upload(key)
    return sorted(world.uploads(Prefix="b/")) == ["b/1", "b/2", "b/2"]


@promise("uploads are listed in the order of their keys")
def _(world: World) -> bool:
    for key in ("2", "1", "3"):
        world.upload(key)
    return world.uploads() == ["1", "2", "3"]


@promise("uploads are listed in pages")
def _(world: World) -> bool:
    for key in ("b/2", "b/1", "b/2", "b/3"):
        world.upload(key)
    pages = world.client.get_paginator("list_multipart_uploads").paginate(
        Bucket=world.bucket, PaginationConfig={"PageSize": 1}
    )
    found = [[upload["Key"] for upload in page.get("Uploads", [])] for page in pages]
    return found == [["b/1"], ["b/2"], ["b/2"], ["b/3"]]


@promise("uploads are listed from behind a key")
def _(world: World) -> bool:
    for key in ("1", "2"):
        world.upload(key)
    return world.uploads(KeyMarker="1") == ["2"]


@promise("parts are listed in pages")
def _(world: World) -> bool:
    upload = world.upload("k", b"1", b"22", b"333")
    pages = world.client.get_paginator("list_parts").paginate(**without_parts(upload), PaginationConfig={"PageSize": 2})
    found = [[(part["PartNumber"], part["Size"], part["ETag"]) for part in page["Parts"]] for page in pages]
    tags = [part["ETag"] for part in upload["MultipartUpload"]["Parts"]]
    return found == [[(1, 1, tags[0]), (2, 2, tags[1])], [(3, 3, tags[2])]]


@promise("a copy on the condition that nothing is there")
def _(world: World) -> bool:
    world.put()
    return [world.copy(IfNoneMatch="*"), world.copy(IfNoneMatch="*")] == ["ok", "PreconditionFailed"]


@promise("a copy on the condition that an etag is there")
def _(world: World) -> bool:
    world.put()
    world.put("copy")
    return world.copy(IfMatch=NEVER) == "PreconditionFailed"


@promise("a copy on the condition of its source's etag")
def _(world: World) -> bool:
    tag = world.tag()
    return [world.copy(CopySourceIfMatch=tag), world.copy(CopySourceIfMatch=NEVER)] == ["ok", "PreconditionFailed"]


@promise("a part is copied on the condition of its source's etag")
def _(world: World) -> bool:
    tag, upload = world.tag("source"), without_parts(world.upload())
    upload |= {"PartNumber": 1, "CopySource": {"Bucket": world.bucket, "Key": "source"}}
    answers = [said(world.client.upload_part_copy, **upload, CopySourceIfMatch=match) for match in (tag, NEVER)]
    return answers == ["ok", "PreconditionFailed"]


@promise("a copy keeps metadata or is given others")
def _(world: World) -> bool:
    world.put(Metadata={"one": "1"})
    world.copy("same")
    world.copy("other", Metadata={"two": "2"}, MetadataDirective="REPLACE")
    return [world.head(key)["Metadata"] for key in ("same", "other")] == [{"one": "1"}, {"two": "2"}]


@promise("a copy onto itself that changes nothing is refused")
def _(world: World) -> bool:
    world.put()
    return world.copy("k", "k") == "InvalidRequest"


@promise("a read on the condition that an etag is there")
def _(world: World) -> bool:
    world.put()
    return said(world.client.get_object, Bucket=world.bucket, Key="k", IfMatch=NEVER) == "PreconditionFailed"


@promise("a delete on the condition that an etag is there")
def _(world: World) -> bool:
    tag = world.tag()
    answers = [world.delete(IfMatch=NEVER), world.delete(IfMatch=tag), world.delete(IfMatch=tag)]
    return answers == ["PreconditionFailed", "ok", "NoSuchKey"] and not world.there()


@promise("a delete of many on the condition of their etags")
def _(world: World) -> bool:
    world.put("a", b"a")
    tag = world.tag("b", b"b")
    several: Any = {"Objects": [{"Key": key, "ETag": tag} for key in "ab"]}
    answer = world.client.delete_objects(Bucket=world.bucket, Delete=several)
    errors = [(error["Key"], error["Code"]) for error in answer.get("Errors", [])]
    return (errors, world.there("a"), world.there("b")) == ([("a", "PreconditionFailed")], True, False)


@promise("a delete of many that is quiet tells of errors alone")
def _(world: World) -> bool:
    several: Any = {"Objects": [{"Key": "k"}], "Quiet": True}
    return "Deleted" not in world.client.delete_objects(Bucket=world.bucket, Delete=several)


@promise("a delete of what is not there succeeds")
def _(world: World) -> bool:
    several: Any = {"Objects": [{"Key": "k"}]}
    answer = world.client.delete_objects(Bucket=world.bucket, Delete=several)
    return world.delete() == "ok" and answer["Deleted"] == [{"Key": "k"}]


@promise("any key is listed in pages as it was given")
def _(world: World) -> bool:
    puts = [world.put(key) for key in KEYS]
    pages = world.client.get_paginator("list_objects_v2").paginate(
        Bucket=world.bucket, PaginationConfig={"PageSize": 2}
    )
    return set(puts) == {"ok"} and [found["Key"] for page in pages for found in page["Contents"]] == KEYS


@promise("a listing is in the order of bytes")
def _(world: World) -> bool:
    keys = ["B", "a", "a!", "a/", "a0", "\uff5e", "\U0001f600"]
    for key in reversed(keys):
        world.put(key)
    found = world.client.list_objects_v2(Bucket=world.bucket)["Contents"]
    after = world.client.list_objects_v2(Bucket=world.bucket, StartAfter="a/")["Contents"]
    return [[one["Key"] for one in page] for page in (found, after)] == [keys, keys[4:]]


@promise("a listing of a level has what is below as prefixes")
def _(world: World) -> bool:
    for key in ("a/1", "a/b/2", "a/ä/3", "c"):
        world.put(key)
    found = world.client.list_objects_v2(Bucket=world.bucket, Prefix="a/", Delimiter="/")
    below = [one["Prefix"] for one in found["CommonPrefixes"]]
    return ([one["Key"] for one in found["Contents"]], below) == (["a/1"], ["a/b/", "a/ä/"])


@promise("a body that is not of its checksum is refused")
def _(world: World) -> bool:
    answers = [world.put(body=b"x", ContentMD5="A" * 22 + "=="), world.put(body=b"x", ChecksumCRC32="AAAAAA==")]
    return answers == ["BadDigest", "BadDigest"] and not world.there()


@promise("a key of more than 1024 bytes is refused")
def _(world: World) -> bool:
    return [world.put("k" * 1024), world.put("k" * 1025)] == ["ok", "KeyTooLongError"]


@promise("metadata of more than 2 KiB are refused")
def _(world: World) -> bool:
    return world.put(Metadata={"one": "1" * 2049}) == "MetadataTooLarge"


@promise("a bucket that is not there is no such bucket")
def _(world: World) -> bool:
    world.bucket = "bucket-that-is-not-there"
    listed = said(world.client.list_objects_v2, Bucket=world.bucket)
    headed = said(world.client.head_bucket, Bucket=world.bucket)
    return [listed, headed, world.put()] == ["NoSuchBucket", "404", "NoSuchBucket"]


@promise("versions have ids and a delete is a marker")
def _(world: World) -> bool:
    ids = {world.client.put_object(Bucket=world.bucket, Key="k", Body=body)["VersionId"] for body in (b"1", b"1")}
    marker = world.client.delete_object(Bucket=world.bucket, Key="k")
    listed = world.client.list_object_versions(Bucket=world.bucket)
    markers = [(one["VersionId"], one["IsLatest"]) for one in listed["DeleteMarkers"]]
    latest = [one["IsLatest"] for one in listed["Versions"]]
    seen = (len(ids), marker["DeleteMarker"], markers, latest, world.there())
    return seen == (2, True, [(marker["VersionId"], True)], [False, False], False)


@promise("a version is read and deleted for itself")
def _(world: World) -> bool:
    ids = [world.client.put_object(Bucket=world.bucket, Key="k", Body=body)["VersionId"] for body in (b"1", b"2")]
    marker = world.client.delete_object(Bucket=world.bucket, Key="k")["VersionId"]
    first = world.client.get_object(Bucket=world.bucket, Key="k", VersionId=ids[0])["Body"].read()
    world.delete(VersionId=marker)
    world.delete(VersionId=ids[1])
    return first == world.client.get_object(Bucket=world.bucket, Key="k")["Body"].read() == b"1"


@promise("a completion in a versioned bucket tells its version")
def _(world: World) -> bool:
    answer = world.client.complete_multipart_upload(**world.upload())
    return bool(answer["VersionId"] == world.head()["VersionId"])


def test_a_server_ends_when_told_to() -> None:
    for kind in SERVERS:
        with S3Server(kind) as server:
            client = client_of(server.url)
            bucket = server.bucket()
            assert said(client.head_bucket, Bucket=bucket) == "ok"
        assert said(client.head_bucket, Bucket=bucket) == "cut"
        client.close()


def test_a_server_ends_with_the_process_that_started_it() -> None:
    code = "import sys, s3\nwith s3.S3Server() as server:\n    print(server.url, flush=True)\n    sys.stdin.read()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent
    ) as process:
        assert process.stdout is not None
        client = client_of(process.stdout.readline().strip())
        assert said(client.list_buckets) == "ok"
        process.kill()
    eventually(lambda: said(client.list_buckets) == "cut")
    client.close()


def eventually(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def proxies(s3_servers: Callable[[str], S3Server]) -> Iterator[dict[str, S3Proxy]]:
    with S3Proxy(s3_servers("ministack").url) as ministack, S3Proxy(s3_servers("moto").url) as moto:
        yield {"ministack": ministack, "moto": moto}


@pytest.fixture
def proxy(s3_server: S3Server, proxies: dict[str, S3Proxy]) -> Iterator[S3Proxy]:
    proxy = proxies[s3_server.kind]
    proxy.clear()
    yield proxy
    proxy.replay()
    proxy.plan, proxy.delay, proxy.throttle, proxy.before = Plan(), 0, 0, lambda number: None


@pytest.fixture
def proxied(s3_server: S3Server, proxy: S3Proxy) -> World:
    return World(s3_server, s3_server.client(proxy.url), versioned=True)


# What is done, what befalls it, what is heard, and how often it was applied.
BEFALLEN = [
    ("put", "lost", "cut", 1),
    ("put", "cut", "cut", 0),
    ("put", "late", "cut", 0),
    ("put", "later+3600000", "cut", 0),
    ("put", "slow_down", "SlowDown", 0),
    ("put", "slow_down+2", "SlowDown", 0),
    ("put", "internal", "InternalError", 0),
    ("put", "internal_applied", "InternalError", 1),
    ("put", "conflict_409", "ConditionalRequestConflict", 0),
    ("put", "doubled", "ok", 2),
    ("copy", "lost", "cut", 1),
    ("copy", "error_in_200", "InternalError", 0),
    ("copy", "error_in_200_applied", "InternalError", 1),
    ("complete", "lost", "cut", 1),
    ("complete", "cut", "cut", 0),
    ("complete", "late", "cut", 0),
    ("complete", "error_in_200", "InternalError", 0),
    ("complete", "error_in_200_applied", "InternalError", 1),
    ("complete", "conflict_409", "ConditionalRequestConflict", 0),
    ("complete", "no_such_upload", "NoSuchUpload", 1),
    ("complete", "vanishes", "ok", 0),
]
OPERATIONS = {"put": "PutObject", "copy": "CopyObject", "complete": "CompleteMultipartUpload"}


@pytest.mark.parametrize(("what", "fault", "heard", "applied"), BEFALLEN)
def test_each_fault_does_what_its_name_says(
    proxied: World, proxy: S3Proxy, what: str, fault: str, heard: str, applied: int
) -> None:
    proxied.put("source", b"text")
    upload = proxied.upload() if what == "complete" else {}
    kind, _, amount = fault.partition("+")
    proxy.plan = Plan(f"{kind}@{OPERATIONS[what]}/k:0" + (f"+{amount}" if amount else ""))
    doing: dict[str, Callable[[], str]] = {
        "put": lambda: proxied.put(body=b"text"),
        "copy": lambda: proxied.copy("k", "source"),
        "complete": lambda: proxied.complete(upload),
    }
    assert (doing[what](), proxied.versions()) == (heard, applied)
    (record,) = [record for record in proxy.log if record.fault]
    assert (record.operation, record.key, record.fault) == (OPERATIONS[what], "k", str(proxy.plan))
    assert (record.status == 0) == (heard == "cut")
    proxy.replay()
    assert proxied.versions() == applied + kind.startswith("late")
    # A plan is over when its faults have been.
    assert proxied.put() == "ok"


def test_every_fault_has_been_tried() -> None:
    assert {fault.partition("+")[0] for _, fault, _, _ in BEFALLEN} == set(FAULTS) - {"denied"}


def test_keys_that_are_denied_are_not_deleted_and_told_of(proxied: World, proxy: S3Proxy) -> None:
    keys = ["a/1", "a/&", "b/1"]
    for denied in (["a/1", "a/&"], ["a/&"], keys):
        for key in keys:
            proxied.put(key)
        pattern = {2: "/a/*", 1: "/a/&", 3: ""}[len(denied)]
        proxy.plan = Plan(f"denied@DeleteObjects{pattern}:0")
        several: Any = {"Objects": [{"Key": key} for key in keys]}
        answer = proxied.client.delete_objects(Bucket=proxied.bucket, Delete=several)
        assert [(error["Key"], error["Code"]) for error in answer["Errors"]] == [(k, "AccessDenied") for k in denied]
        assert sorted(one["Key"] for one in answer.get("Deleted", [])) == sorted(set(keys) - set(denied))
        assert [proxied.there(key) for key in keys] == [key in denied for key in keys]


def test_an_upload_that_vanishes_leaves_nothing_and_is_answered_as_any(proxied: World, proxy: S3Proxy) -> None:
    whole = proxied.client.complete_multipart_upload(**proxied.upload("whole", b"part"))
    proxy.plan = Plan("vanishes@CompleteMultipartUpload:0")
    upload = proxied.upload("k", b"part")
    answer = proxied.client.complete_multipart_upload(**upload)
    assert (answer["ETag"], answer["Key"], answer["Bucket"]) == (whole["ETag"], "k", proxied.bucket)
    assert not proxied.there() and proxied.uploads() == []
    assert said(proxied.client.list_parts, **without_parts(upload)) == "NoSuchUpload"


def test_a_late_request_is_applied_before_the_one_that_comes_so_many_later(proxied: World, proxy: S3Proxy) -> None:
    proxy.plan = Plan("late@PutObject:0+2")
    assert [proxied.put(), proxied.there(), proxied.there()] == ["cut", False, True]
    assert [record.fault for record in proxy.log] == ["late@PutObject:0+2", "", "arrived", ""]


def test_a_late_request_is_applied_after_its_time(proxied: World, proxy: S3Proxy) -> None:
    proxy.plan = Plan("later@PutObject:0+1")
    assert proxied.put() == "cut"
    eventually(proxied.there)


def test_every_so_many_requests_one_is_told_to_slow_down(proxied: World, proxy: S3Proxy) -> None:
    proxy.throttle = 3
    assert [proxied.put() for _ in range(6)] == ["ok", "ok", "SlowDown", "ok", "ok", "SlowDown"]


def test_a_client_that_tries_again_gets_over_what_passes(s3_server: S3Server, proxy: S3Proxy) -> None:
    proxy.plan = Plan("slow_down@PutObject:0 error_in_200@CompleteMultipartUpload:0")
    world = World(s3_server, s3_server.client(proxy.url, attempts=2))
    assert [world.put(), world.complete(world.upload())] == ["ok", "ok"]
    assert (proxy.counts["PutObject"], proxy.counts["CompleteMultipartUpload"]) == (2, 2)


def test_the_proxy_tells_what_came_and_how_much(proxied: World, proxy: S3Proxy) -> None:
    proxied.put("ä/&?+ %25", b"12345", IfNoneMatch="*")
    upload = proxied.upload("m", b"part")
    proxied.complete(upload, IfNoneMatch="*")
    proxied.copy("c", "m", CopySourceIfMatch=proxied.head("m")["ETag"])
    proxied.client.delete_objects(Bucket=proxied.bucket, Delete={"Objects": [{"Key": "c"}, {"Key": "m"}]})
    proxied.delete("m")
    proxied.uploads()
    proxied.client.list_objects_v2(Bucket=proxied.bucket)
    of = {record.operation: record for record in proxy.log}
    assert list(of) == [
        *("PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload", "HeadObject", "CopyObject"),
        *("DeleteObjects", "DeleteObject", "ListMultipartUploads", "ListObjectsV2"),
    ]
    assert proxy.counts == dict.fromkeys(of, 1)
    condition = (("if-none-match", "*"),)
    assert of["PutObject"] == Record("PutObject", proxied.bucket, ("ä/&?+ %25",), "", "", condition, "", 200, "")
    assert (of["UploadPart"].upload, of["UploadPart"].part) == (upload["UploadId"], "1")
    assert of["CompleteMultipartUpload"].conditions == condition
    assert [name for name, _ in of["CopyObject"].conditions] == ["x-amz-copy-source-if-match"]
    assert of["CopyObject"].source == f"{proxied.bucket}/m"
    assert of["DeleteObjects"].keys == ("c", "m")
    proxy.clear()
    data = bytes(range(256)) * 4096
    proxied.client.put_object(Bucket=proxied.bucket, Key="large", Body=data)
    # More than the data is of its framing.
    assert 0 <= proxy.traffic["up"] - len(data) < len(data) / 100
    before = proxy.traffic["down"]
    assert proxied.client.get_object(Bucket=proxied.bucket, Key="large")["Body"].read() == data
    assert proxy.traffic["down"] - before == len(data)


def test_each_request_takes_longer_by_the_delay(proxied: World, proxy: S3Proxy) -> None:
    proxy.delay = 0.02
    start = time.monotonic()
    assert [proxied.put() for _ in range(5)] == ["ok"] * 5
    assert time.monotonic() - start >= 5 * 0.02


def test_a_test_looks_at_the_server_before_each_request(proxied: World, proxy: S3Proxy, world: World) -> None:
    world.bucket = proxied.bucket
    seen = []
    proxy.before = lambda number: seen.append((number, world.there()))
    proxied.put()
    proxied.delete()
    assert seen == [(0, False), (1, True)]


def test_a_body_whose_sender_dies_is_not_applied(proxied: World, proxy: S3Proxy) -> None:
    address = urlsplit(proxy.url)
    with socket.create_connection((address.hostname, address.port or 0)) as sender:
        head = f"PUT /{proxied.bucket}/k HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: {1 << 21}\r\n\r\n"
        sender.sendall(head.encode() + bytes(1 << 20))
    eventually(lambda: len(proxy.log) == 1)
    assert (proxy.log[0].operation, proxy.log[0].status, proxied.versions()) == ("PutObject", 0, 0)


def test_the_text_of_a_plan_gives_it_again() -> None:
    text = "lost@7 late@PutObject:0+3 denied@DeleteObjects/*/a%20b%3A1:2"
    plan = Plan(text)
    assert str(plan) == text and plan.faults[2] == Fault("denied", 2, 0, "DeleteObjects", "*/a b:1")
    assert str(Plan(str(Plan.seeded(3, requests=50, rate=0.5)))) == str(Plan.seeded(3, requests=50, rate=0.5))
    for wrong in ("lost", "lost@x", "loses@7", "lost@Put:-1", "late@1+x"):
        with pytest.raises(ValueError, match="is no fault"):
            Plan(wrong)


def test_a_failure_under_faults_tells_the_line_that_repeats_it() -> None:
    with pytest.raises(AssertionError) as caught, S3Proxy("http://127.0.0.1:1", plan="lost@0"):
        raise AssertionError
    assert caught.value.__notes__ == ['It happened under: S3Proxy(plan="lost@0")']


def test_a_server_that_is_gone_is_a_connection_that_is_cut() -> None:
    with S3Proxy("http://127.0.0.1:1") as proxy:
        client = client_of(proxy.url)
        assert said(client.list_buckets) == "cut"
        client.close()
        assert [(record.operation, record.status) for record in proxy.log] == [("ListBuckets", 0)]
