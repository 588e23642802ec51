"""Nodes of a cluster inside the test's own process: real engines on real sockets, any store behind them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import grpc
from clusters import SECRET, free_ports
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from prometheus_client import CollectorRegistry
from serving import ENGINES, LIFETIMES, OPTIONS

from cache.lru import Lru
from cache.read_through import ReadThrough
from cluster.peer_auth import PeerAuth
from mnemosyned.api import session_manager
from mnemosyned.api.router import carried
from mnemosyned.node import ClusterNode, NodeOptions, Sessions
from mnemosyned.observe.metrics import UpkeepMetrics
from mnemosyned.sessions.clock import StorageClock
from mnemosyned.sessions.encoded import EncodedSession
from mnemosyned.sessions.service import SessionService
from mnemosyned.sessions.store import SessionStore
from mnemosyned.sessions.touches import TouchWriter
from mnemosyned.storage.hashed import HashedStore
from mnemosyned.transport.methods import MethodTable


@dataclass(kw_only=True)
class Parts:
    address: str
    node: ClusterNode
    table: MethodTable
    calls: MethodTable  # what is forwarded here
    cache: ReadThrough[EncodedSession]
    services: tuple[SessionService, SessionService]
    stopped: asyncio.Event
    trust: PeerAuth


@dataclass(kw_only=True)
class Peer(Parts):
    channel: grpc.aio.Channel
    stub: SessionManagerStub
    run: Callable[[], None]  # joins now, where it has not


@asynccontextmanager
async def peering(
    store: SessionStore,
    engine_name: str = "h2corn",
    *,
    seeds: tuple[str, ...] = (),
    secrets: tuple[str, ...] = (SECRET,),
    label: str = "",
    runs: bool = True,
    prepare: Callable[[MethodTable], None] = lambda _: None,
) -> AsyncIterator[Peer]:
    """Run a node until it has joined, lend it, and take it down again; without `runs` it does not join.

    `prepare` may change what clients are served.
    """
    (port,) = free_ports(1)
    parts = _put_together(store, f"127.0.0.1:{port}", seeds, secrets, label)
    node = parts.node
    prepare(parts.table)
    engine = ENGINES[engine_name](parts.table, replace(OPTIONS, port=port))
    await engine.start()
    running: list[asyncio.Task[None]] = []
    run = lambda: running.append(asyncio.create_task(node.run()))  # noqa: E731
    try:
        if runs:
            run()
            async with asyncio.timeout(5):
                await node.has_joined.wait()
        async with grpc.aio.insecure_channel(parts.address) as channel:
            yield Peer(**vars(parts), channel=channel, stub=SessionManagerStub(channel), run=run)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await node.leave()
        await engine.drain()
        await node.announce_left()
        for service in parts.services:
            await service.close()


def _put_together(
    store: SessionStore,
    address: str,
    seeds: tuple[str, ...],
    secrets: tuple[str, ...],
    label: str,
) -> Parts:
    """Make the parts of a node, as the daemon does."""
    token_hasher = store.token_hasher if isinstance(store, HashedStore) else None
    cache: ReadThrough[EncodedSession] = ReadThrough(
        Lru(max_entries=1000, max_bytes=10_000_000),
        Lru(max_entries=1000, max_bytes=1_000_000),
        aliases=token_hasher,
    )
    lost = UpkeepMetrics(CollectorRegistry()).touches_lost
    touches = TouchWriter(store, max_waiting=100, lost=lost, on_gone=cache.drop)
    clock = StorageClock()
    options = NodeOptions(
        listen=address,
        seeds=seeds,
        label=label,
        secrets=secrets,
        max_message_bytes=OPTIONS.max_message_bytes,
        cache_ttl_s=5.0,
    )
    node = ClusterNode(options, Sessions(store=store, clock=clock, cache=cache, touches=touches))

    def service(kept: ReadThrough[EncodedSession], cache_us: int) -> SessionService:
        lifetimes = replace(LIFETIMES, cache_us=cache_us)
        return SessionService(
            store, kept, touches, clock=clock, lifetimes=lifetimes, elsewhere=node.forwarder
        )

    owned, passing = (
        service(cache, LIFETIMES.cache_us),
        service(ReadThrough(Lru(max_entries=0, max_bytes=0), beside=cache, aliases=token_hasher), 0),
    )
    services = node.services(owned, passing)
    table, calls, stopped = MethodTable(), MethodTable(), asyncio.Event()
    session_manager.add_to(table, node.router(services, carried))
    session_manager.add_to(calls, node.owner_router(services))
    node.serve_peers(table, calls, stop=stopped.set)
    return Parts(
        address=address,
        node=node,
        table=table,
        calls=calls,
        cache=cache,
        services=(owned, passing),
        stopped=stopped,
        trust=PeerAuth([secret.encode() for secret in secrets]),
    )
