"""Calls that wait for PostgreSQL, with fsync on, against statements by asyncpg alone."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator
from itertools import count as counting

import asyncpg
from load import Outcome, Request, closed, request
from mnemosynerpc.session_pb2 import SetValueRequest
from results import Result

from rows.setting import Bench, checked, gets, session, start, starts

GOALS = {"first Get": 20_000.0, "Start": 15_000.0, "SetValue": 15_000.0}
METHODS = {"first Get": "Get", "Start": "Start", "SetValue": "SetValue"}
SELECT = "SELECT access_token, subject_id FROM mnemosyne.session WHERE access_token = ANY($1::bytea[])"


def busy(bench: Bench) -> Iterator[Result]:
    """First Get, Start and SetValue with 64 callers, against batches of 64 keys by asyncpg alone."""
    found, raw = measured(bench, in_flight=64, count=bench.scaled(20_000, 4000))
    for name, outcomes in found.items():
        yield Result(
            name=f"{name}, 64 callers",
            unit="a second",
            values=[one.rate for one in outcomes],
            goal=GOALS[name],
            is_more_better=True,
            note=f"a raw batch of 64 reads: {statistics.median(raw):.2g} ms",
        )


def one_caller(bench: Bench) -> Iterator[Result]:
    """First Get, Start and SetValue one at a time, against one statement by asyncpg."""
    found, raw = measured(bench, in_flight=1, count=bench.scaled(2000, 500))
    for name, outcomes in found.items():
        yield Result(
            name=f"{name}, one caller, p50",
            unit="ms",
            values=[one.quantile_ms(0.5) for one in outcomes],
            limit="a read by asyncpg",
            limits=raw,
        )


def measured(bench: Bench, *, in_flight: int, count: int) -> tuple[dict[str, list[Outcome]], list[float]]:
    """Return the outcomes of each kind of call, and the milliseconds of a read of so many keys by asyncpg."""
    dsn = bench.postgres()
    found: dict[str, list[Outcome]] = {name: [] for name in METHODS}
    raw: list[float] = []
    # Without copies every Get is a first one.
    uncached = bench.daemon(f"-postgres.address={dsn}", "-cache.ttl=0")
    daemon = bench.daemon(f"-postgres.address={dsn}")
    start([daemon.address], range(1000))
    for turn in range(bench.rounds):
        for name, calls in calls_of(turn, count).items():
            one = uncached if name == "first Get" else daemon
            found[name].append(
                checked(
                    [one],
                    METHODS[name],
                    lambda one=one, calls=calls: closed([one.address], calls, count, in_flight=in_flight),
                )
            )
        raw.append(asyncio.run(raw_ms(dsn, in_flight)))
    return found, raw


def calls_of(turn: int, count: int) -> dict[str, Iterator[Request]]:
    """Return the calls of one round by the names of METHODS; the first 1,000 sessions are there."""
    return {
        "first Get": iter(gets(range(1000)) * (count // 1000 + 1)),
        "Start": starts(1_000_000 * (turn + 1)),
        "SetValue": set_values(turn),
    }


def set_values(turn: int) -> Iterator[Request]:
    for number in counting():
        token = session(number % 1000).access_token
        yield request("SetValue", SetValueRequest(access_token=token, key="theme", value=f"{turn}.{number}"))


async def raw_ms(dsn: str, keys: int) -> float:
    """Return the median time of a read of so many sessions in one statement."""
    connection = await asyncpg.connect(dsn)
    wanted = [session(number).access_token.encode() for number in range(keys)]
    took_s = []
    for _ in range(300):
        begun_s = time.perf_counter()
        rows = await connection.fetch(SELECT, wanted)
        took_s.append(time.perf_counter() - begun_s)
        assert len(rows) == keys, f"{len(rows)} of {keys} sessions were read"
    await connection.close()
    return statistics.median(took_s) * 1000
