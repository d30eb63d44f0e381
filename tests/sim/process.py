"""One process of the mesh in virtual time: the same classes as in the product, run by events instead of by asyncio."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from random import Random

from kvmesh.discovery.actions import (
    Action,
    Answered,
    Call,
    Event,
    JournalChanged,
    Lost,
    Notify,
    Refuse,
    Reply,
    Requested,
    Started,
    Stopping,
    Ticked,
)
from kvmesh.discovery.core import Core
from kvmesh.discovery.journal import Journal
from kvmesh.discovery.map import ClusterMap
from kvmesh.discovery.messages import Identity, decode_answer, decode_request, encode
from kvmesh.discovery.static import StaticMembership
from tests.sim.clockwork import Clockwork
from tests.sim.network import Network

_calls = itertools.count()


class Process:
    """Name, epoch, address; a journal; and everything of `kvmesh.discovery` but the driver."""

    def __init__(
        self,
        name: str,
        epoch: int,
        address: str,
        seeds: Sequence[str],
        *,
        clockwork: Clockwork,
        network: Network,
        random: Random,
        ring_entries: int,
        on_notice: Callable[[Process, object], None],
        on_event: Callable[[Process], None],
    ) -> None:
        self.name, self.epoch, self.address = name, epoch, address
        self.running = True
        self.journal = Journal(name, epoch, ring_entries=ring_entries)
        self.map = ClusterMap(random=random)
        identity = Identity(name, "agent", epoch, address)
        self.membership = StaticMembership(identity, seeds, head=lambda: self.journal.head, random=random)
        self.core = Core(name, self.membership, self.map, self.journal, random)
        self._clockwork = clockwork
        self._network = network
        self._on_notice = on_notice
        self._on_event = on_event
        self._tokens: dict[int, tuple[str, int]] = {}
        self._next_token = 0
        self._calls: dict[int, Call] = {}
        self._tick_at = float("inf")
        network.attach(address, self)
        self.journal.on_change.append(lambda: self.feed(JournalChanged()))
        self.feed(Started())

    def crash(self) -> None:
        """Gone without a word. Packets that it sent are still under way."""
        self.running = False
        self._network.detach(self.address)

    def leave(self) -> None:
        """Stop in good order."""
        self.feed(Stopping())
        self.crash()

    def feed(self, event: Event) -> None:
        if not self.running:
            return
        for action in self.core.handle(event, self._clockwork.now):
            self._perform(action)
        self._set_timer()
        self._on_event(self)

    def _perform(self, action: Action) -> None:
        match action:
            case Call(tag, address, message, timeout_s):
                call = next(_calls)
                self._calls[call] = action
                self._network.request(self.address, address, call, encode(message))
                lost = Lost(tag)
                self._clockwork.after(
                    timeout_s, lambda: self._network.when_running(self.address, lambda: self.feed(lost))
                )
            case Reply(token, message):
                source, call = self._tokens.pop(token)
                self._network.answer(self.address, source, call, encode(message))
            case Refuse(token, _):
                del self._tokens[token]
            case Notify(event):
                self._on_notice(self, event)
            case _:
                raise AssertionError(action)

    def on_request(self, source: str, call: int, data: bytes) -> None:
        self._next_token += 1
        self._tokens[self._next_token] = (source, call)
        self.feed(Requested(self._next_token, decode_request(data)))

    def on_answer(self, call: int, data: bytes) -> None:
        # Kept after a timeout and after the first answer: late and double ones reach the machine, which must not mind.
        asked = self._calls.get(call)
        if asked is not None:
            self.feed(Answered(asked.tag, decode_answer(data)))

    def _set_timer(self) -> None:
        at = self.core.wake_at()
        if at < self._tick_at or self._tick_at <= self._clockwork.now:
            self._tick_at = at
            if at < float("inf"):
                self._clockwork.at(at, lambda: self._network.when_running(self.address, lambda: self._tick(at)))

    def _tick(self, at: float) -> None:
        if at == self._tick_at:
            self._tick_at = float("inf")
            self.feed(Ticked())
