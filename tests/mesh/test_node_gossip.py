"""What a node says of where it is reached, when it finds others by gossip."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from kvmesh import queries
from kvmesh.controller import open_controller
from kvmesh.node import Node
from kvmesh.settings import ControllerSettings
from kvmesh.transport.errors import ProtocolError


def facts(tmp_path: Path, advertise: str = "", port: int = 0, **given: Any) -> tuple[dict[str, object], str]:
    settings = ControllerSettings(
        "c", mesh_port=0, gossip_port=0, advertise=advertise, advertise_mesh_port=port, state_dir=tmp_path, **given
    )

    async def scene() -> tuple[dict[str, object], str]:
        async with open_controller(settings) as node:
            return node.facts(), node.discovery.members()[0].address

    return asyncio.run(scene())


@pytest.mark.slow  # it leaves the mesh in order
def test_the_advertised_address_is_told_for_gossip_and_for_the_mesh_port(tmp_path: Path) -> None:
    said, own_address = facts(tmp_path, "127.0.0.9:7000")
    assert said["gossip_address"] == "127.0.0.9:7000"
    assert str(said["mesh_address"]).startswith("127.0.0.9:")
    assert said["mesh_address"] == own_address


@pytest.mark.slow  # as above
def test_without_one_it_is_where_the_node_listens(tmp_path: Path) -> None:
    said, own_address = facts(tmp_path)
    assert str(said["gossip_address"]).startswith("127.0.0.1:")
    assert str(said["mesh_address"]).startswith("127.0.0.1:")
    assert said["mesh_address"] == own_address


@pytest.mark.slow  # as above
@pytest.mark.parametrize("membership", ["gossip", "static"])
def test_the_mesh_port_that_is_told_may_be_another_than_the_one_that_is_listened_on(
    tmp_path: Path, membership: str
) -> None:
    said, own_address = facts(tmp_path, port=7777, membership=membership)
    assert said["mesh_address"] == own_address == "127.0.0.1:7777"


@pytest.mark.slow  # as above
def test_address_and_port_are_told_together(tmp_path: Path) -> None:
    said, own_address = facts(tmp_path, "127.0.0.9", 7777)
    assert said["mesh_address"] == own_address == "127.0.0.9:7777"


def test_a_call_that_comes_before_the_node_is_whole_is_refused() -> None:
    """Peers know the address of a node that starts again, and call while its transport is all that it has."""
    node = Node("c", "controller", 1)
    for request in (b"D", queries.CALL_PREFIX + queries.encode(queries.Nodes()), b"?"):
        with pytest.raises(ProtocolError, match="this node is starting"):
            asyncio.run(node.handle(request))
