"""Attacks on the log: a stranger's text must not become a line, move a cursor, or carry a token there."""

from __future__ import annotations

import re
import time
from functools import partial
from typing import Final

import grpc
from mnemosynerpc.session_pb2 import GetRequest
from processes import Daemon
from raw_http2 import PREFACE
from redteam import log_lines
from redteam.lab import SERVICE, Lab, attack, require
from redteam.raw import RawConnection, call, closed_all, headers

_KIND: Final = "log"
_INJECTED: Final = log_lines.INJECTED
# As UTF-8, and as single bytes that are none.
_TEXTS: Final = (
    f"\x1b[2J\x1b[31m{_INJECTED}",
    f"\r\n{_INJECTED}",
    f"\n{_INJECTED}",
    f"\r{_INJECTED}",
    f"\u202e{_INJECTED}\u202c",
    f"\u2066{_INJECTED}\u2069",
    f"\u200b\u200f\ufeff{_INJECTED}",
    f"\u2028{_INJECTED}",
    f"\u2029{_INJECTED}",
    f"\u0085{_INJECTED}",
    f"\u009b31m{_INJECTED}",
    f"\x7f\x08\x08\x08{_INJECTED}",
    f"\x0b\x0c{_INJECTED}",
    f'"}}\n{{"msg": "{_INJECTED}"}}',
    f"{_INJECTED}\U000e0041\U000e007f",
)
_RAW: Final = (b"\x1b[31m", b"\xc2\x9b31m", b"\xe2\x80\xae")
_NO_TEXT: Final = (b"\x9b31m", b"\xff\xfe", b"\xed\xa0\x80", b"\x80", b"\xc3")
_NAMES: Final = (
    b"x-request-id",
    b"request_id",
    b"request-id",
    b"traceparent",
    b"tracestate",
    b"authorization",
    b"x-api-key",
    b"user-agent",
    b"grpc-timeout",
    b"grpc-encoding",
    b"x-forwarded-for",
    b"mnemosyned-peer",
    b"content-type",
)
# Tokens of sessions, where they do not belong.
TOKEN: Final = "ab12" * 32


def _values() -> list[bytes]:
    return [text.encode() for text in _TEXTS] + [raw + _INJECTED.encode() for raw in _RAW]


def _send(daemon: Daemon, pairs: list[tuple[bytes, bytes]], message: bytes = b"") -> str:
    with RawConnection(daemon.address) as client:
        client.send(call(pairs, message))
        answer = client.answer(1, within_s=0.5)
    return answer.headers.get("grpc-message", "")


def _injection(environment: str, level: str, lab: Lab) -> None:
    daemon = _node(lab, environment, level)
    get = f"/{SERVICE}/Get".encode()
    requests = [
        call(pairs, b"")
        for value in _values()
        for pairs in (
            headers(b"/" + value),
            headers(f"/{SERVICE}/".encode() + value),
            headers(get, value),
            *(headers(get, b"POST", (name, value)) for name in _NAMES),
        )
    ]
    # Each on a connection of its own, since a daemon may end the connection for it.
    clients = [RawConnection(daemon.address, PREFACE + one) for one in requests]
    closed_all(clients, 1.0)
    for client in clients:
        client.close()
    with grpc.insecure_channel(daemon.address) as channel:
        # What the session itself says, with a request that fails.
        for text in _TEXTS:
            unary = channel.unary_unary(f"/{SERVICE}/Get")
            try:
                unary(GetRequest(access_token=text).SerializeToString(), timeout=2)
            except grpc.RpcError:
                continue
    for first in (b"\x1b[31mINJECTED\r\n" * 10, b"GET /\x1b[31m HTTP/1.1\r\n\r\n"):
        with RawConnection(daemon.address, first) as client:
            client.wait_closed(0.5)
    time.sleep(0.3)  # for the last lines
    log_lines.check(daemon)


@attack(_KIND, "bytes that are no text, in every place", quick_on=("grpcio",))
def _no_text(lab: Lab) -> None:
    daemon = lab.node()
    get = f"/{SERVICE}/Get".encode()
    for value in _NO_TEXT:
        for pairs in (
            headers(b"/" + value),
            headers(get + value),
            headers(get, value),
            headers(get, b"POST", (b":authority", value)),
            headers(get, b"POST", (value, b"x")),
            *(headers(get, b"POST", (name, value)) for name in _NAMES),
        ):
            try:
                client = RawConnection(daemon.address, PREFACE + call(pairs, b""))
            except OSError:
                require(False, f"the port is closed after {pairs[2:]}")
            else:
                client.wait_closed(0.02)
                client.close()
    log_lines.check(daemon)


def _node(lab: Lab, environment: str, level: str) -> Daemon:
    # The lab's daemon waits for lines of production's form; the other forms are waited for by their text.
    return lab.node(f"-log.environment={environment}", f"-log.level={level}")


for _environment in ("production", "development", "stackdriver"):
    for _level in ("info", "debug"):
        attack(
            _KIND,
            f"control and format characters, {_environment}, {_level}",
            quick_on=("h2",) if (_environment, _level) == ("development", "info") else (),
        )(partial(_injection, _environment, _level))


def _tokens(environment: str, lab: Lab) -> None:
    daemon = _node(lab, environment, "debug")
    echoed: dict[str, str] = {}
    for path in (
        f"/{SERVICE}/Get/{TOKEN}",
        f"/{SERVICE}/{TOKEN}",
        f"/{TOKEN}",
        f"/{TOKEN}/Get",
        f"/{SERVICE}/Get?access_token={TOKEN}",
        f"/v1/sessions/{TOKEN}",
        f"/{SERVICE}/%61{TOKEN[1:]}",
        f"/healthz?token={TOKEN}",
        f"{TOKEN}",
    ):
        for method in (b"POST", b"GET"):
            text = _send(daemon, headers(path.encode(), method))
            if TOKEN[:32] in text:
                echoed[path[:60]] = text
    for name in (b"authorization", b"x-api-key", b"mnemosyned-peer", b"user-agent", b"cookie"):
        text = _send(daemon, headers(b"/x.Y/Z", b"POST", (name, TOKEN.encode())))
        if TOKEN[:32] in text:
            echoed[name.decode()] = text
    time.sleep(0.3)  # for the last lines
    logged = [line for line in daemon.lines if re.search(TOKEN[:32], line)]
    require(not logged, f"{len(logged)} lines of the log have the token, as: {logged[:1]}")
    require(not echoed, f"the token is sent back for {sorted(echoed)}")


for _environment in ("production", "development"):
    attack(
        _KIND,
        f"tokens in wrong places, {_environment}",
        quick_on=("h2",) if _environment == "production" else (),
    )(partial(_tokens, _environment))
