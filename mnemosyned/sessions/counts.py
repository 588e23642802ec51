"""How many sessions began and ended on this node, and about how many there are."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Final

from aio.periodic import run_periodically
from mnemosyned.errors import StorageUnavailable
from mnemosyned.sessions.store import Storage

log = logging.getLogger(__name__)

_ESTIMATE_PERIOD_S: Final = 30.0
# The RPCs that end sessions, and cleanup.
CAUSES: Final = ("abandoned", "deleted", "expired")


@dataclass(slots=True)
class SessionCounts:
    """Plain integers, since a Start must not pay for a lock: scrapes read them from other threads.

    A session is counted on the node that did the work. A Start or an Abandon whose outcome the caller never
    learned is counted only if this node learned it.
    """

    started: int = 0
    ended_by_cause: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CAUSES, 0))
    estimated: int | None = None  # stored sessions; None: not asked yet, or the storage did not answer


async def keep_estimating(storage: Storage, counts: SessionCounts) -> None:
    """Ask the storage at once, and then twice a minute, for about how many sessions there are."""

    async def estimate() -> None:
        try:
            counts.estimated = await storage.estimated_sessions()
        except StorageUnavailable:
            # The health of the storage is logged elsewhere. An old number would look like a live one.
            counts.estimated = None

    await estimate()
    await run_periodically("estimate", estimate, period_s=lambda: _ESTIMATE_PERIOD_S)
