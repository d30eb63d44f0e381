"""Questions about the cluster, and their answers: what `kvmesh nodes`, `map`, `locate` and `keys` show.

Agents and controllers answer them alike: an agent on its unix socket, both on the mesh port (a call that begins with
`CALL_PREFIX`). A question is a tagged msgpack array, an answer a JSON document whose fields programs rely on
(design.md, "Public surface"): add fields, rename none. An answer shows what this process has seen. It is a hint: only a
node says what it holds. One question changes something, and takes other nodes to answer: `Keys`.
"""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

import msgspec

from kvmesh import protocol
from kvmesh.discovery import Discovery, Member, MemberState
from kvmesh.discovery.keying import KeysResult, Operation
from kvmesh.discovery.meta import public_key_text
from kvmesh.discovery.wire.keyring import KEY_SIZES
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


class Keys(_Question, frozen=True, tag="keys"):
    """List the gossip keys of all nodes, or change them on all nodes. The key is empty for a list."""

    operation: Operation
    key: Annotated[bytes, msgspec.Meta(max_length=max(KEY_SIZES))] = b""


Question = Nodes | Map | Locate | Stats | Keys
Later = Callable[[], Coroutine[Any, Any, bytes]]
"""What gets an answer that takes other nodes."""
_decoder: msgspec.msgpack.Decoder[Question] = msgspec.msgpack.Decoder(Question)


def encode(question: Question) -> bytes:
    """A question as bytes."""
    return msgspec.msgpack.encode(question)


class Queries:
    """Answers questions from one process's discovery. Runs on the loop."""

    def __init__(
        self,
        discovery: Discovery,
        stats: Callable[[], dict[str, Any]],
        paths: Callable[[], list[dict[str, Any]]] = list,
    ) -> None:
        """`stats` gives this process's own counters, `paths` what it measured towards peers (`Rates.document`)."""
        self._discovery = discovery
        self._stats = stats
        self._paths = paths

    def answer(self, body: bytes) -> bytes | Later:
        """The JSON document that answers `body`, or what gets it from others. Raises `ProtocolError` when it is no
        question."""
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
            case Keys():
                return functools.partial(self._keys, question)
        return msgspec.json.encode(document)

    def nodes(self) -> dict[str, Any]:
        """Every member, this process first."""
        held = {node.name: node.totals for node in self._discovery.map.summary().nodes}
        own, now = self._discovery.identity.name, time.monotonic()
        paths = {path["peer"]: path for path in sorted(self._paths(), key=_newest_last)}
        found = []
        for member in self._discovery.members():
            totals = held.get(member.name)
            path = paths.get(member.name, {})
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
                    "backend": path.get("backend"),
                    "bytes_per_s": path.get("bytes_per_s"),
                    "head_age_s": 0.0 if member.name == own and member.head else head_age_s(member, now),
                    "up_s": up_s(member),
                    "gossip_address": member.gossip_address or None,
                    "incarnation": member.incarnation,
                    "public_key": public_key_text(member.public_key) or None,
                    "meta": dict(member.meta),
                }
            )
        conflicts = [
            {"name": conflict.name, "address": conflict.address, "other_address": conflict.other_address}
            for conflict in self._discovery.conflicts()
        ]
        return {"nodes": found, "conflicts": conflicts}

    async def _keys(self, question: Keys) -> bytes:
        result = await self._discovery.keys(question.operation, question.key)
        return msgspec.json.encode(keys_document(result))

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
                    "fingerprint": f"{node.fingerprint:016x}",
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


def keys_document(result: KeysResult) -> dict[str, Any]:
    """How an operation on the gossip keys went: by node, and by key over all nodes that answered."""
    held = Counter(key for node in result.nodes for key in node.fingerprints)
    primary = Counter(node.fingerprints[0] for node in result.nodes if node.fingerprints)
    return {
        "operation": result.operation,
        "fingerprint": result.fingerprint or None,
        "done": result.is_done,
        "error": result.error or None,
        "keys": [
            {"fingerprint": key, "nodes": nodes, "primary_nodes": primary[key]} for key, nodes in held.most_common()
        ],
        "nodes": [
            {
                "name": node.name,
                "status": node.status,
                "error": node.error or None,
                "fingerprints": list(node.fingerprints),
            }
            for node in result.nodes
        ],
    }


def head_age_s(member: Member, now: float) -> float | None:
    """How long ago a member told the head that is known of it; None when it has none."""
    if member.head is None:
        return None
    # A static membership has no time of its own for a head: each ping brings it.
    told_at = member.last_seen if member.head_at is None else member.head_at
    return round(max(0.0, now - told_at), 3)


def up_s(member: Member) -> float | None:
    """How long a member has been up, by its epoch (milliseconds of its wall clock at its start); None when it is
    not, or is of another application."""
    if member.state in (MemberState.FAILED, MemberState.LEFT) or not member.epoch:
        return None
    return round(max(0.0, time.time() - member.epoch / 1000), 1)


def _newest_last(path: dict[str, Any]) -> float:
    return -math.inf if path["age_s"] is None else -float(path["age_s"])


def _described(description: bytes) -> dict[str, Any]:
    """What a node said of a namespace. It comes from a peer, so it may be anything."""
    try:
        fields = msgspec.json.decode(description, type=dict[str, Any]) if description else {}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        fields = {}
    return {"model": "", **fields}
