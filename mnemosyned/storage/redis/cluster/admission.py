"""When may the answers of a primary count? Once no node has copies from before it.

Leases, and the rows of nodes, are on one primary, the home; most sessions are on others. When one of those
is lost and a replica takes its place, acknowledged writes may be lost with it, and copies of what was lost
may be in caches: a Delete by subject would not find such a session, and its copy would be served after the
Delete. As on a single server, a primary that was replaced must count as another store (cluster/lease.py,
rule 14), though the home has not changed. So:

    a new connection     the server says who it is: its process, and the history of its data
    one not met yet      its name is written at the home (meet.lua). If it is new there, the identity of the
                         store becomes another one, in the same step
    before the first     this node waits until each lease has run out that was renewed before that
    script on it

Why that is enough. A script runs on A', which has taken the place of A, at least LEASE after A' was met. A
node H that serves copies then has sent its last renewal after A' was met. So the answer has shown H another
identity, and H has dropped every copy (rule 3). What H has loaded since, from A', it has waited for itself.
Nothing is left that H could have from A, and whatever the script finds or does not find, no caller is shown
more of it by H.

Nodes wait by their own clocks. Only a process that has just begun goes by the clock of the home, which says
how long ago the last primary was new: it need not wait once more for what others have waited for.

Nothing is said of a slot that moves between two primaries that are known: no write is lost by that.
Renewals and bars need none of it. They are at the home, whose answers say themselves who it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from aio.units import NS_PER_US, US_PER_S
from cluster.lease import LEASE_US, stretched
from mnemosyned.sessions.clock import uptime_ns


class Admission:
    """Knows which servers have been met, and from when on their answers count."""

    def __init__(self, meet: Callable[[Sequence[str]], Awaitable[tuple[int, int]]]) -> None:
        """`meet` writes names at the home; it returns what meet.lua does, or raises StorageUnavailable."""
        self._meet = meet
        self._due_us: dict[str, int] = {}
        self._lock = asyncio.Lock()
        self.has_renewed = False  # set when this process has had a lease

    def has_admitted(self, server: str) -> bool:
        """Tell whether the answers of a server count."""
        due_us = self._due_us.get(server)
        return due_us is not None and now_us() >= due_us

    async def admit(self, server: str) -> None:
        """Meet a server, and return when its answers count. Raises StorageUnavailable."""
        async with self._lock:
            if server not in self._due_us:
                since_us, nodes = await self._meet([server])
                self._due_us[server] = now_us() + self._wait_us(since_us, nodes)
        # A caller may give up, and the next one goes on.
        await asyncio.sleep(max(0, self._due_us.get(server, 0) - now_us()) / US_PER_S)

    def _wait_us(self, since_us: int, nodes: int) -> int:
        if not nodes:
            return 0
        return stretched(LEASE_US) if self.has_renewed else max(0, stretched(LEASE_US) - since_us)

    def forget(self) -> None:
        """Meet all servers once more."""
        self._due_us.clear()


def now_us() -> int:
    """Return the clock of leases."""
    return uptime_ns() // NS_PER_US
