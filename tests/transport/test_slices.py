"""Slices of a chunk against numpy's own indexing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.transport.interface import Slice
from kvmesh.transport.limits import KIB, MIB
from kvmesh.transport.slices import as_one_run, piece, piece_bytes, taken
from tests.transport.ends import pattern


@given(st.data())
def test_ranges_of_layers_and_heads_are_what_numpy_takes(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.integers(1, most)) for most in (5, 2, 6, 4, 3))
    chunk = np.frombuffer(pattern(1, int(np.prod(shape))), np.uint8).reshape(shape)
    layer, head = data.draw(st.integers(0, shape[0] - 1)), data.draw(st.integers(0, shape[2] - 1))
    layers = data.draw(st.integers(1, shape[0] - layer))
    heads = data.draw(st.integers(1, shape[2] - head))
    row = shape[3] * shape[4]
    offset = (layer * shape[1] * shape[2] + head) * row
    part = Slice(offset, heads * row, shape[2] * row, layers * shape[1])
    expected = chunk[layer : layer + layers, :, head : head + heads].tobytes()
    assert part.end <= chunk.size
    assert bytes(taken(memoryview(chunk.tobytes()), part)) == expected
    assert (as_one_run(part) is not None) == (heads == shape[2] or part.count == 1)


@st.composite
def slices(draw: st.DrawFn) -> Slice:
    run = draw(st.integers(1, 40))
    return Slice(draw(st.integers(0, 50)), run, run + draw(st.integers(0, 30)), draw(st.integers(1, 30)))


@given(slices(), st.integers(1, 200), st.integers(0, 20))
def test_pieces_of_any_size_make_up_the_slice(part: Slice, most: int, behind: int) -> None:
    chunk = memoryview(pattern(2, part.end + behind))
    runs = np.lib.stride_tricks.as_strided(
        np.frombuffer(chunk, np.uint8)[part.offset_bytes :],
        (part.count, part.run_bytes),
        (part.stride_bytes, 1),
        writeable=False,
    )
    expected = runs.tobytes()
    assert len(expected) == part.bytes
    found, offset = b"", 0
    while offset < part.bytes:
        size = piece_bytes(part, offset, most)
        assert 0 < size <= most
        found += bytes(piece(chunk, part, offset, size))
        offset += size
    assert found == expected == bytes(taken(chunk, part))


def test_what_lies_in_one_run_is_not_copied() -> None:
    chunk = memoryview(bytearray(MIB))
    for part in (Slice(10, 100 * KIB), Slice(10, 100 * KIB, 200 * KIB, 3), Slice(5, KIB, KIB, 100)):
        view = piece(chunk, as_one_run(part) or part, KIB // 2, 20)
        chunk[part.offset_bytes + KIB // 2] = 1
        assert view[0] == 1
        chunk[part.offset_bytes + KIB // 2] = 0


def test_runs_beyond_the_chunk_are_never_read() -> None:
    with pytest.raises(ValueError, match="size of buffer"):
        taken(memoryview(bytearray(100)), Slice(0, 10, 31, 4))
