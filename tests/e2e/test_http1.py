"""HTTP/1 on the gRPC port: a request gets an answer that people can read, and reaches no method."""

from __future__ import annotations

import re
import socket

import pytest
from mnemosynerpc.session_pb2 import AbandonRequest, ExistsRequest, Session, StartRequest
from processes import Daemon
from secrecy import CANARY

from http2.messages import framed

TOKEN = f"{CANARY}-a-token"
ABANDON = framed(AbandonRequest(access_token=TOKEN).SerializeToString())
GRPC = b"te: trailers\r\ncontent-type: application/grpc\r\ncontent-length: %d\r\n" % len(ABANDON)
UPGRADE = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n"
WEBSOCKET = (
    b"connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
POST, GET = (
    verb + b" /mnemosynerpc.SessionManager/Abandon HTTP/1.1\r\nhost: x\r\n" for verb in (b"POST", b"GET")
)
REQUESTS = {
    "get": b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
    "call": POST + GRPC + b"\r\n" + ABANDON,
    "call-1.0": POST.replace(b"1.1", b"1.0") + GRPC + b"\r\n" + ABANDON,
    "call-and-upgrade": POST + GRPC + UPGRADE + b"\r\n" + ABANDON,
    "upgrade": GET + UPGRADE + b"\r\n",
    "websocket": GET + WEBSOCKET + b"\r\n",
}
READABLE = re.compile(
    rb"HTTP/1\.1 505 [^\n]*\r\n(?:[^\n]+\r\n)*\r\nmnemosyned speaks gRPC \(HTTP/2\) here; .* next port\n"
)


def answer_to(address: str, request: bytes) -> bytes:
    """Send it on a connection of its own; return all that comes until the server closes."""
    host, port = address.split(":")
    answer = b""
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request)
        try:
            while part := connection.recv(65536):
                answer += part
        except ConnectionResetError:
            # The server closed before it had read everything.
            pass
    return answer


@pytest.mark.parametrize("engine", ["h2", "grpcio"])
def test_no_method_is_reached_and_every_connection_is_closed(engine: str) -> None:
    with Daemon("-storage=memory", f"-grpc.engine={engine}") as daemon, daemon.serving().stub() as stub:
        stub.Start(StartRequest(session=Session(access_token=TOKEN, subject_id="s")))
        answers = {name: answer_to(daemon.address, request) for name, request in REQUESTS.items()}
        exists = stub.Exists(ExistsRequest(access_token=TOKEN)).value
        metrics = daemon.http("/metrics")[1]

    assert exists
    assert re.search(
        r'^grpc_server_request_duration_seconds_count{handler="Abandon",.*} 0\.0$', metrics, re.MULTILINE
    )
    if engine == "h2":
        assert not [name for name, answer in answers.items() if not READABLE.fullmatch(answer)]
    # Neither takes an offer to go on in another protocol.
    assert not [name for name, answer in answers.items() if b" 101 " in answer or b" 200 " in answer]
