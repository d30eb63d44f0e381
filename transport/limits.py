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
AGENT_PROTOCOL_VERSION: Final = 2
"""Between a client and its agent, over the unix socket. Both ends must have the same."""
MESH_PROTOCOL_VERSION: Final = 2
"""Between nodes, over the mesh port. Both ends must have the same."""

# --- chunks --------------------------------------------------------------------------------------------------------
KEY_BYTES: Final = 32
NAMESPACE_ID_BYTES: Final = 16
CHUNK_TOKENS_DEFAULT: Final = 256
CHUNK_BYTES_MAX: Final = 1 * GIB
"""One chunk: 256 tokens of a 405B model in float32 are below it."""
CHAIN_CHUNKS_MAX: Final = 16_384
"""Keys of one request: 4 Mi tokens at 256 tokens a chunk."""
TENSORS_PER_CHUNK_MAX: Final = 1024
NAMESPACE_BYTES_MAX: Final = 64 * KIB
"""A namespace in its canonical form."""

SLICE_RUNS_MAX: Final = 1 << 20
"""Runs of one slice of a chunk: a head of 128 bytes for each token, layer, K and V stays far below."""

# --- arena ---------------------------------------------------------------------------------------------------------
EXTENT_ALIGNMENT_BYTES: Final = 4096
"""A page: an extent can be registered with a NIC, read with O_DIRECT, and given back to the kernel on its own."""
ARENA_BYTES_DEFAULT: Final = 4 * GIB
QUARANTINE_SHARE: Final = 16
"""Extents whose chunks were found corrupt stay out of use, up to this part of the arena: memory that flipped a bit once
is not trusted again soon."""

# --- agent and client ------------------------------------------------------------------------------------------------
AGENT_FRAME_BYTES_MAX: Final = 4 * MIB
"""One message on the unix socket. Bulk bytes never pass there: they are in the arena."""
AGENT_HELLO_TIMEOUT_S: Final = 5.0
CLIENTS_MAX: Final = 256
"""Connections that one agent serves at once."""
ACCEPT_RETRY_S: Final = 0.1
"""How long an agent that could not accept a client, for want of file descriptors, waits before it tries again."""
CLIENT_REQUESTS_MAX: Final = 64
"""Requests of one connection that an agent works on at once."""
CLIENT_CONNECTIONS_MAX: Final = 16
"""Connections that one client opens: as many calls wait at once; a further call waits for a free one."""
CLIENT_REPLY_GRACE_S: Final = 5.0
"""How long past its own deadline a client waits for the agent's answer before it gives the connection up."""
GET_DEADLINE_DEFAULT_S: Final = 0.5
DEADLINE_MAX_S: Final = 3600.0
"""The longest deadline of a get or a prefetch: no request waits longer, and no fetch goes on for nobody longer."""
SPACES_MAX: Final = 1024
"""Namespaces that one agent knows."""
LEASE_S_DEFAULT: Final = 30.0
"""How long a client's leases last without being renewed; a client that runs renews them in time."""
LEASE_S_MIN: Final = 0.05
LEASE_S_MAX: Final = 3600.0
RENEWALS_PER_MESSAGE_MAX: Final = 65_536
"""Gets whose leases one message renews."""
GRANTS_PER_CLIENT_MAX: Final = 4096
"""Gets of one connection whose chunks are not all released."""
INSPECTION_REST: Final = 9.0
"""After each inspection of a suspected chunk the next one waits so many times as long: a tenth of one core at most."""
SUSPECTS_MAX: Final = 64
"""Chunks that wait to be verified because somebody suspects them."""
OWNED_CHUNKS_MAX: Final = 1_000_000
"""Leases and reservations of one connection."""

