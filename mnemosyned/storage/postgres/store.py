"""The PostgreSQL engine: one statement for many sessions.

Statements that change rows lock them in the order of their tokens, so that nodes never deadlock;
a load, which must not wait for a writer, skips rows that are locked.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

import asyncpg

from aio.units import NEVER_US
from mnemosyned.errors import (
    CorruptBag,
    DeadlineExceeded,
    InvalidArgument,
    MnemosyneError,
    SessionAlreadyExists,
    SessionNotFound,
    StorageUnavailable,
)
from mnemosyned.observe.metrics import QueryMetrics
from mnemosyned.sessions import bag
from mnemosyned.sessions.model import (
    MAX_PAGE_BYTES,
    Abandonment,
    Criteria,
    Lookup,
    NewSession,
    Session,
    Touch,
    ValueChange,
    page_too_large,
)
from mnemosyned.sessions.store import Deletion, Renaming, StorageRefused
from mnemosyned.storage.postgres.pool import ITEM_FAULTS, REFUSALS, PostgresOptions, PostgresPool
from mnemosyned.storage.postgres.queries import Queries, Query
from mnemosyned.storage.postgres.schema import Table, set_up

if TYPE_CHECKING:
    from asyncpg import Record
    from prometheus_client import CollectorRegistry

    from mnemosyned.storage.postgres.config import PostgresConfig

Item = TypeVar("Item")
Result = TypeVar("Result")

# Then rows are locked between reading and writing, for so long at the most.
_QUICK_ROUNDS: Final = 4
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
    """Every part of the storage port, on one table."""

    def __init__(self, pool: PostgresPool, table: Table) -> None:
        self._pool = pool
        self._table = table
        self._queries = Queries(table.sql)

    async def open(self) -> None:
        """See Storage."""
        await self._pool.open()
        try:
            async with self._pool.connection(passing=REFUSALS) as connection:
                await set_up(connection, self._table)
        except BaseException as exc:
            await self._pool.close()
            if isinstance(exc, REFUSALS):
                raise StorageRefused(f"PostgreSQL: {exc}") from exc
            raise

    async def close(self) -> None:
        """See Storage."""
        await self._pool.close()

    async def now_us(self) -> int:
        """See Storage."""
        rows = await self._pool.fetch(self._queries.now)
        return int(rows[0]["now"])

    async def identity(self) -> bytes:
        """See Storage."""
        rows = await self._pool.fetch(self._queries.identity)
        return hashlib.blake2b(str(rows[0]["identity"]).encode(), digest_size=16).digest()

    async def start(self, sessions: Sequence[NewSession]) -> list[Session | MnemosyneError]:
        """See SessionStore."""
        return await _isolating(self._start, sessions)

    async def load(self, lookups: Sequence[Lookup]) -> list[Session | MnemosyneError]:
        """See SessionStore."""
        keys = [lookup.access_token.encode() for lookup in lookups]
        # One statement for all sessions with the same times, which today are all of them.
        tokens_by_times: dict[tuple[int, int], list[bytes]] = {}
        for lookup, key in zip(lookups, keys, strict=True):
            tokens_by_times.setdefault((lookup.ttl_us, lookup.touch_interval_us), []).append(key)
        loaded: dict[bytes, Session] = {}
        for (ttl_us, touch_interval_us), tokens in tokens_by_times.items():
            ttl, fresh = timedelta(microseconds=ttl_us), timedelta(microseconds=ttl_us - touch_interval_us)
            for row in await self._pool.fetch(self._queries.load, tokens, ttl, fresh):
                loaded[row["access_token"]] = _session(row)
        return [loaded.get(key) or SessionNotFound() for key in keys]

    async def exist(self, tokens: Sequence[str]) -> list[bool | MnemosyneError]:
        """See SessionStore."""
        rows = await self._pool.fetch(self._queries.exist, _encoded(tokens))
        found = {row["access_token"] for row in rows}
        return [token.encode() in found for token in tokens]

    async def set_values(self, changes: Sequence[ValueChange]) -> list[dict[str, str] | MnemosyneError]:
        """See SessionStore."""
        return await _isolating(self._set_values, changes)

    async def abandon(self, endings: Sequence[Abandonment]) -> list[bool | MnemosyneError]:
        """See SessionStore."""
        return await _isolating(self._abandon, endings)

    async def touch(self, touches: Sequence[Touch]) -> list[bool | MnemosyneError]:
        """See SessionStore."""
        return await _isolating(self._touch, touches)

    async def find(self, criteria: Criteria, *, offset: int, limit: int) -> list[Session]:
        """See SessionStore."""
        where, values = _condition(criteria)
        query = self._queries.find(where, offset_at=len(values) + 1)
        rows = await self._pool.fetch(query, *values, offset, limit, MAX_PAGE_BYTES)
        if any(row["bag"] is None for row in rows):
            raise page_too_large()
        return [_session(row) for row in rows]

    async def delete(self, criteria: Criteria, *, limit: int) -> Deletion:
        """See SessionStore."""
        where, values = _condition(criteria)
        query = self._queries.delete(where, limit_at=len(values) + 1)
        (row,) = await self._pool.fetch(query, *values, limit)
        return Deletion(
            stored_keys=[_text(token) for token in row["tokens"]],
            is_all=len(row["tokens"]) == row["picked"] < limit,
        )

    async def clean_up(self, *, limit: int) -> list[str]:
        """See SessionStore."""
        rows = await self._pool.fetch(self._queries.clean_up, limit, self._table.advisory_key)
        return [_text(row["access_token"]) for row in rows]

    async def rename(self, renamings: Sequence[Renaming]) -> list[bool | MnemosyneError]:
        """See RenamableStore."""
        return await _isolating(self._rename, renamings)

    async def stored_keys_after(self, stored_key: str, *, limit: int) -> list[str]:
        """See RenamableStore."""
        after = stored_key.encode(errors="surrogateescape")
        rows = await self._pool.fetch(self._queries.stored_keys_after, after, limit)
        return [row["access_token"].decode(errors="surrogateescape") for row in rows]

    async def _rename(self, renamings: Sequence[Renaming]) -> list[bool | MnemosyneError]:
        olds = [renaming.old.encode() for renaming in renamings]
        news = [renaming.new.encode() for renaming in renamings]
        query = self._queries.rename if len(renamings) > 1 else self._queries.rename_one
        rows = await self._pool.fetch(query, olds, news, passing=ITEM_FAULTS)
        return [row["is_there"] for row in rows]

    async def _start(self, sessions: Sequence[NewSession]) -> list[Session | MnemosyneError]:
        # One statement may not meet a token twice: the first of a batch has it, or who has the most time.
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
        """Write each bag where it is still what was read, and begin again where it is not.

        A transaction around both would keep the row locked while this process stands still.
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
        return [results.get(at) or _ended_meanwhile() for at in range(len(changes))]

    async def _try_to_set(self, changes: Sequence[ValueChange]) -> tuple[list[_Outcome], set[bytes]]:
        fetch = partial(self._pool.fetch, passing=ITEM_FAULTS)
        return await self._read_and_write(changes, self._queries.read_bags, fetch)

    async def _set_locked(self, changes: Sequence[ValueChange]) -> tuple[list[_Outcome], set[bytes]]:
        """Set what others, nearer to the database, were quicker to change each time: in turn with them."""
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
    ) -> tuple[list[_Outcome], set[bytes]]:
        rows = await fetch(reading, _encoded({change.access_token for change in changes}))
        before = {row["access_token"]: row for row in rows}
        outcomes = _with_values(changes, before)
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
        latest_us: dict[bytes, int] = {}
        for ending in endings:
            token = ending.access_token.encode()
            latest_us[token] = max(ending.not_after_us, latest_us.get(token, 0))
        rows = await self._pool.fetch(
            self._queries.abandon, list(latest_us), list(latest_us.values()), passing=ITEM_FAULTS
        )
        row_by_token = {row["access_token"]: row for row in rows}
        # Of several callers for one token in a batch, the first has ended the session.
        return [_abandoned(row_by_token.pop(ending.access_token.encode(), None)) for ending in endings]

    async def _touch(self, touches: Sequence[Touch]) -> list[bool | MnemosyneError]:
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
    """Return an SQL condition with parameters from $1 on, and their values."""
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
    # Go checks no UTF-8: a row that we could not have written must not keep the others from being read.
    return stored.decode(errors="replace")


