"""The messages of memberlist's protocol, version 5, as plain frozen values.

    number  message        carried by          says
    0       Ping           packet, stream      are you there? (SWIM's direct probe; over a stream: its fallback)
    1       IndirectPing   packet              ask that node for me
    2       Ack            packet, stream      I am here
    3       Suspect        packet              that node does not answer me
    4       Alive          packet              this node is there, at this address, with this meta
    5       Dead           packet              that node is dead; told by itself: it left
    6       PushPull       stream              all that I know; tell me all that you know
    8       User           packet, stream      bytes of the application
    11      Nack           packet              I asked that node for you; it has not answered
    13      ErrorReply     stream              I could not read what you sent

Compound (7), compress (9), encrypt (10), CRC (12) and label (244) are wrappings, taken off before a message is seen.
Numbers and meanings: hashicorp/memberlist, net.go. Values only; what the bytes look like is `codec`'s business.
"""

from __future__ import annotations

import enum
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from typing import Final, NamedTuple

import msgspec


class Kind(enum.IntEnum):
    """The first byte of a message, or of a wrapping."""

    PING = 0
    INDIRECT_PING = 1
    ACK = 2
    SUSPECT = 3
    ALIVE = 4
    DEAD = 5
    PUSH_PULL = 6
    COMPOUND = 7
    USER = 8
    COMPRESS = 9
    ENCRYPT = 10
    NACK = 11
    CRC = 12
    ERROR = 13
    LABEL = 244


class PushedState(enum.IntEnum):
    """The state of a node, as push/pull carries it."""

    ALIVE = 0
    SUSPECT = 1
    DEAD = 2
    LEFT = 3


class Endpoint(NamedTuple):
    """Where a node's packets and streams go: 4 or 16 raw bytes, as they travel, and a port. They are kept as they came:
    peers compare them byte by byte."""

    ip: bytes
    port: int


@lru_cache(maxsize=8192)
def text_of(endpoint: Endpoint) -> str:
    """``HOST:PORT``, an IPv6 address in brackets. An IPv4 address may have come in the form of IPv6."""
    address = ip_address(endpoint.ip)
    if isinstance(address, IPv6Address):
        address = address.ipv4_mapped or address
    return f"[{address}]:{endpoint.port}" if address.version == 6 else f"{address}:{endpoint.port}"


class Message(msgspec.Struct, frozen=True, gc=False):
    """Any of the messages below."""


class Ping(Message, frozen=True, gc=False):
    """`node` must be the receiver's name: another process may have its address by now. The source is where the answer
    goes; an empty one stands for where the packet came from."""

    seq: int
    node: str
    source_ip: bytes = b""
    source_port: int = 0
    source_node: str = ""


class IndirectPing(Message, frozen=True, gc=False):
    """Ping `node` at (`ip`, `port`) for the source. With `nack`: say so when it does not answer."""

    seq: int
    ip: bytes
    port: int
    node: str
    nack: bool = False
    source_ip: bytes = b""
    source_port: int = 0
    source_node: str = ""


class Ack(Message, frozen=True, gc=False):
    """The answer to the ping, or indirect ping, with this number."""

    seq: int
    payload: bytes = b""


class Nack(Message, frozen=True, gc=False):
    """The target of the indirect ping with this number has not answered in time."""

    seq: int


class Suspect(Message, frozen=True, gc=False):
    """`accuser` got no answer from `node`."""

    incarnation: int
    node: str
    accuser: str


class Alive(Message, frozen=True, gc=False):
    """`versions` are six bytes: protocol min, max, current, then the same of the application's protocol; or none."""

    incarnation: int
    node: str
    ip: bytes
    port: int
    meta: bytes
    versions: bytes

    @property
    def endpoint(self) -> Endpoint:
        """Where the node is reached."""
        return Endpoint(self.ip, self.port)


class Dead(Message, frozen=True, gc=False):
    """`accuser` holds `node` for dead. The node itself: it left."""

    incarnation: int
    node: str
    accuser: str


class User(Message, frozen=True, gc=False):
    """Bytes that the layer above understands."""

    payload: bytes


class PushedNode(msgspec.Struct, frozen=True, gc=False):
    """One node of a push/pull."""

    name: str
    ip: bytes
    port: int
    meta: bytes
    incarnation: int
    state: int
    """A `PushedState`."""
    versions: bytes


class PushPull(Message, frozen=True, gc=False):
    """All nodes that the sender knows, and the state of its application. `join`: the sender is new here."""

    join: bool
    nodes: tuple[PushedNode, ...]
    user_state: bytes = b""


class ErrorReply(Message, frozen=True, gc=False):
    """The other end of a stream could not read what it got."""

    text: str


PROTOCOL_MIN: Final = 1
PROTOCOL_MAX: Final = 5
PROTOCOL_CURRENT: Final = 5
"""5: a receiver checks a CRC. What Serf, Consul and Nomad of the last ten years understand."""
APPLICATION_MIN: Final = 2
APPLICATION_MAX: Final = 5
APPLICATION_CURRENT: Final = 5
"""Serf's: with any other, a Serf agent refuses to share a cluster."""
VERSIONS: Final = bytes(
    [PROTOCOL_MIN, PROTOCOL_MAX, PROTOCOL_CURRENT, APPLICATION_MIN, APPLICATION_MAX, APPLICATION_CURRENT]
)
