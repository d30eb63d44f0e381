"""The timers' mathematics against memberlist's formulas, worked out by hand (util.go, suspicion.go)."""

from __future__ import annotations

import pytest

from kvmesh.discovery.swim.timing import (
    confirmations_wanted,
    push_pull_interval_s,
    suspicion_after_s,
    suspicion_timeout_s,
    transmit_limit,
)


@pytest.mark.parametrize(
    ("mult", "nodes", "interval_s", "timeout_s"),
    [
        # mult * max(1, log10(nodes)) * interval
        (3, 0, 1.0, 3.0),
        (3, 1, 1.0, 3.0),
        (3, 5, 1.0, 3.0),
        (3, 10, 1.0, 3.0),
        (3, 50, 1.0, 5.094),
        (3, 100, 1.0, 6.0),
        (3, 500, 1.0, 8.094),
        (3, 1000, 1.0, 9.0),
        (4, 1000, 1.0, 12.0),
        (3, 100, 0.5, 3.0),
        (6, 100, 5.0, 60.0),
    ],
)
def test_the_shortest_suspicion(mult: int, nodes: int, interval_s: float, timeout_s: float):
    # memberlist cuts the logarithm after three digits
    assert suspicion_timeout_s(mult, nodes, interval_s) == pytest.approx(timeout_s, abs=mult * interval_s * 0.001)


@pytest.mark.parametrize(
    ("confirmations", "wanted", "after_s"),
    [
        # of memberlist's own table: 2 s at least, 30 s at most; 30 - log(n + 1) / log(k + 1) * 28
        (0, 3, 30.0),
        (1, 3, 16.0),
        (2, 3, 7.810),
        (3, 3, 2.0),
        (4, 3, 2.0),
        (5, 3, 2.0),
        # LAN's two
        (0, 2, 30.0),
        (1, 2, 12.334),
        (2, 2, 2.0),
        # and a mesh too small to confirm anything
        (0, 0, 2.0),
        (1, 0, 2.0),
        (0, -1, 2.0),
    ],
)
def test_confirmations_shorten_a_suspicion(confirmations: int, wanted: int, after_s: float):
    assert suspicion_after_s(confirmations, wanted, 2.0, 30.0) == pytest.approx(after_s, abs=0.001)


@pytest.mark.parametrize(
    ("mult", "nodes", "wanted"),
    [(4, 3, 0), (4, 4, 2), (4, 1000, 2), (6, 5, 0), (6, 6, 4), (3, 2, 0), (3, 3, 1), (2, 100, 0), (1, 100, -1)],
)
def test_confirmations_are_wanted_only_where_enough_others_are_there(mult: int, nodes: int, wanted: int):
    assert confirmations_wanted(mult, nodes) == wanted


@pytest.mark.parametrize(
    ("mult", "nodes", "limit"),
    [(3, 0, 0), (3, 1, 3), (3, 9, 3), (3, 10, 6), (3, 99, 6), (4, 99, 8), (4, 100, 12), (4, 999, 12), (4, 1000, 16)],
)
def test_a_rumours_transmits(mult: int, nodes: int, limit: int):
    assert transmit_limit(mult, nodes) == limit


@pytest.mark.parametrize(
    ("nodes", "times"), [(0, 1), (1, 1), (32, 1), (33, 2), (64, 2), (65, 3), (128, 3), (129, 4), (1000, 6)]
)
def test_the_interval_of_push_pull_grows_with_the_logarithm(nodes: int, times: int):
    assert push_pull_interval_s(30.0, nodes, linear=False) == 30.0 * times


@pytest.mark.parametrize(("nodes", "interval_s"), [(1, 15.0), (32, 15.0), (64, 30.0), (100, 46.875), (1000, 468.75)])
def test_or_linearly_so_that_the_bytes_of_all_exchanges_stay_the_same(nodes: int, interval_s: float):
    assert push_pull_interval_s(15.0, nodes, linear=True) == interval_s
