"""What the Azure drivers promise beyond the conformance class: URLs, names, requests, gaps, throttling, secrets."""

from __future__ import annotations

import io
import traceback
from collections.abc import Callable, Iterator
from contextlib import aclosing
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from azure.core.credentials import AzureSasCredential
from azure.identity import CredentialUnavailableError
from azure.storage.filedatalake.aio import DataLakeServiceClient
from dfs import DfsServer, Plan
from dfs.service import Request, route
from test_adls import SAS, AdlsHarness

from staged import CommitBlocked, CommitIncomplete, Conflict, InvalidInput, StagedError, Unsupported, open_store
from staged.drivers._azure import Location, in_trio
from staged.drivers._cloud import Limit, Refused
from staged.drivers._lake import Lake
from staged.drivers.adls import AdlsDriver
from staged.drivers.onelake import OneLakeDriver
from staged.model import Mode
from staged.testing.exploration import Work

Figure = Callable[[str, str], None]
CANARY = "canary0123456789"
KEY = {"account_name": "acct", "account_key": "Y2FuYXJ5MDEyMzQ1Njc4OQ=="}


@pytest.fixture
def server() -> Iterator[DfsServer]:
    with DfsServer() as server:
        yield server


# ---------------------------------------------------------------------------------------------------------------- opening


@pytest.mark.parametrize(
    "url",
    [
        "abfss://fs@account.dfs.core.windows.net/lake/flights",
        "ABFSS://fs@Account.dfs.core.windows.net/lake/flights",
        "https://account.dfs.core.windows.net/fs/lake/flights",
        "https://account.dfs.core.windows.net/fs/lake/flights?sv=1&sig=canary",
    ],
)
def test_every_spelling_of_a_url_is_the_same_target_and_shows_no_signature(url: str) -> None:
    store = open_store(url, **({} if "sig=" in url else {"credential": "canary"}))
    assert store.url == "abfss://fs@account.dfs.core.windows.net/lake/flights"
    assert "canary" not in repr(store)
    assert type(store._driver) is AdlsDriver


def test_onelake_is_known_by_its_host() -> None:
    for host in ("onelake", "northeurope-onelake", "msit-onelake"):
        store = open_store(f"abfss://sales@{host}.dfs.fabric.microsoft.com/x.Lakehouse/Files/t", credential="sig=1")
        assert type(store._driver) is OneLakeDriver


@pytest.mark.parametrize(
    "url",
    [
        "abfss://account.dfs.core.windows.net/lake",
        "abfss://fs:canary@account.dfs.core.windows.net/lake",
        "https://account.dfs.core.windows.net",
        "https://account.dfs.core.windows.net/fs/../x",
        "https://account.dfs.core.windows.net/fs/a?sig=canary#x",
        "abfss://fs@account.dfs.core.windows.net:canary/lake",
    ],
)
def test_a_url_that_is_none_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        open_store(url)
    assert "canary" not in "".join(traceback.format_exception(raised.value))


@pytest.mark.anyio
async def test_what_cannot_hold_a_target_is_refused_before_anything_is_written(server: DfsServer) -> None:
    server.namespace.create_filesystem("fs")
    server.namespace.create("fs", "file")
    for path, why in (("nothing/x", "no file system"), ("fs/file", "is a file")):
        async with open_store(AdlsDriver(f"{server.url}/{path}", credential="sig=1")) as store:
            with pytest.raises(Unsupported, match=why):
                await store.begin("append")
    assert server.namespace.paths("fs") == ["file"]


@pytest.mark.anyio
@pytest.mark.parametrize("denied", [(), ("get_access",)], ids=["may ask", "may ask the account only"])
async def test_an_account_without_a_hierarchical_namespace_is_refused(denied: tuple[str, ...]) -> None:
    with DfsServer(hierarchical=False, denied=denied) as server:
        server.namespace.create_filesystem("fs")
        async with open_store(AdlsDriver(f"{server.url}/fs/x", credential="sig=1")) as store:
            with pytest.raises(Unsupported, match="no hierarchical namespace"):
                await store.begin("append")
        assert server.namespace.paths("fs") == []


