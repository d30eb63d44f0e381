"""One suspicion: who shares it, and when it becomes a verdict.

The more nodes suspect the same one independently, the sooner it is over (`timing.suspicion_after_s`). A thin shell: it
owns no timer; whoever holds it asks for `deadline` after each change.
"""

from __future__ import annotations

from .timing import suspicion_after_s


class Suspicion:
    """Of one node, by this one."""

    def __init__(self, accuser: str, *, wanted: int, min_s: float, max_s: float, now: float) -> None:
        self.confirmations = 0
        """Independent accusers after the first."""
        self.deadline = 0.0
        """When the suspect is held for dead."""
        self.fetched_at = float("-inf")
        """When the suspect was last asked for all that it knows."""
        self._wanted = wanted
        self._min_s, self._max_s = min_s, max_s
        self._accusers = {accuser}
        self.restart(now)

    @property
    def half_time(self) -> float:
        """Half of the time that it lasts when all others confirm it."""
        return self._started_at + self._min_s / 2

    def restart(self, now: float) -> None:
        """The time until now does not count: this process did not run in it."""
        self._started_at = now
        self._set_deadline()

    def confirm(self, accuser: str) -> bool:
        """Another node suspects it too. True when that is news, and brought the deadline nearer."""
        if self.confirmations >= self._wanted or accuser in self._accusers:
            return False
        self._accusers.add(accuser)
        self.confirmations += 1
        self._set_deadline()
        return True

    def _set_deadline(self) -> None:
        after_s = suspicion_after_s(self.confirmations, self._wanted, self._min_s, self._max_s)
        self.deadline = self._started_at + after_s
