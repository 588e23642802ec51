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

import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
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

from mnemosyned import __version__

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from cache.read_through import CacheCounters
    from mnemosyned.api.guessing import GuessCounts
    from mnemosyned.sessions.counts import SessionCounts
    from mnemosyned.sessions.lease_keeper import LeaseCounters
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
    """Shows the connections of the gRPC port as `grpc_server_connections*`, and those not accepted."""

    def __init__(self, stats: ConnectionStats, *, is_counted: bool = True) -> None:
        """`is_counted`: the engine counts its connections, not only those that it could not accept."""
        self._stats = stats
        self._is_counted = is_counted

    def collect(self) -> Iterator[Metric]:
        """Yield one family for each name."""
        if self._is_counted:
            yield from self._connections()
        failures = CounterMetricFamily(
            "grpc_server_accept_failures", "Connections that could not be accepted.", labels=("error",)
        )
        for error, count in dict(self._stats.accept_failures).items():
            failures.add_metric((error,), count)
        yield failures

    def _connections(self) -> Iterator[Metric]:
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
        yield ended


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


class LeaseCollector(Collector):
    """Shows a node's lease (`cluster/lease.py`) as `mnemosyned_lease_*`, and what writes waited for."""

    def __init__(
        self, counters: LeaseCounters, *, reason: Callable[[], str], age_s: Callable[[], float | None]
    ) -> None:
        self._counters = counters
        self._reason = reason
        self._age_s = age_s

    def collect(self) -> Iterator[Metric]:
        """Yield one family for each name; the age has no sample before the first renewal."""
        counters = self._counters
        yield GaugeMetricFamily(
            "mnemosyned_lease_valid", "Whether copies may be served: 1 or 0.", value=float(not self._reason())
        )
        age = GaugeMetricFamily("mnemosyned_lease_age_seconds", "Since the last answered renewal was sent.")
        age_s = self._age_s()
        if age_s is not None:
            age.add_metric((), age_s)
        yield age
        renewals = CounterMetricFamily(
            "mnemosyned_lease_renewals", "Renewals of the lease, by outcome.", labels=("outcome",)
        )
        for outcome in ("ok", "refused", "failed"):
            renewals.add_metric((outcome,), counters.renewals[outcome])
        bars = CounterMetricFamily(
            "mnemosyned_lease_bars",
            "Bars that this node gave to nodes which it could not tell of a write, and that it received.",
            labels=("direction",),
        )
        bars.add_metric(("given",), counters.bars_given)
        bars.add_metric(("received",), counters.bars_received)
        drops = CounterMetricFamily(
            "mnemosyned_lease_drops", "Times that every copy was dropped, by reason.", labels=("reason",)
        )
        for reason in ("lapsed", "barred", "replaced"):
            drops.add_metric((reason,), counters.drops[reason])
        refused = CounterMetricFamily(
            "mnemosyned_lease_refused", "Calls that no copy might answer, by reason.", labels=("reason",)
        )
        for reason in ("lapsed", "barred", "registering", "conflict"):
            refused.add_metric((reason,), counters.refused[reason])
        yield from (renewals, bars, drops, refused)
        yield HistogramMetricFamily(
            "mnemosyned_settle_seconds",
            "What writes waited for until no older copy was left; those that need not wait are not counted.",
            buckets=_cumulative(counters.settle_bounds_s, counters.settle_buckets),
            sum_value=counters.settle_s,
        )


