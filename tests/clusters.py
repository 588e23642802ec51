"""Several daemons on one database, as users run them, and callers that remember what went wrong."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from mnemosynerpc.session_pb2 import (
    AbandonRequest,
    ExistsRequest,
    GetRequest,
    Session,
    SetValueRequest,
    StartRequest,
)
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from networks import Network
from processes import Daemon
from secrecy import CANARY

SECRET = f"{CANARY}-a-secret-for-these-tests-only"
# A write waits up to two seconds for a node that was lost, and longer beside other tests.
CALL_TIMEOUT_S = 5.0
# The daemons' -cache.ttl.
MAX_STALE_S = 5.0
_CHANNEL_OPTIONS = (("grpc.max_reconnect_backoff_ms", 500), ("grpc.use_local_subchannel_pool", 1))


def _storage_flags(dsn: str) -> tuple[str, ...]:
    if dsn.startswith("redis"):
        return ("-storage=redis", f"-redis.address={dsn}")
    if dsn.startswith("mongodb"):
        return ("-storage=mongodb", f"-mongodb.address={dsn}")
    return (f"-postgres.address={dsn}", "-postgres.pool.size=4")


class Cluster:
    """Daemons that are one another's seeds."""

    def __init__(
        self,
        dsn: str,
        names: Sequence[str] | int,
        *flags: str,
        network: Network | None = None,
        secret: str = SECRET,
    ) -> None:
        """Start none yet; a number of names means loopback addresses."""
        self.secret = secret
        self.dsn = dsn
        self.flags = flags
        self.names = (
            [f"127.0.0.1:{port}" for port in free_ports(names)] if isinstance(names, int) else list(names)
        )
        self.daemons: dict[str, Daemon] = {}
        # Of single nodes: where they find the storage, and what their environment has besides.
        self.dsns: dict[str, str] = {}
        self.environs: dict[str, dict[str, str]] = {}
        self.seeds: Sequence[str] = self.names
        self._network = network

    def start(self, names: Iterable[str] | None = None) -> None:
        """Start these nodes, or all, at once, and wait until they serve."""
        started = [self.launch(name) for name in (self.names if names is None else names)]
        for daemon in started:
            daemon.serving()

    def launch(
        self, name: str, *flags: str, seeds: Sequence[str] | None = None, secret: str | None = None
    ) -> Daemon:
        """Start one node without waiting for it."""
        secret = self.secret if secret is None else secret
        host, _, port = name.rpartition(":")
        network = self._network
        daemon = Daemon(
            f"-host={host if network is None else network.addresses[host]}",
            f"-port={port}",
            *_storage_flags(self.dsns.get(name, self.dsn)),
            f"-cluster.listen={name}",
            f"-cluster.seeds={','.join(self.seeds if seeds is None else seeds)}",
            *([f"-cluster.secret={secret}"] if secret else []),
            *self.flags,
            *flags,
            environ=self.environs.get(name),
            prefix=() if network is None else network.inside(host),
        )
        self.daemons[name] = daemon
        return daemon

    def page(self, name: str, query: str = "") -> dict[str, Any]:
        """What the admin port shows of the cluster."""
        status, text = self.daemons[name].http(f"/debug/cluster{query}")
        assert status == 200
        page: dict[str, Any] = json.loads(text)
        return page

    def ring(self, name: str) -> list[str]:
        """The nodes by which this one routes, from its log: asking would slow it down."""
        for line in reversed(self.daemons[name].lines):
            if '"ring_changed"' in line:
                nodes: list[str] = json.loads(line)["nodes"]
                return nodes
        return [name]

    async def rings_equal(
        self, names: Sequence[str], *, on: Sequence[str] | None = None, within_s: float = 15.0
    ) -> float:
        """Wait until these nodes all route by exactly these; return how long that took."""
        wanted = sorted(names)
        lookers = names if on is None else on
        try:
            return await until(lambda: all(self.ring(name) == wanted for name in lookers), within_s)
        except AssertionError:
            found = {name: self.ring(name) for name in lookers}
            raise AssertionError(f"after {within_s} s not all have {wanted}: {found}") from None

    def signal(self, name: str, number: int) -> None:
        self.daemons[name].process.send_signal(number)

    def addresses(self, names: Iterable[str]) -> list[str]:
        """Where clients reach these nodes."""
        return [self.daemons[name].address for name in names]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for daemon in self.daemons.values():
            with suppress(ProcessLookupError):
                daemon.process.send_signal(signal.SIGCONT)
        for daemon in self.daemons.values():
            daemon.__exit__(*exc)


