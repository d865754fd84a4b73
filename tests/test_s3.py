"""Amazon S3, against servers that are real."""

from __future__ import annotations

import asyncio
import io
import itertools
import os
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import boto3
import pytest
import trio
from anyio import to_thread
from botocore.exceptions import ClientError
from s3 import Plan, S3Proxy, S3Server, client_of
from test_adls import only

from staged import (
    CommitBlocked,
    CommitIncomplete,
    Conflict,
    InvalidInput,
    StagedError,
    StagingError,
    Unsupported,
    open_store,
)
from staged.driver import Driver
from staged.drivers._azure import in_trio
from staged.drivers._bucket import Bucket
from staged.drivers.s3 import S3Driver
from staged.model import Mode, Resolve
from staged.testing.conformance import DriverConformance
from staged.testing.exploration import Work
from staged.testing.harness import Files, Harness, Step

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client

Figure = Callable[[str, str], None]
_NUMBERS = itertools.count()


class S3Harness(Harness):
    """A target of its own in a bucket.

    Args:
        client: Behind the drivers' back.
        path: Its prefix; empty where the target is a bucket of its own. By default a new one.
        sent: The client of the drivers, if it is another; they keep it open.
        lossy: Answers may be lost: an upload that was begun, and of which nobody was told, has no parts and stays.
    """

    resolution = 1.0

    def __init__(
        self,
        client: S3Client,
        bucket: str,
        path: str | None = None,
        *,
        sent: S3Client | None = None,
        period: float = 0.5,
        lossy: bool = False,
    ) -> None:
        self.lossy = lossy
        path = f"lake/target-{next(_NUMBERS)}" if path is None else path
        self.client, self.sent, self.bucket, self.path, self.period = client, sent or client, bucket, path, period
        above, _, name = path.rpartition("/")
        self.control = f"{above}/_staged/{name or '_staged'}/".lstrip("/")

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.path}"

    def process(self, step: Step | None = None) -> Driver:
        return S3Driver(self.url, client=self.sent, period=self.period)

    async def kill(self, driver: Driver) -> None:
        pass

    @property
    def _start(self) -> str:
        return f"{self.path}/" if self.path else ""

    def content(self) -> Files:
        found = self.client.list_objects_v2(Bucket=self.bucket, Prefix=self._start).get("Contents", ())
        names = [one["Key"] for one in found if "_staged" not in one["Key"].split("/")]
        read = {name: self.client.get_object(Bucket=self.bucket, Key=name)["Body"].read() for name in names}
        return {name[len(self._start) :]: data for name, data in read.items()}

    def uploads(self) -> list[str]:
        found = self.client.list_multipart_uploads(Bucket=self.bucket, Prefix=self._start)
        return [one["Key"] for one in found.get("Uploads", ()) if not self.lossy or self._has_parts(one)]

    def _has_parts(self, upload: Any) -> bool:
        said = self.client.list_parts(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])
        return bool(said.get("Parts"))

    async def files(self) -> Files:
        return await to_thread.run_sync(self.content)

    async def put(self, path: str, data: bytes) -> None:
        await to_thread.run_sync(
            lambda: self.client.put_object(Bucket=self.bucket, Key=f"{self._start}{path}", Body=data)
        )

    async def delete(self, path: str) -> None:
        await to_thread.run_sync(lambda: self.client.delete_object(Bucket=self.bucket, Key=f"{self._start}{path}"))

    async def leftovers(self) -> list[str]:
        return await to_thread.run_sync(self.uploads)


class _Served(DriverConformance):
    """On a server that is started once."""

    service = "ministack"
    root = False

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _server(cls, s3_servers: Callable[[str], S3Server]) -> None:
        cls.server = s3_servers(cls.service)
        cls.bucket = "" if cls.root else cls.server.bucket()

    def harness(self, directory: Path) -> Harness:
        cls = type(self)
        return S3Harness(cls.server.client(), cls.bucket or cls.server.bucket(), "" if cls.root else None)


class TestMinistack(_Served):
    """A prefix of a bucket."""

    anyio_backend = only("asyncio")


class TestMinistackRoot(_Served):
    """A whole bucket, with its control area inside."""

    root = True
    anyio_backend = only("trio")


@pytest.fixture
def target(ministack: S3Server) -> S3Harness:
    return S3Harness(ministack.client(), ministack.bucket())


