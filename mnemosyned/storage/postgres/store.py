"""The PostgreSQL engine: each method of the storage port is one statement for a whole batch.

`queries.py` holds the statements and their locks, `pool.py` connections and errors. This module turns
items into columns, and rows into one result per item:

- Duplicates. A statement must not meet a token twice: ON CONFLICT would fail, an UPDATE would apply one of
  them. Each method merges the items of one token first, and gives each item its own result after.
- Isolation. Some errors are the fault of one item (`pool.ITEM_FAULTS`), but PostgreSQL rolls back the whole
  statement. Then nothing is done yet, and `_isolating` runs each item as a batch of one.
- SetValue reads a bag, changes it here, and writes it if the row is unchanged (`_set_values`). No lock is
  held between the two: a process that is stalled there would stop every writer of the session.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

import asyncpg

from aio.units import NEVER_US
from mnemosyned.errors import (
    CorruptSession,
    DeadlineExceeded,
    InvalidArgument,
    MnemosyneError,
    SessionAlreadyExists,
    SessionNotFound,
    StorageUnavailable,
)
from mnemosyned.observe.metrics import QueryMetrics
from mnemosyned.sessions.model import (
    MAX_PAGE_BYTES,
    Abandonment,
    Criteria,
    DamagedSession,
    Lookup,
    NewSession,
    Session,
    Touch,
    ValueChange,
    page_too_large,
)
from mnemosyned.sessions.store import Deletion, Renaming, StorageRefused, StoredSession
from mnemosyned.storage.postgres.pool import ITEM_FAULTS, REFUSALS, PostgresOptions, PostgresPool
from mnemosyned.storage.postgres.queries import Queries, Query
from mnemosyned.storage.postgres.schema import Table, set_up
from mnemosyned.storage.postgres.value_changes import Outcome, with_values

if TYPE_CHECKING:
    from asyncpg import Record
    from prometheus_client import CollectorRegistry

    from mnemosyned.storage.postgres.config import PostgresConfig

Item = TypeVar("Item")
Result = TypeVar("Result")

# A writer far from the database can lose every round to nearer ones. After so many rounds, the rows are
# locked from the read to the write.
_QUICK_ROUNDS: Final = 4
# If this process is stalled between the two, PostgreSQL ends the transaction after this time.
_LOCKED_MS: Final = 500


def build(config: PostgresConfig, *, dsn: str, registry: CollectorRegistry) -> PostgresStore:
    """Return the store that the configuration describes, not yet opened."""
    options = PostgresOptions(
        dsn=dsn,
        pool_size=config.pool_size,
        connect_timeout_s=config.connect_timeout_s,
        statement_timeout_s=config.statement_timeout_s,
    )
    return PostgresStore(
        PostgresPool(options, QueryMetrics(registry)), Table(schema=config.schema, name=config.table)
    )


class PostgresStore:
    """Every part of the storage port (FullStore), on one table.

    It keeps no state but the pool, so any number of stores, on any number of nodes, may use one table. All
    instants are microseconds since the epoch on the server's clock.
    """

    def __init__(self, pool: PostgresPool, table: Table) -> None:
        self._pool = pool
        self._table = table
        self._queries = Queries(table.sql)

    async def open(self) -> None:
        """See Storage: connect, and create what is missing of the table.

        PostgreSQL refuses in two places: the server at the connection (no such user or database), and the
        table at set-up (no right to create it). Both mean that a retry is useless.
        """
        await self._pool.open()
        try:
            async with self._pool.connection(passing=REFUSALS) as connection:
                await set_up(connection, self._table)
        except BaseException as exc:
            # A cancelled or failed open leaves no pool behind: `open` may be called again.
            await self._pool.close()
            if isinstance(exc, REFUSALS):
                raise StorageRefused(f"PostgreSQL: {exc}") from exc
            raise

    async def close(self) -> None:
        """See Storage. Writes under way have an unknown outcome: the server may still commit them."""
        await self._pool.close()

    async def now_us(self) -> int:
        """See Storage. It waits for a connection like any call: a full pool counts as unhealthy."""
        rows = await self._pool.fetch(self._queries.now)
        return int(rows[0]["now"])

    async def identity(self) -> bytes:
        """See Storage. Hashed, since nodes send it to each other, and the numbers are the database's own."""
        rows = await self._pool.fetch(self._queries.identity)
        return hashlib.blake2b(str(rows[0]["identity"]).encode(), digest_size=16).digest()

    async def start(self, sessions: Sequence[NewSession]) -> list[Session | MnemosyneError]:
        """See SessionStore; an item's InvalidArgument: a token too long to index."""
        return await _isolating(self._start, sessions)

    async def load(self, lookups: Sequence[Lookup]) -> list[Session | MnemosyneError]:
        """See SessionStore. Two lookups of one token with the same times are one parameter and one row."""
        keys = [lookup.access_token.encode() for lookup in lookups]
        # One statement for all sessions with the same times, which today are all of them. No isolation: a
        # load locks only what is free and writes no value of a caller, so no item can fail it.
        tokens_by_times: dict[tuple[int, int], list[bytes]] = {}
        for lookup, key in zip(lookups, keys, strict=True):
            tokens_by_times.setdefault((lookup.ttl_us, lookup.touch_interval_us), []).append(key)
        loaded: dict[bytes, Session | CorruptSession] = {}
        for (ttl_us, touch_interval_us), tokens in tokens_by_times.items():
            ttl, fresh = timedelta(microseconds=ttl_us), timedelta(microseconds=ttl_us - touch_interval_us)
            for row in await self._pool.fetch(self._queries.load, tokens, ttl, fresh):
                found = _session(row)
                loaded[row["access_token"]] = found if isinstance(found, Session) else found.error()
        return [loaded.get(key) or SessionNotFound() for key in keys]

    async def exist(self, tokens: Sequence[str]) -> list[bool | MnemosyneError]:
        """See SessionStore."""
        rows = await self._pool.fetch(self._queries.exist, _encoded(tokens))
        found = {row["access_token"] for row in rows}
        return [token.encode() in found for token in tokens]

    async def set_values(self, changes: Sequence[ValueChange]) -> list[dict[str, str] | MnemosyneError]:
        """See SessionStore; 2 statements if no other node changes the same sessions, and at most 10."""
        return await _isolating(self._set_values, changes)

    async def abandon(self, endings: Sequence[Abandonment]) -> list[bool | MnemosyneError]:
        """See SessionStore."""
        return await _isolating(self._abandon, endings)

    async def touch(self, touches: Sequence[Touch]) -> list[bool | MnemosyneError]:
        """See SessionStore."""
        return await _isolating(self._touch, touches)

    async def find(self, criteria: Criteria, *, offset: int, limit: int) -> list[Session | DamagedSession]:
        """See SessionStore. PostgreSQL withholds the bags beyond MAX_PAGE_BYTES, so memory is bounded."""
        where, values = _condition(criteria)
        query = self._queries.find(where, offset_at=len(values) + 1)
        rows = await self._pool.fetch(query, *values, offset, limit, MAX_PAGE_BYTES)
        if any(row["bag"] is None and row["damage"] is None for row in rows):
            raise page_too_large()
        return [_session(row) for row in rows]

    async def delete(self, criteria: Criteria, *, limit: int) -> Deletion:
        """See SessionStore. No isolation: a Delete is one item, and criteria are checked before.

        `is_all` is True only if the condition met fewer rows than the limit, and all of them were deleted
        by this statement. Otherwise the caller runs another step.
        """
        where, values = _condition(criteria)
        query = self._queries.delete(where, limit_at=len(values) + 1)
        (row,) = await self._pool.fetch(query, *values, limit)
        return Deletion(
            stored_keys=[_text(token) for token in row["tokens"]],
            # Fewer deleted than picked: another node's Delete has the others, and may not be done.
            is_all=len(row["tokens"]) == row["picked"] < limit,
        )

    async def clean_up(self, *, limit: int) -> list[str]:
        """See SessionStore; one node at a time, by the advisory lock that set-up takes too."""
        rows = await self._pool.fetch(self._queries.clean_up, limit, self._table.advisory_key)
        return [_text(row["access_token"]) for row in rows]

    async def rename(self, renamings: Sequence[Renaming]) -> list[bool | MnemosyneError]:
        """See RenamableStore; an item's StorageUnavailable: its lock, or its new key is being taken."""
        return await _isolating(self._rename, renamings)

    async def stored_keys_after(self, stored_key: str, *, limit: int) -> list[str]:
        """See RenamableStore. Surrogates keep invalid UTF-8 intact, so that the walk can go on from it."""
        after = stored_key.encode(errors="surrogateescape")
        rows = await self._pool.fetch(self._queries.stored_keys_after, after, limit)
        return [_escaped(row["access_token"]) for row in rows]

    async def stored_from(self, stored_key: str, *, limit: int) -> list[StoredSession]:
        """See CheckableStore; the version is that of `set_values`."""
        key = stored_key.encode(errors="surrogateescape")
        rows = await self._pool.fetch(self._queries.stored_from, key, limit, MAX_PAGE_BYTES)
        return [
            StoredSession(
                stored_key=_escaped(row["access_token"]), found=_session(row), version=row["version"]
            )
            for row in rows
        ]

    async def remove_unchanged(self, sessions: Sequence[StoredSession]) -> list[str]:
        """See CheckableStore."""
        keys = [session.stored_key.encode(errors="surrogateescape") for session in sessions]
        versions = [session.version for session in sessions]
        rows = await self._pool.fetch(self._queries.remove_unchanged, keys, versions)
        return [_escaped(row["access_token"]) for row in rows]

    async def _rename(self, renamings: Sequence[Renaming]) -> list[bool | MnemosyneError]:
        olds = [renaming.old.encode() for renaming in renamings]
        news = [renaming.new.encode() for renaming in renamings]
        # One alone waits for its row; many skip locked rows, or they could deadlock (`queries._rename`).
        query = self._queries.rename if len(renamings) > 1 else self._queries.rename_one
        rows = await self._pool.fetch(query, olds, news, passing=ITEM_FAULTS)
        return [row["is_there"] for row in rows]

    async def _start(self, sessions: Sequence[NewSession]) -> list[Session | MnemosyneError]:
        # Of several starts of one token, the first is made. A later one replaces it only if it has more
        # time: the first may be late, and its place must not fail a start that still has time.
        first_by_token: dict[str, NewSession] = {}
        for new in sessions:
            first = first_by_token.setdefault(new.access_token, new)
            if new.not_after_us > first.not_after_us:
                first_by_token[new.access_token] = new
        firsts = first_by_token.values()
        rows = await self._pool.fetch(
            self._queries.start,
            [new.access_token.encode() for new in firsts],
            [new.refresh_token.encode() for new in firsts],
            [new.subject_id for new in firsts],
            [new.subject_client for new in firsts],
            [new.bag for new in firsts],
            [new.ttl_us for new in firsts],
            [new.not_after_us for new in firsts],
            passing=ITEM_FAULTS,
        )
        row_by_token = {row["access_token"].decode(): row for row in rows}
        return [
            _started(new, row_by_token[new.access_token])
            if first_by_token[new.access_token] is new
            else SessionAlreadyExists()
            for new in sessions
        ]

    async def _set_values(self, changes: Sequence[ValueChange]) -> list[dict[str, str] | MnemosyneError]:
        """Change bags optimistically: read, change, write where the row has still the version that was read.

        - A failed change (no session, late, bag too large) has its result after the read.
        - A change whose row was written has its result after the write.
        - Any other change lost its row to another writer, and goes into the next round.
        - The last round locks the rows first (`_set_locked`). It can be lost only if the time is up.
        """
        results: dict[int, dict[str, str] | MnemosyneError] = {}
        left = list(range(len(changes)))
        for number in range(_QUICK_ROUNDS + 1):
            try_to_set = self._try_to_set if number < _QUICK_ROUNDS else self._set_locked
            outcomes, written = await try_to_set([changes[at] for at in left])
            for at, outcome in zip(left, outcomes, strict=True):
                if outcome.after is None or outcome.token in written:
                    results[at] = outcome.result
            left = [at for at in left if at not in results]
            if not left:
                break
        return [results.get(at) or _out_of_time() for at in range(len(changes))]

    async def _try_to_set(self, changes: Sequence[ValueChange]) -> tuple[list[Outcome], set[bytes]]:
        fetch = partial(self._pool.fetch, passing=ITEM_FAULTS)
        return await self._read_and_write(changes, self._queries.read_bags, fetch)

    # The transaction costs two more round trips, and the rows are locked during two of them.
    async def _set_locked(self, changes: Sequence[ValueChange]) -> tuple[list[Outcome], set[bytes]]:
        """Read and write in one transaction that holds the rows, in turn with other writers."""
        pool = self._pool
        async with pool.connection(passing=ITEM_FAULTS) as connection, connection.transaction():
            await connection.execute(f"SET LOCAL idle_in_transaction_session_timeout = {_LOCKED_MS}")
            run = partial(pool.run, connection, passing=ITEM_FAULTS)
            return await self._read_and_write(changes, self._queries.lock_bags, run)

    async def _read_and_write(
        self,
        changes: Sequence[ValueChange],
        reading: Query,
        fetch: Callable[..., Awaitable[list[Record]]],
    ) -> tuple[list[Outcome], set[bytes]]:
        """Run one round; return the outcomes, and the tokens whose bags were written.

        `fetch` runs a statement on any connection, or on the one that holds the locks.
        """
        rows = await fetch(reading, _encoded({change.access_token for change in changes}))
        before = {row["access_token"]: row for row in rows}
        outcomes = with_values(changes, before)
        # Per token: the version read, the bag after all its changes, and the least of their limits in time.
        # The changes of one token share one UPDATE; the earliest limit is safe for all of them.
        writes: dict[bytes, tuple[int, bytes, int]] = {}
        for outcome in outcomes:
            if outcome.after is not None:
                _, _, not_after_us = writes.get(outcome.token, (0, b"", NEVER_US))
                version = before[outcome.token]["version"]
                not_after_us = min(not_after_us, outcome.not_after_us)
                writes[outcome.token] = (version, outcome.after, not_after_us)
        if not writes:
            return outcomes, set()
        columns = map(list, zip(*writes.values(), strict=True))
        rows = await fetch(self._queries.write_bags, list(writes), *columns)
        return outcomes, {row["access_token"] for row in rows}

    async def _abandon(self, endings: Sequence[Abandonment]) -> list[bool | MnemosyneError]:
        # The latest limit: while one caller still has time, ending the session is what all of them want.
        latest_us: dict[bytes, int] = {}
        for ending in endings:
            token = ending.access_token.encode()
            latest_us[token] = max(ending.not_after_us, latest_us.get(token, 0))
        rows = await self._pool.fetch(
            self._queries.abandon, list(latest_us), list(latest_us.values()), passing=ITEM_FAULTS
        )
        row_by_token = {row["access_token"]: row for row in rows}
        # Of several callers for one token, the first has ended the session; `pop` leaves the others none.
        return [_abandoned(row_by_token.pop(ending.access_token.encode(), None)) for ending in endings]

    async def _touch(self, touches: Sequence[Touch]) -> list[bool | MnemosyneError]:
        # The latest expiry of a token is what its row would have after all touches one by one.
        latest: dict[bytes, int] = {}
        for touch in touches:
            token = touch.access_token.encode()
            latest[token] = max(touch.expires_at_us, latest.get(token, 0))
        rows = await self._pool.fetch(
            self._queries.touch, list(latest.keys()), list(latest.values()), passing=ITEM_FAULTS
        )
        found = {row["access_token"] for row in rows}
        return [touch.access_token.encode() in found for touch in touches]


