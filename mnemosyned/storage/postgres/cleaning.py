"""Cleanup of the PostgreSQL engine: the rows that are due, and then a part of the table.

One node at a time cleans up, by the rows of nodes (`NodeTable.is_cleaner`). That only saves work, since
cleanup skips the rows that others have locked: two nodes may do it at once, for example two that look at the
rows on both sides of a change, or one of a former version, which goes by an advisory lock of PostgreSQL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mnemosyned.storage.postgres.walks import WalksByDueTime

if TYPE_CHECKING:
    from mnemosyned.storage.postgres.node_table import NodeTable
    from mnemosyned.storage.postgres.pool import PostgresPool
    from mnemosyned.storage.postgres.walks import Walks

# 8 MiB, a few milliseconds: a table of 500 MB is swept in an hour of rounds.
_SWEPT_PAGES: Final = 1000


class Cleaner:
    """Deletes expired rows; remembers which pages it swept last."""

    def __init__(self, pool: PostgresPool, nodes: NodeTable) -> None:
        self._pool = pool
        self._nodes = nodes
        self._next_page = 0

    async def clean_up(self, walks: Walks, limit: int) -> list[bytes]:
        """Delete at most `limit` rows; return their stored keys.

        Rows that are due and live do not count: they are only moved, batch after batch.
        """
        removed: list[bytes] = []
        if not await self._nodes.is_cleaner():
            return removed
        while len(removed) < limit:
            (row,) = await self._pool.fetch(walks.clean_up, limit, limit - len(removed))
            removed += row["tokens"]
            if row["picked"] < limit:
                break
        if isinstance(walks, WalksByDueTime) and len(removed) < limit:
            removed += await self._sweep(walks, limit - len(removed))
        return removed

    async def _sweep(self, walks: WalksByDueTime, limit: int) -> list[bytes]:
        first, end = self._next_page, self._next_page + _SWEPT_PAGES
        (row,) = await self._pool.fetch(walks.sweep, (first, 0), (end, 0), limit)
        self._next_page = end if end < row["pages"] else 0
        tokens: list[bytes] = row["tokens"]
        return tokens
