"""Ask for unknown tokens, fast, while known sessions are read: `make flood`.

Three times in turn, several rounds: cached Gets alone; with as many Gets a second of unknown tokens,
each once; and of a thousand such tokens, again and again. Ratios are those of the cached Gets to the ones
alone of the same round. The server is pinned to one core, and all else to the other.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import asyncpg
import hpack
from mnemosynerpc.session_pb2 import GetRequest, Session, StartRequest

# First: tests/ has a folder of this name.
from http2.messages import framed
from mnemosyned.embedded.server import EmbeddedPostgres

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import (
    CALLS_A_CONNECTION,
    CONNECTIONS,
    LOAD_CORE,
    SERVER_CORE,
    SERVICE,
    cpu_ticks,
    pin,
    portions,
    request_body,
    statements,
)
from processes import Daemon, processes_on

ROWS = 200_000
RATE = 10_000  # unknown tokens a second
TICK_S = 0.005
FLOOD_CONNECTIONS = 8
MAX_IN_FLIGHT = 120  # the server allows 128 on a connection
HEADERS_FRAME, DATA_FRAME, SETTINGS_FRAME, PING_FRAME, WINDOW_FRAME = 1, 0, 4, 6, 8
END_STREAM, END_HEADERS, ACK = 1, 4, 1
KNOWN = Session(access_token="a" * 128, subject_id="user:1", bag={"name": "Ada Lovelace"})


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


class Flood(threading.Thread):
    """Gets of unknown tokens on a few connections, so many a second, until it is stopped."""

    def __init__(self, address: str, tokens: Iterator[str]) -> None:
        super().__init__(daemon=True)
        self._address = address
        self._tokens = tokens
        self._connections = [Connection(address) for _ in range(FLOOD_CONNECTIONS)]
        self._is_over = threading.Event()
        self.answered = 0

    def run(self) -> None:
        begun_s, sent = time.perf_counter(), 0
        while not self._is_over.wait(TICK_S):
            due = int((time.perf_counter() - begun_s) * RATE) - sent
            for at in range(FLOOD_CONNECTIONS):
                if self._connections[at].is_done:
                    self._connections[at].close()
                    self._connections[at] = Connection(self._address)
                connection = self._connections[at]
                count = max(0, min(due, connection.room))
                before = connection.answered
                connection.send([next(self._tokens) for _ in range(count)])
                self.answered += connection.answered - before
                sent, due = sent + count, due - count

    def stop(self) -> None:
        self._is_over.set()
        self.join()
        for connection in self._connections:
            connection.close()


class Connection:
    """One connection of the flood; frames by hand: a client library would cost more than the server does."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)))
        self._encoder = hpack.Encoder()
        self._headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", f"/{SERVICE}/Get"),
            (":authority", address),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ]
        self._received = b""
        self._sent = self.answered = 0
        window = (2**31 - 1 - 65_535).to_bytes(4, "big")
        self._socket.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + frame(SETTINGS_FRAME, 0, 0, b"")
            + frame(WINDOW_FRAME, 0, 0, window)
        )
        self._socket.setblocking(False)

    @property
    def room(self) -> int:
        """How many requests may be sent now."""
        return min(MAX_IN_FLIGHT - (self._sent - self.answered), CALLS_A_CONNECTION - self._sent)

    @property
    def is_done(self) -> bool:
        return self.answered == CALLS_A_CONNECTION

    def send(self, tokens: Iterable[str]) -> None:
        """Send requests, and take what has come for earlier ones."""
        self._exchange(b"".join(map(self._request, tokens)))

    def close(self) -> None:
        self._socket.close()

    def _request(self, token: str) -> bytes:
        block = self._encoder.encode(self._headers)
        body = framed(GetRequest(access_token=token).SerializeToString())
        stream, self._sent = 2 * self._sent + 1, self._sent + 1
        return frame(HEADERS_FRAME, END_HEADERS, stream, block) + frame(DATA_FRAME, END_STREAM, stream, body)

    def _exchange(self, out: bytes) -> None:
        while True:
            with suppress(BlockingIOError):
                out = out[self._socket.send(out) :] if out else out
            with suppress(BlockingIOError):
                while piece := self._socket.recv(1 << 18):
                    self._received += piece
            out += self._take_frames()
            if not out:
                return

    def _take_frames(self) -> bytes:
        reply, at = b"", 0
        while (end := at + 9 + int.from_bytes(self._received[at : at + 3], "big")) <= len(self._received):
            kind, flags = self._received[at + 3], self._received[at + 4]
            if kind in (HEADERS_FRAME, DATA_FRAME):
                self.answered += flags & END_STREAM
            elif kind in (SETTINGS_FRAME, PING_FRAME) and not flags & ACK:
                payload = self._received[at + 9 : end] if kind == PING_FRAME else b""
                reply += frame(kind, ACK, 0, payload)
            at = end
            if len(self._received) - at < 9:
                break
        self._received = self._received[at:]
        return reply


@dataclass
class Round:
    """What one round has measured."""

    gets: float  # a second
    p50_ms: float
    p99_ms: float
    unknown: float  # answered a second
    loads: float  # statements a second
    postgres: float  # share of a core


def fresh() -> Iterator[str]:
    while True:
        yield secrets.token_hex(64)


def repeated() -> Iterator[str]:
    return cycle([secrets.token_hex(64) for _ in range(1000)])


