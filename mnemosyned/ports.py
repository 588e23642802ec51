"""The ports of one daemon: that of clients, that of peers, and the admin port.

    flag                  | port         | serves
    ----------------------+--------------+----------------------------------------------------------
    -host, -port          | gRPC         | SessionManager, health, reflection; the Peer service, if it has
                          |              | no port of its own
    -cluster.bind         | peers        | the Peer service and health, and nothing else
    -host, -port + 1      | admin        | metrics, health, pages (admin/server.py)

The peers' port has an engine of its own with the same limits and the same TLS files. So a firewall or a proxy
can keep clients from the Peer service by the port alone, and a flood of clients takes no connection of peers.

All ports are opened before the storage. If one of them cannot be opened, the others are closed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import Metric
from prometheus_client.registry import Collector

from cluster.peer_auth import is_loopback
from mnemosyned import assembly
from mnemosyned.admin.server import AdminServer
from mnemosyned.assembly import GRPC_ENGINES
from mnemosyned.node_config import ClusterConfig, split_address
from mnemosyned.observe.metrics import ConnectionCollector
from mnemosyned.security.config import TlsConfig
from mnemosyned.security.file_reloader import FilesUnusable
from mnemosyned.security.tls import admin_context
from mnemosyned.storage.engines import StorageConfig
from mnemosyned.transport.config import GrpcConfig
from mnemosyned.transport.engine import (
    UNIX_PREFIX,
    ConnectionStats,
    Engine,
    EngineOptions,
    ListenFailed,
    host_port,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from prometheus_client import CollectorRegistry

    from mnemosyned.admin.server import Page, Readiness
    from mnemosyned.assembly import Parts
    from mnemosyned.config.config import Config
    from mnemosyned.node import ClusterNode
    from mnemosyned.security.file_reloader import FileReloader
    from mnemosyned.security.tls import TlsMaterial


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """The open ports; the addresses are as the log shows them."""

    engine: Engine
    peers: Engine | None  # None: peers come to `engine`
    admin: AdminServer
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
            self.admin.serve_tls(admin_context(files))

        reloader.followers += [reload_admin, self.engine.reload_tls]
        if self.peers is not None:
            reloader.followers.append(self.peers.reload_tls)
        if node is not None:
            await node.identify(reloader.content)
            reloader.followers.append(node.identify)


async def open_ports(
    config: Config, parts: Parts, registry: CollectorRegistry, readiness: Callable[[], Readiness]
) -> Ports:
    """Open all ports.

    Raises:
        ListenFailed: a port cannot be opened, and none is open; the text is one line for people.
    """
    grpc, bind = config[GrpcConfig], config[ClusterConfig].bind
    options = assembly.engine_options(config)
    new_engine = GRPC_ENGINES[grpc.engine]
    engine, peers, stats = new_engine(parts.table, options), None, [options.stats]
    if parts.peers is not None:
        peers_options = _peers_options(options, bind)
        peers = new_engine(parts.peers, peers_options)
        stats.append(peers_options.stats)
    if grpc.engine == "h2":
        registry.register(_AllConnections(stats))
    port = await engine.start()
    try:
        if peers is not None:
            await _start_peers(peers)
        admin = _open_admin(config, parts, registry, readiness)
    except ListenFailed:
        for one in (engine, peers):
            if one is not None:
                await one.drain()
        raise
    scheme = "http" if options.tls is None else "https"
    return Ports(
        engine=engine,
        peers=peers,
        admin=admin,
        grpc_address=host_port(grpc.host, port),
        peers_address=bind if peers is not None else "",
        admin_address=f"{scheme}://{host_port(admin_host(grpc), admin.port)}",
    )


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


def _peers_options(options: EngineOptions, bind: str) -> EngineOptions:
    host, port = split_address(bind)
    return replace(options, host=host, port=port, stats=ConnectionStats())


async def _start_peers(peers: Engine) -> None:
    try:
        await peers.start()
    except ListenFailed as exc:
        raise ListenFailed(f"flag -cluster.bind: {exc}") from exc


def _open_admin(
    config: Config, parts: Parts, registry: CollectorRegistry, readiness: Callable[[], Readiness]
) -> AdminServer:
    grpc, files = config[GrpcConfig], assembly.tls_files(config)
    host = admin_host(grpc)
    # The contract's rule; 0 stands for any free port, for both.
    port = grpc.port and grpc.port + 1
    try:
        return AdminServer.start(
            host,
            port,
            registry=registry,
            readiness=readiness,
            pages={} if parts.node is None else {"/debug/cluster": _cluster_page(parts.node)},
            tls=None if files is None else admin_context(files),
        )
    except FilesUnusable as exc:
        raise ListenFailed(str(exc)) from exc
    except OSError as exc:
        raise ListenFailed(f"cannot listen on {host_port(host, port)}: {exc.strerror}") from exc


def _cluster_page(node: ClusterNode) -> Page:
    from mnemosyned.admin.cluster import page  # as in `assembly._new_node`

    return partial(page, node)


class _AllConnections(Collector):
    """Shows the connections of the gRPC port and of the peers' port together."""

    def __init__(self, stats: Sequence[ConnectionStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        total = ConnectionStats()
        for name in (one.name for one in fields(ConnectionStats)):
            for stats in self._stats:
                value = getattr(stats, name)
                # A copy of a counter, made in one step: the event loop adds to it.
                setattr(
                    total, name, getattr(total, name) + (value if isinstance(value, int) else Counter(value))
                )
        yield from ConnectionCollector(total).collect()
