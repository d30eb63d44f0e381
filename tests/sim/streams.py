"""Streams in virtual time: a connection for one question and its answer, as TCP would carry them.

    connect   a lost SYN, or its answer, costs 1 s, then 2 s, 4 s, …
    data      lost segments are sent again after 200 ms, then 400 ms, … (without fast retransmission and congestion
              window: kinder than TCP for many segments, harsher for few)
    refused   at once, when the host is up and the process dead
    nothing   when the host is off, or cut off in either direction: until the timeout
    stopped   the kernel of a stopped process accepts and acknowledges; it answers when it runs again

A stream ping is answered by the harness, as the product's driver answers it: the protocol core never sees it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from kvmesh.discovery.swim.events import (
    AnswerPull,
    Exchange,
    Exchanged,
    Pulled,
    RefusePull,
    SendUser,
    StreamFailed,
    StreamPing,
    StreamPinged,
    SwimEvent,
    UserCame,
)
from kvmesh.discovery.wire.messages import Ack, Endpoint, ErrorReply, Message, Ping, PushPull, User
from tests.sim.network import Network
from tests.sim.wire import guessed_stream_bytes

if TYPE_CHECKING:
    from tests.sim.process import Node

SYN_TIMEOUT_S = 1.0
DATA_TIMEOUT_S = 0.2
SEGMENT_BYTES = 1448
SEGMENT_OVERHEAD_BYTES = 40
HANDSHAKE_BYTES = 7 * SEGMENT_OVERHEAD_BYTES
"""Three packets to open, four to close."""
EPHEMERAL_PORT = 40_000
"""Streams come from some port, never from the one that the peer listens on."""
STREAMS_WAITING_MAX = 128
"""Connections that the kernel accepts for a stopped process."""


class Stream:
    """One connection, opened by `opener`."""

    __slots__ = ("_network", "action", "attempts", "is_over", "opener", "server", "token")

    def __init__(self, network: Network, opener: Node, action: Exchange | StreamPing | SendUser) -> None:
        self._network = network
        self.opener = opener
        self.action = action
        self.attempts = 0
        self.is_over = False
        """For the opener: it has got its answer, or has given up."""
        self.server: Node | None = None
        self.token = 0
        network.clockwork.after(action.timeout_s, self._fail, "timed out")
        self._connect()

    # --- the opener's way out ------------------------------------------------------------------------------------

    def _connect(self) -> None:
        if self.is_over or not self.opener.running:
            return
        network, ip = self._network, self.action.target.ip
        if self._is_cut(ip) or ip in network.down or self._is_lost() or self._is_lost():
            wait_s = SYN_TIMEOUT_S * 2.0**self.attempts
            self.attempts += 1
            network.clockwork.after(wait_s, self._connect)
            return
        round_trip_s = network.delay_s() + network.delay_s()
        if self.action.target not in network.sockets:
            network.clockwork.after(round_trip_s, self._fail, "connection refused")
            return
        network.clockwork.after(round_trip_s, self._say)

    def _say(self) -> None:
        if self.is_over or not self.opener.running:
            return
        content, size = self._content(_question(self.action), answer=False)
        self.opener.sent_bytes += _stream_bytes(size) + HANDSHAKE_BYTES // 2
        self._carry(_segments(size), DATA_TIMEOUT_S, self._at_server, content)

    def _at_server(self, content: Message | bytes) -> None:
        node = self._network.sockets.get(self.action.target)
        if node is None:
            self._fail("connection reset")
        elif node.streams_waiting < STREAMS_WAITING_MAX:
            self.server = node
            node.streams_waiting += 1
            node.when_running(self._serve, content)

    def _serve(self, content: Message | bytes) -> None:
        node = self.server
        assert node is not None
        node.streams_waiting -= 1
        message = self._message(content, answer=False)
        source = Endpoint(self.opener.ip, EPHEMERAL_PORT + self.action.number % 20_000)
        match message:
            case PushPull():
                self.token = node.open_token(self)
                node.feed(Pulled(self.token, source, message))
            case Ping() if message.node == node.name:
                self.reply(Ack(message.seq))
            case Ping():
                self._carry(1, DATA_TIMEOUT_S, self._closed, None)
            case User():
                node.feed(UserCame(source, message.payload))
                self.is_over = True
            case _:
                raise AssertionError(message)

    # --- and the server's way back -------------------------------------------------------------------------------

    def reply(self, message: Message) -> None:
        """The server's answer."""
        assert self.server is not None
        content, size = self._content(message, answer=True)
        self.server.sent_bytes += _stream_bytes(size) + HANDSHAKE_BYTES // 2
        self._carry(_segments(size), DATA_TIMEOUT_S, self._at_opener, content)

    def _at_opener(self, content: Message | bytes) -> None:
        if self.opener.running:
            self.opener.when_running(self._finish, content)

    def _finish(self, content: Message | bytes) -> None:
        # Answers after the timeout are passed on as well: the machine must not mind.
        number, message = self.action.number, self._message(content, answer=True)
        match message:
            case PushPull():
                self._tell(Exchanged(number, message))
            case Ack(seq) if isinstance(self.action, StreamPing) and seq == self.action.ping.seq:
                self._tell(StreamPinged(number))
            case ErrorReply(text):
                self._tell(StreamFailed(number, f"refused: {text}"))
            case _:
                raise AssertionError(message)

    def _closed(self, _: object) -> None:
        self._fail("closed without an answer")

    def _fail(self, reason: str) -> None:
        if self.is_over or not self.opener.running:
            return
        self.is_over = True
        self.opener.when_running(self._tell, StreamFailed(self.action.number, reason))

    def _tell(self, event: SwimEvent) -> None:
        weather, draw = self._network.weather, self._network.draw
        if weather.forgotten and draw() < weather.forgotten:
            self.is_over = True
            return
        self.is_over = True
        self.opener.feed(event)

    # --- small things --------------------------------------------------------------------------------------------

    def _content(self, message: Message, *, answer: bool) -> tuple[Message | bytes, int]:
        wire = self._network.wire
        return (message, guessed_stream_bytes(message)) if wire is None else wire.stream(message, answer=answer)

    def _message(self, content: Message | bytes, *, answer: bool) -> Message:
        wire = self._network.wire
        return wire.read(content, answer=answer) if wire is not None else cast(Message, content)

    def _is_cut(self, ip: bytes) -> bool:
        cut, own = self._network.cut, self.opener.ip
        return bool(cut) and ((own, ip) in cut or (ip, own) in cut)

    def _is_lost(self) -> bool:
        return self._network.draw() < self._network.weather.loss

    def _carry(self, segments: int, timeout_s: float, arrive: Callable[..., None], content: object) -> None:
        """Either way: until every segment is there."""
        network = self._network
        lost = segments
        if not self._is_cut(self.action.target.ip) and self.action.target.ip not in network.down:
            lost = sum(self._is_lost() for _ in range(segments)) if network.weather.loss else 0
        if not lost:
            network.clockwork.after(network.delay_s(), arrive, content)
        elif timeout_s < self.action.timeout_s * 4:
            network.clockwork.after(timeout_s, self._carry, lost, timeout_s * 2, arrive, content)


def answer(stream: Stream, action: AnswerPull | RefusePull) -> None:
    """The core's answer to `Pulled`."""
    stream.reply(action.state if isinstance(action, AnswerPull) else ErrorReply(action.reason))


def _question(action: Exchange | StreamPing | SendUser) -> Message:
    match action:
        case Exchange():
            return action.state
        case StreamPing():
            return action.ping
        case SendUser():
            return User(action.payload)


def _segments(size: int) -> int:
    return 1 + (size - 1) // SEGMENT_BYTES


def _stream_bytes(size: int) -> int:
    return size + _segments(size) * SEGMENT_OVERHEAD_BYTES
