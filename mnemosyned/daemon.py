"""One daemon, from its configuration to its end: start, serve, drain, stop. `assembly.py` makes its parts.

Start
-----
1. The private database, if there is one. It ends with the thread that started it, so it is started before
   any other thread or event loop exists.
2. The parts (assembly.py). An invalid file of TLS or of callers ends the start; its line names the flag.
3. The gRPC port, the peers' port if there is one, then the admin port (ports.py). A port in use ends the
   start before the storage is touched. The ports listen early, so that a balancer and `/healthr` get an
   answer while the storage is awaited.
4. The storage. An unavailable one is awaited without a limit: in a cluster all parts may start at once. One
   that refuses this daemon (a wrong password, a table of another form) ends it.
5. Everything that repeats: health of the storage, touches, cleanup, changed files; and the node joins.
6. SERVING, once the node has joined: before that it cannot keep copies, and writes of others do not reach it.

Calls are taken from step 3 on. They wait for step 6, 2 s at most (api/opening.py), and are UNAVAILABLE if the
first try of step 4 fails. A balancer that asks for the node's health sends none before step 6.

Stop
----
A signal (signals.py) or a peer's Leave sets one event. The rest is `_drain` and the end of `run`:

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
    service, lease, store         | after all that use them: a write under way still needs the lease
    admin port                    | late, so that metrics and health show the drain
    spans are sent                | after the last call that could make one

A second Ctrl-C ends the process at once.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING, Final, cast

import uvloop

from aio.periodic import run_periodically
from mnemosyned import assembly, configured_files, host_limits
from mnemosyned.admin.health import Readiness
from mnemosyned.admin.pulse import Pulse
from mnemosyned.announcement import announce, greet, storage_shown
from mnemosyned.assembly import Hooks
from mnemosyned.config.flags import ConfigError
from mnemosyned.errors import MnemosyneError
from mnemosyned.host_limits import TooFewThreads
from mnemosyned.observe import logs
from mnemosyned.observe.config import ObserveConfig
from mnemosyned.observe.metrics import (
    new_registry,
    show_build,
    show_certificates_end,
    show_dropped_lines,
    show_readiness,
    show_silence,
)
from mnemosyned.observe.stray_output import log_loop_failure
from mnemosyned.ports import Ports, Vitals, open_ports
from mnemosyned.reload import Reload
from mnemosyned.security.file_reloader import FilesUnusable
from mnemosyned.sessions.cleanup import run_cleanup
from mnemosyned.sessions.config import SessionsConfig
from mnemosyned.sessions.counts import keep_estimating
from mnemosyned.sessions.store import StorageRefused
from mnemosyned.signals import Signals
from mnemosyned.storage.engines import PrivateServer, StorageConfig, Surroundings, new_store, token_hasher
from mnemosyned.storage.hash_keys import warn_of_unknown_keys
from mnemosyned.storage.health import StorageHealth
from mnemosyned.transport.call import tell_left_out
from mnemosyned.transport.config import GrpcConfig
from mnemosyned.transport.engine import ListenFailed
from mnemosyned.transport.traces import Tracing, TracingUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor

    from mnemosyned.assembly import Parts
    from mnemosyned.config.config import Config
    from mnemosyned.place import Supervised
    from mnemosyned.sessions.store import FullStore, Storage

log = logging.getLogger(__name__)

# The last touches get this long to reach a storage that may be unavailable. Without them the sessions that
# were used last expire up to one touch interval too early.
_LAST_FLUSH_S: Final = 5.0
_LEFT_OUT_LINES_S: Final = 2.0
# How long a thread waits for another one that computes. The event loop waits so for a page of the admin port,
# after each of its own waits. The default is 5 ms.
_SWITCH_S: Final = 0.0005
# How long to wait for the first lease. Another daemon of this name may keep this one from it for good: then
# this one serves past its cache.
_REGISTERED_S: Final = 4.0
# How often the private database is looked at. It is for development: half a second of errors does no harm.
_SERVER_CHECK_S: Final = 0.5


class StartFailed(Exception):
    """The daemon cannot run as configured; the text is one line for people, with the flag or the address."""


def run(config: Config, parse: Callable[[], Config], worker: Supervised | None = None) -> None:
    """Run until a signal (signals.py); `parse` reads the configuration again, for SIGHUP.

    `worker`: this process is one of several of a daemon, which has another process as its supervisor.

    Raises:
        StartFailed: the daemon could not start, or the storage refused it.
    """
    # grpcio's core reads the variable when it is first imported. By default it writes a line of its own about
    # each malformed header of a client, without a bound.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if config[GrpcConfig].is_debug:
        os.environ["GRPC_VERBOSITY"] = "debug"
        logging.getLogger("mnemosyned.transport").setLevel(logging.DEBUG)
    if os.environ["GRPC_VERBOSITY"].upper() != "NONE":
        logs.capture_native_output()
    try:
        host_limits.need_threads(config)
        # Before any thread that stays, or event loop: the kernel ends the server with the thread that started
        # it, so that no server outlives a daemon that is killed.
        server = config[StorageConfig].engine.start_server(config)
    except (StorageRefused, TooFewThreads) as exc:
        raise StartFailed(str(exc)) from exc
    _collect_rarely()
    sys.setswitchinterval(_SWITCH_S)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_Daemon(config, server, worker).run(parse))
    finally:
        if server is not None:
            server.stop()


def _collect_rarely() -> None:
    # Each miss leaves a few objects that live for seconds. With the default threshold of 700 the collector
    # went through the whole cache several times a second: a flood of unknown tokens cost twice as much.
    # `freeze` takes what the imports have made out of every collection.
    #
    # A collection stops all calls. Of the young it takes 10 ms for 5,000 tasks of failed calls, and of the
    # next age about as long for 50,000 objects. All are collected after a hundred million.
    gc.freeze()
    gc.set_threshold(5_000, 10, 2_000)
    gc.enable()


class _Daemon:
    """The life of one daemon: constructed before the event loop does anything, `run` once.

    `_is_in_service` is true from SERVING to the drain; readiness needs it and a storage that answers.
    `_refusal` is why the storage refused this daemon: `run` raises it after a clean stop.
    """

    def __init__(self, config: Config, server: PrivateServer | None, worker: Supervised | None) -> None:
        self._config = config
        self._server = server
        self._worker = worker
        self._registry = new_registry()
        self._stop = asyncio.Event()
        try:
            self._tls = configured_files.follow_tls(config)
            self._keys = configured_files.follow_callers(config)
            self._address = configured_files.follow_address(config)
        except ConfigError as exc:
            raise StartFailed(str(exc)) from exc
        self._tracing = _new_tracing(config[ObserveConfig].tracing_address)
        self._hasher = token_hasher(config)
        surroundings = Surroundings(registry=self._registry, server=server, address=self._address)
        store = new_store(config, surroundings, self._hasher)
        keys = self._keys
        self._parts = assembly.assemble(
            config,
            store,
            Hooks(
                registry=self._registry,
                stop=self._asked_to_leave,
                callers=None if keys is None else lambda: keys.content,
                tracing=self._tracing,
                place=None if worker is None else worker.place,
            ),
        )
        tls = self._tls
        if tls is not None:
            show_certificates_end(self._registry, lambda: tls.content.expires_at_s)
        show_build(self._registry, engine=config[GrpcConfig].engine, storage=config[StorageConfig].name)
        show_dropped_lines(self._registry, logs.dropped_lines)
        show_readiness(self._registry, lambda: self._readiness().is_ready)
        self._storage_health = _new_health(store, self._parts)
        # For as long as this object: the private server ends with the thread that has started it again.
        self._restarter = ThreadPoolExecutor(1, "embedded-postgres")
        self._is_in_service = False
        self._is_draining = False
        self._refusal = ""
        self._where: dict[str, str] = {}  # what it listens on and stores in, for the log

    async def run(self, parse: Callable[[], Config]) -> None:
        """Serve until a signal.

        Raises:
            StartFailed: a port cannot be listened on, or the storage refuses this daemon.
        """
        asyncio.get_running_loop().set_exception_handler(log_loop_failure)
        pulse = Pulse()
        pulse.start()
        show_silence(self._registry, pulse.silence_s)
        files = (self._tls, self._keys, self._address)
        reload = Reload(self._config, parse, files, self._parts.node)
        signals = Signals(stop=self._stop.set, reload=reload.ask)
        ports = await self._listen(pulse)
        try:
            async with asyncio.TaskGroup() as group:
                upkeep = [
                    group.create_task(self._open_and_keep_up(ports)),
                    # Also before the storage is open: its address may be what is wrong.
                    group.create_task(reload.run()),
                    group.create_task(signals.run()),
                ]
                await self._stop.wait()
                for task in upkeep:
                    task.cancel()
        finally:
            # Also after an exception of the upkeep: calls in flight must not pay for a bug there.
            await self._drain(ports)
            await self._parts.service.close()
            if self._parts.keeper is not None:
                await self._parts.keeper.resign()
                await self._parts.keeper.close()
            await self._parts.store.close()
            # On a thread: it waits for the admin thread.
            await asyncio.to_thread(ports.admin.stop)
            pulse.stop()
            if self._tracing is not None:
                # On a thread: it blocks for seconds if the endpoint does not answer.
                await asyncio.to_thread(self._tracing.close)
            await self._tell_left_out(is_last=True)
            log.info("stopped")
        if self._refusal:
            raise StartFailed(self._refusal)

    async def _listen(self, pulse: Pulse) -> Ports:
        """Open all ports. Raises StartFailed, with no port open."""
        self._parts.opening.hold()
        try:
            vitals = Vitals(readiness=self._readiness, pulse=pulse, is_draining=lambda: self._is_draining)
            place = None if self._worker is None else self._worker.place
            ports = await open_ports(self._config, self._parts, self._registry, vitals, place)
            if self._tls is not None:
                await ports.follow_tls(self._tls, self._config, self._parts.node)
        except (ListenFailed, FilesUnusable) as exc:
            raise StartFailed(str(exc)) from exc
        self._announce(ports)
        return ports

    def _asked_to_leave(self) -> None:
        if self._worker is not None:
            self._worker.tell("leaving")
        self._stop.set()

    async def _open_and_keep_up(self, ports: Ports) -> None:
        """Open the storage, and then run all that repeats while calls are served; until cancelled.

        One task group owns everything: a bug that ends one of the tasks stops the daemon, instead of leaving
        a daemon that serves without its cleanup.
        """
        parts = self._parts
        async with asyncio.TaskGroup() as group:
            if self._server is not None and self._server.is_owner:
                # Before the storage is opened, which waits for this server if it has died at its start.
                group.create_task(keep_running(self._server, self._restarter))
            if self._address is not None:
                # Before the storage is opened too: its address may be what keeps it from being opened.
                group.create_task(self._address.run())
            if not await self._open_storage():
                return
            if self._config[StorageConfig].engine.capabilities.can_rename:
                group.create_task(warn_of_unknown_keys(cast("FullStore", parts.store), self._hasher))
            if parts.node is not None:
                group.create_task(parts.node.run())
            # Beside the join, not after it: `node.run` does not return.
            group.create_task(self._begin_to_serve(ports))
            for files in (self._tls, self._keys):
                if files is not None:
                    group.create_task(files.run())
            group.create_task(self._storage_health.run())
            group.create_task(
                run_periodically("left_out_lines", self._tell_left_out, period_s=lambda: _LEFT_OUT_LINES_S)
            )
            group.create_task(keep_estimating(parts.store, parts.service.counts))
            group.create_task(parts.touches.run(self._config[SessionsConfig].touch_interval_s))
            group.create_task(
                run_cleanup(
                    parts.service,
                    period_s=self._config[SessionsConfig].ttc_s,
                    metrics=parts.upkeep,
                    rng=Random(),  # noqa: S311  # only jitter
                )
            )

    async def _open_storage(self) -> bool:
        """Return whether the storage takes this daemon; if not, its stop has begun."""
        try:
            await self._storage_health.open()
        except StorageRefused as exc:
            # Not raised here: the stop has the same steps as after a signal.
            self._refusal = str(exc)
            self._stop.set()
            return False
        if self._parts.keeper is not None:
            self._parts.keeper.begin()
        return True

    async def _tell_left_out(self, *, is_last: bool = False) -> None:
        tables = (self._parts.table, self._parts.peers)
        methods = [method for table in tables if table is not None for method in table.methods()]
        # At the end as if the second were over.
        tell_left_out(methods, time.perf_counter() + is_last)

    async def _begin_to_serve(self, ports: Ports) -> None:
        if self._parts.node is not None:
            await self._parts.node.has_joined.wait()
        self._parts.opening.release()
        if self._parts.keeper is not None:
            # After a crash the row of the former process must lapse first. Writes would wait for that.
            with suppress(TimeoutError):
                async with asyncio.timeout(_REGISTERED_S):
                    await self._parts.keeper.has_registered.wait()
        self._parts.health.set_serving(True)
        self._is_in_service = True
        if self._worker is not None and ports.turns is not None:
            ports.turns.serve()
            log.info("worker_serving", extra={"node": self._worker.place.name})
            self._worker.tell("serving")
        else:
            log.info("serving", extra=self._where)
            # Not earlier: it shows a command to try, which would fail.
            greet(self._config, self._where)

    async def _drain(self, ports: Ports) -> None:
        grpc, node = self._config[GrpcConfig], self._parts.node
        log.info("draining", extra={"timeout_s": grpc.drain_timeout_s})
        self._is_in_service, self._is_draining = False, True
        self._parts.health.close()
        self._parts.opening.release()
        # Balancers have this long to see NOT_SERVING, and peers to route by another ring. Calls are answered
        # until both are over.
        await asyncio.gather(asyncio.sleep(grpc.drain_delay_s), self._leave())
        await ports.engine.drain()
        await self._flush_touches()
        if node is not None:
            await node.announce_left()
        if ports.peers:
            await asyncio.gather(*(one.engine.drain() for one in ports.peers))
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
                **({} if is_serving else {"reason": self._storage_health.reason}),
                "cluster": {} if node is None else node.probes(),
            },
        )

    def _announce(self, ports: Ports) -> None:
        if self._worker is not None:
            self._worker.follow(asyncio.get_running_loop(), self._stop.set)
            self._worker.tell("listening")
            return
        self._where = {
            "grpc": ports.grpc_address,
            **({"peers": ports.peers_address} if ports.peers_address else {}),
            "admin": ports.admin_address,
            "storage": storage_shown(self._config, self._server),
        }
        announce(self._config, self._where)
        configured_files.warn(self._config, self._tls)


def _new_health(store: Storage, parts: Parts) -> StorageHealth:
    keeper = parts.keeper
    health = StorageHealth(
        store,
        parts.clock,
        on_replaced=parts.cache.drop_everything,
        on_not_ready=parts.opening.release,
        has_lease=keeper is not None,
    )
    if keeper is not None:
        keeper.on_doubt.append(health.doubt)
    return health


def _new_tracing(endpoint: str) -> Tracing | None:
    try:
        return Tracing(endpoint) if endpoint else None
    except TracingUnavailable as exc:
        raise StartFailed(f"flag -tracing.agent.address: {exc}") from exc


async def keep_running(server: PrivateServer, restarter: Executor) -> None:
    """Restart the private server when it has died; on a thread of `restarter`, with which the server ends."""

    # It takes seconds, up to a minute. Meanwhile copies are served, and probes answered.
    async def look() -> None:
        if server.exited():
            log.error("private_server_died")
            try:
                await asyncio.get_running_loop().run_in_executor(restarter, server.restart)
            except StorageRefused as exc:
                log.error("private_server_restart_failed", extra={"error": str(exc)})

    await run_periodically("private_server_restart", look, period_s=lambda: _SERVER_CHECK_S)
