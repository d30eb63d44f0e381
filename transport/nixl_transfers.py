"""What the reading process of NIXL copies when, and when it must end. Sans-IO: NIXL is behind `Engine`.

NIXL gets at most NIXL_WINDOW_BYTES of a peer's runs, in transfers that end soon, since one that was given to it cannot
be called back. A peer is met by reading a few of its bytes into memory of nobody's. What fails makes its peer lost;
once a move of that peer was begun nobody knows what is still to be written, so the process ends: `UncertainError`.

The loop of nixl_child.py gives it the keeper's messages and its turns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from .limits import NIXL_PROBE_BYTES, NIXL_TRANSFER_BYTES_MAX, NIXL_TRANSFER_RUNS_MAX, NIXL_WINDOW_BYTES
from .nixl_process import Copy, Ended, Forget, FromChild, Lost, Meet, Met, Stop, ToChild


class Engine(Protocol):
    """What is needed of NIXL. Each raises what NIXL raises."""

    def meet(self, agent: str, metadata: bytes) -> None:
        """Make a peer's agent known."""

    def read(self, agent: str, remote: Sequence[tuple[int, int]], local: Sequence[int]) -> int:
        """Start to copy (address, bytes) at the peer to addresses here. Returns the transfer."""

    def done(self, transfer: int) -> bool:
        """Whether it is complete. Moves it on; a transfer that is complete is gone then."""

    def forget(self, agent: str) -> None:
        """The peer's agent is not known any more."""


@dataclass(slots=True)
class _Move:
    peer: int
    runs: deque[tuple[int, int, int]] = field(default_factory=deque)
    whole: bool = False
    """No more runs follow."""
    stopped: bool = False
    under_way: int = 0


@dataclass(slots=True)
class _Peer:
    agent: str
    base: int
    moves: deque[int] = field(default_factory=deque)
    """Those that have runs to start, in order."""
    transfers: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Under way: the move and the bytes of each; move -1 is the probe."""
    under_way_bytes: int = 0


class UncertainError(Exception):
    """A transfer into the arena failed, so it is not known what may still be written: this process must end."""


class Transfers:
    """What this process copies from whom. `tell` is given what the keeper must know."""

    PROBE: Final = -1

    def __init__(self, engine: Engine, arena: int, scratch: int, tell: Callable[[FromChild], None]) -> None:
        self._engine, self._arena, self._scratch, self._tell = engine, arena, scratch, tell
        self._peers: dict[int, _Peer] = {}
        self._moves: dict[int, _Move] = {}

    @property
    def busy(self) -> bool:
        """Whether anything is under way."""
        return any(peer.transfers for peer in self._peers.values())

    def handle(self, message: ToChild) -> None:
        """One message of the keeper's."""
        match message:
            case Meet():
                self._meet(message)
            case Copy(number, peer_number, runs, last):
                if (peer := self._peers.get(peer_number)) is None:
                    self._tell(Ended(number, False))  # lost, and the keeper has been told
                    return
                if number not in self._moves:
                    self._moves[number] = _Move(peer_number)
                    peer.moves.append(number)
                move = self._moves[number]
                move.runs.extend(runs)
                move.whole = last
                self._start(peer_number)
            case Stop(number):
                self._stop(number)
            case Forget(number):
                if (peer := self._peers.pop(number, None)) is not None:
                    self._engine.forget(peer.agent)

    def turn(self) -> bool:
        """Look at all that is under way, and start what fits. Returns whether anything was complete."""
        found = False
        for number, peer in list(self._peers.items()):
            for transfer, (move, length) in list(peer.transfers.items()):
                if self._guarded(number, self._engine.done, transfer):
                    found = True
                    del peer.transfers[transfer]
                    peer.under_way_bytes -= length
                    if move == self.PROBE:
                        self._tell(Met(number))
                    else:
                        self._moves[move].under_way -= 1
                        self._end(move)
                if number not in self._peers:
                    break  # its probe failed
            else:
                self._start(number)
        return found

    def _stop(self, number: int) -> None:
        if (move := self._moves.get(number)) is None:
            self._tell(Ended(number, False))  # it ended just now, or was never begun
            return
        move.stopped, move.whole = True, True
        move.runs.clear()
        self._end(number)

    def _meet(self, message: Meet) -> None:
        try:
            self._engine.meet(message.agent, message.metadata)
        except Exception as error:  # noqa: BLE001  # whatever a peer's metadata makes of NIXL is the peer's
            self._tell(Lost(message.peer, f"NIXL does not take its metadata: {error}"))
            return
        peer = self._peers[message.peer] = _Peer(message.agent, message.base)
        probe = min(NIXL_PROBE_BYTES, message.size_bytes)
        remote = [(peer.base, probe)]
        transfer = self._guarded(message.peer, self._engine.read, peer.agent, remote, [self._scratch])
        if transfer is not None:
            peer.transfers[transfer] = (self.PROBE, probe)
            peer.under_way_bytes = probe

    def _start(self, number: int) -> None:
        """Give NIXL what fits into the peer's window."""
        peer = self._peers[number]
        while peer.moves and peer.under_way_bytes < NIXL_WINDOW_BYTES:
            move = self._moves.get(peer.moves[0])
            if move is None or not move.runs:
                if move is None or move.whole:
                    peer.moves.popleft()
                    continue
                return
            runs = _take(move.runs)
            remote = [(peer.base + there, length) for there, _, length in runs]
            local = [self._arena + here for _, here, _ in runs]
            transfer = self._guarded(number, self._engine.read, peer.agent, remote, local)
            if transfer is None:
                return
            length = sum(length for _, _, length in runs)
            peer.transfers[transfer] = (peer.moves[0], length)
            peer.under_way_bytes += length
            move.under_way += 1

    def _end(self, number: int) -> None:
        move = self._moves[number]
        if move.whole and not move.runs and not move.under_way:
            del self._moves[number]
            self._tell(Ended(number, not move.stopped))

    def _guarded(self, number: int, call: Callable[..., int], *arguments: Any) -> int | None:
        """What `call` returns. If it fails the peer is lost, and if a move of it was begun, so is this process."""
        try:
            return call(*arguments)
        except Exception as error:
            self._tell(Lost(number, str(error)))
            if any(move.peer == number for move in self._moves.values()):
                raise UncertainError from error
            self._engine.forget(self._peers.pop(number).agent)
            return None


def _take(runs: deque[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """The first runs, as many as make one transfer; a long one is cut."""
    taken: list[tuple[int, int, int]] = []
    left = NIXL_TRANSFER_BYTES_MAX
    while runs and left and len(taken) < NIXL_TRANSFER_RUNS_MAX:
        there, here, length = runs.popleft()
        if length > left:
            runs.appendleft((there + left, here + left, length - left))
            length = left
        taken.append((there, here, length))
        left -= length
    return taken
