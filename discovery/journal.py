"""The journal: a node's numbered record of what it admitted and evicted, and what it holds now.

The truth about a node's chunks lives here and nowhere else. An entry is one change of one copy (a key on a tier),
numbered by seq from 1 within this start of the node (its epoch). The newest entries stay in a ring of fixed size; a
follower that asks for older ones compares fingerprints instead. A change that changes nothing (an admit of what is
held, an evict of what is not) makes no entry.

Who follows, and how entries travel, is `kvmesh.discovery.publishing`. No clock, no I/O; one thread: the loop of the
store's owner.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping

import xxhash

from kvmesh.transport.limits import (
    DESCRIPTION_BYTES_MAX,
    DESCRIPTIONS_MAX,
    JOURNAL_RING_ENTRIES,
    KEY_BYTES,
    NAMESPACE_ID_BYTES,
)

from .head import Head, node_id
from .holdings import Holdings, Record
from .packing import ADMIT, DESCRIBE, EVICT, NO_KEY, NO_NAMESPACE, TIER_BITS, Entry, Shape


class Journal:
    """The journal of the node `name` since its start `epoch`, which must be larger than any before it."""

    def __init__(self, name: str, epoch: int, *, ring_entries: int = JOURNAL_RING_ENTRIES) -> None:
        assert epoch > 0
        assert ring_entries > 0
        self.name = name
        self.epoch = epoch
        self.on_change: list[Callable[[], None]] = []
        """Called after each entry, on the same thread."""
        self._node_id = node_id(name)
        self._ring: list[Entry] = []
        """Entry `seq` is at ``(seq - 1) % ring_entries``: a list, since a deque is slow to read in its middle."""
        self._ring_entries = ring_entries
        self._seq = 0
        self._holdings = Holdings()
        self._descriptions = DescriptionTable()

    @property
    def holdings(self) -> Holdings:
        """What the node holds now: to read."""
        return self._holdings

    @property
    def descriptions(self) -> DescriptionTable:
        """The namespaces that were described: to read."""
        return self._descriptions

    @property
    def head(self) -> Head:
        """The summary of this moment."""
        return Head(self._node_id, self.epoch, self._seq, self._holdings.count, self._holdings.fingerprint)

    def admit(self, key: bytes, namespace_id: bytes, size_bytes: int, tier: str) -> bool:
        """A copy of `key` is now on `tier` ("gpu", "ram" or "disk"). False when it was there already.

        `namespace_id`: 16 bytes. `size_bytes`: of the chunk, the same on each tier.
        """
        assert len(key) == KEY_BYTES
        assert len(namespace_id) == NAMESPACE_ID_BYTES
        bit = TIER_BITS[tier]
        held = self._holdings.get(key)
        assert held is None or held[:2] == (namespace_id, size_bytes), "a key names one content, so one size"
        if not self._holdings.admit(key, namespace_id, size_bytes, bit):
            return False
        self._append(Entry(Shape(ADMIT, bit, namespace_id, size_bytes), key))
        return True

    def evict(self, key: bytes, tier: str) -> bool:
        """The copy of `key` on `tier` is gone; copies on other tiers stay. False when there was none."""
        bit = TIER_BITS[tier]
        if not self._holdings.evict(key, bit):
            return False
        self._append(Entry(Shape(EVICT, bit, NO_NAMESPACE, 0), key))
        return True

    def describe(self, namespace_id: bytes, description: bytes) -> bool:
        """Say what a namespace is, for people who look at the map: at most 2 KiB of JSON.

        False when nothing was recorded. Nothing is recorded when it is said already, and beyond `DESCRIPTIONS_MAX`
        namespaces: sharing needs no description.
        """
        if not self._descriptions.set(namespace_id, description):
            return False
        self._append(Entry(Shape(DESCRIBE, 0, namespace_id, 0), NO_KEY, description))
        return True

    def reaches(self, seq: int) -> bool:
        """Whether the entry after `seq` is still in the ring, or is the next to come."""
        return self._seq - len(self._ring) <= seq <= self._seq

    def since(self, seq: int, limit: int) -> list[Entry]:
        """The entries after `seq`, oldest first, at most `limit`. `seq` must be within reach."""
        assert self.reaches(seq)
        count = min(limit, self._seq - seq)
        start = seq % self._ring_entries
        found = self._ring[start : start + count]
        return found + self._ring[: count - len(found)]

    def bucket(self, number: int) -> Mapping[bytes, Record]:
        """The chunks whose key starts with the byte `number`: to look at, not to keep."""
        return self._holdings.bucket(number)

    def fingerprints(self) -> bytes:
        """The fingerprints of the 256 buckets, 8 bytes each, little-endian."""
        return self._holdings.fingerprints()

    def _append(self, entry: Entry) -> None:
        place = self._seq % self._ring_entries
        if place == len(self._ring):
            self._ring.append(entry)
        else:
            self._ring[place] = entry
        self._seq += 1
        for call in self.on_change:
            call()


class DescriptionTable:
    """Namespace id → description, with a fingerprint as `Holdings` has one. Bounded."""

    def __init__(self) -> None:
        self._texts: dict[bytes, bytes] = {}
        self._order: list[bytes] = []
        self.fingerprint = 0

    def __len__(self) -> int:
        return len(self._texts)

    def get(self, namespace_id: bytes) -> bytes | None:
        """The description, or None."""
        return self._texts.get(namespace_id)

    def set(self, namespace_id: bytes, text: bytes) -> bool:
        """Record a description. False when it is there already, is too long, or when the table is full."""
        old = self._texts.get(namespace_id)
        full = old is None and len(self._texts) >= DESCRIPTIONS_MAX
        if old == text or full or len(text) > DESCRIPTION_BYTES_MAX or len(namespace_id) != NAMESPACE_ID_BYTES:
            return False
        if old is None:
            bisect.insort(self._order, namespace_id)
        else:
            self.fingerprint ^= xxhash.xxh3_64_intdigest(namespace_id + old)
        self.fingerprint ^= xxhash.xxh3_64_intdigest(namespace_id + text)
        self._texts[namespace_id] = text
        return True

    def past(self, after: bytes) -> list[bytes]:
        """The namespace ids larger than `after`, ascending."""
        return self._order[bisect.bisect_right(self._order, after) :]
