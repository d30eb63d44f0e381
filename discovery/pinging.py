"""Which address is pinged when: the clockwork below `kvmesh.discovery.static`, which says what the answers mean.

    pace      whose address                                             between two pings
    STEADY    a member that is well                                     PING_INTERVAL_S, spread by a tenth
    QUICK     a member that missed a ping, or is suspect                PING_RETRY_S; several may be under way
    SLOW      one that failed; an address of the list without anybody   growing up to FAILED_PING_INTERVAL_S

An address is kept for one of three reasons: it stands in the list (for ever), a member is reached there, or another
member named it (for a few pings). Bounded: addresses by `PEERS_MAX`, pings under way by `PINGS_AT_ONCE_MAX`. Sans-IO.
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from kvmesh.transport.limits import (
    FAILED_PING_INTERVAL_S,
    HEARSAY_PINGS_MAX,
    PEERS_MAX,
    PING_INTERVAL_S,
    PING_RETRY_S,
    PINGS_AT_ONCE_MAX,
)

_UNDER_WAY_PER_ADDRESS_MAX = 4


class Pace(enum.Enum):
    """See the table above."""

    STEADY = "steady"
    QUICK = "quick"
    SLOW = "slow"


@dataclass(slots=True)
class _Target:
    address: str
    listed: bool
    name: str | None = None
    """Who answered there last."""
    watched: bool = False
    """A member is reached there."""
    lost: int = 0
    """Pings in a row without an answer."""
    next_at: float = 0.0
    under_way: set[int] = field(default_factory=set)


class Asked(NamedTuple):
    """A ping that ended."""

    address: str
    sent_at: float
    name: str | None
    """Who answered at that address before."""


class PingSchedule:
    """The addresses, and the pings under way."""

    def __init__(
        self, listed: Sequence[str], own_address: str, pace: Callable[[str | None], Pace], random: Random
    ) -> None:
        self._pace = pace
        self._random = random
        self._targets: dict[str, _Target] = {}
        self._own = {own_address}
        """Addresses that turned out to be this process."""
        self._queue: list[tuple[float, str]] = []
        """(time, address); valid when the time is still the target's."""
        self._under_way: dict[int, tuple[str, float]] = {}
        self._next_number = 0
        for address in listed:
            if address not in self._own:
                self._targets[address] = _Target(address, listed=True)

    def number(self) -> int:
        """A number for a call that no other has."""
        self._next_number += 1
        return self._next_number

    def start(self, now: float) -> None:
        """Forget every ping under way, and ping everyone soon: members spread over half an interval, others at once."""
        self._under_way.clear()
        for target in self._targets.values():
            target.under_way.clear()
            target.lost = 0
            spread_s = self._random.random() * PING_INTERVAL_S / 2 if target.watched else 0.0
            self._put(target, now + spread_s)

    def due(self, now: float) -> Iterator[tuple[int, str]]:
        """The pings to send now: (number, address)."""
        while self._queue and len(self._under_way) < PINGS_AT_ONCE_MAX:
            at, address = self._queue[0]
            target = self._targets.get(address)
            if target is None or target.next_at != at:
                heapq.heappop(self._queue)
                continue
            if at > now:
                return
            heapq.heappop(self._queue)
            self._put(target, now + self._interval_s(target))
            if len(target.under_way) >= _UNDER_WAY_PER_ADDRESS_MAX:
                continue
            number = self.number()
            target.under_way.add(number)
            self._under_way[number] = (address, now)
            yield number, address

    def wake_at(self) -> float:
        """When the next ping is due; never when none can be sent before another ends."""
        if not self._queue or len(self._under_way) >= PINGS_AT_ONCE_MAX:
            return float("inf")
        return self._queue[0][0]

    def answered(self, number: int, now: float) -> Asked | None:
        """A ping was answered; None when it does not count any more."""
        asked = self._end(number)
        if asked is not None and (target := self._targets.get(asked.address)) is not None:
            target.lost = 0
            self._put(target, now + PING_INTERVAL_S * self._random.uniform(0.9, 1.1))
        return asked

    def lost(self, number: int, now: float) -> Asked | None:
        """A ping was not answered; None when it does not count any more."""
        asked = self._end(number)
        if asked is not None and (target := self._targets.get(asked.address)) is not None:
            target.lost += 1
            if not target.listed and not target.watched and target.lost >= HEARSAY_PINGS_MAX:
                del self._targets[asked.address]
            else:
                well = self._pace(target.name if target.watched else None) is Pace.STEADY
                self._put(target, min(target.next_at, now + (PING_RETRY_S if well else self._interval_s(target))))
        return asked

    def belongs(self, address: str, name: str) -> None:
        """`name` answered at `address`."""
        target = self._targets.get(address)
        if target is not None:
            target.name = name

    def settle(self, address: str, now: float) -> None:
        """The answer from `address` was understood. Where no member is reached, there is nothing to ask soon."""
        target = self._targets.get(address)
        if target is not None and not target.watched:
            if target.listed:
                self._put(target, now + FAILED_PING_INTERVAL_S)
            else:
                del self._targets[address]

    def watch(self, address: str, name: str, now: float) -> None:
        """`name` is a member, reached at `address`: ping it soon, and from then on."""
        target = self._targets.get(address)
        if target is None:
            target = self._targets[address] = _Target(address, listed=False)
            self._put(target, now)
        target.name, target.watched = name, True

    def unwatch(self, address: str, name: str) -> None:
        """`name` is not reached at `address` any more."""
        target = self._targets.get(address)
        if target is None or target.name != name:
            return
        target.watched = False
        if not target.listed:
            del self._targets[address]

    def hear_of(self, address: str, now: float) -> bool:
        """Another member named `address`. False when there is no room for it."""
        target = self._targets.get(address)
        if target is None and address not in self._own:
            if len(self._targets) >= 2 * PEERS_MAX:
                return False
            target = self._targets[address] = _Target(address, listed=False)
            self._put(target, now)
        elif target is not None and target.lost:
            # Alive for somebody else: do not wait as long as for one that nobody has seen.
            self._put(target, min(target.next_at, now + PING_INTERVAL_S))
        return True

    def drop_own(self, address: str) -> None:
        """`address` is this process."""
        if len(self._own) < PEERS_MAX:
            self._own.add(address)
        self._targets.pop(address, None)

    def _end(self, number: int) -> Asked | None:
        asked = self._under_way.pop(number, None)
        if asked is None:
            return None
        address, sent_at = asked
        target = self._targets.get(address)
        if target is None:
            return None
        target.under_way.discard(number)
        return Asked(address, sent_at, target.name)

    def _interval_s(self, target: _Target) -> float:
        match self._pace(target.name if target.watched else None):
            case Pace.STEADY:
                return PING_INTERVAL_S * self._random.uniform(0.9, 1.1)
            case Pace.QUICK:
                return PING_RETRY_S
            case Pace.SLOW:
                return min(PING_RETRY_S * 2.0 ** min(target.lost, 16), FAILED_PING_INTERVAL_S)

    def _put(self, target: _Target, at: float) -> None:
        target.next_at = at
        heapq.heappush(self._queue, (at, target.address))
