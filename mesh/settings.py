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

from kvmesh.transport.errors import SettingsError
from kvmesh.transport.limits import ARENA_BYTES_DEFAULT, EXTENT_ALIGNMENT_BYTES, NAME_BYTES_MAX

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
MESH_PORT_DEFAULT = 7950
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
    """Mesh addresses of peers, ``HOST:PORT``."""
    log_level: str = "info"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name) or len(self.name) > NAME_BYTES_MAX:
            raise SettingsError(
                f"--name {self.name!r}: use letters, digits, '.', '_' and '-', at most {NAME_BYTES_MAX} of them"
            )
        if self.bind not in LOOPBACK_HOSTS:
            raise SettingsError(
                f"--bind {self.bind}: kvmesh listens on loopback only, since peers are not authenticated yet; "
                "use --bind 127.0.0.1"
            )
        parse_port(str(self.mesh_port))
        for address in self.join:
            parse_address(address, flag="--join")
        if self.log_level not in LOG_LEVELS:
            raise SettingsError(f"--log-level {self.log_level!r}: use one of {', '.join(LOG_LEVELS)}")


@dataclass(frozen=True, slots=True)
class AgentSettings(NodeSettings):
    """What an agent can be told."""

    memory_bytes: int = ARENA_BYTES_DEFAULT
    socket: Path = field(default_factory=socket_default)

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


@dataclass(frozen=True, slots=True)
class ControllerSettings(NodeSettings):
    """What a controller can be told."""


def parse_size(text: str, *, flag: str = "--memory") -> int:
    """Bytes from a size such as ``8GiB``, ``512MB`` or ``1073741824``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in SIZE_UNITS:
        raise SettingsError(f"{flag} {text!r} is not a size: write for example 8GiB, 512MiB or 500MB")
    return int(float(match[1]) * SIZE_UNITS[match[2].upper()])


def parse_port(text: str, *, flag: str = "--mesh-port") -> int:
    """A port to listen on; 0 stands for any free one."""
    if not re.fullmatch(r"\d{1,5}", text) or int(text) > 65535:
        raise SettingsError(f"{flag} {text}: use a port from 1 to 65535, or 0 for any free one")
    return int(text)


def parse_address(text: str, *, flag: str) -> tuple[str, int]:
    """(host, port) from ``HOST:PORT`` or ``[IPv6]:PORT``."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\[\]:/\s]+)):(\d{1,5})", text)
    if not match or not 0 < int(match[3]) <= 65535:
        raise SettingsError(f"{flag} {text!r} is not an address: write HOST:PORT, for example 127.0.0.1:7950")
    return match[1] or match[2], int(match[3])
