"""What may happen to a cluster, with load on it and what is to be measured; for tests and the drill."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from clusters import Cluster, Load, Outcome
from networks import Network
from prometheus_client.parser import text_string_to_metric_families


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What callers saw of a node's end, and how long the others went on routing to it."""

    outcome: Outcome
    removed_s: float
    first_second_p99_s: float
    rejoined_s: float = 0.0


async def lose(cluster: Cluster, name: str, *, number: int = signal.SIGKILL, hold_s: float = 0.0) -> Loss:
    """Send a node a signal while the others are called; continue it after `hold_s`, unless that is 0."""
    others = [other for other in cluster.names if other != name]
    async with Load(cluster.addresses(others)) as load:
        await asyncio.sleep(1.0)
        since_s = time.monotonic()
        cluster.signal(name, number)
        removed_s = await cluster.rings_equal(others)
        await asyncio.sleep(max(2.0, hold_s) - removed_s)
        rejoined_s = 0.0
        if hold_s:
            cluster.signal(name, signal.SIGCONT)
            rejoined_s = await cluster.rings_equal(cluster.names)
            await asyncio.sleep(1.0)
    p99_s = load.outcome.percentile(0.99, since_s=since_s, until_s=since_s + 1.0)
    return Loss(
        outcome=load.outcome,
        removed_s=removed_s,
        first_second_p99_s=p99_s,
        rejoined_s=rejoined_s,
    )


async def restart_each(cluster: Cluster) -> Outcome:
    """Stop and start each node in turn, while those are called that say they serve."""
    async with Load(cluster.addresses(cluster.names), watches_health=True) as load:
        await asyncio.sleep(1.0)
        for name in cluster.names:
            assert await asyncio.to_thread(cluster.daemons[name].stop) == 0
            await cluster.rings_equal([other for other in cluster.names if other != name])
            await asyncio.to_thread(cluster.launch(name).serving)
            await cluster.rings_equal(cluster.names)
        await asyncio.sleep(1.0)
    return load.outcome


async def roll_out(cluster: Cluster, network: Network) -> Outcome:
    """Replace each node, the last first, as a StatefulSet does: its name stays, its address does not.

    Those are called that say they serve, as endpoints of a Service are.
    """
    async with Load(cluster.addresses(cluster.names), watches_health=True) as load:
        await asyncio.sleep(0.5)
        for name in reversed(cluster.names):
            assert await asyncio.to_thread(cluster.daemons[name].stop) == 0
            await asyncio.to_thread(network.move, name.partition(":")[0])
            await asyncio.to_thread(cluster.launch(name).serving)
            load.add(cluster.daemons[name].address)
            await cluster.rings_equal(cluster.names)
        await asyncio.sleep(0.5)
    return load.outcome


async def silence(cluster: Cluster, network: Network, name: str) -> Loss:
    """Cut a node's host off, while the others are called."""
    host = name.partition(":")[0]
    hosts = [other for other in network.addresses if other != host]
    others = [other for other in cluster.names if other != name]
    async with Load(cluster.addresses(others)) as load:
        await asyncio.sleep(1.0)
        since_s = time.monotonic()
        await asyncio.to_thread(network.separate, [host], hosts)
        removed_s = await cluster.rings_equal(others)
        await asyncio.sleep(0.5)
        await asyncio.to_thread(network.join)
        rejoined_s = await cluster.rings_equal(cluster.names, within_s=30.0)
    p99_s = load.outcome.percentile(0.99, since_s=since_s, until_s=since_s + 1.0)
    return Loss(
        outcome=load.outcome,
        removed_s=removed_s,
        first_second_p99_s=p99_s,
        rejoined_s=rejoined_s,
    )


