"""All figures of the gossip, for one profile or several: what is measured, with how much of it, and in which process.

A plan is a list of jobs. A job makes clusters of one size with one profile, and measures on forks of the process, so
that every measurement begins with the same rested cluster. Jobs share nothing, so several processes work on them. Each
gives rows: a name, a value, a unit, and the goal if there is one.

    quick   30 and 100 nodes, minutes of bad weather
    full    up to 1,000 nodes, hours of bad weather
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from kvmesh.discovery.swim.profile import PROFILES, Profile
from kvmesh.discovery.swim.timing import push_pull_interval_s
from tests.sim import measures
from tests.sim.cluster import Cluster
from tests.sim.healing import split_and_heal
from tests.sim.measures import LongRun, Spread, quantile
from tests.sim.wire import Counted

KNOWING_S_MAX = 2.0
DETECTION_S_MAX = 5.0
EGRESS_GROWTH_MAX = 1.5
"""From 30 nodes to 1,000, idle: the most that counts as not growing."""
ONE_WAY_CHANGES_MAX = 1.0
HEALED_S_MAX = 5.0
"""Beside one push/pull."""


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `goal`: at most so much."""

    name: str
    profile: str
    value: float
    unit: str
    goal: float | None = None

    @property
    def is_met(self) -> bool:
        """Whether the goal was met; without one, always."""
        return self.goal is None or self.value <= self.goal


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    sizes: tuple[int, ...]
    """Nodes, for everything that spreads."""
    losses: tuple[float, ...]
    crash_sizes: tuple[int, ...]
    egress_sizes: tuple[int, ...]
    busy_sizes: tuple[int, ...]
    """With every journal changing each second: the dearest of all."""
    hours: float
    long_size: int
    long_parts: int
    """The hours are shared out over so many jobs."""
    changes: int = 20
    joins: int = 5
    crashes: int = 10
    pair_size: int = 30
    pair_minutes: float = 10.0


QUICK = Plan(
    sizes=(30, 100), losses=(0.0, 0.3), crash_sizes=(30, 100), egress_sizes=(30, 100), busy_sizes=(30,),
    hours=0.1, long_size=100, long_parts=1, pair_minutes=3.0, joins=3, crashes=5,
)  # fmt: skip
FULL = Plan(
    sizes=(30, 100, 1000), losses=(0.0, 0.1, 0.3), crash_sizes=(30, 100, 1000), egress_sizes=(30, 100, 300, 1000),
    busy_sizes=(30, 100, 300, 1000), hours=10.0, long_size=100, long_parts=8,
)  # fmt: skip

Job = tuple[str, Callable[..., Any], tuple[Any, ...]]
Result = list[Row] | LongRun


def figures(plan: Plan, profiles: Iterable[str], *, processes: int, seed: int = 1, only: str = "") -> list[Row]:
    """Every row, in the order of the plan. Progress goes to stderr."""
    jobs = [job for profile in profiles for job in _jobs(plan, profile, seed) if only in job[0]]
    begin, rows = time.monotonic(), list[Row]()
    runs: dict[str, LongRun] = {}
    for number, (title, result) in enumerate(_run(jobs, processes), 1):
        _say(f"[{time.monotonic() - begin:6.0f} s] {number}/{len(jobs)} {title}")
        if isinstance(result, LongRun):
            profile = title.split()[0]
            runs.setdefault(profile, LongRun(0.0)).add(result)
        else:
            rows += result
    for profile, run in runs.items():
        rows += _long_rows(profile, plan.long_size, run)
    return sorted(rows, key=lambda row: row.name)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _jobs(plan: Plan, profile: str, seed: int) -> Iterator[Job]:
    """The longest ones first."""
    for part in range(plan.long_parts):
        hours = plan.hours / plan.long_parts
        yield f"{profile} long run {part + 1}", _long_job, (profile, plan.long_size, hours, seed + part)
    for size in sorted(plan.sizes, reverse=True):
        yield f"{profile} knowing {size}", _spread_job, (plan, profile, size, seed)
    for size in sorted(plan.egress_sizes, reverse=True):
        yield f"{profile} egress {size}", _egress_job, (plan, profile, size, seed)
    yield f"{profile} pairs", _pair_job, (plan, profile, seed)


