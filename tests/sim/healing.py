"""A mesh split in two halves and healed (fault 3), with journals and maps: until all are alive everywhere, and until
all maps are equal to the journals."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from kvmesh.discovery.membership import MemberState
from kvmesh.discovery.swim.profile import Profile
from tests.sim.clockwork import Clockwork
from tests.sim.kinds import gossip_kind
from tests.sim.network import Network, Weather
from tests.sim.process import GOSSIP_PORT, Process, Start, dotted, ip_of
from tests.sim.watch import differences

NAMESPACE = bytes(range(16))
CHUNKS = 20
CHANGES_PER_S = 5.0
NEVER_S = float("inf")
WATCH_S = 300.0


@dataclass
class Healed:
    """From the moment at which the network is whole again."""

    alive_s: float
    """Until everybody sees everybody alive."""
    equal_s: float
    """Until every map equals every journal."""
    split_seen: bool
    """Whether each half held the other for failed before."""


def split_and_heal(size: int, profile: Profile, *, seed: int, for_s: float, loss: float = 0.0) -> Healed:
    """Half and half, for so long, while journals go on changing."""
    random, clockwork = Random(seed), Clockwork()
    network = Network(clockwork, random, Weather())
    kind = gossip_kind(profile)
    processes: list[Process] = []
    for number in range(1, size + 1):
        seeds = [f"{dotted(ip_of(1))}:{GOSSIP_PORT}"] if number > 1 else []
        start = Start(f"n{number}", number, ip_of(number), seeds)
        process = Process(start, kind, network, random, _ignore, _ignore, ring_entries=1024)
        processes.append(process)
        process.begin()
        clockwork.run_for(0.02)
        for _ in range(CHUNKS):
            process.journal.admit(random.randbytes(32), NAMESPACE, 4096, "ram")
    assert clockwork.run_until_true(lambda: _all_alive(processes) and _all_equal(processes), within_s=120.0)
    network.weather.loss = loss
    half = size // 2
    ones, others = processes[:half], processes[half:]
    network.split([process.ip for process in ones], [process.ip for process in others])
    end = clockwork.now + for_s
    while clockwork.now < end:
        clockwork.run_for(random.expovariate(CHANGES_PER_S))
        random.choice(processes).journal.admit(random.randbytes(32), NAMESPACE, 4096, "ram")
    names = {process.name for process in ones}
    seen = all(
        member.state is MemberState.FAILED
        for process in processes
        for member in process.membership.members()
        if (member.name in names) != (process.name in names)
    )
    network.cut.clear()
    healed_at = clockwork.now
    alive_s = equal_s = NEVER_S
    while clockwork.now < healed_at + WATCH_S and equal_s == NEVER_S:
        clockwork.run_for(0.1)
        if alive_s == NEVER_S and _all_alive(processes):
            alive_s = clockwork.now - healed_at
        if alive_s < NEVER_S and _all_equal(processes):
            equal_s = clockwork.now - healed_at
    return Healed(alive_s, equal_s, seen)


def _ignore(*_: object) -> None:
    pass


def _all_alive(processes: list[Process]) -> bool:
    return all(
        sum(member.state is MemberState.ALIVE for member in process.membership.members()) == len(processes) - 1
        for process in processes
    )


def _all_equal(processes: list[Process]) -> bool:
    return not any(differences(process, processes) for process in processes)
