"""Connections to PostgreSQL: bounded, timed, counted, and with errors in our own terms."""

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

# Parameters of Go's lib/pq that a server would refuse as unknown settings.
_LIB_PQ_ONLY: Final = frozenset({"connect_timeout", "fallback_application_name", "binary_parameters"})
# How long the client waits beyond the server's own statement_timeout, whose error leaves the
# connection usable; only a server that is stuck or gone gets this far.
_GRACE_S: Final = 0.5
_RELEASE_TIMEOUT_S: Final = 1.0

# Not the fault of one item, and perhaps better on another try.
_TRANSIENT: Final = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    # What a transaction's end raises when its connection was lost under it.
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.OperatorInterventionError,
    asyncpg.TransactionRollbackError,
    asyncpg.PostgresSystemError,
)
Faults = tuple[type[Exception], ...]
# An item's own fault, or its own row's: the other items of its batch need not suffer.
ITEM_FAULTS: Final = (
    asyncpg.LockNotAvailableError,
    asyncpg.UniqueViolationError,
    asyncpg.ProgramLimitExceededError,
    asyncpg.DataError,
)

# Another try would end the same way: only an operator can help.
REFUSALS: Final = (
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.InsufficientPrivilegeError,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresOptions:
    """How to reach the server."""

    dsn: str = field(repr=False)
    pool_size: int
    connect_timeout_s: float
    statement_timeout_s: float


class PostgresPool:
    """Runs statements, each within the statement time-out.

    Every method raises StorageUnavailable for what is not an item's fault, after logging the
    SQLSTATE; the server's own text may quote a row and is neither logged nor sent on.
    """

    def __init__(self, options: PostgresOptions, metrics: QueryMetrics) -> None:
        self._options = options
        self._metrics = metrics
        self._pool: Pool[Record] | None = None

    async def open(self) -> None:
        """Make the pool with a first connection.

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
            # The text of the fault may quote the address, which holds a password.
            raise StorageRefused("flag -postgres.address: not an address that asyncpg can use") from exc
        self._metrics.watch_connections(self._size)

    async def close(self) -> None:
        """Close all connections; statements under way fail."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.terminate()

    async def fetch(self, query: Query, *args: object, passing: Faults = ()) -> list[Record]:
        """Run one statement in a transaction of its own; faults `passing` are raised as they are."""
        async with self.connection(passing=passing) as connection:
            return await self.run(connection, query, *args, passing=passing)

    async def run(
        self,
        connection: PoolConnectionProxy[Record],
        query: Query,
        *args: object,
        passing: Faults = (),
    ) -> list[Record]:
        """Run one statement on a connection taken with `connection`."""
        started_s = time.perf_counter()
        try:
            with _translated(query.name, self._metrics, passing):
                return await connection.fetch(query.sql, *args)
        finally:
            self._metrics.count(query.name, time.perf_counter() - started_s)

    @asynccontextmanager
    async def connection(self, *, passing: Faults = ()) -> AsyncIterator[PoolConnectionProxy[Record]]:
        """Lend a connection; a full pool is waited for as long as a statement may take."""
        if self._pool is None:
            raise StorageUnavailable("mnemosyned: storage: not connected")
        with _translated("acquire", self._metrics):
            connection = await self._pool.acquire(timeout=self._options.statement_timeout_s)
        try:
            with _translated("connection", self._metrics, passing):
                yield connection
        finally:
            await self._release(connection)

    async def _release(self, connection: PoolConnectionProxy[Record]) -> None:
        # A connection that cannot be cleaned up is terminated by the pool before it raises.
        if self._pool is not None:
            with suppress(*_TRANSIENT):
                await self._pool.release(connection, timeout=_RELEASE_TIMEOUT_S)

    def _size(self) -> int:
        return 0 if self._pool is None else self._pool.get_size()


async def _create_pool(options: PostgresOptions) -> Pool[Record]:
    timeout_ms = str(int(options.statement_timeout_s * 1000))
    pool = asyncpg.create_pool(
        _without_lib_pq_parameters(options.dsn),
        min_size=1,
        max_size=options.pool_size,
        timeout=options.connect_timeout_s,
        command_timeout=options.statement_timeout_s + _GRACE_S,
        init=_initialise,
        # We leave no session state behind; asyncpg's own reset costs up to 40 % of the throughput.
        reset=_leave_as_it_is,
        server_settings={
            "application_name": "mnemosyned",
            "statement_timeout": timeout_ms,
            "lock_timeout": str(int(options.statement_timeout_s * 1000 / 3)),
            "idle_in_transaction_session_timeout": timeout_ms,
            "jit": "off",
            # All our statements have an index. A plan that was made while the table was empty would scan it
            # for as long as PostgreSQL keeps the plan, which is until it is analyzed.
            "enable_seqscan": "off",
        },
    )
    return await pool


async def _initialise(connection: Connection[Record]) -> None:
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
    """Turns what asyncpg raises into our errors; counts and logs it."""

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
        if not isinstance(exc, (*_TRANSIENT, asyncpg.PostgresError)):
            return
        self._metrics.count_error(self._query_name)
        error = getattr(exc, "sqlstate", None) or type(exc).__name__
        log.warning("storage_failed", extra={"query": self._query_name, "error": error})
        if isinstance(exc, TimeoutError | asyncpg.QueryCanceledError):
            raise StorageUnavailable("mnemosyned: storage: no answer in time") from exc
        raise StorageUnavailable("mnemosyned: storage: unavailable") from exc
