"""The harness for Serf, on Serf alone."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import pytest

from tests.support.serf import LAN, LOCAL, SerfAgent, installed
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.skipif(not installed(), reason="serf is not installed"),
    pytest.mark.slow,  # Serf starts, leaves and looks for failures at its own pace
]


def test_two_agents_see_each_other_one_leaves_and_nobody_complains(tmp_path: Path) -> None:
    key = base64.b64encode(os.urandom(32)).decode()
    with SerfAgent("a", tmp_path, key=key, tags={"role": "test"}) as a:
        with SerfAgent("b", tmp_path, key=key, join=[a.address]) as b:
            wait_until(lambda: a.states() == b.states() == {"a": "alive", "b": "alive"}, 10, "both see both")
            assert b.members()["a"]["addr"] == a.address
            assert b.members()["a"]["tags"] == {"role": "test"}
            b.leave()
            assert not b.alive
            assert b.complaints() == []
        wait_until(lambda: a.states()["b"] == "left", 10, "a knows that b left")
        assert a.complaints() == []


def test_one_that_is_killed_is_failed_within_the_bound_and_complaints_are_told(tmp_path: Path) -> None:
    with (
        SerfAgent("a", tmp_path, profile=LOCAL) as a,
        SerfAgent("b", tmp_path, profile=LOCAL) as b,
        SerfAgent("c", tmp_path, key=KEY) as c,
    ):
        b.join(a.address)
        with pytest.raises(AssertionError, match="serf join said"):
            c.join(a.address)
        assert any("is encrypted" in line for line in a.complaints())
        assert c.complaints(r"\[ERR\] memberlist: ", r"\[WARN\] agent: ") == []
        b.kill()
        wait_until(lambda: a.states()["b"] == "failed", LOCAL.failed_within_s(2) + 1, "a says that b failed")


def test_one_that_cannot_start_fails_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="serf a ended with 1; its log:"), SerfAgent("a", tmp_path, key="short"):
        pass


def test_the_bound_is_that_of_the_profile() -> None:
    assert LOCAL.failed_within_s(2) == 3 + 3
    assert LAN.failed_within_s(3) == 5 + 4
    assert LAN.failed_within_s(100) == 199 + 4 * 2 * 6


KEY = base64.b64encode(bytes(32)).decode()
