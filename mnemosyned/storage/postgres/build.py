"""How the configuration becomes a store in PostgreSQL, which follows the file of its address.

file of the address ── new content ──> PostgresPool.use ── a connection can be made ──> taken
^                                                └── otherwise ──> the former address stays
└── looked at once a second, and read again after a refused connection
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from mnemosyned.observe.metrics import QueryMetrics
from mnemosyned.storage.address_file import follow
from mnemosyned.storage.postgres import plain, trial
from mnemosyned.storage.postgres.address_in_use import PostgresOptions
from mnemosyned.storage.postgres.kind import kind_of
from mnemosyned.storage.postgres.pool import PostgresPool
from mnemosyned.storage.postgres.schema import Table, set_up
from mnemosyned.storage.postgres.store import PostgresStore

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from mnemosyned.security.file_reloader import FileReloader
    from mnemosyned.storage.postgres.config import PostgresConfig
    from mnemosyned.storage.postgres.table_facts import AnyConnection


def build(
    config: PostgresConfig,
    *,
    dsn: str,
    registry: CollectorRegistry,
    environ: Mapping[str, str],
    address: FileReloader[str] | None = None,
) -> PostgresStore:
    """Return the store that the configuration describes, not yet opened.

    `environ` completes the address `dsn`. `address` is its file, if it has one.
    """
    options = PostgresOptions(
        dsn=dsn if address is None else address.content,
        environ=environ,
        pool_size=config.pool_size,
        connect_timeout_s=config.connect_timeout_s,
        statement_timeout_s=config.statement_timeout_s,
    )
    pool = PostgresPool(options, QueryMetrics(registry))
    table = Table(schema=config.schema, name=config.table)
    if address is not None:
        pool.address.prepare = partial(_make_ready, table=table)
        follow(address, pool.use)
        pool.address.on_auth_failure = address.ask
        pool.address.reload = address.look
    return PostgresStore(pool, table)


async def _make_ready(connection: AnyConnection, table: Table) -> None:
    kind = kind_of(connection)
    await (plain.set_up if kind.is_plain else set_up)(connection, table)
    await trial.run(connection, table, partial(PostgresStore, kind=kind))
