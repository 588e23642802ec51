"""Several daemons on one database, as users run them, and callers that remember what went wrong."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

import grpc
from mnemosynerpc.session_pb2 import (
    AbandonRequest,
    ExistsRequest,
    GetRequest,
    Session,
    SetValueRequest,
    StartRequest,
)
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from processes import Daemon

SECRET = "a-secret-for-these-tests-only"
CALL_TIMEOUT_S = 3.0


class Cluster:
    """Daemons that are one another's seeds; each is listening before the next is started, or all at once."""

    def __init__(self, dsn: str, count: int, *flags: str) -> None:
        self.dsn = dsn
        self.flags = flags
        self.addresses = [f"127.0.0.1:{port}" for port in free_ports(count)]
        self.daemons: dict[str, Daemon] = {}

    def start(self, addresses: Iterable[str] | None = None) -> None:
        """Start these nodes, or all, at once."""
        for address in self.addresses if addresses is None else addresses:
            self.launch(address)
        for daemon in self.daemons.values():
            if not hasattr(daemon, "address"):
                daemon.serving()

    def launch(self, address: str, *flags: str) -> Daemon:
        """Start one node without waiting for it."""
        daemon = Daemon(
            f"-port={address.rpartition(':')[2]}",
            f"-postgres.address={self.dsn}",
            "-postgres.pool.size=4",
            f"-cluster.listen={address}",
            f"-cluster.seeds={','.join(self.addresses)}",
            f"-cluster.secret={SECRET}",
            *self.flags,
            *flags,
        )
        self.daemons[address] = daemon
        return daemon

    def page(self, address: str, query: str = "") -> dict[str, Any]:
        """What the node's operator sees."""
        status, text = self.daemons[address].http(f"/debug/cluster{query}")
        assert status == 200
        page: dict[str, Any] = json.loads(text)
        return page

    def ring(self, address: str) -> list[str]:
        nodes: list[str] = self.page(address)["ring"]["nodes"]
        return nodes

    def wait_for_rings(
        self, nodes: Sequence[str], *, on: Sequence[str] | None = None, within_s: float = 15.0
    ) -> float:
        """Wait until these nodes all route by exactly these; return how long that took."""
        began_s = time.monotonic()
        wanted = sorted(nodes)
        for address in nodes if on is None else on:
            while (found := self.ring(address)) != wanted:
                assert time.monotonic() - began_s < within_s, f"{address} has {found}, not {wanted}"
                time.sleep(0.02)
        return time.monotonic() - began_s

    def kill(self, address: str, number: int = signal.SIGKILL) -> None:
        self.daemons[address].process.send_signal(number)

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

    def percentile(self, share: float, *, since_s: float, until_s: float) -> float:
        """Return a percentile of the latencies, in seconds, of calls made in a span of time."""
        times = sorted(took for made, took in self.calls if since_s <= made < until_s)
        return times[min(len(times) - 1, int(share * len(times)))]


class Load:
    """Callers at a steady rate on the given nodes; what they know of their sessions is checked.

    Most calls are Gets; some start, change, look for and end sessions.
    """

    def __init__(self, addresses: Sequence[str], *, rate: float = 500.0, sessions: int = 100) -> None:
        self.outcome = Outcome()
        self.addresses = list(addresses)
        self._rate = rate
        self._count = sessions
        self._bags: dict[str, dict[str, str]] = {}
        self._busy: set[str] = set()
        self._rng = random.Random(1)
        self._stubs: dict[str, Any] = {}
        self._channels: list[grpc.aio.Channel] = []

    async def __aenter__(self) -> Self:
        for address in self.addresses:
            self.add(address)
        for number in range(self._count):
            await self._start(number)
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        for channel in self._channels:
            await channel.close()

    def add(self, address: str) -> None:
        """Call this node too."""
        channel = grpc.aio.insecure_channel(
            address, options=[("grpc.max_reconnect_backoff_ms", 500), ("grpc.enable_retries", 1)]
        )
        self._channels.append(channel)
        self._stubs[address] = SessionManagerStub(channel)

    def remove(self, address: str) -> None:
        """Call this node no more, as a load balancer that has seen NOT_SERVING."""
        self._stubs.pop(address, None)

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
                is_known = token in self._bags and token not in self._busy
                self._expect("Exists: false", holds=found.value or not is_known)
            else:
                await self._read(token)
        except grpc.aio.AioRpcError as exc:
            if token in self._bags and token not in self._busy:
                self.outcome.failures.append(f"{kind}: {exc.code().name} {exc.details()}")
        self.outcome.calls.append((made_s, time.monotonic() - made_s))

    def _stub(self) -> Any:  # noqa: ANN401  # grpc.aio types its stubs for the synchronous API
        return self._rng.choice(list(self._stubs.values()))

    def _expect(self, text: str, *, holds: bool) -> None:
        if not holds:
            self.outcome.failures.append(text)

    async def _start(self, number: int) -> None:
        bag = {"n": str(number)}
        request = StartRequest(session=Session(subject_id=f"s{number}", bag=bag))
        answer = await self._stub().Start(request, timeout=CALL_TIMEOUT_S)
        self._bags[answer.session.access_token] = bag

    async def _read(self, token: str) -> None:
        before = dict(self._bags.get(token, {}))
        answer = await self._stub().Get(GetRequest(access_token=token), timeout=CALL_TIMEOUT_S)
        if before == self._bags.get(token) and token not in self._busy:
            bag = dict(answer.session.bag)
            self._expect(f"Get: {bag} for {before}", holds=bag == before)

    async def _change(self, token: str, number: int) -> None:
        self._busy.add(token)
        try:
            request = SetValueRequest(access_token=token, key="n", value=str(number))
            await self._stub().SetValue(request, timeout=CALL_TIMEOUT_S)
            self._bags[token] = {"n": str(number)}
        except grpc.aio.AioRpcError as exc:
            self.outcome.failures.append(f"SetValue: {exc.code().name} {exc.details()}")
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
            del self._bags[token]
            self._busy.discard(token)


async def until(is_met: Callable[[], bool], within_s: float = 15.0) -> float:
    """Wait for a condition, looked at off the loop; return how long that took."""
    began_s = time.monotonic()
    while not await asyncio.to_thread(is_met):
        assert time.monotonic() - began_s < within_s
        await asyncio.sleep(0.01)
    return time.monotonic() - began_s


def free_ports(count: int) -> list[int]:
    """Return ports of which each next one, the operator's, is free too."""
    found: list[int] = []
    rng = random.Random()
    while len(found) < count:
        port = rng.randrange(20_000, 32_000, 2)
        if port in found:
            continue
        try:
            for number in (port, port + 1):
                with socket.create_server(("127.0.0.1", number)):
                    pass
        except OSError:
            continue
        found.append(port)
    return found
