"""The engine for Hugging Face transformers: a causal LM whose generate() shares its KV cache through the mesh.

    engine = MeshModel(model)                                   # talks to the local agent
    result = engine.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=32)
    result.sequences, result.tokens_reused, result.ttft_s

A call goes through three steps, all in the caller's thread:

1. *Load.* The longest chain of whole chunks that the mesh has is copied into a new cache, chunk by chunk as they land.
   One token at least is left to compute: with none left, generate() would feed the whole prompt again, on top of it.
2. *Generate.* `model.generate` does what it always does (sampling, stopping, streaming), starting from that cache.
3. *Publish.* What is new in whole chunks, of the prompt and of the answer (a chat's next turn begins with both), is
   copied from the cache straight into the arena. This comes last, so it never delays a token; `generate` returns when
   it is done, and from then on other nodes can load it.

No failure of the mesh fails a call: it costs at most the deadline, which by default is the time that computing the
missing tokens would take, and is told in `Generation.mesh_error`. A call that the mesh cannot serve runs without it:
`Generation.bypass_reason`.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from kvmesh.engines.bypass import bypass_reason
from kvmesh.engines.generation import Generation
from kvmesh.engines.identity import (
    CacheGeometry,
    default_name,
    fingerprint,
    inspect_model,
    weights_state,
)
from kvmesh.engines.link import AgentLink, connect_to
from kvmesh.engines.rate import PrefillRate, probe_rate
from kvmesh.keys import Namespace
from kvmesh.transport.errors import KVMeshError, LeaseError
from kvmesh.transport.limits import CHUNK_TOKENS_DEFAULT, ENGINE_DEADLINE_MAX_S, ENGINE_DEADLINE_MIN_S

__all__ = ["Generation", "MeshModel"]

if TYPE_CHECKING:
    from kvmesh.client import Mesh


@dataclass(slots=True)
class _Loaded:
    """The outcome of the first step."""

    cache: Any
    chunks: int = 0
    fetched: int = 0
    bytes_moved: int = 0
    errors: list[str] = field(default_factory=list)


class MeshModel:
    """A causal LM that loads what the mesh has, computes the rest, and publishes what is new. Close it, or use `with`.

    `mesh`: an open `kvmesh.Mesh`, which stays yours, or the path of an agent's socket, or None for the default agent.
    The agent need not run yet, and may be started again at any time.
    `name`, `revision`: part of the identity of what is shared, so they must be equal on all nodes. By default the name
    says type and size, and the revision is a fingerprint of configuration and weights, taken again when weights change.
    A revision that you give is taken at its word: change it when you change the weights.
    `chunk_tokens`: fewer share more of a prompt's end, at more keys.
    `deadline_s`: the longest time that a load may take; by default what computing the missing tokens would take, as
    measured, and then nothing is fetched that would be slower than computing.

    Raises `UnsupportedModelError` when the model's cache cannot be shared safely, with the reason.
    """

    def __init__(
        self,
        model: Any,
        mesh: Mesh | str | os.PathLike[str] | None = None,
        *,
        name: str | None = None,
        revision: str | None = None,
        tenant: str = "",
        chunk_tokens: int = CHUNK_TOKENS_DEFAULT,
        deadline_s: float | None = None,
    ) -> None:
        self.model = model
        self._geometry = inspect_model(model)
        self._name = default_name(model) if name is None else name
        self._given_revision = revision
        self._tenant = tenant
        self._chunk_tokens = chunk_tokens
        self._deadline_s = deadline_s
        self._rate = PrefillRate(probe_rate(model))
        self._weights_state = 0 if revision is not None else weights_state(model)
        self._space = self._make_space()
        if mesh is None or isinstance(mesh, (str, os.PathLike)):
            self._link = AgentLink(connect_to(mesh))
            self._owns_mesh = True
        else:
            self._link = AgentLink(connect_to(mesh.socket), mesh=mesh)
            self._owns_mesh = False

    @property
    def space(self) -> Namespace:
        """The namespace of the chunks that this engine loads and publishes."""
        if self._given_revision is None and (state := weights_state(self.model)) != self._weights_state:
            self._weights_state = state
            self._space = self._make_space()
        return self._space

    @property
    def prefill_tokens_per_s(self) -> float:
        """The measured rate of prefill, on which the default deadline rests."""
        return self._rate.tokens_per_s

    def close(self) -> None:
        """Close the connection to the agent, unless it was given open."""
        if self._owns_mesh:
            self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(self, input_ids: torch.Tensor, *, use_mesh: bool = True, **kwargs: Any) -> Generation:
        """As `model.generate(input_ids, **kwargs)`, with the mesh. `input_ids`: one prompt, ``[1, tokens]``.

        `use_mesh=False` computes everything and publishes nothing, for a comparison.
        """
        start = time.perf_counter()
        reason = bypass_reason(self.model, input_ids, kwargs) if use_mesh else "asked to"
        clock = _FirstToken()
        kwargs["stopping_criteria"] = StoppingCriteriaList([clock, *(kwargs.get("stopping_criteria") or ())])
        if reason is not None:
            output = self.model.generate(input_ids, **kwargs)
            if not use_mesh and input_ids.ndim == 2 and input_ids.shape[0] == 1:
                self._rate.observe(input_ids.shape[1], clock.at - start)
            return _generation(output, input_ids, _Loaded(None), clock, start, reason=reason)
        prompt = input_ids[0].cpu()
        space = self.space
        loaded = self._load(space, prompt)
        load_s = time.perf_counter() - start
        output = self.model.generate(input_ids, past_key_values=loaded.cache, **kwargs)
        reused = loaded.chunks * space.chunk_tokens
        self._rate.observe(len(prompt) - reused, clock.at - start - load_s)
        published = self._publish(space, _sequences(output)[0].cpu(), loaded)
        return _generation(output, input_ids, loaded, clock, start, load_s=load_s, reused=reused, published=published)

    def deadline_s(self, tokens: int) -> float:
        """How long loading `tokens` tokens may take."""
        if self._deadline_s is not None:
            return self._deadline_s
        return min(max(tokens / self._rate.tokens_per_s, ENGINE_DEADLINE_MIN_S), ENGINE_DEADLINE_MAX_S)

    def _make_space(self) -> Namespace:
        geometry = self._geometry
        return Namespace(
            model=self._name,
            revision=fingerprint(self.model) if self._given_revision is None else self._given_revision,
            dtype=str(geometry.dtype).removeprefix("torch."),
            layers=geometry.layers,
            kv_heads=geometry.kv_heads,
            head_dim=geometry.head_dim,
            chunk_tokens=self._chunk_tokens,
            tenant=self._tenant,
        )

    def _load(self, space: Namespace, prompt: torch.Tensor) -> _Loaded:
        """A cache with the longest run of the prompt's chunks that landed in time, short of the last token."""
        loaded = _Loaded(DynamicCache(config=self.model.config))
        chain = space.chain(prompt[:-1])
        if not chain:
            return loaded
        buffer: torch.Tensor | None = None
        try:
            deadline_s = self.deadline_s(len(chain) * space.chunk_tokens)
            # A deadline that the user gave is an order: only a derived one leaves the choice to the price.
            rate = self._rate.tokens_per_s if self._deadline_s is None else None
            with (
                self._link.use() as mesh,
                mesh.get(space, chain, deadline_s=deadline_s, prefill_tokens_per_s=rate) as hit,
            ):
                for view in hit:
                    assert isinstance(view, torch.Tensor)
                    if buffer is None:
                        buffer = _buffer(self._geometry, len(chain) * space.chunk_tokens)
                    at = loaded.chunks * space.chunk_tokens
                    buffer[..., at : at + space.chunk_tokens, :].copy_(view)
                    loaded.chunks += 1
                    del view  # its lease ends with it
                loaded.fetched, loaded.bytes_moved = hit.fetched, hit.bytes_moved
        except LeaseError as error:
            loaded.chunks = 0  # this process was stopped in the middle: who knows what was copied
            loaded.errors.append(str(error))
        except KVMeshError as error:
            # What landed before is whole and verified: it is used.
            loaded.errors.append(str(error))
        if buffer is not None and loaded.chunks:
            _adopt(loaded.cache, buffer, loaded.chunks * space.chunk_tokens)
        return loaded

    def _publish(self, space: Namespace, tokens: torch.Tensor, loaded: _Loaded) -> int:
        """Put the whole chunks that the cache has beyond those loaded. The last token was never fed: it has no keys."""
        held = loaded.cache.get_seq_length()
        chain = space.chain(tokens[:held])
        if loaded.errors or len(chain) <= loaded.chunks:
            return 0
        layers = loaded.cache.layers

        def filler(index: int) -> Any:
            at = slice(index * space.chunk_tokens, (index + 1) * space.chunk_tokens)

            def fill(view: torch.Tensor) -> None:
                for layer, into in zip(layers, view, strict=True):
                    into[0].copy_(layer.keys[0, :, at])
                    into[1].copy_(layer.values[0, :, at])

            return fill

        new = {chain[index]: filler(index) for index in range(loaded.chunks, len(chain))}
        try:
            with self._link.use() as mesh:
                if self._geometry.device.type == "cuda":
                    mesh.pin_memory()  # here, where no token waits: the first time takes seconds
                return mesh.put(space, new).stored * space.chunk_tokens
        except KVMeshError as error:
            loaded.errors.append(str(error))
            return 0


