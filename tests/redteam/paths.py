"""Attacks with paths and methods: what a proxy's rule lets through must be what the daemon runs."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from functools import partial
from typing import Final

import grpc
from mnemosynerpc.session_pb2 import DeleteRequest, ExistsRequest, Session, StartRequest
from processes import Daemon, mnemosyned
from raw_http2 import HEADERS, Pairs, block, frame
from redteam.lab import SERVICE, SUBJECT, Lab, Void, attack, require, start
from redteam.raw import Answer, RawConnection, call, headers, prefixed

_KIND: Final = "path"
_DELETE: Final = f"/{SERVICE}/Delete"
# Statuses by which a request is refused before any method runs.
_UNIMPLEMENTED: Final = "12"

_PATHS: Final = (
    f"/{SERVICE}/%44elete",
    f"/{SERVICE}/%64elete",
    f"/{SERVICE}%2FDelete",
    f"/{SERVICE}%2fDelete",
    f"%2F{SERVICE}/Delete",
    f"/{SERVICE}/Delete%00",
    f"/{SERVICE}/Delete%20",
    f"/{SERVICE}/Delete?x",
    f"/{SERVICE}/Delete?",
    f"/{SERVICE}/Delete#x",
    f"/{SERVICE}/Delete;x",
    f"/{SERVICE}/Delete/",
    f"/{SERVICE}/Delete/x",
    f"//{SERVICE}/Delete",
    f"/{SERVICE}//Delete",
    f"/./{SERVICE}/Delete",
    f"/x/../{SERVICE}/Delete",
    f"/{SERVICE}/Get/../Delete",
    f"/{SERVICE}/./Delete",
    f"\\{SERVICE}\\Delete",
    f"/{SERVICE}\\Delete",
    f"{SERVICE}/Delete",
    f"http://x/{SERVICE}/Delete",
    f"/{SERVICE.lower()}/Delete",
    f"/{SERVICE}/delete",
    f"/{SERVICE}/DELETE",
    f"/{SERVICE}.Delete",
    f"/.{SERVICE}/Delete",
    f" /{SERVICE}/Delete",
    f"/{SERVICE}/Delete ",
    f"/{SERVICE}/Delete\t",
    f"/{SERVICE}/Delete\0",
    f"/{SERVICE}/Delete\r\nx: y",
    f"/{SERVICE}/D\u0435lete",
    f"/{SERVICE}/Delet\uff45",
    f"/{SERVICE}/%EF%BC%A4elete",
    f"/{SERVICE}/%2544elete",
    f"/{SERVICE}/%c0%afDelete",
    f"/{SERVICE}/%u0044elete",
    "/SessionManager/Delete",
    "/mnemosynerpc/SessionManager/Delete",
    "*",
    "",
)
_METHODS: Final = (
    b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"TRACE", b"CONNECT", b"PRI", b"post",
    b"Post", b"POST ", b"POST\0", b"XPOST", b"QUERY", b"",
)  # fmt: skip


def _delete(subject: str) -> bytes:
    return DeleteRequest(subject_id=subject).SerializeToString()


def _asked(daemon: Daemon, pairs: Pairs, message: bytes) -> Answer:
    with RawConnection(daemon.address) as client:
        client.send(call(pairs, message))
        return client.answer(1, within_s=2.0)


class _Victims:
    """Sessions, one for each try, and which of them were ended."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._token_by_what: dict[str, str] = {}

    def subject(self, what: str) -> str:
        """Return the subject of a new session, for a try of this name."""
        subject = f"{SUBJECT}-{len(self._token_by_what)}"
        with self._daemon.stub() as stub:
            self._token_by_what[what] = start(stub, subject)
        return subject

    def ended(self) -> list[str]:
        with self._daemon.stub() as stub:
            return [
                what
                for what, token in self._token_by_what.items()
                if not stub.Exists(ExistsRequest(access_token=token), timeout=5).value
            ]


@attack(_KIND, "other spellings of a method's path", quick_on=("h2",))
def _spellings(lab: Lab) -> None:
    daemon = lab.node()
    _require_reach(daemon)
    victims, answered = _Victims(daemon), {}
    for path in _PATHS:
        status = _asked(daemon, headers(path.encode()), _delete(victims.subject(path))).status
        if status == "0":
            answered[path] = status
    require(not victims.ended(), f"these ran Delete: {victims.ended()}")
    require(not answered, f"these were answered: {answered}")
    _require_unimplemented(daemon)


