"""The free-space map: against a naive model, under any sequence of allocations and frees."""

from hypothesis import given
from hypothesis import strategies as st

from kvmesh.extents import Extents, aligned, largest_gap

PAGE = 4096


def test_best_fit_takes_the_smallest_hole_that_fits() -> None:
    extents = Extents(10 * PAGE)
    offsets = [extents.allocate(size * PAGE) for size in (1, 3, 1, 2, 1)]
    assert offsets == [0, PAGE, 4 * PAGE, 5 * PAGE, 7 * PAGE]
    extents.free(PAGE)  # a hole of three pages
    extents.free(5 * PAGE)  # and one of two, beside the two at the end
    assert extents.allocate(2 * PAGE) == 5 * PAGE


def test_sizes_are_rounded_up_to_pages() -> None:
    extents = Extents(2 * PAGE + 100)
    assert extents.capacity_bytes == 2 * PAGE
    assert extents.allocate(1) == 0
    assert extents.allocate(PAGE + 1) is None
    assert extents.allocate(PAGE) == PAGE
    assert extents.free_bytes == 0


def test_neighbours_merge_so_that_a_large_extent_fits_again() -> None:
    extents = Extents(4 * PAGE)
    for _ in range(4):
        extents.allocate(PAGE)
    for offset in (0, 2 * PAGE, PAGE, 3 * PAGE):
        extents.free(offset)
    assert extents.largest_free_bytes == 4 * PAGE
    assert extents.allocate(4 * PAGE) == 0
    assert extents.largest_free_bytes == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5 * PAGE), st.integers(0, 1 << 30)), max_size=60))
def test_extents_never_overlap_and_nothing_is_lost(steps: list[tuple[bool, int, int]]) -> None:
    extents = Extents(16 * PAGE)
    used: dict[int, int] = {}
    for give, size, pick in steps:
        if give or not used:
            offset = extents.allocate(size)
            gap = largest_gap(extents.capacity_bytes, list(used.items()))
            assert (offset is not None) == (gap >= aligned(size))
            assert extents.largest_free_bytes == (gap if offset is None else extents.largest_free_bytes)
            if offset is not None:
                assert all(offset + aligned(size) <= at or at + s <= offset for at, s in used.items())
                used[offset] = aligned(size)
        else:
            offset = sorted(used)[pick % len(used)]
            extents.free(offset)
            del used[offset]
        assert extents.free_bytes == extents.capacity_bytes - sum(used.values())
    for offset in used:
        extents.free(offset)
    assert extents.largest_free_bytes == extents.capacity_bytes


def test_the_largest_gap_lies_between_before_or_after_what_is_taken() -> None:
    assert largest_gap(10 * PAGE, []) == 10 * PAGE
    assert largest_gap(10 * PAGE, [(0, 1)]) == 9 * PAGE
    assert largest_gap(10 * PAGE, [(6 * PAGE, PAGE), (2 * PAGE, PAGE)]) == 3 * PAGE
