"""Maps of msgpack in the old spec, as Go's encoder of memberlist writes them, and the values in them.

Owns what is allowed: bytes and strings both travel as *raw* there, so ours do, too; a peer of another age may send the
newer str and bin, or nil where a field is empty. Unknown fields are skipped. Extension types, other keys than strings,
and more fields or bytes than named bounds are refused before anything is built. The one module that knows the msgpack
library. Knows no message. Runs wherever it is called; nothing is kept between calls.

A field that is missing and one that is nil are the same, as in Go: its zero. The functions say which may be missing.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgpack

from kvmesh.transport.limits import GOSSIP_FIELDS_MAX, GOSSIP_MAP_BYTES_MAX, NAME_BYTES_MAX

from .errors import Cause, WireError

Fields = dict[bytes, Any]
"""A map as it came: names are bytes, values are not looked at yet."""

UINT16_MAX: Final = (1 << 16) - 1
UINT32_MAX: Final = (1 << 32) - 1
VERSIONS_BYTES: Final = 6
_UNPRINTABLE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Control characters, and those that end lines or turn the direction of text: names are shown on terminals."""

_packer: Final = msgpack.Packer(use_bin_type=False)


def _no_extension(code: int, data: bytes) -> Any:
    raise ValueError("an extension type")


def _bounds(bytes_max: int) -> dict[str, Any]:
    """Everything is checked against these while it is read, before memory is taken for it."""
    return {
        "raw": True,
        "strict_map_key": True,
        "max_str_len": bytes_max,
        "max_bin_len": bytes_max,
        "max_array_len": GOSSIP_FIELDS_MAX,
        "max_map_len": GOSSIP_FIELDS_MAX,
        "max_ext_len": 0,
        "ext_hook": _no_extension,
    }


_MAP_BOUNDS: Final = _bounds(GOSSIP_MAP_BYTES_MAX)
_HELD_BYTES_MAX: Final = 2 * GOSSIP_MAP_BYTES_MAX
"""A reader holds at most a map that is not complete, and the piece that was fed last."""
_unpack: Final = msgpack.unpackb


def pack(fields: dict[str, Any]) -> bytes:
    """The map as it travels."""
    data: bytes = _packer.pack(fields)
    return data


def unpack(data: bytes) -> Fields:
    """The one map that `data` is."""
    if len(data) > GOSSIP_MAP_BYTES_MAX:
        raise WireError(Cause.TOO_LARGE, f"a map of {len(data)} bytes: {GOSSIP_MAP_BYTES_MAX} are accepted")
    try:
        fields = _unpack(data, **_MAP_BOUNDS)
    except (ValueError, msgpack.UnpackException) as error:
        raise WireError(Cause.MALFORMED, f"not a map of msgpack: {_why(error)}") from None
    if type(fields) is not dict:
        raise WireError(Cause.MALFORMED, f"{type(fields).__name__} of msgpack, not a map")
    return fields


class MapReader:
    """Reads maps, and raw bytes behind them, from bytes that come in pieces. No byte is read twice."""

    def __init__(self) -> None:
        self._unpacker = msgpack.Unpacker(read_size=_HELD_BYTES_MAX, max_buffer_size=_HELD_BYTES_MAX, **_MAP_BOUNDS)
        self._fed = 0
        self._read = 0

    def feed(self, data: bytes) -> None:
        """More bytes: at most `GOSSIP_MAP_BYTES_MAX` at once, and only when `map` or `raw` wants more. So no map takes
        much memory before it is seen to be too large."""
        assert len(data) <= GOSSIP_MAP_BYTES_MAX
        self._unpacker.feed(data)
        self._fed += len(data)

    def map(self) -> Fields | None:
        """The next map, once all of it is there."""
        try:
            fields = self._unpacker.unpack()
        except msgpack.OutOfData:
            self._bound(self._fed)
            return None
        except (ValueError, msgpack.UnpackException) as error:
            raise WireError(Cause.MALFORMED, f"not a map of msgpack: {_why(error)}") from None
        if type(fields) is not dict:
            raise WireError(Cause.MALFORMED, f"{type(fields).__name__} of msgpack, not a map")
        read: int = self._unpacker.tell()
        self._bound(read)
        self._read = read
        return fields

    def raw(self, count: int) -> bytes:
        """The next bytes: `count`, or as many of them as are there. No map is read after them."""
        data: bytes = self._unpacker.read_bytes(count)
        self._read += len(data)
        return data

    @property
    def unread_bytes(self) -> int:
        """Bytes that were fed, and are behind what was read."""
        return self._fed - self._read

    def _bound(self, ends: int) -> None:
        if ends - self._read > GOSSIP_MAP_BYTES_MAX:
            raise WireError(Cause.TOO_LARGE, f"a map beyond the {GOSSIP_MAP_BYTES_MAX} bytes that are accepted")


