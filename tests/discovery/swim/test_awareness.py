"""One number, and its invariant."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvmesh.discovery.swim.awareness import Awareness


def test_the_score_stays_within_its_bounds_and_scales_time():
    table = [
        # delta, score, a timeout of one second
        (0, 0, 1.0), (-1, 0, 1.0), (-10, 0, 1.0), (1, 1, 2.0), (-1, 0, 1.0), (10, 7, 8.0), (1, 7, 8.0), (-1, 6, 7.0),
        (-2, 4, 5.0), (3, 7, 8.0), (-7, 0, 1.0), (-1, 0, 1.0), (2, 2, 3.0),
    ]  # fmt: skip
    awareness = Awareness(8)
    for delta, score, scaled_s in table:
        awareness.add(delta)
        assert (awareness.score, awareness.scaled_s(1.0)) == (score, scaled_s), f"after {delta:+}"


def test_a_single_step_never_gets_worse():
    awareness = Awareness(1)
    awareness.add(5)
    assert awareness.score == 0


@given(st.integers(1, 20), st.lists(st.integers(-30, 30)))
def test_the_invariant(max_score: int, deltas: list[int]):
    awareness = Awareness(max_score)
    for delta in deltas:
        before = awareness.score
        awareness.add(delta)
        assert 0 <= awareness.score < max_score
        assert (awareness.score - before) * delta >= 0
