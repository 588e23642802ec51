"""The ports of one daemon: that of clients, that of peers, and the admin port.

    flag                  | port         | serves
    ----------------------+--------------+----------------------------------------------------------
    -host, -port          | gRPC         | SessionManager, health, reflection; the Peer service, if it has
                          |              | no port of its own
    -cluster.bind         | peers        | the Peer service and health, and nothing else
    -host, -port + 1      | admin        | metrics, health, pages (admin/server.py)

A worker (place.py) has the gRPC port's sockets from its supervisor, a Unix socket for the Peer service and
health besides the peers' port, and its admin server on another Unix socket.

The peers' port has an engine of its own with the same limits and the same TLS files. So a firewall or a proxy
can keep clients from the Peer service by the port alone, and a flood of clients takes no connection of peers.

All ports are opened before the storage. If one of them cannot be opened, the others are closed.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client import Metric
from prometheus_client.registry import Collector

from cluster.peer_auth import is_loopback
from mnemosyned import assembly, host_limits
from mnemosyned.admin.grpc_probe import Target, check
from mnemosyned.admin.health import PROBE_TIMEOUT_S, NodeHealth
from mnemosyned.admin.server import AdminServer
from mnemosyned.assembly import GRPC_ENGINES
from mnemosyned.node_config import ClusterConfig, split_address
from mnemosyned.observe.collectors import ConnectionCollector
from mnemosyned.place import unix_host
from mnemosyned.security.config import TlsConfig
from mnemosyned.security.file_reloader import FilesUnusable
from mnemosyned.security.tls import admin_context, probe_context
from mnemosyned.storage.engines import StorageConfig
from mnemosyned.transport.acceptor import reached_at
from mnemosyned.transport.config import GrpcConfig
from mnemosyned.transport.engine import (
    UNIX_PREFIX,
    ConnectionStats,
    Engine,
    EngineOptions,
    ListenFailed,
    host_port,
)
from mnemosyned.transport.turns import Rows, Turns

if TYPE_CHECKING:
    from collections.abc import Callable

    from prometheus_client import CollectorRegistry

    from mnemosyned.admin.health import Health, Readiness
    from mnemosyned.admin.pulse import Pulse
    from mnemosyned.admin.server import Page
    from mnemosyned.assembly import Parts
    from mnemosyned.config.config import Config
    from mnemosyned.node import ClusterNode
    from mnemosyned.place import Place
    from mnemosyned.security.file_reloader import FileReloader
    from mnemosyned.security.tls import TlsMaterial


class _PeersPort(NamedTuple):
    engine: Engine
    has_tls: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """The open ports; the addresses are as the log shows them."""

    engine: Engine
    peers: Sequence[_PeersPort]  # none: peers come to `engine`
    turns: Turns | None  # of a worker
    admin: AdminServer
    own_calls: OwnCalls
    grpc_address: str
    peers_address: str
    admin_address: str

    async def follow_tls(
        self, reloader: FileReloader[TlsMaterial], config: Config, node: ClusterNode | None
    ) -> None:
        """Have all ports and the dials to peers take new TLS files, one after the other.

        Each of them may be called twice with one change (security/file_reloader.py).
        """
        files = assembly.tls_files(config)
        assert files is not None

        async def reload_admin(_: TlsMaterial) -> None:
            self.admin.serve_tls(await asyncio.to_thread(admin_context, files))
            self.own_calls.tls = await asyncio.to_thread(probe_context, files)

        reloader.followers.append(self.engine.reload_tls)
        if self.turns is None:
            # A worker's is behind its supervisor, and without TLS.
            reloader.followers.append(reload_admin)
        reloader.followers += [one.engine.reload_tls for one in self.peers if one.has_tls]
        if node is not None:
            await node.identify(reloader.content)
            reloader.followers.append(node.identify)


@dataclass(slots=True)
class OwnCalls:
    """Calls of this node through its own gRPC port, for its health; `tls` may be replaced at any time."""

    host: str
    port: int
    tls: ssl.SSLContext | None

    async def __call__(self) -> None:
        """Make one call. Raises NotAnswered."""
        if self.host.startswith(UNIX_PREFIX):
            target = Target(unix_path=self.host.removeprefix(UNIX_PREFIX), tls=self.tls)
        else:
            target = Target(host=reached_at(self.host), port=self.port, tls=self.tls)
        await check(target, timeout_s=PROBE_TIMEOUT_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Vitals:
    """What the node knows of its own health; asked from the admin thread."""

    readiness: Callable[[], Readiness]
    pulse: Pulse
    is_draining: Callable[[], bool]


async def open_ports(
    config: Config,
    parts: Parts,
    registry: CollectorRegistry,
    vitals: Vitals,
    place: Place | None = None,
) -> Ports:
    """Open all ports, with as many connections as the limit of open files allows.

    A worker with this place has other ones in part: see the table above.

    Raises:
        ListenFailed: a port cannot be opened, and none is open; the text is one line for people.
    """
    grpc = config[GrpcConfig]
    turns = None if place is None else Turns(Rows(place.rows, len(place.names)), place.number)
    engine, peers = _new_engines(config, parts, registry, turns, place)
    port = await engine.start()
    try:
        for one in peers:
            await _start_peers(one.engine, _flag_of_peers(config, place))
        own_calls = _own_calls(config, port, place)
        health = NodeHealth(
            vitals.readiness,
            call=own_calls,
            pulse=vitals.pulse,
            stall_s=grpc.health_stall_s,
            is_draining=vitals.is_draining,
        )
        admin = await _open_admin(config, parts, registry, health, place)
    except ListenFailed:
        for opened in (engine, *(one.engine for one in peers)):
            await opened.drain()
        raise
    scheme = "http" if assembly.tls_files(config) is None else "https"
    return Ports(
        engine=engine,
        peers=peers,
        turns=turns,
        admin=admin,
        own_calls=own_calls,
        grpc_address=host_port(grpc.host, port),
        peers_address=config[ClusterConfig].bind,
        admin_address=f"{scheme}://{host_port(admin_host(grpc), admin.port)}" if place is None else "",
    )


def _new_engines(
    config: Config, parts: Parts, registry: CollectorRegistry, turns: Turns | None, place: Place | None
) -> tuple[Engine, list[_PeersPort]]:
    """Return what serves clients, and what serves peers on ports of their own; neither listens yet."""
    grpc = config[GrpcConfig]
    max_files = host_limits.allow_many()
    limits = host_limits.connection_limits(config, max_files)
    host_limits.warn(limits, max_files)
    options = replace(assembly.engine_options(config), max_connections=limits.clients)
    shared = options if place is None else replace(options, listeners=place.listeners, turns=turns)
    new_engine, stats = GRPC_ENGINES[grpc.engine], [options.stats]
    peers: list[_PeersPort] = []
    for at in _peers_options(options, config[ClusterConfig].bind, limits.peers, place):
        assert parts.peers is not None
        peers.append(_PeersPort(new_engine(parts.peers, at), has_tls=at.tls is not None))
        stats.append(at.stats)
    registry.register(_AllConnections(stats, is_counted=grpc.engine == "h2"))
    return new_engine(parts.table, shared), peers


def admin_host(grpc: GrpcConfig) -> str:
    """Return where the admin port listens."""
    # A Unix socket is for gRPC alone, as is its file's mode: the admin port is always one of TCP.
    return "127.0.0.1" if grpc.host.startswith(UNIX_PREFIX) else grpc.host


def is_plaintext_exposed(config: Config) -> bool:
    """Tell whether nodes of other hosts call this node without TLS or `-cluster.plaintext`."""
    cluster, is_shared = config[ClusterConfig], config[StorageConfig].engine.capabilities.is_shared
    if not cluster.listen or not is_shared or config[TlsConfig].is_on or cluster.is_plaintext:
        return False
    host = split_address(cluster.bind)[0] if cluster.bind else config[GrpcConfig].host
    return not (is_loopback(host) or host.startswith(UNIX_PREFIX))


def _peers_options(
    options: EngineOptions, bind: str, max_connections: int, place: Place | None
) -> Iterator[EngineOptions]:
    """Yield the options of each port that only peers have."""
    if bind:
        host, port = split_address(bind)
        yield replace(options, host=host, port=port, max_connections=max_connections, stats=ConnectionStats())
    if place is not None:
        path = unix_host(place.peers_socket(place.number))
        yield replace(options, host=path, port=0, tls=None, stats=ConnectionStats())


def _flag_of_peers(config: Config, place: Place | None) -> str:
    """Return the flag that says where the peers' port is: a worker may have it from its name."""
    bind = config[ClusterConfig].bind
    if place is not None and bind and split_address(bind)[1] == split_address(place.name)[1]:
        return "-cluster.listen"
    return "-cluster.bind"


