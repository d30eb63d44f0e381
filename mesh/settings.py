"""What a long-running command can be told, as plain frozen values with their defaults and their checks.

Where a value comes from (a flag, a ``KVMESH_*`` variable, a TOML file) is the CLI's business: `kvmesh.cli`. Nothing
here opens a file or a socket, or imports more than the standard library: ``kvmesh --help`` stays quick.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kvmesh.transport.errors import SettingsError
from kvmesh.transport.limits import ARENA_BYTES_DEFAULT, EXTENT_ALIGNMENT_BYTES, LABEL_BYTES_MAX, NAME_BYTES_MAX

if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv6Address

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
MESH_PORT_DEFAULT = 7950
GOSSIP_PORT_DEFAULT = 7951
OWN_PORT = "the one that is listened on"
MEMBERSHIPS = ("gossip", "static")
PROFILES = ("lan", "wan", "local", "memberlist-lan")
"""The names of `kvmesh.discovery.swim.profile.PROFILES`, which is not imported here."""
TRANSPORTS = ("shm", "nixl", "zmq")
"""What can move chunks between two agents, in the order of preference. The last is always there."""
RDMA_DEVICES = Path("/sys/class/infiniband")
LOG_LEVELS = ("debug", "info", "warning", "error")
SOCKET_PATH_BYTES_MAX = 107
"""What fits into the kernel's ``sockaddr_un``; a longer path fails at bind with a message that says nothing."""
SIZE_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
              "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}  # fmt: skip


def socket_default() -> Path:
    """Where the local agent listens when nobody says otherwise: a directory that only this user can enter."""
    if given := os.environ.get("KVMESH_SOCKET"):
        return Path(given)
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "kvmesh" / "agent.sock"
    return Path("/tmp") / f"kvmesh-{os.getuid()}" / "agent.sock"  # noqa: S108 - the agent makes it 0700 and checks its owner


def state_dir_default() -> Path:
    """Where processes keep what they want to know after a crash, when nobody says otherwise."""
    if state := os.environ.get("XDG_STATE_HOME"):
        return Path(state) / "kvmesh"
    try:
        home = Path.home()
    except RuntimeError:
        home = Path()
    if home.is_absolute() and os.access(home, os.W_OK | os.X_OK):
        return home / ".local" / "state" / "kvmesh"
    return Path("/tmp") / f"kvmesh-{os.getuid()}"  # noqa: S108 - whoever writes there makes it 0700 and checks its owner


def transports_default() -> tuple[str, ...]:
    """What may move chunks when nobody says otherwise: NIXL only where there is RDMA. Over plain TCP it is slower than
    zmq, and UCX asks nobody for a key there."""
    try:
        rdma = any(RDMA_DEVICES.iterdir())
    except OSError:
        rdma = False
    return TRANSPORTS if rdma else tuple(name for name in TRANSPORTS if name != "nixl")


def name_default() -> str:
    """A node's name when none is given: the host's."""
    return socket.gethostname().split(".")[0] or "node"


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """What every long-running process shares. Raises `SettingsError`, naming the flag."""

    name: str = field(default_factory=name_default)
    bind: str = "127.0.0.1"
    mesh_port: int = MESH_PORT_DEFAULT
    """0: any free port."""
    join: tuple[str, ...] = ()
    """Addresses of peers, ``HOST:PORT``: where they gossip, or with a static membership where their mesh port is."""
    log_level: str = "info"
    membership: str = "gossip"
    gossip_port: int = GOSSIP_PORT_DEFAULT
    """0: any free port, the same for UDP and TCP."""
    advertise: str = ""
    """``IP[:PORT]`` that others are told for this node's gossip; the IP goes with the mesh port, too. Empty: what is
    listened on."""
    advertise_mesh_port: int = 0
    """The port that others are told for this node's mesh port, where a container's or a proxy's stands in front of it.
    0: what is listened on."""
    profile: str = "lan"
    label: str = ""
    """Packets of a mesh with another label are refused."""
    key_file: Path | None = None
    """The gossip keys, one a line in base64, the primary first. None: gossip is not encrypted."""
    state_dir: Path = field(default_factory=state_dir_default)

    @property
    def members_file(self) -> Path:
        """Where the last known members are kept, to find them again after a crash."""
        return self.state_dir / f"{self.name}.members"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name) or len(self.name) > NAME_BYTES_MAX:
            raise SettingsError(
                f"--name {self.name!r}: use letters, digits, '.', '_' and '-', at most {NAME_BYTES_MAX} of them"
            )
        if not is_loopback(self.bind):
            raise SettingsError(
                f"--bind {self.bind}: kvmesh listens on loopback only, since peers are not authenticated yet; "
                "use --bind 127.0.0.1"
            )
        parse_port(str(self.mesh_port))
        for address in self.join:
            parse_address(
                address, flag="--join", port=MESH_PORT_DEFAULT if self.membership == "static" else GOSSIP_PORT_DEFAULT
            )
        _one_of("--log-level", self.log_level, LOG_LEVELS)
        _one_of("--membership", self.membership, MEMBERSHIPS)
        parse_port(str(self.gossip_port), flag="--gossip-port")
        if self.advertise:
            parse_advertise(self.advertise)
        parse_port(str(self.advertise_mesh_port), flag="--advertise-mesh-port", zero=OWN_PORT)
        _one_of("--profile", self.profile, PROFILES)
        if len(self.label.encode()) > LABEL_BYTES_MAX:
            raise SettingsError(f"--label: use at most {LABEL_BYTES_MAX} bytes")
        if self.membership == "static":
            # --gossip-port and --profile have defaults: whether somebody gave them cannot be seen here.
            for flag, given, does in (
                ("--key-file", self.key_file is not None, "encrypts gossip"),
                ("--label", self.label, "is gossip's"),
                ("--advertise", self.advertise, "is told by gossip"),
            ):
                if given:
                    raise SettingsError(f"{flag} {does}, which --membership static does without: give one of the two")


