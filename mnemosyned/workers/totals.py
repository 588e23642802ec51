"""`/metrics` of all workers and of the supervisor, added up to those of one daemon.

    counters, histograms, summaries   their sum, with what ended workers had counted: a total never falls
    gauges of the workers that run    their sum: connections, bytes, entries, calls in flight
                                      their largest: states of which each worker has its view
                                      their smallest: whether all have a lease

A worker that ends takes what it has counted since the last scrape with it. One that gives no answer is shown
as it was at the last scrape.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from mnemosyned.place import admin_socket
from mnemosyned.workers.asking import NoAnswer, get
from mnemosyned.workers.process import Phase

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from mnemosyned.workers.process import WorkerProcess

_TIMEOUT_S: Final = 4.0
_SUPERVISOR: Final = "supervisor"
_ADDED: Final = frozenset({"counter", "histogram", "summary"})
# Gauges that are not added up. A name that ends in _info is 1 for what its labels say.
LARGEST: Final = frozenset({
    "mnemosyned_build_info",
    "mnemosyned_cluster_breaker_state",
    "mnemosyned_cluster_candidates",
    "mnemosyned_cluster_health_score",
    "mnemosyned_cluster_loop_lag_seconds",
    "mnemosyned_cluster_members",
    "mnemosyned_cluster_ring_info",
    "mnemosyned_lease_age_seconds",
    "mnemosyned_loop_silence_seconds",
    "mnemosyned_ready",
    "mnemosyned_sessions",
    "python_info",
})  # fmt: skip
SMALLEST: Final = frozenset({
    "mnemosyned_lease_valid",
    "mnemosyned_tls_certificate_end_timestamp_seconds",
    "process_max_fds",
    "process_start_time_seconds",
})  # fmt: skip

Key = tuple[str, tuple[tuple[str, str], ...]]  # of a sample: its name and its labels
FamilyKey = tuple[str, str]  # name and type: a counter and a gauge may have one name


class Totals:
    """Adds metrics up, of sources that begin again at 0 when their process does."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[object, list[Metric]]] = {}  # by source: which process, and its metrics
        self._former: dict[FamilyKey, dict[Key, float]] = {}  # what ended processes had counted

    def take(self, source: str, process: object, families: Iterable[Metric]) -> None:
        """Take a source's metrics, in place of its last ones; `process` tells its processes apart."""
        former = self._last.get(source)
        if former is not None and former[0] != process:
            for family in former[1]:
                if family.type in _ADDED:
                    _merge(self._former.setdefault((family.name, family.type), {}), family, _sum)
        self._last[source] = (process, list(families))

    def families(self, running: Collection[str]) -> Iterator[Metric]:
        """Yield the totals, one family for each name and type; gauges are those of `running` sources."""
        merged: dict[FamilyKey, Metric] = {}
        samples: dict[FamilyKey, dict[Key, float]] = {}
        for source, (_, families) in self._last.items():
            for family in families:
                if family.type not in _ADDED and source not in running:
                    continue
                key = family.name, family.type
                merged.setdefault(key, Metric(family.name, family.documentation, family.type))
                into = samples.setdefault(key, dict(self._former.get(key, {})))
                _merge(into, family, _rule(family))
        for key, total in merged.items():
            for (name, labels), value in samples[key].items():
                total.add_sample(name, dict(labels), value)
            yield total


def _merge(into: dict[Key, float], family: Metric, rule: Callable[[float, float], float]) -> None:
    for sample in family.samples:
        key = sample.name, tuple(sorted(sample.labels.items()))
        into[key] = rule(into[key], sample.value) if key in into else sample.value


def _rule(family: Metric) -> Callable[[float, float], float]:
    # The form of the text has no infos: there they are gauges.
    if family.type == "info" or family.name in LARGEST:
        return max
    return min if family.name in SMALLEST else _sum


def _sum(one: float, other: float) -> float:
    return one + other


class WorkersCollector(Collector):
    """Asks all workers at each scrape, on a thread of the admin server."""

    def __init__(
        self,
        workers: Callable[[], Sequence[WorkerProcess]],
        directory: str,
        own: CollectorRegistry,
        *,
        count: int,
        restarts: Callable[[], int],
    ) -> None:
        """Ask for no metrics yet.

        - `workers` are the processes that there are now; `count` is how many there should be.
        - `own` are the metrics of the supervisor; `restarts` is how often a worker was started again.
        """
        self._count = count
        self._workers = workers
        self._directory = directory
        self._own = own
        self._restarts = restarts
        self._totals = Totals()
        self._one_scrape = threading.Lock()

    def collect(self) -> Iterator[Metric]:
        """Yield the totals."""
        with self._one_scrape:
            workers = self._workers()
            for worker, text in zip(workers, asyncio.run(self._asked(workers)), strict=True):
                if text:
                    families = text_string_to_metric_families(text)
                    self._totals.take(str(worker.number), worker.pid, families)
            self._totals.take(_SUPERVISOR, None, self._own.collect())
            running = {_SUPERVISOR, *(str(worker.number) for worker in workers)}
            yield from self._totals.families(running)
            yield from self.about(workers)

    def about(self, workers: Sequence[WorkerProcess]) -> Iterator[Metric]:
        """Yield what is known of the workers themselves."""
        by_phase = GaugeMetricFamily("mnemosyned_workers", "Workers by what they do.", labels=("state",))
        for phase in (Phase.STARTING, Phase.LISTENING, Phase.SERVING):
            by_phase.add_metric((phase.value.lower(),), sum(one.phase is phase for one in workers))
        by_phase.add_metric((Phase.ENDED.value.lower(),), max(0, self._count - len(workers)))
        yield by_phase
        yield CounterMetricFamily(
            "mnemosyned_worker_restarts",
            "Times that a worker which had ended was started again.",
            value=self._restarts(),
        )

    async def _asked(self, workers: Sequence[WorkerProcess]) -> list[str]:
        return list(await asyncio.gather(*map(self._metrics_of, workers)))

    async def _metrics_of(self, worker: WorkerProcess) -> str:
        try:
            path = admin_socket(self._directory, worker.number)
            return (await get(path, "/metrics", timeout_s=_TIMEOUT_S))[1].decode()
        except NoAnswer:
            return ""
