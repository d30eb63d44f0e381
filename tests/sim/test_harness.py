"""The simulator's own parts: its clock, its network, its streams."""

from __future__ import annotations

from random import Random

import pytest

from kvmesh.discovery.actions import Action, Event, Wake
from kvmesh.discovery.membership import Conflict, Member, Membership
from kvmesh.discovery.swim.events import (
    AnswerPull,
    Exchange,
    Exchanged,
    PacketCame,
    Pulled,
    SendPacket,
    SendUser,
    StreamFailed,
    StreamPing,
    StreamPinged,
    SwimEvent,
    UserCame,
)
from kvmesh.discovery.wire.messages import Endpoint, Nack, Ping, PushPull
from tests.sim.clockwork import Clockwork
from tests.sim.measures import Spread, quantile
from tests.sim.network import Network, Weather
from tests.sim.process import SOCKET_BUFFER_PACKETS, Node, Start, ip_of
from tests.sim.wire import Counted, Encoded, Wire


class _Recorder:
    """A membership that does what it is told, and remembers what it got."""

    def __init__(self) -> None:
        self.got: list[tuple[float, object]] = []
        self.to_do: list[Action] = []

    def members(self) -> list[Member]:
        return []

    def member(self, name: str) -> Member | None:
        return None

    def conflicts(self) -> list[Conflict]:
        return []

    def handle(self, event: Event | SwimEvent, now: float) -> list[Action]:
        self.got.append((now, event))
        if isinstance(event, Pulled):
            return [AnswerPull(event.token, PushPull(False, (), b"theirs"))]
        actions, self.to_do = self.to_do, []
        return actions


class _World:
    """Two processes, `a` and `b`."""

    def __init__(self, weather: Weather | None = None, wire: Wire | None = None) -> None:
        self.clockwork = Clockwork()
        self.network = Network(self.clockwork, Random(1), weather or Weather(), wire)
        self.recorders = [_Recorder(), _Recorder()]
        self.a, self.b = (self._node(number) for number in range(2))

    def _node(self, number: int) -> Node:
        def kind(node: Node, random: Random) -> Membership:
            return self.recorders[number]

        start = Start("ab"[number], 1, ip_of(number + 1))
        node = Node(start, kind, self.network, Random(2), lambda viewer, event: None)
        node.begin()
        self.recorders[number].got.clear()
        return node

    def do(self, *actions: Action) -> None:
        """`a` does it, and then a minute passes."""
        self.recorders[0].to_do += actions
        self.a.change_head()
        self.recorders[0].got.clear()
        self.clockwork.run_for(60.0)

    def got(self, number: int) -> list[object]:
        return [event for _, event in self.recorders[number].got]


def test_the_clockwork_runs_in_the_order_of_time() -> None:
    clockwork, seen = Clockwork(), list[str]()
    clockwork.after(2.0, seen.append, "late")
    clockwork.after(1.0, lambda: clockwork.at(0.0, seen.append, "now"))
    clockwork.run_for(1.0)
    assert seen == ["now"]
    assert clockwork.run_until_true(lambda: len(seen) == 2, within_s=5.0)
    assert seen == ["now", "late"]
    assert not clockwork.run_until_true(lambda: False, within_s=5.0)


def test_quantiles() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([3.0, 1.0, 2.0], 0.99) == 3.0
    assert quantile([], 0.5) != quantile([], 0.5)


def test_the_time_until_a_share_knows() -> None:
    spread = Spread(0.0, 200, [number / 100 for number in range(199)])
    assert spread.until(0.5) == pytest.approx(0.99)
    assert spread.until(0.99) == pytest.approx(1.97)
    assert spread.until(1.0) == float("inf")


@pytest.mark.parametrize("wire", [None, Counted(encrypted=True), Encoded(), Encoded(key=bytes(16))])
def test_a_packet_arrives(wire: Wire | None) -> None:
    world = _World(wire=wire)
    world.do(SendPacket(world.b.endpoint, (Nack(7), Nack(8)), crc=True))
    assert world.got(1) == [PacketCame(world.a.endpoint, (Nack(7), Nack(8)))]
    assert (world.a.sent_bytes > 28) == (wire is not None)


def test_what_is_counted_is_what_travels() -> None:
    for crc in (False, True):
        for messages in ((Nack(7),), (Nack(7), Ping(1, "b"))):
            for key in (None, bytes(16)):
                counted, encoded = Counted(encrypted=key is not None), Encoded(key=key)
                counted.packet(messages, crc)
                assert len(encoded.packet(messages, crc)) <= counted.packet_bytes <= encoded.packet_bytes + 16


