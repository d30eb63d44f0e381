"""Fixtures of the transport's tests."""

from __future__ import annotations

import pytest

from tests.transport.ends import BACKENDS


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that keeps the contract (interface.py)."""
    return str(request.param)
