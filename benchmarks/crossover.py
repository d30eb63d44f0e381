"""From which prefix length on fetching beats computing, with a real model: ``python -m benchmarks.crossover [--json]``.

Computing is one forward pass of SmolLM2-135M (float32, on this machine's cores) over n tokens. Fetching is a get of the
same n tokens' chunks from another agent, copied into a buffer like the one that the engine hands to its cache. Both end
with n tokens of KV in the engine. The other node stands behind links of several rates (`benchmarks.proxy`), and once
behind none. ``kvmesh bench crossover`` works the same out for other models and links.
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import kvmesh
from benchmarks.agents import ZMQ_ONLY, agents, range_of, wait_until_known
from benchmarks.figures import Figure, Prepared, Skip, main, samples
from benchmarks.proxy import throttled
from benchmarks.wire_baselines import free_port
from kvmesh.demo.children import Children
from kvmesh.demo.model import NAME, convert_model, find_gguf, kept_model
from kvmesh.price import crossover_tokens
from kvmesh.transport.errors import SettingsError

CHUNK_TOKENS = 256
LENGTHS = (256, 512, 768, 1024, 1280, 1536)
LINKS_MBIT = (1000, 250, 100)
ROUNDS_MAX = 7
"""A round over all lengths and links takes some 40 s."""
FIRST_TOKEN = 1000
TITLE = f"crossover: computing n tokens of {NAME} against fetching them from another agent"


def measured(
    rounds: int,
    lengths: tuple[int, ...] = LENGTHS,
    links_mbit: tuple[int, ...] = LINKS_MBIT,
    folder: Path | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> list[Figure]:
    """For each link a row for each length, and one that says where the curves cross."""
    model = load(folder or model_folder())
    tokens = torch.tensor([range_of(FIRST_TOKEN, max(lengths))])
    cache = compute(model, tokens)
    space = space_of(cache, chunk_tokens)
    chain = space.chain(tokens[0])
    with ExitStack() as stack:
        links = {f"a link of {rate} Mbit/s": rate * 1e6 / 8 for rate in links_mbit}
        own = {name: free_port() for name in links}
        ports = {
            f"holder-{index}": (own[name], stack.enter_context(throttled(own[name], rate)))
            for index, (name, rate) in enumerate(links.items())
        }
        # Two agents a link, strangers to all others: who holds what must not be a matter of choice here.
        readers = {}
        for index, name in enumerate([*links, "loopback"]):
            pair = agents(
                [f"holder-{index}", f"reader-{index}"], memory=_memory(space, chain), transports=ZMQ_ONLY,
                mesh_ports=ports,
            )  # fmt: skip
            holder, reader = stack.enter_context(pair)
            holder.mesh.put(space, chunks_of(cache, space, chain), pin=True)
            wait_until_known(reader.mesh, chain)
            readers[name] = reader.mesh
        rows: dict[str, list[tuple[int, float, float]]] = {name: [] for name in readers}
        for length in lengths:
            part = chain[: length // chunk_tokens]
            actions = [fetch(mesh, space, part) for mesh in readers.values()]
            taken = samples(lambda n=length: compute(model, tokens[:, :n]), *actions, rounds=min(rounds, ROUNDS_MAX))  # type: ignore[misc]
            computed_s, *fetched_s = (statistics.median(times) for times in taken)
            for name, seconds in zip(readers, fetched_s, strict=True):
                rows[name].append((length, seconds, computed_s))
    return [figure for name, measured in rows.items() for figure in figures_of(name, measured, space)]


def model_folder() -> Path:
    """The demo's model, converted first where that was not done yet."""
    try:
        find_gguf()
        if (kept := kept_model()) is not None:
            return kept
        with Children() as children:
            return convert_model(children, lambda *_: None)
    except SettingsError as error:
        raise Skip(error) from None


def load(folder: Path) -> Any:
    """The model, as the demo's engines load it."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def compute(model: Any, tokens: torch.Tensor) -> Any:
    """Prefill: the cache of `tokens`, and the one logit that the first new token needs."""
    with torch.inference_mode():
        return model(input_ids=tokens, use_cache=True, logits_to_keep=1).past_key_values


def space_of(cache: Any, chunk_tokens: int) -> kvmesh.Namespace:
    """The namespace of chunks of this cache."""
    keys = cache.layers[0].keys
    return kvmesh.Namespace(
        model=NAME, revision="benchmark", dtype=str(keys.dtype).removeprefix("torch."), layers=len(cache.layers),
        kv_heads=keys.shape[1], head_dim=keys.shape[3], chunk_tokens=chunk_tokens,
    )  # fmt: skip


def chunks_of(cache: Any, space: kvmesh.Namespace, chain: list[bytes]) -> dict[bytes, torch.Tensor]:
    """The cache cut into chunks: [layers, K and V, kv_heads, tokens, head_dim]."""
    whole = torch.stack([torch.stack((layer.keys[0], layer.values[0])) for layer in cache.layers])
    size = space.chunk_tokens
    return {key: whole[..., at * size : (at + 1) * size, :].contiguous() for at, key in enumerate(chain)}


def fetch(mesh: kvmesh.Mesh, space: kvmesh.Namespace, chain: list[bytes]) -> Prepared:
    """A get of all of `chain` from another node, and the copy into memory of the engine's own."""
    size = space.chunk_tokens
    shape = list(next(iter(space.tensors.values())).shape)
    shape[-2] = size * len(chain)
    dtype = getattr(torch, space.dtype)

    def get() -> None:
        buffer = torch.empty(shape, dtype=dtype)
        with mesh.get(space, chain, deadline_s=60) as hit:
            for at, view in enumerate(hit):
                assert isinstance(view, torch.Tensor)
                buffer[..., at * size : (at + 1) * size, :].copy_(view)
            assert hit.fetched == len(chain), f"{hit.fetched} of {len(chain)} chunks came: {hit.reason}"

    return Prepared(get, lambda: mesh.delete(chain))


def figures_of(link: str, measured: list[tuple[int, float, float]], space: kvmesh.Namespace) -> list[Figure]:
    """The rows of one link, and the shortest length from which on all that were measured are fetched faster."""
    rows = [
        Figure(f"{length} tokens over {link}", fetched_s * 1e3, "ms", "computing them", computed_s * 1e3)
        for length, fetched_s, computed_s in measured
    ]
    lost = [length for length, fetched_s, computed_s in measured if fetched_s >= computed_s]
    won = [length for length, _, _ in measured if length > max(lost, default=0)]
    name, against = f"over {link} fetching wins from", "the formula, with the rates of the longest prefix"
    length, fetched_s, computed_s = measured[-1]
    bytes_per_token = space.chunk_bytes / space.chunk_tokens
    formula = crossover_tokens(
        bytes_per_token, length * bytes_per_token / fetched_s, 0.0, length / computed_s, space.chunk_tokens
    )
    if not won:
        return [*rows, Figure(name, None, "tokens", skipped=f"computing won at every length up to {length}")]
    return [*rows, Figure(name, won[0], "tokens", against if formula else None, formula)]


def _memory(space: kvmesh.Namespace, chain: list[bytes]) -> str:
    return f"{max(64, 2 * space.chunk_bytes * len(chain) >> 20)}MiB"


if __name__ == "__main__":
    main({"measured": measured}, TITLE)
