"""Faults at the wire under the cloud drivers: what is lost, doubled, late or refused there never changes what is true."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import anyio
import azurite
import dfs
import dfs.faults
import gcs
import pytest
import s3
import s3.faults
from azurite import AzuriteServer, BlobProxy
from dfs import DfsServer
from gcs import GcsServer
from s3 import S3Proxy, S3Server
from test_adls import AdlsHarness
from test_azure_blob import BlobHarness
from test_gcs import GcsHarness
from test_s3 import S3Harness

from staged import StagedError, open_store
from staged.model import Mode
from staged.testing.exploration import Work
from staged.testing.harness import Files, Harness

Figure = Callable[[str, str], None]
SOAK = int(os.environ.get("STAGED_SOAK", "1"))

PRIOR: Files = {"p=0/f0": b"old", "p=1/f1": b"old", "old": b"3"}
WORKS = [
    Work(Mode.APPEND, (("p=0/new", b"ours"), ("q=0/new", b"ours"), ("large", bytes(2 << 20))), key="key"),
    Work(Mode.OVERWRITE_FILES, (("p=0/f0", b"ours"), ("new", b"ours")), deletes=("old",)),
    Work(Mode.OVERWRITE_PARTITIONS, (("p=0/f0", b"ours"), ("p=2/f2", b"ours"))),
    Work(Mode.FULL_DROP, (("p=0/f0", b"ours"), ("top", b"ours"))),
]


@dataclass(frozen=True)
class Wire:
    """A store behind something that fails by plan.

    Attributes:
        between: What fails: it has a plan, counts requests, and lets those that are late arrive.
        plans: The class of its plans.
        faults: What befalls any request.
        harness: A target of its own.
    """

    store: str
    between: Any
    plans: Any
    faults: Sequence[str]
    harness: Callable[[], Harness]


@pytest.fixture(params=["adls", "onelake", "s3", "gcs", "azure_blob"], scope="module")
def wire(request: pytest.FixtureRequest) -> Iterator[Wire]:
    store: str = request.param
    if store == "s3":
        with S3Server() as server, S3Proxy(server.url) as proxy:
            client, bucket, sent = server.client(), server.bucket(), server.client(proxy.url)
            harness = partial(S3Harness, client, bucket, sent=sent, lossy=True)
            yield Wire(store, proxy, s3.Plan, s3.faults.ANYWHERE, harness)
    elif store == "gcs":
        with GcsServer() as service:
            yield Wire(store, service, gcs.Plan, dfs.faults.FAULTS, lambda: GcsHarness(service))
    elif store == "azure_blob":
        if why := azurite.missing():
            pytest.skip(why)
        with AzuriteServer() as azure, BlobProxy(azure.url) as blobs:
            container = azure.container()
            yield Wire(store, blobs, s3.Plan, s3.faults.ANYWHERE, lambda: BlobHarness(container, url=blobs.url))
    else:
        with DfsServer(onelake=store == "onelake") as lake:
            yield Wire(store, lake, dfs.Plan, dfs.faults.FAULTS, lambda: AdlsHarness(lake))


async def under(wire: Wire, plan: Any, work: Work) -> tuple[str, Harness]:
    """Do the work under a plan of faults that counts from its first request: what its caller heard."""
    harness = wire.harness()
    for name, data in PRIOR.items():
        await harness.put(name, data)
    wire.between.plan = plan
    wire.between.counts.clear()
    try:
        async with open_store(harness.process()) as store:
            said = await work(store)
    except StagedError as error:
        said = error.outcome
    finally:
        await anyio.to_thread.run_sync(wire.between.replay)
        wire.between.plan = wire.plans()
    return said, harness


async def cleaned(harness: Harness) -> list[str]:
    """What another process leaves behind after it recovered and collected all."""
    async with open_store(harness.process()) as store:
        await store.recover()
        await store.gc(older_than=timedelta(0))
    return await harness.leftovers()


@pytest.mark.anyio
async def test_one_fault_at_any_request_is_neither_a_false_failure_nor_a_false_success(
    wire: Wire, figure: Figure, anyio_backend: str
) -> None:
    """Each of them is got over: requests are sent again, and identity tells which of them was applied."""
    kinds: Counter[str] = Counter()
    for number, work in enumerate(WORKS):
        expected = work.apply(PRIOR)
        said, harness = await under(wire, wire.plans(), work)
        requests = wire.between.counts.total()
        assert (said, await harness.files()) == ("committed", expected)
        for at, kind in enumerate(kind for _ in range(requests) for kind in wire.faults):
            # Every request meets some kinds of fault, and every kind some requests; all meet all in a soak.
            if (at + number + (anyio_backend == "trio")) % max(1, 29 // SOAK):
                continue
            amount = {"delays": 1, "lags": 1, "replays": 1 + at % 17, "lates": 1 + at % 13, "late": 1 + at % 13}.get(
                kind
            )
            text = f"{kind}@{at // len(wire.faults)}" + (f"+{amount}" if amount else "")
            plan = wire.plans(text)
            said, harness = await under(wire, plan, work)
            assert (said, await harness.files()) == ("committed", expected), f"{work}, {wire.store}, plan={text!r}"
            assert not await cleaned(harness), f"{work}, {wire.store}, plan={text!r}"
            assert await harness.files() == expected, f"{work}, {wire.store}, plan={text!r}"
            kinds[kind] += 1
            await harness.aclose()
    figure(
        f"one fault at the wire, {wire.store}, {anyio_backend}",
        f"{kinds.total()} ({', '.join(f'{count} {kind}' for kind, count in kinds.items())}), all committed and whole",
    )
    assert kinds.keys() == set(wire.faults)


@pytest.mark.anyio
async def test_many_faults_at_the_wire_leave_old_or_new_and_the_truth(
    wire: Wire, figure: Figure, anyio_backend: str
) -> None:
    ends: Counter[str] = Counter()
    for seed in range(6 * SOAK):
        work = WORKS[seed % len(WORKS)]
        new = work.apply(PRIOR)
        plan = wire.plans.seeded(seed, requests=300, rate=0.25)
        text = f"{work}, {wire.store}, plan={str(plan)!r}"
        with anyio.fail_after(300):
            said, harness = await under(wire, plan, work)
            assert not await cleaned(harness), text
        expected = {"committed": [new], "untouched": [PRIOR], "unknown": [PRIOR, new]}[said]
        assert await harness.files() in expected, text
        ends[said] += 1
        await harness.aclose()
    figure(
        f"many faults at the wire, {wire.store}, {anyio_backend}",
        ", ".join(f"{count} {end}" for end, count in ends.items()),
    )
