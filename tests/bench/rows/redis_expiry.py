"""Sessions that expire in Redis: whether they leave a key or memory behind."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from redis_clusters import call
from redis_servers import RedisServer, programs
from results import Result, Skipped

from rows.setting import Bench, start

# Longer than it takes to start all of them, which are there at once then.
_TTL_S: Final = 60
_CLEANED_S: Final = 120
# In it the server shrinks the table of its keys, and the buffers of clients.
_SHRUNK_S: Final = 15
# Buffers of connections come and go; an index that kept its names would take a hundred times as much.
_GOAL: Final = 1.05


@dataclass(frozen=True, slots=True)
class Footprint:
    """What all servers of a storage hold together."""

    keys: int
    used_mb: float
    dataset_mb: float  # without what serves connections, and without the table of the keys

    def __str__(self) -> str:
        return f"{self.keys:,} keys, {self.used_mb:.2f} MB, {self.dataset_mb:.2f} MB of them the dataset"


def expiry(bench: Bench) -> Iterator[Result]:
    """100,000 sessions expire, on one Redis and on a cluster: keys and memory that are left."""
    if not programs():
        raise Skipped("it needs redis-server")
    count = bench.scaled(100_000)
    one = bench.redis()
    yield from _expired(bench, "one Redis", [one], one.url, count)
    cluster = bench.redis_cluster()
    yield from _expired(bench, "a Redis Cluster", cluster.nodes, cluster.url, count)


def _expired(
    bench: Bench, where: str, servers: Sequence[RedisServer], url: str, count: int
) -> Iterator[Result]:
    flags = (f"-redis.address={url}", "-redis.wait=0", f"-ttl={_TTL_S}s", "-ttc=1s")
    daemon = bench.daemon("-storage=redis", *flags)
    before, names_before = _footprint(servers), _names(servers)
    start([daemon.address], range(count))
    most = _footprint(servers)
    # Each has its record, and the index of its subject.
    assert most.keys >= 2 * count, f"some had expired before all were started: {most}"
    left = _left(servers, names_before)
    after = _shrunk(servers, before)
    yield Result(
        name=f"keys left of {count:,} sessions, {where}",
        unit="keys",
        values=[len(left)],
        goal=0.0,
        note=f"before: {before}; with the sessions: {most}; after: {after}",
    )
    yield Result(
        name=f"used_memory after {count:,} sessions, {where}",
        unit="MB",
        values=[after.used_mb],
        limit="before",
        limits=[before.used_mb],
        goal=_GOAL,
    )


def _left(servers: Sequence[RedisServer], names_before: set[bytes]) -> set[bytes]:
    """Wait for the end of all sessions; return the keys that are left of them."""
    end_s = time.monotonic() + _TTL_S + _CLEANED_S
    while _footprint(servers).keys > len(names_before) and time.monotonic() < end_s:
        time.sleep(0.5)
    # Of the keys before, those that try the scripts at a start end by themselves.
    while (left := _names(servers) - names_before) and time.monotonic() < end_s:
        time.sleep(0.5)
    return left


def _shrunk(servers: Sequence[RedisServer], before: Footprint) -> Footprint:
    """Return the footprint when it is again what it was before, or when that takes too long."""
    end_s = time.monotonic() + _SHRUNK_S
    while (found := _footprint(servers)).used_mb > before.used_mb and time.monotonic() < end_s:
        time.sleep(0.5)
    return found


def _names(servers: Sequence[RedisServer]) -> set[bytes]:
    return {name for server in servers for name in call(server, ("KEYS", "*"))[0]}


def _footprint(servers: Sequence[RedisServer]) -> Footprint:
    keys, memory = 0, Counter[str]()
    for server in servers:
        _, count, info = call(server, ("MEMORY", "PURGE"), ("DBSIZE",), ("INFO", "memory"))
        keys += count
        for name in ("used_memory", "used_memory_dataset"):
            (line,) = [line for line in info.decode().splitlines() if line.startswith(f"{name}:")]
            memory[name] += int(line.partition(":")[2])
    return Footprint(keys, memory["used_memory"] / 1e6, memory["used_memory_dataset"] / 1e6)
