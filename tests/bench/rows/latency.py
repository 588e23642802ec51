"""Latency of cached Gets by the clock: each counts from when it was due, also those that had to wait."""

from __future__ import annotations

from collections.abc import Iterator

from load import closed, open_loop
from results import Curve, Result

from rows.setting import ANSWER_BYTES, Bench, at_random, gets, server, start

STEADY_RATE = 4000.0


def under_load(bench: Bench) -> Iterator[Result | Curve]:
    """Cached Gets in an open loop: CPU at 4,000 a second, the tail at half of the maximum, and all loads."""
    echo, daemon = bench.echo(ANSWER_BYTES), bench.daemon("-storage=memory")
    start([daemon.address], range(1000))
    calls, seconds = at_random(gets(range(1000))), 1.0 if bench.is_quick else 10.0
    own, bare, tails, base_tails = [], [], [], []
    most = closed([daemon.address], calls, bench.scaled(60_000)).rate
    for _ in range(bench.rounds):
        for one, costs in ((server(daemon), own), (echo, bare)):
            costs.append(
                one.cpu_us(
                    lambda one=one: open_loop([one.address], calls, rate=STEADY_RATE, seconds=seconds)
                )[0]
            )
        for one, found in ((server(daemon), tails), (echo, base_tails)):
            outcome = open_loop([one.address], calls, rate=most / 2, seconds=seconds)
            found.append(outcome.quantile_ms(0.999))
    yield Result(
        name="cached Get at 4,000/s, CPU", unit="us", values=own, limit="echo", limits=bare, goal=1.3
    )
    yield Result(
        name=f"p99.9 at {most / 2:,.0f}/s, half of the maximum",
        unit="ms",
        values=tails,
        goal=3.0,
        note=f"the echo's, at the same rate: {sorted(base_tails)[len(base_tails) // 2]:.2g} ms",
    )
    shares = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9)
    outcomes = {
        share: open_loop([daemon.address], calls, rate=most * share, seconds=seconds) for share in shares
    }
    yield Curve(
        name="latency against load",
        x="cached Gets a second",
        y="ms from when due",
        points={
            name: [(most * share, outcome.quantile_ms(part)) for share, outcome in outcomes.items()]
            for name, part in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999))
        },
    )
