"""How the configuration becomes a store in MongoDB, which follows the file of its address."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mnemosyned.observe.metrics import QueryMetrics
from mnemosyned.storage.address_file import follow
from mnemosyned.storage.mongodb.pool import MongoOptions, MongoPool
from mnemosyned.storage.mongodb.schema import Names
from mnemosyned.storage.mongodb.store import MongoStore

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from mnemosyned.security.file_reloader import FileReloader
    from mnemosyned.storage.mongodb.config import MongoConfig


def build(
    config: MongoConfig, *, registry: CollectorRegistry, address: FileReloader[str] | None = None
) -> MongoStore:
    """Return the store that the configuration describes, not yet opened; `address` is its file, or None."""
    options = MongoOptions(
        address=config.address if address is None else address.content,
        pool_size=config.pool_size,
        connect_timeout_s=config.connect_timeout_s,
        timeout_s=config.timeout_s,
    )
    pool = MongoPool(options, QueryMetrics(registry, "mongodb"))
    if address is not None:
        follow(address, pool.use)
        pool.on_auth_failure = address.ask
    return MongoStore(pool, Names(config.collection), timeout_s=config.timeout_s)
