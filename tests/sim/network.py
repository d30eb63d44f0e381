"""A network in virtual time: packets, and messages over the mesh's connections, that get lost, doubled, late,
reordered, or cut off in one direction. Streams are in `tests.sim.streams`. Everything is drawn from one seeded random
source.

Two things travel here:

    packets       what the gossip says, from endpoint to endpoint. Values pass by reference; with a `Wire` they pass as
                  the bytes that would travel, through the product's own codec
    mesh messages what followers (and the static membership) say, from mesh address to mesh address, always as bytes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from kvmesh.discovery.swim.events import PacketCame
from kvmesh.discovery.wire.messages import Endpoint, Message
from kvmesh.transport.errors import ProtocolError
from tests.sim.clockwork import Clockwork

if TYPE_CHECKING:
    from tests.sim.process import Node
    from tests.sim.wire import Wire

UDP_IP_BYTES = 28
"""What every packet costs beside its content."""


@dataclass(slots=True)
class Weather:
    """What happens to a message."""

    loss: float = 0.0
    duplication: float = 0.0
    delay_s: float = 0.001
    """The usual one way delay: between half of it and twice of it."""
    late: float = 0.0
    """The share of messages that take up to `late_s` longer: they are overtaken."""
    late_s: float = 1.0
    forgotten: float = 0.0
    """The share of streams whose end nobody is told of: a broken driver."""


class Network:
    """Addresses, and the ways between them."""

    def __init__(self, clockwork: Clockwork, random: Random, weather: Weather, wire: Wire | None = None) -> None:
        self.weather = weather
        self.wire = wire
        self.cut: set[tuple[bytes, bytes]] = set()
        """(from, to) pairs of hosts that nothing passes between."""
        self.down: set[bytes] = set()
        """Hosts that do not even refuse: they are off."""
        self.sent = 0
        """Packets and mesh messages."""
        self.unreadable = 0
        """Packets that the codec refused."""
        self.overflowed = 0
        """Packets that found the socket's buffer of a stopped process full."""
        self.largest_packet_bytes = 0
        self.tap: Callable[[Node, tuple[Message, ...]], None] | None = None
        """Sees all packets that are sent."""
        self.clockwork = clockwork
        self.random = random
        self.draw = random.random
        self.sockets: dict[Endpoint, Node] = {}
        self._meshes: dict[str, Node] = {}

    def attach(self, node: Node) -> None:
        """A process listens."""
        self.down.discard(node.ip)
        self.sockets[node.endpoint] = node
        self._meshes[node.address] = node

    def detach(self, node: Node, *, host_up: bool = True) -> None:
        """It does not any more."""
        if self.sockets.get(node.endpoint) is node:
            del self.sockets[node.endpoint]
            del self._meshes[node.address]
            if not host_up:
                self.down.add(node.ip)

    def split(self, ones: Sequence[bytes], others: Sequence[bytes]) -> None:
        """Nothing passes between two groups of hosts."""
        self.cut |= {pair for one in ones for other in others for pair in ((one, other), (other, one))}

    def delay_s(self) -> float:
        """How long the next message is on its way."""
        weather, draw = self.weather, self.draw
        delay_s = weather.delay_s * (0.5 + 1.5 * draw())
        if weather.late and draw() < weather.late:
            delay_s += draw() * weather.late_s
        return delay_s

    # --- packets -------------------------------------------------------------------------------------------------

    def send(self, node: Node, target: Endpoint, messages: tuple[Message, ...], crc: bool) -> None:
        """`node` sends one packet."""
        self.sent += 1
        weather, draw, clockwork = self.weather, self.draw, self.clockwork
        content: PacketCame | bytes | None = None
        if self.tap is not None:
            self.tap(node, messages)
        if self.wire is not None:
            data = self.wire.packet(messages, crc)
            node.sent_bytes += self.wire.packet_bytes + UDP_IP_BYTES
            self.largest_packet_bytes = max(self.largest_packet_bytes, self.wire.packet_bytes)
            content = data
        if draw() < weather.loss:
            return
        if content is None:
            content = PacketCame(node.endpoint, messages)
        clockwork.at(clockwork.now + self.delay_s(), self._arrive, node, target, content)
        if weather.duplication and draw() < weather.duplication:
            clockwork.at(clockwork.now + self.delay_s(), self._arrive, node, target, content)

    def _arrive(self, source: Node, target: Endpoint, content: PacketCame | bytes) -> None:
        node = self.sockets.get(target)
        if node is None or (self.cut and (source.ip, node.ip) in self.cut):
            return
        if isinstance(content, bytes):
            assert self.wire is not None
            try:
                content = PacketCame(source.endpoint, self.wire.opened(content))
            except ProtocolError:
                self.unreadable += 1
                return
        node.on_packet(content)

    # --- mesh messages -------------------------------------------------------------------------------------------

    def request(self, source: Node, target: str, call: int, data: bytes) -> None:
        """A question of `source`, numbered by it."""
        self._carry(source, target, "on_request", (source.address, call, data))

    def answer(self, source: Node, target: str, call: int, data: bytes) -> None:
        """The answer to it."""
        self._carry(source, target, "on_answer", (call, data))

    def _carry(self, source: Node, target: str, method: str, arguments: tuple[object, ...]) -> None:
        weather, draw = self.weather, self.draw
        self.sent += 1
        copies = 2 if draw() < weather.duplication else 1
        for _ in range(copies):
            if draw() >= weather.loss:
                self.clockwork.after(self.delay_s(), self._hand_over, source, target, method, arguments)

    def _hand_over(self, source: Node, target: str, method: str, arguments: tuple[object, ...]) -> None:
        node = self._meshes.get(target)
        if node is not None and (source.ip, node.ip) not in self.cut:
            node.when_running(getattr(node, method), *arguments)
