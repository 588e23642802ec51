"""Looks at the rows of nodes for what should not be there, and says so in the log.

another process with this node's name       node_name_taken
a daemon that is no member of this cluster  table_shared_with_a_stranger
a row that has not changed for very long    removed
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from aio.tasks import Tasks
from aio.units import US_PER_S
from mnemosyned.errors import StorageUnavailable

if TYPE_CHECKING:
    from cluster.lease import Lease
    from cluster.node_row import NodeRow
    from mnemosyned.sessions.store import LeaseStore

log = logging.getLogger(__name__)

# A row of another daemon that this node does not know as a member: by then it has joined, or never will.
_STRANGE_AFTER_US: Final = 10 * US_PER_S
_TOLD_US: Final = 2**62  # added to the time of what the log has told, once


class RowWatch:
    """The rows as the last answer of the store showed them, and what the log has told of them."""

    def __init__(self, store: LeaseStore, lease: Lease, *, knows: Callable[[str], bool]) -> None:
        """`knows` tells whether a node is a member of this node's cluster."""
        self._store = store
        self._lease = lease
        self._knows = knows
        self._tasks = Tasks("lease_rows")
        self._conflict: NodeRow | None = None
        self._is_conflict_told = False
        self._strange: dict[str, int] = {}  # names that are no members, and since when

    async def close(self) -> None:
        """Cancel what is under way."""
        await self._tasks.close()

    def look(self, now_us: int) -> None:
        """Look at the rows of an answer."""
        self._look_for_a_namesake()
        self._look_for_strangers(now_us)
        for row in self._lease.forgotten(now_us):
            self._tasks.spawn(self._remove((row.name, row.instance, row.number)))

    def strangers(self) -> list[str]:
        """Return the daemons that use the table and are no members of this cluster, as the log tells them."""
        # A copy, made in one step: other threads ask. One that has just been seen may be about to join.
        return sorted(name for name, since_us in list(self._strange.items()) if since_us > _TOLD_US)

    def _look_for_a_namesake(self) -> None:
        """Log that another process has this node's name, and renews its lease.

        After a crash the row of the former process is in the way until it has lapsed, which is no mistake.
        """
        former, self._conflict = self._conflict, self._lease.conflict
        if self._conflict is None:
            self._is_conflict_told = False
        elif former is not None and former.version != self._conflict.version and not self._is_conflict_told:
            self._is_conflict_told = True
            log.error("node_name_taken", extra={"node": self._lease.name})

    def _look_for_strangers(self, now_us: int) -> None:
        strange = {name for name in self._lease.serving() if not self._knows(name)}
        for name in strange - self._strange.keys():
            self._strange[name] = now_us
        for name, since_us in list(self._strange.items()):
            if name not in strange:
                del self._strange[name]
            elif 0 < now_us - since_us > _STRANGE_AFTER_US:
                self._strange[name] = now_us + _TOLD_US
                log.warning("table_shared_with_a_stranger", extra={"node": self._lease.name, "other": name})

    async def _remove(self, row: tuple[str, int, int]) -> None:
        try:
            await self._store.resign(row)
        except StorageUnavailable as exc:
            log.debug("row_not_removed", extra={"error": str(exc)})
