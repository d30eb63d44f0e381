"""Following: each way from nothing, from a gap or from an error to a table that equals the journal."""

from __future__ import annotations

import msgspec
import pytest

from kvmesh.discovery.actions import Answered, Lost, Ticked
from kvmesh.discovery.following import Mode
from kvmesh.discovery.head import Head, node_id
from kvmesh.discovery.membership import HeadTold
from kvmesh.discovery.messages import (
    Answer,
    Buckets,
    Busy,
    Compare,
    Descriptions,
    Done,
    Entries,
    Fingerprints,
    Follow,
    Page,
    Stale,
)
from kvmesh.discovery.packing import ADMIT, DESCRIBE, HELD, NOTHING, Shape, pack
from kvmesh.transport.limits import FOLLOW_BEHIND_S, FOLLOW_RETRY_S_MAX, FOLLOW_TIMEOUT_S, FOLLOW_WAIT_S
from tests.discovery.support import OTHER_SPACE, SIZE, SPACE, Pair, key


def following(count: int = 5, **bounds: int) -> Pair:
    """A pair that is up to date with so many chunks."""
    pair = Pair(**bounds)
    pair.fill(count)
    pair.tell_head()
    pair.settle()
    assert pair.is_equal()
    return pair


def test_a_young_journal_is_read_from_its_first_entry() -> None:
    pair = Pair()
    pair.fill(5)
    pair.tell_head()
    assert pair.settle() == ["Entries"]
    assert pair.is_equal()
    assert pair.table.synced
    assert pair.map.entries == 5
    assert isinstance(pair.asks[-1].message, Follow)


def test_an_older_journal_is_read_from_a_snapshot_of_many_pages() -> None:
    pair = Pair(ring_entries=4)
    pair.fill(7)
    pair.fill(4, first=200)
    pair.journal.describe(SPACE, b"{}")
    for number in range(5):
        pair.journal.evict(key(number), "ram")
    pair.tell_head()
    assert pair.settle() == ["Fingerprints", "Descriptions", "Page", "Page"]
    assert pair.is_equal()
    assert pair.table.synced
    assert pair.table.descriptions.get(SPACE) == b"{}"
    assert pair.publisher.snapshots_served == 1


def test_only_one_question_is_under_way() -> None:
    pair = Pair()
    pair.tell_head()
    pair.tell_head()
    pair.feed(Ticked())
    assert len(pair.asks) == 1


def test_entries_flow_while_the_node_changes() -> None:
    pair = following(2)
    pair.journal.admit(key(7), SPACE, SIZE, "gpu")
    pair.journal.evict(key(0), "ram")
    pair.journal.describe(OTHER_SPACE, b"[]")
    assert pair.settle() == ["Entries"]
    assert pair.is_equal()
    assert pair.table.descriptions.get(OTHER_SPACE) == b"[]"


def test_a_gap_beyond_the_ring_refetches_only_what_differs() -> None:
    pair = following(5, ring_entries=8, batch_entries=8)
    pair.fill(5, first=9)
    pair.settle()
    for number in range(5, 25):
        pair.journal.admit(key(number), SPACE, SIZE, "ram")
    chunks_before = pair.follower.counters.snapshot_chunks
    kinds = pair.settle()
    assert kinds[:2] == ["Stale", "Fingerprints"]
    assert pair.is_equal()
    assert pair.follower.counters.snapshot_chunks - chunks_before == 25  # bucket 0 alone


def test_an_entry_that_its_page_has_already_brings_nothing_back() -> None:
    """A chunk admitted and evicted while the snapshot is read must not show up when the entries are read again."""
    pair = Pair(page_entries=1, ring_entries=6)
    pair.fill(8)
    pair.tell_head()
    assert pair.step() == "Stale"
    assert pair.step() == "Fingerprints"
    assert pair.step() == "Page"
    pair.journal.admit(key(500), SPACE, SIZE, "ram")
    pair.journal.evict(key(500), "ram")
    pair.journal.admit(key(0), SPACE, SIZE, "disk")
    while pair.follower.mode is Mode.FETCH:
        assert pair.step() == "Page"
    answer = pair.answer_to(pair.asks[-1])
    assert isinstance(answer, Entries)
    assert len(answer.packed.keys) == 3 * 32
    assert not pair.follower._snapshot or pair.follower._snapshot.knows(key(500), 9)
    assert not pair.follower._snapshot or not pair.follower._snapshot.knows(key(0), 11)
    pair.settle()
    assert pair.is_equal()


