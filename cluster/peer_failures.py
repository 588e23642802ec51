"""Which error of errors.py a failed call to a peer is, and with which status it is counted.

    what failed                                              | error             | counted as
    ---------------------------------------------------------+-------------------+------------------
    no connection, or it broke                               | PeerUnreachable   | UNAVAILABLE
    no answer in time, by this node's clock or the peer's    | PeerTimeout       | DEADLINE_EXCEEDED
    the peer is alive and says no (_REFUSALS)                | PeerRefused       | its status
    another status                                           | PeerUnreachable   | its status
    no proof, or no message of this protocol                 | PeerUnproven      | UNAUTHENTICATED

A failed introduction is what its reason is.
"""

from __future__ import annotations

from typing import Final

from cluster.channel import IntroductionFailed
from cluster.errors import (
    ClusterError,
    MalformedPacket,
    PeerRefused,
    PeerTimeout,
    PeerUnproven,
    PeerUnreachable,
    UnauthenticatedPeer,
)
from cluster.responses import CallFailed, ConnectionLost
from http2.status import StatusCode

# The peer is alive and says no. Everything else may be a broken connection or a peer that is about to end.
_REFUSALS: Final = frozenset({
    StatusCode.UNAUTHENTICATED,
    StatusCode.PERMISSION_DENIED,
    StatusCode.UNIMPLEMENTED,
    StatusCode.RESOURCE_EXHAUSTED,
    StatusCode.FAILED_PRECONDITION,
})  # fmt: skip

# What a call to a peer may fail with, unless there is a bug, or the caller goes away.
FAILURES: Final = (
    CallFailed,
    ConnectionLost,
    IntroductionFailed,
    MalformedPacket,
    TimeoutError,
    UnauthenticatedPeer,
)


def error_of(exc: BaseException) -> tuple[StatusCode, ClusterError]:
    """Return the status to count for one of `FAILURES`, and what it is for who made the call."""
    if isinstance(exc, IntroductionFailed):
        exc = exc.reason
    if isinstance(exc, UnauthenticatedPeer | MalformedPacket):
        return StatusCode.UNAUTHENTICATED, PeerUnproven(str(exc))
    if isinstance(exc, TimeoutError):
        return StatusCode.DEADLINE_EXCEEDED, PeerTimeout("no answer in time")
    if not isinstance(exc, CallFailed):
        return StatusCode.UNAVAILABLE, PeerUnreachable(str(exc))
    if exc.code is StatusCode.DEADLINE_EXCEEDED:
        return exc.code, PeerTimeout("no answer in time")
    if exc.code in _REFUSALS:
        return exc.code, PeerRefused(str(exc))
    return exc.code, PeerUnreachable(f"{exc.code.name}: {exc}")
