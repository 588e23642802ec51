"""The statements that go through many sessions: List, Delete by criteria, and cleanup.

They need a sequence. A table has one of two forms (`migration.py` turns the first into the second):

- By expiry: an index on (expire_at, access_token). Every touch writes every index of the table.
- By due time: an index on `due_at`, which no touch changes, so that PostgreSQL makes touches in place.

`due_at` is a lower bound: the session does not expire before it. A start sets both to the same instant, a
touch moves `expire_at` alone, and cleanup moves `due_at` behind it:

    due_at              now            expire_at
      |-- cleanup looks --|----------------|        alive: due_at := expire_at
      |-- expire_at ------|                         over:  deleted

Who does not know the column keeps the bound too: its default is the instant of the INSERT. That is the Go
daemon, and a daemon of a former version.

Only a writer that moves an expiry back breaks the bound: a person with SQL, or a Go daemon with a shorter
time to live. The session ends in time, since every statement compares `expire_at`. Its row would stay until
`due_at`, and List of a large table could show it too late. Therefore cleanup also sweeps through the pages
of the table, some at a time, and mends the bound (`sweep`).
"""

from __future__ import annotations

from typing import Final, Protocol

from aio.units import NEVER_US
from mnemosyned.sessions.model import Criteria
from mnemosyned.storage.postgres import key_walk
from mnemosyned.storage.postgres.columns import (
    COLUMNS,
    DAMAGE,
    LIVE,
    READING,
    UNINDEXED,
    Query,
    Reading,
)
from mnemosyned.storage.postgres.conditions import condition, is_keyed

# Beyond it a page is as expensive as reading all sessions, whatever the number.
_MAX_SKIPPED: Final = 10**9


Call = tuple[Query, list[object]]


class Walks(Protocol):
    """The statements of one form of the table, with their arguments."""

    # Parameters: how many rows, how many to delete at most. One row comes back: `picked`,
    # how many rows were looked at, and `tokens`, the stored keys of the deleted ones.
    clean_up: Query

    def find(self, criteria: Criteria, *, offset: int, limit: int, page_bytes: int) -> Call:
        """Page through live sessions in the sequence of (expire_at, access_token).

        SessionStore.find. Locks nothing. If a criterion has an index of its own, the query walks that index
        and sorts what it finds. Pages are separate snapshots: a session that is extended between them moves
        to a later page.

        A row whose bag would exceed the page's bytes comes without its bag. The store then fails the call,
        and neither the server nor this process has held more than a page. A bag that is left out is not
        even fetched. A damaged row counts as empty: it must not make the page too large.
        """
        ...

    def walk(self, criteria: Criteria, *, start: bytes, limit: int, page_bytes: int) -> Call:
        """Page through live sessions in the sequence of their keys; see `key_walk.py`."""
        ...

    def delete(self, criteria: Criteria, *, limit: int, not_after_us: int = NEVER_US) -> Call:
        """Delete what meets the criteria, at most `limit` rows.

        SessionStore.delete. One row comes back: the stored keys of the deleted rows, and how many rows were
        picked. Index: that of a criterion, then the primary key.

        - `picked` chooses the rows without a lock. Choosing and locking at once would need ORDER BY
          access_token before LIMIT, and so a sort of everything that meets the condition. MATERIALIZED: a
          second evaluation could choose other rows.
        - `ended` locks them in token order, and checks the condition again on the locked rows.
        - `timed` compares the clock with `not_after_us` once, when all locks are held: a late Delete ends
          none, and `is_late` says so.

        When two nodes delete the same rows at once, the second waits for the first and finds the rows gone.
        It must not report the end, since the first may have more batches to do. Fewer deleted than picked
        tells the store that the batch was shared, and the store does not call it the last. The same holds
        for a row that was renamed after `picked` saw it under its old key.
        """
        ...


class WalksByExpiry:
    """Walks of a table whose index is on (expire_at, access_token)."""

    def __init__(self, table: str, reading: Reading = READING) -> None:
        self._table = table
        self._reading = reading
        # Index: (expire_at, access_token), from its lower end.
        self.clean_up = _clean_up(table, "expire_at")

    def find(self, criteria: Criteria, *, offset: int, limit: int, page_bytes: int) -> Call:
        """See Walks. A page costs as much as all pages before it, which OFFSET skips."""
        where, values = condition(criteria)
        at = len(values) + 1
        sorting = f"expire_at{UNINDEXED if is_keyed(criteria) else ''}"
        live = LIVE if is_keyed(criteria) else "expire_at > now()"
        page = (
            f"SELECT {COLUMNS}, {DAMAGE} AS damage FROM {self._table} WHERE {live} AND {where} "
            f"ORDER BY {sorting}, access_token OFFSET ${at} LIMIT ${at + 1}"
        )
        return _page(page, self._reading, bytes_at=at + 2), [*values, offset, limit, page_bytes]

    def walk(self, criteria: Criteria, *, start: bytes, limit: int, page_bytes: int) -> Call:
        """See Walks."""
        return key_walk.walk(
            self._table,
            criteria,
            start=start,
            limit=limit,
            page_bytes=page_bytes,
            due="expire_at",
            reading=self._reading,
        )

    def delete(self, criteria: Criteria, *, limit: int, not_after_us: int = NEVER_US) -> Call:
        """See Walks."""
        where, values = condition(criteria)
        return _delete(self._table, where, "", len(values) + 1), [*values, limit, not_after_us]