def _require_reach(daemon: Daemon) -> None:
    """The path as it should be runs Delete, or else the others show nothing."""
    victims = _Victims(daemon)
    _asked(daemon, headers(_DELETE.encode()), _delete(victims.subject("reached")))
    if not victims.ended():
        raise Void("a Delete as it should be ends no session")


def _require_unimplemented(daemon: Daemon) -> None:
    """What is a path of gRPC and no method of ours is UNIMPLEMENTED, as gRPC says."""
    others = {}
    for path in (f"/{SERVICE}/%44elete", f"/{SERVICE}/Delete?x", f"/{SERVICE}/Delete/", "/x.Y/Z"):
        status = _asked(daemon, headers(path.encode()), b"").status
        if status != _UNIMPLEMENTED:
            others[path] = status
    require(not others, f"these are not UNIMPLEMENTED: {others}")


@attack(_KIND, "methods of HTTP other than POST")
def _methods(lab: Lab) -> None:
    daemon = lab.node()
    victims, answered = _Victims(daemon), []
    for method in _METHODS:
        what = method.decode()
        status = _asked(daemon, headers(_DELETE.encode(), method), _delete(victims.subject(what))).status
        answered += [what] if status == "0" else []
    require(not victims.ended(), f"with these methods, Delete was run: {victims.ended()}")
    require(not answered, f"these methods were answered with OK: {answered}")


_POST, _SCHEME, _PATH = (b":method", b"POST"), (b":scheme", b"http"), (b":path", _DELETE.encode())
_GRPC, _TE = (b"content-type", b"application/grpc"), (b"te", b"trailers")
_BAD_HEADERS: Final[dict[str, Pairs]] = {
    "two paths": [_POST, _SCHEME, (b":path", f"/{SERVICE}/Exists".encode()), _PATH, _GRPC, _TE],
    "two paths, ours first": [_POST, _SCHEME, _PATH, (b":path", f"/{SERVICE}/Exists".encode()), _GRPC, _TE],
    "two methods": [_POST, (b":method", b"GET"), _SCHEME, _PATH, _GRPC, _TE],
    "no method": [_SCHEME, _PATH, _GRPC, _TE],
    "no path": [_POST, _SCHEME, _GRPC, _TE],
    "no scheme": [_POST, _PATH, _GRPC, _TE],
    "a path that is no pseudo-header": [_POST, _SCHEME, (b"path", _DELETE.encode()), _GRPC, _TE],
    "a pseudo-header behind others": [_POST, _SCHEME, _GRPC, _TE, _PATH],
    "an unknown pseudo-header": [_POST, _SCHEME, _PATH, (b":x", b"y"), _GRPC, _TE],
    "a status": [_POST, _SCHEME, _PATH, (b":status", b"200"), _GRPC, _TE],
    "upper case": [_POST, _SCHEME, _PATH, _GRPC, _TE, (b"X-Upper", b"y")],
    "a connection header": [_POST, _SCHEME, _PATH, _GRPC, _TE, (b"connection", b"close")],
    "transfer-encoding": [_POST, _SCHEME, _PATH, _GRPC, _TE, (b"transfer-encoding", b"chunked")],
    "a line break in a value": [_POST, _SCHEME, _PATH, _GRPC, _TE, (b"x", b"a\r\nb: c")],
    "a NUL in a value": [_POST, _SCHEME, _PATH, _GRPC, _TE, (b"x", b"a\0b")],
    "a line break in a name": [_POST, _SCHEME, _PATH, _GRPC, _TE, (b"x\r\ny", b"z")],
    "an empty name": [_POST, _SCHEME, _PATH, _GRPC, _TE, (b"", b"z")],
    "another content type": [_POST, _SCHEME, _PATH, (b"content-type", b"text/plain"), _TE],
    "no content type": [_POST, _SCHEME, _PATH, _TE],
    "a content length that is not right": [_POST, _SCHEME, _PATH, _GRPC, _TE, (b"content-length", b"1")],
}
# grpcio's own library takes these, and a flag of it could not change that.
_GRPCIO_TAKES: Final = frozenset(
    {
        "no scheme",
        "a status",
        "an unknown pseudo-header",
        "a pseudo-header behind others",
        "a connection header",
        "transfer-encoding",
        "no content type",
        "another content type",
        "a content length that is not right",
    }
)


