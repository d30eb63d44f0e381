"""The language of a client and its agent, over a unix socket on one host.

    client                            agent
    Hello(version, …)             →
                                  ←   Welcome(node, epoch, arena size, …) with the arena's fd, or Failed
    OpenSpace, Reserve, Get, …    →
                                  ←   one answer each; to Get several Progress, the last one final
    Abandon, Release, Suspect     →   (no answer)

A frame is a little-endian uint32 length and one msgpack array: the type's tag, then its fields in order. Bulk bytes
never pass here: an extent of the arena is named by its offset. Keys travel as one blob of 32 bytes each, checksums as
one of 8 bytes each.

Everything that an agent knows of a connection hangs on the connection: closing it, by whatever cause, returns every
lease and every reservation. The leases of a get also end by time, unless they are renewed (any connection may do so).
Types are closed: an unknown tag, an extension type, or a wrong field is a `ProtocolError`.
This module does no I/O.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any

import msgspec

from kvmesh.transport.errors import (
    CallerError,
    ChunkTooLargeError,
    KVMeshError,
    NamespaceError,
    ProtocolError,
)
from kvmesh.transport.limits import (
    AGENT_FRAME_BYTES_MAX,
    AGENT_PROTOCOL_VERSION,
    CHAIN_CHUNKS_MAX,
    KEY_BYTES,
    RENEWALS_PER_MESSAGE_MAX,
)

LENGTH = struct.Struct("<I")
_KEY = struct.Struct(f"{KEY_BYTES}s")


Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]


class Message(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One message; `id` pairs an answer with its request."""

    id: int


# --- from the client -------------------------------------------------------------------------------------------------
class Hello(Message, frozen=True, tag="hello"):
    """The first frame. Its first two fields never change their place, so that any two versions can refuse each
    other."""

    version: int
    pid: int


class OpenSpace(Message, frozen=True, tag="open"):
    """Make a namespace known to the agent: its fields as JSON."""

    space: bytes


class Reserve(Message, frozen=True, tag="reserve"):
    """Ask where to write the chunks `keys`; answered by `Reserved`."""

    space_id: bytes
    keys: bytes


class Commit(Message, frozen=True, tag="commit"):
    """The reserved chunks `keys` are written, with these checksums; answered by `Counted`."""

    keys: bytes
    checksums: bytes
    pinned: bool
    ttl_s: float | None


class Abandon(Message, frozen=True, tag="abandon"):
    """Give reservations back. No answer."""

    keys: bytes


class Get(Message, frozen=True, tag="get"):
    """Lease the chunks of a chain from the front, fetching what peers hold; answered by `Progress`, the last one
    final."""

    space_id: bytes
    keys: bytes
    deadline_s: float
    lease_s: float
    """How long the leases last unless they are renewed."""
    prefill_tokens_per_s: float | None = None
    """How fast whoever asks computes: what would cost more to fetch than to compute is not fetched."""
    part: tuple[Count, Count, Count, Count] | None = None
    """Of each chunk, just this slice: offset, run, stride (bytes), number of runs."""


class Release(Message, frozen=True, tag="release"):
    """Give leases of the get `get` back, by the offsets that its `Progress` named. No answer."""

    get: int
    offsets: list[int]


class Renew(Message, frozen=True, tag="renew"):
    """Let the leases of gets last on: (session, get) each; answered by `Renewed`."""

    gets: Annotated[list[tuple[int, int]], msgspec.Meta(max_length=RENEWALS_PER_MESSAGE_MAX)]


class Suspect(Message, frozen=True, tag="suspect"):
    """A chunk's bytes in the arena do not match its checksum. No answer."""

    key: bytes


class Prefetch(Message, frozen=True, tag="prefetch"):
    """Fetch what peers hold of a chain, and lease nothing; answered at once by `Counted`: the chunks under way."""

    space_id: bytes
    keys: bytes
    deadline_s: float
    prefill_tokens_per_s: float | None = None


class Pin(Message, frozen=True, tag="pin"):
    """Keep chunks from eviction, or no longer; answered by `Counted`."""

    keys: bytes
    pinned: bool


class Delete(Message, frozen=True, tag="delete"):
    """Remove this node's copies; answered by `Counted`."""

    keys: bytes


class Query(Message, frozen=True, tag="query"):
    """A question about the cluster (`kvmesh.queries`); answered by `Answer`."""

    body: bytes


# --- from the agent --------------------------------------------------------------------------------------------------
class Welcome(Message, frozen=True, tag="welcome"):
    """The connection stands. The arena's file descriptor comes with this frame."""

    version: int
    node: str
    epoch: int
    arena_bytes: int
    session: int
    """The number of this connection, for `Renew`."""


class Opened(Message, frozen=True, tag="opened"):
    """The namespace is known. `notes` say what will keep it from hitting, such as a peer's other dtype."""

    notes: list[str]


class Reserved(Message, frozen=True, tag="reserved"):
    """For each key an offset in the arena, or a `kvmesh.store.Refusal` (negative)."""

    offsets: list[int]


class Counted(Message, frozen=True, tag="counted"):
    """How many chunks a request found."""

    chunks: int


class Progress(Message, frozen=True, tag="progress"):
    """The next chunks from the front of a chain are leased: `offsets` follow those of the `Progress` before."""

    offsets: list[int]
    checksums: bytes
    """XXH3-64 of what stands at each offset."""
    final: bool
    fetched: int = 0
    """Of all chunks so far, those that came from peers for this request. In the final message only."""
    bytes_moved: int = 0
    reason: str = ""
    """Why the run ends where it ends. In the final message only."""
    wholes: list[int] = []
    """Where a part was asked for: the offsets of this message at which the whole chunk stands."""


