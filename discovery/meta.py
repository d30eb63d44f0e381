"""What a node says of itself in memberlist's opaque meta bytes: at most 512 of them, in the form of Serf's tags.

    255 | msgpack, old spec: {role, kvmesh, mesh_port, epoch, key, then facts of the host}      every value a text

    tag         says                                              bounds
    role        what the process is                               agent, controller or router
    kvmesh      the mesh protocol's versions, "oldest-newest"     1 to 255; its presence marks the meta as ours
    mesh_port   where the node's transport is reached             1 to 65535
    epoch       the node's start                                  u64
    key         its public key in base64url; none without one     32 bytes

So ``serf members`` shows the tags, and a Serf agent that shares the gossip reads them without complaint. The facts
are what `Identity.meta` has, the most useful first, as many as fit, each whole or not at all.

What comes from others is bytes of anyone: a meta without the tag ``kvmesh`` is another application's (`Foreign`), to be
listed and left alone; one with it must keep to the table. Values only; no I/O, no clock.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, get_args

import msgpack

from kvmesh.transport.errors import ProtocolError
from kvmesh.transport.limits import (
    MESH_PROTOCOL_VERSION,
    META_CHARS_MAX,
    META_ITEMS_MAX,
    NODE_META_BYTES_MAX,
    PUBLIC_KEY_BYTES,
)

from .messages import Role

ROLES: Final[tuple[Role, ...]] = get_args(Role)
FOREIGN_ROLE: Final = "serf"
"""How a member that is none of ours is listed when its own tags name no role that can be shown, or one of ours."""
_TAGS: Final = 255
_OWN: Final = frozenset({"role", "kvmesh", "mesh_port", "epoch", "key"})
_FACTS_FIRST: Final = ("host", "gpus", "cpus", "memory_bytes", "boot")
_VERSION_MAX: Final = 255
_ROLE_CHARS_MAX: Final = 64
_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,19}")


@dataclass(frozen=True, slots=True)
class Meta:
    """What one of our nodes says of itself."""

    role: Role
    mesh_port: int
    epoch: int
    versions: tuple[int, int] = (MESH_PROTOCOL_VERSION, MESH_PROTOCOL_VERSION)
    """The oldest and the newest mesh protocol that it speaks."""
    public_key: bytes = b""
    """32 bytes; empty: it has none."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Of its host: `kvmesh.host.HostFacts.to_meta`. After `decode_meta`, those that fitted."""

    def encode(self) -> bytes:
        """The bytes, at most `NODE_META_BYTES_MAX`. Facts that do not fit are left out, the least useful first."""
        tags = {
            "role": self.role,
            "kvmesh": f"{self.versions[0]}-{self.versions[1]}",
            "mesh_port": str(self.mesh_port),
            "epoch": str(self.epoch),
        }
        if self.public_key:
            tags["key"] = public_key_text(self.public_key)
        _checked(tags)  # our own mistake shall not reach a peer
        for name in sorted(self.facts.keys() - _OWN, key=_usefulness):
            if len(tags) < META_ITEMS_MAX and _size({**tags, name: self.facts[name]}) <= NODE_META_BYTES_MAX:
                tags[name] = self.facts[name]
        return bytes([_TAGS]) + _pack(tags)


@dataclass(frozen=True, slots=True)
class Foreign:
    """A member of another application that shares the gossip: a Serf agent, most likely."""

    tags: Mapping[str, str]
    """Its tags, where it has some that can be read."""

    @property
    def role(self) -> str:
        """What it is listed as: never as one of ours, and only what a line of a log can hold."""
        role = self.tags.get("role", "")
        return role if role not in ROLES and role.isprintable() and 0 < len(role) <= _ROLE_CHARS_MAX else FOREIGN_ROLE


