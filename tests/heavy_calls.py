"""Calls that cost a daemon much, made by a process of its own: `heavy_calls.py NAME ADDRESS SECONDS`.

    test or bench ── HeavyCaller ── stdout: "begun" <── this script ── many calls at once ──> daemon

Each entry of `HEAVY` says what one of its threads calls again and again, and how many threads there are. At
the end the script writes one JSON of how many calls ended with which status.
"""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import grpc
from mnemosynerpc.session_pb2 import (
    AbandonRequest,
    DeleteRequest,
    ExistsRequest,
    GetRequest,
    ListRequest,
    Query,
    Session,
    SetValueRequest,
    StartRequest,
)
from mnemosynerpc.session_pb2_grpc import SessionManagerStub

_SERVICE: Final = "mnemosynerpc.SessionManager"
_LARGE: Final = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
_TIMEOUT_S: Final = 20.0
_MAX_BYTES: Final = 4 * 1024**2 - 64
_ENTRIES: Final = 10_000

# One call; made again and again by one thread, with a number of its own.
Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Heavy:
    """What one thread calls: `prepare` gets a channel and the thread's number, and returns the call."""

    prepare: Callable[[grpc.Channel, int], Call]
    threads: int = 4


def _stub(channel: grpc.Channel) -> SessionManagerStub:
    return SessionManagerStub(channel)


def _raw(channel: grpc.Channel, method: str) -> Any:  # noqa: ANN401  # a callable of grpcio
    return channel.unary_unary(f"/{_SERVICE}/{method}")


def _many(size: int, count: int = _ENTRIES) -> dict[str, str]:
    return {f"key-{number:06}": "v" * size for number in range(count)}


def _start(bag: dict[str, str], **fields: str) -> StartRequest:
    return StartRequest(session=Session(subject_id="heavy", bag=bag, **fields))


def _starting(make: Callable[[], StartRequest]) -> Callable[[grpc.Channel, int], Call]:
    def prepare(channel: grpc.Channel, _: int) -> Call:
        message, call = make().SerializeToString(), _raw(channel, "Start")
        return lambda: call(message, timeout=_TIMEOUT_S)

    return prepare


def _sending(method: str, make: Callable[[], bytes]) -> Callable[[grpc.Channel, int], Call]:
    def prepare(channel: grpc.Channel, _: int) -> Call:
        message, call = make(), _raw(channel, method)
        return lambda: call(message, timeout=_TIMEOUT_S)

    return prepare


def _packed(message: Callable[[], bytes]) -> Callable[[grpc.Channel, int], Call]:
    def prepare(channel: grpc.Channel, number: int) -> Call:
        body, call = message(), _raw(channel, "Exists")
        way = grpc.Compression.Gzip if number % 2 else grpc.Compression.Deflate
        return lambda: call(body, timeout=_TIMEOUT_S, compression=way)

    return prepare


def _listing(**fields: Any) -> Callable[[grpc.Channel, int], Call]:  # noqa: ANN401  # of a ListRequest
    def prepare(channel: grpc.Channel, _: int) -> Call:
        call = _stub(channel).List
        return lambda: call(ListRequest(limit=1000, **fields), timeout=_TIMEOUT_S)

    return prepare


def _listing_by(channel: grpc.Channel, _: int) -> Call:
    call = _stub(channel).List
    query = Query(refresh_token="shared")
    query.expire_at_from.FromSeconds(int(time.time()))
    return lambda: call(ListRequest(limit=1000, query=query), timeout=_TIMEOUT_S)


def _changing(size: int, *, is_shared: bool) -> Callable[[grpc.Channel, int], Call]:
    def prepare(channel: grpc.Channel, number: int) -> Call:
        stub = _stub(channel)
        token = "shared-by-all-that-change" if is_shared else secrets.token_hex(32)
        try:
            stub.Start(_start(_many(size), access_token=token), timeout=_TIMEOUT_S)
        except grpc.RpcError as exc:
            if not is_shared or exc.code() is not grpc.StatusCode.ALREADY_EXISTS:  # type: ignore[attr-defined]
                raise
        request = SetValueRequest(access_token=token, key=f"key-{number:06}", value="w" * size)
        return lambda: stub.SetValue(request, timeout=_TIMEOUT_S)

    return prepare


def _getting(
    bag: Callable[[], dict[str, str]], *, is_cached: bool = True
) -> Callable[[grpc.Channel, int], Call]:
    def prepare(channel: grpc.Channel, _: int) -> Call:
        stub = _stub(channel)
        token = stub.Start(_start(bag()), timeout=_TIMEOUT_S).session.access_token
        get, change = _raw(channel, "Get"), SetValueRequest(access_token=token, key="key-000001", value="w")
        message = GetRequest(access_token=token).SerializeToString()

        def uncached() -> None:
            stub.SetValue(change, timeout=_TIMEOUT_S)
            get(message, timeout=_TIMEOUT_S)

        return (lambda: get(message, timeout=_TIMEOUT_S)) if is_cached else uncached

    return prepare


def _deleting(channel: grpc.Channel, number: int) -> Call:
    stub = _stub(channel)

    def start_and_delete() -> None:
        subject = f"deleted-{number}"
        calls = [
            stub.Start.future(StartRequest(session=Session(subject_id=subject)), timeout=_TIMEOUT_S)
            for _ in range(3000)
        ]
        for call in calls:
            call.result()
        stub.Delete(DeleteRequest(subject_id=subject), timeout=_TIMEOUT_S)

    return start_and_delete


