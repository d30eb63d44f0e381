"""Reads through NIXL: offers and bounds without the package; with it, NIXL in its own processes, over UCX's TCP."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from importlib import util
from pathlib import Path

import msgspec
import numpy as np
import pytest

from kvmesh.arena import Arena
from kvmesh.transport import nixl
from kvmesh.transport.errors import ProtocolError, UnreachableError
from kvmesh.transport.interface import Region
from kvmesh.transport.limits import (
    MIB,
    NIXL_METADATA_BYTES_MAX,
    NIXL_MOVE_STARTS_MAX,
    NIXL_OFFER_BYTES_MAX,
    NIXL_STOP_GRACE_S,
)
from kvmesh.transport.nixl_offer import OFFER_VERSION, Offer, parse_offer
from kvmesh.transport.nixl_process import environment
from kvmesh.transport.onesided import Piece
from tests.support.waiting import wait_until, wait_until_async

ADDRESS = "holder:1"
SIZE = 32 * MIB
LONG_S = 20.0
GOOD = Offer(OFFER_VERSION, "1.5.1", "0a1b", b"nixlSerDes|Agent\4\0\0\0\0\0\0\0000a1b|Conns", 1 << 40, SIZE)

needs_nixl = pytest.mark.skipif(nixl.nixl_missing_reason() is not None, reason=str(nixl.nixl_missing_reason()))


def slow(test: Callable[[], None]) -> Callable[[], None]:
    """A test with NIXL itself. Each of its processes takes half a second to start."""
    marked: Callable[[], None] = pytest.mark.slow(pytest.mark.cluster(needs_nixl(test)))
    return marked


class Side:
    """A node: an arena, and its end when NIXL runs."""

    def __init__(self, size_bytes: int = SIZE) -> None:
        self.arena = Arena.create(size_bytes)
        self.region = Region(self.arena.fileno(), self.arena.address, size_bytes)
        self.bytes = self.arena.view(0, size_bytes)
        self.end = nixl.NixlEnd(self.region, "127.0.0.1")

    async def close(self) -> None:
        await self.end.close()
        self.bytes.release()
        self.arena.close()

    def pieces(self, *runs: tuple[int, int, int]) -> list[Piece]:
        """(there, here, length) each."""
        return [Piece(there, self.bytes[here : here + length]) for there, here, length in runs]


@contextlib.asynccontextmanager
async def side(*, pattern: int | None = None, served: bool = False) -> AsyncIterator[Side]:
    """A node, with `pattern` as the seed of its bytes."""
    made = Side()
    if pattern is not None:
        made.bytes[:] = np.random.default_rng(pattern).bytes(SIZE)
    try:
        if served:
            assert await made.end.open()
            await wait_until_async(made.end.offer, LONG_S, "it serves")
        yield made
    finally:
        await made.close()


async def reads(mover: nixl.NixlMover, pieces: list[Piece]) -> None:
    """Read all of them."""
    move = mover.move(pieces)
    async with asyncio.timeout(LONG_S):
        await move.wait()
        await move.stop()


def freeze(pid: int) -> None:
    """Stop a process; when this returns, none of its threads runs."""
    os.kill(pid, signal.SIGSTOP)

    def stopped() -> bool:
        return all(state(thread) == "T" for thread in Path(f"/proc/{pid}/task").iterdir())

    wait_until(stopped, LONG_S, "all threads are stopped")


def state(task: Path) -> str:
    """The state of a process or thread: one letter."""
    return (task / "stat").read_text().rpartition(") ")[2][0]


# --- without NIXL ----------------------------------------------------------------------------------------------------
def test_an_offer_comes_back_as_it_was() -> None:
    assert parse_offer(msgspec.msgpack.encode(GOOD)) == GOOD


def changed(**fields: object) -> bytes:
    return msgspec.msgpack.encode(msgspec.structs.replace(GOOD, **fields))


HOSTILE = {
    "nothing": b"",
    "no msgpack": b"\xc1",
    "cut": changed()[:-3],
    "more after it": changed() + b"\0",
    "another type": msgspec.msgpack.encode({"version": 1}),
    "too few fields": msgspec.msgpack.encode([1, "1.5.1"]),
    "too many fields": msgspec.msgpack.encode([*msgspec.structs.astuple(GOOD), 1]),
    "no name": changed(agent=""),
    "a name that is none": changed(agent="../../x"),
    "a long name": changed(agent="a" * 65),
    "the metadata of another": changed(agent="0a1c"),
    "text that is none": changed(package="xyz").replace(b"xyz", b"\xff\xfe\xfd"),
    "a long package": changed(package="1" * 65),
    "no metadata": changed(metadata=b""),
    "much metadata": changed(metadata=bytes(NIXL_METADATA_BYTES_MAX + 1)),
    "metadata as text": changed(metadata="metadata"),
    "an empty arena": changed(size_bytes=0),
    "an arena before the beginning": changed(base=-1),
    "an arena beyond the end": changed(base=(1 << 64) - SIZE + 1),
    "a pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x04nixl\x94.",
    "far too long": bytes(NIXL_OFFER_BYTES_MAX + 1),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_offer_is_refused_before_nixl_sees_it(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse_offer(data)


def test_an_offer_of_another_version_or_package_is_not_taken() -> None:
    async def main() -> None:
        async with side() as here:
            for fields in ({"version": OFFER_VERSION + 1}, {"package": "0.0.1"}):
                with pytest.raises(UnreachableError, match="NIXL"):
                    await here.end.mover(changed(**fields), ADDRESS, b"r")
            assert here.end.reading.pid is None, "no process was started for it"

    asyncio.run(main())


def test_without_the_package_there_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    assert "pip install --no-deps nixl-cu12" in str(nixl.nixl_missing_reason())

    async def main() -> None:
        assert await nixl.open_nixl(Region(-1, 0, 1), "127.0.0.1") is None

    asyncio.run(main())


def test_pieces_outside_of_either_arena_are_refused_at_once() -> None:
    async def main() -> None:
        async with side() as here:
            mover = nixl.NixlMover(here.end, nixl.Peer(1, GOOD), ADDRESS)
            for pieces in (
                [Piece(0, memoryview(bytearray(10)))],
                here.pieces((0, 0, 10), (SIZE - 9, 0, 10)),
                here.pieces((-1, 0, 10)),
                here.pieces((1 << 63, 0, 10)),
            ):
                with pytest.raises(UnreachableError):
                    mover.move(pieces)
            assert here.end.moves_of(mover) == []
            await mover.move([Piece(0, here.bytes[:0])]).wait()
            move = mover.move(here.pieces((SIZE - 10, SIZE - 10, 10)))
            await move.stop()  # no process has it
            with pytest.raises(UnreachableError, match="stopped"):
                await move.wait()
            await mover.close()

    asyncio.run(main())


def test_the_environment_keeps_ucx_on_loopback_and_from_handling_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UCX_NET_DEVICES", raising=False)
    assert environment("127.0.0.1")["UCX_NET_DEVICES"] == "lo"
    assert environment("::1")["UCX_TLS"] == environment("localhost")["UCX_TLS"] == "tcp"
    assert "UCX_NET_DEVICES" not in environment("192.0.2.1")
    assert environment("192.0.2.1")["UCX_ERROR_SIGNALS"] == ""
    monkeypatch.setenv("UCX_TLS", "rc")
    assert environment("127.0.0.1")["UCX_TLS"] == "rc", "the operator's word wins"


# --- with NIXL -------------------------------------------------------------------------------------------------------
@slow
def test_bytes_arrive_as_they_are() -> None:
    async def main() -> None:
        async with side(pattern=1, served=True) as there, side() as here:
            mover = await here.end.mover(there.end.offer(), ADDRESS, b"r")
            rng, runs, at = random.Random(2), [], 1
            for length in (1, 2, 63, 4096, 65_537, MIB, 9 * MIB + 3, *(rng.randrange(1, 20_000) for _ in range(600))):
                runs.append((rng.randrange(SIZE - length), at, length))
                at += length + rng.randrange(3)
            await asyncio.gather(*(reads(mover, here.pieces(*runs[part::3])) for part in range(3)))
            expected = bytearray(SIZE)
            for from_, to, length in runs:
                expected[to : to + length] = there.bytes[from_ : from_ + length]
            assert here.bytes == expected
            await mover.close()
            with pytest.raises(UnreachableError, match="closed"):
                mover.move(here.pieces((0, 0, 1)))

    asyncio.run(main())


@slow
def test_a_move_that_is_stopped_leaves_the_buffer_alone() -> None:
    async def main() -> None:
        async with side(pattern=1, served=True) as there, side() as here:
            mover = await here.end.mover(there.end.offer(), ADDRESS, b"r")
            process = here.end.reading.pid
            move = mover.move(here.pieces((0, 0, SIZE)))
            waiting = asyncio.create_task(move.wait())
            await wait_until_async(lambda: here.bytes[0] or here.bytes[1], LONG_S, "the first bytes are there")
            await move.stop()
            with pytest.raises(UnreachableError, match="stopped"):
                await waiting
            here.bytes[:] = bytes(SIZE)
            await reads(mover, here.pieces((0, 0, 100)))  # what UCX still had would come before this
            assert here.bytes[:100] == there.bytes[:100]
            assert here.bytes[100:] == bytes(SIZE - 100)
            assert here.end.reading.pid == process
            await mover.close()

    asyncio.run(main())


@slow
def test_a_move_from_a_peer_that_hangs_ends_with_the_reading_process() -> None:
    async def main() -> None:
        async with side(pattern=1, served=True) as hangs, side() as here:
            mover = await here.end.mover(hangs.end.offer(), ADDRESS, b"r")
            process, serving = here.end.reading.pid, hangs.end.serving.pid
            assert serving is not None
            freeze(serving)
            move = mover.move(here.pieces((0, 0, SIZE)))
            begun = asyncio.get_running_loop().time()
            await move.stop()
            assert asyncio.get_running_loop().time() - begun >= NIXL_STOP_GRACE_S
            assert not Path(f"/proc/{process}").exists(), "what could write is gone"  # noqa: ASYNC240  # no disk
            before = bytes(here.bytes)
            os.kill(serving, signal.SIGCONT)
            with pytest.raises(UnreachableError, match="hangs"):
                mover.move(here.pieces((0, 0, 1)))
            await mover.close()
            again = await here.end.mover(await offered(hangs), ADDRESS, b"r")
            assert here.bytes == before
            await again.close()

    asyncio.run(main())


async def offered(node: Side) -> bytes:
    """The offer of a serving process that answers, now. UCX may end the one whose reader went away."""
    async with side() as other, asyncio.timeout(LONG_S):
        while True:
            with contextlib.suppress(UnreachableError, ProtocolError):
                await (await other.end.mover(node.end.offer(), ADDRESS, b"r")).close()
                return node.end.offer()
            await asyncio.sleep(0.05)


@slow
def test_when_the_reading_process_ends_its_moves_begin_again_in_the_next() -> None:
    async def main() -> None:
        async with side(pattern=1, served=True) as there, side() as here:
            mover = await here.end.mover(there.end.offer(), ADDRESS, b"r")
            process = here.end.reading.pid
            assert process is not None
            freeze(process)  # it has the move then, and does nothing of it
            move = mover.move(here.pieces((0, 0, SIZE)))
            os.kill(process, signal.SIGKILL)
            async with asyncio.timeout(LONG_S):
                await move.wait()
            assert move.starts == 2
            assert here.bytes == there.bytes
            await mover.close()

    asyncio.run(main())


@slow
def test_a_move_does_not_begin_again_for_ever() -> None:
    async def main() -> None:
        async with side(pattern=1, served=True) as there, side() as here:
            mover = await here.end.mover(there.end.offer(), ADDRESS, b"r")
            serving = there.end.serving.pid
            assert serving is not None
            freeze(serving)
            move = mover.move(here.pieces((0, 0, SIZE)))
            for start in range(1, NIXL_MOVE_STARTS_MAX + 1):
                await wait_until_async(lambda: move.starts == start, LONG_S, "the process has it")  # noqa: B023
                here.end.reading.kill()
            async with asyncio.timeout(LONG_S):
                with pytest.raises(UnreachableError, match="again"):
                    await move.wait()
                await move.stop()
            await mover.close()

    asyncio.run(main())


@slow
def test_the_reading_process_is_changed_when_it_met_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl, "NIXL_MEETINGS_MAX", 2)

    async def main() -> None:
        async with (
            side(pattern=1, served=True) as a,
            side(served=True) as b,
            side(pattern=3, served=True) as c,
            side() as here,
        ):
            for node in (a, a, b, a):
                mover = await here.end.mover(node.end.offer(), ADDRESS, b"r")
            process = here.end.reading.pid
            move = mover.move(here.pieces((0, 0, MIB)))
            with pytest.raises(UnreachableError, match="2 peers"):
                await here.end.mover(c.end.offer(), ADDRESS, b"r")
            await move.stop()
            other = await here.end.mover(c.end.offer(), ADDRESS, b"r")
            assert here.end.reading.pid != process
            await reads(other, here.pieces((0, 0, MIB)))
            await reads(mover, here.pieces((MIB, MIB, MIB)))
            assert here.bytes[:MIB] == c.bytes[:MIB]
            assert here.bytes[MIB : 2 * MIB] == a.bytes[MIB : 2 * MIB]

    asyncio.run(main())


@slow
def test_a_peer_that_dies_in_mid_transfer_and_comes_back() -> None:
    async def main() -> None:
        async with side(pattern=1, served=True) as there, side() as here:
            offer = there.end.offer()
            mover = await here.end.mover(offer, ADDRESS, b"r")
            dying = there.end.serving.pid
            assert dying is not None
            freeze(dying)
            move = mover.move(here.pieces((0, 0, SIZE)))
            await asyncio.sleep(0)
            os.kill(dying, signal.SIGKILL)
            async with asyncio.timeout(LONG_S):
                with pytest.raises(UnreachableError, match=ADDRESS):
                    await move.wait()
                await move.stop()
            here.bytes[:] = bytes(SIZE)
            await wait_until_async(lambda: there.end.offer() not in (b"", offer), LONG_S, "it serves again")
            with pytest.raises(UnreachableError):
                await here.end.mover(offer, ADDRESS, b"r")  # the offer of the process that is gone
            again = await here.end.mover(there.end.offer(), ADDRESS, b"r")
            await reads(again, here.pieces((7, 9, MIB)))
            assert here.bytes[9 : 9 + MIB] == there.bytes[7 : 7 + MIB]
            assert here.bytes[9 + MIB :] == bytes(SIZE - MIB - 9)
            await mover.close()
            await again.close()

    asyncio.run(main())


@slow
def test_metadata_that_is_made_up_costs_its_peer_alone() -> None:
    async def main() -> None:
        async with side(pattern=1, served=True) as there, side() as here:
            good = parse_offer(there.end.offer())
            mover = await here.end.mover(there.end.offer(), ADDRESS, b"r")
            rng = random.Random(3)
            for number in range(6):
                agent = rng.randbytes(16).hex()
                bad = bytearray(good.metadata.replace(good.agent.encode(), agent.encode()))
                for _ in range(1 + number):
                    bad[rng.randrange(62, len(bad))] ^= 1 << rng.randrange(8)
                metadata = bytes(bad[: len(bad) - 8 * (number % 3)])
                made_up = msgspec.structs.replace(good, agent=agent, metadata=metadata)
                with contextlib.suppress(UnreachableError):
                    await (await here.end.mover(msgspec.msgpack.encode(made_up), "bad:1", b"r")).close()
            same = msgspec.structs.replace(good, base=good.base + 1)
            with pytest.raises(UnreachableError, match="the same agent"):
                await here.end.mover(msgspec.msgpack.encode(same), "bad:1", b"r")
            await reads(mover, here.pieces((0, 0, MIB)))
            assert here.bytes[:MIB] == there.bytes[:MIB]
            await mover.close()

    asyncio.run(main())


@slow
def test_many_reads_leave_no_descriptors_and_no_threads() -> None:
    async def main() -> None:
        async with side(pattern=1, served=True) as there, side() as here:
            counts = []
            for _ in range(50):
                mover = await here.end.mover(there.end.offer(), ADDRESS, b"r")
                await reads(mover, here.pieces((0, 0, MIB)))
                await mover.close()
                gc.collect()
                pids = (os.getpid(), here.end.reading.pid, there.end.serving.pid)
                counts.append(held(pids))
            assert all(late <= early + 1 for late, early in zip(counts[-1], counts[10], strict=True)), counts[10:]

    asyncio.run(main())


def held(pids: Sequence[int | None]) -> list[int]:
    """How many descriptors and threads each has."""
    return [len(list(Path(f"/proc/{pid}/{what}").iterdir())) for pid in pids for what in ("fd", "task")]


@slow
def test_a_process_that_serves_nobody_uses_no_time() -> None:
    async def main() -> None:
        async with side(served=True) as there:
            before = ticks(there.end.serving.pid)
            await asyncio.sleep(0.5)  # what is measured
            assert (ticks(there.end.serving.pid) - before) / os.sysconf("SC_CLK_TCK") < 0.1

    asyncio.run(main())


def ticks(pid: int | None) -> int:
    """The processor time of a process, of its threads as well."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return int(fields[11]) + int(fields[12])


@contextlib.contextmanager
def node_process() -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A process of its own with an end that serves and reads from itself; and the ids of NIXL's two."""
    program = (
        "import asyncio\n"
        "from tests.transport.test_nixl import ADDRESS, Side\n"
        "async def main():\n"
        "    side = Side()\n"
        "    assert await side.end.open()\n"
        "    while not side.end.offer(): await asyncio.sleep(0.01)\n"
        "    await side.end.mover(side.end.offer(), ADDRESS, b'r')\n"
        "    print(side.end.serving.pid, side.end.reading.pid, flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, [int(word) for word in process.stdout.readline().split()]
        finally:
            process.kill()


@slow
def test_an_agent_that_is_killed_leaves_no_process() -> None:
    with node_process() as (process, children):
        assert len(children) == 2
        assert all(Path(f"/proc/{pid}").exists() for pid in children)
        process.kill()
        process.wait()
        wait_until(lambda: not any(alive(pid) for pid in children), LONG_S, "NIXL's processes are gone")


def alive(pid: int) -> bool:
    """Whether it runs; one that nobody reaps does not."""
    try:
        return state(Path(f"/proc/{pid}")) != "Z"
    except FileNotFoundError:
        return False