def test_another_fingerprint_at_equal_seq_is_repaired_bucket_by_bucket() -> None:
    pair = following(4)
    pair.table.discard(key(2))  # as if a bit had flipped
    pair.table.admit(key(9, first=3), SPACE, SIZE, 1)
    pair.journal.admit(key(8), SPACE, SIZE, "ram")
    assert pair.settle() == ["Entries", "Fingerprints", "Page", "Page"]
    assert pair.is_equal()
    assert pair.follower.counters.mismatches == 1


def test_a_journal_that_never_adds_up_is_compared_ever_more_rarely() -> None:
    pair = following(4)
    waits = []
    for number in range(12):
        head = Head(node_id("a"), 1, pair.journal.head.seq, 4, number + 1)  # no such fingerprint
        ask = pair.asks.pop()
        match ask.message:
            case Follow():
                pair.feed(Answered(ask.tag, Entries(head.to_bytes(), head.seq + 1, NOTHING, [])))
            case Compare():
                pair.feed(Answered(ask.tag, Fingerprints(head.to_bytes(), pair.journal.fingerprints(), 0)))
        if not pair.asks:
            assert pair.wake_at is not None
            waits.append(round(pair.wake_at - pair.now, 6))
            pair.now = pair.wake_at
            pair.feed(Ticked())
    assert waits == sorted(waits)
    assert waits[-1] > 10 * waits[0]


def test_a_new_epoch_drops_the_old_entries_at_once() -> None:
    """Fault 9 of the first list: old blocks survive a restart as ghosts."""
    pair = following(5)
    pair.restart()
    pair.tell_head()
    assert len(pair.table.holdings) == pair.map.entries == 0
    assert pair.table.epoch == 2
    pair.journal.admit(key(1), OTHER_SPACE, SIZE, "ram")
    pair.settle()
    assert pair.is_equal()


def test_an_answer_of_the_old_epoch_is_ignored() -> None:
    """Fault 10: old packets in flight."""
    pair = following(5)
    old_ask, old = pair.asks[-1], pair.journal
    old.admit(key(77), SPACE, SIZE, "ram")
    late = pair.answer_to(old_ask)
    assert late is not None
    pair.restart()
    pair.tell_head()
    pair.feed(Answered(old_ask.tag, late))
    pair.feed(HeadTold("a", old.head))
    assert len(pair.table.holdings) == 0
    # The old process answers the new question too.
    ask = pair.asks[-1]
    pair.feed(Answered(ask.tag, Entries(old.head.to_bytes(), 1, NOTHING, [])))
    assert pair.table.epoch == 2
    assert pair.follower.counters.late == 3
    assert pair.wake_at is not None
    pair.now = pair.wake_at
    pair.feed(Ticked())
    pair.settle()
    assert pair.is_equal()


def test_a_new_epoch_is_noticed_in_an_answer_too() -> None:
    pair = following(5)
    pair.restart()
    pair.fill(2, first=4)
    assert pair.settle() == ["Stale", "Entries"]
    assert pair.is_equal()


def test_a_lost_question_is_asked_again_later_and_later() -> None:
    pair = following()
    waits = []
    for _ in range(10):
        ask = pair.asks.pop()
        pair.feed(Lost(ask.tag))
        assert not pair.asks
        assert pair.wake_at is not None
        waits.append(pair.wake_at - pair.now)
        pair.now = pair.wake_at - 0.001
        pair.feed(Ticked())
        assert not pair.asks
        pair.now = pair.wake_at
        pair.feed(Ticked())
    assert waits == sorted(waits)
    assert waits[-1] == FOLLOW_RETRY_S_MAX
    pair.feed(Lost(ask.tag))  # of a question that is long over
    assert len(pair.asks) == 1


