"""Measure what a touch costs PostgreSQL: `make touches`.

Sessions are started and then touched again and again, in batches as the daemon writes them. A touch that
PostgreSQL makes in place (a heap-only tuple, HOT) writes no index, and its space needs no VACUUM.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import secrets
import sys
import tempfile
import time
from pathlib import Path

import asyncpg
from prometheus_client import CollectorRegistry

from mnemosyned.embedded.server import EmbeddedPostgres
from mnemosyned.observe.metrics import QueryMetrics
from mnemosyned.sessions import bag
from mnemosyned.sessions.model import NewSession, Touch
from mnemosyned.storage.postgres.address_in_use import PostgresOptions
from mnemosyned.storage.postgres.pool import PostgresPool
from mnemosyned.storage.postgres.schema import Table
from mnemosyned.storage.postgres.store import PostgresStore

TABLE = Table(schema="mnemosyne", name="session")
TTL_US = 24 * 60 * 1_000_000
BATCH = 512
BAG = bag.encode({"name": "Ada Lovelace", "theme": "dark", "language": "en"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=31, help="how often each session is touched")
    parser.add_argument("--period", type=float, default=0.8, help="seconds from round to round; 0: no pause")
    parser.add_argument("--fillfactor", type=int, help="of the table, instead of the daemon's own")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, EmbeddedPostgres.start(Path(directory)) as server:
        asyncio.run(measure(server.dsn, options))


async def measure(dsn: str, options: argparse.Namespace) -> None:
    pool_options = PostgresOptions(dsn=dsn, pool_size=4, connect_timeout_s=5, statement_timeout_s=60)
    store = PostgresStore(PostgresPool(pool_options, QueryMetrics(CollectorRegistry())), TABLE)
    await store.open()
    connection = await asyncpg.connect(dsn)
    if options.fillfactor:
        await connection.execute(f"ALTER TABLE {TABLE.sql} SET (fillfactor = {options.fillfactor})")
    tokens = await start(store, options.sessions)
    await connection.execute("CHECKPOINT")
    before = await state(connection)
    took_s = await touch(store, tokens, rounds=options.rounds, period_s=options.period)
    await store.close()
    # The server counts when a connection ends.
    await asyncio.sleep(1)
    report(before, await state(connection), took_s)
    await connection.close()


async def start(store: PostgresStore, count: int) -> list[str]:
    tokens = [secrets.token_hex(64) for _ in range(count)]
    for at in range(0, count, 256):
        new = [
            NewSession(access_token=token, subject_id=f"user:{token[-6:]}", bag=BAG, ttl_us=TTL_US)
            for token in tokens[at : at + 256]
        ]
        await store.start(new)
    return tokens


async def touch(store: PostgresStore, tokens: list[str], *, rounds: int, period_s: float) -> float:
    """Return how many seconds the touches took, without the pauses."""
    took_s = 0.0
    for _ in range(rounds):
        random.shuffle(tokens)
        expires_at_us = await store.now_us() + TTL_US
        begun_s = time.perf_counter()
        for at in range(0, len(tokens), BATCH):
            touches = [
                Touch(access_token=token, expires_at_us=expires_at_us) for token in tokens[at : at + BATCH]
            ]
            if not all(result is True for result in await store.touch(touches)):
                sys.exit("a session was gone")
        round_s = time.perf_counter() - begun_s
        took_s += round_s
        await asyncio.sleep(max(period_s - round_s, 0))
    return took_s


async def state(connection: asyncpg.Connection) -> dict[str, int]:
    row = await connection.fetchrow(
        "SELECT n_tup_upd AS updates, n_tup_hot_upd AS hot, pg_relation_size(relid) AS table_bytes, "
        "pg_indexes_size(relid) AS index_bytes, "
        "pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint AS wal_bytes "
        "FROM pg_stat_user_tables WHERE relid = $1::text::regclass",
        TABLE.sql,
    )
    indexes = await connection.fetch(
        "SELECT indexrelid::regclass::text AS name, pg_relation_size(indexrelid) AS bytes FROM pg_index "
        "WHERE indrelid = $1::text::regclass",
        TABLE.sql,
    )
    return dict(row) | {f"index {index['name']}": index["bytes"] for index in indexes}


def report(before: dict[str, int], after: dict[str, int], took_s: float) -> None:
    updates = after["updates"] - before["updates"]
    hot = after["hot"] - before["hot"]
    print(f"{updates} touches, {hot / updates:.1%} in place, {updates / took_s:,.0f} a second")
    print(f"log (WAL): {(after['wal_bytes'] - before['wal_bytes']) / updates:,.0f} bytes a touch")
    for name in ("table_bytes", "index_bytes", *(key for key in after if key.startswith("index "))):
        print(f"{name}: {before.get(name, 0):,} -> {after[name]:,}")


if __name__ == "__main__":
    main()
