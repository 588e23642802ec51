"""A million sessions in Redis: what calls cost the daemon and the server, beside those of ten thousand."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Iterator
from itertools import count as counting
from typing import Final

from load import Request, closed, request
from mnemosynerpc.session_pb2 import AbandonRequest, GetRequest, ListRequest, SetValueRequest
from redis_servers import RedisServer, programs
from results import Result, Skipped
from stores import new_redis_store

from mnemosyned.sessions import bag
from mnemosyned.sessions.model import NewSession
from rows.filling import random_token
from rows.setting import Bench, checked, cpu_ns, session, starts

_SMALL: Final = 10_000
# In this sequence: Abandon ends what Start has begun.
_METHODS: Final = {
    "Start": "Start",
    "first Get": "Get",
    "SetValue": "SetValue",
    "List of 10": "List",
    "Abandon": "Abandon",
}
_BATCH: Final = 500
_DAY_US: Final = 86_400_000_000
_GOAL: Final = 1.2


class _Side:
    """A Redis with so many sessions, and its daemon."""

    def __init__(self, bench: Bench, held: int) -> None:
        self.held = held
        # A rewrite of the file in the middle of a round would be another program's cost.
        self._redis = bench.redis(f"redis {held}", **{"auto-aof-rewrite-percentage": "0"})
        asyncio.run(_fill(self._redis, held))
        # Without copies every Get is a first one.
        self._daemon = bench.daemon("-storage=redis", f"-redis.address={self._redis.url}", "-cache.ttl=0")

    def cost_us(self, method: str, calls: Iterator[Request], count: int) -> dict[str, float]:
        """Return what each of so many calls cost the daemon, the server, and both."""
        assert self._redis.process is not None
        pids = {"the daemon": self._daemon.process.pid, "the server": self._redis.process.pid}
        before = {who: cpu_ns(pid) for who, pid in pids.items()}
        checked([self._daemon], method, lambda: closed([self._daemon.address], calls, count))
        found = {who: (cpu_ns(pid) - before[who]) / 1000 / count for who, pid in pids.items()}
        return found | {"both": sum(found.values())}


def many_sessions(bench: Bench) -> Iterator[Result]:
    """CPU of calls beside 1,000,000 sessions in Redis, against 10,000: of the daemon, and of the server."""
    if not programs():
        raise Skipped("it needs redis-server")
    many, count = bench.scaled(1_000_000, 100_000), bench.scaled(5000, 2000)
    large, small = _Side(bench, many), _Side(bench, _SMALL)
    costs: dict[tuple[str, str, _Side], list[float]] = defaultdict(list)
    for turn in range(bench.rounds):
        for name, method in _METHODS.items():
            for side in (large, small):
                for who, cost in side.cost_us(method, _calls(name, turn, side.held), count).items():
                    costs[name, who, side].append(cost)
    for name, who in [(name, who) for name, who, side in costs if side is large]:
        yield Result(
            name=f"{name} beside {many:,} sessions, {who}",
            unit="µs",
            values=costs[name, who, large],
            limit=f"beside {_SMALL:,}",
            limits=costs[name, who, small],
            # A place in a sorted set is deeper among a hundred times as many: that is the server's own.
            goal=None if who == "the server" else _GOAL,
        )


def _calls(name: str, turn: int, held: int) -> Iterator[Request]:
    begun = 1_000_000 * (turn + 1)  # beyond those that are held
    if name == "Start":
        yield from starts(begun)
    for number in counting():
        if name == "List of 10":
            yield request("List", ListRequest(limit=10))
        elif name == "Abandon":
            yield request("Abandon", AbandonRequest(access_token=session(begun + number).access_token))
        else:
            token = random_token(random.randrange(held))  # no secret
            if name == "first Get":
                yield request("Get", GetRequest(access_token=token))
            else:
                value = f"{turn}.{number}"
                yield request("SetValue", SetValueRequest(access_token=token, key="theme", value=value))


async def _fill(server: RedisServer, count: int) -> None:
    """Start sessions whose tokens are `random_token` of 0 and on, as a daemon would."""
    store = new_redis_store(server.url, "mnemosyne:")
    await store.open()
    stored_bag = bag.encode(dict(session(0).bag))
    for first in range(0, count, _BATCH):
        await store.start(
            [
                NewSession(
                    access_token=random_token(number),
                    subject_id=f"user:{number}",
                    subject_client="web",
                    bag=stored_bag,
                    ttl_us=_DAY_US,
                )
                for number in range(first, min(first + _BATCH, count))
            ]
        )
    await store.close()
