"""The serving end over ZeroMQ: what peers call and read at the node's port.

It takes each message apart, counts and drops what is malformed, runs the handler of calls (a bounded number of
tasks), and hands reads to the `Lender`. A reader or caller is known by its connection, as the `Port` names it, so
nobody can act on another's requests; when the connection is lost, all of them end. Runs on the loop.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from typing import Final

from .counters import Counters
from .errors import KVMeshError
from .frames import (
    Answer,
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
from .zmq_port import FullError, GoneError, Port

log = logging.getLogger(__name__)

SWEEP_INTERVAL_S: Final = 1.0


class Server:
    """What this node does for its peers."""

    def __init__(
        self, listening: socket.socket, source: ChunkSource | None, handler: CallHandler, counters: Counters
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._source = source
        self._handler = handler
        self._counters = counters
        self._calls: dict[tuple[bytes, int], asyncio.Task[None]] = {}
        self._per_caller: Counter[bytes] = Counter()
        self._suspects: Counter[bytes] = Counter()  # of each reader, since the last sweep
        self._port = Port(listening, self._receive, self._forget, counters)
        self.lender = Lender(source, self._port.send, counters, self._refuse)
        self._sweeper = self._loop.call_later(SWEEP_INTERVAL_S, self._sweep)

    async def close(self) -> None:
        """Stop: calls are cancelled, reads end, and the port is free. Loans go back as the last bytes are let go of."""
        self._sweeper.cancel()
        self.lender.close()
        tasks = list(self._calls.values())
        await self._port.close()  # it hears no more from here on
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    # --- messages --------------------------------------------------------------------------------------------------
    def _receive(self, peer: bytes, parts: list[bytes]) -> None:
        try:
            message, payload = to_holder(parts)
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
    def _send(self, peer: bytes, message: Message, *payload: bytes) -> None:
        try:
            self._port.send(peer, [encode(message), *payload])
        except FullError:
            self._counters.refused += 1  # the peer does not read: its own timeout tells it
        except GoneError:
            pass

    def _refuse(self, peer: bytes, request_id: int, text: str) -> None:
        self._send(peer, Refusal(MESH_PROTOCOL_VERSION, request_id, text[:REFUSAL_CHARS_MAX]))

    # --- peers that go ---------------------------------------------------------------------------------------------
    def _forget(self, peer: bytes) -> None:
        self.lender.forget(peer)
        for caller, call_id in list(self._calls):
            if caller == peer:
                self._calls[caller, call_id].cancel()

    def _sweep(self) -> None:
        self._sweeper = self._loop.call_later(SWEEP_INTERVAL_S, self._sweep)
        self.lender.sweep()
        self._suspects.clear()
