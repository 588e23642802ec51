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

`session_parts.py` makes the sessions, and the lease and caches around them. Two knots decide the sequence:

- The node and the sessions need each other. The node's `forwarder` is there from its construction, and the
  sessions come to the node later, by `bind`.
- Wrappers of methods go around what is already in a table, so the sequence in `_new_tables` matters.

This is the one place where an implementation is chosen by name: engines of transport here, engines of storage
in their registry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cache.read_through import ReadThrough
from mnemosyned.api import reflection, session_manager
from mnemosyned.api.auth import guard
from mnemosyned.api.guessing import GuessWatch
from mnemosyned.api.health import SERVICE_NAME as HEALTH
from mnemosyned.api.health import Health
from mnemosyned.api.opening import OpeningRouter
from mnemosyned.api.rpc import LocalRouter, Router
from mnemosyned.node_config import ClusterConfig
from mnemosyned.observe.collectors import GuessCollector, RpcCollector
from mnemosyned.observe.metrics import AuthMetrics, UpkeepMetrics
from mnemosyned.security.config import GuessConfig, TlsConfig
from mnemosyned.security.tls import ClientAuth, TlsFiles
from mnemosyned.session_parts import new_sessions
from mnemosyned.sessions.clock import StorageClock
from mnemosyned.sessions.coherence import Coherence
from mnemosyned.sessions.encoded import EncodedSession
from mnemosyned.sessions.lease_gate import LeaseGate
from mnemosyned.sessions.lease_keeper import LeaseKeeper
from mnemosyned.sessions.mirrors import Mirrors
from mnemosyned.sessions.service import SessionService
from mnemosyned.sessions.touches import TouchWriter
from mnemosyned.storage.engines import StorageConfig
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
    opening: OpeningRouter  # what holds the clients' calls until the storage is open
    health: Health
    upkeep: UpkeepMetrics


def assemble(config: Config, store: EngineStore, hooks: Hooks) -> Parts:
    """Return the parts that the configuration asks for, on a store that need not be open yet.

    Metrics are registered in `hooks.registry`, so each node of a process needs a registry of its own.
    """
    clock = StorageClock()
    node = _new_node(config, clock, hooks.place)
    sessions = new_sessions(config, store, clock, node, hooks.registry)
    keeper, mirrors, service = sessions.keeper, sessions.mirrors, sessions.service
    if node is not None:
        assert keeper is not None
        assert mirrors is not None
        node.bind(
            storage=store,
            cache=sessions.cache,
            keeper=keeper,
            coherence=sessions.coherence,
            touches=sessions.touches,
            service=service,
            mirrors=mirrors,
        )
    health = _new_health(config[GrpcConfig])
    gate = None if keeper is None else LeaseGate(keeper)
    router = OpeningRouter(LocalRouter(service, gate) if node is None else node.router(_trace_context(hooks)))
    tables = _new_tables(config, service, router, node, health=health, hooks=hooks)
    _register_calls(hooks.registry, tables, node)
    return Parts(
        store=store,
        clock=clock,
        cache=sessions.cache,
        keeper=keeper,
        mirrors=mirrors,
        coherence=sessions.coherence,
        touches=sessions.touches,
        service=service,
        node=node,
        table=tables.clients,
        peers=tables.peers,
        forwarded=tables.forwarded,
        opening=router,
        health=health,
        upkeep=sessions.upkeep,
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
