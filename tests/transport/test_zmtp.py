"""The connecting side of ZMTP against golden bytes, in any fragments, and against whatever a liar may say."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmesh.transport import zmtp
from kvmesh.transport.limits import (
    FRAME_BYTES_MAX,
    HANDSHAKE_TIMEOUT_S,
    HEADER_BYTES_MAX,
    HEARTBEAT_INTERVAL_S,
    HEARTBEAT_TIMEOUT_S,
    PARTS_PER_MESSAGE_MAX,
    UNSENT_BYTES_MAX,
)
from kvmesh.transport.zmtp import Connection, Head, Null, Part, ZmtpError

GREETING = b"\xff\0\0\0\0\0\0\0\0\x7f\x03\x01NULL" + bytes(16) + b"\0" + bytes(31)
OUR_READY = b"\x04\x29\x05READY\x0bSocket-Type\0\0\0\x06DEALER\x08Identity\0\0\0\0"
READY = b"\x04\x29\x05READY\x0bSocket-Type\0\0\0\x06ROUTER\x08Identity\0\0\0\0"
WELCOME = GREETING + READY
PING = b"\x04\x07\x04PING\0\x3c"


def frame(flags: int, body: bytes, size: int | None = None) -> bytes:
    """A frame as the peer sends it; `size` is what it claims, if that is a lie."""
    size = len(body) if size is None else size
    if size < 256:
        return bytes((flags, size)) + body
    return bytes((flags | 2,)) + size.to_bytes(8, "big") + body


class Receiver:
    """What a socket's owner does: bytes go into the stage, or past it into the part that is due."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.seen: list[Head | bytes] = []
        """Heads, and the bodies of parts."""
        self._body = bytearray()

    def feed(self, data: bytes, at_once: int = 1 << 30) -> None:
        """Receive `data`, so many bytes at once at most."""
        connection = self.connection
        while True:
            if connection.left:
                taken = connection.take(1 << 30)
                if not taken:
                    if not data:
                        return
                    count = min(at_once, connection.left)
                    taken, data = memoryview(data[:count]), data[count:]
                    connection.passed(len(taken))
                self._body += taken
                if not connection.left:
                    self.seen.append(bytes(self._body))
                continue
            event = connection.next()
            if isinstance(event, Head):
                self.seen.append(event)
            elif isinstance(event, Part):
                self._body = bytearray()
                if not event.size_bytes:
                    self.seen.append(b"")
            elif not data:
                return
            else:
                room = connection.room()
                count = min(at_once, len(room), len(data))
                room[:count], data = data[:count], data[count:]
                connection.received(count)


def drain(connection: Connection, data: bytes, at_once: int = 1 << 30) -> list[Head | bytes]:
    """What comes of `data`."""
    receiver = Receiver(connection)
    receiver.feed(data, at_once)
    return receiver.seen


def opened(welcome: bytes = WELCOME) -> Connection:
    """A connection whose handshake is over, with nothing to send."""
    connection = Connection(Null())
    connection.open(0.0)
    assert drain(connection, welcome) == []
    connection.outgoing.clear()
    return connection


# --- golden bytes ------------------------------------------------------------------------------------------------
def test_the_greeting_and_the_handshake() -> None:
    connection = Connection(Null())
    connection.open(0.0)
    assert bytes(connection.outgoing) == GREETING
    assert drain(connection, GREETING) == []
    assert bytes(connection.outgoing) == GREETING + OUR_READY
    assert not connection.ready
    assert drain(connection, READY) == []
    assert connection.ready
    assert bytes(connection.outgoing) == GREETING + OUR_READY


def test_messages_wait_for_the_handshake() -> None:
    connection = Connection(Null())
    connection.open(0.0)
    assert connection.send(b"early", bytes(300))
    drain(connection, GREETING)
    assert bytes(connection.outgoing) == GREETING + OUR_READY
    drain(connection, READY)
    message = b"\x01\x05early" + b"\x02\0\0\0\0\0\0\x01\x2c" + bytes(300)
    assert bytes(connection.outgoing) == GREETING + OUR_READY + message
    connection.outgoing.clear()
    assert connection.send(b"", b"x" * 255)
    assert bytes(connection.outgoing) == b"\x01\0\0\xff" + b"x" * 255


