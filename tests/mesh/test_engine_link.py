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


def test_a_lost_connection_is_closed_and_made_again_after_the_interval() -> None:
    agent = Agent()
    link = agent.link()
    first: Any = link.mesh()
    link.lost(first, "it went away")
    assert first.closed
    with pytest.raises(AgentUnavailableError, match="it went away"):
        link.mesh()
    assert agent.attempts == 1, "too early to try: it fails at once"
    agent.now += ENGINE_RECONNECT_INTERVAL_MIN_S
    assert link.mesh() is not first


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


def test_an_old_connection_that_fails_late_does_not_close_the_new_one() -> None:
    agent = Agent()
    given: Any = Connection()
    link = agent.link(given)
    link.lost(given, "broken")
    agent.now += ENGINE_RECONNECT_INTERVAL_MIN_S
    new: Any = link.mesh()
    link.lost(given, "broken")
    assert link.mesh() is new
    link.close()
    assert new.closed
