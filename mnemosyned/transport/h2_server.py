"""What all connections of one engine share: the methods, the bounds, and the sums that are bounded.

A bound of one connection is kept by that connection (http2/server.py). The bounds over all of them are here:
many clients that each stay within their own bound could still fill the memory together.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from aio.rate_limit import LogRateLimiter
from aio.stalls import StallWatch
from http2.outbox import Tally
from http2.stream import ServerLimits
from mnemosyned.sessions.clock import uptime_ns
from mnemosyned.transport.engine import ConnectionStats
from mnemosyned.transport.h2_backlog import Backlog
from mnemosyned.transport.methods import StreamMethod, UnaryMethod

if TYPE_CHECKING:
    from mnemosyned.transport.h2_connection import Connection

log = logging.getLogger(__name__)

_RELIEVED: Final = 0.9  # of the bound, when incomplete requests have passed it


@dataclass(slots=True, kw_only=True, eq=False)
class Server:
    """What all connections of one engine share."""

    limits: ServerLimits
    unary: dict[bytes, UnaryMethod]  # by path, as it comes
    streams: dict[bytes, StreamMethod]
    max_message_bytes: int  # of a request, where its method has no limit of its own
    max_unsent_bytes: int  # of answers that clients have not taken, over all connections
    max_request_bytes: int  # of requests that are not complete, over all connections
    stats: ConnectionStats
    connections: set[Connection] = field(default_factory=set)
    unsent_total: Tally = field(default_factory=Tally)
    request_total: Tally = field(default_factory=Tally)
    relief_limiter: LogRateLimiter = field(default_factory=LogRateLimiter)
    backlog: Backlog = field(default_factory=Backlog)
    stalls: StallWatch = field(default_factory=lambda: StallWatch(uptime_ns))

    def relieve(self) -> None:
        """Close connections until all together hold no more than they may.

        First those whose clients have taken nothing for the longest: a client that reads is never closed for
        those that do not.
        """
        while self.unsent_total.size_bytes > self.max_unsent_bytes:
            worst = min(self.connections, key=lambda connection: connection.still_since_s())
            left_out = self.relief_limiter.take(time.monotonic())
            if left_out is not None:
                fields = {"peer": worst.peer, "bytes": worst.unsent_bytes, "left_out": left_out}
                log.warning("answers_unread", extra=fields)
            worst.abort("unread")

    def relieve_requests(self) -> None:
        """Close connections if all together hold more of requests than they may.

        First those with the oldest request that is not complete: an upload ends, and an attack waits. More
        are closed than must be, so that the search for them is worth its time.
        """
        if self.request_total.size_bytes <= self.max_request_bytes:
            return
        holders = [it for it in self.connections if it.request_bytes]
        for worst in sorted(holders, key=lambda connection: connection.incomplete_since_s()):
            if self.request_total.size_bytes <= self.max_request_bytes * _RELIEVED:
                return
            left_out = self.relief_limiter.take(time.monotonic())
            if left_out is not None:
                fields = {"peer": worst.peer, "bytes": worst.request_bytes, "left_out": left_out}
                log.warning("requests_incomplete", extra=fields)
            worst.abort("incomplete")
