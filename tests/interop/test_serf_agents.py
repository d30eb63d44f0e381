"""Real agents of ours and of Serf in one mesh, over real sockets: what each says of the other, and that Serf does not
complain. Every test runs in the clear and encrypted, and ends with a look at the logs of all Serf agents."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import kvmesh
from tests.cluster.views import declared_failed, nodes, states, wait_states
from tests.support.cluster import Cluster, Process
from tests.support.serf import LOCAL, SerfAgent, installed
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.skipif(not installed(), reason="serf is not installed"),
    pytest.mark.cluster,
    pytest.mark.slow,  # real processes, and Serf's own pace
]

SLACK_S = 3.0
"""What a busy machine may add to a bound."""
STOPPED = r"\[ERR\] memberlist: Failed fallback ping: read tcp \S+: i/o timeout$"
"""What Serf says of a process that is stopped: the kernel still accepts its connections, and it does not answer."""
REFUTING = r"\[WARN\] memberlist: Refuting a (suspect|dead) message \(from: [ab]\)$"
"""What Serf says when it was itself suspected, and comes back."""


class Mesh:
    """Agents of both kinds, all with one key or with none."""

    def __init__(self, folder: Path, key: str, stack: ExitStack) -> None:
        self.folder = folder
        self.key = key
        self.serfs: list[SerfAgent] = []
        self._stack = stack
        self._cluster = stack.enter_context(Cluster(folder))

    def serf(self, name: str, *, join: Sequence[str] = (), key: str | None = None, **more: Any) -> SerfAgent:
        """A Serf agent that is ready."""
        agent = SerfAgent(name, self.folder, key=self.key if key is None else key, join=join, **more)
        self._stack.callback(agent.kill)
        self.serfs.append(agent)
        agent.wait_ready()
        return agent

    def ours(
        self, name: str, *, join: Sequence[str] = (), key: str | None = None, flags: Sequence[str] = ()
    ) -> Process:
        """An agent of ours, not yet waited for."""
        key = self.key if key is None else key
        return self._cluster.agent(
            name, memory="16MiB", join=join, flags=[*key_flags(self.folder, name, key), *flags], wait=False
        )

    def assert_no_complaints(self, *provoked: str) -> None:
        """None of the Serf agents has said a word that this test did not provoke."""
        complaints = {agent.name: agent.complaints(*provoked) for agent in self.serfs}
        assert not any(complaints.values()), complaints


@pytest.fixture(params=["clear", "encrypted"])
def mesh(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mesh]:
    with ExitStack() as stack:
        yield Mesh(tmp_path, new_key() if request.param == "encrypted" else "", stack)


def new_key() -> str:
    return base64.b64encode(os.urandom(32)).decode()


def key_flags(folder: Path, name: str, key: str) -> list[str]:
    if not key:
        return []
    file = folder / f"{name}.key"
    file.touch(mode=0o600)
    file.write_text(f"{key}\n")
    return ["--key-file", str(file)]


def wait_serf_states(agents: Sequence[SerfAgent], wanted: dict[str, str], timeout_s: float) -> None:
    for agent in agents:
        wait_until(lambda agent=agent: agent.states() == wanted, timeout_s, f"serf {agent.name} sees {wanted}")


def counters(process: Process) -> dict[str, Any]:
    with kvmesh.connect(process.socket) as connection:
        return dict(connection.stats()["discovery"])


def test_both_kinds_join_list_and_bury_each_other(mesh: Mesh) -> None:
    """They join either way and list each other alive. Who leaves is left, who is killed is failed, to both kinds."""
    s = mesh.serf("s")
    a, b, c = (mesh.ours(name, join=[s.address] if name != "b" else []) for name in "abc")
    for process in (a, b, c):
        process.wait_ready()
    t = mesh.serf("t", join=[a.gossip_address], tags={"role": "database"})
    u = mesh.serf("u", join=[s.address])
    u.join(b.gossip_address)  # the two halves become one
    everyone = dict.fromkeys("abcstu", "alive")
    wait_states([a, b, c], everyone, 15)
    wait_serf_states([s, t, u], everyone, 15)
    assert {name: node["addr"] for name, node in s.members().items()} == {
        **{process.name: process.gossip_address for process in (a, b, c)},
        **{agent.name: agent.address for agent in (s, t, u)},
    }
    seen = nodes(c)
    assert {name: seen[name]["gossip_address"] for name in "stu"} == {g.name: g.address for g in (s, t, u)}
    assert {name: seen[name]["role"] for name in "abcstu"} == {
        **dict.fromkeys("abc", "agent"), "s": "serf", "t": "database", "u": "serf"
    }  # fmt: skip
    assert s.members()["a"]["tags"]["role"] == "agent"
    s.command("event", "deploy", "now")  # what only Serf knows does no harm
    wait_until(lambda: u.says("Received event: user-event: deploy"), 10, "the event is everywhere in Serf")

    a.stop()
    t.leave()
    left = everyone | {"a": "left", "t": "left"}
    wait_states([b, c], left, 10)
    wait_serf_states([s, u], left, 10)

    b.kill()
    u.kill()
    buried = left | {"b": "failed", "u": "failed"}
    wait_serf_states([s], buried, LOCAL.failed_within_s(4) + SLACK_S)
    wait_states([c], buried, LOCAL.failed_within_s(4) + SLACK_S)
    c.stop()
    wait_serf_states([s], buried | {"c": "left"}, 10)
    mesh.assert_no_complaints()


def test_a_stopped_node_refutes_to_both_kinds(mesh: Mesh) -> None:
    """SIGSTOP and SIGCONT: of ours until it is suspected, and until it is failed; of Serf's until it is failed."""
    s = mesh.serf("s")
    a, b = (mesh.ours(name, join=[s.address]) for name in "ab")
    for process in (a, b):
        process.wait_ready()
    everyone = dict.fromkeys("abs", "alive")
    wait_states([a, b], everyone, 15)
    wait_serf_states([s], everyone, 15)
    incarnation = nodes(b)["a"]["incarnation"]

    a.pause()
    wait_until(lambda: states(b)["a"] == "suspect", 10, "b suspects a")
    a.resume()
    wait_until(lambda: nodes(b)["a"]["incarnation"] > incarnation, 10, "b hears a refute")
    wait_states([a, b], everyone, 10)
    wait_serf_states([s], everyone, 10)
    assert declared_failed(b) == set()
    assert not s.says("EventMemberFailed")
    incarnation = nodes(b)["a"]["incarnation"]

    a.pause()
    failed = everyone | {"a": "failed"}
    wait_states([b], failed, 15)
    wait_serf_states([s], failed, LOCAL.failed_within_s(3) + SLACK_S)
    a.resume()
    wait_states([a, b], everyone, 10)
    wait_serf_states([s], everyone, 10)
    assert nodes(b)["a"]["incarnation"] > incarnation
    assert declared_failed(a) == set()
    mesh.assert_no_complaints(STOPPED)

    s.pause()
    wait_states([a, b], everyone | {"s": "failed"}, 20)
    s.resume()
    wait_states([a, b], everyone, 20)
    wait_serf_states([s], everyone, 20)
    mesh.assert_no_complaints(STOPPED, REFUTING)
