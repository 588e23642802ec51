"""What is counted on the path of every call, shown to Prometheus under the names of `metrics.py`.

The parts that count keep plain integers (MethodStats, CacheCounters). A `Collector` reads them when
Prometheus scrapes. An increment of prometheus_client takes a lock and more than a microsecond, and a call
would need several.

Scrapes run on threads of the admin port. A collector only reads, and each number is read in one step, so no
lock is needed; two numbers of one scrape may be a few calls apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from cache.read_through import CacheCounters
    from mnemosyned.api.guessing import GuessCounts
    from mnemosyned.sessions.counts import SessionCounts
    from mnemosyned.sessions.lease_keeper import LeaseCounters
    from mnemosyned.transport.call import MethodStats
    from mnemosyned.transport.engine import ConnectionStats


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
