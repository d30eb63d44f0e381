"""Moving bytes between two processes. Imports nothing of ours; `discovery` and `mesh` stand on it."""

from .interface import CallHandler, ChunkSource, Landing, Loan, Outcome, Reading, Transport, TransportStats, Want
from .memory import MemoryNetwork
from .zmq import ZmqTransport, open_zmq

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
