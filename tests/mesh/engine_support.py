"""What the tests of the engine share: tiny random models, and a stand-in for a connection that keeps chunks in a
dict.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kvmesh.keys import Namespace
from kvmesh.transport.errors import AgentUnavailableError, KVMeshError, LeaseError

CHUNK = 16


def llama_config(**changes: Any) -> LlamaConfig:
    fields: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return LlamaConfig(**(fields | changes))


def make_llama(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random Llama whose logits are far apart, so that a greedy answer does not hang on rounding."""
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(llama_config(**changes))  # type: ignore[no-untyped-call]
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model.to(dtype)


def save_tiny_model(folder: Path, text: str) -> Path:
    """A random Llama, with a tokenizer that gives each word of `text` a number."""
    words = sorted(set(re.findall(r"\w+|[^\w\s]+", text)))
    numbers = {"<unk>": 0} | {word: index + 1 for index, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(numbers, "<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    make_llama(vocab_size=len(numbers), max_position_embeddings=4096).save_pretrained(folder)
    wrapped: Any = PreTrainedTokenizerFast
    wrapped(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


@cache
def llama() -> Any:
    """The tiny model that most tests only read."""
    return make_llama()


def prompt(tokens: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 512, (1, tokens), generator=generator)


class HitStandIn:
    """The chunks found, handed out one by one; fails before chunk `fail_at` when told to."""

    def __init__(self, views: list[torch.Tensor], fetched: int, fail_at: int | None) -> None:
        self.views = views
        self.fetched = fetched
        self.bytes_moved = sum(view.nbytes for view in views[len(views) - fetched :])
        self.count = len(views)
        self.reason = "complete"
        self.fail_at = fail_at
        self.ran_out = False
        self.released = False

    def __iter__(self) -> Iterator[torch.Tensor]:
        for index, view in enumerate(self.views):
            if index == self.fail_at:
                raise AgentUnavailableError("the agent went away")
            yield view

    def __enter__(self) -> HitStandIn:
        return self

    def __exit__(self, *_: object) -> None:
        self.released = True
        for view in self.views:
            view.fill_(float("nan"))  # what is used after the release shows
        if self.ran_out:
            raise LeaseError("the leases of this hit ran out")


class MeshStandIn:
    """As much of `kvmesh.Mesh` as an engine uses, in this process."""

    def __init__(self) -> None:
        self.socket = "/nonexistent/agent.sock"
        self.chunks: dict[bytes, torch.Tensor] = {}
        self.spaces: list[Namespace] = []
        self.deadlines: list[float] = []
        self.rates: list[float | None] = []
        self.ran_out = False
        self.asked: list[int] = []
        self.hits: list[HitStandIn] = []
        self.error: KVMeshError | None = None
        self.fail_at: int | None = None
        self.fetched = 0
        self.closed = False

    def get(
        self, space: Namespace, chain: Sequence[bytes], *, deadline_s: float, prefill_tokens_per_s: float | None
    ) -> HitStandIn:
        if self.error is not None:
            raise self.error
        self.spaces.append(space)
        self.deadlines.append(deadline_s)
        self.rates.append(prefill_tokens_per_s)
        self.asked.append(len(chain))
        views = []
        for key in chain:
            if key not in self.chunks:
                break
            views.append(self.chunks[key].clone())
        self.hits.append(HitStandIn(views, min(self.fetched, len(views)), self.fail_at))
        self.hits[-1].ran_out = self.ran_out
        return self.hits[-1]

    def put(self, space: Namespace, chunks: Mapping[bytes, Callable[[torch.Tensor], None]]) -> Any:
        if self.error is not None:
            raise self.error
        stored = 0
        for key, fill in chunks.items():
            if key in self.chunks:
                continue
            view = torch.full(space.tensors["kv"].shape, float("nan"), dtype=getattr(torch, space.dtype))
            fill(view)
            self.chunks[key] = view
            stored += 1
        return type("PutResult", (), {"stored": stored})()

    def close(self) -> None:
        self.closed = True
