"""One seed's story: bad weather, then chaos, then a calm at whose end all maps must be true.

quiet   loss, doubles, late messages. Changes are made, and timed until every other map has them. Nobody fails.
chaos   crashes and restarts (same name; same or new address), stops, one-way cuts, leaves, overflows of the ring
calm    nothing goes wrong any more. Each map equals the truth in the end: no chunk missing, no phantom holder
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from kvmesh.discovery.membership import Conflict, Failed, MemberState
from tests.sim.clockwork import Clockwork
from tests.sim.network import Network, Weather
from tests.sim.process import Process

TIERS = ("gpu", "ram", "disk")
NAMESPACE = bytes(range(16))
QUIET_S, CHAOS_S, CALM_S = 20.0, 40.0, 20.0
FIND_S = 15.0
"""From one address of a list to everybody, at 30 % loss each way and one seed in a thousand."""
EXCUSE_S = 8.0
"""So long after a crash, a stop or a cut a failure may still be told because of it."""


@dataclass
class Report:
    """What one seed showed."""

    seed: int
    nodes: int
    virtual_s: float = 0.0
    delays_s: list[float] = field(default_factory=list)
    """From each change of the quiet part until the last map has it."""
    unseen: int = 0
    """Changes of the quiet part that some map never got in it."""
    false_failures: int = 0
    """A node declared failed that did nothing wrong."""
    messages: int = 0
    problems: list[str] = field(default_factory=list)
    """Why the seed failed; empty when it did not."""


@dataclass
class _Probe:
    owner: str
    key: bytes
    at: float
    waiting: set[str]


class Scenario:
    """Runs one seed."""

    def __init__(self, seed: int, *, nodes: int, loss: float) -> None:
        self.report = Report(seed, nodes)
        self._random = Random(seed)
        self._clockwork = Clockwork()
        weather = Weather(loss=loss, duplication=0.05, late=0.05)
        self._network = Network(self._clockwork, self._random, weather)
        self._processes: dict[str, Process] = {}
        self._probes: list[_Probe] = []
        self._excused_until: dict[str, float] = {}
        """By name, and by "name>name" for cuts."""
        self._epoch = 0
        self._address = 0
        self._ring_entries = self._random.choice((16, 64, 1024))
        for number in range(nodes):
            self._start(f"n{number}", at=number * 0.05)

    def run(self) -> Report:
        begin = self._clockwork.now
        self._clockwork.run_until(begin + FIND_S)
        self._expect(self._all_know_all(MemberState.SUSPECT), f"not everybody found everybody in {FIND_S} s")
        self._quiet()
        self._chaos()
        self._calm()
        self.report.virtual_s = self._clockwork.now - begin
        self.report.messages = self._network.sent
        return self.report

    # --- the three parts -----------------------------------------------------------------------------------------

    def _quiet(self) -> None:
        end = self._clockwork.now + QUIET_S
        while self._clockwork.now < end - 5.0:
            self._clockwork.run_until(self._clockwork.now + self._random.expovariate(3.0))
            self._change(probe=True)
        self._clockwork.run_until(end)
        self.report.unseen = len(self._probes)
        self._probes.clear()

    def _chaos(self) -> None:
        end = self._clockwork.now + CHAOS_S
        steps: list[tuple[Callable[[], None], int]] = [
            (self._change, 40), (self._burst, 6), (self._crash, 4), (self._stop, 3), (self._cut, 4), (self._leave, 1),
        ]  # fmt: skip
        while self._clockwork.now < end:
            self._clockwork.run_until(self._clockwork.now + self._random.expovariate(2.0))
            step = self._random.choices([step for step, _ in steps], [weight for _, weight in steps])[0]
            step()

    def _calm(self) -> None:
        self._clockwork.run_until(self._clockwork.now + 6.0)  # what went away for a while is back by now
        self._network.cut.clear()
        self._network.weather = Weather()
        self._clockwork.run_until(self._clockwork.now + CALM_S)
        self._expect(self._all_know_all(), "not everybody sees everybody alive after the calm")
        for viewer in self._processes.values():
            for problem in self._differences(viewer):
                self._expect(False, f"{viewer.name}: {problem}")

    # --- what happens --------------------------------------------------------------------------------------------

    def _start(self, name: str, *, at: float = 0.0, address: str | None = None) -> None:
        self._epoch += 1
        if address is None:
            self._address += 1
            address = f"a{self._address}"
        epoch, place = self._epoch, address
        others = [process.address for process in self._processes.values() if process.running and process.name != name]
        seeds = self._random.sample(others, min(len(others), 3))

        def start() -> None:
            self._processes[name] = Process(
                name, epoch, place, seeds,
                clockwork=self._clockwork, network=self._network, random=self._random,
                ring_entries=self._ring_entries, on_notice=self._on_notice, on_event=self._on_event,
            )  # fmt: skip

        if at:
            seeds = ["a1"]  # one address is enough to find the others
            self._clockwork.after(at, start)
        else:
            start()

    def _someone(self) -> Process | None:
        running = [p for p in self._processes.values() if p.running and not self._network.is_stopped(p.address)]
        return self._random.choice(running) if running else None

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
                others = {name for name, other in self._processes.items() if other is not process}
                self._probes.append(_Probe(process.name, key, self._clockwork.now, others))
            process.journal.admit(key, NAMESPACE, 4096, self._random.choice(TIERS))

    def _burst(self) -> None:
        for _ in range(self._random.randrange(10, 60)):
            self._change()

    def _crash(self) -> None:
        """Crash; the same name comes back, at the same address or another, empty."""
        process = self._someone()
        if process is None or len([p for p in self._processes.values() if p.running]) < 3:
            return
        process.crash()
        away_s = self._random.choice((0.05, 1.0, 6.0))
        self._excuse(process.name, away_s)
        address = process.address if self._random.random() < 0.5 else None
        self._clockwork.after(away_s, lambda: self._start(process.name, address=address))

    def _leave(self) -> None:
        process = self._someone()
        if process is None or len([p for p in self._processes.values() if p.running]) < 3:
            return
        process.leave()
        self._excuse(process.name, 3.0)
        self._clockwork.after(3.0, lambda: self._start(process.name))

    def _stop(self) -> None:
        process = self._someone()
        if process is None:
            return
        for_s = self._random.choice((1.0, 3.0, 6.0))
        self._network.stop(process.address)
        self._excuse(process.name, for_s)
        self._clockwork.after(for_s, lambda: self._network.resume(process.address))

    def _cut(self) -> None:
        one, other = self._someone(), self._someone()
        if one is None or other is None or one is other:
            return
        way, for_s = (one.address, other.address), self._random.uniform(1.0, 6.0)
        self._network.cut.add(way)
        for pair in (f"{one.name}>{other.name}", f"{other.name}>{one.name}"):
            self._excuse(pair, for_s)
        self._clockwork.after(for_s, lambda: self._network.cut.discard(way))

    def _excuse(self, what: str, for_s: float) -> None:
        until = self._clockwork.now + for_s + EXCUSE_S
        self._excused_until[what] = max(until, self._excused_until.get(what, 0.0))

    # --- what is seen --------------------------------------------------------------------------------------------

    def _on_notice(self, viewer: Process, event: object) -> None:
        if isinstance(event, Failed):
            now, name = self._clockwork.now, event.member.name
            excuses = (self._excused_until.get(name, 0.0), self._excused_until.get(f"{viewer.name}>{name}", 0.0))
            if max(excuses) < now:
                self.report.false_failures += 1
        if isinstance(event, Conflict):
            self._expect(False, f"{viewer.name} saw a conflict of names: {event}")

    def _on_event(self, viewer: Process) -> None:
        for probe in list(self._probes):
            if viewer.name in probe.waiting and viewer.map.has(probe.owner, probe.key):
                probe.waiting.discard(viewer.name)
                if not probe.waiting:
                    self.report.delays_s.append(self._clockwork.now - probe.at)
                    self._probes.remove(probe)

    def _expect(self, holds: bool, problem: str) -> None:
        if not holds:
            self.report.problems.append(problem)

    def _all_know_all(self, also: MemberState = MemberState.ALIVE) -> bool:
        names, there = set(self._processes), (MemberState.ALIVE, also)
        return all(
            {member.name for member in process.membership.members() if member.state in there} == names - {process.name}
            for process in self._processes.values()
        )

    def _differences(self, viewer: Process) -> list[str]:
        problems = []
        for owner in self._processes.values():
            if owner is viewer:
                continue
            table = viewer.map.table(owner.name)
            if table is None:
                problems.append(f"has no table of {owner.name}")
                continue
            truth, seen = dict(owner.journal.holdings.items()), dict(table.holdings.items())
            if truth != seen:
                phantoms, missing = len(seen.keys() - truth.keys()), len(truth.keys() - seen.keys())
                problems.append(f"of {owner.name}: {phantoms} phantom, {missing} missing chunks")
            elif table.holdings.fingerprint != owner.journal.holdings.fingerprint:
                problems.append(f"of {owner.name}: equal chunks, another fingerprint")
            elif not table.synced:
                problems.append(f"of {owner.name}: equal, but not known to be")
        if viewer.map.entries != sum(len(p.journal.holdings) for p in self._processes.values() if p is not viewer):
            problems.append("counts another number of entries than there are")
        return problems
