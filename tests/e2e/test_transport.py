"""The gRPC port under what its clients do to it, and under a stop: unread answers, broken calls."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from certificates import Authority
from clusters import until
from mnemosynerpc.session_pb2 import GetRequest, GetResponse, Session, StartRequest
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from probes import OPTIONS, UNKNOWN, H2Client, dialled, is_answered, stub_of
from processes import Daemon
from secrecy import CANARY

pytestmark = pytest.mark.timeout(120)
DATA, HEADERS, GOAWAY = 0, 1, 7
LARGE_BAG = {f"{CANARY}-{number}": "x" * 50_000 for number in range(60)}


# Answers that are not read.

SEND_TIMEOUT_S = 5
TCP_ESTABLISHED = 1  # tcp(7): the first byte of TCP_INFO


@pytest.mark.parametrize("cache", ["cached", pytest.param("cold", marks=pytest.mark.slow)])
def test_large_answers_that_are_not_read_cost_little_and_end_their_connections(
    cache: str, postgres_dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = f"-postgres.address={postgres_dsn}"
    with Daemon(storage) as daemon, daemon.serving().stub() as stub:
        token = stub.Start(StartRequest(session=Session(subject_id="s", bag=LARGE_BAG))).session.access_token
    request = GetRequest(access_token=token)
    # Another one, which has no copy yet.
    flags = [storage, f"-grpc.send-timeout={SEND_TIMEOUT_S}s"]
    with Daemon(*flags) as daemon, daemon.leased().stub() as stub, ExitStack() as stack:
        stub.Exists(UNKNOWN, timeout=5)
        if cache == "cached":
            stub.Get(request, timeout=5)
        process = psutil.Process(daemon.process.pid)
        before = process.memory_info().rss
        # Half of them grant no window. The others grant all there is, and read nothing.
        readers = [H2Client(daemon.address, window=window) for window in (0, 2**31 - 1) for _ in range(10)]
        for reader in readers:
            stack.callback(reader.socket.close)
            for number in range(60):
                reader.call(2 * number + 1, "Get", request.SerializeToString())
        sockets = [reader.socket for reader in readers]
        most, p99_ms, took_s = watch_until_closed(daemon, process, sockets)

        with capsys.disabled():
            print(  # noqa: T201  # numbers to compare machines by
                f"\n{(most - before) >> 20} MB more, closed after {took_s:.1f} s, others' p99 {p99_ms:.1f} ms"
            )
        assert most - before < 150 * 1024**2
        assert took_s < SEND_TIMEOUT_S + 6
        assert p99_ms < 200
        assert is_answered(daemon.address)


def watch_until_closed(
    daemon: Daemon, process: psutil.Process, sockets: list[socket.socket]
) -> tuple[int, float, float]:
    """Wait until these clients are closed, on both sides; return the most memory, others' p99 and the time.

    A busy server closes the first of them before it has accepted the last, and one between two looks.
    """
    most, latencies_s, began_s = 0, [], time.monotonic()
    ports = {one.getsockname()[1] for one in sockets}
    with stub_of(daemon.address) as stub:
        token = stub.Start(StartRequest(session=Session(subject_id="s"))).session.access_token
        while any(map(is_established, sockets)) or ports & clients_of(process, daemon):
            asked_s = time.monotonic()
            stub.Get(GetRequest(access_token=token), timeout=5)
            latencies_s.append(time.monotonic() - asked_s)
            most = max(most, process.memory_info().rss)
            assert time.monotonic() - began_s < SEND_TIMEOUT_S + 10
            time.sleep(0.02)
    p99_s = sorted(latencies_s)[int(0.99 * len(latencies_s))]
    return most, p99_s * 1000, time.monotonic() - began_s


def is_established(client: socket.socket) -> bool:
    """Tell whether the server has not closed the connection; nothing is read for it."""
    return client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_ESTABLISHED


def clients_of(process: psutil.Process, daemon: Daemon) -> set[int]:
    """Return the ports of the clients that the gRPC port has a connection of."""
    port = int(daemon.address.rpartition(":")[2])
    return {one.raddr.port for one in process.net_connections("tcp") if one.laddr.port == port and one.raddr}


def test_a_client_that_reads_slowly_gets_all_of_a_large_answer() -> None:
    with Daemon("-storage=memory") as daemon, daemon.serving().stub() as stub:
        token = stub.Start(StartRequest(session=Session(subject_id="s", bag=LARGE_BAG))).session.access_token
        client = H2Client(daemon.address, window=65_535)
        client.call(1, "Get", GetRequest(access_token=token).SerializeToString())
        body = b""
        with client.socket:
            for kind, flags, stream_id, payload in client.frames():
                if stream_id == 1 and kind == 0:
                    body += payload
                    # A little at a time.
                    client.grant(0, len(payload))
                    client.grant(1, len(payload))
                    time.sleep(0.005)
                elif stream_id == 1 and flags & 1:
                    break

        assert len(body) == 5 + int.from_bytes(body[1:5], "big")
        assert GetResponse.FromString(body[5:]).session.bag == LARGE_BAG


# Many calls and connections, and the end.


@pytest.mark.parametrize("engine", ["h2", "grpcio"])
@pytest.mark.parametrize("late_calls", [400, 2000, 8000])
def test_calls_with_time_left_outlive_those_whose_deadlines_pass(engine: str, late_calls: int) -> None:
    flags = ["-storage=memory", f"-grpc.engine={engine}"]
    with Daemon(*flags) as daemon, daemon.serving().stub() as stub:
        token = stub.Start(StartRequest(session=Session(subject_id="s"))).session.access_token
        request = GetRequest(access_token=token)

        def late_call() -> grpc.Future:
            # Not so fast that most of them pass their deadlines before the client has sent them.
            time.sleep(0.0002)
            future: grpc.Future = stub.Get.future(request, timeout=0.3)
            return future

        daemon.process.send_signal(signal.SIGSTOP)
        late = [late_call() for _ in range(late_calls // 2)]
        others = [stub.Get.future(request, timeout=20) for _ in range(100)]
        late += [late_call() for _ in range(late_calls // 2)]
        time.sleep(1.0)
        daemon.process.send_signal(signal.SIGCONT)

        assert {one.code() for one in late} == {grpc.StatusCode.DEADLINE_EXCEEDED}
        assert {one.result().session.access_token for one in others} == {token}


def test_connections_beyond_the_limit_are_closed_at_once_and_the_others_are_served() -> None:
    with Daemon("-storage=memory", "-grpc.max-connections=3") as daemon, daemon.serving().stub() as stub:
        stub.Exists(UNKNOWN, timeout=5)
        with dialled(daemon.address), dialled(daemon.address) as second:
            second.sendall(H2Client.PREFACE)
            assert second.recv(1)
            for _ in range(20):
                with dialled(daemon.address) as further:
                    began_s = time.monotonic()
                    assert further.recv(1) == b""
                    assert time.monotonic() - began_s < 1.0
            stub.Exists(UNKNOWN, timeout=5)
        assert is_answered(daemon.address)


def test_a_stop_loses_no_call_that_is_under_way(postgres_dsn: str) -> None:
    outcomes: list[str] = []
    with Daemon(f"-postgres.address={postgres_dsn}", "-drain.delay=500ms") as daemon:
        daemon.serving()
        is_over = threading.Event()

        def keep_calling(number: int) -> None:
            new = StartRequest(session=Session(subject_id=f"s{number}", bag={"k": CANARY}))
            with stub_of(daemon.address) as stub:
                while not is_over.is_set():
                    try:
                        stub.Start(new, timeout=5)
                    except grpc.RpcError as exc:
                        # The port is closed: nothing was begun.
                        outcomes.append(exc.details())  # type: ignore[attr-defined]  # a call's error has it
                        return
                    outcomes.append("")

        with ThreadPoolExecutor(16) as threads:
            calling = [threads.submit(keep_calling, number) for number in range(16)]
            time.sleep(0.7)
            code = daemon.stop()
            is_over.set()
        for one in calling:
            one.result()

    failures = [text for text in outcomes if text]
    assert code == 0
    assert len(outcomes) > 200
    # Those that had begun were answered. Later ones found no port.
    assert all("onnect" in text and "refused" in text for text in failures), failures


def test_a_call_that_arrives_as_the_first_one_while_the_daemon_stops_is_answered() -> None:
    with Daemon("-storage=memory") as daemon:
        client = H2Client(daemon.serving().address, window=65_535, is_silent=True)
        with client.socket:
            daemon.process.send_signal(signal.SIGTERM)
            frames = client.frames()
            assert GOAWAY in (kind for kind, *_ in frames)
            client.begin()
            client.call(1, "Exists", UNKNOWN.SerializeToString())
            kinds = [kind for kind, _, stream_id, _ in frames if stream_id == 1]

        assert kinds == [HEADERS, DATA, HEADERS]
        assert daemon.end() == 0


async def test_tls_files_that_change_under_load_fail_no_call(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ours")
    with Daemon("-storage=memory", *authority.flags("127.0.0.1")) as daemon:
        daemon.serving()
        is_over, counts = asyncio.Event(), {"one": 0, "new": 0}

        async def call(kind: str) -> None:
            while not is_over.is_set():
                async with grpc.aio.secure_channel(
                    daemon.address, authority.credentials(), options=OPTIONS
                ) as channel:
                    stub: Any = SessionManagerStub(channel)
                    while not is_over.is_set():
                        await stub.Exists(UNKNOWN, timeout=5)
                        counts[kind] += 1
                        if kind == "new":
                            break

        async with asyncio.TaskGroup() as group:
            for kind in ("one", "one", "new", "new"):
                group.create_task(call(kind))
            for number in range(3):
                done = reloads(daemon)
                authority.issue("127.0.0.1", f"n{number}.example")
                await until(lambda done=done: reloads(daemon) > done)  # type: ignore[misc]
            is_over.set()

        assert min(counts.values()) > 50


def reloads(daemon: Daemon) -> int:
    return daemon.log.count('"tls_reloaded"')
