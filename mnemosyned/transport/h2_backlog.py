"""Work that waits for its turn, so that a client that sends or reads much does not delay the others.

    data_received ── little ──────────────> taken at once
         └────────── much ──> Backlog ── a slice of each connection in turn, for _TURN_S ──> taken, or sent
    answers ──────── held ───────^ └── then the event loop serves other connections, and comes back

The kernel hands over up to 256 KiB at a time: thousands of requests or frames, which take tens of
milliseconds. With ten such clients, a client with one request would wait for all of them. Its own input is
little, so it does not wait here. While input of a connection waits, nothing more is read from it.

What waits has a bound. Long before it, no further connection is accepted: connections that flood and are
closed again at once would otherwise leave their input here.

Answers that are held (http2/outbox.py) are sent in turns as well: a hundred clients that each read megabytes
would otherwise fill one round of the event loop.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final, Protocol

AT_ONCE_BYTES: Final = 4096  # up to here input is little: some dozens of requests
_SLICE_BYTES: Final = 8 * 1024
_TURN_S: Final = 0.003
# Beyond the first no connection is accepted, and beyond the second input is taken at once.
_MANY_BYTES: Final = 32 * 1024**2
_MAX_BYTES: Final = 128 * 1024**2


class Taker(Protocol):
    """A connection, as the backlog sees it."""

    def take_input(self, data: bytes) -> None:
        """Take what has arrived."""
        ...

    def hold_input(self, is_held: bool) -> None:  # noqa: FBT001  # the state itself
        """Read nothing more from the client for now, or read again."""
        ...

    def send_held(self) -> None:
        """Send a slice of what is held, and ask for another turn if there is more."""
        ...


class Backlog:
    """The input of all connections of an engine that waits for its turn."""

    def __init__(self) -> None:
        # With where the rest begins; the first is the next.
        self._waiting: dict[Taker, tuple[bytes, int]] = {}
        self._size_bytes = 0  # of all that waits, also what a slice was taken of
        self._sending: dict[Taker, None] = {}
        self._is_due = False

    @property
    def is_busy(self) -> bool:
        """Whether so much waits that no other connection should be accepted."""
        return self._size_bytes >= _MANY_BYTES

    def put(self, taker: Taker, data: bytes) -> None:
        """Take input into the backlog, behind that of other connections."""
        former = self._waiting.get(taker)
        if former is not None:
            # What TLS had read already.
            self._size_bytes -= len(former[0])
            data = former[0][former[1] :] + data
        elif self._size_bytes >= _MAX_BYTES:
            taker.take_input(data)
            return
        else:
            taker.hold_input(True)
        self._waiting[taker] = (data, 0)
        self._size_bytes += len(data)
        self._be_due()

    def put_sender(self, taker: Taker) -> None:
        """Have a connection send what it holds, in its turn."""
        self._sending[taker] = None
        self._be_due()

    def drain(self, taker: Taker) -> None:
        """Have a connection take what waits of its input now."""
        data, at = self._waiting.pop(taker, (b"", 0))
        self._size_bytes -= len(data)
        if at < len(data):
            taker.hold_input(False)
            taker.take_input(data[at:])

    def drop(self, taker: Taker) -> None:
        """Forget what waits of a connection."""
        data, _ = self._waiting.pop(taker, (b"", 0))
        self._size_bytes -= len(data)
        self._sending.pop(taker, None)

    def _be_due(self) -> None:
        if (self._waiting or self._sending) and not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._take_turn)

    def _take_turn(self) -> None:
        self._is_due = False
        until_s = time.monotonic() + _TURN_S
        try:
            while (self._waiting or self._sending) and time.monotonic() < until_s:
                if self._waiting:
                    self._take_slice()
                if self._sending:
                    sender = next(iter(self._sending))
                    del self._sending[sender]
                    sender.send_held()
        finally:
            self._be_due()

    def _take_slice(self) -> None:
        taker = next(iter(self._waiting))
        data, at = self._waiting.pop(taker)
        after = at + _SLICE_BYTES
        if after < len(data):
            # Before it takes the slice, after which it may be gone.
            self._waiting[taker] = (data, after)
        else:
            self._size_bytes -= len(data)
            taker.hold_input(False)
        taker.take_input(data[at:after])
