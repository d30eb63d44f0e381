"""By which backend each peer is read: its offers, the link that is open to it, and what failed lately.

A peer is asked for its offers once (single flight), and the best of them that can be opened becomes its link. What is
known goes stale when a call to the peer fails, when its link is lost, and after a while in any case; then it is asked
again, beside the reads that go on. A peer that answers with another instance has restarted: the old link is closed. A
backend that failed for a peer is left out for it for `limits.BACKEND_RETRY_S`.

Owns the links. Knows nothing of chunks, and of the transport that stands in when there is no link. Runs on the loop.
"""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from .errors import PeerError, ProtocolError
from .lending_messages import Ask, Offers, decode_answer, encode_request
from .limits import (
    BACKEND_RETRY_S,
    CALL_TIMEOUT_S,
    INSTANCE_BYTES,
    LINK_IDLE_S,
    OFFER_KEPT_S,
    OFFERS_KEPT_MAX,
)
from .onesided import Mover, OneSidedEnd
from .taking import Link, Tools

NO_LINK = "zmq"


@dataclass(slots=True, eq=False)
class _Peer:
    """What is known of the transport at one address."""

    address: str
    instance: bytes = b""
    link: Link | None = None
    backend: str = NO_LINK
    """The link's, also while it is closed for want of use."""
    fresh_until_s: float = 0.0
    used_s: float = 0.0
    left_out_until_s: dict[str, float] = field(default_factory=dict)
    """By backend."""
    settling: asyncio.Task[None] | None = None


class Peers:
    """The peers that this node reads from."""

    def __init__(
        self,
        ends: Mapping[str, OneSidedEnd],
        call: Callable[[str, bytes, float], Awaitable[bytes]],
        tools: Tools,
    ) -> None:
        """`ends`: the backends of this process, the best one first. `call(address, request, timeout_s)`."""
        self._loop = asyncio.get_running_loop()
        self._ends = ends
        self._call = call
        self._tools = tools
        self._peers: OrderedDict[str, _Peer] = OrderedDict()  # least recently used first
        self._closing: set[asyncio.Task[None]] = set()
        self._sweeper = self._loop.call_later(LINK_IDLE_S, self._sweep)

    def backend(self, address: str) -> str:
        """The backend of the link to this peer, as far as it is known."""
        peer = self._peers.get(address)
        return NO_LINK if peer is None else peer.backend

    def link(self, address: str) -> tuple[Link | None, bool]:
        """The open link, if there is one, and whether that is all there is to know for now. When it is not, the peer
        is being asked from now on."""
        peer = self._use(address)
        settled = self._loop.time() < peer.fresh_until_s and (peer.link is not None or peer.backend == NO_LINK)
        if not settled and peer.settling is None and self._ends:
            peer.settling = self._loop.create_task(self._settle(peer))
        return peer.link, settled or not self._ends

    async def wait_for_link(self, address: str, timeout_s: float) -> Link | None:
        """The link, once the peer has answered; None when there is none, or not in time."""
        link, settled = self.link(address)
        peer = self._peers[address]
        if not settled and peer.settling is not None:
            await asyncio.wait([peer.settling], timeout=timeout_s)
            link = peer.link
        return link

    def stale(self, address: str) -> None:
        """What is known of this peer may be wrong: it did not answer, or is not who it was."""
        peer = self._peers.get(address)
        if peer is not None:
            peer.fresh_until_s = 0.0

    def failed(self, address: str, link: Link) -> None:
        """A taking by this link failed. Its backend is left out when it was the backend that did; also when the link is
        lost already, since a process that lives on may hang up each time."""
        self.stale(address)
        peer = self._peers.get(address)
        if link.broken and peer is not None and peer.instance == link.instance:
            peer.left_out_until_s[link.backend] = self._loop.time() + BACKEND_RETRY_S
            if peer.link is link:
                self._unlink(peer)

    def lost(self, mover: Mover) -> None:
        """The process at the other end of this mover is gone."""
        for peer in self._peers.values():
            if peer.link is not None and peer.link.mover is mover:
                peer.fresh_until_s = 0.0
                self._unlink(peer)

    async def close(self) -> None:
        """Close every link."""
        self._sweeper.cancel()
        settling = [peer.settling for peer in self._peers.values() if peer.settling is not None]
        for task in settling:
            task.cancel()
        if settling:
            await asyncio.wait(settling)
        for peer in self._peers.values():
            self._unlink(peer)
        if self._closing:
            await asyncio.wait(self._closing)

    # --- inside ----------------------------------------------------------------------------------------------------
    def _use(self, address: str) -> _Peer:
        peer = self._peers.get(address)
        if peer is None:
            if len(self._peers) >= OFFERS_KEPT_MAX:
                self._forget_one()
            peer = self._peers[address] = _Peer(address)
        peer.used_s = self._loop.time()
        self._peers.move_to_end(address)
        return peer

    def _forget_one(self) -> None:
        for peer in self._peers.values():
            if peer.settling is None and (peer.link is None or not peer.link.users):
                self._unlink(peer)
                del self._peers[peer.address]
                return

    async def _settle(self, peer: _Peer) -> None:
        try:
            await self._open_best(peer, await self._ask(peer.address))
            peer.fresh_until_s = self._loop.time() + OFFER_KEPT_S
        except ProtocolError:  # it has no such thing as offers, or does not follow the protocol
            self._unlink(peer)
            peer.fresh_until_s = self._loop.time() + BACKEND_RETRY_S
        except PeerError:
            pass  # asked again by the next read
        finally:
            peer.settling = None

    async def _ask(self, address: str) -> Offers:
        return decode_answer(Offers, await self._call(address, encode_request(Ask()), CALL_TIMEOUT_S))

    async def _open_best(self, peer: _Peer, offers: Offers) -> None:
        if peer.instance != offers.instance:  # it has restarted: nothing of what was holds for it
            peer.instance = offers.instance
            peer.left_out_until_s.clear()
            self._unlink(peer)
        for backend, end in self._ends.items():
            if peer.link is not None and peer.link.backend == backend:
                return
            offer = offers.by_backend.get(backend)
            if offer is None or peer.left_out_until_s.get(backend, 0.0) > self._loop.time():
                continue
            reader = os.urandom(INSTANCE_BYTES)
            try:
                mover = await end.mover(offer, peer.address, reader)
            except PeerError:
                peer.left_out_until_s[backend] = self._loop.time() + BACKEND_RETRY_S
                continue
            self._unlink(peer)
            peer.link = Link(
                backend,
                mover,
                offers.instance,
                reader,
                offers.arena_bytes,
                lambda request, timeout_s: self._call(peer.address, request, timeout_s),
                self._tools,
            )
            peer.backend = backend
            return
        self._unlink(peer)

    def _unlink(self, peer: _Peer) -> None:
        link, peer.link = peer.link, None
        peer.backend = NO_LINK
        if link is not None:
            task = self._loop.create_task(link.mover.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _sweep(self) -> None:
        """Close links that nobody uses: each costs both ends a descriptor."""
        now = self._loop.time()
        self._sweeper = self._loop.call_later(LINK_IDLE_S, self._sweep)
        for peer in self._peers.values():
            if peer.link is not None and not peer.link.users and now - peer.used_s >= LINK_IDLE_S:
                backend = peer.backend
                self._unlink(peer)
                peer.backend = backend
