"""Which of several processes accepts the next connection, where all of them listen on the same sockets.

The workers of one daemon (workers/) inherit its listening sockets, so the kernel has one queue for all of
them. Whoever calls `accept` first gets the connection:

- A worker that is dead or just starting accepts nothing, and no connection waits for it. With a queue for
  each worker (SO_REUSEPORT) the kernel would go on filling the queue of a dead one, and reset it at its end.
- Connections of gRPC live for an hour, and a client often has a single one. So they are spread by count: a
  worker that has more connections than another one leaves the next one to that one. A hash of the client's
  port, as with SO_REUSEPORT, gives both of two connections to the same of two workers every second time.

The processes tell one another by a table in shared memory, with one row for each:

    row k    serving (0 or 1) | accepting (0 or 1) | open connections         written by worker k alone;
                                                                              cleared when it is dead

A number is written and read in one step. A worker that read a number just before it changed accepts one
connection more, or waits one round longer: no harm.

A sibling may be stalled. A worker has patience for a moment; if no sibling has taken anything by then, it
accepts all that comes until a sibling's row changes.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from typing import Final

_FIELDS: Final = 3
_SERVING, _ACCEPTING, _OPEN = range(_FIELDS)
_NUMBER_BYTES: Final = 4
# Two looks at the queue (acceptor.py).
_PATIENCE_S: Final = 0.02


class Rows:
    """The table, of so many workers; each process maps the same file."""

    def __init__(self, number: int, count: int) -> None:
        """Map the file of this number, which has `table_bytes`."""
        self.count = count
        self._memory = mmap.mmap(number, table_bytes(count))
        self._numbers = memoryview(self._memory).cast("I")

    def clear(self, worker: int) -> None:
        """Take note that a worker, counted from 1, is no more."""
        for field in range(_FIELDS):
            self.put(worker, field, 0)

    def put(self, worker: int, field: int, value: int) -> None:
        """Write one number of a worker's row."""
        self._numbers[(worker - 1) * _FIELDS + field] = value

    def get(self, worker: int, field: int) -> int:
        """Read one number of a worker's row."""
        return self._numbers[(worker - 1) * _FIELDS + field]

    def close(self) -> None:
        """Unmap."""
        self._numbers.release()
        self._memory.close()


def table_bytes(count: int) -> int:
    """Return the size of the file for so many workers."""
    return count * _FIELDS * _NUMBER_BYTES


class Turns:
    """One worker's view of the table: when it accepts, and what it leaves to its siblings."""

    def __init__(self, rows: Rows, worker: int, *, now_s: Callable[[], float] = time.monotonic) -> None:
        """`worker` is the number of this one, from 1."""
        self._rows = rows
        self._worker = worker
        self._siblings = [number for number in range(1, rows.count + 1) if number != worker]
        self._now_s = now_s
        self._waits_since_s: float | None = None  # for a sibling to accept
        self._stalled: list[int] = []  # what the siblings had when they had let a moment pass
        rows.clear(worker)
        rows.put(worker, _ACCEPTING, 1)

    def serve(self) -> None:
        """Take note that this worker answers calls."""
        self._rows.put(self._worker, _SERVING, 1)

    def show(self, open_connections: int) -> None:
        """Take note of how many connections this worker has."""
        self._rows.put(self._worker, _OPEN, open_connections)

    def may_accept(self, open_connections: int) -> bool:
        """Tell whether the next connection is this worker's, which has so many.

        A worker that does not serve yet accepts only if none serves: its clients then get an answer, as those
        of a daemon that waits for its storage do.
        """
        others = [self._rows.get(one, _OPEN) for one in self._siblings if self._rows.get(one, _SERVING)]
        if not self._rows.get(self._worker, _SERVING):
            return not others
        if not others or open_connections <= min(others) or others == self._stalled:
            self._waits_since_s = None
            return True
        if self._waits_since_s is None:
            self._waits_since_s = self._now_s()
        if self._now_s() - self._waits_since_s < _PATIENCE_S:
            return False
        self._waits_since_s, self._stalled = None, others
        return True

    def give_up(self) -> bool:
        """Accept no more; tell whether no sibling accepts either: then this worker takes what waits."""
        self._rows.put(self._worker, _SERVING, 0)
        # Written before the siblings' are read. So of two that end together, one at least takes what waits.
        self._rows.put(self._worker, _ACCEPTING, 0)
        return not any(self._rows.get(one, _ACCEPTING) for one in self._siblings)
