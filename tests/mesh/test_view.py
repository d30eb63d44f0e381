"""Where look-at commands get their answers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvmesh import view
from kvmesh.controller import open_controller
from kvmesh.settings import ControllerSettings
from kvmesh.transport.errors import AgentUnavailableError
from tests.support.agents import LocalAgents


@contextmanager
def controller(state: Path) -> Iterator[str]:
    """A controller over zmq, on a loop in a thread; its address."""
    loop, address, stop = asyncio.new_event_loop(), list[str](), asyncio.Event()
    ready = threading.Event()

    async def run() -> None:
        settings = ControllerSettings(name="c", mesh_port=0, gossip_port=0, state_dir=state)
        async with open_controller(settings) as node:
            address.append(node.transport.address)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    assert ready.wait(20)
    try:
        yield address[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def test_a_controller_answers_every_question(tmp_path: Path) -> None:
    with controller(tmp_path) as address, view.open_view(controller=address) as seen:
        assert [(node["name"], node["role"]) for node in seen.nodes()["nodes"]] == [("c", "controller")]
        assert seen.map() == {"complete": True, "entries": 0, "namespaces": [], "nodes": []}
        assert seen.locate([b"k" * 32]) == {"chunks": 1, "holders": []}
        assert seen.stats()["node"] == "c"


def test_an_agent_is_found_by_its_socket(tmp_path: Path) -> None:
    with LocalAgents(tmp_path) as agents:
        agents.start("a")
        with view.open_view(agent=str(tmp_path / "a.sock")) as seen:
            assert seen.nodes()["nodes"][0]["name"] == "a"


def test_without_a_name_the_default_agent_answers_then_the_default_controller_then_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KVMESH_SOCKET", raising=False)
    monkeypatch.setattr("kvmesh.client.socket_default", lambda: tmp_path / "a.sock")
    with LocalAgents(tmp_path) as agents:
        agents.start("a")
        with view.open_view() as seen:
            assert seen.stats()["node"] == "a"
    with controller(tmp_path) as address:
        monkeypatch.setattr(view, "MESH_PORT_DEFAULT", int(address.rpartition(":")[2]))
        with view.open_view() as seen:
            assert seen.stats()["node"] == "c"
    with pytest.raises(AgentUnavailableError, match=r"--agent SOCKET or --controller HOST:PORT"):
        view.open_view()


def test_an_agent_that_the_environment_names_is_the_only_one_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVMESH_SOCKET", str(tmp_path / "nobody.sock"))
    with controller(tmp_path) as address:
        monkeypatch.setattr(view, "MESH_PORT_DEFAULT", int(address.rpartition(":")[2]))
        with pytest.raises(AgentUnavailableError, match=r"no agent socket at .*nobody\.sock"):
            view.open_view()
