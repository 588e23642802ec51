"""Long work on the event loop, in slices: other calls wait for a slice, never for the work.

    turns of the loop:  | light calls | … | slice of A | light calls | … | slice of B | light calls | …
                         8 turns             1 ms        8 turns

A light call may need some turns: a call of grpcio takes six, and grpcio accepts one call in two turns. With a
slice in each turn it accepted fewer calls than came. A turn without work takes 20 µs.

All long work of an event loop shares one slice. Thirty jobs that each took a slice between two turns would
delay the light calls by thirty slices. A few jobs take turns among themselves, so that a short one does not
wait for the end of a long one. The others wait, since a job that has begun holds more than one that has not.

A slice ends at the first step after its time, so it is as much longer as that step. Threads would not do
better: nearly all that is long here holds the interpreter's lock, and a thread that holds it delays the loop
by its switching interval of 5 ms in each turn.

What waits has a bound: the work of large requests could be asked for faster than it is done.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, TypeVar
from weakref import WeakKeyDictionary

from aio.steps import Steps

T = TypeVar("T")

_SLICE_S: Final = 0.001
_TURNS_BETWEEN: Final = 8
_MAX_BEGUN: Final = 8
# Of what the jobs that are not done hold. One more is taken if there is none.
MAX_WAITING_BYTES: Final = 64 * 1024**2


class SlicesFull(Exception):
    """Too much waits already; the work was not begun."""


class Slices:
    """The long work of one event loop, and whose turn it is."""

    def __init__(self) -> None:
        self._begun: deque[_Job] = deque()  # the first has the next turn
        self._waiting: deque[_Job] = deque()
        self._turns_left = 0  # before the next slice
        self._is_due = False
        self.waiting_bytes = 0  # as their callers have said

    async def run(self, steps: Steps[T], *, size_bytes: int = 0, is_urgent: bool = False) -> T:
        """Return what the steps come to.

        `size_bytes` is what they hold until then. Urgent work goes before all other: something is locked.

        Raises:
            SlicesFull: too much waits; only with a size.
            Exception: what a step has raised.
        """
        if size_bytes and self.waiting_bytes and self.waiting_bytes + size_bytes > MAX_WAITING_BYTES:
            raise SlicesFull
        job = _Job(steps, asyncio.get_running_loop().create_future(), is_urgent)
        self.waiting_bytes += size_bytes
        if is_urgent:
            self._put_back(job)
        else:
            self._waiting.append(job)
        self._be_due()
        try:
            result: T = await job.answer
            return result
        finally:
            self.waiting_bytes -= size_bytes

    def _be_due(self) -> None:
        while self._waiting and len(self._begun) < _MAX_BEGUN:
            self._begun.append(self._waiting.popleft())
        if self._begun and not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._take_turn)

    def _put_back(self, job: _Job) -> None:
        if job.is_urgent:
            self._begun.appendleft(job)
        else:
            self._begun.append(job)

    def _take_turn(self) -> None:
        if self._turns_left:
            self._turns_left -= 1
            asyncio.get_running_loop().call_soon(self._take_turn)
            return
        self._is_due, self._turns_left = False, _TURNS_BETWEEN
        until_s = time.perf_counter() + _SLICE_S
        while self._begun and time.perf_counter() < until_s:
            job = self._begun.popleft()
            if not job.is_over_at(until_s):
                self._put_back(job)
        self._be_due()


class _Job:
    """Some steps, and the future of whoever waits for them."""

    __slots__ = ("_steps", "answer", "is_urgent")

    def __init__(self, steps: Steps[Any], answer: asyncio.Future[Any], is_urgent: bool) -> None:  # noqa: FBT001
        self._steps = steps
        self.answer = answer
        self.is_urgent = is_urgent

    def is_over_at(self, until_s: float) -> bool:
        """Run steps until an instant; tell whether they have come to an end."""
        if self.answer.done():
            # Its caller was cancelled.
            self._steps.close()
            return True
        try:
            while time.perf_counter() < until_s:
                next(self._steps)
        except StopIteration as end:
            self.answer.set_result(end.value)
        except Exception as exc:  # noqa: BLE001  # it is the caller's
            self.answer.set_exception(exc)
        else:
            return False
        return True


_by_loop: WeakKeyDictionary[asyncio.AbstractEventLoop, Slices] = WeakKeyDictionary()


def of_loop() -> Slices:
    """Return the slices of the running event loop: its time is what they share."""
    loop = asyncio.get_running_loop()
    slices = _by_loop.get(loop)
    if slices is None:
        slices = _by_loop[loop] = Slices()
    return slices


async def in_slices(steps: Steps[T], *, size_bytes: int = 0, is_urgent: bool = False) -> T:
    """Run steps on the event loop; at once if the first is the last, which is so for all that is small.

    See Slices.run.
    """
    try:
        next(steps)
    except StopIteration as end:
        result: T = end.value
        return result
    return await of_loop().run(steps, size_bytes=size_bytes, is_urgent=is_urgent)


async def in_turn(work: Callable[[], T]) -> T:
    """Do work that cannot be cut, when it has the slice of a turn for itself."""

    def steps() -> Steps[T]:
        yield
        return work()

    return await in_slices(steps())
