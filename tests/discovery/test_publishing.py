"""The answering side of following: reach, pages, and the bound on snapshots."""

from __future__ import annotations

import pytest

from kvmesh.discovery.head import Head
from kvmesh.discovery.journal import Journal
from kvmesh.discovery.messages import (
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
from kvmesh.discovery.packing import HELD, unpack
from kvmesh.discovery.publishing import Hold, Publisher
from kvmesh.transport.errors import ProtocolError
from kvmesh.transport.limits import DESCRIPTION_BYTES_MAX, MESSAGE_BYTES_MAX, SNAPSHOT_IDLE_S, SNAPSHOTS_AT_ONCE_MAX
from tests.discovery.support import SIZE, SPACE, key


def journal(count: int = 0, *, ring_entries: int = 64) -> Journal:
    made = Journal("a", 5, ring_entries=ring_entries)
    for number in range(count):
        made.admit(key(number, first=number % 2), SPACE, SIZE, "ram")
    return made


def test_a_question_of_another_epoch_or_out_of_reach_is_stale() -> None:
    publisher = Publisher(journal(10, ring_entries=4))
    for question in (Follow("b", 4, 10, 1), Follow("b", 6, 10, 1), Compare("b", 4), Describe("b", 4, b"")):
        answer = publisher.answer(question, 0.0)
        assert isinstance(answer, Stale)
        assert Head.from_bytes(answer.head).epoch == 5
    assert isinstance(publisher.answer(Follow("b", 5, 5, 9), 0.0), Stale)
    assert isinstance(publisher.answer(Follow("b", 5, 11, 9), 0.0), Stale)
    assert isinstance(publisher.answer(Buckets("b", 4, b"\0", b""), 0.0), Stale)


def test_entries_come_in_order_up_to_the_limit_and_then_the_question_is_held() -> None:
    publisher = Publisher(journal(10))
    answer = publisher.answer(Follow("b", 5, 3, 4), 0.0)
    assert isinstance(answer, Entries)
    assert answer.first_seq == 4
    assert [answer.packed.keys[at : at + 32] for at in range(0, 128, 32)] == [key(n, first=n % 2) for n in (3, 4, 5, 6)]
    assert publisher.answer(Follow("b", 5, 10, 4), 0.0) is Hold.HOLD
    nothing = publisher.nothing_new()
    assert (nothing.first_seq, nothing.packed.keys) == (11, b"")


def test_pages_go_through_the_buckets_in_the_order_of_the_keys() -> None:
    made = journal(9)
    publisher = Publisher(made, page_entries=2)
    seen: list[bytes] = []
    after = b""
    for _ in range(10):
        page = publisher.answer(Buckets("b", 5, bytes([0, 1, 2]), after), 0.0)
        assert isinstance(page, Page)
        _, _, keys = unpack(page.packed, frozenset({HELD}))
        seen += keys
        after = page.upto
        if not after:
            break
    assert seen == sorted(name for name, _ in made.holdings.items())
    assert publisher.snapshots_served == 1


def test_a_page_that_ends_with_its_bucket_still_says_where() -> None:
    made = journal()
    for first in range(3):
        for number in range(2):
            made.admit(key(number, first), SPACE, SIZE, "ram")
    publisher = Publisher(made, page_entries=2)
    uptos = []
    after = b""
    for _ in range(3):
        page = publisher.answer(Buckets("b", 5, bytes([0, 1, 2]), after), 0.0)
        assert isinstance(page, Page)
        after = page.upto
        uptos.append(after)
    assert uptos == [key(1, 0), key(1, 1), b""]


def test_buckets_must_ascend() -> None:
    with pytest.raises(ProtocolError):
        Publisher(journal()).answer(Buckets("b", 5, b"\1\0", b""), 0.0)


def test_snapshots_at_once_are_bounded_and_a_place_is_free_again_in_time() -> None:
    publisher = Publisher(journal(9), page_entries=2)
    question = bytes([0, 1])
    for number in range(SNAPSHOTS_AT_ONCE_MAX):
        assert isinstance(publisher.answer(Buckets(f"f{number}", 5, question, b""), 0.0), Page)
    assert isinstance(publisher.answer(Buckets("late", 5, question, b""), 1.0), Busy)
    assert isinstance(publisher.answer(Buckets("f0", 5, question, b""), 1.0), Page)
    assert publisher.snapshots_refused == 1
    publisher.answer(Buckets("f1", 5, question, key(8)), 2.0)
    last = publisher.answer(Buckets("f1", 5, question, key(5, first=1)), 2.0)
    assert isinstance(last, Page)
    assert not last.upto
    assert isinstance(publisher.answer(Buckets("late", 5, question, b""), 2.0), Page)
    assert isinstance(publisher.answer(Buckets("later", 5, question, b""), 2.5), Busy)
    assert isinstance(publisher.answer(Buckets("later", 5, question, b""), SNAPSHOT_IDLE_S), Page)


def test_many_long_descriptions_fit_into_messages() -> None:
    made = Journal("a", 5)
    for number in range(1000):
        made.describe(number.to_bytes(16, "big"), bytes(DESCRIPTION_BYTES_MAX))
    publisher = Publisher(made)
    entries = publisher.answer(Follow("b", 5, 0, 8192), 0.0)
    assert isinstance(entries, Entries)
    assert 0 < len(entries.descriptions) < 1000
    assert sum(map(len, entries.descriptions)) < MESSAGE_BYTES_MAX / 2
    count, after = 0, b""
    while True:
        page = publisher.answer(Describe("b", 5, after), 0.0)
        assert isinstance(page, Descriptions)
        count += len(page.texts)
        assert sum(map(len, page.texts)) < MESSAGE_BYTES_MAX / 2
        after = page.upto
        if not after:
            break
    assert count == 1000


def test_fingerprints_are_those_of_the_holdings() -> None:
    made = journal(5)
    answer = Publisher(made).answer(Compare("b", 5), 0.0)
    assert isinstance(answer, Fingerprints)
    assert answer.buckets == made.fingerprints()
    assert not made.holdings.differing(answer.buckets)
