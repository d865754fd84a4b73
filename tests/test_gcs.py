"""Google Cloud Storage, against a server of its JSON API."""

from __future__ import annotations

import io
import itertools
import os
import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread
from gcs import GcsServer, Plan
from google.auth.credentials import AnonymousCredentials
from google.cloud.storage import Client
from test_adls import only

from staged import CommitBlocked, InvalidInput, Unsupported, open_store
from staged.driver import Driver
from staged.drivers.gcs import GcsDriver
from staged.model import Mode
from staged.states import new_id
from staged.testing.conformance import DriverConformance
from staged.testing.exploration import Work
from staged.testing.harness import Files, Harness, Step

Figure = Callable[[str, str], None]
_NUMBERS = itertools.count()


def client_of(url: str) -> Client:
    """A client of a server on loopback."""
    # Each client would ask for the bucket once more, in a thread of its own.
    os.environ["DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA"] = "true"
    return Client("project", AnonymousCredentials(), client_options={"api_endpoint": url})  # type: ignore[no-untyped-call]


class GcsHarness(Harness):
    """A target in a bucket of its own.

    Args:
        path: Its prefix; empty where the target is the bucket.
        rate: Seconds between two writes of one record.
    """

    resolution = 1.0

    def __init__(
        self,
        server: GcsServer,
        path: str = "lake/target",
        *,
        period: float = 0.5,
        rate: float = 0.0,
        refuses_move: int = 0,
    ) -> None:
        self.server, self.path, self.period, self.rate = server, path, period, rate
        self.bucket = f"bucket-{next(_NUMBERS)}"
        above, _, name = path.rpartition("/")
        self.control = f"{above}/_staged/{name or '_staged'}/".lstrip("/")
        self.drivers: list[Driver] = []
        server.call(lambda: server.store.create_bucket(self.bucket, refuses_move=refuses_move))

    @property
    def url(self) -> str:
        return f"gs://{self.bucket}/{self.path}"

    def process(self, step: Step | None = None) -> Driver:
        options: dict[str, Any] = {"credential": AnonymousCredentials(), "api_endpoint": self.server.url}
        self.drivers.append(GcsDriver(self.url, period=self.period, rate=self.rate, **options))
        return self.drivers[-1]

    async def aclose(self) -> None:
        for driver in self.drivers:
            await driver.aclose()

    async def kill(self, driver: Driver) -> None:
        pass

    @property
    def _start(self) -> str:
        return f"{self.path}/" if self.path else ""

    def _read(self) -> Files:
        names = self.server.store.names(self.bucket, self._start)
        found = {name: self.server.store.get(self.bucket, name).data for name in names}
        return {name[len(self._start) :]: data for name, data in found.items() if "_staged" not in name.split("/")}

    def content(self) -> Files:
        return self.server.call(self._read)

    async def files(self) -> Files:
        return await to_thread.run_sync(self.content)

    async def put(self, path: str, data: bytes) -> None:
        await to_thread.run_sync(
            lambda: self.server.call(lambda: self.server.store.put(self.bucket, f"{self._start}{path}", data))
        )

    async def delete(self, path: str) -> None:
        await to_thread.run_sync(
            lambda: self.server.call(lambda: self.server.store.delete(self.bucket, f"{self._start}{path}"))
        )

    async def leftovers(self) -> list[str]:
        staged = f"{self.control}staging/"
        return await to_thread.run_sync(
            lambda: self.server.call(lambda: list(self.server.store.names(self.bucket, staged)))
        )


class _Served(DriverConformance):
    path = "lake/target"

    @pytest.fixture(autouse=True)
    def _server(self) -> Iterator[None]:
        with GcsServer() as self.server:
            yield

    def harness(self, directory: Path) -> Harness:
        return GcsHarness(self.server, self.path)


class TestGcs(_Served):
    """A prefix of a bucket."""

    anyio_backend = only("asyncio")


class TestGcsRoot(_Served):
    """A whole bucket, with its control area inside."""

    path = ""
    anyio_backend = only("trio")


@pytest.fixture
def server() -> Iterator[GcsServer]:
    with GcsServer() as server:
        yield server


