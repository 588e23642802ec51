"""An owner for background tasks, so that none is lost, leaks or fails unseen.

asyncio keeps only a weak reference to a task, and reports the failure of a task without an awaiter when
the task is collected, if ever. `asyncio.TaskGroup` solves that for work that ends with a block. `Tasks`
solves it for work that begins at any time and ends with its owner.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from aio.rate_limit import LogRateLimiter, fields_of

_FAILURES_PER_SECOND: Final = 10

log = logging.getLogger(__name__)

T = TypeVar("T")


class Tasks:
    """Owns tasks until they end or `close` cancels them; at most `max_tasks` at a time."""

    def __init__(self, name: str, *, max_tasks: int = 10_000) -> None:
        """`name` begins the log event of a failure, `<name>_failed`."""
        self._name = name
        self._max_tasks = max_tasks
        self._tasks: set[asyncio.Task[Any]] = set()
        self._is_closed = False
        # Tasks may be as many as calls, and fail alike.
        self._limiter = LogRateLimiter(_FAILURES_PER_SECOND)

    def __len__(self) -> int:
        return len(self._tasks)

    def running(self) -> set[asyncio.Task[Any]]:
        """Return the tasks that have not ended, as a copy."""
        return set(self._tasks)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None] | None:
        """Start work in the background; a failure of it is logged, whether or not the task is awaited.

        After `close` and beyond `max_tasks` the work is dropped, never queued, and None is returned.
        """
        if self._is_closed or len(self._tasks) >= self._max_tasks:
            work.close()
            return None
        task = self._own(asyncio.create_task(work))
        task.add_done_callback(self._log_failure)
        return task

    async def run_shielded(self, work: Coroutine[Any, Any, T]) -> T:
        """Run the work to its end, also when the caller is cancelled meanwhile; return its result.

        The caller gets a failure too, unless it is gone. `max_tasks` does not apply, since callers are
        bounded already.
        """
        task = self._own(asyncio.create_task(work))
        # Read, or asyncio would report a failure as never retrieved when the caller was cancelled.
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Cancel every task and wait until all have ended."""
        self._is_closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _own(self, task: asyncio.Task[T]) -> asyncio.Task[T]:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _log_failure(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or (exc := task.exception()) is None:
            return
        left_out = self._limiter.take(time.monotonic())
        if left_out is not None:
            log.error("%s_failed", self._name, exc_info=exc, extra=fields_of(left_out))
