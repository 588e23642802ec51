"""Calls to a cluster whose nodes share the server's core: what the hop costs, and what three nodes cost."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import cycle

from clusters import Cluster
from load import Request, closed, request
from mnemosynerpc.session_pb2 import ExistsRequest, SetValueRequest
from processes import Daemon
from results import Curve, Result

from cluster.ring import Ring
from rows.setting import Bench, Server, at_random, checked, gets, server, session, start, starts


def forwarded(bench: Bench) -> Iterator[Result]:
    """A cached Get that another node owns, against one that the entry node owns."""
    # Without mirrors: with them the entry node soon answers most of these calls itself.
    cluster = bench.cluster(bench.postgres(), 2, "-mirror.bytes=0")
    (entry, _), both = cluster.names, all_of(cluster)
    start([entry], range(200))
    ring = Ring(cluster.names)
    local = gets_of(ring, entry, is_owner=True)
    remote = gets_of(ring, entry, is_owner=False)
    near, far, near_ms, far_ms = [], [], [], []
    for calls in (local, remote):
        closed([entry], at_random(calls), 2000)
    count = bench.scaled(30_000)
    for _ in range(bench.rounds):
        for calls, costs in ((local, near), (remote, far)):
            costs.append(both.cpu_us(lambda calls=calls: closed([entry], at_random(calls), count))[0])
        for calls, times in ((local, near_ms), (remote, far_ms)):
            outcome = closed([entry], at_random(calls), bench.scaled(5000), in_flight=1)
            times.append(outcome.quantile_ms(0.5))
    yield Result(
        name="forwarded cached Get, 64 callers, both nodes",
        unit="us",
        values=far,
        limit="local",
        limits=near,
        goal=2.5,
        note="without mirrors",
    )
    yield Result(
        name="forwarded cached Get, one caller, p50",
        unit="ms",
        values=far_ms,
        goal=0.3,
        note=f"local: {sorted(near_ms)[len(near_ms) // 2]:.2g} ms",
    )


def three_nodes(bench: Bench) -> Iterator[Result | Curve]:
    """Cached Gets and mixed calls to three nodes from every entry, against one node with the same storage."""
    dsn = bench.postgres()
    one = bench.daemon(f"-postgres.address={dsn}")
    numbers = range(1000)
    start([one.address], numbers)
    calls, count = gets(numbers), bench.scaled(30_000)
    closed([one.address], cycle(calls), 3000)
    alone, rates = [], [[], [], []]
    for _ in range(bench.rounds):
        cost, outcome = server(one).cpu_us(lambda: closed([one.address], at_random(calls), count))
        alone.append(cost)
        rates[0].append(outcome.rate)
    one.stop()
    costs: dict[int, list[float]] = {}
    for nodes in (2, 3):
        cluster = bench.cluster(dsn, nodes)
        costs[nodes], rates[nodes - 1] = from_every_entry(bench, cluster, calls)
        if nodes == 3:
            break
        for daemon in cluster.daemons.values():
            daemon.stop()
    yield Result(
        name="3 nodes, cached Get, any entry, all nodes",
        unit="us",
        values=costs[3],
        limit="one node",
        limits=alone,
        goal=1.3,
    )
    mixed_rates = []
    for turn in range(bench.rounds):
        outcome = closed(cluster.names, mixed(numbers, turn), bench.scaled(10_000))
        mixed_rates.append(outcome.rate)
    yield Result(name="3 nodes, mixed calls", unit="a second", values=mixed_rates, is_more_better=True)
    points = [(nodes, sorted(found)[len(found) // 2]) for nodes, found in enumerate(rates, 1)]
    yield Curve(
        name="throughput by nodes", x="nodes on one core", y="cached Gets a second", points={"Get": points}
    )


def storage_calls(bench: Bench) -> Iterator[Result]:
    """Start and first Get at three nodes from every entry, against one node with the same storage."""
    dsn, count = bench.postgres(), bench.scaled(20_000, 4000)
    # Without copies every Get is a first one.
    flags = ("-cache.ttl=0", "-mirror.bytes=0")
    one = bench.daemon(f"-postgres.address={dsn}", *flags)
    cluster = bench.cluster(dsn, 3, *flags)
    start([one.address], range(1000))
    for method in ("Start", "Get"):
        found: dict[int, list[float]] = {1: [], 3: []}
        for turn in range(bench.rounds):
            for daemons in ([one], list(cluster.daemons.values())):
                first = 10_000_000 * (turn + 1) + 1_000_000 * len(daemons)
                calls = starts(first) if method == "Start" else at_random(gets(range(1000)))
                found[len(daemons)].append(rate_of(daemons, method, calls, count))
        yield Result(
            name=f"3 nodes, {'first ' if method == 'Get' else ''}{method}, any entry",
            unit="a second",
            values=found[3],
            limit="one node",
            limits=found[1],
            is_more_better=True,
        )


def rate_of(daemons: Sequence[Daemon], method: str, calls: Iterator[Request], count: int) -> float:
    """Return how many calls a second these daemons answer, with OK, from 64 callers at all of them."""
    addresses = [daemon.address for daemon in daemons]
    return checked(daemons, method, lambda: closed(addresses, calls, count)).rate


def from_every_entry(
    bench: Bench, cluster: Cluster, calls: Sequence[Request]
) -> tuple[list[float], list[float]]:
    """Return the CPU of all nodes for each cached Get, and the Gets a second."""
    daemons, count = list(cluster.daemons.values()), bench.scaled(30_000)
    closed(cluster.names, cycle(calls), 6000)
    rounds = [
        all_of(cluster).cpu_us(
            lambda: checked(daemons, "Get", lambda: closed(cluster.names, at_random(calls), count))
        )
        for _ in range(bench.rounds)
    ]
    return [cost for cost, _ in rounds], [outcome.rate for _, outcome in rounds]


def all_of(cluster: Cluster) -> Server:
    return Server(cluster.names[0], [daemon.process.pid for daemon in cluster.daemons.values()])


def gets_of(ring: Ring, entry: str, *, is_owner: bool) -> list[Request]:
    numbers = [one for one in range(200) if (ring.owner(session(one).access_token) == entry) is is_owner]
    return [gets(range(one, one + 1))[0] for one in numbers]


def mixed(numbers: Sequence[int], turn: int) -> Iterator[Request]:
    """Yield 88 % Get, 5 Start, 5 SetValue and 2 Exists."""
    rng = random.Random(turn)  # no secret
    reads, fresh = gets(range(len(numbers))), starts(10_000_000 * (turn + 1))
    while True:
        kind, number = rng.random(), rng.choice(numbers)
        token = session(number).access_token if kind >= 0.88 else ""
        if kind < 0.88:
            yield reads[number]
        elif kind < 0.93:
            yield next(fresh)
        elif kind < 0.98:
            yield request("SetValue", SetValueRequest(access_token=token, key="theme", value=f"{kind:.4f}"))
        else:
            yield request("Exists", ExistsRequest(access_token=token))
