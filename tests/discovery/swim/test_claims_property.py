"""What holds whatever is said, in whatever order: views that agree, incarnations that never go back, the departed that
stay away, tables that keep their bounds, and messages of any kind that never raise."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.discovery.actions import Event, Started, Ticked, Wake
from kvmesh.discovery.gossip import GossipMembership
from kvmesh.discovery.head import Head
from kvmesh.discovery.messages import Identity
from kvmesh.discovery.swim import base, probing
from kvmesh.discovery.swim.events import (
    AnswerPull,
    Exchange,
    Exchanged,
    PacketCame,
    Pulled,
    Resolved,
    SendPacket,
    StreamFailed,
    StreamPing,
    StreamPinged,
    UserCame,
)
from kvmesh.discovery.swim.machine import Swim
from kvmesh.discovery.swim.profile import KVMESH_LAN
from kvmesh.discovery.wire import codec
from kvmesh.discovery.wire.errors import WireError
from kvmesh.discovery.wire.messages import (
    Ack,
    Alive,
    Dead,
    IndirectPing,
    Message,
    Nack,
    Ping,
    PushedNode,
    PushedState,
    PushPull,
    Suspect,
    User,
)
from kvmesh.discovery.wire.streams import StreamCodec
from kvmesh.transport.limits import CONFLICTS_MAX, JOIN_DIALS_MAX
from tests.discovery.swim.support import STRANGER, Lone, accusation, alive, at, death, departure, pushed

ALIVE, SUSPECT, DEAD, LEFT = PushedState
NAMES = ["n2", "n3", "n4"]

# --- (a) and (b): the order ------------------------------------------------------------------------------------------

CLAIM = st.tuples(st.sampled_from(NAMES), st.sampled_from(PushedState), st.integers(1, 6))
"""Who, what, in which incarnation."""


def message_of(claim: tuple[str, PushedState, int]) -> Message:
    name, state, incarnation = claim
    return (alive, accusation, lambda *told: death(*told, accuser="n9"), departure)[state](name, incarnation)


def view_of(lone: Lone) -> dict[str, tuple[int, str] | None]:
    return {name: lone.view(name) for name in NAMES}


def knowing_all() -> Lone:
    lone = Lone()
    lone.hear(*(alive(name, 1) for name in NAMES))
    return lone


@given(st.lists(CLAIM, max_size=12).flatmap(lambda claims: st.tuples(st.just(claims), st.permutations(claims))))
def test_views_that_heard_the_same_are_the_same(orders: tuple[list[tuple[str, PushedState, int]], ...]):
    views = []
    for claims in orders:
        lone = knowing_all()
        for claim in claims:
            lone.hear(message_of(claim))
        views.append(view_of(lone))
    for name in NAMES:
        told = [(1, ALIVE), *((incarnation, state) for who, state, incarnation in orders[0] if who == name)]
        incarnation, state = max(told)
        assert views[0][name] == views[1][name] == (incarnation, state.name)


@given(
    st.lists(st.tuples(CLAIM, st.booleans()), max_size=12).flatmap(
        lambda claims: st.tuples(st.just(claims), st.permutations(claims))
    )
)
def test_also_when_some_of_it_came_by_push_pull(orders: tuple[list[tuple[tuple[str, PushedState, int], bool]], ...]):
    """A peer's dead are suspects here, until the suspicion is over: in that one point order matters for a while."""
    views = []
    for claims in orders:
        lone = knowing_all()
        for claim, in_a_push_pull in claims:
            if in_a_push_pull:
                lone.pull(pushed(claim[0], claim[2], claim[1]))
            else:
                lone.hear(message_of(claim))
        assert lone.view("n1") == (1, "ALIVE")
        for name in NAMES:
            if (suspicion := lone.node(name).suspicion) is not None:
                lone.swim._beliefs.on_dead(Dead(lone.node(name).incarnation, name, "n1"), suspicion.deadline)
        views.append(view_of(lone))
    assert views[0] == views[1]


ANY_WORD = st.one_of(
    CLAIM.map(message_of),
    st.builds(
        lambda name, incarnation, place, start: alive(name, incarnation, at(place), b"%d" % start),
        st.sampled_from(["n1", *NAMES]),
        st.integers(0, 8),
        st.sampled_from([1, 2, 3, 4, 50, 51]),
        st.integers(0, 3),
    ),
    st.builds(accusation, st.sampled_from(["n1", *NAMES]), st.integers(0, 8), st.sampled_from(["n1", *NAMES, "n9"])),
    st.builds(Dead, st.integers(0, 8), st.sampled_from(["n1", *NAMES]), st.sampled_from(["n1", *NAMES, "n9"])),
)
ANY_PUSHED = st.builds(
    lambda name, incarnation, state, place, start: pushed(name, incarnation, state, at(place), b"%d" % start),
    st.sampled_from(["n1", *NAMES]),
    st.integers(0, 8),
    st.sampled_from(PushedState),
    st.sampled_from([1, 2, 3, 4, 50, 51]),
    st.integers(0, 3),
)
HAPPENING = st.one_of(
    st.lists(ANY_WORD, min_size=1, max_size=4).map(tuple),
    st.lists(ANY_PUSHED, min_size=1, max_size=4).map(lambda nodes: PushPull(False, tuple(nodes))),
    st.sampled_from([0.1, 1.0, 40.0]),
    st.just("a pause"),
)


