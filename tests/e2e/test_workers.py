"""Daemons of several processes, as users run them: one port, one admin port, one log, one exit code."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import Authority
from clusters import SECRET, Load, free_ports, until
from mnemosynerpc.session_pb2 import GetRequest, Session, SetValueRequest, StartRequest
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from processes import Daemon, mnemosyned

from mnemosyned.api.rpc import new_token
from mnemosyned.embedded.probes import servers_on
from mnemosyned.workers.process import _ENTRY

pytestmark = pytest.mark.timeout(120)

Start = Callable[..., Daemon]
RETRYING = json.dumps({
    "methodConfig": [{
        "name": [{}],
        "retryPolicy": {
            "maxAttempts": 5,
            "initialBackoff": "0.02s",
            "maxBackoff": "0.2s",
            "backoffMultiplier": 2,
            "retryableStatusCodes": ["UNAVAILABLE"],
        },
    }]
})  # fmt: skip


@pytest.fixture
def start(postgres_dsn: str) -> Iterator[Start]:
    """Daemons with two workers; those that are left over are killed."""
    with ExitStack() as stack:

        def started(*flags: str, prepare: Sequence[str] = (), **environ: str) -> Daemon:
            own = ("-workers=2", f"-postgres.address={postgres_dsn}", "-postgres.pool.size=8")
            return stack.enter_context(Daemon(*own, *flags, prefix=prepare, environ=environ))

        yield started


@pytest.fixture
def runtime() -> Iterator[Path]:
    """Where a daemon may put its sockets: a short name, as the kernel wants it."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def children_of(daemon: Daemon) -> dict[int, str]:
    """The title of each process that the daemon has started, by its id."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == daemon.process.pid:
                title = (process / "cmdline").read_bytes().partition(b"\0")[0]
                found[int(process.name)] = title.decode()
    return found


def workers_of(daemon: Daemon) -> dict[int, int]:
    """The process of each worker, by its number."""
    return {
        int(title.rpartition(" ")[2]): process
        for process, title in children_of(daemon).items()
        if title.startswith("mnemosyned: worker ")
    }


def value(daemon: Daemon, name: str) -> float:
    _, text = daemon.http("/metrics")
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


def events(daemon: Daemon, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in daemon.lines if f'"msg": "{name}"' in line]


def members(daemon: Daemon) -> list[dict[str, Any]]:
    page = json.loads(daemon.http("/debug/cluster")[1])
    found: list[dict[str, Any]] = page["members"]
    return found


async def leased(*daemons: Daemon) -> None:
    """Wait until the workers of these daemons are one ring, and each may keep copies."""
    wanted = 2 * len(daemons)

    def is_met() -> bool:
        return all(
            Counter((one["status"], one["lease"]) for one in members(daemon)) == {("active", "valid"): wanted}
            for daemon in daemons
        )

    await until(is_met)


class Callers:
    """Clients with connections of their own that retry, as the documentation says they should."""

    def __init__(self, address: str, connections: int) -> None:
        options = (
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.service_config", RETRYING),
            ("grpc.max_reconnect_backoff_ms", 200),
        )
        self._channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(connections)]
        self._tokens: list[str] = []
        self.calls = 0
        self.failures: Counter[str] = Counter()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for channel in self._channels:
                group.create_task(self._call(SessionManagerStub(channel)))

    async def _call(self, stub: Any) -> None:  # noqa: ANN401  # grpc.aio types its stubs for the other API
        for _ in range(10):
            answer = await stub.Start(StartRequest(session=Session(subject_id="s")), timeout=5)
            self._tokens.append(answer.session.access_token)
        while True:
            # Also of sessions that were started by other connections, and so on the other worker.
            token = self._tokens[self.calls % len(self._tokens)]
            self.calls += 1
            try:
                if self.calls % 10:
                    await stub.Get(GetRequest(access_token=token), timeout=5)
                else:
                    await stub.SetValue(SetValueRequest(access_token=token, key="k", value="v"), timeout=5)
            except grpc.aio.AioRpcError as exc:
                self.failures[f"{exc.code().name} {exc.details()}"] += 1
            await asyncio.sleep(0.005)

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


@asynccontextmanager
async def calling(daemon: Daemon, connections: int = 8) -> AsyncIterator[Callers]:
    callers = Callers(daemon.address, connections)
    task = asyncio.create_task(callers.run())
    try:
        await until(lambda: callers.calls > connections or task.done())
        yield callers
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await callers.close()


async def test_workers_are_nodes_beside_one_another(start: Start) -> None:
    (port,) = free_ports(1)
    daemon = start(f"-port={port}").serving()

    await leased(daemon)

    assert len({one["name"] for one in members(daemon)}) == 2
    assert all(0.3 < one["ring_share"] < 0.7 for one in members(daemon))
    node = daemon.address
    assert mnemosyned("cluster", "check", "-node", node)[1].endswith(": healthy\n")
    code, table, _ = mnemosyned("cluster", "members", "-node", node)
    assert (code, table.count("active")) == (0, 2)
    code, _, complaint = mnemosyned("cluster", "leave", "-node", node)
    assert code == 1
    assert f"{node} is a daemon with workers: end it by SIGTERM, or name one of its nodes" in complaint


async def test_one_admin_port_adds_up_what_the_workers_count(start: Start) -> None:
    daemon = start().serving()
    await leased(daemon)

    async with calling(daemon) as callers:
        await until(lambda: callers.calls > 300)
    await asyncio.sleep(0)

    assert not callers.failures
    gets = 'grpc_server_requests_total{code="OK",handler="Get",service="mnemosynerpc.SessionManager"'
    sets = gets.replace('"Get"', '"SetValue"')
    # A call that was cancelled at the end is counted as such.
    assert 0 <= callers.calls - value(daemon, gets) - value(daemon, sets) <= 8
    assert value(daemon, 'mnemosyned_workers{state="serving"}') == 2
    assert value(daemon, "mnemosyned_ready") == 1
    assert value(daemon, 'mnemosyned_cluster_members{state="active"}') == 2
    assert value(daemon, "mnemosyned_cluster_forwards_total") > 0
    status, text = daemon.http("/healthr")
    assert status == 200
    assert json.loads(text)["probes"]["workers"] == {"1": "SERVING", "2": "SERVING"}
    assert daemon.http("/healthz")[0] == 200


async def test_connections_are_shared_evenly(start: Start) -> None:
    daemon = start().serving()

    async with calling(daemon, connections=16):
        before = [_connections(pid) for pid in workers_of(daemon).values()]

    assert max(before) - min(before) <= 2, before


def _connections(pid: int) -> int:
    sockets = {str(one.readlink()) for one in Path(f"/proc/{pid}/fd").glob("*") if one.is_symlink()}
    established = {
        f"socket:[{line.split()[9]}]"
        for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
        if line.split()[3] == "01" and line.split()[1] != line.split()[2]
    }
    return len(sockets & established)


@pytest.mark.slow
async def test_no_retried_call_fails_when_one_worker_after_the_other_is_killed(start: Start) -> None:
    daemon = start().serving()
    await leased(daemon)

    async with calling(daemon, connections=16) as callers:
        for number in (1, 2):
            before = callers.calls
            os.kill(workers_of(daemon)[number], signal.SIGKILL)
            assert daemon.http("/healthz")[0] == 200
            await until(lambda number=number: len(events(daemon, "worker_serving")) == 2 + number)
            await leased(daemon)
            assert callers.calls > before

    assert not callers.failures, (callers.calls, callers.failures)
    ended = events(daemon, "worker_ended")
    assert [(one["worker"], one["end"]) for one in ended] == [(1, "SIGKILL"), (2, "SIGKILL")]
    assert value(daemon, "mnemosyned_worker_restarts_total") == 2
    assert daemon.stop() == 0


async def test_without_retries_only_calls_in_flight_on_the_killed_worker_fail(start: Start) -> None:
    daemon = start().serving()
    await leased(daemon)

    async with Load([f"localhost:{daemon.address.rpartition(':')[2]}", daemon.address], rate=300) as load:
        await until(lambda: len(load.outcome.calls) > 100)
        os.kill(workers_of(daemon)[1], signal.SIGKILL)
        await until(lambda: len(events(daemon, "worker_serving")) == 3)
        await leased(daemon)
        await until(lambda: len(load.outcome.calls) > 300)

    # Those of a tenth of a second at most.
    assert len(load.outcome.failures) <= 30, load.outcome.report
    assert not load.outcome.stale, load.outcome.report


async def test_counters_do_not_fall_when_a_worker_dies(start: Start) -> None:
    daemon = start().serving()
    await leased(daemon)
    name = 'grpc_server_requests_total{code="OK",handler="Get"'
    async with calling(daemon) as callers:
        await until(lambda: callers.calls > 200)
    before = value(daemon, name)

    os.kill(workers_of(daemon)[1], signal.SIGKILL)
    await until(lambda: len(events(daemon, "worker_serving")) == 3)

    assert value(daemon, name) == before > 100


async def test_sigterm_drains_all_without_a_failed_call(start: Start) -> None:
    daemon = start("-drain.delay=500ms").serving()
    await leased(daemon)

    load = Load([daemon.address], rate=200, watches_health=True)
    async with load:
        await until(lambda: len(load.outcome.calls) > 50)
        daemon.process.send_signal(signal.SIGTERM)
        await until(lambda: daemon.process.poll() is not None)

    assert not load.outcome.failures, load.outcome.report
    assert daemon.end() == 0
    assert json.loads(daemon.lines[-1])["msg"] == "stopped"
    assert sorted(one.get("worker", 0) for one in events(daemon, "stopped")) == [0, 1, 2]


async def test_a_worker_that_gets_sigterm_alone_is_started_again_and_loses_no_call(start: Start) -> None:
    daemon = start().serving()
    await leased(daemon)

    async with calling(daemon) as callers:
        os.kill(workers_of(daemon)[2], signal.SIGTERM)
        await until(lambda: len(events(daemon, "worker_serving")) == 3)

    assert not callers.failures, callers.failures
    assert [one["end"] for one in events(daemon, "worker_ended")] == ["exit code 0"]


@pytest.mark.slow
async def test_a_worker_that_stands_still_does_not_keep_the_daemon_from_ending(start: Start) -> None:
    daemon = start("-drain.timeout=100ms").serving()
    await leased(daemon)
    os.kill(workers_of(daemon)[1], signal.SIGSTOP)
    began_s = time.monotonic()
    await asyncio.to_thread(daemon.stop)

    assert time.monotonic() - began_s < 15
    assert [line["worker"] for line in events(daemon, "worker_killed")] == [1]


def test_a_second_ctrl_c_ends_all_at_once(start: Start) -> None:
    daemon = start("-drain.delay=20s").serving()
    workers = workers_of(daemon)

    daemon.process.send_signal(signal.SIGINT)
    daemon.wait_for("draining")
    daemon.process.send_signal(signal.SIGINT)

    assert daemon.end() == 130
    assert json.loads(daemon.lines[-1])["msg"] == "stopped_early"
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers.values())


async def test_workers_drain_when_their_supervisor_is_killed(start: Start, runtime: Path) -> None:
    daemon = start(XDG_RUNTIME_DIR=str(runtime)).serving()
    workers = workers_of(daemon)
    assert len(os.listdir(runtime)) == 1  # noqa: PTH208  # of an async test

    daemon.process.kill()

    await until(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers.values()))
    assert sorted(one["worker"] for one in events(daemon, "stopped")) == [1, 2]
    assert not os.listdir(runtime)  # noqa: PTH208  # see above


async def test_workers_end_whose_supervisor_is_killed_while_they_start(start: Start, runtime: Path) -> None:
    daemon = start(XDG_RUNTIME_DIR=str(runtime)).listening()
    await until(lambda: len(children_of(daemon)) == 2)
    workers = list(children_of(daemon))
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    # Each has been sent its task.
    await until(lambda: value(daemon, 'mnemosyned_workers{state="starting"}') == 2)

    daemon.process.kill()
    daemon.process.wait()
    for worker in workers:
        os.kill(worker, signal.SIGCONT)

    await until(lambda: not any(Path(f"/proc/{worker}/cmdline").exists() for worker in workers))
    assert "Traceback" not in daemon.log
    assert not os.listdir(runtime)  # noqa: PTH208  # of an async test


def test_a_worker_that_is_sent_no_whole_task_ends_without_a_word() -> None:
    for sent in (b"", b"\0\0\0\x09[]"):
        ours, theirs = socket.socketpair()
        with theirs:
            words = [sys.executable, "-P", "-c", _ENTRY, str(theirs.fileno())]
            process = subprocess.Popen(words, pass_fds=(theirs.fileno(),), stderr=subprocess.PIPE)
        with ours:
            ours.sendall(sent)
        assert process.communicate(timeout=30) == (None, b"")
        assert process.returncode == 1


async def test_sighup_reaches_all(start: Start, tmp_path: Path) -> None:
    config = tmp_path / "mnemosyned.toml"
    config.write_text('[log]\nlevel = "info"\n')
    daemon = start(f"-config={config}").serving()
    config.write_text('[log]\nlevel = "debug"\n')

    daemon.process.send_signal(signal.SIGHUP)

    await until(lambda: len(events(daemon, "reloaded")) == 3)
    assert all(one["taken"] == ["log.level"] for one in events(daemon, "reloaded"))
    os.kill(workers_of(daemon)[1], signal.SIGKILL)
    await until(lambda: len(events(daemon, "worker_serving")) == 3)
    assert any('"level": "debug"' in line and '"worker": 1' in line for line in daemon.lines[-30:])


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["-workers=0"], "flag -workers: '0' is not a whole number from 1 to 256, nor auto"),
        (
            ["-workers=2", "-storage=memory"],
            (
                "flag -workers: with -storage=memory each process would have its own sessions; "
                "it takes one worker"
            ),
        ),
        (
            ["-workers=2", "-grpc.engine=grpcio"],
            (
                "flag -workers: -grpc.engine=grpcio opens its sockets itself and cannot share them; "
                "it takes one worker"
            ),
        ),
        (
            ["-workers=2", "-cluster.listen=127.0.0.1:8080"],
            (
                "flag -cluster.listen: 2 workers take the ports from 8080 on for peers, and 8080 is the gRPC "
                "port (-port); give another one, such as 8090"
            ),
        ),
        (
            ["-workers=3", "-cluster.listen=127.0.0.1:65534"],
            "flag -cluster.listen: 3 workers need ports up to 65536",
        ),
    ],
)
def test_what_workers_cannot_do_is_refused_in_one_line(flags: list[str], complaint: str) -> None:
    assert mnemosyned(*flags) == (2, "", f"mnemosyned: {complaint}\n")


def test_a_port_in_use_ends_the_start(start: Start) -> None:
    first = start().serving()

    second = start(f"-port={first.address.rpartition(':')[2]}")

    assert second.end() == 1
    assert [one["error"] for one in events(second, "start_failed")] == [
        f"cannot listen on {first.address}: Address already in use"
    ]


@pytest.mark.parametrize("flag", ["-cluster.listen", "-cluster.bind"])
def test_a_peers_port_in_use_names_the_flag_that_it_comes_from(start: Start, flag: str) -> None:
    listen, bind = free_ports(2)
    flags = [f"-cluster.listen=127.0.0.1:{listen}", f"-cluster.secret={SECRET}"]
    if flag == "-cluster.bind":
        flags.append(f"-cluster.bind=127.0.0.1:{bind}")
    # The second worker's, which the flag does not show.
    taken = 1 + (bind if flag == "-cluster.bind" else listen)
    with socket.create_server(("127.0.0.1", taken)):
        daemon = start(*flags)
        assert daemon.end() == 1

    # Behind the name of the worker, if the first one served already.
    (failure,) = events(daemon, "start_failed")
    assert failure["error"].endswith(
        f"flag {flag}: cannot listen on 127.0.0.1:{taken}: Address already in use"
    )


def test_what_keeps_the_workers_from_starting_is_said_once(start: Start) -> None:
    daemon = start("-postgres.schema=pg_catalog")

    assert daemon.end() == 1
    (failure,) = events(daemon, "start_failed")
    assert "worker" not in failure
    assert json.loads(daemon.lines[-1]) == failure


@pytest.mark.slow
async def test_a_worker_that_cannot_be_started_again_ends_the_daemon(start: Start) -> None:
    (port,) = free_ports(1)
    peers = f"127.0.0.1:{port}"
    daemon = start(f"-cluster.listen={peers}").serving()

    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        os.kill(workers_of(daemon)[2], signal.SIGKILL)
        await until(lambda: _takes(squatter, port + 1))
        squatter.listen()
        assert daemon.end() == 1

    (failure,) = events(daemon, "start_failed")
    assert failure["error"] == (
        f"worker 2 cannot be started: flag -cluster.listen: cannot listen on 127.0.0.1:{port + 1}: "
        "Address already in use"
    )
    assert len(events(daemon, "worker_ended")) == 6


def _takes(squatter: socket.socket, port: int) -> bool:
    with suppress(OSError):
        squatter.bind(("127.0.0.1", port))
        return True
    return False


async def test_two_daemons_with_workers_are_one_cluster(start: Start) -> None:
    ports = free_ports(6)
    addresses = [f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[3]}"]
    cluster = [f"-cluster.seeds={','.join(addresses)}", f"-cluster.secret={SECRET}"]
    daemons = [start(f"-cluster.listen={address}", *cluster) for address in addresses]
    for daemon in daemons:
        daemon.serving()

    await leased(*daemons)

    names = {one["name"] for one in members(daemons[0])}
    assert names == {f"127.0.0.1:{ports[at] + more}" for at in (0, 3) for more in (0, 1)}
    with daemons[0].stub() as stub:
        token = stub.Start(StartRequest(session=Session(subject_id="s")), timeout=5).session.access_token
    with daemons[1].stub() as stub:
        stub.SetValue(SetValueRequest(access_token=token, key="k", value="v"), timeout=5)
    with daemons[0].stub() as stub:
        assert stub.Get(GetRequest(access_token=token), timeout=5).session.bag == {"k": "v"}


async def test_a_worker_that_is_asked_to_leave_takes_its_daemon_along(start: Start) -> None:
    own, port = free_ports(2)
    listen = f"127.0.0.1:{port}"
    daemon = start(f"-port={own}", f"-cluster.listen={listen}", f"-cluster.secret={SECRET}").serving()
    admin_port = daemon.admin.rpartition(":")[2]
    await leased(daemon)
    beside = {"MNEMOSYNED_CLUSTER_LISTEN": listen, "MNEMOSYNED_WORKERS": "2", "MNEMOSYNED_PORT": str(own)}
    assert mnemosyned("cluster", "check", **beside)[0] == 0

    left = mnemosyned(
        *("cluster", "leave", "-node", f"127.0.0.1:{port + 1}", "-admin-port", admin_port),
        MNEMOSYNED_CLUSTER_SECRET=SECRET,
    )

    assert left == (0, f"127.0.0.1:{port + 1} is leaving\n", "")
    assert daemon.end() == 0


async def test_clients_may_come_through_a_unix_socket(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    daemon = start(f"-host=unix:{path}").serving()

    async with calling(daemon) as callers:
        os.kill(workers_of(daemon)[1], signal.SIGKILL)
        await until(lambda: len(events(daemon, "worker_serving")) == 3)

    assert not callers.failures, callers.failures
    assert daemon.stop() == 0
    assert not path.exists()


async def test_a_private_database_is_started_once_for_all(start: Start, tmp_path: Path) -> None:
    daemon = start(f"-postgres.address=embedded:{tmp_path}/data").serving()

    await leased(daemon)

    assert len(servers_on(tmp_path / "data" / "data")) >= 1
    assert daemon.stop() == 0
    assert not servers_on(tmp_path / "data" / "data")


def test_the_sockets_between_workers_are_for_this_user_alone(start: Start, runtime: Path) -> None:
    daemon = start(XDG_RUNTIME_DIR=str(runtime)).serving()

    (own,) = runtime.iterdir()

    assert own.stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in own.iterdir()) == ["admin-1", "admin-2", "peers-1", "peers-2"]
    assert daemon.stop() == 0
    assert list(runtime.iterdir()) == []


def test_the_command_line_of_a_worker_shows_no_flag(start: Start) -> None:
    daemon = start("-cluster.secret=" + SECRET).serving()

    titles = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workers_of(daemon).values()]

    assert len(titles) == 2
    assert not any(re.search(b"secret|postgres", title) for title in titles)


def test_clients_are_answered_while_the_storage_is_awaited(start: Start) -> None:
    daemon = start("-postgres.address=postgres://u:p@127.0.0.1:1/d").listening()
    deadline_s = time.monotonic() + 15

    with daemon.stub() as stub:
        while True:
            call = stub.Get.future(GetRequest(access_token="t"), timeout=5)
            if call.code() is grpc.StatusCode.UNAVAILABLE and "storage" in call.details():
                break
            assert time.monotonic() < deadline_s, (call.code(), call.details())

    assert daemon.http("/healthz")[0] == 200
    assert daemon.http("/healthr")[0] == 503
    assert daemon.stop() == 0


async def test_with_tls_clients_and_the_admin_port_have_it_and_workers_need_none(
    start: Start, tmp_path: Path
) -> None:
    authority = Authority(tmp_path / "ours")
    (port,) = free_ports(1)
    names = [*authority.flags("127.0.0.1", "node.cluster.example", at="node"), "-tls.client-auth=optional"]
    daemon = start(*names, f"-cluster.listen=127.0.0.1:{port}", "-tls.peer-names=*.cluster.example")
    daemon.context = ssl.create_default_context(cafile=str(authority.path))
    daemon.serving()
    await leased(daemon)

    with grpc.secure_channel(daemon.address, authority.credentials()) as channel:
        stub = SessionManagerStub(channel)
        tokens = [new_token() for _ in range(12)]
        for token in tokens:
            stub.Start(StartRequest(session=Session(access_token=token, subject_id="s")), timeout=5)
            stub.Get(GetRequest(access_token=token), timeout=5)

    assert daemon.http("/healthr")[0] == 200
    assert value(daemon, "mnemosyned_cluster_forwards_total") > 0
    assert value(daemon, "mnemosyned_tls_certificate_end_timestamp_seconds") > time.time()
    assert "unproven" not in daemon.log


async def test_a_node_of_one_process_may_be_their_peer(start: Start, postgres_dsn: str) -> None:
    lone, first = free_ports(2)
    cluster = [f"-cluster.seeds=127.0.0.1:{lone},127.0.0.1:{first}", f"-cluster.secret={SECRET}"]
    own = [f"-port={lone}", f"-postgres.address={postgres_dsn}", f"-cluster.listen=127.0.0.1:{lone}"]
    with Daemon(*own, *cluster) as other:
        daemon = start(f"-cluster.listen=127.0.0.1:{first}", *cluster).serving()
        other.serving()

        await until(lambda: [one["status"] for one in members(other)] == ["active"] * 3)

        await until(lambda: [one["status"] for one in members(daemon)] == ["active"] * 3)
        assert other.stop() == 0


async def test_a_stalled_worker_holds_no_new_client_and_the_daemon_is_not_alive(start: Start) -> None:
    daemon = start().serving()
    await leased(daemon)
    stalled = workers_of(daemon)[1]

    os.kill(stalled, signal.SIGSTOP)
    try:
        async with calling(daemon, connections=6) as callers:
            await until(lambda: callers.calls > 100)
            slow = callers.failures
        status, text = daemon.http("/healthz")
    finally:
        os.kill(stalled, signal.SIGCONT)

    assert not slow
    assert (status, json.loads(text)["error"]) == (503, "worker 1: its admin server: no answer in time")
    await until(lambda: daemon.http("/healthz")[0] == 200)


def test_an_admin_port_in_use_ends_the_start_in_one_line(start: Start) -> None:
    (port,) = free_ports(1)
    with socket.create_server(("127.0.0.1", port + 1)):
        daemon = start(f"-port={port}")
        assert daemon.end() == 1

    (line,) = [json.loads(line) for line in daemon.lines]
    assert line["error"] == f"cannot listen on 127.0.0.1:{port + 1}: Address already in use"


async def test_a_worker_that_is_just_starting_reloads_when_it_can(start: Start) -> None:
    daemon = start().serving()
    os.kill(workers_of(daemon)[1], signal.SIGKILL)
    await until(lambda: len(events(daemon, "worker_ended")) == 1)

    daemon.process.send_signal(signal.SIGHUP)

    await until(lambda: len(events(daemon, "reloaded")) == 3)
    assert {one.get("worker") for one in events(daemon, "reloaded")} == {None, 1, 2}
    await until(lambda: len(events(daemon, "worker_serving")) == 3)
    assert len(events(daemon, "worker_ended")) == 1
