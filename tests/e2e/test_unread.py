"""Clients that ask for much and read nothing fill no daemon, on both engines, and are ended."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from mnemosynerpc.session_pb2 import GetRequest, Session, StartRequest
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from processes import Daemon
from raw_http2 import MAGIC, PRIORITY, block, frame, request, request_headers, settings, window_update
from serving import ENGINES

from http2.messages import framed

INITIAL_WINDOW = 4
MOST = 2**31 - 1
NOTHING = frame(PRIORITY, 0, 1, bytes(5))
# The client has room for everything and reads nothing, or has next to no room in HTTP/2.
KINDS = {
    "no reading": MAGIC + settings((INITIAL_WINDOW, MOST)) + window_update(0, MOST - 65_535),
    "no window": MAGIC + settings(),
}
GET = block(request_headers(b"/mnemosynerpc.SessionManager/Get"))
VALUE = "x" * 3_000_000
MB = 10**6
ANY_SIZE = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


@contextmanager
def daemon_with_large_sessions(*flags: str, count: int = 1) -> Iterator[tuple[Daemon, SessionManagerStub]]:
    with Daemon("-storage=memory", *flags) as daemon:
        daemon.serving()
        with grpc.insecure_channel(daemon.address, options=ANY_SIZE) as channel:
            stub = SessionManagerStub(channel)
            for number in range(count):
                new = Session(access_token=f"large-{number}", subject_id="s", bag={"k": VALUE})
                stub.Start(StartRequest(session=new), timeout=10)
            small = Session(access_token="small", subject_id="s", bag={"k": "v"})
            stub.Start(StartRequest(session=small), timeout=10)
            yield daemon, stub
        assert daemon.stop() == 0


def deaf_client(daemon: Daemon, kind: str, calls: int, *, sessions: int = 1) -> socket.socket:
    """Ask `calls` times for large sessions."""
    host, _, port = daemon.address.rpartition(":")
    client = socket.create_connection((host, int(port)))
    bodies = [
        framed(GetRequest(access_token=f"large-{number % sessions}").SerializeToString())
        for number in range(calls)
    ]
    client.sendall(KINDS[kind] + b"".join(request(2 * at + 1, body, GET) for at, body in enumerate(bodies)))
    client.setblocking(False)
    return client


def peak_bytes(daemon: Daemon) -> int:
    """The most memory that the daemon has had in RAM."""
    for line in Path(f"/proc/{daemon.process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


def is_ended(client: socket.socket) -> bool:
    """Tell whether the daemon's side of a connection is gone, without reading from it."""
    poll = select.poll()
    poll.register(client, select.POLLRDHUP)
    if poll.poll(0):
        return True
    # The kernel ends a connection that takes nothing without a word, and resets what comes after.
    with suppress(OSError):
        client.send(NOTHING)
    return False


