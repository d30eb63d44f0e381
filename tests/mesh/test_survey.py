"""The survey: who is asked, along a chain that many nodes hold in pieces."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from kvmesh.discovery import Run
from kvmesh.price import Stretch
from kvmesh.rates import Path, Rates
from kvmesh.survey import Surveyor
from kvmesh.transport.limits import PLAN_HOLDERS_MAX

KEYS = [bytes([number]) * 32 for number in range(20)]


class Held:
    """A map: which places of `KEYS` each node holds."""

    def __init__(self, places: Mapping[str, Collection[int]], tiers: Mapping[str, str]) -> None:
        self.places = places
        self.tiers = tiers

    def runs(self, keys: Sequence[bytes], start: int = 0, *, exclude: Collection[str] = ()) -> list[Run]:
        found = []
        for node, places in self.places.items():
            count = 0
            while start + count < len(keys) and start + count in places:
                count += 1
            if count and node not in exclude:
                found.append(Run(node, count, self.tiers.get(node, "ram"), count))
        return found

    def forget(self, node: str, key: bytes) -> bool:
        return False


def surveyor(
    places: Mapping[str, Collection[int]],
    *,
    tiers: Mapping[str, str] | None = None,
    gone: Collection[str] = (),
    rates: Rates | None = None,
) -> Surveyor:
    return Surveyor(
        Held(places, tiers or {}),
        rates or Rates(),
        lambda _address: "zmq",
        lambda name: None if name in gone else f"{name}:1",
        lambda _name: 0.25,
        lambda runs: runs.reverse(),
        "r",
    )


def test_holders_of_longer_runs_come_first_and_of_equals_the_faster_tier() -> None:
    found = surveyor(
        {"a": range(5), "b": range(20), "c": range(20), "d": range(20)}, tiers={"b": "disk", "c": "gpu"}
    ).survey(KEYS, 0.0)
    assert [peer.name for peer in found.peers] == ["c", "d", "b", "a"]
    assert found.chunks == 20
    assert found.rtt_s == 0.25


def test_who_goes_on_after_the_end_of_a_run_is_found() -> None:
    places = {"a": range(7), "b": range(5, 12), "c": [0, 1, *range(12, 20)]}
    found = surveyor(places).survey(KEYS, 0.0)
    spans = {peer.name: peer.spans for peer in found.peers}
    assert spans == {"a": [range(7)], "b": [range(7, 12)], "c": [range(2), range(12, 20)]}
    assert found.chunks == 20
    assert found.peers[0].holder(15).spans == (range(7),)
    assert next(p for p in found.peers if p.name == "c").holder(15).spans == (range(2), range(12, 15))


def test_a_hole_ends_the_chain_and_oneself_is_never_asked() -> None:
    found = surveyor({"a": range(4), "r": range(20), "b": range(6, 20)}).survey(KEYS, 0.0)
    assert found.chunks == 4
    assert [peer.name for peer in found.peers] == ["a"]
    assert surveyor({"b": range(1, 20)}).survey(KEYS, 0.0).peers == []


def test_a_node_that_cannot_be_reached_is_left_out() -> None:
    found = surveyor({"a": range(20), "b": range(3)}, gone=["a"]).survey(KEYS, 0.0)
    assert ([peer.name for peer in found.peers], found.chunks) == (["b"], 3)


def test_of_many_holders_those_are_kept_that_carry_the_chain_furthest() -> None:
    places: dict[str, Collection[int]] = {f"n{number}": range(10) for number in range(30)}
    places |= {"tail": range(10, 20)}
    found = surveyor(places).survey(KEYS, 0.0)
    assert len(found.peers) == PLAN_HOLDERS_MAX
    assert "tail" in {peer.name for peer in found.peers}
    assert found.chunks == 20


def test_stretches_have_the_rates_of_their_holders_together() -> None:
    rates = Rates()
    for name in ("a", "b"):
        rates.began(Path(name, "zmq"), 1.0)
        rates.answered(Path(name, "zmq"), 1 << 20, 2.0)
        rates.ended(Path(name, "zmq"), 2.0)
    found = surveyor({"a": range(20), "b": range(5), "c": range(2)}, rates=rates).survey(KEYS, 2.0)
    mib = float(1 << 20)
    assert found.stretches == [Stretch(2, None), Stretch(3, 2 * mib), Stretch(15, mib)]
