"""Reads through NIXL: out of the holder's registered arena into ours, by whatever UCX finds between the two machines.

    NixlEnd     this node's side: a serving process, which has the arena registered and is only named in the offer;
                and, from the first mover on, a reading process, which copies for all peers
    Peer        one peer, as one offer of it describes it: met once by each reading process
    NixlMover   what a reading of it uses
    NixlMove    a list of pieces under way; it lives until nothing of it can be written any more

Runs on the loop; NIXL itself runs in the two processes, and nixl_process.py says why. What the movers rely on: a
process that was reaped writes nothing. So a move that was stopped and does not end within NIXL_STOP_GRACE_S (a peer
that hangs), or whose transfer failed (NIXL does not say what of it is still to come), ends with the reading process;
the moves of other peers begin again in the next one, into the same bytes. A peer is met once and not forgotten, since
UCX keeps its connection; after NIXL_MEETINGS_MAX the process is changed for one that has none.

An offer is the claim of a peer: its size is bounded before anything is parsed, its fields are checked, and what is read
lies within the size that it states. The metadata in it is NIXL's own binary form, which no check of ours can vouch for:
it is only given to the reading process, and a peer whose metadata ends that process is lost. Descriptors do not travel,
so the pickle that NIXL's Python API makes of them never runs.

UCX asks no peer for a name or a key. On a host that others reach (not loopback) the ports of both processes must be
closed to all but the nodes of the mesh, which then can read this arena and write into it as they like (`--transports`
without nixl opens none). A wrong byte is found by its checksum like any other.

The arena is host memory, and is registered as such. A node whose arena lies on a GPU would hand the processes a CUDA
IPC handle instead of a memfd and register its address as VRAM_SEG with the device's number, which offers would carry.

The package is optional: ``pip install --no-deps nixl-cu12==1.5.1`` (its dependencies are torch, which kvmesh has, and
with the package ``nixl`` a second build for another CUDA).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np

from .errors import UnreachableError
from .interface import Region
from .limits import (
    NIXL_CONNECT_S,
    NIXL_MEETINGS_MAX,
    NIXL_MOVE_STARTS_MAX,
    NIXL_OPEN_S,
    NIXL_RUNS_PER_MESSAGE,
    NIXL_START_S,
    NIXL_STOP_GRACE_S,
)
from .nixl_offer import OFFER_VERSION, Offer, parse_offer
from .nixl_process import READ, SERVE, Copy, Ended, Forget, FromChild, Keeper, Lost, Meet, Met, Ready, Stop, installed
from .onesided import Piece

log = logging.getLogger(__name__)


def nixl_missing_reason() -> str | None:
    """Why reads through NIXL are not possible here; None when they may be."""
    if installed() is not None:
        return None
    return "no package with NIXL's bindings is installed (pip install --no-deps nixl-cu12==1.5.1)"


async def open_nixl(region: Region, host: str) -> NixlEnd | None:
    """This node's end, serving `region`; None, and the log says why, when NIXL is not installed or does not start.
    `host` is where the node listens: on loopback, so do NIXL's processes."""
    reason = nixl_missing_reason()
    if reason is not None:
        log.warning("nixl is not offered: %s", reason)
        return None
    end = NixlEnd(region, host)
    if not await end.open():
        await end.close()
        log.warning("NIXL is installed and does not start: reads go by other backends")
        return None
    return end


