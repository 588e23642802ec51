"""Make millions of calls on connections that stay open: `make soak`.

Connections of a client that is written here, and one of grpcio, mix Get, Exists and SetValue. A connection is
replaced only when the server asks for that (GOAWAY). Each million calls the daemon's memory is printed. The
command fails if a call fails, or if memory grows by more than 5 MB after the first million.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import grpc
import hpack
import psutil
import uvloop
from google.protobuf.message import Message
from mnemosynerpc.session_pb2 import ExistsRequest, GetRequest, Session, SetValueRequest, StartRequest
from mnemosynerpc.session_pb2_grpc import SessionManagerStub

# First: tests/ has a folder of this name.
from mnemosyned import __version__

sys.path.insert(0, str(Path(__file__).parents[1]))

from processes import Daemon

CONNECTIONS, AT_ONCE = 8, 32
GRPCIO_CALLERS = 4
REPORT_CALLS = 1_000_000
MAX_GROWTH_BYTES = 5 * 1024**2
SESSIONS = 100
# Of ten calls.
METHODS = ("Get", "Get", "Exists", "Get", "SetValue", "Get", "Exists", "Get", "Get", "Exists")

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
REFUSED_STREAM = 7
NO_TABLE = b"\0\1\0\0\0\0"  # of headers, so that equal headers are equal bytes
LARGE_WINDOW = 1024**3


def frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + payload


def framed(message: Message) -> bytes:
    content = message.SerializeToString()
    return b"\0" + len(content).to_bytes(4, "big") + content


class Soak:
    """How many calls are left, done, and failed."""

    def __init__(self, calls: int, process: psutil.Process) -> None:
        self.left = calls
        self.done = 0
        self.failures: Counter[str] = Counter()
        self.open: list[Connection] = []
        self.connections = 0
        self.is_over = asyncio.Event()
        self.memory_bytes: list[int] = []
        self._calls = calls
        self._process = process
        self._began_s = time.monotonic()

    def take(self) -> bool:
        """Take one of the calls that are left."""
        if not self.left or self.failures:
            return False
        self.left -= 1
        return True

    def give_back(self) -> None:
        """Give a call back, of which nothing was done."""
        self.left += 1
        for connection in self.open:
            connection.fill()

    def end(self, failure: str = "") -> None:
        """Count a call."""
        self.done += 1
        if failure:
            self.failures[failure] += 1
        if self.done % REPORT_CALLS == 0 or self.done == self._calls:
            self._report()
        if self.done == self._calls or self.failures:
            self.is_over.set()

    def _report(self) -> None:
        self.memory_bytes.append(self._process.memory_info().rss)
        rate = self.done / (time.monotonic() - self._began_s)
        print(
            f"{self.done:>12,} calls  {self.memory_bytes[-1] / 1024**2:6.1f} MB  {rate:7,.0f}/s"
            f"  {self.connections} connections",
            flush=True,
        )


class Connection(asyncio.Protocol):
    """Keeps calls in flight until the server asks for another connection."""

    def __init__(self, soak: Soak, connect: Callable[[], None], requests: dict[str, list[bytes]]) -> None:
        """`connect` makes another connection like this one."""
        self._soak = soak
        self._connect = connect
        self._requests = requests
        self._transport: asyncio.Transport
        self._buffer = b""
        self._encoder = hpack.Encoder()
        self._blocks: dict[str, bytes] = {}
        self._status_by_block: dict[bytes, str] = {}
        self._calls: dict[int, str] = {}  # by stream: the method
        self._next_id = 1
        self._read_bytes = 0
        self._is_retired = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)
        self._soak.connections += 1
        self._soak.open.append(self)
        grant = frame(WINDOW_UPDATE, 0, 0, LARGE_WINDOW.to_bytes(4, "big"))
        transport.write(PREFACE + frame(SETTINGS, 0, 0, NO_TABLE) + grant)  # type: ignore[attr-defined]
        self.fill()

    def fill(self) -> None:
        """Make as many calls as may be in flight."""
        output = []
        while len(self._calls) < AT_ONCE and not self._is_retired and self._soak.take():
            number = self._next_id // 2
            method = METHODS[number % len(METHODS)]
            output.append(frame(HEADERS, END_HEADERS, self._next_id, self._block(method)))
            message = self._requests[method][number % SESSIONS]
            output.append(frame(DATA, END_STREAM, self._next_id, message))
            self._calls[self._next_id] = method
            self._next_id += 2
        self._transport.write(b"".join(output))
        if self._is_retired and not self._calls:
            self._transport.close()

    def _block(self, method: str) -> bytes:
        block = self._blocks.get(method)
        if block is None:
            headers = [
                (":method", "POST"), (":scheme", "http"), (":path", f"/mnemosynerpc.SessionManager/{method}"),
                (":authority", "soak"), ("content-type", "application/grpc"), ("te", "trailers"),
            ]  # fmt: skip
            block = self._encoder.encode(headers)
            if self._next_id // 2 > len(METHODS):
                # All are in the table by now, so that it changes no more.
                self._blocks[method] = block
        return block

    def data_received(self, data: bytes) -> None:
        """Take whole frames, and keep the beginning of the next."""
        data = self._buffer + data
        at, end = 0, len(data)
        while at + 9 <= end:
            after = at + 9 + int.from_bytes(data[at : at + 3], "big")
            if after > end:
                break
            stream_id = int.from_bytes(data[at + 5 : at + 9], "big")
            self._take(data[at + 3], data[at + 4], stream_id, data[at + 9 : after])
            at = after
        self._buffer = data[at:]
        self.fill()

    def _take(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        if kind == HEADERS and flags & END_STREAM:
            self._end(stream_id, self._failure(payload))
        elif kind == DATA:
            self._read_bytes += len(payload)
            if self._read_bytes > LARGE_WINDOW // 2:
                self._transport.write(frame(WINDOW_UPDATE, 0, 0, self._read_bytes.to_bytes(4, "big")))
                self._read_bytes = 0
        elif kind == RST_STREAM:
            self._take_reset(stream_id, int.from_bytes(payload, "big"))
        elif kind in {PING, SETTINGS} and not flags & ACK:
            self._transport.write(frame(kind, ACK, 0, payload if kind == PING else b""))
        elif kind == GOAWAY:
            self._retire(int.from_bytes(payload[4:8], "big"))

    def _retire(self, code: int) -> None:
        if code:
            self._soak.end(f"GOAWAY with error {code}")
        if not self._is_retired:
            self._is_retired = True
            self._soak.open.remove(self)
            self._connect()

    def _take_reset(self, stream_id: int, code: int) -> None:
        if code == REFUSED_STREAM and self._is_retired:
            # Nothing was done: another connection makes this call.
            del self._calls[stream_id]
            self._soak.give_back()
        else:
            self._end(stream_id, f"RST_STREAM {code}")

    def _failure(self, block: bytes) -> str:
        status = self._status_by_block.get(block)
        if status is None:
            headers = dict(hpack.Decoder().decode(block, raw=True))
            status = headers.get(b"grpc-status", b"none").decode()
            self._status_by_block[block] = status
        return "" if status == "0" else f"status {status}"

    def _end(self, stream_id: int, failure: str) -> None:
        method = self._calls.pop(stream_id)
        self._soak.end(failure and f"{method}: {failure}")

    def connection_lost(self, _exc: Exception | None) -> None:
        """Fail what is in flight: the server must not close a connection that has calls."""
        for method in self._calls.values():
            self._soak.end(f"{method}: connection lost")


async def call_by_grpcio(soak: Soak, address: str, tokens: list[str]) -> None:
    """Call one by one, with the client library that most callers have."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = SessionManagerStub(channel)

        async def call() -> None:
            number = 0
            while soak.take():
                number += 1
                try:
                    await stub.Get(GetRequest(access_token=tokens[number % SESSIONS]), timeout=30)
                    soak.end()
                except grpc.aio.AioRpcError as exc:
                    soak.end(f"grpcio: {exc.code().name} {exc.details()}")

        await asyncio.gather(*(call() for _ in range(GRPCIO_CALLERS)))


