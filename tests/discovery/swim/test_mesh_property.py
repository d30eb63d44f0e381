"""Some machines to which everything happens that a network and its hosts can do. Never an exception, never a packet to
oneself, never a timer without its alarm; and once all is calm, they agree, and are right."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from kvmesh.discovery.swim.profile import KVMESH_LAN, LAN
from tests.discovery.swim.world import World

CALM_S = 400.0
"""Nobody needs longer: a suspicion lasts half a minute, a push/pull comes each half, seeds are tried each minute."""
WHO = st.integers(0, 9)


class Mesh(RuleBasedStateMachine):
    """Rules choose by numbers, so that failing runs shrink well."""

    world: World

    @initialize(size=st.integers(2, 4), ours=st.booleans(), seed=st.integers(0, 99), joined=st.booleans())
    def begin(self, size: int, ours: bool, seed: int, joined: bool) -> None:
        self.world = World(size, KVMESH_LAN if ours else LAN, seed)
        if joined:
            self.world.calm(5.0)

    # --- the network ----------------------------------------------------------------------------------------------

    @rule(place=st.integers(0, 1000))
    def arrives(self, place: int) -> None:
        if (parcel := self.world.take(place)) is not None:
            parcel.arrive()

    @rule(place=st.integers(0, 1000))
    def arrives_and_comes_again(self, place: int) -> None:
        if (parcel := self.world.take(place, keep=True)) is not None:
            parcel.arrive()

    @rule(place=st.integers(0, 1000))
    def is_lost(self, place: int) -> None:
        if (parcel := self.world.take(place)) is not None:
            parcel.lose()

    @rule()
    def all_is_lost(self) -> None:
        lost, self.world.flight = self.world.flight, []
        for parcel in lost:
            parcel.lose()

    @rule(seconds=st.sampled_from([0.05, 0.3, 1.0, 6.0]))
    def nothing_arrives_for_a_while(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @rule(seconds=st.sampled_from([0.1, 1.0, 10.0]), loss=st.sampled_from([0.0, 0.3, 0.7]))
    def time_passes(self, seconds: float, loss: float) -> None:
        self.world.calm(seconds, loss=loss)

    @rule(who=WHO, seconds=st.sampled_from([3.0, 30.0]))
    def is_cut_off_for_a_while(self, who: int, seconds: float) -> None:
        world = self.world
        world.cut_off = {world.names[who % len(world.names)]}
        world.calm(seconds)
        world.cut_off = set()

    # --- the hosts ------------------------------------------------------------------------------------------------

    @rule(who=WHO)
    def crashes(self, who: int) -> None:
        running = self.world.running()
        if len(running) > 1:
            running[who % len(running)].state = "crashed"

    @rule(who=WHO)
    def leaves(self, who: int) -> None:
        running = self.world.running()
        if len(running) > 1:
            self.world.stop(running[who % len(running)])

    @rule(who=WHO, elsewhere=st.booleans(), louder=st.booleans())
    @precondition(lambda self: any(one.state in ("crashed", "departed") for one in self.world.processes.values()))
    def starts_again(self, who: int, elsewhere: bool, louder: bool) -> None:
        gone = [one for one in self.world.processes.values() if one.state in ("crashed", "departed")]
        incarnation = 10 * self.world._starts if louder else 1
        self.world.start(gone[who % len(gone)].name, elsewhere=elsewhere, incarnation=incarnation)

    @rule(who=WHO, elsewhere=st.booleans(), after_s=st.sampled_from([0.0, 1.0, 20.0]))
    def crashes_and_starts_again(self, who: int, elsewhere: bool, after_s: float) -> None:
        names = self.world.names
        process = self.world.processes[names[who % len(names)]]
        process.state = "crashed"
        self.world.calm(after_s)
        self.world.start(process.name, elsewhere=elsewhere, incarnation=1)

    @rule(who=WHO)
    def is_paused(self, who: int) -> None:
        running = self.world.running()
        if len(running) > 1:
            running[who % len(running)].state = "is paused"

    @rule(who=WHO)
    @precondition(lambda self: any(one.state == "is paused" for one in self.world.processes.values()))
    def goes_on(self, who: int) -> None:
        paused = [one for one in self.world.processes.values() if one.state == "is paused"]
        self.world.resume(paused[who % len(paused)])

    # --- the end --------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        world = self.world
        for process in world.processes.values():
            if process.state == "is paused":
                world.resume(process)
        until = world.now + CALM_S
        while world.now < until:
            world.calm(2.0)
            if not world.disagreements():
                return
        assert world.disagreements() == []


TestMesh = Mesh.TestCase
TestMesh.settings = settings(max_examples=3 * settings.default.max_examples, stateful_step_count=40)
TestMesh = pytest.mark.slow(TestMesh)  # 300 meshes: with fewer, some of what they are to find is not found
