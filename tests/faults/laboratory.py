"""A cluster on a network of its own with a storage of its own, and hands that break each of them."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self
from urllib.parse import urlsplit

import grpc
from certificates import Authority
from clocks import Clock
from clusters import Cluster, until
from faults.schedules import Fault, FaultKind
from faults.storages import STORAGES, Storage
from networks import STORAGE, Network, Relay
from secrecy import CANARY

CLOCKS: Final = frozenset({FaultKind.CLOCK, FaultKind.STORAGE_CLOCK})
_PORT: Final = 7000
_SPARE: Final = "spare"
_REJOIN_TIMEOUT_S: Final = 45.0
# Steps of clocks must not end sessions.
_TTL: Final = "-ttl=48h"
_PEER_NAME: Final = "node.cluster.example"
_CLIENT_NAME: Final = "client.example"
# After a fault, while connections are made again.
_RECOVERY_S: Final = 1.0
_MIRROR_HITS: Final = re.compile(r"^mnemosyned_mirror_hits_total (\S+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """How the daemons are run."""

    nodes: int = 3
    engine: str = "h2"
    has_tls: bool = False
    has_hmac: bool = False
    storage: str = "postgres"
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbance:
    """A time in which a node, or with no name the storage, may well fail its callers."""

    began_s: float
    ended_s: float
    node: str = ""


class Laboratory:
    """Nodes n0, n1, … and a spare host; `perform` does a fault from its begin to its end."""

    def __init__(self, directory: Path, variant: Variant, *, has_fake_clocks: bool = False) -> None:
        self.variant = variant
        self.names = [f"n{number}" for number in range(variant.nodes)]
        self.disturbances: list[Disturbance] = []
        self.spans: list[tuple[float, float]] = []  # of all faults
        self.credentials: grpc.ChannelCredentials | None = None
        self._context: ssl.SSLContext | None = None  # to ask the admin ports
        self.starting: set[str] = set()  # nodes that do not say yet that they serve
        self._directory = directory
        self._has_fake_clocks = has_fake_clocks
        self._clocks: dict[str, Clock] = {}
        self._stack = ExitStack()
        # Two faults of one node, or of the storage, would undo one another's end.
        self._locks: dict[str, asyncio.Lock] = {}

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _build(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._network = self._stack.enter_context(Network([*self.names, _SPARE]))
        if self._has_fake_clocks:
            names = [*self.names, _SPARE, STORAGE]
            self._clocks = {name: Clock(self._directory / f"clock-of-{name}") for name in names}
        with self._fake_clock(STORAGE):
            self._storage: Storage = STORAGES[self.variant.storage](
                self._directory, self._network.storage_address
            )
        self._stack.callback(self._storage.stop)
        # Each node has a relay of its own, so that its link alone can be slow.
        self._relays = {
            name: self._stack.enter_context(Relay(self._network.storage_address, self._storage.port))
            for name in [*self.names, _SPARE]
        }
        peers = [self._peer(name) for name in self.names]
        secret = f"{CANARY}-a-secret-of-the-laboratory"
        self.cluster = Cluster(self._storage.dsn, peers, *self._flags(), network=self._network, secret=secret)
        for name in [*self.names, _SPARE]:
            self.cluster.dsns[self._peer(name)] = self._dsn(name)
            self.cluster.environs[self._peer(name)] = self._clock_environ(name)
        self._stack.enter_context(self.cluster)
        self.cluster.start()

    def _peer(self, name: str) -> str:
        return f"{name}:{_PORT}"

    def _dsn(self, name: str) -> str:
        if self._storage.is_direct:
            return self._storage.dsn
        address = f"{self._network.storage_address}:{self._relays[name].port}"
        dsn = urlsplit(self._storage.dsn)
        user, at, _ = dsn.netloc.rpartition("@")
        return dsn._replace(netloc=f"{user}{at}{address}").geturl()

    def _flags(self) -> list[str]:
        flags = [_TTL, *self._storage.flags, f"-grpc.engine={self.variant.engine}", *self.variant.flags]
        if self.variant.has_hmac:
            file = self._directory / "token.key"
            file.write_text(f"{CANARY}-the-key-of-the-tokens-of-the-laboratory\n")
            flags += ["-token.protection=hmac", f"-token.key.file={file}"]
        if self.variant.has_tls:
            authority = Authority(self._directory / "authority")
            names = [_PEER_NAME, *self._network.addresses, *self._network.addresses.values()]
            flags += [*authority.flags(*names), f"-tls.peer-names={_PEER_NAME}", "-tls.client-auth=require"]
            self.credentials = authority.credentials(_CLIENT_NAME)
            self._context = ssl.create_default_context(cafile=str(authority.path))
        return flags

    def address(self, name: str) -> str:
        """Where clients call this node."""
        return f"{self._network.addresses[name]}:{_PORT}"

    def ring_is_whole(self) -> bool:
        """Tell whether all nodes route by all nodes."""
        wanted = sorted(self.cluster.names)
        return all(self.cluster.ring(name) == wanted for name in self.cluster.names)

    async def whole(self) -> None:
        """Wait until all nodes route by all nodes."""
        await self.cluster.rings_equal(self.cluster.names, within_s=_REJOIN_TIMEOUT_S)

    def mirror_hits(self) -> int:
        """Return how many calls the nodes have answered from mirrors, each since its process began."""
        found: list[str] = []
        for daemon in self.cluster.daemons.values():
            daemon.context = self._context
            # One that was removed does not answer.
            with suppress(OSError):
                found += _MIRROR_HITS.findall(daemon.http("/metrics")[1])
        return sum(int(float(hits)) for hits in found)

    async def perform(self, fault: Fault) -> None:
        """Do a fault and undo it; return when the nodes that it ended serve again."""
        began_s = time.monotonic()
        try:
            await self._hands[fault.kind](self, fault)
        finally:
            self.spans.append((began_s, time.monotonic() + _RECOVERY_S))

    @asynccontextmanager
    async def _holding(self, *names: str) -> AsyncIterator[None]:
        """Hold nodes, or the storage, for one fault."""
        async with AsyncExitStack() as held:
            for name in sorted(names):
                await held.enter_async_context(self._locks.setdefault(name, asyncio.Lock()))
            yield

    @asynccontextmanager
    async def _disturbing(self, *names: str) -> AsyncIterator[None]:
        """Hold nodes, or the storage, for one fault, and note how long they are disturbed."""
        async with self._holding(*names):
            began_s = time.monotonic()
            try:
                yield
            finally:
                ended_s = time.monotonic() + _RECOVERY_S
                self.disturbances += [
                    Disturbance(began_s=began_s, ended_s=ended_s, node="" if name == STORAGE else name)
                    for name in names
                ]

    async def _kill(self, fault: Fault) -> None:
        name = self.names[fault.nodes[0]]
        async with self._disturbing(name):
            daemon = self.cluster.daemons[self._peer(name)]
            daemon.process.kill()
            await asyncio.to_thread(daemon.end)
            await asyncio.sleep(fault.lasts_s)
            await self._start(name)

    async def _start(self, name: str) -> None:
        self.starting.add(name)
        daemon = self.cluster.launch(self._peer(name))
        await asyncio.to_thread(daemon.listening)
        # The storage may be broken at the same time.
        with suppress(AssertionError):
            await asyncio.to_thread(daemon.serving)
        self.starting.discard(name)

    async def _stop(self, fault: Fault) -> None:
        name = self.names[fault.nodes[0]]
        async with self._disturbing(name):
            for number in range(fault.times):
                if number:
                    await asyncio.sleep(fault.lasts_s)
                self.cluster.signal(self._peer(name), signal.SIGSTOP)
                await asyncio.sleep(fault.lasts_s)
                self.cluster.signal(self._peer(name), signal.SIGCONT)

    async def _wall(self, fault: Fault) -> None:
        pairs = [(self.names[one], self.names[other]) for one in fault.nodes for other in fault.others]
        if fault.kind is not FaultKind.ONE_WAY:
            pairs += _turned(pairs)
        for number in range(fault.times):
            if number:
                await asyncio.sleep(fault.lasts_s)
            await self._lose(pairs, fault)

    async def _lose(self, pairs: Sequence[tuple[str, str]], fault: Fault) -> None:
        percent = int(fault.amount) if fault.kind is FaultKind.LOSSY else 100
        await asyncio.to_thread(self._network.lose, pairs, percent)
        try:
            await asyncio.sleep(fault.lasts_s)
        finally:
            self._network.keep(pairs, percent)

    async def _storage_cut(self, fault: Fault) -> None:
        name = self.names[fault.nodes[0]]
        # Nothing is disturbed: the other nodes can answer in this one's place.
        async with self._holding(name):
            await self._lose([(name, STORAGE), (STORAGE, name)], fault)

    async def _isolate(self, fault: Fault) -> None:
        name = self.names[fault.nodes[0]]
        pairs = [(name, other) for other in [*self.names, STORAGE] if other != name]
        async with self._disturbing(name):
            await self._lose([*pairs, *_turned(pairs)], fault)

    async def _slow(self, fault: Fault) -> None:
        name = self.names[fault.nodes[0]]
        relay = self._relays[name]
        async with self._disturbing(name):
            relay.delay_s = fault.amount
            await asyncio.sleep(fault.lasts_s)
            relay.delay_s = 0.0
            relay.cut()

    async def _storage_restart(self, fault: Fault) -> None:
        async with self._disturbing(STORAGE):
            self._storage.end(is_killed=bool(int(fault.lasts_s * 100) % 2))
            await until(self._storage.has_ended)
            await asyncio.sleep(fault.lasts_s)
            await asyncio.to_thread(self._restart_storage)

    def _restart_storage(self) -> None:
        with self._fake_clock(STORAGE):
            self._storage.restart()

    async def _storage_freeze(self, fault: Fault) -> None:
        async with self._disturbing(STORAGE):
            self._storage.signal(signal.SIGSTOP)
            try:
                await asyncio.sleep(fault.lasts_s)
            finally:
                self._storage.signal(signal.SIGCONT)

    async def _failover(self, fault: Fault) -> None:
        async with self._disturbing(STORAGE):
            await asyncio.to_thread(self._make_copy)
            self._storage.end(is_killed=True)
            await until(self._storage.has_ended)
            await asyncio.sleep(fault.lasts_s)
            await asyncio.to_thread(self._storage.promote_copy)
            for relay in self._relays.values():
                relay.point_to(self._storage.port)

    def _make_copy(self) -> None:
        with self._fake_clock(STORAGE):
            self._storage.make_copy()

    async def _rolling(self, fault: Fault) -> None:
        for name in self.names:
            async with self._disturbing(name):
                await asyncio.to_thread(self.cluster.daemons[self._peer(name)].stop)
                await asyncio.sleep(fault.lasts_s)
                await self._start(name)
            # As who rolls them out does, within reason: another fault may hold it up.
            with suppress(AssertionError):
                await self.cluster.rings_equal(self.cluster.names, within_s=5.0)

    async def _membership(self, fault: Fault) -> None:
        async with self._disturbing(_SPARE):
            await self._start(_SPARE)
            await asyncio.sleep(fault.lasts_s)
            await asyncio.to_thread(self.cluster.daemons[self._peer(_SPARE)].stop)

    async def _lossy(self, fault: Fault) -> None:
        name = self.names[fault.nodes[0]]
        pairs = [(name, other) for other in [*self.names, STORAGE] if other != name]
        async with self._disturbing(name):
            await self._lose([*pairs, *_turned(pairs)], fault)

    async def _clock(self, fault: Fault) -> None:
        name = self.names[fault.nodes[0]] if fault.nodes else STORAGE
        async with self._disturbing(name):
            self._clocks[name].step(fault.amount)
            await asyncio.sleep(fault.lasts_s)
            self._clocks[name].step(0.0)

    def _clock_environ(self, name: str) -> dict[str, str]:
        return self._clocks[name].environ if self._has_fake_clocks else {}

    @contextmanager
    def _fake_clock(self, name: str) -> Iterator[None]:
        """Have programs that are started meanwhile go by this clock."""
        environ = self._clock_environ(name)
        os.environ.update(environ)
        try:
            yield
        finally:
            for key in environ:
                del os.environ[key]

    _hands: Final[dict[FaultKind, Callable[[Laboratory, Fault], Awaitable[None]]]] = {
        FaultKind.KILL: _kill,
        FaultKind.SHORT_STOP: _stop,
        FaultKind.STOP: _stop,
        FaultKind.STALL: _stop,
        FaultKind.PART: _wall,
        FaultKind.ONE_WAY: _wall,
        FaultKind.FLICKER: _wall,
        FaultKind.STORAGE_CUT: _storage_cut,
        FaultKind.ISOLATE: _isolate,
        FaultKind.STORAGE_RESTART: _storage_restart,
        FaultKind.STORAGE_FREEZE: _storage_freeze,
        FaultKind.FAILOVER: _failover,
        FaultKind.ROLLING: _rolling,
        FaultKind.MEMBERSHIP: _membership,
        FaultKind.LOSSY: _lossy,
        FaultKind.SLOW: _slow,
        FaultKind.CLOCK: _clock,
        FaultKind.STORAGE_CLOCK: _clock,
    }


def _turned(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(target, source) for source, target in pairs]
