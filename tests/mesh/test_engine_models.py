"""Which models the transformers engine takes, which it refuses and why, and what tells two models apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from kvmesh.engines.identity import default_name, fingerprint, inspect_model, weights_state
from kvmesh.engines.transformers import MeshModel
from kvmesh.transport.errors import UnsupportedModelError
from tests.mesh.engine_support import CHUNK, MeshStandIn, llama, llama_config, make_llama, prompt

pytestmark = pytest.mark.model

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 64,
    "pad_token_id": 0,
}


def build(kind: str, **changes: Any) -> Any:
    auto: Any = AutoModelForCausalLM
    return auto.from_config(AutoConfig.for_model(kind, **(SMALL | changes))).eval()


def test_a_plain_llama_is_taken_with_its_geometry() -> None:
    geometry = inspect_model(llama())
    assert (geometry.layers, geometry.kv_heads, geometry.head_dim) == (2, 2, 16)
    assert (geometry.dtype, geometry.device.type) == (torch.float32, "cpu")


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "olmo2", "granite"])
def test_models_with_plain_caches_are_taken(kind: str) -> None:
    assert inspect_model(build(kind)).layers == 2


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("mistral", {"sliding_window": 8}, "DynamicSlidingWindowLayer"),
        ("gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 16}, "cache"),
        ("gemma3_text", {"sliding_window": 8}, "DynamicSlidingWindowLayer"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "'dynamic'"),
        ("mamba", {"state_size": 4, "expand": 1, "conv_kernel": 2}, "past_key_values"),
    ],
)
def test_models_whose_cache_is_more_or_less_than_its_tokens_are_refused(
    kind: str, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        inspect_model(build(kind, **changes))


def test_a_hybrid_model_is_refused() -> None:
    model = build(
        "qwen3_next",
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    with pytest.raises(UnsupportedModelError, match="LinearAttention"):
        inspect_model(model)


def test_a_model_whose_layers_share_keys_is_refused() -> None:
    model = make_llama()
    model.config.num_kv_shared_layers = 1
    with pytest.raises(UnsupportedModelError, match="cannot share its cache"):
        inspect_model(model)


def test_an_encoder_decoder_is_refused() -> None:
    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)
    with pytest.raises(UnsupportedModelError, match="encoder"):
        inspect_model(transformers.T5ForConditionalGeneration(config))


def test_weights_on_the_meta_device_are_refused() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(llama_config())  # type: ignore[no-untyped-call]
    with pytest.raises(UnsupportedModelError, match="meta device"):
        inspect_model(model)


def test_a_quantised_cache_by_default_is_refused() -> None:
    model = make_llama()
    model.generation_config.cache_implementation = "quantized"
    with pytest.raises(UnsupportedModelError, match="'quantized'"):
        inspect_model(model)


def test_attention_that_looks_ahead_is_refused() -> None:
    model = make_llama()
    model.config.is_causal = False
    with pytest.raises(UnsupportedModelError, match="looks ahead"):
        inspect_model(model)


def test_a_switchable_adapter_is_refused() -> None:
    model = make_llama()
    model._hf_peft_config_loaded = True
    with pytest.raises(UnsupportedModelError, match="merge it first"):
        inspect_model(model)


def test_keys_and_values_of_different_size_are_refused() -> None:
    mla = build(
        "deepseek_v3",
        q_lora_rank=8,
        kv_lora_rank=12,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=2,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    with pytest.raises(UnsupportedModelError, match="one shape"):
        inspect_model(mla)


# --- identity
# -----------------------------------------------------------------------------------------------------------
def test_equal_models_have_one_fingerprint_wherever_they_come_from() -> None:
    one, two = make_llama(seed=1), make_llama(seed=1)
    two.config._name_or_path = "/somewhere/else"
    assert fingerprint(one) == fingerprint(two)
    assert default_name(one) == default_name(two) == "llama-0M"


def test_one_changed_weight_changes_the_fingerprint() -> None:
    model = make_llama()
    before = fingerprint(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    assert fingerprint(model) != before


@pytest.mark.parametrize("changes", [{"rms_norm_eps": 1e-5}, {"rope_theta": 5e5}, {"hidden_act": "gelu"}])
def test_a_setting_that_changes_the_cache_changes_the_fingerprint(changes: dict[str, Any]) -> None:
    assert fingerprint(make_llama(**changes)) != fingerprint(make_llama())


def test_the_dtype_changes_the_fingerprint() -> None:
    assert fingerprint(make_llama(dtype=torch.bfloat16)) != fingerprint(make_llama())


def test_weights_that_change_after_wrapping_get_a_namespace_of_their_own() -> None:
    mesh: Any = MeshStandIn()
    model, tokens = make_llama(), prompt(4 * CHUNK)
    engine = MeshModel(model, mesh, chunk_tokens=CHUNK)
    before = engine.space
    engine.generate(tokens, max_new_tokens=2)
    assert engine.space is before
    model.load_state_dict(make_llama(seed=9).state_dict())
    result = engine.generate(tokens, max_new_tokens=2)
    assert engine.space != before
    assert result.tokens_reused == 0


def test_the_sign_of_changed_weights_is_steady_and_sensitive() -> None:
    model = make_llama()
    state = weights_state(model)
    model.generate(prompt(20), max_new_tokens=2)
    assert weights_state(model) == state
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert weights_state(model) != state


def test_the_tenant_and_the_given_names_are_in_the_namespace() -> None:
    mesh: Any = MeshStandIn()
    engine = MeshModel(llama(), mesh, name="m", revision="r", tenant="t", chunk_tokens=CHUNK)
    space = engine.space
    assert (space.model, space.revision, space.tenant, space.layout, space.dtype) == ("m", "r", "t", "torch", "float32")