FLOODS: dict[str, Callable[[], Iterator[str]] | None] = {
    "alone": None,
    "unknown tokens, each once": fresh,
    "a thousand of them, repeated": repeated,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=150_000, help="cached Gets a round")
    parser.add_argument("--rps", type=int, default=0, help="cached Gets a second; 0: as many as will go")
    parser.add_argument("flags", nargs="*", help="flags of the daemon, after --")
    options = parser.parse_args()
    if shutil.which("h2load") is None:
        sys.exit("make flood needs h2load: apt-get install nghttp2-client")
    with tempfile.TemporaryDirectory() as directory:
        rounds = measured(Path(directory), options)
    print(f"\ncached Gets, {options.rounds} rounds, median (least to most)")
    print(f"  {'':30} {'Gets a s':>9} {'ratio':>20} {'p50 ms':>7} {'p99 ms':>7}", end="")
    print(f" {'unknown a s':>12} {'statements a s':>15} {'PostgreSQL, cores':>18}")
    for name, found in rounds.items():
        ratios = sorted(one.gets / base.gets for one, base in zip(found, rounds["alone"], strict=True))
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        columns = [[getattr(one, field) for one in found] for field in Round.__annotations__]
        gets, p50, p99, unknown, loads, postgres = map(statistics.median, columns)
        print(f"  {name:30} {gets:9.0f} {spread:>20} {p50:7.2f} {p99:7.2f}", end="")
        print(f" {unknown:12.0f} {loads:15.0f} {postgres:18.2f}")


def measured(directory: Path, options: argparse.Namespace) -> dict[str, list[Round]]:
    rounds: dict[str, list[Round]] = {name: [] for name in FLOODS}
    with (
        EmbeddedPostgres.start(directory / "postgres") as server,
        Daemon(f"-postgres.address={server.dsn}", *options.flags) as daemon,
    ):
        with daemon.serving().stub() as stub:
            stub.Start(StartRequest(session=KNOWN))
        asyncio.run(fill_table(server.dsn))
        pin(daemon.process.pid, SERVER_CORE)
        for pid in processes_on(directory):
            pin(pid, LOAD_CORE)
        body = request_body(directory, GetRequest(access_token=KNOWN.access_token).SerializeToString())
        for _ in range(options.rounds):
            for name, new_tokens in FLOODS.items():
                flood = None if new_tokens is None else Flood(daemon.address, new_tokens())
                rounds[name].append(one_round(daemon, directory, body, flood, options))
    return rounds


async def fill_table(dsn: str) -> None:
    """Have other sessions in the table, so that its index is as deep as in use."""
    connection = await asyncpg.connect(dsn)
    await connection.execute(
        "INSERT INTO mnemosyne.session SELECT sha512(number::text::bytea), '', 'user:' || number, '', '', "
        "now() + interval '1 day' FROM generate_series(1, $1::int) AS number",
        ROWS,
    )
    await connection.execute("VACUUM ANALYZE mnemosyne.session")
    await connection.close()


def one_round(
    daemon: Daemon, directory: Path, body: Path, flood: Flood | None, options: argparse.Namespace
) -> Round:
    if flood is not None:
        flood.start()
        time.sleep(0.3)  # into its stride; nothing depends on it
    pids = processes_on(directory)
    ticks, sent, answered = postgres_ticks(pids), statements(daemon, "load"), flood.answered if flood else 0
    begun_s = time.perf_counter()
    took_us, busy_s = cached_gets(daemon.address, body, directory / "h2load.log", options)
    took_s = time.perf_counter() - begun_s
    unknown = flood.answered - answered if flood else 0
    if flood is not None:
        flood.stop()
    return Round(
        gets=len(took_us) / busy_s,
        p50_ms=took_us[len(took_us) // 2] / 1000,
        p99_ms=took_us[len(took_us) * 99 // 100] / 1000,
        unknown=unknown / took_s,
        loads=(statements(daemon, "load") - sent) / took_s,
        postgres=(postgres_ticks(pids) - ticks) / 100 / took_s,
    )


def postgres_ticks(pids: list[int]) -> int:
    return sum(cpu_ticks(pid) for pid in pids)


def cached_gets(address: str, body: Path, log: Path, options: argparse.Namespace) -> tuple[list[int], float]:
    """Return the latencies in microseconds, sorted, and the seconds in which h2load has called."""
    took_us, busy_s = [], 0.0
    for calls in portions(options.calls):
        log.unlink(missing_ok=True)
        load_once(address, body, log, calls, options.rps)
        lines = [re.split(r"\s+", line) for line in log.read_text().splitlines()]
        spans = [(int(line[0]), int(line[2])) for line in lines]  # when a call began, and its time
        took_us += [took for _, took in spans]
        busy_s += (max(begun + took for begun, took in spans) - min(spans)[0]) / 1e6
    return sorted(took_us), busy_s


def load_once(address: str, body: Path, log: Path, calls: int, rps: int) -> None:
    pace = [f"--rps={rps // CONNECTIONS}"] if rps else []
    command = ["taskset", "-c", str(LOAD_CORE), "h2load", "-c", str(CONNECTIONS), "-m", "16", *pace]
    command += ["-n", str(calls), f"--log-file={log}", "-d", str(body)]
    headers = ["-H", "content-type: application/grpc", "-H", "te: trailers"]
    out = subprocess.run(
        [*command, *headers, f"http://{address}/{SERVICE}/Get"], check=True, capture_output=True, text=True
    ).stdout
    assert f"{calls} succeeded, 0 failed" in out, out


if __name__ == "__main__":
    main()
