"""A source of chunks in an arena that another process can map, for the tests of one-sided reads."""

from __future__ import annotations

from dataclasses import dataclass

from kvmesh.arena import Arena
from kvmesh.transport.interface import Region
from kvmesh.transport.limits import MIB
from tests.transport.ends import Chunks, CountedLoan

ARENA_BYTES = 512 * MIB
"""More than any test lends; pages cost memory once they are written."""


@dataclass
class ArenaLoan:
    """A loan of the chunks behind, whose bytes lie in the arena."""

    behind: CountedLoan
    buffer: memoryview
    offset: int

    @property
    def checksum(self) -> int:
        return self.behind.checksum

    def release(self) -> None:
        self.behind.release()


class MappedChunks:
    """The chunks of a `Chunks`, each put into the arena when it is first lent."""

    def __init__(self, behind: Chunks, size_bytes: int = ARENA_BYTES) -> None:
        self.behind = behind
        self.arena = Arena.create(size_bytes)
        self.region = Region(self.arena.fileno(), self.arena.address, size_bytes)
        self._placed: dict[bytes, tuple[int, int]] = {}
        self._next = 0

    def view(self, key: bytes) -> memoryview:
        """The chunk in the arena."""
        if key not in self._placed:
            content = self.behind.held[key]
            self._placed[key] = self._next, len(content)
            self.arena.view(*self._placed[key])[:] = content
            self._next += len(content)
        return self.arena.view(*self._placed[key])

    def lend(self, key: bytes) -> ArenaLoan | None:
        loan = self.behind.lend(key)
        if loan is None:
            return None
        return ArenaLoan(loan, self.view(key), self._placed[key][0])

    def suspect(self, key: bytes) -> None:
        self.behind.suspect(key)

    def close(self) -> None:
        self.arena.close()
