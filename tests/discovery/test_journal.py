"""The journal, and the holdings that it and every copy of it are made of."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvmesh.discovery import TIERS, Journal, Record, node_id
from kvmesh.discovery.holdings import Holdings, Totals
from kvmesh.discovery.packing import ADMIT, DESCRIBE, EVICT, TIER_BITS
from kvmesh.transport.limits import DESCRIPTION_BYTES_MAX, DESCRIPTIONS_MAX
from tests.discovery.support import OTHER_SPACE, SIZE, SPACE, key

CHANGES = st.lists(st.tuples(st.booleans(), st.integers(0, 7), st.integers(0, 1), st.sampled_from(TIERS)), max_size=60)


def test_entries_are_numbered_from_one_and_say_what_changed() -> None:
    journal = Journal("a", 5)
    assert journal.head.seq == 0
    assert journal.admit(key(1), SPACE, SIZE, "ram")
    assert journal.admit(key(1), SPACE, SIZE, "disk")
    assert journal.describe(SPACE, b"{}")
    assert journal.evict(key(1), "ram")
    kinds = [(entry.shape.kind, entry.shape.tiers) for entry in journal.since(0, 10)]
    assert kinds == [(ADMIT, TIER_BITS["ram"]), (ADMIT, TIER_BITS["disk"]), (DESCRIBE, 0), (EVICT, TIER_BITS["ram"])]
    head = journal.head
    assert (head.node_id, head.epoch, head.seq, head.count) == (node_id("a"), 5, 4, 1)


def test_what_changes_nothing_makes_no_entry() -> None:
    journal = Journal("a", 1)
    calls: list[None] = []
    journal.on_change.append(lambda: calls.append(None))
    journal.admit(key(1), SPACE, SIZE, "ram")
    journal.describe(SPACE, b"{}")
    before = journal.head
    assert not journal.admit(key(1), SPACE, SIZE, "ram")
    assert not journal.evict(key(1), "gpu")
    assert not journal.evict(key(2), "ram")
    assert not journal.describe(SPACE, b"{}")
    assert journal.head == before
    assert len(calls) == 2


def test_a_removal_on_one_tier_is_not_a_removal_from_the_node() -> None:
    """Fault 13 of faults.md."""
    journal = Journal("a", 1)
    for tier in TIERS:
        journal.admit(key(1), SPACE, SIZE, tier)
    journal.evict(key(1), "gpu")
    assert journal.holdings.get(key(1)) == Record(SPACE, SIZE, TIER_BITS["ram"] | TIER_BITS["disk"])
    journal.evict(key(1), "ram")
    assert key(1) in journal.holdings
    journal.evict(key(1), "disk")
    assert key(1) not in journal.holdings
    assert (journal.head.count, journal.head.fingerprint) == (0, 0)


def test_the_ring_keeps_the_newest_entries_in_order() -> None:
    journal = Journal("a", 1, ring_entries=4)
    for number in range(10):
        journal.admit(key(number), SPACE, SIZE, "ram")
    assert [journal.reaches(seq) for seq in (5, 6, 10, 11)] == [False, True, True, False]
    assert [entry.key for entry in journal.since(6, 10)] == [key(number) for number in (6, 7, 8, 9)]
    assert [entry.key for entry in journal.since(7, 2)] == [key(number) for number in (7, 8)]
    assert journal.since(10, 5) == []


def test_descriptions_are_bounded_and_may_change() -> None:
    journal = Journal("a", 1)
    assert not journal.describe(SPACE, b"x" * (DESCRIPTION_BYTES_MAX + 1))
    for number in range(DESCRIPTIONS_MAX):
        assert journal.describe(number.to_bytes(16, "big"), b"{}")
    assert not journal.describe(SPACE, b"{}")
    assert journal.describe(bytes(16), b'{"model": "m"}')
    assert journal.descriptions.get(bytes(16)) == b'{"model": "m"}'
    assert len(journal.descriptions) == DESCRIPTIONS_MAX
    assert journal.descriptions.past((DESCRIPTIONS_MAX - 2).to_bytes(16, "big")) == [
        (DESCRIPTIONS_MAX - 1).to_bytes(16, "big")
    ]


@given(CHANGES)
def test_fingerprints_and_totals_depend_on_what_is_held_alone(changes: list[tuple[bool, int, int, str]]) -> None:
    holdings, truth = Holdings(), set[tuple[bytes, str]]()
    for admitted, number, first, tier in changes:
        copy = (key(number, first), tier)
        if admitted:
            assert holdings.admit(copy[0], SPACE, SIZE, TIER_BITS[tier]) == (copy not in truth)
            truth.add(copy)
        else:
            assert holdings.evict(copy[0], TIER_BITS[tier]) == (copy in truth)
            truth.discard(copy)
    fresh = Holdings()
    for name, tier in sorted(truth, reverse=True):
        fresh.admit(name, SPACE, SIZE, TIER_BITS[tier])
    assert holdings.fingerprint == fresh.fingerprint
    assert holdings.fingerprints() == fresh.fingerprints()
    assert dict(holdings.items()) == dict(fresh.items())
    assert holdings.tally() == fresh.tally()
    assert holdings.count == len(truth)
    assert len(holdings) == len({name for name, _ in truth}) == sum(holdings.tally().values())


def test_a_swap_of_tiers_changes_the_fingerprint() -> None:
    one, other = Holdings(), Holdings()
    one.admit(key(1), SPACE, SIZE, 1)
    one.admit(key(2), SPACE, SIZE, 2)
    other.admit(key(1), SPACE, SIZE, 2)
    other.admit(key(2), SPACE, SIZE, 1)
    assert one.fingerprint != other.fingerprint
    assert list(one.differing(other.fingerprints())) == [0]


def test_equal_records_are_one_object() -> None:
    holdings = Holdings()
    for number in range(3):
        holdings.admit(key(number), SPACE, SIZE, 2)
    assert len({id(record) for _, record in holdings.items()}) == 1


def test_totals_count_a_chunk_once_and_on_each_tier() -> None:
    totals = Totals()
    totals.add(Record(SPACE, 10, TIER_BITS["ram"] | TIER_BITS["disk"]), 3)
    totals.add(Record(OTHER_SPACE, 1, TIER_BITS["ram"]), 2)
    assert (totals.chunks, totals.size_bytes) == (5, 32)
    assert totals.tiers == {"ram": (5, 32), "disk": (3, 30)}
