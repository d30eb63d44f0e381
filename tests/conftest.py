"""For every test: nothing may leak (tests/support/leak_plugin.py), and random choices come from a printed seed."""

from __future__ import annotations

import logging
import random
import zlib
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["pytester", "tests.support.leak_plugin"]

# The machine that runs the tests may be slow and shared: time is reported (--durations), never asserted.
settings.register_profile(
    "deterministic", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "explore", parent=settings.get_profile("deterministic"), derandomize=False, max_examples=2000, print_blob=True
)
settings.load_profile("deterministic")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--seed``: another set of random choices."""
    parser.addoption("--seed", type=int, default=0, help="the seed of the fixture rng (default 0)")


def pytest_report_header(config: pytest.Config) -> str:
    """The seeds, so that any run can be repeated."""
    return f"seed: {config.getoption('seed')} (another: --seed N); hypothesis: see --hypothesis-profile=explore"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """A random source of the test's own: the same in every run with the same ``--seed``, whatever else runs."""
    return random.Random(request.config.getoption("seed") ^ zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def _no_log_of_another_test() -> Iterator[None]:
    """A test that runs the command line sets logging up, to a stream that is closed after it: a later test's record
    would fail there, and the failure would keep alive whatever it refers to."""
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)
    for handler in [handler for handler in root.handlers if type(handler) is logging.StreamHandler]:
        root.removeHandler(handler)
