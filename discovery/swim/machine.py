"""SWIM with Lifeguard, as memberlist speaks it: the whole protocol as one sans-IO machine.

    events   Started, Stopping, Ticked, and those of `events` (packets, streams, names that were looked up)
    actions  those of `events`, `Wake` when the next `Ticked` is due, `Notify` of what an operator should know

    beliefs      what a message about a node changes
    probing      who is asked whether it is there, and what silence means
    exchanging   push/pull: join, repair, reconnect
    base         the table, the rumours, the timers: what these three share

The layer above is an `Application`: it is told of each change at once, from within `handle`. A pause of this process
(SIGSTOP, a frozen container) shows as a timer that is far too late: then nothing that went unanswered meanwhile counts
against anybody, and a push/pull says at once what was missed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from kvmesh.discovery.actions import Action, Event, Started, Stopping, Ticked, Wake
from kvmesh.discovery.wire.messages import (
    Ack,
    Alive,
    Dead,
    Endpoint,
    IndirectPing,
    Message,
    Nack,
    Ping,
    Suspect,
    User,
)
from kvmesh.transport.limits import LEAVE_PACKETS_MAX, LEAVE_ROUND_S, LEAVE_ROUNDS, TIMER_LATE_S

from .base import Application, Shared, SwimCounters
from .beliefs import Beliefs
from .events import (
    Departed,
    Exchanged,
    PacketCame,
    Pulled,
    Resolved,
    SendPacket,
    StreamFailed,
    StreamPinged,
    UserCame,
)
from .exchanging import Exchanger
from .nodes import ALIVE, Node, NodeTable
from .probing import Prober
from .profile import Profile


class Swim:
    """One node's part of the protocol. `own` is what it says of itself."""

    def __init__(
        self,
        own: Alive,
        app: Application,
        *,
        profile: Profile,
        random: Random,
        seeds: Sequence[str] = (),
        known: Sequence[Endpoint] = (),
        packet_overhead_bytes: int = 0,
    ) -> None:
        node = Node(own.node, own.endpoint, own.meta, own.versions, own.incarnation, ALIVE, 0.0, 0.0)
        self._shared = Shared(node, profile, random, app, packet_overhead_bytes)
        self._beliefs = Beliefs(self._shared)
        self._exchanger = Exchanger(self._shared, self._beliefs, seeds, known)
        self._prober = Prober(self._shared, self._beliefs, self._exchanger)
        self._app = app
        self._last_words: tuple[Message, ...] = ()
        self._members_there = 1
        self._woken_at: float | None = None

    # --- what there is to see -------------------------------------------------------------------------------------

    @property
    def own(self) -> Node:
        """This node, as it tells of itself."""
        return self._shared.own

    @property
    def table(self) -> NodeTable:
        """Everyone, this node included."""
        return self._shared.table

    @property
    def counters(self) -> SwimCounters:
        """Since the start."""
        counters = self._shared.counters
        counters.rumours_dropped = self._shared.rumours.dropped + self._shared.words.dropped
        return counters

    @property
    def health(self) -> int:
        """How badly this node itself does: 0 is well."""
        return self._shared.awareness.score

    @property
    def rumours(self) -> int:
        """Rumours that wait to be told."""
        return len(self._shared.rumours) + len(self._shared.words)

    def number(self) -> int:
        """A number for a stream of the layer above."""
        return self._shared.number()

    def tell(self, name: str, payload: bytes, now: float) -> None:
        """Gossip a user message, in place of the one of that name that still waits. Only from within `handle`."""
        self._shared.word(name, payload, now)

    def later(self, when: float, call: Callable[[float], None]) -> None:
        """Have the layer above called back."""
        self._shared.timers.at(when, call)

    # --- events ---------------------------------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event; the actions are to be performed in order."""
        shared = self._shared
        shared.out = []
        late_s = now - shared.timers.next_at()
        if late_s >= 0:
            self._woken_at = None  # that alarm has rung: the next one must be set, be it for the same moment
            if late_s > TIMER_LATE_S:
                self._resume(late_s, now)
            shared.timers.run(now)
        match event:
            case PacketCame(source, messages):
                is_accused = len(messages) > 1 and self._hear_accusations(messages, now)
                for message in messages:
                    if type(message) is Ping:
                        self._prober.on_ping(message, source, now, is_accused=is_accused)
                    else:
                        self._on_message(message, source, now)
            case Pulled():
                self._exchanger.on_pulled(event, now)
            case Exchanged(number, state):
                self._exchanger.on_exchanged(number, state, now)
            case StreamPinged(number):
                self._prober.on_stream_pinged(number)
            case StreamFailed(number, reason):
                self._exchanger.on_failed(number, reason)
            case Resolved():
                self._exchanger.on_resolved(event, now)
            case UserCame(source, payload):
                self._app.on_user(payload, source, now)
            case Started():
                self._start(now)
            case Stopping():
                self._leave(now)
            case _:
                assert isinstance(event, Ticked)
        if shared.table.there != self._members_there:
            self._members_there = shared.table.there
            self._exchanger.remember_soon(now)
        return self._take_out()

    def _take_out(self) -> list[Action]:
        actions, at = self._shared.out, self._shared.timers.next_at()
        if at != self._woken_at:
            self._woken_at = at
            actions.append(Wake(at))
        return actions

    def _on_message(self, message: Message, source: Endpoint, now: float) -> None:
        match message:
            case Ack():
                self._prober.on_ack(message, now)
            case Alive():
                self._beliefs.on_alive(message, now)
            case Suspect():
                self._beliefs.on_suspect(message, now)
            case User(payload):
                self._app.on_user(payload, source, now)
            case IndirectPing():
                self._prober.on_indirect_ping(message, source, now)
            case Nack():
                self._prober.on_nack(message)
            case Dead():
                self._beliefs.on_dead(message, now)
            case _:
                self._shared.counters.unexpected += 1

    def _hear_accusations(self, messages: Sequence[Message], now: float) -> bool:
        """Whether the sender suspects this node. It says so after its ping; the answer to the ping is to refute it."""
        accused = False
        for message in messages:
            if type(message) is Suspect and message.node == self._shared.own.name:
                accused = True
                self._beliefs.on_suspect(message, now)
        return accused

    def _start(self, now: float) -> None:
        own = self._shared.own
        own.changed_at = own.seen_at = now
        self._beliefs.announce(now)
        self._prober.start(now)
        self._exchanger.start(now)

    def _resume(self, late_s: float, now: float) -> None:
        """This process did not run for a while."""
        shared = self._shared
        shared.counters.pauses += 1
        shared.timers.delay(late_s)
        self._prober.forget(now)
        self._beliefs.forgive(now)
        self._exchanger.repair_once(now)

    # --- leaving --------------------------------------------------------------------------------------------------

    def leave_with(self, *words: bytes) -> None:
        """User messages that go before this node's last word."""
        self._last_words = tuple(User(payload) for payload in words)

    def _leave(self, now: float) -> None:
        if not self._shared.leaving:
            self._beliefs.leave(now)
            self._say_goodbye(LEAVE_ROUNDS, now)

    def _say_goodbye(self, rounds: int, now: float) -> None:
        """Some members hear it directly, several times since packets get lost; all others hear it from them."""
        shared = self._shared
        own = shared.own
        hearers = shared.table.some(LEAVE_PACKETS_MAX, lambda node: node is not own and not node.is_gone)
        targets = {node.endpoint: node.reads_crc for node in hearers}
        for endpoint in self._exchanger.dialled():
            targets.setdefault(endpoint, False)  # it may believe that this node is there before this one knows of it
        if not targets or not rounds:
            shared.out.append(Departed())
            return
        words = (*self._last_words, Dead(own.incarnation, own.name, own.name))
        shared.out.extend(SendPacket(endpoint, words, crc=reads_crc) for endpoint, reads_crc in targets.items())
        shared.timers.at(now + LEAVE_ROUND_S, lambda then: self._say_goodbye(rounds - 1, then))
