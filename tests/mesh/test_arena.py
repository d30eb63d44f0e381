"""The arena: one memory, mapped twice, that nobody can shrink."""

import os

import pytest

from kvmesh.arena import Arena
from kvmesh.transport.errors import SettingsError

MIB = 1 << 20


def test_two_mappings_see_the_same_bytes() -> None:
    arena = Arena.create(MIB)
    reader = Arena(arena.fileno(), MIB, writable=False)
    view = arena.view(4096, 5)
    view[:] = b"hello"
    seen = reader.view(4096, 5)
    assert bytes(seen) == b"hello"
    with pytest.raises(TypeError, match="read-only"):
        seen[0] = 1
    del view, seen
    reader.close()
    arena.close()


def test_the_memory_cannot_be_taken_from_under_a_mapping() -> None:
    arena = Arena.create(MIB)
    for size in (0, 2 * MIB):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fileno(), size)
    arena.close()


def test_closing_leaves_the_mapping_to_views_that_are_alive() -> None:
    arena = Arena.create(MIB)
    view = arena.view(0, 3)
    view[:] = b"abc"
    arena.close()
    assert bytes(view) == b"abc"


def test_an_arena_that_the_kernel_has_no_room_for_is_a_clear_error() -> None:
    with pytest.raises(SettingsError, match="smaller --memory"):
        Arena.create(1 << 60)
