"""Connections to PostgreSQL: bounded, timed, counted, and with errors of `mnemosyned/errors.py`.

Life of a connection. The pool opens one connection at the start, and others on demand up to
`-postgres.pool.size`. asyncpg closes a connection that was idle for 5 minutes. A broken connection leaves
the pool at its release, and the next statement opens another: no code here reconnects.

Time-outs, in the order in which they fire (`S` is `-postgres.statement.timeout`):

    S/3        lock_timeout         server   one row or table lock; LockNotAvailableError, an item's fault
    S          statement_timeout    server   one statement; QueryCanceledError; the connection stays usable
    S          idle_in_transaction  server   a process that is stalled between statements loses its locks
    S + 0.5 s  command_timeout      client   a server that is stuck or unreachable; cancels the statement
    S          acquire              client   before all of these: the wait for a free connection
    1 s        release              client   after all of these: the end of a cancelled statement

lock_timeout is the shortest, so that one locked row fails its item and leaves time to run the others alone.
The server's time-outs fire before the client's, because the server's error leaves the connection in a known
state; after the client's the connection must be cancelled over another one. A call therefore takes at most
2 S + 1.5 s here, though its own deadline may end the wait for it sooner.

Errors fall into four classes:

- Refusals (`REFUSALS`): wrong password, no such database, no right. A retry ends the same way.
- Item faults (`ITEM_FAULTS`): the data of one item, or the lock on its row. The batch is run item by item.
- Transient (`_TRANSIENT`) and all other errors of PostgreSQL: StorageUnavailable. Even an unknown SQLSTATE is
  no bug of the caller, and the caller may retry.
- Anything else, such as a TypeError: a bug, which passes through and becomes INTERNAL.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import asyncpg

from mnemosyned.errors import StorageUnavailable
from mnemosyned.observe.metrics import QueryMetrics
from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.postgres.queries import Query

if TYPE_CHECKING:
    from asyncpg import Connection, Pool, Record
    from asyncpg.pool import PoolConnectionProxy

log = logging.getLogger(__name__)

# Parameters of Go's lib/pq, which addresses of the Go daemon may have. asyncpg passes unknown parameters on
# to the server as settings, and the server refuses these.
_LIB_PQ_ONLY: Final = frozenset({"connect_timeout", "fallback_application_name", "binary_parameters"})
# How long the client waits beyond the server's own statement_timeout. Only a server that is stuck or gone
# gets this far.
_GRACE_S: Final = 0.5
_RELEASE_TIMEOUT_S: Final = 1.0

# Kept between statements; the pool closes the others after minutes without use.
_MAX_KEPT: Final = 2
# Not the fault of one item; a retry may succeed.
_TRANSIENT: Final = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    # What the end of a transaction raises if its connection broke in between.
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.OperatorInterventionError,
    asyncpg.TransactionRollbackError,
    asyncpg.PostgresSystemError,
)
Faults = tuple[type[Exception], ...]
# Caused by one item or its row, so the other items of the batch can succeed without it. LockNotAvailable is
# here though a batch cannot tell whose lock it was: run alone, each item waits for its own row only.
ITEM_FAULTS: Final = (
    asyncpg.LockNotAvailableError,
    asyncpg.UniqueViolationError,
    asyncpg.ProgramLimitExceededError,
    asyncpg.DataError,
)

# A retry ends the same way until the configuration or the server's grants change.
REFUSALS: Final = (
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.InsufficientPrivilegeError,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresOptions:
    """How to reach the server."""

    dsn: str = field(repr=False)  # with a password
    pool_size: int  # most connections
    connect_timeout_s: float
    statement_timeout_s: float


class PostgresPool:
    """Runs statements, each within the statement time-out.

    Every method raises StorageUnavailable for any error of PostgreSQL or the network that is not among its
    `passing` errors. It logs the SQLSTATE alone: the server's text may quote a row, and so a token.
    """

    def __init__(self, options: PostgresOptions, metrics: QueryMetrics) -> None:
        self._options = options
        self._metrics = metrics
        self._pool: Pool[Record] | None = None
        # Connections between two statements, the last one used at the end. To give one back to the pool and
        # to take it again costs two tasks, a third of the time of a lone statement.
        self._kept: list[PoolConnectionProxy[Record]] = []
        self._acquiring = 0  # statements that wait for the pool: for them nothing is kept

    async def open(self) -> None:
        """Make the pool with a first connection, within `-postgres.connect.timeout`.

        Raises:
            StorageUnavailable: the server cannot be reached now.
            StorageRefused: it refuses us, or the address is wrong.
        """
        try:
            with _translated("connect", self._metrics, (*REFUSALS, asyncpg.ClientConfigurationError)):
                self._pool = await _create_pool(self._options)
        except REFUSALS as exc:
            raise StorageRefused(f"PostgreSQL: {exc}") from exc
        except ValueError as exc:
            # The error's text may quote the address, which holds a password.
            raise StorageRefused("flag -postgres.address: not an address that asyncpg can use") from exc
        self._metrics.watch_connections(self._size)

    async def close(self) -> None:
        """Close all connections; statements under way fail.

        At once and not gracefully: asyncpg's `close` waits for every connection, and a stuck server would
        hold the end of the daemon. Callers have been drained before.
        """
        pool, self._pool = self._pool, None
        self._kept.clear()
        if pool is not None:
            pool.terminate()

    async def fetch(self, query: Query, *args: object, passing: Faults = ()) -> list[Record]:
        """Run one statement in a transaction of its own.

        Raises:
            StorageUnavailable: no connection, no answer in time, or any error that is not in `passing`.
            Errors in `passing`: as asyncpg raises them, uncounted and unlogged.
        """
        connection = await self._acquire()
        is_idle = False
        try:
            rows = await self.run(connection, query, *args, passing=passing)
            is_idle = True
            return rows
        finally:
            await self._release(connection, is_idle=is_idle)

    async def run(
        self,
        connection: PoolConnectionProxy[Record],
        query: Query,
        *args: object,
        passing: Faults = (),
    ) -> list[Record]:
        """Run one statement on a connection taken with `connection`. Raises like `fetch`."""
        started_s = time.perf_counter()
        try:
            with _translated(query.name, self._metrics, passing):
                return await connection.fetch(query.sql, *args)
        finally:
            self._metrics.count(query.name, time.perf_counter() - started_s)

    @asynccontextmanager
    async def connection(self, *, passing: Faults = ()) -> AsyncIterator[PoolConnectionProxy[Record]]:
        """Lend a connection; wait for a free one for at most the statement time-out.

        `passing` goes through both translations, this one and that of `run`. Errors of the statements
        arrive here already translated; this translation is for those of the transaction itself.
        """
        connection = await self._acquire()
        is_idle = False
        try:
            with _translated("connection", self._metrics, passing):
                yield connection
            is_idle = True
        finally:
            await self._release(connection, is_idle=is_idle)

    async def _acquire(self) -> PoolConnectionProxy[Record]:
        if self._pool is None:
            raise StorageUnavailable("mnemosyned: storage: not connected")
        while self._kept:
            connection = self._kept.pop()
            if _is_open(connection):
                return connection
            await self._release(connection, is_idle=False)
        self._acquiring += 1
        try:
            with _translated("acquire", self._metrics):
                return await self._pool.acquire(timeout=self._options.statement_timeout_s)
        finally:
            self._acquiring -= 1

    async def _release(self, connection: PoolConnectionProxy[Record], *, is_idle: bool) -> None:
        """Take a connection back; `is_idle`: its last statement ended, with a result."""
        if is_idle and not self._acquiring and len(self._kept) < _MAX_KEPT and self._pool is not None:
            self._kept.append(connection)
            return
        # The pool terminates a connection that it cannot clean up, and then raises. The caller has its rows
        # already, so this error must not replace them. `close` may have run meanwhile.
        if self._pool is not None:
            with suppress(*_TRANSIENT):
                await self._pool.release(connection, timeout=_RELEASE_TIMEOUT_S)

    def _size(self) -> int:
        return 0 if self._pool is None else self._pool.get_size()


def _is_open(connection: PoolConnectionProxy[Record]) -> bool:
    try:
        return not connection.is_closed()
    except asyncpg.InterfaceError:
        # It broke, and the pool has taken it back by itself.
        return False


async def _create_pool(options: PostgresOptions) -> Pool[Record]:
    timeout_ms = str(int(options.statement_timeout_s * 1000))
    pool = asyncpg.create_pool(
        _without_lib_pq_parameters(options.dsn),
        min_size=1,
        max_size=options.pool_size,
        timeout=options.connect_timeout_s,
        command_timeout=options.statement_timeout_s + _GRACE_S,
        init=_initialise,
        # No statement leaves state in the connection: settings are SET LOCAL, advisory locks end with the
        # transaction. asyncpg's own reset is a round trip per statement, up to 40 % of the throughput.
        reset=_leave_as_it_is,
        server_settings={
            "application_name": "mnemosyned",
            "statement_timeout": timeout_ms,
            "lock_timeout": str(int(options.statement_timeout_s * 1000 / 3)),
            "idle_in_transaction_session_timeout": timeout_ms,
            # These statements are short: compiling one would take longer than running it.
            "jit": "off",
            # Every statement has an index. PostgreSQL may plan a scan while the table is empty, and keeps
            # that plan until the table is analyzed: Starts fell to 17 % of their rate.
            "enable_seqscan": "off",
        },
    )
    return await pool


async def _initialise(connection: Connection[Record]) -> None:
    # Instants are integers of microseconds on both sides. A datetime would cost a conversion per row.
    await connection.set_type_codec(
        "timestamptz",
        schema="pg_catalog",
        format="tuple",
        encoder=lambda epoch_us: (epoch_us - _POSTGRES_EPOCH_US,),
        decoder=lambda postgres: postgres[0] + _POSTGRES_EPOCH_US,
    )


# PostgreSQL counts microseconds from 2000-01-01 UTC.
_POSTGRES_EPOCH_US: Final = 946_684_800_000_000


async def _leave_as_it_is(_: Any) -> None:  # noqa: ANN401  # asyncpg passes its private proxy
    pass


def _without_lib_pq_parameters(dsn: str) -> str:
    parts = urlsplit(dsn)
    given = parse_qsl(parts.query, keep_blank_values=True)
    kept = [(key, value) for key, value in given if key not in _LIB_PQ_ONLY]
    return dsn if kept == given else urlunsplit(parts._replace(query=urlencode(kept)))


class _translated:  # noqa: N801  # reads as a clause: `with _translated(…)`
    """Turns what asyncpg raises into StorageUnavailable; counts and logs it.

    A class and not a generator with `contextmanager`, which would cost more on every statement.
    """

    __slots__ = ("_metrics", "_passing", "_query_name")

    def __init__(self, query_name: str, metrics: QueryMetrics, passing: Faults = ()) -> None:
        self._query_name = query_name
        self._metrics = metrics
        self._passing = passing

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, _: object) -> None:
        if exc is None or isinstance(exc, self._passing):
            return
        # A bug, a cancellation, or an error that an inner translation has already made.
        if not isinstance(exc, (*_TRANSIENT, asyncpg.PostgresError)):
            return
        self._metrics.count_error(self._query_name)
        error = getattr(exc, "sqlstate", None) or type(exc).__name__
        log.warning("storage_failed", extra={"query": self._query_name, "error": error})
        if isinstance(exc, TimeoutError | asyncpg.QueryCanceledError):
            raise StorageUnavailable("mnemosyned: storage: no answer in time") from exc
        raise StorageUnavailable("mnemosyned: storage: unavailable") from exc
