"""Which transformers models can share their cache, and the namespace of one that can.

A chunk's tensors must be a function of (namespace, tokens of the prefix) and of nothing else. This module owns that
judgement:

- `inspect_model` refuses, with the reason, a model for which it does not hold, or whose cache a chunk cannot hold. It
  looks at the cache that the model really fills: one token is computed, and every layer must be exactly a
  `DynamicLayer` of one shape.
- `fingerprint` is the default revision: a digest of the configuration and of all weights, so two models share only if
  they are the same, whatever their directories are called. All bytes count: a merged adapter changes few of
  them. It runs at the speed of memory (538 MB of float32 in 26 ms on two cores).
- `weights_state` is a cheap sign of changed weights (training, `load_state_dict`), looked at before each request.

The attention implementation (eager, sdpa, flash) is *not* part of the identity: it changes how rounding falls, not what
is computed, just as the processor does. Runs in the caller's thread.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kvmesh.transport.errors import UnsupportedModelError

_NOT_CONTENT = frozenset(
    {
        "_name_or_path", "_model_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype",
        "use_cache", "return_dict",
        "output_attentions", "output_hidden_states", "id2label", "label2id", "problem_type", "chunk_size_feed_forward",
        "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range",
    }
)  # fmt: skip
"""Fields of a configuration that change no key or value. A field that is not known here counts: a needless miss is the
safe error.
"""


@dataclass(frozen=True, slots=True)
class CacheGeometry:
    """What the cache of a model looks like: `layers` times K and V of shape [1, kv_heads, tokens, head_dim]."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


def inspect_model(model: Any) -> CacheGeometry:
    """The geometry of the cache of `model`. Raises `UnsupportedModelError` when it cannot be shared safely."""
    if reason := _refusal(model):
        raise _refused(model, reason)
    cache: Any = DynamicCache(config=model.config)
    _only_plain_layers(model, cache)
    one_token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    with torch.no_grad():
        model(input_ids=one_token, past_key_values=cache, use_cache=True)
    _only_plain_layers(model, cache)
    if not all(layer.is_initialized for layer in cache.layers):
        raise _refused(model, "some of its layers fill no cache of their own")
    parts = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    shapes, dtypes, devices = ({getattr(part, name) for part in parts} for name in ("shape", "dtype", "device"))
    if len(shapes) != 1 or len(dtypes) != 1:
        forms = sorted({f"{list(part.shape)} {part.dtype}" for part in parts})
        raise _refused(model, f"its keys and values are not all of one shape and dtype: {', '.join(forms)}")
    if len(devices) != 1:
        raise _refused(model, f"its layers are on several devices: {', '.join(sorted(map(str, devices)))}")
    shape = shapes.pop()
    if len(shape) != 4 or shape[0] != 1 or shape[2] != 1:
        raise _refused(model, f"one token gave keys of shape {list(shape)}, not [1, kv_heads, 1, head_dim]")
    return CacheGeometry(len(cache.layers), shape[1], shape[3], dtypes.pop(), devices.pop())


def default_name(model: Any) -> str:
    """A name for people that depends on nothing but the model, e.g. ``llama-135M``: a path would differ between
    machines.
    """
    return f"{model.config.model_type}-{round(model.num_parameters() / 1e6)}M"


def fingerprint(model: Any) -> str:
    """32 hex digits that stand for the configuration and for every byte of the weights of `model`."""
    digest = hashlib.blake2b(digest_size=16, person=b"kvmesh-weights")
    config = json.dumps(_content(model.config.to_dict()), sort_keys=True, default=str)
    digest.update(f"{type(model).__qualname__}\n{config}\n".encode())
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in sorted(model.state_dict().items()):
        identity = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if identity not in seen:
            seen[identity] = _digest(name, tensor)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} {seen[identity]}\n".encode())
    return digest.hexdigest()


def weights_state(model: Any) -> int:
    """A number that changes when a weight is replaced or written in place: storage addresses and version counters."""
    return hash(
        tuple(
            (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)  # noqa: SLF001 - no public name for it
            for tensors in (model.parameters(), model.buffers())
            for tensor in tensors
        )
    )


def _refused(model: Any, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{type(model).__name__} cannot share its cache: {reason}")


def _text_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def _refusal(model: Any) -> str | None:
    """What the configuration alone says against `model`; None when it says nothing."""
    config = _text_config(model)
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder: its cache depends on the encoder's input as well"
    if any(tensor.is_meta for tensor in model.parameters()):
        return "some of its weights are on the meta device (not loaded, or offloaded)"
    if not hasattr(model, "generate") or "past_key_values" not in inspect.signature(model.forward).parameters:
        return "its forward() takes no past_key_values: it keeps another kind of state"
    if getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        return "an adapter is loaded, which can be switched at any time: merge it first (merge_and_unload)"
    if (getattr(model, "_tp_size", None) or 1) > 1:
        return "it is split by tensor parallelism: each rank holds other heads"
    if getattr(config, "is_causal", True) is False or getattr(config, "use_bidirectional_attention", None):
        return "its attention looks ahead: a token's keys depend on what follows it"
    for rope in _ropes(config):
        if rope in ("dynamic", "longrope"):
            return f"its rope type {rope!r} changes a token's keys with the length of the whole prompt"
    if implementation := getattr(model.generation_config, "cache_implementation", None):
        return f"its generation config asks for the cache {implementation!r}: only the dynamic cache can be shared"
    if getattr(config, "num_kv_shared_layers", None):
        return f"its last {config.num_kv_shared_layers} layers use the keys of others"
    return None


def _ropes(config: Any) -> set[str]:
    """The rope types in a configuration, of all layer types."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {str(part.get("rope_type") or part.get("type") or "default") for part in nested}


def _only_plain_layers(model: Any, cache: Any) -> None:
    """Exactly `DynamicLayer`: each subclass keeps something else or less (a window, quantised or indexed keys, a
    state).
    """
    others = {type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer}
    if others or not cache.layers:
        raise _refused(
            model, f"its cache has layers of kind {', '.join(sorted(others)) or 'none'}, not only DynamicLayer"
        )


def _content(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _content(item) for key, item in value.items() if key not in _NOT_CONTENT}
    return [_content(item) for item in value] if isinstance(value, (list, tuple)) else value


def _digest(name: str, tensor: torch.Tensor) -> str:
    try:
        data: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"the bytes of the weight {name!r} ({type(tensor).__name__}) cannot be read, so the model has no "
            f"fingerprint: name its weights yourself with revision=... ({error})"
        ) from None
    return xxhash.xxh3_128_hexdigest(data)
