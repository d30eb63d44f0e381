"""The engine's connection to its agent: when it is made again, and how little a dead agent costs."""

from __future__ import annotations

from typing import Any

import pytest

from kvmesh.engines.link import AgentLink
from kvmesh.transport.errors import AgentUnavailableError
from kvmesh.transport.limits import ENGINE_RECONNECT_INTERVAL_MAX_S, ENGINE_RECONNECT_INTERVAL_MIN_S


class Connection:
    closed = False

    def close(self) -> None:
        self.closed = True


class Agent:
    """Something to connect to, which can be down, and a clock."""

    def __init__(self) -> None:
        self.up = True
        self.attempts = 0
        self.now = 100.0

    def connect(self) -> Any:
        self.attempts += 1
        if not self.up:
            raise AgentUnavailableError("nobody there")
        return Connection()

    def link(self, mesh: Any = None) -> AgentLink:
        return AgentLink(self.connect, mesh=mesh, clock=lambda: self.now)


def test_one_connection_is_made_and_kept() -> None:
    agent = Agent()
    link = agent.link()
    assert link.mesh() is link.mesh()
    assert agent.attempts == 1


def test_a_failed_agent_is_left_alone_for_the_interval() -> None:
    agent = Agent()
    link = agent.link()
    first = link.mesh()
    link.failed("it went away")
    with pytest.raises(AgentUnavailableError, match="it went away"):
        link.mesh()
    agent.now += ENGINE_RECONNECT_INTERVAL_MIN_S
    assert link.mesh() is first, "a Mesh connects again by itself"


def test_the_interval_doubles_up_to_its_bound_while_nobody_is_there() -> None:
    agent = Agent()
    agent.up = False
    link = agent.link()
    for _ in range(200):
        agent.now += ENGINE_RECONNECT_INTERVAL_MIN_S
        with pytest.raises(AgentUnavailableError, match="nobody there"):
            link.mesh()
    assert 5 <= agent.attempts <= 12
    agent.up = True
    agent.now += ENGINE_RECONNECT_INTERVAL_MAX_S
    link.mesh()


def test_an_agent_that_answers_again_is_trusted_again() -> None:
    agent = Agent()
    link = agent.link()
    for _ in range(10):
        link.failed("it hangs")
    agent.now += ENGINE_RECONNECT_INTERVAL_MAX_S
    link.mesh()
    link.worked()
    link.failed("it hangs")
    agent.now += ENGINE_RECONNECT_INTERVAL_MIN_S
    link.mesh()


def test_closing_the_link_closes_the_connection() -> None:
    agent = Agent()
    link = agent.link()
    first: Any = link.mesh()
    link.close()
    assert first.closed
    assert link.mesh() is not first
