"""The transformers engine with real agents: a prompt computed on one node is read on another, and an agent may die."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kvmesh
from kvmesh.engines.transformers import Generation, MeshModel
from tests.mesh.engine_support import CHUNK, llama, prompt
from tests.support.cluster import Cluster
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.model, pytest.mark.cluster, pytest.mark.slow]  # real agent processes take a second to start
NEW = 8
DEADLINE_S = 10.0  # generous: what is tested is what arrives, not how fast


def engine_at(socket: Path) -> MeshModel:
    return MeshModel(llama(), socket, revision="test", chunk_tokens=CHUNK, deadline_s=DEADLINE_S)


def plain(tokens: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = llama().generate(tokens, max_new_tokens=NEW, do_sample=False)
    return output


def longest_run(mesh: kvmesh.Mesh, chain: list[bytes]) -> int:
    return max((holder["run_chunks"] for holder in mesh.locate(chain)["holders"]), default=0)


def test_a_prompt_computed_on_a_is_fetched_on_b_and_then_local(tmp_path: Path) -> None:
    tokens = prompt(6 * CHUNK + 3)
    with Cluster(tmp_path) as cluster:
        a = cluster.agent("a")
        b = cluster.agent("b", join=[a.gossip_address])
        with engine_at(a.socket) as at_a, engine_at(b.socket) as at_b, kvmesh.connect(b.socket) as mesh:
            computed = at_a.generate(tokens, max_new_tokens=NEW, do_sample=False)
            chain = at_b.space.chain(tokens[0])
            wait_until(lambda: longest_run(mesh, chain) >= 6, 10.0, "b knows what a holds")
            fetched = at_b.generate(tokens, max_new_tokens=NEW, do_sample=False)
            local = at_b.generate(tokens, max_new_tokens=NEW, do_sample=False)
            # The next turn of the same conversation: it begins with the prompt and the answer.
            turn = torch.cat([computed.sequences, prompt(CHUNK, seed=4)], dim=1)
            wait_until(lambda: longest_run(mesh, at_b.space.chain(turn[0])) >= 6, 10.0, "the answer is known too")
            followed = at_b.generate(turn, max_new_tokens=NEW, do_sample=False)
    assert computed.mesh_error is fetched.mesh_error is local.mesh_error is None
    assert (computed.tokens_reused, fetched.tokens_reused, local.tokens_reused) == (0, 6 * CHUNK, 6 * CHUNK)
    assert (fetched.tokens_fetched, local.tokens_fetched) == (6 * CHUNK, 0)
    assert fetched.bytes_moved == 6 * at_b.space.chunk_bytes
    assert local.bytes_moved == 0
    for result in (computed, fetched, local):
        assert torch.equal(result.sequences, plain(tokens))
    assert followed.tokens_reused >= 6 * CHUNK
    assert torch.equal(followed.sequences, plain(turn))


def test_a_killed_agent_fails_no_request_and_a_new_one_is_used_again(tmp_path: Path) -> None:
    tokens = prompt(4 * CHUNK + 1)
    with Cluster(tmp_path) as cluster:
        agent = cluster.agent("a")
        with engine_at(agent.socket) as engine:
            engine.generate(tokens, max_new_tokens=NEW, do_sample=False)
            agent.kill()
            without = engine.generate(tokens, max_new_tokens=NEW, do_sample=False)
            assert without.mesh_error
            assert torch.equal(without.sequences, plain(tokens))
            cluster.agent("a")

            def served() -> Generation | None:
                result = engine.generate(tokens, max_new_tokens=NEW)
                return result if result.mesh_error is None else None

            again = wait_until(served, 30.0, "the engine uses the new agent")
            assert again is not None
            assert again.tokens_reused == 0, "the new agent has an empty arena"
            assert again.tokens_published == 4 * CHUNK


def test_an_arena_smaller_than_the_prompt_keeps_what_fits(tmp_path: Path) -> None:
    tokens = prompt(24 * CHUNK)
    with Cluster(tmp_path) as cluster:
        agent = cluster.agent("a", memory="128KiB")
        with engine_at(agent.socket) as engine:
            for _ in range(2):
                result = engine.generate(tokens, max_new_tokens=NEW, do_sample=False)
                assert result.mesh_error is None
                assert torch.equal(result.sequences, plain(tokens))
