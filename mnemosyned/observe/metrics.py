"""What is counted, under the names that dashboards of the Go daemon use.

Two kinds of metrics, by how often something is counted:

- On the path of every call: plain integers, which `collectors.py` shows.
- Rarer things: Counter, Gauge and Histogram of prometheus_client, in a class for each part, here.

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
from collections.abc import Callable, Iterator
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
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from mnemosyned import __version__

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

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
        # By the name of a statement. To find them costs more than to count.
        self._found: dict[str, tuple[Counter, Histogram]] = {}
        self._connections = Gauge(f"{prefix}_connections", "Connections of the pool.", registry=registry)
        self._in_use = Gauge(
            f"{prefix}_connections_in_use", "Connections that a statement uses.", registry=registry
        )
        self._waiting = Gauge(
            f"{prefix}_waiting", "Statements that wait for a connection of the pool.", registry=registry
        )

    def count(self, query: str, elapsed_s: float) -> None:
        """Count a statement, failed or not."""
        found = self._found.get(query)
        if found is None:
            found = self._found[query] = (self._queries.labels(query), self._durations.labels(query))
        queries, durations = found
        queries.inc()
        durations.observe(elapsed_s)

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
