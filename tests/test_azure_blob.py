"""Azure Blob Storage, against Azurite: the conformance class, and what the driver promises beyond it."""

from __future__ import annotations

import io
import itertools
import traceback
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread
from azure.storage.blob import BlobBlock, ContainerClient
from azure.storage.blob.aio import BlobServiceClient
from azurite import ACCOUNT, KEY, AzuriteServer, BlobProxy, missing

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
from staged.drivers._cloud import Refused
from staged.drivers._container import Container
from staged.drivers.azure_blob import AzureBlobDriver
from staged.model import Answer, Entry, Mode, Resolve
from staged.states import new_id
from staged.testing.conformance import DriverConformance
from staged.testing.exploration import Work
from staged.testing.harness import Files, Harness, Step

_NUMBERS = itertools.count()
_DAY = 86_400


class BlobHarness(Harness):
    """A target of its own in a container.

    Args:
        container: Behind the drivers' back.
        path: Its prefix; empty where the target is a container of its own. By default a new one.
        url: Where the drivers find the account, if that is not where it is.
        signature: A shared access signature in place of the account's key.
    """

    resolution = 1.0

    def __init__(
        self,
        container: ContainerClient,
        path: str | None = None,
        *,
        url: str = "",
        signature: str = "",
        period: float = 0.5,
    ) -> None:
        self.path = f"lake/target-{next(_NUMBERS)}" if path is None else path
        self.container, self.period, self.signature = container, period, signature
        account = f"{url}/{ACCOUNT}" if url else container.url.rpartition("/")[0]
        self.url = f"{account}/{container.container_name}/{self.path}"
        self.drivers: list[Driver] = []
        above, _, name = self.path.rpartition("/")
        self.control = f"{above}/_staged/{name or '_staged'}/".lstrip("/")
        self._start = f"{self.path}/" if self.path else ""

    def process(self, step: Step | None = None) -> Driver:
        url = f"{self.url}?{self.signature}" if self.signature else self.url
        credential: Any = None if self.signature else KEY
        self.drivers.append(AzureBlobDriver(url, credential=credential, period=self.period))
        return self.drivers[-1]

    async def aclose(self) -> None:
        for driver in self.drivers:
            await driver.aclose()

    async def kill(self, driver: Driver) -> None:
        pass

    def content(self) -> Files:
        names = [blob.name for blob in self.container.list_blobs(self._start)]
        return {
            name[len(self._start) :]: self.container.download_blob(name).readall()
            for name in names
            if "_staged" not in name.split("/")
        }

    def write(self, path: str, data: bytes) -> None:
        # As the service does and Azurite does only here, what is staged at that name is discarded.
        blob = self.container.get_blob_client(f"{self._start}{path}")
        blocks = [BlobBlock("f" * 56)] if data else []
        if data:
            blob.stage_block("f" * 56, io.BytesIO(data), length=len(data))
        blob.commit_block_list(blocks)

    def blocks(self) -> dict[str, int]:
        """What is staged, by name, and how many blocks of it."""
        found = self.container.list_blobs(self._start, include=["uncommittedblobs"])
        names = [blob.name for blob in found if "_staged" not in blob.name.split("/")]
        counts = {
            name[len(self._start) :]: len(self.container.get_blob_client(name).get_block_list("uncommitted")[1])
            for name in names
        }
        return {name: count for name, count in counts.items() if count}

    async def files(self) -> Files:
        return await to_thread.run_sync(self.content)

    async def put(self, path: str, data: bytes) -> None:
        await to_thread.run_sync(self.write, path, data)

    async def delete(self, path: str) -> None:
        await to_thread.run_sync(lambda: self.container.delete_blob(f"{self._start}{path}"))

    async def leftovers(self) -> list[str]:
        # Blocks stay where they are: nobody sees them, nobody can discard them, and they expire.
        found = await to_thread.run_sync(lambda: [blob.name for blob in self.container.list_blobs(self.control)])
        known = tuple(f"{self.control}{kind}" for kind in ("head", "ledger-", "tx/", "log/", "outcome/"))
        return [name for name in found if not name.startswith(known)]


