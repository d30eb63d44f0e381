"""What is measured on a cluster. Each function takes a rested cluster, uses it up, and returns plain numbers.

    knowing        until 50, 99 and 100 % of the others know that a journal changed; and that a node joined
    crashes        from a crash until each of the others says *failed*
    egress         bytes that a node sends in a second
    one_way        state changes of a pair that is cut in one direction (fault 4)
    stopped        what one node's SIGSTOP for 30 s does to the others (fault 2)
    long_run       false deaths in hours of bad weather, and how fast a rumour is meanwhile (fault 5)

`tests.sim.healing` measures a healed partition (fault 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvmesh.discovery.membership import Changed, Failed, HeadTold, Joined, Left, MemberState
from tests.sim.cluster import Cluster, FalseDeaths, alive_at
from tests.sim.network import Weather
from tests.sim.process import Node
from tests.sim.slowness import Bouts

WARM_UP_S = 30.0
"""In bad weather, before anything is measured: suspicions and their refutations fill the gossip by then."""
NEVER_S = float("inf")
DUPLICATION, LATE, LATE_S = 0.05, 0.05, 0.5
"""Beside losses, in `bad_weather`: doubles, and packets that are overtaken."""


def bad_weather(loss: float) -> Weather:
    """Losses, doubles and late packets."""
    return Weather(loss=loss, duplication=DUPLICATION, late=LATE, late_s=LATE_S, delay_s=0.001)


def quantile(values: Sequence[float], share: float) -> float:
    """The nearest-rank quantile; NaN of nothing."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


# --- knowing ---------------------------------------------------------------------------------------------------------


