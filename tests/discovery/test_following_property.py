"""Whatever happens on the way, once the network is calm the table equals the journal: nothing missing, no phantom."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvmesh.discovery import TIERS
from kvmesh.discovery.actions import Answered, Ask, Lost, Ticked
from kvmesh.discovery.membership import HeadTold
from kvmesh.discovery.messages import Answer
from kvmesh.transport.limits import FOLLOW_WAIT_S
from tests.discovery.support import SIZE, SPACE, Pair, key

KEYS = [key(number, first=number % 2) for number in range(10)]

STEPS = st.one_of(
    st.tuples(st.just("admit"), st.integers(0, 9), st.sampled_from(TIERS)),
    st.tuples(st.just("evict"), st.integers(0, 9), st.sampled_from(TIERS)),
    st.tuples(st.just("describe"), st.integers(0, 3), st.just("")),
    st.tuples(st.just("burst"), st.integers(1, 8), st.just("")),  # overflows the ring
    st.tuples(st.sampled_from(["ask arrives", "ask arrives again"]), st.integers(0, 5), st.just("")),
    st.tuples(st.sampled_from(["answer arrives", "answer arrives again"]), st.integers(0, 5), st.just("")),
    st.tuples(st.just("ask is lost"), st.integers(0, 5), st.just("")),
    st.tuples(st.just("time passes"), st.integers(1, 40), st.just("")),
    st.tuples(st.just("head"), st.integers(0, 5), st.just("")),
    st.tuples(st.just("restart"), st.just(0), st.just("")),
)


class Wire:
    """A pair with everything that is still under way, so that it can be lost, doubled and late."""

    def __init__(self) -> None:
        self.pair = Pair(ring_entries=6, batch_entries=4, page_entries=2)
        self.answers: list[tuple[Ask, Answer]] = []
        self.heads = [self.pair.journal.head]

    def step(self, what: str, number: int, tier: str) -> None:
        pair, journal = self.pair, self.pair.journal
        match what:
            case "admit":
                journal.admit(KEYS[number], SPACE, SIZE, tier)
            case "evict":
                journal.evict(KEYS[number], tier)
            case "describe":
                journal.describe(bytes([number]) * 16, bytes([number, journal.head.seq % 256]))
            case "burst":
                for at in range(number):
                    journal.admit(KEYS[at], SPACE, SIZE, "gpu")
                    journal.evict(KEYS[at], "gpu")
            case "ask arrives" | "ask arrives again" if pair.asks:
                ask = pair.asks[number % len(pair.asks)]
                answer = pair.answer_to(ask)
                if answer is not None:
                    self.answers.append((ask, answer))
                    if what == "ask arrives":
                        pair.asks.remove(ask)
            case "answer arrives" | "answer arrives again" if self.answers:
                place = number % len(self.answers)
                ask, answer = self.answers[place]
                if what == "answer arrives":
                    del self.answers[place]
                pair.feed(Answered(ask.tag, answer))
            case "ask is lost" if pair.asks:
                pair.feed(Lost(pair.asks[number % len(pair.asks)].tag))
            case "time passes":
                pair.now += number / 10
                pair.feed(Ticked())
            case "head":
                pair.feed(HeadTold("a", self.heads[-1 - number % len(self.heads)]))
            case "restart":
                pair.restart()
        self.heads.append(self.pair.journal.head)

    def calm(self) -> None:
        """Late answers come in, every question gets its answer, heads are told: for two minutes at most."""
        for ask, answer in self.answers:
            self.pair.feed(Answered(ask.tag, answer))
        for ask in self.pair.asks[:-1]:
            self.pair.feed(Lost(ask.tag))
        del self.pair.asks[:-1]
        for _ in range(100):
            self.pair.settle()
            head, table = self.pair.journal.head, self.pair.table
            if self.pair.is_equal() and table.synced and (table.epoch, table.seq) == (head.epoch, head.seq):
                return
            self.pair.now += FOLLOW_WAIT_S
            if self.pair.asks:  # held as long as a node holds a question
                self.pair.feed(Answered(self.pair.asks.pop().tag, self.pair.publisher.nothing_new()))
            self.pair.feed(Ticked())
            self.pair.tell_head()


@given(st.lists(STEPS, max_size=80))
def test_the_table_equals_the_journal_once_all_is_calm(steps: list[tuple[str, int, str]]) -> None:
    wire = Wire()
    for step in steps:
        wire.step(*step)
        table = wire.pair.table
        assert table.epoch <= wire.pair.epoch
        assert wire.pair.map.entries == len(table.holdings)
    wire.calm()
    pair = wire.pair
    head, table = pair.journal.head, pair.table
    assert pair.is_equal()
    assert (table.epoch, table.holdings.count, table.holdings.fingerprint) == (head.epoch, head.count, head.fingerprint)
    assert table.seq == head.seq
    assert table.synced
    assert table.descriptions.fingerprint == pair.journal.descriptions.fingerprint
    assert pair.follower.counters.malformed == 0
