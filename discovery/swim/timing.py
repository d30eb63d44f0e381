"""The mathematics of the timers, as pure functions. Formulas: hashicorp/memberlist (util.go, suspicion.go), and the
Lifeguard paper, Dadgar et al. 2018, section IV."""

from __future__ import annotations

import math

PUSH_PULL_SCALE_NODES = 32
"""Up to so many nodes the interval of push/pull stays as it is."""


def suspicion_timeout_s(mult: int, nodes: int, probe_interval_s: float) -> float:
    """The shortest time from suspect to dead, in a mesh of `nodes`."""
    return mult * max(1.0, math.log10(max(1, nodes))) * probe_interval_s


def suspicion_after_s(confirmations: int, wanted: int, min_s: float, max_s: float) -> float:
    """From the start of a suspicion to its end, after so many of the `wanted` independent confirmations: from `max_s`
    at none down to `min_s` at all of them, by the logarithm, so that the first one counts most."""
    if wanted < 1:
        return min_s
    share = math.log(confirmations + 1) / math.log(wanted + 1)
    return max(min_s, max_s - share * (max_s - min_s))


def confirmations_wanted(suspicion_mult: int, nodes: int) -> int:
    """Two probe intervals short of the multiplier; none where there are not enough others to give them."""
    wanted = suspicion_mult - 2
    return wanted if nodes - 2 >= wanted else 0


def transmit_limit(mult: int, nodes: int) -> int:
    """How often one node sends one rumour."""
    return mult * math.ceil(math.log10(nodes + 1))


def push_pull_interval_s(interval_s: float, nodes: int, *, linear: bool) -> float:
    """Between two push/pulls of one node."""
    if nodes <= PUSH_PULL_SCALE_NODES:
        return interval_s
    if linear:
        return interval_s * nodes / PUSH_PULL_SCALE_NODES
    return interval_s * (math.ceil(math.log2(nodes) - math.log2(PUSH_PULL_SCALE_NODES)) + 1)