def _condition(criteria: Criteria) -> tuple[str, list[object]]:
    """Return an SQL condition with parameters from $1 on, and their values.

    The texts are constants, so there are at most 32 different conditions for asyncpg to prepare.
    """
    value_by_condition: dict[str, object] = {
        "access_token =": _encoded_or_none(criteria.access_token),
        "refresh_token =": _encoded_or_none(criteria.refresh_token),
        "subject_id =": criteria.subject_id,
        "expire_at >": criteria.expires_after_us,
        "expire_at <": criteria.expires_before_us,
    }
    given = [(text, value) for text, value in value_by_condition.items() if value is not None]
    conditions = [f"{text} ${number}" for number, (text, _) in enumerate(given, start=1)]
    return " AND ".join(conditions) or "TRUE", [value for _, value in given]


def _encoded(tokens: Sequence[str] | set[str]) -> list[bytes]:
    return [token.encode() for token in tokens]


def _encoded_or_none(token: str | None) -> bytes | None:
    return None if token is None else token.encode()


def _text(stored: bytes) -> str:
    # The Go daemon checks no UTF-8. A row that this daemon cannot have written must not hide the others.
    return stored.decode(errors="replace")


def _escaped(stored: bytes) -> str:
    return stored.decode(errors="surrogateescape")


