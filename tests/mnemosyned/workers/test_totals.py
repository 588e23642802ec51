from __future__ import annotations

from collections.abc import Iterator

from exported import exported_families
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from mnemosyned.workers.totals import LARGEST, SMALLEST, Totals

# Gauges of which the daemon's is the sum over its workers. A new one belongs here, or to LARGEST or SMALLEST.
SUMMED = {
    "grpc_client_requests",
    "grpc_server_connections",
    "grpc_server_requests",
    "grpc_server_unsent_bytes",
    "mnemosyned_cache_bytes",
    "mnemosyned_cache_entries",
    "mnemosyned_cache_negative_entries",
    "mnemosyned_guess_callers",
    "mnemosyned_mirror_bytes",
    "mnemosyned_mirror_entries",
    "mnemosyned_storage_postgres_connections",
    "mnemosyned_storage_postgres_connections_in_use",
    "mnemosyned_storage_postgres_waiting",
    "mnemosyned_storage_mongodb_connections",
    "mnemosyned_storage_mongodb_connections_in_use",
    "mnemosyned_storage_mongodb_waiting",
    "mnemosyned_storage_redis_connections",
    "mnemosyned_storage_redis_connections_in_use",
    "mnemosyned_storage_redis_waiting",
    "process_open_fds",
    "process_resident_memory_bytes",
    "process_virtual_memory_bytes",
}
# The supervisor's own.
OWN = {"mnemosyned_workers"}


async def test_each_gauge_is_known_to_be_added_up_or_not() -> None:
    gauges = {
        family.name + ("_info" if family.type == "info" else "")
        for family in await exported_families()
        if family.type in {"gauge", "info"}
    }

    unknown = gauges - SUMMED - LARGEST - SMALLEST - OWN

    assert not unknown


class Source:
    """One process with metrics of each kind."""

    def __init__(self, *, calls: int, seconds: float, connections: int, ready: int, ends_at: int) -> None:
        self.registry = CollectorRegistry()
        Counter("calls", "Calls.", ["code"], registry=self.registry).labels("OK").inc(calls)
        Histogram("took", "Times.", buckets=(1.0,), registry=self.registry).observe(seconds)
        Gauge("grpc_server_connections", "Open.", registry=self.registry).set(connections)
        Gauge("mnemosyned_ready", "Ready.", registry=self.registry).set(ready)
        name = "mnemosyned_tls_certificate_end_timestamp_seconds"
        Gauge(name, "End.", registry=self.registry).set(ends_at)

    def families(self) -> Iterator[object]:
        yield from text_string_to_metric_families(generate_latest(self.registry).decode())


def samples(totals: Totals, *running: str) -> dict[str, float]:
    return {
        sample.name + "".join(f"{{{value}}}" for value in sample.labels.values()): sample.value
        for family in totals.families(running or {"1", "2"})
        for sample in family.samples
    }


ONE = Source(calls=3, seconds=0.5, connections=2, ready=1, ends_at=100)
OTHER = Source(calls=4, seconds=5, connections=1, ready=0, ends_at=50)


def test_workers_are_added_up_by_what_their_metrics_mean() -> None:
    totals = Totals()
    totals.take("1", 10, ONE.families())  # type: ignore[arg-type]  # the library's parser is untyped
    totals.take("2", 20, OTHER.families())  # type: ignore[arg-type]  # see above

    found = samples(totals)

    assert found["calls_total{OK}"] == 7
    assert (found["took_bucket{1.0}"], found["took_bucket{+Inf}"]) == (1, 2)
    assert (found["took_count"], found["took_sum"]) == (2, 5.5)
    assert found["grpc_server_connections"] == 3
    assert found["mnemosyned_ready"] == 1
    assert found["mnemosyned_tls_certificate_end_timestamp_seconds"] == 50


def test_a_total_keeps_what_an_ended_worker_had_counted() -> None:
    totals = Totals()
    totals.take("1", 10, ONE.families())  # type: ignore[arg-type]  # see above
    totals.take("1", 11, OTHER.families())  # type: ignore[arg-type]  # see above
    totals.take("1", 11, OTHER.families())  # type: ignore[arg-type]  # see above

    found = samples(totals)

    assert found["calls_total{OK}"] == 7
    assert found["took_count"] == 2
    assert found["grpc_server_connections"] == 1


def test_an_ended_worker_has_no_gauges() -> None:
    totals = Totals()
    totals.take("1", 10, ONE.families())  # type: ignore[arg-type]  # see above
    totals.take("2", 20, OTHER.families())  # type: ignore[arg-type]  # see above

    found = samples(totals, "1")

    assert found["calls_total{OK}"] == 7
    assert found["grpc_server_connections"] == 2


def test_a_counter_and_a_gauge_of_one_name_stay_apart() -> None:
    text = "# TYPE r_total counter\nr_total 2\n# TYPE r gauge\nr 3\n"
    totals = Totals()
    for source in ("1", "2"):
        totals.take(source, 0, text_string_to_metric_families(text))

    assert samples(totals) == {"r_total": 4, "r": 6}
