"""Every metric that a daemon may export: of a cluster, with TLS and with keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peering import peering

from cache.read_through import CacheCounters
from mnemosyned.admin.cluster import ClusterCollector
from mnemosyned.api.guessing import GuessCounts
from mnemosyned.observe.collectors import (
    CacheCollector,
    ConnectionCollector,
    GuessCollector,
    LeaseCollector,
    RpcCollector,
    SessionCollector,
)
from mnemosyned.observe.metrics import (
    AuthMetrics,
    QueryMetrics,
    UpkeepMetrics,
    new_registry,
    show_build,
    show_certificates_end,
    show_dropped_lines,
    show_readiness,
    show_silence,
)
from mnemosyned.observe.mirror_metrics import MirrorCollector
from mnemosyned.sessions.counts import SessionCounts
from mnemosyned.sessions.lease_keeper import LeaseCounters
from mnemosyned.storage.memory import MemoryStore
from mnemosyned.transport.call import MethodStats
from mnemosyned.transport.engine import ConnectionStats
from mnemosyned.workers.totals import WorkersCollector

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
    QueryMetrics(registry, "redis")
    QueryMetrics(registry, "mongodb")
    UpkeepMetrics(registry)
    AuthMetrics(registry)
    show_certificates_end(registry, lambda: 0.0)
    show_build(registry, engine="h2", storage="memory")
    show_silence(registry, float)
    show_dropped_lines(registry, int)
    show_readiness(registry, lambda: True)
    registry.register(SessionCollector(SessionCounts(estimated=0)))
    registry.register(RpcCollector([MethodStats("s", "h", "unary")]))
    registry.register(RpcCollector([MethodStats("s", "h", "unary")], side="client"))
    registry.register(ConnectionCollector(ConnectionStats()))
    registry.register(GuessCollector(GuessCounts(), callers=int))
    registry.register(CacheCollector(CacheCounters(), entries=int, size_bytes=int, negative_entries=int))
    registry.register(LeaseCollector(LeaseCounters(), reason=str, age_s=float))
    async with peering(MemoryStore(wall_us=lambda: 0)) as peer:
        registry.register(MirrorCollector(peer.mirrors.cache, peer.mirrors.counters, LeaseCounters()))
        registry.register(ClusterCollector(peer.node))
        workers = WorkersCollector(list, "", new_registry(), count=0, restarts=int)
        return [*registry.collect(), *workers.about([])]


async def exported_series() -> set[str]:
    """The names by which Prometheus can be asked for them."""
    return {
        family.name + suffix
        for family in await exported_families()
        for suffix in _SUFFIXES.get(family.type, ("",))
    }
