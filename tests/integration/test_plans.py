"""What every statement reads, whatever PostgreSQL believes of the table: its plans, and the pages they touch.

The statistics of `expire_at` are always old, since its values only grow. Each case here is a table whose
statistics are of another table than the one that the statement meets.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Final

import asyncpg
import pytest
from stores import new_postgres_store

from mnemosyned.sessions.model import MAX_PAGE_BYTES, Criteria
from mnemosyned.storage.postgres.queries import Queries, Query
from mnemosyned.storage.postgres.schema import Table
from mnemosyned.storage.postgres.walks import Walks, WalksByDueTime, WalksByExpiry

Calls = dict[str, tuple[Query, list[object]]]

TABLE: Final = Table(schema="mnemosyne", name="session")
ROWS: Final = 20_000
# A look-up reads three pages of an index and one of the table. A write reads those of four indexes, twice
# where a row is moved. The index of all live sessions has hundreds of pages.
PAGES_PER_ITEM: Final = 40
PAGES_PER_STATEMENT: Final = 20
HOUR_US: Final = 3_600_000_000
BAG_BYTES: Final = 300
# How often asyncpg runs a statement before PostgreSQL may take the generic plan.
EXECUTIONS: Final = 6


class Statements:
    """Every statement with arguments for some items, for one form of the table."""

    def __init__(self, queries: Queries, items: int, now_us: int) -> None:
        numbers = [number * 7 for number in range(1, items + 1)]
        keys = [f"t{number}".encode() for number in numbers]
        stored = [f"{number:0{BAG_BYTES}}".encode() for number in numbers]
        new = [f"new{number}".encode() for number in range(1, items + 1)]
        later = [now_us + HOUR_US] * items
        minute = timedelta(minutes=1)
        bags, texts = [b""] * items, ["s"] * items
        self.items = items
        self.look_ups: dict[str, tuple[Query, list[object]]] = {
            "load": (queries.load, [keys, 24 * minute, 23 * minute]),
            "load of lagging rows": (queries.load, [keys, 540 * minute, 540 * minute]),
            "load_unmoved": (queries.load_unmoved, [keys, 23 * minute]),
            "exist": (queries.exist, [keys]),
            "read_bags": (queries.read_bags, [keys]),
            "lock_bags": (queries.lock_bags, [keys]),
            "write_bags": (queries.write_bags, [keys, [0] * items, bags, later]),
            "write_known": (queries.write_known, [keys, bags, bags, later]),
            "write_known of unchanged bags": (queries.write_known, [keys, stored, bags, later]),
            "abandon": (queries.abandon, [keys, later]),
            "touch": (queries.touch, [keys, later]),
            "start": (queries.start, [new, bags, texts, texts, bags, [60_000_000] * items, later]),
            "start of tokens in use": (
                queries.start,
                [keys, bags, texts, texts, bags, [60_000_000] * items, later],
            ),
            "rename": (queries.rename, [keys, new]),
            "rename_one": (queries.rename_one, [keys[:1], new[:1]]),
            "stored_keys_after": (queries.stored_keys_after, [b"t1", items]),
            "stored_from": (queries.stored_from, [b"t1", items, MAX_PAGE_BYTES]),
            "remove_unchanged": (queries.remove_unchanged, [keys, [0] * items]),
            "now": (queries.now, []),
            "identity": (queries.identity, []),
            "estimate": (queries.estimate, []),
        }
        self._add_walks(queries, now_us)

    def _add_walks(self, queries: Queries, now_us: int) -> None:
        walks, items = queries.walks, self.items
        # What goes through a range of an index, and stops at its limit.
        self.ranges: dict[str, tuple[Query, list[object]]] = {"clean_up": (walks.clean_up, [items, items])}
        for name, criteria in {
            "a subject": Criteria(subject_id="s3"),
            "a subject and a range": Criteria(
                subject_id="s3", expires_after_us=now_us, expires_before_us=now_us + 90 * HOUR_US
            ),
            "a refresh token": Criteria(refresh_token="r3"),
            "a token": Criteria(access_token="t7"),
        }.items():
            self.ranges[f"list of {name}"] = walks.find(
                criteria, offset=0, limit=items, page_bytes=MAX_PAGE_BYTES
            )
            self.ranges[f"delete of {name}"] = walks.delete(
                criteria, limit=items, not_after_us=now_us + HOUR_US
            )
            self.ranges[f"walk of {name}"] = self._walk(walks, criteria)
        for start in (b"", b"t1", b"t19"):
            self.ranges[f"walk from {start!r}"] = self._walk(walks, Criteria(), start)
        self.ranges["walk of all that expire after"] = self._walk(walks, Criteria(expires_after_us=now_us))
        # What looks at so many sessions at most that meet nothing, here all that it can.
        self.scans = {
            f"walk of {name}": self._walk(walks, criteria)
            for name, criteria in {
                "what expires late": Criteria(expires_after_us=now_us + 900 * HOUR_US),
                "what expires soon": Criteria(expires_before_us=now_us + HOUR_US // 2),
                "all that expire before": Criteria(expires_before_us=now_us + 90 * HOUR_US),
                "no subject": Criteria(subject_id="s"),
            }.items()
        }
        # What reads all sessions that are due before: here those of the first page.
        self.walks = {
            "list": walks.find(Criteria(), offset=0, limit=items, page_bytes=MAX_PAGE_BYTES),
            "delete of a range": walks.delete(
                Criteria(expires_before_us=now_us + 90 * HOUR_US), limit=items, not_after_us=now_us + HOUR_US
            ),
        }

    def _walk(self, walks: Walks, criteria: Criteria, start: bytes = b"") -> tuple[Query, list[object]]:
        return walks.walk(criteria, start=start, limit=self.items, page_bytes=MAX_PAGE_BYTES)

    def pages_allowed(self) -> int:
        return PAGES_PER_STATEMENT + PAGES_PER_ITEM * self.items


def rows(first: int, last: int, expiry: str) -> str:
    return (
        f"INSERT INTO {TABLE.sql} SELECT ('t' || n)::bytea, ('r' || n % 2000)::bytea, "  # noqa: S608
        f"'s' || n % 2000, '', lpad(n::text, {BAG_BYTES}, '0')::bytea, {expiry} "
        f"FROM generate_series({first}, {last}) n"
    )


LIVE: Final = "now() + interval '1 hour' + n * interval '1 second'"
ENDED: Final = "now() - interval '9 hours' + n * interval '1 millisecond'"
HISTORIES: Final = {
    "never analyzed": [rows(1, ROWS, LIVE)],
    "analyzed small, of sessions that have ended, and grown since": [
        rows(1, 500, ENDED), "ANALYZE {t}", rows(501, ROWS, LIVE),
    ],
    # VACUUM removes the page that the trial of the start has left. With a page and no row, PostgreSQL expects
    # one row whatever the size, and may walk an index on (expire_at, access_token) until the next ANALYZE.
    "analyzed empty, and grown since": ["VACUUM {t}", "ANALYZE {t}", rows(1, ROWS, LIVE)],
    "analyzed when all had ended, and extended since": [
        rows(1, ROWS, ENDED), "ANALYZE {t}",
        "UPDATE {t} SET expire_at = now() + random() * interval '9 hours'",
        "VACUUM {t}",
    ],
    "analyzed large, and emptied since": [
        rows(1, ROWS, LIVE), "VACUUM ANALYZE {t}", "DELETE FROM {t} WHERE access_token > 't2'", "VACUUM {t}",
    ],
    "analyzed as it is": [rows(1, ROWS, LIVE), "VACUUM ANALYZE {t}"],
}  # fmt: skip


class Server:
    def __init__(self, connection: asyncpg.Connection) -> None:
        self.connection = connection
        self.now_us = 0

    async def pages(self, query: Query, arguments: list[object], runs: int) -> tuple[int, str]:
        """Run a prepared statement so often; return the pages that the last run read, and its plan."""
        text = await self.explained(query, arguments, runs)
        (found,) = json.loads(text)
        plan = found["Plan"]
        return plan["Shared Hit Blocks"] + plan["Shared Read Blocks"], text

    async def took_ms(self, query: Query, arguments: list[object]) -> float:
        """Return the least time that the server took for a statement, of some runs."""
        texts = [await self.explained(query, arguments, 1) for _ in range(5)]
        return min(json.loads(text)[0]["Execution Time"] for text in texts)

    async def explained(self, query: Query, arguments: list[object], runs: int) -> str:
        """Run a prepared statement so often; return the plan of the last run.

        By EXECUTE, since EXPLAIN of a statement with parameters never uses the generic plan. Every run is
        undone.
        """
        connection = self.connection
        execute = f"EXECUTE it({', '.join(map(literal, arguments))})" if arguments else "EXECUTE it"
        await connection.execute(f"PREPARE it AS {query.sql}")
        for number in range(runs):
            explain = "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " if number == runs - 1 else ""
            transaction = connection.transaction()
            await transaction.start()
            if explain:
                text = await connection.fetchval(explain + execute)
            else:
                await connection.execute(execute)
            await transaction.rollback()
        await connection.execute("DEALLOCATE it")
        return str(text)

    async def over(self, statements: Calls, allowed: int, *, runs: int = 1) -> dict[str, object]:
        over: dict[str, object] = {}
        for name, (query, arguments) in statements.items():
            pages, plan = await self.pages(query, arguments, runs)
            if pages > allowed:
                # The catalog's pages count too, where PostgreSQL has just had to read it again.
                pages, plan = await self.pages(query, arguments, runs)
            if pages > allowed or "Seq Scan" in plan:
                over[name] = (pages, plan)
        return over


def literal(value: object) -> str:
    """A parameter as a text, which takes the type that the statement gives it."""
    if isinstance(value, list):
        escaped = ",".join('"' + plain(one).replace("\\", "\\\\") + '"' for one in value)
        return f"'{{{escaped}}}'"
    return f"'{plain(value)}'"


def plain(value: object) -> str:
    if isinstance(value, bytes):
        return f"\\x{value.hex()}"
    if isinstance(value, int) and value > HOUR_US:
        return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=value)).isoformat()
    if isinstance(value, timedelta):
        return f"{value.total_seconds()} seconds"
    return str(value)


@pytest.fixture(params=HISTORIES)
def history(request: pytest.FixtureRequest) -> list[str]:
    return HISTORIES[request.param]


@pytest.fixture(
    params=[
        pytest.param(True, id="by due time"),
        # A table of the former form.
        pytest.param(False, id="by expiry", marks=pytest.mark.slow),
    ]
)
def queries(request: pytest.FixtureRequest) -> Queries:
    return Queries(TABLE.sql, is_due=request.param)


@pytest.fixture
async def server(postgres_dsn: str, queries: Queries, history: list[str]) -> AsyncIterator[Server]:
    store = new_postgres_store(postgres_dsn, TABLE)
    await store.open()
    await store.close()
    # Each statement is prepared under one name, in turn.
    connection = await asyncpg.connect(postgres_dsn, statement_cache_size=0)
    await connection.execute(f"ALTER TABLE {TABLE.sql} SET (autovacuum_enabled = off)")
    if isinstance(queries.walks, WalksByExpiry):
        await connection.execute(f"ALTER TABLE {TABLE.sql} DROP COLUMN due_at")
        await connection.execute(f"CREATE INDEX ON {TABLE.sql} (expire_at, access_token)")
    for statement in history:
        await connection.execute(statement.format(t=TABLE.sql))
    if isinstance(queries.walks, WalksByDueTime):
        # As starts write it. These rows are not touched yet; the statistics are as they were.
        await connection.execute(f"UPDATE {TABLE.sql} SET due_at = expire_at")  # noqa: S608
        await connection.execute(f"VACUUM {TABLE.sql}")
    # As the pool sets them.
    await connection.execute("SET enable_seqscan = off; SET jit = off")
    server = Server(connection)
    server.now_us = time.time_ns() // 1000
    yield server
    await connection.close()


def test_no_statement_is_forgotten(queries: Queries) -> None:
    statements = Statements(queries, 1, 0)
    known = {query.sql for query, _ in (statements.look_ups | statements.ranges).values()}
    # Its pages are in its arguments.
    swept = {queries.walks.sweep.sql} if isinstance(queries.walks, WalksByDueTime) else set()
    every = [*vars(queries).values(), *vars(queries.walks).values()]

    assert {one.sql for one in every if isinstance(one, Query)} <= known | swept


async def test_a_statement_costs_so_much_an_item_whatever_the_statistics_say(
    server: Server, queries: Queries
) -> None:
    for mode in ("force_generic_plan", "force_custom_plan"):
        await server.connection.execute(f"SET plan_cache_mode = {mode}")
        for items in (1, 16, 256, 1000):
            statements = Statements(queries, items, server.now_us)
            every = statements.look_ups | statements.ranges
            assert not await server.over(every, statements.pages_allowed())
        statements = Statements(queries, 5, server.now_us)
        # The first thousand sessions by their due time give the bound of a page.
        assert not await server.over(statements.walks, statements.pages_allowed() + 3000)
        # What it looks at, by the index of a criterion and by the key, and a page of an index now and then.
        assert not await server.over(statements.scans, statements.pages_allowed() + 9000)
    await server.connection.execute("SET plan_cache_mode = auto")
    statements = Statements(queries, 5, server.now_us)
    every = statements.look_ups | statements.ranges
    assert not await server.over(every, statements.pages_allowed(), runs=EXECUTIONS)


# With the former form, what the runs before have left behind takes longer than the statement.
@pytest.mark.parametrize("queries", [True], indirect=True, ids=["by due time"])
async def test_a_large_batch_takes_no_longer_for_an_item(server: Server, queries: Queries) -> None:
    """One that compares all keys with all others reads the same pages, and takes 30 times as long."""
    await server.connection.execute("SET plan_cache_mode = force_generic_plan")
    took_ms: dict[str, list[float]] = {}
    for items in (16, 512):
        for name, call in Statements(queries, items, server.now_us).look_ups.items():
            took_ms.setdefault(name, []).append(await server.took_ms(*call) / items)

    assert not {name: times for name, times in took_ms.items() if times[1] > 6 * times[0]}
