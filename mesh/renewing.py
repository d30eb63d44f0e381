"""Renewing: keeps the leases of a client's living hits and views from running out.

A lease lasts some seconds (`connect(lease_s=…)`); this thread begins its time anew three times within that. It is the
sign of life that the agent goes by: a process that is stopped sends none, and its leases end. When such a process goes
on, its own clock tells it so before it uses a chunk again (`Leases.check`): a lease lasts for the client from the
moment when it *asked*, and for the agent from the moment when it *heard*, so the client's belief always ends first.

The thread starts with the first lease and ends when there has been none for a while. It asks on a connection of its
own, so it never waits behind a get.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

RENEWALS_PER_LEASE = 3


class Renewable(Protocol):
    """The leases of one get."""

    epoch: int
    """Of the agent that gave them: its start."""
    session: int
    get: int
    begun: bool
    """The agent has answered the get: before that it may not know of the leases yet."""

    def last_until(self, expires_s: float) -> None:
        """They last until then, on this process's monotonic clock; 0: they are over."""


Exchange = Callable[[list[tuple[int, int]]], tuple[int, list[bool]] | None]
"""Asks the agent to renew gets, (session, get) each: its epoch, and whether each lasts on; None: it did not answer."""


class Renewals:
    """All leases of one client that live."""

    def __init__(self, lease_s: float, exchange: Exchange, end: Callable[[], None]) -> None:
        """`end` is called in the thread when it ends."""
        self._lease_s = lease_s
        self._exchange = exchange
        self._end = end
        # A finaliser may call `discard` in the middle of anything: so there is no lock around the table, only
        # operations that are atomic.
        self._living: dict[int, Renewable] = {}
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._wake = threading.Event()
        self._closed = False

    def add(self, leases: Renewable) -> None:
        """Renew `leases` until they are discarded."""
        self._living[id(leases)] = leases
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    self._wake.clear()
                    self._thread = threading.Thread(target=self._run, name="kvmesh-leases", daemon=True)
                    self._thread.start()

    def discard(self, leases: Renewable) -> None:
        """These are of no use any more. Safe in a finaliser."""
        self._living.pop(id(leases), None)
        if self._closed and not self._living:
            self._wake.set()

    def close(self) -> None:
        """End the thread as soon as nothing lives that it must renew, and wait for that unless views still live."""
        self._closed = True
        self._wake.set()
        thread = self._thread
        if thread is not None and not self._living and thread is not threading.current_thread():
            thread.join()

    def _run(self) -> None:
        idle = False
        while True:
            self._wake.wait(self._lease_s / RENEWALS_PER_LEASE)
            self._wake.clear()
            living = list(self._living.values())
            if not living and (idle or self._closed):
                with self._starting:
                    if not self._living:
                        self._thread = None
                        break
            idle = not living
            if living:
                self._renew(living)
        self._end()

    def _renew(self, living: list[Renewable]) -> None:
        asked_s = time.monotonic()
        begun = [leases.begun for leases in living]
        answer = self._exchange([(leases.session, leases.get) for leases in living])
        if answer is None:
            return  # they run out by the clock unless the agent answers in time
        epoch, lasting = answer
        for leases, known, lasts in zip(living, begun, lasting, strict=True):
            if leases.epoch != epoch:
                # The agent that gave them is gone, and with it all who could write to its arena: the bytes stay.
                leases.last_until(float("inf"))
            elif lasts:
                leases.last_until(asked_s + self._lease_s)
            elif known:
                leases.last_until(0.0)
