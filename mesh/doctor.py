"""What is right and wrong on this machine, and what to do about it.

Each check is a small function from what it looked at to a `Finding`, so that each can be tested without the machine;
`examine` looks, and runs them all on the caller's thread. Nothing is changed, and nothing heavy is imported: versions
come from the packages' metadata.

    ok        as it should be
    note      worth knowing; nothing to do now
    warning   kvmesh works, but less well than it could, or not yet
    problem   kvmesh cannot work like this
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import socket
import stat
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, Protocol

from kvmesh.host import HostFacts, host_facts
from kvmesh.settings import transports_default
from kvmesh.transport.errors import AgentUnavailableError, KVMeshError, VersionMismatchError
from kvmesh.transport.limits import GIB, MIB

Status = Literal["ok", "note", "warning", "problem"]
DESCRIPTORS_WANTED = 4096
"""A connection takes one, a peer a few: enough for hundreds of either."""
DEV_SHM = "/dev/shm"  # noqa: S108 - only looked at
DEV_SHM_WANTED_BYTES = 1 * GIB
CONNECT_TIMEOUT_S = 1.0
PACKAGES = (
    # name, the oldest version that works, whether kvmesh needs it
    ("kvmesh", "0", True),
    ("torch", "2.4", True),
    ("pyzmq", "26", True),
    ("msgspec", "0.19", True),
    ("msgpack", "1.0.8", True),
    ("cryptography", "43", True),
    ("safetensors", "0.5", True),
    ("transformers", "5.19", False),
)
VersionOf = Callable[[str], str | None]


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check."""

    name: str
    status: Status
    what: str
    advice: str = ""
    """What to do; empty when there is nothing to do."""