@dataclass
class Outcome:
    """What callers saw: (when it was made, how long it took), and every failure."""

    calls: list[tuple[float, float]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    # Gets of what had been replaced: (when they were made, how long after the write was acknowledged).
    stale: list[tuple[float, float]] = field(default_factory=list)

    @property
    def report(self) -> str:
        """The failures, each kind once with its count."""
        failed = (
            f"{len(self.failures)} of {len(self.calls)} calls failed {Counter(self.failures).most_common(5)}"
        )
        oldest_s = max((age_s for _, age_s in self.stale), default=0.0)
        return f"{failed}, {len(self.stale)} stale by up to {oldest_s:.1f} s"

    def percentile(self, share: float, *, since_s: float, until_s: float) -> float:
        """Return a percentile of the latencies, in seconds, of calls made in a span of time."""
        times = sorted(took for made, took in self.calls if since_s <= made < until_s)
        return times[min(len(times) - 1, int(share * len(times)))]


class Load:
    """Callers at a steady rate on the given nodes; what they know of their sessions is checked.

    Most calls are Gets; some start, change, look for and end sessions. With `watches_health` a node
    is called only while its health service says that it serves, as a load balancer does.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        rate: float = 500.0,
        sessions: int = 100,
        watches_health: bool = False,
    ) -> None:
        self.outcome = Outcome()
        self.addresses = list(addresses)
        self._watches_health = watches_health
        self._tasks: list[asyncio.Task[None]] = []
        self._rate = rate
        self._count = sessions
        self._bags: dict[str, dict[str, str]] = {}
        self._written_s: dict[str, float] = {}
        self._busy: set[str] = set()
        self._rng = random.Random(1)
        self._stubs: dict[str, Any] = {}
        self._channels: list[grpc.aio.Channel] = []

    async def __aenter__(self) -> Self:
        for address in self.addresses:
            self.add(address)
        await until(lambda: len(self._stubs) == len(self.addresses))
        for number in range(self._count):
            await self._start(number)
        self._tasks.append(asyncio.create_task(self._run()))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for channel in self._channels:
            await channel.close()

    def add(self, address: str) -> None:
        """Call this node too."""
        channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._channels.append(channel)
        if self._watches_health:
            self._tasks.append(asyncio.create_task(self._watch(address, channel)))
        else:
            self._stubs[address] = SessionManagerStub(channel)

    async def _watch(self, address: str, channel: grpc.aio.Channel) -> None:
        while True:
            with suppress(grpc.aio.AioRpcError):
                async for answer in HealthStub(channel).Watch(HealthCheckRequest()):
                    if answer.status == HealthCheckResponse.SERVING:
                        self._stubs[address] = SessionManagerStub(channel)
                    else:
                        self._stubs.pop(address, None)
            self._stubs.pop(address, None)
            await asyncio.sleep(0.1)

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            due_s, number = time.monotonic(), 0
            while True:
                due_s += 1 / self._rate
                await asyncio.sleep(max(0.0, due_s - time.monotonic()))
                number += 1
                group.create_task(self._call(number))

    async def _call(self, number: int) -> None:
        tokens = [token for token in self._bags if token not in self._busy]
        token = self._rng.choice(tokens)
        kind = number % 20
        made_s = time.monotonic()
        try:
            if kind == 0:
                await self._change(token, number)
            elif kind == 1:
                await self._replace(token, number)
            elif kind == 2:
                found = await self._stub().Exists(ExistsRequest(access_token=token), timeout=CALL_TIMEOUT_S)
                if not found.value and self._is_known(token):
                    self.outcome.failures.append("Exists: false")
            else:
                await self._read(token)
        except grpc.aio.AioRpcError as exc:
            if self._is_known(token):
                self.outcome.failures.append(f"{kind}: {exc.code().name} {exc.details()}")
        self.outcome.calls.append((made_s, time.monotonic() - made_s))

    def _stub(self) -> Any:  # noqa: ANN401  # grpc.aio types its stubs for the synchronous API
        return self._rng.choice(list(self._stubs.values()))

    def _is_known(self, token: str) -> bool:
        return token in self._bags and token not in self._busy

    async def _start(self, number: int) -> None:
        bag = {"n": f"{CANARY}-{number}"}
        request = StartRequest(session=Session(subject_id=f"s{number}", bag=bag))
        answer = await self._stub().Start(request, timeout=CALL_TIMEOUT_S)
        self._remember(answer.session.access_token, bag)

    def _remember(self, token: str, bag: dict[str, str]) -> None:
        self._bags[token] = bag
        self._written_s[token] = time.monotonic()

    async def _read(self, token: str) -> None:
        before, made_s = self._bags[token], time.monotonic()
        answer = await self._stub().Get(GetRequest(access_token=token), timeout=CALL_TIMEOUT_S)
        if self._bags.get(token) is before and self._is_known(token) and answer.session.bag != before:
            age_s = made_s - self._written_s[token]
            self.outcome.stale.append((made_s, age_s))
            if age_s > MAX_STALE_S:
                self.outcome.failures.append("Get: what was replaced longer ago than the cache's lifetime")

    async def _change(self, token: str, number: int) -> None:
        self._busy.add(token)
        try:
            request = SetValueRequest(access_token=token, key="n", value=f"{CANARY}-{number}")
            await self._stub().SetValue(request, timeout=CALL_TIMEOUT_S)
            self._remember(token, {"n": f"{CANARY}-{number}"})
        except grpc.aio.AioRpcError as exc:
            self.outcome.failures.append(f"SetValue: {exc.code().name} {exc.details()}")
            # It may have been done: from now on nothing is known of the session.
            del self._bags[token], self._written_s[token]
        finally:
            self._busy.discard(token)

    async def _replace(self, token: str, number: int) -> None:
        self._busy.add(token)
        try:
            await self._stub().Abandon(AbandonRequest(access_token=token), timeout=CALL_TIMEOUT_S)
            await self._start(number)
        except grpc.aio.AioRpcError as exc:
            self.outcome.failures.append(f"Abandon, Start: {exc.code().name} {exc.details()}")
        finally:
            del self._bags[token], self._written_s[token]
            self._busy.discard(token)


async def until(is_met: Callable[[], bool], within_s: float = 15.0) -> float:
    """Wait for a condition; return how long that took, in seconds."""
    began_s = time.monotonic()
    while not is_met():
        assert time.monotonic() - began_s < within_s, f"not within {within_s} s"
        await asyncio.sleep(0.005)
    return time.monotonic() - began_s


def free_ports(count: int) -> list[int]:
    """Return ports of which each next one, the admin port, is free too; each process of tests has its own."""
    found: list[int] = []
    while len(found) < count:
        port = next(_ports)
        try:
            for number in (port, port + 1):
                with socket.create_server(("127.0.0.1", number)):
                    pass
        except OSError:
            continue
        found.append(port)
    return found


def _own_ports() -> Iterator[int]:
    """Yield the even ports of this process's share again and again, from a random one on."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw5").removeprefix("gw"))
    share = range(20_000 + worker % 6 * 2_000, 22_000 + worker % 6 * 2_000, 2)
    start = random.randrange(len(share))
    for number in itertools.count(start):
        yield share[number % len(share)]


_ports = _own_ports()
