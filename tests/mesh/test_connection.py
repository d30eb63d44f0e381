"""What hangs on a client's connection: leases behind views, places in the pool, extents that are being written."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch

import kvmesh
from kvmesh import agent, aio, client, connection, protocol, sessions
from kvmesh.hit import Leases
from kvmesh.transport.checksum import checksum
from kvmesh.transport.limits import CLIENT_CONNECTIONS_MAX
from tests.support.agents import LocalAgents
from tests.support.waiting import wait_until

SPACE = kvmesh.Namespace(model="m", revision="r", dtype="float32", layers=2, kv_heads=2, head_dim=16, chunk_tokens=16)


def chain_of(count: int, first: int = 0) -> list[bytes]:
    return SPACE.chain(list(range(first, first + count * SPACE.chunk_tokens)))


def tensor(value: float) -> torch.Tensor:
    return torch.full(next(iter(SPACE.tensors.values())).shape, float(value))


def fill_up(agents: LocalAgents, name: str) -> None:
    """Put so much that all goes that may be evicted."""
    with kvmesh.connect(agents.directory / f"{name}.sock") as mesh:
        for first in range(10_000, 11_000, 50):
            mesh.put(SPACE, {chain_of(1, first)[0]: tensor(9)})


def stalled_peer(agents: LocalAgents, chain: list[bytes]) -> agent.Agent:
    """A small agent b, whose peer a holds `chain` and gives nothing."""
    agents.start("a")
    b = agents.start("b", memory=8 * SPACE.chunk_bytes, join=("a",))
    agents.wait_alive(b, "a")
    agents.mesh("a").put(SPACE, {key: tensor(7) for key in chain})
    agents.wait(b, lambda: b.node.discovery.map.has("a", chain[-1]))
    agents.do(lambda: agents.network.stall("a"))
    return b


def test_a_get_that_is_left_early_takes_no_lease_from_under_an_older_view(agents: LocalAgents) -> None:
    near, far = chain_of(1), chain_of(2, first=500)
    stalled_peer(agents, far)
    mesh = agents.mesh("b")
    mesh.put(SPACE, {near[0]: tensor(1)})
    with mesh.get(SPACE, near) as hit:
        view = hit[0]
    with mesh.get(SPACE, far, deadline_s=30):
        pass  # it has the connection that the view's lease hangs on
    fill_up(agents, "b")
    assert torch.equal(view, tensor(1))
    del view
    agents.do(lambda: agents.network.resume("a"))
    wait_until(lambda: mesh.stats()["store"]["leases"] == 0, 10, "all leases are back")


def test_an_agent_that_does_not_answer_in_time_takes_no_lease_from_under_a_view(
    agents: LocalAgents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "CLIENT_REPLY_GRACE_S", 0.0)
    a = agents.start("a", memory=8 * SPACE.chunk_bytes)
    chain = chain_of(1)
    with kvmesh.connect(agents.directory / "a.sock", timeout_s=0.05) as mesh:
        mesh.put(SPACE, {chain[0]: tensor(1)})
        with mesh.get(SPACE, chain) as hit:
            view = hit[0]
        stopped, go_on = threading.Event(), threading.Event()

        def stop() -> None:
            stopped.set()
            go_on.wait(10)

        agents._loop.call_soon_threadsafe(stop)
        stopped.wait(10)
        with pytest.raises(kvmesh.AgentUnavailableError, match="did not answer"):
            mesh.nodes()
        go_on.set()
        fill_up(agents, "a")
        assert torch.equal(view, tensor(1))
    del view
    agents.wait_for(lambda: a.store.stats().leases == 0)


def test_a_forked_child_returns_no_lease_of_its_parent(agents: LocalAgents) -> None:
    agents.start("a")
    mesh = agents.mesh("a")
    chain = chain_of(1)
    mesh.put(SPACE, {chain[0]: tensor(1)})
    hit = mesh.get(SPACE, chain)
    assert hit.count == 1
    child = os.fork()
    if child == 0:
        hit.close()
        os._exit(0)
    os.waitpid(child, 0)
    wait_until(lambda: mesh.stats()["store"]["leases"] == 1, 10, "the lease of the view is left")
    hit.close()
    wait_until(lambda: mesh.stats()["store"]["leases"] == 0, 10, "all leases are back")


def test_more_gets_than_places_are_refused_in_bounded_time(
    agents: LocalAgents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "CLIENT_REPLY_GRACE_S", 0.0)
    stalled_peer(agents, chain_of(1))
    with kvmesh.connect(agents.directory / "b.sock", timeout_s=0.05) as mesh:
        hits = [mesh.get(SPACE, chain_of(1), deadline_s=30) for _ in range(CLIENT_CONNECTIONS_MAX)]
        with pytest.raises(kvmesh.CallerError, match="16 gets or calls"):
            mesh.get(SPACE, chain_of(1))
        hits.pop().close()
        assert mesh.get(SPACE, [], deadline_s=0).count == 0
        for hit in hits:
            hit.close()
    agents.do(lambda: agents.network.resume("a"))


def test_a_get_that_cannot_be_sent_gives_its_place_back_once(
    agents: LocalAgents, monkeypatch: pytest.MonkeyPatch
) -> None:
    agents.start("a")
    mesh = agents.mesh("a")
    mesh.put(SPACE, {chain_of(1)[0]: tensor(1)})
    free = mesh._places.qsize()
    monkeypatch.setattr(protocol, "Get", Mock(side_effect=ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        mesh.get(SPACE, chain_of(1))
    gc.collect()
    assert mesh._places.qsize() == free


@pytest.mark.parametrize("deadline_s", [-1, 1e9, float("inf"), float("nan"), "soon", None])
def test_a_deadline_that_is_no_bounded_time_is_refused(agents: LocalAgents, deadline_s: Any) -> None:
    agents.start("a")
    mesh = agents.mesh("a")
    for call in (mesh.get, mesh.prefetch):
        with pytest.raises(kvmesh.CallerError, match=r"deadline_s is .*: give seconds, from 0 to 3600"):
            call(SPACE, [], deadline_s=deadline_s)


def test_a_hit_that_is_left_early_does_not_wait_although_an_older_one_of_its_views_lives(agents: LocalAgents) -> None:
    near = chain_of(3)
    stalled_peer(agents, near[1:])
    mesh, other = agents.mesh("b"), agents.mesh("b")
    mesh.put(SPACE, {near[0]: tensor(1)})
    with mesh.get(SPACE, near, deadline_s=3000) as hit:
        view = next(iter(hit))  # the rest would come within 3000 s
    agents.do(lambda: agents.network.resume("a"))
    for first in range(1000, 1200, 20):
        other.put(SPACE, {chain_of(1, first)[0]: tensor(9)})
    assert isinstance(view, torch.Tensor)
    assert view.eq(1).all()
    del view
    wait_until(lambda: other.stats()["store"]["leases"] == 0, 10, "every lease is back")


def test_a_mesh_that_is_closed_under_a_put_or_a_get_is_an_ordinary_error(agents: LocalAgents) -> None:
    a = agents.start("a")
    mesh = agents.mesh("a")
    chain = chain_of(2)

    def fill(view: torch.Tensor) -> None:
        mesh.close()
        view.fill_(1)

    assert mesh.put(SPACE, {chain[0]: fill}).stored == 1
    mesh = agents.mesh("a")
    opening = mesh._open

    def close_then_open(*args: Any) -> None:
        mesh.close()
        opening(*args)

    mesh._open = close_then_open  # type: ignore[method-assign]
    with mesh.get(SPACE, chain[:1]) as hit:
        assert torch.equal(hit[0], tensor(1))
    agents.wait_for(lambda: (s := a.store.stats()).leases == 0 and s.reserved_chunks == 0)


def test_a_chain_that_names_a_chunk_twice_is_refused(agents: LocalAgents) -> None:
    agents.start("a")
    mesh = agents.mesh("a")
    chain = chain_of(1)
    mesh.put(SPACE, {chain[0]: tensor(1)})
    with pytest.raises(kvmesh.CallerError, match="twice"), mesh.get(SPACE, chain * 2) as hit:
        hit.count  # noqa: B018
    wait_until(lambda: mesh.stats()["store"]["leases"] == 0, 10, "all leases are back")


def test_leases_of_what_is_here_are_bounded_as_well(agents: LocalAgents, monkeypatch: pytest.MonkeyPatch) -> None:
    a = agents.start("a")
    mesh = agents.mesh("a")
    chain = chain_of(3)
    mesh.put(SPACE, {key: tensor(1) for key in chain})
    monkeypatch.setattr(sessions, "OWNED_CHUNKS_MAX", 4)
    first = mesh.get(SPACE, chain)
    assert first.count == 3
    with pytest.raises(kvmesh.CallerError, match="leases open"), mesh.get(SPACE, chain) as hit:
        hit.count  # noqa: B018
    first.close()
    with mesh.get(SPACE, chain) as hit:
        assert hit.count == 3
    agents.wait_for(lambda: a.store.stats().leases == 0)


def test_a_prefetch_that_names_a_chunk_twice_is_refused_and_costs_nobody_a_fetch(agents: LocalAgents) -> None:
    chain = chain_of(1)
    b = stalled_peer(agents, chain)
    agents.do(lambda: agents.network.resume("a"))
    mesh = agents.mesh("b")
    with pytest.raises(kvmesh.CallerError, match="twice"):
        mesh.prefetch(SPACE, chain * 2)
    with mesh.get(SPACE, chain, deadline_s=5) as hit:
        assert hit.count == 1
    agents.wait_for(lambda: b.fetcher.stats()["flights"] == 0 and b.store.stats().reserved_chunks == 0)


def test_a_view_that_goes_while_its_hit_is_released_gives_its_lease_back_once() -> None:
    to_agent = Mock()
    leases = Leases(to_agent, 1, float("inf"))
    ends = {offset: leases.look_at(offset) for offset in (0, 4096)}

    class Collected(list[int]):
        """As if the garbage collector ran while the offsets are looked through."""

        def __iter__(self) -> Iterator[int]:
            for offset in super().__iter__():
                yield offset
                if offset in ends:
                    ends.pop(offset)()

    leases.end(Collected([0, 4096, 8192]))
    returned = [offset for call in to_agent.note.call_args_list for offset in call.args[0].offsets]
    assert sorted(returned) == [0, 4096, 8192]
    to_agent.let_go.assert_called_once()


def test_a_view_whose_end_is_said_twice_does_not_end_another_one() -> None:
    """As when making it fails half-way: whoever was making it says so, and the garbage collector, later."""
    to_agent = Mock()
    leases = Leases(to_agent, 1, float("inf"))
    half_made, other = leases.look_at(4096), leases.look_at(4096)
    leases.end([4096])
    half_made()
    half_made()
    to_agent.note.assert_not_called()
    other()
    assert to_agent.note.call_args.args[0].offsets == [4096]
    to_agent.let_go.assert_called_once()


def test_an_agent_that_starts_again_with_the_same_epoch_has_another_arena(
    agents: LocalAgents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "epoch_now", lambda: 7)
    agents.start("a")
    mesh = agents.mesh("a")
    chain = chain_of(1)
    mesh.put(SPACE, {chain[0]: tensor(1)})
    agents.stop("a")
    again = agents.start("a")
    mesh.put(SPACE, {chain[0]: tensor(2)})
    held = agents.do(lambda: again.store.get(chain[0]))
    assert held is not None
    assert checksum(again.arena.view(held.offset, SPACE.chunk_bytes)) == held.checksum


def test_after_half_a_frame_nothing_more_is_sent(agents: LocalAgents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CLIENT_REPLY_GRACE_S", 0.0)
    a = agents.start("a")
    mesh = agents.mesh("a")
    mesh.put(SPACE, {chain_of(1)[0]: tensor(1)})
    with mesh.get(SPACE, chain_of(1)) as hit:
        view = hit[0]
    stopped, go_on = threading.Event(), threading.Event()

    def stop() -> None:
        stopped.set()
        go_on.wait(10)

    agents._loop.call_soon_threadsafe(stop)
    stopped.wait(10)
    connected = hit._connection

    def send_much() -> None:
        for _ in range(100):
            connected.send(protocol.Abandon(0, b"k" * 32 * 1000))

    with pytest.raises(kvmesh.AgentUnavailableError, match="does not read"):
        send_much()
    go_on.set()
    agents.wait_for(lambda: a.listener.clients == 1)
    assert agents.do(a.store.stats).leases == 1, "the view keeps its lease"
    del view
    agents.wait_for(lambda: a.store.stats().leases == 0)


def test_an_answer_that_is_too_large_is_an_ordinary_error(agents: LocalAgents, monkeypatch: pytest.MonkeyPatch) -> None:
    agents.start("a")
    mesh = agents.mesh("a")
    monkeypatch.setattr(protocol, "AGENT_FRAME_BYTES_MAX", 300)
    with pytest.raises(kvmesh.CallerError, match="too large"):
        mesh.stats()
    assert mesh.prefetch(SPACE, []) == 0


def test_an_agent_without_a_free_file_descriptor_accepts_again_when_it_has_one(
    agents: LocalAgents, caplog: pytest.LogCaptureFixture
) -> None:
    agents.start("a")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX) as client_end:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (1, limits[1]))
            client_end.connect(str(agents.directory / "a.sock"))
            agents.wait_for(lambda: "could not be accepted" in caplog.text)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert agents.mesh("a").node == "a"


def test_closing_the_asyncio_client_does_not_hold_up_the_loop(agents: LocalAgents) -> None:
    b = stalled_peer(agents, chain_of(1))

    async def use() -> None:
        mesh = await aio.connect(agents.directory / "b.sock")
        getting = asyncio.create_task(mesh.get(SPACE, chain_of(1), deadline_s=10).__aenter__())
        await asyncio.to_thread(agents.wait_for, lambda: b.store.stats().reserved_chunks == 1)
        getting.cancel()
        # Only this loop's next turn lets the holder go on, so closing must not wait on the loop itself.
        asyncio.get_running_loop().call_later(0.02, agents._loop.call_soon_threadsafe, agents.network.resume, "a")
        began = time.monotonic()
        await mesh.close()
        assert time.monotonic() - began < 5
        with pytest.raises(asyncio.CancelledError):
            await getting

    asyncio.run(use())
