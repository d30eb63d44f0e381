"""The survey before a fetch: who holds what of a chain, where they are reached, and how fast they are.

The map answers with runs: how many chunks a node holds from some place on. So the survey walks: who goes on from the
front, and then, at the end of each run, who goes on from there. A node whose run had a gap is seen again at the next
such place. Of the nodes found at most `PLAN_HOLDERS_MAX` are kept: first those that carry the chain furthest, then
those that hold most of it, the faster tier before the slower; equals in random order. A node that cannot be reached is
left out here and costs nothing.

Runs on the agent's loop, without waiting: it reads the map and the rates.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvmesh.discovery import Run
from kvmesh.price import Stretch
from kvmesh.rates import Path, Rates
from kvmesh.steps import Holder
from kvmesh.transport.limits import PLAN_HOLDERS_MAX, PLAN_STRETCHES_MAX

_TIER_ORDER = {"gpu": 0, "ram": 1, "disk": 2}


class Holders(Protocol):
    """What a fetch must know of the cluster."""

    def runs(self, keys: Sequence[bytes], start: int = 0, *, exclude: Collection[str] = ()) -> list[Run]:
        """For every node outside `exclude` that holds ``keys[start]``: how many it holds from there."""

    def forget(self, node: str, key: bytes) -> bool:
        """`node` said that it does not hold `key`."""


@dataclass(slots=True)
class Peer:
    """A node that holds some of a chain."""

    name: str
    address: str
    tier: str
    spans: list[range] = field(default_factory=list)
    bytes_per_s: float | None = None
    rtt_s: float = 0.0

    @property
    def end(self) -> int:
        """Where its last run ends."""
        return self.spans[-1].stop

    def has(self, place: int) -> bool:
        """Whether it holds the chunk at a place of the chain."""
        return any(place in span for span in self.spans)

    def holder(self, chunks: int) -> Holder:
        """What the plan of the first `chunks` chunks knows of it."""
        spans = tuple(range(span.start, min(span.stop, chunks)) for span in self.spans if span.start < chunks)
        return Holder(spans, self.bytes_per_s, self.rtt_s)


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found. `chunks`: how many the peers have together, from the front."""

    chunks: int
    peers: list[Peer]
    stretches: list[Stretch]
    rtt_s: float
    """To the nearest peer that has the front."""


class Surveyor:
    """Makes surveys for one node."""

    def __init__(
        self,
        holders: Holders,
        rates: Rates,
        backend_of: Callable[[str], str],
        address_of: Callable[[str], str | None],
        rtt_of: Callable[[str], float | None],
        shuffle: Callable[[list[Run]], None],
        node: str,
    ) -> None:
        self._holders = holders
        self._rates = rates
        self._backend_of = backend_of
        self._address_of = address_of
        self._rtt_of = rtt_of
        self._shuffle = shuffle
        self._node = node

    def survey(self, keys: Sequence[bytes], now: float) -> Survey:
        """Who holds the chain `keys`, from the front, without a hole."""
        peers = self._walk(keys)
        if len(peers) > 1:
            peers = self._choose(peers)
        if not peers:
            return Survey(0, [], [], 0.0)
        for peer in peers:
            path = Path(peer.name, self._backend_of(peer.address))
            peer.bytes_per_s = self._rates.one_more(path, now)
            peer.rtt_s = self._rates.rtt_s(path, self._rtt_of(peer.name))
        if len(peers) == 1:  # as below, for the most frequent case
            peer = peers[0]
            count = peer.spans[0].stop
            return Survey(count, peers, [Stretch(count, peer.bytes_per_s)], peer.rtt_s)
        stretches: list[Stretch] = []
        at = 0
        edges = sorted({edge for peer in peers for span in peer.spans for edge in (span.start, span.stop)} - {0})
        for edge in edges:
            rates = [peer.bytes_per_s for peer in peers if peer.has(at)]
            if not rates:
                break
            known = [rate for rate in rates if rate is not None]
            stretches.append(Stretch(edge - at, sum(known) if len(known) == len(rates) else None))
            at = edge
        return Survey(at, peers, stretches, min(peer.rtt_s for peer in peers if peer.has(0)))

    def _walk(self, keys: Sequence[bytes]) -> list[Peer]:
        """All reachable holders along the chain; those of longer runs first, equals in random order."""
        peers: dict[str, Peer] = {}
        unreachable: set[str] = set()
        at = 0
        for _ in range(PLAN_STRETCHES_MAX):
            still = [name for name, peer in peers.items() if peer.end > at]
            runs = self._holders.runs(keys, at, exclude={self._node, *unreachable, *still})
            self._shuffle(runs)
            runs.sort(key=lambda run: (-run.run_chunks, _TIER_ORDER[run.tier]))
            for run in runs:
                address = self._address_of(run.node)
                if address is None:
                    unreachable.add(run.node)
                    continue
                peer = peers.setdefault(run.node, Peer(run.node, address, run.tier))
                peer.spans.append(range(at, at + run.run_chunks))
            at = min((peer.end for peer in peers.values() if peer.end > at), default=len(keys))
            if at >= len(keys):
                break
        return list(peers.values())

    def _choose(self, peers: list[Peer]) -> list[Peer]:
        chosen: list[Peer] = []
        at = 0
        while len(chosen) < PLAN_HOLDERS_MAX:
            ends = [(span.stop, peer) for peer in peers for span in peer.spans if at in span]
            if not ends:
                break
            at, peer = max(ends, key=lambda found: found[0])
            if peer not in chosen:
                chosen.append(peer)
        if not chosen:
            return []
        others = [peer for peer in peers if peer not in chosen]
        others.sort(key=lambda peer: (-sum(map(len, peer.spans)), _TIER_ORDER[peer.tier]))
        return chosen + others[: PLAN_HOLDERS_MAX - len(chosen)]
