"""HTTP/2 written by hand: frames as bytes, and what a peer sent as frames."""

from __future__ import annotations

from typing import Final, NamedTuple

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    range(10)
)
END_STREAM, ACK, END_HEADERS, PADDED, HAS_PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20

NO_ERROR, PROTOCOL_ERROR, _, FLOW_CONTROL_ERROR, _, STREAM_CLOSED, FRAME_SIZE_ERROR = range(7)
REFUSED_STREAM, CANCEL, COMPRESSION_ERROR, _, ENHANCE_YOUR_CALM = range(7, 12)

MAGIC: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME_HEADER_BYTES: Final = 9
Pairs = list[tuple[bytes, bytes]]


class Sent(NamedTuple):
    """A frame that a peer sent."""

    kind: int
    flags: int
    stream_id: int
    payload: bytes


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + payload


def setting(key: int, value: int) -> bytes:
    return key.to_bytes(2, "big") + value.to_bytes(4, "big")


def settings(*pairs: tuple[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(setting(key, value) for key, value in pairs))


def window_update(stream_id: int, increment: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream_id, increment.to_bytes(4, "big"))


def rst_stream(stream_id: int, code: int = CANCEL) -> bytes:
    return frame(RST_STREAM, 0, stream_id, code.to_bytes(4, "big"))


def ping(payload: bytes = b"12345678", *, flags: int = 0) -> bytes:
    return frame(PING, flags, 0, payload)


def goaway(last_stream_id: int, code: int = NO_ERROR) -> bytes:
    return frame(GOAWAY, 0, 0, last_stream_id.to_bytes(4, "big") + code.to_bytes(4, "big"))


PREFACE: Final = MAGIC + settings()


def literal(name: bytes, value: bytes) -> bytes:
    """One header, neither compressed nor put into the table."""
    return b"\0" + _length(name) + name + _length(value) + value


def _length(text: bytes) -> bytes:
    if len(text) < 127:
        return bytes((len(text),))
    rest, encoded = len(text) - 127, b"\x7f"
    while rest > 127:
        encoded, rest = encoded + bytes((rest & 127 | 128,)), rest >> 7
    return encoded + bytes((rest,))


def block(pairs: Pairs) -> bytes:
    return b"".join(literal(name, value) for name, value in pairs)


def request_headers(path: bytes = b"/toy.Toy/Echo", *extra: tuple[bytes, bytes]) -> Pairs:
    return [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path),
        (b":authority", b"localhost"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
        *extra,
    ]


REQUEST_BLOCK: Final = block(request_headers())


def open_request(stream_id: int, headers: bytes = REQUEST_BLOCK) -> bytes:
    """A request of which the body is still to come."""
    return frame(HEADERS, END_HEADERS, stream_id, headers)


def request(stream_id: int, body: bytes = b"", headers: bytes = REQUEST_BLOCK) -> bytes:
    if not body:
        return frame(HEADERS, END_HEADERS | END_STREAM, stream_id, headers)
    return open_request(stream_id, headers) + frame(DATA, END_STREAM, stream_id, body)


def frames_of(output: bytes) -> list[Sent]:
    """Cut what a peer sent into frames; a rest without its end is left out."""
    frames: list[Sent] = []
    at = 0
    while at + FRAME_HEADER_BYTES <= len(output):
        after = at + FRAME_HEADER_BYTES + int.from_bytes(output[at : at + 3], "big")
        if after > len(output):
            break
        stream_id = int.from_bytes(output[at + 5 : at + 9], "big")
        frames.append(Sent(output[at + 3], output[at + 4], stream_id, output[at + 9 : after]))
        at = after
    return frames


def resets_of(output: bytes) -> list[tuple[int, int]]:
    """The streams that were reset, each with its code."""
    return [
        (sent.stream_id, int.from_bytes(sent.payload, "big"))
        for sent in frames_of(output)
        if sent.kind == RST_STREAM
    ]


def goaways_of(output: bytes) -> list[tuple[int, int]]:
    """The last stream and the code of each GOAWAY."""
    return [
        (int.from_bytes(sent.payload[:4], "big"), int.from_bytes(sent.payload[4:8], "big"))
        for sent in frames_of(output)
        if sent.kind == GOAWAY
    ]
