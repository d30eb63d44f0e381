"""The map: which node holds which chunk, as far as this process has followed.

It is soft state. A node's table is written by the follower of that node alone, and dropped whole when the node fails,
leaves or starts again; an answer is a hint, checked by whoever reads the chunk. There is one table a node and no index
over all nodes: dropping a node is one step, and a lookup visits a node's table only as far as its run goes.

The process's own journal is in the map too (`attach`): the truth itself, not a copy.
No clock, no I/O; one thread: the loop of discovery. What is counted is kept while tables change, never by a scan.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from random import Random

from kvmesh.transport.limits import MAP_ENTRIES_MAX

from .holdings import Holdings, Record, Totals
from .journal import DescriptionTable, Journal
from .packing import TIERS


@dataclass(frozen=True, slots=True)
class Run:
    """The chunks from the front of a chain that one node holds."""

    node: str
    run_chunks: int
    tier: str
    """The slowest tier that the run needs: each of its chunks is on this tier or a faster one."""
    size_bytes: int


@dataclass(frozen=True, slots=True)
class NodeSummary:
    """What the map has about one node."""

    name: str
    complete: bool
    """False while it is read for the first time, and when the map had no room for all of it."""
    epoch: int
    seq: int
    fingerprint: int
    """Over all copies, as the node's own head has it: equal on all that are up to date."""
    totals: Totals


@dataclass(frozen=True, slots=True)
class NamespaceSummary:
    """What the map has about one namespace, over all nodes: a chunk that two nodes hold counts twice."""

    namespace_id: bytes
    description: bytes
    """As the node said it (JSON); empty when none did."""
    nodes: int
    totals: Totals


@dataclass(frozen=True, slots=True)
class MapSummary:
    """The totals of a map."""

    complete: bool
    entries: int
    """Chunks, counted once for each node that holds them; the own journal included."""
    nodes: list[NodeSummary]
    namespaces: list[NamespaceSummary]


class NodeTable:
    """What is known of one node. Its follower writes it; everyone else reads."""

    def __init__(self, room: Callable[[], int], count: Callable[[int], None]) -> None:
        self._room = room
        self._count = count
        self.holdings = Holdings()
        self.descriptions = DescriptionTable()
        self.epoch = 0
        self.seq = 0
        self.synced = False
        """Whether it has equalled the node's journal at some moment of this epoch."""
        self.refused = 0
        """Chunks that found no room since the table last was complete."""

    def clear(self, epoch: int) -> None:
        """Forget everything: the node has started again, as `epoch`."""
        self._count(-len(self.holdings))
        self.holdings = Holdings()
        self.descriptions = DescriptionTable()
        self.epoch, self.seq, self.synced, self.refused = epoch, 0, False, 0

    @property
    def room(self) -> int:
        """Chunks that may still be added to the map."""
        return self._room()

    def admit(self, key: bytes, namespace_id: bytes, size_bytes: int, tier: int) -> None:
        """A copy came to the tier (a bit)."""
        if key in self.holdings:
            self.holdings.admit(key, namespace_id, size_bytes, tier)
        elif self._room() > 0:
            self.holdings.admit(key, namespace_id, size_bytes, tier)
            self._count(1)
        else:
            self.refused += 1

    def evict(self, key: bytes, tier: int) -> None:
        """The copy on the tier (a bit) went."""
        before = len(self.holdings)
        self.holdings.evict(key, tier)
        self._count(len(self.holdings) - before)

    def discard(self, key: bytes) -> bool:
        """Take the chunk out on all tiers: it was asked for and not there. False when the map did not have it."""
        gone = self.holdings.discard(key)
        self._count(-int(gone))
        return gone

    def replace(self, buckets: bytes, after: bytes, upto: bytes, pairs: Sequence[tuple[bytes, Record]]) -> None:
        """In these buckets, past the key `after`, up to `upto` (empty: to the end), the node holds this and no more."""
        holdings = self.holdings
        before = len(holdings)
        for number in buckets:
            if (after and number < after[0]) or (upto and number > upto[0]):
                continue
            for key in [key for key in holdings.bucket(number) if key > after and (not upto or key <= upto)]:
                holdings.discard(key)
        self._count(len(holdings) - before)
        room = max(self._room(), 0)
        holdings.load(islice(pairs, room))
        added = min(room, len(pairs))
        self.refused += len(pairs) - added
        self._count(added)


@dataclass(slots=True)
class _NamespaceSum:
    description: bytes = b""
    nodes: set[str] = field(default_factory=set)
    totals: Totals = field(default_factory=Totals)


