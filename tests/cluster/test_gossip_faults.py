"""Rows 2, 3 and 4 of the fault table with real agents: stopped processes, clocks that jump, packets that are dropped.
tests/sim has the same in virtual time, for many seeds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from kvmesh.discovery.swim.profile import KVMESH_LAN
from tests.cluster.views import (
    declared_failed,
    get,
    held,
    holders,
    nodes,
    put,
    states,
    wait_alive,
    wait_states,
)
from tests.support.cluster import Cluster, Process
from tests.support.hosts import HostCluster
from tests.support.namespaces import Network, why_not
from tests.support.waiting import hold, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow]  # real processes, and faults that last
needs_network = pytest.mark.skipif(bool(why_not()), reason=f"a network of its own: {why_not()}")

HOUR_S = 3600
FAILED_WITHIN_S = 25.0
"""From a crash or a cut until all say so, on a busy machine: two rounds of probes, and a suspicion nobody confirms."""
DEADLINE_S = 1.0
"""Of a read."""
LATE_S = 0.5
"""How much later an answer may arrive here, on a busy machine."""
CLOCK_LIBRARY = next(iter(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")), None)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[HostCluster]:
    with Network() as network, HostCluster(tmp_path, network) as running:
        yield running


def start(cluster: HostCluster, names: str) -> list[Process]:
    """Agents on hosts 2, 3, ... that all know each other."""
    agents = [cluster.start(name, host, join=[cluster.seed(2)]) for host, name in enumerate(names, start=2)]
    wait_alive(agents)
    return agents


def watch(agents: Sequence[Process], seconds: float) -> None:
    """For a while, all of them see each other there (a suspicion may come and go)."""
    names = {agent.name for agent in agents}

    def all_are_there() -> None:
        for agent in agents:
            seen = states(agent)
            assert set(seen) == names, f"{agent.name} sees {seen}"
            assert set(seen.values()) <= {"alive", "suspect"}, f"{agent.name} sees {seen}"

    hold(all_are_there, seconds, every_s=0.1)


# --- row 2 -----------------------------------------------------------------------------------------------------------


def test_a_node_stopped_for_half_a_minute_declares_nobody_failed_and_is_alive_again_everywhere(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        first = cluster.agent("a", memory="16MiB")
        agents = [first, *(cluster.agent(name, memory="16MiB", join=[first.gossip_address]) for name in "bcde")]
        wait_alive(agents)
        stopped, healthy = agents[2], [agent for agent in agents if agent.name != "c"]
        chain = put(stopped, 1, 3)
        wait_until(lambda: all(holders(agent, chain) == {"c": 3} for agent in healthy), 10, "all know what c holds")
        incarnation = nodes(first)["c"]["incarnation"]

        continues = time.monotonic() + 30
        stopped.pause()
        wait_states(healthy, {"a": "alive", "b": "alive", "c": "failed", "d": "alive", "e": "alive"}, FAILED_WITHIN_S)
        chain = put(first, 2, 3)
        wait_until(lambda: all(holders(agent, chain) == {"a": 3} for agent in healthy), 10, "the others go on")
        wait_until(lambda: time.monotonic() > continues, 31, "half a minute is over")
        stopped.resume()

        view = states(stopped)
        assert {state for name, state in view.items() if name != "c"} == {"alive"}, view
        wait_alive(agents, 10)
        assert nodes(first)["c"]["incarnation"] > incarnation
        wait_until(lambda: get(first, 1, 3, DEADLINE_S) == 3, 10, "what c holds can be read again")
        wait_until(lambda: get(stopped, 2, 3, DEADLINE_S) == 3, 10, "c reads what was put meanwhile")
        assert declared_failed(stopped) == set()
        assert all(declared_failed(agent) == {"c"} for agent in healthy)


@pytest.mark.skipif(CLOCK_LIBRARY is None, reason="needs libfaketime")
def test_a_wall_clock_that_jumps_an_hour_changes_nothing(tmp_path: Path) -> None:
    """And a process that starts again under a clock that was set back is believed all the same."""
    with ExitStack() as stack:
        clusters = {name: stack.enter_context(clocked(tmp_path / name)) for name in "abc"}
        for name in clusters:
            set_clock(tmp_path / name, 0)
        a = clusters["a"].agent("a", memory="16MiB")
        b, c = (clusters[name].agent(name, memory="16MiB", join=[a.gossip_address]) for name in "bc")
        agents = [a, b, c]
        wait_alive(agents)
        old = put(b, 1, 3)
        wait_until(lambda: all(holders(agent, old) == {"b": 3} for agent in agents), 10, "all know what b holds")
        incarnations = {name: node["incarnation"] for name, node in nodes(a).items()}
        for turn, jumps_s in enumerate(((HOUR_S, -HOUR_S, 0), (-HOUR_S, HOUR_S, 0), (0, 0, 2 * HOUR_S)), start=2):
            for agent, jump_s in zip(agents, jumps_s, strict=True):
                set_clock(tmp_path / agent.name, jump_s)
                if jump_s >= 0:  # one that was set back before the process started does not show
                    wait_until(lambda agent=agent, s=jump_s: abs(ahead_s(agent) - s) < 60, 10, "the clock has jumped")
            watch(agents, 3 * KVMESH_LAN.probe_interval_s * len(agents))
            chain = put(agents[turn % 3], turn, 2)
            for agent in agents:
                wait_until(lambda agent=agent, chain=chain: len(holders(agent, chain)) == 1, 5, "the chunks are known")
        after = {name: node["incarnation"] for name, node in nodes(a).items()}
        assert all(after[name] - incarnations[name] <= 1 for name in "abc"), (incarnations, after)
        assert [declared_failed(agent) for agent in agents] == [set()] * 3
        assert get(c, 1, 3, DEADLINE_S) == 3

        b.kill()
        set_clock(tmp_path / "b", -HOUR_S)
        b = clusters["b"].agent("b", memory="16MiB", join=[a.gossip_address])
        for agent in (a, c):
            # Its start looks older than the one before, which must first be found dead; a push/pull tells the rest.
            within_s = FAILED_WITHIN_S + KVMESH_LAN.push_pull_interval_s
            wait_until(lambda agent=agent: nodes(agent)["b"]["address"] == b.address, within_s, "b's new address")
            wait_until(lambda agent=agent: states(agent)["b"] == "alive", 5, f"{agent.name} sees b alive")
            wait_until(lambda agent=agent: "b" not in holders(agent, old), 5, f"{agent.name} knows that b lost all")
        chain = put(b, 9, 2)
        for agent in (a, c):
            wait_until(lambda agent=agent: holders(agent, chain) == {"b": 2}, 5, f"{agent.name} knows what b holds")


@contextmanager
def clocked(folder: Path) -> Iterator[Cluster]:
    """Processes whose wall clock, and nothing else, is what a file says."""
    folder.mkdir()
    environment = {
        "LD_PRELOAD": str(CLOCK_LIBRARY),
        "FAKETIME_TIMESTAMP_FILE": str(folder / "clock"),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    with Cluster(folder, environment) as cluster:
        yield cluster
    for process in cluster.processes:  # the library removes what it shares only when its process ends by itself
        for path in Path("/dev/shm").glob(f"*faketime_*_{process.pid}"):
            path.unlink()


def set_clock(folder: Path, offset_s: int) -> None:
    new = folder / "clock.new"
    new.write_text(f"{offset_s:+d}\n")
    new.rename(folder / "clock")  # never half of it


def ahead_s(process: Process) -> float:
    """How far ahead a process's wall clock is: its epoch is when it started, by that clock."""
    own = nodes(process)[process.name]
    return float(own["epoch"] / 1000 + own["up_s"] - time.time())


