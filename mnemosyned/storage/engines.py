"""From a configuration to the store that it asks for."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Final

from mnemosyned.errors import MnemosyneError
from mnemosyned.observe.metrics import QueryMetrics
from mnemosyned.options import lifetimes
from mnemosyned.sessions import token_hash as names
from mnemosyned.sessions.token_hash import TokenHasher
from mnemosyned.storage.hashed import HashedStore
from mnemosyned.storage.memory import MemoryStore
from mnemosyned.storage.postgres.pool import PostgresOptions, PostgresPool
from mnemosyned.storage.postgres.schema import Table
from mnemosyned.storage.postgres.store import PostgresStore

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from mnemosyned.config.config import Config
    from mnemosyned.sessions.store import SessionStore

log = logging.getLogger(__name__)

_RETRY_S: Final = 1.0
# Two keys are in use at most, and others' rows are not ours to go through.
_MAX_LOOKS: Final = 100


def token_hasher(config: Config) -> TokenHasher | None:
    """Return how tokens are named in the storage; None: by themselves, and no key is known."""
    keys = [key.encode() for key in config.token_keys]
    are_protected = config.token_protection == "hmac"  # noqa: S105  # a mode
    return TokenHasher(keys, are_protected=are_protected) if keys else None


def new_store(config: Config, embedded_dsn: str | None, registry: CollectorRegistry) -> SessionStore:
    """Return the store, not yet opened; `embedded_dsn` is the address of an embedded server."""
    store, known = _plain_store(config, embedded_dsn, registry), token_hasher(config)
    return store if known is None else HashedStore(store, known)


def _plain_store(config: Config, embedded_dsn: str | None, registry: CollectorRegistry) -> SessionStore:
    lasting = lifetimes(config)
    ttl_us, touch_interval_us = lasting.session_us, lasting.touch_interval_us
    if config.storage == "memory":
        return MemoryStore(
            ttl_us=ttl_us, touch_interval_us=touch_interval_us, wall_us=lambda: time.time_ns() // 1000
        )
    options = PostgresOptions(
        dsn=config.postgres_address if embedded_dsn is None else embedded_dsn,
        pool_size=config.postgres_pool_size,
        connect_timeout_s=config.postgres_connect_timeout_s,
        statement_timeout_s=config.postgres_statement_timeout_s,
    )
    table = Table(schema=config.postgres_schema, name=config.postgres_table)
    pool = PostgresPool(options, QueryMetrics(registry))
    return PostgresStore(pool, table, ttl_us=ttl_us, touch_interval_us=touch_interval_us)


async def warn_of_unknown_keys(store: SessionStore, known: TokenHasher | None) -> None:
    """Log it when sessions are named by a key that is not known here: their users would be logged out."""
    while True:
        try:
            unknown = await key_ids_in(store) - (frozenset() if known is None else known.key_ids)
            break
        except MnemosyneError as exc:
            log.debug("token_keys_wait", extra={"error": str(exc)})
            await asyncio.sleep(_RETRY_S)
        except Exception as exc:  # the root of a task: a bug here must not end the daemon
            log.error("token_keys_not_looked_for", exc_info=exc)
            return
    if unknown:
        log.error("tokens_by_unknown_keys", extra={"key_ids": sorted(unknown), "flags": "-token.key.file"})


async def key_ids_in(store: SessionStore) -> set[str]:
    """Return which keys have named sessions; one short look for each. Raises StorageUnavailable."""
    found: set[str] = set()
    after = ""
    for _ in range(_MAX_LOOKS):
        (name, *_) = await store.stored_keys_after(after, limit=1) or [""]
        if not names.is_hashed(name):
            break
        after = name
        if names.is_session_id(names.shown(name)):
            found.add(names.key_id_in(name))
            after = names.after_key(names.key_id_in(name))
    return found
