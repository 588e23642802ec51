"""What the cluster looks like from here: metrics, and the page behind `/debug/cluster`.

Both are made on the operator's threads: they read counters and copies, and change nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from cluster.forward import BATCH_BUCKETS
from mnemosyned.observe.fingerprint import fingerprint

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from cluster.gossip import Gossip, TimedEvent
    from cluster.member import Member
    from mnemosyned.node import ClusterNode

_PREFIX: Final = "mnemosyned_cluster"
_STATUSES: Final = ("joining", "active", "leaving", "suspect", "dead", "left")
_EVENTS_SHOWN: Final = 100


class ClusterCollector(Collector):
    """Shows a node's cluster as `mnemosyned_cluster_*`."""

    def __init__(self, node: ClusterNode) -> None:
        self._node = node

    def collect(self) -> Iterator[Metric]:
        """Yield one family for each name; a node that has not joined yet shows its calls alone."""
        yield from self._calls()
        gossip = self._node.gossip
        if gossip is not None:
            yield from _membership(gossip)
            yield from _traffic(gossip)

    def _calls(self) -> Iterator[Metric]:
        forwarder = self._node.forwarder
        counters = forwarder.counters
        forwards = CounterMetricFamily(
            f"{_PREFIX}_forwards",
            "Calls for tokens that a peer owns; all but the ok were answered from the storage.",
            labels=("peer", "outcome"),
        )
        for labels, count in list(counters.by_outcome.items()):
            forwards.add_metric(labels, count)
        breakers = GaugeMetricFamily(
            f"{_PREFIX}_breaker_state", "0 closed, 1 half-open, 2 open.", labels=("peer",)
        )
        for peer, state in forwarder.breaker_states().items():
            breakers.add_metric((peer,), state)
        batches = HistogramMetricFamily(
            f"{_PREFIX}_forward_batch_size",
            "Calls in a batch to a peer.",
            buckets=_cumulative(counters.batch_sizes),
            sum_value=counters.items,
        )
        yield from (forwards, breakers, batches)


def page(node: ClusterNode, query: Mapping[str, list[str]]) -> dict[str, object]:
    """Return what `/debug/cluster` shows; `token` in the query asks for its owner."""
    ring = node.view.ring
    if "token" in query:
        token = query["token"][-1]
        return {"token": fingerprint(token), "owner": ring.owner(token), "ring": ring.fingerprint}
    gossip = node.gossip
    shares = ring.shares()
    members: list[Member] = [] if gossip is None else sorted(gossip.swim.table)
    breakers = node.forwarder.breaker_states()
    return {
        "node": node.view.me,
        "status": "starting" if gossip is None else gossip.swim.me.status,
        "ring": {"fingerprint": ring.fingerprint, "nodes": list(ring.nodes)},
        "health_score": 0 if gossip is None else gossip.swim.health_score,
        "loop_lag_s": 0.0 if gossip is None else round(gossip.counters.max_loop_lag_s, 4),
        "members": [
            {
                "name": member.name,
                "address": member.address,
                "status": member.status,
                "generation": member.generation,
                "incarnation": member.incarnation,
                "ring_share": round(shares.get(member.name, 0.0), 4),
                "breaker": breakers[member.name].name.lower() if member.name in breakers else "closed",
            }
            for member in members
        ],
        "events": [] if gossip is None else [_event(one) for one in list(gossip.events)[-_EVENTS_SHOWN:]],
    }


def _event(timed: TimedEvent) -> dict[str, object]:
    event = timed.event
    return {
        "at": round(timed.at_s, 3),
        "event": event.kind.value,
        "node": event.member.name,
        "incarnation": event.member.incarnation,
        "evidence": event.evidence,
        "accuser": event.accuser,
        "confirmations": event.confirmations,
        "seconds": round(event.seconds, 3),
    }


def _membership(gossip: Gossip) -> Iterator[Metric]:
    swim = gossip.swim
    members = GaugeMetricFamily(
        f"{_PREFIX}_members", "Members by what this node holds of them.", labels=("state",)
    )
    count_by_status = Counter(member.status for member in swim.table)
    for status in _STATUSES:
        members.add_metric((status,), count_by_status[status])
    yield members
    ring = gossip.view.ring
    yield InfoMetricFamily(
        f"{_PREFIX}_ring",
        "The ring's fingerprint: equal on all nodes that route alike.",
        value={"fingerprint": ring.fingerprint},
    )
    yield _counter("ring_changes", "New rings.", gossip.counters.ring_changes)
    yield _gauge("health_score", "Lifeguard's local health: 0 is well, 8 is worst.", swim.health_score)
    yield _gauge("loop_lag_seconds", "How late the last membership timer fired.", gossip.counters.loop_lag_s)
    yield _counter("stalls", "Times that the event loop stood still for over 100 ms.", swim.counters.stalls)
    probes = CounterMetricFamily(f"{_PREFIX}_probes", "Probes that ended.", labels=("result",))
    probes.add_metric(("acked",), swim.counters.probes_acked)
    probes.add_metric(("failed",), swim.counters.probes_failed)
    yield probes
    yield _counter("suspicions", "Members that came under suspicion.", swim.counters.suspicions)
    yield _counter("false_suspicions", "Suspicions that the suspect refuted.", swim.counters.false_suspicions)
    yield SummaryMetricFamily(
        f"{_PREFIX}_detection_seconds",
        "From suspecting a member to declaring it dead, here.",
        count_value=gossip.counters.detections,
        sum_value=gossip.counters.detection_s_sum,
    )


def _traffic(gossip: Gossip) -> Iterator[Metric]:
    messages = CounterMetricFamily(
        f"{_PREFIX}_gossip_messages", "Packets of the membership protocol.", labels=("direction", "kind")
    )
    for labels, count in list(gossip.counters.packets.items()):
        messages.add_metric(labels, count)
    payload = CounterMetricFamily(f"{_PREFIX}_gossip_bytes", "Their payload.", labels=("direction",))
    for direction, size in list(gossip.counters.payload_bytes.items()):
        payload.add_metric((direction,), size)
    yield from (messages, payload)
    yield _counter("syncs", "Exchanges of whole tables, or of their hashes.", gossip.swim.counters.syncs)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"{_PREFIX}_{name}", text, value=value)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{_PREFIX}_{name}", text, value=value)


def _cumulative(counts: list[int]) -> list[tuple[str, float]]:
    total = 0
    rows: list[tuple[str, float]] = []
    for bound, count in zip([*map(str, BATCH_BUCKETS), "+Inf"], counts, strict=True):
        total += count
        rows.append((bound, total))
    return rows
