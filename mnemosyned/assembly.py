"""From a configuration to the parts of a node, connected with one another.

The daemon uses it, and so do the tests that put a node together: no test then checks a node that no user
runs. Nothing here listens, runs or opens anything, so it needs no event loop and cannot fail half-way.

    Config ──> store (storage/engines.py)
                 |
    StorageClock |      ClusterNode (if it has peers) ── forwarder ──┐
        |        |                                                   v
        └────────┴──> LruBackend, negative Lru ──> ReadThrough ──> LeaseKeeper ──> Coherence
                                                        |              |
                          TouchWriter ──────────> SessionService <─────┘
                                                        |
                                           node.bind <──┴──> LocalRouter or ClusterRouter
                                                                  |
                         MethodTables of the ports, MethodTable of forwarded calls

Two knots decide the sequence:

- The node and the sessions need each other. The node's `forwarder` is there from its construction, and the
  sessions come to the node later, by `bind`.
- Wrappers of methods go around what is already in a table, so the sequence in `_new_tables` matters.

This is the one place where an implementation is chosen by name: engines of transport here, engines of storage
in their registry.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from cache.backend import LruBackend
from cache.lru import Lru
from cache.read_through import ReadThrough
from cluster.lease import Lease
from cluster.mirrors import Grants
from mnemosyned.api import reflection, session_manager
from mnemosyned.api.auth import guard
from mnemosyned.api.guessing import GuessWatch
from mnemosyned.api.health import SERVICE_NAME as HEALTH
from mnemosyned.api.health import Health
from mnemosyned.api.session_manager import LocalRouter, Router
from mnemosyned.node_config import ClusterConfig
from mnemosyned.observe.metrics import (
    AuthMetrics,
    CacheCollector,
    GuessCollector,
    LeaseCollector,
    RpcCollector,
    SessionCollector,
    UpkeepMetrics,
)
from mnemosyned.observe.mirror_metrics import MirrorCollector
from mnemosyned.security.config import GuessConfig, TlsConfig
from mnemosyned.security.tls import ClientAuth, TlsFiles
from mnemosyned.sessions.clock import StorageClock
from mnemosyned.sessions.coherence import Coherence
from mnemosyned.sessions.config import CacheConfig, bag_limits, lifetime
from mnemosyned.sessions.damage_log import DamageLog
from mnemosyned.sessions.encoded import EncodedSession
from mnemosyned.sessions.lease_gate import LeaseGate, LeaseSettler
from mnemosyned.sessions.lease_keeper import LeaseKeeper
from mnemosyned.sessions.mirrors import Mirrors
from mnemosyned.sessions.service import ServiceRules, SessionService
from mnemosyned.sessions.token_index import TokenIndex
from mnemosyned.sessions.touches import TouchWriter
from mnemosyned.storage.engines import StorageConfig
from mnemosyned.storage.hashed import HashedStore
from mnemosyned.transport.call import Call
from mnemosyned.transport.config import GrpcConfig
from mnemosyned.transport.engine import Engine, EngineOptions
from mnemosyned.transport.h2_engine import H2Engine
from mnemosyned.transport.methods import MethodTable
from mnemosyned.transport.places import StreamPlaces
from mnemosyned.transport.traces import carried

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from mnemosyned.config.config import Config
    from mnemosyned.node import ClusterNode
    from mnemosyned.place import Place
    from mnemosyned.security.api_keys import Callers
    from mnemosyned.sessions.store import EngineStore, SharedStore
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
    place: Place | None = None  # None: this process is the daemon, and no worker of one


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The parts of one node, connected and at rest; the caller of `assemble` opens, runs and closes them."""

    store: EngineStore
    clock: StorageClock
    cache: ReadThrough[EncodedSession]
    keeper: LeaseKeeper | None  # None: nobody else has the storage
    mirrors: Mirrors | None  # as `keeper`
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
    node = _new_node(config, clock, hooks.place)
    caches = _new_caches(config, store, clock, hooks.registry)
    cache = caches.own
    keeper = _new_keeper(config, store, clock, caches, node)
    if keeper is not None:
        hooks.registry.register(LeaseCollector(keeper.counters, reason=keeper.reason, age_s=keeper.age_s))
    mirrors = _new_mirrors(config, clock, caches, keeper, hooks.registry)
    coherence = Coherence(cache, index=caches.index, settler=_settler(keeper, node), mirrors=mirrors)
    upkeep = UpkeepMetrics(hooks.registry)
    touches = TouchWriter(
        store,
        max_waiting=config[CacheConfig].max_sessions,
        lost=upkeep.touches_lost,
        on_gone=coherence.drop_copy,
        token_of=caches.token_shown_as,
    )
    rules = ServiceRules(lifetime=lifetime(config), bag_limits=bag_limits(config))
    damage_log = DamageLog(upkeep.damaged_sessions)
    service = SessionService(
        store, cache, touches, coherence=coherence, clock=clock, rules=rules, damage_log=damage_log
    )
    hooks.registry.register(SessionCollector(service.counts))
    if node is not None:
        assert keeper is not None
        assert mirrors is not None
        node.bind(
            storage=store,
            cache=cache,
            keeper=keeper,
            coherence=coherence,
            touches=touches,
            service=service,
            mirrors=mirrors,
        )
    health = _new_health(config[GrpcConfig])
    gate = None if keeper is None else LeaseGate(keeper)
    router = LocalRouter(service, gate) if node is None else node.router(_trace_context(hooks))
    tables = _new_tables(config, service, router, node, health=health, hooks=hooks)
    _register_calls(hooks.registry, tables, node)
    return Parts(
        store=store,
        clock=clock,
        cache=cache,
        keeper=keeper,
        mirrors=mirrors,
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
        age_grace_s=grpc.age_grace_s,
        max_idle_s=grpc.max_idle_s,
        send_timeout_s=grpc.send_timeout_s,
        max_unsent_bytes=grpc.max_unsent_bytes,
        max_unsent_bytes_per_connection=grpc.max_unsent_bytes_per_connection,
        max_request_bytes=grpc.max_request_bytes,
        max_request_bytes_per_connection=grpc.max_request_bytes_per_connection,
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


def _new_node(config: Config, clock: StorageClock, place: Place | None) -> ClusterNode | None:
    cluster = config[ClusterConfig]
    # A storage of this process alone cannot be shared, so its node has no peers, whatever the flags say: the
    # daemon warns of that.
    if not cluster.listen or not config[StorageConfig].engine.capabilities.is_shared:
        return None
    # Only here: a daemon without peers starts in two thirds of the time without these imports.
    from mnemosyned.node import ClusterNode, NodeOptions

    options = NodeOptions(
        listen=cluster.listen,
        public=config[GrpcConfig].advertise,
        seeds=cluster.foreign_seeds,
        label=cluster.label,
        secrets=cluster.secret,
        peer_names=config[TlsConfig].peer_names,
        max_members=cluster.max_members,
        max_message_bytes=config[GrpcConfig].max_message_bytes,
        siblings={} if place is None else place.siblings,
    )
    return ClusterNode(options, clock)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Caches:
    """Of the sessions that this node owns, and mirrors of others; with hashed tokens there are indexes."""

    own: ReadThrough[EncodedSession]
    index: TokenIndex | None
    mirrors: ReadThrough[EncodedSession]
    mirror_index: TokenIndex | None

    def drop_everything(self) -> None:
        self.own.drop_everything()
        self.mirrors.drop_everything()

    def token_shown_as(self, shown: str) -> str:
        """Return the token of the copy that List shows so, or what it shows."""
        for index in (self.index, self.mirror_index):
            if index is not None and (token := index.token_shown_as(shown)) != shown:
                return token
        return shown


def _new_caches(
    config: Config,
    store: EngineStore,
    clock: StorageClock,
    registry: CollectorRegistry,
) -> _Caches:
    limits = config[CacheConfig]
    entries: LruBackend[EncodedSession] = LruBackend(
        max_entries=limits.max_sessions, max_bytes=limits.max_bytes, now_us=clock.now_us
    )
    # Bound by bytes alone: its entries are tokens that clients choose, up to 4,096 bytes each. It needs the
    # cache's time to live, by which its entries grow old; without one it is off.
    negative: Lru[None] = Lru(max_entries=sys.maxsize, max_bytes=limits.negative_bytes if limits.ttl_s else 0)
    # With hashed tokens, other nodes name sessions by their hashes, which the cache does not have as keys.
    index, mirror_index = (
        TokenIndex(store.token_hasher) if isinstance(store, HashedStore) else None for _ in range(2)
    )
    cache = ReadThrough(entries, negative, observer=index)
    registry.register(
        CacheCollector(
            cache.counters,
            entries=lambda: len(entries),
            size_bytes=lambda: entries.size_bytes,
            negative_entries=lambda: len(negative),
        )
    )
    # Bound by bytes alone: each entry is of some size.
    mirrored: Lru[EncodedSession] = Lru(max_entries=sys.maxsize, max_bytes=limits.mirror_bytes)
    mirrors = ReadThrough(mirrored, observer=mirror_index)
    return _Caches(own=cache, index=index, mirrors=mirrors, mirror_index=mirror_index)


def _new_keeper(
    config: Config,
    store: EngineStore,
    clock: StorageClock,
    caches: _Caches,
    node: ClusterNode | None,
) -> LeaseKeeper | None:
    """Return what keeps the lease of a daemon whose storage others may use too, knowingly or not."""
    if not config[StorageConfig].engine.capabilities.is_shared:
        return None
    instance = int.from_bytes(os.urandom(8), "big") >> 1
    name = config[ClusterConfig].listen or f"alone-{instance:016x}"
    keeper = LeaseKeeper(
        cast("SharedStore", store),
        Lease(name, instance),
        clock,
        grants=Grants(max_tokens=config[CacheConfig].max_sessions, keep_us=lifetime(config).cache_us),
        drop_everything=caches.drop_everything,
        teller=None if node is None else node.forwarder,
    )
    if node is None:
        # A ring of its own: no other daemon takes it for one that routes alike.
        keeper.route_by(name)
    else:
        keeper.on_published = node.published
        keeper.on_doubt.append(node.storage_doubted)
    caches.own.may_fill = lambda: keeper.lease.is_valid(clock.uptime_us())
    return keeper


def _new_mirrors(
    config: Config,
    clock: StorageClock,
    caches: _Caches,
    keeper: LeaseKeeper | None,
    registry: CollectorRegistry,
) -> Mirrors | None:
    if keeper is None:
        return None
    mirrors = Mirrors(
        caches.own,
        caches.mirrors,
        index=caches.mirror_index,
        grants=keeper.grants,
        lease=keeper.lease,
        clock=clock,
        is_wanted=config[CacheConfig].mirror_bytes > 0,
    )
    keeper.on_rows, keeper.drop_mirrors = mirrors.met, mirrors.drop
    registry.register(MirrorCollector(mirrors.cache, mirrors.counters, keeper.counters))
    return mirrors


def _settler(keeper: LeaseKeeper | None, node: ClusterNode | None) -> LeaseSettler | None:
    if keeper is None:
        return None
    return LeaseSettler(keeper, (lambda _: True) if node is None else node.owns)


def _trace_context(hooks: Hooks) -> Callable[[Call], Mapping[str, str]]:
    return carried if hooks.tracing is None else hooks.tracing.context


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tables:
    clients: MethodTable
    peers: MethodTable | None
    forwarded: MethodTable  # what a forwarded call may call


def _new_health(grpc: GrpcConfig) -> Health:
    return Health(
        _PUBLIC_SERVICES, StreamPlaces(per_connection=grpc.max_watches_per_connection, total=grpc.max_watches)
    )


def _new_tables(
    config: Config,
    service: SessionService,
    router: Router,
    node: ClusterNode | None,
    *,
    health: Health,
    hooks: Hooks,
) -> _Tables:
    """Return what clients and peers may call, and what a forwarded call may call.

    Where peers have a port of their own, the clients' table has no Peer service.

    Added in this sequence:

    1. The SessionManager, and for peers the Peer service.
    2. The guard around the SessionManager. Forwarded calls have none: they have passed it at the entry node.
    3. The watch for guesses, which also counts the keys that the guard does not know.
    4. Health and reflection, which need no credential. The peers' port has no reflection.
    5. Traces around everything, so that a refused call has a span too.
    """
    clients, forwarded = MethodTable(), MethodTable()
    has_own_port = bool(config[ClusterConfig].bind) or hooks.place is not None
    peers = MethodTable() if node is not None and has_own_port else None
    max_entries = service.bag_limits.entries
    session_manager.add_to(clients, router, max_entries=max_entries)
    if node is not None:
        session_manager.add_to(forwarded, node.owner_router(), max_entries=max_entries)
        node.serve_peers(clients if peers is None else peers, forwarded, stop=hooks.stop)
    if hooks.callers is not None:
        guard(clients, hooks.callers, AuthMetrics(hooks.registry))
    guesses = GuessWatch(config[GuessConfig], hooks.callers, max_streams=config[GrpcConfig].max_streams)
    hooks.registry.register(GuessCollector(guesses.counts, callers=guesses.callers))
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
