"""Things to do later."""

from __future__ import annotations

from collections.abc import Callable

from kvmesh.discovery.swim.timers import NEVER, Timers


def noting(log: list[tuple[str, float]], name: str) -> Callable[[float], None]:
    return lambda now: log.append((name, now))


def test_they_run_in_the_order_of_their_times_and_then_of_their_setting():
    timers, log = Timers(), list[tuple[str, float]]()
    for name, when in [("late", 3.0), ("first", 1.0), ("second", 1.0), ("early", 0.5), ("third", 1.0)]:
        timers.at(when, noting(log, name))
    assert timers.next_at() == 0.5
    timers.run(0.4)
    assert log == []
    timers.run(1.0)
    assert log == [("early", 1.0), ("first", 1.0), ("second", 1.0), ("third", 1.0)]
    assert timers.next_at() == 3.0
    timers.run(10.0)
    assert log[4:] == [("late", 10.0)]
    assert timers.next_at() == NEVER
    timers.run(11.0)
    assert len(log) == 5


def test_one_that_sets_itself_for_now_runs_once_a_call():
    timers, log = Timers(), list[float]()

    def again(now: float) -> None:
        log.append(now)
        timers.at(now, again)

    timers.at(1.0, again)
    timers.run(1.0)
    assert log == [1.0]
    assert timers.next_at() == 1.0
    timers.run(1.0)
    assert log == [1.0, 1.0]


def test_all_are_put_off_together_and_keep_their_order():
    timers, log = Timers(), list[tuple[str, float]]()
    for name, when in [("b", 2.0), ("a", 1.0), ("b too", 2.0)]:
        timers.at(when, noting(log, name))
    timers.delay(10.0)
    assert timers.next_at() == 11.0
    timers.run(11.9)
    assert log == [("a", 11.9)]
    timers.run(12.0)
    assert log == [("a", 11.9), ("b", 12.0), ("b too", 12.0)]
