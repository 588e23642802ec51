"""What all connections of one engine share: the methods, the bounds, and the sums that are bounded.

A bound of one connection is kept by that connection (http2/server.py). The bounds over all of them are here:
many clients that each stay within their own bound could still fill the memory together.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from http2.outbox import Tally
from http2.stream import ServerLimits
from mnemosyned.transport.engine import ConnectionStats
from mnemosyned.transport.methods import StreamMethod, UnaryMethod

if TYPE_CHECKING:
    from mnemosyned.transport.h2_connection import Connection

log = logging.getLogger(__name__)


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

    def relieve(self) -> None:
        """Close connections until all together hold no more than they may.

        First those whose clients have taken nothing for the longest: a client that reads is never closed for
        those that do not.
        """
        while self.unsent_total.size_bytes > self.max_unsent_bytes:
            worst = min(self.connections, key=lambda connection: connection.still_since_s())
            log.warning("answers_unread", extra={"peer": worst.peer, "bytes": worst.unsent_bytes})
            worst.abort("unread")
