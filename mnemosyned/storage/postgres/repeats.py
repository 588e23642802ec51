"""Transactions that the server has rolled back for the sake of others, and that are run again.

    run ── 40001 serialization_failure, 40P01 deadlock_detected ──> pause ──> run …
     │         └── the time is over ──> StorageUnavailable
     └── 40003 statement_completion_unknown ──> StorageUnavailable: it may be done, and is not repeated

After the first two nothing is done, whatever the statement, and the next try may well succeed. PostgreSQL
gives them where another program uses the table in its own way, or where a transaction is serializable. A
server that knows no other isolation gives them in daily use.

A write that is repeated compares its `not_after` with the clock once more. So no write is done late, however
often it is repeated.
"""

from __future__ import annotations

import asyncio
import random
from typing import Final

import asyncpg

ROLLED_BACK: Final = (asyncpg.SerializationError, asyncpg.DeadlockDetectedError)
_FIRST_PAUSE_S: Final = 0.005
_LONGEST_PAUSE_S: Final = 0.1


class Repeats:
    """The pauses between the tries of one transaction; the time runs from the first pause."""

    def __init__(self, for_s: float) -> None:
        self._for_s = for_s
        self._until_s = 0.0
        self._most_s = _FIRST_PAUSE_S

    async def pause(self) -> bool:
        """Wait at random, for longer each time, so that two do not meet again; False: the time is over."""
        now_s = asyncio.get_running_loop().time()
        self._until_s = self._until_s or now_s + self._for_s
        pause_s = random.uniform(0.0, self._most_s)  # noqa: S311  # no secret
        if now_s + pause_s >= self._until_s:
            return False
        self._most_s = min(2 * self._most_s, _LONGEST_PAUSE_S)
        await asyncio.sleep(pause_s)
        return True
