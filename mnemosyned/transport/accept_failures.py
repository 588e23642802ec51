"""What is told of connections that could not be accepted: a count of each error, and a line now and then.

A process that is out of files fails ten times a second, for as long as that lasts. One line in ten seconds
says as much, if it says how often.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

log = logging.getLogger(__name__)

_QUIET_S: Final = 10.0


@dataclass(slots=True)
class _Told:
    at_s: float
    left_out: int = 0


@dataclass(slots=True)
class AcceptFailures:
    """The failures of one listener; `counts` are by the name of the error."""

    counts: Counter[str]
    # As many as errors have names.
    _told_by_name: dict[str, _Told] = field(default_factory=dict)

    def add(self, name: str, text: str, now_s: float) -> None:
        """Count a failure, and log it, unless one of this name was logged in the last ten seconds."""
        self.counts[name] += 1
        told = self._told_by_name.get(name)
        if told is not None and now_s - told.at_s < _QUIET_S:
            told.left_out += 1
            return
        left_out = 0 if told is None else told.left_out
        self._told_by_name[name] = _Told(now_s)
        log.warning("accept_failed", extra={"error": text, "left_out": left_out})
