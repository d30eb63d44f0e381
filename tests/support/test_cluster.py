"""The harness for real processes, on small processes that are none of ours."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.cluster import Process
from tests.support.waiting import wait_until

READY = """
import json, signal, sys, time
print(json.dumps({"mesh_address": "127.0.0.1:1", "socket": "/s"}), flush=True)
print("a word", file=sys.stderr, flush=True)
signal.sigwait([signal.SIGTERM])
sys.exit(%d)
"""


def start(folder: Path, source: str) -> Process:
    return Process(
        "p", [sys.executable, "-S", "-c", "import signal; signal.pthread_sigmask(0, {15});" + source], folder, {}
    )


def test_a_process_tells_when_it_is_ready_and_leaves_when_asked(tmp_path: Path) -> None:
    process = start(tmp_path, READY % 0)
    process.wait_ready()
    assert (process.address, process.socket) == ("127.0.0.1:1", Path("/s"))
    process.stop()
    assert not process.alive
    process.kill()


def test_one_that_ends_badly_fails_with_its_log(tmp_path: Path) -> None:
    process = start(tmp_path, READY % 3)
    process.wait_ready()
    wait_until(lambda: process.log, 5, "there is a log")
    with pytest.raises(AssertionError, match=r"p ended with 3 after SIGTERM; its log:\na word"):
        process.stop()


def test_one_that_never_becomes_ready_fails_with_its_log(tmp_path: Path) -> None:
    process = start(tmp_path, "import sys; sys.exit('no port')")
    with pytest.raises(AssertionError, match=r"p ended with 1; its log:\nno port"):
        process.wait_ready()
    process = start(tmp_path, "print('{', flush=True); signal.pause()")
    with pytest.raises(AssertionError, match=r"waited 0.1 s in vain until p is ready"):
        process.wait_ready(timeout_s=0.1)
    process.kill()


def test_a_paused_process_can_be_killed(tmp_path: Path) -> None:
    process = start(tmp_path, READY % 0)
    process.wait_ready()
    process.pause()
    assert process.alive
    process.kill()
    assert process.wait_ended() == -9


def test_a_resumed_process_goes_on(tmp_path: Path) -> None:
    process = start(tmp_path, READY % 0)
    process.wait_ready()
    process.pause()
    process.resume()
    process.stop()
