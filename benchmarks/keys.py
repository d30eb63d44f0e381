"""How fast a prompt's keys are made: ``python -m benchmarks.keys [--json]``.

The baseline is one plain BLAKE2b-256 over the same bytes: the least that any hash of the prompt costs here.
"""

from __future__ import annotations

import hashlib

import numpy as np

from benchmarks.figures import Call, Figure, main, timed
from kvmesh.keys import Namespace

TOKENS = 1_000_000
GOAL_MS = 20.0
TITLE = "keys: the chain of 1,000,000 tokens in chunks of 256, on one core"


def chains(rounds: int, count: int = TOKENS) -> list[Figure]:
    """One figure for each way in which engines hold their tokens."""
    space = Namespace(model="m", revision="r", dtype="bfloat16", layers=30, kv_heads=3, head_dim=64)
    tokens = np.random.default_rng(0).integers(0, 150_000, count)
    plain = tokens.astype("<u4").tobytes()
    kinds = {"an array of uint32": tokens.astype("u4"), "an array of int64": tokens, "a list": tokens.tolist()}

    def chain(given_as: object) -> Call:
        return lambda: space.chain(given_as)  # type: ignore[arg-type]

    def one_hash() -> bytes:
        return hashlib.blake2b(plain, digest_size=32).digest()

    return [
        timed(
            f"chain of {name}", chain(given_as), "one BLAKE2b of the same bytes", one_hash, goal=GOAL_MS, rounds=rounds
        )
        for name, given_as in kinds.items()
    ]


if __name__ == "__main__":
    main({"chains": chains}, TITLE)
