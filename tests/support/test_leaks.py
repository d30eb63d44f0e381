"""The leak detector itself: what leaks fails and is named; what does not, passes."""

from __future__ import annotations

import pytest

LEAKS = {
    "thread": """
        import threading
        kept = threading.Event()
        def test(): threading.Thread(target=kept.wait, name="forgotten", daemon=True).start()
        def test_after(): kept.set()
    """,
    "fd": """
        import os
        kept = []
        def test(): kept.append(os.memfd_create("forgotten"))
        def test_after(): os.close(kept.pop())
    """,
    "socket": """
        import socket
        kept = []
        def test(): kept.append(socket.socketpair())
        def test_after(): [end.close() for end in kept.pop()]
    """,
    "process": """
        import subprocess
        kept = []
        def test(): kept.append(subprocess.Popen(["sleep", "60"]))
        def test_after(): assert kept.pop().wait(10) == -9  # the detector ended it
    """,
    "orphan": """
        import subprocess
        def test(): subprocess.run(["sh", "-c", "sleep 60 > /dev/null 2>&1 &"], check=True)
    """,
    "not waited for": """
        import os, signal
        kept = []
        def test(): kept.append(os.spawnlp(os.P_NOWAIT, "true", "true"))
        def test_after(): os.waitpid(kept.pop(), 0)
    """,
    "zmq context": """
        import zmq
        kept = []
        def test():
            kept.append(zmq.Context())
            kept[0].socket(zmq.PUSH).close()
        def test_after(): kept.pop().term()
    """,
    "asyncio task": """
        import asyncio
        async def forget(): kept = asyncio.create_task(asyncio.Event().wait()); await asyncio.sleep(0)
        def test(): asyncio.run(forget())
    """,
    "never retrieved": """
        import asyncio
        async def fail(): raise ValueError("nobody looked")
        async def forget(): task = asyncio.create_task(fail()); await asyncio.sleep(0.01)
        def test(): asyncio.run(forget())
    """,
    "/dev/shm entry": """
        import pathlib
        entry = pathlib.Path("/dev/shm/kvmesh-test-leak")
        def test(): entry.touch()
        def test_after(): entry.unlink()
    """,
    "the module fixture 'owner'": """
        import os, pytest
        @pytest.fixture(scope="module")
        def owner(): kept.append(os.memfd_create("forgotten"))
        kept = []
        def test(owner): pass
        @pytest.fixture(scope="session", autouse=True)
        def last():
            yield
            os.close(kept.pop())
    """,
}
SHOWN_AS = {"orphan": "sleep 60", "socket": "socket:["}

CLEAN = {
    "used and closed": """
        import asyncio, os, socket, subprocess, threading
        def test():
            thread = threading.Thread(target=int)
            thread.start()
            thread.join()
            subprocess.run(["true"], check=True)
            with socket.socket(): pass
            async def main():
                task = asyncio.create_task(asyncio.sleep(60))
                task.cancel()
            asyncio.run(main())
    """,
    "just going": """
        import threading, time
        def test(): threading.Thread(target=time.sleep, args=(0.1,)).start()
    """,
    "garbage": """
        import os, weakref
        class Holder:
            def __init__(self):
                self.itself = self
                weakref.finalize(self, os.close, os.memfd_create("held"))
        def test(): Holder()
    """,
    "a wider fixture's, first asked for by a later test and inside it": """
        import os, pytest
        @pytest.fixture(scope="module")
        def asked():
            fd = os.memfd_create("asked")
            yield
            os.close(fd)
        @pytest.fixture(scope="session")
        def later():
            fd = os.memfd_create("later")
            yield
            os.close(fd)
        @pytest.fixture
        def own():
            fd = os.memfd_create("own")
            yield
            os.close(fd)
        def test_first(own): pass
        def test_inside(request): request.getfixturevalue("asked")
        def test_later(later, own): pass
        def test_last(): pass
    """,
}


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A run inside the run, with the detector and nothing else of ours."""
    monkeypatch.setattr("tests.support.leaks.SETTLE_S", 0.3)
    pytester.makeini("[pytest]\nfilterwarnings = ignore")
    return pytester


@pytest.mark.parametrize("named", LEAKS)
@pytest.mark.slow  # the detector waits for a leak to go before it calls it one
def test_a_leak_fails_the_test_that_leaked_and_no_other(inner: pytest.Pytester, named: str) -> None:
    source = LEAKS[named]
    inner.makepyfile(source)
    outcome = inner.runpytest_inprocess("-p", "tests.support.leak_plugin", "-p", "no:unraisableexception")
    outcome.assert_outcomes(passed=2 if "test_after" in source else 1, errors=1)
    outcome.stdout.fnmatch_lines(["*ERROR at teardown of test _*", "*left behind:"])
    assert SHOWN_AS.get(named, named) in outcome.stdout.str()


@pytest.mark.parametrize("source", CLEAN.values(), ids=CLEAN)
@pytest.mark.slow
def test_what_is_tidy_passes(inner: pytest.Pytester, source: str) -> None:
    inner.makepyfile(source)
    outcome = inner.runpytest_inprocess("-p", "tests.support.leak_plugin")
    outcome.assert_outcomes(passed=source.count("def test"))


def test_a_failed_test_is_not_charged_twice(inner: pytest.Pytester) -> None:
    inner.makepyfile("""
        import os
        kept = []
        def test():
            kept.append(os.memfd_create("cut short"))
            assert not kept
        def test_after(): os.close(kept.pop())
    """)
    inner.runpytest_inprocess("-p", "tests.support.leak_plugin").assert_outcomes(failed=1, passed=1)
