"""Messages as bytes: the kind, then a map whose fields have memberlist's names; a user message: the kind, its bytes.

Owns the table of kinds and fields. `encode` and `decode` are for what packets carry. Over a stream most of these look
the same; push/pull and user messages have more than one part there, and `streams` puts those together. Every value of a
peer is checked in `values`. Knows no wrapping, no socket and no clock. Runs wherever it is called.

    Ping           Node SeqNo  SourceAddr SourceNode SourcePort
    IndirectPing   Nack Node Port SeqNo  SourceAddr SourceNode SourcePort  Target
    Ack            Payload SeqNo
    Nack           SeqNo
    Suspect, Dead  From Incarnation Node
    Alive          Addr Incarnation Meta Node Port Vsn
    push/pull      Join Nodes UserStateLen, once; then for each node: Addr Incarnation Meta Name Port State Vsn
    ErrorReply     Error

Names and types: hashicorp/memberlist, net.go. In this order, with nil for what is empty, and without the source when
there is none, they are the very bytes that Go sends; any order is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from kvmesh.transport.limits import (
    ACK_PAYLOAD_BYTES_MAX,
    NODE_META_BYTES_MAX,
    REFUSAL_CHARS_MAX,
)

from .errors import Cause, WireError
from .messages import (
    Ack,
    Alive,
    Dead,
    ErrorReply,
    IndirectPing,
    Kind,
    Message,
    Nack,
    Ping,
    PushedNode,
    PushedState,
    Suspect,
    User,
)
from .values import (
    UINT16_MAX,
    Fields,
    flag,
    ip,
    ip_or_none,
    name,
    name_or_none,
    octets,
    pack,
    port,
    text,
    uint,
    uint_or_zero,
    unpack,
    versions,
)

_USER: Final = bytes([Kind.USER])


def encode(message: Message) -> bytes:
    """The message as a packet carries it, or a stream an error. A push/pull is no such message."""
    if type(message) is User:
        return _USER + message.payload
    kind, fields_of = _OUT[type(message)]
    return kind + pack(fields_of(message))


def decode(data: bytes) -> Message:
    """The message that a packet carried. Raises `WireError` for anything else."""
    if not data:
        raise WireError(Cause.MALFORMED, "a message of no bytes")
    kind = data[0]
    if kind == Kind.USER:
        return User(data[1:])
    message_of = PACKET_KINDS.get(kind)
    if message_of is None:
        raise WireError(Cause.UNKNOWN_KIND, f"a message of kind {kind} in a packet")
    return message_of(unpack(data[1:]))


# --- out -------------------------------------------------------------------------------------------------------------


def _ping_fields(message: Ping) -> dict[str, Any]:
    return _source({"Node": message.node, "SeqNo": message.seq}, message)


def _indirect_ping_fields(message: IndirectPing) -> dict[str, Any]:
    fields = {"Nack": message.nack, "Node": message.node, "Port": message.port, "SeqNo": message.seq}
    _source(fields, message)["Target"] = message.ip
    return fields


def _source(fields: dict[str, Any], message: Ping | IndirectPing) -> dict[str, Any]:
    if message.source_ip:
        fields["SourceAddr"] = message.source_ip
    if message.source_node:
        fields["SourceNode"] = message.source_node
    if message.source_port:
        fields["SourcePort"] = message.source_port
    return fields


def _ack_fields(message: Ack) -> dict[str, Any]:
    return {"Payload": message.payload or None, "SeqNo": message.seq}


def _nack_fields(message: Nack) -> dict[str, Any]:
    return {"SeqNo": message.seq}


def _accusation_fields(message: Suspect | Dead) -> dict[str, Any]:
    return {"From": message.accuser, "Incarnation": message.incarnation, "Node": message.node}


def _alive_fields(message: Alive) -> dict[str, Any]:
    return {
        "Addr": message.ip,
        "Incarnation": message.incarnation,
        "Meta": message.meta or None,
        "Node": message.node,
        "Port": message.port,
        "Vsn": message.versions or None,
    }


def _error_fields(message: ErrorReply) -> dict[str, Any]:
    return {"Error": message.text[:REFUSAL_CHARS_MAX]}


def pushed_node_fields(node: PushedNode) -> dict[str, Any]:
    """One node of a push/pull."""
    return {
        "Addr": node.ip,
        "Incarnation": node.incarnation,
        "Meta": node.meta or None,
        "Name": node.name,
        "Port": node.port,
        "State": node.state,
        "Vsn": node.versions or None,
    }


_OUT: Final[dict[type[Message], tuple[bytes, Callable[[Any], dict[str, Any]]]]] = {
    Ping: (bytes([Kind.PING]), _ping_fields),
    IndirectPing: (bytes([Kind.INDIRECT_PING]), _indirect_ping_fields),
    Ack: (bytes([Kind.ACK]), _ack_fields),
    Nack: (bytes([Kind.NACK]), _nack_fields),
    Suspect: (bytes([Kind.SUSPECT]), _accusation_fields),
    Alive: (bytes([Kind.ALIVE]), _alive_fields),
    Dead: (bytes([Kind.DEAD]), _accusation_fields),
    ErrorReply: (bytes([Kind.ERROR]), _error_fields),
}


# --- in --------------------------------------------------------------------------------------------------------------


def _ping(fields: Fields) -> Ping:
    return Ping(
        uint(fields, b"SeqNo"),
        name_or_none(fields, b"Node"),
        ip_or_none(fields, b"SourceAddr"),
        uint_or_zero(fields, b"SourcePort", UINT16_MAX),
        name_or_none(fields, b"SourceNode"),
    )


def _indirect_ping(fields: Fields) -> IndirectPing:
    return IndirectPing(
        uint(fields, b"SeqNo"),
        ip(fields, b"Target"),
        port(fields, b"Port"),
        name_or_none(fields, b"Node"),
        flag(fields, b"Nack"),
        ip_or_none(fields, b"SourceAddr"),
        uint_or_zero(fields, b"SourcePort", UINT16_MAX),
        name_or_none(fields, b"SourceNode"),
    )


def _ack(fields: Fields) -> Ack:
    return Ack(uint(fields, b"SeqNo"), octets(fields, b"Payload", ACK_PAYLOAD_BYTES_MAX))


def _nack(fields: Fields) -> Nack:
    return Nack(uint(fields, b"SeqNo"))


def _suspect(fields: Fields) -> Suspect:
    return Suspect(uint(fields, b"Incarnation"), name(fields, b"Node"), name_or_none(fields, b"From"))


def _dead(fields: Fields) -> Dead:
    return Dead(uint(fields, b"Incarnation"), name(fields, b"Node"), name_or_none(fields, b"From"))


def _alive(fields: Fields) -> Alive:
    return Alive(
        uint(fields, b"Incarnation"),
        name(fields, b"Node"),
        ip(fields, b"Addr"),
        port(fields, b"Port"),
        octets(fields, b"Meta", NODE_META_BYTES_MAX),
        versions(fields, b"Vsn"),
    )


def _error(fields: Fields) -> ErrorReply:
    return ErrorReply(text(fields, b"Error", REFUSAL_CHARS_MAX))


def pushed_node(fields: Fields) -> PushedNode:
    """One node of a push/pull."""
    return PushedNode(
        name(fields, b"Name"),
        ip(fields, b"Addr"),
        port(fields, b"Port"),
        octets(fields, b"Meta", NODE_META_BYTES_MAX),
        uint(fields, b"Incarnation"),
        uint_or_zero(fields, b"State", max(PushedState)),
        versions(fields, b"Vsn"),
    )


PACKET_KINDS: Final[dict[int, Callable[[Fields], Message]]] = {
    Kind.PING: _ping,
    Kind.INDIRECT_PING: _indirect_ping,
    Kind.ACK: _ack,
    Kind.SUSPECT: _suspect,
    Kind.ALIVE: _alive,
    Kind.DEAD: _dead,
    Kind.NACK: _nack,
}
"""What packets carry beside user messages: how the map of each becomes a message."""

STREAM_KINDS: Final[dict[int, Callable[[Fields], Message]]] = {
    Kind.PING: _ping,
    Kind.ACK: _ack,
    Kind.ERROR: _error,
}
"""What streams carry beside push/pull and user messages, which have more than one map."""
