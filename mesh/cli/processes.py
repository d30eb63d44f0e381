"""``kvmesh agent`` and ``kvmesh controller``: from flags to settings, then the process itself until a signal ends it.

What a flag, a variable and the file give is merged by typer (flag, then ``KVMESH_*`` variable, then file, then
default); the values are checked by `kvmesh.settings`, so that all three get the same sentence for the same mistake.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from kvmesh.settings import (
    GOSSIP_PORT_DEFAULT,
    LOG_LEVELS,
    MEMBERSHIPS,
    MESH_PORT_DEFAULT,
    OWN_PORT,
    PROFILES,
    TRANSPORTS,
    AgentSettings,
    ControllerSettings,
    name_default,
    parse_port,
    parse_size,
    parse_transports,
    socket_default,
    state_dir_default,
    transports_default,
)
from kvmesh.transport.limits import ARENA_BYTES_DEFAULT, GIB

from .config import load
from .options import AsJson
from .output import human_bytes, print_json, say

MEMORY_DEFAULT = f"{ARENA_BYTES_DEFAULT // GIB}GiB"
Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", envvar="KVMESH_CONFIG", is_eager=True, callback=load, help="A TOML file with these settings."
    ),
]
Name = Annotated[
    str | None,
    typer.Option(metavar="NAME", envvar="KVMESH_NAME", show_default="the host's", help="The node's name in the mesh."),
]
Bind = Annotated[str, typer.Option(metavar="HOST", envvar="KVMESH_BIND", help="The address to listen on.")]
MeshPort = Annotated[
    str, typer.Option(metavar="N", envvar="KVMESH_MESH_PORT", help="The port for other nodes; 0 takes any free one.")
]
Join = Annotated[
    list[str] | None,
    typer.Option(
        metavar="HOST:PORT",
        envvar="KVMESH_JOIN",
        help="A peer's gossip address; repeat it for more. A DNS name stands for all its addresses. "
        "In the variable, separate them with spaces or commas.",
    ),
]
GossipPort = Annotated[
    str,
    typer.Option(
        metavar="N", envvar="KVMESH_GOSSIP_PORT", help="The port for gossip, UDP and TCP; 0 takes any free one."
    ),
]
Membership = Annotated[
    str,
    typer.Option(
        metavar="KIND",
        envvar="KVMESH_MEMBERSHIP",
        help=f"How peers are found: {', '.join(MEMBERSHIPS)}. Static: --join lists mesh addresses.",
    ),
]
Advertise = Annotated[
    str,
    typer.Option(
        metavar="IP[:PORT]",
        envvar="KVMESH_ADVERTISE",
        show_default="what is listened on",
        help="Where others reach this node's gossip; the IP goes with the mesh port, too.",
    ),
]
AdvertiseMeshPort = Annotated[
    str,
    typer.Option(
        metavar="N",
        envvar="KVMESH_ADVERTISE_MESH_PORT",
        show_default=OWN_PORT,
        help="The mesh port that others are told, where a container maps it to another one.",
    ),
]
Profile = Annotated[
    str,
    typer.Option(metavar="NAME", envvar="KVMESH_PROFILE", help=f"The network's kind: {', '.join(PROFILES)}."),
]
Label = Annotated[
    str,
    typer.Option(
        metavar="TEXT",
        envvar="KVMESH_LABEL",
        show_default="none",
        help="The mesh's label: gossip with another one is refused.",
    ),
]
KeyFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        envvar="KVMESH_KEY_FILE",
        show_default="gossip is not encrypted",
        help="The gossip keys, one a line, the primary first; 'kvmesh keygen FILE' makes one.",
    ),
]
StateDir = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        envvar="KVMESH_STATE_DIR",
        show_default="of this user",
        help="Where the last known members are kept, to rejoin after a crash.",
    ),
]
LogLevel = Annotated[
    str, typer.Option(metavar="LEVEL", envvar="KVMESH_LOG_LEVEL", help=f"What to log: {', '.join(LOG_LEVELS)}.")
]
Memory = Annotated[
    str, typer.Option(metavar="SIZE", envvar="KVMESH_MEMORY", help="The size of the arena, for example 64GiB.")
]
Socket = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        envvar="KVMESH_SOCKET",
        show_default="in a directory of this user's",
        help="Where engines and commands on this host reach the agent.",
    ),
]
Transports = Annotated[
    str,
    typer.Option(
        metavar="NAMES",
        envvar="KVMESH_TRANSPORTS",
        show_default="shm,zmq; with RDMA shm,nixl,zmq",
        help=f"What may move chunks to and from peers, the best first; {TRANSPORTS[-1]} always may.",
    ),
]


def agent(
    config: Config = None,
    name: Name = None,
    bind: Bind = "127.0.0.1",
    mesh_port: MeshPort = str(MESH_PORT_DEFAULT),
    gossip_port: GossipPort = str(GOSSIP_PORT_DEFAULT),
    join: Join = None,
    membership: Membership = MEMBERSHIPS[0],
    advertise: Advertise = "",
    advertise_mesh_port: AdvertiseMeshPort = "0",
    profile: Profile = PROFILES[0],
    label: Label = "",
    key_file: KeyFile = None,
    state_dir: StateDir = None,
    memory: Memory = MEMORY_DEFAULT,
    socket: Socket = None,
    transports: Transports = "",
    log_level: LogLevel = "info",
    as_json: AsJson = False,
) -> int:
    """Run this host's node. It keeps chunks in shared memory, and shares them with its peers."""
    settings = AgentSettings(
        name=name or name_default(),
        bind=bind,
        mesh_port=parse_port(mesh_port),
        join=_addresses(join),
        log_level=log_level,
        membership=membership,
        gossip_port=parse_port(gossip_port, flag="--gossip-port"),
        advertise=advertise,
        advertise_mesh_port=parse_port(advertise_mesh_port, flag="--advertise-mesh-port", zero=OWN_PORT),
        profile=profile,
        label=label,
        key_file=key_file,
        state_dir=state_dir or state_dir_default(),
        memory_bytes=parse_size(memory),
        socket=socket or socket_default(),
        transports=parse_transports(transports) if transports else transports_default(),
    )
    from kvmesh.agent import run

    _log_to_stderr(log_level)
    run(settings, _announce(as_json))
    return 0


