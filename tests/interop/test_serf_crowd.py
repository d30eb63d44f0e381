"""Twenty of ours and three Serf agents: one mesh, one view. Ours share a process, and have sockets of their own."""

from __future__ import annotations

import asyncio
import base64
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvmesh.discovery.wire import compression
from tests.discovery.support import key
from tests.interop.crowd import Crowd
from tests.interop.support import KINDS, SLACK_S, key_of
from tests.support.serf import LAN, SerfAgent, installed
from tests.support.waiting import wait_until_async

pytestmark = [
    pytest.mark.skipif(not installed(), reason="serf is not installed"),
    pytest.mark.slow,  # real processes, and Serf's own pace
]

OURS = [f"n{number}" for number in range(20)]


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_of_ours_and_three_serf_agents_converge(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = key_of(kind)
    decompressed = []
    decompress = compression.decompress

    def counted(data: bytes, limit: int) -> bytes:
        decompressed.append(len(data))
        return decompress(data, limit)

    monkeypatch.setattr(compression, "decompress", counted)
    with ExitStack() as stack:
        serfs = [stack.enter_context(SerfAgent(name, tmp_path, key=secret)) for name in ("s1", "s2", "s3")]
        for agent in serfs[1:]:
            agent.join(serfs[0].address)
        asyncio.run(scene(serfs, base64.b64decode(secret)))
        assert decompressed, "Serf compresses its push/pulls, and none was decompressed"
        assert {agent.name: agent.complaints() for agent in serfs} == {agent.name: [] for agent in serfs}


async def scene(serfs: list[SerfAgent], secret: bytes) -> None:
    crowd = Crowd(secret)
    try:
        for number, name in enumerate(OURS):
            join = serfs[number % 3].address if number % 4 == 0 else crowd.networks[OURS[number // 2]].address
            await crowd.start(name, [join])
        everyone = dict.fromkeys([*OURS, *(agent.name for agent in serfs)], "alive")
        await crowd.wait_states(everyone, 20)
        await wait_serf_states(serfs, everyone, 20)

        for number, name in enumerate(OURS):
            crowd.admit(name, number)
        for name in OURS:
            await wait_until_async(lambda name=name: knows_all(crowd, name), 20, f"{name} knows what all hold")

        await crowd.stop("n7")
        await crowd.stop("n13")
        serfs[2].kill()
        after = everyone | {"n7": "left", "n13": "left", "s3": "failed"}
        await crowd.wait_states(after, LAN.failed_within_s(len(everyone)))
        await wait_serf_states(serfs[:2], after, LAN.failed_within_s(len(everyone)) + SLACK_S)
        for name, node in crowd.nodes.items():
            network = crowd.networks[name].counters
            assert (dict(network.refused), dict(network.left_out), network.unexpected_errors) == ({}, {}, 0), name
            assert node.stats().unexpected_errors == 0
    finally:
        await crowd.stop_all()


def knows_all(crowd: Crowd, name: str) -> bool:
    seen = crowd.nodes[name].map
    return all(seen.has(other, key(number)) for number, other in enumerate(OURS) if other != name)


async def wait_serf_states(agents: list[SerfAgent], wanted: dict[str, str], timeout_s: float) -> None:
    for agent in agents:

        async def seen(agent: SerfAgent = agent) -> bool:
            return await asyncio.to_thread(agent.states) == wanted

        await wait_until_async(seen, timeout_s, f"serf {agent.name} sees {wanted}")
