"""Follows the journal of one node and keeps its table in the map equal to it.

    FOLLOW    "entries after seq?"  again and again; the node holds the question while there is nothing new
      │ out of reach, or unlike at equal seq
    COMPARE   "your fingerprints?"  as of seq S; what differs is fetched, what is equal is known as of S
    DESCRIBE  "your namespaces?"    only when the descriptions differ
    FETCH     "these buckets?"      page by page, each as of its own seq ≥ S; then FOLLOW from S

The first snapshot is a repair of an empty table. Entries between S and a page's seq are in the page already: they are
passed over by range of keys, so that no copy shows up that is long gone (fault 9). A young journal is simply read from
its first entry.

Rules: one question at a time, and an answer to any other is ignored; a larger epoch empties the table at once, whatever
is under way; nothing of a smaller epoch counts (fault 10); every wait that follows a failure grows, so a node that
answers nonsense costs little.

Sans-IO. It writes its own table of the map directly: that is memory, and nobody else writes it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvmesh.transport.errors import ProtocolError
from kvmesh.transport.limits import (
    FOLLOW_BEHIND_S,
    FOLLOW_RETRY_S,
    FOLLOW_RETRY_S_MAX,
    FOLLOW_TIMEOUT_S,
    FOLLOW_WAIT_S,
    JOURNAL_BATCH_ENTRIES_MAX,
)

from .actions import Action, Answered, Ask, Lost, Tag, Ticked, Wake
from .head import Head, node_id
from .map import NodeTable
from .membership import HeadTold
from .messages import (
    Answer,
    Buckets,
    Busy,
    Compare,
    Describe,
    Descriptions,
    Entries,
    Fingerprints,
    Follow,
    Page,
    Request,
    Stale,
)
from .packing import ADMIT, DESCRIBE, EVICT, Shape, unpack
from .snapshot import Snapshot, described


class Mode(enum.Enum):
    """What the next question is."""

    IDLE = "idle"
    FOLLOW = "follow"
    COMPARE = "compare"
    DESCRIBE = "describe"
    FETCH = "fetch"


@dataclass(slots=True)
class FollowerCounters:
    """Since the start. One object may serve many followers."""

    entries: int = 0
    """Journal entries that were applied."""
    snapshot_chunks: int = 0
    """Chunks that came in pages of a snapshot or a repair."""
    compares: int = 0
    """Times that a follower lost its place, or started, and compared fingerprints."""
    mismatches: int = 0
    """Times that a table differed from the journal at equal seq."""
    lost: int = 0
    """Questions without an answer."""
    late: int = 0
    """Answers that nobody waited for any more, or of an old epoch."""
    malformed: int = 0
    """Answers that break the protocol, or come from another node."""
    busy: int = 0
    """Times that a node asked to come back later."""


_LOSSES_BORNE = 3
"""Questions lost in a row before a slow answer, and not a loss, becomes the likely cause."""
_ENTRY_KINDS = frozenset({ADMIT, EVICT, DESCRIBE})


class Follower:
    """Follows the node `name` on behalf of `own_name`."""

    def __init__(
        self,
        name: str,
        own_name: str,
        table: NodeTable,
        *,
        numbers: Iterator[int],
        random: Callable[[], float],
        counters: FollowerCounters | None = None,
        batch_entries: int = JOURNAL_BATCH_ENTRIES_MAX,
    ) -> None:
        self.name = name
        self.mode = Mode.IDLE
        self.counters = counters or FollowerCounters()
        self.heard_at = float("-inf")
        """When the node last gave a valid answer."""
        self.told_epoch = 0
        """The start of the node that the membership last told of: the table may know of a later one by an answer."""
        self._own_name = own_name
        self._node_id = node_id(name)
        self._table = table
        self._numbers = numbers
        self._random = random
        self._batch_entries = batch_entries
        self._asked: int | None = None
        self._asked_at = 0.0
        self._shown_seq = 0
        """The newest entry that a head showed."""
        self._behind_since = float("inf")
        """When a head first showed entries that the question under way should have brought."""
        self._wait_until: float | None = None
        self._wait_is_firm = False
        self._failures = 0
        """Questions in a row that failed."""
        self._mismatches = 0
        """Repairs in a row that did not lead to an equal table."""
        self._snapshot: Snapshot | None = None
        """Kept until the entries that its pages have already are behind."""
        self._describe = False
        """Whether the descriptions are still to be fetched,"""
        self._described_upto = b""
        """and from where."""

    def handle(self, event: HeadTold | Answered | Lost | Ticked, now: float) -> list[Action]:
        """Take one event. The actions are `Ask` and `Wake`."""
        match event:
            case HeadTold():
                return self._on_head(event.head, now)
            case Answered():
                if event.tag.number != self._asked:
                    self.counters.late += 1
                    return []
                self._asked = None
                return self._on_answer(event.message, now)
            case Lost():
                if event.tag.number != self._asked:
                    return []
                self._asked = None
                self.counters.lost += 1
                return self._retry(now)
            case Ticked():
                if self._asked is not None:
                    return self._ask_again_if_behind(now)
                if self._wait_until is None or now < self._wait_until:
                    return []
                return self._ask(now)

    # --- heads ---------------------------------------------------------------------------------------------------

    def _on_head(self, head: Head, now: float) -> list[Action]:
        table = self._table
        if head.node_id != self._node_id:
            self.counters.malformed += 1
            return []
        self.told_epoch = head.epoch
        if head.epoch < table.epoch or (head.epoch == table.epoch and self.mode is Mode.IDLE):
            self.counters.late += 1
            return []
        if head.epoch > table.epoch:
            return self._begin(head, now)
        self._shown_seq = max(self._shown_seq, head.seq)
        if self._asked is not None:
            self._is_unlike(head)
            return self._ask_again_if_behind(now)
        if self._wait_is_firm:
            return []
        if head.seq > table.seq or self.mode is not Mode.FOLLOW:
            return self._ask(now)
        return self._repair_if_unlike(head, now) or []

    def _ask_again_if_behind(self, now: float) -> list[Action]:
        """A head showed entries that the node would have sent by now, had it the question: the question is lost, not
        held. Gossip tells a head once, so this looks again by itself."""
        if self.mode is not Mode.FOLLOW or self._shown_seq <= self._table.seq:
            return []
        self._behind_since = min(self._behind_since, now)
        doublings = min(max(self._failures - _LOSSES_BORNE, 0), 16)
        patience_s = min(FOLLOW_BEHIND_S * 2.0**doublings, FOLLOW_TIMEOUT_S)
        if now < self._behind_since + patience_s:
            return [Wake(self._behind_since + patience_s)]
        self.counters.lost += 1
        self._failures += 1
        self._asked = None
        return self._ask(now)

    def _begin(self, head: Head, now: float) -> list[Action]:
        """A new start of the node: nothing of the old one counts."""
        self._table.clear(head.epoch)
        self._snapshot, self._describe, self._described_upto = None, False, b""
        self._failures = self._mismatches = 0
        self._shown_seq = head.seq
        self._asked = None
        self.mode = Mode.FOLLOW if head.seq <= self._batch_entries else Mode.COMPARE
        self._is_unlike(head)
        return self._ask(now)

    # --- questions -----------------------------------------------------------------------------------------------

    def _ask(self, now: float) -> list[Action]:
        assert self._asked is None
        self._wait_until, self._wait_is_firm = None, False
        self._asked, self._asked_at, self._behind_since = next(self._numbers), now, float("inf")
        ask = Ask(Tag(self.name, self._asked), self._question(), FOLLOW_TIMEOUT_S)
        return [ask, *self._ask_again_if_behind(now)]

    def _question(self) -> Request:
        epoch = self._table.epoch
        match self.mode:
            case Mode.FOLLOW:
                return Follow(self._own_name, epoch, self._table.seq, self._batch_entries)
            case Mode.DESCRIBE:
                return Describe(self._own_name, epoch, self._described_upto)
            case Mode.FETCH:
                assert self._snapshot is not None
                return Buckets(self._own_name, epoch, self._snapshot.buckets, self._snapshot.after)
            case Mode.COMPARE:
                return Compare(self._own_name, epoch)
            case Mode.IDLE:
                raise AssertionError("nothing is asked before the first head")

    def _wait(self, until: float, *, firm: bool) -> list[Action]:
        """Ask at `until`; earlier when a head shows something new, unless the wait is firm."""
        self._wait_until, self._wait_is_firm = until, firm
        return [Wake(until)]

    def _retry(self, now: float) -> list[Action]:
        """The question got no good answer: ask again, after a while that doubles."""
        self._failures += 1
        return self._wait(now + self._backoff_s(self._failures), firm=False)

    def _backoff_s(self, failures: int) -> float:
        wait_s = min(FOLLOW_RETRY_S * 2.0 ** min(failures - 1, 16), FOLLOW_RETRY_S_MAX)
        return wait_s * (0.5 + self._random())

    # --- answers -------------------------------------------------------------------------------------------------

    def _on_answer(self, answer: Answer, now: float) -> list[Action]:
        if not isinstance(answer, (Entries, Stale, Busy, Fingerprints, Descriptions, Page)):
            return self._refuse(now)
        head = Head.from_bytes(answer.head)
        if head.node_id != self._node_id:
            return self._refuse(now)
        if head.epoch > self._table.epoch:
            self.heard_at = now
            return self._begin(head, now)
        if head.epoch < self._table.epoch:
            self.counters.late += 1
            return self._retry(now)
        try:
            actions = self._take(answer, head, now)
        except ProtocolError:
            return self._refuse(now)
        self.heard_at = now
        return actions

    def _refuse(self, now: float) -> list[Action]:
        """The answer breaks the protocol: start over with a comparison, later. Heads do not hasten that."""
        self.counters.malformed += 1
        self._failures += 1
        if self.mode is not Mode.IDLE:
            self.mode = Mode.COMPARE
        return self._wait(now + self._backoff_s(self._failures), firm=True)

    def _take(self, answer: Answer, head: Head, now: float) -> list[Action]:
        match self.mode, answer:
            case Mode.FOLLOW, Stale():
                return self._repair(now)
            case _, Busy():
                self.counters.busy += 1
                return self._wait(now + answer.retry_after_ms / 1000 * (0.5 + self._random()), firm=True)
            case Mode.FOLLOW, Entries():
                return self._take_entries(answer, head, now)
            case Mode.COMPARE, Fingerprints():
                return self._take_fingerprints(answer, head, now)
            case Mode.DESCRIBE, Descriptions():
                return self._take_descriptions(answer, head, now)
            case Mode.FETCH, Page():
                return self._take_page(answer, head, now)
            case _:
                raise ProtocolError(f"{type(answer).__name__} does not answer the question")

    def _take_entries(self, answer: Entries, head: Head, now: float) -> list[Action]:
        shapes, index, keys = unpack(answer.packed, _ENTRY_KINDS)
        seq = self._table.seq
        if keys and (answer.first_seq != seq + 1 or seq + len(keys) > head.seq):
            raise ProtocolError("entries that were not asked for")
        if sum(shapes[number].kind == DESCRIBE for number in index) != len(answer.descriptions):
            raise ProtocolError("more or fewer descriptions than entries that take one")
        self._apply([shapes[number] for number in index], keys, iter(answer.descriptions))
        self._failures = 0
        if not keys:
            self._shown_seq = min(self._shown_seq, head.seq)  # the node has no more, whoever told that it has
        if self._snapshot is not None and self._table.seq >= self._snapshot.seq:
            self._snapshot = None
        if (actions := self._repair_if_unlike(head, now)) is not None:
            return actions
        if not keys and now - self._asked_at < FOLLOW_WAIT_S / 2:
            # The node holds no question open now: ask at intervals instead.
            return self._wait(now + FOLLOW_WAIT_S * (0.5 + self._random()), firm=False)
        return self._ask(now)

    def _apply(self, shapes: list[Shape], keys: list[bytes], texts: Iterator[bytes]) -> None:
        """Write the entries after the table's seq into it."""
        table, snapshot = self._table, self._snapshot
        for shape, key in zip(shapes, keys, strict=True):
            table.seq += 1
            if shape.kind == DESCRIBE:
                table.descriptions.set(shape.namespace_id, next(texts))
            elif snapshot is not None and snapshot.knows(key, table.seq):
                continue
            elif shape.kind == ADMIT:
                table.admit(key, shape.namespace_id, shape.size_bytes, shape.tiers)
            else:
                table.evict(key, shape.tiers)
        self.counters.entries += len(keys)

    def _take_fingerprints(self, answer: Fingerprints, head: Head, now: float) -> list[Action]:
        table = self._table
        table.seq, table.refused = head.seq, 0
        self._snapshot = Snapshot(table.holdings.differing(answer.buckets), head.seq)
        self._describe, self._described_upto = answer.descriptions != table.descriptions.fingerprint, b""
        return self._next_part(head, now)

    def _take_descriptions(self, answer: Descriptions, head: Head, now: float) -> list[Action]:
        for namespace_id, text in described(answer, self._described_upto):
            self._table.descriptions.set(namespace_id, text)
        self._described_upto = answer.upto
        self._describe = bool(answer.upto)
        return self._next_part(head, now)

    def _take_page(self, answer: Page, head: Head, now: float) -> list[Action]:
        assert self._snapshot is not None
        self.counters.snapshot_chunks += self._snapshot.take(answer, head.seq, self._table)
        return self._next_part(head, now)

    def _next_part(self, head: Head, now: float) -> list[Action]:
        """After a comparison, and after each page that follows from it: what is still to be fetched?"""
        assert self._snapshot is not None
        self._failures = 0
        if self._describe:
            self.mode = Mode.DESCRIBE
        elif not self._snapshot.complete:
            self.mode = Mode.FETCH
        else:
            self.mode = Mode.FOLLOW
            if self._table.seq >= self._snapshot.seq:
                self._snapshot = None
                if (actions := self._repair_if_unlike(head, now)) is not None:
                    return actions
        return self._ask(now)

    # --- comparing -----------------------------------------------------------------------------------------------

    def _is_unlike(self, head: Head) -> bool:
        """Whether the table differs from the journal of this head. Only at equal seq can that be said."""
        table, holdings = self._table, self._table.holdings
        if head.seq != table.seq or self.mode is not Mode.FOLLOW or self._snapshot is not None:
            return False
        if table.refused:
            # The map was full: of course it differs. Try again when there is room for the rest, not before.
            table.synced = True
            return table.room >= head.count - holdings.count
        if (head.count, head.fingerprint) != (holdings.count, holdings.fingerprint):
            self.counters.mismatches += 1
            return True
        table.synced, self._mismatches = True, 0
        return False

    def _repair_if_unlike(self, head: Head, now: float) -> list[Action] | None:
        """None when nothing speaks against the table."""
        return self._repair(now) if self._is_unlike(head) else None

    def _repair(self, now: float) -> list[Action]:
        """Compare: at once the first time, and ever later as long as that does not lead to an equal table."""
        self._mismatches += 1
        self.counters.compares += 1
        self.mode = Mode.COMPARE
        if self._mismatches == 1:
            return self._ask(now)
        return self._wait(now + self._backoff_s(self._mismatches), firm=True)
