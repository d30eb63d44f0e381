"""One seed's story: bad weather, then chaos, then a calm at whose end everything must be true.

quiet   loss, doubles, late messages. Changes are made, and timed until every other map has them. Nobody fails
chaos   crashes and restarts (same name; same or new address), stops, slow processes, one-way cuts, split networks,
        leaves, joins, overflows of the ring. Some never come back
calm    nothing goes wrong any more. In the end all memberships agree with the truth, and each map equals it: no chunk
        missing, no phantom holder

With gossip, half of the seeds have every packet and stream pass through the product's codec, some of them encrypted.
What must hold at any moment is watched by `tests.sim.watch`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from kvmesh.discovery.membership import Failed, MemberState
from kvmesh.discovery.wire.messages import Endpoint
from tests.sim.clockwork import Clockwork
from tests.sim.kinds import gossip_kind, static_kind
from tests.sim.network import Network, Weather
from tests.sim.process import GOSSIP_PORT, MESH_PORT, Kind, Node, Process, Start, dotted, ip_of
from tests.sim.slowness import be_slow
from tests.sim.watch import Watch, differences
from tests.sim.wire import Encoded

TIERS = ("gpu", "ram", "disk")
NAMESPACE = bytes(range(16))
GROWTH = 2
"""At most so many times the nodes of the beginning."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long the parts last, in virtual seconds."""

    find_s: float
    """From one address of a list to everybody, at 30 % loss each way and one seed in a thousand."""
    quiet_s: float
    chaos_s: float
    calm_s: float
    """Long enough that everything which is true of any seed is true of all."""
    excuse_s: float
    """So long after a crash, a stop or a cut a failure may still be told because of it."""
    leave_s: float
    """A leave is told within."""


LENGTHS = {
    "static": Lengths(find_s=15.0, quiet_s=20.0, chaos_s=40.0, calm_s=20.0, excuse_s=8.0, leave_s=0.0),
    "gossip": Lengths(find_s=40.0, quiet_s=20.0, chaos_s=50.0, calm_s=60.0, excuse_s=40.0, leave_s=10.0),
}


@dataclass
class Report:
    """What one seed showed."""

    seed: int
    nodes: int
    membership: str = "static"
    loss: float = 0.0
    virtual_s: float = 0.0
    delays_s: list[float] = field(default_factory=list)
    """From each change of the quiet part until the last map has it."""
    unseen: int = 0
    """Changes of the quiet part that some map never got in it."""
    false_failures: int = 0
    """A node declared failed that did nothing wrong, by one that had no reason."""
    messages: int = 0
    problems: list[str] = field(default_factory=list)
    """Why the seed failed; empty when it did not."""

    @property
    def replay(self) -> str:
        """The command that runs this seed again."""
        return (
            f"python -m tests.sim --membership {self.membership} --first {self.seed} --seeds 1 "
            f"--nodes {self.nodes} --loss {self.loss}"
        )


@dataclass
class _Probe:
    owner: str
    key: bytes
    at: float
    waiting: set[str]


