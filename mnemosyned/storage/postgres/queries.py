"""The SQL of the PostgreSQL engine: one statement per method of the storage port (`sessions/store.py`).

The table (`schema.py` creates it; a table of the Go daemon has the same columns):

    access_token    bytea  primary key   the session's stored key: its token, or the token's hash
    refresh_token   bytea  null          index (refresh_token)           Delete and List
    subject_id      text                 index (subject_id)              Delete and List
    subject_client  text   null
    bag             bytea                the stored form, see sessions/bag.py
    expire_at       timestamptz
    due_at          timestamptz          index (due_at)                  cleanup and List, see `walks.py`

A change of `bag` or `expire_at` touches no index, so PostgreSQL can make it in place (a heap-only tuple,
HOT). A table that is not migrated yet (`migration.py`) has no `due_at`, and an index on
(expire_at, access_token). There every touch writes a new entry into every index.

Rules that all statements keep:

- Shape. A batch arrives as one array per column (`unnest`), so the text of a statement does not depend on
  the size of the batch. asyncpg prepares each text once per connection. No statement may need a sequential
  scan: the pool turns these scans off.
- No look-up by key may go through the index on `expire_at`: `LIVE` is written so that no index can serve it.
  Statistics of that column are always old, since its values only grow. PostgreSQL then expects that no row
  is live, and takes the index of all live sessions for the cheapest way to a single one.
- Expired rows do not exist. Each statement compares `expire_at` with the clock itself, because cleanup runs
  late. A start replaces an expired row; cleanup only frees the space.
- Lock order. A statement that changes rows first locks them in the order of `access_token`, in a
  common table expression (CTE) or subquery with ORDER BY and FOR UPDATE. A plain UPDATE would lock rows in
  the order of its plan, and batches of two nodes could deadlock. Statements that skip locked rows (`load`,
  `clean_up`, `rename`) cannot deadlock by row locks in any order, since they wait for none.
- Lock strength. FOR NO KEY UPDATE is what an UPDATE of other columns than the key takes itself; FOR UPDATE
  is what a DELETE and a change of the key take. Locking more would be wider than needed. Locking less would
  upgrade the lock later, and two statements that upgrade deadlock.
- Recheck. A statement that has waited for a row lock sees the newest version of that row, and PostgreSQL
  checks its conditions again on that version (READ COMMITTED). A row that no longer meets them drops out.
- Late writes. A write with a `not_after` compares it with `clock_timestamp()` after its row is locked.
  Suppose that its caller gives up and another node repeats the write after `not_after`. Either this write
  holds the lock, and the repeated one waits for it, or this write gets the lock later and finds itself late.
  A start has no row to lock; see `_start`.
- Two clocks. `now()` is the start of the transaction: one instant for all rows and parts of a statement.
  `clock_timestamp()` is the time of its evaluation: the only one that moves while a statement waits.
- Snapshot. All parts of a statement see the table as it was at the start of the statement. One part learns
  what another part changed only from its RETURNING.

Every statement is a transaction of its own, except `lock_bags` and the `write_bags` after it. If a
connection breaks during a write, the outcome is unknown: the server may still commit.
"""

from __future__ import annotations

from typing import Final

from mnemosyned.sessions.model import MAX_BAG_BYTES
from mnemosyned.storage.postgres.columns import (
    COLUMNS,
    DAMAGE,
    LIVE,
    NEW_COLUMNS,
    PLAIN_READING,
    READABLE_BAG,
    READING,
    Query,
    Reading,
)
from mnemosyned.storage.postgres.walks import Walks, WalksByDueTime, WalksByExpiry

__all__ = ["Queries", "Query"]

# Beside each join with the table, though the join says as much. If the table had no live row when it was
# analyzed, PostgreSQL expects one row, and takes a walk of the whole key for as cheap as a look-up.
ASKED: Final = "access_token = ANY($1::bytea[])"

