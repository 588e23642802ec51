"""How the configuration becomes a store in Redis, which follows the file of its address."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mnemosyned.observe.metrics import QueryMetrics
from mnemosyned.storage.address_file import follow
from mnemosyned.storage.redis.address import parse
from mnemosyned.storage.redis.cluster.pool import ClusterPool
from mnemosyned.storage.redis.cluster.store import ClusterStore
from mnemosyned.storage.redis.pool import RedisOptions, RedisPool
from mnemosyned.storage.redis.server_watch import ServerWatch
from mnemosyned.storage.redis.store import RedisStore

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from mnemosyned.security.file_reloader import FileReloader
    from mnemosyned.storage.redis.config import RedisConfig


def build(
    config: RedisConfig,
    *,
    dsn: str,
    registry: CollectorRegistry,
    address: FileReloader[str] | None = None,
) -> RedisStore | ClusterStore:
    """Return the store that the configuration describes, not yet opened; `address` is its file, or None."""
    options = RedisOptions(
        address=dsn if address is None else address.content,
        prefix=config.prefix,
        pool_size=config.pool_size,
        connect_timeout_s=config.connect_timeout_s,
        timeout_s=config.timeout_s,
        wait=config.wait,
    )
    metrics = QueryMetrics(registry, "redis")
    if parse(options.address).is_cluster:
        cluster = ClusterPool(options, metrics, ServerWatch(is_cluster=True))
        if address is not None:
            follow(address, cluster.use)
            cluster.follow(address.ask)
        return ClusterStore(cluster, timeout_s=config.timeout_s, buckets=config.buckets)
    pool = RedisPool(options, metrics)
    if address is not None:
        follow(address, pool.use)
        pool.follow(address.ask)
    return RedisStore(pool, timeout_s=config.timeout_s)