def _cumulative(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    names = [*(f"{bound:g}" for bound in bounds), "+Inf"]
    return list(zip(names, map(float, accumulate(counts)), strict=True))


class SessionCollector(Collector):
    """Shows sessions/counts.py as `mnemosyned_sessions*`."""

    def __init__(self, counts: SessionCounts) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        """Yield one family for each name; the estimate has no sample while there is none."""
        counts = self._counts
        estimated = GaugeMetricFamily(
            "mnemosyned_sessions",
            "Estimate of the stored sessions of all nodes, with expired ones that are not cleaned up yet.",
        )
        if counts.estimated is not None:
            estimated.add_metric((), counts.estimated)
        started = CounterMetricFamily(
            "mnemosyned_sessions_started", "Sessions that this node has stored.", value=counts.started
        )
        ended = CounterMetricFamily(
            "mnemosyned_sessions_ended", "Sessions that this node has ended, by cause.", labels=("cause",)
        )
        for cause, count in counts.ended_by_cause.items():
            ended.add_metric((cause,), count)
        yield from (estimated, started, ended)


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
    """What is sent to a database, by names: those of postgres/queries.py or redis/scripts.py, or a call's."""

    def __init__(self, registry: CollectorRegistry, engine: str = "postgres") -> None:
        prefix = f"mnemosyned_storage_{engine}"
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
        self._in_use = Gauge(
            f"{prefix}_connections_in_use", "Connections that a statement uses.", registry=registry
        )
        self._waiting = Gauge(
            f"{prefix}_waiting", "Statements that wait for a connection of the pool.", registry=registry
        )

    def count(self, query: str, elapsed_s: float) -> None:
        """Count a statement, failed or not."""
        self._queries.labels(query).inc()
        self._durations.labels(query).observe(elapsed_s)

    def count_error(self, query: str) -> None:
        """Count a failed statement by its name.

        Failures of connections are counted too, as `connect`, `acquire` or `connection`.
        """
        self._errors.labels(query).inc()

    def watch_pool(
        self, *, size: Callable[[], int], in_use: Callable[[], int], waiting: Callable[[], int]
    ) -> None:
        """Ask for the pool's numbers at each scrape."""
        self._connections.set_function(size)
        self._in_use.set_function(in_use)
        self._waiting.set_function(waiting)


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


def show_build(registry: CollectorRegistry, *, engine: str, storage: str) -> None:
    """Export what runs here, as labels of a gauge that is 1."""
    Gauge(
        "mnemosyned_build_info",
        "What this node runs; the value is 1.",
        ("version", "python", "engine", "storage"),
        registry=registry,
    ).labels(__version__, platform.python_version(), engine, storage).set(1)


def show_dropped_lines(registry: CollectorRegistry, dropped: Callable[[], int]) -> None:
    """Export how many lines of the log were lost; `dropped` is asked at each scrape."""
    registry.register(_DroppedLines(dropped))


class _DroppedLines(Collector):
    def __init__(self, dropped: Callable[[], int]) -> None:
        self._dropped = dropped

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(
            "mnemosyned_log_lines_dropped",
            "Lines of the log that could not be written.",
            value=self._dropped(),
        )


def show_readiness(registry: CollectorRegistry, is_ready: Callable[[], bool]) -> None:
    """Export what `/healthr` answers; `is_ready` is asked at each scrape, on threads of the admin port."""
    gauge = Gauge("mnemosyned_ready", "Whether calls should be sent to this node: 1 or 0.", registry=registry)
    gauge.set_function(is_ready)


def show_silence(registry: CollectorRegistry, silence_s: Callable[[], float]) -> None:
    """Export for how long the event loop is silent; `silence_s` is asked at each scrape."""
    gauge = Gauge(
        "mnemosyned_loop_silence_seconds",
        "For how long the event loop has not answered: 0 while it keeps time.",
        registry=registry,
    )
    gauge.set_function(silence_s)


def show_certificates_end(registry: CollectorRegistry, ends_at_s: Callable[[], float]) -> None:
    """Export when this node's certificate ends; `ends_at_s` returns seconds since the epoch."""
    gauge = Gauge(
        "mnemosyned_tls_certificate_end_timestamp_seconds",
        "End of the certificate that this node serves, in seconds since the epoch.",
        registry=registry,
    )
    gauge.set_function(ends_at_s)