def test_a_head_that_is_ahead_ends_a_wait() -> None:
    pair = following()
    pair.feed(Lost(pair.asks.pop().tag))
    pair.tell_head()
    assert not pair.asks  # nothing new, nothing wrong
    pair.journal.admit(key(9), SPACE, SIZE, "ram")
    pair.tell_head()
    assert pair.settle() == ["Entries"]
    assert pair.is_equal()


def test_a_question_that_a_head_shows_to_be_lost_is_asked_again() -> None:
    pair = following()
    lost = pair.asks[-1]
    pair.journal.admit(key(9), SPACE, SIZE, "ram")
    pair.tell_head()
    pair.now += FOLLOW_BEHIND_S - 0.01
    pair.tell_head()
    assert pair.asks == [lost]
    pair.now += 0.01
    pair.tell_head()
    assert pair.asks[-1].tag != lost.tag
    assert pair.settle() == ["Entries"]
    pair.feed(Answered(lost.tag, Entries(pair.journal.head.to_bytes(), 6, NOTHING, [])))
    assert pair.is_equal()
    assert pair.follower.counters.late == 1


def test_a_slow_node_is_given_the_whole_time_in_the_end() -> None:
    pair = following()
    pair.journal.admit(key(9), SPACE, SIZE, "ram")
    patience = []
    for _ in range(8):
        begin, count = pair.now, len(pair.asks)
        while len(pair.asks) == count:
            pair.tell_head()
            pair.now += 0.05
        patience.append(pair.now - begin)
    assert patience[-1] == pytest.approx(FOLLOW_TIMEOUT_S, abs=0.2)


def test_a_busy_node_is_left_alone_for_the_time_it_asks_for() -> None:
    pair = Pair(ring_entries=2)
    pair.fill(20)
    pair.tell_head()
    assert pair.step() == "Fingerprints"
    ask = pair.asks.pop()
    assert isinstance(ask.message, Buckets)
    pair.feed(Answered(ask.tag, Busy(pair.journal.head.to_bytes(), 500)))
    pair.tell_head()
    assert not pair.asks
    assert pair.wake_at == pair.now + 0.5
    pair.now = pair.wake_at
    pair.feed(Ticked())
    pair.settle()
    assert pair.is_equal()


def test_a_node_that_holds_no_question_is_asked_at_intervals() -> None:
    pair = following()
    nothing = pair.publisher.nothing_new()
    pair.feed(Answered(pair.asks.pop().tag, nothing))
    assert not pair.asks
    assert pair.wake_at == pair.now + FOLLOW_WAIT_S
    pair.now = pair.wake_at
    pair.feed(Ticked())
    pair.now += FOLLOW_WAIT_S  # held as long as it should be: ask again at once
    pair.feed(Answered(pair.asks.pop().tag, nothing))
    assert len(pair.asks) == 1


def head_bytes(seq: int = 100, *, name: str = "a", epoch: int = 1) -> bytes:
    return Head(node_id(name), epoch, seq, 0, 0).to_bytes()


ADMIT_ONE = pack([(Shape(ADMIT, 2, SPACE, SIZE), key(1))])
DESCRIBE_ONE = pack([(Shape(DESCRIBE, 0, SPACE, 0), bytes(32))])


@pytest.mark.parametrize(
    "answer",
    [
        Done(),
        Page(head_bytes(), b"", NOTHING),
        Fingerprints(head_bytes(), bytes(2048), 0),
        Entries(head_bytes(), 7, ADMIT_ONE, []),  # 6 was asked for
        Entries(head_bytes(5), 6, ADMIT_ONE, []),  # an entry past the head
        Entries(head_bytes(), 6, DESCRIBE_ONE, []),
        Entries(head_bytes(), 6, ADMIT_ONE, [b"{}"]),
        Entries(head_bytes(), 6, msgspec.structs.replace(ADMIT_ONE, index=b"\xff\xff"), []),
        Entries(head_bytes(name="c"), 6, ADMIT_ONE, []),  # another node lives there now
    ],
    ids=repr,
)
def test_an_answer_that_makes_no_sense_is_counted_and_changes_nothing(answer: Answer) -> None:
    pair = following(5)
    pair.feed(Answered(pair.asks.pop().tag, answer))
    assert pair.follower.counters.malformed == 1
    assert pair.is_equal()
    pair.journal.admit(key(9), SPACE, SIZE, "ram")
    pair.tell_head()
    assert not pair.asks  # a head does not hasten it
    assert pair.wake_at is not None
    pair.now = pair.wake_at
    pair.feed(Ticked())
    pair.settle()
    assert pair.is_equal()