@dataclass(frozen=True, slots=True)
class AgentSettings(NodeSettings):
    """What an agent can be told."""

    memory_bytes: int = ARENA_BYTES_DEFAULT
    socket: Path = field(default_factory=socket_default)
    transports: tuple[str, ...] = field(default_factory=transports_default)
    """What may move chunks between this agent and its peers, the best first; zmq is among them."""

    def __post_init__(self) -> None:
        # Not super(): a slotted dataclass is a second class, which the zero-argument form does not know.
        NodeSettings.__post_init__(self)
        if self.memory_bytes < EXTENT_ALIGNMENT_BYTES:
            raise SettingsError(f"--memory {self.memory_bytes}: too small to hold a chunk; write for example 4GiB")
        if len(os.fsencode(self.socket)) > SOCKET_PATH_BYTES_MAX:
            raise SettingsError(
                f"--socket {self.socket}: the path of a unix socket has at most {SOCKET_PATH_BYTES_MAX} bytes; "
                "use a shorter one"
            )
        for name in self.transports:
            _one_of("--transports", name, TRANSPORTS)
        if len(set(self.transports)) != len(self.transports) or self.transports[-1:] != TRANSPORTS[-1:]:
            given = ",".join(self.transports)
            raise SettingsError(f"--transports {given!r}: name each once, and {TRANSPORTS[-1]} last")


@dataclass(frozen=True, slots=True)
class ControllerSettings(NodeSettings):
    """What a controller can be told."""


def parse_size(text: str, *, flag: str = "--memory") -> int:
    """Bytes from a size such as ``8GiB``, ``512MB`` or ``1073741824``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in SIZE_UNITS:
        raise SettingsError(f"{flag} {text!r} is not a size: write for example 8GiB, 512MiB or 500MB")
    return int(float(match[1]) * SIZE_UNITS[match[2].upper()])


def parse_port(text: str, *, flag: str = "--mesh-port", zero: str = "any free one") -> int:
    """A port, or 0: `zero` says what that stands for."""
    if not re.fullmatch(r"\d{1,5}", text) or int(text) > 65535:
        raise SettingsError(f"{flag} {text}: use a port from 1 to 65535, or 0 for {zero}")
    return int(text)


def parse_transports(text: str) -> tuple[str, ...]:
    """The backends of ``shm,nixl,zmq``, in that order; zmq is the last, named or not."""
    given = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in given:
        _one_of("--transports", name, TRANSPORTS)
    return (*(name for name in given if name != TRANSPORTS[-1]), TRANSPORTS[-1])


def parse_advertise(text: str) -> tuple[str, int | None]:
    """(IP address, port or None) from ``IP``, ``IP:PORT``, ``[IPv6]`` or ``[IPv6]:PORT``. Gossip carries addresses, not
    names."""
    match = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^\[\]:]+))(?::(\d{1,5}))?", text)
    host, port = (match[1] or match[2], match[3]) if match else (text, None)
    address = _ip(host)
    if address is None or address.is_unspecified or (port is not None and not 0 < int(port) <= 65535):
        raise SettingsError(f"--advertise {text!r} is not an address: write IP or IP:PORT, for example 10.0.0.5:7951")
    return str(address), None if port is None else int(port)


def is_loopback(host: str) -> bool:
    """Whether only processes of this host can reach what listens there: 127.0.0.0/8, ``::1``, ``localhost``."""
    address = _ip(host)
    if address is None:
        return host == "localhost"
    return address.is_loopback and (address.version == 4 or str(address) == "::1")


def _ip(text: str) -> IPv4Address | IPv6Address | None:
    from ipaddress import ip_address  # here, not above: `kvmesh --help` does without

    try:
        return ip_address(text)
    except ValueError:
        return None


def _one_of(flag: str, value: str, values: tuple[str, ...]) -> None:
    if value not in values:
        raise SettingsError(f"{flag} {value!r}: use one of {', '.join(values)}")


def parse_address(text: str, *, flag: str, port: int = MESH_PORT_DEFAULT) -> tuple[str, int]:
    """(host, port) from ``HOST:PORT`` or ``[IPv6]:PORT``. `port` is the one of the example that a mistake is answered
    with."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\[\]:/\s]+)):(\d{1,5})", text)
    if not match or not 0 < int(match[3]) <= 65535:
        raise SettingsError(f"{flag} {text!r} is not an address: write HOST:PORT, for example 127.0.0.1:{port}")
    return match[1] or match[2], int(match[3])