# What joins the row `held` with its key instead, where PostgreSQL expects few of many rows. Beside ASKED it
# may compare all keys with all others: a write of 256 bags took 17 ms, and takes 4. This is a look-up of each
# key, and no equality, which a walk could serve. Other servers may have no index that serves it.
SAME_KEY: Final = "held.access_token = ANY(ARRAY[{}])"
PLAIN_SAME_KEY: Final = f"held.access_token = {{}} AND held.{ASKED}"

# What changes with every change of a row, and its type. `xmin` is the transaction that wrote it.
_XMIN: Final = ("xmin", "xid")
# Of a bag that is too long, only its length: the row is damaged whatever it holds.
_DIGEST: Final = (
    "md5(concat_ws('/', encode(refresh_token, 'hex'), subject_id, subject_client, octet_length(bag)::text, "
    f"CASE WHEN octet_length(bag) <= {MAX_BAG_BYTES} THEN encode(bag, 'hex') END, "
    "extract(epoch FROM expire_at)::text))"
)
_PLAIN_VERSION: Final = (_DIGEST, "text")


class Queries:
    """All statements for one table.

    `table` is the qualified, quoted name. It is the only thing that is ever spliced into SQL besides the
    conditions of `conditions.py`, which are constant texts. Values are parameters.
    """

    def __init__(self, table: str, *, is_due: bool = False, identity: str | None = None) -> None:
        """`is_due`: the table has the column `due_at` and its index.

        With `identity`, the table with the store's identity, the statements are plain ones (`kind.py`).
        """
        self.is_due = is_due
        self.is_plain = identity is not None
        version = _PLAIN_VERSION if self.is_plain else _XMIN
        # A bag may be its own version, as it is for bags that are remembered. On PostgreSQL it would cost:
        # a large one is sent twice (1.2 times as long for 100 kB, twice for 1 MB).
        bag_version = "bag" if self.is_plain else "xmin"
        reading = PLAIN_READING if self.is_plain else READING
        self.walks: Walks = WalksByDueTime(table) if is_due else WalksByExpiry(table, reading)
        # Storage.now_us. It does not touch the table, so the clock is known while that is locked.
        self.now = Query("now", "SELECT clock_timestamp() AS now")
        self.identity = _identity(table, identity)
        self.estimate = _estimate(table, is_plain=self.is_plain)
        self.start = _start(table, is_due=is_due)
        self.load = _load(table, reading)
        self.load_unmoved = _load_unmoved(table, reading)
        self.exist = _exist(table)
        self.read_bags = _read_bags(table, version=bag_version)
        # The last round of SessionStore.set_values: the rows stay locked until the same transaction has
        # written them.
        self.lock_bags = _read_bags(table, "ORDER BY access_token FOR NO KEY UPDATE", version=bag_version)
        same_key = PLAIN_SAME_KEY if self.is_plain else SAME_KEY
        self.write_bags = _write_bags(table, reading, same_key, is_known=self.is_plain)
        self.write_known = _write_bags(table, reading, same_key, is_known=True)
        self.abandon = _abandon(table, same_key)
        self.touch = _touch(table, same_key)
        self.rename = _rename(table, "SKIP LOCKED")
        self.rename_one = _rename(table)
        self.stored_from = _stored_from(table, reading, version)
        self.remove_unchanged = _remove_unchanged(table, version, same_key)
        self.stored_keys_after = _stored_keys_after(table)


def _identity(table: str, stored: str | None) -> Query:
    """Storage.identity: which sessions these are; `stored` is the table with a random identity.

    The cluster of databases goes by its number, for nodes may reach it by different addresses; the database
    and the table by their names. A table or database that is dropped and created again keeps its identity: a
    node that restarts then must find its peers.
    """
    system = "pg_control_system()"
    if stored is not None:
        system = f"(SELECT identity AS system_identifier FROM {stored} WHERE id = 1) AS stored"
    return Query(
        "identity",
        f"SELECT concat_ws('/', system_identifier, current_database(), '{_literal(table)}') AS identity "
        f"FROM {system}",
    )