@pytest.fixture(scope="module")
def server() -> Iterator[AzuriteServer]:
    if why := missing():
        pytest.skip(why)
    with AzuriteServer() as server:
        yield server


@pytest.fixture
def proxy(server: AzuriteServer) -> Iterator[BlobProxy]:
    with BlobProxy(server.url) as proxy:
        yield proxy


@pytest.fixture
async def harness(server: AzuriteServer, proxy: BlobProxy) -> AsyncIterator[BlobHarness]:
    """A target behind the proxy, whose writers are patient."""
    harness = BlobHarness(server.container(), url=proxy.url, period=30.0)
    yield harness
    await harness.aclose()


class _Served(DriverConformance):
    root = False

    @pytest.fixture(autouse=True)
    def _server(self, server: AzuriteServer) -> None:
        self.server = server
        self.container = server.container()

    def harness(self, directory: Path) -> Harness:
        return BlobHarness(self.server.container() if self.root else self.container, "" if self.root else None)


def _only(loop: str) -> object:
    """One event loop, where another target has the other: each request takes milliseconds."""

    @pytest.fixture(params=[loop])
    def anyio_backend(self: object, request: pytest.FixtureRequest) -> str:
        backend: str = request.param
        return backend

    return anyio_backend


class TestPrefix(_Served):
    """A prefix of a container."""

    anyio_backend = _only("asyncio")


class TestContainer(_Served):
    """A whole container."""

    root = True
    anyio_backend = _only("trio")


# ---------------------------------------------------------------------------------------------------------------- opening


@pytest.mark.parametrize(
    "url",
    [
        "https://account.blob.core.windows.net/container/lake/flights",
        "HTTPS://Account.blob.core.windows.net/container/lake/flights?sv=1&sig=canary",
        "wasbs://container@account.blob.core.windows.net/lake/flights",
        "wasb://container@Account.blob.core.windows.net/lake/flights/",
    ],
)
def test_every_spelling_of_a_url_is_the_same_target_and_shows_no_signature(url: str) -> None:
    store = open_store(url, **({} if "sig=" in url else {"credential": "canary"}))
    assert store.url == "https://account.blob.core.windows.net/container/lake/flights"
    assert "canary" not in repr(store)
    assert type(store._driver) is AzureBlobDriver


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:10000", "http://localhost:10000", "http://[::1]:10000", "http://azurite:10000"]
)
def test_where_the_host_names_no_account_the_path_does(address: str) -> None:
    store = open_store(f"{address}/{ACCOUNT}/container/lake", credential=KEY)
    assert store.url == f"{address}/{ACCOUNT}/container/lake"
    location = store._driver._objects._location  # type: ignore[attr-defined]
    assert (location.container, location.path) == ("container", "lake")


@pytest.mark.parametrize(
    "url",
    [
        "wasbs://account.blob.core.windows.net/lake",
        "wasbs://fs:canary@account.blob.core.windows.net/lake",
        "https://account.blob.core.windows.net",
        "https://account.blob.core.windows.net/container/../x",
        "https://account.blob.core.windows.net/container/a?sig=canary#x",
        f"http://127.0.0.1:1/{ACCOUNT}/?sig=canary",
    ],
)
def test_a_url_that_is_none_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        open_store(url)
    assert "canary" not in "".join(traceback.format_exception(raised.value))