def held(*keys: bytes) -> msgspec.Struct:
    return pack([(Shape(HELD, 2, SPACE, SIZE), name) for name in keys])


@pytest.mark.parametrize(
    ("upto", "keys", "seq"),
    [
        (b"", (key(2), key(1)), 100),
        (b"", (key(1), key(1)), 100),
        (b"", (key(1, first=9),), 100),
        (key(3), (key(1),), 100),
        (key(1), (), 100),
        (b"", (key(1),), 2),  # older than the comparison
    ],
)
def test_a_page_that_makes_no_sense_is_counted(upto: bytes, keys: tuple[bytes, ...], seq: int) -> None:
    pair = Pair(ring_entries=2)
    pair.fill(20)
    pair.tell_head()
    assert pair.step() == "Fingerprints"
    packed = held(*keys)
    pair.feed(Answered(pair.asks.pop().tag, Page(head_bytes(seq), upto, packed)))  # type: ignore[arg-type]
    assert pair.follower.counters.malformed == 1
    assert len(pair.table.holdings) == 0


@pytest.mark.parametrize(
    ("upto", "ids", "texts"),
    [(b"", SPACE, []), (SPACE, OTHER_SPACE, [b""]), (b"", OTHER_SPACE + SPACE, [b"", b""]), (b"", b"short", [b""])],
)
def test_descriptions_that_make_no_sense_are_counted(upto: bytes, ids: bytes, texts: list[bytes]) -> None:
    pair = Pair(ring_entries=2)
    pair.fill(20)
    pair.journal.describe(SPACE, b"{}")
    pair.tell_head()
    assert pair.step() == "Fingerprints"
    pair.feed(Answered(pair.asks.pop().tag, Descriptions(head_bytes(), upto, ids, texts)))
    assert pair.follower.counters.malformed == 1
    assert len(pair.table.descriptions) == 0


def test_stale_answers_without_end_do_not_make_a_busy_loop() -> None:
    pair = following()
    for _ in range(3):
        ask = pair.asks.pop()
        if isinstance(ask.message, Follow):
            pair.feed(Answered(ask.tag, Stale(pair.journal.head.to_bytes())))
        else:
            pair.feed(Answered(ask.tag, Stale(pair.journal.head.to_bytes())))
            break
    assert not pair.asks
    assert pair.follower.counters.malformed == 1


def test_a_head_of_another_node_or_of_no_epoch_is_ignored() -> None:
    pair = Pair()
    pair.feed(HeadTold("a", Head(node_id("c"), 9, 0, 0, 0)))
    pair.feed(HeadTold("a", Head(node_id("a"), 0, 0, 0, 0)))
    assert not pair.asks
    assert pair.follower.mode is Mode.IDLE


def test_a_full_map_is_filled_up_when_there_is_room() -> None:
    pair = Pair(entries_max=6)
    other = pair.map.open("other")
    for number in range(4):
        other.admit(key(number, first=1), SPACE, SIZE, 2)
    pair.fill(4)
    pair.tell_head()
    pair.settle()
    assert (len(pair.table.holdings), pair.table.refused, pair.map.complete) == (2, 2, False)
    assert pair.follower.counters.mismatches == 0
    pair.map.drop("other")
    pair.journal.admit(key(9), SPACE, SIZE, "disk")
    pair.settle()
    assert pair.is_equal()
    assert pair.table.refused == 0
    assert pair.map.complete
