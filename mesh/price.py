"""The price of a fetch against the price of computing: whether bringing chunks over beats prefilling their tokens.

    fetch    = round trip + bytes / rate
    prefill  = tokens / tokens a second

Both grow with the length of the prefix; only the fetch has a fixed cost. So either every prefix beyond some length is
worth fetching (`crossover_tokens`), or none is. What a fetch brings late is worth nothing: chunks behind the deadline
do not count.

Nothing is refused for want of knowledge: an unknown rate counts as fast, an unknown round trip as none, and what is not
known of the engine asks for no price at all. Pure functions: no clock, no state.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvmesh.transport.limits import DEADLINE_OPTIMISM, PRICE_SHARE


@dataclass(frozen=True, slots=True)
class Stretch:
    """Chunks of a chain, one after the other, that the same holders have."""

    chunks: int
    bytes_per_s: float | None
    """What these holders give together; None when it was not measured."""


def fetch_s(size_bytes: float, bytes_per_s: float | None, rtt_s: float) -> float:
    """How long reading `size_bytes` takes. At a rate of None it is the round trip alone."""
    return rtt_s + (size_bytes / bytes_per_s if bytes_per_s is not None else 0.0)


def prefill_s(tokens: float, tokens_per_s: float) -> float:
    """How long computing `tokens` takes."""
    return tokens / tokens_per_s


def crossover_tokens(
    kv_bytes_per_token: float, bytes_per_s: float, rtt_s: float, prefill_tokens_per_s: float, chunk_tokens: int
) -> int | None:
    """The shortest prefix, in whole chunks, that is fetched faster than it is computed; None when none is."""
    won_s = prefill_s(chunk_tokens, prefill_tokens_per_s) - chunk_tokens * kv_bytes_per_token / bytes_per_s
    if won_s <= 0:
        return None
    return chunk_tokens * (int(rtt_s / won_s) + 1)


def worth(
    stretches: Iterable[Stretch],
    *,
    chunk_bytes: int,
    chunk_tokens: int,
    rtt_s: float,
    prefill_tokens_per_s: float | None,
    left_s: float,
) -> int:
    """How many chunks from the front to fetch: those whose fetch saves the most time. 0: computing them is faster.

    Of computing, a fetch may take `PRICE_SHARE`. Without a prefill rate it is only asked what can land within `left_s`,
    the time to the deadline, at `DEADLINE_OPTIMISM` times the rate.
    """
    best = count = 0
    best_saved_s = 0.0
    taken_s = rtt_s
    computing_s = None
    if prefill_tokens_per_s is not None:
        computing_s = PRICE_SHARE * prefill_s(chunk_tokens, prefill_tokens_per_s)
    for stretch in stretches:
        chunk_s = fetch_s(chunk_bytes, stretch.bytes_per_s, 0.0)
        fits = stretch.chunks
        if chunk_s > 0:
            fits = min(fits, max(0, int((left_s - taken_s) * DEADLINE_OPTIMISM / chunk_s)))
        elif taken_s >= left_s:
            fits = 0
        count += fits
        taken_s += fits * chunk_s
        # Within a stretch each chunk saves the same, so the best place to stop is at the end of one.
        saved_s = count * computing_s - taken_s if computing_s is not None else float(count)
        if saved_s > best_saved_s:
            best, best_saved_s = count, saved_s
        if fits < stretch.chunks:
            break
    return best
