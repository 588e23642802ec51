"""A stranger's connection: any bytes to the gRPC port, and what comes back."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Self

import hpack
from raw_http2 import (
    DATA,
    GOAWAY,
    HEADERS,
    PREFACE,
    RST_STREAM,
    Pairs,
    Sent,
    block,
    frame,
    frames_of,
    open_request,
    request_headers,
)

_READ: Final = 1 << 16


@dataclass
class Answer:
    """What came for one stream."""

    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    is_over: bool = False
    reset_code: int | None = None

    @property
    def status(self) -> str:
        """The gRPC status, or what came in its place."""
        if self.reset_code is not None:
            return f"reset {self.reset_code}"
        if not self.is_over:
            return "none"
        return self.headers.get("grpc-status", f"HTTP {self.headers.get(':status')}")


class RawConnection:
    """One connection; `is_closed` once the daemon has closed it."""

    def __init__(self, address: str, first: bytes = PREFACE, *, source: str = "127.0.0.1") -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=5, source_address=(source, 0))
        self.socket.setblocking(False)
        self.received = b""
        self.is_closed = False
        self.send(first)

    def send(self, data: bytes, within_s: float = 5.0) -> bool:
        """Send all of it unless the daemon closes, or takes nothing; tell whether all was taken."""
        end_s = time.monotonic() + within_s
        left = memoryview(data)
        while left and not self.is_closed and time.monotonic() < end_s:
            readable, writable = ready([self.socket], 0.1, writes=True)
            if readable:
                self.read()
            if writable and not self.is_closed:
                try:
                    left = left[self.socket.send(left[:_READ]) :]
                except BlockingIOError:
                    continue
                except OSError:
                    self.is_closed = True
        return not left

    def flood(self, data: bytes, seconds: float) -> bool:
        """Send the same bytes again and again; tell whether the daemon closed the connection."""
        end_s = time.monotonic() + seconds
        while not self.is_closed and time.monotonic() < end_s:
            self.send(data, within_s=max(0.0, end_s - time.monotonic()))
            # What was sent last may have answers that no attacker keeps.
            self.received = self.received[-_READ:]
        return self.is_closed

    def wait_closed(self, within_s: float) -> bool:
        """Read until the daemon closes; tell whether it did."""
        end_s = time.monotonic() + within_s
        while not self.is_closed and time.monotonic() < end_s:
            if ready([self.socket], min(0.1, within_s))[0]:
                self.read()
        return self.is_closed

    def frames(self) -> list[Sent]:
        """Return what has come so far."""
        return frames_of(self.received)

    def ends_with_error(self, within_s: float = 3.0) -> bool:
        """Tell whether the daemon has closed, said GOAWAY with an error, or reset a stream."""
        end_s = time.monotonic() + within_s
        while time.monotonic() < end_s:
            self.wait_closed(0.1)
            if self.is_closed or any(
                (sent.kind == GOAWAY and any(sent.payload[4:8])) or sent.kind == RST_STREAM
                for sent in self.frames()
            ):
                return True
        return False

    def answer(self, stream_id: int, within_s: float = 3.0) -> Answer:
        """Read until a stream has ended, or the connection; return what came for it."""
        end_s = time.monotonic() + within_s
        while True:
            answer = self._answer(stream_id)
            if answer.is_over or answer.reset_code is not None:
                return answer
            if self.is_closed or time.monotonic() > end_s:
                return answer
            self.wait_closed(0.05)

    def _answer(self, stream_id: int) -> Answer:
        # From the first byte each time: the decoder's table depends on all that came before.
        decoder, answer = hpack.Decoder(), Answer()
        for sent in self.frames():
            headers: list[tuple[str, str]] = []
            if sent.kind == HEADERS:
                headers = [(str(name), str(value)) for name, value in decoder.decode(sent.payload)]
            if sent.stream_id != stream_id:
                continue
            answer.headers |= dict(headers)
            if sent.kind == DATA:
                answer.body += sent.payload
            if sent.kind in (DATA, HEADERS) and sent.flags & 1:
                answer.is_over = True
            if sent.kind == RST_STREAM and not answer.is_over:
                answer.reset_code = int.from_bytes(sent.payload, "big")
        return answer

    def close(self) -> None:
        """Close at once."""
        self.socket.close()

    def read(self) -> None:
        """Take what has come."""
        try:
            data = self.socket.recv(_READ)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.received += data
        self.is_closed = not data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def ready(
    sockets: Sequence[socket.socket], seconds: float, *, writes: bool = False
) -> tuple[set[int], set[int]]:
    """Wait for any of them; return the file descriptors that can be read, and written."""
    # Not `select`, which knows no more than 1,024 files.
    poll = select.poll()
    for one in sockets:
        poll.register(one, select.POLLIN | (select.POLLOUT if writes else 0))
    events = poll.poll(seconds * 1000)
    closed = select.POLLIN | select.POLLHUP | select.POLLERR
    return (
        {number for number, event in events if event & closed},
        {number for number, event in events if event & select.POLLOUT},
    )


def headers(path: bytes, method: bytes = b"POST", *extra: tuple[bytes, bytes]) -> Pairs:
    """Return a request's headers with any path and method."""
    return [(b":method", method), *request_headers(path, *extra)[1:]]


def call(pairs: Pairs, message: bytes, stream_id: int = 1) -> bytes:
    """Return a whole request."""
    return half_call(pairs, stream_id) + frame(DATA, 1, stream_id, prefixed(message))


def half_call(pairs: Pairs, stream_id: int) -> bytes:
    """Return a request without its end."""
    return open_request(stream_id, block(pairs))


def prefixed(message: bytes, *, is_compressed: bool = False) -> bytes:
    """Return a message as gRPC frames it."""
    return bytes((is_compressed,)) + len(message).to_bytes(4, "big") + message


def closed_all(connections: list[RawConnection], within_s: float) -> int:
    """Read from all until they are closed or time is up; return how many are still open."""
    end_s = time.monotonic() + within_s
    still = [one for one in connections if not one.is_closed]
    while still and time.monotonic() < end_s:
        readable, _ = ready([one.socket for one in still], 0.2)
        for one in still:
            if one.socket.fileno() in readable:
                one.read()
                one.received = b""
        still = [one for one in still if not one.is_closed]
    return len(still)


def dial_many(address: str, count: int, first: bytes, *, source: str = "127.0.0.1") -> list[RawConnection]:
    """Dial again and again; those that the daemon refuses are left out."""
    found: list[RawConnection] = []
    for _ in range(count):
        with suppress(OSError):
            found.append(RawConnection(address, first, source=source))
    return found
