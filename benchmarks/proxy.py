"""A link with a rate: ``python -m benchmarks.proxy PORT BYTES_PER_S`` forwards TCP to 127.0.0.1:PORT at that rate.

It stands in front of an agent's mesh port, where a network would be. What the agent sends takes turns at one token
bucket for all connections, as on a wire; what others send to it (questions and credit) is passed on at once. A process
of its own, one thread: it says its port as one JSON line, and serves until its stdin ends.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PIECE_BYTES = 64 << 10
BURST_S = 0.01
"""What an idle link has ahead: without it a timer of a millisecond would lower the rate."""


@contextmanager
def throttled(port: int, bytes_per_s: float) -> Iterator[int]:
    """The port in front of `port` whose link gives `bytes_per_s`."""
    command = [sys.executable, "-m", "benchmarks.proxy", str(port), str(bytes_per_s)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())["port"]
        finally:
            process.terminate()


class Link:
    """A token bucket: when the next bytes may go. Turns are taken in the order of asking."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0

    def delay_s(self, size: int, now: float) -> float:
        """How long `size` bytes that come at `now` have to wait."""
        self._free_at = max(self._free_at, now - BURST_S) + size / self._bytes_per_s
        return max(0.0, self._free_at - now)


async def _serve(port: int, bytes_per_s: float) -> None:
    link = Link(bytes_per_s)
    running: set[asyncio.Task[None]] = set()

    async def connected(near: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        try:
            far, far_out = await asyncio.open_connection("127.0.0.1", port, limit=PIECE_BYTES)
        except OSError:  # the agent does not run yet, or not any more
            near_out.close()
            return
        for out in (near_out, far_out):
            out.transport.set_write_buffer_limits(high=PIECE_BYTES)  # a slow reader holds the sender back
        await asyncio.gather(_pass_on(near, far_out, None), _pass_on(far, near_out, link))

    def accept(near: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(connected(near, near_out))
        running.add(task)
        task.add_done_callback(running.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0, limit=PIECE_BYTES)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    server.close()
    for task in running:
        task.cancel()


async def _pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter, link: Link | None) -> None:
    """Everything from `source` to `target`, and then its end."""
    loop = asyncio.get_running_loop()
    with suppress(ConnectionError):
        while piece := await source.read(PIECE_BYTES):
            if link is not None and (delay_s := link.delay_s(len(piece), loop.time())) > 0:
                await asyncio.sleep(delay_s)
            target.write(piece)
            await target.drain()
    target.close()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), float(sys.argv[2])))