def test_packets_get_lost_doubled_and_cut_off() -> None:
    packets = [SendPacket(Endpoint(ip_of(2), 7946), (Nack(number),)) for number in range(400)]
    world = _World(Weather(loss=0.3))
    world.do(*packets)
    assert 220 < len(world.got(1)) < 340
    world = _World(Weather(duplication=0.5))
    world.do(*packets)
    assert 540 < len(world.got(1)) < 660
    world = _World(Weather(late=0.5))
    world.do(*packets)
    numbers = [event.messages[0].seq for event in world.got(1)]  # type: ignore[attr-defined]
    assert sorted(numbers) == list(range(400)) != numbers
    world = _World()
    world.network.cut.add((world.b.ip, world.a.ip))
    world.do(packets[0])
    assert len(world.got(1)) == 1
    world.network.cut.add((world.a.ip, world.b.ip))
    world.do(packets[0])
    assert len(world.got(1)) == 1


def test_packets_for_a_stopped_process_wait_in_a_bounded_buffer() -> None:
    world = _World()
    world.b.stop()
    world.do(*[SendPacket(world.b.endpoint, (Nack(number),)) for number in range(SOCKET_BUFFER_PACKETS + 10)])
    assert world.got(1) == []
    world.b.resume()
    assert len(world.got(1)) == SOCKET_BUFFER_PACKETS
    assert world.network.overflowed == 10


@pytest.mark.parametrize("wire", [None, Counted(), Encoded(key=bytes(16))])
def test_streams_carry_a_question_and_its_answer(wire: Wire | None) -> None:
    world = _World(wire=wire)
    ours = PushPull(True, (), b"ours")
    world.do(
        Exchange(1, world.b.endpoint, ours, 5.0),
        StreamPing(2, world.b.endpoint, Ping(2, "b"), 5.0),
        SendUser(3, world.b.endpoint, b"word", 5.0),
    )
    pulled = next(event for event in world.got(1) if isinstance(event, Pulled))
    assert (pulled.state, pulled.source.ip) == (ours, world.a.ip)
    assert pulled.source.port != world.a.endpoint.port
    assert [event.payload for event in world.got(1) if isinstance(event, UserCame)] == [b"word"]
    assert Exchanged(1, PushPull(False, (), b"theirs")) in world.got(0)
    assert StreamPinged(2) in world.got(0)
    assert not world.b.tokens


def _stream_fails(world: _World, reason: str, *, name: str = "b") -> float:
    """When, after the beginning, the stream ping failed for this reason."""
    at = world.clockwork.now
    world.do(StreamPing(2, world.b.endpoint, Ping(2, name), 5.0))
    (when, event), *more = world.recorders[0].got
    assert event == StreamFailed(2, reason)
    assert not more
    return when - at


def test_streams_fail() -> None:
    assert _stream_fails(_World(), "closed without an answer", name="somebody else") < 0.1
    world = _World()
    world.b.crash()
    assert _stream_fails(world, "connection refused") < 0.1
    world = _World()
    world.b.crash(host_up=False)
    assert _stream_fails(world, "timed out") == pytest.approx(5.0)
    world = _World()
    world.network.cut.add((world.b.ip, world.a.ip))
    assert _stream_fails(world, "timed out") == pytest.approx(5.0)
    world = _World()
    world.b.stop()
    assert _stream_fails(world, "timed out") == pytest.approx(5.0)


def test_lost_segments_cost_time() -> None:
    world = _World(Weather(loss=0.3))
    took = []
    for number in range(200):
        begin = world.clockwork.now
        world.do(Exchange(number, world.b.endpoint, PushPull(False, (), bytes(20_000)), 50.0))
        took += [when - begin for when, event in world.recorders[0].got if isinstance(event, Exchanged)]
    assert 170 < len(took) < 200
    assert quantile(took, 0.1) > 0.2
    assert 0.5 < quantile(took, 0.5) < 5.0


def test_a_machine_that_wants_a_tick_now_for_ever_is_caught() -> None:
    class Restless(_Recorder):
        def handle(self, event: Event | SwimEvent, now: float) -> list[Action]:
            return [Wake(now)]

    world = _World()
    node = Node(Start("c", 1, ip_of(9)), lambda node, random: Restless(), world.network, Random(1), lambda *_: None)
    node.begin()
    with pytest.raises(AssertionError, match="again and again"):
        world.clockwork.run_for(1.0)
