"""Calls that one node answers from its cache, against a bare echo of an answer of the same size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle

from google.protobuf.empty_pb2 import Empty
from load import Outcome, Request, closed, request
from mnemosynerpc.session_pb2 import ExistsRequest
from results import Curve, Result

from rows.setting import ANSWER_BYTES, Bench, Server, at_random, checked, gets, rss_kb, server, session, start


def one_token(bench: Bench) -> Iterator[Result]:
    """A cached Get of one token, 64 callers: CPU a call, and calls a second of one core."""
    echo, daemon = bench.echo(ANSWER_BYTES), bench.daemon("-storage=memory")
    start([daemon.address], range(1))
    call, count = gets(range(1)), bench.scaled(60_000)
    bare: list[tuple[float, Outcome]] = []
    own: list[tuple[float, Outcome]] = []
    for _ in range(bench.rounds):
        bare.append(cost(echo, call, count))
        own.append(
            server(daemon).cpu_us(
                lambda: checked([daemon], "Get", lambda: closed([daemon.address], cycle(call), count))
            )
        )
    yield Result(
        name="cached Get, one token",
        unit="us",
        values=[one[0] for one in own],
        limit="echo",
        limits=[one[0] for one in bare],
        note="the goal is against the Go original, which is not here",
    )
    yield Result(
        name="the same, calls",
        unit="a second",
        values=[one[1].rate for one in own],
        is_more_better=True,
        note="the load's core may be the limit",
    )


def many_tokens(bench: Bench) -> Iterator[Result]:
    """A cached Get of 1,000 tokens at random, against one of one token."""
    daemon = bench.daemon("-storage=memory")
    start([daemon.address], range(1000))
    calls, count = gets(range(1000)), bench.scaled(60_000)
    rounds = [
        (cost(server(daemon), calls[:1], count)[0], cost(server(daemon), calls, count)[0])
        for _ in range(bench.rounds)
    ]
    yield Result(
        name="cached Get, 1,000 tokens at random",
        unit="us",
        values=[many for _, many in rounds],
        limit="one token",
        limits=[one for one, _ in rounds],
        note="the goal is against the Go original, which is not here",
    )


def other_methods(bench: Bench) -> Iterator[Result]:
    """Context and Exists from the cache, against a Get."""
    daemon = bench.daemon("-storage=memory")
    start([daemon.address], range(1))
    token, count = session(0).access_token, bench.scaled(60_000)
    calls = {
        "Context": request("Context", Empty(), ("authorization", token)),
        "Exists": request("Exists", ExistsRequest(access_token=token)),
    }
    costs: dict[str, list[float]] = {name: [] for name in ("Get", *calls)}
    for _ in range(bench.rounds):
        costs["Get"].append(cost(server(daemon), gets(range(1)), count)[0])
        for name, call in calls.items():
            costs[name].append(cost(server(daemon), [call], count)[0])
    for name in calls:
        yield Result(
            name=f"{name}, cached", unit="us", values=costs[name], limit="Get", limits=costs["Get"], goal=1.05
        )


def many_sessions(bench: Bench) -> Iterator[Result | Curve]:
    """A cached Get by the number of sessions, and what each takes of memory."""
    sizes = [1_000, 10_000, bench.scaled(100_000, 30_000), *([] if bench.is_quick else [1_000_000])]
    daemon = bench.daemon("-storage=memory", f"-cache.size={sizes[-1]}", "-cache.bytes=4GiB")
    points: list[tuple[float, float]] = []
    found: dict[int, list[float]] = {}
    done, empty_kb = 0, rss_kb(daemon.process.pid)
    for size in sizes:
        start([daemon.address], range(done, size))
        done = size
        calls = gets(range(0, size, max(1, size // 20_000)))
        found[size] = [cost(server(daemon), calls, bench.scaled(60_000))[0] for _ in range(bench.rounds)]
        points.append((size, sorted(found[size])[bench.rounds // 2]))
    yield Result(
        name=f"cached Get of {sizes[-1]:,} sessions",
        unit="us",
        values=found[sizes[-1]],
        limit="of 1,000",
        limits=found[1_000],
        goal=1.2,
    )
    yield Result(
        name="memory a session, with the storage's own",
        unit="KB",
        values=[(rss_kb(daemon.process.pid) - empty_kb) / sizes[-1]],
        note="the store in memory has its part in it",
    )
    yield Curve(
        name="cost by sessions", x="sessions", y="µs of CPU a Get", points={"cached Get": points}, is_log=True
    )


def cost(one: Server, calls: Sequence[Request], count: int) -> tuple[float, Outcome]:
    """Return the CPU that each of these calls costs, in a random sequence, and the outcome."""
    return one.cpu_us(lambda: closed([one.address], at_random(calls), count))
