"""The Cloud Storage server of the tests answers Google's own client as Google's reference says, and fails as it is told to."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests
from dfs.faults import FAULTS
from gcs import GcsServer
from gcs.errors import ERRORS
from gcs.store import QUANTUM
from google.api_core.exceptions import GoogleAPICallError, NotFound, ServiceUnavailable
from google.auth.credentials import AnonymousCredentials
from google.cloud.storage import Blob, Bucket, Client
from google.cloud.storage.retry import DEFAULT_RETRY

Json = dict[str, Any]
Call = Callable[[Bucket, Json], object]

ONCE: Json = {"retry": None, "timeout": 10}
SOON = DEFAULT_RETRY.with_delay(0.001, 0.002).with_timeout(10)


@pytest.fixture(autouse=True)
def nothing_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this the client asks for the bucket once more, in a thread of its own."""
    monkeypatch.setenv("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")


@pytest.fixture
def server() -> Iterator[GcsServer]:
    with GcsServer() as server:
        server.store.create_bucket("b")
        yield server


@pytest.fixture
def bucket(server: GcsServer) -> Iterator[Bucket]:
    with client_of(server) as bucket:
        yield bucket


@contextmanager
def client_of(server: GcsServer) -> Iterator[Bucket]:
    """The bucket, as a client of its own has it."""
    nobody = AnonymousCredentials()  # type: ignore[no-untyped-call]
    client = Client("project", nobody, client_options={"api_endpoint": server.url})
    try:
        yield client.bucket("b")
    finally:
        client.close()


def status(call: Callable[[], object]) -> int:
    """What a call was answered: 200 for any success, 0 for none at all."""
    try:
        call()
    except GoogleAPICallError as error:
        assert error.code is not None
        return int(error.code)
    except requests.ConnectionError:
        return 0
    return 200


def wire(server: GcsServer, method: str, path: str, **options: Any) -> requests.Response:
    """A request without a client that would add something, or repeat it."""
    return requests.request(method, server.url + path, timeout=10, **options)


def patched(bucket: Bucket, options: Json) -> None:
    blob = bucket.blob("a")
    blob.metadata = {"k": "v"}
    blob.patch(**options)


def updated(bucket: Bucket, options: Json) -> None:
    blob = bucket.blob("a")
    blob.metadata = {"k": "v"}
    blob.update(**options)


# What makes an object "a", and what wants one to be there.
MAKE: dict[str, Call] = {
    "insert": lambda bucket, options: bucket.blob("a").upload_from_string(b"new", **options),
    "resumable": lambda bucket, options: bucket.blob("a", chunk_size=QUANTUM).upload_from_file(
        io.BytesIO(b"new"), **options
    ),
    "rewrite": lambda bucket, options: bucket.blob("a").rewrite(bucket.blob("source"), **options),
    "copy": lambda bucket, options: bucket.copy_blob(bucket.blob("source"), bucket, "a", **options),
    "move": lambda bucket, options: bucket.move_blob(bucket.blob("source"), "a", **options),
    "compose": lambda bucket, options: bucket.blob("a").compose([bucket.blob("source")], **options),
}
WANT: dict[str, Call] = {
    "get": lambda bucket, options: bucket.blob("a").reload(**options),
    "read": lambda bucket, options: bucket.blob("a").download_as_bytes(**options),
    "patch": patched,
    "update": updated,
    "delete": lambda bucket, options: bucket.delete_blob("a", **options),
}
# The client has no parameters for the first two, and sends the last ones misspelt, as `ifMetaGenerationNotMatch`.
UNASKED = {
    ("compose", "if_generation_not_match"),
    ("compose", "if_metageneration_not_match"),
    ("insert", "if_metageneration_not_match"),
    ("resumable", "if_metageneration_not_match"),
}


# With an object of generation G and metageneration 1, and for what makes one where there is none.
@pytest.mark.parametrize(
    ("condition", "offset", "there", "absent"),
    [
        ("if_generation_match", "G", 200, 412),
        ("if_generation_match", "G+1", 412, 412),
        ("if_generation_match", "0", 412, 200),
        ("if_generation_not_match", "G", 304, 304),
        ("if_generation_not_match", "G+1", 200, 304),
        ("if_generation_not_match", "0", 200, 304),
        ("if_metageneration_match", "1", 200, 412),
        ("if_metageneration_match", "2", 412, 412),
        ("if_metageneration_not_match", "1", 304, 304),
        ("if_metageneration_not_match", "2", 200, 304),
    ],
)
def test_every_condition_lets_in_what_it_says_and_what_it_refuses_changes_nothing(
    server: GcsServer, bucket: Bucket, condition: str, offset: str, there: int, absent: int
) -> None:
    wrong = []
    for verb, call in (MAKE | WANT).items():
        if (verb, condition) in UNASKED:
            continue
        for expected, exists in ((there, True), (absent if verb in MAKE else 404, False)):
            for name in server.store.names("b"):
                server.store.delete("b", name)
            made = server.store.put("b", "source", b"source")
            if exists:
                made = server.store.put("b", "a", b"old")
            before = dict(server.store.bucket("b").objects)
            value = {"G": made.generation, "G+1": made.generation + 1}.get(offset) or int(offset.strip("G+"))
            found = status(partial(call, bucket, {condition: value} | ONCE))
            if found != expected:
                wrong.append(f"{verb}, {'there' if exists else 'absent'}: {found}, not {expected}")
            if found != 200 and server.store.bucket("b").objects != before:
                wrong.append(f"{verb}, {'there' if exists else 'absent'}: something was done")
    assert not wrong


