"""Answers the followers of one journal. Following is a question at a time, so a slow follower costs the node nothing.

Nothing is kept for a follower but its place in the short list of those that read a snapshot. A snapshot is fuzzy: each
page is what the node holds at the moment it is asked, and says at which seq that was; nothing is copied or frozen for
it. Pages go through the wanted buckets in the order of the keys, so a page's end is one key, and a bucket may take
several pages.

Sans-IO: who waits for new entries, and how long, is `kvmesh.discovery.core`.
"""

from __future__ import annotations

import enum

from kvmesh.transport.errors import ProtocolError
from kvmesh.transport.limits import (
    DESCRIPTIONS_PAGE_BYTES_MAX,
    SNAPSHOT_IDLE_S,
    SNAPSHOT_PAGE_ENTRIES_MAX,
    SNAPSHOT_RETRY_S,
    SNAPSHOTS_AT_ONCE_MAX,
)

from .holdings import Record
from .journal import Journal
from .messages import (
    Buckets,
    Busy,
    Compare,
    Describe,
    Descriptions,
    Entries,
    Fingerprints,
    Follow,
    Page,
    Stale,
)
from .packing import DESCRIBE, HELD, NOTHING, Entry, Shape, pack

Question = Follow | Compare | Describe | Buckets


class Hold(enum.Enum):
    """There is nothing to answer yet."""

    HOLD = "hold"


class Publisher:
    """The answering side of following."""

    def __init__(self, journal: Journal, *, page_entries: int = SNAPSHOT_PAGE_ENTRIES_MAX) -> None:
        self._journal = journal
        self._page_entries = page_entries
        self._readers: dict[str, float] = {}
        """Followers that read a snapshot, each with the time at which its place is free again."""
        self.snapshots_served = 0
        self.snapshots_refused = 0

    def answer(
        self, question: Question, now: float
    ) -> Entries | Stale | Busy | Fingerprints | Descriptions | Page | Hold:
        """The answer of this moment, or HOLD when a follower has all there is."""
        journal = self._journal
        if question.epoch != journal.epoch:
            return Stale(journal.head.to_bytes())
        match question:
            case Follow():
                return self._entries(question)
            case Compare():
                return Fingerprints(journal.head.to_bytes(), journal.fingerprints(), journal.descriptions.fingerprint)
            case Describe():
                return self._descriptions(question)
            case Buckets():
                return self._page(question, now)

    def nothing_new(self) -> Entries:
        """The answer to a question that was held long enough."""
        head = self._journal.head
        return Entries(head.to_bytes(), head.seq + 1, NOTHING, [])

    def _entries(self, question: Follow) -> Entries | Stale | Hold:
        journal = self._journal
        if not journal.reaches(question.seq):
            return Stale(journal.head.to_bytes())
        entries = _within_bytes(journal.since(question.seq, question.limit))
        if not entries:
            return Hold.HOLD
        return Entries(
            journal.head.to_bytes(),
            question.seq + 1,
            pack((entry.shape, entry.key) for entry in entries),
            [entry.description for entry in entries if entry.shape.kind == DESCRIBE],
        )

    def _descriptions(self, question: Describe) -> Descriptions:
        table = self._journal.descriptions
        ids: list[bytes] = []
        texts: list[bytes] = []
        taken = 0
        waiting = table.past(question.after)
        for namespace_id in waiting:
            text = table.get(namespace_id) or b""
            taken += len(text)
            if ids and taken > DESCRIPTIONS_PAGE_BYTES_MAX:
                break
            ids.append(namespace_id)
            texts.append(text)
        upto = ids[-1] if len(ids) < len(waiting) else b""
        return Descriptions(self._journal.head.to_bytes(), upto, b"".join(ids), texts)

    def _page(self, question: Buckets, now: float) -> Page | Busy:
        if list(question.buckets) != sorted(set(question.buckets)):
            raise ProtocolError("the buckets of a question must ascend")
        if not self._has_place(question.follower, now):
            self.snapshots_refused += 1
            return Busy(self._journal.head.to_bytes(), int(SNAPSHOT_RETRY_S * 1000))
        pairs: list[tuple[Shape, bytes]] = []
        shapes: dict[Record, Shape] = {}
        upto = b""
        room = self._page_entries
        for number in question.buckets:
            if question.after and number < question.after[0]:
                continue
            bucket = self._journal.bucket(number)
            keys = sorted(key for key in bucket if key > question.after)
            if len(keys) > room:
                upto = keys[room - 1] if room else pairs[-1][1]
                keys = keys[:room]
            for key in keys:
                record = bucket[key]
                shape = shapes.get(record)
                if shape is None:
                    shape = shapes[record] = Shape(HELD, record.tiers, record.namespace_id, record.size_bytes)
                pairs.append((shape, key))
            room -= len(keys)
            if upto:
                break
        if not upto:
            del self._readers[question.follower]
            self.snapshots_served += 1
        return Page(self._journal.head.to_bytes(), upto, pack(pairs))

    def _has_place(self, follower: str, now: float) -> bool:
        for reader in [reader for reader, until in self._readers.items() if until <= now]:
            del self._readers[reader]
        if follower not in self._readers and len(self._readers) >= SNAPSHOTS_AT_ONCE_MAX:
            return False
        self._readers[follower] = now + SNAPSHOT_IDLE_S
        return True


def _within_bytes(entries: list[Entry]) -> list[Entry]:
    """As many entries from the front as have descriptions that fit into one message."""
    taken = 0
    for number, entry in enumerate(entries):
        taken += len(entry.description)
        if taken > DESCRIPTIONS_PAGE_BYTES_MAX:
            return entries[:number]
    return entries
