"""List: pages of a quiet node, at any depth, and while touches wait; and how touches are written."""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import Iterator

import asyncpg
import grpc
from load import open_loop
from mnemosynerpc.session_pb2 import ListRequest
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from results import Result

from mnemosyned.sessions.model import Criteria
from mnemosyned.sessions.page_token import PageToken
from rows.filling import fill_in_sequence
from rows.setting import Bench, at_random, cpu_ns, gets, start

COUNTERS = "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'session'"
GET_RATE = 10_000.0


def pages(bench: Bench) -> Iterator[Result]:
    """List of 100 and of 1,000: CPU of the node for each call."""
    daemon = bench.daemon(f"-postgres.address={bench.postgres()}")
    start([daemon.address], range(2000))
    with daemon.stub() as stub:
        for limit, goal in ((100, 0.25), (1000, 2.0)):
            costs = []
            for _ in range(bench.rounds):
                before = cpu_ns(daemon.process.pid)
                for _ in range(20):
                    assert len(stub.List(ListRequest(limit=limit), timeout=10).sessions) == limit
                costs.append((cpu_ns(daemon.process.pid) - before) / 20 / 1e6)
            yield Result(name=f"List of {limit:,}, CPU", unit="ms", values=costs, goal=goal)


def deep_pages(bench: Bench) -> Iterator[Result]:
    """A page of 10 at depth 1,000,000 by its token, beside the first page of the walk."""
    dsn, depth = bench.postgres(), bench.scaled(1_000_000)
    daemon = bench.daemon(f"-postgres.address={dsn}")
    asyncio.run(fill_in_sequence(dsn, depth + 20_000))
    with daemon.stub() as stub:
        first = ListRequest(limit=10, page_token="")
        # As a walk that came so far has it: a page token names a place, and no state of a node.
        place = f"{depth:07}".encode()
        deep = ListRequest(limit=10, page_token=PageToken(start=place).encode(Criteria()))
        assert stub.List(deep, timeout=10).sessions[0].access_token.startswith(place.decode())
        took_ms: list[list[float]] = [[], []]
        for _ in range(bench.rounds):
            for request, medians in zip((deep, first), took_ms, strict=True):
                medians.append(statistics.median(_took_ms(stub, request) for _ in range(50)))
    yield Result(
        name=f"List at depth {depth:,}, by page token",
        unit="ms",
        values=took_ms[0],
        goal=20.0,
        note=f"the first page: {statistics.median(took_ms[1]):.2f} ms",
    )


def _took_ms(stub: SessionManagerStub, request: ListRequest) -> float:
    begun_s = time.perf_counter()
    assert len(stub.List(request, timeout=10).sessions) == 10
    return (time.perf_counter() - begun_s) * 1000


def under_touches(bench: Bench) -> Iterator[Result]:
    """List of 10 under 10,000 Gets a second of many sessions, and the touches that these cause."""
    dsn, sessions = bench.postgres(), bench.scaled(100_000, 10_000)
    daemon = bench.daemon(f"-postgres.address={dsn}", "-touch.interval=1s")
    start([daemon.address], range(sessions))
    calls, seconds = at_random(gets(range(sessions))), 5.0 if bench.is_quick else 15.0
    medians, worst = [], []
    before = asyncio.run(_counters(dsn))
    for _ in range(bench.rounds):
        is_over = threading.Event()
        took_s: list[float] = []
        lister = threading.Thread(target=_list_until, args=(daemon.address, is_over, took_s))
        lister.start()
        open_loop([daemon.address], calls, rate=GET_RATE, seconds=seconds)
        is_over.set()
        lister.join()
        medians.append(statistics.median(took_s) * 1000)
        worst.append(max(took_s) * 1000)
    yield Result(name="List of 10 under 10,000 Gets a second", unit="ms", values=medians, goal=10.0)
    yield Result(name="the same, the worst", unit="ms", values=worst)
    time.sleep(2.0)  # the last touches, and PostgreSQL's counters
    updates, hot = (now - was for now, was in zip(asyncio.run(_counters(dsn)), before, strict=True))
    if updates:
        share = [100 * hot / updates]
        yield Result(name="touches that are HOT", unit="%", values=share, goal=90.0, is_more_better=True)


def _list_until(address: str, is_over: threading.Event, took_s: list[float]) -> None:
    with grpc.insecure_channel(address) as channel:
        stub = SessionManagerStub(channel)
        while not is_over.wait(0.1):
            begun_s = time.perf_counter()
            stub.List(ListRequest(limit=10), timeout=30)
            took_s.append(time.perf_counter() - begun_s)


async def _counters(dsn: str) -> tuple[int, int]:
    connection = await asyncpg.connect(dsn)
    row = await connection.fetchrow(COUNTERS)
    await connection.close()
    return (0, 0) if row is None else (row[0], row[1])
