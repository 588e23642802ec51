"""A session that is started, read, changed, extended, renamed and ended in a transaction that is rolled back.

`table_check.py` judges what the catalog says. It cannot judge what the catalog does not say: what a trigger
does, or whether a replication permits an UPDATE. So the store's own methods run once at the start:

    BEGIN ──> start ──> load ──> set_values ──> touch ──> rename ──> abandon ──> ROLLBACK

The key is random, so the rows of others are not locked. No other connection sees the session. What remains is
a dead row, and what a trigger does outside of its transaction.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypeVar, cast

import asyncpg

from aio.units import NEVER_US
from mnemosyned.errors import MnemosyneError
from mnemosyned.sessions.model import (
    Abandonment,
    ChangedBag,
    Lookup,
    NewSession,
    Session,
    Touch,
    ValueChange,
)
from mnemosyned.sessions.store import FullStore, Renaming
from mnemosyned.storage.postgres.faults import is_of_the_table
from mnemosyned.storage.postgres.read_only import ReadOnlyServer
from mnemosyned.storage.postgres.schema import Table, trial_refused

if TYPE_CHECKING:
    from asyncpg import Record

    from mnemosyned.storage.postgres.pool import PostgresPool
    from mnemosyned.storage.postgres.queries import Query
    from mnemosyned.storage.postgres.table_facts import AnyConnection

T = TypeVar("T")
_HOUR_US: Final = 3_600_000_000


class _OneConnection:
    """Stands in for the pool: everything on one connection, and errors as asyncpg raises them."""

    def __init__(self, connection: AnyConnection) -> None:
        self._connection = connection
        self.read_only = ReadOnlyServer()
        self.error: asyncpg.PostgresError | None = None

    async def fetch(self, query: Query, *args: object, **_: object) -> list[Record]:
        try:
            return await self._connection.fetch(query.sql, *args)
        except asyncpg.PostgresError as exc:
            self.error = exc
            raise

    async def run(self, _: object, query: Query, *args: object, **__: object) -> list[Record]:
        return await self.fetch(query, *args)

    async def in_transaction(self, work: Callable[[AnyConnection], Awaitable[T]], **_: object) -> T:
        return await work(self._connection)


async def run(
    connection: AnyConnection,
    table: Table,
    store_on: Callable[[PostgresPool, Table], FullStore],
) -> None:
    """Try all that callers do; `store_on` makes a store.

    Raises:
        StorageRefused: a statement fails because of the table, or does not do what it should.
        asyncpg's errors: of the server or the connection.
    """
    one = _OneConnection(connection)
    transaction = connection.transaction()
    await transaction.start()
    complaint = ""
    try:
        complaint = await _try_all(store_on(cast("PostgresPool", one), table))
    except asyncpg.PostgresError as exc:
        if not is_of_the_table(exc) or exc.sqlstate == "42501":
            raise
        complaint = "a statement fails"
    finally:
        if not connection.is_closed():
            await transaction.rollback()
    if complaint:
        error = one.error
        why = "" if error is None else f": {error.sqlstate} {type(error).__name__.removesuffix('Error')}"
        raise await trial_refused(connection, table, f"in a trial that was rolled back, {complaint}{why}")


async def _try_all(store: FullStore) -> str:
    """Return what does not work; empty: all does."""
    token, renamed = secrets.token_hex(32), secrets.token_hex(32)
    new = NewSession(
        access_token=token,
        refresh_token="",
        subject_id="trial",
        subject_client="trial",
        bag=b"",
        ttl_us=_HOUR_US,
        not_after_us=NEVER_US,
    )
    (started,) = await store.start([new])
    if not isinstance(started, Session):
        return "a session could not be started"
    if not isinstance(started.expires_at_us, int):
        return "an expiry is no instant"
    later_us = started.expires_at_us + _HOUR_US
    (loaded,) = await store.load([Lookup(access_token=token, ttl_us=2 * _HOUR_US, touch_interval_us=0)])
    if not isinstance(loaded, Session) or (loaded.subject_id, loaded.bag) != ("trial", b""):
        return "a session that was started could not be read as it was"
    if loaded.expires_at_us < later_us:
        return "a session could not be extended"
    (changed,) = await store.set_values([ValueChange(access_token=token, key="k", value="v")])
    if not isinstance(changed, ChangedBag) or changed.values != {"k": "v"}:
        return "a bag could not be changed"
    touched = await store.touch([Touch(access_token=token, expires_at_us=later_us + _HOUR_US)])
    renaming = await store.rename([Renaming(old=token, new=renamed)])
    (ended,) = await store.abandon([Abandonment(access_token=renamed)])
    if [*touched, *renaming, ended] != [True, True, True]:
        return "a session could not be renamed or ended" if touched == [True] else "no expiry could be moved"
    left = [one for one in await store.exist([token, renamed]) if one is not False]
    return "a session that was ended is still there" if left or isinstance(ended, MnemosyneError) else ""