async def start_sessions(address: str) -> list[str]:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = SessionManagerStub(channel)
        new = StartRequest(session=Session(subject_id="user:1", bag={"name": "Ada", "n": "0"}))
        return [(await stub.Start(new)).session.access_token for _ in range(SESSIONS)]


def requests_of(tokens: list[str]) -> dict[str, list[bytes]]:
    """Return the bodies of requests by method."""
    return {
        "Get": [framed(GetRequest(access_token=one)) for one in tokens],
        "Exists": [framed(ExistsRequest(access_token=one)) for one in tokens],
        "SetValue": [
            framed(SetValueRequest(access_token=one, key="n", value=f"{number}"))
            for number, one in enumerate(tokens)
        ],
    }


async def soak_daemon(daemon: Daemon, calls: int) -> Soak:
    tokens = await start_sessions(daemon.address)
    requests = requests_of(tokens)
    soak = Soak(calls, psutil.Process(daemon.process.pid))
    host, _, port = daemon.address.rpartition(":")
    loop, connecting = asyncio.get_running_loop(), set[asyncio.Task[Any]]()

    def connect() -> None:
        protocol = Connection(soak, connect, requests)
        task = loop.create_task(loop.create_connection(lambda: protocol, host, int(port)))
        connecting.add(task)
        task.add_done_callback(connecting.discard)

    for _ in range(CONNECTIONS):
        connect()
    by_grpcio = asyncio.create_task(call_by_grpcio(soak, daemon.address, tokens))
    await soak.is_over.wait()
    by_grpcio.cancel()
    await asyncio.gather(by_grpcio, return_exceptions=True)
    return soak


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=10_000_000, help="calls; default: %(default)s")
    parser.add_argument("flags", nargs="*", help="of the daemon, after --")
    arguments = parser.parse_args()
    print(f"mnemosyned {__version__}: {arguments.n:,} calls")
    with Daemon("-storage=memory", "-ttl=1h", *arguments.flags) as daemon:
        soak = uvloop.run(soak_daemon(daemon.serving(), arguments.n))
    if soak.failures:
        print(f"failed: {dict(soak.failures.most_common(5))}")
        return 1
    grown_bytes = max(soak.memory_bytes) - soak.memory_bytes[0]
    print(f"no call failed; {grown_bytes / 1024**2:+.1f} MB after the first million")
    return int(grown_bytes > MAX_GROWTH_BYTES)


if __name__ == "__main__":
    sys.exit(main())