class NixlEnd:
    """As `OneSidedEnd`. Make it with `open_nixl`."""

    def __init__(self, region: Region, host: str) -> None:
        self.region = region
        self._offer = b""
        self._peers: dict[Offer, Peer] = {}
        self._moves: dict[int, NixlMove] = {}
        self._numbers = itertools.count(1)
        self._up = asyncio.Event()
        """Set while a reading process takes messages, and until all that it had under way has ended."""
        self._meetings = 0
        self.serving = Keeper(SERVE, region, host, self._serve, _ignore, self._serve_no_more)
        self.reading = Keeper(READ, region, host, self._reading_starts, self._told, self._reading_died)

    async def open(self) -> bool:
        """Start to serve, and wait a while for the first offer. Returns False when there will be none."""
        self.serving.start()
        try:
            async with asyncio.timeout(NIXL_OPEN_S):
                await self.serving.first.wait()
        except TimeoutError:
            return True  # a busy machine: the offer comes later
        return bool(self._offer)

    def offer(self) -> bytes:
        """As `OneSidedEnd.offer`: empty while the serving process starts again."""
        return self._offer

    async def mover(self, peer_offer: bytes, peer_address: str, reader: bytes) -> NixlMover:
        """As `OneSidedEnd.mover`: bytes of the peer have been read when it is returned."""
        offer = parse_offer(peer_offer)
        found = installed()
        if offer.version != OFFER_VERSION or found is None or offer.package != found[1]:
            raise UnreachableError(f"{peer_address} has NIXL {offer.package} and offers version {offer.version}")
        await self._reading_is_up(known=offer in self._peers)
        peer = self._peer(offer)
        try:
            async with asyncio.timeout(NIXL_CONNECT_S):
                await peer.known.wait()
        except TimeoutError:
            self._lose(peer, f"it does not answer within {NIXL_CONNECT_S} s")
        if peer.lost is not None:
            raise UnreachableError(f"{peer_address} cannot be read from through NIXL: {peer.lost}")
        return NixlMover(self, peer, peer_address)

    async def close(self) -> None:
        """As `OneSidedEnd.close`."""
        self._offer = b""
        for peer in list(self._peers.values()):
            self._lose(peer, "this node closes")
        await self.reading.close()
        await self.serving.close()

    def begin(self, mover: NixlMover, runs: list[tuple[int, int, int]]) -> NixlMove:
        """Start to copy, now or when the next reading process is there."""
        move = NixlMove(self, next(self._numbers), mover, runs)
        self._moves[move.number] = move
        if runs:
            self._submit(move)
        else:
            self._drop(move)  # complete
        return move

    def call_off(self, move: NixlMove) -> None:
        """Have a move ended: by itself soon, else with the process."""
        if not move.starts or not self._up.is_set():
            self._drop(move)  # no process has it: the last one was reaped
            return
        self.reading.send(Stop(move.number))
        asyncio.get_running_loop().call_later(NIXL_STOP_GRACE_S, self._still_there, move)

    def moves_of(self, mover: NixlMover) -> list[NixlMove]:
        """What of the mover may still be written."""
        return [move for move in self._moves.values() if move.mover is mover]

    async def _reading_is_up(self, known: bool) -> None:
        """Have a reading process, and one that can meet a peer that it does not know, unless it is busy."""
        self.reading.start()
        if not known and self._meetings >= NIXL_MEETINGS_MAX and not self._moves and self._up.is_set():
            self._up.clear()
            self.reading.kill()
        try:
            async with asyncio.timeout(NIXL_START_S):
                await self._up.wait()
        except TimeoutError:
            raise UnreachableError("no NIXL process is there to read") from None

    def _peer(self, offer: Offer) -> Peer:
        """The peer of this offer, as long as it is not lost; else it is met."""
        if (peer := self._peers.get(offer)) is None:
            if any(other.offer.agent == offer.agent for other in self._peers.values()):
                raise UnreachableError("another peer with the same agent is read from through NIXL")
            if self._meetings >= NIXL_MEETINGS_MAX:
                raise UnreachableError(f"{NIXL_MEETINGS_MAX} peers are read from through NIXL already")
            peer = self._peers[offer] = Peer(next(self._numbers), offer)
        self._meet(peer)
        return peer

    def _meet(self, peer: Peer) -> None:
        """Let the reading process know the peer, if one runs and does not."""
        if self._up.is_set() and not peer.met:
            peer.met = True
            self._meetings += 1
            offer = peer.offer
            self.reading.send(Meet(peer.number, offer.agent, offer.metadata, offer.base, offer.size_bytes))

    def _submit(self, move: NixlMove) -> None:
        if not self._up.is_set():
            return
        move.starts += 1
        self._meet(move.mover.peer)
        for first in range(0, len(move.runs), NIXL_RUNS_PER_MESSAGE):
            part = move.runs[first : first + NIXL_RUNS_PER_MESSAGE]
            last = first + NIXL_RUNS_PER_MESSAGE >= len(move.runs)
            self.reading.send(Copy(move.number, move.mover.peer.number, part, last))

    def _drop(self, move: NixlMove) -> None:
        """Nothing can write for this move any more."""
        self._moves.pop(move.number, None)
        move.end()

    def _lose(self, peer: Peer, reason: str) -> None:
        """The peer is not read from any more. Its moves have failed, and may write until they are dropped."""
        if self._peers.pop(peer.offer, None) is None:
            return
        peer.lost = reason
        peer.known.set()
        self.reading.send(Forget(peer.number))
        for move in list(self._moves.values()):
            if move.mover.peer is peer:
                move.fail(reason)
                if not move.starts or not self._up.is_set():
                    self._drop(move)

    def _still_there(self, move: NixlMove) -> None:
        if move.number in self._moves:
            log.info("a read from %s through NIXL cannot be stopped: the process ends", move.mover.address)
            self._lose(move.mover.peer, "it hangs")
            self.reading.kill()

    def _serve(self, ready: Ready) -> None:
        size = self.region.size_bytes
        offer = Offer(OFFER_VERSION, ready.package, ready.agent, ready.metadata, ready.base, size)
        self._offer = msgspec.msgpack.encode(offer)

    def _serve_no_more(self) -> None:
        self._offer = b""

    def _reading_starts(self, ready: Ready) -> None:
        self._meetings = 0
        self._up.set()
        for peer in self._peers.values():
            if not peer.known.is_set():
                self._meet(peer)  # someone waits for it
        for move in list(self._moves.values()):
            self._submit(move)

    def _told(self, message: FromChild) -> None:
        match message:
            case Met(number) | Lost(number):
                peer = next((peer for peer in self._peers.values() if peer.number == number), None)
                if peer is not None and isinstance(message, Lost):
                    self._lose(peer, message.reason)
                elif peer is not None:
                    peer.known.set()
            case Ended(number, complete) if (move := self._moves.get(number)) is not None:
                if not complete:
                    move.fail("it was stopped")
                self._drop(move)

    def _reading_died(self) -> None:
        """All that was under way has ended. What no peer is to blame for begins again in the next process."""
        self._up.clear()
        for peer in list(self._peers.values()):
            if peer.met and not peer.known.is_set():
                self._lose(peer, "the process that met it ended")  # its metadata may be what did it
            elif peer.known.is_set() and not peer.movers:
                del self._peers[peer.offer]
            peer.met = False
        for move in list(self._moves.values()):
            if move.starts >= NIXL_MOVE_STARTS_MAX:
                move.fail("the process that read from it ended, again")
            if move.failed or move.stopped:
                self._drop(move)


