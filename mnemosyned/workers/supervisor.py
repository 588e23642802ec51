"""The supervisor: starts the workers, starts again those that die, drains them all, and answers for all.

A worker ends:

    how                                        | what follows
    -------------------------------------------+-------------------------------------------------------------
    in the drain of all                        | nothing
    a peer's Leave                             | all drain: the daemon was asked to leave
    SIGTERM to it alone: it drains, code 0     | it is started again at once; it has lost no call
    it says why it cannot start, and no worker | the daemon ends with that line and code 1, as a daemon of
    has ever served                            | one process does
    otherwise: killed, out of memory, a bug    | it is started again, at once the first time, then after a
                                               | pause that doubles up to _LAST_PAUSE_S
    so, before it has served, _MAX_FAILED_STARTS | all drain, and the daemon ends with the worker's last line
    times one after the other                  | and code 1

Between a worker's death and its next start, its siblings serve: they accept the connections, and the cluster
gives them its tokens. Only the calls in flight on the dead one are lost to it.

Signals (signals.py) are those of one process. SIGTERM, SIGINT and SIGQUIT begin the drain of all workers. A
second SIGINT kills them, as does the end of the time that a drain may take. SIGHUP goes to all. If the
supervisor itself is killed, its workers drain.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from mnemosyned import configured_files
from mnemosyned.announcement import announce, greet, storage_shown
from mnemosyned.assembly import tls_files
from mnemosyned.config.flags import ConfigError
from mnemosyned.daemon import StartFailed, keep_running
from mnemosyned.node_config import ClusterConfig, joined_address, split_address
from mnemosyned.observe.config import ObserveConfig
from mnemosyned.observe.metrics import new_registry
from mnemosyned.observe.stray_output import log_loop_failure
from mnemosyned.place import Place
from mnemosyned.ports import admin_host, open_admin
from mnemosyned.reload import Reload
from mnemosyned.security.tls import admin_context
from mnemosyned.sessions.store import StorageRefused
from mnemosyned.settings import RunConfig
from mnemosyned.signals import Signals
from mnemosyned.storage.engines import StorageConfig
from mnemosyned.transport.config import GrpcConfig
from mnemosyned.transport.engine import ListenFailed, host_port
from mnemosyned.workers.health import ClusterPage, WorkersHealth
from mnemosyned.workers.process import Phase, Task, WorkerProcess
from mnemosyned.workers.sockets import Sockets
from mnemosyned.workers.totals import WorkersCollector

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mnemosyned.admin.server import AdminServer
    from mnemosyned.config.config import Config
    from mnemosyned.security.tls import TlsMaterial
    from mnemosyned.storage.engines import PrivateServer

log = logging.getLogger(__name__)

_FIRST_PAUSE_S: Final = 0.2
_LAST_PAUSE_S: Final = 5.0
# A worker that has lived for so long did not die of its start.
_STEADY_S: Final = 10.0
_MAX_FAILED_STARTS: Final = 6
# Besides the time that calls have to finish: to leave the cluster, and to close the storage.
_LAST_STEPS_S: Final = 8.0


def run(config: Config, parse: Callable[[], Config], arguments: list[str]) -> None:
    """Run the workers until a signal; `arguments` are those of the command line.

    Raises:
        StartFailed: the daemon could not start, or a worker cannot be started any more.
    """
    gc.enable()
    try:
        # From the main thread, and for all workers: they find it running, and share it.
        server = config[StorageConfig].engine.start_server(config)
    except StorageRefused as exc:
        raise StartFailed(str(exc)) from exc
    try:
        asyncio.run(_Supervisor(config, server, arguments).run(parse))
    finally:
        if server is not None:
            server.stop()


class _Supervisor:
    """The life of a daemon with several workers; `run` once."""

    def __init__(self, config: Config, server: PrivateServer | None, arguments: list[str]) -> None:
        self._config = config
        self._server = server
        self._arguments = arguments
        self._count = config[RunConfig].workers
        self._workers: dict[int, WorkerProcess] = {}
        self._stop = asyncio.Event()
        self._refusal = ""
        self._restarts = 0
        self._have_served: set[int] = set()
        self._where: dict[str, object] = {}
        self._reload: Reload
        self._reloads = 0  # that were asked for
        # For as long as this object: the private server ends with the thread that has started it again.
        self._restarter = ThreadPoolExecutor(1, "embedded-postgres")
        try:
            self._tls = configured_files.follow_tls(config)
            # Only read, so that a wrong one ends the start here.
            configured_files.follow_callers(config)
        except ConfigError as exc:
            raise StartFailed(str(exc)) from exc

    async def run(self, parse: Callable[[], Config]) -> None:
        """Run until a signal. Raises StartFailed."""
        asyncio.get_running_loop().set_exception_handler(log_loop_failure)
        self._reload = Reload(self._config, parse, (self._tls,), _Secrets(self))
        signals = Signals(stop=self._stop.set, reload=self._pass_on_reload)
        grpc = self._config[GrpcConfig]
        try:
            sockets = await Sockets.open(grpc.host, grpc.port, self._count, os.environ)
        except ListenFailed as exc:
            raise StartFailed(str(exc)) from exc
        try:
            admin = await self._open_admin(sockets)
            try:
                self._announce(sockets, admin)
                await self._run(sockets, signals)
            finally:
                await asyncio.to_thread(admin.stop)
                log.info("stopped")
        finally:
            sockets.close()
        if self._refusal:
            raise StartFailed(self._refusal)

    async def _run(self, sockets: Sockets, signals: Signals) -> None:
        names = _names(self._config, self._count, sockets.port)
        async with asyncio.TaskGroup() as group:
            upkeep = [group.create_task(self._reload.run()), group.create_task(signals.run())]
            if self._tls is not None:
                upkeep.append(group.create_task(self._tls.run()))
            if self._server is not None and self._server.is_owner:
                upkeep.append(group.create_task(keep_running(self._server, self._restarter)))
            for number in range(1, self._count + 1):
                place = Place(
                    number=number,
                    names=names,
                    directory=sockets.directory,
                    listeners=sockets.files,
                    rows=sockets.rows_file,
                )
                group.create_task(self._keep(place, sockets))
            await self._stop.wait()
            log.info("draining", extra={"timeout_s": self._config[GrpcConfig].drain_timeout_s})
            sockets.stop_listening()
            for worker in self._running():
                worker.send(signal.SIGTERM)
            for task in upkeep:
                task.cancel()
            grpc = self._config[GrpcConfig]
            limit_s = grpc.drain_delay_s + grpc.drain_timeout_s + _LAST_STEPS_S
            killing = asyncio.get_running_loop().call_later(limit_s, self._kill)
        killing.cancel()

    def _kill(self) -> None:
        """End the workers that do not end by themselves: one that stands still never would."""
        for worker in self._running():
            log.error("worker_killed", extra={"worker": worker.number, "reason": "it did not end in time"})
            worker.send(signal.SIGKILL)

    # The workers.

    async def _keep(self, place: Place, sockets: Sockets) -> None:
        """Run a worker, and run it again, until the stop."""
        deaths = failed_starts = 0
        while not self._stop.is_set():
            end = await self._run_one(place)
            sockets.rows.clear(place.number)
            if self._stop.is_set() or self._is_over(end):
                if not (end.is_clean or end.refusal):
                    log.error("worker_ended", extra={"worker": place.number, "end": end.how})
                return
            deaths = 0 if end.is_clean or end.age_s > _STEADY_S else deaths + 1
            failed_starts = 0 if end.has_served or end.is_clean else failed_starts + 1
            if failed_starts == _MAX_FAILED_STARTS:
                self._refuse(f"worker {place.number} cannot be started: {end.refusal or end.how}")
                return
            pause_s = min(_FIRST_PAUSE_S * 2 ** (deaths - 2), _LAST_PAUSE_S) if deaths > 1 else 0.0
            fields = {"worker": place.number, "end": end.how, "restart_in_s": pause_s}
            if end.refusal:
                fields["error"] = end.refusal
            log.log(logging.INFO if end.is_clean else logging.ERROR, "worker_ended", extra=fields)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._stop.wait()
            self._restarts += 1

    async def _run_one(self, place: Place) -> _End:
        """Start the process of a worker; return how it ended."""
        # As SIGHUP has left it, not as the files are now: all workers have the same.
        observe = replace(self._config[ObserveConfig], log_level=self._reload.log_level)
        config = self._config.replaced(observe)
        task = Task(config=config, arguments=self._arguments, place=place, supervisor=os.getpid())
        reloads = self._reloads
        try:
            worker = await WorkerProcess.start(task, changed=self._look)
        except OSError as exc:
            return _End(how="not started", refusal=f"cannot start a process: {exc.strerror}")
        self._workers[place.number] = worker
        if self._stop.is_set():
            # The signal for all has gone out while the process was started.
            worker.send(signal.SIGTERM)
        elif self._reloads != reloads:
            worker.reload()
        code = await worker.until_end()
        # One that is just starting has no handler of signals yet.
        is_drained = self._stop.is_set() and code in {0, -signal.SIGTERM}
        return _End(
            how=_told(code),
            refusal=worker.refusal,
            is_clean=is_drained or (code == 0 and worker.has_served),
            has_served=worker.has_served,
            age_s=worker.age_s,
        )

    def _is_over(self, end: _End) -> bool:
        """Tell whether the end of one worker is that of all."""
        if end.refusal and not self._have_served:
            self._refuse(end.refusal)
        return self._stop.is_set()

    def _refuse(self, reason: str) -> None:
        self._refusal = reason
        self._stop.set()

    def _look(self) -> None:
        """Take note of what a worker has told."""
        if any(worker.is_leaving for worker in self._workers.values()):
            self._stop.set()
        were_all = len(self._have_served) == self._count
        self._have_served |= {number for number, worker in self._workers.items() if worker.has_served}
        if not were_all and len(self._have_served) == self._count:
            log.info("serving", extra=self._where)
            # Not earlier: it shows a command to try, which would fail.
            greet(self._config, self._where)

    def _running(self) -> Sequence[WorkerProcess]:
        # A copy, made in one step: threads of the admin port ask.
        workers = list(self._workers.values())
        return sorted((one for one in workers if one.phase is not Phase.ENDED), key=lambda one: one.number)

    # Reload.

    def _pass_on_reload(self) -> None:
        self._reloads += 1
        for worker in self._running():
            worker.reload()
        self._reload.ask()

    def take_secrets(self, secrets: Sequence[str]) -> None:
        """Have workers that are started from now on use these. Raises ValueError."""
        cluster = self._config[ClusterConfig]
        if bool(secrets) != bool(cluster.secret):
            raise ValueError("a node with a secret cannot go on without one, nor the reverse")
        self._config = self._config.replaced(replace(cluster, secret=tuple(secrets)))

    # The admin port.

    async def _open_admin(self, sockets: Sockets) -> AdminServer:
        registry = new_registry()
        collector = WorkersCollector(
            self._running,
            sockets.directory,
            registry,
            count=self._count,
            restarts=lambda: self._restarts,
        )
        try:
            admin = await open_admin(
                self._config,
                collector,
                WorkersHealth(self._running, self._count, sockets.directory),
                {"/debug/cluster": ClusterPage(self._running, sockets.directory, lambda: admin.port)},
            )
        except ListenFailed as exc:
            raise StartFailed(str(exc)) from exc
        files = tls_files(self._config)
        if self._tls is not None and files is not None:

            async def take(_: TlsMaterial) -> None:
                admin.serve_tls(await asyncio.to_thread(admin_context, files))

            self._tls.followers.append(take)
        return admin

    def _announce(self, sockets: Sockets, admin: AdminServer) -> None:
        grpc, scheme = self._config[GrpcConfig], "http" if self._tls is None else "https"
        self._where = {
            "grpc": host_port(grpc.host, sockets.port),
            "admin": f"{scheme}://{host_port(admin_host(grpc), admin.port)}",
            "storage": storage_shown(self._config, self._server),
            "workers": self._count,
        }
        announce(self._config, self._where)
        configured_files.warn(self._config, self._tls)


@dataclass(frozen=True, slots=True, kw_only=True)
class _End:
    """How the process of a worker has ended."""

    how: str  # for people
    refusal: str  # why it could not start, in one line
    is_clean: bool = False
    has_served: bool = False
    age_s: float = 0.0


class _Secrets:
    """Where Reload finds the node of a daemon of one process."""

    def __init__(self, supervisor: _Supervisor) -> None:
        self._supervisor = supervisor

    def renew_secrets(self, secrets: Sequence[str]) -> None:
        """See ClusterNode."""
        self._supervisor.take_secrets(secrets)


def _told(code: int) -> str:
    """Return how a process has ended, for people."""
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):  # a number that has no name
        return signal.Signals(-code).name
    return f"signal {-code}"


def _names(config: Config, count: int, port: int) -> tuple[str, ...]:
    """Return the workers' names as nodes; see place.py."""
    listen = config[ClusterConfig].listen
    if listen:
        host, first = split_address(listen)
        return tuple(joined_address(host, first + number) for number in range(count))
    network = ":".join(f"{int.from_bytes(os.urandom(2), 'big'):x}" for _ in range(3))
    prefix = f"fd{os.urandom(1).hex()}:{network}"
    return tuple(joined_address(f"{prefix}::{number:x}", port or 1) for number in range(1, count + 1))
