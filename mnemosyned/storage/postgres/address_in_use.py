"""The address in use: how connections to it are made and set up, and how another takes its place.

    content of the file ──> parse, read its files ──> pooler? ──> other servers, other database?
             │                                                        └── make the table ready there
             └── wrong, or no connection ──> StorageRefused: the former address stays       └──> in use

A new connection that is refused has the file read again at once, since the password may have changed. It is
then made with what the file has by now.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import asyncpg

from aio.tasks import Tasks
from mnemosyned.errors import StorageUnavailable
from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.postgres import address, session_settings
from mnemosyned.storage.postgres.address import AddressError
from mnemosyned.storage.postgres.connector import Connector
from mnemosyned.storage.postgres.faults import (
    CONFIGURED_WRONG,
    REFUSALS,
    TRANSIENT,
    hint_of,
    is_refusal_of_a_pooler,
    name_of,
)
from mnemosyned.storage.postgres.kind import POSTGRESQL, Kind, kind_of
from mnemosyned.storage.postgres.pooler import find_pooler
from mnemosyned.storage.postgres.timeline import Timelines

if TYPE_CHECKING:
    from asyncpg import Connection, Record

# How long the client waits beyond the server's own statement_timeout. Only a server that is stuck or gone
# gets this far.
_GRACE_S: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class PostgresOptions:
    """How to reach the server."""

    dsn: str = field(repr=False)  # with a password
    pool_size: int  # most connections
    connect_timeout_s: float
    statement_timeout_s: float
    # What the address leaves out (address.py). Nothing for a server of our own.
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ, repr=False)
    kind: Kind | None = None  # of the server; None: what it says of itself


class AddressInUse:
    """Makes connections to the servers of one address at a time; `kind` is known after the first."""

    def __init__(self, options: PostgresOptions, on_later: Callable[[], None]) -> None:
        """`on_later` is called when a later primary is found than the one in use (`timeline.py`)."""
        self._options = options
        self._on_later = on_later
        self.dsn = options.dsn
        self.kind = options.kind or POSTGRESQL
        self.connector: Connector | None = None
        self._is_pooled = False
        # What reads the file of the address again, soon or now.
        self.on_auth_failure: Callable[[], None] = _do_nothing
        self.reload: Callable[[], Coroutine[Any, Any, None]] = _wait_for_nothing
        self._reloads = Tasks("postgres_reload")
        # What makes another server ready before it is used.
        self.prepare: Callable[[Connection[Record]], Awaitable[None]] = _wait_for_nothing

    @property
    def where(self) -> dict[str, str]:
        """What the log tells of it."""
        if self.connector is None:
            return {}
        found = self.connector.address
        hosts = ", ".join(map(str, found.hosts))
        return {"server": hosts, "database": found.database, "user": found.user}

    async def look(self) -> None:
        """Find out whether a pooler is in front of the server. Raises as `find_pooler` does."""
        assert self.connector is not None
        self._is_pooled = await find_pooler(self.connector.connect)

    async def change(self, dsn: str) -> None:
        """Use another address from now on.

        Raises:
            StorageRefused: the address is wrong, or no connection can be made. The former address stays.
        """
        connector = self.connector_of(dsn)
        try:
            is_pooled = await find_pooler(connector.connect)
            await self._prepare(connector, is_pooled=is_pooled)
        except (*TRANSIENT, asyncpg.PostgresError) as exc:
            raise self.refused(exc, connector) from exc
        self.dsn, self.connector, self._is_pooled = dsn, connector, is_pooled

    async def _prepare(self, connector: Connector, *, is_pooled: bool) -> None:
        """Make the table ready at another server or in another database; raises asyncpg's errors."""
        assert self.connector is not None
        new, old = connector.address, self.connector.address
        if (new.hosts, new.database) == (old.hosts, old.database):
            return
        connection = await connector.connect()
        try:
            await session_settings.apply(
                connection,
                self._options.statement_timeout_s,
                new.settings,
                is_pooled=is_pooled,
                is_plain=kind_of(connection).is_plain,
            )
            await self.prepare(connection)
        finally:
            connection.terminate()

    def connector_of(self, dsn: str) -> Connector:
        """Return what opens connections to an address, whose files have been read. Raises StorageRefused."""
        try:
            found = address.parse(dsn, self._options.environ)
            former = self.connector
            is_same = former is not None and set(former.address.hosts) == set(found.hosts)
            connector = Connector(
                found,
                timeout_s=self._options.connect_timeout_s,
                command_timeout_s=self._options.statement_timeout_s + _GRACE_S,
                # A person who names other servers knows which one is right.
                timelines=former.timelines if former is not None and is_same else Timelines(self._on_later),
                environ=self._options.environ,
            )
            connector.check()
        except AddressError as exc:
            raise StorageRefused(f"flag -postgres.address: {exc}") from None
        return connector

    async def connect(self) -> Connection[Record]:
        """Open a connection; nothing is set on it yet. Raises as `Connector.connect` does."""
        connector = self.connector
        assert connector is not None
        try:
            connection = await connector.connect()
        except asyncpg.InvalidAuthorizationSpecificationError:
            # The file may have the new password already, and is looked at once a second only. Shielded: a
            # call that gives up must not leave half a change behind.
            self.on_auth_failure()
            await self._reloads.run_shielded(self.reload())
            newer = self.connector
            if newer is None or newer is connector:
                raise
            connection = await newer.connect()
        self.kind = self._options.kind or kind_of(connection)
        return connection

    async def set_up(self, connection: Connection[Record]) -> None:
        """Set what every connection has; raises as `session_settings.apply` does, or TimeoutError."""
        assert self.connector is not None
        try:
            # A pooler answers before it has a connection of the server.
            async with asyncio.timeout(self._options.connect_timeout_s):
                await session_settings.apply(
                    connection,
                    self._options.statement_timeout_s,
                    self.connector.address.settings,
                    is_pooled=self._is_pooled,
                    is_plain=self.kind.is_plain,
                )
        except BaseException:
            # Whatever ends it: asyncpg would wait for the end of the statement.
            connection.terminate()
            raise

    def refused(
        self, exc: BaseException, connector: Connector | None = None, *, doing: str = "connect"
    ) -> StorageRefused:
        """Return why the server refuses us, for the end of the start."""
        connector = connector or self.connector
        where = "" if connector is None else f" at {connector.address}"
        # PostgreSQL's DETAIL is a line of its own.
        line = " ".join(str(exc).split()).removesuffix(".")
        what = f"{name_of(exc)}: {line}" if line else name_of(exc)
        hint = f"; {hint_of(exc)}" if hint_of(exc) else ""
        if (
            isinstance(exc, asyncpg.InsufficientPrivilegeError)
            and doing == "connect"
            and connector is not None
        ):
            hint = f". This SQL mends it: {connector.address.grant}"
        return StorageRefused(f"PostgreSQL{where}: {doing}: {what}{hint}")

    @contextmanager
    def refusing(self, connector: Connector) -> Iterator[None]:
        """Raise StorageRefused in place of what a retry would meet again."""
        try:
            yield
        except REFUSALS as exc:
            raise self.refused(exc, connector) from exc
        except StorageUnavailable as exc:
            cause = exc.__cause__
            if is_refusal_of_a_pooler(cause) or isinstance(cause, CONFIGURED_WRONG):
                raise self.refused(cause, connector) from cause
            raise
        except AddressError as exc:
            # A file that was there a moment ago.
            raise StorageRefused(f"flag -postgres.address: {exc}") from None

    async def close(self) -> None:
        """End a look at the file that is under way."""
        await self._reloads.close()


def _do_nothing() -> None:
    pass


async def _wait_for_nothing(*_: object) -> None:
    pass
