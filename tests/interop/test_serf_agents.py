"""Real agents of ours and of Serf in one mesh, over real sockets: what each says of the other, and that Serf does not
complain. Every test runs in the clear and encrypted, and ends with a look at the logs of all Serf agents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cluster.views import declared_failed, nodes, states, wait_states
from tests.interop.support import KINDS, SLACK_S, Mesh, key_of, wait_serf_states
from tests.support.serf import LOCAL, installed
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.skipif(not installed(), reason="serf is not installed"),
    pytest.mark.cluster,
    pytest.mark.slow,  # real processes, and Serf's own pace
]

STOPPED = r"\[ERR\] memberlist: Failed fallback ping: read tcp \S+: i/o timeout$"
"""What Serf says of a process that is stopped: the kernel still accepts its connections, and it does not answer."""
REFUTING = r"\[WARN\] memberlist: Refuting a (suspect|dead) message \(from: [ab]\)$"
"""What Serf says when it was itself suspected, and comes back."""


@pytest.fixture(params=KINDS)
def mesh(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mesh]:
    with ExitStack() as stack:
        yield Mesh(tmp_path, key_of(request.param), stack)


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
    wait_until(lambda: s.says("Received event: user-event: deploy"), 10, "Serf has sent its event")

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