def _session(row: Record) -> Session | DamagedSession:
    if row["damage"] is not None:
        return DamagedSession(access_token=_escaped(row["access_token"]), reason=row["damage"])
    try:
        # Rows of the Go daemon may have NULL for the client or the refresh token; it means the same as "".
        return Session(
            access_token=row["access_token"].decode(),
            subject_id=row["subject_id"],
            subject_client=row["subject_client"] or "",
            refresh_token=(row["refresh_token"] or b"").decode(),
            bag=row["bag"],
            expires_at_us=row["expire_at"],
        )
    except UnicodeDecodeError:
        return DamagedSession(access_token=_escaped(row["access_token"]), reason="a token is not UTF-8")


def _started(new: NewSession, row: Record) -> Session | MnemosyneError:
    if row["expire_at"] is None:
        # A duplicate may be called late, which is safe: its caller does not know the outcome. A late start
        # is never called a duplicate, as its caller would take the token for used.
        return DeadlineExceeded() if row["is_late"] else SessionAlreadyExists()
    return Session(
        access_token=new.access_token,
        subject_id=new.subject_id,
        subject_client=new.subject_client,
        refresh_token=new.refresh_token,
        bag=new.bag,
        expires_at_us=row["expire_at"],
    )


def _abandoned(row: Record | None) -> bool | MnemosyneError:
    # An expired row is deleted as well, but its session did not exist: False.
    if row is None:
        return False
    return DeadlineExceeded() if row["is_late"] else bool(row["was_live"])


