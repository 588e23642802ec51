from __future__ import annotations

import asyncio
import errno
import http.client
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.parser import text_string_to_metric_families

from mnemosyned import __version__
from mnemosyned.admin.grpc_probe import NotAnswered, Refused, Untrusted
from mnemosyned.admin.health import NodeHealth, Readiness
from mnemosyned.admin.pulse import Pulse
from mnemosyned.admin.server import MAX_CONNECTIONS, AdminServer


class State:
    is_ready = True
    is_draining = False
    failure: NotAnswered | None = None

    async def call(self) -> None:
        if self.failure is not None:
            raise self.failure


class SilentPulse(Pulse):
    silent_s = 0.0

    def silence_s(self) -> float:
        return self.silent_s


@pytest.fixture
def state() -> State:
    return State()


@pytest.fixture
def pulse() -> SilentPulse:
    return SilentPulse()


@pytest.fixture
def health(state: State, pulse: SilentPulse) -> NodeHealth:
    def readiness() -> Readiness:
        probes = {"postgres": "SERVING" if state.is_ready else "NOT_SERVING", "cluster": {}}
        return Readiness(is_ready=state.is_ready, probes=probes)

    return NodeHealth(
        readiness, call=state.call, pulse=pulse, stall_s=10.0, is_draining=lambda: state.is_draining
    )


def started(health: NodeHealth, port: int = 0, registry: CollectorRegistry | None = None) -> AdminServer:
    starting = AdminServer.start("127.0.0.1", port, registry=registry or CollectorRegistry(), health=health)
    return asyncio.run(starting)


@pytest.fixture
def server(health: NodeHealth) -> Iterator[AdminServer]:
    registry = CollectorRegistry()
    Counter("things", "Counted.", registry=registry).inc(3)
    one = started(health, registry=registry)
    yield one
    one.stop()


def ask(
    server: AdminServer, path: str, method: str = "GET", *, timeout_s: float = 5
) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout_s)
    connection.request(method, path)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


def test_metrics_are_in_prometheus_form(server: AdminServer) -> None:
    response, body = ask(server, "/metrics")
    families = {family.name: family for family in text_string_to_metric_families(body.decode())}

    assert response.status == 200
    assert families["things"].samples[0].value == 3


def test_health_tells_the_version(server: AdminServer) -> None:
    response, body = ask(server, "/healthz?from=probe")

    assert response.status == 200
    assert json.loads(body) == {"version": __version__}


def test_readiness_is_503_when_not_ready(server: AdminServer, state: State) -> None:
    ready, ready_body = ask(server, "/healthr")
    state.is_ready = False
    away, away_body = ask(server, "/healthr")

    assert (ready.status, away.status) == (200, 503)
    assert json.loads(ready_body) == {
        "version": __version__,
        "probes": {"postgres": "SERVING", "cluster": {}},
    }
    assert json.loads(away_body)["probes"]["postgres"] == "NOT_SERVING"


def test_other_paths_and_methods_are_refused_clearly(server: AdminServer) -> None:
    unknown, _ = ask(server, "/")
    wrong, _ = ask(server, "/metrics", "POST")

    assert unknown.status == 404
    assert wrong.status == 405
    assert wrong.getheader("Allow") == "GET, HEAD"


def test_head_has_no_body(server: AdminServer) -> None:
    response, body = ask(server, "/healthz", "HEAD")

    assert response.status == 200
    assert body == b""


def test_the_server_does_not_name_its_python(server: AdminServer) -> None:
    response, _ = ask(server, "/healthz")

    assert response.getheader("Server") == "mnemosyned"


def test_a_slow_client_does_not_delay_another(server: AdminServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as slow:
        slow.sendall(b"GET /metr")
        response, _ = ask(server, "/metrics")

    assert response.status == 200


def test_a_crowd_of_idle_and_slow_clients_keeps_no_probe_from_its_answer(server: AdminServer) -> None:
    with ExitStack() as stack:
        for number in range(3 * MAX_CONNECTIONS):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            with suppress(OSError):  # closed for a later one
                one.sendall((b"", b"GET /hea", b"GET /metrics HTTP/1.1\r\nHost:")[number % 3])
        begun_s = time.monotonic()
        responses = [ask(server, path)[0].status for path in ("/healthz", "/healthr", "/metrics") * 20]

    assert responses == [200] * 60
    assert time.monotonic() - begun_s < 5


def test_the_oldest_idle_connection_makes_room_for_another(server: AdminServer) -> None:
    with ExitStack() as stack:
        crowd = [
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=5))
            for _ in range(MAX_CONNECTIONS)
        ]
        for one in crowd[1:]:
            one.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert one.recv(12) == b"HTTP/1.1 200"

        assert ask(server, "/healthz")[0].status == 200
        assert crowd[0].recv(1) == b""
        crowd[1].sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"HTTP/1.1 200" in crowd[1].recv(4096) + crowd[1].recv(4096)


def test_requests_that_come_together_are_answered_one_after_the_other(server: AdminServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as one:
        one.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 3 + b"GET / HTTP/1.0\r\n\r\n")
        answer = b"".join(iter(lambda: one.recv(65536), b""))

    assert (answer.count(b"HTTP/1.1 200"), answer.count(b"HTTP/1.1 404")) == (3, 1)


def test_a_call_that_is_not_answered_makes_the_node_unready_at_once(
    server: AdminServer, state: State
) -> None:
    state.failure = NotAnswered("no answer within 1 s")
    ready, body = ask(server, "/healthr")

    assert (ready.status, ask(server, "/healthz")[0].status) == (503, 200)
    assert json.loads(body)["probes"]["grpc"] == "NOT_SERVING: no answer within 1 s"
    state.failure = None
    assert ask(server, "/healthr")[0].status == 200


