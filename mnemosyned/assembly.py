"""From a configuration to the parts of a node, connected with one another.

The daemon uses it, and so do the tests that put a node together: no test then checks a node that no user
runs. Nothing here listens, runs or opens anything, so it needs no event loop and cannot fail half-way.

    Config ──> store (storage/engines.py)
                 |
    StorageClock |      ClusterNode (if it has peers) ── invalidator ──┐
        |        |                                                     v
        └────────┴──> LruBackend, negative Lru ──> ReadThrough ──> Coherence
                                                        |              |
                          TouchWriter ──────────> SessionService <─────┘
                                                        |
                                           node.bind <──┴──> LocalRouter or ClusterRouter
                                                                  |
                         MethodTables of the ports, MethodTable of forwarded calls

Two knots decide the sequence:

- The node and the sessions need each other. The node's `invalidator` is there from its construction, and the
  sessions come to the node later, by `bind`.
- Wrappers of methods go around what is already in a table, so the sequence in `_new_tables` matters.

This is the one place where an implementation is chosen by name: engines of transport here, engines of storage
in their registry.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cache.backend import LruBackend
from cache.lru import Lru
from cache.read_through import ReadThrough
from mnemosyned.api import reflection, session_manager
from mnemosyned.api.auth import guard
from mnemosyned.api.guessing import GuessWatch
from mnemosyned.api.health import SERVICE_NAME as HEALTH
from mnemosyned.api.health import Health
from mnemosyned.api.session_manager import LocalRouter
from mnemosyned.node_config import ClusterConfig
from mnemosyned.observe.metrics import (
    AuthMetrics,
    CacheCollector,
    GuessCollector,
    RpcCollector,
    UpkeepMetrics,
)
from mnemosyned.security.config import GuessConfig, TlsConfig
from mnemosyned.security.tls import ClientAuth, TlsFiles
from mnemosyned.sessions.clock import StorageClock
from mnemosyned.sessions.coherence import Coherence, TokenIndex
from mnemosyned.sessions.config import CacheConfig, bag_limits, lifetime
from mnemosyned.sessions.damage_log import DamageLog
from mnemosyned.sessions.encoded import EncodedSession
from mnemosyned.sessions.service import ServiceRules, SessionService
from mnemosyned.sessions.touches import TouchWriter
from mnemosyned.storage.engines import StorageConfig
from mnemosyned.storage.hashed import HashedStore
from mnemosyned.transport.call import Call
from mnemosyned.transport.config import GrpcConfig
from mnemosyned.transport.engine import Engine, EngineOptions
from mnemosyned.transport.h2_engine import H2Engine
from mnemosyned.transport.methods import MethodTable
from mnemosyned.transport.traces import carried

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from mnemosyned.config.config import Config
    from mnemosyned.node import ClusterNode
    from mnemosyned.security.api_keys import Callers
    from mnemosyned.sessions.store import EngineStore
    from mnemosyned.transport.traces import Tracing


def _grpcio_engine(table: MethodTable, options: EngineOptions) -> Engine:
    # Only when it is asked for: it imports grpcio.
    from mnemosyned.transport.grpcio_engine import GrpcioEngine

    return GrpcioEngine(table, options)


GRPC_ENGINES: Final[dict[str, Callable[[MethodTable, EngineOptions], Engine]]] = {
    "h2": H2Engine,
    "grpcio": _grpcio_engine,
}
_PUBLIC_SERVICES: Final = frozenset({session_manager.SERVICE_NAME, HEALTH})


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What a node gets from the outside: the daemon's, or a test's own."""

    registry: CollectorRegistry
    stop: Callable[[], None]  # begins the end of the daemon; a peer may ask for it
    callers: Callable[[], Callers] | None = None  # who may call; None: all may
    tracing: Tracing | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The parts of one node, connected and at rest; the caller of `assemble` opens, runs and closes them."""

    store: EngineStore
    clock: StorageClock
    cache: ReadThrough[EncodedSession]
    coherence: Coherence
    touches: TouchWriter
    service: SessionService
    node: ClusterNode | None  # None: this daemon has no peers
    table: MethodTable  # what the gRPC port serves
    peers: MethodTable | None  # what the peers' port serves; None: the gRPC port serves peers too
    forwarded: MethodTable  # what peers forward to this node
    health: Health
    upkeep: UpkeepMetrics


def assemble(config: Config, store: EngineStore, hooks: Hooks) -> Parts:
    """Return the parts that the configuration asks for, on a store that need not be open yet.

    Metrics are registered in `hooks.registry`, so each node of a process needs a registry of its own.
    """
    clock = StorageClock()
    node = _new_node(config, clock)
    cache, coherence = _new_cache(config, store, clock, node, hooks.registry)
    upkeep = UpkeepMetrics(hooks.registry)
    touches = TouchWriter(
        store,
        max_waiting=config[CacheConfig].max_sessions,
        lost=upkeep.touches_lost,
        on_gone=coherence.drop_copy,
    )
    service = SessionService(
        store,
        cache,
        touches,
        coherence=coherence,
        clock=clock,
        rules=ServiceRules(lifetime=lifetime(config), bag_limits=bag_limits(config)),
        damage_log=DamageLog(upkeep.damaged_sessions),
    )
    if node is not None:
        node.bind(storage=store, cache=cache, coherence=coherence, touches=touches, service=service)
    health = Health(_PUBLIC_SERVICES)
    guesses = GuessWatch(config[GuessConfig], hooks.callers, max_streams=config[GrpcConfig].max_streams)
    hooks.registry.register(GuessCollector(guesses.counts, callers=guesses.callers))
    has_own_port = bool(config[ClusterConfig].bind)
    tables = _new_tables(service, node, health, hooks, guesses=guesses, has_own_port=has_own_port)
    _register_calls(hooks.registry, tables, node)
    return Parts(
        store=store,
        clock=clock,
        cache=cache,
        coherence=coherence,
        touches=touches,
        service=service,
        node=node,
        table=tables.clients,
        peers=tables.peers,
        forwarded=tables.forwarded,
        health=health,
        upkeep=upkeep,
    )


def engine_options(config: Config) -> EngineOptions:
    """Return what both gRPC engines need; the TLS files are named, not read."""
    grpc = config[GrpcConfig]
    return EngineOptions(
        host=grpc.host,
        port=grpc.port,
        max_message_bytes=grpc.max_message_bytes,
        max_streams=grpc.max_streams,
        max_connections=grpc.max_connections,
        max_connections_per_address=grpc.max_connections_per_address,
        handshake_timeout_s=grpc.handshake_timeout_s,
        drain_timeout_s=grpc.drain_timeout_s,
        max_age_s=grpc.max_age_s,
        send_timeout_s=grpc.send_timeout_s,
        tls=tls_files(config),
    )


def tls_files(config: Config) -> TlsFiles | None:
    """Return the files of TLS; None without `-tls`."""
    tls = config[TlsConfig]
    if not tls.is_on:
        return None
    return TlsFiles(
        certificate=tls.certificate,
        private_key=tls.private_key,
        authorities=tls.authorities,
        client_auth=ClientAuth(tls.client_auth),
    )


def _new_node(config: Config, clock: StorageClock) -> ClusterNode | None:
    cluster = config[ClusterConfig]
    # A storage of this process alone cannot be shared, so its node has no peers, whatever the flags say: the
    # daemon warns of that.
    if not cluster.listen or not config[StorageConfig].engine.capabilities.is_shared:
        return None
    # Only here: a daemon without peers starts in two thirds of the time without these imports.
    from mnemosyned.node import ClusterNode, NodeOptions

    options = NodeOptions(
        listen=cluster.listen,
        seeds=cluster.foreign_seeds,
        label=cluster.label,
        secrets=cluster.secret,
        peer_names=config[TlsConfig].peer_names,
        max_members=cluster.max_members,
        max_message_bytes=config[GrpcConfig].max_message_bytes,
        cache_ttl_s=config[CacheConfig].ttl_s,
    )
    return ClusterNode(options, clock)


def _new_cache(
    config: Config,
    store: EngineStore,
    clock: StorageClock,
    node: ClusterNode | None,
    registry: CollectorRegistry,
) -> tuple[ReadThrough[EncodedSession], Coherence]:
    limits = config[CacheConfig]
    entries: LruBackend[EncodedSession] = LruBackend(
        max_entries=limits.max_sessions, max_bytes=limits.max_bytes, now_us=clock.now_us
    )
    # Bound by bytes alone: its entries are tokens that clients choose, up to 4,096 bytes each. It needs the
    # cache's time to live, by which its entries grow old; without one it is off.
    negative: Lru[None] = Lru(max_entries=sys.maxsize, max_bytes=limits.negative_bytes if limits.ttl_s else 0)
    # With hashed tokens, other nodes name sessions by their hashes, which the cache does not have as keys.
    index = TokenIndex(store.token_hasher) if isinstance(store, HashedStore) else None
    cache = ReadThrough(entries, negative, observer=index)
    registry.register(
        CacheCollector(
            cache.counters,
            entries=lambda: len(entries),
            size_bytes=lambda: entries.size_bytes,
            negative_entries=lambda: len(negative),
        )
    )
    return cache, Coherence(cache, index=index, invalidator=None if node is None else node.invalidator)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tables:
    clients: MethodTable
    peers: MethodTable | None
    forwarded: MethodTable  # what a forwarded call may call


def _new_tables(
    service: SessionService,
    node: ClusterNode | None,
    health: Health,
    hooks: Hooks,
    *,
    guesses: GuessWatch,
    has_own_port: bool,
) -> _Tables:
    """Return what clients and peers may call, and what a forwarded call may call.

    `has_own_port` is whether peers have a port of their own. Then the clients' table has no Peer service.

    Added in this sequence:

    1. The SessionManager, and for peers the Peer service.
    2. The guard around the SessionManager. Forwarded calls have none: they have passed it at the entry node.
    3. The watch for guesses, which also counts the keys that the guard does not know.
    4. Health and reflection, which need no credential. The peers' port has no reflection.
    5. Traces around everything, so that a refused call has a span too.
    """
    clients, forwarded = MethodTable(), MethodTable()
    peers = MethodTable() if node is not None and has_own_port else None
    trace_context: Callable[[Call], Mapping[str, str]] = carried
    if hooks.tracing is not None:
        trace_context = hooks.tracing.context
    router = LocalRouter(service) if node is None else node.router(trace_context)
    session_manager.add_to(clients, router)
    if node is not None:
        session_manager.add_to(forwarded, node.owner_router())
        node.serve_peers(clients if peers is None else peers, forwarded, stop=hooks.stop)
    if hooks.callers is not None:
        guard(clients, hooks.callers, AuthMetrics(hooks.registry))
    guesses.watch(clients)
    health.add_to(clients)
    reflection.add_to(clients, _PUBLIC_SERVICES)
    if hooks.tracing is not None:
        for table in (clients, forwarded, *([] if peers is None else [peers])):
            hooks.tracing.trace(table)
    if peers is not None:
        _share(clients, peers, HEALTH)
    return _Tables(clients=clients, peers=peers, forwarded=forwarded)


def _share(one: MethodTable, other: MethodTable, service: str) -> None:
    """Serve the methods of a service in another table too, counted together, since metrics name no port."""
    prefix = f"/{service}/"
    other.unary.update({path: method for path, method in one.unary.items() if path.startswith(prefix)})
    other.streams.update({path: method for path, method in one.streams.items() if path.startswith(prefix)})


# After all wrapping: a method's stats are those of its last wrapper.
def _register_calls(registry: CollectorRegistry, tables: _Tables, node: ClusterNode | None) -> None:
    served = [*tables.clients.stats(), *([] if tables.peers is None else tables.peers.stats())]
    # Each once: two ports share the methods of health.
    registry.register(RpcCollector(list({id(stats): stats for stats in served}.values())))
    if node is not None:
        from mnemosyned.admin.cluster import ClusterCollector  # as in `_new_node`

        registry.register(RpcCollector(node.client_stats.values(), side="client"))
        registry.register(ClusterCollector(node))
