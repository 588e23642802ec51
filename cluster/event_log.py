"""What happens to members, as lines of the log.

The names of events and fields are part of the daemon's interface: alerts are made of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Final

from aio.rate_limit import LogRateLimiter, fields_of
from cluster.member import Event, EventKind

log = logging.getLogger(__name__)

_WARNINGS: Final = frozenset({EventKind.SUSPECT, EventKind.DEAD, EventKind.CONFLICT})
# By level. A network that comes and goes makes an event of each member, again and again.
_LIMITERS: Final[Mapping[int, LogRateLimiter]] = {
    logging.INFO: LogRateLimiter(),
    logging.WARNING: LogRateLimiter(),
}
_PAUSE_S: Final = 10.0
_MAX_LINES: Final = 50
_MAX_REMEMBERED: Final = 512
_MAX_SHOWN: Final = 300  # characters of what a foreign node sent


def log_event(event: Event) -> None:
    """Write one line with what is known of the event, and at most 100 a second.

    Fields that say nothing are left out.
    """
    level = logging.WARNING if event.kind in _WARNINGS else logging.INFO
    left_out = _LIMITERS[level].take(time.monotonic())
    if left_out is None:
        return
    member = event.member
    fields: dict[str, object] = {
        "node": member.name,
        "address": member.address,
        "generation": member.generation,
        "incarnation": member.incarnation,
    }
    if event.evidence:
        fields["evidence"] = event.evidence
    if event.accuser:
        fields["accuser"] = event.accuser
    if event.confirmations:
        fields["confirmations"] = event.confirmations
    if event.seconds:
        fields["seconds"] = round(event.seconds, 3)
    log.log(level, event.kind.value, extra=fields | fields_of(left_out))


class RefusalLog:
    """Logs that a peer and this node refuse one another: at most one line per event and peer in 10 s.

    Such a mistake in the settings repeats with every packet until it is mended. A stranger may send any name,
    so all of them together get _MAX_LINES in that time. A line says how many were left out before it.
    """

    def __init__(self) -> None:
        self._logged_s: dict[str, float] = {}  # by event and peer
        self._since_s = -_PAUSE_S  # of `_lines`
        self._lines = 0
        self._left_out = 0

    def write(self, event: str, peer: str, text: str, *, now: float) -> None:
        """Write the line unless one like it was written a short while ago."""
        if now - self._logged_s.get(event + peer, -_PAUSE_S) < _PAUSE_S:
            self._left_out += 1
            return
        if now - self._since_s >= _PAUSE_S:
            self._since_s, self._lines = now, 0
        self._lines += 1
        if self._lines > _MAX_LINES:
            self._left_out += 1
            return
        if len(self._logged_s) >= _MAX_REMEMBERED:
            # A foreign node may send any name. A line too many is better than memory without a bound.
            self._logged_s.clear()
        self._logged_s[event + peer] = now
        fields: dict[str, object] = {"peer_node": peer[:_MAX_SHOWN], "error": text[:_MAX_SHOWN]}
        log.error(event, extra=fields | fields_of(self._left_out))
        self._left_out = 0