@attack(_KIND, "malformed headers")
def _malformed(lab: Lab) -> None:
    daemon = lab.node()
    victims = _Victims(daemon)
    for what, pairs in _BAD_HEADERS.items():
        _asked(daemon, pairs, _delete(victims.subject(what)))
    ended = set(victims.ended()) - (frozenset() if lab.is_ours else _GRPCIO_TAKES)
    require(not ended, f"Delete was run in spite of: {sorted(ended)}")


def _large_frame(kind: int, size: int, lab: Lab) -> None:
    daemon = lab.node()
    victims = _Victims(daemon)
    message = prefixed(_delete(victims.subject("large")))
    with RawConnection(daemon.address) as client:
        filler = block([(b"x", b"y" * (size - 200))])
        if kind == HEADERS:
            client.send(frame(HEADERS, 4, 1, block(headers(_DELETE.encode())) + filler))
            client.send(frame(0, 1, 1, message))
        else:
            client.send(frame(HEADERS, 4, 1, block(headers(_DELETE.encode()))))
            client.send(frame(0, 1, 1, message + bytes(size - len(message))))
        require(client.ends_with_error(), f"a frame of {size} bytes is no error")
    require(not victims.ended(), "Delete was run by a frame over SETTINGS_MAX_FRAME_SIZE")


for _size in (16_385 + 200, 20_000, 60_000):
    attack(
        _KIND,
        f"HEADERS of {_size} bytes, over SETTINGS_MAX_FRAME_SIZE",
        quick_on=("grpcio",) if _size == 20_000 else (),
    )(partial(_large_frame, HEADERS, _size))
attack(_KIND, "DATA over SETTINGS_MAX_FRAME_SIZE")(partial(_large_frame, 0, 40_000))


_HTTP1: Final = (
    b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/grpc\r\nContent-Length: %d\r\n\r\n",
    b"POST %s HTTP/1.0\r\nContent-Type: application/grpc\r\nContent-Length: %d\r\n\r\n",
    (
        b"POST %s HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\n"
        b"HTTP2-Settings: AAMAAABkAAQAAP__\r\nContent-Type: application/grpc\r\nContent-Length: %d\r\n\r\n"
    ),
)


@attack(_KIND, "HTTP/1, and an upgrade from it")
def _http1(lab: Lab) -> None:
    daemon = lab.node()
    victims = _Victims(daemon)
    for number, head in enumerate(_HTTP1):
        body = prefixed(_delete(victims.subject(str(number))))
        host, _, port = daemon.address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=2) as client:
            client.sendall(head % (_DELETE.encode(), len(body)) + body)
    require(not victims.ended(), "Delete was run by a request of HTTP/1")


_KEYED: Final = ("readonly", "session")


@attack(_KIND, "other spellings of a path, with the key of a lesser role")
def _roles(lab: Lab) -> None:
    keys, lines = {}, []
    for role in _KEYED:
        keys[role], line = _new_key(role)
        lines.append(line)
    file = lab.scratch / "keys"
    file.write_text("".join(lines))
    file.chmod(0o600)
    daemon = lab.node(f"-auth.keys={file}", watches=False)
    with grpc.insecure_channel(daemon.address) as channel:
        start_call = channel.unary_unary(f"/{SERVICE}/Start")

        request = StartRequest(session=Session(subject_id=SUBJECT, access_token="t" * 64))
        start_call(request.SerializeToString(), metadata=(("x-api-key", keys["session"]),), timeout=5)
        for role in _KEYED:
            for path in (*_PATHS, _DELETE):
                key = (b"x-api-key", keys[role].encode())
                status = _asked(daemon, headers(path.encode(), b"POST", key), _delete(SUBJECT)).status
                require(status != "0", f"{role} may call {path}")
        exists = channel.unary_unary(f"/{SERVICE}/Exists")
        body = ExistsRequest(access_token="t" * 64).SerializeToString()
        found = exists(body, metadata=(("x-api-key", keys["readonly"]),), timeout=5)
    require(found, "a lesser role has ended the session")


def _new_key(role: str) -> tuple[str, str]:

    _, out, err = mnemosyned("key", role)
    found: Sequence[str] = (out + "\n" + err).split()
    (key,) = (word for word in found if word.startswith("mnk_"))
    (digest,) = (word for word in found if word.startswith("sha256:"))
    return key, f"{role} {digest}\n"
