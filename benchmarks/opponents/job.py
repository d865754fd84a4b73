"""What each of the programs beside this one is asked for, as JSON in its argument, and how it tells of the seconds it took."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

PIECE = 8 << 20


@dataclass(frozen=True)
class Job:
    """A set of files to write.

    Attributes:
        kind: Of which store.
        near: The server's URL.
        far: Its URL behind the delay: what is measured goes there.
        place: A bucket or container with nothing in it.
        size: Bytes of each file.
        tasks: How many requests, or files, at once.
        work: What of it, where a program does several things.
    """

    kind: str
    near: str
    far: str
    place: str
    files: int
    size: int
    tasks: int
    work: str = ""

    @property
    def names(self) -> list[str]:
        return [f"f{number:05d}" for number in range(self.files)]

    def at_once(self, work: Callable[[str], object], names: Iterable[str]) -> None:
        """Work on all names in so many threads."""
        with ThreadPoolExecutor(self.tasks) as pool:
            for _ in pool.map(work, names):
                pass


def asked() -> Job:
    """What this process was started for."""
    return Job(**json.loads(sys.argv[1]))


def tell(**seconds: float) -> None:
    """Say how long each part took."""
    print(json.dumps(seconds))