def _session(row: Record) -> Session:
    return Session(
        access_token=_text(row["access_token"]),
        subject_id=row["subject_id"],
        subject_client=row["subject_client"] or "",
        refresh_token=_text(row["refresh_token"] or b""),
        bag=row["bag"],
        expires_at_us=row["expire_at"],
    )


def _started(new: NewSession, row: Record) -> Session | MnemosyneError:
    if row["expire_at"] is None:
        # A duplicate may be called late, which is safe; what was late is never called a duplicate.
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
    if row is None:
        return False
    return DeadlineExceeded() if row["is_late"] else bool(row["was_live"])


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What one change comes to: a result and the bag to write, or a failure and none."""

    token: bytes
    result: dict[str, str] | MnemosyneError
    after: bytes | None
    not_after_us: int = NEVER_US


def _with_values(changes: Sequence[ValueChange], before: Mapping[bytes, Record]) -> list[_Outcome]:
    """Apply the changes in order; of several for one token, the last one's bag is to be written."""
    bags = {token: row["bag"] for token, row in before.items()}
    outcomes: list[_Outcome] = []
    for change in changes:
        token = change.access_token.encode()
        if token not in bags:
            outcomes.append(_Outcome(token, SessionNotFound(), None))
        elif before[token]["now"] >= change.not_after_us:
            outcomes.append(_Outcome(token, DeadlineExceeded(), None))
        else:
            outcomes.append(_with_value(change, token, bags))
    return outcomes


def _with_value(change: ValueChange, token: bytes, bags: dict[bytes, bytes]) -> _Outcome:
    try:
        values, bags[token] = bag.with_value(
            bags[token], change.key, change.value, max_entries=change.max_entries
        )
    except (InvalidArgument, CorruptBag) as exc:
        return _Outcome(token, exc, None)
    return _Outcome(token, values, bags[token], change.not_after_us)


def _ended_meanwhile() -> MnemosyneError:
    # Locked, a row can be written but for its time: it is past it, or so near that it makes no odds.
    return DeadlineExceeded()


async def _isolating(
    run: Callable[[Sequence[Item]], Awaitable[list[Result | MnemosyneError]]], items: Sequence[Item]
) -> list[Result | MnemosyneError]:
    """Run a batch; when one item's fault fails it, run the items one by one."""
    try:
        return await run(items)
    except ITEM_FAULTS as exc:
        if len(items) == 1:
            return [_item_error(exc)]
        alone = [_isolating(run, [item]) for item in items]
        return [result for results in await asyncio.gather(*alone) for result in results]


def _item_error(exc: Exception) -> MnemosyneError:
    if isinstance(exc, asyncpg.LockNotAvailableError | asyncpg.UniqueViolationError):
        return StorageUnavailable("mnemosyned: storage: the session is locked by another writer")
    if isinstance(exc, asyncpg.ProgramLimitExceededError):
        return InvalidArgument("mnemosyned: access_token is too long for PostgreSQL to index")
    return InvalidArgument("mnemosyned: a field holds text that PostgreSQL cannot store")
