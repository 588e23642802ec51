"""Do to a cluster what the tests do once, many times, and measure it: `make drill ARGS='kill -n 20'`."""

from __future__ import annotations

import argparse
import asyncio
import math
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import grpc
from mnemosynerpc.session_pb2 import GetRequest, Session, StartRequest
from mnemosynerpc.session_pb2_grpc import SessionManagerStub

# First: tests/ has a folder of this name.
from mnemosyned.embedded.server import EmbeddedPostgres

sys.path.insert(0, str(Path(__file__).parents[1]))

import scenarios
from clusters import Cluster
from networks import IS_POSSIBLE, Network, Relay
from scenarios import Loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=sorted(CASES))
    parser.add_argument("-n", "--runs", type=int, default=5)
    arguments = parser.parse_args()
    asyncio.run(CASES[arguments.case](arguments.runs))


async def kill(runs: int) -> None:
    """One of five nodes is killed under load."""
    losses = []
    async with loopback(5) as cluster:
        for name in turns(cluster, runs):
            losses.append(await scenarios.lose(cluster, name))
            show(losses[-1])
            await asyncio.to_thread(cluster.daemons[name].end)
            await restarted(cluster, name)
    sum_up(losses)


async def stop(runs: int) -> None:
    """One of five nodes stands still for 10 s under load."""
    losses = []
    async with loopback(5) as cluster:
        for name in turns(cluster, runs):
            losses.append(await scenarios.lose(cluster, name, number=signal.SIGSTOP, hold_s=10.0))
            show(losses[-1])
    sum_up(losses)


async def crash(runs: int) -> None:
    """One of 3 to 9 idle nodes is killed: how long until it is in no ring."""
    removed_s = []
    for count in (3, 5, 7, 9):
        async with loopback(count) as cluster:
            for name in turns(cluster, math.ceil(runs / 4)):
                others = [other for other in cluster.names if other != name]
                cluster.signal(name, signal.SIGKILL)
                removed_s.append(await cluster.rings_equal(others))
                await asyncio.to_thread(cluster.daemons[name].end)
                await restarted(cluster, name)
        print(f"{count} nodes: {spread(removed_s[-math.ceil(runs / 4) :])}", flush=True)
    print(f"removed after {spread(removed_s)}")


async def rolling(runs: int) -> None:
    """Each of five nodes is stopped and started in turn under load."""
    async with loopback(5) as cluster:
        for _ in range(runs):
            outcome = await scenarios.restart_each(cluster)
            print(outcome.report, flush=True)


async def silence(runs: int) -> None:
    """One of five hosts falls silent under load."""
    losses = []
    async with hosts(5) as (cluster, network):
        for name in turns(cluster, runs):
            losses.append(await scenarios.silence(cluster, network, name))
            show(losses[-1])
    sum_up(losses)


async def part(runs: int) -> None:
    """Three of five hosts lose the other two for a minute under load."""
    losses = []
    async with hosts(5) as (cluster, network):
        for _ in range(runs):
            groups = (cluster.names[:3], cluster.names[3:])
            losses.append(await scenarios.part(cluster, network, groups, hold_s=60.0))
            show(losses[-1])
    sum_up(losses)


async def move(runs: int) -> None:
    """A killed node comes back under its name at another address."""
    async with hosts(5) as (cluster, network):
        took_s = [await scenarios.move(cluster, network, name) for name in turns(cluster, runs)]
    print(f"all route to the new address {spread(took_s)} after the new process was started")


async def boot(runs: int) -> None:
    """Nine nodes are started at once on an empty database."""
    took_s, agreed_s = [], []
    for _ in range(runs):
        with database() as dsn, Cluster(dsn, 9) as cluster:
            took, agreed = await scenarios.start_all(cluster)
            took_s.append(took)
            agreed_s.append(agreed)
    print(f"all rings equal {spread(took_s)} after the start, {spread(agreed_s)} after the last listened")


async def idle(runs: int) -> None:
    """Nine nodes without callers, against one alone: traffic and CPU time of a node, over 30 s each."""
    for _ in range(runs):
        async with loopback(9) as cluster:
            nine = await scenarios.idle(cluster, 30.0)
        async with loopback(1) as cluster:
            (alone,) = await scenarios.idle(cluster, 30.0)
        payload = statistics.mean(one.payload_bytes_s for one in nine) / 1000
        cores = statistics.mean(one.cores for one in nine)
        print(f"{payload:.2f} KB/s of gossip; {cores:.2%} of a core a node, {alone.cores:.2%} when alone")