@dataclass
class Spread:
    """How one piece of news spread: when each of the others knew it, from the moment that it was told."""

    told_at: float
    wanted: int
    delays_s: list[float] = field(default_factory=list)

    def until(self, share: float) -> float:
        """When this share of the others knew."""
        needed = max(1, -(-int(self.wanted * share * 1000) // 1000))
        ordered = sorted(self.delays_s)
        return ordered[needed - 1] if len(ordered) >= needed else NEVER_S


class Rumours:
    """Times the heads that nodes tell."""

    def __init__(self, cluster: Cluster) -> None:
        self.spreads: list[Spread] = []
        self._cluster = cluster
        self._open: dict[str, tuple[int, Spread, set[str]]] = {}
        """By name: the seq of the newest head that is timed, and who knows it."""
        cluster.watchers.append(self._on_notice)

    def start(self, node: Node) -> Spread:
        """The journal of `node` changes now."""
        spread = Spread(self._cluster.clockwork.now, len(self._cluster.nodes) - 1)
        self.spreads.append(spread)
        seq = 1 if node.head is None else node.head.seq + 1
        self._open[node.name] = (seq, spread, set())
        node.change_head()
        return spread

    def _on_notice(self, viewer: Node, event: object) -> None:
        if isinstance(event, HeadTold) and (timed := self._open.get(event.name)) is not None:
            seq, spread, knowing = timed
            if event.head.seq >= seq and viewer.name not in knowing:
                knowing.add(viewer.name)
                spread.delays_s.append(self._cluster.clockwork.now - spread.told_at)


def knowing(
    cluster: Cluster, loss: float, *, changes: int, every_s: float = 1.0, watch_s: float = 30.0
) -> list[Spread]:
    """Several journals change, one after the other."""
    cluster.network.weather = bad_weather(loss) if loss else Weather()
    if loss:
        cluster.clockwork.run_for(WARM_UP_S)
    rumours = Rumours(cluster)
    for node in cluster.random.sample(cluster.nodes, changes):
        rumours.start(node)
        cluster.clockwork.run_for(every_s)
    _until_all_know(cluster, rumours.spreads, watch_s)
    return rumours.spreads


def joins(cluster: Cluster, loss: float, *, count: int, every_s: float = 1.0, watch_s: float = 30.0) -> list[Spread]:
    """Several nodes join, one after the other."""
    cluster.network.weather = bad_weather(loss) if loss else Weather()
    if loss:
        cluster.clockwork.run_for(WARM_UP_S)
    others = {node.name for node in cluster.nodes}
    spreads: dict[str, Spread] = {}
    seen: dict[str, set[str]] = {}

    def on_notice(viewer: Node, event: object) -> None:
        if not isinstance(event, Joined) or viewer.name not in others:
            return
        name = event.member.name
        if name in spreads and viewer.name not in seen[name]:
            seen[name].add(viewer.name)
            spreads[name].delays_s.append(cluster.clockwork.now - spreads[name].told_at)

    cluster.watchers.append(on_notice)
    for _ in range(count):
        name = f"new{len(spreads)}"
        spreads[name], seen[name] = Spread(cluster.clockwork.now, len(others)), set()
        cluster.join(name=name)
        cluster.clockwork.run_for(every_s)
    _until_all_know(cluster, list(spreads.values()), watch_s)
    return list(spreads.values())


def _until_all_know(cluster: Cluster, spreads: list[Spread], within_s: float) -> None:
    cluster.clockwork.run_until_true(
        lambda: all(len(spread.delays_s) >= spread.wanted for spread in spreads), within_s=within_s
    )


# --- crashes ---------------------------------------------------------------------------------------------------------


def crashes(cluster: Cluster, loss: float, *, count: int, every_s: float, watch_s: float = 60.0) -> list[float]:
    """Some nodes crash, one after the other: until each of the others says so. `NEVER_S`: it did not in `watch_s`."""
    cluster.network.weather = bad_weather(loss) if loss else Weather()
    if loss:
        cluster.clockwork.run_for(WARM_UP_S)
    crashed: dict[str, float] = {}
    delays: dict[tuple[str, str], float] = {}

    def on_notice(viewer: Node, event: object) -> None:
        if isinstance(event, Failed) and (at := crashed.get(event.member.name)) is not None:
            delays.setdefault((event.member.name, viewer.name), cluster.clockwork.now - at)

    cluster.watchers.append(on_notice)
    victims = cluster.random.sample(cluster.nodes, count)
    for victim in victims:
        crashed[victim.name] = cluster.clockwork.now
        cluster.crash(victim, host_up=cluster.random.random() < 0.5)
        cluster.clockwork.run_for(every_s)
    pairs = [(victim.name, node.name) for victim in victims for node in cluster.nodes]
    cluster.clockwork.run_until_true(lambda: all(pair in delays for pair in pairs), within_s=watch_s)
    return [delays.get(pair, NEVER_S) for pair in pairs]


# --- egress ----------------------------------------------------------------------------------------------------------


def egress(cluster: Cluster, changes_per_s: float, *, for_s: float, warm_up_s: float = 5.0) -> float:
    """Bytes per node and second while `changes_per_s` journals change in the whole mesh. The cluster's wire counts."""
    begin = cluster.clockwork.now

    def change() -> None:
        cluster.random.choice(cluster.nodes).change_head()

    total = int(changes_per_s * (warm_up_s + for_s))
    if changes_per_s < len(cluster.nodes):
        for number in range(total):
            cluster.clockwork.at(begin + (number + cluster.random.random()) / changes_per_s, change)
    else:
        for node in cluster.nodes:
            for second in range(int(warm_up_s + for_s)):
                cluster.clockwork.at(begin + second + cluster.random.random(), node.change_head)
    cluster.clockwork.run_for(warm_up_s)
    before = cluster.sent_bytes
    cluster.clockwork.run_for(for_s)
    return (cluster.sent_bytes - before) / for_s / len(cluster.nodes)


# --- one way, and stopped --------------------------------------------------------------------------------------------


@dataclass
class OneWay:
    """A pair that is cut in one direction."""

    pair_changes_per_minute: float
    """State changes that the two told of each other, the larger of both."""
    worst_changes_per_minute: float
    """That any node told of one of the two."""
    failures: int
    """Times that anybody said that one of them failed."""


def one_way(cluster: Cluster, loss: float, *, minutes: float) -> OneWay:
    """Nothing that A sends reaches B, for so long."""
    cluster.network.weather = bad_weather(loss) if loss else Weather()
    if loss:
        cluster.clockwork.run_for(WARM_UP_S)
    a, b = cluster.random.sample(cluster.nodes, 2)
    states: dict[tuple[str, str], MemberState] = {}
    changes: dict[tuple[str, str], int] = {}
    failures = 0

    def on_notice(viewer: Node, event: object) -> None:
        nonlocal failures
        if isinstance(event, (Joined, Changed, Failed, Left)) and event.member.name in (a.name, b.name):
            way = (viewer.name, event.member.name)
            if event.member.state is not states.get(way, MemberState.ALIVE):
                changes[way] = changes.get(way, 0) + 1
            states[way] = event.member.state
            failures += isinstance(event, Failed)

    cluster.watchers.append(on_notice)
    cluster.network.cut.add((a.ip, b.ip))
    cluster.clockwork.run_for(minutes * 60)
    pair = max(changes.get((a.name, b.name), 0), changes.get((b.name, a.name), 0))
    return OneWay(pair / minutes, max(changes.values(), default=0) / minutes, failures)


@dataclass
class Stopped:
    """One node was stopped and continued."""

    failures_by_it: int
    """Nodes that it declared failed."""
    failures_of_others: int
    """Declared by anybody, of any other node: all of them run."""
    alive_again_s: float
    """From SIGCONT until everybody sees it alive, and it everybody."""


def stopped(cluster: Cluster, loss: float, *, for_s: float) -> Stopped:
    """SIGSTOP for so long, then SIGCONT."""
    cluster.network.weather = bad_weather(loss) if loss else Weather()
    if loss:
        cluster.clockwork.run_for(WARM_UP_S)
    victim = cluster.random.choice(cluster.nodes)
    deaths = FalseDeaths(cluster)
    victim.stop()
    cluster.clockwork.run_for(for_s)
    victim.resume()
    at = cluster.clockwork.now
    names = {node.name for node in cluster.nodes}

    def all_is_well() -> bool:
        return alive_at(victim) == names and all(victim.name in alive_at(node) for node in cluster.nodes)

    found = cluster.clockwork.run_until_true(all_is_well, within_s=120.0)
    took_s = cluster.clockwork.now - at if found else NEVER_S
    cluster.clockwork.run_for(60.0)  # what else it led to
    told = [(viewer, name) for _, viewer, name in deaths.told]
    return Stopped(
        failures_by_it=sum(viewer == victim.name for viewer, _ in told),
        failures_of_others=sum(victim.name not in pair for pair in told),
        alive_again_s=took_s,
    )


# --- the long run ----------------------------------------------------------------------------------------------------


@dataclass
class LongRun:
    """Hours of bad weather with some slow nodes."""

    hours: float
    deaths_healthy: int = 0
    """Nodes that ran well and were declared failed: each counts once, however many nodes believed it."""
    deaths_slow: int = 0
    """The same of nodes that were slow then."""
    reports_healthy: int = 0
    """Nodes that declared a healthy one failed, summed over the deaths."""
    reports_slow: int = 0
    t50_s: list[float] = field(default_factory=list)
    """One rumour a minute: until half of the nodes know it."""
    t99_s: list[float] = field(default_factory=list)
    t100_s: list[float] = field(default_factory=list)
    packets: int = 0

    def add(self, other: LongRun) -> None:
        """Two stretches make one longer one."""
        self.hours += other.hours
        self.deaths_healthy += other.deaths_healthy
        self.deaths_slow += other.deaths_slow
        self.reports_healthy += other.reports_healthy
        self.reports_slow += other.reports_slow
        self.packets += other.packets
        self.t50_s += other.t50_s
        self.t99_s += other.t99_s
        self.t100_s += other.t100_s


SLOW_SHARE = 0.05
"""Of the nodes: those have bouts of slowness."""
SLOW_S, WELL_S = (5.0, 30.0), (30.0, 120.0)
SAME_DEATH_S = 30.0
"""Reports of one name within so long of each other are one death."""


def long_run(cluster: Cluster, loss: float, *, hours: float) -> LongRun:
    """See `LongRun`."""
    cluster.network.weather = bad_weather(loss)
    clockwork, random = cluster.clockwork, cluster.random
    slow = random.sample(cluster.nodes, round(SLOW_SHARE * len(cluster.nodes)))
    bouts = {node.name: Bouts(node, clockwork, random, slow_s=SLOW_S, well_s=WELL_S) for node in slow}
    clockwork.run_for(WARM_UP_S)
    result, deaths, rumours = LongRun(hours), FalseDeaths(cluster), Rumours(cluster)
    reported: dict[str, float] = {}
    before, end = cluster.network.sent, clockwork.now + hours * 3600
    while clockwork.now < end:
        healthy = [node for node in cluster.nodes if node.name not in bouts]
        rumours.start(random.choice(healthy))
        clockwork.run_until(min(clockwork.now + 60.0, end))
        for at, _, victim in deaths.told:
            # A node that is slow, or was a moment ago: what is said of it may have been under way since.
            was_slow = victim in bouts and at < bouts[victim].slow_until + SAME_DEATH_S
            is_new = at - reported.get(victim, float("-inf")) > SAME_DEATH_S
            reported[victim] = at
            if was_slow:
                result.deaths_slow += is_new
                result.reports_slow += 1
            else:
                result.deaths_healthy += is_new
                result.reports_healthy += 1
        deaths.told.clear()
    result.packets = cluster.network.sent - before
    for spread in rumours.spreads:
        result.t50_s.append(spread.until(0.5))
        result.t99_s.append(spread.until(0.99))
        result.t100_s.append(spread.until(1.0))
    return result
