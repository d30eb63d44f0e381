"""The failure detector: one node at a time is asked whether it is there, and judged when nobody reaches it.

    ping, again and again ──(no ack within probe_timeout_s)──▶ pings through others too, and one over a stream
         ──(no ack until the interval is over, and no stream)──▶ suspect

An ack may come late, or through another node: any that comes before the end saves the target. Those that were asked say
when they got no answer either (nack); silence from them too means that this node itself hears badly (`Awareness`), and
makes its next intervals longer. This module also answers the pings of others, and pings for them.

Sources: Das, Gupta, Motivala 2002 (SWIM); Dadgar et al. 2018 (Lifeguard); memberlist, state.go.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Final

from kvmesh.discovery.wire.messages import Ack, Endpoint, IndirectPing, Nack, Ping, Suspect
from kvmesh.transport.limits import RELAYS_MAX

from .base import Shared
from .beliefs import Beliefs
from .events import StreamPing
from .exchanging import Exchanger
from .nodes import ALIVE, Node
from .suspicion import Suspicion

NAMESAKE_S: Final = 3.0
"""So long two processes must be heard from in one name until that is a conflict: packets of an earlier start may come
after a restart at another address."""


@dataclass(slots=True, eq=False)
class _Probe:
    number: int
    node: Node
    incarnation: int
    sent_at: float
    until: float
    others_asked: bool = False
    asked: int = 0
    """Others that were asked to help, and would say that they failed."""
    nacks: int = 0
    is_first: bool = True
    """One ping was sent, and nobody else was asked: an ack now measures the round trip."""
    streamed: bool = False
    """It answered over a stream."""


@dataclass(slots=True, eq=False)
class _Relay:
    """A probe for somebody else."""

    target: Endpoint
    number: int


class Prober:
    """See above."""

    def __init__(self, shared: Shared, beliefs: Beliefs, exchanger: Exchanger) -> None:
        self._shared = shared
        self._beliefs = beliefs
        self._exchanger = exchanger
        self._probe: _Probe | None = None
        self._insisted: dict[int, tuple[Node, Suspicion]] = {}
        """Pings to suspects that were not answered yet."""
        if shared.profile.insist_interval_s:
            beliefs.on_suspicion = self._on_suspicion
        self._relays: dict[int, _Relay] = {}
        self._next_at = 0.0

    def start(self, now: float) -> None:
        """Begin at a random moment: nodes that were started together do not probe together."""
        self._next_at = now + self._shared.random.random() * self._shared.profile.probe_interval_s
        self._shared.timers.at(self._next_at, self._begin)

    def forget(self, now: float) -> None:
        """This process did not run for a while: no probe from before says anything."""
        self._relays.clear()
        self._insisted.clear()
        if self._probe is not None:
            self._end(now)

    def _begin(self, now: float) -> None:
        shared, interval_s = self._shared, self._shared.profile.probe_interval_s
        self._next_at = now + interval_s
        node = shared.table.next_to_probe(shared.own, now)
        if node is None or shared.leaving:
            shared.timers.at(self._next_at, self._begin)
            return
        shared.counters.probes += 1
        until = now + shared.awareness.scaled_s(interval_s)
        probe = self._probe = _Probe(shared.number(), node, node.incarnation, now, until)
        ping = self._ping(probe.number, node.name)
        if node.state is ALIVE:
            shared.send(node.endpoint, ping)
        else:  # the suspect hears at once what is said of it
            shared.send(node.endpoint, ping, Suspect(node.incarnation, node.name, shared.own.name))
        shared.timers.at(now + shared.profile.probe_timeout_s, partial(self._ask_others, probe))
        if shared.profile.ping_interval_s:
            shared.timers.at(now + shared.profile.ping_interval_s, partial(self._ping_again, probe))

    def _ping_again(self, probe: _Probe, now: float) -> None:
        if self._probe is not probe:
            return
        probe.is_first = False
        next_at = now + self._shared.profile.ping_interval_s
        self._shared.send(probe.node.endpoint, self._ping(probe.number, probe.node.name))
        if probe.others_asked:
            # Others, most likely. Their nacks would come after the verdict, so none are wanted.
            self._ask(self._helpers(probe.node), probe, nack=False)
        if next_at < probe.until:
            self._shared.timers.at(next_at, partial(self._ping_again, probe))

    def _ask_others(self, probe: _Probe, now: float) -> None:
        if self._probe is not probe:
            return
        probe.is_first, probe.others_asked = False, True
        shared, node = self._shared, probe.node
        shared.counters.probes_indirect += 1
        helpers = self._helpers(node)
        probe.asked += sum(helper.sends_nack for helper in helpers)
        self._ask(helpers, probe, nack=True)
        left_s = max(probe.until - now, 0.0)
        shared.out.append(StreamPing(probe.number, node.endpoint, self._ping(probe.number, node.name), left_s))
        shared.timers.at(probe.until, partial(self._judge, probe))

    def _helpers(self, node: Node) -> list[Node]:
        """Some that are alive, to ask `node` for this one."""
        own = self._shared.own
        return self._shared.table.some(
            self._shared.profile.indirect_checks,
            lambda other: other.state is ALIVE and other is not node and other is not own,
        )

    def _ask(self, helpers: list[Node], probe: _Probe, *, nack: bool) -> None:
        own, (ip, port) = self._shared.own, probe.node.endpoint
        own_ip, own_port = own.endpoint
        for helper in helpers:
            wants_nack = nack and helper.sends_nack
            asked = IndirectPing(probe.number, ip, port, probe.node.name, wants_nack, own_ip, own_port, own.name)
            self._shared.send(helper.endpoint, asked)

    def _judge(self, probe: _Probe, now: float) -> None:
        if self._probe is not probe:
            return
        shared = self._shared
        if probe.streamed:
            shared.counters.probes_saved_by_stream += 1
            shared.awareness.add(-1)
        else:
            shared.counters.probes_failed += 1
            shared.awareness.add(max(probe.asked - probe.nacks, 0) if probe.asked else 1)
            self._beliefs.on_suspect(Suspect(probe.incarnation, probe.node.name, shared.own.name), now)
        self._end(now)

    def _end(self, now: float) -> None:
        self._probe = None
        self._shared.timers.at(max(self._next_at, now), self._begin)

    def _ping(self, number: int, name: str) -> Ping:
        own = self._shared.own
        return Ping(number, name, own.endpoint.ip, own.endpoint.port, own.name)

    # --- what comes back ------------------------------------------------------------------------------------------

    def on_ack(self, ack: Ack, now: float) -> None:
        """Somebody is there: the one that this node probes, or one that it asked for another."""
        probe = self._probe
        if probe is not None and ack.seq == probe.number:
            probe.node.seen_at = now
            if probe.is_first:
                probe.node.measured(max(now - probe.sent_at, 0.0))
            self._shared.awareness.add(-1)
            self._end(now)
        elif (relay := self._relays.pop(ack.seq, None)) is not None:
            self._shared.send(relay.target, Ack(relay.number))
        elif (insisted := self._insisted.pop(ack.seq, None)) is not None:
            self._on_suspect_there(*insisted, now)

    def on_nack(self, nack: Nack) -> None:
        """One of those that were asked got no answer either. So it is not this node that hears badly."""
        if self._probe is not None and nack.seq == self._probe.number:
            self._probe.nacks += 1

    def on_stream_pinged(self, number: int) -> None:
        """The node answered over a stream. Its acks may still come: the verdict waits for the end of the interval."""
        if self._probe is not None and number == self._probe.number:
            self._probe.streamed = True

    # --- suspects -------------------------------------------------------------------------------------------------

    def _on_suspicion(self, node: Node, suspicion: Suspicion, _now: float) -> None:
        self._shared.timers.at(suspicion.half_time, partial(self._insist, node, suspicion))

    def _insist(self, node: Node, suspicion: Suspicion, now: float) -> None:
        """Ask the suspect itself, while there is time: its refutation may have been missed here. Others have it, so the
        fewer miss it, the fewer ask."""
        if node.suspicion is not suspicion:
            return
        shared = self._shared
        if now < suspicion.half_time:  # it answered meanwhile, and the suspicion began anew
            shared.timers.at(suspicion.half_time, partial(self._insist, node, suspicion))
            return
        shared.timers.at(now + shared.profile.insist_interval_s, partial(self._insist, node, suspicion))
        if len(self._insisted) >= RELAYS_MAX:
            shared.counters.refused += 1
            return
        number = shared.number()
        self._insisted[number] = (node, suspicion)
        shared.send(node.endpoint, self._ping(number, node.name), Suspect(node.incarnation, node.name, shared.own.name))
        shared.timers.at(now + shared.profile.stream_timeout_s, partial(self._stop_insisting, number))

    def _stop_insisting(self, number: int, _now: float) -> None:
        self._insisted.pop(number, None)

    def _on_suspect_there(self, node: Node, suspicion: Suspicion, now: float) -> None:
        """It answered. One of ours refutes in the same packet; of another, a push/pull fetches what was missed."""
        node.seen_at = now
        if node.suspicion is suspicion:
            suspicion.restart(now)
            if now >= suspicion.fetched_at + self._shared.profile.stream_timeout_s:
                # Not at each answer: one that cannot refute (an accusation of the last incarnation) would be asked for
                # everything by everybody, all the time.
                suspicion.fetched_at = now
                self._exchanger.exchange_with(node, now)

    # --- the probes of others -------------------------------------------------------------------------------------

    def on_ping(self, ping: Ping, source: Endpoint, now: float, *, is_accused: bool) -> None:
        """Answer, if the ping is for this node and not for one that had the address before. Whoever suspects this node
        gets the refutation with the answer, and need not wait for gossip."""
        shared = self._shared
        if ping.node and ping.node != shared.own.name:
            shared.counters.pings_misdirected += 1
            return
        node = shared.table.get(ping.source_node)
        if node is None:
            if ping.source_node:
                self._exchanger.hear_of(source, now)
        elif node is not shared.own:
            self._on_pinged_by(node, ping, source, now)
        answer = Ack(ping.seq)
        if is_accused and not shared.leaving:
            shared.send(self._reply_to(ping, source), answer, shared.own.alive())
        else:
            shared.send(self._reply_to(ping, source), answer)

    def _on_pinged_by(self, node: Node, ping: Ping, source: Endpoint, now: float) -> None:
        """A ping in the name of `node`. One from another address may be of a new start that was not heard of yet, or a
        late one of an earlier start; when both addresses go on talking, two processes have the name."""
        said = Endpoint(ping.source_ip, ping.source_port)
        if said == node.endpoint:
            node.seen_at = now
        elif said == source and node.state is ALIVE:
            if node.namesake is None or node.namesake[0] != source:
                node.namesake = (source, now)
            elif node.seen_at > node.namesake[1] and now - node.namesake[1] >= NAMESAKE_S:
                self._shared.counters.conflicts += 1
                self._shared.app.on_conflict(node, source, now)

    def on_indirect_ping(self, asked: IndirectPing, source: Endpoint, now: float) -> None:
        """Ping a node for another one. Only a node that is known here, and where it is known to be: this one does not
        send packets to wherever a stranger says."""
        shared = self._shared
        node = shared.table.get(asked.node)
        if len(self._relays) >= RELAYS_MAX or node is None or node is shared.own:
            shared.counters.refused += 1
            return
        shared.counters.relayed += 1
        number = shared.number()
        self._relays[number] = _Relay(self._reply_to(asked, source), asked.seq)
        shared.send(node.endpoint, self._ping(number, asked.node))
        shared.timers.at(now + shared.profile.probe_timeout_s, partial(self._give_up, number, asked.nack))

    def _give_up(self, number: int, nack: bool, _now: float) -> None:
        relay = self._relays.pop(number, None)
        if relay is not None and nack:
            self._shared.send(relay.target, Nack(relay.number))

    def _reply_to(self, asked: Ping | IndirectPing, source: Endpoint) -> Endpoint:
        """Where the asker wants its answer, if that is where it is known to be; else where its packet came from: a
        packet with a forged source must not make this node send to a third one."""
        node = self._shared.table.get(asked.source_node)
        wanted = Endpoint(asked.source_ip, asked.source_port)
        is_known = node is not None and node is not self._shared.own and node.endpoint == wanted
        return wanted if is_known else source
