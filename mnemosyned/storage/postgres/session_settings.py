"""What every connection is set to, after connecting, and the proof that it is in force.

    connect ──> [pooler: DEALLOCATE ALL] ──> SET … ──> pg_settings ── as asked ──> in use
                                                                    └── otherwise ──> StorageRefused

Not as parameters of the start-up message, where libpq and asyncpg put them: PgBouncer refuses all but five
names there. A pooler, a proxy or a role may also ignore what it is sent. A statement without its time-out
would hold locks without a bound, so the settings are read again, in another transaction.

- They win over `ALTER ROLE … SET` and `ALTER DATABASE … SET`, which PostgreSQL applies before.
- They last as long as the connection. A pooler in session mode resets them when the connection ends
  (`server_reset_query`). DEALLOCATE ALL removes what an earlier client has left where that query is empty.
- A GUC that another setting could do harm by is set too: each line of `settings_of` says what for.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.postgres.columns import POSTGRES_EPOCH_US
from mnemosyned.storage.postgres.faults import CONFIGURED_WRONG, name_of

if TYPE_CHECKING:
    from asyncpg import Connection, Record
    from asyncpg.pool import PoolConnectionProxy

log = logging.getLogger(__name__)

# WITH … AS MATERIALIZED, in queries.py.
OLDEST_MAJOR: Final = 12
_HAS_IDLE_SESSION_TIMEOUT: Final = 14
APPLICATION_NAME: Final = "mnemosyned"
_LOSSY: Final = {
    "synchronous_commit": "a crash of the server loses the last sessions: put synchronous_commit=on into the "
    "address",
    "fsync": "a crash of the server's machine can destroy the database: set it to on",
    "full_page_writes": "a crash of the server's machine can destroy the database: set it to on",
}
# PgBouncer may add the client's address to it.
_PLAIN: Final = (
    "application_name",
    "statement_timeout",
    "lock_timeout",
    "idle_in_transaction_session_timeout",
    "default_transaction_isolation",
)
_UNPROVED: Final = frozenset({"application_name"})


def settings_of(statement_timeout_s: float, major: int) -> dict[str, str]:
    """Return the settings by name, as pg_settings shows them: times in milliseconds."""
    timeout_ms = str(int(statement_timeout_s * 1000))
    settings = {
        "application_name": APPLICATION_NAME,
        "statement_timeout": timeout_ms,
        "lock_timeout": str(int(statement_timeout_s * 1000 / 3)),
        "idle_in_transaction_session_timeout": timeout_ms,
        # These statements are short: compiling one would take longer than running it.
        "jit": "off",
        # Every statement has an index. PostgreSQL may plan a scan while the table is empty, and keeps that
        # plan until the table is analyzed: Starts fell to 17 % of their rate.
        "enable_seqscan": "off",
        # Planning took a third of a lone load. No generic plan is bad (tests/integration/test_plans.py).
        "plan_cache_mode": "force_generic_plan",
        # The statements are written for it (queries.py). With a stricter default, those that meet on a row
        # fail (40001) instead of waiting for each other.
        "default_transaction_isolation": "read committed",
    }
    if major >= _HAS_IDLE_SESSION_TIMEOUT:
        # The server would end pooled connections in the middle of their use.
        settings["idle_session_timeout"] = "0"
    return settings


async def apply(
    connection: Connection[Record],
    statement_timeout_s: float,
    extra: Mapping[str, str],
    *,
    is_pooled: bool,
    is_plain: bool,
) -> None:
    """Set up a new connection; `extra` are settings of the address, which ours win over.

    A server that `is_plain` (`kind.py`) gets those that it may not do without.

    Raises:
        StorageRefused: the server is too old, or the settings are not in force.
        asyncpg's errors: the server refuses a setting, or the connection broke.
    """
    version = connection.get_server_version()
    if version.major < OLDEST_MAJOR:
        raise StorageRefused(
            f"PostgreSQL {version.major} is too old: mnemosyned needs version {OLDEST_MAJOR} or later"
        )
    ours = settings_of(statement_timeout_s, version.major)
    if is_plain:
        ours = {name: ours[name] for name in _PLAIN}
    # One round trip of the simple protocol, without a prepared statement: the role's own statement_timeout
    # may be shorter than more of them take. The values are numbers and words of this module.
    statements = ["DEALLOCATE ALL"] if is_pooled else []
    statements += [f"SET {name} = '{value}'" for name, value in ours.items()]
    await connection.execute("; ".join(statements))
    others = {name: value for name, value in extra.items() if name not in ours or name in _UNPROVED}
    for name, value in others.items():
        try:
            await connection.execute("SELECT set_config($1, $2, false)", name, value)
        except CONFIGURED_WRONG as exc:
            raise StorageRefused(
                f"flag -postgres.address: its parameter {name} cannot be set: {name_of(exc)}"
            ) from exc
    if not is_plain:
        await _prove(connection, ours)
    await _use_microseconds(connection)


async def _prove(connection: Connection[Record], ours: Mapping[str, str]) -> None:
    """Raise StorageRefused if the settings are not in force."""
    rows = await connection.fetch(
        "SELECT name, setting FROM pg_catalog.pg_settings WHERE name = ANY($1::text[])", list(ours)
    )
    found = {row["name"]: row["setting"] for row in rows}
    for name, value in ours.items():
        if found.get(name) != value and name not in _UNPROVED:
            raise StorageRefused(
                f"PostgreSQL: setting {name} is {found.get(name, 'missing')} after it was set to {value}: "
                "a pooler or proxy in front of the server does not keep settings of a session; "
                "use its session mode, or another address"
            )


async def _use_microseconds(connection: Connection[Record]) -> None:
    # Instants are integers of microseconds on both sides. A datetime would cost a conversion per row.
    await connection.set_type_codec(
        "timestamptz",
        schema="pg_catalog",
        format="tuple",
        encoder=lambda epoch_us: (epoch_us - POSTGRES_EPOCH_US,),
        decoder=lambda postgres: postgres[0] + POSTGRES_EPOCH_US,
    )


async def warn_of_server(connection: Connection[Record] | PoolConnectionProxy[Record]) -> None:
    """Warn of settings of the server or the role by which acknowledged sessions can be lost."""
    rows = await connection.fetch(
        "SELECT name, setting FROM pg_catalog.pg_settings "
        "WHERE name IN ('synchronous_commit', 'fsync', 'full_page_writes') AND setting = 'off'"
    )
    for row in rows:
        name = row["name"]
        log.warning("postgres_may_lose_sessions", extra={"setting": f"{name}=off", "advice": _LOSSY[name]})