def _run(jobs: list[Job], processes: int) -> Iterator[tuple[str, Result]]:
    if processes <= 1 or len(jobs) <= 1:
        yield from map(_work, jobs)
        return
    with multiprocessing.get_context("fork").Pool(processes, maxtasksperchild=1) as pool:
        yield from pool.imap_unordered(_work, jobs)


def _work(job: Job) -> tuple[str, Result]:
    title, call, arguments = job
    gc.disable()  # what little is cyclic can wait: one look at a thousand nodes takes seconds
    try:
        return title, call(*arguments)
    finally:
        gc.enable()


def forked(call: Callable[..., Any], *arguments: Any) -> Any:
    """What the call returns, made in a fork of this process: what it changes is gone afterwards."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            with os.fdopen(write, "wb") as pipe:
                pickle.dump(call(*arguments), pipe)
            os._exit(0)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the parent must hear that there is no result
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(1)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    if status or not data:
        raise RuntimeError(f"a measurement failed: {getattr(call, '__name__', call)}{arguments[1:]}")
    return pickle.loads(data)


# --- jobs ------------------------------------------------------------------------------------------------------------


def _spread_job(plan: Plan, profile: str, size: int, seed: int) -> list[Row]:
    cluster, rows = Cluster(size, PROFILES[profile], seed=seed), list[Row]()
    for loss in plan.losses:
        where = f"{size:4d} nodes, {loss:.0%} loss"
        spreads = forked(_measured, measures.knowing, cluster, loss, {"changes": min(plan.changes, size)})
        rows += _spread_rows(f"a head is known, {where}", profile, spreads, KNOWING_S_MAX)
        spreads = forked(_measured, measures.joins, cluster, loss, {"count": plan.joins})
        rows += _spread_rows(f"a join is known, {where}", profile, spreads, None)
        if size in plan.crash_sizes:
            count = min(plan.crashes, size // 5)
            delays = forked(_measured, measures.crashes, cluster, loss, {"count": count, "every_s": 5.0})
            goal = DETECTION_S_MAX if (size, loss, profile) == (100, 0.0, "lan") else None
            rows += [
                Row(f"a crash is detected, {where}, median", profile, quantile(delays, 0.5), "s", goal),
                Row(f"a crash is detected, {where}, p99", profile, quantile(delays, 0.99), "s"),
                Row(f"a crash is detected, {where}, the last", profile, max(delays), "s"),
            ]
    return rows


def _measured(call: Callable[..., Any], cluster: Cluster, loss: float, options: dict[str, Any]) -> Any:
    result = call(cluster, loss, **options)
    assert cluster.nobody_sleeps(), "a machine asked for no further tick"
    return result


def _spread_rows(name: str, profile: str, spreads: list[Spread], goal: float | None) -> list[Row]:
    if profile != "lan":
        goal = None
    rows = []
    for share in (0.5, 0.99, 1.0):
        delays = [spread.until(share) for spread in spreads]
        rows += [
            Row(f"{name}, by {share:.0%}, median", profile, quantile(delays, 0.5), "s"),
            Row(f"{name}, by {share:.0%}, worst of {len(delays)}", profile, max(delays), "s",
                goal if share == 0.99 else None),
        ]  # fmt: skip
    return rows


def _egress_job(plan: Plan, profile: str, size: int, seed: int) -> list[Row]:
    cluster = Cluster(size, PROFILES[profile], seed=seed, wire=Counted(encrypted=True))
    cluster.clockwork.run_for(5.0)
    chosen = PROFILES[profile]
    exchange_s = push_pull_interval_s(chosen.push_pull_interval_s, size, linear=chosen.push_pull_linear)
    # A whole interval of push/pull: in a shorter time few of the nodes of a large mesh would have made theirs.
    rates = [("idle", 0.0, max(60.0, exchange_s)), ("a change a second", 1.0, max(30.0, exchange_s))]
    if size in plan.busy_sizes:
        rates.append(("a change a second at each node", float(size), 10.0))
    return [
        Row(f"bytes sent, {size:4d} nodes, {words}", profile,
            forked(_measured_egress, cluster, rate, for_s), "B/s a node")
        for words, rate, for_s in rates
    ]  # fmt: skip


def _measured_egress(cluster: Cluster, rate: float, for_s: float) -> float:
    return measures.egress(cluster, rate, for_s=for_s)


def _pair_job(plan: Plan, profile: str, seed: int) -> list[Row]:
    ours, rows, size = profile == "lan", list[Row](), plan.pair_size
    cluster = Cluster(size, PROFILES[profile], seed=seed)
    for loss in (0.0, 0.1):
        found = forked(_measured, measures.one_way, cluster, loss, {"minutes": plan.pair_minutes})
        where = f"one way cut off, {size:4d} nodes, {loss:.0%} loss"
        rows += [
            Row(f"{where}, state changes a minute", profile, found.worst_changes_per_minute, "1/min",
                ONE_WAY_CHANGES_MAX if ours else None),
            Row(f"{where}, said to have failed", profile, float(found.failures), "times", 0.0 if ours else None),
        ]  # fmt: skip
        found = forked(_measured, measures.stopped, cluster, loss, {"for_s": 30.0})
        where = f"stopped for 30 s, {size:4d} nodes, {loss:.0%} loss"
        rows += [
            Row(f"{where}, it declares failed", profile, float(found.failures_by_it), "nodes", 0.0 if ours else None),
            Row(f"{where}, others declared failed", profile, float(found.failures_of_others), "nodes",
                0.0 if ours else None),
            Row(f"{where}, all alive again", profile, found.alive_again_s, "s"),
        ]  # fmt: skip
    chosen: Profile = PROFILES[profile]
    healed = split_and_heal(size, chosen, seed=seed, for_s=60.0)
    where = f"halves apart for 60 s, {size:4d} nodes"
    goal = chosen.push_pull_interval_s + HEALED_S_MAX if ours else None
    rows += [
        Row(f"{where}, all alive", profile, healed.alive_s, "s", goal),
        Row(f"{where}, all maps equal", profile, healed.equal_s, "s", goal),
    ]
    return rows


def _long_job(profile: str, size: int, hours: float, seed: int) -> LongRun:
    return measures.long_run(Cluster(size, PROFILES[profile], seed=seed), 0.3, hours=hours)


def _long_rows(profile: str, size: int, run: LongRun) -> list[Row]:
    ours, where = profile == "lan", f"{run.hours:g} h at 30% loss with slow nodes, {size:4d} nodes"
    return [
        Row(f"{where}, false deaths of healthy nodes", profile, float(run.deaths_healthy), "", 0.0 if ours else None),
        Row(f"{where}, and who said so, summed", profile, float(run.reports_healthy), "nodes"),
        Row(f"{where}, false deaths of slow nodes", profile, float(run.deaths_slow), "", 0.0 if ours else None),
        Row(f"{where}, rumours timed", profile, float(len(run.t99_s)), ""),
        Row(f"{where}, a head is known by 50%, median", profile, quantile(run.t50_s, 0.5), "s"),
        Row(f"{where}, a head is known by 99%, p99 of all rumours", profile, quantile(run.t99_s, 0.99), "s",
            KNOWING_S_MAX if ours else None),
        Row(f"{where}, a head is known by all, p99 of all rumours", profile, quantile(run.t100_s, 0.99), "s"),
        Row(f"{where}, packets sent", profile, run.packets / (run.hours * 3600 * size), "1/s a node"),
    ]  # fmt: skip


def growth_rows(rows: list[Row]) -> list[Row]:
    """Whether the bytes of an idle node grow with the mesh: the largest size's over the smallest size's."""
    found = []
    for profile in dict.fromkeys(row.profile for row in rows):
        idle = [row.value for row in rows if row.profile == profile and row.name.startswith("bytes sent, ")
                and row.name.endswith(", idle")]  # fmt: skip
        if len(idle) > 1:
            goal = EGRESS_GROWTH_MAX if profile == "lan" else None
            found.append(Row("bytes sent when idle, largest mesh over smallest", profile, idle[-1] / idle[0], "", goal))
    return found