@pytest.mark.anyio
async def test_who_may_not_look_at_access_control_may_still_write(logged: io.StringIO) -> None:
    for denied in (("get_access",), ("get_access", "account", "set_access")):
        with DfsServer(denied=denied) as server:
            harness = AdlsHarness(server, period=30.0)
            async with open_store(harness.process()) as store:
                await Work(Mode.FULL_DROP, (("a", b"1"),))(store)
            assert harness.content() == {"a": b"1"}
        assert "may not be taken over" in logged.getvalue()
        assert ("may not be asked" in logged.getvalue()) == ("account" in denied)


@pytest.mark.anyio
async def test_what_the_target_grants_is_granted_by_what_is_committed_to_it(server: DfsServer) -> None:
    """A new tree grants what the old one did, and a new file what the target gives to its files."""
    granted = "user::rwx,group::r-x,group:etl:r-x,mask::r-x,other::---"
    defaults = "default:user::rwx,default:group::r-x,default:group:etl:r-x,default:mask::r-x,default:other::---"
    harness = AdlsHarness(server, period=30.0)
    await harness.put("old", b"old")
    server.namespace.find(harness.filesystem, harness.path).acl = f"{granted},{defaults}"

    def grants(path: str) -> str:
        return server.namespace.find(harness.filesystem, f"{harness.path}/{path}".rstrip("/")).acl

    async with open_store(harness.process()) as store:
        await Work(Mode.APPEND, (("p=0/a", b"1"),))(store)
        assert (grants("p=0/a"), grants("")) == (granted, f"{granted},{defaults}")
        for files in ((("b", b"1"), ("p=0/b", b"1")), ()):
            async with store.staged_write("full_drop", allow_empty=True) as tx:
                for path, data in files:
                    await tx.write(path, data)
            assert grants("") == f"{granted},{defaults}"
            assert all(grants(path) == granted for path, _ in files)
            assert harness.content() == dict(files)


@pytest.mark.anyio
async def test_a_tree_that_takes_several_requests_to_rename_or_delete_is_renamed_and_deleted_whole(
    anyio_backend: str,
) -> None:
    with DfsServer(page=3) as server:
        harness = AdlsHarness(server, period=30.0)
        async with open_store(harness.process()) as store:
            for number in range(3):
                files = tuple((f"p={name}/f{number}", b"1") for name in range(5))
                await Work(Mode.FULL_DROP, files)(store)
                assert harness.content() == dict(files)
            await store.gc(older_than=timedelta(0))
            assert await harness.leftovers() == []


@pytest.mark.anyio
@pytest.mark.parametrize(
    "credential",
    [
        SAS,
        AzureSasCredential(SAS),
        f"BlobEndpoint=https://x;SharedAccessSignature={SAS}",
        f"AccountName={KEY['account_name']};AccountKey={KEY['account_key']};EndpointSuffix=core.windows.net",
    ],
    ids=["text", "object", "connection string", "connection string with a key"],
)
async def test_every_kind_of_credential_signs_both_ends_of_a_rename(credential: Any) -> None:
    with DfsServer(anonymous=False) as server:
        server.namespace.create_filesystem("fs")
        async with open_store(AdlsDriver(f"{server.url}/fs/x", credential=credential)) as store:
            await Work(Mode.FULL_DROP, (("a", b"1"),))(store)
        assert server.namespace.read("fs", "x/a") == b"1"


@pytest.mark.anyio
async def test_who_is_not_logged_in_is_told_so_at_once(server: DfsServer) -> None:
    class NotLoggedIn:
        asked = 0

        async def get_token(self, *scopes: str, **options: Any) -> Any:
            self.asked += 1
            raise CredentialUnavailableError("Please run 'az login'.")

        async def close(self) -> None:
            pass

        async def __aexit__(self, *_: object) -> None:
            pass

    credential: Any = NotLoggedIn()
    url = "abfss://fs@account.dfs.core.windows.net/x"
    async with open_store(AdlsDriver(url, credential=credential)) as store:
        with pytest.raises(StagedError, match="Please run 'az login'") as raised:
            await store.begin("append")
    assert not raised.value.retryable
    assert credential.asked == 1


@pytest.mark.anyio
async def test_the_environments_credential_is_refused_on_trio_where_it_cannot_run(anyio_backend: str) -> None:
    if anyio_backend == "asyncio":
        return
    async with open_store("abfss://fs@account.dfs.core.windows.net/x") as store:
        with pytest.raises(Unsupported, match="On trio pass a credential"):
            await store.begin("append")


