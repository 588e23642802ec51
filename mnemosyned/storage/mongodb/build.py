"""How the configuration becomes a store in MongoDB, which follows the file of its address."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mnemosyned.observe.metrics import QueryMetrics
from mnemosyned.security.file_reloader import FileReloader, FilesUnusable
from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.mongodb.pool import MongoOptions, MongoPool
from mnemosyned.storage.mongodb.schema import Names
from mnemosyned.storage.mongodb.store import MongoStore

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

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
        _follow(pool, address)
    return MongoStore(pool, Names(config.collection), timeout_s=config.timeout_s)


def _follow(pool: MongoPool, address: FileReloader[str]) -> None:
    async def use(text: str) -> None:
        try:
            await pool.use(text)
        except StorageRefused as exc:
            raise FilesUnusable(str(exc)) from exc

    address.followers.append(use)
    pool.on_auth_failure = address.ask