def _estimate(table: str, *, is_plain: bool) -> Query:
    """Storage.estimated_sessions: rows per page when the table was last analyzed, times its pages now.

    That is what the planner estimates. The statement reads the catalog and the file's size, and never the
    table. The catalog of a plain server may have no number of rows, and to count them is to read them.
    """
    sessions = "SELECT 0::bigint AS sessions"
    if not is_plain:
        sessions = (
            "SELECT (CASE WHEN relpages > 0 THEN reltuples / relpages ELSE 0 END * pg_relation_size(oid) "
            "/ current_setting('block_size')::int)::bigint AS sessions "
            f"FROM pg_class WHERE oid = '{_literal(table)}'::regclass"
        )
    return Query("estimate", sessions)


def _start(table: str, *, is_due: bool) -> Query:
    """SessionStore.start: insert sessions; replace rows that have expired.

    Parameters: one array per column of `asked`; no token twice, which ON CONFLICT could not handle.
    Index: the primary key, which finds the conflict. Locks: the new rows, in token order, so that two
    batches with tokens in common wait for each other in one direction only.

    One row per item comes back: its expiry, or NULL and whether the item is late. An item that was not
    made because it is late is late at the end as well, since the clock only moves forward. A duplicate may
    pass its limit before the end and be called late: the caller then does not know, which is safe.

    If two nodes start one token at once, the second insertion waits for the first transaction. It then
    meets a live row and makes nothing. A start that is repeated after its `not_after` is safe the same way:
    the repeated one waits for this one and meets its token, or comes first and is met by this one.

    An insertion can also wait for a transaction that ends the session, or is rolled back, and is then made
    after the clock was compared. It is compared again when the row is there; a late row fails the statement
    (DivisionByZeroError). The store then runs each item alone, and the late one is refused before its wait.
    """
    due, due_value, due_set = "", "", ""
    if is_due:
        due, due_value = ", due_at", ", now() + ttl_us * interval '1 microsecond'"
        due_set = ", due_at = EXCLUDED.due_at"
    return Query(
        "start",
        "WITH asked AS MATERIALIZED (SELECT * FROM unnest($1::bytea[], $2::bytea[], $3::text[], $4::text[], "
        f"$5::bytea[], $6::bigint[], $7::timestamptz[]) AS new ({NEW_COLUMNS}, ttl_us, not_after)), "
        f"made AS (INSERT INTO {table} AS held ({COLUMNS}{due}) "
        f"SELECT {NEW_COLUMNS}, now() + ttl_us * interval '1 microsecond'{due_value} "
        # OFFSET 0 is a fence: PostgreSQL moves no condition into a subquery that has one. Below the sort,
        # the clock would be compared for all rows before the first is inserted. Above it, each row is
        # compared when it is inserted, after the wait for the rows before it.
        "FROM (SELECT * FROM asked ORDER BY access_token OFFSET 0) AS sorted "
        "WHERE clock_timestamp() < not_after "
        # EXCLUDED is the row that could not be inserted. The WHERE spares a live row: it is locked, but
        # neither changed nor returned. An expired row does not exist, though cleanup has not seen it yet.
        "ON CONFLICT (access_token) DO UPDATE SET refresh_token = EXCLUDED.refresh_token, "
        "subject_id = EXCLUDED.subject_id, subject_client = EXCLUDED.subject_client, "
        f"bag = EXCLUDED.bag, expire_at = EXCLUDED.expire_at{due_set} WHERE held.expire_at <= now() "
        "RETURNING access_token, expire_at, clock_timestamp() AS made_at) "
        "SELECT access_token, expire_at, clock_timestamp() >= not_after AS is_late, "
        # Fails, and takes all back, if a row was made too late: nothing else undoes an insertion.
        "1 / (made_at < not_after)::int AS in_time "
        "FROM asked LEFT JOIN made USING (access_token)",
    )


