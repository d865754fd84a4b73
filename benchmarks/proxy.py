"""A TCP proxy on loopback that adds a delay to every request: `python benchmarks/proxy.py PORT MILLISECONDS` prints its URL."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def started(*program: str, cwd: str | None = None) -> Iterator[str]:
    """A server in a process of its own, by the URL that it prints; it ends when its input does."""
    with subprocess.Popen(
        [sys.executable, *program], cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate()


@contextmanager
def delayed(url: str, seconds: float) -> Iterator[str]:
    """The address of a server behind this proxy, in a process of its own."""
    with started(__file__, url.rpartition(":")[2], f"{seconds * 1000:g}") as far:
        yield far


async def pump(source: asyncio.StreamReader, goal: asyncio.StreamWriter, delay: float) -> None:
    """Pass on what comes, each piece so much later, in their order and however many are on their way."""
    loop = asyncio.get_running_loop()
    while data := await source.read(1 << 16):
        loop.call_later(delay, goal.write, data)
    loop.call_later(delay, goal.close)


async def serve(port: int, delay: float) -> None:
    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other, onward = await asyncio.open_connection("127.0.0.1", port)
        with suppress(asyncio.CancelledError):  # in the end
            await asyncio.gather(pump(reader, onward, delay), pump(other, writer, 0.0), return_exceptions=True)

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    # It ends with whoever started it.
    await loop_until_stdin_ends()


async def loop_until_stdin_ends() -> None:
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), float(sys.argv[2]) / 1000))
