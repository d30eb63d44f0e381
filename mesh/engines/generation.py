"""What one call of an engine gave, and what the mesh did for it. A plain value: this module computes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class Generation:
    """What a call of `MeshModel.generate` gave, and what the mesh did for it. Times count from the start of the
    call.
    """

    output: Any
    """What `model.generate` returned: a tensor, or a ModelOutput where `return_dict_in_generate` asked for one."""
    sequences: torch.Tensor
    """Prompt and answer, ``[1, tokens]``."""
    prompt_tokens: int
    tokens_reused: int
    """Prompt tokens whose keys and values came out of the mesh."""
    tokens_fetched: int
    """Of those, the ones that came from another node for this call."""
    tokens_computed: int
    """Prompt tokens that this model computed: the others."""
    tokens_published: int
    """Tokens in chunks that the local agent did not have before."""
    bytes_moved: int
    """Bytes that the agent read from other nodes for this call."""
    load_s: float
    """How long asking the mesh, waiting and copying took. It is part of `ttft_s`."""
    ttft_s: float
    """Time to first token: until the first new token existed, loading included."""
    total_s: float
    """Until the call returned, publishing included."""
    bypass_reason: str | None = None
    """Why the mesh was left out of this call."""
    mesh_error: str | None = None
    """What went wrong with the mesh; the call went on without it."""