@pytest.fixture
def proxy(ministack: S3Server) -> Iterator[S3Proxy]:
    with S3Proxy(ministack.url) as proxy:
        yield proxy


@pytest.fixture
def behind(ministack: S3Server, proxy: S3Proxy) -> S3Harness:
    """A target whose drivers go through the proxy."""
    return S3Harness(ministack.client(), ministack.bucket(), sent=ministack.client(proxy.url))


DROP = Work(Mode.FULL_DROP, (("new", b"new"), ("both", b"new")))
PRIOR: Files = {"old": b"old", "both": b"old", "d/f1": b"old"}


async def laid(target: S3Harness) -> S3Harness:
    for name, data in PRIOR.items():
        await target.put(name, data)
    return target


# ---------------------------------------------------------------------------------------------------------------- opening


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("s3a://bucket/a b%20", "s3://bucket/a b%20"),
        ("s3://my.bucket-1", "s3://my.bucket-1/"),
    ],
)
def test_every_spelling_of_a_url_is_the_same_target(url: str, shown: str) -> None:
    assert open_store(url).url == shown


@pytest.mark.parametrize(
    "url",
    [
        "s3://",
        "s3://bucket/../x",
        "s3://bucket/_staged/x",
        "s3://key:canary@bucket/x",
        "s3://b/x?X-Amz-Signature=canary",
    ],
)
def test_a_url_that_is_none_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        open_store(url)
    assert "canary" not in "".join(traceback.format_exception(raised.value))


@pytest.mark.anyio
async def test_a_session_and_an_endpoint_are_as_good_as_a_client_which_stays_open(ministack: S3Server) -> None:
    bucket = ministack.bucket()
    session = boto3.session.Session("test", "CANARY", region_name="us-east-1")
    async with open_store(f"s3://{bucket}/t", session=session, endpoint_url=ministack.url) as store:
        await Work(Mode.APPEND, (("a", b"1"),))(store)
    client = ministack.client()
    async with open_store(f"s3://{bucket}/t", client=client) as store:
        await Work(Mode.APPEND, (("b", b"2"),))(store)
    assert S3Harness(client, bucket, "t").content() == {"a": b"1", "b": b"2"}
    with pytest.raises(InvalidInput, match="pass either"):
        open_store(f"s3://{bucket}/t", client=client, endpoint_url=ministack.url)


@pytest.mark.anyio
async def test_a_bucket_that_is_not_there_is_refused(ministack: S3Server) -> None:
    async with open_store("s3://no-such-bucket/t", client=ministack.client()) as store:
        with pytest.raises(Unsupported, match="no bucket"):
            await store.begin("append")


@pytest.mark.anyio
async def test_who_has_no_credential_is_told_so_and_a_credential_is_told_to_nobody(
    ministack: S3Server, behind: S3Harness, proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch, logged: io.StringIO
) -> None:
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    async with open_store(behind.url, endpoint_url=proxy.url) as store:
        with pytest.raises(StagedError, match=r"[Cc]redentials"):
            await store.begin("append")
    proxy.plan = Plan("denied@DeleteObjects/*/d/f1:0 error_in_200@CompleteMultipartUpload:0 internal@UploadPart:0")
    await laid(behind)
    async with open_store(behind.process()) as store:
        with pytest.raises(CommitIncomplete) as raised:
            await DROP(store)
    shown = "".join(traceback.format_exception(raised.value)) + repr(store)
    assert "CANARY" not in shown + logged.getvalue().replace("botocore", "")


@pytest.mark.anyio
async def test_a_store_that_ignores_conditions_promises_neither_order_nor_fence(
    ministack: S3Server, behind: S3Harness, proxy: S3Proxy
) -> None:
    proxy.drops = ("If-Match", "If-None-Match")
    async with open_store(behind.process()) as store:
        for mode in Mode:
            for guarantee in ("serialised", "fenced"):
                with pytest.raises(Unsupported):
                    await store.begin(mode, require=[guarantee])  # type: ignore[list-item]
        assert await DROP(store) == "committed"
    assert await behind.files() == {"new": b"new", "both": b"new"}


