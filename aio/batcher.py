"""Natural batching: what arrives while a batch is under way forms the next one.

There is no timer. An item that finds no batch under way is sent at once, so batching adds no latency to
an idle daemon. Under load, batches grow by themselves until they reach their bounds. Databases call the
same idea group commit.

Rules for editing:
- Items leave `_waiting` in order and exactly once.
- State is consistent before every await.
- Only a worker task awaits a batch, or the caller of a lone item (`is_eager`).
"""

from __future__ import annotations

import asyncio
import copy
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from aio.expiry import Expiry
from aio.later import Later

Item = TypeVar("Item")
Result = TypeVar("Result")
Raised = TypeVar("Raised", bound=BaseException)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """Bounds of a batcher; an item over `max_bytes` still goes out, alone."""

    max_items: int = 512
    max_bytes: int = 8 * 1024 * 1024
    max_waiting: int = 20_000
    concurrency: int = 1  # batches under way at once
    is_abandonable: bool = True  # whether a batch is cancelled when all its callers are gone
    # Whether an item that is alone for a turn of the loop is run by its own caller: that saves two tasks.
    is_eager: bool = False


class QueueFull(Exception):
    """`max_waiting` items wait already; the item was not taken."""


@dataclass(slots=True, eq=False)
class _Waiting(Generic[Item, Result]):
    item: Item
    size_bytes: int
    answer: Later[Result]


class Batcher(Generic[Item, Result]):
    """Turns single calls into batches.

    `run` takes the items of one batch and returns as many results in the same order. A result that is an
    exception fails its own item only; an exception that `run` raises fails all items of the batch. A caller
    that is cancelled takes its item out of the queue. When all callers of a batch under way are gone, the
    batch is cancelled too, unless `is_abandonable` is false because its outcome must be known. `full` makes
    the error for an item that finds `max_waiting` others.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Awaitable[Sequence[Result | Exception]]],
        *,
        limits: BatchLimits,
        size_bytes: Callable[[Item], int] | None = None,
        full: Callable[[], Exception] = QueueFull,
    ) -> None:
        self._run = run
        self._limits = limits
        self._size_bytes = size_bytes
        self._full = full
        self._waiting: deque[_Waiting[Item, Result]] = deque()
        self._workers: set[asyncio.Task[None]] = set()
        self._running = 0  # batches under way
        self._is_gathering = False  # an eager item waits for a turn, to learn whether it is alone
        self._expiry = Expiry()  # of answers with a time-out

    async def submit(self, item: Item, *, timeout_s: float | None = None) -> Result:
        """Return the item's own result.

        `timeout_s` bounds the wait for a batch and for its end. It does not bound an item that its own caller
        runs (`is_eager`): that takes as long as `run` does.

        Raises:
            QueueFull: `max_waiting` items wait already; or what `full` makes.
            TimeoutError: the time has passed; the batch may be under way.
            Exception: the item's own failure, or that of its batch.
        """
        if self._limits.is_eager and not (self._running or self._waiting or self._is_gathering):
            await self._gather()
            if not (self._running or self._waiting):
                return await self._run_alone(item)
        answer = self.enqueue(item)
        if timeout_s is not None:
            self._expiry.add(answer, timeout_s)
        return await answer

    def enqueue(self, item: Item) -> Later[Result]:
        """Return the item's own result; cancelling it takes the item back.

        Raises:
            QueueFull: `max_waiting` items wait already; or what `full` makes.
        """
        if len(self._waiting) >= self._limits.max_waiting:
            raise self._full()
        answer: Later[Result] = Later()
        size_bytes = 0 if self._size_bytes is None else self._size_bytes(item)
        self._waiting.append(_Waiting(item, size_bytes, answer))
        if self._running < self._limits.concurrency and not self._is_gathering:
            self._start_worker()
        return answer

    async def _gather(self) -> None:
        """Wait for one turn of the loop: what arrives in it shares a batch."""
        self._is_gathering = True
        try:
            await asyncio.sleep(0)
        finally:
            self._is_gathering = False
            if self._waiting:
                self._start_worker()

    async def _run_alone(self, item: Item) -> Result:
        self._running += 1
        try:
            (result,) = await self._run([item])
        finally:
            self._running -= 1
            if self._waiting and self._running < self._limits.concurrency:
                self._start_worker()
        if isinstance(result, Exception):
            raise result
        return result

    async def close(self) -> None:
        """Cancel what is under way; callers still waiting are cancelled."""
        workers = list(self._workers)
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        for waiting in self._waiting:
            waiting.answer.cancel()
        self._waiting.clear()
        self._expiry.close()

    def _start_worker(self) -> None:
        # The set owns the task; it starts in the next turn of the loop, so that
        # calls which arrive in this turn share its first batch.
        self._running += 1
        worker = asyncio.create_task(self._drain())
        self._workers.add(worker)
        worker.add_done_callback(self._workers.discard)

    async def _drain(self) -> None:
        try:
            while batch := self._next_batch():
                await self._run_batch(batch)
        finally:
            # In the same turn as the last look at the queue: the set learns of a
            # task's end a turn later, and nothing would ever run an item of that turn.
            self._running -= 1

    def _next_batch(self) -> list[_Waiting[Item, Result]]:
        batch: list[_Waiting[Item, Result]] = []
        size_bytes = 0
        while self._waiting and len(batch) < self._limits.max_items:
            head = self._waiting[0]
            if head.answer.done():
                self._waiting.popleft()
                continue
            size_bytes += head.size_bytes
            if batch and size_bytes > self._limits.max_bytes:
                break
            batch.append(self._waiting.popleft())
        return batch

    async def _run_batch(self, batch: list[_Waiting[Item, Result]]) -> None:
        work = self._run([waiting.item for waiting in batch])
        if self._limits.is_abandonable:
            work = asyncio.ensure_future(work)
            _cancelled_without_callers(work, batch)
        try:
            _settle(batch, await work)
        except asyncio.CancelledError:
            if isinstance(work, asyncio.Future):
                work.cancel()
            _abandon(batch)
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]  # a worker is a task
                raise
        except Exception as exc:  # noqa: BLE001  # the root of the work: every caller gets it
            _fail(batch, exc)


def _cancelled_without_callers(
    work: asyncio.Future[Sequence[Result | Exception]], batch: list[_Waiting[Item, Result]]
) -> None:
    """Have the work of a batch cancelled when all its callers are gone."""
    callers = len(batch)

    def leave() -> None:
        nonlocal callers
        callers -= 1
        if not callers:
            work.cancel()

    for waiting in batch:
        waiting.answer.on_cancel = leave


def _settle(batch: list[_Waiting[Item, Result]], results: Sequence[Result | Exception]) -> None:
    assert len(results) == len(batch)
    for waiting, result in zip(batch, results, strict=True):
        # Also one that is an exception: it is the item's failure.
        waiting.answer.set_result(cast("Result", result))


def _abandon(batch: list[_Waiting[Item, Result]]) -> None:
    for waiting in batch:
        waiting.answer.set_exception(asyncio.CancelledError())


def _fail(batch: list[_Waiting[Item, Result]], exc: Exception) -> None:
    for waiting in batch:
        waiting.answer.set_exception(own_copy(exc))


def own_copy(exc: Raised) -> Raised:
    """Return a copy of an exception, for one of several callers that it is raised to."""
    # One instance raised in many tasks would collect the tracebacks of them all.
    try:
        copied = copy.copy(exc)
    except TypeError:
        # Its constructor does not take its own arguments; only a bug raises such a one here.
        return exc
    copied.__cause__ = exc.__cause__
    return copied.with_traceback(exc.__traceback__)