def test_an_event_loop_that_is_silent_for_too_long_is_not_alive(
    server: AdminServer, state: State, pulse: SilentPulse
) -> None:
    state.failure, pulse.silent_s = NotAnswered("no answer within 1 s"), 12.0
    response, body = ask(server, "/healthz")

    assert response.status == 503
    assert json.loads(body) == {
        "version": __version__,
        "error": "the event loop has not answered for 12 s",
    }


def test_after_a_pause_of_the_process_an_answered_call_counts(
    server: AdminServer, pulse: SilentPulse
) -> None:
    pulse.silent_s = 3600.0

    assert ask(server, "/healthz")[0].status == 200


def test_a_full_node_is_alive_and_takes_no_more_clients(
    server: AdminServer, state: State, pulse: SilentPulse
) -> None:
    state.failure = Refused("the connection was closed")

    assert (ask(server, "/healthz")[0].status, ask(server, "/healthr")[0].status) == (200, 503)
    # grpcio closes connections without the event loop.
    pulse.silent_s = 12.0
    assert ask(server, "/healthz")[0].status == 503


def test_a_port_without_an_answer_is_full_while_the_process_has_no_file_left(
    server: AdminServer, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    def need_files() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    state.failure = NotAnswered("no answer within 1 s")
    server._site.health._stall_s = 0.0
    ask(server, "/healthz")
    without_an_answer = ask(server, "/healthz")[0].status
    monkeypatch.setattr("mnemosyned.admin.health.need_files", need_files)
    without_files = [ask(server, "/healthz")[0].status for _ in range(2)]
    ready, body = ask(server, "/healthr")

    assert (without_an_answer, without_files, ready.status) == (503, [200, 200], 503)
    assert json.loads(body)["probes"]["grpc"] == "NOT_SERVING: no answer within 1 s: Too many open files"


def test_a_port_that_refuses_our_certificate_has_answered_unless_the_event_loop_is_silent(
    server: AdminServer, state: State, pulse: SilentPulse
) -> None:
    state.failure = Untrusted("our certificate is refused")

    assert (ask(server, "/healthz")[0].status, ask(server, "/healthr")[0].status) == (200, 200)
    pulse.silent_s = 12.0
    assert (ask(server, "/healthz")[0].status, ask(server, "/healthr")[0].status) == (503, 503)


def test_answers_that_are_not_read_hold_no_file_of_a_closed_connection(health: NodeHealth) -> None:
    registry = CollectorRegistry()
    Gauge("large", "Larger than what a kernel keeps.", ("name",), registry=registry).labels("x" * 8_000_000)
    server = started(health, registry=registry)
    files = Path("/proc/self/fd")
    with ExitStack() as stack:
        stack.callback(server.stop)
        before = len(list(files.iterdir()))
        for _ in range(3 * MAX_CONNECTIONS):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            one.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        # Behind as much as 3 GB that is rendered and copied: a busy machine takes its time.
        assert ask(server, "/healthz", timeout_s=40)[0].status == 200
        until_s = time.monotonic() + 10
        while len(list(files.iterdir())) - before > 4 * MAX_CONNECTIONS + 16:
            assert time.monotonic() < until_s
            time.sleep(0.02)


def test_a_silence_leaves_out_the_time_in_which_the_whole_process_was_paused() -> None:
    pulse = Pulse()
    pulse._beaten_s -= 60.0

    pulse.forgive(59.0)

    assert 0.3 < pulse.silence_s() < 1


@pytest.mark.parametrize(("is_draining", "complaint"), [(True, ""), (False, "has not answered for")])
async def test_a_port_that_answers_no_more_is_no_life_except_in_a_drain(
    state: State, pulse: SilentPulse, *, is_draining: bool, complaint: str
) -> None:
    health = NodeHealth(
        lambda: Readiness(is_ready=True, probes={}),
        call=state.call,
        pulse=pulse,
        stall_s=0.0,
        is_draining=lambda: is_draining,
    )
    state.failure = NotAnswered("Connection refused")
    await health.complaint()

    assert complaint in await health.complaint()
    assert bool(await health.complaint()) == bool(complaint)


def test_a_port_in_use_is_an_error(server: AdminServer, health: NodeHealth) -> None:
    with pytest.raises(OSError, match="in use"):
        started(health, server.port)


@pytest.mark.parametrize(
    "request_line",
    [b"GET /?token=hunter2 2 HTTP/1.1", b"GET /?token=hunter2 HTTP/hunter2", b"GET /?token=hunter2 HTTP/9.9"],
)
@pytest.mark.parametrize("method", [b"GET", b"HUNTER2"])
def test_an_invalid_request_is_refused_and_not_repeated(
    server: AdminServer, request_line: bytes, method: bytes
) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as one:
        one.sendall(request_line.replace(b"GET", method) + b"\r\n\r\n")
        answer = b"".join(iter(lambda: one.recv(65536), b""))

    assert b'"error"' in answer
    assert b"hunter2" not in answer.lower()


def test_junk_takes_nothing_down(server: AdminServer, capsys: pytest.CaptureFixture[str]) -> None:
    for junk in (b"\x00\xff\r\n\r\n", b"GET " + b"x" * 100_000 + b"\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"):
        # The server may close at any moment, as it should.
        with (
            socket.create_connection(("127.0.0.1", server.port), timeout=5) as one,
            suppress(OSError),
        ):
            one.sendall(junk)
            one.shutdown(socket.SHUT_WR)
            while one.recv(65536):
                pass

    assert ask(server, "/healthz")[0].status == 200
    assert capsys.readouterr().err == ""
