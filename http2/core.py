"""The library zttp, which parses and writes HTTP/2; the one module that imports it.

zttp (https://github.com/Kludex/zttp) does for us: frames, HPACK, the states of streams, flow control, the
answers to SETTINGS and PING, and the refusal of malformed requests. It is young, so its version is pinned
exactly, and this module and its users work around what is missing in it. For each gap a test in
tests/http2/test_gaps.py fails as soon as the gap is closed, and names what may then be deleted:

    gap in zttp 0.0.35                               | what we do about it
    -------------------------------------------------+----------------------------------------------------
    a server's connection ends after 4,096 streams   | GOAWAY long before, at RETIRE_AFTER_STREAMS; no streams
                                                     | of a client that goes on, from CLOSE_AFTER_STREAMS on
    a connection ends after 256 RST_STREAM, of the   | RST_STREAM is kept from it: `cancel`
    peer or of its own for malformed requests        |
    its SETTINGS cannot be set                       | we write the frame: `server_core`
    129 streams at once are refused                  | MAX_STREAMS bounds `-grpc.max-streams`; further ones
                                                     | wait (admission.py)
    no bound on PING, SETTINGS, PRIORITY and others  | they are counted (frames.py, purse.py)
    bodies without a window are kept without a bound | bodies wait in our Outbox (outbox.py)
    PRIORITY on stream 0 and streams that depend on  | refused (frames.py)
    themselves are accepted                          |
    trailers of a stream that was reset end the      | nothing: clients of gRPC send no trailers
    connection                                       |
    an acknowledgement is taken for the SETTINGS     | nothing: the connection ends at `preface_s`
    that a client must send first                    |
    a client's connection ends after 256 RST_STREAM  | it dials again (cluster/channel.py)
    of its server                                    |
    a client's `:scheme` is always https             | nothing: servers of gRPC do not look at it
    DATA of requests that wait uses up the window of | nothing: 64 KiB of them before our SETTINGS may hold
    the connection, and cannot be granted back       | up incomplete requests until `body_s`
"""

from __future__ import annotations

from typing import Final

import zttp
from zttp import (
    NEED_DATA,
    Data,
    EndOfMessage,
    GoAway,
    Ping,
    Request,
    Response,
    RstStream,
    Settings,
    WindowUpdate,
)
from zttp import ProtocolError as ProtocolViolated
from zttp import Stream as Sender

__all__ = [
    "CANCEL",
    "CLOSE_AFTER_STREAMS",
    "ENHANCE_YOUR_CALM",
    "FRAME_SIZE_ERROR",
    "MAX_STREAMS",
    "NEED_DATA",
    "NO_ERROR",
    "PROTOCOL_ERROR",
    "REFUSED_STREAM",
    "RETIRE_AFTER_STREAMS",
    "Core",
    "Data",
    "EndOfMessage",
    "GoAway",
    "Ping",
    "ProtocolViolated",
    "Request",
    "Response",
    "RstStream",
    "Sender",
    "Settings",
    "WindowUpdate",
    "cancel",
    "client_core",
    "server_core",
]

Core = zttp.H2Connection

# RFC 9113, section 7.
NO_ERROR: Final = 0
PROTOCOL_ERROR: Final = 1
FRAME_SIZE_ERROR: Final = 6
REFUSED_STREAM: Final = 7
CANCEL: Final = 8
ENHANCE_YOUR_CALM: Final = 11

MAX_STREAMS: Final = 128  # at once; more are refused by zttp with REFUSED_STREAM
# Clients need a moment until they see the GOAWAY. In it, one of them may open up to MAX_STREAMS a round trip.
RETIRE_AFTER_STREAMS: Final = 3400
# Some have opened all of them before they could: while this process stood still. Twice MAX_STREAMS are left,
# because that many may be opened between two looks at the number.
CLOSE_AFTER_STREAMS: Final = 3800

_SETTINGS: Final = 4
_MAX_CONCURRENT_STREAMS: Final = 3
_MAX_HEADER_LIST_SIZE: Final = 6


def server_core(*, max_streams: int, max_header_bytes: int) -> tuple[Core, bytes]:
    """Return a server's side of a new connection, and the SETTINGS to send first."""
    core = zttp.Connection(zttp.SERVER, zttp.HTTP2)
    core.initiate_connection()
    core.data_to_send()
    return core, _settings_frame(
        {
            _MAX_CONCURRENT_STREAMS: max_streams,
            _MAX_HEADER_LIST_SIZE: max_header_bytes,
        }
    )


def client_core() -> Core:
    """Return a client's side of a new connection; its preface is in what it sends first."""
    core = zttp.Connection(zttp.CLIENT, zttp.HTTP2)
    core.initiate_connection()
    return core


def cancel(core: Core, stream_id: int, code: int) -> bytes:
    """End a stream that the peer has reset; return what was to be sent before.

    zttp has not seen the RST_STREAM, so it answers with one of its own. That is dropped, because a reset is
    not answered with a reset.
    """
    output = core.data_to_send()
    core.stream(stream_id).reset(code)
    core.data_to_send()
    return output


def _settings_frame(values: dict[int, int]) -> bytes:
    payload = b"".join(key.to_bytes(2, "big") + value.to_bytes(4, "big") for key, value in values.items())
    return len(payload).to_bytes(3, "big") + bytes((_SETTINGS, 0, 0, 0, 0, 0)) + payload