class Renewed(Message, frozen=True, tag="renewed"):
    """For each get of a `Renew`: whether its leases last on. False: they are over, and what they kept may be gone."""

    lasting: list[bool]


class Answer(Message, frozen=True, tag="answer"):
    """A JSON document."""

    body: bytes


class Failed(Message, frozen=True, tag="failed"):
    """The request cannot be done: the name of an error of `kvmesh.transport.errors`, and its message."""

    error: str
    message: str


Request = (
    Hello | OpenSpace | Reserve | Commit | Abandon | Get | Release | Renew | Suspect | Prefetch | Pin | Delete | Query
)
Reply = Welcome | Opened | Reserved | Counted | Progress | Renewed | Answer | Failed

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
_anything = msgspec.msgpack.Decoder(list[Any])

# What an agent may make a client raise. Anything else arrives as KVMeshError.
_ERRORS: dict[str, type[KVMeshError]] = {
    error.__name__: error for error in (CallerError, NamespaceError, ChunkTooLargeError, ProtocolError)
}


def frame(message: Message) -> bytes:
    """`message` as the bytes of one frame."""
    body = _encoder.encode(message)
    if len(body) > AGENT_FRAME_BYTES_MAX:
        raise CallerError(f"a request of {len(body)} bytes is too large: ask for fewer chunks at once")
    return LENGTH.pack(len(body)) + body


class FrameReader:
    """Cuts a stream of bytes into the bodies of frames. Raises `ProtocolError` for one that is too large."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The bodies that are whole once `data` has arrived."""
        body = data[LENGTH.size :]
        whole = not self._buffer and data[: LENGTH.size] == LENGTH.pack(len(body))
        if whole and len(body) <= AGENT_FRAME_BYTES_MAX:
            yield body  # one frame by itself, as nearly always: nothing to keep
            return
        self._buffer += data
        while len(self._buffer) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._buffer)
            if length > AGENT_FRAME_BYTES_MAX:
                raise ProtocolError(f"a frame of {length} bytes is larger than {AGENT_FRAME_BYTES_MAX}")
            end = LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[LENGTH.size : end])
            del self._buffer[:end]
            yield body


def decode_request(body: bytes) -> Request:
    """What a client sent. Raises `ProtocolError`."""
    try:
        return _requests.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"a client's message does not follow the protocol: {error}") from None


def decode_reply(body: bytes) -> Reply:
    """What an agent sent. Raises `ProtocolError`."""
    try:
        return _replies.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"the agent's message does not follow the protocol: {error}") from None


def hello_version(body: bytes) -> int:
    """The protocol version of a first frame of any version. Raises `ProtocolError` when it is no such frame."""
    try:
        fields = _anything.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        fields = []
    if len(fields) < 3 or fields[0] != "hello" or not isinstance(fields[2], int):
        raise ProtocolError("the first message of a client must be its hello")
    return fields[2]


def version_refusal(theirs: int, node: str) -> str:
    """What an agent tells a client of another version."""
    older = "client" if theirs < AGENT_PROTOCOL_VERSION else "agent"
    return (
        f"the agent {node!r} speaks protocol version {AGENT_PROTOCOL_VERSION} and this client version {theirs}: "
        f"upgrade kvmesh where the {older} runs"
    )


def failure(id_: int, error: Exception) -> Failed:
    """The answer that makes the client raise `error`."""
    return Failed(id_, type(error).__name__, str(error))


def raised(failed: Failed) -> KVMeshError:
    """The exception that an agent's `Failed` stands for."""
    return _ERRORS.get(failed.error, KVMeshError)(failed.message)


def pack_keys(keys: Sequence[bytes]) -> bytes:
    """Keys as one blob. Raises `CallerError` for what is not a chain of keys."""
    if len(keys) > CHAIN_CHUNKS_MAX:
        raise CallerError(f"{len(keys)} keys at once are too many: ask for at most {CHAIN_CHUNKS_MAX}")
    try:
        blob = b"".join(keys)
    except TypeError:
        blob, keys = b"x", ()  # no bytes: refused below
    if len(blob) != KEY_BYTES * len(keys) or set(map(len, keys)) - {KEY_BYTES}:
        raise CallerError(f"a key has {KEY_BYTES} bytes: pass what Namespace.chain returned")
    return blob


def unpack_keys(blob: bytes) -> list[bytes]:
    """The keys of one blob. Raises `ProtocolError`."""
    if len(blob) % KEY_BYTES or len(blob) > CHAIN_CHUNKS_MAX * KEY_BYTES:
        raise ProtocolError(f"{len(blob)} bytes are not at most {CHAIN_CHUNKS_MAX} keys of {KEY_BYTES} bytes")
    return [key for (key,) in _KEY.iter_unpack(blob)]


def pack_checksums(values: Iterable[int]) -> bytes:
    """Checksums as one blob."""
    return b"".join(value.to_bytes(8, "little") for value in values)


def unpack_checksums(blob: bytes, count: int) -> list[int]:
    """The `count` checksums of one blob. Raises `ProtocolError`."""
    if len(blob) != 8 * count:
        raise ProtocolError(f"{len(blob)} bytes are not {count} checksums of 8 bytes")
    return list(struct.unpack(f"<{count}Q", blob))
