"""Fixtures of the transport's tests."""

from __future__ import annotations

import pytest

from kvmesh.transport import zmq as zmq_transport
from kvmesh.transport.limits import SMALL_READ_BYTES_MAX
from tests.transport.ends import BACKENDS


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that keeps the contract (interface.py)."""
    return str(request.param)


@pytest.fixture(params=["loop", "thread"])
def receiver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Who receives the small reads of a test: the loop, as it does, or the thread that receives large ones."""
    if request.param == "thread":
        monkeypatch.setattr(zmq_transport, "SMALL_READ_BYTES_MAX", 0)
    else:
        assert zmq_transport.SMALL_READ_BYTES_MAX == SMALL_READ_BYTES_MAX > 0
    return str(request.param)
