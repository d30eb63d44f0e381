"""One process of the mesh in virtual time: the same classes as in the product, run by events instead of by asyncio.

`Node` runs a membership alone, which is enough for the figures. `Process` runs all of discovery: a journal, followers
and a map beside it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from kvmesh.discovery.actions import (
    Answered,
    Call,
    JournalChanged,
    Lost,
    Notify,
    Refuse,
    Reply,
    Requested,
    Started,
    Stopping,
    Ticked,
    Wake,
)
from kvmesh.discovery.core import Core
from kvmesh.discovery.head import Head, node_id
from kvmesh.discovery.journal import Journal
from kvmesh.discovery.map import ClusterMap
from kvmesh.discovery.membership import Membership
from kvmesh.discovery.messages import Identity, decode_answer, decode_request, encode
from kvmesh.discovery.swim.events import (
    AnswerPull,
    Departed,
    Exchange,
    PacketCame,
    RefusePull,
    Remember,
    Resolve,
    Resolved,
    SendPacket,
    SendUser,
    StreamPing,
)
from kvmesh.discovery.wire.messages import Endpoint
from tests.sim import streams
from tests.sim.network import Network

GOSSIP_PORT = 7946
MESH_PORT = 7900
SOCKET_BUFFER_PACKETS = 256
"""Packets that wait for a stopped process: Linux counts some 800 bytes for each, of 208 KiB."""
TICKS_AT_ONCE_MAX = 1000
RESOLVE_S = 0.01

NEVER = float("inf")
_calls = itertools.count()


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a process: who it is, where, and what it knows of others."""

    name: str
    epoch: int
    ip: bytes
    seeds: Sequence[str] = ()
    known: Sequence[Endpoint] = ()

    @property
    def identity(self) -> Identity:
        return Identity(self.name, "agent", self.epoch, f"{dotted(self.ip)}:{MESH_PORT}")


Kind = Callable[["Node", Random], Membership]
"""Makes the membership of a node."""


def dotted(ip: bytes) -> str:
    """The address as text."""
    return ".".join(map(str, ip))


def ip_of(number: int) -> bytes:
    """The address of the host with this number."""
    return bytes([10, number >> 16 & 255, number >> 8 & 255, number & 255])


