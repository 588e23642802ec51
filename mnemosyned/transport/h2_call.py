"""One call on a stream of HTTP/2: what its headers say, who works for it, and how it ends.

    Stream (http2/server.py) <── Call ── work ──> UnaryWork: the task of a call that waits
                                          └─────> Streaming (h2_streams.py): a call of many messages

A Call is made for each request, so it does as little as it can: headers are read when they are asked for, and
a call that is answered at once has no work at all.
"""

from __future__ import annotations

import asyncio
from functools import lru_cache
from typing import Final, Protocol

from aio.deadline import NO_DEADLINE, Deadline
from http2.outbox import Headers
from http2.stream import Stream
from mnemosyned.errors import (
    DeadlineExceeded,
    InvalidArgument,
    MnemosyneError,
    Unimplemented,
)
from mnemosyned.transport import frame
from mnemosyned.transport.call import OWNER_KEY, Failure

GRPC: Final = b"application/grpc"
CONTENT_TYPE: Final = (b"content-type", GRPC)
_OWNER: Final = OWNER_KEY.encode()


class Way(Protocol):
    """The connection, as a call sees it."""

    peer: str

    @property
    def certificate_names(self) -> tuple[str, ...]:
        """The names in the client's certificate."""
        ...

    def send_part(self, call: Call, message: bytes) -> None:
        """Send one message of a streaming answer, or hold it."""
        ...

    def flush_soon(self) -> None:
        """Write within this turn of the event loop, together with what else is answered in it."""
        ...

    def count(self, call: Call, size_bytes: int) -> None:
        """Count more bytes of a call's request that wait, or with a number below zero fewer."""
        ...

    def unsent_of(self, call: Call) -> int:
        """Return how many bytes of a call's answer wait."""
        ...


class Call(Stream):
    """Call on a stream of HTTP/2. Headers are read when they are asked for: most calls need one or two."""

    connection: Way  # set before any handler sees the call
    # The headers by name: made when metadata is first asked for, which most calls for this node never do.
    _fields: dict[bytes, bytes] | None = None
    waited_s: float = 0.0  # in the socket before it was read, at most; see aio/stalls.py
    owner: str | None = None  # see Call in call.py; `is_grpc` sets it
    _deadline: Deadline | None = None  # once it was asked for, which a call that waits does twice

    @property
    def is_grpc(self) -> bool:  # noqa: C901, PLR0912  # a loop without calls, since it runs for each request
        """Whether the request is what every client of gRPC sends: a POST of its type that takes trailers.

        Its time-outs, if it has any, are well-formed, and longer than zero.
        """
        is_type = takes_trailers = False
        fields = iter(self.headers)
        for name, value in fields:
            if name == b"content-type":
                is_type = value == GRPC or is_grpc_type(value)
                is_valid = is_type
            elif name == b"te":
                takes_trailers = is_valid = value == b"trailers"
            elif name == b"grpc-timeout":
                is_valid = frame.has_time(value)
            else:
                if name == _OWNER:
                    self.owner = ""
                continue
            # A second value does not mend a first one, which a proxy may have decided by.
            if not is_valid:
                return False
            if is_type and takes_trailers:
                break
        else:
            return False
        # Not read later: a call that is answered from the cache has no use for its deadline.
        for name, value in fields:
            if name == b"grpc-timeout":
                if not frame.has_time(value):
                    return False
            elif name == _OWNER:
                self.owner = ""
        return self.method == b"POST"

    def objection(self) -> MnemosyneError:
        """Return what is wrong with a POST of gRPC's type that is not `is_grpc`."""
        for name, value in self.headers:
            if name == b"grpc-timeout" and not frame.has_time(value):
                try:
                    frame.timeout_s(value)
                except InvalidArgument as exc:
                    return exc
                return DeadlineExceeded()
        return Unimplemented("mnemosyned: the request lacks `te: trailers`")

    @property
    def peer(self) -> str:
        """See Call."""
        return self.connection.peer

    def header(self, wanted: bytes) -> bytes | None:
        """Return the first value of a header."""
        for name, value in self.headers:
            if name == wanted:
                return value
        return None

    @property
    def deadline(self) -> Deadline:
        """See Call."""
        if self._deadline is None:
            value = self.header(b"grpc-timeout")
            self._deadline = (
                NO_DEADLINE
                if value is None
                else Deadline(self.arrived_s + frame.timeout_s(value), waited_s=self.waited_s)
            )
        return self._deadline

    @property
    def certificate_names(self) -> tuple[str, ...]:
        """See Call."""
        return self.connection.certificate_names

    def metadata(self, key: str) -> str | None:
        """See Call."""
        fields = self._fields
        if fields is None:
            fields = dict(self.headers)
            if len(fields) < len(self.headers):
                # The first value of a name counts.
                fields = dict(reversed(self.headers))
            self._fields = fields
        value = fields.get(key.encode())
        return None if value is None else value.decode(errors="replace")


class UnaryWork:
    """A unary call that waits for something."""

    __slots__ = ("_task",)

    def __init__(self, task: asyncio.Task[None]) -> None:
        self._task = task

    def cancel(self) -> None:
        """Stop the handler."""
        # After the task's first step: before it, the work would never begin, and never be counted out.
        self._task.get_loop().call_soon(self._task.cancel)


def is_grpc_type(content_type: bytes) -> bool:
    """Tell whether a content type is gRPC's."""
    if content_type == GRPC:
        return True
    lower = content_type.lower()
    return lower == GRPC or lower.startswith((GRPC + b"+", GRPC + b";", GRPC + b" "))


def frame_reader(call: Call, max_message_bytes: int) -> frame.FrameReader:
    """Return a reader of a call's messages."""
    encoding = call.header(b"grpc-encoding") or b""
    return frame.FrameReader(encoding=encoding, max_message_bytes=max_message_bytes)


def owner_trailers(owner: str) -> Headers:
    """Return the trailer that says where a token's owner is."""
    return [(_OWNER, owner.encode())]


def status_headers(failure: Failure) -> Headers:
    """Return the trailers of a call that has failed."""
    return [
        (b"grpc-status", str(failure.code.value).encode()),
        (b"grpc-message", frame.status_message(failure.text)),
    ]


# Most failures are alike, and may come in floods. The cache holds texts of errors, hence its bound.
@lru_cache(maxsize=64)
def failure_headers(failure: Failure) -> Headers:
    """Return the only block of headers of a call that has failed: gRPC's Trailers-Only form."""
    return [CONTENT_TYPE, *status_headers(failure), (b"grpc-accept-encoding", frame.ACCEPTED_ENCODINGS)]
