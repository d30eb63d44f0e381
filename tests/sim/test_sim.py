"""Some seeds of the simulator with every test run (``make sim`` runs hundreds), and proof that a seed can fail."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from kvmesh.discovery.actions import Action, Event
from kvmesh.discovery.gossip import GossipMembership
from kvmesh.discovery.membership import Member, MemberState
from kvmesh.discovery.swim.events import SwimEvent
from tests.sim.__main__ import LOSSES, main, run_seed
from tests.sim.kinds import gossip_kind
from tests.sim.scenario import Report, Scenario


@pytest.mark.slow  # 90 to 160 virtual seconds of four nodes each
@pytest.mark.parametrize(
    ("membership", "seed"), [("static", seed) for seed in range(10)] + [("gossip", seed) for seed in range(20)]
)
def test_all_memberships_and_maps_are_true_after_the_calm(membership: str, seed: int) -> None:
    report = run_seed((seed, 4, LOSSES[seed % len(LOSSES)], membership))
    assert not report.problems, f"replay: {report.replay}"


@pytest.mark.slow  # one seed, twice
@pytest.mark.parametrize("membership", ["static", "gossip"])
def test_a_seed_replays_exactly(membership: str) -> None:
    first, second = (_with_events(Scenario(5, nodes=3, loss=0.1, membership=membership)) for _ in range(2))
    assert first == second
    assert first[0].messages > 0
    assert len(first[1]) > 10


def _with_events(scenario: Scenario) -> tuple[Report, list[str]]:
    """The report, and every event that any membership told, with its time."""
    told: list[str] = []
    scenario.on_notice.append(lambda viewer, event: told.append(f"{scenario.now} {viewer.name} {event}"))
    return scenario.run(), told


class _Gullible(GossipMembership):
    """Believes that nobody ever dies."""

    def member(self, name: str) -> Member | None:
        member = super().member(name)
        return None if member is None else replace(member, state=MemberState.ALIVE)


class _Sleepy(GossipMembership):
    """Asks for no tick any more after a while."""

    def handle(self, event: Event | SwimEvent, now: float) -> list[Action]:
        actions = super().handle(event, now)
        return [action for action in actions if now < 1060.0 or "Wake" not in repr(action)]


@pytest.mark.slow  # some seeds each
@pytest.mark.parametrize("broken", [_Gullible, _Sleepy])
def test_a_broken_membership_is_caught(broken: type[GossipMembership]) -> None:
    reports = [
        Scenario(seed, nodes=4, loss=0.0, membership="gossip", kind=gossip_kind(made=broken)).run() for seed in range(4)
    ]
    assert any(report.problems for report in reports)


@pytest.mark.slow  # one seed
def test_the_command_prints_a_table_and_succeeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "1", "--nodes", "3", "--membership", "static", "--processes", "1"]) == 0
    out = capsys.readouterr().out
    assert "all_know_p99_s" in out
    assert "1 seeds in" in out


@pytest.mark.slow  # figures of a few nodes
def test_the_command_prints_figures_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--figures", "quick", "--only", "knowing 30", "--profile", "lan", "--json", "--processes", "1"])
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert {"name", "profile", "value", "unit", "goal", "met"} == set(figures[0])
    assert any(figure["goal"] is not None for figure in figures)
    assert all(figure["met"] is not False for figure in figures)


def test_an_exception_is_a_problem_of_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Scenario) -> Report:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(Scenario, "run", fail)
    report = run_seed((3, 4, 0.1, "gossip"))
    assert report.problems == ["ZeroDivisionError: oh"]
    assert report.replay == "python -m tests.sim --membership gossip --first 3 --seeds 1 --nodes 4 --loss 0.1"
