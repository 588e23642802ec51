"""The statements for one table; see SessionStore for what each must do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_NEW_COLUMNS: Final = "access_token, refresh_token, subject_id, subject_client, bag"
_COLUMNS: Final = f"{_NEW_COLUMNS}, expire_at"


@dataclass(frozen=True, slots=True)
class Query:
    """A statement and the name it is counted under."""

    name: str
    sql: str


class Queries:
    """All statements; `table` is the quoted name, the only thing ever spliced into SQL."""

    def __init__(self, table: str) -> None:
        self._table = table
        self.now = Query("now", "SELECT clock_timestamp() AS now")
        # The cluster of databases, the database, the table: together there is only one of it.
        self.identity = Query(
            "identity",
            "SELECT concat_ws('/', system_identifier, (SELECT oid FROM pg_database "
            f"WHERE datname = current_database()), '{_literal(table)}'::regclass::oid) AS identity "
            "FROM pg_control_system()",
        )
        self.start = _start(table)
        self.load = _load(table)
        self.exist = _exist(table)
        self.read_bags = _read_bags(table)
        self.lock_bags = _read_bags(table, "ORDER BY access_token FOR NO KEY UPDATE")
        self.write_bags = _write_bags(table)
        self.abandon = _abandon(table)
        self.touch = _touch(table)
        self.clean_up = _clean_up(table)
        self.rename = _rename(table, "SKIP LOCKED")
        self.rename_one = _rename(table)
        self.stored_keys_after = Query(
            "names",
            f"SELECT access_token FROM {table} WHERE access_token > $1 ORDER BY access_token LIMIT $2",
        )

    def find(self, where: str, *, offset_at: int) -> Query:
        """Page through live sessions; parameters from `offset_at` on: offset, limit, bytes of bags."""
        return Query(
            "list",
            # Bags beyond what a page may hold stay in the database: a row without one tells so.
            "SELECT access_token, refresh_token, subject_id, subject_client, expire_at, CASE WHEN "
            "sum(octet_length(bag)) OVER (ORDER BY expire_at, access_token ROWS UNBOUNDED PRECEDING) "
            f"<= ${offset_at + 2} THEN bag END AS bag FROM (SELECT {_COLUMNS} FROM {self._table} "
            f"WHERE expire_at > now() AND {where} ORDER BY expire_at, access_token "
            f"OFFSET ${offset_at} LIMIT ${offset_at + 1}) AS page ORDER BY expire_at, access_token",
        )

    def delete(self, where: str, *, limit_at: int) -> Query:
        """Delete what meets a condition; parameter `limit_at`: how many at most.

        One row: the tokens, and how many were picked, of which others may have ended or renamed some.
        """
        return Query(
            "delete",
            f"WITH picked AS MATERIALIZED (SELECT access_token FROM {self._table} WHERE {where} "
            f"LIMIT ${limit_at}), ended AS (SELECT access_token FROM {self._table} WHERE access_token IN "
            f"(SELECT access_token FROM picked) AND {where} ORDER BY access_token FOR UPDATE), "
            f"gone AS (DELETE FROM {self._table} AS held USING ended "
            "WHERE held.access_token = ended.access_token RETURNING held.access_token) "
            "SELECT (SELECT count(*) FROM picked) AS picked, "
            "ARRAY(SELECT access_token FROM gone) AS tokens",
        )


# A write that must not be done late looks at the clock when its row is locked: whoever does it instead
# then waits for the lock, or comes first. A start has no row to lock and looks when it is its turn, row by
# row, the fence (OFFSET 0) in front; who does it instead then meets its token.
def _start(table: str) -> Query:
    return Query(
        "start",
        "WITH asked AS MATERIALIZED (SELECT * FROM unnest($1::bytea[], $2::bytea[], $3::text[], $4::text[], "
        f"$5::bytea[], $6::bigint[], $7::timestamptz[]) AS new ({_NEW_COLUMNS}, ttl_us, not_after)), "
        f"made AS (INSERT INTO {table} AS held ({_COLUMNS}) "
        f"SELECT {_NEW_COLUMNS}, now() + ttl_us * interval '1 microsecond' "
        "FROM (SELECT * FROM asked ORDER BY access_token OFFSET 0) AS sorted "
        "WHERE clock_timestamp() < not_after "
        # A row that is past its expiry does not exist, though cleanup has not seen it yet.
        "ON CONFLICT (access_token) DO UPDATE SET refresh_token = EXCLUDED.refresh_token, "
        "subject_id = EXCLUDED.subject_id, subject_client = EXCLUDED.subject_client, "
        "bag = EXCLUDED.bag, expire_at = EXCLUDED.expire_at WHERE held.expire_at <= now() "
        "RETURNING access_token, expire_at) "
        "SELECT access_token, expire_at, clock_timestamp() >= not_after AS is_late "
        "FROM asked LEFT JOIN made USING (access_token)",
    )


def _load(table: str) -> Query:
    return Query(
        "load",
        f"WITH found AS MATERIALIZED (SELECT {_COLUMNS} FROM {table} "
        "WHERE access_token = ANY($1::bytea[]) AND expire_at > now()), "
        f"moved AS (UPDATE {table} AS held SET expire_at = now() + $2::interval FROM "
        f"(SELECT access_token FROM {table} WHERE access_token = ANY($1::bytea[]) "
        "AND expire_at > now() AND expire_at < now() + $3::interval "
        "ORDER BY access_token FOR NO KEY UPDATE SKIP LOCKED) AS behind "
        "WHERE held.access_token = behind.access_token RETURNING held.access_token, held.expire_at) "
        "SELECT access_token, refresh_token, subject_id, subject_client, bag, "
        "COALESCE(moved.expire_at, found.expire_at) AS expire_at "
        "FROM found LEFT JOIN moved USING (access_token)",
    )


def _exist(table: str) -> Query:
    return Query(
        "exists",
        f"SELECT access_token FROM {table} WHERE access_token = ANY($1::bytea[]) AND expire_at > now()",
    )


def _read_bags(table: str, locking: str = "") -> Query:
    return Query(
        "set_value_select",
        # The transaction that wrote a row tells its versions apart.
        f"SELECT access_token, bag, xmin AS version, clock_timestamp() AS now FROM {table} "
        f"WHERE access_token = ANY($1::bytea[]) AND expire_at > now() {locking}",
    )


def _write_bags(table: str) -> Query:
    return Query(
        "set_value_update",
        "WITH unchanged AS MATERIALIZED (SELECT held.access_token, new.bag, not_after "
        f"FROM {table} AS held JOIN unnest($1::bytea[], $2::xid[], $3::bytea[], $4::timestamptz[]) "
        "AS new (access_token, version, bag, not_after) "
        "ON held.access_token = new.access_token AND held.xmin = new.version "
        "ORDER BY held.access_token FOR NO KEY UPDATE OF held) "
        f"UPDATE {table} AS held SET bag = unchanged.bag FROM unchanged "
        "WHERE held.access_token = unchanged.access_token AND clock_timestamp() < not_after "
        "RETURNING held.access_token",
    )


def _abandon(table: str) -> Query:
    return Query(
        "abandon",
        "WITH ended AS MATERIALIZED (SELECT held.access_token, not_after "
        f"FROM {table} AS held JOIN unnest($1::bytea[], $2::timestamptz[]) "
        "AS asked (access_token, not_after) ON held.access_token = asked.access_token "
        "ORDER BY held.access_token FOR UPDATE OF held), "
        f"gone AS (DELETE FROM {table} AS held USING ended WHERE held.access_token = ended.access_token "
        "AND clock_timestamp() < not_after RETURNING held.access_token, held.expire_at > now() AS was_live) "
        "SELECT access_token, was_live, was_live IS NULL AS is_late "
        "FROM ended LEFT JOIN gone USING (access_token)",
    )


def _touch(table: str) -> Query:
    return Query(
        "touch",
        f"UPDATE {table} AS held SET expire_at = GREATEST(held.expire_at, new.expire_at) "
        f"FROM (SELECT access_token, asked.expire_at FROM {table} AS live "
        "JOIN unnest($1::bytea[], $2::timestamptz[]) AS asked (access_token, expire_at) "
        "USING (access_token) WHERE live.expire_at > now() "
        "ORDER BY access_token FOR NO KEY UPDATE OF live) AS new "
        "WHERE held.access_token = new.access_token RETURNING held.access_token",
    )


def _clean_up(table: str) -> Query:
    return Query(
        "clean_up",
        # One node at a time: the others' try at the lock fails and they find nothing.
        f"DELETE FROM {table} WHERE access_token IN (SELECT access_token FROM {table} "
        "WHERE expire_at <= now() AND (SELECT pg_try_advisory_xact_lock($2)) "
        "ORDER BY expire_at LIMIT $1 FOR UPDATE SKIP LOCKED) RETURNING access_token",
    )


# A renaming moves a row in the order of names, so that locks taken in that order do not keep it from meeting
# others crosswise: of many it waits for none.
def _rename(table: str, locking: str = "") -> Query:
    return Query(
        "rename",
        "WITH asked AS MATERIALIZED (SELECT * FROM unnest($1::bytea[], $2::bytea[]) WITH ORDINALITY "
        "AS one (old, new, number)), "
        "held AS MATERIALIZED (SELECT asked.old, asked.new, "
        f"EXISTS (SELECT 1 FROM {table} AS taken WHERE taken.access_token = asked.new "
        f"AND taken.expire_at > now()) AS is_taken FROM {table} AS there "
        "JOIN asked ON there.access_token = asked.old "
        f"WHERE there.expire_at > now() ORDER BY asked.old FOR UPDATE OF there {locking}), "
        f"ended AS (DELETE FROM {table} AS there USING held "
        "WHERE is_taken AND there.access_token = held.old), "
        # Which does not exist, though cleanup has not seen it yet, and is in the way.
        f"expired AS (DELETE FROM {table} AS there USING held WHERE NOT is_taken "
        "AND there.access_token = held.new AND there.expire_at <= now() RETURNING 1), "
        f"renamed AS (UPDATE {table} AS there SET access_token = held.new FROM held WHERE NOT is_taken "
        "AND there.access_token = held.old AND (SELECT count(*) FROM expired) >= 0) "
        f"SELECT EXISTS (SELECT 1 FROM {table} AS there WHERE there.access_token IN (asked.old, asked.new) "
        "AND there.expire_at > now()) AS is_there FROM asked ORDER BY number",
    )


def _literal(text: str) -> str:
    return text.replace("'", "''")
