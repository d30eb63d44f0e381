"""The counters of one transport while it runs. `TransportStats` is a copy of them for others to look at.

Each thread that counts has a `Counters` of its own, so no increment is lost without a lock; `total` adds them up.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from .interface import TransportStats


@dataclass(slots=True)
class Counters:
    """The same fields as `TransportStats`, where each is explained. Written by one thread, read by any."""

    bytes_read: int = 0
    bytes_served: int = 0
    chunks_read: int = 0
    chunks_served: int = 0
    not_held: int = 0
    corrupt: int = 0
    malformed: int = 0
    refused: int = 0
    peers_lost: int = 0
    expired: int = 0
    bytes_read_shm: int = 0
    bytes_read_nixl: int = 0
    fallbacks: int = 0


def total(parts: Iterable[Counters | TransportStats]) -> TransportStats:
    """The sum of what several threads, or parts of a transport, counted."""
    kept = list(parts)
    return TransportStats(**{name.name: sum(getattr(part, name.name) for part in kept) for name in fields(Counters)})