def happen(lone: Lone, what: tuple[Message, ...] | PushPull | float | str) -> None:
    match what:
        case tuple():
            lone.hear(*what)
        case PushPull():
            lone.pull(*what.nodes)
        case float():
            lone.run(what)
        case _:
            lone.sleep(60.0)


@pytest.mark.slow  # long streams of messages, a hundred times
@given(st.lists(HAPPENING, max_size=20))
def test_incarnations_never_go_back(happenings: list[object]):
    lone = knowing_all()
    for what in happenings:
        before = {node.name: node.incarnation for node in lone.swim.table}
        happen(lone, what)  # type: ignore[arg-type]
        for node in lone.swim.table:
            assert node.incarnation >= before[node.name]
            assert (node.state is SUSPECT) == (node.suspicion is not None)
        assert lone.view("n1") == (lone.swim.own.incarnation, "ALIVE")
        assert lone.swim.table.there == sum(not node.is_gone for node in lone.swim.table)


# --- (c): the departed -----------------------------------------------------------------------------------------------


@st.composite
def anything_old(draw: st.DrawFn) -> tuple[Message, ...] | PushPull | float | str:
    """Whatever may happen, but for a louder word about n3, and a later start of it."""

    def is_old(name: str, incarnation: int, meta: bytes) -> bool:
        return name != "n3" or (incarnation <= 5 and meta <= b"2")

    what = draw(HAPPENING)
    if isinstance(what, tuple):
        return tuple(one for one in what if is_old(one.node, one.incarnation, getattr(one, "meta", b"2")))  # type: ignore[attr-defined]
    if isinstance(what, PushPull):
        return PushPull(False, tuple(one for one in what.nodes if is_old(one.name, one.incarnation, one.meta)))
    return what


@pytest.mark.slow  # long streams of messages, a hundred times
@given(st.lists(anything_old(), max_size=20), st.lists(anything_old(), max_size=20))
def test_who_left_does_not_come_back_by_what_was_said_before(
    before: list[tuple[Message, ...] | PushPull | float | str],
    after: list[tuple[Message, ...] | PushPull | float | str],
):
    lone = knowing_all()
    lone.hear(alive("n3", 5, meta=b"2"))
    for what in before:
        happen(lone, what)
    lone.hear(departure("n3", 5))
    assert lone.view("n3") == (5, "LEFT")
    for what in after:
        happen(lone, what)
        assert lone.view("n3") == (5, "LEFT")


# --- (d) and (f): anything at all ------------------------------------------------------------------------------------

NAME = st.one_of(
    st.sampled_from(["n1", "n2", "n3", "n4", "x" * 128]),
    st.integers(0, 40).map(lambda number: f"m{number}"),
    st.text(max_size=6),
)
IP = st.one_of(
    st.sampled_from([at(1).ip, at(2).ip, at(3).ip, bytes(16)]), st.binary(min_size=4, max_size=4), st.just(b"")
)
PORTS = st.one_of(st.sampled_from([7946, 7946, 1, 65535]), st.integers(0, 65535))
NUMBER = st.one_of(st.integers(0, 8), st.integers(0, (1 << 32) - 1), st.just((1 << 32) - 1))
IDENTITY = Identity("n1", "agent", 5, "10.0.0.1:7000", {})


def meta_like() -> st.SearchStrategy[bytes]:
    """Ours, Serf's, and bytes of anybody."""
    ours = fresh_membership(0).swim.own.meta
    serf = b"\xff\x82\xa4role\xa4serf\xa2dc\xa4east"
    broken = ours.replace(b"mesh_port", b"mesh_pork")
    return st.one_of(st.sampled_from([ours, serf, broken, b"", b"1"]), st.binary(max_size=40), st.binary(max_size=512))


