"""Nodes of a cluster inside the test's own process: real engines on real sockets, any store behind them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
from clusters import SECRET, free_ports
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from prometheus_client import CollectorRegistry
from serving import configured, until_valid

from cache.read_through import ReadThrough
from cluster.peer_auth import PeerAuth
from mnemosyned import assembly
from mnemosyned.assembly import GRPC_ENGINES, Hooks, Parts
from mnemosyned.config.config import Config
from mnemosyned.node import ClusterNode
from mnemosyned.sessions.encoded import EncodedSession
from mnemosyned.sessions.lease_keeper import LeaseKeeper
from mnemosyned.sessions.mirrors import Mirrors
from mnemosyned.sessions.service import SessionService
from mnemosyned.sessions.store import EngineStore
from mnemosyned.transport.engine import Engine
from mnemosyned.transport.methods import MethodTable


@dataclass(kw_only=True)
class Peer:
    address: str
    node: ClusterNode
    table: MethodTable
    calls: MethodTable  # what is forwarded here
    cache: ReadThrough[EncodedSession]
    keeper: LeaseKeeper
    mirrors: Mirrors
    service: SessionService
    stopped: asyncio.Event
    peer_auth: PeerAuth
    channel: grpc.aio.Channel
    stub: SessionManagerStub
    run: Callable[[], None]  # joins now, where it has not


@asynccontextmanager
async def peering(  # noqa: PLR0913  # a node has many settings
    store: EngineStore,
    engine_name: str = "h2",
    *,
    seeds: tuple[str, ...] = (),
    secrets: tuple[str, ...] = (SECRET,),
    label: str = "",
    runs: bool = True,
    mirror_bytes: int = 64 * 1024**2,
    prepare: Callable[[MethodTable], None] = lambda _: None,
) -> AsyncIterator[Peer]:
    """Run a node until it has joined, lend it, and take it down again; without `runs` it does not join.

    `prepare` may change what clients are served.
    """
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    config = _config(address, seeds, secrets, label, mirror_bytes)
    stopped = asyncio.Event()
    parts = assembly.assemble(config, store, Hooks(registry=CollectorRegistry(), stop=stopped.set))
    node = parts.node
    assert node is not None
    assert parts.keeper is not None
    prepare(parts.table)
    engine = GRPC_ENGINES[engine_name](parts.table, assembly.engine_options(config))
    await engine.start()
    parts.keeper.begin()
    running: list[asyncio.Task[None]] = []
    run = lambda: running.append(asyncio.create_task(node.run()))  # noqa: E731
    try:
        if runs:
            run()
            async with asyncio.timeout(5):
                await node.has_joined.wait()
        async with grpc.aio.insecure_channel(address) as channel:
            auth = PeerAuth([secret.encode() for secret in secrets], process=os.urandom(16))
            yield _peer(parts, channel, peer_auth=auth, address=address, stopped=stopped, run=run)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await _take_down(node, engine, parts)


def _peer(
    parts: assembly.Parts,
    channel: grpc.aio.Channel,
    *,
    peer_auth: PeerAuth,
    address: str,
    stopped: asyncio.Event,
    run: Callable[[], None],
) -> Peer:
    assert parts.node is not None
    assert parts.keeper is not None
    assert parts.mirrors is not None
    return Peer(
        address=address,
        node=parts.node,
        table=parts.table,
        calls=parts.forwarded,
        cache=parts.cache,
        keeper=parts.keeper,
        mirrors=parts.mirrors,
        service=parts.service,
        stopped=stopped,
        peer_auth=peer_auth,
        channel=channel,
        stub=SessionManagerStub(channel),
        run=run,
    )


async def until_they_serve_copies(*peers: Peer) -> None:
    """Wait until these nodes are the members of one ring, and serve copies of all that they own; seconds."""
    async with asyncio.timeout(15):
        while any(len(peer.node.view.ring.nodes) != len(peers) or peer.node.view.former for peer in peers):
            await asyncio.sleep(0.01)
        for peer in peers:
            await until_valid(peer.keeper)


async def _take_down(node: ClusterNode, engine: Engine, parts: Parts) -> None:
    await node.leave()
    await engine.drain()
    await node.announce_left()
    await parts.service.close()
    assert parts.keeper is not None
    await parts.keeper.resign()


def _config(
    address: str, seeds: tuple[str, ...], secrets: tuple[str, ...], label: str, mirror_bytes: int
) -> Config:
    return configured(
        f"-port={address.rpartition(':')[2]}",
        f"-cluster.listen={address}",
        f"-cluster.seeds={','.join(seeds)}",
        f"-cluster.secret={','.join(secrets)}",
        f"-cluster.label={label}",
        f"-mirror.bytes={mirror_bytes}",
    )
