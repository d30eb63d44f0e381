"""Runs discovery on asyncio: over the calls of a transport, and over a gossip network when there is one. Timers, tasks
and bytes, and not one decision.

Owns: the tasks of calls under way, one timer, and the answers that peers still wait for. Everything runs on the loop
that `start` was called on; the journal must be changed on that loop too. What a peer sends or raises is counted, never
passed on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from random import Random, SystemRandom
from typing import TYPE_CHECKING, Any, Protocol

from kvmesh.transport.errors import PeerError, ProtocolError
from kvmesh.transport.limits import (
    JOIN_CALLS_UNTIL_WARNED,
    LEAVE_ROUND_S,
    LEAVE_ROUNDS,
    MAP_ENTRIES_MAX,
    PING_TIMEOUT_S,
)

from .actions import (
    Action,
    Answered,
    Call,
    Event,
    JournalChanged,
    KeysAsked,
    Lost,
    Notify,
    Refuse,
    Reply,
    Requested,
    Started,
    Stopping,
    Ticked,
    Withdrawn,
)
from .core import Core
from .gossip import GossipMembership
from .head import Head
from .journal import Journal
from .keying import KeysAnswered, KeysResult, Operation
from .map import ClusterMap
from .membership import Conflict, Member, MemberState
from .messages import Identity, decode_answer, decode_request, encode
from .reports import DiscoveryStats, GossipStats, tell
from .static import StaticMembership
from .swim.events import Departed, Remember, SwimEvent
from .swim.profile import KVMESH_LAN, Profile
from .wire.keyring import Keyring
from .wire.messages import Endpoint

if TYPE_CHECKING:
    from .network import GossipNetwork

CALL_PREFIX = b"D"
"""The first byte of a call that belongs to discovery."""
_TIMER_S_MIN = 0.001

_log = logging.getLogger("kvmesh.discovery")


class TransportCall(Protocol):
    """`kvmesh.transport.Transport.call`."""

    def __call__(self, address: str, request: bytes, *, timeout_s: float) -> Awaitable[bytes]: ...


@dataclass(frozen=True, slots=True)
class Gossip:
    """What a membership by gossip needs."""

    network: GossipNetwork
    profile: Profile = KVMESH_LAN
    known: Sequence[Endpoint] = ()
    """Members of the last run."""
    public_key: bytes = b""
    keyring: Keyring | None = None
    """The one that the network seals with."""
    save_keys: Callable[[], None] = lambda: None


class Discovery:
    """Who is there and who holds what, kept up to date in the background.

    `transport_call` is the `call` of this process's transport; its handler must pass calls that begin with
    `CALL_PREFIX`, without that byte, to `handle`. `journal` is None for a process that holds nothing. `peers` are
    addresses; one of a process that runs is enough. With `gossip` they are gossip addresses, or names of several;
    without it the membership is static, and they are addresses of the transport.
    """

    def __init__(
        self,
        identity: Identity,
        transport_call: TransportCall,
        journal: Journal | None,
        peers: Sequence[str],
        *,
        gossip: Gossip | None = None,
        clock: Callable[[], float] = time.monotonic,
        random: Random | None = None,
        map_entries_max: int = MAP_ENTRIES_MAX,
    ) -> None:
        assert journal is None or (journal.name, journal.epoch) == (identity.name, identity.epoch)
        random = random or SystemRandom()
        self.identity = identity
        self.map = ClusterMap(random=random, entries_max=map_entries_max)
        self._journal = journal
        self._call = transport_call
        self._clock = clock
        self._network = None if gossip is None else gossip.network
        self._membership: StaticMembership | GossipMembership
        if gossip is None:
            self._membership = StaticMembership(identity, peers, head=lambda: self.local_head, random=random)
        else:
            self._membership = GossipMembership(
                identity,
                gossip.network.endpoint,
                head=lambda: self.local_head,
                random=random,
                profile=gossip.profile,
                seeds=peers,
                known=gossip.known,
                packet_overhead_bytes=gossip.network.packet_overhead_bytes,
                public_key=gossip.public_key,
                keyring=gossip.keyring,
                save_keys=gossip.save_keys,
            )
        self._core = Core(identity.name, self._membership, self.map, journal, random)
        self._unanswered = dict.fromkeys(peers, 0)  # addresses that were given and have not answered yet
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")
        self._replies: dict[int, asyncio.Future[bytes]] = {}
        self._next_token = 0
        self._watchers: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self._running = self._leaving = self._change_due = False
        self._departed = asyncio.Event()
        self._keys_asked: dict[int, asyncio.Future[KeysResult]] = {}
        self._calls_failed = self._protocol_errors = self._unexpected_errors = 0

    # --- life ----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to look for peers. Returns at once; `wait_for` waits for what is to be seen."""
        assert not self._running
        self._running = True
        if self._journal is not None:
            self._journal.on_change.append(self._journal_changed)
        if self._network is not None:
            self._network.start(self._dispatch)
        self._dispatch(Started())

    async def stop(self) -> None:
        """Tell the members that this process leaves, and end every task. A second call does nothing."""
        if not self._running or self._leaving:
            return
        self._leaving = True
        if self._journal is not None:
            self._journal.on_change.remove(self._journal_changed)
        earlier = set(self._tasks)
        self._attempt(Stopping())
        if self._network is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._departed.wait(), 2 * LEAVE_ROUNDS * LEAVE_ROUND_S)
            await self._network.forget_members()
            await self._network.close()
        self._running = False
        if self._timer is not None:
            self._timer.cancel()
        for task in earlier:
            task.cancel()
        leaving = self._tasks - earlier
        if leaving:
            await asyncio.wait(leaving, timeout=PING_TIMEOUT_S)
        for task in leaving:
            task.cancel()
        await asyncio.gather(*earlier, *leaving, return_exceptions=True)
        for _, watcher in self._watchers:
            watcher.cancel()
        for asked in self._keys_asked.values():
            asked.cancel()

    async def handle(self, request: bytes) -> bytes:
        """The answer to a peer's call, without its prefix. Raises `ProtocolError`; may wait (a long poll)."""
        if not self._running:
            raise ProtocolError("this node is not running")
        try:
            message = decode_request(request)
        except ProtocolError:
            self._protocol_errors += 1
            raise
        self._next_token += 1
        token = self._next_token
        reply: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._replies[token] = reply
        try:
            self._dispatch(Requested(token, message))
            return await reply
        finally:
            del self._replies[token]
            if reply.cancelled():
                self._attempt(Withdrawn(token))

    # --- what there is to see ------------------------------------------------------------------------------------

    @property
    def local_head(self) -> Head | None:
        """The head of the own journal."""
        return None if self._journal is None else self._journal.head

    def members(self) -> list[Member]:
        """Everyone, this process first, failed and left ones included."""
        own = self.identity
        return [
            Member(
                own.name, own.role, MemberState.ALIVE, own.address, own.epoch, own.protocol_version,
                self._clock(), 0.0, self.local_head, own.meta, **self._own_gossip(),
            ),
            *self._membership.members(),
        ]  # fmt: skip

    def _own_gossip(self) -> dict[str, Any]:
        """What only a member by gossip has."""
        if self._network is None or not isinstance(self._membership, GossipMembership):
            return {}
        return {
            "gossip_address": self._network.address,
            "incarnation": self._membership.swim.own.incarnation,
            "public_key": self._membership.public_key,
        }

    def member(self, name: str) -> Member | None:
        """Another process, by name."""
        return self._membership.member(name)

    def rtt_s(self, name: str) -> float | None:
        """The smoothed round trip to a member; None before it was measured."""
        member = self._membership.member(name)
        return None if member is None else member.rtt_s

    def conflicts(self) -> list[Conflict]:
        """Names that two processes use at the same time, with both addresses."""
        return self._membership.conflicts()

    def stats(self) -> DiscoveryStats:
        """A copy of the counters."""
        publisher = self._core.publisher
        return DiscoveryStats(
            pings=replace(self._membership.counters) if isinstance(self._membership, StaticMembership) else None,
            gossip=self._gossip_stats(),
            following=replace(self._core.follower_counters),
            followers=self._core.followers,
            map_entries=self.map.entries,
            map_entries_refused=self.map.entries_refused,
            snapshots_served=publisher.snapshots_served if publisher else 0,
            snapshots_refused=publisher.snapshots_refused if publisher else 0,
            calls_failed=self._calls_failed,
            protocol_errors=self._protocol_errors,
            unexpected_errors=self._unexpected_errors,
        )

    def _gossip_stats(self) -> GossipStats | None:
        if self._network is None or not isinstance(self._membership, GossipMembership):
            return None
        swim = self._membership.swim
        return GossipStats(
            protocol=replace(swim.counters),
            members=replace(self._membership.counters),
            network=replace(self._network.counters),
            keys=replace(self._membership.keys.counters),
            rumours=swim.rumours,
            health=swim.health,
        )

    async def keys(self, operation: Operation, key: bytes = b"") -> KeysResult:
        """List the gossip keys of all nodes, or change them on all. Ends after some seconds at the latest."""
        if not isinstance(self._membership, GossipMembership):
            return KeysResult(operation, "", (), "this node has no gossip keys: its membership is static")
        if not self._running or self._leaving:
            return KeysResult(operation, "", (), "this node is not running: ask another one")
        self._next_token += 1
        token = self._next_token
        self._keys_asked[token] = asyncio.get_running_loop().create_future()
        try:
            self._dispatch(KeysAsked(token, operation, key))
            return await self._keys_asked[token]
        finally:
            del self._keys_asked[token]

    async def wait_for(self, seen: Callable[[], bool], *, timeout_s: float) -> bool:
        """Wait until `seen()` holds; it is asked after each event. False when it does not within `timeout_s`. What
        `seen` raises is raised here."""
        if seen():
            return True
        watcher = (seen, asyncio.get_running_loop().create_future())
        self._watchers.append(watcher)
        try:
            async with asyncio.timeout(timeout_s):
                await watcher[1]
        except TimeoutError:
            return seen()
        finally:
            self._watchers = [other for other in self._watchers if other is not watcher]
        return True

    # --- events and actions --------------------------------------------------------------------------------------

    def _dispatch(self, event: Event | SwimEvent) -> None:
        if not self._running:
            return
        try:
            for action in self._core.handle(event, self._clock()):
                self._perform(action)
        finally:
            self._arm()
        for seen, watcher in self._watchers:
            if watcher.done():
                continue
            try:
                if seen():
                    watcher.set_result(None)
            except Exception as error:  # noqa: BLE001 - it is for whoever waits, not for whoever brought the event
                watcher.set_exception(error)

    def _attempt(self, event: Event) -> None:
        """Dispatch an event of this process's own. An error of the protocol is nothing that a timer, the journal or a
        call could do anything about: it is counted, and discovery goes on."""
        try:
            self._dispatch(event)
        except Exception:  # noqa: BLE001 - see above
            self._unexpected_errors += 1
            _log.exception("discovery failed unexpectedly at %s; it goes on", type(event).__name__)

    def _perform(self, action: Action) -> None:
        match action:
            case Call():
                task = asyncio.get_running_loop().create_task(self._ask(action))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            case Reply(token, message):
                reply = self._replies.get(token)
                if reply is not None and not reply.done():
                    reply.set_result(encode(message))
            case Refuse(token, reason):
                self._protocol_errors += 1
                reply = self._replies.get(token)
                if reply is not None and not reply.done():
                    reply.set_exception(ProtocolError(reason))
            case Notify(KeysAnswered(token, result)):
                asked = self._keys_asked.get(token)
                if asked is not None and not asked.done():
                    asked.set_result(result)
            case Notify(event):
                tell(event)
            case Departed():
                self._departed.set()
            case Remember() if self._leaving:
                pass  # who left on purpose does not come back by itself
            case _:
                performed = self._network is not None and self._network.perform(action)
                assert performed, f"nobody performs {action}"

    async def _ask(self, call: Call) -> None:
        """Make one call, and report how it ended."""
        event: Event = Lost(call.tag)
        try:
            request = CALL_PREFIX + encode(call.message)
            answer = await self._call(call.address, request, timeout_s=call.timeout_s)
            event = Answered(call.tag, decode_answer(answer))
            self._unanswered.pop(call.address, None)
        except ProtocolError as error:
            self._protocol_errors += 1
            _log.debug("%s refused or sent what cannot be read: %r", call.address, error)
            self._warn_of_silence(call.address, error)
        except PeerError as error:
            self._calls_failed += 1
            self._warn_of_silence(call.address, error)
        except Exception:  # noqa: BLE001 - any error of a transport is a lost call; discovery must outlive it
            self._unexpected_errors += 1
            _log.exception("a call to %s failed unexpectedly", call.address)
        self._attempt(event)

    def _warn_of_silence(self, address: str, why: PeerError) -> None:
        """An address that was given by hand and never answers is most likely wrong: say so, once."""
        if address in self._unanswered:
            self._unanswered[address] += 1
            if self._unanswered[address] == JOIN_CALLS_UNTIL_WARNED:
                _log.warning("no node answers at %s, which is to be joined: %s; trying on", address, why)

    def _journal_changed(self) -> None:
        """Chunks land many at a time: all changes of one turn of the loop are one event."""
        if not self._change_due:
            self._change_due = True
            asyncio.get_running_loop().call_soon(self._tell_change)

    def _tell_change(self) -> None:
        self._change_due = False
        if self._running and not self._leaving:
            self._attempt(JournalChanged())

    def _arm(self) -> None:
        """Set the timer to when the core wants it."""
        at = self._core.wake_at()
        if at == self._timer_at or not self._running:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_at = at
        if at < float("inf"):
            delay_s = max(at - self._clock(), _TIMER_S_MIN)
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer, self._timer_at = None, float("inf")
        self._attempt(Ticked())