def payload_like() -> st.SearchStrategy[bytes]:
    """Heads, words of Serf, keys, and bytes of anybody."""
    heads = st.builds(
        lambda name, epoch, seq: b"KH" + Head(name, epoch, seq, 1, 1).to_bytes(),
        st.sampled_from([bytes(16), b"i" * 16]),
        st.integers(0, 1 << 63),
        st.integers(0, 1 << 63),
    )
    intents = st.builds(
        lambda kind, number, name: bytes([kind, 0x82]) + b"\xa5LTime" + bytes([number]) + b"\xa4Node" + name,
        st.integers(0, 1),
        st.integers(0, 127),
        st.sampled_from([b"\xa2n1", b"\xa2n2", b"\xa1s"]),
    )
    prefixed = st.builds(
        bytes.__add__, st.sampled_from([b"KH", b"KK", b"KK\x01", b"\x00", b"\x02"]), st.binary(max_size=80)
    )
    return st.one_of(heads, intents, prefixed, st.binary(max_size=300))


def fresh_membership(seed: int) -> GossipMembership:
    return GossipMembership(
        IDENTITY,
        at(1),
        head=lambda: Head(b"i" * 16, 5, 1, 1, 1),
        random=Random(seed),
        seeds=["seed:1"],
        known=[at(2), at(77)],
    )


PACKET_MESSAGE = st.one_of(
    st.builds(Ping, NUMBER, NAME, IP, PORTS, NAME),
    st.builds(IndirectPing, NUMBER, IP, PORTS, NAME, st.booleans(), IP, PORTS, NAME),
    st.builds(Ack, NUMBER, st.binary(max_size=20)),
    st.builds(Nack, NUMBER),
    st.builds(Suspect, NUMBER, NAME, NAME),
    st.builds(Dead, NUMBER, NAME, NAME),
    st.builds(
        Alive,
        NUMBER,
        NAME,
        IP,
        PORTS,
        meta_like(),
        st.one_of(st.just(b""), st.just(bytes([1, 5, 5, 2, 5, 5])), st.binary(max_size=8)),
    ),
    st.builds(User, payload_like()),
)
PUSHED = st.builds(
    PushedNode,
    NAME,
    IP,
    PORTS,
    meta_like(),
    NUMBER,
    st.integers(0, 3),
    st.sampled_from([b"", bytes([1, 5, 5, 2, 5, 5])]),
)
PUSH_PULL = st.builds(PushPull, st.booleans(), st.lists(PUSHED, max_size=5).map(tuple), payload_like())
ANYTHING = st.one_of(
    st.lists(PACKET_MESSAGE, min_size=1, max_size=5).map(tuple),
    st.lists(PACKET_MESSAGE, min_size=1, max_size=5).map(tuple),
    PUSH_PULL,
    st.tuples(st.just("answer"), PUSH_PULL),
    st.tuples(st.just("user"), payload_like()),
    st.sampled_from(["acked", "stream pinged", "stream failed", "resolved", "a pause"]),
    st.sampled_from([0.0, 0.05, 0.3, 2.0]),
)


def over_the_wire(messages: Sequence[Message]) -> tuple[Message, ...]:
    """As they arrive: those that a peer could not send are left out."""
    arrived = []
    for message in messages:
        try:
            arrived.append(codec.decode(codec.encode(message)))
        except WireError:
            continue
    return tuple(arrived)


def state_over_the_wire(state: PushPull) -> PushPull:
    reader = StreamCodec(None).reader(answer=False)
    try:
        arrived = reader.feed(StreamCodec(None).seal(state, answer=False))
    except WireError:
        return PushPull(False, ())
    assert isinstance(arrived, PushPull)
    return arrived


