"""The composition root: from a configuration to a running daemon, and back down in order.

Down: NOT_SERVING first, then no new calls, then those in flight, then what they left to write.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from random import Random
from typing import Final

import uvloop

from cache.lru import Lru
from cache.read_through import ReadThrough
from cluster.peer_auth import is_loopback
from mnemosyned import __version__
from mnemosyned.admin.cluster import ClusterCollector, page
from mnemosyned.admin.server import AdminServer, Readiness
from mnemosyned.api import reflection, session_manager
from mnemosyned.api.auth import guard
from mnemosyned.api.health import SERVICE_NAME as HEALTH
from mnemosyned.api.health import Health
from mnemosyned.api.router import carried
from mnemosyned.config.config import Config
from mnemosyned.embedded.server import EmbeddedError, EmbeddedPostgres, data_directory
from mnemosyned.errors import MnemosyneError
from mnemosyned.node import ClusterNode, NodeOptions, Sessions
from mnemosyned.observe.metrics import (
    AuthMetrics,
    CacheCollector,
    RpcCollector,
    UpkeepMetrics,
    new_registry,
    show_certificates_end,
)
from mnemosyned.options import bag_limits, engine_options, lifetimes, tls_files
from mnemosyned.security import api_keys as keys
from mnemosyned.security.api_keys import Callers
from mnemosyned.security.file_reloader import FileReloader, FilesUnusable
from mnemosyned.security.tls import (
    TlsMaterial,
    admin_context,
    tls_reloader,
)
from mnemosyned.sessions.cleanup import run_cleanup
from mnemosyned.sessions.clock import StorageClock
from mnemosyned.sessions.encoded import EncodedSession
from mnemosyned.sessions.service import Lifetimes, SessionService
from mnemosyned.sessions.store import SessionStore, StorageRefused
from mnemosyned.sessions.touches import TouchWriter
from mnemosyned.storage.engines import new_store, token_hasher, warn_of_unknown_keys
from mnemosyned.storage.health import StorageHealth
from mnemosyned.transport.engine import Engine, EngineOptions, ListenFailed, host_port
from mnemosyned.transport.grpcio_engine import GrpcioEngine
from mnemosyned.transport.h2corn_engine import H2cornEngine
from mnemosyned.transport.methods import MethodTable
from mnemosyned.transport.traces import Tracing, TracingUnavailable

log = logging.getLogger(__name__)

_ENGINES: Final[dict[str, Callable[[MethodTable, EngineOptions], Engine]]] = {
    "h2corn": H2cornEngine,
    "grpcio": GrpcioEngine,
}
_PUBLIC_SERVICES: Final = frozenset({session_manager.SERVICE_NAME, HEALTH})
# The last touches get this long to reach a storage that may be away.
_LAST_FLUSH_S: Final = 5.0
_EMBEDDED_CHECK_S: Final = 0.5


class StartFailed(Exception):
    """The daemon cannot run as configured; the text is one line for the operator."""


def run(config: Config) -> None:
    """Run until SIGTERM or SIGINT; a second one ends the process at once.

    Raises:
        StartFailed: it could not start, or its storage refused it.
    """
    if config.grpc_debug:
        # grpcio's core reads it when it is first used.
        os.environ["GRPC_VERBOSITY"] = "debug"
        logging.getLogger("mnemosyned.transport").setLevel(logging.DEBUG)
    embedded = start_embedded(config)
    _allow_many_files()
    _collect_rarely()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_Daemon(config, embedded).run())
    finally:
        if embedded is not None:
            embedded.stop()


def _allow_many_files() -> None:
    # A connection is a file. The soft limit, often 1,024, is there for programs that use select().
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _collect_rarely() -> None:
    # Each miss leaves a few objects that live for seconds. At the default of 700 the collector then went
    # through the whole cache several times a second: a flood of unknown tokens cost twice as much.
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def start_embedded(config: Config) -> EmbeddedPostgres | None:
    """Start the private server, if that is what the address asks for. Raises StartFailed.

    Before any thread or event loop: the server dies with the thread that started it.
    """
    if config.storage != "postgres" or not config.postgres_address.startswith("embedded:"):
        return None
    try:
        directory = data_directory(config.postgres_address, os.environ)
        return EmbeddedPostgres.start(directory, binaries=config.postgres_bin)
    except EmbeddedError as exc:
        raise StartFailed(f"embedded PostgreSQL: {exc}") from exc


class _Daemon:
    """The parts of one daemon, from nothing to nothing."""

    def __init__(self, config: Config, embedded: EmbeddedPostgres | None) -> None:
        self._config = config
        self._embedded = embedded
        self._registry = new_registry()
        self._upkeep = UpkeepMetrics(self._registry)
        self._clock = StorageClock()
        self._names = token_hasher(config)
        self._store = new_store(config, None if embedded is None else embedded.dsn, self._registry)
        self._watch = StorageHealth(self._store, self._clock)
        self._lru: Lru[EncodedSession] = Lru(max_entries=config.cache_size, max_bytes=config.cache_bytes)
        negative_bytes = config.cache_negative_bytes if config.cache_ttl_s else 0
        self._negative: Lru[None] = Lru(max_entries=sys.maxsize, max_bytes=negative_bytes)
        self._cache = ReadThrough(self._lru, self._negative, aliases=self._names)
        self._touches = TouchWriter(
            self._store,
            max_waiting=config.cache_size,
            lost=self._upkeep.touches_lost,
            on_gone=self._cache.drop,
        )
        self._tls = _new_tls_watch(config)
        self._keys = _new_keys_watch(config)
        self._node = _new_node(config, self._store, self._clock, self._cache, self._touches)
        self._service = self._new_service(self._cache, lifetimes(config))
        self._stop = asyncio.Event()
        self._tracing = _new_tracing(config.tracing_agent_address)
        self._health = Health(_PUBLIC_SERVICES)
        self._table = MethodTable()
        self._passing: SessionService | None = None  # past the cache, for tokens that others own
        self._add_methods()
        self._register_collectors()
        self._is_in_service = False
        self._refusal = ""
        self._welcome = ""  # for people, in development

    def _new_service(self, cache: ReadThrough[EncodedSession], lasting: Lifetimes) -> SessionService:
        return SessionService(
            self._store,
            cache,
            self._touches,
            clock=self._clock,
            lifetimes=lasting,
            bag_limits=bag_limits(self._config),
            elsewhere=None if self._node is None else self._node.forwarder,
        )

    def _add_methods(self) -> None:
        if self._node is None:
            session_manager.add_to(self._table, session_manager.Here(self._service))
        else:
            self._add_clustered_methods(self._node)
        if self._keys is not None:
            known = self._keys
            guard(self._table, lambda: known.content, AuthMetrics(self._registry))
        self._health.add_to(self._table)
        reflection.add_to(self._table, _PUBLIC_SERVICES)
        if self._tracing is not None:
            self._tracing.trace(self._table)

    def _add_clustered_methods(self, node: ClusterNode) -> None:
        # Beside the cache: a write past it ends what is in it, and the other way round.
        nothing: Lru[EncodedSession] = Lru(max_entries=0, max_bytes=0)
        no_cache = ReadThrough(nothing, beside=self._cache, aliases=self._names)
        self._passing = self._new_service(no_cache, replace(lifetimes(self._config), cache_us=0))
        services = node.services(self._service, self._passing)
        trace_context = carried if self._tracing is None else self._tracing.context
        session_manager.add_to(self._table, node.router(services, trace_context))
        calls = MethodTable()
        session_manager.add_to(calls, node.owner_router(services))
        if self._tracing is not None:
            self._tracing.trace(calls)
        node.serve_peers(self._table, calls, stop=self._stop.set)

    async def run(self) -> None:
        """Serve until a signal.

        Raises:
            StartFailed: a port cannot be listened on, or the storage refuses us.
        """
        stop = self._stop
        _set_on_signal(stop)
        operator, engine = await self._listen()
        try:
            async with asyncio.TaskGroup() as group:
                upkeep = group.create_task(self._open_and_keep_up(stop))
                await stop.wait()
                upkeep.cancel()
        finally:
            await self._drain(engine)
            await self._service.close()
            if self._passing is not None:
                await self._passing.close()
            await self._store.close()
            operator.stop()
            if self._tracing is not None:
                await asyncio.to_thread(self._tracing.close)
            log.info("stopped")
        if self._refusal:
            raise StartFailed(self._refusal)

    async def _listen(self) -> tuple[AdminServer, Engine]:
        config = self._config
        engine = _ENGINES[config.grpc_engine](self._table, engine_options(config))
        try:
            context = admin_context(tls_files(config)) if config.tls else None
            port = await engine.start()
            operator_port = config.port and config.port + 1
            operator = AdminServer.start(
                config.host,
                operator_port,
                registry=self._registry,
                readiness=self._readiness,
                pages={} if self._node is None else {"/debug/cluster": partial(page, self._node)},
                tls=context,
            )
        except (ListenFailed, FilesUnusable) as exc:
            raise StartFailed(str(exc)) from exc
        except OSError as exc:
            await engine.drain()
            address = host_port(config.host, operator_port)
            raise StartFailed(f"cannot listen on {address}: {exc.strerror}") from exc
        if self._tls is not None:
            await self._follow_tls(self._tls, operator, engine)
        self._announce(port, operator.port)
        return operator, engine

    async def _follow_tls(
        self, watch: FileReloader[TlsMaterial], operator: AdminServer, engine: Engine
    ) -> None:
        """Have everything that uses the TLS files take new ones."""

        async def reload_operator(_: TlsMaterial) -> None:
            operator.serve_tls(admin_context(tls_files(self._config)))

        watch.followers += [reload_operator, engine.reload_tls]
        if self._node is not None:
            await self._node.identify(watch.content)
            watch.followers.append(self._node.identify)

    async def _open_and_keep_up(self, stop: asyncio.Event) -> None:
        """Open the storage and then do what must go on while calls are served."""
        async with asyncio.TaskGroup() as group:
            if self._embedded is not None and self._embedded.is_owner:
                group.create_task(_keep_alive(self._embedded))
            try:
                await self._watch.open()
            except StorageRefused as exc:
                self._refusal = str(exc)
                stop.set()
                return
            group.create_task(warn_of_unknown_keys(self._store, self._names))
            if self._node is not None:
                group.create_task(self._node.run())
            group.create_task(self._begin_to_serve())
            for files in (self._tls, self._keys):
                if files is not None:
                    group.create_task(files.run())
            group.create_task(self._watch.run())
            group.create_task(self._touches.run(self._config.touch_interval_s))
            group.create_task(
                run_cleanup(
                    self._service,
                    period_s=self._config.ttc_s,
                    metrics=self._upkeep,
                    rng=Random(),  # noqa: S311  # only jitter
                )
            )

    async def _begin_to_serve(self) -> None:
        if self._node is not None:
            await self._node.has_joined.wait()
        self._health.set_serving(True)
        self._is_in_service = True
        # Now, since it invites to try.
        sys.stdout.write(self._welcome)
        sys.stdout.flush()

    async def _drain(self, engine: Engine) -> None:
        log.info("draining", extra={"timeout_s": self._config.drain_timeout_s})
        self._is_in_service = False
        self._health.close()
        # Whoever asks about the health has this long to see it; meanwhile calls are answered.
        await asyncio.gather(asyncio.sleep(self._config.drain_delay_s), self._leave())
        await engine.drain()
        try:
            async with asyncio.timeout(_LAST_FLUSH_S):
                await self._touches.flush()
        except (MnemosyneError, TimeoutError):
            log.error("touches_lost", extra={"sessions": len(self._touches)})
        if self._node is not None:
            await self._node.announce_left()

    async def _leave(self) -> None:
        if self._node is not None:
            await self._node.leave()

    def _readiness(self) -> Readiness:
        storage = "SERVING" if self._watch.is_serving else "NOT_SERVING"
        return Readiness(
            is_ready=self._watch.is_serving and self._is_in_service,
            probes={
                self._config.storage: storage,
                "cluster": {} if self._node is None else self._node.probes(),
            },
        )

    def _register_collectors(self) -> None:
        tls = self._tls
        if tls is not None:
            show_certificates_end(self._registry, lambda: tls.content.expires_at_s)
        self._registry.register(RpcCollector(self._table.stats()))
        if self._node is not None:
            self._registry.register(RpcCollector(self._node.client_stats.values(), side="client"))
            self._registry.register(ClusterCollector(self._node))
        self._registry.register(
            CacheCollector(
                self._cache.counters,
                entries=lambda: len(self._lru),
                size_bytes=lambda: self._lru.size_bytes,
                negative_entries=lambda: len(self._negative),
            )
        )

    def _announce(self, port: int, operator_port: int) -> None:
        config = self._config
        where = {
            "grpc": host_port(config.host, port),
            "operator": f"http{'s' if config.tls else ''}://{host_port(config.host, operator_port)}",
            "storage": config.storage if self._embedded is None else str(self._embedded.directory),
        }
        log.info("serving", extra={"version": __version__, "engine": config.grpc_engine, **where})
        if not (config.auth_keys or config.tls_client_auth == "require" or is_loopback(config.host)):
            log.warning(
                "anybody_may_call", extra={"host": config.host, "flags": "-auth.keys, -tls.client-auth"}
            )
        if config.storage == "memory":
            log.warning("memory_storage_forgets_all_sessions_at_exit")
        if config.log_environment == "development":
            self._welcome = _WELCOME.format(version=__version__, python=sys.executable, **where)


_WELCOME: Final = """
mnemosyned {version}
  gRPC     {grpc}
  metrics  {operator}/metrics, health on /healthz and /healthr
  data     {storage}
  try it   {python} -m mnemosynerpc.example {grpc}
  stop it  Ctrl-C

