"""`GossipNetwork`: performs the actions of `swim.events` over a carrier, and reports its events.

Packets are sealed and opened here, streams in `streams`; the name service is asked through the carrier; the last known
members are kept in a file, written in a thread. Nothing that a peer sends, and no error of the protocol above, ends
the receiving: it is counted. Runs on the loop of `start`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kvmesh.discovery.actions import Action
from kvmesh.discovery.swim.events import (
    AnswerPull,
    Exchange,
    PacketCame,
    RefusePull,
    Remember,
    Resolve,
    Resolved,
    SendPacket,
    SendUser,
    StreamPing,
    SwimEvent,
)
from kvmesh.discovery.wire.errors import WireError
from kvmesh.discovery.wire.keyring import Keyring
from kvmesh.discovery.wire.messages import Endpoint, text_of
from kvmesh.discovery.wire.packets import PacketCodec, overhead_bytes
from kvmesh.discovery.wire.streams import StreamCodec
from kvmesh.transport.limits import RESOLVE_TIMEOUT_S, SEED_ADDRESSES_MAX

from .addresses import parse_port, shown
from .carrier import Carrier
from .counters import Account, NetworkCounters
from .members import remove_members_file, write_members_file
from .streams import Streams

_NetworkAction = SendPacket | AnswerPull | RefusePull | Exchange | StreamPing | SendUser | Resolve | Remember

_log = logging.getLogger("kvmesh.discovery")


class GossipNetwork:
    """See above. Made by `open_network`, and by `MemoryGossip.open`."""

    def __init__(
        self,
        carrier: Carrier,
        *,
        name: str,
        endpoint: Endpoint,
        keyring: Keyring | None = None,
        label: str = "",
        members_file: Path | None = None,
    ) -> None:
        self.endpoint = endpoint
        """What others are told."""
        self.packet_overhead_bytes = overhead_bytes(keyring is not None, label)
        """What sealing costs of a packet, at most."""
        self._carrier = carrier
        self._account = Account()
        self._packet_codec = PacketCodec(keyring, label)
        self._stream_codec = StreamCodec(keyring, label)
        self._streams = Streams(carrier.connect, self._stream_codec, self._account, name, self._tell)
        self._on_event: Callable[[SwimEvent], None] | None = None
        self._closed = False
        self._resolving: set[asyncio.Task[None]] = set()
        self._members_file = members_file
        self._to_write: Remember | None = None
        self._writing: asyncio.Task[None] | None = None
        self._file_failed = False

    @property
    def address(self) -> str:
        """``HOST:PORT`` that others are told, an IPv6 address in brackets."""
        return text_of(self.endpoint)

    @property
    def counters(self) -> NetworkCounters:
        """Since the start. A copy."""
        left_out = self._packet_codec.left_out + self._stream_codec.left_out
        return replace(
            self._account.counters,
            refused={str(cause): count for cause, count in self._account.refusals.items()},
            left_out={str(cause): count for cause, count in left_out.items()},
        )

    def start(self, on_event: Callable[[SwimEvent], None]) -> None:
        """Receive, and report to `on_event`, from now on."""
        assert self._on_event is None
        assert not self._closed
        self._on_event = on_event
        self._carrier.start(self._on_packet, self._streams.serve, self._account.not_received)

    def perform(self, action: Action) -> bool:
        """Do what the protocol wants; nothing, once it is closed. False when the action is not one of gossip."""
        if not isinstance(action, _NetworkAction):
            return False
        if not self._closed:
            self._do(action)
        return True

    def _do(self, action: _NetworkAction) -> None:
        match action:
            case SendPacket():
                self._send(action)
            case AnswerPull() | RefusePull():
                self._streams.answer(action)
            case Exchange() | StreamPing() | SendUser():
                self._streams.open(action)
            case Resolve(seed):
                task = asyncio.get_running_loop().create_task(self._resolve(seed))
                self._resolving.add(task)
                task.add_done_callback(self._resolving.discard)
            case Remember():
                self._remember(action)

    async def close(self) -> None:
        """Stop, and end all streams. A second call does nothing."""
        self._closed, self._on_event = True, None
        self._carrier.close()
        for task in self._resolving:
            task.cancel()
        await self._streams.close()
        await asyncio.gather(*self._resolving, return_exceptions=True)
        await self._written()

    def _tell(self, event: SwimEvent) -> bool:
        """Report it. False when nobody takes it: the network is closed, or the protocol failed over it."""
        if self._on_event is None:
            return False
        try:
            self._on_event(event)
        except Exception as error:  # noqa: BLE001 - a reader that ends would make this node deaf
            self._account.unexpected(error, f"gossip's protocol, at {type(event).__name__},")
            return False
        return True

    # --- packets --------------------------------------------------------------------------------------------------

    def _send(self, packet: SendPacket) -> None:
        """One packet, if it can be sent. If not, it looks to the protocol like one that got lost."""
        try:
            data = self._packet_codec.seal(packet.messages, crc=packet.crc)
            self._carrier.send(packet.target, data)
        except OSError as error:
            self._account.not_sent(error)
        except Exception as error:  # noqa: BLE001 - the other actions of the same event are still to be performed
            self._account.unexpected(error, "sending a packet")
        else:
            self._account.counters.packets_sent += 1
            self._account.counters.packet_bytes_sent += len(data)

    def _on_packet(self, data: bytes, source: Endpoint) -> None:
        self._account.counters.packets_received += 1
        self._account.counters.packet_bytes_received += len(data)
        try:
            messages = tuple(self._packet_codec.open(data))
        except WireError as error:
            self._account.refuse(error, f"a packet from {shown(source)}")
        except Exception as error:  # noqa: BLE001 - as in `_tell`
            self._account.unexpected(error, "opening a packet")
        else:
            self._tell(PacketCame(source, messages))

    # --- names ----------------------------------------------------------------------------------------------------

    async def _resolve(self, seed: str) -> None:
        """All addresses of a name: behind one there may be many nodes, and some of them may be gone."""
        found: tuple[Endpoint, ...] = ()
        error = ""
        host, _, port = seed.rpartition(":")
        try:
            async with asyncio.timeout(RESOLVE_TIMEOUT_S):
                endpoints = await self._carrier.look_up(host.removeprefix("[").removesuffix("]"), parse_port(port))
            found = tuple(dict.fromkeys(endpoints))[:SEED_ADDRESSES_MAX]
            error = "" if found else "it has no address that this node's --bind can reach"
        except TimeoutError:
            error = f"the name service did not answer within {RESOLVE_TIMEOUT_S:g} s"
        except OSError as failure:
            error = failure.strerror or str(failure)
        except ValueError as failure:
            error = f"it is not HOST:PORT: {failure}"
        except Exception as failure:  # noqa: BLE001 - every lookup ends in an event
            self._account.unexpected(failure, "looking a name up")
            error = "an unexpected error"
        self._tell(Resolved(seed, found, error))

    # --- the last known members -----------------------------------------------------------------------------------

    def _remember(self, members: Remember) -> None:
        if self._members_file is not None:
            self._to_write = members
            if self._writing is None:
                self._writing = asyncio.get_running_loop().create_task(self._write(self._members_file))

    async def _write(self, path: Path) -> None:
        """Write until what was written is the newest."""
        while (members := self._to_write) is not None:
            self._to_write = None
            try:
                await asyncio.to_thread(write_members_file, path, members.endpoints)
            except OSError as error:
                self._account.counters.file_errors += 1
                if not self._file_failed:
                    _log.warning("the known members cannot be kept in %s: %s; check --state-dir", path, error)
                self._file_failed = True
            except Exception as error:  # noqa: BLE001 - the next change is written all the same
                self._account.unexpected(error, "keeping the members")
            else:
                self._file_failed = False
        self._writing = None

    async def _written(self) -> None:
        """What is being written is written; no task is left behind."""
        if self._writing is not None:
            await self._writing

    async def forget_members(self) -> None:
        """This node leaves on purpose: it shall not come back by itself. Nothing is remembered from now on."""
        path, self._members_file, self._to_write = self._members_file, None, None
        await self._written()
        if path is not None:
            remove_members_file(path)