# --- transport -------------------------------------------------------------------------------------------------------
MESSAGE_BYTES_MAX: Final = 4 * MIB
"""One control message between nodes."""
FRAME_BYTES_MAX: Final = 16 * MIB
"""One frame of bulk bytes."""
FRAME_BYTES_DEFAULT: Final = 4 * MIB
"""The largest that a holder makes: in the largest window. `FRAMES_PER_WINDOW` makes it 1 MiB in an ordinary one."""
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
SERVED_READ_LEASE_S_MAX: Final = DEADLINE_MAX_S + 1.0
"""The longest time for which a reader may ask a holder to keep a read: its deadline, and a second."""
SLICES_PER_READ_MAX: Final = 1024
"""Different slices that one read names. An engine of another parallel degree names one, a loader of layers 128."""
SUSPECTS_PER_SWEEP_MAX: Final = 64
"""Chunks that one reader may call corrupt between two sweeps, a second apart: each costs the holder a checksum."""
HEADER_BYTES_MAX: Final = 4 * KIB
"""The header of one message between nodes: a few numbers, or `ITEMS_PER_MESSAGE_MAX` items."""
READ_WINDOW_BYTES_MIN: Final = 64 * KIB
"""The smallest credit that a holder accepts: below it a read would be all headers."""
FRAMES_PER_WINDOW: Final = 16
"""A holder's frames are at most this part of the window, so that several are under way at once. 1 MiB frames measured
best."""
SMALL_CHUNK_BYTES: Final = 128 * KIB
"""Chunks up to this size share a part of a message: as one stretch of the arena when they follow each other there, else
joined by a copy, which is cheaper than the bookkeeping of a part each."""
ITEMS_PER_MESSAGE_MAX: Final = 64
ITEM_COST_BYTES: Final = 256
"""What each item of a bulk message costs of the reader's credit beside its bytes, so that tiny chunks are bounded as
well."""
WANTS_SERVED_MAX: Final = 1 << 20
"""Chunks still to send in all the reads that one holder serves: 40 MiB of keys and sizes."""
REFUSAL_CHARS_MAX: Final = 512
IO_THREADS: Final = 1
"""libzmq's threads of one transport. They carry its own calls; what it serves, and all bulk, goes over sockets of
ours."""
CONNECTIONS_SERVED_MAX: Final = 16_384
"""Connections that others have to one mesh port. Each costs a descriptor and some KiB; one beyond it is closed."""
SMALL_READ_BYTES_MAX: Final = 256 * KIB
"""Reads up to this size are done by the loop: receiving and verifying them takes it some 50 us."""
SMALL_READ_CHUNKS_MAX: Final = 16
"""And of so many chunks."""
DIRECT_SEND_BYTES_MAX: Final = SMALL_READ_BYTES_MAX + HEADER_BYTES_MAX
"""So little, the answer to a small read, is sent by the loop itself, at once, on a connection where nothing waits:
waking a thread takes longer."""
SAID_BYTES_MAX: Final = 16 * KIB
"""Of greeting, handshake and answers to PINGs that wait to be sent on one connection that is served: what a peer makes
us hold that asks and does not read."""
BULK_LINKS_PER_PEER_MAX: Final = 2
"""Connections for bulk to one peer. Reads at the same time spread over them, so that a small read does not wait behind
all of a large one; for the rate of several reads it is the same (1 measured 0.9-1.0 of 2)."""
LINK_IDLE_S: Final = 60.0
"""A connection without a call or a read for so long is closed; the next one opens it again."""
CONNECT_TIMEOUT_S: Final = 3.0
HANDSHAKE_TIMEOUT_S: Final = 3.0
HEARTBEAT_INTERVAL_S: Final = 2.0
HEARTBEAT_TIMEOUT_S: Final = 6.0
"""A connection whose other end is silent for so long is lost. A caller answers by libzmq's threads, a reader of bulk by
its bulk thread and a holder by its loop: nothing holds any of them up for so long."""
SEND_QUEUE_MESSAGES: Final = 1024
"""Messages that wait to be sent on one control connection. A call beyond it is refused."""
SEND_QUEUE_BUFFERS: Final = 4 * SEND_QUEUE_MESSAGES
"""Buffers that wait to be sent on one connection that is served: two for most messages. An answer beyond it is dropped;
bulk waits for the reader's next credit."""
RECEIVE_QUEUE_MESSAGES: Final = 64
"""Messages of one control connection that were received and not looked at. Beyond it TCP holds the sender back."""
PARTS_PER_MESSAGE_MAX: Final = 64
"""Frames of one bulk message beside its header."""
STAGE_BYTES: Final = 8 * KIB
"""The buffer of one bulk connection for headers and commands: more than `HEADER_BYTES_MAX`."""
PIECE_BYTES: Final = 512 * KIB
"""Bytes of bulk that one system call receives at most: they are hashed while they are in the CPU's cache, and a
cancelled read is heard between two of them. 512 KiB cost 10-15 % less of the CPU than 256, and 1 MiB no less."""
UNSENT_BYTES_MAX: Final = 8 * MIB
"""Bytes that wait to be sent on one bulk connection: some lists of wanted chunks. A read beyond it is refused."""
NAMES_AT_ONCE_MAX: Final = 8
"""Host names that are looked up at the same time."""
LOANS_LOOK_S: Final = 0.01
"""How often a holder looks which of its lent chunks have been sent. To be told of each would wake the loop for
each frame."""
LOANS_RETURN_S: Final = 5.0
"""How long a closing transport waits for its lent chunks to come back. It takes milliseconds."""
INSTANCE_BYTES: Final = 16
"""The random name of one transport, and of one reader's link to it: a restarted peer has another."""
OFFER_BYTES_MAX: Final = 64 * KIB
"""What one backend tells a peer of itself: NIXL's metadata are a few KiB."""
OFFERS_PER_PEER_MAX: Final = 8
OFFER_WAIT_S: Final = 0.02
"""How long the first read of a peer waits to learn a faster way than ``zmq``: what 256 MiB take over TCP are 50 ms."""
OFFER_WAIT_BYTES_MIN: Final = 1 * MIB
"""A first read of less does not wait: it is over before the answer is there."""
OFFERS_KEPT_MAX: Final = 1024
"""Peers whose offers are remembered. Beyond it the one that was used least recently is asked again."""
LINKS_PER_READ_MAX: Final = 4
"""Links to its holder that one read tries, one after the other, before it goes by ``zmq``: one of each backend, and
more for a holder that has just started again."""
BACKEND_RETRY_S: Final = 30.0
"""A backend that failed for a peer is left out for so long."""
OFFER_KEPT_S: Final = BACKEND_RETRY_S
"""How long a peer's offers are believed before it is asked again, beside the reads that go on."""
LEND_LEASE_S: Final = 5.0
"""The longest lease of chunks that a reader takes itself: a reader that dies keeps them from eviction no longer. One
that still moves renews it."""
LEND_RENEW_S: Final = LEND_LEASE_S / 2
"""How long after it asked for a lease the reader asks for more time, if it still moves."""
LEND_MARGIN_S: Final = 0.25
"""So long before a lease ends by its own clock the reader stops to rely on it."""
LEND_BATCH_BYTES_MIN: Final = 2 * MIB
"""Chunks that are lent, moved and given back together, at the front of a read: they land together, and an engine waits
for the first."""
LEND_BATCH_BYTES_MAX: Final = 32 * MIB
"""The same further back, where each batch has twice the bytes of the one before it: three milliseconds of copying,
beside which the calls of a batch cost little. A single chunk may be larger."""
LEND_BATCH_CHUNKS_MAX: Final = 256
LEND_BATCHES_AT_ONCE: Final = 4
"""Batches of one read: while some are moved, the next are lent."""
LEND_RUNS_MAX: Final = 4096
"""Runs of one part, or of all parts in a batch, that a reader takes itself; of more, the holder gathers them."""
LEND_RUN_BYTES_MIN: Final = 4 * KIB
"""Parts with smaller runs are gathered by the holder: each run that a reader takes costs it some microseconds."""
LEASES_PER_READER_MAX: Final = 64 * LEND_BATCHES_AT_ONCE
LEASES_MAX: Final = 4096
LENT_BYTES_PER_READER_MAX: Final = 8 * GIB
LENT_CHUNKS_MAX: Final = 1 << 18
"""Chunks lent to all readers that take the bytes themselves."""
GIVE_BACK_GATHER_S: Final = 0.002
"""How long leases that are not needed any more wait for others, to be given back by one call."""
GIVE_BACK_TIMEOUT_S: Final = 1.0
"""For the call that gives leases back. When it fails they end by themselves."""
COPY_THREADS: Final = 2
"""Threads of one transport that copy and hash. Two reach what the memory gives; one does not."""
COPY_STEP_BYTES: Final = 512 * KIB
"""Bytes that are copied, then hashed while they are in the processor's cache; a cancelled copy is heard in between."""
COPY_ON_LOOP_BYTES_MAX: Final = 256 * KIB
"""So little is copied or hashed at once: waking a thread takes longer."""
SHM_PEERS_MAX: Final = 256
"""Readers on this host that one node serves through shared memory."""
SHM_HELLO_BYTES_MAX: Final = 256

