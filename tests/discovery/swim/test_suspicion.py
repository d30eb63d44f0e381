"""One suspicion: memberlist's table (suspicion_test.go), with its times worked out by hand."""

from __future__ import annotations

import pytest

from kvmesh.discovery.swim.suspicion import Suspicion


@pytest.mark.parametrize(
    ("accusers", "news", "confirmations", "lasts_s"),
    [
        # half a second at least, two at most, three confirmations wanted: 2 - log(n + 1) / log(4) * 1.5
        ([], [], 0, 2.0),
        (["me", "foo"], [False, True], 1, 1.25),
        (["me", "foo", "foo", "foo"], [False, True, False, False], 1, 1.25),
        (["me", "foo", "bar"], [False, True, True], 2, 0.811),
        (["me", "foo", "bar", "baz"], [False, True, True, True], 3, 0.5),
        (["me", "foo", "bar", "baz", "zoo"], [False, True, True, True, False], 3, 0.5),
    ],
)
def test_each_new_accuser_brings_the_end_nearer(
    accusers: list[str], news: list[bool], confirmations: int, lasts_s: float
):
    suspicion = Suspicion("me", wanted=3, min_s=0.5, max_s=2.0, now=100.0)
    assert [suspicion.confirm(accuser) for accuser in accusers] == news
    assert suspicion.confirmations == confirmations
    assert suspicion.deadline == pytest.approx(100.0 + lasts_s, abs=0.001)


def test_where_nobody_could_confirm_it_lasts_its_shortest_time():
    suspicion = Suspicion("me", wanted=0, min_s=0.5, max_s=2.0, now=100.0)
    assert not suspicion.confirm("foo")
    assert suspicion.deadline == 100.5


def test_the_deadline_may_be_in_the_past_once_it_is_confirmed():
    suspicion = Suspicion("me", wanted=1, min_s=0.5, max_s=2.0, now=100.0)
    assert suspicion.confirm("foo")  # heard at 101.9, say
    assert suspicion.deadline == 100.5


def test_a_restart_keeps_what_is_confirmed_and_counts_from_now():
    suspicion = Suspicion("me", wanted=3, min_s=0.5, max_s=2.0, now=100.0)
    suspicion.confirm("foo")
    suspicion.restart(200.0)
    assert suspicion.deadline == pytest.approx(201.25)
    assert suspicion.half_time == 200.25
    assert not suspicion.confirm("foo")
    assert suspicion.confirm("bar")
    assert suspicion.deadline == pytest.approx(200.811, abs=0.001)


def test_it_remembers_no_more_accusers_than_it_wants():
    suspicion = Suspicion("me", wanted=3, min_s=0.5, max_s=2.0, now=100.0)
    for number in range(1000):
        suspicion.confirm(f"accuser {number}")
    assert len(suspicion._accusers) == 4