# --- row 3 -----------------------------------------------------------------------------------------------------------


@needs_network
@pytest.mark.timeout(240)
def test_the_halves_of_a_mesh_go_on_alone_and_agree_after_healing(cluster: HostCluster) -> None:
    agents = start(cluster, "abcdef")
    left, right = agents[:3], agents[3:]
    before = {1: put(agents[0], 1, 4), 2: put(agents[5], 2, 4)}
    for agent in agents:
        wait_until(
            lambda agent=agent: [holders(agent, chain) for chain in before.values()] == [{"a": 4}, {"f": 4}],
            10,
            f"{agent.name} knows what a and f hold",
        )

    heals = time.monotonic() + 60
    cluster.network.cut([2, 3, 4], [5, 6, 7])
    during = {3: put(agents[1], 3, 4), 4: put(agents[4], 4, 4)}
    wait_until(lambda: get(left[2], 3, 4, DEADLINE_S) == 4, 10, "the left half shares what is new there")
    wait_until(lambda: get(right[2], 4, 4, DEADLINE_S) == 4, 10, "the right half shares what is new there")

    def each_half_serves_itself() -> None:
        for agent, seed, count in ((left[0], 1, 4), (right[2], 2, 4), (left[1], 2, 0), (right[1], 1, 0)):
            began = time.monotonic()
            found = get(agent, seed, 4, DEADLINE_S)
            took_s = time.monotonic() - began
            assert found == count, f"{agent.name} got {found} of chain {seed}"
            assert took_s <= DEADLINE_S + LATE_S, f"{agent.name} waited {took_s:.2f} s"

    hold(each_half_serves_itself, heals - time.monotonic(), every_s=0.2)
    for half, others in ((left, right), (right, left)):
        seen = {a.name: "alive" for a in half} | {a.name: "failed" for a in others}
        assert [states(agent) for agent in half] == [seen] * 3
        assert [declared_failed(agent) for agent in half] == [{a.name for a in others}] * 3

    ends = time.monotonic() + KVMESH_LAN.push_pull_interval_s + 5
    cluster.network.heal()
    for agent in agents:
        wait_until(lambda agent=agent: same(agent, agents), ends - time.monotonic(), f"{agent.name} agrees with all")
    for agent in agents:
        assert holders(agent, during[3]) == {"b": 4, "c": 4}
        assert holders(agent, during[4]) == {"e": 4, "f": 4}
    assert get(right[0], 3, 4, DEADLINE_S) == 4
    assert get(left[0], 4, 4, DEADLINE_S) == 4


def same(agent: Process, agents: Sequence[Process]) -> bool:
    """Whether an agent sees all of them alive, and knows of each what it knows of itself."""
    if states(agent) != {other.name: "alive" for other in agents}:
        return False
    seen = held(agent)
    return all(other.name in seen and seen[other.name] == held(other).get(other.name) for other in agents)


# --- row 4 -----------------------------------------------------------------------------------------------------------


@needs_network
def test_where_packets_pass_one_way_only_others_vouch_for_both_nodes(cluster: HostCluster) -> None:
    agents = start(cluster, "abcd")
    before = {name: node["incarnation"] for name, node in nodes(agents[2]).items()}
    cluster.network.cut_one_way([2], [3])
    watch(agents, 20)
    after = {name: node["incarnation"] for name, node in nodes(agents[2]).items()}
    assert all(after[name] - before[name] <= 1 for name in "abcd"), (before, after)
    assert [declared_failed(agent) for agent in agents] == [set()] * 4
