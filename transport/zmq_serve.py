"""The serving end over ZeroMQ: the ROUTER at the node's port, on which peers call and read.

It takes each message apart, counts and drops what is malformed, runs the handler of calls (a bounded number of
tasks), and hands reads to the `Lender`. A reader or caller is known by its connection (the identity that the ROUTER
gives it), so nobody can act on another's requests. A ROUTER does not say which connection went away, only that one
did: then everyone who has something open here is sent an `Alive`, and the send itself fails for those who are gone.
Runs on the loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Final

import zmq

from .counters import Counters
from .errors import KVMeshError
from .frames import (
    Alive,
    Answer,
    Buffer,
    Call,
    Cancel,
    ForeignVersionError,
    FrameError,
    Grant,
    Message,
    Read,
    Refusal,
    Suspect,
    encode,
    to_holder,
)
from .interface import CallHandler, ChunkSource
from .limits import (
    CALLS_PER_PEER_MAX,
    CALLS_SERVED_MAX,
    MESH_PROTOCOL_VERSION,
    MESSAGE_BYTES_MAX,
    REFUSAL_CHARS_MAX,
    SUSPECTS_PER_SWEEP_MAX,
)
from .loans import suspect
from .zmq_lend import Lender
from .zmq_sockets import WatchedSocket

log = logging.getLogger(__name__)

SWEEP_INTERVAL_S: Final = 1.0
PROBE_DELAY_S: Final = 0.01
"""From a lost connection to the look at who it was: libzmq tells of the loss a little before it acts on it."""


class Server:
    """What this node does for its peers."""

    def __init__(
        self, router: zmq.Socket[bytes], source: ChunkSource | None, handler: CallHandler, counters: Counters
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._source = source
        self._handler = handler
        self._counters = counters
        self._calls: dict[tuple[bytes, int], asyncio.Task[None]] = {}
        self._per_caller: Counter[bytes] = Counter()
        self._suspects: Counter[bytes] = Counter()  # of each reader, since the last sweep
        monitor = router.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket = WatchedSocket(router, monitor, self._receive, self._probe_soon)
        self.lender = Lender(source, self._send_bulk, counters, self._refuse)
        self._sweeper = self._loop.call_later(SWEEP_INTERVAL_S, self._sweep)
        self._probe: asyncio.TimerHandle | None = None
        self._lost_one = False

    async def close(self) -> None:
        """Stop: calls are cancelled, reads end, and the port is free. Loans go back as libzmq lets go of them."""
        self._sweeper.cancel()
        if self._probe is not None:
            self._probe.cancel()
        self.lender.close()
        self._socket.close()  # before anything is waited for: nobody asks for more meanwhile
        tasks = list(self._calls.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # --- messages --------------------------------------------------------------------------------------------------
    def _receive(self, parts: list[bytes]) -> None:
        peer, *rest = parts
        try:
            message, payload = to_holder(rest)
        except ForeignVersionError as error:
            self._counters.malformed += 1
            if error.tag in (Call.__struct_config__.tag, Read.__struct_config__.tag):
                self._refuse(peer, error.request_id, str(error))
            return
        except FrameError:
            self._counters.malformed += 1
            return
        match message:
            case Call():
                self._call(peer, message.id, payload)
            case Read():
                refused = self.lender.open(peer, message, payload)
                if refused is not None:
                    self._counters.refused += 1
                    self._refuse(peer, message.id, refused)
            case Grant():
                self._counters.malformed += not self.lender.grant(peer, message.id, message.credit_bytes)
            case Cancel():
                self._cancel(peer, message.id)
            case Suspect():
                self._suspect(peer, payload)

    def _suspect(self, peer: bytes, key: bytes) -> None:
        """A reader says that a chunk came to it corrupt. What that says of our copy, the source finds out."""
        self._suspects[peer] += 1
        if self._suspects[peer] <= SUSPECTS_PER_SWEEP_MAX:
            suspect(self._source, key)
        else:
            self._counters.refused += 1

    def _call(self, peer: bytes, call_id: int, request: bytes) -> None:
        if (peer, call_id) in self._calls:
            self._counters.malformed += 1
        elif self._per_caller[peer] >= CALLS_PER_PEER_MAX or len(self._calls) >= CALLS_SERVED_MAX:
            self._counters.refused += 1
            self._refuse(peer, call_id, "too many calls at once")
        else:
            self._per_caller[peer] += 1
            task = self._loop.create_task(self._answer(peer, call_id, request))
            self._calls[peer, call_id] = task
            task.add_done_callback(lambda _: self._answered(peer, call_id))

    async def _answer(self, peer: bytes, call_id: int, request: bytes) -> None:
        try:
            answer = await self._handler(request)
        except KVMeshError as error:
            self._refuse(peer, call_id, str(error))
        except Exception:
            log.exception("the handler of calls failed")
            self._refuse(peer, call_id, "internal error")
        else:
            if len(answer) > MESSAGE_BYTES_MAX:
                log.error("an answer of %d bytes is longer than %d", len(answer), MESSAGE_BYTES_MAX)
                self._refuse(peer, call_id, "internal error")
            else:
                self._send(peer, Answer(MESH_PROTOCOL_VERSION, call_id), answer)

    def _answered(self, peer: bytes, call_id: int) -> None:
        del self._calls[peer, call_id]
        self._per_caller[peer] -= 1
        if not self._per_caller[peer]:
            del self._per_caller[peer]

    def _cancel(self, peer: bytes, request_id: int) -> None:
        task = self._calls.get((peer, request_id))
        if task is not None:
            task.cancel()
        self.lender.end(peer, request_id)

    # --- sending ---------------------------------------------------------------------------------------------------
    def _send_bulk(self, peer: bytes, parts: Sequence[Buffer]) -> None:
        self._socket.send([peer, *parts], copy=False)

    def _send(self, peer: bytes, message: Message, *payload: bytes) -> None:
        try:
            self._socket.send([peer, encode(message), *payload])
        except zmq.Again:
            self._counters.refused += 1  # the peer does not read: its own timeout tells it
        except zmq.ZMQError:
            self._forget(peer)

    def _refuse(self, peer: bytes, request_id: int, text: str) -> None:
        self._send(peer, Refusal(MESH_PROTOCOL_VERSION, request_id, text[:REFUSAL_CHARS_MAX]))

    # --- peers that go ---------------------------------------------------------------------------------------------
    def _forget(self, peer: bytes) -> None:
        self.lender.forget(peer)
        for caller, call_id in list(self._calls):
            if caller == peer:
                self._calls[caller, call_id].cancel()

    def _probe_soon(self, _: bool) -> None:
        self._lost_one = True
        if self._probe is None:
            self._probe = self._loop.call_later(PROBE_DELAY_S, self._probe_all)

    def _probe_all(self) -> None:
        if self._probe is not None:
            self._probe.cancel()
            self._probe = None
        for peer in {*self.lender.readers, *self._per_caller}:
            self._send(peer, Alive(MESH_PROTOCOL_VERSION, 0))

    def _sweep(self) -> None:
        self._sweeper = self._loop.call_later(SWEEP_INTERVAL_S, self._sweep)
        self.lender.sweep()
        self._suspects.clear()
        if self._lost_one:  # once more, in case that the first look came too early
            self._lost_one = False
            self._probe_all()
