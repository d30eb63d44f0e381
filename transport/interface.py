"""What a transport is: the seam between the mesh and whatever moves its bytes.

A *transport* is one node's end. It answers *calls* (small control messages, one request and one reply), serves *reads*
(bulk: chunks out of this node's arena) and makes both towards other nodes. `kvmesh.transport.memory` and
`kvmesh.transport.zmq` have the same behaviour; one contract test runs against both, and against all that an agent opens
(tests/transport/test_contract.py).

The rules of a read:

1. Each wanted chunk has exactly one landing, in any order, unless the read ends first (deadline, close, lost peer):
   what has not landed by then is a miss. A read never raises for what a peer does.
2. `Outcome.LANDED` means: all bytes are in `Want.into`, and their checksum equals the one that the holder took at put.
   Of a part, the holder verifies the whole chunk against the checksum of its put before it takes the part's.
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

import msgspec


@dataclass(frozen=True, slots=True)
class Region:
    """A node's arena, as a transport that moves bytes without the holder's help needs it."""

    fd: int
    """The memfd. It stays open, and its owner's, for as long as the transport is."""
    address: int
    """Where it is mapped in this process, writable."""
    size_bytes: int


class Loan(Protocol):
    """A chunk lent to the transport: its bytes stay as they are until `release`."""

    @property
    def buffer(self) -> memoryview:
        """The chunk's bytes, in the arena."""

    @property
    def offset(self) -> int:
        """Where in the arena they begin."""

    @property
    def checksum(self) -> int:
        """XXH3-64 of the bytes, as taken at put."""

    def release(self) -> None:
        """Give the chunk back. May be called from any thread, and does not block; a second call does nothing."""


class ChunkSource(Protocol):
    """Where a transport finds the chunks that peers read."""

    @property
    def region(self) -> Region | None:
        """The arena that all loans lie in; None when there is none that another process could map."""

    def lend(self, key: bytes) -> Loan | None:
        """The chunk `key`, kept from eviction until released; None when this node does not hold it. Called on the
        loop."""

    def suspect(self, key: bytes) -> None:
        """The bytes of `key` do not match their checksum, or a reader says so. The source verifies its copy in its own
        time, and takes it out when it is wrong. Called on the loop, returns at once."""


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
class Slice:
    """A regular part of a chunk: `count` runs of `run_bytes`, the first at `offset_bytes`, a run each `stride_bytes`.

    A byte range is one run. A range of layers of ``[layers, 2, heads, tokens, head_dim]`` is one run; a range of heads
    is a run for each layer's K and V. What is read are the runs, one after the other, without the gaps.
    """

    offset_bytes: int
    run_bytes: int
    stride_bytes: int = 0
    """From the start of a run to the start of the next; at least `run_bytes`. Means nothing for one run."""
    count: int = 1

    @property
    def bytes(self) -> int:
        """What the runs have together."""
        return self.run_bytes * self.count

    @property
    def end(self) -> int:
        """Where the last run ends: a chunk that has the slice is at least so long."""
        return self.offset_bytes + self.stride_bytes * (self.count - 1) + self.run_bytes


class Want(msgspec.Struct, frozen=True):
    """One chunk to read, or a part of one. Wants of one chunk stand next to each other: it is verified once then."""

    key: bytes
    into: memoryview
    """Writable, contiguous, and of exactly the chunk's size, or the part's."""
    part: Slice | None = None
    """None: the whole chunk."""
    chunk_bytes: int = 0
    """The size of the whole chunk, where only a part is read."""

    @property
    def whole_bytes(self) -> int:
        """The size that the holder's chunk must have."""
        return self.chunk_bytes if self.part is not None else self.into.nbytes


class Landing(msgspec.Struct, frozen=True, gc=False):
    """The end of one wanted chunk: `index` counts in the list of wants."""

    index: int
    outcome: Outcome
    checksum: int
    """XXH3-64 of what was read, as the holder has it; 0 when there is none."""


class Reading(Protocol):
    """A read under way: an asynchronous iterator of landings, as they happen, all at once that have."""

    def __aiter__(self) -> AsyncIterator[list[Landing]]: ...

    async def __anext__(self) -> list[Landing]:
        """The next landings, at least one. Ends at the last one, at the deadline, or when the peer is lost."""

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
    expired: int = 0
    """Reads and leases of peers that this node ended because their time was over."""
    bytes_read_shm: int = 0
    """Of `bytes_read`: what was copied out of the arena of a peer on this host."""
    bytes_read_nixl: int = 0
    """Of `bytes_read`: what NIXL moved."""
    fallbacks: int = 0
    """Reads that went on by the next backend after one had failed for the holder."""


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

    def backend(self, address: str) -> str:
        """By which backend a read from `address` would go, as far as it is known now: a key for what was measured."""

    def stats(self) -> TransportStats:
        """A copy of the counters."""

    async def close(self) -> None:
        """Cancel every read and call, give every loan back, and free the address."""
