"""Attacks that guess: tokens, keys, and the times that answers take."""

from __future__ import annotations

import contextlib
import re
import secrets
import statistics
import time
from typing import Final

import grpc
from mnemosynerpc.session_pb2 import ExistsRequest, GetRequest
from processes import Daemon, mnemosyned
from raw_http2 import RST_STREAM
from redteam.lab import SERVICE, Lab, attack, own_session, require
from redteam.raw import RawConnection, call, headers

_KIND: Final = "guess"
_TOKENS: Final = 10_000
_A_CONNECTION: Final = 100
_MAX_LINES: Final = 5
_MAX_LINES_OF_CALLS: Final = 2000


def _guess(daemon: Daemon, method: str, count: int) -> int:
    """Ask for unknown tokens; return how many were found."""
    path, found = headers(f"/{SERVICE}/{method}".encode()), 0
    client, stream_id = RawConnection(daemon.address), 1
    for _ in range(count // _A_CONNECTION):
        if stream_id > 4000:
            client.close()
            client, stream_id = RawConnection(daemon.address), 1
        ids = range(stream_id, stream_id + 2 * _A_CONNECTION, 2)
        client.received = b""
        client.send(
            b"".join(
                call(path, GetRequest(access_token=secrets.token_hex(64)).SerializeToString(), it)
                for it in ids
            )
        )
        stream_id += 2 * _A_CONNECTION
        end_s = time.monotonic() + 5.0
        while not _has_answers(client) and time.monotonic() < end_s:
            pass
        found += client.received.count(b"\x0bgrpc-status\x010") if method != "Exists" else 0
    client.close()
    return found


def _has_answers(client: RawConnection) -> bool:
    client.wait_closed(0.01)
    ended = [
        sent for sent in client.frames() if sent.kind == RST_STREAM or (sent.kind < 2 and sent.flags & 1)
    ]
    return len(ended) >= _A_CONNECTION


@attack(_KIND, f"{_TOKENS:,} unknown tokens are counted, and said once", quick_on=("h2",))
def _unknown(lab: Lab) -> None:
    daemon = lab.node()
    for method in ("Get", "Exists", "Abandon", "SetValue"):
        found = _guess(daemon, method, _TOKENS // 4)
        require(not found, f"{found} unknown tokens were found")
    time.sleep(0.5)  # for what it logs
    _, page = daemon.http("/metrics")
    counted = [line for line in page.splitlines() if re.search(r"guess|unknown_token", line)]
    lines = [line for line in daemon.lines if re.search(r"guess|unknown_token", line)]
    require(counted, "no metric says that unknown tokens are asked for")
    require(lines, "no line of the log says that one address asks for unknown tokens")
    require(len(lines) < _MAX_LINES, f"{len(lines)} lines of log say that one caller guesses")
    # Failed calls have a limit of their own: 100 lines a second for each method.
    require(len(daemon.lines) < _MAX_LINES_OF_CALLS, f"{len(daemon.lines)} lines of log for one guesser")


@attack(_KIND, "guesses from 5,000 addresses fill no memory")
def _many_guessers(lab: Lab) -> None:
    daemon = lab.node()
    before = len(daemon.http("/metrics")[1])
    path = headers(f"/{SERVICE}/Get".encode())
    for number in range(5000):
        message = GetRequest(access_token=secrets.token_hex(64)).SerializeToString()
        source = f"127.1.{number >> 8}.{number & 255 or 1}"
        with contextlib.suppress(OSError), RawConnection(daemon.address, source=source) as client:
            client.send(call(path, message))
    grown = len(daemon.http("/metrics")[1]) - before
    require(grown < 20_000, f"the page of metrics has grown by {grown} bytes")


@attack(_KIND, "guesses of API keys")
def _keys(lab: Lab) -> None:
    _, out, err = mnemosyned("key", "session")
    (digest,) = (word for word in (out + err).split() if word.startswith("sha256:"))
    file = lab.scratch / "keys"
    file.write_text(f"session {digest}\n")
    file.chmod(0o600)
    daemon = lab.node(f"-auth.keys={file}", watches=False)
    message = ExistsRequest(access_token="t").SerializeToString()
    passed = 0
    with grpc.insecure_channel(daemon.address) as channel:
        unary = channel.unary_unary(f"/{SERVICE}/Exists")
        for _ in range(2000):
            try:
                unary(message, metadata=(("x-api-key", f"mnk_{secrets.token_urlsafe(32)[:43]}"),), timeout=5)
            except grpc.RpcError:
                continue
            passed += 1
        for key in ("", "x" * 4000, f"session {digest}", digest, digest.removeprefix("sha256:")):
            with contextlib.suppress(grpc.RpcError):
                unary(message, metadata=(("x-api-key", key),), timeout=5)
                passed += 1
    require(not passed, f"{passed} guessed keys passed")


@attack(_KIND, "the time of an answer tells how much of a token is right")
def _timing(lab: Lab) -> None:
    daemon = lab.node()
    token = own_session(daemon)
    near, far = token[:-1] + ("0" if token[-1] != "0" else "1"), secrets.token_hex(64)
    took: dict[str, list[float]] = {near: [], far: []}
    with daemon.stub() as stub:
        for _ in range(1500):
            for guessed, times in took.items():
                begun_s = time.perf_counter()
                stub.Exists(ExistsRequest(access_token=guessed), timeout=5)
                times.append(time.perf_counter() - begun_s)
    medians = [statistics.median(times) for times in took.values()]
    require(
        max(medians) < 1.3 * min(medians),
        f"nearly the right token takes {medians[0] * 1e6:.0f} µs, another one {medians[1] * 1e6:.0f} µs",
    )
