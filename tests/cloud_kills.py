"""Forks processes that write to a cloud store and die, or are stopped and overtaken; a line of JSON for each case.

    python tests/cloud_kills.py STORE MOMENTS NAME=URL…

Each URL is a fresh target with its prior content. Run as a program, it has no threads, so that forking is safe.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from datetime import timedelta

import anyio
import mirror

from staged import Fenced, StagedError, open_store
from staged.driver import Driver
from staged.model import Mode
from staged.testing.exploration import Work
from staged.testing.faults import FaultDriver, Moment
from staged.testing.harness import Files

PRIOR: Files = {"p=0/f0": b"old", "p=1/f1": b"old", "old": b"3"}
WORKS = {
    "append": Work(Mode.APPEND, (("p=0/new", b"ours"), ("q=0/new", b"ours"), ("top", b"ours")), key="key"),
    "files": Work(Mode.OVERWRITE_FILES, (("p=0/f0", b"ours"), ("new", b"ours")), deletes=("old",)),
    "partitions": Work(Mode.OVERWRITE_PARTITIONS, (("p=0/f0", b"ours"), ("p=2/f2", b"ours"))),
    "drop": Work(Mode.FULL_DROP, (("p=0/f0", b"ours"), ("top", b"ours"))),
}
NEXT = Work(Mode.APPEND, (("next", b"next"),))
CHANGES = {"append": mirror.WORKS[0], "drop": mirror.WORKS[2]}
"""What is done to a table of a landing zone."""
NEXT_CHANGES = mirror.Changes("append", (("upsert", ((99, "next"),)),))
PERIOD = 0.2


def driver_of(store: str, url: str) -> Driver:
    if store == "onelake":
        from staged.drivers.onelake import OneLakeDriver

        return OneLakeDriver(url, credential="sv=1&sig=CANARY", period=PERIOD)
    if store == "open_mirroring":
        from staged.drivers.open_mirroring import OpenMirroringDriver

        return OpenMirroringDriver(url, credential="sv=1&sig=CANARY", period=PERIOD, keys=["id"], drop_poll=0.01)
    if store == "s3":
        from s3 import client_of

        from staged.drivers.s3 import S3Driver

        return S3Driver(url, client=client_of(os.environ["STAGED_ENDPOINT"]), period=PERIOD)
    if store == "gcs":
        from google.auth.credentials import AnonymousCredentials

        from staged.drivers.gcs import GcsDriver

        endpoint = os.environ["STAGED_ENDPOINT"]
        return GcsDriver(url, credential=AnonymousCredentials(), api_endpoint=endpoint, period=PERIOD, rate=0.0)
    if store == "azure_blob":
        from azurite import KEY

        from staged.drivers.azure_blob import AzureBlobDriver

        return AzureBlobDriver(url, credential=KEY, period=PERIOD)
    from staged.drivers.adls import AdlsDriver

    return AdlsDriver(url, credential="sv=1&sig=CANARY", period=PERIOD)


def fork(work: Callable[[], object]) -> int:
    """A child that does this work; its id."""
    if child := os.fork():
        return child
    status = 1
    try:
        work()
        status = 0
    except Fenced:
        status = 2
    except StagedError as error:
        status = 3 if error.outcome == "untouched" else 4
    finally:
        os._exit(status)


def ended(child: int) -> int:
    """The exit status of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def write(store: str, url: str, work: Work | mirror.Changes, at: Callable[[str, Moment], None]) -> None:
    async def gate(name: str, moment: Moment) -> None:
        at(name, moment)

    async def run() -> None:
        driver = driver_of(store, url)
        async with open_store(FaultDriver(driver, gate)) as opened:
            await work(opened, lock_timeout=60.0)

    anyio.run(run)


def recover(store: str, url: str) -> None:
    async def run() -> None:
        async with open_store(driver_of(store, url)) as opened:
            await opened.recover()
            await opened.gc(older_than=timedelta(0))

    anyio.run(run)


def dies(number: int, moment: Moment, delay: float) -> Callable[[str, Moment], None]:
    """Die at the call of that number, so many seconds later."""
    calls = 0

    def at(_: str, now: Moment) -> None:
        nonlocal calls
        calls += now == "before"
        if calls == number and now == moment:
            if not delay:
                os.kill(os.getpid(), signal.SIGKILL)
            # Its default action ends the process where it stands, as SIGKILL does.
            signal.setitimer(signal.ITIMER_REAL, delay)

    return at


def stops(store: str, url: str, call: str, name: str) -> dict[str, object]:
    """One process is stopped at a call, another takes over and writes, and the first wakes up.

    Args:
        call: How the call begins, and perhaps `+` and the milliseconds from there.
    """
    call, _, delay = call.partition("+")
    stopped = False

    def at(name: str, now: Moment) -> None:
        nonlocal stopped
        if not stopped and now == "before" and name.startswith(call):
            stopped = True
            if not delay:
                os.kill(os.getpid(), signal.SIGSTOP)
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGSTOP))
            signal.setitimer(signal.ITIMER_REAL, int(delay or 0) / 1000)

    mirrored = store == "open_mirroring"
    first = fork(lambda: write(store, url, CHANGES[name] if mirrored else WORKS[name], at))
    _, status = os.waitpid(first, os.WUNTRACED)
    asleep = os.WIFSTOPPED(status)
    second = ended(fork(lambda: write(store, url, NEXT_CHANGES if mirrored else NEXT, lambda *_: None)))
    if not asleep:
        return {"asleep": False, "first": os.waitstatus_to_exitcode(status), "second": second}
    os.kill(first, signal.SIGCONT)
    return {"asleep": asleep, "first": ended(first), "second": second}


def main(store: str, words: list[str]) -> None:
    for word in words:
        case, _, url = word.partition("=")
        name, number, moment = case.split(",")
        chance = random.Random(case)
        if name == "stops":
            said = stops(store, url, number, moment)
        else:
            at = dies(int(number), "before" if moment == "before" else "after", chance.choice((0.0, 0.0, 0.003, 0.01)))
            said = {"killed": ended(fork(lambda: write(store, url, WORKS[name], at))) < 0}  # noqa: B023 - run at once
        said["recovered"] = ended(fork(lambda: recover(store, url))) == 0  # noqa: B023
        print(json.dumps({"case": case, **said}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