DROP = Work(Mode.FULL_DROP, (("new", b"new"), ("both", b"new")))
PRIOR: Files = {"old": b"old", "both": b"old", "d/f1": b"old"}


async def laid(target: GcsHarness) -> GcsHarness:
    for name, data in PRIOR.items():
        await target.put(name, data)
    return target


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("gs://bucket/a/b", "gs://bucket/a/b"),
        ("gs://bucket/a/b/", "gs://bucket/a/b"),
        ("gs://my.bucket", "gs://my.bucket/"),
    ],
)
def test_every_spelling_of_a_url_is_the_same_target(url: str, shown: str) -> None:
    assert open_store(url).url == shown


@pytest.mark.parametrize("url", ["gs://", "gs://bucket/../x", "gs://key:canary@bucket/x"])
def test_a_url_that_is_none_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(InvalidInput) as raised:
        open_store(url)
    assert "canary" not in "".join(traceback.format_exception(raised.value))


@pytest.mark.anyio
async def test_a_clients_bucket_is_served_and_the_client_stays_open(server: GcsServer) -> None:
    target = GcsHarness(server)
    client = await to_thread.run_sync(client_of, server.url)
    async with open_store(target.url, client=client) as store:
        await Work(Mode.APPEND, (("a", b"1"),))(store)
    async with open_store(target.url, client=client) as store:
        await Work(Mode.APPEND, (("b", b"2"),))(store)
    assert await target.files() == {"a": b"1", "b": b"2"}
    async with open_store("gs://no-such-bucket/t", client=client) as store:
        with pytest.raises(Unsupported, match="no bucket"):
            await store.begin("append")
    client.close()


@pytest.mark.anyio
async def test_a_store_that_ignores_conditions_promises_neither_order_nor_fence() -> None:
    with GcsServer(conditions=False) as server:
        async with open_store(GcsHarness(server).process()) as store:
            for guarantee in ("serialised", "fenced"):
                with pytest.raises(Unsupported):
                    await store.begin("append", require=[guarantee])  # type: ignore[list-item]


@pytest.mark.anyio
@pytest.mark.parametrize("refused", [400, 501])
async def test_a_bucket_that_refuses_to_move_is_served_by_copies_whose_sources_are_gone(
    server: GcsServer, refused: int
) -> None:
    target = await laid(GcsHarness(server, refuses_move=refused))
    server.plan = Plan("loses@rewrite:0 repeats@rewrite:1 loses@delete:1")
    async with open_store(target.process()) as store:
        assert await DROP(store) == "committed"
    assert await target.files() == {"new": b"new", "both": b"new"}
    assert await target.leftovers() == []


@pytest.mark.anyio
async def test_a_record_is_written_no_more_than_once_a_second_and_nothing_is_refused_for_it(figure: Figure) -> None:
    with GcsServer(rate=1.0) as slow:
        target = GcsHarness(slow, rate=1.0, period=30.0)
        async with open_store(target.process()) as store:
            began = anyio.current_time()
            await Work(Mode.APPEND, (("a", b"1"),))(store)
            figure(
                "a commit on Cloud Storage", f"{anyio.current_time() - began:.1f} s for one write a second of a record"
            )
        # What is tried on a server that is not Google's is no record.
        assert [one.path for one in slow.log if one.status == 429 and "/probe/" not in one.path] == []