class WalksByDueTime:
    """Walks of a table whose index is on `due_at`.

    A session's expiry says only which due times it cannot have: later ones. A page of List, or a Delete by
    expiries alone, therefore may read all sessions that are due before the last that it wants. In the worst
    case, where all sessions are in use, these are all sessions.
    """

    def __init__(self, table: str) -> None:
        self._table = table
        # Index: due_at, from its lower end.
        self.clean_up = _clean_up(table, "due_at")
        self.sweep = _sweep(table)

    def find(self, criteria: Criteria, *, offset: int, limit: int, page_bytes: int) -> Call:
        """See Walks.

        The first rows by due time give a bound: if `offset + limit` of them expire until then, all sessions
        of the page do, and so none of them is due later. The page is sought among those that are due until
        then. Where sessions are left unused and expire all the time, the bound is near.
        """
        where, values = condition(criteria, is_indexed=False)
        at = len(values) + 1
        live = f"{LIVE} AND {where}"
        keys = (
            f"{self._keyed(live) if is_keyed(criteria) else self._soonest(live, at)} "
            f"ORDER BY expire_at{UNINDEXED}, access_token OFFSET ${at}::bigint LIMIT ${at + 1}::bigint"
        )
        # Only keys are sorted: rows would not fit into memory.
        page = (
            f"SELECT {COLUMNS}, {DAMAGE} AS damage FROM {self._table} WHERE access_token = ANY(ARRAY({keys}))"
        )
        return _page(page, READING, bytes_at=at + 2), [*values, offset, limit, page_bytes]

    def walk(self, criteria: Criteria, *, start: bytes, limit: int, page_bytes: int) -> Call:
        """See Walks."""
        return key_walk.walk(
            self._table,
            criteria,
            start=start,
            limit=limit,
            page_bytes=page_bytes,
            due="due_at",
            reading=READING,
        )

    def _keyed(self, live: str) -> str:
        return f"SELECT access_token FROM {self._table} WHERE {live}"

    def _soonest(self, live: str, at: int) -> str:
        wanted = f"(LEAST(${at}::bigint, {_MAX_SKIPPED}) + ${at + 1}::bigint)"
        most = f"(4 * {wanted} + 1000)"
        is_all = f"(SELECT total < {most} FROM counted)"
        return (
            "WITH soonest AS MATERIALIZED (SELECT access_token, expire_at "
            f"FROM {self._table} WHERE {live} ORDER BY due_at LIMIT {most}), "
            # Once: each count reads them all.
            "counted AS MATERIALIZED (SELECT count(*) AS total FROM soonest), "
            "bound AS MATERIALIZED (SELECT expire_at FROM soonest "
            f"ORDER BY expire_at OFFSET {wanted} - 1 LIMIT 1) "
            # If these are all sessions, the bound is not needed, and others may have broken it.
            f"SELECT access_token FROM (SELECT access_token, expire_at FROM soonest WHERE {is_all} UNION ALL "
            f"SELECT access_token, expire_at FROM {self._table} WHERE {live} AND NOT {is_all} "
            "AND due_at <= (SELECT expire_at FROM bound) "
            # What is beyond the bound is dropped where it is read: in use, that is nearly everything.
            f"AND expire_at{UNINDEXED} <= (SELECT expire_at FROM bound)) AS found"
        )

    def delete(self, criteria: Criteria, *, limit: int, not_after_us: int = NEVER_US) -> Call:
        """See Walks.

        The bound is not used to stop early: a session whose expiry others have moved back must end too. The
        sequence begins with the rows that most likely meet the criteria.
        """
        where, values = condition(criteria, is_indexed=False)
        sequence = ""
        if not is_keyed(criteria):
            sequence = "ORDER BY due_at" + ("" if criteria.expires_before_us is not None else " DESC")
        return _delete(self._table, where, sequence, len(values) + 1), [*values, limit, not_after_us]