def _ignore(message: FromChild) -> None:
    """The serving process says nothing after it is ready."""


class Peer:
    """A peer, as one offer of it describes it, and what is known of it."""

    def __init__(self, number: int, offer: Offer) -> None:
        self.number, self.offer = number, offer
        self.met = False
        """Whether the reading process that runs has been told of it."""
        self.lost: str | None = None
        """Why it is not read from any more."""
        self.known = asyncio.Event()
        """Set when bytes of it have been read, or it is lost."""
        self.movers = 0
        """Those that are not closed. Without any it is remembered as long as the reading process lives."""


class NixlMover:
    """As `Mover`. The peer stays known when it is closed: UCX does not give a connection back."""

    hashes: Final = False
    """The bytes arrive in another process."""

    def __init__(self, end: NixlEnd, peer: Peer, address: str) -> None:
        self._end = end
        self._closed = False
        self.peer, self.address = peer, address
        peer.movers += 1

    def move(self, pieces: Sequence[Piece]) -> NixlMove:
        """As `Mover.move`. Raises `UnreachableError` for a piece whose bytes are not to land in the arena: only that is
        registered."""
        if self._closed or self.peer.lost is not None:
            raise UnreachableError(f"{self.address} cannot be read from through NIXL: {self.peer.lost or 'closed'}")
        return self._end.begin(self, [self._run(piece) for piece in pieces if piece.into.nbytes])

    async def close(self) -> None:
        """As `Mover.close`."""
        self.peer.movers -= not self._closed
        self._closed = True
        for move in self._end.moves_of(self):
            await move.stop()

    def _run(self, piece: Piece) -> tuple[int, int, int]:
        region, length = self._end.region, piece.into.nbytes
        here = np.frombuffer(piece.into, np.uint8).ctypes.data - region.address
        if here < 0 or here + length > region.size_bytes:
            raise UnreachableError("NIXL reads into the arena only")
        if piece.remote_offset < 0 or piece.remote_offset + length > self.peer.offer.size_bytes:
            raise UnreachableError(f"{self.address} offers {self.peer.offer.size_bytes} bytes: this is beyond them")
        return piece.remote_offset, here, length


class NixlMove:
    """As `Move`."""

    def __init__(self, end: NixlEnd, number: int, mover: NixlMover, runs: list[tuple[int, int, int]]) -> None:
        self._end = end
        self.number, self.mover, self.runs = number, mover, runs
        self.starts = 0
        """Processes that it was given to."""
        self.stopped = False
        self._error: str | None = None
        self._outcome = asyncio.Event()
        self._quiet = asyncio.Event()

    @property
    def failed(self) -> bool:
        """Whether it will not become complete."""
        return self._error is not None

    async def wait(self) -> None:
        """As `Move.wait`."""
        await self._outcome.wait()
        if self._error is not None:
            raise UnreachableError(f"{self.mover.address} was not read from through NIXL: {self._error}")

    async def stop(self) -> None:
        """As `Move.stop`."""
        if not self.stopped and not self._quiet.is_set():
            self.stopped = True
            self._end.call_off(self)
        await self._quiet.wait()

    def fail(self, reason: str) -> None:
        """It will not become complete, and may still be written."""
        if not self._outcome.is_set():
            self._error = reason
            self._outcome.set()

    def end(self) -> None:
        """Nothing of it can be written any more."""
        if self.stopped:
            self.fail("it was stopped")
        self._outcome.set()
        self._quiet.set()
