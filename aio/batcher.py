"""Natural batching: what arrives while a batch is under way forms the next one.

No timer: an item that finds nothing under way goes out at once, so idle latency is
unchanged, and under load batches grow by themselves until the bounds.

Rules for editing: items leave `_waiting` in order and exactly once; state is consistent
before every await; nobody awaits a batch but its own task, or the caller of a lone item.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from mnemosyned.errors import MnemosyneError, Overloaded

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """Bounds of a batcher; an item over `max_bytes` still goes out, alone."""

    max_items: int = 512
    max_bytes: int = 8 * 1024 * 1024
    max_waiting: int = 20_000
    lanes: int = 1  # batches under way at once
    is_abandonable: bool = True  # whether a batch is cancelled when all its callers are gone
    is_eager: bool = False  # whether the caller of an item that finds no lane open runs it, a turn sooner


@dataclass(slots=True, eq=False)
class _Waiting(Generic[Item, Result]):
    item: Item
    size_bytes: int
    answer: asyncio.Future[Result]


class Batcher(Generic[Item, Result]):
    """Turns single calls into batches.

    `run` takes the items of one batch and returns as many results in the same order; a result
    that is an exception fails its own item only, an exception raised by `run` fails them all.
    A caller that is cancelled takes its item out of the queue; when all callers of a batch under
    way are gone, the batch is cancelled too, unless it must know its outcome.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Awaitable[Sequence[Result | MnemosyneError]]],
        *,
        limits: BatchLimits,
        size_bytes: Callable[[Item], int] = lambda _: 0,
    ) -> None:
        self._run = run
        self._limits = limits
        self._size_bytes = size_bytes
        self._waiting: deque[_Waiting[Item, Result]] = deque()
        self._lanes: set[asyncio.Task[None]] = set()
        self._open_lanes = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    async def submit(self, item: Item) -> Result:
        """Return the item's own result.

        Raises:
            Overloaded: `max_waiting` items wait already.
            MnemosyneError: the item's own failure, or its batch's.
        """
        if self._limits.is_eager and not self._open_lanes:
            return await self._run_alone(item)
        return await self.enqueue(item)

    def enqueue(self, item: Item) -> asyncio.Future[Result]:
        """Return the item's own result to come; whoever cancels it takes the item back.

        Raises:
            Overloaded: `max_waiting` items wait already.
        """
        if len(self._waiting) >= self._limits.max_waiting:
            raise Overloaded("mnemosyned: too many calls are waiting for the storage")
        if self._loop is None:
            # Once: before Python 3.12 it is a system call.
            self._loop = asyncio.get_running_loop()
        answer: asyncio.Future[Result] = self._loop.create_future()
        self._waiting.append(_Waiting(item, self._size_bytes(item), answer))
        if self._open_lanes < self._limits.lanes:
            self._open_lane()
        return answer

    async def _run_alone(self, item: Item) -> Result:
        self._open_lanes += 1
        try:
            (result,) = await self._run([item])
        finally:
            self._open_lanes -= 1
            if self._waiting and self._open_lanes < self._limits.lanes:
                self._open_lane()
        if isinstance(result, MnemosyneError):
            raise result
        return result

    async def close(self) -> None:
        """Cancel what is under way; callers still waiting are cancelled."""
        lanes = list(self._lanes)
        for lane in lanes:
            lane.cancel()
        await asyncio.gather(*lanes, return_exceptions=True)
        for waiting in self._waiting:
            waiting.answer.cancel()
        self._waiting.clear()

    def _open_lane(self) -> None:
        # The set owns the task; it starts in the next turn of the loop, so that
        # calls which arrive in this turn share its first batch.
        self._open_lanes += 1
        lane = asyncio.create_task(self._drain())
        self._lanes.add(lane)
        lane.add_done_callback(self._lanes.discard)

    async def _drain(self) -> None:
        try:
            while batch := self._next_batch():
                await self._run_batch(batch)
        finally:
            # In the same turn as the last look at the queue: the set learns of a
            # task's end a turn later, and an item of that turn would wait for ever.
            self._open_lanes -= 1

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
        work = asyncio.ensure_future(self._results([waiting.item for waiting in batch]))
        callers = len(batch)

        def leave(answer: asyncio.Future[Result]) -> None:
            nonlocal callers
            callers -= answer.cancelled()
            if not callers and self._limits.is_abandonable:
                work.cancel()

        for waiting in batch:
            waiting.answer.add_done_callback(leave)
        try:
            _settle(batch, await work)
        except asyncio.CancelledError:
            work.cancel()
            _abandon(batch)
            if asyncio.current_task().cancelling():  # type: ignore[union-attr]  # a lane is a task
                raise
        except Exception as exc:  # noqa: BLE001  # the root of the work: every caller gets it
            _fail(batch, exc)

    async def _results(self, items: list[Item]) -> Sequence[Result | MnemosyneError]:
        return await self._run(items)


def _settle(batch: list[_Waiting[Item, Result]], results: Sequence[Result | MnemosyneError]) -> None:
    assert len(results) == len(batch)
    for waiting, result in zip(batch, results, strict=True):
        if waiting.answer.done():
            continue
        if isinstance(result, MnemosyneError):
            waiting.answer.set_exception(result)
        else:
            waiting.answer.set_result(result)


def _abandon(batch: list[_Waiting[Item, Result]]) -> None:
    for waiting in batch:
        waiting.answer.cancel()


def _fail(batch: list[_Waiting[Item, Result]], exc: Exception) -> None:
    for waiting in batch:
        if not waiting.answer.done():
            waiting.answer.set_exception(_own_copy(exc))


def _own_copy(exc: Exception) -> Exception:
    # One instance raised in many tasks would collect the tracebacks of them all.
    if not isinstance(exc, MnemosyneError):
        return exc
    copy = type(exc)(*exc.args)
    copy.__cause__ = exc.__cause__
    return copy
