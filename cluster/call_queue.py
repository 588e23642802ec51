"""Calls that wait for one peer, and leave in batches: natural batching (aio/batcher.py) without tasks.

    add() ──> waiting ── _send, at the end of this turn of the loop ──> a batch under way ──> its answers
                 └──────── when a batch is answered ──────────────────────^        each given to its call
                                                                                   in the same step

A forwarded call is a part of a client's call, and hundreds of them may be in one batch. So a call here costs
one object and a place in a line: no task, no future, no timer of its own.

- Nothing waits while fewer batches are under way than may be: a lone call leaves in the turn in which it
  came. What arrives in one turn shares a batch, and so does what arrives while all batches are under way.
- One timer runs, for the call whose time ends first.
- A call that is cancelled, or too late, leaves the line. A batch that nobody waits for any more is cancelled.
- A batch that fails as a whole fails each of its calls.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Protocol

from aio.batcher import BatchLimits, own_copy
from aio.later import Later, Outcome, failed
from cluster.errors import ClusterError, PeerSkipped, PeerTimeout, PeerUnreachable
from cluster.peerpb import peer_pb2 as pb


class Line(Protocol):
    """The way to the peer."""

    def send(self, items: list[pb.Item], timeout_s: float) -> Later[Sequence[pb.Answer]]:
        """Send a batch; the Later has as many answers, in the same sequence, or fails after that time."""
        ...

    def answered(self, count: int) -> None:
        """Take note that so many calls were answered."""
        ...

    def failed(self, failure: ClusterError, try_s: float) -> None:
        """Take note of the failure of a call, which had so many seconds."""
        ...


class Call(Later[pb.Answer]):
    """A call, from `add` to its answer."""

    __slots__ = ("item", "late_s", "try_s", "until_s")

    def __init__(self, item: pb.Item, *, try_s: float, until_s: float, late_s: float) -> None:
        """On the loop's clock, its time ends at `until_s`, and it is waited for until `late_s`."""
        super().__init__()
        self.item = item
        self.try_s = try_s
        self.until_s = until_s
        self.late_s = late_s


class CallQueue:
    """Calls of one kind for one peer."""

    def __init__(self, line: Line, limits: BatchLimits, *, grace_s: float) -> None:
        """A call is waited for `grace_s` longer than it has, and at most twice as long.

        It has half of its caller's time, so none is waited for after its caller's deadline.
        """
        self._line = line
        self._limits = limits
        self._grace_s = grace_s
        self._waiting: deque[Call] = deque()
        self._under_way: set[_Batch] = set()
        self._is_due = False  # `_send`
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.Handle | None = None
        self._timer_s = math.inf  # when it fires

    def add(self, item: pb.Item, *, try_s: float) -> Later[pb.Answer]:
        """Return the answer, or why there is none: a ClusterError.

        Raises:
            PeerSkipped: too many calls wait.
        """
        if len(self._waiting) >= self._limits.max_waiting:
            raise PeerSkipped("too many calls wait for it")
        until_s = self._loop.time() + try_s
        call = Call(item, try_s=try_s, until_s=until_s, late_s=until_s + min(try_s, self._grace_s))
        self._waiting.append(call)
        if call.late_s < self._timer_s:
            self._set_timer(call.late_s)
        self._send_soon()
        return call

    def close(self) -> None:
        """Cancel what is under way; all calls fail with PeerUnreachable."""
        self._set_timer(math.inf)
        batches, calls = list(self._under_way), self._calls()
        self._waiting.clear()
        for call in calls:
            self._fail(call, PeerUnreachable("it is no member any more"))
        for batch in batches:
            batch.work.cancel()

    def _send_soon(self) -> None:
        if not self._is_due and len(self._under_way) < self._limits.concurrency:
            self._is_due = True
            self._loop.call_soon(self._send)

    def _send(self) -> None:
        self._is_due = False
        while len(self._under_way) < self._limits.concurrency and (calls := self._next_calls()):
            batch = _Batch(calls)
            self._under_way.add(batch)
            try:
                # Until the last of its calls is late; the others stop waiting by themselves.
                left_s = max(call.until_s for call in calls) - self._loop.time()
                batch.work = self._line.send([call.item for call in calls], max(0.0, left_s))
            except Exception as exc:  # noqa: BLE001  # the root of a batch: every caller gets it
                batch.work = failed(exc)
            batch.work.then(partial(self._take, batch))

    def _next_calls(self) -> list[Call]:
        calls: list[Call] = []
        waiting, size_bytes = self._waiting, 0
        while waiting and len(calls) < self._limits.max_items:
            call = waiting[0]
            if not call.done():
                size_bytes += len(call.item.message)
                if calls and size_bytes > self._limits.max_bytes:
                    break
                calls.append(call)
            waiting.popleft()
        return calls

    def _take(self, batch: _Batch, outcome: Outcome[Sequence[pb.Answer]]) -> None:
        """Give each call its answer, and let those that wait take the batch's place."""
        self._under_way.discard(batch)
        if self._waiting:
            self._send_soon()
        if isinstance(outcome, BaseException):
            for call in batch.calls:
                self._fail(call, own_copy(outcome))
            return
        assert isinstance(outcome, Sequence)
        count = 0
        for call, answer in zip(batch.calls, outcome, strict=True):
            count += not call.done()
            call.set_result(answer)
        if count:
            self._line.answered(count)

    def _fail(self, call: Call, failure: BaseException) -> None:
        if not call.done():
            if isinstance(failure, ClusterError):
                self._line.failed(failure, call.try_s)
            call.set_exception(failure)

    def _calls(self) -> list[Call]:
        return [*self._waiting, *(call for batch in self._under_way for call in batch.calls)]

    def _set_timer(self, at_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if at_s == math.inf else self._loop.call_at(at_s, self._expire)
        self._timer_s = at_s

    def _expire(self) -> None:
        now_s, next_s = self._loop.time(), math.inf
        for call in self._calls():
            if call.late_s <= now_s:
                self._fail(call, PeerTimeout("no answer in time"))
            elif not call.done():
                next_s = min(next_s, call.late_s)
        self._set_timer(next_s)


class _Batch:
    """A batch under way, which is cancelled when all its calls are."""

    __slots__ = ("_callers", "calls", "work")

    def __init__(self, calls: list[Call]) -> None:
        self.calls = calls
        self.work: Later[Sequence[pb.Answer]] = Later()  # until it is sent
        self._callers = len(calls)
        for call in calls:
            call.on_cancel = self._leave

    def _leave(self) -> None:
        self._callers -= 1
        if not self._callers:
            self.work.cancel()
