"""The transformers engine against a stand-in for the mesh: what is reused, what is published, and what it costs when it
fails.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StoppingCriteriaList
from transformers.generation.stopping_criteria import MaxLengthCriteria

from kvmesh.engines.rate import PrefillRate
from kvmesh.engines.transformers import MeshModel
from kvmesh.transport.errors import AgentUnavailableError, ChunkTooLargeError
from kvmesh.transport.limits import ENGINE_DEADLINE_MAX_S, ENGINE_DEADLINE_MIN_S
from tests.mesh.engine_support import CHUNK, MeshStandIn, llama, make_llama, prompt

pytestmark = pytest.mark.model
NEW = 10


def engine_of(mesh: Any, model: Any = None, **options: Any) -> MeshModel:
    return MeshModel(model or llama(), mesh, revision="test", chunk_tokens=CHUNK, **options)


def plain(tokens: torch.Tensor, model: Any = None, **kwargs: Any) -> torch.Tensor:
    output: torch.Tensor = (model or llama()).generate(tokens, max_new_tokens=NEW, do_sample=False, **kwargs)
    return output


@pytest.mark.parametrize(
    ("length", "reused"),
    [
        (CHUNK - 1, 0),
        (CHUNK, 0),
        (CHUNK + 1, CHUNK),
        (4 * CHUNK - 1, 3 * CHUNK),
        (4 * CHUNK, 3 * CHUNK),
        (4 * CHUNK + 1, 4 * CHUNK),
        (5 * CHUNK + 7, 5 * CHUNK),
    ],
)
def test_a_second_engine_reuses_whole_chunks_and_answers_the_same(length: int, reused: int) -> None:
    mesh, tokens = MeshStandIn(), prompt(length)
    first = engine_of(mesh).generate(tokens, max_new_tokens=NEW, do_sample=False)
    second = engine_of(mesh).generate(tokens, max_new_tokens=NEW, do_sample=False)

    assert torch.equal(first.sequences, plain(tokens))
    assert torch.equal(second.sequences, first.sequences)
    assert (first.tokens_reused, first.tokens_computed) == (0, length)
    assert (second.tokens_reused, second.tokens_computed) == (reused, length - reused)
    assert second.prompt_tokens == length
    assert second.mesh_error is None
    assert second.bypass_reason is None


@pytest.mark.parametrize("shared", [CHUNK, 3 * CHUNK, 3 * CHUNK + 5])
def test_a_prompt_that_shares_only_its_beginning_reuses_only_that(shared: int) -> None:
    mesh, engine = MeshStandIn(), None
    first = prompt(6 * CHUNK, seed=1)
    other = torch.cat([first[:, :shared], prompt(5 * CHUNK, seed=2)], dim=1)
    engine = engine_of(mesh)
    engine.generate(first, max_new_tokens=NEW, do_sample=False)
    result = engine.generate(other, max_new_tokens=NEW, do_sample=False)
    assert result.tokens_reused == shared // CHUNK * CHUNK
    assert torch.equal(result.sequences, plain(other))


def test_the_answer_is_published_for_the_next_turn() -> None:
    mesh = MeshStandIn()
    tokens = prompt(3 * CHUNK - 4)
    first = engine_of(mesh).generate(tokens, max_new_tokens=2 * CHUNK, do_sample=False)
    # 44 + 32 tokens; the last one was never fed, so 75 have keys: four whole chunks.
    assert first.tokens_published == 4 * CHUNK
    follow_up = torch.cat([first.sequences, prompt(9, seed=5)], dim=1)
    second = engine_of(mesh).generate(follow_up, max_new_tokens=NEW, do_sample=False)
    assert second.tokens_reused == 4 * CHUNK
    assert torch.equal(second.sequences, plain(follow_up))


def test_what_exists_is_not_published_again() -> None:
    mesh, tokens = MeshStandIn(), prompt(4 * CHUNK)
    engine = engine_of(mesh)
    assert engine.generate(tokens, max_new_tokens=1, do_sample=False).tokens_published == 4 * CHUNK
    assert engine.generate(tokens, max_new_tokens=1, do_sample=False).tokens_published == 0


def test_the_published_tensors_are_those_of_a_plain_forward_pass() -> None:
    mesh, tokens, model = MeshStandIn(), prompt(3 * CHUNK), llama()
    engine = engine_of(mesh)
    engine.generate(tokens, max_new_tokens=1, do_sample=False)
    with torch.no_grad():
        cache = model(tokens).past_key_values
    for index, key in enumerate(engine.space.chain(tokens[0])):
        at = slice(index * CHUNK, (index + 1) * CHUNK)
        for layer in range(2):
            torch.testing.assert_close(mesh.chunks[key][layer, 0], cache.layers[layer].keys[0, :, at])
            torch.testing.assert_close(mesh.chunks[key][layer, 1], cache.layers[layer].values[0, :, at])


def test_every_hit_is_released_and_its_views_are_not_used_afterwards() -> None:
    mesh, tokens = MeshStandIn(), prompt(5 * CHUNK)
    engine = engine_of(mesh)
    engine.generate(tokens, max_new_tokens=NEW)
    mesh.fetched = 3
    result = engine.generate(tokens, max_new_tokens=NEW, do_sample=False)
    assert [hit.released for hit in mesh.hits] == [True, True]
    assert mesh.asked[-1] == 4, "the chunk that holds the last token is not asked for"
    assert torch.equal(result.sequences, plain(tokens))  # a view used after its release would be NaN
    assert result.tokens_fetched == 3 * CHUNK
    assert result.bytes_moved == 3 * engine.space.chunk_bytes


def test_sampling_stopping_and_output_options_are_those_of_generate() -> None:
    mesh, tokens = MeshStandIn(), prompt(4 * CHUNK + 3)
    engine = engine_of(mesh)
    engine.generate(tokens, max_new_tokens=1)
    torch.manual_seed(7)
    sampled = engine.generate(tokens, max_new_tokens=NEW, do_sample=True, temperature=0.8, top_k=20)
    torch.manual_seed(7)
    assert torch.equal(
        sampled.sequences, llama().generate(tokens, max_new_tokens=NEW, do_sample=True, temperature=0.8, top_k=20)
    )

    stop = StoppingCriteriaList([MaxLengthCriteria(tokens.shape[1] + 2)])
    assert engine.generate(tokens, max_new_tokens=NEW, stopping_criteria=stop).sequences.shape[1] == tokens.shape[1] + 2
    rich = engine.generate(
        tokens, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    assert len(rich.output.scores) == NEW
    assert torch.equal(rich.sequences, plain(tokens))
    masked = engine.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW, do_sample=False)
    assert torch.equal(masked.sequences, plain(tokens))
    assert masked.tokens_reused == 4 * CHUNK


def test_an_end_token_stops_the_answer_and_the_cache_stays_right() -> None:
    tokens = prompt(2 * CHUNK + 1)
    end = int(plain(tokens)[0, tokens.shape[1] + 3])
    mesh = MeshStandIn()
    engine = engine_of(mesh)
    for _ in range(2):
        result = engine.generate(tokens, max_new_tokens=NEW, do_sample=False, eos_token_id=end, pad_token_id=0)
        assert torch.equal(result.sequences, plain(tokens, eos_token_id=end, pad_token_id=0))


def test_times_are_told_in_order() -> None:
    result = engine_of(MeshStandIn()).generate(prompt(4 * CHUNK), max_new_tokens=3)
    assert 0 <= result.load_s <= result.ttft_s <= result.total_s


def test_bfloat16_runs_and_shares() -> None:
    mesh, model = MeshStandIn(), make_llama(dtype=torch.bfloat16)
    engine = engine_of(mesh, model)
    tokens = prompt(4 * CHUNK + 8)
    engine.generate(tokens, max_new_tokens=NEW, do_sample=False)
    result = engine.generate(tokens, max_new_tokens=NEW, do_sample=False)
    assert engine.space.dtype == "bfloat16"
    assert result.tokens_reused == 4 * CHUNK
    assert all(chunk.dtype == torch.bfloat16 and not chunk.isnan().any() for chunk in mesh.chunks.values())


# --- when the mesh fails ---
@pytest.mark.parametrize("error", [AgentUnavailableError("gone"), ChunkTooLargeError("too large")])
def test_a_failing_mesh_fails_no_request(error: Exception) -> None:
    mesh, tokens = MeshStandIn(), prompt(4 * CHUNK)
    engine = engine_of(mesh)
    mesh.error = error  # type: ignore[assignment]
    result = engine.generate(tokens, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(result.sequences, plain(tokens))
    assert result.tokens_reused == result.tokens_published == 0
    assert str(error) in str(result.mesh_error)


def test_an_agent_that_dies_while_loading_costs_only_what_did_not_land() -> None:
    mesh, tokens = MeshStandIn(), prompt(5 * CHUNK + 2)
    engine_of(mesh).generate(tokens, max_new_tokens=NEW)
    mesh.fail_at = 3
    result = engine_of(mesh).generate(tokens, max_new_tokens=NEW, do_sample=False)
    assert result.tokens_reused == 3 * CHUNK
    assert "went away" in str(result.mesh_error)
    assert torch.equal(result.sequences, plain(tokens))
    assert not mesh.closed, "a mesh that was given stays its owner's"


def test_leases_that_ran_out_while_loading_cost_all_that_was_copied() -> None:
    mesh, tokens = MeshStandIn(), prompt(5 * CHUNK + 2)
    engine_of(mesh).generate(tokens, max_new_tokens=NEW)
    mesh.ran_out = True
    result = engine_of(mesh).generate(tokens, max_new_tokens=NEW, do_sample=False)
    assert result.tokens_reused == 0
    assert "ran out" in str(result.mesh_error)
    assert torch.equal(result.sequences, plain(tokens))


def test_no_agent_at_all_is_told_and_nothing_more(tmp_path: Any) -> None:
    tokens = prompt(3 * CHUNK)
    with engine_of(tmp_path / "nobody.sock") as engine:
        result = engine.generate(tokens, max_new_tokens=NEW, do_sample=False)
    assert result.mesh_error
    assert torch.equal(result.sequences, plain(tokens))


# --- what the mesh cannot serve ---
@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2"),
        ({"use_cache": False}, "use_cache=False"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"prefill_chunk_size": 8}, "prefill_chunk_size=8"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens=2"),
        ({"position_ids": torch.arange(5 * CHUNK)[None]}, "position_ids is an input"),
        ({"attention_mask": torch.tensor([[0, 1] + [1] * (5 * CHUNK - 2)])}, "padding"),
    ],
)
def test_a_call_that_cannot_be_shared_runs_without_the_mesh_and_says_why(kwargs: dict[str, Any], reason: str) -> None:
    mesh, tokens = MeshStandIn(), prompt(5 * CHUNK)
    engine = engine_of(mesh)
    options = {"max_new_tokens": 4, "do_sample": False, **kwargs}
    torch.manual_seed(3)
    result = engine.generate(tokens, **options)
    torch.manual_seed(3)
    assert torch.equal(result.sequences, llama().generate(tokens, **options))
    assert reason in str(result.bypass_reason)
    assert not mesh.chunks
    assert not mesh.asked


def test_a_batch_runs_without_the_mesh() -> None:
    mesh, tokens = MeshStandIn(), torch.cat([prompt(40, 1), prompt(40, 2)])
    result = engine_of(mesh).generate(tokens, max_new_tokens=4, do_sample=False)
    assert "a batch of 2" in str(result.bypass_reason)
    assert result.sequences.shape == (2, 44)
    assert not mesh.chunks


def test_pad_tokens_without_a_mask_run_without_the_mesh() -> None:
    mesh, tokens = MeshStandIn(), prompt(3 * CHUNK)
    tokens[0, :4] = 0
    engine = engine_of(mesh)
    result = engine.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=1)
    assert "pad tokens" in str(result.bypass_reason)
    expected = llama().generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=1)
    assert torch.equal(result.sequences, expected)
    assert engine.generate(tokens, max_new_tokens=4, pad_token_id=0, eos_token_id=0).bypass_reason is None


def test_training_mode_and_autocast_run_without_the_mesh() -> None:
    model = make_llama()
    mesh = MeshStandIn()
    engine = engine_of(mesh, model)
    model.train()
    assert "model.eval()" in str(engine.generate(prompt(40), max_new_tokens=2).bypass_reason)
    model.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in str(engine.generate(prompt(40), max_new_tokens=2).bypass_reason)
    assert not mesh.chunks


def test_the_mesh_can_be_left_out_for_a_comparison() -> None:
    mesh, tokens = MeshStandIn(), prompt(5 * CHUNK)
    result = engine_of(mesh).generate(tokens, use_mesh=False, max_new_tokens=NEW, do_sample=False)
    assert result.bypass_reason == "asked to"
    assert result.tokens_computed == 5 * CHUNK
    assert result.ttft_s > 0
    assert not mesh.asked


# --- deadlines ---
def test_the_deadline_is_the_time_to_compute_what_is_missing() -> None:
    mesh, tokens = MeshStandIn(), prompt(5 * CHUNK)
    engine = engine_of(mesh)
    engine._rate.tokens_per_s = 100.0
    engine.generate(tokens, max_new_tokens=1)
    assert mesh.deadlines == [pytest.approx(4 * CHUNK / 100.0)]
    assert mesh.rates == [100.0], "what would be slower than computing is not worth a fetch"
    engine._rate.tokens_per_s = 1e9
    assert engine.deadline_s(1000) == ENGINE_DEADLINE_MIN_S
    engine._rate.tokens_per_s = 1e-3
    assert engine.deadline_s(1000) == ENGINE_DEADLINE_MAX_S
    ordered = engine_of(mesh, deadline_s=0.25)
    assert ordered.deadline_s(1000) == 0.25
    ordered.generate(tokens, max_new_tokens=1)
    assert mesh.rates[1:] == [None], "a deadline that was given is an order"


def test_the_rate_follows_long_prefills_only() -> None:
    rate = PrefillRate(100.0)
    rate.observe(10, 0.001)
    assert rate.tokens_per_s == 100.0
    for _ in range(50):
        rate.observe(1000, 2.0)
    assert rate.tokens_per_s == pytest.approx(500.0, rel=0.01)


def test_a_call_measures_the_rate() -> None:
    engine = engine_of(MeshStandIn())
    before = engine.prefill_tokens_per_s
    engine.generate(prompt(200), max_new_tokens=1)
    assert engine.prefill_tokens_per_s != before