# --- discovery -------------------------------------------------------------------------------------------------------
PEERS_MAX: Final = 4096
NAME_BYTES_MAX: Final = 128
PING_INTERVAL_S: Final = 1.0
PING_TIMEOUT_S: Final = 0.5
JOIN_CALLS_UNTIL_WARNED: Final = 3
"""Calls to an address of ``--join`` that fail before the log says so."""
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
FOLLOWS_HELD_MAX: Final = CALLS_SERVED_MAX // 2
"""Questions of followers that one node holds open at once. Beyond it a follower is answered at once and asks again
later, so that pings and snapshots always find a free call."""
FOLLOW_GATHER_S: Final = 0.001
"""How long after a change a node waits, for each question that it holds, before it answers them all: entries gather
meanwhile, and a busy journal with many followers does not answer each of them for each entry."""
FOLLOW_GATHER_S_MIN: Final = 0.1
"""From one answer with news to the next: each takes processor time from the chunks that land, on both ends, and every
node answers every other. With five nodes that read, 0.02 s took a fifth of the time of the bytes."""
FOLLOW_GATHER_ENTRIES: Final = 256
"""So many entries are worth an answer at once: a follower that catches up does not wait."""
FOLLOW_GATHER_S_MAX: Final = 0.25
FOLLOW_BEHIND_S: Final = 0.5
"""How long a head may show more than a follower has before its question counts as lost; grows when losses repeat."""
FOLLOW_RETRY_S: Final = 0.1
"""A follower's first wait after a lost question; it doubles up to the bound below."""
FOLLOW_RETRY_S_MAX: Final = 5.0
SNAPSHOT_PAGE_ENTRIES_MAX: Final = 16_384
"""Chunks in one page of a snapshot: at most 1 MiB."""
SNAPSHOT_IDLE_S: Final = 5.0
"""A follower that asks for no further page for so long has given its snapshot up."""
SNAPSHOT_RETRY_S: Final = 0.5
"""How long a follower is asked to wait for its snapshot when others are being served."""
DESCRIPTIONS_MAX: Final = SPACES_MAX
"""Namespaces that one journal describes."""
DESCRIPTION_BYTES_MAX: Final = 2 * KIB
DESCRIPTIONS_PAGE_BYTES_MAX: Final = 1 * MIB
MAP_ENTRIES_MAX: Final = 2_000_000
"""Chunks that one map records, over all nodes. Beyond it the map refuses more and says that it is not complete."""
PING_RETRY_S: Final = 0.25
"""Between two pings to a member that missed one: several fit into the time from suspect to failed."""
FAILED_PING_INTERVAL_S: Final = 5.0
"""Between two pings to a member that failed, or to an address of the list where nobody answers."""
HEARSAY_PINGS_MAX: Final = 4
"""Pings to an address that only another member named, before it is dropped."""
PEERS_TOLD_MAX: Final = 64
"""Addresses of other members in one answer to a ping."""
PAUSE_S: Final = 2.0
"""A process that did nothing for so long was stopped: what it believes lost may wait in its own queues."""
NAME_CONFLICT_S: Final = 5.0
"""A message of an older epoch that comes so long after the newer one is no late packet: two processes have one name."""
CONFLICTS_MAX: Final = 64
ADDRESS_CHARS_MAX: Final = 300
META_ITEMS_MAX: Final = 32
META_CHARS_MAX: Final = 512
"""One value of a member's meta."""
PACKET_BYTES_MAX: Final = 65_535
"""One packet of gossip as it is read, and what a compressed one may hold. What is sent stays far below it."""
GOSSIP_MAP_BYTES_MAX: Final = 4 * KIB
"""The map of one gossip message. The longest of ours are below 1 KiB; a newer peer may have more fields."""
GOSSIP_FIELDS_MAX: Final = 32
"""Fields of one gossip message, and of any list in a field that we do not know."""
ACK_PAYLOAD_BYTES_MAX: Final = 1 * KIB
"""Bytes of the application in an ack. Serf's coordinates are some 150."""
PACKET_MESSAGES_MAX: Final = 255
"""Messages in one packet, over all compounds in compounds: one compound has no more."""
WRAPPINGS_MAX: Final = 4
"""Compounds and compressions around a message. A peer sends two: a compound, compressed."""
STREAM_BYTES_MAX: Final = 8 * MIB
"""One message over a stream, and what a compressed one may hold. memberlist's bound is 20 MiB; the state of `PEERS_MAX`
nodes with the longest names and metas is 3 MiB, and decompressing takes the loop's time."""
PUSHED_NODES_MAX: Final = 2 * PEERS_MAX
"""Nodes in one push/pull: the dead are told for a while beside the living."""
KEY_FILE_BYTES_MAX: Final = 16 * KIB
LABEL_BYTES_MAX: Final = 255
"""A cluster's label: its length travels in one byte."""
GOSSIP_NODES_MAX: Final = PEERS_MAX
"""Nodes that a membership by gossip knows, gone ones included."""
RUMOURS_MAX: Final = PEERS_MAX
"""Rumours that wait to be told; of one node only the newest waits."""
INCARNATION_MAX: Final = (1 << 32) - 1
RELAYS_MAX: Final = 1024
"""Probes that a node makes for others at once."""
JOIN_DIALS_MAX: Final = 8
"""Addresses of seeds that one round of joining tries: one is enough, and a service may name hundreds."""
JOIN_RETRY_S: Final = 1.0
"""After a round of joining in which nobody answered; it doubles up to the bound below."""
JOIN_RETRY_S_MAX: Final = 30.0
SEED_RETRY_S: Final = 60.0
"""How often a seed that is no member is tried again, by a node that has found others: two meshes that were begun apart
find each other."""
SEED_ADDRESSES_MAX: Final = 1024
"""Addresses of one seed that are looked at."""
MEMBERS_REMEMBERED_MAX: Final = 64
"""Members whose addresses are kept in a file for the next start."""
TIMER_LATE_S: Final = 1.0
"""A timer that is late by so much was not late because of work: this process did not run."""
REMEMBER_S: Final = 1.0
"""From a change of the members until they are remembered."""
PACKETS_PER_TURN: Final = 64
"""Packets that are read before timers and streams get their turn."""
RECEIVE_BUFFER_BYTES: Final = 4 * MIB
"""Asked of the kernel for gossip's packets."""
STREAM_READ_BYTES: Final = 64 * KIB
STREAM_SERVE_TIMEOUT_S: Final = 10.0
"""For a peer's whole stream, its message and our answer."""
STREAMS_SERVED_MAX: Final = 128
"""Streams of peers at once: memberlist's bound on push/pulls."""
STREAMS_PER_SOURCE_MAX: Final = 32
"""Streams of one address at once: a host that opens them and says nothing leaves room for others."""
STREAMS_OPENED_MAX: Final = 1024
"""Streams of our own at once: a change of keys opens one to each member."""
STREAM_BYTES_HELD_MAX: Final = 32 * MIB
"""What the streams of peers hold together of messages that are not whole and of answers that are not taken; and so much
again those of our own. Four of the longest messages, or a hundred push/pulls of 1,000 nodes."""
MEMORY_PACKETS_HELD_MAX: Final = 4096
"""Packets that a node in memory holds that is stalled, or not started yet; a kernel's buffer has as many small ones."""
STREAM_LINGER_S: Final = 0.5
"""How long a stream that was refused stays open for the peer to read why."""
STREAM_BACKLOG: Final = 128
PORT_TRIES_MAX: Final = 16
"""Attempts to find a port that is free for UDP and TCP alike."""
RESOLVE_TIMEOUT_S: Final = 5.0
MEMBERS_FILE_BYTES_MAX: Final = 64 * KIB
WIRE_WARNING_INTERVAL_S: Final = 60.0
"""Between two warnings that packets of one kind are refused."""
LEAVE_ROUNDS: Final = 3
LEAVE_ROUND_S: Final = 0.1
LEAVE_PACKETS_MAX: Final = 64
"""Members that a leaving node tells itself, in each of its rounds; they tell the others."""
HEAD_INTERVAL_S: Final = 1.0
"""Between two heads of one node in gossip. Followers read the journal itself: heads are for those that missed it."""
NODE_META_BYTES_MAX: Final = 512
"""What a node says of itself in gossip: memberlist's own bound, which every peer enforces."""
PUBLIC_KEY_BYTES: Final = 32
SERF_STATE_BYTES_MAX: Final = 1 * MIB
"""The state of the application in one push/pull, ours or a Serf agent's: some 20,000 heads."""
SERF_NAMES_MAX: Final = PEERS_MAX
"""Names whose last intent, to join or to leave, is remembered. Beyond it the oldest goes: it would be told on once more
if it came again."""
LAMPORT_TIME_MAX: Final = 1 << 62
"""A logical time beyond it is no time but an attempt to make the clocks of all overflow."""
KEYS_ROUND_S: Final = 2.0
"""How long nodes have to answer one question about gossip keys; a change of keys takes two rounds."""
KEYS_REMEMBERED_MAX: Final = 1024
"""Questions about gossip keys whose numbers are remembered, so that one that is repeated is refused."""
KEYS_PER_RING_MAX: Final = 16
"""Gossip keys that one node may hold at once: a rotation needs two, and each costs an attempt at every packet."""
KEYS_ERROR_CHARS_MAX: Final = 256
TICK_RETRY_S: Final = 1.0
"""How long after an error of its own a part of discovery gets its next tick."""

