"""Every bound of kvmesh, by name. Reaching one is an ordinary, counted error, never a crash and never a wait for ever.

Units stand last in each name. A bound that a user may want to change is a setting with its default here; the others are
safety bounds, far above ordinary use, that keep a faulty or hostile peer from taking memory or time.
This module stands in the lowest layer, so that all three folders share it. It imports nothing.
"""

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

# --- versions ------------------------------------------------------------------------------------------------------
AGENT_PROTOCOL_VERSION: Final = 1
"""Between a client and its agent, over the unix socket. Both ends must have the same."""
MESH_PROTOCOL_VERSION: Final = 1
"""Between nodes, over the mesh port. Both ends must have the same."""

# --- chunks --------------------------------------------------------------------------------------------------------
KEY_BYTES: Final = 32
NAMESPACE_ID_BYTES: Final = 16
CHUNK_TOKENS_DEFAULT: Final = 256
CHUNK_BYTES_MAX: Final = 1 * GIB
"""One chunk: 256 tokens of a 405B model in float32 are below it."""
CHAIN_CHUNKS_MAX: Final = 16_384
"""Keys of one request: 4 Mi tokens at 256 tokens a chunk."""
TOKENS_MAX: Final = CHAIN_CHUNKS_MAX * 4096
TENSORS_PER_CHUNK_MAX: Final = 1024
NAMESPACE_BYTES_MAX: Final = 64 * KIB
"""A namespace in its canonical form."""

# --- arena ---------------------------------------------------------------------------------------------------------
EXTENT_ALIGNMENT_BYTES: Final = 4096
"""A page: an extent can be registered with a NIC, read with O_DIRECT, and given back to the kernel on its own."""
ARENA_BYTES_DEFAULT: Final = 4 * GIB

# --- agent and client ------------------------------------------------------------------------------------------------
AGENT_FRAME_BYTES_MAX: Final = 4 * MIB
"""One message on the unix socket. Bulk bytes never pass there: they are in the arena."""
AGENT_HELLO_TIMEOUT_S: Final = 5.0
CLIENTS_MAX: Final = 256
"""Connections that one agent serves at once."""
CLIENT_REQUESTS_MAX: Final = 64
"""Requests of one connection that an agent works on at once."""
CLIENT_CONNECTIONS_MAX: Final = 16
"""Connections that one client opens: as many calls wait at once; a further call waits for a free one."""
CLIENT_REPLY_GRACE_S: Final = 5.0
"""How long past its own deadline a client waits for the agent's answer before it gives the connection up."""
GET_DEADLINE_DEFAULT_S: Final = 0.5
SPACES_MAX: Final = 1024
"""Namespaces that one agent knows."""
OWNED_CHUNKS_MAX: Final = 1_000_000
"""Leases and reservations of one connection."""

# --- transport -------------------------------------------------------------------------------------------------------
MESSAGE_BYTES_MAX: Final = 4 * MIB
"""One control message between nodes."""
FRAME_BYTES_MAX: Final = 16 * MIB
"""One frame of bulk bytes."""
FRAME_BYTES_DEFAULT: Final = 4 * MIB
READ_WINDOW_BYTES: Final = 16 * MIB
"""Bytes that a holder may have under way to one reader of one read: its credit. What a read costs beyond the arena."""
READ_WINDOW_BYTES_MAX: Final = 64 * MIB
"""The largest credit that a holder accepts from a reader."""
READS_PER_PEER_MAX: Final = 64
"""Reads that one reader may have open at one holder."""
READS_SERVED_MAX: Final = 1024
"""Reads that one holder serves at once, over all readers."""
CALLS_PER_PEER_MAX: Final = 256
CALLS_SERVED_MAX: Final = 1024
CALL_TIMEOUT_S: Final = 2.0
SERVED_READ_IDLE_S: Final = 30.0
"""A read whose reader grants no credit for so long is ended by the holder, and its leases are given back."""

# --- discovery -------------------------------------------------------------------------------------------------------
PEERS_MAX: Final = 4096
NAME_BYTES_MAX: Final = 128
PING_INTERVAL_S: Final = 1.0
PING_TIMEOUT_S: Final = 0.5
PINGS_LOST_UNTIL_SUSPECT: Final = 1
SUSPICION_S: Final = 3.0
"""From suspect to failed."""
PINGS_AT_ONCE_MAX: Final = 64
FAILED_FORGOTTEN_S: Final = 24 * 3600.0
JOURNAL_RING_ENTRIES: Final = 65_536
JOURNAL_BUCKETS: Final = 256
JOURNAL_BATCH_ENTRIES_MAX: Final = 8192
FOLLOW_WAIT_S: Final = 1.0
"""How long a node holds a follower's question open when there is nothing new."""
FOLLOW_TIMEOUT_S: Final = 3.0
SNAPSHOTS_AT_ONCE_MAX: Final = 8
"""Followers that one node sends a snapshot to at once."""
FOLLOWERS_MAX: Final = 1024
