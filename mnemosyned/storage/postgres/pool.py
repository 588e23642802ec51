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

Connections are made by `address_in_use.py`.

Replaced connections. `use` takes another address, and `renew` drops what is connected: idle connections at
once, the others at the end of their statement. No statement fails by either. Three things cause it:

- the file of the address has changed (its server or its password). It is read again at once if a new
  connection is refused, and the call that wanted it gets one with the new password;
- a statement had no answer at all. Other idle connections may be as dead, behind a firewall that has
  forgotten them, so no further call waits for one of them;
- a server that is not to be used any more. Statements at a former primary fail (`timeline.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar

import asyncpg

from aio.tasks import Tasks
from mnemosyned.errors import StorageUnavailable
from mnemosyned.observe.metrics import QueryMetrics
from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.fault_log import FaultLog
from mnemosyned.storage.postgres import faults, session_settings
from mnemosyned.storage.postgres.acquisition import Acquisition
from mnemosyned.storage.postgres.address import AddressError
from mnemosyned.storage.postgres.address_in_use import AddressInUse, PostgresOptions
from mnemosyned.storage.postgres.connector import Connector
from mnemosyned.storage.postgres.faults import REFUSALS, TRANSIENT, Faults, hint_of, is_of_the_table
from mnemosyned.storage.postgres.kind import Kind
from mnemosyned.storage.postgres.queries import Query
from mnemosyned.storage.postgres.read_only import ReadOnlyServer
from mnemosyned.storage.postgres.repeats import ROLLED_BACK, Repeats

if TYPE_CHECKING:
    from asyncpg import Connection, Pool, Record
    from asyncpg.pool import PoolConnectionProxy

log = logging.getLogger(__name__)

T = TypeVar("T")

_RELEASE_TIMEOUT_S: Final = 1.0

# Kept between statements; the pool closes the others after minutes without use.
_MAX_KEPT: Final = 2
# The connection has lost what was prepared on it: a pooler in front has changed its mode.
_LOST_STATEMENTS: Final = (asyncpg.InvalidSQLStatementNameError, asyncpg.DuplicatePreparedStatementError)


class PostgresPool:
    """Runs statements, each within the statement time-out.

    Every method raises StorageUnavailable for any error of PostgreSQL or the network that is not among its
    `passing` errors. It logs no text of the server, which may quote a row, and so a token.
    """

    def __init__(self, options: PostgresOptions, metrics: QueryMetrics) -> None:
        self._options = options
        self._metrics = metrics
        self._faults = FaultLog(faults)
        self.address = AddressInUse(options, self._leave_former)
        self._pool: Pool[Record] | None = None
        # Connections between two statements, the last one used at the end. To give one back to the pool and
        # to take it again costs two tasks, a third of the time of a lone statement.
        self._kept: list[PoolConnectionProxy[Record]] = []
        self._acquiring = 0  # statements that wait for the pool: for them nothing is kept
        self._epoch = 0  # raised by `renew`: connections of earlier ones are not kept
        self._lent: set[PoolConnectionProxy[Record]] = set()
        self.read_only = ReadOnlyServer()
        self.is_table_suspected = False  # a statement failed because of the table, since it was last tried
        self._acquisition = Acquisition(options.pool_size)
        self._doubts = _doubts()

    @property
    def kind(self) -> Kind:
        """Which kind of server it is; known once it is open."""
        return self.address.kind

    async def open(self) -> None:
        """Make the pool with a first connection, within `-postgres.connect.timeout`.

        Raises:
            StorageUnavailable: the server cannot be reached now.
            StorageRefused: it refuses us, or the address is wrong.
        """
        address, dsn = self.address, self.address.dsn
        connector = address.connector_of(dsn)
        if address.connector is None:
            for name, word in connector.address.dropped.items():
                log.warning("postgres_parameter_ignored", extra={"parameter": name, "reason": word})
        address.connector = connector
        self._faults.where = address.where
        try:
            with address.refusing(connector), _Translated(self, "connect", REFUSALS):
                await address.look()
                self._pool = await self._create_pool()
        except StorageRefused:
            # The file of the address may have changed since it was read.
            address.on_auth_failure()
            await address.reload()
            if address.dsn == dsn:
                raise
        if address.dsn != dsn:
            await self.close()
            raise StorageUnavailable("mnemosyned: storage: its address has changed")
        if self.kind.is_plain:
            log.warning("server_is_not_postgresql", extra={"kind": self.kind.name, **self._faults.where})
        self._metrics.watch_pool(size=self._size, in_use=self._in_use, waiting=lambda: self._acquiring)

    async def use(self, dsn: str) -> None:
        """Use another address from now on, if a connection to it can be made; keep the former otherwise.

        Statements under way end on the connection that they have. Before `open`, the address is only taken.

        Raises:
            StorageRefused: the address is wrong, or no connection can be made. The former address stays.
        """
        if dsn == self.address.dsn:
            return
        if self._pool is None:
            self.address.connector_of(dsn)
            self.address.dsn = dsn
            return
        await self.address.change(dsn)
        self._faults.where = self.address.where
        kept, self._kept = self._kept, []
        self.renew()
        for connection in kept:
            # In an orderly manner: the pool closes it.
            await self._release(connection, is_idle=False)
        log.info("postgres_address_changed", extra=self._faults.where)

    def renew(self) -> None:
        """Replace all connections: idle ones now, and others at the end of their statement."""
        self._epoch += 1
        kept, self._kept = self._kept, []
        for connection in kept:
            # Nothing is under way on it. The pool gets its place back by itself.
            with suppress(asyncpg.InterfaceError):
                connection.terminate()
            self._acquisition.released()
        if self._pool is not None:
            # asyncpg's method is a coroutine that awaits nothing.
            with suppress(StopIteration):
                self._pool.expire_connections().send(None)

    async def close(self) -> None:
        """Close all connections; statements under way fail.

        At once and not gracefully: asyncpg's `close` waits for every connection, and a stuck server would
        hold the end of the daemon. Callers have been drained before.
        """
        pool, self._pool = self._pool, None
        self._kept.clear()
        self._lent.clear()
        self._acquisition = Acquisition(self._options.pool_size)
        if pool is not None:
            pool.terminate()
        await self.address.close()
        await self._doubts.close()
        # It may be opened again.
        self._doubts = _doubts()

    def doubt(self) -> None:
        """Look in the background whether another server of the address has become the primary.

        The server in use has answered no write. If it has lost its synchronous standby, it will never.
        """
        connector = self.address.connector
        if connector is not None and len(connector.address.hosts) > 1 and not len(self._doubts):
            self._doubts.spawn(self._look_for_later(connector))

    async def _look_for_later(self, connector: Connector) -> None:
        # No server can be used: the calls that need one tell it.
        with suppress(*TRANSIENT, asyncpg.PostgresError, AddressError):
            await connector.look_for_later()

    def _leave_former(self) -> None:
        """Close all connections to a primary that another one has replaced, also those in use."""
        log.warning("later_primary_found", extra=self._faults.where)
        self.renew()
        self.read_only.drop_but(())

    async def fetch(
        self, query: Query, *args: object, passing: Faults = (), is_urgent: bool = False
    ) -> list[Record]:
        """Run one statement in a transaction of its own; an urgent one before all that wait for a connection.

        It is run again if the server has rolled it back for the sake of another (`repeats.py`).

        Raises:
            StorageUnavailable: no connection, no answer in time, or any error that is not in `passing`.
            Errors in `passing`: as asyncpg raises them, uncounted and unlogged.
        """
        connection = await self._acquire(is_urgent=is_urgent)
        epoch, is_idle = self._epoch, False
        expected: Faults = (*passing, *ROLLED_BACK)
        repeats: Repeats | None = None
        try:
            while True:
                try:
                    rows = await self.run(connection, query, *args, passing=expected)
                except ROLLED_BACK as exc:
                    repeats = repeats or Repeats(self._options.statement_timeout_s)
                    if not await repeats.pause():
                        raise self.failed(query.name, exc) from exc
                else:
                    is_idle = epoch == self._epoch
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
            with _Translated(self, query.name, passing):
                return await connection.fetch(query.sql, *args)
        except StorageUnavailable as exc:
            if isinstance(exc.__cause__, _LOST_STATEMENTS):
                connection.terminate()
            raise
        finally:
            self._metrics.count(query.name, time.perf_counter() - started_s)

    async def in_transaction(
        self,
        work: Callable[[PoolConnectionProxy[Record]], Awaitable[T]],
        *,
        passing: Faults = (),
    ) -> T:
        """Run statements in one transaction, from their beginning again if the server has rolled it back.

        `work` uses `run` with `passing` and ROLLED_BACK. Raises as `fetch` does.
        """
        repeats = Repeats(self._options.statement_timeout_s)
        while True:
            try:
                async with (
                    self.connection(passing=(*passing, *ROLLED_BACK)) as connection,
                    connection.transaction(),
                ):
                    return await work(connection)
            except ROLLED_BACK as exc:
                if not await repeats.pause():
                    raise self.failed("connection", exc) from exc

    @asynccontextmanager
    async def connection(self, *, passing: Faults = ()) -> AsyncIterator[PoolConnectionProxy[Record]]:
        """Lend a connection; wait for a free one for at most the statement time-out.

        `passing` goes through both translations, this one and that of `run`. Errors of the statements
        arrive here already translated; this translation is for those of the transaction itself.
        """
        connection = await self._acquire()
        epoch, is_idle = self._epoch, False
        try:
            with _Translated(self, "connection", passing):
                yield connection
            is_idle = epoch == self._epoch
        finally:
            await self._release(connection, is_idle=is_idle)

    async def _acquire(self, *, is_urgent: bool = False) -> PoolConnectionProxy[Record]:
        if self._pool is None:
            raise StorageUnavailable("mnemosyned: storage: not connected")
        while self._kept:
            connection = self._kept.pop()
            if _is_open(connection):
                self._lent.add(connection)
                return connection
            await self._release(connection, is_idle=False)
        self._acquiring += 1
        try:
            with _Translated(self, "acquire"):
                connection = await self._acquisition.take(
                    self._pool, self._options.statement_timeout_s, is_urgent=is_urgent
                )
                self._lent.add(connection)
                return connection
        except (StorageRefused, AddressError) as exc:
            # A new connection cannot be set up as it was at the start.
            raise self.failed("acquire", exc) from exc
        finally:
            self._acquiring -= 1

    async def _release(self, connection: PoolConnectionProxy[Record], *, is_idle: bool) -> None:
        """Take a connection back; `is_idle`: its last statement ended, with a result, and it is not old."""
        self._lent.discard(connection)
        if is_idle and not self._acquiring and len(self._kept) < _MAX_KEPT and self._pool is not None:
            self._kept.append(connection)
            return
        # The pool terminates a connection that it cannot clean up, and then raises. The caller has its rows
        # already, so this error must not replace them. `close` may have run meanwhile.
        try:
            if self._pool is not None:
                with suppress(*TRANSIENT):
                    await self._pool.release(connection, timeout=_RELEASE_TIMEOUT_S)
        finally:
            self._acquisition.released()

    def _size(self) -> int:
        return 0 if self._pool is None else self._pool.get_size()

    def _in_use(self) -> int:
        return 0 if self._pool is None else self._size() - self._pool.get_idle_size() - len(self._kept)

    async def _create_pool(self) -> Pool[Record]:
        pool = await asyncpg.create_pool(
            # Otherwise asyncpg restores the number on its own, in a task that outlives the pool.
            min_size=0,
            max_size=self._options.pool_size,
            connect=self._connect,
            init=self.address.set_up,
            # No statement leaves state in the connection: settings are SET LOCAL, advisory locks end with the
            # transaction. asyncpg's own reset is a round trip per statement, up to 40 % of the throughput.
            reset=_leave_as_it_is,
        )
        try:
            async with pool.acquire() as connection:
                if not self.kind.is_plain:
                    await session_settings.warn_of_server(connection)
        except BaseException:
            pool.terminate()
            raise
        return pool

    async def _connect(self, *_: object, **__: object) -> Connection[Record]:
        connection = await self.address.connect()
        self.read_only.opened(connection)
        return connection

    def failed(self, doing: str, exc: Exception) -> StorageUnavailable:
        """Count and log a fault; return what to raise for it."""
        self._metrics.count_error(doing)
        self._faults.failed(doing, exc)
        if isinstance(exc, asyncpg.InvalidAuthorizationSpecificationError):
            self.address.on_auth_failure()
        if isinstance(exc, TimeoutError) and doing not in {"acquire", "connect"}:
            # No answer at all, not even that of the server's own time-out.
            self.renew()
            self.doubt()
        if isinstance(exc, asyncpg.ReadOnlySQLTransactionError) and self.read_only.met(time.monotonic()):
            self.renew()
            self.read_only.drop_but(self._lent)
        self.is_table_suspected |= is_of_the_table(exc)
        is_late = isinstance(exc, TimeoutError | asyncpg.QueryCanceledError)
        error = StorageUnavailable(
            "mnemosyned: storage: " + ("no answer in time" if is_late else "unavailable")
        )
        # Without a connection nothing was sent.
        error.is_under_way = doing not in {"acquire", "connect"}
        error.detail, error.hint = self._faults.described(doing, exc), hint_of(exc)
        return error


def _doubts() -> Tasks:
    return Tasks("postgres_doubt", max_tasks=1)


def _is_open(connection: PoolConnectionProxy[Record]) -> bool:
    try:
        return not connection.is_closed()
    except asyncpg.InterfaceError:
        # It broke, and the pool has taken it back by itself.
        return False


async def _leave_as_it_is(_: Any) -> None:  # noqa: ANN401  # asyncpg passes its private proxy
    pass


class _Translated:
    """Turns what asyncpg raises into StorageUnavailable; counts and logs it.

    A class and not a generator with `contextmanager`, which would cost more on every statement.
    """

    __slots__ = ("_doing", "_passing", "_pool")

    def __init__(self, pool: PostgresPool, doing: str, passing: Faults = ()) -> None:
        self._pool = pool
        self._doing = doing
        self._passing = passing

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, _: object) -> None:
        if exc is None or isinstance(exc, self._passing):
            return
        # A bug, a cancellation, or an error that an inner translation has already made.
        if isinstance(exc, (*TRANSIENT, asyncpg.PostgresError)):
            raise self._pool.failed(self._doing, exc) from exc
