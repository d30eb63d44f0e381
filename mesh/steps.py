"""What goes into a read plan and what comes out of it: holders, events, actions, and how a chunk can end.

Every one is small and frozen; reads and chunks are numbers, the chunks' their places in the chain. What they do is told
in `kvmesh.plan`.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass


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


@dataclass(frozen=True, slots=True)
class Holder:
    """Someone to read from."""

    spans: tuple[range, ...]
    """The chunks that it has, as places in the chain."""
    bytes_per_s: float | None
    rtt_s: float


# --- events ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Begin:
    """The first event, once."""


@dataclass(frozen=True, slots=True)
class Landed:
    """A read brought chunks."""

    read: int
    chunks: Sequence[int]


@dataclass(frozen=True, slots=True)
class Missed:
    """A read will not bring a chunk: not held, wrong bytes, wrong size."""

    read: int
    chunk: int


@dataclass(frozen=True, slots=True)
class Held:
    """A chunk that a read was to bring is in the store already."""

    read: int
    chunk: int


@dataclass(frozen=True, slots=True)
class NoRoom:
    """There are no extents for these chunks of a read: it does not ask for them."""

    read: int
    chunks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ended:
    """A read has nothing more to bring, whatever it still owes."""

    read: int


@dataclass(frozen=True, slots=True)
class Tick:
    """It is the time that `Wake` named, or later."""


Event = Begin | Landed | Missed | Held | NoRoom | Ended | Tick


# --- actions ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Start:
    """Read these chunks, in this order, from a holder (a place in the list of holders), into extents of their own."""

    read: int
    holder: int
    chunks: tuple[int, ...]
    hedge: bool = False


@dataclass(frozen=True, slots=True)
class Commit:
    """What the read brought as these chunks is what counts."""

    read: int
    chunks: Sequence[int]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nothing is wanted of the read any more. `late`: it did not deliver in time."""

    read: int
    late: bool


@dataclass(frozen=True, slots=True)
class Lose:
    """These chunks do not come."""

    chunks: tuple[int, ...]
    fate: Fate


@dataclass(frozen=True, slots=True)
class Wake:
    """Send a `Tick` at this time; it replaces the one before."""

    at: float


@dataclass(frozen=True, slots=True)
class Finish:
    """The last action: every chunk is done or lost."""


Action = Start | Commit | Cancel | Lose | Wake | Finish
