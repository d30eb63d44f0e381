"""Which calls of generate() can use the mesh: those whose cache is the cache of their tokens, in one row.

Everything else that transformers can do goes on as it always did, without the mesh, and the result says why: a request
must not fail for what the mesh cannot hold, nor silently miss. This module only looks at arguments; it computes
nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin

_ALONE = {
    "num_beams": 1, "num_return_sequences": 1, "use_cache": True, "cache_implementation": None, "prefill_chunk_size":
    None,
    "token_healing": False, "penalty_alpha": None, "dola_layers": None, "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None, "use_mtp": False, "constraints": None, "force_words_ids": None,
}  # fmt: skip
"""The settings of generation that change what the cache holds or who owns it, with the value that leaves it alone.

prefill_chunk_size: transformers 5.19 feeds the whole prompt again, on top of a cache that has its beginning already.
token_healing: it rewrites the end of the prompt. Beams and assistants reorder and crop the cache."""

_OTHER_LOOPS = ("custom_generate", "assistant_model", "synced_gpus")
_HARMLESS_INPUTS = frozenset({"attention_mask", "tokenizer", "trust_remote_code"})


def bypass_reason(model: Any, input_ids: Any, kwargs: Mapping[str, Any]) -> str | None:
    """Why `model.generate(input_ids, **kwargs)` has to run without the mesh; None when it can use it."""
    if not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2:
        return "input_ids is not a tensor of shape [1, tokens]"
    if input_ids.shape[0] != 1:
        return f"a batch of {input_ids.shape[0]}: one request at a time can be shared"
    if input_ids.shape[1] == 0:
        return "the prompt is empty"
    if model.training:
        return "the model is in training mode, where dropout makes keys random: call model.eval()"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on, so the cache may have another dtype than the model's"
    for name in _OTHER_LOOPS:
        if kwargs.get(name) is not None:
            return f"{name} runs another generation loop"
    for name, alone in _ALONE.items():
        value = effective(model, kwargs, name)
        if value is not None and value != alone:
            return f"{name}={value!r} changes how the cache is filled"
    for name, value in kwargs.items():
        if value is not None and name not in _known_names():
            return f"{name} is an input besides the tokens"
    return _padding(model, input_ids, kwargs)


def effective(model: Any, kwargs: Mapping[str, Any], name: str) -> Any:
    """A generation setting as generate() will see it: the call's, else its generation_config's, else the model's."""
    for source in (kwargs.get(name), getattr(kwargs.get("generation_config"), name, None)):
        if source is not None:
            return source
    return getattr(model.generation_config, name, None)


def _padding(model: Any, input_ids: torch.Tensor, kwargs: Mapping[str, Any]) -> str | None:
    mask = kwargs.get("attention_mask")
    if mask is not None:
        if mask.shape == input_ids.shape and bool((mask == 1).all()):
            return None
        return "the attention mask leaves tokens out (padding)"
    # Without a mask generate() takes the pad token for padding, unless it is the end token as well.
    pad, eos = (effective(model, kwargs, name) for name in ("pad_token_id", "eos_token_id"))
    ends = set(eos) if isinstance(eos, (list, tuple)) else {eos}
    if pad is not None and pad not in ends and bool((input_ids == pad).any()):
        return "the prompt has pad tokens and no attention mask"
    return None


@cache
def _known_names() -> frozenset[str]:
    """What generate() takes that is not an input of the model."""
    named = inspect.signature(GenerationMixin.generate).parameters
    settings = vars(GenerationConfig())  # type: ignore[no-untyped-call]
    return frozenset(named) | frozenset(settings) | _HARMLESS_INPUTS
