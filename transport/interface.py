"""What a transport is: the seam between the mesh and whatever moves its bytes.

A *transport* is one node's end. It answers *calls* (small control messages, one request and one reply), serves *reads*
(bulk: chunks out of this node's arena) and makes both towards other nodes. `kvmesh.transport.memory` and
`kvmesh.transport.zmq` have the same behaviour; one contract test runs against both (tests/transport/test_contract.py).

The rules of a read:

1. Each wanted chunk has exactly one landing, in any order, unless the read ends first (deadline, close, lost peer):
   what has not landed by then is a miss. A read never raises for what a peer does.
2. `Outcome.LANDED` means: all bytes are in `Want.into`, and their checksum equals the one that the holder took at put.
3. `Want.into` may be written until `Reading.close()` has returned, whatever the outcome. Until then the buffer is
   quarantined: the caller must not give it to anyone else.
4. A holder sends no more than the reader's credit allows, so a slow reader costs the holder leases, never memory.

This module knows nothing of sockets, of the arena, or of who holds what.
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


class Loan(Protocol):
    """A chunk lent to the transport: its bytes stay as they are until `release`."""

    @property
    def buffer(self) -> memoryview:
        """The chunk's bytes, in the arena."""

    @property
    def checksum(self) -> int:
        """XXH3-64 of the bytes, as taken at put."""

    def release(self) -> None:
        """Give the chunk back. May be called from any thread, and does not block; a second call does nothing."""


class ChunkSource(Protocol):
    """Where a transport finds the chunks that peers read."""

    def lend(self, key: bytes) -> Loan | None:
        """The chunk `key`, kept from eviction until released; None when this node does not hold it. Called on the
        loop."""


CallHandler = Callable[[bytes], Awaitable[bytes]]
"""Answers one control message. It may wait (a long poll). An exception of its own answers the caller with an error."""


class Outcome(enum.Enum):
    """What became of one wanted chunk."""

    LANDED = "landed"
    NOT_HELD = "not_held"
    """The holder does not have it (any more): the map was stale."""
    WRONG_SIZE = "wrong_size"
    """The holder's chunk has another size than the buffer: nothing was written."""
    CORRUPT = "corrupt"
    """The bytes that arrived do not match the holder's checksum."""


@dataclass(frozen=True, slots=True)
class Want:
    """One chunk to read."""

    key: bytes
    into: memoryview
    """Writable, contiguous, and of exactly the chunk's size."""


@dataclass(frozen=True, slots=True)
class Landing:
    """The end of one wanted chunk: `index` counts in the list of wants."""

    index: int
    outcome: Outcome
    checksum: int
    """XXH3-64 as the holder has it; 0 when there is none."""


class Reading(Protocol):
    """A read under way: an asynchronous iterator of landings, as they happen."""

    def __aiter__(self) -> AsyncIterator[Landing]: ...

    async def __anext__(self) -> Landing:
        """The next landing. Ends at the last one, at the deadline, or when the peer is lost."""

    async def close(self) -> None:
        """Cancel what is still under way. When this returns, no buffer of the read will be written again."""


@dataclass(frozen=True, slots=True)
class TransportStats:
    """Counters since the start of one transport."""

    bytes_read: int = 0
    """Bulk bytes that landed here."""
    bytes_served: int = 0
    """Bulk bytes that were sent from here."""
    chunks_read: int = 0
    chunks_served: int = 0
    not_held: int = 0
    """Answers "not held" that this node gave or got."""
    corrupt: int = 0
    """Chunks that arrived with a wrong checksum."""
    malformed: int = 0
    """Messages from peers that were dropped because they do not follow the protocol."""
    refused: int = 0
    """Requests from peers that were refused because a bound was reached."""
    peers_lost: int = 0
    """Reads that ended because the connection to the holder went away."""


class Transport(Protocol):
    """One node's end of the data plane."""

    @property
    def address(self) -> str:
        """Where peers reach this transport, e.g. ``127.0.0.1:41235``."""

    async def call(self, address: str, request: bytes, *, timeout_s: float) -> bytes:
        """Send `request` to the transport at `address` and return its handler's answer.

        Raises `UnreachableError` when there is none within `timeout_s`, `ProtocolError` when the peer refused the
        request.
        """

    def read(self, address: str, wants: Sequence[Want], *, deadline_s: float) -> Reading:
        """Start to read chunks from the holder at `address`; `deadline_s` counts from now."""

    def stats(self) -> TransportStats:
        """A copy of the counters."""

    async def close(self) -> None:
        """Cancel every read and call, give every loan back, and free the address."""
