"""Moving bytes between two processes. Imports nothing of ours; `discovery` and `mesh` stand on it.

Names are loaded when they are first used: `kvmesh.transport.errors` and `limits` are imported by everything, also by
``kvmesh --help``, which needs neither zmq nor numpy nor asyncio.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .interface import CallHandler, ChunkSource, Landing, Loan, Outcome, Reading, Transport, TransportStats, Want
    from .memory import MemoryNetwork
    from .zmq import ZmqTransport, open_zmq

_HOMES = {"MemoryNetwork": ".memory", "ZmqTransport": ".zmq", "open_zmq": ".zmq"}

__all__ = [
    "CallHandler",
    "ChunkSource",
    "Landing",
    "Loan",
    "MemoryNetwork",
    "Outcome",
    "Reading",
    "Transport",
    "TransportStats",
    "Want",
    "ZmqTransport",
    "open_zmq",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, ".interface"), __name__), name)
