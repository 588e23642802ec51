"""A table of two million sessions: what calls cost beside those of a small one, and its size on disk."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

import asyncpg
from load import Request, closed, request
from mnemosynerpc.session_pb2 import GetRequest
from processes import Daemon
from results import Result

from rows.filling import fill_at_random, random_token
from rows.setting import Bench, checked, starts

SMALL = 30_000
SIZES = (
    "SELECT 'table' AS part, pg_table_size('mnemosyne.session') AS bytes "
    "UNION ALL SELECT indexrelid::regclass::text, pg_relation_size(indexrelid) "
    "FROM pg_index WHERE indrelid = 'mnemosyne.session'::regclass ORDER BY bytes DESC"
)
# Half of what a session of 128 digits and three entries took when the token stood in three places.
MAX_BYTES = 375.0


def large_table(bench: Bench) -> Iterator[Result]:
    """First Get and Start in a table of 2,000,000 sessions, against one of 30,000; and bytes a session."""
    rows, count = bench.scaled(2_000_000, 200_000), bench.scaled(20_000, 4000)
    small_dsn = bench.postgres()
    large_dsn = asyncio.run(_second_database(small_dsn))
    rows_by_daemon = {_filled(bench, large_dsn, rows): rows, _filled(bench, small_dsn, SMALL): SMALL}
    yield asyncio.run(_size(large_dsn, rows))
    for method in ("Get", "Start"):
        rates: list[list[float]] = [[], []]
        for turn in range(bench.rounds):
            for (daemon, held), found in zip(rows_by_daemon.items(), rates, strict=True):
                calls = _gets(held, turn) if method == "Get" else starts(1_000_000 * (turn + 1))
                found.append(_rate(daemon, method, calls, count))
        yield Result(
            name=f"{'first ' if method == 'Get' else ''}{method} beside {rows:,} sessions, 64 callers",
            unit="a second",
            values=rates[0],
            limit=f"beside {SMALL:,}",
            limits=rates[1],
            goal=0.8,
            is_more_better=True,
        )


def _filled(bench: Bench, dsn: str, rows: int) -> Daemon:
    # Without copies every Get is a first one.
    daemon = bench.daemon(f"-postgres.address={dsn}", "-cache.ttl=0")
    asyncio.run(fill_at_random(dsn, rows))
    return daemon


def _rate(daemon: Daemon, method: str, calls: Iterator[Request], count: int) -> float:
    return checked([daemon], method, lambda: closed([daemon.address], calls, count)).rate


def _gets(rows: int, turn: int) -> Iterator[Request]:
    rng = random.Random(turn)  # no secret
    while True:
        yield request("Get", GetRequest(access_token=random_token(rng.randrange(rows))))


async def _second_database(dsn: str) -> str:
    connection = await asyncpg.connect(dsn)
    await connection.execute("CREATE DATABASE large")
    await connection.close()
    return dsn.rpartition("/")[0] + "/large"


async def _size(dsn: str, rows: int) -> Result:
    connection = await asyncpg.connect(dsn)
    parts = [(part, size / rows) for part, size in await connection.fetch(SIZES)]
    await connection.close()
    return Result(
        name=f"bytes a session on disk, of {rows:,}",
        unit="bytes",
        values=[sum(size for _, size in parts)],
        goal=MAX_BYTES,
        note=", ".join(f"{part.rpartition('.')[2]} {size:.0f}" for part, size in parts),
    )
