"""Pieces become chunks, and a peer's lies become errors that write nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.transport.assembly import Assembly
from kvmesh.transport.checksum import bound, checksum
from kvmesh.transport.frames import CORRUPT_HERE, HELD, NOT_HELD, WRONG_SIZE, FrameError, Item
from kvmesh.transport.interface import Landing, Outcome, Slice, Want
from tests.transport.ends import key, pattern, wants

CONTENT = pattern(1, 100)
SUM = checksum(CONTENT)


def piece(index: int, start: int, end: int, sum_: int = SUM, part: Slice | None = None, of: int | None = None) -> Item:
    """Of the chunk ``key(index)``, or of `of`."""
    return Item(index, HELD, bound(sum_, key(index if of is None else of), part), start, end - start)


def fill(assembly: Assembly, content: bytes, at_once: int = 1 << 30) -> list[Landing]:
    """Write `content` where the assembly wants it, so many bytes at once."""
    landings = []
    while content:
        count = min(at_once, len(content))
        targets = assembly.targets(count)
        assert sum(len(target) for target in targets) == count
        for target in targets:
            target[:], content = content[: len(target)], content[len(target) :]
        landings += assembly.filled(count)
    return landings


def accept(assembly: Assembly, item: Item, content: bytes) -> list[Landing]:
    """One item, and its bytes."""
    return assembly.announce([item]) + fill(assembly, content)


def test_pieces_of_two_chunks_in_turn() -> None:
    wanted = wants([0, 1], 100)
    assembly = Assembly(wanted)
    assert accept(assembly, piece(0, 0, 30), CONTENT[:30]) == []
    assert accept(assembly, piece(1, 0, 99), CONTENT[:99]) == []
    assert accept(assembly, piece(0, 30, 100), CONTENT[30:]) == [Landing(0, Outcome.LANDED, SUM)]
    assert accept(assembly, piece(1, 99, 100), CONTENT[99:]) == [Landing(1, Outcome.LANDED, SUM)]
    assert assembly.complete
    assert wanted[0].into == wanted[1].into == CONTENT


@pytest.mark.parametrize("at_once", [1, 7, 99, 100, 101, 1000])
def test_several_items_in_one_message(at_once: int) -> None:
    wanted = wants([0, 1, 2, 3, 4], [100, 4, 100, 5, 6])
    items = [
        piece(2, 0, 100),
        Item(1, NOT_HELD, 0, 0, 0),
        piece(0, 0, 100, SUM ^ 1),
        Item(3, WRONG_SIZE, 9, 0, 0),
        Item(4, CORRUPT_HERE, 8, 0, 0),
    ]
    assembly = Assembly(wanted)
    assert assembly.announce(items) == [
        Landing(1, Outcome.NOT_HELD, 0),
        Landing(3, Outcome.WRONG_SIZE, 9),
        Landing(4, Outcome.CORRUPT, 8),
    ]
    assert assembly.expected == 200
    assert fill(assembly, CONTENT * 2, at_once) == [
        Landing(2, Outcome.LANDED, SUM),
        Landing(0, Outcome.CORRUPT, SUM ^ 1),
    ]
    assert assembly.complete
    assert assembly.expected == 0
    assert wanted[2].into == CONTENT
    assert bytes(wanted[4].into) == b"\xa5" * 6


def test_a_part_of_a_chunk_counts_from_its_own_start() -> None:
    part = Slice(5000, 50, 900, 2)
    wanted = Want(key(0), memoryview(bytearray(100)), part, 1 << 20)
    assembly = Assembly([wanted])
    assert accept(assembly, piece(0, 0, 50, part=part), CONTENT[:50]) == []
    assert accept(assembly, piece(0, 50, 100, part=part), CONTENT[50:]) == [Landing(0, Outcome.LANDED, SUM)]
    assert wanted.into == CONTENT


@pytest.mark.parametrize("part", [None, Slice(5000, 100), Slice(5000, 50, 901, 2)])
def test_sound_bytes_of_another_chunk_or_another_part_are_corrupt(part: Slice | None) -> None:
    """A bit that flips in an index, or in the number of a slice, must not give one chunk the bytes of another."""
    right = Slice(5000, 50, 900, 2)
    into = [memoryview(bytearray(100)) for _ in range(2)]
    assembly = Assembly([Want(key(0), into[0], right, 1 << 20), Want(key(1), into[1], right, 1 << 20)])
    (first,) = accept(assembly, piece(0, 0, 100, part=part), CONTENT)
    (second,) = accept(assembly, piece(1, 0, 100, part=right, of=0), CONTENT)
    assert (first.outcome, second.outcome) == (Outcome.CORRUPT, Outcome.CORRUPT)


def test_targets_end_where_the_items_do() -> None:
    assembly = Assembly(wants([0, 1], 100))
    assembly.announce([piece(0, 0, 40), piece(1, 0, 10)])
    assert [len(target) for target in assembly.targets(30)] == [30]
    assert [len(target) for target in assembly.targets(1000)] == [40, 10]


LIES = [
    piece(5, 0, 10),  # not wanted
    piece(0, 50, 60),  # a gap
    piece(0, 30, 60),  # again
    piece(0, 0, 40),  # from the start
    piece(0, 40, 50, sum_=1),  # another chunk's
    piece(0, 40, 40),  # no bytes
    piece(0, 40, 101),  # beyond the end
    Item(0, NOT_HELD, 0, 0, 0),  # after all, not held
    Item(1, NOT_HELD, 0, 0, 5),  # not held, with bytes
    Item(1, CORRUPT_HERE, 0, 3, 0),  # nor is nothing anywhere
    piece(1, 5, 10),  # not from the start
]


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_writes_nothing(lie: Item) -> None:
    wanted = wants([0, 1], 100)
    assembly = Assembly(wanted)
    accept(assembly, piece(0, 0, 40), CONTENT[:40])
    before = [bytes(want.into) for want in wanted]
    with pytest.raises(FrameError):
        assembly.announce([lie])
    assert assembly.expected == 0
    assert [bytes(want.into) for want in wanted] == before


def test_a_chunk_has_one_piece_in_a_message() -> None:
    assembly = Assembly(wants([0], 100))
    with pytest.raises(FrameError, match="two pieces"):
        assembly.announce([piece(0, 0, 60), piece(0, 60, 100)])


def test_a_chunk_that_has_ended_is_not_written_again() -> None:
    wanted = wants([0], 100)
    assembly = Assembly(wanted)
    accept(assembly, piece(0, 0, 100), bytes(100))
    with pytest.raises(FrameError):
        assembly.announce([piece(0, 0, 100)])
    assert bytes(wanted[0].into) == bytes(100)


@given(st.lists(st.tuples(*[st.integers(0, n) for n in (3, 3, 1, 12, 12)]), min_size=1, max_size=30), st.integers(1, 9))
def test_any_items_are_taken_or_refused(drawn: list[tuple[int, int, int, int, int]], at_once: int) -> None:
    assembly = Assembly(wants([0, 1, 2], 10))
    ended: set[int] = set()
    for item in (Item(*fields) for fields in drawn):
        try:
            landings = assembly.announce([item])
        except FrameError:
            assert assembly.expected == 0
            continue
        for landing in landings + fill(assembly, bytes(item.bytes), at_once):
            assert landing.index not in ended
            ended.add(landing.index)
    assert assembly.complete == (len(ended) == 3)
