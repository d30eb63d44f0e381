"""A process of its own for the tests of shared memory: ``python -m tests.transport.shm_peer ROLE [ADDRESS]``.

``holder``: lends 256 chunks of 256 KiB; prints its address; stops itself (SIGSTOP) when the chunk 200 is asked for.
``reader``: leases the chunks 0 to 7 of the holder at ADDRESS, copies none, prints a line, and waits.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from kvmesh.transport.backends import open_transport
from kvmesh.transport.lending_messages import Lent, decode_answer, encode_request, lend_request
from kvmesh.transport.limits import KIB, LEND_LEASE_S, MIB
from tests.transport.arenas import MappedChunks
from tests.transport.ends import LONG_S, Chunks, echo, key, wants


class Stopping(MappedChunks):
    """Stops its process in mid-read."""

    def lend(self, key_: bytes) -> object:
        if key_ == key(200):
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().lend(key_)


async def holder() -> None:
    """Serve until killed."""
    source = Chunks()
    source.fill(256, 256 * KIB)
    transport = await open_transport("127.0.0.1", 0, Stopping(source), echo, transports=("shm", "zmq"))
    print(transport.address, flush=True)
    await asyncio.Event().wait()


async def reader(address: str) -> None:
    """Lease, and wait until killed."""
    transport = await open_transport("127.0.0.1", 0, None, echo, transports=("shm",))
    link = await transport.peers.wait_for_link(address, LONG_S)
    assert link is not None
    request = lend_request(link.instance, link.reader, 1, LEND_LEASE_S, wants(range(8), MIB))
    decode_answer(Lent, await link.call(encode_request(request), LONG_S))
    print("leased", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(holder() if sys.argv[1] == "holder" else reader(sys.argv[2]))