# --- engines ---------------------------------------------------------------------------------------------------------
ENGINE_DEADLINE_MIN_S: Final = 0.05
"""The shortest deadline of a load that an engine derives: below it a busy scheduler alone makes a local hit a miss."""
ENGINE_DEADLINE_MAX_S: Final = 30.0
ENGINE_CONNECT_TIMEOUT_S: Final = 0.5
"""How long a request may wait for the handshake with a local agent that went away before."""
ENGINE_RECONNECT_INTERVAL_MIN_S: Final = 1.0
"""After a lost connection the engine does without the mesh for so long; each failed attempt doubles it."""
ENGINE_RECONNECT_INTERVAL_MAX_S: Final = 30.0

# --- fetching --------------------------------------------------------------------------------------------------------
FETCHES_MAX: Final = 256
"""Fetches that one node has under way at once; a further chain is a miss."""
FETCH_FAILED_HOLDERS_MAX: Final = 2
"""Holders that may fail one fetch before it ends: a stale map must not cost more than that."""
PRICE_SHARE: Final = 0.8
"""The part of the time of computing that a fetch may be expected to take. Measured rates waver by a fifth from read to
read, and computing does not: a fetch that wins by less than that loses in its worse half."""
DEADLINE_OPTIMISM: Final = 2.0
"""How much faster than measured a holder may turn out to be, before chunks count as too late for a deadline: what is
not asked for is surely missed."""
RATE_PATHS_MAX: Final = PEERS_MAX
"""Ways to peers whose rates are kept."""
RATE_NEW_SHARE: Final = 0.3
"""What a new sample counts in the average of a rate."""
RATE_SAMPLE_BYTES_MIN: Final = 1 * MIB
RATE_SAMPLE_S_MIN: Final = 0.002
"""A window of fewer bytes or less time tells more about the process's own turns than about the path."""
RATE_STALE_S: Final = 30.0
"""After so long without a sample a rate is unknown again: a peer that was slow is tried once more."""
RATE_SAMPLE_S_LONG: Final = 0.1
"""A window of so much time tells about the path, however few its bytes."""
PLAN_HOLDERS_MAX: Final = 8
"""Holders that one plan reads from: the best; more would only make shares smaller."""
PLAN_STRETCHES_MAX: Final = 64
"""Places of one chain at which the map is asked who goes on from there."""
PLAN_READS_PER_HOLDER_MAX: Final = 2
"""Reads of one plan that are open at one holder: one that is nearly done, and the next."""
PLAN_RATE_ASSUMED_BYTES_PER_S: Final = 125_000_000
"""Of a holder whose rate is not known, for comparing: 1 Gbit/s, the slowest link that carries a cluster."""
PLAN_FIRST_SHARE_BYTES: Final = 4 * MIB
"""What a holder of unknown rate is asked for first, beside others: enough to tell, and soon done again elsewhere."""
PLAN_SHARE_CHUNKS_MAX: Final = 512
"""The most that a lone holder is asked for by one read. The next read is begun when half of that has landed."""
PLAN_SHARE_S_MIN: Final = 0.002
"""The shortest share, in time: below it reads cost more than the balance that they bring."""
PLAN_PRIOR_S_MIN: Final = 0.01
"""How long a plan must see a holder at work until what it sees weighs as much as the rate that was known before."""
PLAN_LATE_FACTOR: Final = 3
"""A chunk is late when it takes so many times as long as expected, ..."""
PLAN_LATE_S_MIN: Final = 0.02
"""... and so much longer: a process that had no turn for a moment is no straggler."""
PLAN_SLOW_FACTOR: Final = 2
"""A holder that is late is left when the others would do its rest so many times sooner."""
PLAN_HEDGE_BYTES_MAX: Final = 4 * MIB
"""What a hedge asks for a second time (and one chunk at least): the front, not the whole share."""
READ_GRACE_S: Final = 0.05
"""How long after the deadline of a fetch its reads end by themselves: the plan is to end them before."""
FETCH_CLOSE_S: Final = 5.0
"""How long a node that closes waits for its last reads to say that nothing is written any more."""
EXPIRY_SWEEP_S: Final = 1.0
"""How often an agent looks for chunks whose ``ttl_s`` is over, and for leases that nobody renewed."""
PROGRESS_GATHER_S: Final = 0.005
"""The least time between two reports to a client of what has landed: each costs two processes a wake-up, and the
bytes that are still to land their processor."""
SESSION_BACKLOG_BYTES_MAX: Final = 16 * MIB
"""Answers that wait for a client that does not read. Beyond it the connection is closed."""
PREFETCH_DEADLINE_DEFAULT_S: Final = 10.0

