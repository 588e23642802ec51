"""Calls by hand-made frames of HTTP/2: a client library would cost more than the server does.

`closed` keeps so many calls in flight, and measures throughput. `open_loop` sends by the clock, whatever the
answers do, and counts each latency from the moment when the call was due: a server that stands still is
charged for all calls that it held up (coordinated omission). That calls were OK is told by the server's own
counters.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle

import hpack
from google.protobuf.message import Message

from http2.messages import framed

SERVICE = "mnemosynerpc.SessionManager"
# The daemon asks a client for a new connection after 3,400 calls (http2/core.py).
CALLS_A_CONNECTION = 3000
MAX_IN_FLIGHT = 120  # the server allows 128 on a connection
SILENCE_S = 10.0
HEADERS_FRAME, DATA_FRAME, SETTINGS_FRAME, PING_FRAME, WINDOW_FRAME = 1, 0, 4, 6, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1


@dataclass(frozen=True)
class Request:
    """A call as it goes over the wire, but for its stream."""

    method: str
    body: bytes
    metadata: tuple[tuple[str, str], ...] = ()


def request(method: str, message: Message, *metadata: tuple[str, str]) -> Request:
    return Request(method, framed(message.SerializeToString()), metadata)


@dataclass
class Outcome:
    """What a load has measured."""

    took_s: float = 0.0
    latencies_s: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return len(self.latencies_s) / self.took_s

    def quantile_ms(self, share: float) -> float:
        ordered = sorted(self.latencies_s)
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1000


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


class Connection:
    """One connection; it takes CALLS_A_CONNECTION calls."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._encoder = hpack.Encoder()
        self._authority = address
        self._due_s: dict[int, float] = {}
        self._received = b""
        self._sent = 0
        self._out = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS_FRAME, 0, 0, b"")
        self._out += frame(WINDOW_FRAME, 0, 0, (2**31 - 1 - 65_535).to_bytes(4, "big"))
        self.socket.setblocking(False)

    @property
    def in_flight(self) -> int:
        return len(self._due_s)

    @property
    def is_used_up(self) -> bool:
        return self._sent >= CALLS_A_CONNECTION

    def add(self, call: Request, due_s: float) -> None:
        """Send a call with the next `exchange`."""
        stream, self._sent = 2 * self._sent + 1, self._sent + 1
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", f"/{SERVICE}/{call.method}"),
            (":authority", self._authority),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
            *call.metadata,
        ]
        self._due_s[stream] = due_s
        self._out += frame(HEADERS_FRAME, END_HEADERS, stream, self._encoder.encode(headers))
        self._out += frame(DATA_FRAME, END_STREAM, stream, call.body)

    def exchange(self) -> list[float]:
        """Write what waits and read what has come; return the latencies of what was answered."""
        if self._out:
            with suppress(BlockingIOError):
                self._out = self._out[self.socket.send(self._out) :]
        try:
            while piece := self.socket.recv(1 << 18):
                self._received += piece
        except BlockingIOError:
            return self._take_frames(time.perf_counter())
        raise ConnectionError("the server closed a connection with calls under way")

    def _take_frames(self, now_s: float) -> list[float]:
        took_s, at, received = [], 0, self._received
        while len(received) - at >= 9 and (end := at + 9 + int.from_bytes(received[at : at + 3])) <= len(
            received
        ):
            kind, flags, stream = (
                received[at + 3],
                received[at + 4],
                int.from_bytes(received[at + 5 : at + 9]),
            )
            if kind in {HEADERS_FRAME, DATA_FRAME} and flags & END_STREAM:
                took_s.append(now_s - self._due_s.pop(stream))
            elif kind in {SETTINGS_FRAME, PING_FRAME} and not flags & ACK:
                self._out += frame(kind, ACK, 0, received[at + 9 : end] if kind == PING_FRAME else b"")
            at = end
        self._received = received[at:]
        return took_s


class Connections:
    """Connections to some addresses; one that is used up is replaced, and finishes its calls."""

    def __init__(self, addresses: Sequence[str], count: int) -> None:
        self._addresses = cycle(addresses)
        self._open = [Connection(next(self._addresses)) for _ in range(max(count, len(addresses)))]
        self._finishing: list[Connection] = []
        self._turn = 0
        self.in_flight = 0

    def add(self, call: Request, due_s: float) -> bool:
        """Send a call on the next connection that has room."""
        for _ in range(len(self._open)):
            self._turn = (self._turn + 1) % len(self._open)
            one = self._open[self._turn]
            if one.is_used_up:
                self._finishing.append(one)
                host, _, port = one._authority.rpartition(":")
                one = self._open[self._turn] = Connection(f"{host}:{port}")
            if one.in_flight < MAX_IN_FLIGHT:
                one.add(call, due_s)
                self.in_flight += 1
                return True
        return False

    def exchange(self, wait_s: float) -> list[float]:
        took_s = [one for connection in self._all() for one in connection.exchange()]
        if not took_s and wait_s > 0:
            select.select([one.socket for one in self._all()], [], [], wait_s)
            took_s = [one for connection in self._all() for one in connection.exchange()]
        self.in_flight -= len(took_s)
        for one in [one for one in self._finishing if not one.in_flight]:
            self._finishing.remove(one)
            one.socket.close()
        return took_s

    def close(self) -> None:
        for one in self._all():
            one.socket.close()

    def _all(self) -> list[Connection]:
        return self._open + self._finishing


def closed(
    addresses: Sequence[str],
    calls: Iterator[Request],
    count: int,
    *,
    in_flight: int = 64,
    connections: int = 4,
) -> Outcome:
    """Make so many calls, with so many in flight all the time."""
    outcome, sent = Outcome(), 0
    lines = Connections(addresses, min(connections, in_flight))
    begun_s = heard_s = time.perf_counter()
    while len(outcome.latencies_s) < count:
        now_s = time.perf_counter()
        while sent < count and lines.in_flight < in_flight and lines.add(next(calls), now_s):
            sent += 1
        took_s = lines.exchange(1.0)
        heard_s = _heard(heard_s, took_s)
        outcome.latencies_s += took_s
    outcome.took_s = time.perf_counter() - begun_s
    lines.close()
    return outcome


def open_loop(addresses: Sequence[str], calls: Iterator[Request], *, rate: float, seconds: float) -> Outcome:
    """Make calls at this rate; a latency begins when its call is due."""
    outcome, sent, count = Outcome(), 0, int(rate * seconds)
    lines = Connections(addresses, 8)
    begun_s = heard_s = time.perf_counter()
    while len(outcome.latencies_s) < count:
        while sent < count and (due_s := begun_s + sent / rate) <= time.perf_counter():
            if not lines.add(next(calls), due_s):
                break
            sent += 1
        next_s = begun_s + sent / rate - time.perf_counter() if sent < count else 1.0
        took_s = lines.exchange(max(0.0, min(next_s, 1.0)))
        heard_s = _heard(heard_s, took_s)
        outcome.latencies_s += took_s
    outcome.took_s = time.perf_counter() - begun_s
    lines.close()
    return outcome


def _heard(heard_s: float, took_s: list[float]) -> float:
    now_s = time.perf_counter()
    if not took_s and now_s - heard_s > SILENCE_S:
        raise TimeoutError(f"no answer for {SILENCE_S:.0f} s")
    return now_s if took_s else heard_s
