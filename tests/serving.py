"""A node inside the test's own process: a real engine on a real socket, any store behind it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Final

import grpc
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from prometheus_client import CollectorRegistry

from cache.lru import Lru
from cache.read_through import ReadThrough
from mnemosyned.api import reflection, session_manager
from mnemosyned.api.health import Health
from mnemosyned.observe.metrics import UpkeepMetrics
from mnemosyned.sessions.bag import BagLimits
from mnemosyned.sessions.clock import StorageClock
from mnemosyned.sessions.encoded import EncodedSession
from mnemosyned.sessions.service import Lifetimes, SessionService
from mnemosyned.sessions.store import SessionStore
from mnemosyned.sessions.touches import TouchWriter
from mnemosyned.storage.hashed import HashedStore
from mnemosyned.transport.engine import Engine, EngineOptions
from mnemosyned.transport.grpcio_engine import GrpcioEngine
from mnemosyned.transport.h2corn_engine import H2cornEngine
from mnemosyned.transport.methods import MethodTable

ENGINES: Final = {"h2corn": H2cornEngine, "grpcio": GrpcioEngine}
LIFETIMES: Final = Lifetimes(session_us=60_000_000, cache_us=5_000_000, touch_interval_us=6_000_000)
OPTIONS: Final = EngineOptions(
    host="127.0.0.1",
    port=0,
    max_message_bytes=4 * 1024**2,
    max_streams=1024,
    max_connections=1000,
    drain_timeout_s=5,
)


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
    store: SessionStore,
    engine_name: str = "h2corn",
    *,
    lifetimes: Lifetimes = LIFETIMES,
    options: EngineOptions = OPTIONS,
    bag_limits: BagLimits | None = None,
) -> AsyncIterator[Node]:
    token_hasher = store.token_hasher if isinstance(store, HashedStore) else None
    cache: ReadThrough[EncodedSession] = ReadThrough(
        Lru(max_entries=10_000, max_bytes=100_000_000),
        Lru(max_entries=10_000, max_bytes=1_000_000),
        aliases=token_hasher,
    )
    touches = TouchWriter(
        store, max_waiting=100, lost=UpkeepMetrics(CollectorRegistry()).touches_lost, on_gone=cache.drop
    )
    service = SessionService(
        store, cache, touches, clock=StorageClock(), lifetimes=lifetimes, bag_limits=bag_limits
    )
    table = MethodTable()
    session_manager.add_to(table, session_manager.Here(service))
    health = Health(frozenset({session_manager.SERVICE_NAME}))
    health.add_to(table)
    health.set_serving(True)
    reflection.add_to(table, frozenset({session_manager.SERVICE_NAME}))
    engine = ENGINES[engine_name](table, replace(options))
    port = await engine.start()
    address = f"127.0.0.1:{port}"
    channel_options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
    try:
        async with grpc.aio.insecure_channel(address, options=channel_options) as channel:
            stub = SessionManagerStub(channel)
            yield Node(address, channel, stub, engine, table, health, cache, touches, service)
    finally:
        health.close()
        await engine.drain()
        await service.close()
