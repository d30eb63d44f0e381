"""Several machines and everything that is under way between them, so that it can be lost, doubled, late, and out of
order. Time moves only when it is told to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from kvmesh.discovery.actions import Event, Notify, Started, Stopping, Ticked, Wake
from kvmesh.discovery.swim.events import (
    AnswerPull,
    Departed,
    Exchange,
    Exchanged,
    PacketCame,
    Pulled,
    RefusePull,
    Remember,
    Resolve,
    Resolved,
    SendPacket,
    StreamFailed,
    StreamPing,
    StreamPinged,
)
from kvmesh.discovery.swim.machine import Swim
from kvmesh.discovery.swim.profile import Profile
from kvmesh.discovery.swim.timers import NEVER
from kvmesh.discovery.wire.messages import VERSIONS, Alive, Endpoint
from tests.discovery.swim.support import App, at

DELAY_S = 0.002
"""Of everything that is sent, once the network is calm."""


@dataclass(eq=False)
class Process:
    """One start of one node."""

    name: str
    endpoint: Endpoint
    start: int
    swim: Swim
    wake_at: float = NEVER
    state: str = "runs"
    """Or: is paused, crashed, departed."""
    tokens: dict[int, Callable[[Event | None], None]] = field(default_factory=dict)
    """Streams of peers that wait for an answer; None stands for an end without one."""
    waiting: list[Event] = field(default_factory=list)
    """What came while it was paused."""


@dataclass(eq=False)
class Parcel:
    """Something on its way: what happens when it arrives, and when it does not."""

    arrive: Callable[[], None]
    lose: Callable[[], None] = lambda: None
    due_at: float = 0.0


class World:
    """See above. Names are ``n1``, ``n2``, …; each may use two addresses, a start of its own at each time."""

    def __init__(self, size: int, profile: Profile, seed: int) -> None:
        self.profile = profile
        self.random = Random(seed)
        self.now = 100.0
        self.names = [f"n{number}" for number in range(1, size + 1)]
        self.processes: dict[str, Process] = {}
        self.flight: list[Parcel] = []
        self.cut_off: set[str] = set()
        """Names that nobody reaches, and that reach nobody."""
        self._starts = 0
        for name in self.names:
            self.start(name, elsewhere=False, incarnation=1)

    # --- processes ------------------------------------------------------------------------------------------------

    def start(self, name: str, *, elsewhere: bool, incarnation: int) -> None:
        """A new start of a node that does not run."""
        self._starts += 1
        number = int(name[1:]) + (100 if elsewhere else 0)
        own = Alive(incarnation, name, at(number).ip, at(number).port, b"%d" % self._starts, VERSIONS)
        random = Random(self.random.random())
        swim = Swim(own, App(), profile=self.profile, random=random, seeds=self.names)
        self.processes[name] = Process(name, at(number), self._starts, swim)
        self.feed(self.processes[name], Started())

    def running(self) -> list[Process]:
        return [process for process in self.processes.values() if process.state == "runs"]

    def feed(self, process: Process, event: Event) -> None:
        """One event, if the process runs. What is checked here holds after every single event."""
        if process.state == "is paused" and not isinstance(event, Ticked):
            process.waiting.append(event)
        if process.state != "runs":
            return
        if process.wake_at <= self.now:
            process.wake_at = NEVER
        before = {node.name: node.incarnation for node in process.swim.table}
        actions = process.swim.handle(event, self.now)
        for action in actions:
            if isinstance(action, Wake):
                process.wake_at = action.at
        assert process.wake_at == process.swim._shared.timers.next_at(), "a timer without an alarm"
        assert all(node.incarnation >= before.get(node.name, 0) for node in process.swim.table)
        for action in actions:
            self._perform(process, action)

    def tick(self, process: Process) -> None:
        self.feed(process, Ticked())

    # --- what they want done --------------------------------------------------------------------------------------

    def _perform(self, process: Process, action: object) -> None:
        match action:
            case SendPacket(target, messages):
                assert target != process.endpoint, "a packet to itself"
                assert messages
                self._send(
                    lambda: self._to(target, PacketCame(process.endpoint, messages)),
                    between=(process.endpoint, target),
                )
            case Exchange(number, target, state, _):
                assert target != process.endpoint, "an exchange with itself"
                failed = StreamFailed(number, f"{target.ip.hex('.')}: nobody is there")
                self._send(
                    lambda: self._pull(process, target, state, number),
                    lambda: self.feed(process, failed),
                    between=(process.endpoint, target),
                )
            case StreamPing(number, target, ping):
                self._send(
                    lambda: self._stream_ping(process, target, ping.node, number),
                    lambda: self.feed(process, StreamFailed(number, "lost")),
                    between=(process.endpoint, target),
                )
            case AnswerPull(token, state):
                process.tokens.pop(token)(Exchanged(0, state))
            case RefusePull(token):
                process.tokens.pop(token)(None)
            case Resolve(seed):
                endpoints = (self.processes[seed].endpoint,) if seed in self.processes else ()
                self._send(
                    lambda: self.feed(process, Resolved(seed, endpoints)),
                    lambda: self.feed(process, Resolved(seed, (), "the name service does not answer")),
                )
            case Departed():
                process.state = "departed"
            case _:
                assert isinstance(action, Wake | Remember | Notify)

    def _send(
        self,
        arrive: Callable[[], None],
        lose: Callable[[], None] = lambda: None,
        between: tuple[Endpoint, ...] = (),
    ) -> None:
        is_cut = any(f"n{end.ip[3] % 100}" in self.cut_off for end in between)
        self.flight.append(Parcel(lose if is_cut else arrive, lose, self.now + DELAY_S))

    def _at(self, target: Endpoint) -> Process | None:
        return next((one for one in self.running() if one.endpoint == target), None)

    def _to(self, target: Endpoint, event: Event) -> None:
        for process in list(self.processes.values()):
            if process.endpoint == target:
                self.feed(process, event)  # a paused one finds it later

    def _pull(self, asker: Process, target: Endpoint, state: object, number: int) -> None:
        process = self._at(target)
        if process is None:
            self._send(lambda: self.feed(asker, StreamFailed(number, "refused")))
            return

        def answer(event: Event | None) -> None:
            failed = StreamFailed(number, "no answer")
            told = Exchanged(number, event.state) if isinstance(event, Exchanged) else failed
            self._send(lambda: self.feed(asker, told), lambda: self.feed(asker, failed))

        token = len(process.tokens)
        process.tokens[token] = answer
        self.feed(process, Pulled(token, asker.endpoint, state))  # type: ignore[arg-type]
        assert token not in process.tokens, "a peer that waits for ever"

    def _stream_ping(self, asker: Process, target: Endpoint, name: str, number: int) -> None:
        process = self._at(target)
        there = process is not None and process.name == name
        event: Event = StreamPinged(number) if there else StreamFailed(number, "nobody is there")
        self._send(lambda: self.feed(asker, event))

    # --- time and the network -------------------------------------------------------------------------------------

    def take(self, place: int, *, keep: bool = False) -> Parcel | None:
        """One of those that are on their way; `keep`: it will come once more."""
        if not self.flight:
            return None
        place %= len(self.flight)
        return self.flight[place] if keep else self.flight.pop(place)

    def pass_time(self, seconds: float) -> None:
        """Alarms ring; nothing arrives."""
        until = self.now + seconds
        while (at_ := min((one.wake_at for one in self.running()), default=NEVER)) <= until:
            self.now = max(self.now, at_)
            for process in self.running():
                if process.wake_at <= self.now:
                    self.tick(process)
        self.now = until

    def calm(self, seconds: float, *, loss: float = 0.0) -> None:
        """Alarms ring, and everything arrives after a short delay, in its order, but for what is lost."""
        until = self.now + seconds
        for parcel in self.flight:
            parcel.due_at = min(parcel.due_at, self.now)
        while True:
            rings_at = min((one.wake_at for one in self.running()), default=NEVER)
            comes_at = self.flight[0].due_at if self.flight else NEVER
            if min(rings_at, comes_at) > until:
                break
            self.now = max(self.now, min(rings_at, comes_at))
            if comes_at <= rings_at:
                parcel = self.flight.pop(0)
                (parcel.lose if loss and self.random.random() < loss else parcel.arrive)()
            else:
                for process in self.running():
                    if process.wake_at <= self.now:
                        self.tick(process)
        self.now = until

    def stop(self, process: Process) -> None:
        """It leaves."""
        self.feed(process, Stopping())

    def resume(self, process: Process) -> None:
        """After a pause its alarm is late, and what came meanwhile is there at once."""
        process.state = "runs"
        if process.wake_at <= self.now:
            self.tick(process)
        waiting, process.waiting = process.waiting, []
        for event in waiting:
            self.feed(process, event)

    # --- what all believe -----------------------------------------------------------------------------------------

    def disagreements(self) -> list[str]:
        """What keeps all running nodes from having one and the true view."""
        found = []
        running = self.running()
        for name in self.names:
            of_it = self.processes[name]
            views = {one.name: one.swim.table.get(name) for one in running if one.name != name}
            if of_it.state == "runs":
                own = of_it.swim.own
                for other, node in views.items():
                    if node is None or node.alive() != own.alive() or node.state != own.state:
                        found.append(f"{other} takes {name} for {node}")
            else:
                known = [node for node in views.values() if node is not None]
                if any(not node.is_gone for node in known):
                    found.append(f"{name} is gone, and somebody takes it to be there")
                if len({(node.incarnation, node.state) for node in known}) > 1:
                    found.append(f"of {name}, which is gone, there are several views")
        return found
