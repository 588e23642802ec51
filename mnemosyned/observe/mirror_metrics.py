"""What became of mirrors of other nodes' sessions; as `metrics.py`, which has the rules for names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from cache.read_through import ReadThrough
    from mnemosyned.sessions.encoded import EncodedSession
    from mnemosyned.sessions.lease_keeper import LeaseCounters
    from mnemosyned.sessions.mirrors import MirrorCounters


class MirrorCollector(Collector):
    """Shows what became of mirrors of other nodes' sessions as `mnemosyned_mirror_*`."""

    def __init__(
        self, cache: ReadThrough[EncodedSession], counters: MirrorCounters, keeper: LeaseCounters
    ) -> None:
        self._cache = cache
        self._counters = counters
        self._keeper = keeper

    def collect(self) -> Iterator[Metric]:
        """Yield one family for each name."""
        lookups, counters = self._cache.counters, self._counters
        yield CounterMetricFamily(
            "mnemosyned_mirror_hits",
            "Calls for other nodes' tokens that were answered here, from a mirror of the owner's session.",
            value=lookups.hits,
        )
        yield CounterMetricFamily(
            "mnemosyned_mirror_misses",
            "Calls for other nodes' tokens that found no mirror here, and went to the owner.",
            value=lookups.misses,
        )
        yield CounterMetricFamily(
            "mnemosyned_mirror_grants", "Mirrors that this node has granted to others.", value=counters.grants
        )
        recalls = CounterMetricFamily(
            "mnemosyned_mirror_recalls",
            "Nodes told to drop mirrors, once a write (sent), and mirrors dropped for others (received).",
            labels=("direction",),
        )
        recalls.add_metric(("sent",), self._keeper.recalls)
        recalls.add_metric(("received",), counters.recalled)
        yield recalls
        yield GaugeMetricFamily("mnemosyned_mirror_entries", "Mirrors in memory.", value=len(self._cache.lru))
        yield GaugeMetricFamily(
            "mnemosyned_mirror_bytes", "Estimated memory of the mirrors.", value=self._cache.lru.size_bytes
        )
