"""Renaming in single statements of one transaction, for servers that change a table once in each (`kind.py`).

    BEGIN ──> lock: which are there, held and taken? ──> end what is in the way ──> move the rest ──> COMMIT
                                                          └── nearly always nothing

On PostgreSQL this would take twice as long for one session as the one statement of `queries.py`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from mnemosyned.storage.postgres.columns import LIVE, Query
from mnemosyned.storage.postgres.faults import ITEM_FAULTS
from mnemosyned.storage.postgres.queries import ASKED
from mnemosyned.storage.postgres.repeats import ROLLED_BACK

if TYPE_CHECKING:
    from asyncpg import Record
    from asyncpg.pool import PoolConnectionProxy

    from mnemosyned.storage.postgres.pool import PostgresPool


async def in_steps(pool: PostgresPool, table: str, olds: list[bytes], news: list[bytes]) -> list[bool]:
    """Tell of each session whether it is there, under either key, and give it its new key if it is free.

    Raises as `PostgresPool.fetch` does, and ITEM_FAULTS: nothing is renamed then.
    """
    steps = _Steps(table)

    async def rename(connection: PoolConnectionProxy[Record]) -> list[bool]:
        run = partial(pool.run, connection, passing=(*ITEM_FAULTS, *ROLLED_BACK))
        rows = await run(steps.lock if len(olds) > 1 else steps.lock_one, olds, news)
        asked = zip(olds, news, rows, strict=True)
        held = [(old, new, row["is_taken"]) for old, new, row in asked if row["is_held"]]
        # Of two live sessions of one token, the one under the current key stays.
        ended = [old for old, _, is_taken in held if is_taken]
        moved = [(old, new) for old, new, is_taken in held if not is_taken]
        if any(is_taken is not None for *_, is_taken in held):
            await run(steps.end, ended, [new for _, new in moved])
        if moved:
            await run(steps.move, [old for old, _ in moved], [new for _, new in moved])
        return [row["is_there"] for row in rows]

    return await pool.in_transaction(rename, passing=ITEM_FAULTS)


class _Steps:
    """The statements; parameters and locks are those of `queries._rename`."""

    def __init__(self, table: str) -> None:
        self.lock = self._lock(table, "SKIP LOCKED")
        self.lock_one = self._lock(table)
        # What occupies the new keys, and what is stored under both keys; nearly always nothing. Both are
        # judged once more, since a start may have taken a new key meanwhile.
        self.end = Query(
            "rename",
            f"DELETE FROM {table} AS there WHERE access_token = ANY($1::bytea[]) "
            f"OR access_token = ANY($2::bytea[]) AND NOT {LIVE}",
        )
        self.move = Query(
            "rename",
            f"UPDATE {table} AS there SET access_token = asked.new "
            "FROM unnest($1::bytea[], $2::bytea[]) AS asked (old, new) "
            f"WHERE there.access_token = asked.old AND there.{ASKED}",
        )

    @staticmethod
    def _lock(table: str, locking: str = "") -> Query:
        """Lock the rows under the old keys; say of each session whether it is there, locked and taken."""
        return Query(
            "rename",
            "WITH asked AS MATERIALIZED (SELECT * FROM unnest($1::bytea[], $2::bytea[]) WITH ORDINALITY "
            "AS one (old, new, number)), "
            f"held AS MATERIALIZED (SELECT there.access_token AS old FROM {table} AS there "
            f"WHERE there.{ASKED} AND there.{LIVE} ORDER BY there.access_token FOR UPDATE {locking}), "
            f"used AS MATERIALIZED (SELECT access_token AS new, {LIVE} AS is_taken FROM {table} "
            "WHERE access_token = ANY($2::bytea[])) "
            f"SELECT EXISTS (SELECT 1 FROM {table} AS there "
            f"WHERE there.access_token IN (asked.old, asked.new) AND there.{LIVE}) AS is_there, "
            "held.old IS NOT NULL AS is_held, is_taken "
            "FROM asked LEFT JOIN held ON held.old = asked.old LEFT JOIN used ON used.new = asked.new "
            "ORDER BY number",
        )
