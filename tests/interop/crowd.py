"""Many nodes of ours in one process, each with sockets of its own for gossip: what a host can bear of real ones is few.

Their journals are followed as in an agent, by calls that go from one to the other without a transport between them.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvmesh.discovery import CALL_PREFIX, Discovery, Identity, Journal
from kvmesh.discovery.driver import Gossip
from kvmesh.discovery.network import GossipNetwork, open_network
from kvmesh.discovery.wire.keyring import Keyring
from kvmesh.transport.errors import UnreachableError
from tests.discovery.support import SIZE, SPACE, key
from tests.support.waiting import wait_until_async


class Crowd:
    """Nodes by name. Runs on one loop."""

    def __init__(self, keyring: bytes) -> None:
        self._key = keyring
        self.nodes: dict[str, Discovery] = {}
        self.journals: dict[str, Journal] = {}
        self.networks: dict[str, GossipNetwork] = {}
        self._by_address: dict[str, Discovery] = {}

    async def start(self, name: str, join: Sequence[str]) -> Discovery:
        """One more, which joins these gossip addresses."""
        keyring = Keyring([self._key]) if self._key else None
        network = self.networks[name] = await open_network("127.0.0.1", 0, name=name, keyring=keyring)
        journal = self.journals[name] = Journal(name, 1)
        address = f"127.0.0.1:{len(self.nodes) + 1}"
        node = Discovery(
            Identity(name, "agent", 1, address),
            self._call,
            journal,
            join,
            gossip=Gossip(network=network, keyring=keyring),
        )
        self.nodes[name] = self._by_address[address] = node
        await node.start()
        return node

    async def stop(self, name: str) -> None:
        """One of them leaves."""
        await self.nodes.pop(name).stop()

    async def stop_all(self) -> None:
        """All of them leave, one after the other."""
        for name in list(self.nodes):
            await self.stop(name)

    def admit(self, name: str, number: int) -> None:
        """A node holds one more chunk."""
        self.journals[name].admit(key(number), SPACE, SIZE, "ram")

    def states(self, name: str) -> dict[str, str]:
        """The state of everyone, as one node sees it."""
        return {member.name: member.state.value for member in self.nodes[name].members()}

    async def wait_states(self, wanted: dict[str, str], timeout_s: float) -> None:
        """Wait until all of them see these states."""
        for name in self.nodes:
            await wait_until_async(lambda name=name: self.states(name) == wanted, timeout_s, f"{name} sees {wanted}")

    async def _call(self, address: str, request: bytes, *, timeout_s: float) -> bytes:
        node = self._by_address.get(address)
        if node is None or node not in self.nodes.values():
            raise UnreachableError(f"nobody is at {address}")
        return await node.handle(request.removeprefix(CALL_PREFIX))