async def stall(runs: int) -> None:
    """One of five nodes stands still 500 ms every 2 s, the other core busy, for ten minutes."""
    async with loopback(5) as cluster:
        for name in turns(cluster, runs):
            print(f"{await scenarios.stall(cluster, name, 600.0)} false deaths in ten minutes", flush=True)


async def forward(runs: int) -> None:
    """Gets that the called node owns, and that its peer owns, in turn."""
    async with loopback(2) as cluster:
        (address, _), name = cluster.addresses(cluster.names), cluster.names[0]
        async with grpc.aio.insecure_channel(address) as channel:
            stub = SessionManagerStub(channel)
            local, remote = await tokens_by_owner(cluster, name, stub)
            for _ in range(runs):
                here_s, there_s = [], []
                for number in range(1000):
                    here_s.append(await timed(stub, local[number % len(local)]))
                    there_s.append(await timed(stub, remote[number % len(remote)]))
                here_ms, there_ms = (1000 * statistics.median(times) for times in (here_s, there_s))
                added_ms = there_ms - here_ms
                print(
                    f"local {here_ms:.3f} ms, forwarded {there_ms:.3f} ms: {added_ms:.3f} ms more", flush=True
                )


async def tokens_by_owner(
    cluster: Cluster, name: str, stub: SessionManagerStub
) -> tuple[list[str], list[str]]:
    local: list[str] = []
    remote: list[str] = []
    while min(len(local), len(remote)) < 10:
        new = StartRequest(session=Session(subject_id="s", bag={"name": "Ada Lovelace"}))
        token = (await stub.Start(new)).session.access_token
        (local if cluster.page(name, f"?token={token}")["owner"] == name else remote).append(token)
    return local, remote


async def timed(stub: SessionManagerStub, token: str) -> float:
    began_s = time.perf_counter()
    await stub.Get(GetRequest(access_token=token))
    return time.perf_counter() - began_s


@asynccontextmanager
async def loopback(count: int) -> AsyncIterator[Cluster]:
    with database() as dsn, Cluster(dsn, count) as cluster:
        await asyncio.to_thread(cluster.start)
        await cluster.rings_equal(cluster.names)
        yield cluster


@asynccontextmanager
async def hosts(count: int) -> AsyncIterator[tuple[Cluster, Network]]:
    if not IS_POSSIBLE:
        raise SystemExit("this needs root, ip and nft")
    with database() as dsn, Network([f"n{number}" for number in range(count)]) as network:
        port = urlsplit(dsn).port
        assert port is not None
        with Relay(network.address, port) as relay:
            relayed = dsn.replace(f"127.0.0.1:{port}", f"{network.address}:{relay.port}")
            with Cluster(relayed, [f"{host}:7000" for host in network.addresses], network=network) as cluster:
                await asyncio.to_thread(cluster.start)
                await cluster.rings_equal(cluster.names)
                yield cluster, network


@contextmanager
def database() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as directory, EmbeddedPostgres.start(Path(directory)) as server:
        yield server.dsn


async def restarted(cluster: Cluster, name: str) -> None:
    await asyncio.to_thread(cluster.start, [name])
    await cluster.rings_equal(cluster.names)


def turns(cluster: Cluster, runs: int) -> Sequence[str]:
    return [cluster.names[number % len(cluster.names)] for number in range(runs)]


def show(loss: Loss) -> None:
    p99_ms = 1000 * loss.first_second_p99_s
    rejoined = f", equal again after {loss.rejoined_s:.2f} s" if loss.rejoined_s else ""
    print(
        f"{loss.outcome.report}; removed after {loss.removed_s:.2f} s{rejoined}; p99 {p99_ms:.0f} ms",
        flush=True,
    )


def sum_up(losses: Sequence[Loss]) -> None:
    failed = sum(len(loss.outcome.failures) for loss in losses)
    calls = sum(len(loss.outcome.calls) for loss in losses)
    print(f"{failed} of {calls} calls failed in {len(losses)} runs")
    print(f"removed after {spread([loss.removed_s for loss in losses])}")
    print(f"p99 of the first second {spread([loss.first_second_p99_s for loss in losses])}")
    if any(loss.rejoined_s for loss in losses):
        print(f"equal again after {spread([loss.rejoined_s for loss in losses])}")


def spread(seconds: Sequence[float]) -> str:
    ordered = sorted(seconds)
    p95 = ordered[min(len(ordered) - 1, math.ceil(0.95 * len(ordered)) - 1)]
    return f"{statistics.median(ordered):.3f} s (median), {p95:.3f} (95 %), {ordered[-1]:.3f} (most)"


CASES: dict[str, Callable[[int], Awaitable[None]]] = {
    case.__name__: case
    for case in (boot, crash, forward, idle, kill, move, part, rolling, silence, stall, stop)
}

if __name__ == "__main__":
    main()
