"""What one node holds: key → record, in 256 buckets, with a fingerprint for each bucket and for all.

Both ends of following use this one class: the journal for the truth, the map for its copy. So both take the fingerprint
in the same way, and two copies are equal when it, and the count, are equal.

    fingerprint = xor over all (key, tier) of XXH3-64(key, seed=bit of the tier)   (any order; its own inverse)

A copy on one tier is one thing: a chunk leaves the node only with its last copy. Records are shared objects: a million
chunks of one namespace have one record for each combination of tiers, and counting the records gives all totals without
a scan.

Plain data: no clock, no I/O, one thread.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import xxhash

from kvmesh.transport.limits import JOURNAL_BUCKETS

from .packing import ALL_TIERS, TIERS

_TIER_BITS_IN: Final = [
    tuple(1 << bit for bit in range(len(TIERS)) if mask >> bit & 1) for mask in range(ALL_TIERS + 1)
]
_hash = xxhash.xxh3_64_intdigest


class Record(NamedTuple):
    """What is known about a chunk besides its key."""

    namespace_id: bytes
    size_bytes: int
    tiers: int
    """A mask: `kvmesh.discovery.packing.TIER_BITS`."""


@dataclass(slots=True)
class Totals:
    """A sum over chunks. `tiers` has (chunks, bytes) for each tier: a chunk on two of them counts in both."""

    chunks: int = 0
    size_bytes: int = 0
    tiers: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, record: Record, times: int) -> None:
        """Count `times` chunks of this record."""
        self.chunks += times
        self.size_bytes += times * record.size_bytes
        for bit, tier in enumerate(TIERS):
            if record.tiers >> bit & 1:
                chunks, size_bytes = self.tiers.get(tier, (0, 0))
                self.tiers[tier] = (chunks + times, size_bytes + times * record.size_bytes)


class Holdings:
    """The chunks of one node."""

    def __init__(self) -> None:
        self._buckets: list[dict[bytes, Record]] = [{} for _ in range(JOURNAL_BUCKETS)]
        self._fingerprints = [0] * JOURNAL_BUCKETS
        self._fingerprint = 0
        self._tally: dict[Record, int] = {}
        self._shared: dict[Record, Record] = {}
        """One object for all chunks that have an equal record."""
        self._chunks = 0
        self._count = 0

    def __len__(self) -> int:
        return self._chunks

    def __contains__(self, key: bytes) -> bool:
        return key in self._buckets[key[0]]

    @property
    def count(self) -> int:
        """Copies: a chunk on two tiers counts twice."""
        return self._count

    @property
    def fingerprint(self) -> int:
        """64 bits over all copies."""
        return self._fingerprint

    def fingerprints(self) -> bytes:
        """The fingerprints of the 256 buckets, 8 bytes each, little-endian."""
        return struct.pack(f"<{JOURNAL_BUCKETS}Q", *self._fingerprints)

    def differing(self, fingerprints: bytes) -> bytes:
        """The buckets whose fingerprints are not these."""
        theirs = struct.unpack(f"<{JOURNAL_BUCKETS}Q", fingerprints)
        return bytes(number for number, own in enumerate(self._fingerprints) if own != theirs[number])

    def get(self, key: bytes) -> Record | None:
        """The record of `key`, or None."""
        return self._buckets[key[0]].get(key)

    def bucket(self, number: int) -> Mapping[bytes, Record]:
        """The chunks whose key starts with the byte `number`: to look at, not to keep."""
        return self._buckets[number]

    def items(self) -> Iterator[tuple[bytes, Record]]:
        """Every chunk."""
        for bucket in self._buckets:
            yield from bucket.items()

    def tally(self) -> Mapping[Record, int]:
        """How many chunks have each record: what totals are made of."""
        return self._tally

    def admit(self, key: bytes, namespace_id: bytes, size_bytes: int, tier: int) -> bool:
        """A copy came to the tier (a bit). False when it was there already, as it is."""
        old = self.get(key)
        record = Record(namespace_id, size_bytes, tier | (old.tiers if old else 0))
        if record == old:
            return False
        self._put(key, old, record)
        return True

    def evict(self, key: bytes, tier: int) -> bool:
        """The copy on the tier (a bit) went. False when there was none."""
        old = self.get(key)
        if old is None or not old.tiers & tier:
            return False
        if old.tiers == tier:
            self._remove(key, old)
        else:
            self._put(key, old, old._replace(tiers=old.tiers & ~tier))
        return True

    def discard(self, key: bytes) -> bool:
        """Every copy of `key` went. False when there was none."""
        old = self.get(key)
        if old is not None:
            self._remove(key, old)
        return old is not None

    def load(self, pairs: Iterable[tuple[bytes, Record]]) -> None:
        """Add many chunks, none of which is here: as `admit` on every tier, but quickly."""
        tally = self._tally
        for key, record in pairs:
            bits = _TIER_BITS_IN[record.tiers]
            for bit in bits:
                self._mix(key, bit)
            self._buckets[key[0]][key] = self._shared.setdefault(record, record)
            self._chunks += 1
            self._count += len(bits)
            tally[record] = tally.get(record, 0) + 1

    def _mix(self, key: bytes, bit: int) -> None:
        """Put a copy into the fingerprints, or take it out: xor does both."""
        mixed = _hash(key, bit)
        self._fingerprints[key[0]] ^= mixed
        self._fingerprint ^= mixed

    def _put(self, key: bytes, old: Record | None, record: Record) -> None:
        if old is not None:
            self._remove(key, old)
        self.load(((key, record),))

    def _remove(self, key: bytes, old: Record) -> None:
        del self._buckets[key[0]][key]
        for bit in _TIER_BITS_IN[old.tiers]:
            self._mix(key, bit)
            self._count -= 1
        self._chunks -= 1
        left = self._tally[old] - 1
        if left:
            self._tally[old] = left
        else:
            del self._tally[old], self._shared[old]
