from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families

from mnemosyned import __version__
from mnemosyned.admin.server import AdminServer, Readiness


class State:
    is_ready = True


@pytest.fixture
def state() -> State:
    return State()


@pytest.fixture
def server(state: State) -> Iterator[AdminServer]:
    registry = CollectorRegistry()
    Counter("things", "Counted.", registry=registry).inc(3)

    def readiness() -> Readiness:
        probes = {"postgres": "SERVING" if state.is_ready else "NOT_SERVING", "cluster": {}}
        return Readiness(is_ready=state.is_ready, probes=probes)

    one = AdminServer.start("127.0.0.1", 0, registry=registry, readiness=readiness)
    yield one
    one.stop()


def ask(server: AdminServer, path: str, method: str = "GET") -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
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


def test_too_many_connections_are_refused_and_places_come_back(server: AdminServer) -> None:
    crowd = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(16)]
    for one in crowd:
        one.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert one.recv(12) == b"HTTP/1.1 200"
    refused, _ = ask(server, "/healthz")
    for one in crowd:
        one.close()

    assert refused.status == 503
    for _ in range(1000):
        if ask(server, "/healthz")[0].status == 200:
            break
    assert ask(server, "/healthz")[0].status == 200


def test_a_port_in_use_is_an_error(server: AdminServer) -> None:
    with pytest.raises(OSError, match="in use"):
        AdminServer.start(
            "127.0.0.1",
            server.port,
            registry=CollectorRegistry(),
            readiness=lambda: Readiness(is_ready=True, probes={}),
        )


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
