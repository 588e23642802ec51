"""How old the input may be that a connection takes in: since when it may have waited to be read. Pure.

Input waits in this host's socket, in the backlog of the engine, and, when both are full, with the client. So
the end of a stall does not end it: what was sent in the stall may arrive seconds later, behind other input.
An echo does:

    this process                                              client
        | stands still        <── call, call, call ──            |
        | reads: may be as old as the stall                      |
        | ── PING ──>         <── call, call ──                  |
        | reads: as old       <── ACK ── the PING was seen       |
        | reads: sent after the PING                             |

What comes behind the ACK was sent after the PING, because a connection keeps its sequence. If input waited
again meanwhile, another PING asks for what comes behind that.

RFC 9113, section 6.7, has every client answer a PING. One that does not is asked to open another connection.
"""

from __future__ import annotations

import math
from typing import Final

_LATE_S: Final = 20.0


class InputAge:
    """The age of one connection's input, from what delayed it and from its echoes.

    `since_s` is when the oldest input that is taken in now may have been sent; infinity: just now.
    """

    __slots__ = ("_asked_s", "_later_s", "since_s")

    def __init__(self) -> None:
        """Begin with input that is new."""
        self.since_s = math.inf
        self._later_s = math.inf  # the same of what was delayed after an echo was asked for
        self._asked_s = math.inf

    def delayed_since(self, instant_s: float) -> None:
        """Take note that input waits, or has waited, since an instant."""
        self.since_s = min(self.since_s, instant_s)
        if self._asked_s != math.inf:
            self._later_s = min(self._later_s, instant_s)

    def ask(self, now_s: float) -> bool:
        """Tell whether a PING is due, which the caller sends: all that waited here has been taken in."""
        if self._asked_s != math.inf or self.since_s == math.inf:
            return False
        self._asked_s = now_s
        return True

    def echoed(self) -> None:
        """Take note that the PING was answered before what is taken in next; without a PING, do nothing."""
        if self._asked_s == math.inf:
            return
        self.since_s, self._later_s = self._later_s, math.inf
        self._asked_s = math.inf

    def is_late(self, now_s: float) -> bool:
        """Tell whether the client has left the PING unanswered for too long."""
        return now_s - self._asked_s > _LATE_S
