"""What the tests of the wire and the fuzz target share: an LZW encoder, and messages of every kind.

The encoder is written from the description of Go's compress/lzw, not from our decoder: what it writes, Go reads.
"""

from __future__ import annotations

import msgpack
from hypothesis import strategies as st

from kvmesh.discovery.wire import (
    VERSIONS,
    Ack,
    Alive,
    Dead,
    IndirectPing,
    Kind,
    Message,
    Nack,
    Ping,
    PushedNode,
    PushPull,
    Suspect,
    User,
)

CLEAR = 256
END = 257


class Bits:
    """Codes of changing width, least significant bit first."""

    def __init__(self) -> None:
        self._value = 0
        self._held = 0
        self.data = bytearray()

    def write(self, code: int, width: int) -> None:
        self._value |= code << self._held
        self._held += width
        while self._held >= 8:
            self.data.append(self._value & 0xFF)
            self._value >>= 8
            self._held -= 8

    def finish(self) -> bytes:
        if self._held:
            self.data.append(self._value)
        return bytes(self.data)


def lzw(data: bytes) -> bytes:
    """`data`, compressed: a clear first, a clear whenever the codes run out, an end."""
    bits = Bits()
    width, last = 9, END
    strings: dict[tuple[int, int], int] = {}
    bits.write(CLEAR, width)
    code: int | None = None
    for byte in data:
        if code is None:
            code = byte
            continue
        known = strings.get((code, byte))
        if known is not None:
            code = known
            continue
        bits.write(code, width)
        last += 1
        if last == 1 << width:
            width += 1
        if last == 4095:
            bits.write(CLEAR, 12)
            width, last = 9, END
            strings.clear()
        else:
            strings[(code, byte)] = last
        code = byte
    if code is not None:
        bits.write(code, width)
        last += 1
        if last == 1 << width and width < 12:
            width += 1
        if last == 4095:
            bits.write(CLEAR, 12)
            width = 9
    bits.write(END, width)
    return bits.finish()


def lzw_zeros(codes: int) -> bytes:
    """What `lzw` makes of very many zeros: each code but the first after a clear stands for one more of them."""
    bits = Bits()
    bits.write(CLEAR, 9)
    width, last, code = 9, END, 0
    for _ in range(codes):
        bits.write(code, width)
        last += 1
        width += last == 1 << width
        code = last
        if last == 4095:
            bits.write(CLEAR, 12)
            width, last, code = 9, END, 0
    bits.write(END, width)
    return bits.finish()


def compressed(data: bytes) -> bytes:
    """The wrapping: what Go sends when it compresses."""
    return bytes([Kind.COMPRESS]) + msgpack.packb({"Algo": 0, "Buf": lzw(data)}, use_bin_type=False)


uint32s = st.integers(0, 2**32 - 1)
uint16s = st.integers(0, 2**16 - 1)
ports = st.integers(1, 2**16 - 1)
names = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=30)
ips = st.one_of(st.binary(min_size=4, max_size=4), st.binary(min_size=16, max_size=16))
metas = st.binary(max_size=512)
versions = st.one_of(st.just(VERSIONS), st.just(b""), st.binary(min_size=6, max_size=6))
sources = {"source_ip": st.one_of(st.just(b""), ips), "source_port": uint16s, "source_node": st.just("") | names}

pings = st.builds(Ping, seq=uint32s, node=names, **sources)
acks = st.builds(Ack, seq=uint32s, payload=st.binary(max_size=1024))
users = st.builds(User, payload=st.binary(max_size=300))
packet_messages: st.SearchStrategy[Message] = st.one_of(
    pings,
    st.builds(IndirectPing, seq=uint32s, ip=ips, port=ports, node=names, nack=st.booleans(), **sources),
    acks,
    st.builds(Nack, seq=uint32s),
    st.builds(Suspect, incarnation=uint32s, node=names, accuser=names),
    st.builds(Dead, incarnation=uint32s, node=names, accuser=names),
    st.builds(Alive, incarnation=uint32s, node=names, ip=ips, port=ports, meta=metas, versions=versions),
    users,
)
pushed_nodes = st.builds(
    PushedNode,
    name=names,
    ip=ips,
    port=ports,
    meta=metas,
    incarnation=uint32s,
    state=st.integers(0, 3),
    versions=versions,
)
push_pulls = st.builds(
    PushPull,
    join=st.booleans(),
    nodes=st.lists(pushed_nodes, max_size=8).map(tuple),
    user_state=st.binary(max_size=4500),
)