# --- reads through NIXL ----------------------------------------------------------------------------------------------
NIXL_OFFER_BYTES_MAX: Final = 64 * KIB
NIXL_METADATA_BYTES_MAX: Final = 32 * KIB
"""A peer's agent in NIXL's own encoding: 300 bytes over TCP, a few KiB with many network cards."""
NIXL_NAME_CHARS_MAX: Final = 64
NIXL_MESSAGE_BYTES_MAX: Final = 1 * MIB
"""One message between an agent and its NIXL process."""
NIXL_RUNS_PER_MESSAGE: Final = 4096
"""Runs that one message names; 27 bytes each at most."""
NIXL_MEETINGS_MAX: Final = 256
"""Peers that one reading process meets: UCX keeps a connection of each. The next process begins with none."""
NIXL_TRANSFER_BYTES_MAX: Final = 4 * MIB
"""What is given to NIXL at once: it cannot be called back, so a stop waits for it."""
NIXL_TRANSFER_RUNS_MAX: Final = 256
NIXL_WINDOW_BYTES: Final = 16 * MIB
"""What is under way from one peer at once."""
NIXL_PROBE_BYTES: Final = 64
"""What is read from a new peer to see whether it can be reached."""
NIXL_CONNECT_S: Final = 2.0
NIXL_STOP_GRACE_S: Final = 1.0
"""How long a stopped move may take to end by itself; then the reading process is ended, and its other moves begin again
in the next one."""
NIXL_MOVE_STARTS_MAX: Final = 2
"""Processes that one move is given to: the second after the death of the first was not its peer's doing."""
NIXL_OPEN_S: Final = 3.0
"""How long an agent's start waits for NIXL's."""
NIXL_START_S: Final = 20.0
NIXL_STEADY_S: Final = 10.0
"""A process that lived so long may be followed by the next one at once."""
NIXL_RESTART_INTERVAL_MIN_S: Final = 0.05
"""Before the next process; it doubles each time that one was not steady."""
NIXL_RESTART_INTERVAL_MAX_S: Final = 30.0
NIXL_POLL_MIN_S: Final = 50e-6
"""Between two looks at transfers under way, when the last one found something. It doubles up to the next bound."""
NIXL_POLL_MAX_S: Final = 1e-3
NIXL_SERVE_POLL_MS: Final = 5
"""UCX wakes NIXL's thread when something comes; this is how often it looks nevertheless, as UCX misses a wake-up."""