@pytest.mark.anyio
async def test_a_store_that_ignores_the_etags_of_what_is_to_be_deleted_is_asked_before(
    s3_servers: Callable[[str], S3Server],
) -> None:
    moto = s3_servers("moto")
    target = await laid(S3Harness(moto.client(), moto.bucket()))
    driver = target.process()
    await driver.probe()
    listed = [one async for page in driver.list() for one in page]
    await target.put("old", b"a stranger's")
    assert sorted(await driver.remove(listed)) == ["done", "done", "foreign"]
    assert await target.files() == {"old": b"a stranger's"}
    async with open_store(target.process()) as store:
        assert await DROP(store) == "committed"
    assert await target.files() == {"new": b"new", "both": b"new"}
    assert await target.leftovers() == []


# ------------------------------------------------------------------------------------------------------------------ faults


@pytest.mark.anyio
@pytest.mark.parametrize(
    "plan",
    [
        "lost@CompleteMultipartUpload:0",
        "doubled@CompleteMultipartUpload:0",
        "error_in_200@CompleteMultipartUpload:0",
        "error_in_200_applied@CompleteMultipartUpload:0",
        "no_such_upload@CompleteMultipartUpload:0",
        "internal_applied@CompleteMultipartUpload:1",
        "slow_down@CompleteMultipartUpload:0+1",
        "conflict_409@PutObject:3 conflict_409@PutObject:7",
        "lost@PutObject:2 lost@PutObject:4 lost@PutObject:9",
        "lost@DeleteObjects:0",
        "late@DeleteObjects:0+5",
        "internal@DeleteObjects:0 slow_down@DeleteObjects:1",
        "lost@UploadPart:0 doubled@UploadPart:1 late@UploadPart:2+2",
        "cut@AbortMultipartUpload:0 lost@ListParts:0",
    ],
)
async def test_a_fault_that_passes_is_got_over(behind: S3Harness, proxy: S3Proxy, plan: str) -> None:
    await laid(behind)
    proxy.plan = Plan(plan)
    async with open_store(behind.process()) as store:
        assert await DROP(store) == "committed"
    await to_thread.run_sync(proxy.replay)
    assert await behind.files() == {"new": b"new", "both": b"new"}
    assert await behind.leftovers() == []


@pytest.mark.anyio
@pytest.mark.parametrize("resolve", ["keep", "replace"])
async def test_a_completion_that_answers_200_and_never_shows_is_noticed(
    behind: S3Harness, proxy: S3Proxy, resolve: Resolve
) -> None:
    """As when the key was deleted by somebody after the upload was begun."""
    await laid(behind)
    proxy.plan = Plan("vanishes@CompleteMultipartUpload/*/new:0")
    async with open_store(behind.process()) as store:
        with pytest.raises(CommitBlocked, match="'new'") as raised:
            await DROP(store)
        assert raised.value.paths == ("new",)
        assert (await behind.files()).keys() == {"old", "both", "d/f1"}, "nothing is removed before all is there"
        # What is gone cannot be brought back: nothing is removed for what did not come.
        await store.recover(resolve=resolve)
        assert await behind.files() == {"both": b"new", "old": b"old", "d/f1": b"old"}
        last = (await store.status()).last
        assert last is not None
        receipt = (await store.outcome(last.transaction)).receipt
        assert receipt is not None
        assert (receipt.files, receipt.left) == (1, 3)
        assert await behind.leftovers() == []


