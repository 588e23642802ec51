"""The daemons that run on a storage, as a command sees them that changes its sessions.

A command is no node: it serves nothing and has no peers. While it changes sessions it has a row among those
of the nodes all the same, without a ring (`cluster/lease.py`, rule 15). By that it knows which nodes run, and
can settle what it has changed as a node does that can tell no other: it bars them, so they drop their copies.

    command ── renews its row ──> rows of all nodes ──> who has not lapsed, runs
       └────── settle ──────────> raises the epoch of each node ──> they drop every copy, and tell so
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from cluster.lease import LEASE_US, LOOK_US, Lease, stretched
from cluster.mirrors import Grants
from mnemosyned.errors import StorageUnavailable
from mnemosyned.sessions.clock import StorageClock
from mnemosyned.sessions.lease_keeper import LeaseKeeper
from mnemosyned.sessions.store import LeaseStore

_US_PER_S: Final = 1_000_000
# A row that is left of a node that was killed has lapsed after a lease; a look and a renewal come on top.
_KNOWN_AFTER_S: Final = (stretched(LEASE_US) + 5 * LOOK_US) / _US_PER_S
_REGISTERED_S: Final = 10.0


class RunningNodes:
    """Who runs on the storage, from one moment on."""

    def __init__(self, keeper: LeaseKeeper) -> None:
        self._keeper = keeper

    def names(self) -> list[str]:
        """Return the nodes whose rows have not lapsed, as the last renewal has shown them."""
        return sorted(self._keeper.lease.living())

    async def look(self) -> list[str]:
        """Return the nodes that run, when rows of nodes that were killed have had the time to lapse."""
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + _KNOWN_AFTER_S
        while True:
            await self._keeper.refresh()
            if not self.names() or loop.time() >= ends_s:
                return self.names()
            await asyncio.sleep(LOOK_US / _US_PER_S)

    async def settle(self) -> None:
        """Have every node drop every copy. Raises StorageUnavailable if nothing proves that it has."""
        await self._keeper.settle_everything()


@asynccontextmanager
async def running_nodes(store: LeaseStore, name: str) -> AsyncIterator[RunningNodes]:
    """Watch the nodes from now on; `name` is what they see of this command. Raises StorageUnavailable."""
    keeper = LeaseKeeper(
        store,
        Lease(f"{name} {secrets.token_hex(4)}", secrets.randbits(62)),
        StorageClock(),
        grants=Grants(max_tokens=1, keep_us=1),
        drop_everything=lambda: None,
    )
    keeper.begin()
    try:
        try:
            async with asyncio.timeout(_REGISTERED_S):
                await keeper.has_registered.wait()
        except TimeoutError:
            raise StorageUnavailable("mnemosyned: storage: unavailable") from None
        yield RunningNodes(keeper)
    finally:
        await keeper.resign()
        await keeper.close()
