"""The well-behaved client: one call every few milliseconds, in a process of its own, timed.

    attack's process ── GoodClient ── stdin: "report" ──> this script ── HTTP/2 ──> daemon
                                   <── stdout: one JSON ──

The process is separate so that the attacker's own work does not delay what is measured. The frames are
written by hand: a client library would cost more than the daemon's answer.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import hpack

# Below the daemon's bound of calls on a connection.
_CALLS_A_CONNECTION: Final = 3000
_TIMEOUT_S: Final = 2.0
_MAGIC: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST, _SETTINGS, _PING, _GOAWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the client saw since the last report."""

    calls: int
    p99_ms: float
    most_ms: float
    failed: int
    failures: dict[str, int]  # by text, with their count


class GoodClient:
    """The process of the client, as the attack's process sees it."""

    def __init__(
        self, address: str, path: str, message: bytes, *, wanted: bytes = b"", every_ms: float = 5.0
    ) -> None:
        """Call `path` with the message again and again; an answer without `wanted` is a failure."""
        words = [address, path, message.hex(), wanted.hex(), str(every_ms)]
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        with suppress(PermissionError):
            # It is the clock of the whole measurement.
            os.setpriority(os.PRIO_PROCESS, self._process.pid, -10)
        # The first report says that it is connected.
        self.report()

    def report(self) -> Report:
        """Return what was seen since the last report, and begin the next one."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"report\n")
        self._process.stdin.flush()
        return Report(**json.loads(self._process.stdout.readline()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait()


def _frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + payload


class _Connection:
    """One connection; `pending` has the calls that are not answered, with when they were made."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=_TIMEOUT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.pending: dict[int, float] = {}
        self.is_retired = False
        self._next_id = 1
        self._received = b""
        self._bodies: dict[int, bytes] = {}
        self._decoder = hpack.Decoder()
        window = (2**31 - 1 - 65_535).to_bytes(4, "big")
        self.socket.sendall(_MAGIC + _frame(_SETTINGS, 0, 0) + _frame(_WINDOW, 0, 0, window))

    def call(self, block: bytes, body: bytes, now_s: float) -> None:
        stream_id, self._next_id = self._next_id, self._next_id + 2
        self.pending[stream_id] = now_s
        self.socket.sendall(_frame(_HEADERS, 4, stream_id, block) + _frame(_DATA, 1, stream_id, body))
        self.is_retired = self.is_retired or self._next_id > 2 * _CALLS_A_CONNECTION

    def read(self) -> list[tuple[int, str, bytes]]:
        """Return the calls that ended: stream, gRPC status, body. Raises ConnectionError."""
        data = self.socket.recv(1 << 16)
        if not data:
            raise ConnectionError("closed by the daemon")
        self._received += data
        ended: list[tuple[int, str, bytes]] = []
        while len(self._received) >= 9:
            end = 9 + int.from_bytes(self._received[:3], "big")
            if len(self._received) < end:
                break
            head, payload = self._received[:9], self._received[9:end]
            self._received = self._received[end:]
            ended += self._take(head[3], head[4], int.from_bytes(head[5:], "big"), payload)
        return ended

    def _take(self, kind: int, flags: int, stream_id: int, payload: bytes) -> list[tuple[int, str, bytes]]:
        if kind in (_SETTINGS, _PING) and not flags & 1:
            self.socket.sendall(_frame(kind, 1, 0, payload if kind == _PING else b""))
        elif kind == _GOAWAY:
            self.is_retired = True
        elif kind == _RST:
            return [(stream_id, f"reset {int.from_bytes(payload, 'big')}", b"")]
        elif kind == _DATA:
            self._bodies[stream_id] = self._bodies.get(stream_id, b"") + payload
        elif kind == _HEADERS:
            headers = dict(self._decoder.decode(payload))
            if flags & 1:
                status = headers.get("grpc-status", f"HTTP {headers.get(':status')}")
                status = f"{status} {headers.get('grpc-message', '')}".rstrip()
                return [(stream_id, status, self._bodies.pop(stream_id, b""))]
        return []


class _Calls:
    """The calls of the process, and their times."""

    def __init__(self, address: str, path: str, message: bytes, wanted: bytes) -> None:
        self._address = address
        self._body = b"\0" + len(message).to_bytes(4, "big") + message
        self._wanted = wanted
        encoder = hpack.Encoder()
        encoder.header_table_size = 0
        self._block = encoder.encode(
            [
                (":method", "POST"),
                (":scheme", "http"),
                (":path", path),
                (":authority", "good"),
                ("content-type", "application/grpc"),
                ("te", "trailers"),
            ]
        )
        self._connections: list[_Connection] = []
        self._took_s: list[float] = []
        self._failures: Counter[str] = Counter()

    def make(self, now_s: float) -> None:
        try:
            fresh = [one for one in self._connections if not one.is_retired]
            if not fresh:
                fresh = [_Connection(self._address)]
                self._connections += fresh
            fresh[-1].call(self._block, self._body, now_s)
        except OSError as exc:
            self._failures[f"{type(exc).__name__}: {exc.strerror}"] += 1

    def take(self, within_s: float) -> None:
        """Take answers for at most so long, or until there is a line on the standard input."""
        readable, _, _ = select.select(
            [sys.stdin, *(one.socket for one in self._connections)], [], [], within_s
        )
        now_s = time.perf_counter()
        for one in list(self._connections):
            try:
                if one.socket in readable:
                    self._count(one, now_s)
            except OSError as exc:
                self._failures[f"lost: {exc}"] += max(1, len(one.pending))
                self._connections.remove(one)
                continue
            late = [stream_id for stream_id, made_s in one.pending.items() if now_s - made_s > _TIMEOUT_S]
            for stream_id in late:
                del one.pending[stream_id]
                self._failures["no answer in 2 s"] += 1
            if one.is_retired and not one.pending:
                one.socket.close()
                self._connections.remove(one)
        if sys.stdin in readable:
            if not sys.stdin.readline():
                sys.exit()
            self._report()

    def _count(self, one: _Connection, now_s: float) -> None:
        for stream_id, status, body in one.read():
            made_s = one.pending.pop(stream_id, None)
            if made_s is None:
                continue
            self._took_s.append(now_s - made_s)
            if status != "0":
                self._failures[f"status {status}"] += 1
            elif self._wanted not in body:
                self._failures["another answer than the right one"] += 1

    def _report(self) -> None:
        took_s = sorted(self._took_s) or [0.0]
        # A call that is late and not answered yet counts with the time that has passed.
        report: dict[str, Any] = {
            "calls": len(self._took_s),
            "p99_ms": round(took_s[min(len(took_s) - 1, len(took_s) * 99 // 100)] * 1000, 1),
            "most_ms": round(took_s[-1] * 1000, 1),
            "failed": self._failures.total(),
            "failures": dict(self._failures.most_common(5)),
        }
        self._took_s, self._failures = [], Counter()
        print(json.dumps(report), flush=True)


def _main(address: str, path: str, message: str, wanted: str, every_ms: str) -> None:
    calls = _Calls(address, path, bytes.fromhex(message), bytes.fromhex(wanted))
    every_s = float(every_ms) / 1000
    due_s = time.perf_counter()
    while True:
        now_s = time.perf_counter()
        if now_s >= due_s:
            calls.make(now_s)
            # Ticks that this process missed itself are not made up for.
            due_s = max(due_s + every_s, now_s)
        calls.take(max(0.0, due_s - time.perf_counter()))


if __name__ == "__main__":
    _main(*sys.argv[1:])