def _load(table: str, reading: Reading) -> Query:
    """SessionStore.load: read sessions, and extend those whose stored expiry lags.

    Parameters: tokens, ttl, and ttl minus the touch interval. A row is extended only if its expiry lies
    before now + $3, so most loads write nothing. Index: the primary key.

    Locks: only the rows to extend. SKIP LOCKED, because a Get must not wait for a writer: a row that
    another transaction holds is returned with the expiry it has, and a later load or touch extends it.
    If two nodes load one lagging session at once, one extends it and the other skips it.
    """
    return Query(
        "load",
        # MATERIALIZED: the rows are read once, by the snapshot of the statement, whatever the join's plan.
        f"WITH found AS MATERIALIZED (SELECT {COLUMNS}, {DAMAGE} AS damage FROM {table} "
        f"WHERE access_token = ANY($1::bytea[]) AND {LIVE}), "
        f"moved AS (UPDATE {table} AS held SET expire_at = now() + $2::interval FROM "
        f"(SELECT access_token FROM {table} WHERE access_token = ANY($1::bytea[]) "
        # A damaged row is left to expire.
        f"AND {LIVE} AND expire_at - $3::interval < now() AND {DAMAGE} IS NULL "
        "ORDER BY access_token FOR NO KEY UPDATE SKIP LOCKED) AS behind "
        "WHERE held.access_token = behind.access_token RETURNING held.access_token, held.expire_at) "
        f"SELECT access_token, {reading.readable}, {READABLE_BAG}, damage, false AS is_behind, "
        "COALESCE(moved.expire_at, found.expire_at) AS expire_at "
        "FROM found LEFT JOIN moved USING (access_token)",
    )


def _load_unmoved(table: str, reading: Reading) -> Query:
    """SessionStore.load on a server that refuses writes; parameters: tokens, ttl minus the touch interval."""
    return Query(
        "load_read_only",
        f"SELECT access_token, {reading.readable}, {READABLE_BAG}, damage, expire_at, is_behind FROM (SELECT "
        f"{COLUMNS}, {DAMAGE} AS damage, expire_at - $2::interval < now() AS is_behind FROM {table} "
        f"WHERE access_token = ANY($1::bytea[]) AND {LIVE}) AS found",
    )


def _exist(table: str) -> Query:
    """SessionStore.exist. Locks nothing and extends nothing. Index: the primary key."""
    return Query(
        "exists",
        f"SELECT access_token FROM {table} WHERE access_token = ANY($1::bytea[]) AND {LIVE}",
    )


def _read_bags(table: str, locking: str = "", *, version: str = "xmin") -> Query:
    """The first half of SessionStore.set_values: bags, and the version that each row has.

    `xmin` is the number of the transaction that wrote the row: it changes with every UPDATE and costs no
    column. A touch or a load that extends the row changes it too, and the round is lost though the bag is
    the same; the store then tries again. Numbers repeat after 2^32 transactions, far beyond any time-out.
    """
    return Query(
        "set_value_select",
        f"SELECT access_token, CASE WHEN octet_length(bag) <= {MAX_BAG_BYTES} THEN bag END AS bag, "
        f"{version} AS version, clock_timestamp() AS now FROM {table} "
        f"WHERE access_token = ANY($1::bytea[]) AND {LIVE} {locking}",
    )


def _write_bags(table: str, reading: Reading, same_key: str, *, is_known: bool) -> Query:
    """The second half of SessionStore.set_values: write each bag whose row is as it was.

    Parameters: tokens, the versions that were read, bags, limits in time. `is_known`: the bags of before in
    place of the versions, where no read came first. Index: the primary key. Locks: the rows that still fit,
    in token order. Returned are the rows that were written, without their bags; of damaged rows, the key.

    If two nodes have changed one bag, the second waits for the lock of the first. The recheck then finds
    another `xmin` or bag, and the row drops out: no change is lost, and the second node reads again.
    """
    kind, column, live = "xid", "xmin", ""
    if is_known:
        kind, column, live = "bytea", "bag", f"AND held.{LIVE} "
    return Query(
        "set_value_update",
        "WITH unchanged AS MATERIALIZED (SELECT held.access_token AS token, new.bag AS new_bag, not_after "
        f"FROM {table} AS held JOIN unnest($1::bytea[], $2::{kind}[], $3::bytea[], $4::timestamptz[]) "
        "AS new (access_token, before, bag, not_after) "
        f"ON {same_key.format('new.access_token')} AND held.{column} = new.before {live}"
        "ORDER BY new.access_token FOR NO KEY UPDATE OF held), "
        # The clock is compared here and not in `unchanged`, whose conditions are checked before the lock.
        f"written AS (UPDATE {table} AS held SET bag = new_bag FROM unchanged "
        f"WHERE {same_key.format('token')} AND clock_timestamp() < not_after "
        f"RETURNING access_token, refresh_token, subject_id, subject_client, expire_at, {DAMAGE} AS damage) "
        f"SELECT access_token, {reading.readable}, expire_at, damage FROM written",
    )


