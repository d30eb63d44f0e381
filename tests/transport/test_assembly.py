"""Pieces become chunks, and a peer's lies become errors that write nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.transport.assembly import Assembly
from kvmesh.transport.checksum import checksum
from kvmesh.transport.frames import HELD, NOT_HELD, WRONG_SIZE, FrameError, Item
from kvmesh.transport.interface import Landing, Outcome
from tests.transport.ends import pattern, wants

CONTENT = pattern(1, 100)
SUM = checksum(CONTENT)


def piece(index: int, start: int, end: int, sum_: int = SUM) -> tuple[list[Item], memoryview]:
    return [Item(index, HELD, sum_, start, end - start)], memoryview(CONTENT)[start:end]


def test_pieces_of_two_chunks_in_turn() -> None:
    wanted = wants([0, 1], 100)
    assembly = Assembly(wanted)
    assert assembly.accept(*piece(0, 0, 30)) == []
    assert assembly.accept(*piece(1, 0, 99)) == []
    assert assembly.accept(*piece(0, 30, 100)) == [Landing(0, Outcome.LANDED, SUM)]
    assert assembly.accept(*piece(1, 99, 100)) == [Landing(1, Outcome.LANDED, SUM)]
    assert assembly.complete
    assert wanted[0].into == wanted[1].into == CONTENT


def test_several_items_in_one_message() -> None:
    wanted = wants([0, 1, 2, 3], [100, 4, 100, 5])
    items = [
        Item(2, HELD, SUM, 0, 100),
        Item(1, NOT_HELD, 0, 0, 0),
        Item(0, HELD, SUM ^ 1, 0, 100),
        Item(3, WRONG_SIZE, 9, 0, 0),
    ]
    assembly = Assembly(wanted)
    assert assembly.accept(items, memoryview(CONTENT * 2)) == [
        Landing(2, Outcome.LANDED, SUM),
        Landing(1, Outcome.NOT_HELD, 0),
        Landing(0, Outcome.CORRUPT, SUM ^ 1),
        Landing(3, Outcome.WRONG_SIZE, 9),
    ]
    assert assembly.complete


@pytest.mark.parametrize(
    "lie",
    [
        piece(5, 0, 10),  # not wanted
        piece(0, 50, 60),  # a gap
        piece(0, 30, 60),  # again
        piece(0, 0, 40),  # from the start
        piece(0, 40, 50, sum_=1),  # another chunk's
        ([Item(0, HELD, SUM, 40, 0)], memoryview(b"")),  # no bytes
        ([Item(0, HELD, SUM, 40, 61)], memoryview(bytes(61))),  # beyond the end
        ([Item(0, NOT_HELD, 0, 0, 0)], memoryview(b"")),  # after all, not held
        ([Item(1, NOT_HELD, 0, 0, 5)], memoryview(bytes(5))),  # not held, with bytes
        ([Item(1, HELD, SUM, 5, 5)], memoryview(bytes(5))),  # not from the start
    ],
)
def test_a_lie_writes_nothing(lie: tuple[list[Item], memoryview]) -> None:
    wanted = wants([0, 1], 100)
    assembly = Assembly(wanted)
    assembly.accept(*piece(0, 0, 40))
    before = [bytes(want.into) for want in wanted]
    with pytest.raises(FrameError):
        assembly.accept(*lie)
    assert [bytes(want.into) for want in wanted] == before


def test_a_chunk_that_has_ended_is_not_written_again() -> None:
    wanted = wants([0], 100)
    assembly = Assembly(wanted)
    assembly.accept([Item(0, HELD, SUM, 0, 100)], memoryview(bytes(100)))
    with pytest.raises(FrameError):
        assembly.accept(*piece(0, 0, 100))
    assert bytes(wanted[0].into) == bytes(100)


@given(st.lists(st.tuples(*[st.integers(0, n) for n in (3, 2, 1, 12, 12)]), min_size=1, max_size=30))
def test_any_items_are_taken_or_refused(drawn: list[tuple[int, int, int, int, int]]) -> None:
    wanted = wants([0, 1, 2], 10)
    assembly = Assembly(wanted)
    ended: set[int] = set()
    for item in (Item(*fields) for fields in drawn):
        try:
            landings = assembly.accept([item], memoryview(bytes(item.bytes)))
        except FrameError:
            continue
        for landing in landings:
            assert landing.index not in ended
            ended.add(landing.index)
    assert assembly.complete == (len(ended) == 3)
