"""Listening ports under what a host does to them: a failing `accept`, no files left, a low limit of files."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import resource
import shutil
import signal
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import psutil
import pytest
from certificates import Authority
from clusters import SECRET, Cluster, free_ports
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub
from mnemosynerpc.session_pb2 import GetRequest, Session, StartRequest
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from probes import OPTIONS, UNKNOWN, dialled, is_answered
from processes import Daemon
from waiting import until

from mnemosyned.security.api_keys import Role, line_of, new_key

ENGINES = ["h2", "grpcio"]
pytestmark = pytest.mark.timeout(120)
needs_rlimit = pytest.mark.skipif(
    not hasattr(psutil.Process, "rlimit"), reason="this system sets no other process's limits"
)
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")

# What accept(2) says it may fail with, of the connection, of the host and of a firewall.
OF_H2 = [
    *("ECONNABORTED", "EMFILE", "ENFILE", "EPROTO", "ENETDOWN", "EHOSTUNREACH", "ENOBUFS", "ENOMEM", "EPERM"),
    *("EOPNOTSUPP", "ENETUNREACH", "ENONET", "EHOSTDOWN", "ENOPROTOOPT", "ETIMEDOUT", "EINVAL"),
]
# Python itself, and the event loop, call `accept` again.
WITHOUT_A_LINE = ["EINTR", "EAGAIN"]
# One of each kind that grpcio tells apart: those that it waits after, and those that end its listening.
OF_GRPCIO = ["ECONNABORTED", "EMFILE", "ENFILE", "EPROTO"]


def failures_of(daemon: Daemon) -> float:
    samples = [line for line in daemon.http("/metrics")[1].splitlines() if "accept_failures_total{" in line]
    return sum(float(line.rpartition(" ")[2]) for line in samples)


@contextmanager
def failing_accept(pid: int, name: str, when: str = "1") -> Iterator[None]:
    """Let `accept` of a process fail: `when` says which calls of each thread, as strace has it."""
    calls = "accept,accept4"
    command = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={calls}"]
    command += ["-e", f"inject={calls}:error={name}:when={when}", "-p", str(pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        end_s = time.monotonic() + 10
        while not tracer_of(pid):
            if tracer.poll() is not None:
                assert tracer.stderr is not None
                assert "not permitted" in tracer.stderr.read()
                pytest.skip("this host lets no process trace another one")
            assert time.monotonic() < end_s
            time.sleep(0.01)
        try:
            yield
        finally:
            tracer.terminate()


def tracer_of(pid: int) -> int:
    """Return which process traces all threads of this one; 0: none, or not all yet."""
    tracers = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        # A thread may have ended.
        with suppress(FileNotFoundError):
            (line,) = (one for one in (task / "status").read_text().splitlines() if "TracerPid" in one)
            tracers.add(int(line.split()[1]))
    return min(tracers)


def answered_after_s(
    address: str, credentials: grpc.ChannelCredentials | None = None, *, of_peers: bool = False
) -> float:
    """Return after how many seconds a new connection is served; as a client that tries again at once."""
    began_s = time.monotonic()
    while time.monotonic() < began_s + 30:
        channel = (
            grpc.insecure_channel(address, OPTIONS)
            if credentials is None
            else grpc.secure_channel(address, credentials, OPTIONS)
        )
        with channel:
            try:
                if of_peers:
                    HealthStub(channel).Check(HealthCheckRequest(), timeout=3)
                else:
                    stub: Any = SessionManagerStub(channel)
                    stub.Exists(UNKNOWN, timeout=3)
            except grpc.RpcError:
                continue
        return time.monotonic() - began_s
    raise AssertionError("new connections get no answer")


@needs_strace
def test_whatever_accept_fails_with_calls_go_on_and_new_connections_are_served() -> None:
    with Daemon("-storage=memory") as daemon, daemon.serving().stub() as known:
        known.Exists(UNKNOWN, timeout=5)
        for name in [*OF_H2, *WITHOUT_A_LINE]:
            with failing_accept(daemon.process.pid, name):
                assert answered_after_s(daemon.address) < 1.0, name
                known.Exists(UNKNOWN, timeout=5)
            if name not in WITHOUT_A_LINE:
                number = getattr(errno, name)
                assert daemon.wait_for("accept_failed")["error"] == os.strerror(number)
                # Two names may stand for one number.
                sample = f'accept_failures_total{{error="{errno.errorcode[number]}"}} 1.0'
                assert sample in daemon.http("/metrics")[1]

        assert daemon.stop() == 0


@needs_strace
@pytest.mark.parametrize("name", OF_GRPCIO)
def test_grpcio_listens_again_after_it_has_ceased_to_accept(name: str) -> None:
    with Daemon("-storage=memory", "-grpc.engine=grpcio") as daemon, daemon.serving().stub() as known:
        known.Exists(UNKNOWN, timeout=5)
        # Each of its threads fails once, so it may cease several times.
        with failing_accept(daemon.process.pid, name):
            answered_after_s(daemon.address)
            known.Exists(UNKNOWN, timeout=5)

        assert answered_after_s(daemon.address) < 1.0
        known.Exists(UNKNOWN, timeout=5)
        assert failures_of(daemon) > 0
        daemon.wait_for("accept_failed")
        assert daemon.stop() == 0


@needs_strace
@pytest.mark.parametrize("engine", ENGINES)
def test_a_port_serves_again_when_accept_has_failed_for_a_while(engine: str) -> None:
    with Daemon("-storage=memory", f"-grpc.engine={engine}") as daemon, daemon.serving().stub() as known:
        known.Exists(UNKNOWN, timeout=5)
        with failing_accept(daemon.process.pid, "ENFILE", "1+"), ExitStack() as waiting:
            for _ in range(20):
                waiting.enter_context(dialled(daemon.address))
            daemon.wait_for("accept_failed")
            # Not the admin port: its connections are not accepted either.
            time.sleep(1.5)
            known.Exists(UNKNOWN, timeout=5)

        assert answered_after_s(daemon.address) < 1.0
        known.Exists(UNKNOWN, timeout=5)
        # One line in ten seconds for each kind of failure.
        assert sum('"accept_failed"' in line for line in daemon.lines) <= 3
        assert daemon.stop() == 0


@needs_strace
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("place", ["tls", "unix"])
def test_accept_may_fail_wherever_a_port_listens(engine: str, place: str, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ours")
    flags = authority.flags("127.0.0.1") if place == "tls" else [f"-host=unix:{tmp_path / 'socket'}"]
    credentials = authority.credentials() if place == "tls" else None
    with Daemon("-storage=memory", f"-grpc.engine={engine}", *flags) as daemon:
        daemon.serving()
        daemon.context = ssl.create_default_context(cafile=str(authority.path))
        with failing_accept(daemon.process.pid, "ENFILE"):
            answered_after_s(daemon.address, credentials)

        assert answered_after_s(daemon.address, credentials) < 1.0
        assert failures_of(daemon) > 0
        assert daemon.stop() == 0
        assert not (tmp_path / "socket").exists()


@needs_strace
@pytest.mark.parametrize("engine", ENGINES)
def test_accept_may_fail_on_the_port_of_the_peers(engine: str, postgres_dsn: str) -> None:
    client_port, peers_port = free_ports(2)
    peers = f"127.0.0.1:{peers_port}"
    cluster = [f"-cluster.listen={peers}", f"-cluster.bind={peers}", f"-cluster.secret={SECRET}"]
    engine_flag = f"-grpc.engine={engine}"
    with Daemon(f"-postgres.address={postgres_dsn}", engine_flag, f"-port={client_port}", *cluster) as daemon:
        daemon.serving()
        with failing_accept(daemon.process.pid, "ENFILE"):
            answered_after_s(peers, of_peers=True)
            answered_after_s(daemon.address)

        assert answered_after_s(peers, of_peers=True) < 1.0
        assert answered_after_s(daemon.address) < 1.0
        assert failures_of(daemon) > 0
        assert daemon.stop() == 0


@needs_rlimit
@pytest.mark.parametrize("engine", ENGINES)
def test_a_daemon_without_files_left_serves_its_connections_and_later_new_ones(engine: str) -> None:
    flags = ["-storage=memory", f"-grpc.engine={engine}"]
    with Daemon(*flags) as daemon, daemon.serving().stub() as known, ExitStack() as idle:
        known.Exists(UNKNOWN, timeout=5)
        process = psutil.Process(daemon.process.pid)
        files = process.num_fds()
        process.rlimit(resource.RLIMIT_NOFILE, (files + 20, files + 20))
        held = [idle.enter_context(dialled(daemon.address)) for _ in range(40)]
        while "Too many open files" not in daemon.wait_for("accept_failed")["error"]:
            pass
        for _ in range(100):
            known.Exists(UNKNOWN, timeout=5)
        busy_s = sum(process.cpu_times()[:2])
        time.sleep(1.0)
        busy_s = sum(process.cpu_times()[:2]) - busy_s
        for connection in held:
            connection.close()

        assert answered_after_s(daemon.address) < 1.0
        known.Exists(UNKNOWN, timeout=5)
        # It does not ask again and again.
        assert busy_s < 0.3
        assert 'accept_failures_total{error="EMFILE"}' in daemon.http("/metrics")[1]
        assert daemon.stop() == 0


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="prlimit is not installed")
@pytest.mark.parametrize("engine", ENGINES)
def test_connections_stay_below_a_low_limit_of_files(engine: str) -> None:
    flags = ["-storage=memory", f"-grpc.engine={engine}"]
    prefix = ["prlimit", "--nofile=1024:1024"]
    with Daemon(*flags, prefix=prefix) as daemon, daemon.serving().stub() as known, ExitStack() as idle:
        known.Exists(UNKNOWN, timeout=5)
        (warning,) = [json.loads(one) for one in daemon.lines if '"open_files_limit_too_low"' in one]
        process = psutil.Process(daemon.process.pid)
        held = [idle.enter_context(dialled(daemon.address)) for _ in range(1100)]
        until(lambda: process.num_fds() >= warning["allowed"])
        for _ in range(20):
            known.Exists(UNKNOWN, timeout=5)
        assert daemon.http("/healthz")[0] == 200
        files = process.num_fds()
        for connection in held:
            connection.close()

        assert warning["hard_limit"] == 1024
        assert warning["wanted"] == 10_000
        assert f"-grpc.max-connections={warning['allowed']}" in warning["advice"]
        assert warning["allowed"] <= files < 1000
        assert is_answered(daemon.address, 5)
        assert "Too many open files" not in daemon.log
        assert daemon.stop() == 0


def test_a_limit_of_files_that_suffices_is_not_mentioned() -> None:
    with Daemon("-storage=memory", "-grpc.max-connections=200") as daemon:
        daemon.serving()

        assert "open_files_limit_too_low" not in daemon.log


@needs_rlimit
@pytest.mark.parametrize("engine", ENGINES)
def test_a_node_that_was_out_of_files_dials_its_database_and_peers_again(
    engine: str, postgres_dsn: str, tmp_path: Path
) -> None:
    keys, key = tmp_path / "keys", new_key()
    _replace(keys, line_of(new_key(), Role.ADMIN))
    with Cluster(postgres_dsn, 2, f"-grpc.engine={engine}", f"-auth.keys={keys}") as cluster:
        one, other = cluster.names
        cluster.start()
        asyncio.run(cluster.rings_equal(cluster.names))
        process = psutil.Process(cluster.daemons[one].process.pid)
        before = process.rlimit(resource.RLIMIT_NOFILE)
        # Nothing can be opened: no connection to PostgreSQL, to the other node, no file of callers.
        process.rlimit(resource.RLIMIT_NOFILE, (3, before[1]))
        asyncio.run(_end_connections(postgres_dsn))
        cluster.signal(other, signal.SIGKILL)
        cluster.daemons[other].end()
        _replace(keys, line_of(key, Role.ADMIN))
        time.sleep(3)
        assert process.is_running()
        process.rlimit(resource.RLIMIT_NOFILE, before)
        cluster.start([other])

        asyncio.run(cluster.rings_equal(cluster.names))
        cluster.daemons[one].wait_for("keys_reloaded")
        with grpc.insecure_channel(one) as channel:
            stub: Any = SessionManagerStub(channel)
            bearer = [("x-api-key", key)]
            for _ in range(20):
                request = StartRequest(session=Session(subject_id="s"))
                token = stub.Start(request, timeout=5, metadata=bearer).session.access_token
                stub.Get(GetRequest(access_token=token), timeout=5, metadata=bearer)
        assert "Traceback" not in cluster.daemons[one].log
        assert [daemon.stop() for daemon in cluster.daemons.values()] == [0, 0]


def _replace(file: Path, line: str) -> None:
    new = file.with_suffix(".new")
    new.touch(mode=0o600)
    new.write_text(f"{line}\n")
    new.rename(file)


async def _end_connections(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    await connection.close()


@pytest.mark.skipif(
    os.getuid() != 0 or shutil.which("prlimit") is None or shutil.which("setpriv") is None,
    reason="only root may be another user, whose threads are limited",
)
@pytest.mark.parametrize("engine", ENGINES)
def test_too_few_threads_end_the_start_with_one_line(engine: str) -> None:
    user = ["prlimit", "--nproc=3:3", "setpriv", "--reuid=54321", "--clear-groups"]
    with Daemon("-storage=memory", f"-grpc.engine={engine}", prefix=user) as daemon:
        assert daemon.end() == 1

        (line,) = daemon.lines
        assert "threads" in line
        assert "ulimit -u" in line