@pytest.mark.anyio
@pytest.mark.parametrize(
    "plan",
    [
        "loses@move:0 repeats@move:1",
        "cuts@move:0 fails@move:1 errs@move:2",
        "overloads@move:0+1 throttles@insert:0+1",
        "loses@insert:0 errs@insert:1 repeats@insert:2",
        "replays@move:0+2 replays@delete:0+3",
        "lates@move:0+2 lates@delete:0+2",
        "loses@start:0 loses@upload:0 cuts@upload:2 loses@upload:3 errs@upload:5 fails@status:0",
    ],
)
async def test_a_fault_that_passes_is_got_over(server: GcsServer, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("staged.drivers._cloud._PART", 1 << 18)
    large = os.urandom((5 << 18) + 7)
    target = await laid(GcsHarness(server))
    server.plan = Plan(plan)
    async with open_store(target.process()) as store, store.staged_write("full_drop") as tx:
        await tx.write("new", b"new")
        async with tx.open("large") as file:
            for at in range(0, len(large), 100_000):
                await file.write(large[at : at + 100_000])
    await to_thread.run_sync(server.replay)
    async with open_store(target.process()) as store:
        await store.gc(older_than=timedelta(0))
    assert await target.files() == {"new": b"new", "large": large}
    assert await target.leftovers() == []


@pytest.mark.anyio
async def test_a_service_that_keeps_less_of_a_chunk_than_was_sent_gets_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("staged.drivers._cloud._PART", 1 << 20)
    body = os.urandom((3 << 20) + 1)
    with GcsServer(keeps=1 << 18) as server:
        target = GcsHarness(server)
        async with open_store(target.process()) as store, store.staged_write("append") as tx:
            await tx.write("large", body)
        assert await target.files() == {"large": body}


@pytest.mark.anyio
async def test_the_address_of_an_upload_which_is_a_credential_is_not_logged(
    server: GcsServer, logged: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("staged.drivers._cloud._PART", 1 << 20)
    async with open_store(GcsHarness(server).process()) as store, store.staged_write("append") as tx:
        await tx.write("large", bytes(3 << 20))
    assert "upload_id=REDACTED" in logged.getvalue()
    assert set(re.findall("upload_id=([^&\\s]*)", logged.getvalue())) == {"REDACTED"}


@pytest.mark.anyio
async def test_a_strangers_object_in_the_way_is_left_and_told(server: GcsServer) -> None:
    target = await laid(GcsHarness(server))

    def come(number: int) -> None:
        if server.counts["move"] == 1 and "new" not in server.store.names(target.bucket, "lake/target/"):
            server.store.put(target.bucket, "lake/target/new", b"a stranger's")

    server.before = come
    async with open_store(target.process()) as store:
        with pytest.raises(CommitBlocked, match="'new'"):
            await Work(Mode.APPEND, (("new", b"new"), ("other", b"1")))(store)
        server.before = lambda number: None
        assert (await target.files())["new"] == b"a stranger's"
        await store.recover(resolve="keep")
    assert await target.files() == {**PRIOR, "new": b"a stranger's", "other": b"1"}
    assert await target.leftovers() == []


@pytest.mark.anyio
async def test_a_commit_is_one_request_a_file_and_copies_no_byte(server: GcsServer, figure: Figure) -> None:
    async def counted(files: int) -> Counter[str]:
        target = GcsHarness(server)
        async with open_store(target.process()) as store:
            tx = await store.begin("append")
            async with anyio.create_task_group() as tasks:
                for number in range(files):
                    tasks.start_soon(tx.write, f"{tx.id}/{number}", b"x" * 100)
            await tx.prepare()
            server.counts.clear()
            await tx.commit()
            return Counter(server.counts)

    few, more = await counted(20), await counted(60)
    assert (few.pop("move"), more.pop("move")) == (20, 60)
    assert few == more, "whatever else a commit asks for does not depend on the number of files"
    figure("requests at commit on Cloud Storage", f"1 a file, and {more.total()} around them: {dict(more)}")


@pytest.mark.anyio
async def test_where_a_bucket_refuses_to_move_a_published_files_source_is_gone_at_once(server: GcsServer) -> None:
    target = GcsHarness(server, refuses_move=400)
    driver, tx = target.process(), new_id()

    async def nowhere(handle: str) -> None:
        pass

    writer = await driver.stage(tx, "a", nowhere)
    await writer.write(b"1")
    entry = await writer.close()
    await driver.seal(tx, [entry])
    # Else a copy that comes late could bring the file back after somebody removed it.
    server.plan = Plan("loses@delete:0")
    assert await driver.publish(tx, [entry], {}) == ["done"]
    assert await target.leftovers() == []
    assert await driver.publish(tx, [entry], {}) == ["already"]
    await target.delete("a")
    assert await driver.publish(tx, [entry], {}) == ["lost"]