class Node:
    """A membership, its timer, and what waits while the process is stopped."""

    def __init__(
        self, start: Start, kind: Kind, network: Network, random: Random, on_notice: Callable[[Node, object], None]
    ) -> None:
        self.start = start
        self.name, self.epoch, self.ip = start.name, start.epoch, start.ip
        self.endpoint = Endpoint(start.ip, GOSSIP_PORT)
        self.address = start.identity.address
        self.running = True
        self.leaving = False
        self.head: Head | None = None
        self.sent_bytes = 0
        self.streams_waiting = 0
        self.remembered: Sequence[Endpoint] = start.known
        self.tokens: dict[int, streams.Stream] = {}
        self.notices = 0
        self._network = network
        self._clockwork = network.clockwork
        self._on_notice = on_notice
        self._stops = 0
        self._waiting: list[tuple[Callable[..., None], tuple[Any, ...]]] = []
        self._packets_waiting = 0
        self._tick_waits = False
        self._wake_at = self._armed_at = NEVER
        self._ticked_at, self._ticks = 0.0, 0
        self._next_token = 0
        self._performers: dict[type, Callable[[Any], None]] = {
            SendPacket: self._send_packet, Wake: self._wake, Notify: self._notify,
            Exchange: self._open_stream, StreamPing: self._open_stream, SendUser: self._open_stream,
            AnswerPull: self._answer_pull, RefusePull: self._answer_pull,
            Resolve: self._resolve, Remember: self._remember, Departed: self._departed,
        }  # fmt: skip
        self.membership = kind(self, random)
        self._handle = self.membership.handle

    def begin(self) -> None:
        """Listen, and start."""
        self._network.attach(self)
        self.feed(Started())

    # --- how it ends ---------------------------------------------------------------------------------------------

    def crash(self, *, host_up: bool = True) -> None:
        """Gone without a word. Packets that it sent are still under way."""
        self.running = False
        self._waiting.clear()
        self._network.detach(self, host_up=host_up)

    def leave(self) -> None:
        """Stop in good order: it lasts until the membership says `Departed`."""
        if not self.leaving:
            self.leaving = True
            self.feed(Stopping())

    # --- events --------------------------------------------------------------------------------------------------

    def feed(self, event: object) -> None:
        """Pass one event to the machine, and perform what it says."""
        if not self.running:
            return
        performers = self._performers
        for action in self._handle(event, self._clockwork.now):  # type: ignore[arg-type]
            performers[type(action)](action)
        self._arm()

    def on_packet(self, event: PacketCame) -> None:
        """A packet is in the socket's buffer."""
        if not self._stops:
            self.feed(event)
        elif self._packets_waiting < SOCKET_BUFFER_PACKETS:
            self._packets_waiting += 1
            self._waiting.append((self.feed, (event,)))
        else:
            self._network.overflowed += 1

    def change_head(self) -> Head:
        """The journal has one more entry."""
        seq = 1 if self.head is None else self.head.seq + 1
        self.head = Head(node_id(self.name), self.epoch, seq, seq, seq)
        self.feed(JournalChanged())
        return self.head

    # --- stopped and slow ----------------------------------------------------------------------------------------

    @property
    def is_stopped(self) -> bool:
        return self._stops > 0

    @property
    def sleeps(self) -> bool:
        """It asked for no tick: only a packet can wake it."""
        return self.running and self._armed_at == NEVER

    def stop(self) -> None:
        """SIGSTOP. Each stop takes one `resume`."""
        self._stops += 1

    def resume(self) -> None:
        """SIGCONT: what waited happens now, in its order; its timer at some moment among it."""
        self._stops -= 1
        if self._stops or not self.running:
            return
        waiting, self._waiting, self._packets_waiting = self._waiting, [], 0
        if self._tick_waits:
            self._tick_waits = False
            self._armed_at = -NEVER  # nothing else is armed before this late tick
            waiting.insert(self._network.random.randint(0, len(waiting)), (self._tick, ()))
        for call, arguments in waiting:
            call(*arguments)

    def when_running(self, call: Callable[..., None], *arguments: Any) -> None:
        """Do it now, or when the process runs again."""
        if self._stops:
            self._waiting.append((call, arguments))
        else:
            call(*arguments)

    # --- the timer -----------------------------------------------------------------------------------------------

    def _arm(self) -> None:
        wake_at = self._wake_at
        if wake_at < self._armed_at:
            self._armed_at = wake_at
            self._clockwork.at(wake_at, self._on_timer, wake_at)

    def _on_timer(self, at: float) -> None:
        if at != self._armed_at or not self.running:
            return
        if self._stops:
            self._tick_waits = True
            return
        self._tick()

    def _tick(self) -> None:
        self._armed_at = NEVER
        now = self._clockwork.now
        if self._wake_at > now:
            self._arm()
            return
        self._ticks = self._ticks + 1 if now == self._ticked_at else 0
        self._ticked_at = now
        assert self._ticks < TICKS_AT_ONCE_MAX, f"{self.name} wants a tick now, again and again"
        self._wake_at = NEVER
        self.feed(Ticked())

    # --- actions -------------------------------------------------------------------------------------------------

    def open_token(self, stream: streams.Stream) -> int:
        """A number for the answer to a `Pulled`."""
        self._next_token += 1
        self.tokens[self._next_token] = stream
        return self._next_token

    def _send_packet(self, action: SendPacket) -> None:
        self._network.send(self, action.target, action.messages, action.crc)

    def _wake(self, action: Wake) -> None:
        self._wake_at = action.at

    def _notify(self, action: Notify) -> None:
        self.notices += 1
        self._on_notice(self, action.event)

    def _open_stream(self, action: Exchange | StreamPing | SendUser) -> None:
        streams.Stream(self._network, self, action)

    def _answer_pull(self, action: AnswerPull | RefusePull) -> None:
        streams.answer(self.tokens.pop(action.token), action)

    def _resolve(self, action: Resolve) -> None:
        host, _, port = action.seed.rpartition(":")
        try:
            endpoint = Endpoint(bytes(map(int, host.split("."))), int(port))
            event = Resolved(action.seed, (endpoint,))
        except ValueError:
            event = Resolved(action.seed, (), "no such host")
        self._clockwork.after(RESOLVE_S, self.when_running, self.feed, event)

    def _remember(self, action: Remember) -> None:
        self.remembered = action.endpoints

    def _departed(self, _: Departed) -> None:
        # After the actions that came with it: what they send is sent.
        self._clockwork.after(0.0, self.crash)


class Process(Node):
    """Everything of `kvmesh.discovery` but the driver."""

    def __init__(
        self,
        start: Start,
        kind: Kind,
        network: Network,
        random: Random,
        on_notice: Callable[[Node, object], None],
        on_event: Callable[[Process], None],
        *,
        ring_entries: int,
    ) -> None:
        self.journal = Journal(start.name, start.epoch, ring_entries=ring_entries)
        self.map = ClusterMap(random=random)
        super().__init__(start, kind, network, random, on_notice)
        self.core = Core(start.name, self.membership, self.map, self.journal, random)
        self._handle = self.core.handle
        self._on_event = on_event
        self._asked: dict[int, tuple[str, int]] = {}
        """Tokens of questions, with who asked and its number."""
        self._calls: dict[int, Call] = {}
        self._performers |= {Call: self._call, Reply: self._reply, Refuse: self._refuse}
        self.journal.on_change.append(lambda: self.feed(JournalChanged()))

    def feed(self, event: object) -> None:
        super().feed(event)
        if self.running:
            self._wake_at = self.core.wake_at()
            self._arm()
            self._on_event(self)

    def _call(self, action: Call) -> None:
        call = next(_calls)
        self._calls[call] = action
        self._network.request(self, action.address, call, encode(action.message))
        self._clockwork.after(action.timeout_s, self.when_running, self.feed, Lost(action.tag))

    def _reply(self, action: Reply) -> None:
        source, call = self._asked.pop(action.token)
        self._network.answer(self, source, call, encode(action.message))

    def _refuse(self, action: Refuse) -> None:
        del self._asked[action.token]

    def on_request(self, source: str, call: int, data: bytes) -> None:
        self._next_token += 1
        self._asked[self._next_token] = (source, call)
        self.feed(Requested(self._next_token, decode_request(data)))

    def on_answer(self, call: int, data: bytes) -> None:
        # Kept after a timeout and after the first answer: late and double ones reach the machine, which must not mind.
        asked = self._calls.get(call)
        if asked is not None:
            self.feed(Answered(asked.tag, decode_answer(data)))
