"""What a driver's author writes to have the driver proved: how to make a process, and a way behind the driver's back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import ClassVar

from staged.driver import Driver

__all__ = ["Files", "Harness", "Step"]

Files = dict[str, bytes]
"""A target as a reader sees it: paths relative to it, and their bytes."""

Step = Callable[[str], Awaitable[None]]


class Harness(ABC):
    """One target that nobody has written yet, with the storage that it lies in.

    Attributes:
        resolution: Seconds by which the store's clock may be wrong, such as 1 where it is the date of HTTP's answers.
    """

    resolution: ClassVar[float] = 0.0

    @abstractmethod
    def process(self, step: Step | None = None) -> Driver:
        """The driver of another process that opens this target; calls nothing and waits for nothing.

        Args:
            step: To be awaited between two changes within one call, where the driver can be made to do so; else unused.
        """

    @abstractmethod
    async def kill(self, driver: Driver) -> None:
        """Do to the storage what the death of this driver's process does: drop its locks. Nothing of it runs any more."""

    @abstractmethod
    async def files(self) -> Files:
        """What any reader finds in the target, the control area left out."""

    @abstractmethod
    async def put(self, path: str, data: bytes) -> None:
        """Write a file into the target as a stranger would, over what is there."""

    @abstractmethod
    async def delete(self, path: str) -> None:
        """Remove a file of the target as a stranger would."""

    @abstractmethod
    async def leftovers(self) -> list[str]:
        """What a backend keeps besides records and the target: staged bytes, pending uploads, trees put aside, held locks."""

    async def aclose(self) -> None:
        """Close what its processes opened."""