@pytest.mark.anyio
async def test_a_completion_that_answers_200_and_did_nothing_is_made_again(
    target: S3Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete, lied = Bucket.complete, list[str]()

    async def lie(self: Bucket, name: str, upload: str, parts: Any) -> str:
        if name.endswith("new") and not lied:
            lied.append(name)
            return "an-etag"
        return await complete(self, name, upload, parts)

    monkeypatch.setattr(Bucket, "complete", lie)
    async with open_store((await laid(target)).process()) as store:
        with pytest.raises(CommitIncomplete, match="was not"):
            await DROP(store)
        await store.recover()
    assert await target.files() == {"new": b"new", "both": b"new"}
    assert await target.leftovers() == []


@pytest.mark.anyio
async def test_a_part_that_arrived_twice_with_other_etags_is_completed_as_it_is(target: S3Harness) -> None:
    async with open_store(target.process()) as store:
        tx = await store.begin("append")
        await tx.write("same size", b"1234")
        await tx.write("other size", b"1234")
        await tx.prepare()
        for name, body in (("same size", b"abcd"), ("other size", b"too long")):
            upload = next(one for one in _uploads(target) if one["Key"].endswith(name))["UploadId"]
            target.client.upload_part(
                Bucket=target.bucket, Key=f"{target.path}/{name}", UploadId=upload, PartNumber=1, Body=body
            )
        with pytest.raises(CommitBlocked, match="'other size'"):
            await tx.commit()
        await store.recover(resolve="keep")
    assert await target.files() == {"same size": b"abcd"}


def _uploads(target: S3Harness) -> list[Any]:
    return list(target.client.list_multipart_uploads(Bucket=target.bucket).get("Uploads", ()))


@pytest.mark.anyio
async def test_what_was_cleared_away_since_it_was_prepared_is_noticed_before_the_decision(
    target: S3Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("staged.lifecycle._FRESH", 0.0)
    async with open_store((await laid(target)).process()) as store:
        tx = await store.begin("full_drop")
        await tx.write("new", b"new")
        await tx.prepare()
        upload = _uploads(target)[0]
        target.client.abort_multipart_upload(Bucket=target.bucket, Key=upload["Key"], UploadId=upload["UploadId"])
        with pytest.raises(StagingError, match="no longer staged"):
            await tx.commit()
    assert await target.files() == PRIOR


@pytest.mark.anyio
async def test_two_tasks_that_write_into_one_file_take_turns(
    target: S3Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("staged.drivers._cloud._PART", 1_000)
    async with (
        open_store(target.process()) as store,
        store.staged_write("append") as tx,
        tx.open("a") as file,
        anyio.create_task_group() as tasks,
    ):
        for number in range(20):
            tasks.start_soon(file.write, bytes([number]) * 1_000)
    body = (await target.files())["a"]
    assert sorted(body[at : at + 1_000] for at in range(0, 20_000, 1_000)) == [bytes([n]) * 1_000 for n in range(20)]


@pytest.mark.anyio
async def test_a_service_that_takes_no_deletion_of_many_is_asked_for_each(ministack: S3Server) -> None:
    """Such as one that wants a digest which the SDK no longer sends."""
    client = client_of(ministack.url)

    def refuse(**_: object) -> None:
        said = {"Error": {"Code": "MissingContentMD5"}, "ResponseMetadata": {"HTTPStatusCode": 400}}
        raise ClientError(said, "DeleteObjects")  # type: ignore[arg-type]

    client.meta.events.register("before-call.s3.DeleteObjects", refuse)
    target = await laid(S3Harness(ministack.client(), ministack.bucket(), sent=client))
    async with open_store(target.process()) as store:
        assert await DROP(store) == "committed"
        await store.gc(older_than=timedelta(0))
    assert await target.files() == {"new": b"new", "both": b"new"}
    client.close()


@pytest.mark.anyio
async def test_an_overlap_with_a_commit_since_the_base_is_found_before_the_decision(target: S3Harness) -> None:
    """Else such an upload could complete and never be seen."""
    async with open_store((await laid(target)).process()) as store:
        for mode in (Mode.OVERWRITE_FILES, Mode.FULL_DROP, Mode.OVERWRITE_PARTITIONS):
            tx = await store.begin(mode)
            await tx.write("d/f1", b"late")
            async with store.staged_write("append") as other:
                await other.delete("d/f1")
            with pytest.raises(Conflict, match="d/f1"):
                await tx.commit()
            await tx.rollback()
            await target.put("d/f1", b"again")
    assert (await target.files())["d/f1"] == b"again"
    assert await target.leftovers() == []


@pytest.mark.anyio
@pytest.mark.parametrize("resolve", [None, "keep"])
async def test_a_key_that_may_not_be_deleted_leaves_the_commit_to_be_completed(
    behind: S3Harness, proxy: S3Proxy, resolve: Resolve | None
) -> None:
    await laid(behind)
    proxy.plan = Plan("denied@DeleteObjects/*/d/f1:0")
    async with open_store(behind.process()) as store:
        with pytest.raises(CommitIncomplete, match="d/f1"):
            await DROP(store)
        assert await behind.files() == {"new": b"new", "both": b"new", "d/f1": b"old"}
        if resolve is not None:
            proxy.plan = Plan(" ".join(f"denied@DeleteObjects/*/d/f1:{number}" for number in range(9)))
        await store.recover(resolve=resolve)
    kept = {} if resolve is None else {"d/f1": b"old"}
    assert await behind.files() == {"new": b"new", "both": b"new", **kept}


@pytest.mark.anyio
async def test_an_upload_of_which_nobody_was_told_is_empty_and_nobody_elses_is_touched(
    behind: S3Harness, proxy: S3Proxy
) -> None:
    behind.client.create_multipart_upload(Bucket=behind.bucket, Key=f"{behind.path}/a")
    proxy.plan = Plan("lost@CreateMultipartUpload:0")
    async with open_store(behind.process()) as store:
        async with store.staged_write("append") as tx:
            await tx.write("a", b"1")
        await store.gc(older_than=timedelta(0))
    assert await behind.files() == {"a": b"1"}
    # One is a stranger's; of the other nobody knows the id. It has no parts, and costs nothing.
    assert await behind.leftovers() == [f"{behind.path}/a"] * 2
    behind.lossy = True
    assert await behind.leftovers() == []


async def cancelled(proxy: S3Proxy, operation: str, work: Callable[[], Awaitable[object]]) -> bool:
    """Whether work was cancelled while a request of that kind was under way."""
    token = trio.lowlevel.current_trio_token() if in_trio() else None
    soon: Any = token.run_sync_soon if token is not None else asyncio.get_running_loop().call_soon_threadsafe
    before = proxy.counts[operation]
    with anyio.CancelScope() as scope:
        proxy.before = lambda number: proxy.counts[operation] > before and soon(scope.cancel)
        await work()
    proxy.before = lambda number: None
    return scope.cancelled_caught


@pytest.mark.anyio
async def test_a_cancelled_write_leaves_no_upload(behind: S3Harness, proxy: S3Proxy) -> None:
    async with open_store(behind.process()) as store, store.staged_write("append") as tx:
        for operation in ("CreateMultipartUpload", "PutObject", "UploadPart"):
            assert await cancelled(proxy, operation, partial(tx.write, f"x-{operation}", b"1"))
        await tx.write("kept", b"1")
    assert await behind.files() == {"kept": b"1"}
    assert await behind.leftovers() == []


# ----------------------------------------------------------------------------------------------------------- what is asked


@pytest.mark.anyio
async def test_a_commit_is_one_request_a_file_and_copies_no_byte(
    behind: S3Harness, proxy: S3Proxy, figure: Figure, anyio_backend: str
) -> None:
    async def counted(files: int) -> tuple[Counter[str], Counter[str]]:
        proxy.clear()
        async with open_store(behind.process()) as store:
            await store.capabilities()
            proxy.clear()
            tx = await store.begin("append")
            async with anyio.create_task_group() as tasks:
                for number in range(files):
                    tasks.start_soon(tx.write, f"{tx.id}/{number}", b"x" * 10_000)
            await tx.prepare()
            staged = proxy.counts.copy()
            sent = proxy.traffic["up"]
            assert staged["CreateMultipartUpload"] == staged["UploadPart"] == files
            assert sent < files * 10_000 * 1.2
            await tx.commit()
            return staged, proxy.counts - staged

    (few, at_commit), (more, later) = await counted(20), await counted(60)
    assert at_commit.pop("CompleteMultipartUpload") == 20
    assert later.pop("CompleteMultipartUpload") == 60
    # Whatever else a commit asks for does not depend on the number of files, but for records that many writes share.
    records = ("GetObject", "PutObject", "DeleteObjects")
    assert {name: later[name] for name in later if name not in records} == {"ListObjectsV2": 4}
    assert at_commit["ListObjectsV2"] == later["ListObjectsV2"]
    assert (few + at_commit)["CopyObject"] == 0
    around = sum((more + later).values()) - 2 * 60
    figure(
        f"requests on S3, {anyio_backend}",
        f"3 a file, and {around} around them, {later.total()} at commit: {dict(later)}",
    )
    assert later.total() <= 25


@pytest.mark.anyio
async def test_a_file_of_many_parts_is_completed_by_whoever_asks_for_them_again(
    target: S3Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("staged.drivers._cloud._PART", 1_000)
    sizes = [0, 1, 999, 1_000, 1_001, 16_000, 16_001, 40_000]
    bodies = {f"f{size}": os.urandom(size) for size in sizes}
    async with open_store(target.process()) as store:
        tx = await store.begin("append")
        for name, body in bodies.items():
            async with tx.open(name) as file:
                for at in range(0, len(body), 700):
                    await file.write(body[at : at + 700])
        await tx.prepare()
    async with open_store(target.process()) as other:
        resumed = await other.resume(tx.id)
        await resumed.commit()
    assert await target.files() == bodies
    assert await target.leftovers() == []


# ------------------------------------------------------------------------------------------------------------------- names


@pytest.mark.anyio
async def test_whatever_a_key_is_called_it_is_listed_and_removed_and_its_neighbours_are_not(target: S3Harness) -> None:
    odd = ["a b", "a+b", "a%20b", "ü", "a&<b>\"'", "tab\t", "line\n", "bell\a", "end\r", "~", "😀", "a=1"]
    for name in odd:
        await target.put(name, b"1")
    near = [f"{target.path}2/x", f"{target.path}-x", target.path, "lake/x"]
    for name in near:
        target.client.put_object(Bucket=target.bucket, Key=name, Body=b"1")
    async with open_store(target.process()) as store:
        assert {path async for page in store._driver.list() for path in [one.path for one in page]} == set(odd)
        assert await DROP(store) == "committed"
        tx = await store.begin("append")
        for name in ("a b", "a+b%20", "ü", "a&'", "😀"):
            await tx.write(f"d/{name}", name.encode())
        await tx.commit()
    files = await target.files()
    assert {name[2:]: data.decode() for name, data in files.items() if name.startswith("d/")} == {
        name: name for name in ("a b", "a+b%20", "ü", "a&'", "😀")
    }
    assert files.keys() - {f"d/{name}" for name in ("a b", "a+b%20", "ü", "a&'", "😀")} == {"new", "both"}
    there = {one["Key"] for one in target.client.list_objects_v2(Bucket=target.bucket)["Contents"]}
    assert there >= set(near)


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["a//b", "x/../y", "/a", "./a"])
async def test_a_name_that_nobody_could_remove_after_a_crash_is_refused_before_the_decision(
    target: S3Harness, name: str
) -> None:
    await target.put(name, b"1")
    async with open_store(target.process()) as store:
        with pytest.raises(Conflict, match="remove it first"):
            await DROP(store)
        assert await Work(Mode.APPEND, (("b", b"1"),))(store) == "committed"
    assert await target.files() == {name: b"1", "b": b"1"}


@pytest.mark.anyio
async def test_markers_of_directories_are_no_files(target: S3Harness) -> None:
    for marker in ("", "d/", "d/e/"):
        await target.put(marker, b"")
    async with open_store(target.process()) as store:
        assert await Work(Mode.ERROR, (("a", b"1"),))(store) == "committed"
        assert await DROP(store) == "committed"
    assert (await target.files()).keys() == {"", "d/", "d/e/", "new", "both"}


@pytest.mark.anyio
async def test_in_a_versioned_bucket_what_was_replaced_or_removed_is_there_as_an_older_version(
    ministack: S3Server,
) -> None:
    target = await laid(S3Harness(ministack.client(), ministack.bucket(versioned=True)))
    async with open_store(target.process()) as store:
        assert await DROP(store) == "committed"
        assert await Work(Mode.APPEND, (("old", b"anew"),))(store) == "committed"
        await store.gc(older_than=timedelta(0))
    assert await target.files() == {"new": b"new", "both": b"new", "old": b"anew"}
    assert await target.leftovers() == []
    versions = target.client.list_object_versions(Bucket=target.bucket, Prefix=f"{target.path}/")["Versions"]
    names = Counter(one["Key"].removeprefix(f"{target.path}/") for one in versions)
    assert names == {"old": 2, "both": 2, "d/f1": 1, "new": 1}


@pytest.mark.anyio
async def test_more_than_a_page_is_listed_and_more_than_a_request_is_removed(behind: S3Harness, proxy: S3Proxy) -> None:
    for number in range(1_003):
        behind.client.put_object(Bucket=behind.bucket, Key=f"{behind.path}/f{number}", Body=b"1")
    proxy.clear()
    async with open_store(behind.process()) as store:
        assert await DROP(store) == "committed"
    assert await behind.files() == {"new": b"new", "both": b"new"}
    removals = [one for one in proxy.log if one.operation == "DeleteObjects" and "_staged" not in one.key]
    assert [len(one.keys) for one in removals] == [1_000, 3]
