"""Every asynchronous test runs on both event loops, with nothing that blocks them; figures are printed at the end."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from blockbuster import BlockBuster, blockbuster_ctx

if TYPE_CHECKING:
    from s3 import S3Server


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


@pytest.fixture(scope="session")
def s3_servers() -> Iterator[Callable[[str], S3Server]]:
    """A server of S3 of a kind; each is started when it is first asked for, and serves all tests of the process."""
    from s3 import S3Server

    servers: dict[str, S3Server] = {}
    with ExitStack() as stack:

        def server(kind: str) -> S3Server:
            if kind not in servers:
                servers[kind] = stack.enter_context(S3Server(kind))
            return servers[kind]

        yield server


@pytest.fixture
def ministack(s3_servers: Callable[[str], S3Server]) -> S3Server:
    """MiniStack, the one of the servers that does most as S3 does."""
    return s3_servers("ministack")


@pytest.fixture(params=["ministack", "moto"])
def s3_server(request: pytest.FixtureRequest, s3_servers: Callable[[str], S3Server]) -> S3Server:
    """Each of the servers of S3."""
    return s3_servers(request.param)


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Print a figure in the run's summary."""

    def note(name: str, text: str) -> None:
        # Travels with the report, also from a worker process.
        request.node.user_properties.append(("figure", f"{name}: {text}"))

    return note


LOGGERS = ("staged", "asyncio", "aiohttp", "azure", "botocore", "boto3", "google", "msal", "requests", "urllib3")


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    """What our logger and those of the SDKs and of what they stand on say, down to DEBUG."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    # pytest sets the root's own level anew for each phase of a test.
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
    yield stream
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)
    logging.getLogger().removeHandler(handler)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ended = [report for reports in terminalreporter.stats.values() for report in reports if hasattr(report, "when")]
    figures = [
        text for report in ended if report.when == "call" for name, text in report.user_properties if name == "figure"
    ]
    if figures:
        terminalreporter.section("figures")
        for text in figures:
            terminalreporter.write_line(text)
