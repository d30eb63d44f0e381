"""The newest head that each node told, as gossip brings it: by rumour, or in a push/pull.

A head names its node by 16 bytes, so it counts only for a node whose name is known. It may come before the word that
the node has started again; it is kept, and counts once the node's epoch is the head's. But one of the start that is
known outranks those of any other: after a restart with the clock set back, the old start's is the larger one. Values
only; no clock.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvmesh.transport.errors import ProtocolError

from .head import HEAD_BYTES, Head, node_id


class HeadTable:
    """Name → (head, when it was told)."""

    def __init__(self) -> None:
        self._names: dict[bytes, tuple[str, int | None]] = {}
        """By id: the name, and the epoch of the start that is known."""
        self._heads: dict[str, tuple[Head, float]] = {}

    def know(self, name: str, epoch: int | None) -> None:
        """There is a node of that name, and this is its start."""
        self._names[node_id(name)] = name, epoch

    def forget(self, name: str) -> None:
        """The node is gone: what it told last means nothing any more."""
        self._names.pop(node_id(name), None)
        self._heads.pop(name, None)

    def take(self, head: Head, now: float) -> str | None:
        """A head was told. The name of its node, when that is known and the head is news."""
        name, epoch = self._names.get(head.node_id, ("", None))
        if not name:
            return None
        known = self._heads.get(name)
        if known is not None and _rank(head, epoch) <= _rank(known[0], epoch):
            return None
        self._heads[name] = head, now
        return name

    def of(self, name: str, epoch: int) -> tuple[Head, float | None]:
        """The newest head of a node's start, and when it was told. Of one that told none yet: the head of a journal
        without entries, so that whoever follows it asks, and learns the rest."""
        told = self._heads.get(name)
        if told is not None and told[0].epoch == epoch:
            return told
        return Head(node_id(name), epoch, 0, 0, 0), None

    def all(self) -> Iterable[Head]:
        """Those that were told."""
        return [head for head, _ in self._heads.values()]


def _rank(head: Head, epoch: int | None) -> tuple[bool, int, int]:
    return head.epoch == epoch, head.epoch, head.seq


def pack_heads(heads: Iterable[Head]) -> bytes:
    """Heads one after the other."""
    return b"".join(head.to_bytes() for head in heads)


def unpack_heads(data: bytes) -> list[Head]:
    """The heads in `data`. Raises `ProtocolError` when it ends within one."""
    if len(data) % HEAD_BYTES:
        raise ProtocolError(f"heads have {HEAD_BYTES} bytes each: {len(data)} bytes end within one")
    return [Head.from_bytes(data[start : start + HEAD_BYTES]) for start in range(0, len(data), HEAD_BYTES)]
