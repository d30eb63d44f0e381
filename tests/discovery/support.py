"""What the tests of discovery share: keys, and two ends of following without a network between them."""

from __future__ import annotations

import itertools
from random import Random

from kvmesh.discovery.actions import Action, Answered, Ask, Wake
from kvmesh.discovery.following import Follower
from kvmesh.discovery.journal import Journal
from kvmesh.discovery.map import ClusterMap, NodeTable
from kvmesh.discovery.membership import HeadTold
from kvmesh.discovery.messages import Answer, decode_answer, decode_request, encode
from kvmesh.discovery.publishing import Hold, Publisher, Question

SPACE = b"s" * 16
OTHER_SPACE = b"t" * 16
SIZE = 4096


def key(number: int, first: int = 0) -> bytes:
    """A key in the bucket `first`."""
    return bytes([first]) + number.to_bytes(31, "big")


class Pair:
    """A journal with its publisher, and a follower with its map. Questions wait in `asks` until somebody answers
    them."""

    def __init__(
        self, *, ring_entries: int = 64, batch_entries: int = 16, page_entries: int = 3, entries_max: int = 10**6
    ):
        self.page_entries = page_entries
        self.ring_entries = ring_entries
        self.now = 100.0
        self.map = ClusterMap(random=Random(0), entries_max=entries_max)
        self.table: NodeTable = self.map.open("a")
        self.follower = Follower(
            "a", "b", self.table, numbers=itertools.count(1), random=lambda: 0.5, batch_entries=batch_entries
        )
        self.asks: list[Ask] = []
        self.wake_at: float | None = None
        self.epoch = 0
        self.restart()

    def restart(self) -> None:
        """The node starts again, empty."""
        self.epoch += 1
        self.journal = Journal("a", self.epoch, ring_entries=self.ring_entries)
        self.publisher = Publisher(self.journal, page_entries=self.page_entries)

    def fill(self, count: int, *, first: int = 0, tier: str = "ram") -> None:
        for number in range(count):
            self.journal.admit(key(number, first), SPACE, SIZE, tier)

    def feed(self, event: object) -> None:
        for action in self.follower.handle(event, self.now):  # type: ignore[arg-type]
            self._perform(action)

    def _perform(self, action: Action) -> None:
        if isinstance(action, Ask):
            self.asks.append(action)
        else:
            assert isinstance(action, Wake)
            self.wake_at = action.at

    def tell_head(self) -> None:
        self.feed(HeadTold("a", self.journal.head))

    def answer_to(self, ask: Ask) -> Answer | None:
        """What the node says now; None when it would hold the question. Both cross the wire."""
        message = decode_request(encode(ask.message))
        assert isinstance(message, Question)
        answer = self.publisher.answer(message, self.now)
        return None if isinstance(answer, Hold) else decode_answer(encode(answer))

    def step(self) -> str | None:
        """Answer the latest question; the kind of answer, or None when it is held."""
        ask = self.asks[-1]
        answer = self.answer_to(ask)
        if answer is None:
            return None
        self.asks.remove(ask)
        self.feed(Answered(ask.tag, answer))
        return type(answer).__name__

    def settle(self) -> list[str]:
        """Answer until the last question is held; the kinds of the answers."""
        kinds: list[str] = []
        while self.asks and (kind := self.step()) is not None:
            kinds.append(kind)
            assert len(kinds) < 1000
        return kinds

    def is_equal(self) -> bool:
        return dict(self.table.holdings.items()) == dict(self.journal.holdings.items())
