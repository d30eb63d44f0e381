"""The seam of the network of gossip: what moves bytes between two addresses. `sockets` and `memory` are both.

A carrier knows no message, no key and no bound but those on its own buffers. Its errors are `OSError`s, as sockets
raise them. All of it runs on the loop on which `start` was called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from kvmesh.discovery.wire.messages import Endpoint


class Connection(Protocol):
    """One end of a stream. Whoever was given it closes it."""

    async def receive(self) -> bytes:
        """Some of what came; nothing at its end."""
        ...

    async def send(self, data: bytes) -> None:
        """All of it, as fast as the other end takes it."""
        ...

    def end(self) -> None:
        """Nothing more will be sent. It can still receive."""
        ...

    def close(self) -> None:
        """A second call does nothing."""
        ...


OnPacket = Callable[[bytes, Endpoint], None]
OnStream = Callable[[Connection, Endpoint], None]
OnError = Callable[[OSError], None]


class Carrier(Protocol):
    """Where one node's packets and streams come from and go to."""

    def start(self, on_packet: OnPacket, on_stream: OnStream, on_error: OnError) -> None:
        """Receive from now on. `on_error` hears what went wrong in receiving; it goes on all the same."""
        ...

    def send(self, target: Endpoint, data: bytes) -> None:
        """One packet, at once or not at all. Nobody is told whether it arrives."""
        ...

    async def connect(self, target: Endpoint) -> Connection:
        """A stream to `target`."""
        ...

    async def look_up(self, host: str, port: int) -> Sequence[Endpoint]:
        """Every address of a name that can be reached from here; none when it has no such address."""
        ...

    def close(self) -> None:
        """Nothing is received any more. A second call does nothing. Connections stay: their owners close them."""
        ...
