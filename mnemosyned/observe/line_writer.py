"""Writing lines to a descriptor that may be stuck, full or closed, without ever waiting for it.

    put(line) ──> queue, at most MAX_QUEUED_BYTES ──> thread ── write(2) ──> pipe, file or terminal
        │                                                │
        └── full: dropped, counted                       └── refused by the system: dropped, counted

A collector of logs that reads no more fills the pipe, and the next `write` waits for it without a limit. On
the event loop that would stop every call, the membership and the drain. Here only the thread waits.

Rules:

- Lines keep their sequence. A line is written whole or cut at its end, never mixed with another.
- A line that the system refuses (no space, no reader) is not tried again. The next one is, so that a disk
  that has space again is used at once.
- The first line after dropped ones is preceded by a line that says how many (`render_dropped`).
- `flush` and `close` wait a bounded time for what is queued. The thread is a daemon: it never holds the
  process.
"""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

# Minutes of a normal log, and little beside the memory of the daemon.
MAX_QUEUED_BYTES: Final = 4 * 1024 * 1024
# What a queued line costs besides its bytes.
_LINE_OVERHEAD_BYTES: Final = 100


class LineWriter:
    """Writes lines to a descriptor on a thread of its own; every method is safe from any thread.

    If no thread can be started, `put` writes, and may wait.
    """

    def __init__(self, descriptor: int, *, render_dropped: Callable[[int, str], str] | None = None) -> None:
        """`render_dropped` makes the line, with its end, from how many lines were dropped and why."""
        self.descriptor = descriptor  # where the lines go; may be replaced
        self._render_dropped = render_dropped
        self._lines: deque[bytes] = deque()
        self._queued_bytes = 0
        self._is_closed = False
        self._is_writing = False
        self._changed = threading.Condition()
        self._dropped = 0  # in all
        self._untold = 0  # since the last line that said how many
        self._reason = ""
        self._is_cut = False  # the last line was written without its end
        self._is_threaded = True
        try:
            threading.Thread(target=self._run, name="log", daemon=True).start()
        except RuntimeError:
            # No thread can be started, and a start that fails for that reason must be able to say so.
            self._is_threaded = False

    @property
    def dropped(self) -> int:
        """How many lines were dropped."""
        return self._dropped

    def put(self, line: str) -> None:
        """Queue a line, with its end; drop it if the queue is full or closed. Returns at once."""
        encoded = line.encode(errors="backslashreplace")
        if not self._is_threaded:
            if not self._write(encoded):
                self._count_dropped(self._reason)
            return
        size_bytes = len(encoded) + _LINE_OVERHEAD_BYTES
        with self._changed:
            if self._is_closed or self._queued_bytes + size_bytes > MAX_QUEUED_BYTES:
                self._count_dropped("the reader of the log is too slow")
                return
            self._lines.append(encoded)
            self._queued_bytes += size_bytes
            self._changed.notify_all()

    def flush(self, *, timeout_s: float) -> bool:
        """Wait at most so long until all is written; tell whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._lines and not self._is_writing, timeout_s)

    def close(self, *, timeout_s: float) -> bool:
        """Write what is queued, and take no more lines; tell whether all was written within the time.

        Only the first call waits: the interpreter closes all handlers of logs once more at its end.
        """
        with self._changed:
            is_first, self._is_closed = not self._is_closed, True
            self._changed.notify_all()
        return self.flush(timeout_s=timeout_s if is_first else 0)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._lines or self._is_closed)
                if not self._lines:
                    return
                self._is_writing = True
                line = self._lines.popleft()
                self._queued_bytes -= len(line) + _LINE_OVERHEAD_BYTES
                untold, reason = self._untold, self._reason
            if untold and self._tell_dropped(untold, reason):
                with self._changed:
                    self._untold -= untold
            if not self._write(line):
                with self._changed:
                    self._count_dropped(self._reason)

    def _tell_dropped(self, count: int, reason: str) -> bool:
        if self._render_dropped is None:
            return True
        return self._write(self._render_dropped(count, reason).encode(errors="backslashreplace"))

    def _write(self, line: bytes) -> bool:
        """Write a line; tell whether the system took it whole. Waits as long as the reader does not read."""
        # After a line that was cut, another line begins.
        rest = memoryview(b"\n" + line if self._is_cut else line)
        while rest:
            try:
                written = os.write(self.descriptor, rest)
            except BlockingIOError:
                # Whoever gave us the pipe may have made it non-blocking.
                wait_until_writable(self.descriptor)
                continue
            except OSError as exc:
                self._reason = exc.strerror or type(exc).__name__
                return False
            rest = rest[written:]
            self._is_cut = bool(rest)
        return True

    def _count_dropped(self, reason: str) -> None:
        self._dropped += 1
        self._untold += 1
        self._reason = reason


def wait_until_writable(descriptor: int) -> None:
    """Wait until a non-blocking descriptor takes something, or fails."""
    poll = select.poll()
    poll.register(descriptor, select.POLLOUT)
    poll.poll()