def wait_until_ended(clients: list[socket.socket], stub: SessionManagerStub) -> None:
    """Wait for it, and be a good client meanwhile."""
    deadline_s = time.monotonic() + 20
    left = clients
    while left := [client for client in left if not is_ended(client)]:
        assert time.monotonic() < deadline_s, f"{len(left)} connections are still open"
        assert stub.Get(GetRequest(access_token="small"), timeout=5).session.bag["k"] == "v"
        time.sleep(0.05)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_a_client_that_reads_nothing_of_many_large_answers_does_not_fill_the_memory(
    engine: str, kind: str
) -> None:
    flags = [f"-grpc.engine={engine}", "-grpc.send-timeout=1s"]
    with daemon_with_large_sessions(*flags) as (daemon, stub), ExitStack() as stack:
        before_bytes = peak_bytes(daemon)
        client = stack.enter_context(deaf_client(daemon, kind, 200))
        wait_until_ended([client], stub)

        assert peak_bytes(daemon) - before_bytes < 60 * MB


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_many_clients_that_read_nothing_are_ended_before_they_fill_the_memory_together(engine: str) -> None:
    flags = [f"-grpc.engine={engine}", "-grpc.send-timeout=2s", "-grpc.max-unsent=30MiB"]
    with daemon_with_large_sessions(*flags, count=10) as (daemon, stub), ExitStack() as stack:
        before_bytes = peak_bytes(daemon)
        clients = [stack.enter_context(deaf_client(daemon, "no window", 20, sessions=10)) for _ in range(60)]
        wait_until_ended(clients, stub)

        assert "answers_unread" in daemon.log
        assert peak_bytes(daemon) - before_bytes < 120 * MB
        assert stub.Get(GetRequest(access_token="large-0"), timeout=10).session.bag["k"] == VALUE


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_a_client_that_reads_slowly_and_one_that_asks_for_much_are_served(engine: str) -> None:
    flags = [f"-grpc.engine={engine}", "-grpc.send-timeout=1s"]
    with daemon_with_large_sessions(*flags) as (daemon, stub):
        futures = [stub.Get.future(GetRequest(access_token="large-0"), timeout=30) for _ in range(100)]
        host, _, port = daemon.address.rpartition(":")
        with socket.create_connection((host, int(port))) as slow:
            body = framed(GetRequest(access_token="large-0").SerializeToString())
            slow.sendall(KINDS["no reading"] + request(1, body, GET))
            read_bytes, until_s = 0, time.monotonic() + 4
            while time.monotonic() < until_s:
                read_bytes += len(slow.recv(32_768))
                time.sleep(0.05)
            slow.settimeout(20)
            while read_bytes < len(VALUE):
                part = slow.recv(65_536)
                assert part, "the connection was ended"
                read_bytes += len(part)

        assert all(it.result().session.bag["k"] == VALUE for it in futures)


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_calls_that_waited_for_a_reader_go_on_though_others_fail(engine: str) -> None:
    flags = [f"-grpc.engine={engine}", "-grpc.max-unsent-per-connection=64KiB"]
    with daemon_with_large_sessions(*flags) as (_, stub):
        tokens = ["large-0", *["unknown"] * 5, "large-0", "", "large-0"] * 5
        futures = [stub.Get.future(GetRequest(access_token=it), timeout=20) for it in tokens]
        codes = {"large-0": "OK", "unknown": "NOT_FOUND", "": "INVALID_ARGUMENT"}

        assert [it.code().name for it in futures] == [codes[it] for it in tokens]


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_watches_are_bounded_by_flags_in_all_and_on_a_connection(engine: str) -> None:
    flags = [f"-grpc.engine={engine}", "-grpc.max-watches-per-connection=2", "-grpc.max-watches=3"]
    with Daemon("-storage=memory", *flags) as daemon, ExitStack() as stack:
        daemon.serving()
        own = [("grpc.use_local_subchannel_pool", 1)]
        outcomes, streams = [], []
        for _ in range(2):
            channel = stack.enter_context(grpc.insecure_channel(daemon.address, options=own))
            watch = health_pb2_grpc.HealthStub(channel).Watch
            of_one = [watch(health_pb2.HealthCheckRequest(), timeout=20) for _ in range(3)]
            outcomes.append(sorted(map(first_of, of_one)))
            streams += of_one  # one that is forgotten is cancelled

        assert outcomes == [["SERVING", "SERVING", "UNAVAILABLE"], ["SERVING", "UNAVAILABLE", "UNAVAILABLE"]]
        for stream in streams:
            stream.cancel()
        assert daemon.stop() == 0


def first_of(stream: Iterator[health_pb2.HealthCheckResponse]) -> str:
    try:
        return health_pb2.HealthCheckResponse.ServingStatus.Name(next(stream).status)
    except grpc.RpcError as exc:
        code: grpc.StatusCode = exc.code()  # type: ignore[attr-defined]  # it is a call as well
        return code.name
