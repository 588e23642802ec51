"""Which of several primaries is the latest: one of before a failover is not used again.

    one  ── timeline 1 ──x                    comes back and takes writes, still on timeline 1: former
    two  ── standby ─────── promoted ── timeline 2 ──────────────────────────────────────────>

PostgreSQL begins a timeline with each promotion, and numbers them upwards. A former primary that is started
again without having been made a standby does not know of the promotion: it takes writes, which are lost as
soon as it is a standby, and has sessions that were ended since.

- A process remembers the highest timeline that it has used, and uses no server with a lower one. It asks each
  new connection.
- A process that has used none yet, or whose server does not answer, looks at all servers of its address and
  takes the one with the highest (`connector.py`).
- Once it uses a later one, it closes all connections of before, also in the middle of a statement. The former
  primary may only have been stalled: what it acknowledges is lost, and what it reads may have been ended.
- While renewals of the lease have no answer, it looks at the other servers too: a primary that has lost its
  synchronous standby answers reads, and no write.

The memory ends with the process, so that a restart uses what there is: a server that was set back on purpose,
but also a former primary that alone can be reached. Who promotes a standby has to stop the former primary
first; docs/storage.md says how.

The numbers are those of one cluster of databases, by its system identifier. Servers that do not tell them,
and roles without the right to ask for the identifier, are used as they come.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import asyncpg

if TYPE_CHECKING:
    from asyncpg import Connection, Record

# The name of the file of the log begins with the timeline, in hexadecimal; a standby writes no log.
_READ: Final = (
    "SELECT system_identifier AS system, CASE WHEN NOT pg_catalog.pg_is_in_recovery() THEN "
    "pg_catalog.substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_lsn()), 1, 8) END AS number "
    "FROM pg_catalog.pg_control_system()"
)


class FormerPrimaryError(ConnectionError):
    """The server was the primary before a failover, and another server has taken its place."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """The timeline that a primary writes, of one cluster of databases."""

    system: int
    number: int

    def is_before(self, other: Timeline | None) -> bool:
        """Tell whether the same sessions have been written on a later timeline."""
        return other is not None and self.system == other.system and self.number < other.number


class Timelines:
    """The timeline that this process uses; `on_later` is called when it is another, and later."""

    def __init__(self, on_later: Callable[[], None]) -> None:
        self.used: Timeline | None = None
        self._on_later = on_later

    def use(self, timeline: Timeline | None) -> None:
        """Take note of the timeline of a server that is used from now on."""
        former, self.used = self.used, timeline or self.used
        if former is not None and former.is_before(self.used):
            self._on_later()


async def timeline_of(connection: Connection[Record]) -> Timeline | None:
    """Return the timeline of a server; None: it is a standby, or does not tell."""
    try:
        row = await connection.fetchrow(_READ)
    except asyncpg.PostgresConnectionError:
        raise
    except asyncpg.PostgresError:
        # Another kind of server, or a role without the right.
        return None
    return None if row is None or row["number"] is None else Timeline(row["system"], int(row["number"], 16))
