"""Calls that wait for Redis, on goals like those that wait for PostgreSQL, against pipelines of redis-py."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Final

from load import closed
from redis import Redis
from redis_servers import RedisServer, programs
from results import Result, Skipped

from rows.setting import Bench, checked, server, session, start
from rows.storage import METHODS, calls_of

GOALS: Final = {"first Get": 20_000.0, "Start": 12_000.0, "SetValue": None}
_BATCH: Final = 64
_BATCHES: Final = 50


def busy(bench: Bench) -> Iterator[Result]:
    """First Get, Start and SetValue with 64 callers, on Redis with appendonly and everysec."""
    if not programs():
        raise Skipped("it needs redis-server")
    redis = bench.redis()
    flags = ("-storage=redis", f"-redis.address={redis.url}")
    # Without copies every Get is a first one.
    uncached, daemon = bench.daemon(*flags, "-cache.ttl=0"), bench.daemon(*flags)
    start([daemon.address], range(1000))
    count = bench.scaled(40_000, 4000)
    rates, limits, costs_us = (defaultdict[str, list[float]](list) for _ in range(3))
    for turn in range(bench.rounds):
        for name, calls in calls_of(turn, count).items():
            one = uncached if name == "first Get" else daemon
            run = partial(closed, [one.address], calls, count)
            cost_us, outcome = server(one).cpu_us(partial(checked, [one], METHODS[name], run))
            rates[name].append(outcome.rate)
            costs_us[name].append(cost_us)
            limits[name].append(_bare_rate(redis, name))
    for name, values in rates.items():
        cost_us, bare = statistics.median(costs_us[name]), statistics.median(limits[name])
        yield Result(
            name=f"{name} on Redis, 64 callers",
            unit="a second",
            values=values,
            goal=GOALS[name],
            is_more_better=True,
            note=f"CPU of the daemon {cost_us:.0f} µs; bare pipelines {bare:,.0f} a second",
        )


def _bare_rate(redis: RedisServer, name: str) -> float:
    """Return how many such calls redis-py does in a second, 64 in a pipeline, without a script or a check."""
    client, record = Redis.from_url(redis.url), b"r" * 180
    tokens = [session(number).access_token for number in range(_BATCH)]
    begun_s = time.perf_counter()
    for _ in range(_BATCHES):
        pipeline = client.pipeline(transaction=False)
        for number, token in enumerate(tokens):
            if name == "Start":
                pipeline.set(f"bare:s:{token}", record, px=86_400_000)
                pipeline.zadd("bare:n", {token: 0})
                pipeline.zadd("bare:x", {token: begun_s})
                pipeline.zadd(f"bare:u:{number}", {token: begun_s})
                pipeline.pexpire(f"bare:u:{number}", 86_400_000)
            else:
                pipeline.get(f"bare:s:{token}")
            if name == "SetValue":
                pipeline.set(f"bare:s:{token}", record, keepttl=True)
        pipeline.execute()
    took_s = time.perf_counter() - begun_s
    client.close()
    return _BATCH * _BATCHES / took_s