@pytest.mark.anyio
async def test_a_onelake_that_would_put_one_tree_into_another_moves_files_one_by_one() -> None:
    with DfsServer(onelake=True) as server:
        server.namespace.conditions_of_goal = True
        harness = AdlsHarness(server, period=30.0)
        await harness.put("old", b"old")
        async with open_store(harness.process()) as store:
            found = await store.capabilities()
            assert not found.swaps_trees and "fenced" in found.guarantees[Mode.FULL_DROP]
            await Work(Mode.FULL_DROP, (("new", b"new"), ("d/new", b"new")))(store)
        assert harness.content() == {"new": b"new", "d/new": b"new"}


@pytest.mark.anyio
async def test_a_clients_owner_keeps_it_and_children_share_it(server: DfsServer, anyio_backend: str) -> None:
    if anyio_backend == "trio":
        from azure.core.pipeline.transport import TrioRequestsTransport as Transport
    else:
        from azure.core.pipeline.transport import AioHttpTransport as Transport  # type: ignore[assignment]
    server.namespace.create_filesystem("fs")
    transport = Transport()
    client = await anyio.to_thread.run_sync(
        lambda: DataLakeServiceClient(server.url, credential=KEY, retry_total=0, transport=transport)
    )
    async with open_store(AdlsDriver(f"{server.url}/fs/lake", client=client)) as store:
        for number in range(3):
            await Work(Mode.FULL_DROP, (("a", b"1"),))(store.child(f"t{number}"))
    assert [path.name async for path in client.get_file_system_client("fs").get_paths("lake", recursive=False)] == [
        "lake/_staged", "lake/t0", "lake/t1", "lake/t2"
    ]  # fmt: skip
    await client.close()


# ------------------------------------------------------------------------------------------------------- requests and names


@pytest.mark.anyio
async def test_a_full_drop_commits_in_the_same_number_of_requests_whatever_the_number_of_files(
    server: DfsServer, figure: Figure
) -> None:
    counts = []
    harness = AdlsHarness(server, period=30.0)
    async with open_store(harness.process()) as store:
        for files in (1, 1, 1, 3, 60):
            tx = await store.begin("full_drop")
            for number in range(files):
                await tx.write(f"p={number % 7}/f{number}", b"1")
            await tx.prepare()
            server.counts.clear()
            await tx.commit()
            counts.append(dict(server.counts))
    figure(
        "requests of a full_drop on ADLS", f"{sum(counts[-1].values())} at commit, of 3 files and of 60: {counts[-1]}"
    )
    assert counts[2] == counts[3] == counts[4]
    assert counts[-1]["rename"] == 2


@pytest.mark.anyio
async def test_a_small_file_costs_two_requests_and_a_large_one_only_its_blocks_more(server: DfsServer) -> None:
    harness = AdlsHarness(server, period=30.0)
    await harness.put("there", b"")
    async with open_store(harness.process()) as store:
        tx = await store.begin("append")
        await tx.write("first", b"")  # looks at what the target grants
        for size, requests in ((10, {"put_blob": 1}), (20 << 20, {"put_block": 3, "put_block_list": 1})):
            server.counts.clear()
            await tx.write(f"f{size}", bytes(size))
            assert dict(server.counts) == requests
        await tx.prepare()
        server.counts.clear()
        await tx.commit()
    assert server.counts["rename"] == 3
    assert {name: len(data) for name, data in harness.content().items()} == {
        "there": 0,
        "first": 0,
        "f10": 10,
        f"f{20 << 20}": 20 << 20,
    }


