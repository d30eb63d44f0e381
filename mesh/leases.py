"""The leases of clients: one grant a get, which ends when all of it is released, when its client goes, or in time.

A client says how long a grant shall last and renews it while it lives: a process that is stopped, or hangs, renews
nothing and loses its leases after seconds, whether or not its connection still stands. It finds that out by its own
monotonic clock before it uses a chunk again (`kvmesh.hit`): the clock of one host goes on for both.

A reservation has no such end. A writer that was stopped may go on to write at any time, and an extent that went to
somebody else meanwhile would be damaged: so it goes back when the kernel says that the writer is gone, and not before.

Sans-IO. A grant is an owner in the store. Runs on the agent's loop.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvmesh.store import Store
from kvmesh.transport.limits import LEASE_S_MAX, LEASE_S_MIN


@dataclass(slots=True, eq=False)
class Grant:
    """The leases of one get: an owner in the store."""

    session: int
    get: int
    lease_s: float
    expires_s: float
    """On the agent's monotonic clock."""
    busy: bool = False
    """More may be leased: the get goes on."""


class Grants:
    """All grants of one agent."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._sessions: dict[int, dict[int, Grant]] = {}
        self.expired = 0
        """Grants that ended because nobody renewed them."""

    def __len__(self) -> int:
        return sum(map(len, self._sessions.values()))

    def count(self, session: int) -> int:
        """How many grants a session has."""
        return len(self._sessions.get(session, ()))

    def of(self, session: int) -> list[Grant]:
        """All grants of a session."""
        return list(self._sessions.get(session, {}).values())

    def open(self, session: int, get: int, lease_s: float, now: float) -> Grant:
        """A grant for the get `get` of `session`. A get of that number that is open already ends."""
        self.end(session, get)
        lease_s = min(max(lease_s, LEASE_S_MIN), LEASE_S_MAX) if lease_s > 0 else LEASE_S_MIN  # NaN is not > 0
        grant = Grant(session, get, lease_s, now + lease_s)
        self._sessions.setdefault(session, {})[get] = grant
        self._store.add_owner(grant)
        return grant

    def find(self, session: int, get: int) -> Grant | None:
        """The open grant of a get."""
        return self._sessions.get(session, {}).get(get)

    def renew(self, session: int, get: int, now: float) -> bool:
        """Begin the time of a grant anew. False when it is over: what it leased may belong to others by now."""
        grant = self.find(session, get)
        if grant is None:
            return False
        if grant.expires_s <= now:
            self._expire(grant)
            return False
        grant.expires_s = now + grant.lease_s
        return True

    def end(self, session: int, get: int) -> None:
        """Give back what a get still leases."""
        grants = self._sessions.get(session, {})
        grant = grants.pop(get, None)
        if grant is not None:
            self._store.drop_owner(grant)
            if not grants:
                del self._sessions[session]

    def end_session(self, session: int) -> None:
        """The client is gone."""
        for grant in self.of(session):
            self.end(session, grant.get)

    def expire(self, now: float) -> int:
        """End the grants whose time is over. Returns how many."""
        over = [grant for grants in self._sessions.values() for grant in grants.values() if grant.expires_s <= now]
        for grant in over:
            self._expire(grant)
        return len(over)

    def _expire(self, grant: Grant) -> None:
        self.expired += 1
        self.end(grant.session, grant.get)