class _FirstToken(StoppingCriteria):
    """Never stops anything: generate() asks it once a token, and it notes when the first one existed."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if not self.at:
            input_ids[0, -1].item()  # waits for an accelerator, where the token is otherwise only promised
            self.at = time.perf_counter()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _buffer(geometry: CacheGeometry, tokens: int) -> torch.Tensor:
    shape = (geometry.layers, 2, geometry.kv_heads, tokens, geometry.head_dim)
    return torch.empty(shape, dtype=geometry.dtype, device=geometry.device)


def _adopt(cache: Any, buffer: torch.Tensor, tokens: int) -> None:
    """Make the first `tokens` tokens of `buffer` the content of `cache`, without another copy.

    A layer never writes into its tensors: it concatenates, so the next update makes its own.
    """
    for layer, (keys, values) in zip(cache.layers, buffer[..., :tokens, :], strict=True):
        layer.lazy_initialization(keys[None], values[None])
        layer.keys, layer.values = keys[None], values[None]


def _sequences(output: Any) -> torch.Tensor:
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    assert isinstance(sequences, torch.Tensor)
    return sequences


def _generation(
    output: Any,
    input_ids: Any,
    loaded: _Loaded,
    clock: _FirstToken,
    start: float,
    *,
    load_s: float = 0.0,
    reused: int = 0,
    published: int = 0,
    reason: str | None = None,
) -> Generation:
    sequences = _sequences(output)
    prompt_tokens = int(input_ids.shape[-1]) if isinstance(input_ids, torch.Tensor) else 0
    end = time.perf_counter()
    return Generation(
        output=output,
        sequences=sequences,
        prompt_tokens=prompt_tokens,
        tokens_reused=reused,
        tokens_fetched=loaded.fetched * (reused // loaded.chunks) if loaded.chunks else 0,
        tokens_computed=prompt_tokens - reused,
        tokens_published=published,
        bytes_moved=loaded.bytes_moved,
        load_s=load_s,
        ttft_s=(clock.at or end) - start,
        total_s=end - start,
        bypass_reason=reason,
        mesh_error="; ".join(loaded.errors) or None,
    )