def _why(error: Exception) -> str:
    """What the library says, or which of its exceptions it is: some say nothing."""
    return str(error) or type(error).__name__


def _refuse(key: bytes, what: str) -> WireError:
    return WireError(Cause.FIELD, f"field {key.decode()}: {what}")


def uint(fields: Fields, key: bytes, most: int = UINT32_MAX) -> int:
    """A number that must be there, from 0 to `most`."""
    value = fields.get(key)
    if type(value) is not int or not 0 <= value <= most:
        raise _refuse(key, f"a number from 0 to {most} must be there")
    return value


def uint_or_zero(fields: Fields, key: bytes, most: int = UINT32_MAX) -> int:
    """A number from 0 to `most`; 0 when it is missing."""
    return uint(fields, key, most) if fields.get(key) is not None else 0


def port(fields: Fields, key: bytes) -> int:
    """A port that something may listen on."""
    value = fields.get(key)
    if type(value) is not int or not 0 < value <= UINT16_MAX:
        raise _refuse(key, f"a port from 1 to {UINT16_MAX} must be there")
    return value


def flag(fields: Fields, key: bytes) -> bool:
    """False when it is missing."""
    value = fields.get(key, False)
    if value is None:
        return False
    if type(value) is not bool:
        raise _refuse(key, "true or false must be there")
    return value


def octets(fields: Fields, key: bytes, most: int) -> bytes:
    """At most `most` bytes; none when it is missing."""
    value = fields.get(key)
    if value is None:
        return b""
    if type(value) is not bytes or len(value) > most:
        raise _refuse(key, f"at most {most} bytes may be there")
    return value


def ip(fields: Fields, key: bytes) -> bytes:
    """An address of IPv4 or IPv6: 4 or 16 bytes."""
    value = fields.get(key)
    if type(value) is not bytes or (len(value) != 4 and len(value) != 16):
        raise _refuse(key, "an address of 4 or 16 bytes must be there")
    return value


def ip_or_none(fields: Fields, key: bytes) -> bytes:
    """The same, or no bytes when it is missing or empty."""
    return ip(fields, key) if fields.get(key) else b""


def name(fields: Fields, key: bytes) -> str:
    """A node's name: UTF-8 that can be shown."""
    value = name_or_none(fields, key)
    if not value:
        raise _refuse(key, "a name must be there")
    return value


def name_or_none(fields: Fields, key: bytes) -> str:
    """The same, or nothing when it is missing or empty."""
    value = fields.get(key)
    if value is None:
        return ""
    if type(value) is not bytes or len(value) > NAME_BYTES_MAX:
        raise _refuse(key, f"a name of at most {NAME_BYTES_MAX} bytes may be there")
    try:
        text = value.decode()
    except UnicodeDecodeError:
        raise _refuse(key, "a name must be UTF-8") from None
    if not text.isprintable() and _UNPRINTABLE.search(text):
        raise _refuse(key, "a name must not hold control characters")
    return text


def text(fields: Fields, key: bytes, most: int) -> str:
    """Words for people, made fit to be shown whatever they are: the first `most` characters."""
    value = octets(fields, key, GOSSIP_MAP_BYTES_MAX)
    return _UNPRINTABLE.sub("?", value.decode(errors="replace")[:most])


def versions(fields: Fields, key: bytes) -> bytes:
    """Six versions or none. A newer peer may know of more kinds of them: the first six are those that all know."""
    value = octets(fields, key, GOSSIP_FIELDS_MAX)
    if 0 < len(value) < VERSIONS_BYTES:
        raise _refuse(key, f"{VERSIONS_BYTES} versions or none must be there")
    return value[:VERSIONS_BYTES]
