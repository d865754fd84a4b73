"""Every asynchronous test runs on both event loops, with nothing that blocks them; figures are printed at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from blockbuster import BlockBuster, blockbuster_ctx

_FIGURES = pytest.StashKey[dict[str, str]]()


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    """Both loops of anyio."""
    backend: str = request.param
    return backend


@pytest.fixture(autouse=True)
def nothing_blocks(request: pytest.FixtureRequest) -> Iterator[BlockBuster | None]:
    """A blocking call of ours in an event loop raises."""
    if "anyio_backend" not in request.fixturenames:
        yield None
        return
    with blockbuster_ctx("staged", excluded_modules=["staged.testing"]) as detector:
        yield detector


@pytest.fixture
def figure(pytestconfig: pytest.Config) -> Callable[[str, str], None]:
    """Print a figure in the run's summary."""

    def note(name: str, text: str) -> None:
        pytestconfig.stash.setdefault(_FIGURES, {})[name] = text

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    figures = config.stash.get(_FIGURES, {})
    if figures:
        terminalreporter.section("figures")
        for name, text in figures.items():
            terminalreporter.write_line(f"{name}: {text}")
