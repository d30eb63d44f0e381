"""The network of gossip on asyncio: one port number, for UDP and TCP. It performs the actions of `swim.events`, reports
its events, and takes no decision of the protocol.

    network    `GossipNetwork`: actions in, events out; packets, names, and the file of the last known members
    streams    what is said over a stream, and the bounds on all of them
    carrier    the seam: what moves bytes and knows nothing of messages
    sockets    ... over UDP and TCP; `opening` binds them
    memory     ... within one process, for tests and for whatever runs several nodes in one
"""

from .counters import NetworkCounters
from .members import read_members_file
from .memory import MemoryGossip
from .network import GossipNetwork
from .opening import open_network

__all__ = ["GossipNetwork", "MemoryGossip", "NetworkCounters", "open_network", "read_members_file"]
