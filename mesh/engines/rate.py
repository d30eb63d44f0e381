"""How fast an engine prefills: what a load may cost at most is what computing the same tokens would cost.

An engine measures itself: once when it is made, and then with every prefill that is long enough to tell.
"""

from __future__ import annotations

import time
from typing import Any

import torch

_PROBE_TOKENS = 32
"""The first estimate of the prefill rate: the time of a forward pass over so many tokens."""
_RATE_SAMPLE_TOKENS_MIN = 64
"""A prefill of fewer tokens tells more about its fixed cost than about the rate."""
_RATE_NEW_SHARE = 0.3


class PrefillRate:
    """Tokens a second of prefill: a moving average over the calls that computed enough to tell."""

    def __init__(self, tokens_per_s: float) -> None:
        self.tokens_per_s = tokens_per_s

    def observe(self, tokens: int, seconds: float) -> None:
        """A prefill of `tokens` tokens took `seconds`, up to the first new token."""
        if tokens >= _RATE_SAMPLE_TOKENS_MIN and seconds > 0:
            self.tokens_per_s += _RATE_NEW_SHARE * (tokens / seconds - self.tokens_per_s)


def probe_rate(model: Any) -> float:
    """Tokens a second of one short forward pass. It is an underestimate, and so gives loads more time, until a prefill
    was measured.
    """
    tokens = torch.zeros((1, _PROBE_TOKENS), dtype=torch.long, device=model.device)
    with torch.no_grad():
        start = time.perf_counter()
        model(input_ids=tokens, use_cache=False).logits[0, -1, 0].item()
    return _PROBE_TOKENS / (time.perf_counter() - start)
