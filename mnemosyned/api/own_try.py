"""The first try of a client's write on this node's own storage, which leaves time for another member's.

The storage does no part of the write after the try's deadline. If it has not answered a moment later, the
router leaves it, and asks another member (router.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from aio.deadline import Deadline
from aio.expiry import Expiry
from mnemosyned.transport.call import Call

# The storage does a write of this node only in this part of its caller's time, and so long at most: another
# member may do it in the rest.
_OWN_TRY_PART: Final = 0.6
_OWN_TRY_S: Final = 2.0
# A storage that answers refuses the write by then.
_REFUSAL_S: Final = 0.03


class Limit:
    """When a storage that has not answered is left. Waits in an Expiry, without a timer of its own."""

    __slots__ = ("_at_s", "_expiry", "leave")

    def __init__(self, expiry: Expiry, leave: Callable[[], None]) -> None:
        self._expiry = expiry
        self._at_s = 0.0  # never
        self.leave: Callable[[], None] | None = leave  # None: it has answered

    def extend(self, until_s: float) -> None:
        """Let the storage have until then for a part of the work that begins; 0: none has begun."""
        is_waiting = self._at_s > 0
        self._at_s = until_s + _REFUSAL_S if until_s else 0.0
        if self._at_s and not is_waiting:
            self._expiry.add(self, self._at_s - time.monotonic())

    def done(self) -> bool:
        """See Waiting."""
        return self.leave is None

    def expire(self) -> None:
        """Leave, unless another part has begun meanwhile."""
        left_s = self._at_s - time.monotonic()
        if left_s > 0:
            self._expiry.add(self, left_s)
        elif self.leave is not None:
            self.leave()


class OwnTry:
    """A client's write, as this node's storage gets it first: with time left for a retry. A Call.

    The storage does no part of it after `until_s`, on `time.monotonic()`. Each part, such as a step of a
    Delete, has an end of its own: `deadline` is asked when it begins.
    """

    __slots__ = ("_call", "_expiry", "_limit", "certificate_names", "owner", "peer", "until_s")

    def __init__(self, call: Call, expiry: Expiry) -> None:
        self._call = call
        self._expiry = expiry
        self._limit: Limit | None = None  # while the storage is awaited
        self.peer = call.peer
        self.certificate_names = call.certificate_names
        self.owner = call.owner
        self.until_s = 0.0  # nothing has begun

    def limited(self, leave: Callable[[], None]) -> Limit:
        """Have `leave` called when the storage has had its time, from the first part on, and not answered."""
        self._limit = limit = Limit(self._expiry, leave)
        limit.extend(self.until_s)
        return limit

    @property
    def deadline(self) -> Deadline:
        """See Call."""
        left_s = self._call.deadline.of_write().left_s()
        limit = Deadline.in_s(_OWN_TRY_S if left_s is None else min(_OWN_TRY_PART * left_s, _OWN_TRY_S))
        self.until_s = limit.at_s
        if self._limit is not None:
            self._limit.extend(limit.at_s)
        return limit

    def metadata(self, key: str) -> str | None:
        """See Call."""
        return self._call.metadata(key)
