"""How the configuration becomes a store in Redis, which follows the file of its address."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mnemosyned.observe.metrics import QueryMetrics
from mnemosyned.security.file_reloader import FileReloader, FilesUnusable
from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.redis.pool import RedisOptions, RedisPool
from mnemosyned.storage.redis.store import RedisStore

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from mnemosyned.storage.redis.config import RedisConfig


def build(
    config: RedisConfig,
    *,
    dsn: str,
    registry: CollectorRegistry,
    address: FileReloader[str] | None = None,
) -> RedisStore:
    """Return the store that the configuration describes, not yet opened; `address` is its file, or None."""
    options = RedisOptions(
        address=dsn if address is None else address.content,
        prefix=config.prefix,
        pool_size=config.pool_size,
        connect_timeout_s=config.connect_timeout_s,
        timeout_s=config.timeout_s,
        wait=config.wait,
    )
    pool = RedisPool(options, QueryMetrics(registry, "redis"))
    if address is not None:
        _follow(pool, address)
    return RedisStore(pool, timeout_s=config.timeout_s)


def _follow(pool: RedisPool, address: FileReloader[str]) -> None:
    async def use(text: str) -> None:
        try:
            await pool.use(text)
        except StorageRefused as exc:
            raise FilesUnusable(str(exc)) from exc

    address.followers.append(use)
    pool.follow(address.ask)
