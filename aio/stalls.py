"""How long a request may have lain in a socket, because the event loop did not come round to read it.

A process that is stopped, or whose loop is busy, reads nothing. What clients send meanwhile waits in the
sockets, and no protocol says when it was sent. What is known is when the loop was last in time:

    beat      beat                                   late beat
     |---------|----------- stands still --------------|-- memory --|
               |<── sent somewhere in here ── read ──> |            |
                                 `waited_s` is measured from the beat before

- A beat that is overdue by more than _SLACK_S tells of a stall, already before it has come: the loop may read
  the sockets first.
- What is read shortly after a stall may still be from it: a connection is accepted after others are read.
  Hence the memory, of some time and of _ROUNDS rounds of the loop, since a round may take longer. It has a
  bound, so that a loop that is always late measures its last stalls, and not all of them. Input that takes
  several reads is the reader's to remember (`mnemosyned/transport/input_age.py`).
- A stall below _PERIOD_S + _SLACK_S may go unseen. A request then counts as sent when it is read.

The clock also counts the time in which the machine was suspended.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from aio.units import NS_PER_S

_PERIOD_S: Final = 0.05
_SLACK_S: Final = 0.05
# In one, all that lies in the sockets is read; in the next, that of connections it has accepted. The first
# that is counted may end before it has read anything.
_ROUNDS: Final = 3
_IN_TIME_NS: Final = round((_PERIOD_S + _SLACK_S) * NS_PER_S)


class StallWatch:
    """The beats of one event loop, from `start` to `stop`; without them no stall is seen."""

    def __init__(
        self, uptime_ns: Callable[[], int], *, memory_s: float = 0.1, memory_part: float = 0.0
    ) -> None:
        """`uptime_ns` never goes back.

        A stall is remembered for `memory_s` after its end, and longer by `memory_part` of its length.
        """
        self._uptime_ns = uptime_ns
        self._memory_ns = round(memory_s * NS_PER_S)
        self._memory_part = memory_part
        self._beaten_ns = 0
        # Their beginnings, their ends, and the rounds in which these were seen; as short as the memory.
        self._stalls: deque[tuple[int, int, int]] = deque()
        self._round = 0  # counted while the last stall is younger than _ROUNDS
        self._counter: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Beat until `stop`, on the running loop."""
        self._beaten_ns = self._uptime_ns()
        self._beat_later()

    def stop(self) -> None:
        """Beat no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._counter is not None:
            self._counter.cancel()
            self._counter = None
        self._stalls.clear()

    def waited_s(self) -> float:
        """Return how long ago the oldest request that is read now may have been sent; 0: it is new."""
        if self._timer is None:
            return 0.0
        now_ns = self._uptime_ns()
        if self._stalls:
            return (now_ns - self._stalls[0][0]) / NS_PER_S
        silence_ns = now_ns - self._beaten_ns
        return silence_ns / NS_PER_S if silence_ns > _IN_TIME_NS else 0.0

    def _beat_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_PERIOD_S, self.beat)

    def beat(self) -> None:
        """Note that the loop is running now."""
        now_ns = self._uptime_ns()
        if now_ns - self._beaten_ns > _IN_TIME_NS:
            self._stalls.append((self._beaten_ns, now_ns, self._round))
            if self._counter is None:
                self._counter = asyncio.get_running_loop().call_soon(self.count_round)
        while self._stalls and self._is_past(*self._stalls[0], now_ns):
            self._stalls.popleft()
        self._beaten_ns = now_ns
        self._beat_later()

    def _is_past(self, begun_ns: int, ended_ns: int, ended_round: int, now_ns: int) -> bool:
        memory_ns = self._memory_ns + self._memory_part * (ended_ns - begun_ns)
        return now_ns - ended_ns > memory_ns and self._round - ended_round >= _ROUNDS

    def count_round(self) -> None:
        """Note that the loop has come round once more."""
        self._round += 1
        self._counter = None
        if self._stalls and self._round - self._stalls[-1][2] < _ROUNDS:
            self._counter = asyncio.get_running_loop().call_soon(self.count_round)