"""


def _new_node(
    config: Config,
    store: SessionStore,
    clock: StorageClock,
    cache: ReadThrough[EncodedSession],
    touches: TouchWriter,
) -> ClusterNode | None:
    if not config.cluster_listen or config.storage == "memory":
        return None
    options = NodeOptions(
        listen=config.cluster_listen,
        seeds=[seed for seed in config.cluster_seeds if seed != config.cluster_listen],
        label=config.cluster_label,
        secrets=config.cluster_secret,
        peer_names=config.tls_peer_names,
        max_message_bytes=config.grpc_max_message_bytes,
        cache_ttl_s=config.cache_ttl_s,
    )
    return ClusterNode(options, Sessions(store=store, clock=clock, cache=cache, touches=touches))


def _new_tracing(endpoint: str) -> Tracing | None:
    try:
        return Tracing(endpoint) if endpoint else None
    except TracingUnavailable as exc:
        raise StartFailed(f"flag -tracing.agent.address: {exc}") from exc


def _new_tls_watch(config: Config) -> FileReloader[TlsMaterial] | None:
    if not config.tls:
        return None
    try:
        return tls_reloader(tls_files(config))
    except FilesUnusable as exc:
        raise StartFailed(f"flag -tls: {exc}") from exc


def _new_keys_watch(config: Config) -> FileReloader[Callers] | None:
    if not config.auth_keys:
        return None
    try:
        return FileReloader("keys", [config.auth_keys], partial(keys.read, config.auth_keys))
    except FilesUnusable as exc:
        raise StartFailed(f"flag -auth.keys: {exc}") from exc


async def _keep_alive(embedded: EmbeddedPostgres) -> None:
    """Start the embedded server again when it has died; on this thread, which it dies with."""
    while True:
        await asyncio.sleep(_EMBEDDED_CHECK_S)
        if embedded.exited():
            log.error("embedded_postgres_died")
            try:
                embedded.restart()
            except EmbeddedError as exc:
                log.error("embedded_postgres_restart_failed", extra={"error": str(exc)})


def _set_on_signal(stop: asyncio.Event) -> None:
    """Have the first SIGTERM or SIGINT set the event; the next one does what it always does."""
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        stop.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
