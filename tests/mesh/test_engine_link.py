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


def use(link: AgentLink) -> Any:
    with link.use() as mesh:
        return mesh


def fail(link: AgentLink, reason: str) -> None:
    with pytest.raises(AgentUnavailableError, match=reason), link.use():
        raise AgentUnavailableError(reason)


def test_one_connection_is_made_and_kept() -> None:
    agent = Agent()
    link = agent.link()
    assert use(link) is use(link)
    assert agent.attempts == 1


def test_a_failed_agent_is_left_alone_for_the_interval() -> None:
    agent = Agent()
    link = agent.link()
    first = use(link)
    fail(link, "it went away")
    for _ in range(20):  # asking too early changes nothing
        with pytest.raises(AgentUnavailableError, match="it went away"):
            use(link)
    agent.now += ENGINE_RECONNECT_INTERVAL_MIN_S
    assert use(link) is first, "a Mesh connects again by itself"


def test_the_interval_doubles_up_to_its_bound_while_nobody_is_there() -> None:
    agent = Agent()
    agent.up = False
    link = agent.link()
    for _ in range(200):
        agent.now += ENGINE_RECONNECT_INTERVAL_MIN_S
        with pytest.raises(AgentUnavailableError, match="nobody there"):
            use(link)
    assert 5 <= agent.attempts <= 12
    agent.up = True
    agent.now += ENGINE_RECONNECT_INTERVAL_MAX_S
    use(link)


def test_an_agent_that_answers_again_is_trusted_again() -> None:
    agent = Agent()
    link = agent.link()
    for _ in range(10):
        fail(link, "it hangs")
        agent.now += ENGINE_RECONNECT_INTERVAL_MAX_S
    use(link)
    fail(link, "it hangs")
    agent.now += ENGINE_RECONNECT_INTERVAL_MIN_S
    use(link)


def test_another_error_is_the_callers_and_postpones_nothing() -> None:
    link = Agent().link()
    with pytest.raises(ValueError, match="mine"), link.use():
        raise ValueError("mine")
    use(link)


def test_closing_the_link_closes_the_connection() -> None:
    link = Agent().link()
    first = use(link)
    link.close()
    assert first.closed
    assert use(link) is not first
