"""How well this node itself is: Lifeguard's local health.

One number, 0 when all is well. A probe that fails without a word from those who were asked to help, or an accusation
that has to be refuted, adds to it; a probe that succeeds takes from it. The invariant: 0 <= score < max.
"""

from __future__ import annotations


class Awareness:
    """The score, and what it does to a probe's time."""

    def __init__(self, max_score: int) -> None:
        assert max_score >= 1
        self._max = max_score
        self.score = 0

    def add(self, delta: int) -> None:
        """It got worse (positive) or better."""
        self.score = min(max(self.score + delta, 0), self._max - 1)

    def scaled_s(self, timeout_s: float) -> float:
        """A timeout, longer the less well this node is."""
        return timeout_s * (self.score + 1)
