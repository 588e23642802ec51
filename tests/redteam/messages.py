"""Attacks with messages and bytes that cost the daemon more than their sender."""

from __future__ import annotations

import random
import time
from functools import partial
from typing import Final

from raw_http2 import DATA, PREFACE, frame
from redteam.lab import SERVICE, Lab, attack, require
from redteam.raw import RawConnection, half_call, headers, prefixed

_KIND: Final = "message"
_SECONDS: Final = 5.0
_SIZE: Final = 4_000_000  # below the largest request


def _field(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _varint(number: int) -> bytes:
    digits = b""
    while number > 127:
        digits, number = digits + bytes((number & 127 | 128,)), number >> 7
    return digits + bytes((number,))


def _distinct_entries() -> bytes:
    entries, at = bytearray(), 0
    while len(entries) < _SIZE - 20:
        entries += _field(4, _field(1, b"%d" % at))
        at += 1
    return bytes(entries)


# Requests of Start: field 1 is the session, and field 4 of it the bag.
_MESSAGES: Final = {
    "a bag of two million empty entries": lambda: _field(1, b"\x22\x00" * (_SIZE // 2)),
    "a bag of 300,000 entries": lambda: _field(1, _distinct_entries()),
    "two million sessions in one": lambda: b"\x0a\x00" * (_SIZE // 2),
    "two million unknown numbers": lambda: b"\x78\x01" * (_SIZE // 2),
    "unknown fields of each number": lambda: b"".join(_varint(it << 3) + b"\0" for it in range(20, 800_000)),
    "nested groups": lambda: b"\x7b" * (_SIZE // 2) + b"\x7c" * (_SIZE // 2),
    "nested messages": lambda: _nested(3000),
    "numbers of ten bytes": lambda: (b"\x78" + b"\xff" * 9 + b"\x01") * (_SIZE // 11),
    "text that is no UTF-8": lambda: _field(1, _field(2, b"\xff" * (_SIZE - 20))),
    "a value of 4 MB": lambda: _field(1, _field(2, b"s") + _field(4, _field(2, b"v" * (_SIZE - 30)))),
    "an access token of 4 MB": lambda: _field(1, _field(1, b"t" * (_SIZE - 30)) + _field(2, b"s")),
    "a subject of NULs": lambda: _field(1, _field(2, bytes(_SIZE - 30))),
}


def _nested(depth: int) -> bytes:
    inner = b""
    for _ in range(depth):
        inner = _field(1, inner)
    return inner


def _heavy(name: str, lab: Lab) -> None:
    daemon = lab.node()
    body = prefixed(_MESSAGES[name]())
    path = headers(f"/{SERVICE}/Start".encode())
    end_s = time.monotonic() + _SECONDS
    while time.monotonic() < end_s:
        with RawConnection(daemon.address) as client:
            _upload(client, half_call(path, 1), body)
            # Nothing of it is a session, but for the value of 4 MB, which the limits allow.
            client.answer(1, within_s=2.0)


def _upload(client: RawConnection, head: bytes, body: bytes) -> None:
    """Send a request as fast as its windows allow; the daemon opens them as it reads."""
    client.send(head)
    for at in range(0, len(body), 16_000):
        part = body[at : at + 16_000]
        if not client.send(frame(DATA, at + 16_000 >= len(body), 1, part), within_s=2.0):
            return
        _wait_for_window(client, at + len(part))


def _wait_for_window(client: RawConnection, sent: int) -> None:
    end_s = time.monotonic() + 2.0
    while not client.is_closed and time.monotonic() < end_s:
        granted = 65_535 + sum(
            int.from_bytes(one.payload, "big")
            for one in client.frames()
            if one.kind == 8 and one.stream_id == 0
        )
        if sent + 16_000 <= granted:
            return
        client.wait_closed(0.01)


for _name in _MESSAGES:
    attack(_KIND, _name)(partial(_heavy, _name))


@attack(_KIND, "random frames on 300 connections")
def _random_frames(lab: Lab) -> None:
    daemon = lab.node()
    rng = random.Random(12)
    for _ in range(300):
        frames = b"".join(
            frame(
                rng.choice((*range(10), 0x63)),
                rng.getrandbits(8),
                rng.choice((0, 1, 1, 3, 5, 2**31 - 1)),
                rng.randbytes(rng.choice((0, 4, 5, 8, 12, 40))),
            )
            for _ in range(30)
        )
        with RawConnection(daemon.address) as client:
            client.send(half_call(headers(f"/{SERVICE}/Exists".encode()), 1) + frames, within_s=1.0)
            client.wait_closed(0.005)


@attack(_KIND, "real requests with changed bytes")
def _changed_bytes(lab: Lab) -> None:
    daemon = lab.node()
    rng = random.Random(34)
    path = headers(f"/{SERVICE}/Exists".encode())
    whole = PREFACE + half_call(path, 1) + frame(DATA, 1, 1, prefixed(b"\x0a\x01t"))
    for _ in range(600):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 2, 8))):
            data[rng.randrange(len(data))] = rng.getrandbits(8)
        with RawConnection(daemon.address, bytes(data)) as client:
            client.wait_closed(0.002)


_TIMEOUTS: Final = (
    b"0n", b"1n", b"-1S", b"99999999H", b"999999999999999999H", b"1e9S", b"S", b"", b"1.5S", b"0x1S",
    "\u0661S".encode(), b"1 S", b"1SS", b"+1S", b"00000000000000000001S",
)  # fmt: skip


@attack(_KIND, "deadlines that are none")
def _timeouts(lab: Lab) -> None:
    daemon = lab.node()
    silent = []
    for value in _TIMEOUTS:
        pairs = headers(f"/{SERVICE}/Exists".encode(), b"POST", (b"grpc-timeout", value))
        with RawConnection(daemon.address) as client:
            client.send(half_call(pairs, 1) + frame(DATA, 1, 1, prefixed(b"\x0a\x01t")))
            if client.answer(1, within_s=3.0).status == "none":
                silent.append(value)
    require(not silent, f"no answer with grpc-timeout {silent}")
