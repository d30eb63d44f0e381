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
    LOG_LEVELS,
    MESH_PORT_DEFAULT,
    AgentSettings,
    ControllerSettings,
    name_default,
    parse_port,
    parse_size,
    socket_default,
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
        help="A peer's mesh address; repeat it for more. In the variable, separate them with spaces or commas.",
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


def agent(
    config: Config = None,
    name: Name = None,
    bind: Bind = "127.0.0.1",
    mesh_port: MeshPort = str(MESH_PORT_DEFAULT),
    join: Join = None,
    memory: Memory = MEMORY_DEFAULT,
    socket: Socket = None,
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
        memory_bytes=parse_size(memory),
        socket=socket or socket_default(),
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
    join: Join = None,
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
        if facts["role"] == "agent":
            parts += [f"socket {facts['socket']}", human_bytes(facts["memory_bytes"])]
        say(f"{facts['role']} {facts['name']} is ready: {', '.join(parts)}")

    return ready