@pytest.mark.parametrize(
    ("condition", "offset", "expected"),
    [
        ("if_source_generation_match", "G", 200),
        ("if_source_generation_match", "G+1", 412),
        ("if_source_generation_not_match", "G", 304),
        ("if_source_generation_not_match", "G+1", 200),
        ("if_source_metageneration_match", "1", 200),
        ("if_source_metageneration_match", "2", 412),
        ("if_source_metageneration_not_match", "1", 304),
        ("if_source_metageneration_not_match", "2", 200),
    ],
)
@pytest.mark.parametrize("verb", ["rewrite", "copy", "move"])
def test_conditions_of_the_source_are_about_the_source(
    server: GcsServer, bucket: Bucket, verb: str, condition: str, offset: str, expected: int
) -> None:
    generation = server.store.put("b", "source", b"source").generation
    server.store.put("b", "a", b"old")
    value = {"G": generation, "G+1": generation + 1}.get(offset) or int(offset.strip("G+"))
    assert status(lambda: MAKE[verb](bucket, {condition: value} | ONCE)) == expected
    assert server.store.read("b", "a") == (b"source" if expected == 200 else b"old")
    assert ("source" in server.store.names("b")) == (verb != "move" or expected != 200)


def test_a_condition_on_what_is_not_there_can_also_be_one_that_fails() -> None:
    with GcsServer(absent=412) as server:
        server.store.create_bucket("b")
        with client_of(server) as bucket:
            for call in WANT.values():
                assert status(partial(call, bucket, {"if_generation_match": 7} | ONCE)) == 412
                assert status(partial(call, bucket, ONCE)) == 404


@pytest.mark.parametrize("value", ["x", "-1", "1.0"])
def test_a_condition_that_is_no_number_is_refused(server: GcsServer, value: str) -> None:
    server.store.put("b", "a")
    assert wire(server, "GET", f"/storage/v1/b/b/o/a?ifGenerationNotMatch={value}").status_code == 400


