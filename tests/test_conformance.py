"""Every driver keeps the contracts and the promises; what it cannot do it declares."""

from __future__ import annotations

import os
from pathlib import Path

import anyio.to_thread
import pytest
from example_driver import DictDriver, Shelf

from staged.driver import Driver
from staged.drivers.local import LocalDriver
from staged.testing.conformance import DriverConformance
from staged.testing.exploration import MemoryHarness
from staged.testing.harness import Files, Harness, Step


class TestMemoryExchange(DriverConformance):
    def harness(self, directory: Path) -> Harness:
        return MemoryHarness()


class TestMemoryRenames(DriverConformance):
    def harness(self, directory: Path) -> Harness:
        return MemoryHarness(fence="consumed", swap="renames", period=0.1)


class TestMemoryEntries(DriverConformance):
    def harness(self, directory: Path) -> Harness:
        return MemoryHarness(fence="consumed", swap=None, folds=True, period=0.1)


class DictHarness(Harness):
    def __init__(self) -> None:
        self.shelf: Shelf = {}

    def process(self, step: Step | None = None) -> Driver:
        return DictDriver(self.shelf, period=0.1)

    async def kill(self, driver: Driver) -> None:
        pass

    async def files(self) -> Files:
        return {
            key.removeprefix("target/"): one[1]
            for key, one in self.shelf.items()
            if key.startswith("target/") and "_staged" not in key.split("/")
        }

    async def put(self, path: str, data: bytes) -> None:
        DictDriver(self.shelf).put(f"target/{path}", data)

    async def delete(self, path: str) -> None:
        del self.shelf[f"target/{path}"]

    async def leftovers(self) -> list[str]:
        return [key for key in self.shelf if key.startswith("_staged/target/staged-")]


class TestTheExampleOfTheReadme(DriverConformance):
    def harness(self, directory: Path) -> Harness:
        return DictHarness()


class LocalHarness(Harness):
    """A directory; with `inside` its control area lies in the target, so that trees cannot be swapped."""

    def __init__(self, directory: Path, *, inside: bool = False) -> None:
        self.target = directory / "target"
        self.target.mkdir()
        self.area = self.target / "_staged" / "_staged" if inside else directory / "_staged" / "target"
        if inside:
            self.area.mkdir(parents=True)

    def process(self, step: Step | None = None) -> Driver:
        return LocalDriver(str(self.target), durability="none")

    async def kill(self, driver: Driver) -> None:
        assert isinstance(driver, LocalDriver)
        for lock in list(driver._held.values()):
            lock.release()  # as the system does when it closes a dead process's descriptors
        driver._held.clear()

    async def files(self) -> Files:
        return await anyio.to_thread.run_sync(self._files)

    def _files(self) -> Files:
        found = (path for path in self.target.rglob("*") if path.is_file() and "_staged" not in path.parts[-4:])
        paths = [path for path in found if "_staged" not in path.relative_to(self.target).parts]
        return {str(path.relative_to(self.target)): path.read_bytes() for path in paths}

    async def put(self, path: str, data: bytes) -> None:
        await anyio.to_thread.run_sync(self._put, self.target / path, data)

    @staticmethod
    def _put(path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        os.utime(path)  # the clock of a file system ticks in milliseconds

    async def delete(self, path: str) -> None:
        await anyio.Path(self.target / path).unlink()

    async def leftovers(self) -> list[str]:
        return await anyio.to_thread.run_sync(self._leftovers)

    def _leftovers(self) -> list[str]:
        files = [str(path.relative_to(self.area)) for path in self.area.rglob("*") if not path.is_dir()]
        return [path for path in files if path.startswith(("tx/", "old/", "probe-")) or path.endswith(".tmp")]


class TestLocalExchange(DriverConformance):
    def harness(self, directory: Path) -> Harness:
        return LocalHarness(directory)


class TestLocalEntries(DriverConformance):
    def harness(self, directory: Path) -> Harness:
        return LocalHarness(directory, inside=True)


def test_a_subclass_cannot_weaken_a_promise() -> None:
    def harmless(self: object) -> None:
        pass

    for name in (name for name in vars(DriverConformance) if name.startswith("test_")):
        with pytest.raises(TypeError, match="keeps every promise"):
            type("TestWeak", (DriverConformance,), {name: harmless})
        mixin = type("Mixin", (), {name: None})
        with pytest.raises(TypeError, match="keeps every promise"):
            type("TestWeak", (mixin, DriverConformance), {})
    for name in ("__test__", "pytestmark", "target", "kind"):
        with pytest.raises(TypeError):
            type("TestWeak", (DriverConformance,), {name: harmless})