def _out_of_time() -> MnemosyneError:
    # The locked round fails to write a row only for its time. The limit has passed, or passes too soon to
    # begin again.
    return DeadlineExceeded()


async def _isolating(
    run: Callable[[Sequence[Item]], Awaitable[list[Result | MnemosyneError]]], items: Sequence[Item]
) -> list[Result | MnemosyneError]:
    """Run a batch; if an item's fault fails the batch, run each item alone.

    Cost: one statement per item, over as many connections as are free. A caller can cause this by its own
    text, but only for the batch that it is in. Two items for one token then race like two callers.
    """
    try:
        return await run(items)
    except ITEM_FAULTS as exc:
        if len(items) == 1:
            return [_item_error(exc)]
        alone = [_isolating(run, [item]) for item in items]
        return [result for results in await asyncio.gather(*alone) for result in results]


def _item_error(exc: Exception) -> MnemosyneError:
    # A lock not released within lock_timeout, or a key that another transaction has just taken: a retry
    # may succeed.
    if isinstance(exc, asyncpg.LockNotAvailableError | asyncpg.UniqueViolationError):
        return StorageUnavailable("mnemosyned: storage: the session is locked by another writer")
    if isinstance(exc, asyncpg.ProgramLimitExceededError):
        # An index entry of about 2,700 bytes at most, after compression: only PostgreSQL can tell.
        return InvalidArgument("mnemosyned: access_token is too long for PostgreSQL to index")
    return InvalidArgument("mnemosyned: a field holds text that PostgreSQL cannot store")
