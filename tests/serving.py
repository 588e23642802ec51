"""A node inside the test's own process: the daemon's parts on a real socket, any store behind them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import grpc
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from prometheus_client import CollectorRegistry

from cache.read_through import ReadThrough
from mnemosyned import assembly, settings
from mnemosyned.api.health import Health
from mnemosyned.assembly import GRPC_ENGINES, Hooks, Parts
from mnemosyned.config.config import Config
from mnemosyned.sessions.config import lifetime
from mnemosyned.sessions.encoded import EncodedSession
from mnemosyned.sessions.lease_keeper import LeaseKeeper
from mnemosyned.sessions.service import SessionService
from mnemosyned.sessions.store import EngineStore
from mnemosyned.sessions.touches import TouchWriter
from mnemosyned.transport.engine import Engine
from mnemosyned.transport.methods import MethodTable

# Short enough for tests to see them pass, and long enough for slow machines.
FLAGS: Final = ("-port=0", "-ttl=1m", "-cache.ttl=5s", "-touch.interval=6s", "-drain.timeout=5s")
ENGINES: Final = GRPC_ENGINES


def configured(*flags: str) -> Config:
    """A configuration for tests; `flags` win over FLAGS."""
    return settings.parse([*FLAGS, *flags], {})


LIFETIME: Final = lifetime(configured())


def assembled(store: EngineStore, *flags: str) -> Parts:
    """The parts of a node on this store, which is nobody else's, unless `flags` choose a shared engine."""
    hooks = Hooks(registry=CollectorRegistry(), stop=lambda: None)
    return assembly.assemble(configured("-storage=memory", *flags), store, hooks)


def kept(cache: ReadThrough[Any]) -> list[str]:
    """The keys of which a cache knows the value, or that there is none."""
    return [*cache.lru.slots, *cache.negative.slots]


async def until_valid(keeper: LeaseKeeper) -> None:
    """Wait until the lease of a node is valid: from then on it serves copies."""
    async with asyncio.timeout(10):
        while keeper.reason():
            await asyncio.sleep(0.01)


@dataclass
class Node:
    address: str
    channel: grpc.aio.Channel
    stub: SessionManagerStub
    engine: Engine
    table: MethodTable
    health: Health
    cache: ReadThrough[EncodedSession]
    touches: TouchWriter
    service: SessionService


@asynccontextmanager
async def serving(
    store: EngineStore, engine_name: str = "h2", *, flags: Sequence[str] = ()
) -> AsyncIterator[Node]:
    parts = assembled(store, *flags)
    parts.health.set_serving(True)
    engine = GRPC_ENGINES[engine_name](parts.table, assembly.engine_options(configured(*flags)))
    port = await engine.start()
    if parts.keeper is not None:
        parts.keeper.begin()
        await until_valid(parts.keeper)
    address = f"127.0.0.1:{port}"
    channel_options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    try:
        async with grpc.aio.insecure_channel(address, options=channel_options) as channel:
            yield Node(
                address=address,
                channel=channel,
                stub=SessionManagerStub(channel),
                engine=engine,
                table=parts.table,
                health=parts.health,
                cache=parts.cache,
                touches=parts.touches,
                service=parts.service,
            )
    finally:
        parts.health.close()
        await engine.drain()
        await parts.service.close()
        if parts.keeper is not None:
            await parts.keeper.resign()