class Scenario:
    """Runs one seed. `kind` makes the memberships, in place of the product's own."""

    def __init__(
        self, seed: int, *, nodes: int, loss: float, membership: str = "static", kind: Kind | None = None
    ) -> None:
        self.report = Report(seed, nodes, membership, loss)
        self._lengths = LENGTHS[membership]
        self._is_gossip = membership == "gossip"
        self._random = Random(seed)
        self._clockwork = Clockwork()
        self._weather = Weather(loss=loss, duplication=0.05, late=0.05)
        if self._is_gossip:
            self._weather.late_s = self._random.choice((0.5, 3.0))
            self._weather.forgotten = 0.01
        wire = None
        if self._is_gossip and self._random.random() < 0.5:
            wire = Encoded(key=self._random.choice((None, bytes(range(16)), bytes(range(32)))))
        self._kind = kind or (gossip_kind(encrypted=wire is not None) if self._is_gossip else static_kind)
        self._network = Network(self._clockwork, self._random, self._weather, wire)
        self._watch = Watch(self._clockwork, self._expect)
        if self._is_gossip:
            self._network.tap = self._watch.on_packet
        self.on_notice: list[Callable[[Node, object], None]] = [self._watch.on_notice, self._count_failures]
        """Called with each event that a membership tells."""
        self._processes: dict[str, Process] = {}
        """The newest start of each name."""
        self._probes: list[_Probe] = []
        self._excused_until: dict[str, float] = {}
        """By name, and by "name>name" for cuts."""
        self._epoch = self._host = 0
        self._gone: dict[str, MemberState] = {}
        """Names that are not to come back, and what they are to be seen as."""
        self._remembered: dict[str, tuple[Endpoint, ...]] = {}
        """What is in the file of each name."""
        self._ring_entries = self._random.choice((16, 64, 1024))
        for number in range(nodes):
            self._start(f"n{number}", at=number * 0.05)

    def run(self) -> Report:
        begin, nodes = self._clockwork.now, self.report.nodes
        self._clockwork.run_for(self._lengths.find_s)
        self._expect(self._all_know_all(), f"not everybody found everybody of {nodes} in {self._lengths.find_s} s")
        self._quiet()
        self._chaos()
        self._calm()
        self.report.virtual_s = self._clockwork.now - begin
        self.report.messages = self._network.sent
        return self.report

    @property
    def now(self) -> float:
        """The virtual time."""
        return self._clockwork.now

    # --- the three parts -----------------------------------------------------------------------------------------

    def _quiet(self) -> None:
        end = self._clockwork.now + self._lengths.quiet_s
        while self._clockwork.now < end - 5.0:
            self._clockwork.run_for(self._random.expovariate(3.0))
            self._change(probe=True)
        self._clockwork.run_until(end)
        self.report.unseen = len(self._probes)
        self._probes.clear()

    def _chaos(self) -> None:
        end = self._clockwork.now + self._lengths.chaos_s
        steps: list[tuple[Callable[[], None], int]] = [
            (self._change, 40), (self._burst, 6), (self._crash, 4), (self._stop, 3), (self._cut, 4), (self._leave, 1),
        ]  # fmt: skip
        if self._is_gossip:
            steps += [(self._split, 1), (self._slow, 2), (self._join, 1), (self._crash_for_good, 1), (self._retire, 1)]
        while self._clockwork.now < end:
            self._clockwork.run_for(self._random.expovariate(2.0))
            step = self._random.choices([step for step, _ in steps], [weight for _, weight in steps])[0]
            step()

    def _calm(self) -> None:
        self._clockwork.run_for(6.0)  # what went away for a while is back by now
        self._network.cut.clear()
        self._network.weather = Weather()
        self._clockwork.run_for(self._lengths.calm_s)
        running = self._running()
        for viewer in running:
            for problem in (*self._disagreements(viewer), *differences(viewer, running)):
                self._expect(False, f"{viewer.name}: {problem}")
            self._watch.at_the_end(viewer, self._network)
        for name in self._gone:
            seen = {(member.state, member.epoch) for viewer in running if (member := viewer.membership.member(name))}
            self._expect(len(seen) <= 1, f"{name} is gone, and seen differently: {seen}")

    # --- what happens --------------------------------------------------------------------------------------------

    def _start(self, name: str, *, at: float = 0.0, ip: bytes | None = None) -> None:
        if name in self._gone:
            return
        self._epoch += 1000  # milliseconds, like those of real processes: the starts of one name are a second apart
        if ip is None:
            self._host += 1
            ip = ip_of(self._host)
        epoch, place = self._epoch, ip
        others = [self._seed_of(process) for process in self._running() if process.name != name]
        seeds = self._random.sample(others, min(len(others), 3))

        def start() -> None:
            birth = Start(name, epoch, place, seeds, self._remembered.get(name, ()))
            process = Process(
                birth, self._kind, self._network, self._random, self._on_notice, self._on_event,
                ring_entries=self._ring_entries,
            )  # fmt: skip
            self._processes[name] = process
            self._watch.on_start(process)
            process.begin()

        if at:
            seeds = [f"{dotted(ip_of(1))}:{GOSSIP_PORT if self._is_gossip else MESH_PORT}"]  # one address is enough
            self._clockwork.after(at, start)
        else:
            start()

    def _seed_of(self, process: Process) -> str:
        return f"{dotted(process.ip)}:{GOSSIP_PORT}" if self._is_gossip else process.address

    def _running(self) -> list[Process]:
        return [process for process in self._processes.values() if process.running]

    def _someone(self) -> Process | None:
        running = [process for process in self._running() if not process.is_stopped and not process.leaving]
        return self._random.choice(running) if running else None

    def _someone_to_spare(self, *, for_good: bool = False) -> Process | None:
        """Somebody who may go: never are there fewer than two others."""
        others = len(self._running())
        enough = others >= 3 and (not for_good or others > 1 + self.report.nodes // 2)
        return self._someone() if enough else None

    def _change(self, *, probe: bool = False) -> None:
        process = self._someone()
        if process is None:
            return
        held = list(process.journal.holdings.items())
        if held and not probe and self._random.random() < 0.45:
            key, record = self._random.choice(held)
            process.journal.evict(key, self._random.choice([t for i, t in enumerate(TIERS) if record.tiers >> i & 1]))
        elif held and self._random.random() < 0.2:
            key, record = self._random.choice(held)
            process.journal.admit(key, NAMESPACE, 4096, self._random.choice(TIERS))
        else:
            key = bytes([self._random.randrange(4)]) + self._random.randbytes(31)
            if probe:
                others = {other.name for other in self._running() if other is not process}
                self._probes.append(_Probe(process.name, key, self._clockwork.now, others))
            process.journal.admit(key, NAMESPACE, 4096, self._random.choice(TIERS))

    def _burst(self) -> None:
        for _ in range(self._random.randrange(10, 60)):
            self._change()

    def _crash(self) -> None:
        """Crash; the same name comes back, at the same address or another, empty."""
        process = self._someone_to_spare()
        if process is None:
            return
        self._end(process)
        away_s = self._random.choice((0.05, 1.0, 6.0))
        self._excuse(process.name, away_s)
        ip = process.ip if self._random.random() < 0.5 else None
        self._clockwork.after(away_s, self._start_again, process.name, ip)

    def _end(self, process: Process) -> None:
        """Like a crash; sometimes the whole host is off."""
        if self._random.random() < 0.5:
            self._remembered[process.name] = tuple(process.remembered)
        process.crash(host_up=not self._is_gossip or self._random.random() < 0.7)

    def _start_again(self, name: str, ip: bytes | None) -> None:
        if not self._processes[name].running:
            self._start(name, ip=ip)

    def _crash_for_good(self) -> None:
        process = self._someone_to_spare(for_good=True)
        if process is not None:
            self._end(process)
            self._excuse(process.name, 1000.0)
            self._gone[process.name] = MemberState.FAILED

    def _leave(self) -> None:
        process = self._someone_to_spare()
        if process is not None:
            self._say_goodbye(process)
            self._excuse(process.name, 3.0 + self._lengths.leave_s)
            self._clockwork.after(3.0 + self._lengths.leave_s / 3, self._start_again, process.name, None)

    def _retire(self) -> None:
        process = self._someone_to_spare(for_good=True)
        if process is not None and self._is_heard(process):
            self._gone[process.name] = MemberState.LEFT
            self._say_goodbye(process)
            self._excuse(process.name, 1000.0)

    def _is_heard(self, process: Process) -> bool:
        """Whether enough others would hear what it says, and live on to tell."""
        there = [other.name for other in self._running() if other is not process and not other.is_stopped]
        known = [name for name in there if (m := process.membership.member(name)) and m.state is MemberState.ALIVE]
        return len(known) >= 2 and not self._network.cut

    def _say_goodbye(self, process: Process) -> None:
        process.leave()
        if not self._is_gossip:
            process.crash()
        self._clockwork.after(self._lengths.leave_s, self._must_have_left, process)

    def _must_have_left(self, process: Process) -> None:
        self._expect(not process.running or process.is_stopped, f"{process.name} left, and never said that it had")

    def _join(self) -> None:
        if len(self._processes) < GROWTH * self.report.nodes:
            name = f"n{len(self._processes)}"
            self._excuse(name, 5.0)
            self._start(name)

    def _stop(self) -> None:
        process = self._someone()
        if process is None:
            return
        for_s = self._random.choice((1.0, 3.0, 6.0, 15.0) if self._is_gossip else (1.0, 3.0, 6.0))
        process.stop()
        self._excuse(process.name, for_s)
        self._clockwork.after(for_s, process.resume)

    def _slow(self) -> None:
        process = self._someone()
        if process is not None:
            for_s = self._random.uniform(3.0, 10.0)
            self._excuse(process.name, for_s + 1.5)
            be_slow(process, self._clockwork, self._random, for_s)

    def _cut(self) -> None:
        one, other = self._someone(), self._someone()
        if one is None or other is None or one is other:
            return
        way, for_s = (one.ip, other.ip), self._random.uniform(1.0, 6.0)
        self._network.cut.add(way)
        for pair in (f"{one.name}>{other.name}", f"{other.name}>{one.name}"):
            self._excuse(pair, for_s)
        self._clockwork.after(for_s, self._network.cut.discard, way)

    def _split(self) -> None:
        """Nothing passes between two parts of the mesh."""
        running = self._running()
        self._random.shuffle(running)
        count = self._random.randrange(1, len(running)) if len(running) > 1 else 0
        ones, others = [p.ip for p in running[:count]], [p.ip for p in running[count:]]
        before = set(self._network.cut)
        self._network.split(ones, others)
        new, for_s = self._network.cut - before, self._random.uniform(1.0, 20.0)
        for process in running:
            self._excuse(process.name, for_s)
        self._clockwork.after(for_s, self._network.cut.difference_update, new)

    def _excuse(self, what: str, for_s: float) -> None:
        until = self._clockwork.now + for_s + self._lengths.excuse_s
        self._excused_until[what] = max(until, self._excused_until.get(what, 0.0))

    # --- what is seen --------------------------------------------------------------------------------------------

    def _on_notice(self, viewer: Node, event: object) -> None:
        for call in self.on_notice:
            call(viewer, event)

    def _count_failures(self, viewer: Node, event: object) -> None:
        if isinstance(event, Failed):
            now, name = self._clockwork.now, event.member.name
            excuses = (self._excused_until.get(name, 0.0), self._excused_until.get(f"{viewer.name}>{name}", 0.0))
            if max(excuses) < now:
                self.report.false_failures += 1

    def _on_event(self, viewer: Process) -> None:
        self._watch.on_event(viewer)
        for probe in list(self._probes):
            if viewer.name in probe.waiting and viewer.map.has(probe.owner, probe.key):
                probe.waiting.discard(viewer.name)
                if not probe.waiting:
                    self.report.delays_s.append(self._clockwork.now - probe.at)
                    self._probes.remove(probe)

    def _expect(self, holds: bool, problem: str) -> None:
        if not holds:
            self.report.problems.append(problem)

    def _all_know_all(self) -> bool:
        names, there = set(self._processes), (MemberState.ALIVE, MemberState.SUSPECT)
        return all(
            {member.name for member in process.membership.members() if member.state in there} == names - {process.name}
            for process in self._processes.values()
        )

    def _disagreements(self, viewer: Process) -> list[str]:
        """Where the viewer's membership differs from the truth."""
        problems = []
        for owner in self._processes.values():
            if owner is viewer:
                continue
            member = viewer.membership.member(owner.name)
            if not owner.running and owner.name not in self._gone:
                problems.append(f"{owner.name} did not come back")
            elif member is None:
                if owner.running:  # who came after it had gone need not have heard of it
                    problems.append(f"does not know {owner.name}")
            elif owner.running:
                if member.state is not MemberState.ALIVE:
                    problems.append(f"sees {owner.name} {member.state}")
                if (member.epoch, member.address) != (owner.epoch, owner.address):
                    problems.append(f"sees the start {member.epoch} of {owner.name} at {member.address}: it is "
                                    f"{owner.epoch} at {owner.address}")  # fmt: skip
            elif member.epoch == owner.epoch and member.state is not self._gone[owner.name]:
                problems.append(f"sees {owner.name} {member.state}, not {self._gone[owner.name]}")
            elif member.state not in (MemberState.FAILED, MemberState.LEFT):
                problems.append(f"sees {owner.name} {member.state}: it is gone")
        return problems