@pytest.mark.anyio
@pytest.mark.parametrize("onelake", [False, True], ids=["adls", "onelake"])
async def test_every_request_that_changes_something_says_what_it_expects_and_comes_again_without_harm(
    onelake: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the SDK would do by itself, it is kept from: a file is never there in part, and nothing is overwritten unseen."""
    asked: list[Request] = []
    with DfsServer(onelake=onelake) as server:
        answer = server.service.answer
        monkeypatch.setattr(server.service, "answer", lambda request: (asked.append(request), answer(request))[1])
        harness = AdlsHarness(server, period=30.0)
        await harness.put("p=0/f0", b"old")
        await harness.put("old", b"old")
        async with open_store(harness.process()) as store:
            await Work(Mode.APPEND, (("p=0/new", b"1"), ("large", bytes(9 << 20))))(store)
            await Work(Mode.OVERWRITE_FILES, (("p=0/f0", b"2"),), deletes=("old",))(store)
            await Work(Mode.OVERWRITE_PARTITIONS, (("p=0/f0", b"3"),))(store)
            await Work(Mode.FULL_DROP, (("p=0/f0", b"4"),))(store)
            await store.gc(older_than=timedelta(0))
    harmless = {"put_block", "lease", "get_access", "set_access", "read", "head", "list", "account"}
    changes = [(route(request)[0], request) for request in asked]
    changes = [(verb, request) for verb, request in changes if verb not in harmless]
    assert {verb for verb, _ in changes} == {"put_blob", "put_block_list", "create", "rename", "delete"}
    assert "lease" not in server.counts
    for verb, request in changes:
        headers = request.headers
        conditional = headers.get("if-none-match") == "*" or headers.get("if-match", "").startswith('"0x')
        if verb == "create":  # a file that is created is there before its first byte
            assert request.query["resource"] == "directory" and conditional
        elif verb == "delete" and not request.path.startswith(harness.control):
            assert headers["if-match"].startswith('"0x')
        elif verb == "rename":
            source, _, signature = headers["x-ms-rename-source"].partition("?")
            assert source.startswith(f"/{request.filesystem}/") and signature == SAS
            assert conditional and headers["x-ms-source-if-match"].startswith('"0x')
            assert ("mode" in request.query) != onelake
        elif verb != "delete":
            assert conditional


@pytest.mark.parametrize(
    ("url", "blobs"),
    [
        ("abfss://fs@account.dfs.core.windows.net/x", "https://account.blob.core.windows.net/fs"),
        ("abfss://fs@account.dfs.core.chinacloudapi.cn/x", "https://account.blob.core.chinacloudapi.cn/fs"),
        ("abfss://w@onelake.dfs.fabric.microsoft.com/x", "https://onelake.blob.fabric.microsoft.com/w"),
        ("abfss://w@msit-onelake.dfs.fabric.microsoft.com/x", "https://msit-onelake.blob.fabric.microsoft.com/w"),
    ],
)
@pytest.mark.anyio
async def test_blobs_are_asked_for_at_the_accounts_other_address(url: str, blobs: str) -> None:
    lake = Lake(Location.parse(url), "sig=1", None, 1, {})
    assert lake._open(trio=in_trio()).blobs.url.partition("?")[0] == blobs
    await lake.aclose()


NAMES = ["with space", "100%", "100%41", "a+b", "ü", "ü", "a&b=c#d", "p=1/it's", "~x", "a;b,c", "[x](y){z}", "日本"]  # fmt: skip


@pytest.mark.anyio
async def test_a_name_is_on_the_wire_what_it_is_in_the_block(server: DfsServer) -> None:
    harness = AdlsHarness(server, "lake/ta rget%20ü")
    async with open_store(harness.process()) as store:
        for mode in (Mode.APPEND, Mode.OVERWRITE_FILES, Mode.FULL_DROP):
            await Work(mode, tuple((name, name.encode()) for name in dict.fromkeys(NAMES)))(store)
            assert harness.content() == {name: name.encode() for name in NAMES}
        await Work(Mode.OVERWRITE_FILES, (("one", b"1"),), deletes=tuple(dict.fromkeys(NAMES)))(store)
    assert harness.content() == {"one": b"1"}


@pytest.mark.anyio
async def test_listings_of_many_pages_are_read_to_their_end(server: DfsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("staged.drivers._lake._PAGE", 3)
    harness = AdlsHarness(server, period=30.0)
    files = tuple((f"p={number % 4}/f{number}", b"1") for number in range(40))
    async with open_store(harness.process()) as store:
        await Work(Mode.APPEND, files)(store)
        with pytest.raises(StagedError):
            await Work(Mode.APPEND, files[-1:])(store)
        await Work(Mode.OVERWRITE_PARTITIONS, (("p=3/new", b"2"),))(store)
    assert harness.content() == {**{name: data for name, data in files if "p=3/" not in name}, "p=3/new": b"2"}


# ---------------------------------------------------------------------------------------------------- readers and strangers


@pytest.mark.anyio
async def test_readers_find_the_old_tree_or_the_new_one_or_between_two_requests_none(
    server: DfsServer, figure: Figure
) -> None:
    harness = AdlsHarness(server, period=30.0)
    reader = f"{harness.filesystem}/{harness.path}"
    async with open_store(harness.process()) as store:
        await Work(Mode.FULL_DROP, tuple((f"f{n}", b"old") for n in range(20)))(store)
        assert "no_gap" not in (await store.capabilities()).guarantees[Mode.FULL_DROP]
        server.log.clear()
        await Work(Mode.FULL_DROP, tuple((f"g{n}", b"new") for n in range(20)))(store)
    verbs = [(line.verb if line.status < 400 else "refused", line.path) for line in server.log]
    _, first, second = [number for number, (verb, _) in enumerate(verbs) if verb == "rename"]
    # After that of sealing there are two, and the second is the very next request after the first.
    assert second == first + 1
    assert verbs[second] == ("rename", reader)

    seen: set[str] = set()
    async with open_store(harness.process()) as store, anyio.create_task_group() as tasks:
        driver = harness.process()

        async def poll() -> None:
            while True:
                async with aclosing(driver.list()) as pages:
                    names = [found.path async for page in pages for found in page]
                seen.add(
                    {(): "none"}.get(tuple(names), "/".join(sorted({name[0] for name in names})) + str(len(names)))
                )

        tasks.start_soon(poll)
        for number in range(8):
            letter = "gh"[number % 2]
            await Work(Mode.FULL_DROP, tuple((f"{letter}{n}", b"1") for n in range(20)))(store)
        tasks.cancel_scope.cancel()
    await harness.aclose()
    figure("what a polling reader of ADLS saw", ", ".join(sorted(seen)))
    assert seen <= {"g20", "h20", "none"}
    assert {"g20", "h20"} <= seen


@pytest.mark.anyio
async def test_a_strangers_tree_that_comes_into_the_gap_of_a_swap_is_kept_aside(server: DfsServer) -> None:
    harness = AdlsHarness(server, period=30.0)
    await harness.put("old", b"old")
    async with open_store(harness.process()) as store:
        tx = await store.begin("full_drop")
        await tx.write("new", b"new")
        await tx.prepare()
        driver = harness.process()
        trees = await driver.trees(tx.id)
        server.namespace.create(harness.filesystem, f"{harness.control}old/1", directory=True)
        aside = f"{harness.control}old/1/tree"
        server.namespace.rename((harness.filesystem, harness.path), (harness.filesystem, aside))
        await harness.put("stranger", b"mine")
        assert await driver.swap(tx.id, trees, "1") == "done"
        await tx.rollback()
    await harness.aclose()
    assert harness.content() == {"new": b"new"}
    kept = [name for name in server.namespace.paths(harness.filesystem) if "/foreign/" in name]
    assert [name.rpartition("/")[2] for name in kept if name.endswith("stranger")] == ["stranger"]


# ------------------------------------------------------------------------------------------------------------- the limit


@pytest.mark.anyio
async def test_the_limit_shrinks_once_for_a_burst_of_refusals_and_grows_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("staged.drivers._cloud.PATIENCE", 0.0)
    limit = Limit(16)
    running = most = 0
    throttled = True

    async def request() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await anyio.lowlevel.checkpoint()
        running -= 1
        if throttled:
            raise Refused("request", 429)

    async def burst(count: int) -> None:
        nonlocal most
        most = 0
        async with anyio.create_task_group() as tasks:
            for _ in range(count):
                tasks.start_soon(send)

    async def send() -> None:
        try:
            await limit.send(request)
        except Refused:
            pass

    await burst(16)
    assert most == 16
    throttled = False
    await burst(8)
    assert most == 8
    await burst(300)
    await burst(100)
    assert most == 16


@pytest.mark.anyio
async def test_waiting_for_a_turn_costs_no_patience_and_what_is_urgent_does_not_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("staged.drivers._cloud.PATIENCE", 0.2)
    limit, tries, order = Limit(1), 0, list[str]()

    async def slow() -> None:
        await anyio.sleep(0.05)
        order.append("slow")

    async def fails_once() -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise Refused("request", 500)

    async def urgent() -> None:
        order.append("urgent")

    async with anyio.create_task_group() as tasks:
        for _ in range(10):
            tasks.start_soon(limit.send, slow)
        await anyio.sleep(0.01)
        tasks.start_soon(limit.send, fails_once)
        await limit.send(urgent, urgent=True)
    assert tries == 2
    assert order[0] == "urgent"


@pytest.mark.anyio
async def test_a_commit_gets_through_a_store_that_throttles_a_fifth_of_all_requests(
    server: DfsServer, figure: Figure
) -> None:
    harness = AdlsHarness(server, period=30.0)
    server.plan = Plan(" ".join(f"{('throttles', 'overloads')[n % 2]}@{n * 5}" for n in range(200)))
    work = Work(Mode.APPEND, tuple((f"f{n}", b"1") for n in range(60)))
    async with open_store(harness.process()) as store:
        assert await work(store) == "committed"
    assert harness.content() == work.apply({})
    refused = sum(line.status in (429, 503) for line in server.log)
    figure("throttled", f"{refused} of {len(server.log)} requests, and the commit got through")
    assert refused > 20


# ------------------------------------------------------------------------------------------------------------------ secrets


@pytest.mark.anyio
@pytest.mark.parametrize("given", ["credential", "url", "object"])
async def test_no_signature_is_shown_logged_or_kept(
    given: str,
    server: DfsServer,
    logged: io.StringIO,
    figure: Figure,
    anyio_backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server.namespace.create_filesystem("fs")
    sas = f"sv=2024-01-01&sig={CANARY}"
    url = f"{server.url}/fs/lake/t" + (f"?{sas}" if given == "url" else "")
    credential = {"credential": sas, "object": AzureSasCredential(sas), "url": None}[given]
    driver = AdlsDriver(url, credential=credential)
    monkeypatch.setattr("staged.drivers._cloud.PATIENCE", 0.3)
    said: list[str] = [repr(driver), driver.url, repr(driver._location)]
    async with open_store(driver) as store:
        said.append(repr(store))
        for plan in ("", " ".join(f"fails@{n}" for n in range(2_000)), " ".join(f"cuts@{n}" for n in range(2_000))):
            server.plan = Plan(plan)
            server.counts.clear()
            try:
                async with store.staged_write("overwrite_files") as tx:
                    await tx.write("a", b"1")
                said += [repr(tx), repr(tx.receipt)]
            except StagedError as error:
                said += ["".join(traceback.format_exception(error)), repr(vars(error)), repr(error.__cause__)]
                said.append(repr(vars(error.__cause__)) if error.__cause__ else "")
        server.plan = Plan()
    kept = [
        server.namespace.read("fs", name) for name in server.namespace.paths("fs") if name.endswith(("head", "record"))
    ]
    texts = [*said, *map(repr, kept), logged.getvalue()]
    figure(f"canaries on the wire, {given}, {anyio_backend}", f"{sum(map(len, texts)):,} characters, 0 leaks")
    assert any(line.auth == "sas" for line in server.log), "it was never sent"
    assert [text for text in texts if CANARY in text] == []


# ------------------------------------------------------------------------------------------------ late and refused requests


@pytest.mark.anyio
async def test_a_write_that_lands_after_sealing_is_in_no_commit(server: DfsServer) -> None:
    """It was given up, and its request came through all the same."""
    for mode in ("append", "full_drop"):
        harness = AdlsHarness(server, period=30.0)
        async with open_store(harness.process()) as store:
            tx = await store.begin(mode)
            await tx.write("good", b"1")
            await tx.prepare()
            for late in ("good", "late"):
                name = f"{harness.control}staging/{tx.id}/tree/{late}"
                server.namespace.put_block(harness.filesystem, name, "a", b"late")
                server.namespace.put_block_list(harness.filesystem, name, ["a"])
            await tx.commit()
            assert harness.content() == {"good": b"1"}
        assert await harness.leftovers() == []


@pytest.mark.anyio
async def test_a_full_drop_carries_no_target_away_that_was_begun_below_meanwhile(server: DfsServer) -> None:
    harness = AdlsHarness(server, period=30.0)
    await harness.put("old", b"old")
    async with open_store(harness.process()) as store:
        tx = await store.begin("full_drop")
        await tx.write("new", b"new")
        await tx.prepare()
        driver = harness.process()
        trees = await driver.trees(tx.id)
        await Work(Mode.APPEND, (("x", b"x"),))(store.child("below"))
        assert await driver.swap(tx.id, trees, "1") == "foreign"
        await tx.rollback()
    assert harness.content() == {"old": b"old", "below/x": b"x"}
    await harness.aclose()


@pytest.mark.anyio
async def test_a_whole_file_system_is_not_replaced_while_a_target_lies_in_it(server: DfsServer) -> None:
    harness = AdlsHarness(server, "", period=30.0)
    async with open_store(harness.process()) as store:
        await Work(Mode.APPEND, (("x", b"x"),))(store.child("t"))
        with pytest.raises(Conflict):
            await Work(Mode.FULL_DROP, (("y", b"y"),))(store)
    assert harness.content() == {"t/x": b"x"}


@pytest.mark.anyio
async def test_what_is_leased_is_neither_taken_for_a_strangers_nor_left_out(server: DfsServer) -> None:
    harness = AdlsHarness(server, period=0.2)
    await harness.put("p=0/old", b"old")
    async with DataLakeServiceClient(server.url, credential=KEY, retry_total=0, **transport_of()) as client:
        lease = await client.get_file_client(harness.filesystem, f"{harness.path}/p=0/old").acquire_lease(60)
        async with open_store(harness.process()) as store:
            with pytest.raises(CommitIncomplete, match="LeaseIdMissing") as raised:
                await Work(Mode.OVERWRITE_PARTITIONS, (("p=0/new", b"new"),))(store)
            assert not isinstance(raised.value, CommitBlocked)
            await lease.release()
            await store.recover()
    assert harness.content() == {"p=0/new": b"new"}


def transport_of() -> dict[str, object]:
    """What a client of the test's own needs on this event loop."""
    if not in_trio():
        return {}
    from azure.core.pipeline.transport import TrioRequestsTransport

    return {"transport": TrioRequestsTransport()}


@pytest.mark.anyio
async def test_a_tree_put_aside_is_as_old_as_its_commit() -> None:
    clock = [1_000_000_000.0]
    with DfsServer(now=lambda: clock[0]) as server:
        harness = AdlsHarness(server, period=30.0)
        async with open_store(harness.process()) as store:
            await Work(Mode.FULL_DROP, (("a", b"1"),))(store)
            clock[0] += 30 * 86_400
            await Work(Mode.FULL_DROP, (("b", b"1"),))(store)
            clock[0] += 60
            await store.gc(older_than=timedelta(days=7))
            assert [name for name in await harness.leftovers() if name.endswith("/a")] != []
            await store.gc(older_than=timedelta(0))
            assert await harness.leftovers() == []


@pytest.mark.anyio
async def test_an_overwrite_that_failed_leaves_its_path_to_be_written_again(server: DfsServer, tmp_path: Path) -> None:
    harness = AdlsHarness(server, period=30.0)
    async with open_store(harness.process()) as store, store.staged_write("append") as tx:
        await tx.write("a", b"1")
        with pytest.raises(StagedError):
            async with tx.dir(overwrite=True) as local:
                await anyio.Path(local, "a").write_bytes(b"2")
                await anyio.Path(local, "con").write_bytes(b"2")  # a name that is refused
        await tx.write("a", b"3", overwrite=True)
        await tx.write("a", b"4", overwrite=True)
    assert harness.content() == {"a": b"4"}


@pytest.mark.anyio
async def test_gc_collects_what_a_probe_left_but_not_what_one_may_be_at_right_now() -> None:
    clock = [1_000_000_000.0]
    with DfsServer(onelake=True, now=lambda: clock[0]) as server:
        harness = AdlsHarness(server, period=30.0)
        left = f"{harness.control}probe/dead/one"
        server.namespace.put_block(harness.filesystem, left, "a", b"1")
        server.namespace.put_block_list(harness.filesystem, left, ["a"])
        async with open_store(harness.process()) as store:
            await Work(Mode.APPEND, (("a", b"1"),))(store)
            await store.gc(older_than=timedelta(0))
            assert left in server.namespace.paths(harness.filesystem)
            clock[0] += 61
            await store.gc(older_than=timedelta(0))
            assert left not in server.namespace.paths(harness.filesystem)
