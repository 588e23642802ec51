"""Attacks that hold what costs the daemon something: connections, halves of requests, streams, answers."""

from __future__ import annotations

import resource
import time
from contextlib import suppress
from functools import partial
from typing import Final

from mnemosynerpc.session_pb2 import GetRequest, Session, StartRequest
from raw_http2 import DATA, HEADERS, MAGIC, PREFACE, block, frame, open_request, settings
from redteam.lab import SERVICE, Lab, attack, known_flags, require
from redteam.raw import RawConnection, call, closed_all, dial_many, half_call, headers, prefixed, ready

_KIND: Final = "hoard"
_HOLD_S: Final = 4.0
_EXISTS: Final = headers(f"/{SERVICE}/Exists".encode())
_START: Final = headers(f"/{SERVICE}/Start".encode())
_GET: Final = headers(f"/{SERVICE}/Get".encode())
_WATCH: Final = headers(b"/grpc.health.v1.Health/Watch")
_REFLECTION: Final = headers(b"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
_SILENT_S: Final = 15.0
_OTHER: Final = "127.0.0.2"  # an address of this host that the good client does not have


def _prepare() -> None:
    """Allow this process the files that thousands of connections need."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _streams(make: bytes | None, connections: int, streams: int, lab: Lab, *, name: str) -> None:
    """Open many streams on many connections, and hold them."""
    _prepare()
    daemon = lab.node()
    clients = dial_many(daemon.address, connections, PREFACE, source=_OTHER)
    pairs = {"watch": _WATCH, "reflection": _REFLECTION, "half": _EXISTS, "body": _START}[name]
    for client in clients:
        for it in range(1, 2 * streams, 2):
            if name == "watch":
                client.send(call(pairs, b"", it))
            elif make is None:
                client.send(half_call(pairs, it))
            else:
                client.send(half_call(pairs, it) + frame(DATA, 0, it, make), within_s=0.2)
    _hold(clients)


def _hold(clients: list[RawConnection]) -> None:
    closed_all(clients, _HOLD_S)
    for client in clients:
        client.close()


_BODY: Final = prefixed(b"")[:1] + (4_000_000).to_bytes(4, "big") + bytes(16_000)
_LIST: Final = prefixed(b"\x3a\x00")
for _what, _name, _make, _connections, _count in (
    ("4,000 Health.Watch streams", "watch", None, 40, 100),
    ("8,000 Health.Watch streams on 800 connections", "watch", None, 800, 10),
    ("4,000 reflection streams", "reflection", _LIST, 40, 100),
    ("reflection streams that say nothing", "reflection", None, 40, 100),
    ("half requests, 100 on each of 200 connections", "half", None, 200, 100),
    ("half bodies, 100 on each of 200 connections", "body", _BODY, 200, 100),
):
    attack(_KIND, _what, quick_on=("h2",) if _what.startswith("4,000 H") else ())(
        partial(_streams, _make, _connections, _count, name=_name)
    )


@attack(_KIND, "bodies of 4 MB that never end, 16 on each of 100 connections")
def _long_bodies(lab: Lab) -> None:
    _prepare()
    daemon = lab.node()
    clients = dial_many(daemon.address, 100, PREFACE, source=_OTHER)
    first = b"\0" + (4_000_000).to_bytes(4, "big")
    for client in clients:
        for it in range(1, 33, 2):
            client.send(half_call(_START, it) + frame(DATA, 0, it, first))
    part, end_s = bytes(8_000), time.monotonic() + 8.0
    while time.monotonic() < end_s:
        for client in clients:
            # Whatever windows the daemon grants are used.
            for it in range(1, 33, 2):
                client.send(frame(DATA, 0, it, part), within_s=0.001)
            client.received = client.received[-1000:]
    _hold(clients)


def _halves(first: bytes, lab: Lab) -> None:
    _prepare()
    daemon = lab.node()
    _hold(dial_many(daemon.address, 1000, first, source=_OTHER))


for _what, _half in {
    "nothing": b"",
    "half a preface": MAGIC[:10],
    "no SETTINGS": MAGIC,
    "half a frame": PREFACE + open_request(1)[:20],
    "half a block of headers": PREFACE + frame(HEADERS, 0, 1, block(_EXISTS)),
    "a preface, and no request": PREFACE,
    "half a handshake of TLS": b"\x16\x03\x01\x02\x00\x01\x00",
}.items():
    attack(_KIND, f"1,000 connections that say {_what}")(partial(_halves, _half))


@attack(_KIND, "silent connections are closed in seconds")
def _silent(lab: Lab) -> None:
    flags = ("-grpc.handshake-timeout=3s",) if "-grpc.handshake-timeout" in known_flags() else ()
    daemon = lab.node(*flags)
    clients = [RawConnection(daemon.address, first) for first in (b"", MAGIC[:10], b"P") for _ in range(10)]
    left = closed_all(clients, _SILENT_S)
    require(not left, f"{left} of {len(clients)} silent connections are open after {_SILENT_S} s")


@attack(_KIND, "3,000 connections from one address")
def _many(lab: Lab) -> None:
    _prepare()
    daemon = lab.node()
    _hold(dial_many(daemon.address, 3000, PREFACE, source=_OTHER))


@attack(_KIND, "connections that are opened and closed again")
def _churn(lab: Lab) -> None:
    daemon = lab.node()
    end_s = time.monotonic() + 5.0
    while time.monotonic() < end_s:
        for client in dial_many(daemon.address, 100, PREFACE + call(_EXISTS, b""), source=_OTHER):
            client.close()


@attack(_KIND, "more connections from one address than it may have", engines=("h2",))
def _over_the_bound(lab: Lab) -> None:
    _prepare()
    daemon = lab.node("-grpc.max-connections-per-address=50")
    clients = dial_many(daemon.address, 500, PREFACE, source=_OTHER)
    left = closed_all(clients, 2.0)
    for client in clients:
        client.close()
    require(left <= 50, f"{left} connections of one address are open, and 50 are allowed")


@attack(_KIND, "more connections than the daemon may have, from one address")
def _over_all(lab: Lab) -> None:
    _prepare()
    flags = ("-grpc.max-connections-per-address=100",) if lab.is_ours else ()
    daemon = lab.node("-grpc.max-connections=200", *flags)
    clients = dial_many(daemon.address, 1000, PREFACE, source=_OTHER)
    if lab.is_ours:
        with RawConnection(daemon.address) as other:
            other.send(call(_EXISTS, b"\x0a\x01t"))
            status = other.answer(1).status
            require(status == "0", f"another address gets no connection: {status}")
    _hold(clients)


def _unread(first: bytes, lab: Lab) -> None:
    _prepare()
    daemon = lab.node()
    token = "large" * 10
    with daemon.stub() as stub:
        session = Session(access_token=token, subject_id="large", bag={"k": "x" * 1_000_000})
        stub.Start(StartRequest(session=session), timeout=10)
    request = GetRequest(access_token=token).SerializeToString()
    clients = dial_many(daemon.address, 64, first, source=_OTHER)
    end_s = time.monotonic() + 6.0
    for it in range(1, 201, 2):
        for client in clients:
            _send_unread(client, call(_GET, request, it))
        if time.monotonic() > end_s:
            break
    time.sleep(max(0.0, end_s - time.monotonic()))  # the attack is to hold them
    for client in clients:
        client.close()


def _send_unread(client: RawConnection, data: bytes) -> None:
    if ready([client.socket], 0, writes=True)[1]:
        with suppress(OSError):
            client.socket.send(data)


attack(_KIND, "answers of 1 MB that are not read, with a window of 0")(
    partial(_unread, MAGIC + settings((4, 0)))
)
attack(_KIND, "answers of 1 MB that are not read, with the usual window")(partial(_unread, PREFACE))
attack(_KIND, "answers of 1 MB that are not read, with the largest window")(
    partial(_unread, MAGIC + settings((4, 2**31 - 1)) + frame(8, 0, 0, (2**31 - 65_536).to_bytes(4, "big")))
)