class AgentConnection(Protocol):
    """What a check asks of a connected agent: the part of `kvmesh.Mesh` that it needs."""

    @property
    def node(self) -> str: ...

    def nodes(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


def examine(
    agent_socket: Path,
    host: str,
    mesh_port: int,
    gossip_port: int,
    arena_bytes: int,
    connect: Callable[[Path], AgentConnection],
) -> list[Finding]:
    """Every check, with what an agent on this machine would be told."""
    from kvmesh.transport.nixl import nixl_missing_reason  # not above: it brings numpy

    facts = host_facts()
    shm = shutil.disk_usage(DEV_SHM).total if os.path.isdir(DEV_SHM) else None
    agent, addresses = check_agent(agent_socket, os.getuid(), connect)
    return [
        check_python(sys.version_info[:3]),
        *(check_package(name, oldest, needed, version_of) for name, oldest, needed in PACKAGES),
        check_socket_directory(agent_socket.parent, os.getuid()),
        agent,
        check_mesh_port(host, mesh_port, addresses),
        check_gossip_port(host, gossip_port, addresses),
        check_memfd(os.memfd_create),
        check_memory(facts.memory_available_bytes, arena_bytes, agent_runs=agent.status == "ok"),
        check_dev_shm(shm),
        check_memlock(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], arena_bytes),
        check_descriptors(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        check_gpus(facts, version_of("torch")),
        check_nixl(nixl_missing_reason(), "nixl" in transports_default()),
    ]


def version_of(package: str) -> str | None:
    """The installed version, without importing the package; None when it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_python(running: Sequence[int]) -> Finding:
    """kvmesh needs Python 3.11."""
    text = ".".join(map(str, running))
    if tuple(running) < (3, 11):
        return Finding("python", "problem", f"{text} runs", "use Python 3.11 or later")
    return Finding("python", "ok", text)


def check_package(name: str, oldest: str, needed: bool, version_of: VersionOf) -> Finding:
    """The package is there, and not older than what kvmesh was made for."""
    found = version_of(name)
    if found is None:
        if needed:
            return Finding(name, "problem", "not installed", f"pip install '{name}>={oldest}'")
        return Finding(name, "note", "not installed", f"only for its engine: pip install 'kvmesh[{name}]'")
    if _numbers(found) < _numbers(oldest):
        status: Status = "problem" if needed else "warning"
        return Finding(name, status, f"{found} is too old", f"pip install '{name}>={oldest}'")
    return Finding(name, "ok", found)


def check_socket_directory(path: Path, uid: int) -> Finding:
    """The agent would take the directory of its socket, and nobody but this user can enter it."""
    name = "socket directory"
    try:
        found = path.lstat()
    except FileNotFoundError:
        return Finding(name, "ok", f"{path} is not there yet; the agent makes it")
    except OSError as error:
        return Finding(name, "problem", f"{path}: {error.strerror}", "use --socket with a path that you can enter")
    if not stat.S_ISDIR(found.st_mode):
        return Finding(name, "problem", f"{path} is not a directory", "use --socket with a path in a directory")
    shared = bool(found.st_mode & stat.S_ISVTX)  # like /tmp, which the agent takes too
    if found.st_uid not in (uid, 0) and not shared:
        return Finding(
            name, "problem", f"{path} belongs to user {found.st_uid}", "use --socket with a path of your own"
        )
    if found.st_mode & 0o077:
        # Never `chmod`: it may be a directory that others need, like / or /run.
        mode = stat.S_IMODE(found.st_mode)
        advice = "use --socket in a directory that only you can enter"
        return Finding(name, "warning", f"{path} is open to other users (mode {mode:04o})", advice)
    return Finding(name, "ok", f"{path}, only for this user")


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where an agent that answers is reached by other nodes."""

    mesh: str
    gossip: str | None
    """None: its membership is static."""


def check_agent(path: Path, uid: int, connect: Callable[[Path], AgentConnection]) -> tuple[Finding, Addresses | None]:
    """Whether an agent answers at the socket; with its addresses when it does."""
    try:
        found = path.lstat()
    except OSError:
        return Finding("agent", "warning", f"none runs: nothing is at {path}", "start it: kvmesh agent"), None
    if not stat.S_ISSOCK(found.st_mode):
        advice = "name the agent's socket with --agent, or start the agent with another --socket"
        return Finding("agent", "problem", f"{path} is not a socket", advice), None
    if found.st_uid != uid:
        what = f"{path} belongs to user {found.st_uid}: it is not your agent"
        return Finding("agent", "problem", what, "use --agent with your own agent's socket"), None
    if not _listens(path):
        what = f"none runs: {path} was left behind by one that is gone"
        return Finding("agent", "warning", what, "start it again: kvmesh agent"), None
    try:
        mesh = connect(path)
    except VersionMismatchError as error:
        return Finding("agent", "problem", str(error), "use one version of kvmesh for the agent and its clients"), None
    except AgentUnavailableError as error:
        return Finding("agent", "problem", str(error), "stop that agent and start it again"), None
    try:
        own = next((node for node in mesh.nodes()["nodes"] if node["name"] == mesh.node), None)
    except KVMeshError as error:
        return Finding("agent", "problem", f"{mesh.node}: {error}", "stop that agent and start it again"), None
    finally:
        mesh.close()
    addresses = Addresses(str(own["address"]), own.get("gossip_address")) if own else None
    return Finding("agent", "ok", f"{mesh.node} answers at {path}"), addresses


def check_mesh_port(host: str, port: int, agent: Addresses | None) -> Finding:
    """The port is free. Where an agent answers, its own port is what counts: no second one can have its socket."""
    name = "mesh port"
    if agent is not None:
        return Finding(name, "ok", f"{agent.mesh} is the agent's")
    if (why := _taken(host, port, socket.SOCK_STREAM)) is not None:
        what = f"{host}:{port} cannot be used: {why}"
        return Finding(name, "warning", what, "start the agent with --mesh-port 0, which takes any free port")
    return Finding(name, "ok", f"{host}:{port} is free" if port else "any free one")


def check_gossip_port(host: str, port: int, agent: Addresses | None) -> Finding:
    """The port is free, for UDP and for TCP. Where an agent answers, its own port is what counts."""
    name = "gossip port"
    if agent is not None:
        if agent.gossip is None:
            return Finding(name, "ok", "none: the agent's membership is static")
        return Finding(name, "ok", f"{agent.gossip} is the agent's")
    for kind, called in ((socket.SOCK_DGRAM, "UDP"), (socket.SOCK_STREAM, "TCP")):
        if (why := _taken(host, port, kind)) is not None:
            what = f"{host}:{port} cannot be used for {called}: {why}"
            return Finding(name, "warning", what, "start the agent with --gossip-port 0, which takes any free port")
    return Finding(name, "ok", f"{host}:{port} is free" if port else "any free one")


def _taken(host: str, port: int, kind: socket.SocketKind) -> str | None:
    """Why an agent could not have the port; None when it could."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, kind) as probe:
        try:
            if kind == socket.SOCK_STREAM:
                # As the agent does it: connections that are only waiting to be forgotten do not keep the port.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            if kind == socket.SOCK_STREAM:
                probe.listen(1)
        except OSError as error:
            return error.strerror or str(error)
    return None


def check_memfd(create: Callable[[str], int]) -> Finding:
    """The kernel gives anonymous shared memory: the arena is made of it."""
    try:
        descriptor = create("kvmesh-doctor")
    except OSError as error:
        what = f"memfd_create fails: {error.strerror}"
        return Finding("shared memory", "problem", what, "allow memfd_create in this container's seccomp profile")
    os.close(descriptor)
    return Finding("shared memory", "ok", "memfd_create works")


def check_memory(available_bytes: int, arena_bytes: int, *, agent_runs: bool) -> Finding:
    """The arena fits into what is free. One that already runs has its share."""
    what = f"{_gib(available_bytes)} available"
    if agent_runs:
        return Finding("memory", "ok", f"{what} beside the agent")
    if available_bytes < arena_bytes:
        half = max(1, available_bytes // 2 // MIB)
        return Finding(
            "memory",
            "warning",
            f"{what}, and the arena takes {_gib(arena_bytes)}",
            f"start the agent with --memory {half}MiB",
        )
    return Finding("memory", "ok", f"{what}, and the arena takes {_gib(arena_bytes)}")


def check_dev_shm(total_bytes: int | None) -> Finding:
    """The arena does not lie in /dev/shm, but the processes of one engine talk through it."""
    if total_bytes is None:
        return Finding(DEV_SHM, "note", "not there: the arena does not need it, but most engines do")
    if total_bytes < DEV_SHM_WANTED_BYTES:
        what = f"{_gib(total_bytes)}: the arena does not need it, but engines of several processes do"
        return Finding(DEV_SHM, "note", what, "in Docker: --shm-size=1g or --ipc=host")
    return Finding(DEV_SHM, "ok", f"{_gib(total_bytes)}")


def check_memlock(limit_bytes: int, arena_bytes: int) -> Finding:
    """RDMA pins the arena; TCP does not."""
    if limit_bytes == resource.RLIM_INFINITY:
        return Finding("locked memory", "ok", "unlimited")
    if limit_bytes >= arena_bytes:
        return Finding("locked memory", "ok", f"{_gib(limit_bytes)} may be locked")
    what = f"{_gib(limit_bytes)} may be locked: enough for TCP, too little for RDMA on the arena"
    return Finding("locked memory", "note", what, "for RDMA: ulimit -l unlimited (systemd: LimitMEMLOCK=infinity)")


def check_descriptors(soft: int, hard: int) -> Finding:
    """Each client and each peer takes some."""
    unlimited = soft == resource.RLIM_INFINITY
    if unlimited or soft >= DESCRIPTORS_WANTED:
        return Finding("open files", "ok", "unlimited" if unlimited else f"{soft} at once")
    enough = hard == resource.RLIM_INFINITY or hard >= DESCRIPTORS_WANTED
    advice = f"ulimit -n {DESCRIPTORS_WANTED}" if enough else "raise LimitNOFILE (systemd) or nofile (limits.conf)"
    return Finding("open files", "warning", f"only {soft} at once: a large mesh needs more", advice)


def check_gpus(facts: HostFacts, torch_version: str | None) -> Finding:
    """The driver and its GPUs, and that torch can use them."""
    if not facts.driver:
        return Finding("gpus", "note", "no NVIDIA driver: engines compute on the CPU here")
    if not facts.gpus:
        return Finding("gpus", "warning", f"driver {facts.driver}, but no GPU", "see what nvidia-smi says")
    what = f"{facts.gpu_summary}, driver {facts.driver}"
    if torch_version and torch_version.endswith("+cpu"):
        advice = "install torch for CUDA: https://pytorch.org/get-started/locally"
        return Finding("gpus", "warning", f"{what}, but torch {torch_version} is built without CUDA", advice)
    return Finding("gpus", "ok", what)


def check_nixl(missing: str | None, rdma: bool) -> Finding:
    """NIXL is optional, and of use where there is RDMA. `missing`: why it cannot be used."""
    if not rdma:
        there = "not installed" if missing else "installed"
        return Finding("nixl", "note", f"{there}, and not needed: without RDMA bytes move by shared memory and TCP")
    if missing:
        advice = "install it: pip install --no-deps nixl-cu12==1.5.1"
        return Finding("nixl", "warning", f"this host has RDMA, and {missing}", advice)
    return Finding("nixl", "ok", "installed, and this host has RDMA")


def _listens(path: Path) -> bool:
    """Whether somebody accepts connections at the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(CONNECT_TIMEOUT_S)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return False
        except OSError:
            return True  # full or hung, but there: what `connect` says about it is better
    return True


def _numbers(text: str) -> tuple[int, ...]:
    """``5.19.0rc1`` as (5, 19, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"