async def _start_peers(peers: Engine, flag: str) -> None:
    try:
        await peers.start()
    except ListenFailed as exc:
        raise ListenFailed(f"flag {flag}: {exc}") from exc


def _own_calls(config: Config, port: int, place: Place | None) -> OwnCalls:
    if place is not None:
        # A sibling might accept a call through the gRPC port.
        return OwnCalls(unix_host(place.peers_socket(place.number)), 0, None)
    files = assembly.tls_files(config)
    try:
        return OwnCalls(config[GrpcConfig].host, port, None if files is None else probe_context(files))
    except FilesUnusable as exc:
        raise ListenFailed(str(exc)) from exc


async def _open_admin(
    config: Config, parts: Parts, registry: CollectorRegistry, health: NodeHealth, place: Place | None
) -> AdminServer:
    pages = {} if parts.node is None else {"/debug/cluster": _cluster_page(parts.node)}
    if place is None:
        return await open_admin(config, registry, health, pages)
    path = place.admin_socket(place.number)
    try:
        return await AdminServer.start(unix_host(path), 0, registry=registry, health=health, pages=pages)
    except OSError as exc:
        raise ListenFailed(f"cannot listen on {path}: {exc.strerror}") from exc


async def open_admin(
    config: Config, registry: Collector, health: Health, pages: Mapping[str, Page]
) -> AdminServer:
    """Open the daemon's admin port. Raises ListenFailed."""
    grpc, files = config[GrpcConfig], assembly.tls_files(config)
    host = admin_host(grpc)
    # The contract's rule; 0 stands for any free port, for both.
    port = grpc.port and grpc.port + 1
    try:
        return await AdminServer.start(
            host,
            port,
            registry=registry,
            health=health,
            pages=pages,
            tls=None if files is None else admin_context(files),
        )
    except FilesUnusable as exc:
        raise ListenFailed(str(exc)) from exc
    except OSError as exc:
        # The text of `socket.create_server` repeats the address.
        reason = (exc.strerror or str(exc)).partition(" (while ")[0]
        raise ListenFailed(f"cannot listen on {host_port(host, port)}: {reason}") from exc


def _cluster_page(node: ClusterNode) -> Page:
    from mnemosyned.admin.cluster import page  # as in `assembly._new_node`

    return partial(page, node)


class _AllConnections(Collector):
    """Shows the connections of the gRPC port and of the peers' port together."""

    def __init__(self, stats: Sequence[ConnectionStats], *, is_counted: bool = True) -> None:
        self._stats = stats
        self._is_counted = is_counted

    def collect(self) -> Iterator[Metric]:
        total = ConnectionStats()
        for name in (one.name for one in fields(ConnectionStats)):
            for stats in self._stats:
                value = getattr(stats, name)
                # A copy of a counter, made in one step: the event loop adds to it.
                setattr(
                    total, name, getattr(total, name) + (value if isinstance(value, int) else Counter(value))
                )
        yield from ConnectionCollector(total, is_counted=self._is_counted).collect()
