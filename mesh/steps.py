"""What goes into a read plan and what comes out of it: holders, events, actions, and how a chunk can end.

Every one is small and frozen; reads and chunks are numbers, the chunks' their places in the chain. What they do is told
in `kvmesh.plan`.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import msgspec


class Fate(enum.StrEnum):
    """How a chunk on its way ended, or why there was none. The words are what a hit gives as its reason."""

    LANDED = "complete"
    MISS = "miss"
    """No node that could be asked has it."""
    DEADLINE = "deadline"
    FULL = "arena full"
    """No room to receive it: the arena is full of leased, pinned or reserved chunks."""
    PRICE = "computing is faster"
    """By the rates that were measured, fetching it would take longer than computing it, or than the deadline."""


class Holder(msgspec.Struct, frozen=True):
    """Someone to read from."""

    spans: tuple[range, ...]
    """The chunks that it has, as places in the chain."""
    bytes_per_s: float | None
    rtt_s: float


# --- events ----------------------------------------------------------------------------------------------------------
class Begin(msgspec.Struct, frozen=True):
    """The first event, once."""


class Landed(msgspec.Struct, frozen=True):
    """A read brought chunks."""

    read: int
    chunks: Sequence[int]


class Missed(msgspec.Struct, frozen=True):
    """A read will not bring a chunk: not held, wrong bytes, wrong size."""

    read: int
    chunk: int


class Held(msgspec.Struct, frozen=True):
    """A chunk that a read was to bring is in the store already."""

    read: int
    chunk: int


class NoRoom(msgspec.Struct, frozen=True):
    """There are no extents for these chunks of a read: it does not ask for them."""

    read: int
    chunks: tuple[int, ...]


class Ended(msgspec.Struct, frozen=True):
    """A read has nothing more to bring, whatever it still owes."""

    read: int


class Tick(msgspec.Struct, frozen=True):
    """It is the time that `Wake` named, or later."""


Event = Begin | Landed | Missed | Held | NoRoom | Ended | Tick


# --- actions ---------------------------------------------------------------------------------------------------------
class Start(msgspec.Struct, frozen=True):
    """Read these chunks, in this order, from a holder (a place in the list of holders), into extents of their own."""

    read: int
    holder: int
    chunks: tuple[int, ...]
    hedge: bool = False


class Commit(msgspec.Struct, frozen=True):
    """What the read brought as these chunks is what counts."""

    read: int
    chunks: Sequence[int]


class Cancel(msgspec.Struct, frozen=True):
    """Nothing is wanted of the read any more. `late`: it did not deliver in time."""

    read: int
    late: bool


class Lose(msgspec.Struct, frozen=True):
    """These chunks do not come."""

    chunks: tuple[int, ...]
    fate: Fate


class Wake(msgspec.Struct, frozen=True):
    """Send a `Tick` at this time; it replaces the one before."""

    at: float


class Finish(msgspec.Struct, frozen=True):
    """The last action: every chunk is done or lost."""


Action = Start | Commit | Cancel | Lose | Wake | Finish
