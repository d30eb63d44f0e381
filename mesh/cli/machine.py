"""``kvmesh doctor`` and ``kvmesh demo``: what a newcomer runs first."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from kvmesh.settings import (
    GOSSIP_PORT_DEFAULT,
    LOOPBACK_HOSTS,
    MESH_PORT_DEFAULT,
    parse_port,
    parse_size,
    socket_default,
)

from . import reach
from .options import AgentSocket, AsJson
from .output import Column, counted, print_json, say, show
from .processes import MEMORY_DEFAULT, GossipPort, Memory, MeshPort

if TYPE_CHECKING:
    from kvmesh.doctor import Finding


def doctor(
    agent: AgentSocket = None,
    mesh_port: MeshPort = str(MESH_PORT_DEFAULT),
    gossip_port: GossipPort = str(GOSSIP_PORT_DEFAULT),
    memory: Memory = MEMORY_DEFAULT,
    as_json: AsJson = False,
) -> int:
    """Say what is wrong on this machine, and what to do.

    The flags are the agent's: what is checked is whether an agent that is given the same would work.
    """
    from kvmesh.doctor import examine

    findings = examine(
        agent or socket_default(),
        LOOPBACK_HOSTS[0],
        parse_port(mesh_port),
        parse_port(gossip_port, flag="--gossip-port"),
        parse_size(memory),
        reach.mesh,
    )
    counts = {status: sum(one.status == status for one in findings) for status in ("problem", "warning")}
    if as_json:
        print_json(
            {
                "findings": [asdict(finding) for finding in findings],
                "problems": counts["problem"],
                "warnings": counts["warning"],
            }
        )
    else:
        _print_findings(findings)
        say(f"{counted(counts['problem'], 'problem')}, {counted(counts['warning'], 'warning')}")
    return 1 if counts["problem"] else 0


def _print_findings(findings: list[Finding]) -> None:
    columns = (Column("check"), Column("status"), Column("what was found", name=True))
    show(columns, [[one.name, one.status, one.what] for one in findings])
    advice = [[one.name, one.advice] for one in findings if one.advice]
    if advice:
        say("")
        show((Column("check"), Column("what to do", name=True)), advice)
    say("")


def demo(
    model: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="A transformers model folder.", show_default="SmolLM2-135M-Instruct"),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Show the whole idea on this machine. It starts a controller, three agents and two engines."""
    from kvmesh.demo import run

    return run(json=as_json, model=model)