def _page(page: str, reading: Reading, *, bytes_at: int) -> Query:
    return Query(
        "list",
        f"SELECT {reading.listed}, CASE WHEN damage IS NULL AND "
        # ROWS, as the default (RANGE) would add up rows of equal order in one step.
        "sum(CASE WHEN damage IS NULL THEN octet_length(bag) ELSE 0 END) "
        "OVER (ORDER BY expire_at, page.access_token ROWS UNBOUNDED PRECEDING) "
        f"<= ${bytes_at} THEN bag END AS bag FROM ({page}) AS page ORDER BY expire_at, page.access_token",
    )


def _delete(table: str, where: str, sequence: str, limit_at: int) -> Query:
    return Query(
        "delete",
        f"WITH picked AS MATERIALIZED (SELECT access_token FROM {table} WHERE {where} "
        f"{sequence} LIMIT ${limit_at}), ended AS MATERIALIZED (SELECT access_token FROM {table} "
        # An array, which is complete before the look-ups: for IN, PostgreSQL may walk the whole key.
        f"WHERE access_token = ANY(ARRAY(SELECT access_token FROM picked)) AND {where} "
        "ORDER BY access_token FOR UPDATE), "
        # From the count, so that every lock is held before the clock is read.
        f"timed AS MATERIALIZED (SELECT count(*) >= 0 AND clock_timestamp() >= ${limit_at + 1}::timestamptz "
        "AS is_late FROM ended), "
        f"gone AS (DELETE FROM {table} AS held USING ended WHERE held.access_token = ended.access_token "
        "AND NOT (SELECT is_late FROM timed) "
        "AND held.access_token = ANY(ARRAY(SELECT access_token FROM picked)) RETURNING held.access_token) "
        "SELECT (SELECT count(*) FROM picked) AS picked, "
        "ARRAY(SELECT access_token FROM gone) AS tokens, (SELECT is_late FROM timed) AS is_late",
    )


def _clean_up(table: str, column: str) -> Query:
    """SessionStore.clean_up: look at $1 rows that are due, the oldest first; delete at most $2 that are over.

    Locks: the rows. One node at a time cleans up (`cleaning.py`), which saves work: two may do it at once.

    SKIP LOCKED: a row that is locked is being replaced by a start, extended or ended by a caller. If cleanup
    locks the row first, a start of the same token waits and then inserts.
    """
    moved = ""
    if column == "due_at":
        # Without an expiry a row is damaged, and nobody can say when it ends.
        moved = (
            f"moved AS (UPDATE {table} SET due_at = COALESCE(expire_at, 'infinity') WHERE access_token = "
            "ANY(ARRAY(SELECT access_token FROM due WHERE is_over IS NOT TRUE))), "
        )
    return Query(
        "clean_up",
        f"WITH due AS MATERIALIZED (SELECT access_token, expire_at <= now() AS is_over FROM {table} "
        f"WHERE {column} <= now() "
        f"ORDER BY {column} LIMIT $1 FOR UPDATE SKIP LOCKED), {moved}"
        # An array, which is complete before the look-ups: for IN, PostgreSQL may walk the whole primary key.
        f"gone AS (DELETE FROM {table} WHERE access_token = ANY(ARRAY(SELECT access_token FROM due "
        "WHERE is_over LIMIT $2)) RETURNING access_token) "
        "SELECT (SELECT count(*) FROM due) AS picked, ARRAY(SELECT access_token FROM gone) AS tokens",
    )


def _sweep(table: str) -> Query:
    """Look for at most $3 rows in pages $1 to $2 that expire before they are due; delete what is over.

    Index: none; it reads these pages alone (a TID range scan, from PostgreSQL 14 on). Locks as `_clean_up`.
    One row comes back: `tokens`, the stored keys of the deleted rows, and `pages`, the size of the table.
    """
    name = table.replace("'", "''")
    return Query(
        "clean_up",
        f"WITH found AS MATERIALIZED (SELECT access_token, expire_at <= now() AS is_over FROM {table} "
        "WHERE ctid >= $1::tid AND ctid < $2::tid AND expire_at < COALESCE(due_at, 'infinity') "
        "LIMIT $3 FOR UPDATE SKIP LOCKED), "
        f"moved AS (UPDATE {table} SET due_at = expire_at WHERE access_token = "
        "ANY(ARRAY(SELECT access_token FROM found WHERE NOT is_over))), "
        f"gone AS (DELETE FROM {table} WHERE access_token = ANY(ARRAY(SELECT access_token FROM found "
        "WHERE is_over)) RETURNING access_token) "
        "SELECT ARRAY(SELECT access_token FROM gone) AS tokens, "
        f"pg_relation_size('{name}'::regclass) / current_setting('block_size')::int AS pages",
    )