def test_a_later_version_with_other_padding_and_metadata_is_welcome() -> None:
    greeting = b"\xff" + b"\x5a" * 8 + b"\x7f\x03\x07NULL" + bytes(48)
    ready = b"\x05READY\x06X-More\0\0\0\x02ab\x0bSOCKET-type\0\0\0\x06ROUTER"
    assert opened(greeting + frame(4, ready)).ready


def test_a_ping_is_answered_with_its_context() -> None:
    connection = opened()
    assert drain(connection, b"\x04\x0b\x04PING\0\x64abcd") == []
    assert bytes(connection.outgoing) == b"\x04\x09\x04PONGabcd"
    connection.outgoing.clear()
    assert drain(connection, b"\x04\x09\x04PONGabcd" + frame(4, b"\x09SUBSCRIBEx")) == []
    assert not connection.outgoing


# --- frames, however they are cut --------------------------------------------------------------------------------
STREAM = (
    WELCOME
    + frame(1, b"head one")
    + frame(1, b"p" * 300)
    + frame(4, b"\x04PING\0\0c")  # commands stand between any two frames
    + frame(1, b"")
    + frame(0, b"last")
    + frame(0, b"alone")
    + frame(0, b"")
    + frame(1, b"h" * 256)
    + frame(0, b"b" * 20_000)
)
SEEN = [
    Head(b"head one", True),
    b"p" * 300,
    b"",
    b"last",
    Head(b"alone", False),
    Head(b"", False),
    Head(b"h" * 256, True),
    b"b" * 20_000,
]


@pytest.mark.parametrize("at_once", [1, 2, 3, 7, 64, 1000, 100_000])
def test_fragments_of_any_size(at_once: int) -> None:
    connection = Connection(Null())
    connection.open(0.0)
    assert drain(connection, STREAM, at_once) == SEEN
    assert bytes(connection.outgoing) == GREETING + OUR_READY + b"\x04\x06\x04PONGc"


def test_a_cut_at_each_byte() -> None:
    for cut in range(len(STREAM) - 20_000):
        receiver = Receiver(Connection(Null()))
        receiver.feed(STREAM[:cut])
        receiver.feed(STREAM[cut:])
        assert receiver.seen == SEEN, cut


@given(
    st.lists(st.tuples(st.binary(max_size=600), st.lists(st.binary(max_size=9000), max_size=4)), max_size=6), st.data()
)
def test_any_messages_in_any_fragments(messages: list[tuple[bytes, list[bytes]]], data: st.DataObject) -> None:
    stream, expected = WELCOME, []
    for head, parts in messages:
        frames = [head, *parts]
        stream += b"".join(frame(int(index < len(parts)), body) for index, body in enumerate(frames))
        expected += [Head(head, bool(parts)), *parts]
    connection = Connection(Null())
    connection.open(0.0)
    assert drain(connection, stream, data.draw(st.integers(1, 10_000))) == expected


# --- liars -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 400",
        b"\x01",
        b"\xff" + bytes(8) + b"\x7e" + GREETING[10:],
        GREETING[:10] + b"\x02" + GREETING[11:],
        GREETING[:12] + b"CURVE".ljust(20, b"\0") + GREETING[32:],
        GREETING + frame(0, b"a message"),
        GREETING + frame(4, b"\x05ERROR\x09not today"),
        GREETING + frame(4, b"\x05HELLO"),
        GREETING + frame(4, b"\x05READY"),
        GREETING + OUR_READY,  # a DEALER, or this very connection come back
        GREETING + frame(4, b"\x05READY\x0bSocket-Type\0\0\0\x07ROUTER"),
        GREETING + frame(4, b"\x05READY\x0bSocket-Type\0\0"),
        GREETING + frame(4, b"\x05READY\xff"),
        GREETING + frame(4, b"\x05READY\0\0\0\0\0"),
        GREETING + frame(4, b"", HEADER_BYTES_MAX + 1),
        WELCOME + frame(8, b"a reserved flag"),
        WELCOME + frame(5, b"\x04PING\0\0"),
        WELCOME + frame(4, b""),
        WELCOME + frame(4, b"\0"),
        WELCOME + frame(4, b"\x09PING"),
        WELCOME + frame(4, b"\x04PING\0"),
        WELCOME + frame(4, b"\x04PING\0\0" + bytes(17)),
        WELCOME + frame(4, b"\x05ERROR\0"),
        WELCOME + frame(0, b"", HEADER_BYTES_MAX + 1),
        WELCOME + frame(0, b"", 2**63),
        WELCOME + frame(1, b"head") + frame(0, b"", FRAME_BYTES_MAX + 1),
        WELCOME + frame(1, b"head") + frame(1, b"") * (PARTS_PER_MESSAGE_MAX + 1),
    ],
)
def test_what_is_no_zmtp_is_an_error(said: bytes) -> None:
    connection = Connection(Null())
    connection.open(0.0)
    with pytest.raises(ZmtpError):
        drain(connection, said)


