"""A batch of forwarded calls at the owner: each item becomes a call, and its outcome an answer.

    peer.py ── Batch ──> `answer` ── item by item ──> method table: a method of the SessionManager
       <── Answers ── at once, if all items are ────────┤ answered at once: from the cache
       <── later ──── when the last item is ────────────┘ a Later, or a coroutine, which gets a task

Items wait for the storage together, and share its batches. An item fails alone: its error becomes the status
of its answer.

Late items
----------
An item carries `deadline_us`, an instant on the storage's clock: from then on the entry node may do the work
itself. Two nodes' estimates of that clock differ by less than `CLOCK_ERROR_US`, hence two rules:

- An item that arrives after `deadline_us` plus that error is not begun. It was held up by a stalled process
  or network, and the entry node has already asked the storage.
- A write of an item is not done after `deadline_us` minus that error. The statement itself checks it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Final

from aio.later import Later, Outcome, begun
from aio.rate_limit import LogRateLimiter, fields_of
from aio.tasks import Tasks
from cluster.peerpb import peer_pb2 as pb
from http2.status import StatusCode
from mnemosyned.api import session_manager
from mnemosyned.api.forwarded import CLOCK_ERROR_US, Arrival, ForwardedCall
from mnemosyned.errors import DeadlineExceeded, StorageUnavailable, Unimplemented
from mnemosyned.sessions.encoded import joined
from mnemosyned.transport.call import Encoded, await_in_time, failure_of
from mnemosyned.transport.methods import MethodTable

log = logging.getLogger(__name__)

# Below the largest message that the entry node accepts, or the whole batch would fail. The entry node gets
# the answers beyond this limit from the storage.
_MAX_RESPONSE_BYTES: Final = 32 * 1024**2
_METHOD_PREFIX: Final = f"/{session_manager.SERVICE_NAME}/"
_BUGS: Final = LogRateLimiter(10)
_TOO_LARGE: Final = pb.Answer(
    code=StatusCode.UNAVAILABLE.value, text="mnemosyned: the batch's answers are too large together"
)


class ForwardedBatches:
    """Handles the batches of all peers."""

    def __init__(self, calls: MethodTable, *, storage_now_us: Callable[[], int]) -> None:
        """Handle items by the methods of `calls`. `storage_now_us` is in microseconds since the epoch."""
        self._calls = calls
        self._storage_now_us = storage_now_us
        self._tasks = Tasks("forwarded_call")

    def answer(self, batch: pb.Batch, peer: str) -> bytes | Later[bytes]:
        """Return the serialized Answers, one for each item; at once if the cache has them all."""
        answers = pb.Answers()
        add = answers.answers.add
        arrival = Arrival(self._storage_now_us(), time.monotonic(), peer)
        waiting = _Waiting(answers, self._tasks)
        for item in batch.items:
            self._begin(item, add(), arrival, waiting)
        return waiting.answer()

    def _begin(self, item: pb.Item, answer: pb.Answer, arrival: Arrival, waiting: _Waiting) -> None:
        """Fill an item's answer in if the cache has it, otherwise have it waited for."""
        retried_name = item.retried_method
        name = retried_name or item.method
        method = self._calls.unary.get(_METHOD_PREFIX + name)
        if method is None:
            _fail(answer, item, Unimplemented(f"mnemosyned: unknown method {name[:100]}"))
            return
        if arrival.storage_us > item.deadline_us + CLOCK_ERROR_US:
            # Begun now, a write could follow the one that the entry node has done itself.
            _fail(answer, item, DeadlineExceeded())
            return
        forwarded = ForwardedCall(item, arrival, is_retry=bool(retried_name))
        try:
            response = method.handle(item.message, forwarded)
        except Exception as exc:  # noqa: BLE001  # the root of a call: becomes its status
            _fail(answer, item, exc)
            return
        # As in transport/call.py, faster than asking for a Coroutine.
        if not (isinstance(response, bytes) or isinstance(response, tuple)):  # noqa: SIM101
            waiting.add(response, item, answer, forwarded)
            return
        answer.message = joined(response)
        if (grant := forwarded.grant) is not None:
            answer.keep_us, answer.instance, answer.expires_at_us = grant


class _Waiting:
    """The items of a batch that are not answered yet."""

    __slots__ = ("_answers", "_left", "_tasks", "_whole", "_works")

    def __init__(self, answers: pb.Answers, tasks: Tasks) -> None:
        self._answers = answers
        self._tasks = tasks
        self._whole: Later[bytes] = Later()
        self._works: list[Later[Encoded]] = []
        self._left = 1  # until `answer`, when all have begun

    def add(
        self,
        response: Later[Encoded] | Coroutine[Any, Any, Encoded],
        item: pb.Item,
        answer: pb.Answer,
        call: ForwardedCall,
    ) -> None:
        """Fill an answer in when the response is known.

        A Later knows the deadline. A coroutine is kept to it.
        """
        if not isinstance(response, Later):
            response = begun(await_in_time(response, call), self._tasks)
        self._left += 1
        self._works.append(response)
        response.then(partial(self._take, item, answer, call))

    def answer(self) -> bytes | Later[bytes]:
        """Return the answers once all items have begun."""
        self._left -= 1
        if not self._left:
            return _response(self._answers)
        self._whole.on_cancel = self._cancel
        return self._whole

    def _take(self, item: pb.Item, answer: pb.Answer, call: ForwardedCall, outcome: Outcome[Encoded]) -> None:
        if isinstance(outcome, bytes | tuple):
            answer.message = joined(outcome)
        elif isinstance(outcome, Exception):
            _fail(answer, item, outcome)
        elif isinstance(outcome, BaseException):
            # Cancelled: this node is ending, or the peer waits no more.
            _fail(answer, item, StorageUnavailable("mnemosyned: the owner has given the call up"))
        else:
            self.add(outcome, item, answer, call)
        self._left -= 1
        if not self._left:
            self._whole.set_result(_response(self._answers))

    def _cancel(self) -> None:
        for work in self._works:
            work.cancel()


def _response(answers: pb.Answers) -> bytes:
    """Return the answers in the sequence of their items, which is how the entry node tells them apart."""
    size_bytes = 0
    for answer in answers.answers:
        size_bytes += len(answer.message)
        if size_bytes > _MAX_RESPONSE_BYTES:
            # UNAVAILABLE sends the entry node to the storage (router.py). If the item was a write that is
            # done, the entry node's retry accepts that, as after a lost connection.
            answer.CopyFrom(_TOO_LARGE)
    return answers.SerializeToString()


def _fail(answer: pb.Answer, item: pb.Item, exc: Exception) -> None:
    # Only a bug is logged above DEBUG. What the client gets in the end is logged at the entry node, with the
    # client's address.
    failure = failure_of(exc)
    method = (item.retried_method or item.method)[:100]
    fields = {"method": method, "code": failure.code.name, "request_id": item.request_id[:200]}
    if failure.is_bug:
        left_out = _BUGS.take(time.monotonic())
        if left_out is not None:
            log.error("forwarded_call_failed", extra=fields | fields_of(left_out), exc_info=exc)
    else:
        log.debug("forwarded_call_failed", extra=fields | {"error": failure.text})
    answer.code, answer.text = failure.code.value, failure.text
