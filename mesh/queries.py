"""Questions about the cluster, and their answers: what `kvmesh nodes`, `map` and `locate` show.

Agents and controllers answer them alike: an agent on its unix socket, both on the mesh port (a call that begins with
`CALL_PREFIX`). A question is a tagged msgpack array, an answer a JSON document whose fields programs rely on
(design.md, "Public surface"): add fields, rename none. An answer shows what this process has seen. It is a hint: only a
node says what it holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec

from kvmesh import protocol
from kvmesh.discovery import Discovery, Member, MemberState
from kvmesh.transport.errors import ProtocolError

CALL_PREFIX = b"Q"


class _Question(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    pass


class Nodes(_Question, frozen=True, tag="nodes"):
    """Who is there?"""


class Map(_Question, frozen=True, tag="map"):
    """What is held where?"""


class Locate(_Question, frozen=True, tag="locate"):
    """Who holds the front of this chain? Keys as one blob."""

    keys: bytes


class Stats(_Question, frozen=True, tag="stats"):
    """What has this process counted?"""


Question = Nodes | Map | Locate | Stats
_decoder: msgspec.msgpack.Decoder[Question] = msgspec.msgpack.Decoder(Question)


def encode(question: Question) -> bytes:
    """A question as bytes."""
    return msgspec.msgpack.encode(question)


class Queries:
    """Answers questions from one process's discovery. Runs on the loop."""

    def __init__(self, discovery: Discovery, stats: Callable[[], dict[str, Any]]) -> None:
        """`stats` gives this process's own counters."""
        self._discovery = discovery
        self._stats = stats

    def answer(self, body: bytes) -> bytes:
        """The JSON document that answers `body`. Raises `ProtocolError` when it is no question."""
        try:
            question = _decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"a question does not follow the protocol: {error}") from None
        match question:
            case Nodes():
                document = self.nodes()
            case Map():
                document = self.map()
            case Locate():
                document = self.locate(protocol.unpack_keys(question.keys))
            case Stats():
                document = self._stats()
        return msgspec.json.encode(document)

    def nodes(self) -> dict[str, Any]:
        """Every member, this process first."""
        held = {node.name: node.totals for node in self._discovery.map.summary().nodes}
        own, now = self._discovery.identity.name, time.monotonic()
        found = []
        for member in self._discovery.members():
            totals = held.get(member.name)
            found.append(
                {
                    "name": member.name,
                    "role": member.role,
                    "state": member.state.value,
                    "address": member.address,
                    "epoch": member.epoch,
                    "seq": member.head.seq if member.head else 0,
                    "chunks": totals.chunks if totals else 0,
                    "bytes": totals.size_bytes if totals else 0,
                    "rtt_s": None if member.name == own else member.rtt_s,
                    "head_age_s": round(max(0.0, now - member.last_seen), 3),
                    "up_s": up_s(member),
                    "meta": dict(member.meta),
                }
            )
        return {"nodes": found}

    def map(self) -> dict[str, Any]:
        """Totals by namespace and by node."""
        summary = self._discovery.map.summary()
        return {
            "complete": summary.complete,
            "entries": summary.entries,
            "namespaces": [
                {
                    **_described(space.description),
                    "id": space.namespace_id.hex(),
                    "nodes": space.nodes,
                    "chunks": space.totals.chunks,
                    "bytes": space.totals.size_bytes,
                }
                for space in summary.namespaces
            ],
            "nodes": [
                {
                    "name": node.name,
                    "complete": node.complete,
                    "epoch": node.epoch,
                    "seq": node.seq,
                    "chunks": node.totals.chunks,
                    "bytes": node.totals.size_bytes,
                    "tiers": {
                        tier: {"chunks": chunks, "bytes": size_bytes}
                        for tier, (chunks, size_bytes) in node.totals.tiers.items()
                    },
                }
                for node in summary.nodes
            ],
        }

    def locate(self, chain: list[bytes]) -> dict[str, Any]:
        """The holders of the chain's front, best first."""
        return {
            "chunks": len(chain),
            "holders": [
                {"node": run.node, "run_chunks": run.run_chunks, "tier": run.tier}
                for run in self._discovery.map.locate(chain)
            ],
        }


def up_s(member: Member) -> float | None:
    """How long a member has been up, by its epoch (milliseconds of its wall clock at its start); None when it is
    not."""
    if member.state in (MemberState.FAILED, MemberState.LEFT):
        return None
    return round(max(0.0, time.time() - member.epoch / 1000), 1)


def _described(description: bytes) -> dict[str, Any]:
    """What a node said of a namespace. It comes from a peer, so it may be anything."""
    try:
        fields = msgspec.json.decode(description, type=dict[str, Any]) if description else {}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        fields = {}
    return {"model": "", **fields}
