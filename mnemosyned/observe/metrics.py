"""What is counted, under the names that dashboards of the Go daemon use.

Two kinds of metrics, by how often something is counted:

- On the path of every call: plain integers, in the part that counts (MethodStats, CacheCounters). A
  `Collector` reads them when Prometheus scrapes. An increment of prometheus_client takes a lock and more than
  a microsecond, and a call would need several.
- Rarer things: Counter, Gauge and Histogram of prometheus_client, in a class for each part.

Scrapes run on threads of the admin port. A collector only reads, and each number is read in one step, so no
lock is needed; two numbers of one scrape may be a few calls apart.

Rules for editing:

- A name, once released, stays: dashboards and alerts use it. docs/monitoring.md lists all names, and a test
  compares the list.
- Label sets are closed and small: methods of the table, status codes, names of our own statements. Nothing
  that a client chooses, and never a token.
- Counters that belong together add up, and their help says how: lookups = hits + misses.
- prometheus_client appends `_total` to the names of counters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from cache.read_through import CacheCounters
    from mnemosyned.api.guessing import GuessCounts
    from mnemosyned.transport.call import MethodStats
    from mnemosyned.transport.engine import ConnectionStats

_QUERY_BUCKETS_S: Final = (
    0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip


def new_registry() -> CollectorRegistry:
    """Return a registry that shows this process, ready for our own metrics.

    Not the library's global registry: tests run several nodes in one process.
    """
    # They would be a second time series for every counter.
    disable_created_metrics()  # type: ignore[no-untyped-call]  # theirs
    registry = CollectorRegistry(auto_describe=False)
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


class RpcCollector(Collector):
    """Shows the stats of methods: `grpc_server_*` for calls to this node, `grpc_client_*` for calls to peers.

    Make it after the method table is complete: it keeps the list that it gets.
    """

    def __init__(self, stats: Iterable[MethodStats], *, side: str = "server") -> None:
        self._stats = list(stats)
        self._prefix = f"grpc_{side}"

    def collect(self) -> Iterator[Metric]:
        """Yield one family for each name."""
        names = ("service", "handler", "type")
        requests = CounterMetricFamily(
            f"{self._prefix}_requests_total", "RPCs that ended, by status.", labels=(*names, "code")
        )
        errors = CounterMetricFamily(
            f"{self._prefix}_errors_total",
            "RPCs that ended with another status than OK.",
            labels=(*names, "code"),
        )
        durations = HistogramMetricFamily(
            f"{self._prefix}_request_duration_seconds", "Time from a request to its response.", labels=names
        )
        in_flight = GaugeMetricFamily(f"{self._prefix}_requests", "RPCs in flight.", labels=names)
        for stats in self._stats:
            for code, count in stats.requests_by_code().items():
                requests.add_metric((*stats.labels, code), count)
                if code != "OK":
                    errors.add_metric((*stats.labels, code), count)
            durations.add_metric(stats.labels, stats.cumulative_buckets(), stats.duration_s)
            in_flight.add_metric(stats.labels, stats.in_flight)
        # Two families are named alike: the counter `grpc_server_requests_total`, and the gauge of calls in
        # flight, `grpc_server_requests`. The Go daemon's dashboards have both.
        yield from (requests, errors, durations, in_flight)


class ConnectionCollector(Collector):
    """Shows the connections of the gRPC port as `grpc_server_connections*`."""

    def __init__(self, stats: ConnectionStats) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """Yield one family for each name."""
        yield GaugeMetricFamily(
            "grpc_server_connections", "Open connections of the gRPC port.", value=self._stats.open
        )
        yield GaugeMetricFamily(
            "grpc_server_unsent_bytes",
            "Bytes of answers that clients have not taken yet.",
            value=self._stats.unsent_bytes,
        )
        ended = CounterMetricFamily(
            "grpc_server_connections_ended", "Connections that ended, by reason.", labels=("reason",)
        )
        # Copies, made in one step: the event loop adds to them.
        for reason, count in dict(self._stats.ended).items():
            ended.add_metric((reason,), count)
        failures = CounterMetricFamily(
            "grpc_server_accept_failures", "Connections that could not be accepted.", labels=("error",)
        )
        for error, count in dict(self._stats.accept_failures).items():
            failures.add_metric((error,), count)
        yield from (ended, failures)


class CacheCollector(Collector):
    """Shows the counters of both caches as `mnemosyned_cache_*`; sizes in entries and in estimated bytes."""

    def __init__(
        self,
        counters: CacheCounters,
        *,
        entries: Callable[[], int],
        size_bytes: Callable[[], int],
        negative_entries: Callable[[], int],
    ) -> None:
        self._counters = counters
        self._entries = entries
        self._size_bytes = size_bytes
        self._negative_entries = negative_entries

    def collect(self) -> Iterator[Metric]:
        """Yield one family for each name."""
        counters = self._counters
        yield CounterMetricFamily(
            "mnemosyned_cache_hits", "Lookups answered from the cache; lookups = hits + misses.",
            value=counters.hits,
        )  # fmt: skip
        yield CounterMetricFamily(
            "mnemosyned_cache_misses",
            "Lookups that found no session in this node's cache; most of them went to the storage.",
            value=counters.misses,
        )
        yield CounterMetricFamily(
            "mnemosyned_cache_refresh",
            "Misses that found an entry which was too old to serve.",
            value=counters.refreshes,
        )
        yield CounterMetricFamily(
            "mnemosyned_cache_negative_hits",
            "Misses answered by the negative cache, without the storage.",
            value=counters.negative_hits,
        )
        yield GaugeMetricFamily(
            "mnemosyned_cache_negative_entries",
            "Tokens without a session, in the negative cache.",
            value=self._negative_entries(),
        )
        yield GaugeMetricFamily("mnemosyned_cache_entries", "Sessions in the cache.", value=self._entries())
        yield GaugeMetricFamily(
            "mnemosyned_cache_bytes", "Estimated memory of the cached sessions.", value=self._size_bytes()
        )


class GuessCollector(Collector):
    """Shows what api/guessing.py counts as `mnemosyned_guess_*`."""

    def __init__(self, counts: GuessCounts, *, callers: Callable[[], int]) -> None:
        self._counts = counts
        self._callers = callers

    def collect(self) -> Iterator[Metric]:
        """Yield one family for each name."""
        counts = self._counts
        answers = CounterMetricFamily(
            "mnemosyned_guess_answers",
            "Answers by which a caller learns whether a token, or an API key, of its choice is known.",
            labels=("about",),
        )
        answers.add_metric(("token",), counts.tokens)
        answers.add_metric(("key",), counts.keys)
        exceeded = CounterMetricFamily(
            "mnemosyned_guess_exceeded",
            "Times that one caller was over -guess.threshold; once in -guess.window for each caller.",
            labels=("caller",),
        )
        for kind, count in counts.exceeded_by_kind.items():
            exceeded.add_metric((kind,), count)
        limited = CounterMetricFamily(
            "mnemosyned_guess_limited", "Such answers over -guess.limit, late or refused.", labels=("answer",)
        )
        limited.add_metric(("late",), counts.late)
        limited.add_metric(("refused",), counts.refused)
        yield from (answers, exceeded, limited)
        yield GaugeMetricFamily(
            "mnemosyned_guess_callers",
            "Callers with such answers in this -guess.window, at most 8192.",
            value=self._callers(),
        )


class QueryMetrics:
    """The statements sent to PostgreSQL, by the names of storage/postgres/queries.py."""

    def __init__(self, registry: CollectorRegistry) -> None:
        prefix = "mnemosyned_storage_postgres"
        labels = ("query",)
        self._queries = Counter(f"{prefix}_queries", "Statements sent.", labels, registry=registry)
        self._errors = Counter(f"{prefix}_errors", "Statements that failed.", labels, registry=registry)
        self._durations = Histogram(
            f"{prefix}_query_duration_seconds",
            "Time from sending a statement to its complete result.",
            labels,
            buckets=_QUERY_BUCKETS_S,
            registry=registry,
        )
        self._connections = Gauge(f"{prefix}_connections", "Connections of the pool.", registry=registry)

    def count(self, query: str, elapsed_s: float) -> None:
        """Count a statement, failed or not."""
        self._queries.labels(query).inc()
        self._durations.labels(query).observe(elapsed_s)

    def count_error(self, query: str) -> None:
        """Count a failed statement by its name.

        Failures of connections are counted too, as `connect`, `acquire` or `connection`.
        """
        self._errors.labels(query).inc()

    def watch_connections(self, size: Callable[[], int]) -> None:
        """Ask for the pool's size at each scrape."""
        self._connections.set_function(size)


