"""Whether a pooler is in front of the server, and whether each connection keeps its server connection.

Statements, prepared once a connection, and settings (session_settings.py) belong to a connection of the
server. A pooler such as PgBouncer has three modes:

    session      a client has one server connection until it disconnects: works
    transaction  another one for each transaction: prepared statements are missing or those of others, and
                 time-outs set here would apply to other clients of the pooler: refused
    statement    as transaction, and BEGIN is an error: refused

The question is asked before anything is set or prepared, with statements of the simple protocol alone, whose
only answer is whether they fail. A pooler shows no pooling mode, so the question is asked by its effect:

    first                              second
    set_config('mnemosyned.owner')
                                       BEGIN          takes a server connection that is free, and holds it
                                       is it marked?  yes ──> shared
    is it still marked?  no ──> shared
                                       ROLLBACK

In transaction mode the first connection leaves its server connection at the end of its statement. The second
takes it, or, if another client was quicker, holds one more. Some rounds make a mistake unlikely on a pooler
that others use too.

Whether there is a pooler at all: PostgreSQL tells a client the number of its process at the start. A pooler
tells a number of its own, since a client may have several processes over time.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final

import asyncpg

from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.postgres.kind import kind_of

if TYPE_CHECKING:
    from asyncpg import Connection, Record

_ROUNDS: Final = 5
_CLOSE_TIMEOUT_S: Final = 1.0
_ADVICE: Final = (
    "set pool_mode=session for this database or user in the pooler, or give the server's own address"
)


async def find_pooler(connect: Callable[[], Awaitable[Connection[Record]]]) -> bool:
    """Return whether a pooler in session mode is in front of the server; False: there is no pooler.

    `connect` opens a connection that nothing has been set on. At most two are open at once, and none at the
    end.

    Raises:
        StorageRefused: a pooler gives one server connection to several clients at once.
        asyncpg's errors, OSError, TimeoutError: there is no answer.
    """
    async with _lent(connect) as first:
        if kind_of(first).is_plain:
            # Its connections are none of PostgreSQL's processes. Give the address of the server.
            return False
        if await _holds(first, f"pg_backend_pid() = {first.get_server_pid()}"):
            return False
        await _check_transactions(first)
        try:
            async with _lent(connect) as second:
                await _check_sharing(first, second)
        except TimeoutError:
            # All server connections are in use, also that of the first, which is in no transaction: it keeps
            # its own. Opening the pool tells whether there is one more.
            return True
    return True


@asynccontextmanager
async def _lent(connect: Callable[[], Awaitable[Connection[Record]]]) -> AsyncIterator[Connection[Record]]:
    connection = await connect()
    try:
        yield connection
    except BaseException:
        connection.terminate()
        raise
    # With a word to the server, which would log a connection that just ends.
    with suppress(OSError, TimeoutError, asyncpg.InterfaceError):
        await connection.close(timeout=_CLOSE_TIMEOUT_S)


async def _check_transactions(connection: Connection[Record]) -> None:
    try:
        await connection.execute("BEGIN")
        await connection.execute("ROLLBACK")
    except asyncpg.PostgresConnectionError as exc:
        # PgBouncer says so, and closes the connection: in asyncpg's eyes it broke.
        if "transaction blocks" not in str(exc):
            raise
        raise StorageRefused(f"the pooler in front of PostgreSQL is in statement mode: {_ADVICE}") from None


async def _check_sharing(first: Connection[Record], second: Connection[Record]) -> None:
    owner = secrets.token_hex(8)
    mark = f"current_setting('mnemosyned.owner', true) IS NOT DISTINCT FROM '{owner}'"
    for _ in range(_ROUNDS):
        await first.execute(f"SELECT set_config('mnemosyned.owner', '{owner}', false)")
        await second.execute("BEGIN")
        if await _holds(second, mark) or not await _holds(first, mark):
            raise StorageRefused(
                f"the pooler in front of PostgreSQL is in transaction mode, in which prepared "
                f"statements and time-outs do not work: {_ADVICE}"
            )
        await second.execute("ROLLBACK")


async def _holds(connection: Connection[Record], condition: str) -> bool:
    # Without a result: `execute` without parameters is the only use of the simple protocol in asyncpg.
    try:
        await connection.execute(f"SELECT 1 / CASE WHEN {condition} THEN 1 ELSE 0 END")  # ours
    except asyncpg.DivisionByZeroError:
        return False
    return True