class Attacked:
    """A membership to which anything may happen; what it sends is put on the wire."""

    def __init__(self) -> None:
        self.membership = fresh_membership(1)
        self.now = 50.0
        self.asked: list[int] = []
        """Numbers of pings that it sent."""
        self.streams: list[int] = []
        self.wake_at = float("inf")
        self.sources = 0
        """Each packet comes from another address."""
        self.feed(Started())

    @property
    def swim(self) -> Swim:
        return self.membership.swim

    def feed(self, event: Event) -> None:
        if self.wake_at <= self.now:
            self.wake_at = float("inf")
        for action in self.membership.handle(event, self.now):
            match action:
                case Wake(when):
                    self.wake_at = when
                case SendPacket(_, messages):
                    assert over_the_wire(messages) == messages, "it sends nothing that a peer could not read"
                    self.asked += [one.seq for one in messages if isinstance(one, Ping)]
                case Exchange(number, _, state, _):
                    self.streams.append(number)
                    assert state_over_the_wire(state) == state
                case AnswerPull(_, state):
                    assert state_over_the_wire(state) == state
                case StreamPing(number):
                    self.streams.append(number)
        assert self.wake_at == self.swim._shared.timers.next_at()

    def happen(self, what: object) -> None:
        match what:
            case ("answer", PushPull() as state):
                if self.streams:
                    self.feed(Exchanged(self.streams.pop(), state_over_the_wire(state)))
            case ("user", bytes(payload)):
                self.feed(UserCame(STRANGER, payload))
            case tuple():
                self.sources += 1
                self.feed(PacketCame(at(300 + self.sources), over_the_wire(what)))
            case PushPull():
                self.feed(Pulled(1, STRANGER, state_over_the_wire(what)))
            case "acked":
                if self.asked:
                    self.feed(PacketCame(STRANGER, (Ack(self.asked[-1]),)))
            case "stream pinged":
                if self.streams:
                    self.feed(StreamPinged(self.streams[-1]))
            case "stream failed":
                if self.streams:
                    self.feed(StreamFailed(self.streams.pop(), "why"))
            case "resolved":
                self.feed(Resolved("seed:1", tuple(at(number) for number in range(2, 100))))
            case "a pause":
                self.now += 60.0
                self.feed(Ticked())
            case float():
                self.run(what)

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self.wake_at <= until:
            self.now = max(self.now, self.wake_at)
            self.feed(Ticked())
        self.now = until

    def check_bounds(self, nodes_max: int, rumours_max: int, relays_max: int) -> None:
        membership, swim = self.membership, self.swim
        shared, prober, exchanger = swim._shared, swim._prober, swim._exchanger
        assert len(swim.table) == len(swim.table._nodes) <= nodes_max
        assert swim.table.there == sum(not node.is_gone for node in swim.table)
        assert len(shared.rumours) <= rumours_max
        assert len(shared.words) <= rumours_max
        assert sum(map(len, shared.rumours._tiers)) == len(shared.rumours)
        assert len(shared.rumours._tiers) <= 64
        assert len(prober._relays) <= relays_max
        assert len(prober._insisted) <= relays_max
        assert len(exchanger._under_way) <= JOIN_DIALS_MAX * 3 + nodes_max
        assert len(exchanger._reasons) <= 4 * JOIN_DIALS_MAX
        assert len(exchanger._resolving) <= 1
        for node in swim.table:
            if node.suspicion is not None:
                assert len(node.suspicion._accusers) <= KVMESH_LAN.suspicion_mult - 2 + 1
        assert len(membership._heads._names) == len([node for node in swim.table if not node.is_gone]) - 1
        assert set(membership._heads._heads) <= {name for name, _ in membership._heads._names.values()}
        assert len(membership.conflicts()) <= CONFLICTS_MAX
        assert len(membership.members()) == len(swim.table) - 1


@pytest.mark.slow  # long streams of messages, a hundred times
@given(st.lists(ANYTHING, max_size=40))
def test_whatever_comes_is_taken_and_fills_no_table(happenings: list[object]):
    """With small bounds, so that they are reached. In the end, all that was set for later comes to an end."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(base, "GOSSIP_NODES_MAX", 6)
        patched.setattr(base, "RUMOURS_MAX", 5)
        patched.setattr(probing, "RELAYS_MAX", 4)
        attacked = Attacked()
        for what in happenings:
            attacked.happen(what)
            attacked.check_bounds(6, 5, 4)
            assert attacked.swim.own.state is ALIVE
        attacked.run(12.0)
        assert not attacked.swim._prober._relays
        assert len(attacked.swim._prober._insisted) <= 4
        assert len(attacked.swim._shared.timers._heap) <= 12 + 60 * len(attacked.swim.table)


def test_a_flood_reaches_every_bound():
    """The test above would show nothing if its bounds were never reached."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(base, "GOSSIP_NODES_MAX", 6)
        patched.setattr(base, "RUMOURS_MAX", 5)
        patched.setattr(probing, "RELAYS_MAX", 4)
        attacked = Attacked()
        for number in range(40):
            name = f"m{number}"
            attacked.happen((
                alive(name, 1, at(2 + number)), accusation("m1", 1, name), accusation("m1", number, name),
                IndirectPing(number, *at(3), "m1", True, *at(4), "m2"), User(b"KH" + bytes(48)),
                alive("m1", 1, at(100 + number)), User(b"\x01\x82\xa5LTime\x05\xa4Node\xa1" + bytes([65 + number])),
            ))  # fmt: skip
            attacked.check_bounds(6, 5, 4)
        counters = attacked.swim.counters
        assert len(attacked.swim.table) == 6
        assert len(attacked.swim._prober._relays) == 4
        assert counters.refused > 0
        assert counters.rumours_dropped > 0
        assert counters.conflicts > 0


def test_what_is_sent_of_anything_that_was_heard_goes_through_the_codec():
    """As a check of `over_the_wire`: it leaves out what cannot travel."""
    assert over_the_wire([Ping(1, "a"), Alive(1, "a", b"123", 1, b"", b""), Suspect(1, "a\n", "b")]) == (Ping(1, "a"),)
