"""How one node sees its cluster: metrics, and the page `/debug/cluster`.

Both are made on the threads of the admin server, while the event loop changes what they read. The rules:

- Read only. Membership, ring and breakers belong to the event loop, and there are no locks.
- Iterate over copies that are made in one step: `list(counter.items())`, `breaker_states()`, the table's own
  iterator. A dictionary that changes during an iteration raises RuntimeError.
- A ring never changes; a new one replaces it. Read it once per page, so that the page is of one ring.
- Two numbers on one page may be of slightly different instants. Nothing may depend on their sum.

A node's view is its own. In a partition both halves show pages that are right for them, and `mnemosyned
cluster check` compares them. The fingerprint of the ring is what to compare: nodes with equal fingerprints
route every token alike.

`commands/cluster.py` reads the page, also that of other versions during a rolling update. Add fields; do not
rename or remove them.
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
# The last changes of membership; the gossip keeps more of them.
_EVENTS_SHOWN: Final = 100


class ClusterCollector(Collector):
    """Shows a node's cluster as `mnemosyned_cluster_*`.

    A collector and not counters that are incremented: the cluster's packages know nothing of Prometheus, and
    a scrape every 15 s costs less than an increment per packet. Labels are names of peers, directions and
    kinds, so the series are bounded by the size of the cluster.
    """

    def __init__(self, node: ClusterNode) -> None:
        self._node = node

    def collect(self) -> Iterator[Metric]:
        """Yield one family for each name; a node that has not joined yet shows only its forwarded calls."""
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
            "Calls for tokens of a peer; with any outcome but ok, this node answered from the storage.",
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
    """Return what `/debug/cluster` shows, as JSON.

    With `token` in the query: the owner of that token by this node's ring. The token itself is not sent
    back, only its fingerprint. Without it: this node, its ring, its members and the last changes of
    membership. Before the node has joined, `status` is "starting" and there are no members.
    """
    ring = node.view.ring
    if "token" in query:
        token = query["token"][-1]
        return {"token": fingerprint(token), "owner": ring.owner(token), "ring": ring.fingerprint}
    gossip = node.gossip
    shares = ring.shares()
    members: list[Member] = [] if gossip is None else sorted(gossip.swim.table)
    breakers = node.forwarder.breaker_states()
    keeper = node.keeper
    leases = {} if keeper is None else keeper.shown()
    return {
        "node": node.view.me,
        "status": "starting" if gossip is None else gossip.swim.me.status,
        "ring": {"fingerprint": ring.fingerprint, "nodes": list(ring.nodes)},
        "health_score": 0 if gossip is None else gossip.swim.health_score,
        "loop_lag_s": 0.0 if gossip is None else round(gossip.timer.max_lag_s, 4),
        "lease": {} if keeper is None else {"reason": keeper.reason(), "strangers": keeper.rows.strangers()},
        "members": [
            {
                "name": member.name,
                "address": member.address,
                "status": member.status,
                "generation": member.generation,
                "incarnation": member.incarnation,
                # 0 for a member that is not in the ring: still joining, leaving, or dead.
                "ring_share": round(shares.get(member.name, 0.0), 4),
                # As the storage has it; none: the node serves no copies, or has no row.
                "lease": leases.get(member.name, "none"),
                # No breaker yet: this node has never forwarded a call there.
                "breaker": breakers[member.name].name.lower() if member.name in breakers else "closed",
            }
            for member in members
        ],
        "events": [] if gossip is None else [_event(one) for one in list(gossip.events)[-_EVENTS_SHOWN:]],
    }


def _event(timed: TimedEvent) -> dict[str, object]:
    # Evidence, accuser and confirmations answer the question of an incident: who suspected whom, and why.
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
    """Yield what this node holds of the members, and how well it can judge them.

    `health_score`, `loop_lag_seconds` and `stalls` are about this node. If they rise, its suspicions of
    other nodes say more about itself.
    """
    swim = gossip.swim
    members = GaugeMetricFamily(
        f"{_PREFIX}_members", "Members by their state in this node's view.", labels=("state",)
    )
    # Every status, also with 0: a series that appears only in an incident breaks alerts on its change.
    count_by_status = Counter(member.status for member in swim.table)
    for status in _STATUSES:
        members.add_metric((status,), count_by_status[status])
    yield members
    ring = gossip.view.ring
    yield InfoMetricFamily(
        f"{_PREFIX}_ring",
        # A changed fingerprint begins a new series, at most one per change of the ring.
        "The ring's fingerprint: equal on all nodes that route alike.",
        value={"fingerprint": ring.fingerprint},
    )
    introductions = gossip.introductions
    yield _gauge("candidates", "Processes that must still prove where they are.", len(introductions))
    yield _counter("unproven", "Processes that did not prove where they are.", introductions.failed)
    yield _counter("ring_changes", "New rings.", gossip.counters.ring_changes)
    yield _gauge("health_score", "Lifeguard's local health: 0 is healthy, 8 is worst.", swim.health_score)
    yield _gauge("loop_lag_seconds", "How late the last membership timer fired.", gossip.timer.lag_s)
    yield _counter("stalls", "Times that the event loop was stalled for over 100 ms.", swim.counters.stalls)
    probes = CounterMetricFamily(f"{_PREFIX}_probes", "Probes that ended.", labels=("result",))
    probes.add_metric(("acked",), swim.counters.probes_acked)
    probes.add_metric(("failed",), swim.counters.probes_failed)
    yield probes
    # Many false suspicions and few deaths: the network loses packets, or nodes are stalled.
    yield _counter("suspicions", "Members that came under suspicion.", swim.counters.suspicions)
    yield _counter("false_suspicions", "Suspicions that the suspect refuted.", swim.counters.false_suspicions)
    yield SummaryMetricFamily(
        f"{_PREFIX}_detection_seconds",
        "Time from suspecting a member to declaring it dead, on this node.",
        count_value=gossip.counters.detections,
        sum_value=gossip.counters.detection_s_sum,
    )


def _traffic(gossip: Gossip) -> Iterator[Metric]:
    """Yield packets, bytes and syncs: per node constant in a large cluster, by the design of SWIM."""
    messages = CounterMetricFamily(
        f"{_PREFIX}_gossip_messages", "Packets of the membership protocol.", labels=("direction", "kind")
    )
    for labels, count in list(gossip.counters.packets.items()):
        messages.add_metric(labels, count)
    payload = CounterMetricFamily(
        f"{_PREFIX}_gossip_bytes", "Payload of these packets.", labels=("direction",)
    )
    for direction, size in list(gossip.counters.payload_bytes.items()):
        payload.add_metric((direction,), size)
    yield from (messages, payload)
    yield _counter("syncs", "Exchanges of whole tables, or of their hashes.", gossip.swim.counters.syncs)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"{_PREFIX}_{name}", text, value=value)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{_PREFIX}_{name}", text, value=value)


def _cumulative(counts: list[int]) -> list[tuple[str, float]]:
    # Prometheus counts a value in every bucket whose bound it does not exceed; the forwarder in one.
    total = 0
    rows: list[tuple[str, float]] = []
    for bound, count in zip([*map(str, BATCH_BUCKETS), "+Inf"], counts, strict=True):
        total += count
        rows.append((bound, total))
    return rows
