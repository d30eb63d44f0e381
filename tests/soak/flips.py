"""Row 7 of the fault table at length: a million flipped bits, and not one of them in what a client gets.

Half of them flip on the wire between two transports, in both directions and at rates from one in 2 KiB to one in 4 MiB,
over chunks of 256 bytes to 3 MiB: in bodies, in headers, in handshakes. There are no agents around them, whose plans
would soon avoid such a holder. The other half flip in the arena of an agent, by the thousand in the chunks of a chain,
and another agent reads them. A finding is a wrong byte in what was said to have landed or came to a client, a changed
chunk that stays in its holder's store once it was read, or a right one that does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path

import kvmesh
from kvmesh.transport import open_zmq
from kvmesh.transport.interface import Outcome
from tests.support import content
from tests.support.content import KIB, MIB, chain_of, space_of
from tests.support.plane import Node, Plane
from tests.support.proxy import Proxy
from tests.transport.ends import Chunks, collect, echo, wants
from tests.transport.ends import key as key_of

SIZES = ((256, 512), (4 * KIB, 256), (64 * KIB, 64), (MIB, 12), (3 * MIB, 4))
"""(Bytes of a chunk, chunks of a chain)."""
ARENA_FLIPS = 2_000
"""In the chunks of one chain."""
WIRE_DEADLINE_S = 0.5
OUT_WITHIN_S = 20.0
TOLD_EVERY_S = 10.0


def flip_bits(folder: Path, flips: int, seed: int, *, tell: Callable[[str], None]) -> tuple[Counter[str], list[str]]:
    """(What was counted, what was found)."""
    rng = random.Random(f"{seed} flips")
    counts, findings = Counter[str](), list[str]()
    asyncio.run(_on_the_wire(flips // 2, rng, counts, findings, tell))
    with Plane(folder) as plane:
        holder = plane.start("a", memory="64MiB")
        reader = plane.start("c", memory="64MiB")
        plane.wait_alive()
        _in_the_arena(plane, holder, reader, flips - flips // 2, rng, counts, findings, tell)
    return counts, findings


async def _on_the_wire(
    flips: int, rng: random.Random, counts: Counter[str], findings: list[str], tell: Callable[[str], None]
) -> None:
    source, groups, number = Chunks(), [], 0
    for size, count in SIZES:
        groups.append((size, range(number, number + count)))
        for one in groups[-1][1]:
            source.add(one, content.bytes_of(hashlib.sha256(key_of(one)).digest(), size).tobytes())
        number += count
    async with AsyncExitStack() as stack:
        proxy = stack.enter_context(Proxy(seed=rng.randrange(1 << 32)))
        holder = await open_zmq("127.0.0.1", 0, source, echo)
        stack.push_async_callback(holder.close)
        reader = await open_zmq("127.0.0.1", 0, None, echo)
        stack.push_async_callback(reader.close)
        proxy.target = holder.address
        down, up = proxy.down, proxy.up
        told = time.monotonic()
        while down.flips + up.flips < flips:
            size, numbers = groups[0] if rng.random() < 0.4 else rng.choice(groups)  # the most headers
            down.flip_every_bytes = 2 ** rng.uniform(11, 22)
            up.flip_every_bytes = None if rng.random() < 0.7 else 2 ** rng.uniform(9, 16)
            asked = wants(numbers, size)
            landings = await collect(reader.read(proxy.address, asked, deadline_s=WIRE_DEADLINE_S))
            counts.update(wire_reads=1)
            for landing in landings.values():
                counts.update({f"wire_{landing.outcome.value}": 1})
                want = asked[landing.index]
                if landing.outcome is Outcome.LANDED and want.into != source.held[want.key]:
                    others = [place for place, one in enumerate(numbers) if source.held[key_of(one)] == want.into]
                    findings.append(f"on the wire: chunk {landing.index} landed with the bytes of {others or 'none'}")
            if time.monotonic() - told > TOLD_EVERY_S:
                told = time.monotonic()
                tell(f"{down.flips + up.flips:>9} bits flipped on the wire, {len(findings)} findings")
        counts["wire_flips"] = down.flips + up.flips
        counts.update({f"wire_{name}": count for name, count in asdict(reader.stats()).items() if name == "malformed"})


def _in_the_arena(
    plane: Plane, holder: Node, reader: Node, flips: int, rng: random.Random, counts: Counter[str],
    findings: list[str], tell: Callable[[str], None],
) -> None:  # fmt: skip
    left, turn, told = flips, 1, time.monotonic()
    while left > 0:
        size, count = rng.choice(SIZES[1:])
        space, turn = space_of(size), turn + 1
        chain = holder.put(space, chain_of(space, turn, count))
        plane.wait_known(chain, {"a": count}, to="c")
        before = holder.stats("store")["corrupt"]
        changed = {key for key in chain if rng.random() < 0.5}
        done = 0
        for key in changed:
            done += flip_in_arena(holder, space, key, rng, min(left, ARENA_FLIPS) // len(changed) or 1)
        for key in chain:
            got, fault = checked_get(reader, space, [key])
            counts.update(arena_gets=1, arena_chunks=got)
            if fault or (got and key in changed):
                findings.append(f"in the arena: {fault or 'a changed chunk was delivered'}")
        _read_until_out(holder, reader, space, changed, before + len(changed))
        if holder.stats("store")["corrupt"] - before > len(changed):
            findings.append("in the arena: right chunks were taken out")
        for node in (holder, reader):
            node.mesh.delete(chain)
        left -= done
        counts.update(arena_flips=done, arena_corrupt=len(changed))
        if time.monotonic() - told > TOLD_EVERY_S:
            told = time.monotonic()
            tell(f"{flips - left:>9} bits flipped in the arena, {len(findings)} findings")


def _read_until_out(holder: Node, reader: Node, space: kvmesh.Namespace, changed: set[bytes], total: int) -> None:
    """A holder looks at so many suspected chunks of one reader a second: a reader that asks again is heard again."""
    ends = time.monotonic() + OUT_WITHIN_S
    while (out := holder.stats("store")["corrupt"]) < total:
        assert time.monotonic() < ends, (
            f"{total - out} of {len(changed)} changed chunks are still held: {holder.stats()}"
        )
        for key in changed:
            checked_get(reader, space, [key])
        time.sleep(0.2)


def checked_get(node: Node, space: kvmesh.Namespace, chain: Sequence[bytes]) -> tuple[int, str]:
    """(How many chunks came, what is wrong with them)."""
    with node.mesh.get(space, chain, deadline_s=4.0) as hit:
        faults = []
        for key, view in zip(chain, hit, strict=False):
            faults.append(content.wrong(key, view))
            del view
        return hit.count, "; ".join(filter(None, faults))


def flip_in_arena(node: Node, space: kvmesh.Namespace, key: bytes, rng: random.Random, count: int = 1) -> int:
    """Flip `count` bits of a chunk where it lies, each at another place, as bad memory does it. Returns how many."""
    with open(_arena_of(node.process.pid), "r+b", buffering=0) as arena:
        start = _find(arena.fileno(), content.bytes_of(key, 64).tobytes())
        places = rng.sample(range(start, start + space.chunk_bytes), min(count, space.chunk_bytes))
        for place in places:
            old = os.pread(arena.fileno(), 1, place)[0]
            os.pwrite(arena.fileno(), bytes([old ^ 1 << rng.randrange(8)]), place)
    return len(places)


def _arena_of(pid: int) -> str:
    """The arena's file, by the process that made it."""
    folder = f"/proc/{pid}/fd"
    links: dict[str, str] = {}
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            links[name] = os.readlink(f"{folder}/{name}")
    return next(f"{folder}/{name}" for name, link in links.items() if link.startswith("/memfd:kvmesh-arena"))


def _find(arena: int, first: bytes) -> int:
    """Where in the arena a chunk with these first bytes lies: extents begin at pages."""
    places = range(0, os.fstat(arena).st_size, 4096)
    return next(place for place in places if os.pread(arena, len(first), place) == first)
