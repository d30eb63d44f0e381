"""The names that a static membership knows, each with its newest start: a bounded table.

Everything here is bookkeeping; what a message means for a name is decided in `kvmesh.discovery.static`. Sans-IO, no
clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvmesh.transport.limits import FAILED_FORGOTTEN_S, PEERS_MAX, PEERS_TOLD_MAX

from .head import Head
from .membership import Member, MemberState, smoothed_s
from .messages import Identity


@dataclass(slots=True)
class Peer:
    """What is known of one name."""

    identity: Identity
    address: str
    """The one that answered, if any did; else the one that it gave."""
    head: Head | None
    state: MemberState
    heard_at: float
    epoch_since: float
    """When this epoch was first heard of."""
    changed_at: float
    """When its state last changed."""
    lost: int = 0
    """Pings lost since it was heard, or since it is suspect."""
    rtt_s: float | None = None

    @property
    def is_gone(self) -> bool:
        """Failed or left."""
        return self.state in (MemberState.FAILED, MemberState.LEFT)

    def measured(self, rtt_s: float) -> None:
        """A round trip took so long."""
        self.rtt_s = smoothed_s(self.rtt_s, rtt_s)

    def member(self) -> Member:
        """As others see it."""
        identity = self.identity
        return Member(
            identity.name, identity.role, self.state, self.address, identity.epoch, identity.protocol_version,
            self.heard_at, self.rtt_s, self.head, identity.meta,
        )  # fmt: skip


class PeerTable:
    """Name → peer."""

    def __init__(self) -> None:
        self._peers: dict[str, Peer] = {}
        self._names_by_address: dict[str, str] = {}
        """By the address that a peer gave."""
        self._order: list[str] = []
        """The names, to tell each of them in turn."""
        self._told = 0

    def __iter__(self) -> Iterator[Peer]:
        return iter(list(self._peers.values()))

    def get(self, name: str | None) -> Peer | None:
        """The peer of that name."""
        return None if name is None else self._peers.get(name)

    def who_gave(self, address: str) -> Peer | None:
        """The peer that gave `address` as its own."""
        return self.get(self._names_by_address.get(address))

    def add(self, peer: Peer) -> None:
        """A new name. There must be room."""
        assert len(self._peers) < PEERS_MAX
        name = peer.identity.name
        self._peers[name] = peer
        self._order.append(name)
        self._names_by_address[peer.identity.address] = name

    def restart(self, peer: Peer, identity: Identity) -> None:
        """The name has started again, as `identity`."""
        self._drop_address(peer)
        peer.identity = identity
        self._names_by_address[identity.address] = identity.name

    def remove(self, peer: Peer) -> None:
        """Forget the name."""
        self._drop_address(peer)
        del self._peers[peer.identity.name]
        self._order.remove(peer.identity.name)

    def in_the_way(self) -> Peer | None:
        """The one to forget before another name fits; the longest gone one. None when there is room, or nobody is
        gone."""
        if len(self._peers) < PEERS_MAX:
            return None
        gone = [peer for peer in self._peers.values() if peer.is_gone]
        return min(gone, key=lambda peer: peer.changed_at, default=None)

    @property
    def is_full(self) -> bool:
        """No further name fits."""
        return len(self._peers) >= PEERS_MAX

    def long_gone(self, now: float) -> list[Peer]:
        """Those that failed or left a day ago."""
        return [peer for peer in self._peers.values() if peer.is_gone and now - peer.changed_at >= FAILED_FORGOTTEN_S]

    def to_tell(self) -> list[str]:
        """Addresses of some that are alive, others each time, as they gave them: the ones used here may mean nothing
        elsewhere."""
        found: list[str] = []
        for _ in range(min(len(self._order), 2 * PEERS_TOLD_MAX)):
            self._told = (self._told + 1) % len(self._order)
            peer = self._peers[self._order[self._told]]
            if peer.state is MemberState.ALIVE:
                found.append(peer.identity.address)
            if len(found) == PEERS_TOLD_MAX:
                break
        return found

    def _drop_address(self, peer: Peer) -> None:
        if self._names_by_address.get(peer.identity.address) == peer.identity.name:
            del self._names_by_address[peer.identity.address]
