"""Shares: who of several holders reads which chunks next.

A chunk goes to the holder that is expected to have it landed first. So the chunks of the front are dealt out over all
holders by their rates, and the front grows at the rate of all of them together. Nothing goes to a holder so slow that a
busy one would be done with the chunk before it: that chunk waits.

Not all is dealt out at once. A holder gets at most half of what its rate entitles it to of what waits, and the next
share shortly before it is done with that; so a rate that was wrong corrects itself, and the shares at the end are small
enough for all to end together. A holder of unknown rate, beside others that are known, gets a small share from the far
end, where nobody waits for it soon.

Pure bookkeeping for `kvmesh.plan`: the time comes in as `now`, nothing goes out but lists of chunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvmesh.transport.limits import (
    DEADLINE_OPTIMISM,
    PLAN_FIRST_SHARE_BYTES,
    PLAN_LATE_S_MIN,
    PLAN_PRIOR_S_MIN,
    PLAN_RATE_ASSUMED_BYTES_PER_S,
    PLAN_READS_PER_HOLDER_MAX,
    PLAN_SHARE_CHUNKS_MAX,
    PLAN_SHARE_S_MIN,
)

_ABOUT_AS_GOOD = 1.25
"""Holders whose expected times differ by less than this are taken in the order given: it is random among equals, and
measured rates never are equal."""
_PROBE_PART = 4
"""A probe takes at most this part of what waits."""


@dataclass(slots=True)
class Source:
    """One holder, as the plan has seen it."""

    index: int
    chunk_bytes: int
    prior_bytes_per_s: float | None
    """What was known of it before."""
    rtt_s: float
    landed: int = 0
    out: int = 0
    """Chunks that it was asked for and still owes."""
    low: int = 0
    """It is asked for more when it owes no more than so many."""
    reads: int = 0
    failed: bool = False
    doubtful: bool = False
    """It did not have what the map says that it holds: the rest of what the map says is in doubt as well."""
    asked: bool = False
    busy_s: float = 0.0
    """How long it was at work, up to when it last had nothing to do."""
    busy_since: float = 0.0
    heard: float = 0.0
    """When it last landed something, or could first have."""
    bit: int = field(init=False)

    def __post_init__(self) -> None:
        self.bit = 1 << self.index

    def ask(self, chunks: int, now: float) -> None:
        """It is asked for so many chunks."""
        if not self.out:
            self.busy_since = self.heard = now + self.rtt_s
        self.out += chunks
        self.reads += 1
        self.asked = True

    def settle(self, now: float, chunks: int = 1, *, landed: bool = False) -> None:
        """It owes so many chunks less."""
        self.out -= chunks
        if landed:
            self.landed += chunks
            self.heard = now
        if not self.out:
            self.busy_s += max(0.0, now - self.busy_since)

    def rate(self, now: float) -> float | None:
        """Bytes a second: what was known before and what was seen, weighed by time. None: neither says anything."""
        busy_s = self._busy_s(now)
        seen = self.landed * self.chunk_bytes
        prior = self.prior_bytes_per_s
        if prior is not None:
            weight_s = max(PLAN_PRIOR_S_MIN, 2 * self.chunk_bytes / prior)
            return (prior * weight_s + seen) / (weight_s + busy_s)
        if seen:
            return seen / max(busy_s, 1e-6)
        return self.chunk_bytes / busy_s if busy_s > PLAN_LATE_S_MIN else None  # less than one chunk in that time

    def pace_s(self, now: float) -> float:
        """The time of one chunk."""
        return self.chunk_bytes / (self.rate(now) or PLAN_RATE_ASSUMED_BYTES_PER_S)

    def dragging_s(self, now: float) -> float:
        """The time of one chunk of a source that is late: as it was seen alone, or as long as it has said nothing. Who
        says nothing for so long may well go on for as long."""
        return max(self._busy_s(now) / (self.landed + 1), now - self.heard)

    def _busy_s(self, now: float) -> float:
        return self.busy_s + (max(0.0, now - self.busy_since) if self.out else 0.0)


def divide(
    waiting: list[int], masks: Sequence[int], sources: Sequence[Source], now: float, left_s: float, *, urgent: bool
) -> tuple[list[tuple[Source, list[int]]], list[int]]:
    """The next share of each source that is due for one, and what goes on waiting. `masks`: who has each chunk.

    `urgent`: the front itself waits, so a source need not be done with what it has.
    """
    if len(sources) == 1:
        source = sources[0]
        if source.reads >= PLAN_READS_PER_HOLDER_MAX + urgent or (source.out > source.low and not urgent):
            return [], waiting
        # The first one is short: while it is on its way the next is made ready, which takes time for many small chunks.
        share = PLAN_SHARE_CHUNKS_MAX if source.asked else PLAN_SHARE_CHUNKS_MAX // 4
        return [(source, waiting[:share])], waiting[share:]
    dealer = _Dealer(len(waiting), sources, now, left_s, urgent=urgent)
    whole = dealer.whole(waiting, masks)
    if whole is not None:
        return [(whole, waiting)], []
    shares, rest = dealer.deal(waiting, masks, left_s)
    return shares, rest


class _Dealer:
    """One division. The lists are by place in `sources`."""

    def __init__(self, waiting: int, sources: Sequence[Source], now: float, left_s: float, *, urgent: bool) -> None:
        self._sources = sources
        rates = [source.rate(now) for source in sources]
        self._pace_s = [source.pace_s(now) for source in sources]
        self._ready_s = [s.rtt_s + s.out * pace_s for s, pace_s in zip(sources, self._pace_s, strict=True)]
        self._unknown = [place for place, rate in enumerate(rates) if rate is None]
        self._known = [place for place, rate in enumerate(rates) if rate is not None]
        if self._unknown:  # who is known to be too slow must not hide those of whom nothing is known
            soon_s = left_s * DEADLINE_OPTIMISM
            self._known = [place for place in self._known if self._ready_s[place] + self._pace_s[place] <= soon_s]
        total = sum(rates[place] or 0.0 for place in self._known)
        self._least: list[int] = []
        """The shortest share worth a read."""
        self._quota: list[int] = []
        for place, (source, rate) in enumerate(zip(sources, rates, strict=True)):
            least = quota = 0
            if rate is None:
                least = quota = max(1, PLAN_FIRST_SHARE_BYTES // source.chunk_bytes)
            elif place in self._known:
                least = math.ceil(max(source.rtt_s, PLAN_SHARE_S_MIN) / self._pace_s[place])
                quota = max(least, math.ceil(waiting * rate / total / 2))
            free = source.reads < PLAN_READS_PER_HOLDER_MAX + urgent and (urgent or source.out <= source.low)
            self._least.append(least)
            self._quota.append(quota if free else 0)

    def whole(self, waiting: Sequence[int], masks: Sequence[int]) -> Source | None:
        """The source that takes all that waits, when that is too little to divide."""
        count = len(waiting)
        open_ = [p for p in self._known or self._unknown if self._quota[p] and count <= self._least[p]]
        if not open_:
            return None
        common = -1
        for chunk in waiting:
            common &= masks[chunk]
        took_s = {p: self._ready_s[p] + count * self._pace_s[p] for p in open_ if common & self._sources[p].bit}
        if not took_s:
            return None
        best = min(took_s.values()) * _ABOUT_AS_GOOD
        # A source that is busy now may still be sooner; then it is for the deal to say that this waits for it.
        busy = [p for p in self._known if not self._quota[p] and self._ready_s[p] + count * self._pace_s[p] < best]
        return None if busy else next(self._sources[p] for p, s in took_s.items() if s <= best)

    def deal(
        self, waiting: Sequence[int], masks: Sequence[int], left_s: float
    ) -> tuple[list[tuple[Source, list[int]]], list[int]]:
        """As `divide`."""
        sources, pace_s, ready_s, quota = self._sources, self._pace_s, self._ready_s, self._quota
        shares: list[list[int]] = [[] for _ in sources]
        rest: list[int] = []
        open_ = {p for p in self._known or self._unknown if quota[p]}
        at = 0
        for at, chunk in enumerate(waiting):  # noqa: B007 - where it stopped counts
            if not open_:
                break
            mask = masks[chunk]
            place, soonest_s = self._soonest(mask, self._known)
            if place < 0:
                place, soonest_s = self._soonest(mask, self._unknown)
            if soonest_s > left_s * DEADLINE_OPTIMISM:
                break
            ready_s[place] += pace_s[place]
            if len(shares[place]) < quota[place]:
                shares[place].append(chunk)
                if len(shares[place]) == quota[place]:
                    open_.discard(place)
            else:
                rest.append(chunk)
        else:
            at = len(waiting)
        rest.extend(waiting[at:])
        if self._known:
            for place in self._unknown:
                if not sources[place].asked and not shares[place]:
                    shares[place] = self._probe(sources[place], rest, masks)
        return [(source, share) for source, share in zip(sources, shares, strict=True) if share], rest

    def _soonest(self, mask: int, places: Sequence[int]) -> tuple[int, float]:
        best, best_s = -1, math.inf
        for place in places:
            if mask & self._sources[place].bit:
                done_s = self._ready_s[place] + self._pace_s[place]
                if done_s < best_s:
                    best, best_s = place, done_s
        return best, best_s

    @staticmethod
    def _probe(source: Source, rest: list[int], masks: Sequence[int]) -> list[int]:
        """Take the last chunks of `rest` that the source has: few, and not before they are few of what waits."""
        most = min(max(1, PLAN_FIRST_SHARE_BYTES // source.chunk_bytes), len(rest) // _PROBE_PART)
        share: list[int] = []
        while rest and len(share) < most and masks[rest[-1]] & source.bit:
            share.append(rest.pop())
        return share[::-1]