def controller(
    config: Config = None,
    name: Name = None,
    bind: Bind = "127.0.0.1",
    mesh_port: MeshPort = str(MESH_PORT_DEFAULT),
    gossip_port: GossipPort = str(GOSSIP_PORT_DEFAULT),
    join: Join = None,
    membership: Membership = MEMBERSHIPS[0],
    advertise: Advertise = "",
    advertise_mesh_port: AdvertiseMeshPort = "0",
    profile: Profile = PROFILES[0],
    label: Label = "",
    key_file: KeyFile = None,
    state_dir: StateDir = None,
    log_level: LogLevel = "info",
    as_json: AsJson = False,
) -> int:
    """Run a controller. It follows every node, answers where chunks are, and shows the map."""
    settings = ControllerSettings(
        name=name or f"{name_default()}-controller",
        bind=bind,
        mesh_port=parse_port(mesh_port),
        join=_addresses(join),
        log_level=log_level,
        membership=membership,
        gossip_port=parse_port(gossip_port, flag="--gossip-port"),
        advertise=advertise,
        advertise_mesh_port=parse_port(advertise_mesh_port, flag="--advertise-mesh-port", zero=OWN_PORT),
        profile=profile,
        label=label,
        key_file=key_file,
        state_dir=state_dir or state_dir_default(),
    )
    from kvmesh.controller import run

    _log_to_stderr(log_level)
    run(settings, _announce(as_json))
    return 0


def _addresses(join: Sequence[str] | None) -> tuple[str, ...]:
    return tuple(address for text in join or () for address in text.replace(",", " ").split())


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=level.upper(),
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        datefmt="%Y-%m-%d %H:%M:%S",
        force=True,
    )


def _announce(as_json: bool) -> Callable[[dict[str, Any]], None]:
    """What a process does once it is ready: one line with its addresses, at once even into a pipe."""

    def ready(facts: dict[str, Any]) -> None:
        if as_json:
            print_json(facts, one_line=True)
            return
        parts = [f"mesh {facts['mesh_address']}"]
        if facts.get("gossip_address"):
            parts.append(f"gossip {facts['gossip_address']}")
        if facts["role"] == "agent":
            parts += [f"socket {facts['socket']}", human_bytes(facts["memory_bytes"])]
        say(f"{facts['role']} {facts['name']} is ready: {', '.join(parts)}")

    return ready
