"""Every metric that a daemon may export: of a cluster, with TLS and with keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peering import peering

from cache.read_through import CacheCounters
from mnemosyned.admin.cluster import ClusterCollector
from mnemosyned.api.guessing import GuessCounts
from mnemosyned.observe.metrics import (
    AuthMetrics,
    CacheCollector,
    ConnectionCollector,
    GuessCollector,
    QueryMetrics,
    RpcCollector,
    UpkeepMetrics,
    new_registry,
    show_certificates_end,
)
from mnemosyned.storage.memory import MemoryStore
from mnemosyned.transport.call import MethodStats
from mnemosyned.transport.engine import ConnectionStats

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

_SUFFIXES = {
    "counter": ("_total",),
    "info": ("_info",),
    "histogram": ("_bucket", "_count", "_sum"),
    "summary": ("_count", "_sum"),
}


async def exported_families() -> list[Metric]:
    """Collect from a real node of a cluster, and from all that a daemon may add to it."""
    registry = new_registry()
    QueryMetrics(registry)
    UpkeepMetrics(registry)
    AuthMetrics(registry)
    show_certificates_end(registry, lambda: 0.0)
    registry.register(RpcCollector([MethodStats("s", "h", "unary")]))
    registry.register(RpcCollector([MethodStats("s", "h", "unary")], side="client"))
    registry.register(ConnectionCollector(ConnectionStats()))
    registry.register(GuessCollector(GuessCounts(), callers=int))
    registry.register(CacheCollector(CacheCounters(), entries=int, size_bytes=int, negative_entries=int))
    async with peering(MemoryStore(wall_us=lambda: 0)) as peer:
        registry.register(ClusterCollector(peer.node))
        return list(registry.collect())


async def exported_series() -> set[str]:
    """The names by which Prometheus can be asked for them."""
    return {
        family.name + suffix
        for family in await exported_families()
        for suffix in _SUFFIXES.get(family.type, ("",))
    }
