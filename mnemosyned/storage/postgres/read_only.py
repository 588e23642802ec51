"""A server that refuses writes: a standby, a demoted primary, or one that was told to be read-only.

    a statement fails with 25006 ──> its idle connections are dropped, at most once a second
                                       └── the next statement connects: a server that can be written to, if
                                           one of the address can; otherwise this one, or another to read from

- Connections are dropped again and again while it lasts. `ALTER DATABASE … SET` holds only for connections
  that are opened later, and another host may be the primary by now.
- Connections in use end after their statement (`PostgresPool.renew`).
- Meanwhile `load` only reads (`PostgresStore`), and the health check fails (`table_health.py`), which is what
  finds the end of it too.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Final
from weakref import WeakSet

import asyncpg

if TYPE_CHECKING:
    from asyncpg import Connection, Record
    from asyncpg.pool import PoolConnectionProxy

_PERIOD_S: Final = 1.0


class ReadOnlyServer:
    """Whether the server was found to be read-only, and which connections there are to drop."""

    def __init__(self) -> None:
        self.is_known = False
        self._open: WeakSet[Connection[Record]] = WeakSet()
        self._dropped_s = 0.0

    def opened(self, connection: Connection[Record]) -> None:
        """Take note of a new connection."""
        self._open.add(connection)

    def met(self, now_s: float) -> bool:
        """Take note of a refused write; tell whether it is time to drop the connections."""
        self.is_known = True
        if now_s - self._dropped_s < _PERIOD_S:
            return False
        self._dropped_s = now_s
        return True

    def drop_but(self, lent: Iterable[PoolConnectionProxy[Record]]) -> None:
        """Drop all connections but these, at once: the pool would keep idle ones for minutes."""
        busy = set()
        for one in lent:
            # One that broke is no longer the pool's.
            with suppress(asyncpg.InterfaceError):
                busy.add(one.get_server_pid())
        for connection in list(self._open):
            if not connection.is_closed() and connection.get_server_pid() not in busy:
                connection.terminate()


async def refuses_writes(connection: Connection[Record]) -> bool:
    """Tell whether the server of a new connection refuses writes; a question only before PostgreSQL 14."""
    settings = connection.get_settings()
    reported = [getattr(settings, name, None) for name in ("in_hot_standby", "default_transaction_read_only")]
    if None in reported:
        # An older server, or a pooler in front.
        return bool(await connection.fetchval("SELECT current_setting('transaction_read_only') = 'on'"))
    return "on" in reported
