"""What a message about a node changes here. The theory is one order:

    (incarnation, state), with alive < suspect < dead < left; the larger one is believed, whatever came first

Only the node itself makes its incarnation grow: to refute what is said of it. So views that got the same messages in
any order are the same, incarnations never go back, and a node that left does not return by an old rumour. memberlist
(state.go) has the same rules but for two gaps that depend on the order: there, *dead* before *left* stays dead, and a
suspicion of a newer incarnation does not wake a dead node.

An address belongs to a name until the process behind it is gone, or a later start of it speaks (`compare_starts`);
another process that uses the name is a conflict, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from kvmesh.discovery.wire.messages import (
    APPLICATION_CURRENT,
    APPLICATION_MAX,
    APPLICATION_MIN,
    PROTOCOL_CURRENT,
    PROTOCOL_MAX,
    PROTOCOL_MIN,
    Alive,
    Dead,
    Endpoint,
    PushedNode,
    PushPull,
    Suspect,
)
from kvmesh.transport.limits import INCARNATION_MAX

from .base import Change, Shared
from .nodes import ALIVE, DEAD, LEFT, SUSPECT, Node
from .suspicion import Suspicion
from .timers import NEVER
from .timing import confirmations_wanted, suspicion_timeout_s


class Beliefs:
    """Takes claims about nodes, and keeps `shared.table`."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self.on_suspicion: Callable[[Node, Suspicion, float], None] = _nothing
        """Called when a suspicion begins."""
        self.on_namesake: Callable[[float], None] = _nothing
        """Called when another process has this one's name; or had, and is not found dead yet."""
        self._own = shared.own
        self._counters = shared.counters

    # --- alive ----------------------------------------------------------------------------------------------------

    def on_alive(self, claim: Alive, now: float) -> None:
        """Somebody says that a node is there."""
        if not _speaks(claim.versions):
            self._counters.incompatible += 1
            return
        if claim.node == self._own.name:
            self._on_alive_about_me(claim, now)
            return
        node = self._shared.table.get(claim.node)
        if node is None:
            node = self._new(claim, now)
        elif not self._may_speak(node, claim, now):
            return
        if node is not None:
            self._take_alive(node, claim, now)

    def _new(self, claim: Alive, now: float) -> Node | None:
        node = Node(claim.node, claim.endpoint, claim.meta, claim.versions, -1, DEAD, now, now)
        if not self._shared.table.add(node):
            self._counters.refused += 1
            return None
        return node

    def _may_speak(self, node: Node, claim: Alive, now: float) -> bool:
        """Whether the claim is about the process that has the name, and is news."""
        if claim.endpoint == node.endpoint:
            return claim.incarnation > node.incarnation
        order = self._shared.app.compare_starts(node.meta, claim.meta)
        if order is not None and order > 0:
            return True
        if order is None and node.is_gone:
            # Neither says when it started, so memberlist's rule: who left makes room, who died does after a while.
            reclaim_s = self._shared.profile.dead_reclaim_s
            if node.state is LEFT or 0 < reclaim_s < now - node.changed_at:
                return True
        elif order is not None and order < 0 and node.is_gone:
            # The clock was set back before a restart, or the latest of several was the first to go.
            return claim.incarnation > node.incarnation
        if order is not None and order < 0 and claim.incarnation <= node.incarnation:
            self._counters.stale += 1
        elif not node.is_gone:
            self._counters.conflicts += 1
            self._shared.app.on_conflict(node, claim.endpoint, now)
        return False

    def _take_alive(self, node: Node, claim: Alive, now: float) -> None:
        was = node.state
        differs = (node.meta, node.endpoint) != (claim.meta, claim.endpoint)
        node.incarnation = max(node.incarnation, claim.incarnation)
        node.meta, node.endpoint, node.versions = claim.meta, claim.endpoint, claim.versions
        node.seen_at, node.namesake = now, None
        if was is not ALIVE:
            self._shared.table.set_state(node, ALIVE, now)
        self._shared.rumour(node.name, claim, now)
        if was >= DEAD:
            self._shared.app.on_change(node, Change.JOINED, now)
        elif differs:
            self._shared.app.on_change(node, Change.UPDATED, now)
        elif was is SUSPECT:
            self._shared.app.on_change(node, Change.TRUSTED, now)

    def _on_alive_about_me(self, claim: Alive, now: float) -> None:
        own = self._own
        if self._shared.leaving:
            return
        if claim.endpoint != own.endpoint:
            order = self._shared.app.compare_starts(own.meta, claim.meta)
            if order is None or order >= 0:
                self._counters.conflicts += 1
                self._shared.app.on_conflict(own, claim.endpoint, now)
                self.on_namesake(now)
                return
        if claim.incarnation < own.incarnation:
            return
        if claim.incarnation == own.incarnation and (claim.meta, claim.versions) == (own.meta, own.versions):
            return
        self._refute(claim.incarnation, now)  # words of an earlier start of this process

    # --- suspect and dead -----------------------------------------------------------------------------------------

    def on_suspect(self, claim: Suspect, now: float) -> None:
        """Somebody got no answer from a node."""
        node = self._shared.table.get(claim.node)
        if node is None or claim.incarnation < node.incarnation:
            return
        if node is self._own:
            if not self._shared.leaving:
                self._refute(claim.incarnation, now)
            return
        if node.suspicion is not None and claim.incarnation == node.incarnation:
            if node.suspicion.confirm(claim.accuser):
                self._shared.rumour(node.name, claim, now)
                self._await_verdict(node, node.suspicion, now)
            return
        was = node.state
        if was >= DEAD and claim.incarnation == node.incarnation:
            return
        self._suspect(node, claim, now)
        if was >= DEAD:
            self._shared.app.on_change(node, Change.JOINED, now)
        if was is not SUSPECT:  # else it refuted the last one, unheard here: this one gets its full time
            self._shared.app.on_change(node, Change.SUSPECTED, now)

    def _suspect(self, node: Node, claim: Suspect, now: float) -> None:
        shared, profile = self._shared, self._shared.profile
        self._counters.suspicions += 1
        node.incarnation = claim.incarnation
        shared.table.set_state(node, SUSPECT, now)
        shared.rumour(node.name, claim, now)
        nodes = shared.table.there
        scaled_s = suspicion_timeout_s(profile.suspicion_mult, nodes, profile.probe_interval_s)
        min_s = max(scaled_s, profile.suspicion_min_s)
        node.suspicion = Suspicion(
            claim.accuser,
            wanted=confirmations_wanted(profile.suspicion_mult, nodes),
            min_s=min_s,
            max_s=min_s * profile.suspicion_max_timeout_mult,
            now=now,
        )
        self._await_verdict(node, node.suspicion, now)
        self.on_suspicion(node, node.suspicion, now)

    def _await_verdict(self, node: Node, suspicion: Suspicion, now: float) -> None:
        """Come back at the deadline. A timer that comes sooner will look again: whoever accuses and refutes a node in
        turn does not fill the memory with timers. A deadline in the past is due now: a timer of then would be late, and
        look as if this process had not run."""
        at = max(now, suspicion.deadline)
        if at < node.verdict_at:
            node.verdict_at = at
            self._shared.timers.at(at, partial(self._on_verdict, node, at))

    def _on_verdict(self, node: Node, at: float, now: float) -> None:
        if node.verdict_at != at:
            return
        node.verdict_at = NEVER
        suspicion = node.suspicion
        if suspicion is None:
            return
        if now < suspicion.deadline:
            self._await_verdict(node, suspicion, now)
            return
        self._counters.deaths += 1
        self.on_dead(Dead(node.incarnation, node.name, self._own.name), now)

    def on_dead(self, claim: Dead, now: float) -> None:
        """Somebody holds a node for dead; or it said itself that it leaves."""
        node = self._shared.table.get(claim.node)
        state = LEFT if claim.accuser == claim.node else DEAD
        if node is None or (claim.incarnation, state) <= (node.incarnation, node.state):
            return
        if node is self._own and not self._shared.leaving:
            self._refute(claim.incarnation, now)
            return
        was = node.state
        node.incarnation = claim.incarnation
        self._shared.table.set_state(node, state, now)
        self._shared.rumour(node.name, claim, now)
        if node is not self._own and (was < DEAD or state is not was):
            self._shared.app.on_change(node, Change.LEFT if state is LEFT else Change.FAILED, now)

    def forgive(self, now: float) -> None:
        """This process did not run for a while: what it suspects may have answered meanwhile."""
        for node in self._shared.table:
            node.verdict_at = NEVER
            if node.suspicion is not None:
                node.suspicion.restart(now)
                self._await_verdict(node, node.suspicion, now)

    # --- this node ------------------------------------------------------------------------------------------------

    def announce(self, now: float) -> None:
        """Tell the mesh what this node says of itself."""
        self._shared.rumour(self._own.name, self._own.alive(), now)

    def leave(self, now: float) -> None:
        """Tell the mesh that this node goes."""
        self._shared.leaving = True
        self.on_dead(Dead(self._own.incarnation, self._own.name, self._own.name), now)

    def _refute(self, accused: int, now: float) -> None:
        """Say that this node is alive, louder than the accusation."""
        self._counters.refutations += 1
        self._own.incarnation = min(max(self._own.incarnation, accused) + 1, INCARNATION_MAX)
        self._shared.awareness.add(1)
        self.announce(now)

    # --- push/pull ------------------------------------------------------------------------------------------------

    def state(self, *, join: bool) -> PushPull:
        """All that is believed, for a push/pull."""
        nodes = tuple(node.pushed() for node in self._shared.table)
        return PushPull(join, nodes, self._shared.app.state())

    def problem_with(self, state: PushPull) -> str | None:
        """Why the sender of this state cannot be in one mesh with this node; None when it can."""
        for node in state.nodes:
            if node.state == ALIVE and not _speaks(node.versions):
                return (
                    f"node {node.name} speaks the protocol versions {node.versions.hex(' ')}, which this one does not"
                )
        return None

    def merge(self, state: PushPull, now: float) -> bool:
        """Take over what a peer believes. True when it accused this node, which then refuted."""
        before = self._counters.refutations
        for pushed in state.nodes:
            self._merge_one(pushed, now)
        if state.user_state:
            self._shared.app.on_state(state.user_state, now)
        return self._counters.refutations > before

    def _merge_one(self, pushed: PushedNode, now: float) -> None:
        name, incarnation = pushed.name, pushed.incarnation
        node = self._shared.table.get(name)
        if (
            node is not None
            and pushed.state == node.state == ALIVE
            and incarnation <= node.incarnation
            and (pushed.ip, pushed.port) == node.endpoint
            and node is not self._own
        ):
            return  # most of a push/pull is known: it is passed over quickly
        if pushed.state == ALIVE:
            self.on_alive(Alive(incarnation, name, pushed.ip, pushed.port, pushed.meta, pushed.versions), now)
        elif pushed.state == LEFT:
            self.on_dead(Dead(incarnation, name, name), now)
            self._take_last_start(node, pushed)
        elif pushed.state == DEAD and node is not None and node.is_gone:
            self.on_dead(Dead(incarnation, name, self._own.name), now)
            self._take_last_start(node, pushed)
        else:
            # Dead for them may be their own mistake: here it is a suspicion, and the node gets time to refute.
            self.on_suspect(Suspect(incarnation, name, self._own.name), now)

    def _take_last_start(self, node: Node | None, pushed: PushedNode) -> None:
        """Of a node that started again and was gone before this one heard of it: that was its last start."""
        if node is None or node is self._own or not node.is_gone or pushed.incarnation < node.incarnation:
            return
        if (self._shared.app.compare_starts(node.meta, pushed.meta) or 0) > 0:
            node.meta, node.endpoint, node.versions = pushed.meta, Endpoint(pushed.ip, pushed.port), pushed.versions


def _nothing(*_: object) -> None:
    pass


def _speaks(versions: bytes) -> bool:
    """Whether a node with these versions and this one understand each other. Without versions nobody knows."""
    if len(versions) < 6:
        return True
    low, high, current, app_low, app_high, app_current = versions[:6]
    return (
        0 < low <= PROTOCOL_CURRENT <= high
        and PROTOCOL_MIN <= current <= PROTOCOL_MAX
        and app_low <= APPLICATION_CURRENT <= app_high
        and APPLICATION_MIN <= app_current <= APPLICATION_MAX
    )
