"""Reads in which the reader takes the bytes itself: out of the holder's arena, without the holder's help.

The contract between the taking of chunks (what to lend, verify and give back: taking.py) and a backend that moves bytes
(shared memory, NIXL). An *end* is this process's side of one backend: it has an offer for peers, and makes a *mover*
from a peer's offer; a mover copies pieces out of that peer's arena. Every checksum is verified afterwards, so a mover
may be wrong, late or cut off, and costs a chunk and never a wrong byte.

Knows nothing of leases and of chunks. Everything here is used on the loop; where the bytes move is the backend's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import xxhash


@dataclass(frozen=True, slots=True)
class Piece:
    """One contiguous run to copy. A part of a chunk becomes several, one after the other in a list."""

    remote_offset: int
    """Where in the holder's arena it begins. Whoever makes the piece has checked that the run lies in the arena."""
    into: memoryview
    """Writable, contiguous bytes of this process, of exactly the run's length."""
    digest: xxhash.xxh3_64 | None = None
    """Shared by the pieces of one chunk. A mover that `hashes` feeds it with what it wrote, in the list's order."""


class Move(Protocol):
    """A list of pieces under way."""

    async def wait(self) -> None:
        """Wait until all of it is copied; then nothing is left to stop. Raises `UnreachableError` when the peer or the
        path to it is gone. May be cancelled, and called again: the move goes on meanwhile."""

    async def stop(self) -> None:
        """Give up what is not copied yet. When this returns, nothing of this move can write any more, and no view of
        its buffers is kept; until then they stay quarantined. Called unless `wait` has returned. Raises nothing."""


class Mover(Protocol):
    """Moves bytes from one peer's arena to this process."""

    @property
    def hashes(self) -> bool:
        """Whether moves feed the digest of each piece as they copy, while the bytes are in the processor's cache."""

    def move(self, pieces: Sequence[Piece]) -> Move:
        """Start to copy the pieces, in their order as far as the backend has one. Does not block. Raises
        `UnreachableError` only when nothing was started."""

    async def close(self) -> None:
        """Stop all moves, as `Move.stop`, and forget the peer."""


class OneSidedEnd(Protocol):
    """This process's side of one backend."""

    def offer(self) -> bytes:
        """What a peer needs to read from here; empty when nothing can be read from here."""

    async def mover(self, peer_offer: bytes, peer_address: str, reader: bytes) -> Mover:
        """A mover for the peer that made this offer. `reader` is the random name that our leases go by there. Raises
        `UnreachableError` when this process cannot reach the peer in this way, `ProtocolError` for an offer that is
        malformed. Bounded in time."""

    async def close(self) -> None:
        """Serve no more. Its movers were closed before."""