def _abandon(table: str, same_key: str) -> Query:
    """SessionStore.abandon: delete rows by stored key.

    Parameters: tokens, limits in time. Index: the primary key. Locks: the rows, in token order, expired
    ones included: they are deleted as well, and only `was_live` tells the difference.

    No row comes back for a token that is not stored. A row that was locked (`ended`) and not deleted
    (`gone`) is late. If two nodes abandon one session at once, the second waits, finds no row, and its
    caller gets NOT_FOUND.
    """
    return Query(
        "abandon",
        "WITH ended AS MATERIALIZED (SELECT held.access_token, not_after "
        f"FROM {table} AS held JOIN unnest($1::bytea[], $2::timestamptz[]) "
        f"AS asked (access_token, not_after) ON {same_key.format('asked.access_token')} "
        "ORDER BY asked.access_token FOR UPDATE OF held), "
        f"gone AS (DELETE FROM {table} AS held USING ended WHERE {same_key.format('ended.access_token')} "
        "AND clock_timestamp() < not_after "
        "RETURNING held.access_token, held.expire_at > now() AS was_live) "
        "SELECT access_token, was_live, was_live IS NULL AS is_late "
        "FROM ended LEFT JOIN gone USING (access_token)",
    )


def _touch(table: str, same_key: str) -> Query:
    """SessionStore.touch: move expiries forward to what nodes hold in memory.

    Parameters: tokens, expiries. Index: the primary key. Locks: the live rows, in token order. A touch has
    no limit in time: GREATEST makes it harmless however late it comes, and in which order two nodes write.
    A session that has expired stays expired, though a touch for it may still be under way.
    """
    return Query(
        "touch",
        f"UPDATE {table} AS held SET expire_at = GREATEST(held.expire_at, new.expire_at) "
        f"FROM (SELECT asked.access_token, asked.expire_at FROM {table} AS held "
        "JOIN unnest($1::bytea[], $2::timestamptz[]) AS asked (access_token, expire_at) "
        f"ON {same_key.format('asked.access_token')} WHERE held.{LIVE} "
        "ORDER BY asked.access_token FOR NO KEY UPDATE OF held) AS new "
        f"WHERE {same_key.format('new.access_token')} RETURNING held.access_token",
    )


