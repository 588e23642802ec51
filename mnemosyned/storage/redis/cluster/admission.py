"""When may the answers of a primary count? Once all nodes know that it is one.

Leases, and the rows of nodes, are on one primary, the home; most sessions are on others. When one of those
is lost and a replica takes its place, acknowledged writes may be lost with it, and copies of what was lost
may be in caches: a Delete by subject would not find such a session, and its copy would be served after the
Delete. As on a single server, a primary that was replaced must count as another store (cluster/lease.py,
rule 14), though the home has not changed. So:

    a new connection     the server says who it is: its process, and the history of its data
    one not met yet      its name is written at the home (meet.lua). If it is new there, the identity of the
                         store becomes another one, in the same step
    before the first     this node waits for a renewal of its lease that it has sent after that, or until the
    script on it         lease has run out. If it never had one, it waits until the leases have run out that
                         other nodes had when the last primary was new

Why that is enough. Suppose that node W writes on the primary A', which has taken the place of A, and node H
has a copy from A. W sends its script after a renewal which shows that A' is met, or without a lease. Either
way a renewal that shows it comes before W's acknowledgement (rule 6), and by rule 14 W waits until each
lease from before that renewal has run out; a process that is too young to see a change has waited for that
before. A later renewal of H shows A' too, so H has dropped its copies. What H loads after that it loads
from A', for which it waits itself.

Nothing is said of a slot that moves between two primaries that are known: no write is lost by that.

Renewals and bars need none of it. They are at the home, whose answers say themselves who it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from aio.units import NS_PER_US, US_PER_S
from cluster.lease import LEASE_US, stretched
from mnemosyned.sessions.clock import uptime_ns


class Renewals:
    """When this node has sent the last renewal of its lease that was answered."""

    def __init__(self) -> None:
        self._sent_us: int | None = None
        self._answered = asyncio.Event()

    @property
    def has_any(self) -> bool:
        """Whether there was one."""
        return self._sent_us is not None

    def answered(self, sent_us: int) -> None:
        """Take note of an answer, which the lease takes in before anything else runs."""
        if self._sent_us is None or sent_us > self._sent_us:
            self._sent_us = sent_us
        self._answered.set()
        self._answered = asyncio.Event()

    async def until_after(self, instant_us: int) -> None:
        """Wait for the answer to a renewal that was sent after an instant, or for the end of the lease."""
        while self._sent_us is not None and self._sent_us <= instant_us:
            left_us = self._sent_us + LEASE_US - now_us()
            answered = self._answered
            try:
                async with asyncio.timeout(max(0, left_us) / US_PER_S):
                    await answered.wait()
            except TimeoutError:
                return


class Admission:
    """Knows which servers have been met."""

    def __init__(
        self, meet: Callable[[Sequence[str]], Awaitable[tuple[int, int]]], renewals: Renewals
    ) -> None:
        """`meet` writes names at the home; it returns what meet.lua does, or raises StorageUnavailable."""
        self._meet = meet
        self._renewals = renewals
        self._met: set[str] = set()
        self._lock = asyncio.Lock()

    def has_met(self, server: str) -> bool:
        """Tell whether the answers of a server count."""
        return server in self._met

    async def admit(self, servers: Sequence[str]) -> None:
        """Meet servers, and return when their answers count. Raises StorageUnavailable."""
        async with self._lock:
            new = [server for server in servers if server not in self._met]
            if not new:
                return
            since_us, nodes = await self._meet(new)
            if self._renewals.has_any:
                await self._renewals.until_after(now_us())
            elif nodes:
                await asyncio.sleep(max(0, stretched(LEASE_US) - since_us) / US_PER_S)
            self._met |= set(new)

    def forget(self) -> None:
        """Meet all servers once more."""
        self._met.clear()


def now_us() -> int:
    """Return the clock of leases."""
    return uptime_ns() // NS_PER_US