@given(st.binary(max_size=400), st.booleans(), st.integers(1, 100))
def test_random_bytes_are_taken_or_refused(said: bytes, welcomed: bool, at_once: int) -> None:
    connection = opened() if welcomed else Connection(Null())
    try:
        drain(connection, said, at_once)
    except ZmtpError:
        return
    assert connection.left <= FRAME_BYTES_MAX
    assert len(connection.room()) > 0 or connection.left


def test_a_peer_that_asks_and_never_reads_is_an_error() -> None:
    connection = opened()
    assert connection.send(bytes(UNSENT_BYTES_MAX))
    assert not connection.send(b"x", b"y")
    with pytest.raises(ZmtpError, match="does not read"):
        drain(connection, b"\x04\x07\x04PING\0\0")


# --- time --------------------------------------------------------------------------------------------------------
def test_a_handshake_has_its_time() -> None:
    connection = Connection(Null())
    connection.open(100.0)
    assert connection.due_s == 100.0 + HANDSHAKE_TIMEOUT_S
    connection.tick(99.9 + HANDSHAKE_TIMEOUT_S)
    with pytest.raises(ZmtpError, match="too long"):
        connection.tick(100.0 + HANDSHAKE_TIMEOUT_S)


def test_a_silent_peer_is_asked_and_then_lost() -> None:
    connection = opened()
    connection.heard_s = 50.0
    connection.tick(50.0)
    connection.outgoing.clear()
    assert connection.due_s == 50.0 + HEARTBEAT_INTERVAL_S
    connection.tick(49.9 + HEARTBEAT_INTERVAL_S)
    assert not connection.outgoing
    now = 50.0 + HEARTBEAT_INTERVAL_S
    connection.tick(now)
    connection.tick(now)  # once is enough
    assert bytes(connection.outgoing) == PING
    assert connection.due_s == now + HEARTBEAT_INTERVAL_S
    with pytest.raises(ZmtpError, match="silent"):
        connection.tick(50.0 + HEARTBEAT_TIMEOUT_S)
    connection.heard_s = 55.0  # whatever it said
    connection.tick(50.0 + HEARTBEAT_TIMEOUT_S)


def test_a_peer_that_talks_is_given_signs_of_life_too() -> None:
    """Behind megabytes that a slow path has not carried yet its own PING stands in line, and so does our PONG."""
    connection = opened()
    said: list[float] = []
    for now in range(60):
        connection.heard_s = float(now)
        connection.tick(now)
        if connection.outgoing:
            said.append(now)
            connection.outgoing.clear()
    assert said[0] <= HEARTBEAT_INTERVAL_S
    assert {later - earlier for earlier, later in itertools.pairwise(said)} == {HEARTBEAT_INTERVAL_S}
    assert connection.due_s == said[-1] + HEARTBEAT_INTERVAL_S


def test_another_mechanism_has_its_own_commands() -> None:
    class Riddle:
        name = b"RIDDLE"
        ready = False

        def begin(self) -> list[bytes]:
            return [b"\x03ASK"]

        def receive(self, name: bytes, data: memoryview) -> list[bytes]:
            self.ready = name == b"RIGHT"
            return [b"\x05GUESS" + data]

    connection = Connection(Riddle())
    connection.open(0.0)
    drain(connection, GREETING[:12] + b"RIDDLE".ljust(20, b"\0") + GREETING[32:] + frame(4, b"\x04HINT12"))
    assert not connection.ready
    drain(connection, frame(4, b"\x05RIGHT3"))
    assert connection.ready
    assert bytes(connection.outgoing[zmtp.GREETING_BYTES :]) == b"\x04\x04\x03ASK\x04\x08\x05GUESS12\x04\x07\x05GUESS3"