@pytest.mark.anyio
async def test_what_cannot_hold_a_target_is_refused_before_anything_is_written(
    server: AzuriteServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_store(f"{server.url}/{ACCOUNT}/nothing/x", credential=KEY) as store:
        with pytest.raises(Unsupported, match="no container"):
            await store.begin("append")
    container = server.container()

    async def hierarchical(self: object) -> dict[str, bool]:
        return {"is_hns_enabled": True}

    monkeypatch.setattr("azure.storage.blob.aio.ContainerClient.get_account_information", hierarchical)
    async with open_store(container.url, credential=KEY) as store:
        with pytest.raises(Unsupported, match="abfss://"):
            await store.begin("append")
    assert list(container.list_blobs()) == []


@pytest.mark.anyio
async def test_who_may_not_ask_what_the_account_is_may_still_write(
    server: AzuriteServer, monkeypatch: pytest.MonkeyPatch, logged: io.StringIO
) -> None:
    async def denied(self: Container) -> bool:
        raise Refused("looking at the account", 403, "AuthorizationPermissionMismatch")

    monkeypatch.setattr(Container, "is_hierarchical", denied)
    container = server.container()
    async with open_store(f"{container.url}/lake", credential=KEY) as store:
        await Work(Mode.APPEND, (("a", b"1"),))(store)
    assert container.download_blob("lake/a").readall() == b"1"
    assert "may not be asked" in logged.getvalue()


@pytest.mark.anyio
async def test_a_clients_owner_keeps_it_and_children_share_it(server: AzuriteServer, anyio_backend: str) -> None:
    if anyio_backend == "trio":
        from azure.core.pipeline.transport import TrioRequestsTransport as Transport
    else:
        from azure.core.pipeline.transport import AioHttpTransport as Transport  # type: ignore[assignment]
    container = server.container()
    async with BlobServiceClient(f"{server.url}/{ACCOUNT}", credential=KEY, transport=Transport()) as client:
        for number in range(2):
            async with open_store(AzureBlobDriver(f"{container.url}/lake", client=client)) as store:
                await Work(Mode.APPEND, ((f"f{number}", b"1"),))(store.child("below"))
    assert {blob.name for blob in container.list_blobs("lake/below")} == {"lake/below/f0", "lake/below/f1"}


@pytest.mark.anyio
async def test_a_token_over_plain_http_is_refused_with_nothing_sent(server: AzuriteServer) -> None:
    class Token:
        async def get_token(self, *scopes: str) -> None:
            raise AssertionError("asked for")

        async def close(self) -> None: ...

    token: Any = Token()
    async with open_store(AzureBlobDriver(f"{server.container().url}/lake", credential=token)) as store:
        with pytest.raises(InvalidInput, match="only supported with HTTPS"):
            await store.begin("append")


@pytest.mark.anyio
async def test_no_signature_is_shown_logged_or_kept(
    server: AzuriteServer, proxy: BlobProxy, logged: io.StringIO, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not where all goes well, and not where requests fail for good, are cut off, or are denied."""
    container = server.container()
    signature = server.signature(container.container_name)
    secret = signature.partition("sig=")[2].partition("&")[0]
    harness = BlobHarness(container, url=proxy.url, signature=signature, period=30.0)
    said: list[str] = []
    async with open_store(harness.process()) as store:
        said += [repr(store), store.url]
        await Work(Mode.APPEND, (("a", b"1"), ("large", bytes(9 << 20))))(store)
        await Work(Mode.FULL_DROP, (("b", b"1"), ("c", b"")))(store)
        with pytest.raises(StagedError) as raised:
            await Work(Mode.APPEND, (("b", b"2"),))(store)
        said += traceback.format_exception(raised.value)
    assert harness.content() == {"b": b"1", "c": b""}
    denied = AzureBlobDriver(f"{harness.url}?{signature.replace('sp=', 'sp=x')}")
    async with open_store(denied) as store:
        with pytest.raises(StagedError) as raised:
            await store.begin("append")
        said += traceback.format_exception(raised.value)
    texts = [*said, logged.getvalue(), *capfd.readouterr()]
    texts += [container.download_blob(blob.name).readall().decode("latin-1") for blob in container.list_blobs()]
    assert logged.getvalue()
    assert not [text for text in texts if secret in text]


# ---------------------------------------------------------------------------------------------------------------- requests


@pytest.mark.anyio
async def test_a_file_costs_two_requests_and_a_large_one_only_its_blocks_more(
    harness: BlobHarness, proxy: BlobProxy
) -> None:
    async def commit(count: int, data: bytes, mode: Mode) -> dict[str, int]:
        proxy.clear()
        async with open_store(harness.process()) as store:
            await Work(mode, tuple((f"{mode}/{len(data)}/f{number:03d}", data) for number in range(count)))(store)
        return dict(proxy.counts)

    await commit(1, b"", Mode.APPEND)  # the first commit has no earlier one to look at
    one, many = await commit(2, b"1", Mode.APPEND), await commit(60, b"12", Mode.APPEND)
    assert {kind: many[kind] - one[kind] for kind in many if many[kind] != one[kind]} == {
        "PutBlock": 58,
        "PutBlockList": 58,
    }
    one = await commit(1, b"123", Mode.APPEND)
    large = await commit(1, bytes(20 << 20), Mode.APPEND)
    assert {kind: large[kind] - one[kind] for kind in large if large[kind] != one[kind]} == {"PutBlock": 2}
    again = await commit(60, b"12", Mode.OVERWRITE_FILES)
    replaced = await commit(60, b"12", Mode.OVERWRITE_FILES)
    # What replaces another may have been discarded by it, and is asked for by name.
    assert (replaced["GetBlockList"], again.get("GetBlockList", 0)) == (60, 0)
    dropped = await commit(1, b"1", Mode.FULL_DROP)
    assert 122 <= dropped["DeleteBlob"] < 135


@pytest.mark.anyio
async def test_a_commit_names_blocks_that_are_not_committed_and_says_what_it_replaces(
    harness: BlobHarness, proxy: BlobProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, bytes]] = []
    sent = BlobProxy._passed

    async def watched(self: BlobProxy, raw: Any, request: Any) -> Any:
        if request.asked.operation == "PutBlockList":
            seen.append((request.asked.key, request.body))
        return await sent(self, raw, request)

    monkeypatch.setattr(BlobProxy, "_passed", watched)
    await harness.put("old", b"old")
    async with open_store(harness.process()) as store:
        await Work(Mode.OVERWRITE_FILES, (("old", b"1"), ("new", b"2"), ("empty", b"")))(store)
    assert len(seen) == 3
    for name, body in seen:
        kinds = [kind for kind in (b"<Latest>", b"<Committed>", b"<Uncommitted>") if kind in body]
        assert kinds == ([] if name.endswith("empty") else [b"<Uncommitted>"]), body
    conditions = {
        record.key.rpartition("/")[2]: dict(record.conditions)
        for record in proxy.log
        if record.operation == "PutBlockList"
    }
    assert conditions["new"] == conditions["empty"] == {"if-none-match": "*"}
    assert set(conditions["old"]) == {"if-match"}


@pytest.mark.anyio
async def test_what_is_removed_in_many_is_removed_each_on_its_own_condition(harness: BlobHarness) -> None:
    driver = harness.process()
    names = [f"f{number:03d}" for number in range(300)]
    async with anyio.create_task_group() as tasks:
        for name in (*names, "with space", "100%41", "ü"):
            tasks.start_soon(harness.put, name, b"1")
    listed = sorted([one async for page in driver.list() for one in page], key=lambda one: one.path)
    changed, gone = {"f001", "f257", "ü"}, {"f003", "f299"}
    for name in changed:
        await harness.put(name, b"2")
    for name in gone:
        await harness.delete(name)
    answers = dict(zip([one.path for one in listed], await driver.remove(listed), strict=True))
    assert {name for name, answer in answers.items() if answer is Answer.FOREIGN} == changed
    assert {name for name, answer in answers.items() if answer is Answer.ALREADY} == gone
    assert set(harness.content()) == changed


# ---------------------------------------------------------------------------------------------------- what is not committed


async def _staged(driver: Driver, tx: str, path: str, data: bytes) -> Entry:
    async def nowhere(handle: str) -> None:
        raise AssertionError("there is nothing to discard, and so nothing to log")

    writer = await driver.stage(tx, path, nowhere)
    await writer.write(data)
    return await writer.close()


@pytest.mark.anyio
async def test_what_is_rolled_back_or_came_late_is_seen_by_nobody_and_is_in_nobodys_way(harness: BlobHarness) -> None:
    async with open_store(harness.process()) as store:
        for data in (b"1", bytes(9 << 20), b""):
            with pytest.raises(ZeroDivisionError):
                async with store.staged_write("append") as tx:
                    await tx.write("d/a", data)
                    raise ZeroDivisionError
        assert (harness.content(), harness.blocks()) == ({}, {"d/a": 4})  # declared: they stay for a week
        await Work(Mode.ERROR, (("d/a", b"2"),))(store)
    assert (harness.content(), harness.blocks()) == ({"d/a": b"2"}, {})


@pytest.mark.anyio
@pytest.mark.parametrize("data", [b"ours", b""])
async def test_a_late_repeat_of_a_publication_finds_its_blocks_consumed(harness: BlobHarness, data: bytes) -> None:
    driver, tx = harness.process(), new_id()
    entry = await _staged(driver, tx, "a", data)
    await driver.seal(tx, [entry])
    assert await driver.publish(tx, [entry], {}) == [Answer.DONE]
    assert await driver.publish(tx, [entry], {}) == [Answer.ALREADY]
    await harness.delete("a")
    assert await driver.publish(tx, [entry], {}) == [Answer.LOST]
    assert await harness.files() == {}


@pytest.mark.anyio
async def test_a_name_of_which_a_stranger_sends_blocks_of_another_kind_cannot_be_staged(harness: BlobHarness) -> None:
    harness.container.get_blob_client(f"{harness.path}/a").stage_block("other", b"1")
    async with open_store(harness.process()) as store:
        with pytest.raises(StagingError, match="'a' cannot be staged"):
            await Work(Mode.APPEND, (("a", b"1"),))(store)
        await Work(Mode.APPEND, (("b", b"1"),))(store)
    assert await harness.files() == {"b": b"1"}


@pytest.mark.anyio
async def test_what_a_stranger_changed_without_writing_it_is_not_replaced(harness: BlobHarness) -> None:
    """Metadata are changed without discarding what is staged: then the ETag alone tells."""
    driver, tx = harness.process(), new_id()
    await harness.put("a", b"old")
    old = {one.path: one.identity async for page in driver.list() for one in page}
    entry = await _staged(driver, tx, "a", b"new")
    await driver.seal(tx, [entry])
    await to_thread.run_sync(
        lambda: harness.container.get_blob_client(f"{harness.path}/a").set_blob_metadata({"theirs": "1"})
    )
    assert await driver.publish(tx, [entry], old) == [Answer.FOREIGN]
    assert await harness.files() == {"a": b"old"}
    now = {one.path: one.identity async for page in driver.list() for one in page}
    assert await driver.publish(tx, [entry], now) == [Answer.DONE]
    assert await harness.files() == {"a": b"new"}


@pytest.mark.anyio
@pytest.mark.parametrize("leaves", ["a file", "nothing"])
@pytest.mark.parametrize("since", ["staging", "preparing"])
async def test_what_a_stranger_discarded_is_missed_before_the_decision(
    harness: BlobHarness, proxy: BlobProxy, leaves: str, since: str
) -> None:
    async with open_store(harness.process()) as store:
        tx = await store.begin("overwrite_files")
        for name in ("a", "b"):
            await tx.write(name, b"ours")
        if since == "preparing":
            await tx.prepare()
            proxy.ahead = 3600
        await harness.put("a", b"a stranger's")
        if leaves == "nothing":
            await harness.delete("a")
        with pytest.raises(Conflict, match="'a' is no longer staged"):
            await tx.commit()
        await tx.rollback()
    assert await harness.files() == ({"a": b"a stranger's"} if leaves == "a file" else {})


@pytest.mark.anyio
@pytest.mark.parametrize("resolve", ["keep", "replace"])
async def test_what_a_stranger_discards_after_the_decision_is_said_to_be_lost_and_nothing_is_removed_for_it(
    harness: BlobHarness, proxy: BlobProxy, resolve: Resolve
) -> None:
    harness.period = 0.5
    await harness.put("old", b"old")
    async with open_store(harness.process()) as store:
        proxy.clear()

        def steal(number: int) -> None:
            # With the first that is put together the decision is made.
            if proxy.counts["PutBlockList"] == 1 and not stolen:
                stolen.append(number)
                harness.write("a", b"a stranger's")

        stolen: list[int] = []
        proxy.before = steal
        with pytest.raises(CommitBlocked, match="are gone: 'a'"):
            await Work(Mode.FULL_DROP, (("a", b"ours"),))(store)
        assert stolen
        proxy.before = lambda number: None
        await store.recover(resolve=resolve)
    assert await harness.files() == {"a": b"a stranger's", "old": b"old"}


@pytest.mark.anyio
async def test_a_lease_on_what_is_replaced_is_named_and_the_commit_completed_when_it_ends(harness: BlobHarness) -> None:
    harness.period = 0.5
    await harness.put("a", b"old")
    leased = harness.container.get_blob_client(f"{harness.path}/a")
    async with open_store(harness.process()) as store:
        tx = await store.begin("overwrite_files")
        await tx.write("a", b"ours")
        await tx.prepare()
        lease = await to_thread.run_sync(leased.acquire_lease)
        with pytest.raises(CommitIncomplete, match="LeaseIdMissing"):
            await tx.commit()
        with pytest.raises(CommitIncomplete, match="LeaseIdMissing"):
            await store.recover(resolve="replace")
        await to_thread.run_sync(lease.break_lease, 0)
        await store.recover()
    assert await harness.files() == {"a": b"ours"}


@pytest.mark.anyio
@pytest.mark.parametrize("mode", [Mode.OVERWRITE_FILES, Mode.FULL_DROP])
async def test_a_commit_since_the_base_that_touched_a_staged_name_is_a_conflict_in_every_mode(
    harness: BlobHarness, mode: Mode
) -> None:
    """The other's commit discarded the blocks; what was sent again under the same names hides that from a listing."""
    async with open_store(harness.process()) as store, open_store(harness.process()) as other:
        tx = await store.begin(mode)
        await tx.write("a", b"ours")
        await Work(Mode.APPEND, (("a", b"theirs"),))(other)
        await Work(Mode.OVERWRITE_FILES, (("b", b"theirs"),), deletes=("a",))(other)
        late = await other.begin("append")
        await late.write("a", b"late")
        with pytest.raises(Conflict):
            await tx.commit()
        await tx.rollback()
        await late.rollback()
    assert await harness.files() == {"b": b"theirs"}


@pytest.mark.anyio
@pytest.mark.parametrize("moment", ["prepare", "commit"])
async def test_nothing_is_decided_that_the_service_may_soon_discard(
    harness: BlobHarness, proxy: BlobProxy, moment: str
) -> None:
    """By the service's clock, whatever the writer's is."""
    async with open_store(harness.process()) as store:
        for days, in_time in ((5.9, True), (6.1, False)):
            proxy.ahead = 40 * _DAY
            tx = await store.begin("append")
            await tx.write(f"f{days}", b"1")
            if moment == "commit":
                await tx.prepare()
            proxy.ahead += int(days * _DAY)
            end = tx.commit if moment == "commit" or in_time else tx.prepare
            if in_time:
                await end()
                continue
            with pytest.raises(StagingError, match="more than six days ago"):
                await end()
            await tx.rollback()
    assert await harness.files() == {"f5.9": b"1"}
