"""Push/pull: two nodes tell each other all that they know. To join, to repair what gossip missed, and to find those
again that were cut off.

    join        until somebody is there: every seed, looked up anew each time, and every member of the last run;
                later from time to time those seeds that are no members: two meshes begun apart become one
    repair      with a random node that is alive, at an interval that grows with the mesh
    reconnect   with a random node that failed (Serf's habit): a partition may outlast gossip to the dead

The answering side merges first and answers then, so that its answer already refutes what the other one said of it. The
asking side, when it was accused, tells the other one directly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from kvmesh.discovery.actions import Notify
from kvmesh.discovery.wire.messages import Endpoint, PushPull
from kvmesh.transport.limits import (
    JOIN_DIALS_MAX,
    JOIN_RETRY_S,
    JOIN_RETRY_S_MAX,
    MEMBERS_REMEMBERED_MAX,
    REMEMBER_S,
    SEED_RETRY_S,
)

from .base import Shared
from .beliefs import Beliefs
from .events import AnswerPull, Exchange, Pulled, RefusePull, Remember, Resolve, Resolved, SendPacket
from .nodes import ALIVE, DEAD, LEFT, Node
from .timing import push_pull_interval_s


@dataclass(frozen=True, slots=True)
class JoinFailed:
    """Nobody answered in a round of joining. It is tried again."""

    reasons: tuple[str, ...]
    """What was tried, and why it did not work."""
    retry_in_s: float


class _UnderWay(NamedTuple):
    """An exchange of ours."""

    target: Endpoint
    join: bool
    seed: str
    """What was looked up to find the target; empty when it was known."""


class Exchanger:
    """See above."""

    def __init__(self, shared: Shared, beliefs: Beliefs, seeds: Sequence[str], known: Sequence[Endpoint]) -> None:
        self._shared = shared
        self._beliefs = beliefs
        self._seeds = tuple(seeds)
        self._known = tuple(endpoint for endpoint in known if endpoint != shared.own.endpoint)
        self._under_way: dict[int, _UnderWay] = {}
        self._resolving: set[str] = set()
        self._reasons: list[str] = []
        """What went wrong in this round of joining."""
        self._retry_s = JOIN_RETRY_S
        self._repairing = False
        beliefs.on_namesake = self._repair_soon
        self._was_alone = False
        """When the last round began."""
        self._remembering = False
        self._remembered_at = float("-inf")

    def start(self, now: float) -> None:
        """Join, and begin the repairs."""
        profile, random = self._shared.profile, self._shared.random
        self._join(now)
        self._shared.timers.at(now + random.random() * profile.push_pull_interval_s, self._repair)
        self._shared.timers.at(now + random.uniform(0.5, 1.0) * profile.reconnect_interval_s, self._reconnect)

    # --- joining --------------------------------------------------------------------------------------------------

    def _is_alone(self) -> bool:
        return self._shared.table.there <= 1

    def _join(self, now: float) -> None:
        """A round: look all seeds up. While nobody is there, ask the members of the last run, too."""
        if not (self._seeds or self._known) or self._shared.leaving:
            return
        self._reasons.clear()
        for seed in self._seeds:
            if seed not in self._resolving:
                self._resolving.add(seed)
                self._shared.out.append(Resolve(seed))
        self._was_alone = self._is_alone()
        if self._was_alone:
            for endpoint in self._pick(self._known):
                self._exchange(endpoint, now, join=True)
            self._shared.timers.at(now + self._retry_s * self._shared.random.uniform(0.75, 1.25), self._rejoin)
        else:
            self._shared.timers.at(now + SEED_RETRY_S, self._rejoin)

    def _rejoin(self, now: float) -> None:
        if not self._is_alone():
            self._retry_s = JOIN_RETRY_S
        elif self._was_alone and not self._shared.leaving and (self._reasons or not self._waits()):
            self._retry_s = min(2 * self._retry_s, JOIN_RETRY_S_MAX)
            if self._reasons:  # else every seed is this node itself: the first one of a list that all nodes have
                self._shared.counters.joins_failed += 1
                self._shared.out.append(Notify(JoinFailed(tuple(self._reasons), self._retry_s)))
        self._join(now)

    def _waits(self) -> bool:
        """Whether something of the last round may still work out."""
        return bool(self._under_way or self._resolving)

    def on_resolved(self, event: Resolved, now: float) -> None:
        """A seed was looked up. One of its addresses that is a member already is nearly enough."""
        self._resolving.discard(event.seed)
        if event.error:
            self._note(f"{event.seed}: {event.error}")
        own = self._shared.own.endpoint
        members = {node.endpoint for node in self._shared.table if not node.is_gone}
        others = [endpoint for endpoint in event.endpoints if endpoint != own]
        strangers = [endpoint for endpoint in others if endpoint not in members]
        if len(strangers) < len(others):
            # Some are members; the rest may be gone, or be another mesh behind the same name. All members together try
            # one of them at a time.
            seldom = strangers and self._shared.random.random() * self._shared.table.there < 1
            strangers = self._shared.random.sample(strangers, 1) if seldom else []
        for endpoint in self._pick(strangers):
            self._exchange(endpoint, now, join=True, seed=event.seed)

    def dialled(self) -> list[Endpoint]:
        """Who has this node's state, or gets it just now, and may not be known here yet."""
        return [other.target for other in self._under_way.values()]

    def hear_of(self, stranger: Endpoint, now: float) -> None:
        """A node that is not known here pings this one, so it knows it: from before a restart, most likely. Whoever is
        alone joins it. A few at a time: a packet's source is easily forged."""
        dialled = sum(one.join and not one.seed for one in self._under_way.values())
        if self._is_alone() and stranger != self._shared.own.endpoint and dialled < 2 * JOIN_DIALS_MAX:
            self._exchange(stranger, now, join=True)

    def _pick(self, endpoints: Sequence[Endpoint]) -> list[Endpoint]:
        return self._shared.random.sample(endpoints, min(len(endpoints), JOIN_DIALS_MAX))

    def _note(self, reason: str) -> None:
        if len(self._reasons) < 4 * JOIN_DIALS_MAX:
            self._reasons.append(reason)

    # --- repair and reconnect -------------------------------------------------------------------------------------

    def _repair(self, now: float) -> None:
        shared, profile = self._shared, self._shared.profile
        self.repair_once(now)
        interval_s = push_pull_interval_s(
            profile.push_pull_interval_s, shared.table.there, linear=profile.push_pull_linear
        )
        shared.timers.at(now + interval_s, self._repair)

    def _repair_soon(self, now: float) -> None:
        """Whoever has this node's name may be its own earlier start, under a clock that was set back since. Once that
        is found dead, an exchange tells what there is to refute; so one is made again and again, and not only at the
        next repair."""
        if not self._repairing:
            self._repairing = True
            self._shared.timers.at(now + self._shared.profile.reconnect_interval_s, self._repair_for_name)

    def _repair_for_name(self, now: float) -> None:
        self._repairing = False
        self.repair_once(now)

    def repair_once(self, now: float) -> None:
        """Exchange everything with one node that is alive."""
        own = self._shared.own
        self._exchange_with_one(lambda node: node.state is ALIVE and node is not own, now)

    def _reconnect(self, now: float) -> None:
        shared = self._shared
        shared.timers.at(now + shared.profile.reconnect_interval_s, self._reconnect)
        failed = sum(node.state is DEAD for node in shared.table)
        # The mesh together makes one attempt an interval for each that failed, however many nodes it has.
        if failed and shared.random.random() < failed / max(shared.table.there, 1):
            self._exchange_with_one(lambda node: node.state is DEAD, now)

    def _exchange_with_one(self, wanted: Callable[[Node], bool], now: float) -> None:
        for node in self._shared.table.some(1, wanted):
            self.exchange_with(node, now)

    def exchange_with(self, node: Node, now: float) -> None:
        """Exchange everything with this node."""
        self._exchange(node.endpoint, now, join=False)

    # --- the exchange itself --------------------------------------------------------------------------------------

    def _exchange(self, target: Endpoint, now: float, *, join: bool, seed: str = "") -> None:
        if self._shared.leaving or any(target == other.target for other in self._under_way.values()):
            return
        number = self._shared.number()
        self._under_way[number] = _UnderWay(target, join, seed)
        timeout_s = self._shared.profile.stream_timeout_s
        self._shared.out.append(Exchange(number, target, self._beliefs.state(join=join), timeout_s))
        # Whoever performs it reports its end. Should that get lost, the target must not stay blocked for ever.
        self._shared.timers.at(now + 2 * timeout_s, partial(self._abandon, number))

    def _abandon(self, number: int, _now: float) -> None:
        self._under_way.pop(number, None)

    def on_exchanged(self, number: int, state: PushPull, now: float) -> None:
        """The answer to an exchange of ours."""
        under_way = self._under_way.pop(number, None)
        if under_way is None:
            return
        problem = self._beliefs.problem_with(state)
        if problem is not None:
            self._shared.counters.incompatible += 1
            self._note(problem)
            return
        self._shared.counters.exchanges += 1
        if self._beliefs.merge(state, now):
            self._shared.out.append(SendPacket(under_way.target, (self._shared.own.alive(),)))

    def on_failed(self, number: int, reason: str) -> bool:
        """An exchange of ours got nowhere. False when the number is not one of an exchange."""
        under_way = self._under_way.pop(number, None)
        if under_way is None:
            return False
        self._shared.counters.exchanges_failed += 1
        if under_way.join:
            of_seed = under_way.seed and not reason.startswith(under_way.seed)
            self._note(f"{under_way.seed}: {reason}" if of_seed else reason)
        return True

    def on_pulled(self, event: Pulled, now: float) -> None:
        """A peer began an exchange."""
        problem = self._beliefs.problem_with(event.state)
        if problem is not None:
            self._shared.counters.incompatible += 1
            self._shared.out.append(RefusePull(event.token, problem))
            return
        self._shared.counters.exchanges += 1
        self._beliefs.merge(event.state, now)
        self._shared.out.append(AnswerPull(event.token, self._beliefs.state(join=event.state.join)))

    # --- the next start -------------------------------------------------------------------------------------------

    def remember_soon(self, now: float) -> None:
        """The members changed. The first are remembered at once; a further change a little later, since members seldom
        change alone."""
        if not self._remembering:
            self._remembering = True
            self._shared.timers.at(max(now, self._remembered_at + REMEMBER_S), self._remember)

    def _remember(self, now: float) -> None:
        self._remembering, self._remembered_at = False, now
        own = self._shared.own
        there = [node.endpoint for node in self._shared.table if node is not own and node.state is not LEFT]
        self._shared.out.append(Remember(tuple(there[:MEMBERS_REMEMBERED_MAX])))
