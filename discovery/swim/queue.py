"""The rumours that this node still passes on: each a limited number of times, the freshest first.

A rumour has a name, and a newer one of the same name replaces it: only the newest word about a node is worth a place in
a packet. What fits into a packet is chosen by fewest transmits, then newest; the limit grows with the mesh's size.
Bounded by `rumours_max`: when it is full, the rumour that was sent most often, and is oldest, goes.
"""

from __future__ import annotations

from typing import NamedTuple

from kvmesh.discovery.wire.messages import Message

_MISFITS_MAX = 8
"""Rumours that did not fit: after so many it is not worth a look at all the others."""


class _Rumour(NamedTuple):
    name: str
    message: Message
    size_bytes: int


class RumourQueue:
    """See above. Sizes are those of a message's encoding."""

    def __init__(self, rumours_max: int) -> None:
        assert rumours_max >= 1
        self.dropped = 0
        """Rumours that went before their time, for want of room."""
        self._max = rumours_max
        self._tiers: list[dict[str, _Rumour]] = []
        """By the number of transmits so far; in each, by name, the newest last."""
        self._tier_of: dict[str, int] = {}
        self._smallest_bytes = 1 << 30
        """Of all rumours so far: with less room than that, there is no point in looking further."""

    def __len__(self) -> int:
        return len(self._tier_of)

    def put(self, name: str, message: Message, size_bytes: int) -> None:
        """A new rumour. It takes the place of an older one of that name."""
        self.discard(name)
        if len(self._tier_of) >= self._max:
            self._drop_one()
        self._smallest_bytes = min(self._smallest_bytes, size_bytes)
        self._insert(_Rumour(name, message, size_bytes), 0)

    def discard(self, name: str) -> None:
        """Forget the rumour of that name, if there is one."""
        tier = self._tier_of.pop(name, None)
        if tier is not None:
            del self._tiers[tier][name]

    def take(self, budget_bytes: int, overhead_bytes: int, transmit_limit: int) -> tuple[list[Message], int]:
        """Rumours for one packet: together at most `budget_bytes`, each costing `overhead_bytes` beside its own size.
        They count as sent once more; those that reach `transmit_limit` are done. Gives what is left of the budget,
        too."""
        if not self._tier_of:
            return [], budget_bytes
        taken: list[tuple[int, _Rumour]] = []
        least_bytes, misfits = self._smallest_bytes + overhead_bytes, 0
        for number, tier in enumerate(self._tiers):
            if budget_bytes < least_bytes or misfits >= _MISFITS_MAX:
                break
            for rumour in reversed(tier.values()):
                cost = rumour.size_bytes + overhead_bytes
                if cost <= budget_bytes:
                    budget_bytes -= cost
                    taken.append((number, rumour))
                    if budget_bytes < least_bytes:
                        break
                else:
                    misfits += 1
                    if misfits == _MISFITS_MAX:
                        break
        messages = [rumour.message for _, rumour in taken]
        taken.reverse()  # so that the newest is the newest in its next tier, too
        for number, rumour in taken:
            del self._tiers[number][rumour.name]
            if number + 1 < transmit_limit:
                self._insert(rumour, number + 1)
            else:
                del self._tier_of[rumour.name]
        return messages, budget_bytes

    def _insert(self, rumour: _Rumour, tier: int) -> None:
        while len(self._tiers) <= tier:
            self._tiers.append({})
        self._tiers[tier][rumour.name] = rumour
        self._tier_of[rumour.name] = tier

    def _drop_one(self) -> None:
        for tier in reversed(self._tiers):
            if tier:
                self.discard(next(iter(tier)))
                self.dropped += 1
                return
