"""What a client with HTTP/1 is told on the gRPC port: a status and one line that it can show. Pure.

No request of HTTP/1 reaches a method, and none is upgraded to HTTP/2: an upgrade would lead past a proxy that
filters HTTP/1 only. The answer closes the connection.
"""

from __future__ import annotations

import re
from typing import Final

# A request line of HTTP/1, or its beginning.
_REQUEST_LINE: Final = re.compile(rb"[A-Z]{3,10} ")
_TEXT: Final = b"mnemosyned speaks gRPC (HTTP/2) here; its admin pages are on the next port\n"
_ANSWER: Final = (
    b"HTTP/1.1 505 HTTP Version Not Supported\r\nconnection: close\r\ncontent-type: text/plain\r\n"
    b"content-length: %d\r\n\r\n%b" % (len(_TEXT), _TEXT)
)


def answer_to(first: bytes) -> bytes:
    """Return the answer to a client that begins with these bytes; empty if they are not HTTP/1 either."""
    return _ANSWER if _REQUEST_LINE.match(first) else b""