@pytest.mark.parametrize("verb", [*MAKE, "delete"])
def test_of_many_that_race_under_one_condition_one_wins(server: GcsServer, verb: str) -> None:
    count = 8
    generation = server.store.put("b", "a").generation if verb == "delete" else 0
    for number in range(count):
        server.store.put("b", f"source{number}", str(number).encode())
    races: dict[str, Callable[[Bucket, int, Json], object]] = {
        "insert": lambda bucket, number, options: bucket.blob("a").upload_from_string(str(number), **options),
        "resumable": lambda bucket, number, options: bucket.blob("a", chunk_size=QUANTUM).upload_from_file(
            io.BytesIO(str(number).encode()), **options
        ),
        "rewrite": lambda bucket, number, options: bucket.blob("a").rewrite(bucket.blob(f"source{number}"), **options),
        "copy": lambda bucket, number, options: bucket.copy_blob(
            bucket.blob(f"source{number}"), bucket, "a", **options
        ),
        "move": lambda bucket, number, options: bucket.move_blob(bucket.blob(f"source{number}"), "a", **options),
        "compose": lambda bucket, number, options: bucket.blob("a").compose(
            [bucket.blob(f"source{number}")], **options
        ),
        "delete": lambda bucket, number, options: bucket.delete_blob("a", **options),
    }
    together, answers = threading.Barrier(count), [0] * count

    def race(number: int) -> None:
        with client_of(server) as bucket:
            together.wait(10)
            options = {"if_generation_match": generation} | ONCE
            answers[number] = status(lambda: races[verb](bucket, number, options))

    threads = [threading.Thread(target=race, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [200] + [404 if verb == "delete" else 412] * (count - 1)
    if verb != "delete":
        assert server.store.read("b", "a") == str(answers.index(200)).encode()
    if verb == "move":
        assert len(server.store.names("b", "source")) == count - 1


# Moving


def test_a_move_takes_the_object_away_and_makes_a_new_generation_of_what_it_was(
    server: GcsServer, bucket: Bucket
) -> None:
    made = bucket.blob("deep/a")
    made.metadata = {"k": "v"}
    made.upload_from_string(b"data", content_type="text/csv", **ONCE)
    made.metadata = {"k": "w"}
    made.patch(**ONCE)
    before = server.store.put("b", "c", b"replaced").generation
    moved = bucket.move_blob(made, "c", **ONCE)
    assert server.store.names("b") == ["c"]
    assert moved.generation > before > made.generation
    assert (moved.metageneration, moved.metadata, moved.content_type) == (1, {"k": "w"}, "text/csv")
    assert moved.time_created > made.time_created
    assert bucket.blob("c").download_as_bytes(**ONCE) == b"data"


def test_nothing_is_moved_that_is_not_there_or_onto_itself(server: GcsServer, bucket: Bucket) -> None:
    server.store.put("b", "a")
    assert status(lambda: bucket.move_blob(bucket.blob("none"), "a", **ONCE)) == 404
    assert status(lambda: bucket.move_blob(bucket.blob("a"), "a", **ONCE)) == 400
    assert server.store.names("b") == ["a"]


@pytest.mark.parametrize("refusal", [400, 501])
def test_a_bucket_can_refuse_to_move(bucket: Bucket, server: GcsServer, refusal: int) -> None:
    server.store.bucket("b").refuses_move = refusal
    server.store.put("b", "a")
    assert status(lambda: bucket.move_blob(bucket.blob("a"), "c", **ONCE)) == refusal
    assert server.store.names("b") == ["a"]


# Rewriting


@pytest.fixture
def slow() -> Iterator[GcsServer]:
    with GcsServer(rewritten=4) as server:
        server.store.create_bucket("b")
        server.store.put("b", "a", b"0123456789", {"contentType": "text/csv"})
        yield server


def test_a_rewrite_of_a_large_object_takes_calls_with_tokens_until_it_is_there_at_once(slow: GcsServer) -> None:
    with client_of(slow) as bucket:
        token: str | None = None
        told: list[object] = []
        while token is not None or not told:
            token, done, size = bucket.blob("c").rewrite(bucket.blob("a"), token=token, **ONCE)
            told.append((done, size, slow.store.names("b")))
        assert told == [(4, 10, ["a"]), (8, 10, ["a"]), (10, 10, ["a", "c"])]
        assert slow.store.read("b", "c") == b"0123456789"
        assert bucket.get_blob("c", **ONCE).content_type == "text/csv"


@pytest.mark.parametrize(("changed", "expected"), [("a", 400), ("c", 412), ("", 200)])
def test_a_rewrite_under_way_ends_only_as_it_began(slow: GcsServer, changed: str, expected: int) -> None:
    with client_of(slow) as bucket:
        options = {"if_generation_match": 0} | ONCE
        token, *_ = bucket.blob("c").rewrite(bucket.blob("a"), **options)
        token, *_ = bucket.blob("c").rewrite(bucket.blob("a"), token=token, **options)
        if changed:
            slow.store.put("b", changed, b"changed")
        last = {"token": token} | options
        assert status(lambda: bucket.blob("c").rewrite(bucket.blob("a"), **last)) == expected
        assert status(lambda: bucket.blob("c").rewrite(bucket.blob("a"), token="none", **ONCE)) == 400


def test_a_rewrite_that_could_not_end_does_not_begin(slow: GcsServer) -> None:
    slow.store.put("b", "c", b"there")
    with client_of(slow) as bucket:
        assert status(lambda: bucket.blob("c").rewrite(bucket.blob("a"), if_generation_match=0, **ONCE)) == 412


# Listing


def test_pages_of_a_listing_come_to_all_of_it_while_it_changes(server: GcsServer, bucket: Bucket) -> None:
    wanted = [f"d{high}/{low:02}" for high in range(4) for low in range(30)]
    for name in reversed(wanted):
        server.store.put("b", name)
    found = []
    for page in bucket.list_blobs(page_size=7, **ONCE).pages:
        names = [blob.name for blob in page]
        server.store.delete("b", names[-1])
        found += names
    assert found == wanted
    assert server.counts["list"] == -(-len(wanted) // 7)


NAMES = ["a", "a/b", "a/c/d", "a/c/e", "a/f/g", "a/", "ab", "ä", "b//c"]


@pytest.mark.parametrize(
    ("query", "names", "prefixes"),
    [
        ({}, sorted(NAMES), []),
        ({"prefix": "a/"}, ["a/", "a/b", "a/c/d", "a/c/e", "a/f/g"], []),
        ({"prefix": "a/", "delimiter": "/"}, ["a/", "a/b"], ["a/c/", "a/f/"]),
        ({"delimiter": "/"}, ["a", "ab", "ä"], ["a/", "b/"]),
        ({"delimiter": "/", "include_trailing_delimiter": True}, ["a", "a/", "ab", "ä"], ["a/", "b/"]),
        ({"start_offset": "a/f", "end_offset": "b"}, ["a/f/g", "ab"], []),
        ({"prefix": "a/c", "start_offset": "a/c/e"}, ["a/c/e"], []),
        ({"prefix": "none"}, [], []),
    ],
)
@pytest.mark.parametrize("size", [None, 1, 2, 3])
def test_a_listing_has_prefixes_delimiters_and_offsets_in_pages_of_any_size(
    server: GcsServer, bucket: Bucket, query: Json, names: list[str], prefixes: list[str], size: int | None
) -> None:
    for name in NAMES:
        server.store.put("b", name)
    listing = bucket.list_blobs(page_size=size, **query, **ONCE)
    assert [blob.name for blob in listing] == names
    assert sorted(listing.prefixes) == prefixes


def test_a_versioned_bucket_keeps_what_is_replaced_until_its_generation_is_deleted() -> None:
    with GcsServer() as server:
        server.store.create_bucket("b", versioned=True)
        with client_of(server) as bucket:
            first = server.store.put("b", "a", b"1").generation
            second = server.store.put("b", "a", b"2").generation
            bucket.delete_blob("a", **ONCE)
            assert bucket.get_blob("a", **ONCE) is None
            assert [blob.generation for blob in bucket.list_blobs(versions=True, **ONCE)] == [first, second]
            assert bucket.blob("a", generation=first).download_as_bytes(**ONCE) == b"1"
            bucket.delete_blob("a", generation=first, **ONCE)
            assert [blob.generation for blob in bucket.list_blobs(versions=True, **ONCE)] == [second]
            third = server.store.put("b", "a", b"3").generation
            bucket.delete_blob("a", generation=third, **ONCE)
            assert [blob.generation for blob in bucket.list_blobs(versions=True, **ONCE)] == [second]


# Writing and reading


def test_a_generation_is_newer_than_all_before_it_though_the_clock_stands() -> None:
    with GcsServer(now=lambda: 1_750_000_000.0) as server:
        server.store.create_bucket("b")
        with client_of(server) as bucket:
            seen = []
            for name in ("a", "a", "c"):
                blob = bucket.blob(name)
                blob.upload_from_string(b"x", **ONCE)
                seen.append(blob.generation)
            bucket.delete_blob("a", **ONCE)
            seen.append(bucket.move_blob(bucket.blob("c"), "a", **ONCE).generation)
            assert seen == sorted(set(seen))


def test_a_change_of_metadata_is_a_new_metageneration_and_etag_of_the_same_generation(bucket: Bucket) -> None:
    blob = bucket.blob("a")
    blob.upload_from_string(b"x", **ONCE)
    before = (blob.generation, blob.metageneration, blob.etag)
    blob.metadata = {"k": "v"}
    blob.patch(**ONCE)
    blob.reload(**ONCE)
    assert (blob.generation, blob.metageneration, blob.metadata) == (before[0], 2, {"k": "v"})
    assert blob.etag != before[2]
    assert status(lambda: blob.reload(if_etag_match=before[2], **ONCE)) == 412
    assert status(lambda: blob.reload(if_etag_not_match=blob.etag, **ONCE)) == 304


def test_what_an_answer_says_of_an_object_is_the_same_in_its_headers(server: GcsServer, bucket: Bucket) -> None:
    blob = bucket.blob("a")
    blob.upload_from_string(b"hello", **ONCE)
    heard = wire(server, "GET", "/download/storage/v1/b/b/o/a?alt=media")
    assert heard.headers["ETag"] == blob.etag
    assert heard.headers["X-Goog-Hash"] == f"crc32c={blob.crc32c},md5={blob.md5_hash}"
    assert heard.headers["X-Goog-Generation"] == str(blob.generation)
    assert heard.headers["X-Goog-Stored-Content-Length"] == "5"
    assert heard.headers["Date"].endswith("GMT")
    assert wire(server, "GET", "/storage/v1/b/b/o/a").headers["ETag"] == blob.etag


@pytest.mark.parametrize(
    ("begin", "end", "expected"), [(0, 0, b"0"), (2, 4, b"234"), (8, 99, b"89"), (3, None, b"3456789"), (10, None, 416)]
)
def test_a_part_of_an_object_is_read(bucket: Bucket, begin: int, end: int | None, expected: bytes | int) -> None:
    bucket.blob("a").upload_from_string(b"0123456789", **ONCE)
    if expected == 416:
        assert status(lambda: bucket.blob("a").download_as_bytes(start=begin, end=end, **ONCE)) == 416
    else:
        assert bucket.blob("a").download_as_bytes(start=begin, end=end, **ONCE) == expected


@pytest.mark.parametrize("name", ["a b", "a/b/c", "%2F", "a+b", "ä/ö", "a?b=c&d", "#", "o/moveTo/o/x", "x" * 1024])
def test_a_name_is_what_it_was(server: GcsServer, bucket: Bucket, name: str) -> None:
    bucket.blob(name).upload_from_string(b"x", **ONCE)
    assert [blob.name for blob in bucket.list_blobs(prefix=name, **ONCE)] == [name]
    assert bucket.move_blob(bucket.blob(name), "y", **ONCE).name == "y"
    bucket.move_blob(bucket.blob("y"), name, **ONCE)
    assert bucket.blob(name).download_as_bytes(**ONCE) == b"x"
    assert server.log[0].path == f"b/{name}"


@pytest.mark.parametrize("name", [".", "..", "a\nb", "x" * 1025])
def test_what_is_no_name_is_refused(server: GcsServer, bucket: Bucket, name: str) -> None:
    assert status(lambda: bucket.blob(name).upload_from_string(b"x", **ONCE)) == 400
    assert server.store.names("b") == []


@pytest.mark.parametrize("data", [b"", b"\r\n", b"x\r\n--", b"--\n", bytes(range(256))])
@pytest.mark.parametrize("way", ["media", "multipart", "resumable"])
def test_every_byte_is_kept_in_each_way_of_uploading(server: GcsServer, bucket: Bucket, way: str, data: bytes) -> None:
    if way == "media":
        heard = wire(server, "POST", "/upload/storage/v1/b/b/o?uploadType=media&name=a", data=data)
        assert heard.json()["size"] == str(len(data))
    elif way == "multipart":
        bucket.blob("a").upload_from_string(data, **ONCE)
    else:
        bucket.blob("a", chunk_size=QUANTUM).upload_from_file(io.BytesIO(data), **ONCE)
    assert server.store.read("b", "a") == data


def test_data_that_are_not_what_their_sender_says_are_refused(server: GcsServer, bucket: Bucket) -> None:
    blob = bucket.blob("a")
    blob.crc32c = "AAAAAA=="
    assert status(lambda: blob.upload_from_string(b"x", checksum=None, **ONCE)) == 400
    blob = bucket.blob("a")
    blob.md5_hash = "1B2M2Y8AsgTpgAmY7PhCfg=="
    assert status(lambda: blob.upload_from_string(b"x", checksum=None, **ONCE)) == 400
    assert server.store.names("b") == []


def test_objects_are_composed_in_their_order(server: GcsServer, bucket: Bucket) -> None:
    parts = []
    for text in ("one", "two"):
        parts.append(bucket.blob(text))
        parts[-1].upload_from_string(text, **ONCE)
    whole = bucket.blob("a")
    whole.compose(parts[::-1], if_source_generation_match=[part.generation for part in parts[::-1]], **ONCE)
    assert (whole.component_count, whole.md5_hash) == (2, None)
    assert whole.download_as_bytes(**ONCE) == b"twoone"
    assert status(lambda: whole.compose([bucket.blob("none")], **ONCE)) == 404
    assert status(lambda: whole.compose(parts, if_source_generation_match=[1, 1], **ONCE)) == 412
    assert status(lambda: whole.compose(parts * 17, **ONCE)) == 400


def test_a_bucket_is_made_once_found_and_deleted_when_it_is_empty(server: GcsServer, bucket: Bucket) -> None:
    client = bucket.client
    assert status(lambda: client.create_bucket("b", **ONCE)) == 409
    made = client.create_bucket("other", **ONCE)
    assert [found.name for found in client.list_buckets(**ONCE)] == ["b", "other"]
    server.store.put("other", "a")
    assert status(lambda: made.delete(**ONCE)) == 409
    server.store.delete("other", "a")
    made.delete(**ONCE)
    assert not made.exists(**ONCE)
    assert status(lambda: made.blob("a").upload_from_string(b"x", **ONCE)) == 404


# Resumable uploads


@pytest.mark.parametrize(
    "plan", ["loses@start:0", "loses@upload:0", "cuts@upload:1", "overloads@upload:1", "loses@status:0"]
)
def test_an_upload_goes_on_where_an_answer_was_lost(plan: str) -> None:
    data = bytes(range(256)) * (2 * QUANTUM // 256) + b"rest"
    with GcsServer(plan=plan) as server:
        server.store.create_bucket("b")
        with client_of(server) as bucket:
            blob = bucket.blob("a", chunk_size=QUANTUM)
            blob.upload_from_file(io.BytesIO(data), if_generation_match=0, retry=SOON)
            assert server.store.read("b", "a") == data


class Session:
    """A resumable upload that somebody drives by hand."""

    def __init__(self, bucket: Bucket, name: str, **options: Any) -> None:
        self.url = bucket.blob(name).create_resumable_upload_session(**options, **ONCE)

    def ask(self, said: str, data: bytes = b"", method: str = "PUT") -> tuple[int, str | None]:
        heard = requests.request(method, self.url, data=data, headers={"Content-Range": f"bytes {said}"}, timeout=10)
        return heard.status_code, heard.headers.get("Range")


def test_an_upload_tells_how_much_it_has_and_takes_no_byte_twice(server: GcsServer, bucket: Bucket) -> None:
    data = b"a" * QUANTUM + b"b" * QUANTUM + b"c"
    session = Session(bucket, "a")
    assert session.ask("*/*") == (308, None)
    assert session.ask(f"0-{QUANTUM - 1}/*", data[:QUANTUM]) == (308, f"bytes=0-{QUANTUM - 1}")
    assert session.ask(f"0-{2 * QUANTUM - 1}/*", data[: 2 * QUANTUM]) == (308, f"bytes=0-{2 * QUANTUM - 1}")
    assert session.ask(f"*/{len(data)}") == (308, f"bytes=0-{2 * QUANTUM - 1}")
    assert server.store.names("b") == []
    last = f"{2 * QUANTUM}-{2 * QUANTUM}/{len(data)}"
    assert session.ask(last, b"c") == (200, None)
    assert session.ask(last, b"c", "POST") == session.ask("*/*") == (200, None)
    assert server.store.read("b", "a") == data
    assert bucket.get_blob("a", **ONCE).metageneration == 1


@pytest.mark.parametrize("said", ["0-99/*", f"{QUANTUM}-{2 * QUANTUM - 1}/*", "0-98/*", "1-0/*", "nonsense"])
def test_a_chunk_that_is_too_small_or_leaves_a_gap_or_lies_is_refused(bucket: Bucket, said: str) -> None:
    session = Session(bucket, "a")
    assert session.ask(said, b"x" * (QUANTUM if said.startswith(str(QUANTUM)) else 100))[0] == 400
    assert session.ask("*/*") == (308, None)


def test_what_is_not_a_whole_number_of_quanta_is_kept_in_part(bucket: Bucket) -> None:
    session = Session(bucket, "a")
    assert session.ask(f"0-{QUANTUM + 99}/*", b"x" * (QUANTUM + 100)) == (308, f"bytes=0-{QUANTUM - 1}")


def test_a_server_may_keep_less_than_was_sent() -> None:
    with GcsServer(keeps=QUANTUM) as server:
        server.store.create_bucket("b")
        with client_of(server) as bucket:
            session, size = Session(bucket, "a"), 2 * QUANTUM
            assert session.ask(f"0-{size - 1}/{size}", b"x" * size) == (308, f"bytes=0-{QUANTUM - 1}")
            assert session.ask(f"{QUANTUM}-{size - 1}/{size}", b"x" * QUANTUM) == (200, None)
            assert server.store.read("b", "a") == b"x" * size


def test_an_upload_s_conditions_are_held_against_what_is_there_at_its_end(server: GcsServer, bucket: Bucket) -> None:
    session = Session(bucket, "a", if_generation_match=0)
    server.store.put("b", "a", b"other")
    assert session.ask("0-0/1", b"x")[0] == 412
    assert session.ask("0-0/1", b"x")[0] == 412
    assert server.store.read("b", "a") == b"other"


def test_a_cancelled_upload_takes_nothing_more(server: GcsServer, bucket: Bucket) -> None:
    session = Session(bucket, "a")
    assert session.ask("*/*", method="DELETE")[0] == 499
    assert session.ask("0-0/1", b"x")[0] == 499
    session.url += "0"
    assert session.ask("0-0/1", b"x")[0] == 404
    assert server.store.names("b") == []


def test_the_client_notices_damage_on_the_way(server: GcsServer, bucket: Bucket) -> None:
    session = Session(bucket, "a")
    sent = {"Content-Range": "bytes 0-0/1", "X-Goog-Hash": "crc32c=AAAAAA=="}
    assert requests.put(session.url, b"x", headers=sent, timeout=10).status_code == 400
    assert server.store.names("b") == []


# Batches


def deleted(bucket: Bucket, names: list[str], **options: Any) -> list[int]:
    """The answer to each of many deletions in one request."""
    with bucket.client.batch(raise_exception=False) as batch:
        for name in names:
            bucket.delete_blob(name, **options)
    return [answer.status_code for answer in batch._responses]


def test_a_batch_deletes_what_it_can_and_tells_of_each_part(server: GcsServer, bucket: Bucket) -> None:
    for number in range(98):
        server.store.put("b", f"a/{number:02}")
    assert deleted(bucket, ["none", *server.store.names("b"), "none"]) == [404] + [204] * 98 + [404]
    assert server.store.names("b") == []
    assert server.counts == {"batch": 1}
    assert [entry.verb for entry in server.log] == ["delete"] * 100 + ["batch"]


def test_a_batch_holds_a_hundred_calls_and_no_data(server: GcsServer, bucket: Bucket) -> None:
    server.store.put("b", "a")
    assert status(lambda: deleted(bucket, ["a"] * 101)) == 400
    assert server.store.names("b") == ["a"]
    part = (
        "--x\r\nContent-Type: application/http\r\nContent-ID: <1>\r\n\r\nGET /storage/v1/b/b/o/a{} HTTP/1.1\r\n\r\n\r\n"
    )
    body = part.format("") + part.format("?alt=media") + "--x--"
    heard = wire(
        server, "POST", "/batch/storage/v1", data=body, headers={"Content-Type": "multipart/mixed; boundary=x"}
    )
    assert "HTTP/1.1 200 OK" in heard.text
    assert "HTTP/1.1 400 Bad Request" in heard.text
    assert "Content-ID: <response-1>" in heard.text


def test_conditions_hold_for_each_part_of_a_batch(server: GcsServer, bucket: Bucket) -> None:
    generation = server.store.put("b", "a").generation
    server.store.put("b", "c")
    assert deleted(bucket, ["a", "c"], if_generation_match=generation) == [204, 412]
    assert server.store.names("b") == ["c"]


def test_parts_of_a_batch_fail_for_themselves() -> None:
    with GcsServer(plan="overloads@part:1 throttles@part:2 errs@part:3") as server:
        server.store.create_bucket("b")
        for name in "acde":
            server.store.put("b", name)
        with client_of(server) as bucket:
            assert deleted(bucket, ["a", "c", "d", "e"]) == [204, 503, 429, 500]
            assert server.store.names("b") == ["c", "d"]
            assert [entry.fault for entry in server.log] == ["batched", *str(server.plan).split(), ""]


# What goes wrong


def told(server: GcsServer) -> tuple[str, list[str]]:
    """What a move is told, and what is there then."""
    try:
        heard = wire(server, "POST", "/storage/v1/b/b/o/a/moveTo/o/b")
        said = f"{heard.status_code} {heard.headers.get('Retry-After', '')}".strip()
    except requests.ConnectionError:
        said = "cut"
    return said, server.store.names("b")


@pytest.mark.parametrize(
    ("plan", "said", "left"),
    [
        ("fails@move:0", "500", ["a"]),
        ("errs@move:0", "500", ["b"]),
        ("cuts@move:0", "cut", ["a"]),
        ("loses@move:0", "cut", ["b"]),
        ("throttles@move:0+3", "429 3", ["a"]),
        ("overloads@move:0+2", "503 2", ["a"]),
        ("delays@move:0+50", "200", ["b"]),
        ("lags@0+50", "200", ["b"]),
        ("repeats@0", "404", ["b"]),
        ("replays@0+1", "200", ["b"]),
        ("lates@0+1", "cut", ["a"]),
    ],
)
def test_each_fault_does_what_its_name_says(plan: str, said: str, left: list[str]) -> None:
    with GcsServer(plan=plan) as server:
        server.store.create_bucket("b")
        server.store.put("b", "a")
        began = time.monotonic()
        assert told(server) == (said, left)
        if "+50" in plan:
            assert time.monotonic() - began >= 0.05
        assert [(entry.verb, entry.path, entry.fault) for entry in server.log] == [("move", "b/a", plan)]
        server.replay()
        assert server.store.names("b") == (["b"] if plan.startswith("lates") else left)


def test_every_fault_has_been_tried() -> None:
    marks = test_each_fault_does_what_its_name_says.pytestmark  # type: ignore[attr-defined]
    assert {row[0].partition("@")[0] for row in marks[0].args[1]} == set(FAULTS)


def test_a_move_s_lost_answer_is_told_by_what_is_there_afterwards() -> None:
    with GcsServer(plan="loses@move:0") as server:
        server.store.create_bucket("b")
        generation = server.store.put("b", "a").generation
        with client_of(server) as bucket:
            options = {"if_generation_match": 0, "if_source_generation_match": generation}
            assert status(lambda: bucket.move_blob(bucket.blob("a"), "c", **options, **ONCE)) == 0
            with pytest.raises(NotFound):
                bucket.move_blob(bucket.blob("a"), "c", **options, **ONCE)
            assert bucket.get_blob("c", **ONCE).generation > generation


@pytest.mark.parametrize("verb", ["insert", "rewrite", "move", "compose", "patch", "delete"])
def test_a_name_takes_no_more_writes_than_its_rate(verb: str) -> None:
    clock = [1_750_000_000.0]
    with GcsServer(rate=1, now=lambda: clock[0]) as server:
        server.store.create_bucket("b")
        with client_of(server) as bucket:
            server.store.put("b", "source")
            clock[0] += 5
            server.store.put("b", "a")
            clock[0] += 0.9
            assert status(lambda: (MAKE | WANT)[verb](bucket, ONCE)) == 429
            assert status(lambda: bucket.blob("other").upload_from_string(b"x", **ONCE)) == 200
            clock[0] += 0.2
            assert status(lambda: (MAKE | WANT)[verb](bucket, ONCE)) == 200


def test_an_error_has_google_s_form(server: GcsServer) -> None:
    error = wire(server, "GET", "/storage/v1/b/b/o/none").json()["error"]
    assert (error["code"], error["message"]) == (404, "No such object: b/none")
    assert error["errors"] == [{"message": error["message"], "domain": "global", "reason": "notFound"}]
    assert all(400 <= code < 600 or reason == "notModified" for reason, (code, _) in ERRORS.items())


def test_what_nobody_deserves_comes_as_the_client_s_own_error() -> None:
    with (
        GcsServer(plan="overloads@get:0+1") as server,
        client_of(server) as bucket,
        pytest.raises(ServiceUnavailable, match="internal error"),
    ):
        bucket.blob("a").reload(**ONCE)


def test_a_server_that_ignores_conditions_overwrites() -> None:
    with GcsServer(conditions=False) as server:
        server.store.create_bucket("b")
        server.store.put("b", "a", b"old")
        with client_of(server) as bucket:
            MAKE["insert"](bucket, {"if_generation_match": 0} | ONCE)
            assert server.store.read("b", "a") == b"new"


def test_credentials_can_be_demanded_and_verbs_denied() -> None:
    with GcsServer(token="secret", denied=["delete"]) as server:
        server.store.create_bucket("b")
        server.store.put("b", "a")
        bearer = {"Authorization": "Bearer secret"}
        assert wire(server, "GET", "/storage/v1/b/b/o/a").status_code == 401
        assert wire(server, "GET", "/storage/v1/b/b/o/a", headers=bearer).status_code == 200
        assert wire(server, "DELETE", "/storage/v1/b/b/o/a", headers=bearer).status_code == 403
        assert [entry.auth for entry in server.log] == ["", "Bearer", "Bearer"]
        assert "secret" not in str(server.log)


# The client as it is, without `retry=None`. It repeats reads, too, but leaves the sockets of those that failed open.
@pytest.mark.parametrize(
    ("verb", "unconditional", "conditional"),
    [
        ("insert", 2, 2),
        ("delete", 2, 2),
        ("patch", 2, 2),
        ("update", 1, 1),
        ("get", 2, 2),
        ("rewrite", 1, 2),
        ("copy", 1, 2),
        ("move", 1, 2),
        ("compose", 1, 2),
    ],
)
def test_the_client_repeats_what_failed_of_itself_also_where_that_is_no_longer_the_same(
    monkeypatch: pytest.MonkeyPatch, verb: str, unconditional: int, conditional: int
) -> None:
    monkeypatch.setattr("google.api_core.retry.retry_unary.time.sleep", lambda seconds: None)
    for expected, conditions in ((unconditional, False), (conditional, True)):
        with GcsServer(plan=f"overloads@{verb}:0") as server, client_of(server) as bucket:
            server.store.create_bucket("b")
            server.store.put("b", "source")
            generation = server.store.put("b", "a").generation
            status(partial((MAKE | WANT)[verb], bucket, {"if_generation_match": generation} if conditions else {}))
            assert server.counts[verb] == expected


def test_one_client_serves_many_threads(server: GcsServer, bucket: Bucket) -> None:
    failed: list[Exception] = []

    def write(number: int) -> None:
        try:
            for each in range(5):
                blob: Blob = bucket.blob(f"{number}/{each}")
                blob.upload_from_string(str(number), if_generation_match=0, **ONCE)
                assert blob.download_as_bytes(**ONCE) == str(number).encode()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(server.store.names("b")) == 40


def test_it_serves_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "gcs", "b", "--plan", "fails@get:0"]
    where = Path(__file__).parent
    with subprocess.Popen(command, cwd=where, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        url = process.stdout.readline().strip()
        assert requests.get(f"{url}/storage/v1/b/b/o/a", timeout=10).status_code == 500
        assert requests.get(f"{url}/storage/v1/b/b/o/a", timeout=10).status_code == 404
        process.stdin.close()
        assert process.wait(10) == 0
