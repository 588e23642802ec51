"""The statements for one table; see SessionStore for what each must do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_COLUMNS: Final = "access_token, refresh_token, subject_id, subject_client, bag, expire_at"


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
        self.lock_bags = _lock_bags(table)
        self.write_bags = _write_bags(table)
        self.abandon = _abandon(table)
        self.touch = _touch(table)
        self.clean_up = _clean_up(table)

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

        One row: the tokens, and how many were picked, of which others may have ended some meanwhile.
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


def _start(table: str) -> Query:
    return Query(
        "start",
        f"INSERT INTO {table} AS held ({_COLUMNS}) "
        "SELECT access_token, refresh_token, subject_id, subject_client, bag, now() + $6::interval "
        "FROM unnest($1::bytea[], $2::bytea[], $3::text[], $4::text[], $5::bytea[]) "
        "AS new (access_token, refresh_token, subject_id, subject_client, bag) ORDER BY access_token "
        # A row that is past its expiry does not exist, though cleanup has not seen it yet.
        "ON CONFLICT (access_token) DO UPDATE SET refresh_token = EXCLUDED.refresh_token, "
        "subject_id = EXCLUDED.subject_id, subject_client = EXCLUDED.subject_client, "
        "bag = EXCLUDED.bag, expire_at = EXCLUDED.expire_at WHERE held.expire_at <= now() "
        "RETURNING access_token, expire_at",
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


def _lock_bags(table: str) -> Query:
    return Query(
        "set_value_select",
        f"SELECT access_token, bag FROM {table} "
        "WHERE access_token = ANY($1::bytea[]) AND expire_at > now() "
        "ORDER BY access_token FOR NO KEY UPDATE",
    )


def _write_bags(table: str) -> Query:
    return Query(
        "set_value_update",
        f"UPDATE {table} AS held SET bag = new.bag "
        "FROM unnest($1::bytea[], $2::bytea[]) AS new (access_token, bag) "
        "WHERE held.access_token = new.access_token",
    )


def _abandon(table: str) -> Query:
    return Query(
        "abandon",
        f"WITH ended AS (SELECT access_token FROM {table} "
        "WHERE access_token = ANY($1::bytea[]) ORDER BY access_token FOR UPDATE) "
        f"DELETE FROM {table} AS held USING ended WHERE held.access_token = ended.access_token "
        "RETURNING held.access_token, held.expire_at > now() AS was_live",
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


def _literal(text: str) -> str:
    return text.replace("'", "''")
