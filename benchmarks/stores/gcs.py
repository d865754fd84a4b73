"""Google Cloud Storage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import count
from typing import Self

import objects
from bench import Bench
from objects import ROUND_TRIP, Opponent
from proxy import delayed


class Gcs:
    """The server of the tests, which counts for itself; what delays is a proxy of TCP in a process of its own."""

    kind, unit = "GCS", "moves"
    by_hand = Opponent("with_google", "moves")
    writers: Mapping[str, Opponent] = {
        "staged append, with its default of rate=1": Opponent("with_staged", "append, rated"),
        "gcsfs, a transaction": Opponent("with_gcsfs", needs=("gcsfs",)),
        "google-cloud-storage, uploads, copies and deletions": Opponent("with_google", "copies"),
        "google-cloud-storage, no transaction": Opponent("with_google", "uploads"),
    }
    base = "google-cloud-storage, no transaction"
    overwriters: Mapping[str, Opponent] = {}
    environment: Mapping[str, str] = {
        # Each client would ask for the bucket once more, in a thread of its own.
        "DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA": "true",
        # gcsfs would ask by gRPC what kind of bucket it is, for a minute.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "NO_PROXY": "127.0.0.1",
    }
    removes = 1

    def __enter__(self) -> Self:
        from gcs import GcsServer

        with ExitStack() as stack:
            self._server = stack.enter_context(GcsServer())
            self.near = self.far = self._server.url
            self._delayed = stack.enter_context(delayed(self.near, ROUND_TRIP))
            self._stack = stack.pop_all()
        self._numbers = count()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def place(self) -> str:
        name = f"bucket-{next(self._numbers)}"
        self._server.call(lambda: self._server.store.create_bucket(name))
        return name

    def drop(self, place: str) -> None:
        self._server.call(lambda: self._server.store.buckets.pop(place))

    def behave(self, delay: float, throttle: int) -> None:
        from gcs import Plan

        assert delay in (0.0, ROUND_TRIP)
        self.far = self._delayed if delay else self.near
        every = range(throttle - 1, 50_000, throttle) if throttle else ()
        self._server.plan = Plan(" ".join(f"throttles@{number}" for number in every))
        self._server.counts.clear()
        self._server.log.clear()
        self._server.received = 0

    def requests(self) -> Counter[str]:
        return Counter(self._server.counts)

    def copies(self) -> int:
        return self._server.counts["copy"] + self._server.counts["rewrite"]

    def removals(self) -> int:
        removed = [logged.path for logged in self._server.log if logged.verb == "delete"]
        return sum("_staged" not in path.split("/") for path in removed)

    def sent(self) -> int:
        return self._server.received


def run(bench: Bench) -> None:
    bench.note(
        "GCS takes one write of a name a second, for which ours waits with its default of rate=1; all its other figures are "
        "with rate=0, to compare requests."
    )
    objects.run(bench, Gcs())
