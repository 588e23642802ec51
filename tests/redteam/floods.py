"""Attacks with frames: floods of each kind, requests of which the sender wants nothing, and bombs."""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from mnemosynerpc.session_pb2 import ExistsRequest, GetRequest
from raw_http2 import (
    CONTINUATION,
    DATA,
    GOAWAY,
    HEADERS,
    MAGIC,
    PREFACE,
    PRIORITY,
    PUSH_PROMISE,
    SETTINGS,
    block,
    frame,
    ping,
    rst_stream,
    setting,
    settings,
    window_update,
)
from redteam.lab import SERVICE, Lab, attack, require
from redteam.raw import RawConnection, call, half_call, headers, prefixed

_KIND: Final = "flood"
_FLOOD_S: Final = 4.0
_GET: Final = headers(f"/{SERVICE}/Get".encode())
_EXISTS: Final = headers(f"/{SERVICE}/Exists".encode())
_UNKNOWN: Final = headers(b"/no.Such/Method" + b"x" * 500)
_OPEN: Final = half_call(_EXISTS, 1)
_PING_ACK: Final = 0x1

# What is sent again and again, after what it needs.
_FRAMES: Final[dict[str, tuple[bytes, bytes]]] = {
    "PING": (b"", ping()),
    "PING that answers none": (b"", ping(flags=_PING_ACK)),
    "SETTINGS": (b"", settings()),
    "SETTINGS with many pairs": (b"", frame(SETTINGS, 0, 0, setting(0x99, 1) * 2000)),
    "SETTINGS of the table's size": (b"", settings((1, 0)) + settings((1, 65_536))),
    "SETTINGS of the window": (_OPEN, settings((4, 1)) + settings((4, 65_535))),
    "SETTINGS that answer none": (b"", frame(SETTINGS, 1, 0)),
    "PRIORITY": (b"", frame(PRIORITY, 0, 5, b"\0\0\0\3\x10")),
    "PRIORITY of many streams": (
        b"",
        b"".join(frame(PRIORITY, 0, it, b"\0\0\0\1\x10") for it in range(3, 2003, 2)),
    ),
    "WINDOW_UPDATE": (b"", window_update(0, 1)),
    "WINDOW_UPDATE of a stream": (_OPEN, window_update(1, 1)),
    "empty DATA": (_OPEN, frame(DATA, 0, 1)),
    "DATA that is padding": (_OPEN, frame(DATA, 0x8, 1, b"\xff" + bytes(255))),
    "DATA of one byte": (_OPEN, frame(DATA, 0, 1, b"\0")),
    "RST_STREAM of a closed stream": (_OPEN + rst_stream(1), rst_stream(1)),
    "GOAWAY": (b"", frame(GOAWAY, 0, 0, bytes(8))),
    "unknown frames": (b"", frame(0x63, 0, 0, bytes(10))),
    "empty CONTINUATION": (frame(HEADERS, 0, 1, block(_EXISTS)), frame(CONTINUATION, 0, 1)),
    "CONTINUATION": (
        frame(HEADERS, 0, 1, block(_EXISTS)),
        frame(CONTINUATION, 0, 1, block([(b"x", b"y" * 1000)])),
    ),
    "CONTINUATION of one byte": (
        frame(HEADERS, 0, 1, block(_EXISTS) + b"\0\x7f\xff\xff\x7f"),
        frame(CONTINUATION, 0, 1, b"y"),
    ),
}


