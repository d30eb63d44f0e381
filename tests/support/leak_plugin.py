"""The pytest hooks that run tests/support/leaks.py around every test. The root conftest makes them a plugin.

A leak is an error of the test's teardown: the run fails, and the message names the test and the thing. A test that has
failed already is not charged again, since its cleaning up was cut short; processes that it left are ended all the same.
"""

from __future__ import annotations

import gc
from collections.abc import Generator
from typing import Any

import pytest

from tests.support import leaks

_wider: dict[pytest.FixtureDef[Any], frozenset[leaks.Resource]] = {}
"""What each living fixture of wider than function scope has started."""
_failed = pytest.StashKey[bool]()


def pytest_sessionstart() -> None:
    """Before collection: what is started from here on belongs to somebody."""
    leaks.warm_up()


def pytest_collection_finish() -> None:
    """What the imports made lives for ever: frozen, it costs later collections no time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember whether the test has failed before its teardown."""
    report = yield
    item.stash[_failed] = item.stash.get(_failed, False) or report.failed
    return report


@pytest.fixture(autouse=True)
def _nothing_leaks(request: pytest.FixtureRequest) -> Generator[None]:
    """First of the function-scoped fixtures, so it ends last of them."""
    before = leaks.snapshot()
    with leaks.LoopWatch() as watch:
        yield
        left = leaks.left_over(lambda now: now - before.union(*_wider.values()))
        notes = watch.take()
    leaks.end_processes(left)
    if not request.node.stash.get(_failed, False):
        _charge("this test", left + notes)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, object, object]:
    """Note what a fixture of wider scope starts as its own."""
    if request.scope == "function":
        return (yield)
    before = leaks.snapshot().union(*_wider.values())
    result = yield
    _wider[fixturedef] = leaks.snapshot() - before
    return result


def pytest_fixture_post_finalizer(fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest) -> None:
    """A fixture of wider scope has ended: what it started must be gone."""
    mine = _wider.pop(fixturedef, frozenset())
    if not mine:
        return
    left = leaks.left_over(lambda now: now & mine)
    leaks.end_processes(left)
    _charge(f"the {request.scope} fixture {fixturedef.argname!r}", left)


def _charge(who: str, left: list[leaks.Resource]) -> None:
    if left:
        # One exception without a traceback of this file: the message is all there is to say.
        pytest.fail("\n  ".join([f"{who} left behind:", *map(str, left)]), pytrace=False)
