"""Calls that wait for Redis, on the same goals as those that wait for PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator

from load import closed
from redis_servers import programs
from results import Result, Skipped

from rows.setting import Bench, checked, start
from rows.storage import METHODS, calls_of

GOALS = {"first Get": 20_000.0, "Start": 12_000.0, "SetValue": None}


def busy(bench: Bench) -> Iterator[Result]:
    """First Get, Start and SetValue with 64 callers, on Redis with appendonly and everysec."""
    if not programs():
        raise Skipped("it needs redis-server")
    flags = ("-storage=redis", f"-redis.address={bench.redis()}")
    # Without copies every Get is a first one.
    uncached, daemon = bench.daemon(*flags, "-cache.ttl=0"), bench.daemon(*flags)
    start([daemon.address], range(1000))
    count = bench.scaled(40_000, 4000)
    found: dict[str, list[float]] = {name: [] for name in METHODS}
    for turn in range(bench.rounds):
        for name, calls in calls_of(turn, count).items():
            one = uncached if name == "first Get" else daemon
            outcome = checked(
                [one], METHODS[name], lambda one=one, calls=calls: closed([one.address], calls, count)
            )
            found[name].append(outcome.rate)
    for name, values in found.items():
        yield Result(
            name=f"{name} on Redis, 64 callers",
            unit="a second",
            values=values,
            goal=GOALS[name],
            is_more_better=True,
        )