def decode_meta(data: bytes) -> Meta | Foreign:
    """What the meta of a member says. Raises `ProtocolError` when it claims to be ours and breaks the table above."""
    if len(data) > NODE_META_BYTES_MAX:
        raise ProtocolError(f"a node's meta of {len(data)} bytes: {NODE_META_BYTES_MAX} are allowed")
    if not data.startswith(bytes([_TAGS])):
        # Serf before its protocol 3, and whatever others put there: the role as plain text, or nothing.
        return Foreign({"role": data.decode(errors="replace")} if data else {})
    pairs = _unpack(data[1:])
    if pairs is None:
        return Foreign({})
    tags = dict(pairs)
    if "kvmesh" not in tags:
        return Foreign(tags)
    if len(tags) != len(pairs):
        raise ProtocolError("a node's meta names a tag twice")
    return _checked(tags)


def public_key_text(key: bytes) -> str:
    """A public key as people see it: base64url without padding, 43 characters."""
    return base64.urlsafe_b64encode(key).decode().rstrip("=")


def _checked(tags: Mapping[str, str]) -> Meta:
    role = next((one for one in ROLES if one == tags.get("role")), None)
    if role is None:
        raise ProtocolError(f"a node's meta: role {tags.get('role', '')!r} is none of {', '.join(ROLES)}")
    oldest, _, newest = tags["kvmesh"].partition("-")
    versions = _number("kvmesh", oldest, 1, _VERSION_MAX), _number("kvmesh", newest, 1, _VERSION_MAX)
    if versions[0] > versions[1]:
        raise ProtocolError(f"a node's meta: versions {tags['kvmesh']} end before they begin")
    facts = {name: value for name, value in tags.items() if name not in _OWN}
    if len(tags) > META_ITEMS_MAX or any(len(value) > META_CHARS_MAX for value in facts.values()):
        raise ProtocolError(f"a node's meta has {len(tags)} tags: {META_ITEMS_MAX} are allowed")
    return Meta(
        role=role,
        mesh_port=_number("mesh_port", tags.get("mesh_port", ""), 1, 65535),
        epoch=_number("epoch", tags.get("epoch", ""), 0, 2**64 - 1),
        versions=versions,
        public_key=_public_key(tags["key"]) if "key" in tags else b"",
        facts=facts,
    )


def _number(name: str, text: str, least: int, most: int) -> int:
    if not _NUMBER.fullmatch(text) or not least <= int(text) <= most:
        raise ProtocolError(f"a node's meta: {name} {text[:32]!r} is no number from {least} to {most}")
    return int(text)


def _public_key(text: str) -> bytes:
    try:
        key = base64.b64decode(text + "=", altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != PUBLIC_KEY_BYTES or public_key_text(key) != text:  # one key has one text
        raise ProtocolError(f"a node's meta: its key is not {PUBLIC_KEY_BYTES} bytes in base64url")
    return key


def _usefulness(name: str) -> tuple[int, str]:
    return (_FACTS_FIRST.index(name) if name in _FACTS_FIRST else len(_FACTS_FIRST), name)


# --- msgpack, old spec -----------------------------------------------------------------------------------------------


class _Pairs(tuple[Any, ...]):
    """A map as it came: a name that stands there twice is seen."""

    __slots__ = ()


def _pack(tags: Mapping[str, str]) -> bytes:
    packed: bytes = msgpack.packb(dict(tags), use_bin_type=False)
    return packed


def _size(tags: Mapping[str, str]) -> int:
    return 1 + len(_pack(tags))


def _unpack(data: bytes) -> list[tuple[str, str]] | None:
    """The pairs of a map of texts; None for anything else."""
    try:
        found = msgpack.unpackb(data, raw=False, object_pairs_hook=_Pairs, strict_map_key=True)
    except (ValueError, TypeError, OverflowError, RecursionError):  # its errors have no common root
        return None
    if not isinstance(found, _Pairs):
        return None
    pairs = [(name, value) for name, value in found if isinstance(name, str) and isinstance(value, str)]
    return pairs if len(pairs) == len(found) else None
