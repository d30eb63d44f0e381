"""The newest head of each node: which one counts, and when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.discovery.head import HEAD_BYTES, Head, node_id
from kvmesh.discovery.heads import HeadTable, pack_heads, unpack_heads
from kvmesh.transport.errors import ProtocolError


def head(name: str = "b", epoch: int = 5, seq: int = 1) -> Head:
    return Head(node_id(name), epoch, seq, seq * 2, 99)


def knowing(*names: str) -> HeadTable:
    table = HeadTable()
    for name in names:
        table.know(name, 5)
    return table


def test_a_head_counts_only_for_a_node_that_is_known():
    table = knowing("b")
    assert table.take(head("c"), 1.0) is None
    assert table.take(head("b"), 1.0) == "b"
    table.know("c", 5)
    assert table.take(head("c"), 1.0) == "c"
    assert list(table.all()) == [head("b"), head("c")]


@pytest.mark.parametrize(
    ("epoch", "seq", "is_news"),
    [(5, 8, True), (5, 7, False), (5, 6, False), (6, 100, False), (4, 100, False)],
)
def test_of_the_start_that_is_known_only_a_newer_one_is_news(epoch: int, seq: int, is_news: bool):
    table = knowing("b")
    table.take(head(epoch=5, seq=7), 1.0)
    assert table.take(head(epoch=epoch, seq=seq), 2.0) == ("b" if is_news else None)
    newest = head(epoch=epoch, seq=seq) if is_news else head(epoch=5, seq=7)
    assert list(table.all()) == [newest]
    assert table.of("b", newest.epoch) == (newest, 2.0 if is_news else 1.0)


def test_before_the_first_it_is_the_head_of_an_empty_journal():
    table = knowing("b")
    empty = Head(node_id("b"), 5, 0, 0, 0)
    assert table.of("b", 5) == (empty, None)
    assert table.of("nobody", 5) == (Head(node_id("nobody"), 5, 0, 0, 0), None)
    assert table.take(empty, 1.0) == "b", "told, it is news"
    assert table.of("b", 5) == (empty, 1.0)


def test_one_of_another_start_waits_until_that_start_is_known():
    table = knowing("b")
    table.take(head(epoch=6, seq=3), 1.0)
    assert table.of("b", 5) == (Head(node_id("b"), 5, 0, 0, 0), None)
    assert table.of("b", 6) == (head(epoch=6, seq=3), 1.0)
    assert list(table.all()) == [head(epoch=6, seq=3)], "and is told on"


def test_of_starts_that_are_not_known_the_latest_is_kept():
    table = knowing("b")
    told = [(3, 9, True), (4, 2, True), (4, 2, False), (3, 10, False), (7, 1, True), (5, 1, True), (7, 2, False)]
    for epoch, seq, is_news in told:
        assert (table.take(head(epoch=epoch, seq=seq), 1.0) == "b") is is_news, (epoch, seq)


def test_a_restart_with_a_smaller_epoch_is_heard():
    """A clock was set back."""
    table = knowing("b")
    table.take(head(epoch=5, seq=100), 1.0)
    table.know("b", 3)
    assert table.of("b", 3)[1] is None
    assert table.take(head(epoch=3, seq=1), 2.0) == "b"
    assert table.take(head(epoch=5, seq=101), 3.0) is None, "and what others still tell of the old one is not"
    assert table.of("b", 3) == (head(epoch=3, seq=1), 2.0)


def test_of_a_node_that_is_gone_nothing_is_kept():
    table = knowing("b")
    table.take(head(seq=7), 1.0)
    table.forget("b")
    assert list(table.all()) == []
    assert table.take(head(seq=8), 2.0) is None
    table.know("b", 5)
    assert table.of("b", 5)[1] is None
    assert table.take(head(seq=1), 3.0) == "b", "what came before its end means nothing"
    table.forget("nobody")


def rank(one: Head) -> tuple[bool, int, int]:
    return one.epoch == 5, one.epoch, one.seq


@given(st.lists(st.tuples(st.sampled_from("bcd"), st.integers(3, 7), st.integers(0, 4)), max_size=20))
def test_heads_in_any_order_leave_the_newest(told: list[tuple[str, int, int]]):
    table, newest = knowing("b", "c"), dict[str, Head]()
    for name, epoch, seq in told:
        one = head(name, epoch, seq)
        if name != "d" and (name not in newest or rank(one) > rank(newest[name])):
            newest[name] = one
            assert table.take(one, 1.0) == name
        else:
            assert table.take(one, 1.0) is None
    assert sorted(table.all(), key=repr) == sorted(newest.values(), key=repr)


def test_heads_travel_one_after_the_other():
    heads = [head("b"), head("c", 6, 7)]
    assert len(pack_heads(heads)) == 2 * HEAD_BYTES
    assert unpack_heads(pack_heads(heads)) == heads
    assert unpack_heads(b"") == []
    for cut in (1, HEAD_BYTES - 1, HEAD_BYTES + 1, 2 * HEAD_BYTES - 1):
        with pytest.raises(ProtocolError, match=f"{cut} bytes end within one"):
            unpack_heads(pack_heads(heads)[:cut])
