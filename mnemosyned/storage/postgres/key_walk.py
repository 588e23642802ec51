"""The statement of a walk by stored key: pages of List that cost the same wherever they begin.

    primary key   … | start  k  k  k  …  k | k …
                      `ahead`: read only until the page is full, and at most _MOST_LOOKED rows
                                           next: the row that is not looked at

The sequence of expiries would be no sequence for a walk. No index has it (`walks.py`), so a page would cost
what all pages before it cost, and a session that is extended would come once more.

Criteria that few sessions meet are met far apart in the primary key. If an index finds at most _MOST_LOOKED
rows for them, these rows are all that is looked at, and their keys are sorted. Whether it does may change
from one page to the next: the sequence of keys is the same.
"""

from __future__ import annotations

from typing import Final

from mnemosyned.sessions.model import Criteria
from mnemosyned.sessions.token import MAX_TOKEN_BYTES
from mnemosyned.storage.postgres.columns import (
    COLUMNS,
    DAMAGE,
    LIVE,
    Query,
    Reading,
)
from mnemosyned.storage.postgres.conditions import condition, is_keyed

# Rows that meet nothing, or have expired, cost time too: this many about 5 ms.
_MOST_LOOKED: Final = 2500


def walk(
    table: str,
    criteria: Criteria,
    *,
    start: bytes,
    limit: int,
    page_bytes: int,
    due: str,
    reading: Reading,
) -> tuple[Query, list[object]]:
    """SessionStore.walk; `due` is the column that has an index and no later instant than the expiry.

    Locks nothing. Indexes: the primary key; that of a criterion or of `due`, if the range has an upper end.

    A row comes back for each session of the page, and one more for the key that follows, unless there is
    none: `is_next`, without any session. `before` is the key before it, of whatever row. Bags are withheld as
    in `Walks.find`.
    """
    where, values = condition(criteria, is_indexed=False)
    at = len(values) + 1
    is_met = f"({LIVE} AND {where}) AS is_met"
    ahead = (
        f"SELECT access_token, {is_met} FROM {table} WHERE access_token >= ${at} "
        f"ORDER BY access_token LIMIT {_MOST_LOOKED + 1}"
    )
    few = ""
    if is_keyed(criteria):
        few = f"SELECT access_token, {is_met} FROM {table} WHERE {where} LIMIT {_MOST_LOOKED + 1}"
    elif criteria.expires_before_us is not None:
        # The last of the values.
        few = (
            f"SELECT access_token, {is_met} FROM {table} WHERE {due} < ${at - 1} "
            f"ORDER BY {due} LIMIT {_MOST_LOOKED + 1}"
        )
    if few:
        is_few = f"(SELECT count(*) <= {_MOST_LOOKED} FROM few)"
        ahead = (
            f"SELECT access_token, is_met FROM few WHERE {is_few} AND access_token >= ${at} UNION ALL "
            f"SELECT access_token, is_met FROM ({ahead}) AS part WHERE NOT {is_few}"
        )
        few = f"few AS MATERIALIZED ({few}), "
    return _page(table, few, ahead, at, reading), [*values, start, limit, page_bytes]


def _page(table: str, few: str, ahead: str, at: int, reading: Reading) -> Query:
    limit, page_bytes = f"${at + 1}::bigint", f"${at + 2}"
    short_before = f"substring(before FROM 1 FOR {MAX_TOKEN_BYTES + 1}) AS before"
    return Query(
        "list",
        f"WITH {few}looked AS MATERIALIZED (SELECT access_token, number, before FROM "
        "(SELECT access_token, is_met, row_number() OVER keys AS number, "
        "lag(access_token) OVER keys AS before "
        f"FROM ({ahead}) AS ahead WINDOW keys AS (ORDER BY access_token)) AS numbered "
        # Not sorted: nothing is read beyond the last row that is wanted.
        f"WHERE is_met OR number > {_MOST_LOOKED} LIMIT {limit} + 1), "
        f"page AS (SELECT {COLUMNS}, {DAMAGE} AS damage FROM {table} WHERE access_token = ANY("
        f"ARRAY(SELECT access_token FROM looked WHERE number <= {_MOST_LOOKED} "
        f"ORDER BY access_token LIMIT {limit}))), "
        "summed AS (SELECT *, sum(CASE WHEN damage IS NULL THEN octet_length(bag) ELSE 0 END) "
        "OVER (ORDER BY access_token ROWS UNBOUNDED PRECEDING) AS bytes FROM page) "
        f"SELECT {reading.listed}, "
        f"CASE WHEN damage IS NULL AND bytes <= {page_bytes} THEN bag END AS bag, "
        f"{short_before}, bytes IS NULL AS is_next "
        "FROM looked LEFT JOIN summed USING (access_token) ORDER BY access_token",
    )