def _rename(table: str, locking: str = "") -> Query:
    """RenamableStore.rename: give live sessions new stored keys; no key comes twice.

    Parameters: old keys, new keys. Index: the primary key, for each key alone, as by SAME_KEY. Locks: the
    rows under the old keys; whatever a DELETE or UPDATE then changes. The result is in the order of the
    parameters.

    A renaming moves a row within the order of keys, so the common lock order does not help: a batch that
    holds one row and waits for another can meet a touch that holds them the other way round. Therefore:

    - `rename`, for many: SKIP LOCKED. Rows that others hold are passed over, and the caller tries again.
    - `rename_one`, for one: waits, for at most lock_timeout, and holds nothing else meanwhile.

    If two nodes rename one session to the same key, the second skips it, or waits and finds no row. If a
    start or another renaming takes the new key after the snapshot, the primary key refuses the UPDATE
    (UniqueViolationError), which the store treats as the fault of one item.
    """
    return Query(
        "rename",
        "WITH asked AS MATERIALIZED (SELECT * FROM unnest($1::bytea[], $2::bytea[]) WITH ORDINALITY "
        "AS one (old, new, number)), "
        "held AS MATERIALIZED (SELECT asked.old, asked.new, "
        f"EXISTS (SELECT 1 FROM {table} AS taken WHERE taken.access_token = ANY(ARRAY[asked.new]) "
        f"AND taken.{LIVE}) AS is_taken FROM {table} AS there "
        "JOIN asked ON there.access_token = ANY(ARRAY[asked.old]) "
        f"WHERE there.{LIVE} ORDER BY asked.old FOR UPDATE OF there {locking}), "
        # Of two live sessions of one token, the one under the current key stays.
        f"ended AS (DELETE FROM {table} AS there USING held "
        "WHERE is_taken AND there.access_token = ANY(ARRAY[held.old])), "
        # An expired row does not exist, but cleanup has not seen it yet, and it occupies the key.
        f"expired AS (DELETE FROM {table} AS there USING held WHERE NOT is_taken "
        "AND there.access_token = ANY(ARRAY[held.new]) "
        f"AND NOT there.{LIVE} RETURNING 1), "
        # PostgreSQL runs the parts of a statement in any order. Counting `expired` (always >= 0) makes the
        # UPDATE wait until those rows are deleted, or the primary key would refuse it.
        f"renamed AS (UPDATE {table} AS there SET access_token = held.new FROM held WHERE NOT is_taken "
        "AND there.access_token = ANY(ARRAY[held.old]) AND (SELECT count(*) FROM expired) >= 0) "
        # By the snapshot, so before the changes: a session that is there has one key or the other.
        f"SELECT EXISTS (SELECT 1 FROM {table} AS there WHERE there.access_token IN (asked.old, asked.new) "
        f"AND there.{LIVE}) AS is_there FROM asked ORDER BY number",
    )


def _stored_keys_after(table: str) -> Query:
    """RenamableStore.stored_keys_after: a range of the primary key. Parameters: a key, how many.

    It goes on from the last key instead of by OFFSET, so each page costs the same, and renamings meanwhile
    neither repeat nor hide others.
    """
    return Query(
        "stored_keys",
        f"SELECT access_token FROM {table} WHERE access_token > $1 ORDER BY access_token LIMIT $2",
    )


def _stored_from(table: str, reading: Reading, version: tuple[str, str]) -> Query:
    """CheckableStore.stored_from: a range of the primary key, from $1 on, expired rows too.

    Parameters: the least key, how many rows, how many bytes. Locks nothing. A row is left to the next page if
    those before it on this page have $3 bytes already, so there is always one row. Damaged rows are not read.
    """
    return Query(
        "check",
        f"SELECT access_token, {reading.readable}, {READABLE_BAG}, damage, expire_at, version FROM ("
        "SELECT *, sum(octet_length(access_token) "
        "+ CASE WHEN damage IS NULL THEN octet_length(bag) ELSE 0 END) "
        "OVER (ORDER BY access_token ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS bytes_before "
        f"FROM (SELECT {COLUMNS}, {DAMAGE} AS damage, {version[0]} AS version FROM {table} "
        "WHERE access_token >= $1 ORDER BY access_token LIMIT $2) AS page) AS summed "
        "WHERE COALESCE(bytes_before, 0) <= $3 ORDER BY access_token",
    )


def _remove_unchanged(table: str, version: tuple[str, str], same_key: str) -> Query:
    """CheckableStore.remove_unchanged: delete rows that have still the version that was read.

    Parameters: keys, versions. Index: the primary key. Locks: the rows whose version still fits, in the
    sequence of their keys. A row that another writer changes meanwhile drops out at the recheck.
    """
    return Query(
        "check_remove",
        f"WITH unchanged AS MATERIALIZED (SELECT held.access_token FROM {table} AS held "
        f"JOIN unnest($1::bytea[], $2::{version[1]}[]) AS asked (access_token, version) "
        f"ON {same_key.format('asked.access_token')} AND {version[0]} = asked.version "
        "ORDER BY asked.access_token FOR UPDATE OF held) "
        f"DELETE FROM {table} AS held USING unchanged WHERE {same_key.format('unchanged.access_token')} "
        "RETURNING held.access_token",
    )


def _literal(text: str) -> str:
    """Escape the table's name for a string literal, from which `regclass` reads it."""
    return text.replace("'", "''")
