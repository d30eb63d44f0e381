"""Where a command finds the cluster. The one seam between the commands and the rest: tests put fakes here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvmesh.settings import parse_address
from kvmesh.transport.errors import SettingsError

if TYPE_CHECKING:
    from kvmesh.client import Mesh
    from kvmesh.view import View


def view(agent: Path | None, controller: str | None) -> View:
    """What answers *nodes*, *map* and *locate*: the named agent or controller, else whatever is at the defaults."""
    if agent is not None and controller is not None:
        raise SettingsError("--agent and --controller exclude each other: give the one that shall answer")
    if controller is not None:
        parse_address(controller, flag="--controller")
    from kvmesh.view import open_view

    return open_view(str(agent) if agent is not None else None, controller)


def mesh(agent: Path | None) -> Mesh:
    """A connection to the local agent, for what moves or marks chunks."""
    import kvmesh

    return kvmesh.connect(agent)
