"""Keys, changed on several nodes: managers that pass each other their messages, some of which get lost."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.discovery.actions import Notify
from kvmesh.discovery.keying import (
    NO_KEYRING,
    PAYLOAD_PREFIX,
    KeyManager,
    KeysAnswered,
    KeysResult,
    NodeKeys,
    Operation,
)
from kvmesh.discovery.swim.events import SendUser
from kvmesh.discovery.wire.keyring import Keyring, fingerprint
from kvmesh.discovery.wire.messages import Endpoint
from kvmesh.transport.errors import SettingsError
from kvmesh.transport.limits import KEYS_PER_RING_MAX, KEYS_ROUND_S

OLD, NEW = b"o" * 32, b"n" * 32
NAMES = ("a", "b", "c")


class Nodes:
    """Some managers with a keyring each. `sent` has all messages; those to `deaf` nodes are lost."""

    def __init__(self, *rings: tuple[bytes, ...]) -> None:
        self.rings = [Keyring(ring) if ring else None for ring in rings]
        self.numbers = itertools.count(1)
        self.ids = itertools.count(1)
        self.saved: list[str] = []
        self.sent: list[SendUser] = []
        self.results: list[KeysAnswered] = []
        self.deaf: set[str] = set()
        self.managers = [self._manager(name, ring) for name, ring in zip(NAMES, self.rings, strict=False)]

    def _manager(self, name: str, ring: Keyring | None) -> KeyManager:
        return KeyManager(
            name,
            ring,
            endpoint=lambda: at(name),
            numbers=lambda: next(self.numbers),
            new_id=lambda: next(self.ids).to_bytes(8, "big"),
            save=lambda: self.saved.append(name),
        )

    @property
    def members(self) -> list[tuple[str, Endpoint]]:
        return [(name, at(name)) for name in NAMES[1 : len(self.managers)]]

    def ask(self, operation: Operation, key: bytes = b"", now: float = 0.0) -> KeysResult | None:
        """Node a asks; the result, when there is one at once."""
        self.perform(self.managers[0].ask(7, operation, key, self.members, now), now)
        return self.result()

    def tick(self, now: float) -> KeysResult | None:
        self.perform(self.managers[0].tick(now), now)
        return self.result()

    def result(self) -> KeysResult | None:
        assert all(one.token == 7 for one in self.results)
        return self.results.pop().result if self.results else None

    def perform(self, actions: list[Any], now: float) -> None:
        for action in actions:
            match action:
                case SendUser(_, target, payload, timeout_s):
                    assert timeout_s <= KEYS_ROUND_S
                    self.sent.append(action)
                    name = NAMES[target.port - 1]
                    if name not in self.deaf:
                        self.perform(self.managers[target.port - 1].on_payload(payload, now), now)
                case Notify(KeysAnswered() as answered):
                    self.results.append(answered)
                case _:
                    raise AssertionError(action)

    def keys(self) -> list[str]:
        return ["".join(chr(key[0]) for key in ring.keys) if ring else "" for ring in self.rings]


def at(name: str) -> Endpoint:
    return Endpoint(b"\x7f\0\0\1", NAMES.index(name) + 1)


def test_a_rotation_on_all_nodes():
    nodes = Nodes((OLD,), (OLD,), (OLD,))
    result = nodes.ask("install", NEW)
    assert result is not None
    assert (result.is_done, result.fingerprint, result.error) == (True, fingerprint(NEW), "")
    assert [node.name for node in result.nodes] == ["a", "b", "c"]
    assert result.nodes[0].fingerprints == (fingerprint(OLD), fingerprint(NEW))
    assert nodes.keys() == ["on", "on", "on"]
    assert sorted(nodes.saved) == ["a", "b", "c"]
    result = nodes.ask("use", NEW)
    assert result is not None
    assert result.is_done
    assert nodes.keys() == ["no", "no", "no"]
    result = nodes.ask("remove", OLD)
    assert result is not None
    assert result.is_done
    assert nodes.keys() == ["n", "n", "n"]
    assert nodes.managers[1].counters.questions == 5
    assert nodes.managers[0].wake_at() == float("inf")


def test_a_list_changes_nothing_and_tells_no_key():
    nodes = Nodes((OLD, NEW), (NEW,), (OLD,))
    result = nodes.ask("list")
    assert result == KeysResult(
        "list",
        "",
        (
            NodeKeys("a", "ok", "", (fingerprint(OLD), fingerprint(NEW))),
            NodeKeys("b", "ok", "", (fingerprint(NEW),)),
            NodeKeys("c", "ok", "", (fingerprint(OLD),)),
        ),
    )
    assert nodes.saved == []
    assert not any(key in message.payload for message in nodes.sent for key in (OLD, NEW))


def test_nothing_is_used_that_a_node_lacks():
    nodes = Nodes((OLD, NEW), (OLD, NEW), (OLD,))
    result = nodes.ask("use", NEW)
    assert result is not None
    assert not result.is_done
    assert "nothing was changed" in result.error
    assert [(node.name, node.status, node.error) for node in result.nodes] == [
        ("b", "ok", ""), ("c", "failed", "it does not have this key"),
    ]  # fmt: skip
    assert nodes.keys() == ["on", "on", "o"]


def test_nothing_is_removed_that_a_node_uses():
    nodes = Nodes((NEW, OLD), (OLD, NEW), (NEW, OLD))
    result = nodes.ask("remove", OLD)
    assert result is not None
    assert [(node.name, node.error) for node in result.nodes] == [("b", "it still uses this key"), ("c", "")]
    assert nodes.keys() == ["no", "on", "no"]


def test_a_key_that_no_node_has_is_not_said_to_be_removed():
    nodes = Nodes((OLD,), (OLD,))
    result = nodes.ask("remove", NEW)
    assert result is not None
    assert not result.is_done
    assert result.error.startswith(f"no node has the key {fingerprint(NEW)}")
    nodes.deaf = {"b"}  # it may have the key
    assert nodes.ask("remove", NEW, now=10.0) is None
    result = nodes.tick(10.0 + KEYS_ROUND_S)
    assert result is not None
    assert "nothing was changed" in result.error
    assert [node.status for node in result.nodes] == ["silent"]


def test_a_silent_node_ends_the_first_round_and_nothing_is_changed():
    nodes = Nodes((OLD, NEW), (OLD, NEW), (OLD, NEW))
    nodes.deaf = {"c"}
    assert nodes.ask("use", NEW, now=10.0) is None
    assert nodes.managers[0].wake_at() == 10.0 + KEYS_ROUND_S
    assert nodes.tick(11.0) is None
    result = nodes.tick(12.0)
    assert result is not None
    assert result.nodes[1] == NodeKeys("c", "silent", "it did not answer within 2 s")
    assert nodes.keys() == ["on", "on", "on"]


def test_one_that_falls_silent_after_the_first_round_is_named_and_the_others_do_it():
    nodes = Nodes((OLD, NEW), (OLD, NEW), (OLD, NEW))
    for action in nodes.managers[0].ask(7, "use", NEW, nodes.members, 0.0):
        answers = nodes.managers[action.target.port - 1].on_payload(action.payload, 0.0)
        nodes.deaf = {"c"}  # the second round is sent when the last answer comes
        nodes.perform(answers, 0.0)
    result = nodes.tick(KEYS_ROUND_S)
    assert result is not None
    assert (result.is_done, result.error) == (False, "")
    assert [(node.name, node.status) for node in result.nodes] == [("a", "ok"), ("b", "ok"), ("c", "silent")]
    assert nodes.keys() == ["no", "no", "on"]


def test_one_that_cannot_be_reached_ends_it_sooner():
    nodes = Nodes((OLD,), (OLD,), (OLD,))
    nodes.deaf = {"c"}
    assert nodes.ask("install", NEW) is None
    (to_c,) = [message.number for message in nodes.sent if message.target == at("c")]
    nodes.perform(nodes.managers[0].on_failed(999, 0.1), 0.1)
    assert nodes.result() is None
    nodes.perform(nodes.managers[0].on_failed(to_c, 0.1), 0.1)
    result = nodes.result()
    assert result is not None
    assert [(node.name, node.status) for node in result.nodes] == [("a", "ok"), ("b", "ok"), ("c", "silent")]
    assert nodes.keys() == ["on", "on", "o"]
    assert nodes.managers[0].on_failed(to_c, 0.2) == []


def test_alone_it_is_done_at_once():
    nodes = Nodes((OLD, NEW))
    result = nodes.ask("use", NEW)
    assert result is not None
    assert result.is_done
    assert nodes.keys() == ["no"]


@pytest.mark.parametrize(
    ("rings", "operation", "key", "sentence"),
    [
        ([()], "list", b"", "a: " + NO_KEYRING),
        ([(OLD,), (OLD,)], "use", NEW, "not installed"),
        ([(OLD,), (OLD,)], "remove", OLD, "the primary"),
        ([(OLD,), (OLD,)], "install", b"short", "16, 24 or 32 bytes, not 5"),
        ([tuple(bytes([n]) * 32 for n in range(KEYS_PER_RING_MAX))], "install", NEW, "16 keys: remove one"),
    ],
)
def test_what_the_asker_cannot_do_asks_nobody(
    rings: list[tuple[bytes, ...]], operation: Operation, key: bytes, sentence: str
):
    nodes = Nodes(*rings)
    before = nodes.keys()
    result = nodes.ask(operation, key)
    assert result is not None
    assert sentence in result.error
    assert (result.nodes, nodes.sent, nodes.keys()) == ((), [], before)


def test_one_at_a_time():
    nodes = Nodes((OLD,), (OLD,))
    nodes.deaf = {"b"}
    assert nodes.ask("list") is None
    result = nodes.ask("install", NEW)
    assert result is not None
    assert "another change of keys is under way" in result.error
    assert nodes.tick(KEYS_ROUND_S) is not None


def test_what_another_node_cannot_do_is_its_error():
    nodes = Nodes((OLD,), (), tuple(bytes([n]) * 32 for n in range(KEYS_PER_RING_MAX)))
    assert nodes.ask("install", NEW) is None  # b has no key: it can read no question
    result = nodes.tick(KEYS_ROUND_S)
    assert result is not None
    assert [(node.name, node.status) for node in result.nodes] == [("a", "ok"), ("b", "silent"), ("c", "failed")]
    assert "remove one" in result.nodes[2].error
    assert nodes.managers[2].counters.refused == 1


def test_a_key_file_that_cannot_be_written_is_said():
    nodes = Nodes((OLD,), (OLD,))

    def full() -> None:
        raise SettingsError("cannot write the gossip keys: no space")

    nodes.managers[1]._save = full
    result = nodes.ask("install", NEW)
    assert result is not None
    assert result.nodes[1].error == "it did, but a restart undoes it: cannot write the gossip keys: no space"
    assert nodes.keys() == ["on", "on"]


def test_a_question_that_is_repeated_and_an_answer_that_is_not_expected_are_counted():
    nodes = Nodes((OLD,), (OLD,))
    nodes.ask("install", NEW)
    question, answer = nodes.sent
    assert nodes.managers[1].on_payload(question.payload, 1.0) == []
    assert nodes.managers[1].counters.replayed == 1
    assert nodes.managers[0].on_payload(answer.payload, 1.0) == []
    assert nodes.managers[0].counters.unexpected == 1
    nodes.deaf = {"b"}
    assert nodes.ask("list") is None
    assert nodes.managers[0].on_payload(answer.payload, 1.0) == []
    assert nodes.managers[0].counters.unexpected == 2


def test_the_questions_that_are_remembered_are_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kvmesh.discovery.keying.KEYS_REMEMBERED_MAX", 2)
    nodes = Nodes((OLD,), (OLD,))
    for _ in range(5):
        assert nodes.ask("list") is not None
    assert len(nodes.managers[1]._seen) == 2


@given(st.binary(max_size=80))
def test_any_bytes_are_a_counted_error(data: bytes):
    nodes = Nodes((OLD,), (OLD,))
    manager = nodes.managers[1]
    assert manager.on_payload(PAYLOAD_PREFIX + data, 0.0) == []
    assert manager.counters.malformed == 1


@given(st.data())
def test_a_changed_message_never_raises(data: st.DataObject):
    nodes = Nodes((OLD,), (OLD,))
    nodes.ask("list")
    for message in list(nodes.sent):
        changed = bytearray(message.payload)
        changed[data.draw(st.integers(2, len(changed) - 1))] = data.draw(st.integers(0, 255))
        for manager in nodes.managers:
            manager.on_payload(bytes(changed), 0.0)
