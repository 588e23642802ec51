"""One daemon, from its configuration to its end: start, serve, drain, stop. `assembly.py` makes its parts.

Start
-----
1. The private database, if there is one. It ends with the thread that started it, so it is started before
   any other thread or event loop exists.
2. The parts (assembly.py). Files of TLS and of callers are read: an invalid one ends the start here, with one
   line that names the flag.
3. The gRPC port, the peers' port if there is one, then the admin port (ports.py). A port in use ends the
   start before the storage is touched. The ports listen early, so that a balancer and `/healthr` get an
   answer while the storage is awaited.
4. The storage. An unavailable one is awaited without a limit: in a cluster all parts may start at once. One
   that refuses this daemon (a wrong password, a table of another form) ends it.
5. Everything that repeats: health of the storage, touches, cleanup, changed files; and the node joins.
6. SERVING, once the node has joined: before that it cannot keep copies, and writes of others do not reach it.

Calls are answered from step 3 on, with UNAVAILABLE until step 4. A balancer sends none before step 6.

Stop
----
SIGTERM, SIGINT or a peer's Leave sets one event. The rest is `_drain` and the end of `run`:

    step                          | why here
    ------------------------------+---------------------------------------------------------------------
    upkeep is cancelled           | nothing is begun that the stop would have to await
    NOT_SERVING                   | balancers send new calls to other nodes
    -drain.delay, and the ring    | balancers need time to see it, and peers a moment to route by a ring
      without this node           |   without this node; calls are still answered in both
    the engine drains             | calls in flight finish; there are no new ones
    touches are flushed           | after the last call that could extend a session
    the peers are told            | only now no peer can have a call under way here
    the peers' port drains        | peers that probe this node before they are told find it alive
    service, store                | after all that use them
    admin port                    | late, so that metrics and health show the drain
    spans are sent                | after the last call that could make one

A second signal ends the process at once: the handlers are removed by the first.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import sys
from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING, Final, cast

import uvloop

from aio.periodic import run_periodically
from cluster.peer_auth import is_loopback
from mnemosyned import __version__, assembly, configured_files
from mnemosyned.admin.server import Readiness
from mnemosyned.assembly import Hooks
from mnemosyned.config.flags import ConfigError
from mnemosyned.errors import MnemosyneError
from mnemosyned.node_config import ClusterConfig
from mnemosyned.observe.config import ObserveConfig
from mnemosyned.observe.metrics import new_registry, show_certificates_end
from mnemosyned.ports import Ports, admin_host, is_plaintext_exposed, open_ports
from mnemosyned.security.config import AuthConfig, TlsConfig
from mnemosyned.security.file_reloader import FilesUnusable
from mnemosyned.sessions.cleanup import run_cleanup
from mnemosyned.sessions.config import SessionsConfig
from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.engines import PrivateServer, StorageConfig, Surroundings, new_store, token_hasher
from mnemosyned.storage.hash_keys import warn_of_unknown_keys
from mnemosyned.storage.health import StorageHealth
from mnemosyned.transport.config import GrpcConfig
from mnemosyned.transport.engine import ListenFailed
from mnemosyned.transport.traces import Tracing, TracingUnavailable

if TYPE_CHECKING:
    from mnemosyned.config.config import Config
    from mnemosyned.sessions.store import FullStore

log = logging.getLogger(__name__)

# The last touches get this long to reach a storage that may be unavailable. Without them the sessions that
# were used last expire up to one touch interval too early.
_LAST_FLUSH_S: Final = 5.0
# How often the private database is looked at. It is for development: half a second of errors does no harm.
_SERVER_CHECK_S: Final = 0.5


class StartFailed(Exception):
    """The daemon cannot run as configured; the text is one line for people, with the flag or the address."""


def run(config: Config) -> None:
    """Run until SIGTERM or SIGINT; a second signal ends the process at once.

    Raises:
        StartFailed: the daemon could not start, or the storage refused it.
    """
    # grpcio's core reads the variable when it is first imported. By default it writes a line of its own about
    # each malformed header of a client, without a bound.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if config[GrpcConfig].is_debug:
        os.environ["GRPC_VERBOSITY"] = "debug"
        logging.getLogger("mnemosyned.transport").setLevel(logging.DEBUG)
    try:
        # Before any thread or event loop: the kernel ends the server with the thread that started it, so that
        # no server outlives a daemon that is killed.
        server = config[StorageConfig].engine.start_server(config)
    except StorageRefused as exc:
        raise StartFailed(str(exc)) from exc
    _allow_many_files()
    _collect_rarely()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_Daemon(config, server).run())
    finally:
        if server is not None:
            server.stop()


def _allow_many_files() -> None:
    # A connection is a file. The soft limit, often 1,024, exists for programs that use select().
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _collect_rarely() -> None:
    # Each miss leaves a few objects that live for seconds. With the default threshold of 700 the collector
    # went through the whole cache several times a second: a flood of unknown tokens cost twice as much.
    # `freeze` takes what the imports have made out of every collection.
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    gc.enable()


class _Daemon:
    """The life of one daemon: constructed before the event loop does anything, `run` once.

    `_is_in_service` is true from SERVING to the drain; readiness needs it and a storage that answers.
    `_refusal` is why the storage refused this daemon: `run` raises it after a clean stop.
    """

    def __init__(self, config: Config, server: PrivateServer | None) -> None:
        self._config = config
        self._server = server
        self._registry = new_registry()
        self._stop = asyncio.Event()
        try:
            self._tls = configured_files.follow_tls(config)
            self._keys = configured_files.follow_callers(config)
        except ConfigError as exc:
            raise StartFailed(str(exc)) from exc
        self._tracing = _new_tracing(config[ObserveConfig].tracing_address)
        self._hasher = token_hasher(config)
        store = new_store(config, Surroundings(registry=self._registry, server=server), self._hasher)
        keys = self._keys
        self._parts = assembly.assemble(
            config,
            store,
            Hooks(
                registry=self._registry,
                stop=self._stop.set,
                callers=None if keys is None else lambda: keys.content,
                tracing=self._tracing,
            ),
        )
        tls = self._tls
        if tls is not None:
            show_certificates_end(self._registry, lambda: tls.content.expires_at_s)
        self._storage_health = StorageHealth(store, self._parts.clock)
        self._is_in_service = False
        self._refusal = ""
        self._welcome = ""  # for people, in development

    async def run(self) -> None:
        """Serve until a signal.

        Raises:
            StartFailed: a port cannot be listened on, or the storage refuses this daemon.
        """
        _set_on_signal(self._stop)
        ports = await self._listen()
        try:
            async with asyncio.TaskGroup() as group:
                upkeep = group.create_task(self._open_and_keep_up())
                await self._stop.wait()
                upkeep.cancel()
        finally:
            # Also after an exception of the upkeep: calls in flight must not pay for a bug there.
            await self._drain(ports)
            await self._parts.service.close()
            await self._parts.store.close()
            ports.admin.stop()
            if self._tracing is not None:
                # On a thread: it blocks for seconds if the endpoint does not answer.
                await asyncio.to_thread(self._tracing.close)
            log.info("stopped")
        if self._refusal:
            raise StartFailed(self._refusal)

    async def _listen(self) -> Ports:
        """Open all ports. Raises StartFailed, with no port open."""
        try:
            ports = await open_ports(self._config, self._parts, self._registry, self._readiness)
            if self._tls is not None:
                await ports.follow_tls(self._tls, self._config, self._parts.node)
        except (ListenFailed, FilesUnusable) as exc:
            raise StartFailed(str(exc)) from exc
        self._announce(ports)
        return ports

    async def _open_and_keep_up(self) -> None:
        """Open the storage, and then run all that repeats while calls are served; until cancelled.

        One task group owns everything: a bug that ends one of the tasks stops the daemon, instead of leaving
        a daemon that serves without its cleanup.
        """
        parts = self._parts
        async with asyncio.TaskGroup() as group:
            if self._server is not None and self._server.is_owner:
                # Before the storage is opened, which waits for this server if it has died at its start.
                group.create_task(_keep_running(self._server))
            try:
                await self._storage_health.open()
            except StorageRefused as exc:
                # Not raised here: the stop has the same steps as after a signal.
                self._refusal = str(exc)
                self._stop.set()
                return
            if self._config[StorageConfig].engine.capabilities.can_rename:
                group.create_task(warn_of_unknown_keys(cast("FullStore", parts.store), self._hasher))
            if parts.node is not None:
                group.create_task(parts.node.run())
            # Beside the join, not after it: `node.run` does not return.
            group.create_task(self._begin_to_serve())
            for files in (self._tls, self._keys):
                if files is not None:
                    group.create_task(files.run())
            group.create_task(self._storage_health.run())
            group.create_task(parts.touches.run(self._config[SessionsConfig].touch_interval_s))
            group.create_task(
                run_cleanup(
                    parts.service,
                    period_s=self._config[SessionsConfig].ttc_s,
                    metrics=parts.upkeep,
                    rng=Random(),  # noqa: S311  # only jitter
                )
            )

    async def _begin_to_serve(self) -> None:
        if self._parts.node is not None:
            await self._parts.node.has_joined.wait()
        self._parts.health.set_serving(True)
        self._is_in_service = True
        # Not earlier: it shows a command to try, which would fail.
        sys.stdout.write(self._welcome)
        sys.stdout.flush()

    async def _drain(self, ports: Ports) -> None:
        grpc, node = self._config[GrpcConfig], self._parts.node
        log.info("draining", extra={"timeout_s": grpc.drain_timeout_s})
        self._is_in_service = False
        self._parts.health.close()
        # Balancers have this long to see NOT_SERVING, and peers to route by another ring. Calls are answered
        # until both are over.
        await asyncio.gather(asyncio.sleep(grpc.drain_delay_s), self._leave())
        await ports.engine.drain()
        await self._flush_touches()
        if node is not None:
            await node.announce_left()
        if ports.peers is not None:
            await ports.peers.drain()
            # A peer's last call may have been under way at the first flush.
            await self._flush_touches()

    async def _flush_touches(self) -> None:
        touches = self._parts.touches
        try:
            async with asyncio.timeout(_LAST_FLUSH_S):
                await touches.flush()
        except (MnemosyneError, TimeoutError):
            # These sessions expire up to a touch interval early. To wait longer would end in a SIGKILL.
            log.error("touches_lost", extra={"sessions": len(touches)})

    async def _leave(self) -> None:
        if self._parts.node is not None:
            await self._parts.node.leave()

    def _readiness(self) -> Readiness:
        """Return whether this node is ready, never because of a peer: then one dead node would stop them all.

        Runs on a thread of the admin port.
        """
        is_serving, node = self._storage_health.is_serving, self._parts.node
        return Readiness(
            is_ready=is_serving and self._is_in_service,
            probes={
                self._config[StorageConfig].name: "SERVING" if is_serving else "NOT_SERVING",
                "cluster": {} if node is None else node.probes(),
            },
        )

    def _announce(self, ports: Ports) -> None:
        """Log where the daemon listens, and warn of settings that are safe only for trials."""
        config, grpc, tls = self._config, self._config[GrpcConfig], self._config[TlsConfig]
        storage = config[StorageConfig]
        where = {
            "grpc": ports.grpc_address,
            **({"peers": ports.peers_address} if ports.peers_address else {}),
            "admin": ports.admin_address,
            "storage": storage.name if self._server is None else str(self._server.directory),
        }
        log.info("serving", extra={"version": __version__, "engine": grpc.engine, **where})
        if not (
            config[AuthConfig].keys_file or tls.client_auth == "require" or is_loopback(admin_host(grpc))
        ):
            log.warning(
                "anybody_may_call", extra={"host": grpc.host, "flags": "-auth.keys, -tls.client-auth"}
            )
        if is_plaintext_exposed(config):
            log.warning("cluster_without_tls", extra={"flags": "-tls, -cluster.plaintext"})
        if not storage.engine.capabilities.is_durable:
            log.warning("storage_forgets_all_sessions_at_exit", extra={"storage": storage.name})
        if not storage.engine.capabilities.is_shared and config[ClusterConfig].listen:
            log.warning("storage_is_for_a_single_node", extra={"storage": storage.name})
        configured_files.warn(config, self._tls)
        if config[ObserveConfig].log_environment == "development":
            self._welcome = _WELCOME.format(version=__version__, python=sys.executable, **where)


_WELCOME: Final = """
mnemosyned {version}
  gRPC     {grpc}
  metrics  {admin}/metrics, health on /healthz and /healthr
  data     {storage}
  try it   {python} -m mnemosynerpc.example {grpc}
  stop it  Ctrl-C

"""


def _new_tracing(endpoint: str) -> Tracing | None:
    try:
        return Tracing(endpoint) if endpoint else None
    except TracingUnavailable as exc:
        raise StartFailed(f"flag -tracing.agent.address: {exc}") from exc


async def _keep_running(server: PrivateServer) -> None:
    """Restart the private server when it has died; on this thread, with which the server ends."""

    # It blocks the event loop while the server starts. Without its storage the daemon could do little else.
    async def look() -> None:
        if server.exited():
            log.error("embedded_postgres_died")
            try:
                server.restart()
            except StorageRefused as exc:
                log.error("embedded_postgres_restart_failed", extra={"error": str(exc)})

    await run_periodically("embedded_postgres_restart", look, period_s=lambda: _SERVER_CHECK_S)


def _set_on_signal(stop: asyncio.Event) -> None:
    """Have the first SIGTERM or SIGINT set the event; the next one has its usual effect.

    So a drain that takes too long can be ended by hand, without SIGKILL.
    """
    loop = asyncio.get_running_loop()

    def on_signal() -> None:
        stop.set()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
