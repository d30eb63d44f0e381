"""What the cluster says about itself, and how the questions reach it."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from kvmesh import queries
from kvmesh.discovery import Conflict, Head, Identity, Member, MemberState, node_id
from kvmesh.discovery.keying import KeysResult, NodeKeys
from kvmesh.queries import Queries
from kvmesh.transport.errors import CallerError, ProtocolError
from tests.support.agents import LocalAgents

KEY = b"n" * 32
EPOCH = 1_795_516_800_123
RESULT = KeysResult("install", "f1", (NodeKeys("a", "ok", "", ("f0", "f1")), NodeKeys("b", "silent", "no answer")))
DOCUMENT = {
    "operation": "install",
    "fingerprint": "f1",
    "done": False,
    "error": None,
    "keys": [
        {"fingerprint": "f0", "nodes": 1, "primary_nodes": 1},
        {"fingerprint": "f1", "nodes": 1, "primary_nodes": 0},
    ],
    "nodes": [
        {"name": "a", "status": "ok", "error": None, "fingerprints": ["f0", "f1"]},
        {"name": "b", "status": "silent", "error": "no answer", "fingerprints": []},
    ],
}


def head(name: str) -> Head:
    return Head(node_id(name), EPOCH, 7, 3, 1)


class FakeDiscovery:
    """What `Queries` asks of discovery."""

    identity = Identity("a", "agent", EPOCH, "127.0.0.1:1")

    def __init__(self, *members: Member) -> None:
        self._members = members
        self.asked: list[Any] = []

    @property
    def map(self) -> Any:
        return self

    def summary(self) -> Any:
        self.nodes: list[Any] = []
        return self

    def conflicts(self) -> list[Conflict]:
        return [Conflict("b", "127.0.0.1:2", "127.0.0.1:3")]

    def members(self) -> Any:
        return self._members

    async def keys(self, operation: str, key: bytes) -> KeysResult:
        self.asked.append((operation, key))
        return RESULT


def member(name: str, **fields: Any) -> Member:
    known: dict[str, Any] = {
        "role": "agent", "state": MemberState.ALIVE, "address": "127.0.0.1:1", "epoch": EPOCH, "protocol_version": 1,
        "last_seen": time.monotonic() - 5, "rtt_s": 0.001, "head": head(name), "meta": {}, **fields,
    }  # fmt: skip
    return Member(name, **known)


def nodes(*members: Member) -> dict[str, dict[str, Any]]:
    found = Queries(FakeDiscovery(*members), dict).nodes()["nodes"]  # type: ignore[arg-type]
    return {node["name"]: node for node in found}


def test_a_node_found_by_gossip_shows_what_gossip_knows():
    told = member(
        "b", head_at=time.monotonic() - 2, gossip_address="127.0.0.1:7951", incarnation=3, public_key=bytes(range(32))
    )
    node = nodes(told)["b"]
    assert node["head_age_s"] == pytest.approx(2, abs=0.5)
    assert (node["gossip_address"], node["incarnation"]) == ("127.0.0.1:7951", 3)
    assert node["public_key"] == "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8"
    assert (node["epoch"], node["seq"]) == (EPOCH, 7)


def test_a_node_of_a_static_membership_has_the_age_of_its_last_ping():
    node = nodes(member("b"))["b"]
    assert node["head_age_s"] == pytest.approx(5, abs=0.5)
    assert (node["gossip_address"], node["incarnation"], node["public_key"]) == (None, 0, None)


def test_the_own_head_is_as_new_as_can_be_and_a_controller_has_none():
    found = nodes(member("a"), member("c", role="controller", head=None, head_at=1.0))
    assert (found["a"]["head_age_s"], found["a"]["rtt_s"]) == (0.0, None)
    assert (found["c"]["head_age_s"], found["c"]["seq"]) == (None, 0)


def test_names_that_two_processes_use_are_told():
    conflicts = Queries(FakeDiscovery(), dict).nodes()["conflicts"]  # type: ignore[arg-type]
    assert conflicts == [{"name": "b", "address": "127.0.0.1:2", "other_address": "127.0.0.1:3"}]


def test_a_serf_agent_is_listed_without_what_it_cannot_know():
    serf = member("s", role="serf", epoch=0, head=None, rtt_s=None, meta={"dc": "x"}, address="10.0.0.1:7946")
    node = nodes(serf)["s"]
    assert (node["role"], node["address"], node["epoch"], node["up_s"]) == ("serf", "10.0.0.1:7946", 0, None)
    assert (node["head_age_s"], node["chunks"], node["meta"]) == (None, 0, {"dc": "x"})


def test_a_question_about_keys_takes_other_nodes():
    discovery = FakeDiscovery()
    asked = Queries(discovery, dict)  # type: ignore[arg-type]
    answer = asked.answer(queries.encode(queries.Keys("install", KEY)))
    assert callable(answer)
    assert discovery.asked == []
    assert json.loads(asyncio.run(answer())) == DOCUMENT
    assert discovery.asked == [("install", KEY)]


@pytest.mark.parametrize("question", [["keys", "burn", KEY], ["keys", "use", b"k" * 33], ["keys"], ["keys", "use", 1]])
def test_a_malformed_question_about_keys_is_an_error(question: list[Any]):
    import msgspec

    with pytest.raises(ProtocolError):
        Queries(FakeDiscovery(), dict).answer(msgspec.msgpack.encode(question))  # type: ignore[arg-type]


def test_a_client_asks_about_keys_and_other_requests_go_on_meanwhile(tmp_path: Path):
    with LocalAgents(tmp_path) as agents:
        agent = agents.start("a")
        mesh = agents.mesh("a")
        seen: list[Any] = []

        async def keys(operation: str, key: bytes) -> KeysResult:
            if operation == "remove":
                raise CallerError("not this one")
            seen.append((operation, key, await asyncio.to_thread(lambda: len(mesh.nodes()["nodes"]))))
            return RESULT

        agent.node.discovery.keys = keys  # type: ignore[method-assign]
        assert mesh.keys("install", KEY) == DOCUMENT
        assert seen == [("install", KEY, 1)]
        with pytest.raises(CallerError, match="not this one"):
            mesh.keys("remove", KEY)