HEAVY: Final[dict[str, Heavy]] = {
    "nothing": Heavy(prepare=lambda *_: lambda: time.sleep(0.01), threads=1),
    "packed, random": Heavy(prepare=_packed(lambda: secrets.token_bytes(_MAX_BYTES)), threads=8),
    "packed, zeros": Heavy(prepare=_packed(lambda: bytes(_MAX_BYTES)), threads=8),
    "packed, a bag": Heavy(prepare=_packed(lambda: _start(_many(300)).SerializeToString()), threads=8),
    "List by 8": Heavy(prepare=_listing(), threads=8),
    "List by 32": Heavy(prepare=_listing(), threads=32),
    "List at an offset": Heavy(prepare=_listing(offset=5000), threads=8),
    "List by criteria": Heavy(prepare=_listing_by, threads=8),
    "SetValue in 10,000": Heavy(prepare=_changing(10, is_shared=False), threads=4),
    "SetValue in 10,000 by 16": Heavy(prepare=_changing(10, is_shared=False), threads=16),
    "SetValue in one of 10,000 by 16": Heavy(prepare=_changing(10, is_shared=True), threads=16),
    "SetValue in 3.9 MB": Heavy(prepare=_changing(370, is_shared=False), threads=4),
    "Start of 3.9 MB": Heavy(prepare=_starting(lambda: _start({"k": "v" * 3_900_000})), threads=8),
    "Start of 3.9 MB, not ASCII": Heavy(prepare=_starting(lambda: _start({"k": "é" * 1_950_000}))),
    "Start of 10,000 entries": Heavy(prepare=_starting(lambda: _start(_many(370))), threads=8),
    "Start of 300,000 entries": Heavy(
        prepare=_starting(lambda: _start({f"{number:x}": "" for number in range(300_000)}))
    ),
    "Get of one field 2,000,000 times": Heavy(prepare=_sending("Get", lambda: b"\x0a\0" * 2_000_000)),
    "Start of 2,000,000 unknown fields": Heavy(prepare=_sending("Start", lambda: b"\x78\1" * 2_000_000)),
    "Start of one entry of 1,000,000 keys": Heavy(
        prepare=_sending("Start", lambda: _nested(b"\x0a\0" * 1_000_000, b"\x22", b"\x0a"))
    ),
    "Start of groups": Heavy(prepare=_sending("Start", lambda: b"\x7b\x7c" * 2_000_000)),
    "Start that is no UTF-8": Heavy(prepare=_sending("Start", lambda: _nested(_NOT_UTF_8, b"\x12", b"\x0a"))),
    "List of 1,000,000 fields": Heavy(
        prepare=_sending("List", lambda: _nested(b"\x1a\0" * 1_000_000, b"\x5a"))
    ),
    "Get of 3.9 MB": Heavy(prepare=_getting(lambda: {"k": "v" * 3_900_000}), threads=8),
    "Get of 3.9 MB, not cached": Heavy(prepare=_getting(lambda: _many(370), is_cached=False), threads=4),
    "Delete of 3,000": Heavy(prepare=_deleting, threads=2),
    "Exists of long tokens": Heavy(
        prepare=_sending("Exists", lambda: ExistsRequest(access_token="t" * 4_000_000).SerializeToString())
    ),
    "Abandon of long tokens": Heavy(
        prepare=_sending("Abandon", lambda: AbandonRequest(access_token="t" * 4_000_000).SerializeToString())
    ),
}  # fmt: skip


_NOT_UTF_8: Final = b"v" * 3_900_000 + b"\xff"


def _nested(body: bytes, *tags: bytes) -> bytes:
    for tag in tags:
        size, length = len(body), bytearray()
        while size >= 128:
            length.append(size & 127 | 128)
            size >>= 7
        body = tag + bytes(length) + bytes((size,)) + body
    return body


class HeavyCaller:
    """The process that calls, as a test sees it."""

    def __init__(self, name: str, address: str, seconds: float) -> None:
        """Return when all its threads have made what they need, and call."""
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), name, address, str(seconds)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline().strip() != "begun":
            raise AssertionError(f"{name} does not begin")

    def ended(self) -> Counter[str]:
        """Wait until the time is over; return how many calls ended with which status."""
        assert self._process.stdout is not None
        return Counter(json.loads(self._process.stdout.readline()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.wait()


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _run(heavy: Heavy, address: str, seconds: float) -> Counter[str]:
    counts: Counter[str] = Counter()
    # The last to be ready is the one that begins.
    ready = threading.Barrier(heavy.threads, action=lambda: _say("begun"))

    def work(number: int) -> None:
        options = [*_LARGE, ("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(address, options=options) as channel:
            call = heavy.prepare(channel, number)
            ready.wait(60)
            end_s = time.monotonic() + seconds
            while time.monotonic() < end_s:
                try:
                    call()
                    counts["OK"] += 1
                except grpc.RpcError as exc:
                    counts[exc.code().name] += 1  # type: ignore[attr-defined]  # a Call as well

    threads = [threading.Thread(target=work, args=(number,)) for number in range(heavy.threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts


if __name__ == "__main__":
    _say(json.dumps(_run(HEAVY[sys.argv[1]], sys.argv[2], float(sys.argv[3]))))
