"""Fixtures of the tests of mesh/."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.agents import LocalAgents


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[LocalAgents]:
    """Agents of this process, over a network in memory."""
    with LocalAgents(tmp_path) as running:
        yield running
