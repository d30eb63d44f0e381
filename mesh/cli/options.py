"""The flags that more than one command has, each written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text for people.")]

AgentSocket = Annotated[
    Path | None,
    typer.Option(
        "--agent", metavar="SOCKET", help="The agent's socket. Default: KVMESH_SOCKET, or where the agent listens."
    ),
]
ControllerAddress = Annotated[
    str | None,
    typer.Option("--controller", metavar="HOST:PORT", help="Ask this controller instead of the local agent."),
]
TokensFile = Annotated[
    Path | None,
    typer.Option("--tokens", metavar="T.json", help="The prompt: a JSON list of token ids. '-' reads it from stdin."),
]
SpaceFile = Annotated[
    Path | None,
    typer.Option(
        "--space", metavar="SPACE.json", help="The namespace: a JSON object with the fields of kvmesh.Namespace."
    ),
]
Keys = Annotated[
    list[str] | None,
    typer.Option(
        "--key", metavar="HEX", help="A chunk's key, 64 hex digits; repeat it for a chain. Instead of --tokens."
    ),
]