class ClusterMap:
    """The tables of all nodes, and what is asked of them."""

    def __init__(self, *, random: Random, entries_max: int = MAP_ENTRIES_MAX) -> None:
        self._random = random
        self._entries_max = entries_max
        self._entries = 0
        self._tables: dict[str, NodeTable] = {}
        self._own: Journal | None = None
        self._refused_of_dropped = 0

    def attach(self, journal: Journal) -> None:
        """Show the own journal as one of the nodes. It does not count towards the bound."""
        self._own = journal

    def open(self, node: str) -> NodeTable:
        """An empty table for `node`, in place of any earlier one."""
        self.drop(node)
        table = self._tables[node] = NodeTable(self._room, self._add)
        return table

    def drop(self, node: str) -> None:
        """Forget `node`."""
        table = self._tables.pop(node, None)
        if table is not None:
            self._refused_of_dropped += table.refused
            self._add(-len(table.holdings))

    def forget(self, node: str, key: bytes) -> bool:
        """`node` said that it does not hold `key`. If that is wrong after all, the next fingerprint brings it back."""
        table = self._tables.get(node)
        return table is not None and table.discard(key)

    def table(self, node: str) -> NodeTable | None:
        """The table of a followed node."""
        return self._tables.get(node)

    @property
    def entries(self) -> int:
        """Chunks in the tables of followed nodes: what the bound is about."""
        return self._entries

    @property
    def entries_refused(self) -> int:
        """Chunks that found no room."""
        return self._refused_of_dropped + sum(table.refused for table in self._tables.values())

    @property
    def complete(self) -> bool:
        """Whether every followed node is in the map with all it holds."""
        return all(table.synced and not table.refused for table in self._tables.values())

    def has(self, node: str, key: bytes) -> bool:
        """Whether `node` holds `key`."""
        holdings = self._holdings().get(node)
        return holdings is not None and key in holdings

    def holders(self, key: bytes) -> dict[str, Record]:
        """Every node that holds `key`, with what it holds."""
        found = {node: holdings.get(key) for node, holdings in self._holdings().items()}
        return {node: record for node, record in found.items() if record is not None}

    def runs(self, keys: Sequence[bytes], start: int = 0, *, exclude: Collection[str] = ()) -> list[Run]:
        """For every node not in `exclude` that holds ``keys[start]``: its run from there. In no order."""
        found = []
        for node, holdings in self._holdings().items():
            if node in exclude:
                continue
            count, slowest, size_bytes = 0, 0, 0
            for key in islice(keys, start, None):
                record = holdings.get(key)
                if record is None:
                    break
                count += 1
                size_bytes += record.size_bytes
                slowest = max(slowest, record.tiers & -record.tiers)
            if count:
                found.append(Run(node, count, TIERS[slowest.bit_length() - 1], size_bytes))
        return found

    def locate(self, chain: Sequence[bytes]) -> list[Run]:
        """The holders of the chain's front: the longest run first, then the faster tier; equals as `shuffle` puts
        them."""
        found = self.runs(chain)
        self._random.shuffle(found)
        found.sort(key=lambda run: (-run.run_chunks, TIERS.index(run.tier)))
        return found

    def summary(self) -> MapSummary:
        """Totals by node and by namespace. The cost grows with nodes and namespaces, not with chunks."""
        nodes = []
        spaces: dict[bytes, _NamespaceSum] = {}
        entries = 0
        if self._own is not None:
            head = self._own.head
            totals = _sum_up(self._own.name, self._own.holdings, self._own.descriptions, spaces)
            nodes.append(NodeSummary(self._own.name, True, head.epoch, head.seq, head.fingerprint, totals))
            entries += totals.chunks
        for name, table in self._tables.items():
            totals = _sum_up(name, table.holdings, table.descriptions, spaces)
            complete = table.synced and not table.refused
            fingerprint = table.holdings.fingerprint
            nodes.append(NodeSummary(name, complete, table.epoch, table.seq, fingerprint, totals))
            entries += totals.chunks
        nodes.sort(key=lambda node: node.name)
        namespaces = [
            NamespaceSummary(namespace_id, space.description, len(space.nodes), space.totals)
            for namespace_id, space in sorted(spaces.items())
        ]
        return MapSummary(self.complete, entries, nodes, namespaces)

    def _holdings(self) -> Mapping[str, Holdings]:
        found = {node: table.holdings for node, table in self._tables.items()}
        if self._own is not None:
            found[self._own.name] = self._own.holdings
        return found

    def _room(self) -> int:
        return self._entries_max - self._entries

    def _add(self, chunks: int) -> None:
        self._entries += chunks


def _sum_up(
    node: str, holdings: Holdings, descriptions: DescriptionTable, spaces: dict[bytes, _NamespaceSum]
) -> Totals:
    """The node's totals; its share is added to `spaces`."""
    totals = Totals()
    for record, times in holdings.tally().items():
        totals.add(record, times)
        space = spaces.setdefault(record.namespace_id, _NamespaceSum())
        space.description = space.description or descriptions.get(record.namespace_id) or b""
        space.nodes.add(node)
        space.totals.add(record, times)
    return totals