class UpkeepMetrics:
    """Cleanup (sessions/cleanup.py), the later writing of expiries (touches.py), and damaged sessions."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.cleanup_errors = Counter(
            "mnemosyned_cleanup_errors", "Rounds of cleanup that failed.", registry=registry
        )
        self.cleaned_up = Counter(
            "mnemosyned_cleanup_sessions", "Expired sessions removed by this node.", registry=registry
        )
        self.touches_lost = Counter(
            "mnemosyned_touches_lost",
            "Extended expiries that were given up, because too many waited for the storage.",
            registry=registry,
        )
        self.damaged_sessions = Counter(
            "mnemosyned_damaged_sessions",
            "Damaged sessions met: calls that failed with DATA_LOSS, and sessions that List left out.",
            registry=registry,
        )


class AuthMetrics:
    """Calls refused because of their caller (api/auth.py)."""

    def __init__(self, registry: CollectorRegistry) -> None:
        refusals = Counter(
            "mnemosyned_auth_refusals",
            "Calls refused because of their caller: no credential, an unknown key, or too low a role.",
            ("reason",),
            registry=registry,
        )
        # All three at once, so that each is exported as 0 before the first refusal: `rate` needs that.
        self._by_reason = {reason: refusals.labels(reason) for reason in ("missing", "unknown", "role")}

    def refused(self, reason: str) -> None:
        """Count a refused call; `reason` is missing, unknown or role."""
        self._by_reason[reason].inc()


def show_certificates_end(registry: CollectorRegistry, ends_at_s: Callable[[], float]) -> None:
    """Export when this node's certificate ends; `ends_at_s` returns seconds since the epoch."""
    gauge = Gauge(
        "mnemosyned_tls_certificate_end_timestamp_seconds",
        "End of the certificate that this node serves, in seconds since the epoch.",
        registry=registry,
    )
    gauge.set_function(ends_at_s)
