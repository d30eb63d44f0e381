"""The caller's end of calls over ZeroMQ: one control connection a peer, on which any number of calls wait side by side.

A connection is opened by the first call and closed when idle. When it is lost (refused, reset, silent for too long)
every call on it ends at once with `UnreachableError`. Knows nothing of what the calls say. Runs on the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from dataclasses import dataclass, field

import zmq

from .counters import Counters
from .errors import PeerError, ProtocolError, UnreachableError
from .frames import Answer, Call, Cancel, ForeignVersionError, FrameError, Refusal, encode, to_caller
from .limits import CALLS_PER_PEER_MAX, LINK_IDLE_S, MESH_PROTOCOL_VERSION, MESSAGE_BYTES_MAX
from .zmq_sockets import READY_TIMEOUT_S, Sockets, WatchedSocket


@dataclass(slots=True)
class _Link:
    """The control connection to one peer."""

    address: str
    socket: WatchedSocket
    timer: asyncio.TimerHandle
    """Until it is ready: the bound on that. From then on: the look whether it is idle."""
    used_s: float
    pending: dict[int, asyncio.Future[bytes]] = field(default_factory=dict)


class Caller:
    """Calls to any peers."""

    def __init__(self, sockets: Sockets, counters: Counters) -> None:
        self._loop = asyncio.get_running_loop()
        self._sockets = sockets
        self._counters = counters
        self._links: dict[str, _Link] = {}
        self._ids = itertools.count(1)
        self._closed = False

    async def call(self, address: str, request: bytes, timeout_s: float) -> bytes:
        """As `Transport.call`."""
        if len(request) > MESSAGE_BYTES_MAX:
            raise ProtocolError(f"a request of {len(request)} bytes: at most {MESSAGE_BYTES_MAX}")
        if self._closed:
            raise UnreachableError("this transport is closed")
        link = self._links.get(address) or self._open(address)
        if len(link.pending) >= CALLS_PER_PEER_MAX:
            self._counters.refused += 1
            raise UnreachableError(f"{len(link.pending)} calls to {address} wait already")
        call_id = next(self._ids)
        answer: asyncio.Future[bytes] = self._loop.create_future()
        link.pending[call_id] = answer
        try:
            link.socket.send([encode(Call(MESH_PROTOCOL_VERSION, call_id)), request])
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            raise UnreachableError(f"{address} did not answer within {timeout_s:g} s") from None
        except zmq.ZMQError as error:
            raise UnreachableError(f"cannot send to {address}: {error.strerror}") from None
        finally:
            link.used_s = self._loop.time()
            if link.pending.pop(call_id, None) is not None:
                self._cancel(link, call_id)

    def close(self) -> None:
        """End every call, and close the connections."""
        self._closed = True
        for link in list(self._links.values()):
            self._lose(link, "this transport is closed")

    def _open(self, address: str) -> _Link:
        link: _Link = _Link(
            address,
            WatchedSocket(
                *self._sockets.connect(address),
                lambda parts: self._receive(link, parts),
                lambda ready: self._event(link, ready),
            ),
            self._loop.call_later(READY_TIMEOUT_S, lambda: self._event(link, False)),
            self._loop.time(),
        )
        self._links[address] = link
        return link

    def _event(self, link: _Link, ready: bool) -> None:
        if ready:
            link.timer.cancel()
            link.timer = self._loop.call_later(LINK_IDLE_S, self._close_idle, link)
        else:
            link.socket.drain()  # the peer may have answered before it went
            self._lose(link, f"nothing answers at {link.address}")

    def _close_idle(self, link: _Link) -> None:
        unused_s = self._loop.time() - link.used_s if not link.pending else 0.0
        if unused_s >= LINK_IDLE_S:
            self._lose(link, "idle")
        else:
            link.timer = self._loop.call_later(LINK_IDLE_S - unused_s, self._close_idle, link)

    def _lose(self, link: _Link, why: str) -> None:
        if self._links.get(link.address) is not link:
            return  # both ends of a connection may report its loss
        del self._links[link.address]
        link.timer.cancel()
        link.socket.close()
        for answer in link.pending.values():
            if not answer.done():
                answer.set_exception(UnreachableError(why))
        link.pending.clear()

    def _cancel(self, link: _Link, call_id: int) -> None:
        """Spare the peer the work. It may not hear of it: then the call ends there by itself."""
        if self._links.get(link.address) is link:
            with contextlib.suppress(zmq.ZMQError):
                link.socket.send([encode(Cancel(MESH_PROTOCOL_VERSION, call_id))])

    def _receive(self, link: _Link, parts: list[bytes]) -> None:
        try:
            message, payload = to_caller(parts)
        except ForeignVersionError as error:
            self._counters.malformed += 1
            self._fail(link, error.request_id, ProtocolError(f"cannot talk to {link.address}: {error}"))
            return
        except FrameError:
            self._counters.malformed += 1
            return
        match message:
            case Answer():
                answer = link.pending.pop(message.id, None)
                if answer is not None and not answer.done():
                    answer.set_result(payload)
            case Refusal():
                self._fail(link, message.id, ProtocolError(f"{link.address} refused: {message.text}"))

    def _fail(self, link: _Link, call_id: int, error: PeerError) -> None:
        answer = link.pending.pop(call_id, None)
        if answer is not None and not answer.done():
            answer.set_exception(error)