def _flood(first: bytes, again: bytes, lab: Lab) -> None:
    daemon = lab.node()
    batch = again * max(1, 60_000 // len(again))
    with RawConnection(daemon.address, PREFACE + first) as client:
        is_closed = client.flood(batch, _FLOOD_S)
    # What the reference engine does to such a connection is gRPC's own affair: it must harm no other.
    require(is_closed or not lab.is_ours, f"the connection is still open after {_FLOOD_S} s")


for _name, (_first, _again) in _FRAMES.items():
    attack(_KIND, _name, quick_on=("h2",) if _name == "PING" else ())(partial(_flood, _first, _again))


@attack(_KIND, "PING on eight connections, opened again when closed")
def _reconnecting(lab: Lab) -> None:
    daemon = lab.node()
    end_s = time.monotonic() + _FLOOD_S
    while time.monotonic() < end_s:
        clients = [RawConnection(daemon.address) for _ in range(8)]
        for client in clients:
            client.send(ping() * 3000, within_s=1.0)
        for client in clients:
            client.close()


def _ids(client: RawConnection, make: Callable[[int], bytes]) -> bool:
    """Send what `make` says of each new stream, until the connection or the time ends."""
    end_s, stream_id = time.monotonic() + _FLOOD_S, 1
    while time.monotonic() < end_s and not client.is_closed:
        client.send(b"".join(make(it) for it in range(stream_id, stream_id + 400, 2)))
        client.received = client.received[-1000:]
        stream_id += 400
    return client.is_closed


@attack(_KIND, "rapid reset")
def _rapid_reset(lab: Lab) -> None:
    daemon = lab.node()
    message = GetRequest(access_token="unknown").SerializeToString()
    end_s = time.monotonic() + _FLOOD_S
    while time.monotonic() < end_s:
        with RawConnection(daemon.address) as client:
            is_closed = _ids(client, lambda it: call(_GET, message, it) + rst_stream(it))
    require(is_closed or not lab.is_ours, "a connection that resets all its calls stays open")


@attack(_KIND, "rapid reset by the daemon: a window of 0 for each stream")
def _made_you_reset(lab: Lab) -> None:
    daemon = lab.node()
    message = GetRequest(access_token="unknown").SerializeToString()
    end_s = time.monotonic() + _FLOOD_S
    while time.monotonic() < end_s:
        with RawConnection(daemon.address) as client:
            _ids(client, lambda it: call(_GET, message, it) + window_update(it, 0))
            client.wait_closed(0.2)


@attack(_KIND, "headers without a request, on new streams")
def _empty_requests(lab: Lab) -> None:
    daemon = lab.node()
    with RawConnection(daemon.address) as client:
        _ids(client, lambda it: frame(HEADERS, 5, it, block(_EXISTS)))


@attack(_KIND, "calls of unknown methods")
def _unknown_methods(lab: Lab) -> None:
    daemon = lab.node()
    end_s = time.monotonic() + _FLOOD_S
    while time.monotonic() < end_s:
        with RawConnection(daemon.address) as client:
            _ids(client, lambda it: call(_UNKNOWN, b"", it))


_INDEXED: Final = b"\xbe"  # the newest entry of the table


def _hpack_bomb(lab: Lab) -> None:
    daemon = lab.node()
    # 4,000 bytes enter the table with incremental indexing, and are then named by one byte each time.
    entry = b"\x40\x01x" + b"\x7f" + _digits(4000 - 127) + b"y" * 4000
    begin = block(_EXISTS) + entry
    bomb = _INDEXED * 16_000
    for round_number in range(20):
        with RawConnection(daemon.address) as client:
            client.send(
                frame(HEADERS, 0, 1, begin) + frame(CONTINUATION, 4, 1, bomb[: 16_000 - round_number])
            )
            client.send(frame(DATA, 1, 1, prefixed(ExistsRequest(access_token="t").SerializeToString())))
            answer = client.answer(1, within_s=3.0)
            require(answer.status != "0", "64 MB of headers were taken")


def _digits(number: int) -> bytes:
    digits = b""
    while number > 127:
        digits, number = digits + bytes((number & 127 | 128,)), number >> 7
    return digits + bytes((number,))


attack("bomb", "HPACK: one byte for 4,000", quick_on=("h2",))(_hpack_bomb)

_BAD_BLOCKS: Final = {
    "an endless integer": b"\x7f" + b"\xff" * 4000,
    "a table of 4 GB": b"\x3f\xe1\xff\xff\xff\x0f",
    "many sizes of the table": b"\x20\x3f\xe1\x1f" * 3000,
    "an index that is not there": b"\xff\xff\xff\xff\x07",
    "index 0": b"\x80",
    "a string longer than the block": b"\0\x7f\xff\xff\xff\x0f",
    "an endless Huffman code": b"\0\x81\xff\x81\xff",
}


@attack("bomb", "HPACK: blocks that are none")
def _bad_blocks(lab: Lab) -> None:
    daemon = lab.node()
    for what, bad in _BAD_BLOCKS.items():
        with RawConnection(daemon.address) as client:
            client.send(frame(HEADERS, 5, 1, bad + block(_EXISTS)))
            require(client.ends_with_error(1.0) or client.answer(1).status != "0", f"{what} was taken")


@attack("bomb", "gzip: 1 GB in one message", quick_on=("grpcio",))
def _gzip_bomb(lab: Lab) -> None:
    daemon = lab.node()
    # A gzip of gzips, as many members as a message may have.
    member = gzip.compress(bytes(16 * 1024**2), 9)
    bomb = member * 64
    for encoding in (b"gzip", b"deflate", b"identity", b"snappy"):
        pairs = headers(f"/{SERVICE}/Exists".encode(), b"POST", (b"grpc-encoding", encoding))
        body = prefixed(bomb, is_compressed=True)
        with RawConnection(daemon.address) as client:
            client.send(half_call(pairs, 1))
            for at in range(0, len(body), 16_000):
                client.send(frame(DATA, at + 16_000 >= len(body), 1, body[at : at + 16_000]), within_s=1.0)
            require(client.answer(1, within_s=5.0).status != "0", "a bomb was taken")


@attack("bomb", "messages that announce 4 GB")
def _announced(lab: Lab) -> None:
    daemon = lab.node()
    clients = [RawConnection(daemon.address) for _ in range(50)]
    for client in clients:
        for it in range(1, 41, 2):
            client.send(half_call(_EXISTS, it) + frame(DATA, 0, it, b"\0\xff\xff\xff\xff"))
    time.sleep(2.0)  # the attack is to hold them
    for client in clients:
        client.close()


_BEGIN: Final = block(_EXISTS)
_CONFORMANCE: Final[dict[str, bytes]] = {
    "DATA on a stream that is not open": frame(DATA, 1, 1, b"x"),
    "DATA on stream 0": frame(DATA, 0, 0, b"x"),
    "HEADERS on stream 0": frame(HEADERS, 5, 0, _BEGIN),
    "HEADERS on an even stream": frame(HEADERS, 5, 2, _BEGIN),
    "a stream that is older than the last": frame(HEADERS, 5, 5, _BEGIN) + frame(HEADERS, 5, 3, _BEGIN),
    "CONTINUATION without HEADERS": frame(CONTINUATION, 4, 1, _BEGIN),
    "another frame in a block": frame(HEADERS, 0, 1, _BEGIN) + ping(),
    "CONTINUATION of another stream": frame(HEADERS, 0, 1, _BEGIN) + frame(CONTINUATION, 4, 3, b""),
    "PUSH_PROMISE": frame(PUSH_PROMISE, 4, 1, b"\0\0\0\2" + _BEGIN),
    "SETTINGS of 5 bytes": frame(SETTINGS, 0, 0, bytes(5)),
    "SETTINGS on a stream": frame(SETTINGS, 0, 1),
    "SETTINGS ACK with pairs": frame(SETTINGS, 1, 0, setting(4, 1)),
    "SETTINGS with a window of 4 GB": settings((4, 2**32 - 1)),
    "SETTINGS with frames of 16 bytes": settings((5, 16)),
    "PING of 7 bytes": frame(6, 0, 0, bytes(7)),
    "PING on a stream": frame(6, 0, 1, bytes(8)),
    "WINDOW_UPDATE of 0": window_update(0, 0),
    "WINDOW_UPDATE beyond 2 GB": window_update(0, 2**31 - 1) * 2,
    "WINDOW_UPDATE of 3 bytes": frame(8, 0, 0, bytes(3)),
    "RST_STREAM of a stream that never was": rst_stream(9),
    "RST_STREAM of 3 bytes": _OPEN + frame(3, 0, 1, bytes(3)),
    "padding longer than the frame": frame(HEADERS, 0xD, 1, b"\xff" + _BEGIN[:20]),
}
# What the reference engine's own library takes.
_GRPCIO_TAKES: Final = frozenset(
    {
        "DATA on a stream that is not open",
        "DATA on stream 0",
        "RST_STREAM of a stream that never was",
        "PING on a stream",
        "SETTINGS ACK with pairs",
        "PUSH_PROMISE",
        "HEADERS on an even stream",
        "a stream that is older than the last",
        "HEADERS on stream 0",
        "WINDOW_UPDATE beyond 2 GB",
    }
)


@attack("conformance", "frames that HTTP/2 forbids", quick_on=("h2",))
def _conformance(lab: Lab) -> None:
    daemon = lab.node()
    taken = []
    for what, frames in _CONFORMANCE.items():
        with RawConnection(daemon.address) as client:
            client.send(frames)
            if not client.ends_with_error(2.0):
                taken.append(what)
    if not lab.is_ours:
        taken = [what for what in taken if what not in _GRPCIO_TAKES]
    require(not taken, f"no error, but the connection goes on: {taken}")


@attack("conformance", "a preface that is none")
def _prefaces(lab: Lab) -> None:
    daemon = lab.node()
    for first in (b"\0" * 24, MAGIC[:-1] + b"\0", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00" * 20):
        with RawConnection(daemon.address, first + bytes(100)) as client:
            require(client.wait_closed(5.0), f"still open after {first[:10]!r}")
