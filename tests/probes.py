"""Clients for a look at the gRPC port: one of grpcio, and one that writes frames by hand."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from hpack import Encoder
from mnemosynerpc.session_pb2 import ExistsRequest
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from secrecy import CANARY

UNKNOWN = ExistsRequest(access_token=f"{CANARY}-unknown")
OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1))


@contextmanager
def stub_of(address: str, credentials: grpc.ChannelCredentials | None = None) -> Iterator[Any]:
    """Lend a client on a connection of its own."""
    channel = (
        grpc.insecure_channel(address, OPTIONS)
        if credentials is None
        else grpc.secure_channel(address, credentials, OPTIONS)
    )
    with channel:
        yield SessionManagerStub(channel)


def code_of(call: Callable[[], object]) -> grpc.StatusCode:
    """Make a call; return the status with which it has ended."""
    try:
        call()
    except grpc.RpcError as exc:
        code: grpc.StatusCode = exc.code()  # type: ignore[attr-defined]  # it is a call too
        return code
    return grpc.StatusCode.OK


def is_answered(address: str, timeout_s: float = 2.0) -> bool:
    with stub_of(address) as stub:
        return stub.Exists(UNKNOWN, timeout=timeout_s, wait_for_ready=True).value is False


def dialled(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


class H2Client:
    """A connection that sends what a test says and reads what a test wants."""

    PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

    def __init__(self, address: str, *, window: int, is_silent: bool = False) -> None:
        """Grant this window for each stream and for the connection. A silent client begins with `begin`."""
        self.socket = dialled(address)
        self._encoder = Encoder()
        self._window = window
        if not is_silent:
            self.begin()

    def begin(self) -> None:
        """Send what comes first."""
        window = self._window
        settings = b"\0\4" + window.to_bytes(4, "big")
        self.socket.sendall(self.PREFACE + frame(4, 0, 0, settings))
        if window > 65_535:
            self.grant(0, window - 65_535)

    def grant(self, stream_id: int, size_bytes: int) -> None:
        self.socket.sendall(frame(8, 0, stream_id, size_bytes.to_bytes(4, "big")))

    def call(self, stream_id: int, method: str, message: bytes) -> None:
        headers = [
            (":method", "POST"), (":scheme", "http"), (":path", f"/mnemosynerpc.SessionManager/{method}"),
            (":authority", "x"), ("content-type", "application/grpc"), ("te", "trailers"),
        ]  # fmt: skip
        block = self._encoder.encode(headers)
        body = b"\0" + len(message).to_bytes(4, "big") + message
        self.socket.sendall(frame(1, 4, stream_id, block) + frame(0, 1, stream_id, body))

    def frames(self) -> Iterator[tuple[int, int, int, bytes]]:
        """Yield kind, flags, stream and payload until the server closes."""
        read = self.socket.makefile("rb")
        while len(head := read.read(9)) == 9:
            yield (
                head[3],
                head[4],
                int.from_bytes(head[5:], "big"),
                read.read(int.from_bytes(head[:3], "big")),
            )


def frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + payload
