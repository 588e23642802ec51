"""Messages of gRPC in the bodies of HTTP/2. Pure.

https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md

HTTP/2 cuts a body into DATA frames wherever it likes. In the body, gRPC has frames of its own, one for each
message:

    +------------+----------------------+------------------------------------+
    | 1 byte     | 4 bytes, big-endian  | that many bytes                    |
    | compressed | length of the payload| the message, serialized or packed  |
    +------------+----------------------+------------------------------------+

The first byte is 0 or 1. If it is 1, the header `grpc-encoding` names the compression.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Final

HEADER_BYTES: Final = 5

_flag_and_length = Struct(">BI").unpack_from


def framed(message: bytes) -> bytes:
    """Put an uncompressed message into a frame."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def head(pieces: Sequence[bytes]) -> bytes:
    """Return what comes before an uncompressed message that is sent in pieces."""
    return b"\0" + sum(map(len, pieces)).to_bytes(4, "big")


def only_message(body: bytes | bytearray) -> bytes | None:
    """Return the message of a body that is one whole, uncompressed frame; None for any other."""
    size_bytes = len(body) - HEADER_BYTES
    if size_bytes < 0 or _flag_and_length(body) != (0, size_bytes):
        return None
    return bytes(body[HEADER_BYTES:])


def announced_bytes(body: bytes | bytearray) -> int:
    """Return how long the body is, or will be by what its first frame announces; in bytes.

    With this a reader stops before the payload: what is announced as too large need not be received.
    """
    return max(len(body), HEADER_BYTES + int.from_bytes(body[1:HEADER_BYTES], "big"))
