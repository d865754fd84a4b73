"""Faults at the wire under the Azure drivers: what is lost, doubled, late or refused there never changes what is true."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta

import anyio
import pytest
from dfs import DfsServer, Plan
from dfs.faults import FAULTS
from test_adls import AdlsHarness

from staged import StagedError, open_store
from staged.model import Mode
from staged.testing.exploration import Work
from staged.testing.harness import Files

Figure = Callable[[str, str], None]
SOAK = int(os.environ.get("STAGED_SOAK", "1"))

PRIOR: Files = {"p=0/f0": b"old", "p=1/f1": b"old", "old": b"3"}
WORKS = [
    Work(Mode.APPEND, (("p=0/new", b"ours"), ("q=0/new", b"ours"), ("large", bytes(2 << 20))), key="key"),
    Work(Mode.OVERWRITE_FILES, (("p=0/f0", b"ours"), ("new", b"ours")), deletes=("old",)),
    Work(Mode.OVERWRITE_PARTITIONS, (("p=0/f0", b"ours"), ("p=2/f2", b"ours"))),
    Work(Mode.FULL_DROP, (("p=0/f0", b"ours"), ("top", b"ours"))),
]


@pytest.fixture(params=[False, True], ids=["adls", "onelake"])
def server(request: pytest.FixtureRequest) -> Iterator[DfsServer]:
    with DfsServer(onelake=request.param) as server:
        yield server


async def laid(server: DfsServer) -> AdlsHarness:
    harness = AdlsHarness(server)
    for name, data in PRIOR.items():
        await harness.put(name, data)
    return harness


async def under(server: DfsServer, plan: Plan, work: Work) -> tuple[str, AdlsHarness]:
    """Do the work under a plan of faults that counts from its first request: what its caller heard."""
    harness = await laid(server)
    server.plan = plan
    server.counts.clear()
    try:
        async with open_store(harness.process()) as store:
            said = await work(store)
    except StagedError as error:
        said = error.outcome
    finally:
        server.replay()
        server.plan = Plan()
    return said, harness


async def cleaned(harness: AdlsHarness) -> list[str]:
    """What another process leaves behind after it recovered and collected all."""
    async with open_store(harness.process()) as store:
        await store.recover()
        await store.gc(older_than=timedelta(0))
    return await harness.leftovers()


@pytest.mark.anyio
async def test_one_fault_at_any_request_is_neither_a_false_failure_nor_a_false_success(
    server: DfsServer, figure: Figure, anyio_backend: str
) -> None:
    """Each of them is got over: requests are sent again, and identity tells which of them was applied."""
    kinds: Counter[str] = Counter()
    for number, work in enumerate(WORKS):
        expected = work.apply(PRIOR)
        said, harness = await under(server, Plan(), work)
        requests = server.counts.total()
        assert (said, harness.content()) == ("committed", expected)
        for at, kind in enumerate(kind for _ in range(requests) for kind in FAULTS):
            # Every request meets some kinds of fault, and every kind some requests; all meet all in a soak.
            if (at + number + (anyio_backend == "trio")) % max(1, 29 // SOAK):
                continue
            amount = {"delays": 1, "lags": 1, "replays": 1 + at % 17, "lates": 1 + at % 13}.get(kind, 0)
            plan = f"{kind}@{at // len(FAULTS)}" + (f"+{amount}" if amount else "")
            said, harness = await under(server, Plan(plan), work)
            assert (said, harness.content()) == ("committed", expected), f"{work}, DfsServer(plan={plan!r})"
            assert not await cleaned(harness), f"{work}, DfsServer(plan={plan!r})"
            assert harness.content() == expected, f"{work}, DfsServer(plan={plan!r})"
            kinds[kind] += 1
            await harness.aclose()
    figure(
        f"one fault at the wire, {'onelake' if server.onelake else 'adls'}, {anyio_backend}",
        f"{kinds.total()} ({', '.join(f'{count} {kind}' for kind, count in kinds.items())}), all committed and whole",
    )
    assert kinds.keys() == set(FAULTS)


@pytest.mark.anyio
async def test_many_faults_at_the_wire_leave_old_or_new_and_the_truth(
    server: DfsServer, figure: Figure, anyio_backend: str
) -> None:
    ends: Counter[str] = Counter()
    for seed in range(6 * SOAK):
        work = WORKS[seed % len(WORKS)]
        new = work.apply(PRIOR)
        plan = Plan.seeded(seed, requests=300, rate=0.25)
        text = f"{work}, DfsServer(plan={str(plan)!r})"
        with anyio.fail_after(300):
            said, harness = await under(server, plan, work)
            assert not await cleaned(harness), text
        expected = {"committed": [new], "untouched": [PRIOR], "unknown": [PRIOR, new]}[said]
        assert harness.content() in expected, text
        ends[said] += 1
        await harness.aclose()
    figure(
        f"many faults at the wire, {'onelake' if server.onelake else 'adls'}, {anyio_backend}",
        ", ".join(f"{count} {end}" for end, count in ends.items()),
    )