async def part(
    cluster: Cluster, network: Network, groups: tuple[Sequence[str], Sequence[str]], *, hold_s: float
) -> Loss:
    """Put a wall through the cluster for a while; both sides are called throughout."""
    some, others = ([name.partition(":")[0] for name in group] for group in groups)
    async with Load(cluster.addresses(cluster.names), rate=200.0) as load:
        since_s = time.monotonic()
        await asyncio.to_thread(network.separate, some, others)
        for group in groups:
            # The smaller one has too few to confirm its suspicions soon.
            await cluster.rings_equal(group, within_s=40.0)
        removed_s = time.monotonic() - since_s
        await asyncio.sleep(max(0.0, hold_s - removed_s))
        await asyncio.to_thread(network.join)
        rejoined_s = await cluster.rings_equal(cluster.names, within_s=40.0)
        await asyncio.sleep(1.0)
    p99_s = load.outcome.percentile(0.99, since_s=since_s, until_s=since_s + 1.0)
    return Loss(
        outcome=load.outcome,
        removed_s=removed_s,
        first_second_p99_s=p99_s,
        rejoined_s=rejoined_s,
    )


async def move(cluster: Cluster, network: Network, name: str) -> float:
    """Kill a node and start it under its name at another address; return when all route to it there.

    In seconds from the start of the new process.
    """
    host = name.partition(":")[0]
    cluster.signal(name, signal.SIGKILL)
    await asyncio.to_thread(cluster.daemons[name].end)
    await asyncio.to_thread(network.move, host)
    since_s = time.monotonic()
    await asyncio.to_thread(cluster.launch(name).serving)
    wanted = network.addresses[host]

    def routes_there(other: str) -> bool:
        members = {one["name"]: one for one in cluster.page(other)["members"]}
        member = members.get(name, {"address": "", "status": ""})
        return bool(member["address"].startswith(f"{wanted}:") and member["status"] == "active")

    for other in cluster.names:
        while not await asyncio.to_thread(routes_there, other):
            assert time.monotonic() - since_s < 15.0, f"{other} does not know the new address"
            await asyncio.sleep(0.02)
    await cluster.rings_equal(cluster.names)
    return time.monotonic() - since_s


async def start_all(cluster: Cluster) -> tuple[float, float]:
    """Start all nodes at once; return when all route alike: since the first, and since the last listened."""
    since_s = time.monotonic()
    started = [cluster.launch(name) for name in cluster.names]
    for daemon in started:
        await asyncio.to_thread(daemon.serving)
    serving_s = time.monotonic()
    await cluster.rings_equal(cluster.names, within_s=20.0)
    now_s = time.monotonic()
    return now_s - since_s, now_s - serving_s


@dataclass(frozen=True, kw_only=True)
class Idle:
    """What a node costs that does nothing but gossip."""

    payload_bytes_s: float
    cores: float


async def idle(cluster: Cluster, seconds: float) -> list[Idle]:
    """Let the nodes be for a while; return what each has sent and received, and its CPU time."""
    before = {name: _spent(cluster, name) for name in cluster.names}
    await asyncio.sleep(seconds)
    after = {name: _spent(cluster, name) for name in cluster.names}
    spent = [(after[name][0] - before[name][0], after[name][1] - before[name][1]) for name in cluster.names]
    return [Idle(payload_bytes_s=sent / seconds, cores=cpu_s / seconds) for sent, cpu_s in spent]


def _spent(cluster: Cluster, name: str) -> tuple[float, float]:
    _, text = cluster.daemons[name].http("/metrics")
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    sent = sum(one.value for one in samples if one.name == "mnemosyned_cluster_gossip_bytes_total")
    fields = Path(f"/proc/{cluster.daemons[name].process.pid}/stat").read_text().rpartition(")")[2].split()
    return sent, (int(fields[11]) + int(fields[12])) / 100


async def stall(cluster: Cluster, name: str, seconds: float) -> int:
    """Stop a node for 500 ms every 2 s while another process is busy; return the deaths that others saw."""
    busy = await asyncio.create_subprocess_exec("python3", "-c", "while True: pass")
    try:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            await asyncio.sleep(1.5)
            cluster.signal(name, signal.SIGSTOP)
            await asyncio.sleep(0.5)
            cluster.signal(name, signal.SIGCONT)
    finally:
        busy.kill()
        await busy.wait()
    return sum(line.count('"member_dead"') for daemon in cluster.daemons.values() for line in daemon.lines)
