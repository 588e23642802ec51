"""How often each caller has guessed within a window of time, in bounded memory. Pure.

Callers are many, and an attacker with an IPv6 network or a botnet can be any number of them. A dictionary of
callers would fill the memory. An LRU (least recently used) cache would let many addresses flush the entry of
a heavy guesser. Therefore:

- **Space-Saving** keeps the callers that count most. A new caller takes the place of the caller with the
  least count, and inherits that count as its possible error. (Metwally, Agrawal, El Abbadi: "Efficient
  computation of frequent and top-k elements in data streams", 2005.)
- **Two windows** make a rate of the counts, as in the limiters of proxies: the count of the current window,
  and of the window before it the share that is still within the time asked for. A caller that spreads its
  guesses over the end of a window is thus found too.

Invariants of one table, for N guesses and room for k callers:

1. It has at most k callers.
2. `sure` <= the caller's own guesses <= `count`. Only `sure` accuses a caller, so that the guesses of others
   never do.
3. Every caller with more than N / k guesses is in the table. To flush a caller with c guesses, others must
   make k * c guesses within the window.

Each step takes constant time, because an attacker chooses the callers: callers with equal counts are in one
bucket, and a guess moves its caller to the next bucket. The victim is the last caller of the least bucket,
since `popitem` takes constant time, and the first item of a dictionary may take a search.

Rules for editing:
- Time is an argument, on a monotonic clock.
- What grows with a caller is in `_Tally`, so that it goes with the caller.
"""

from __future__ import annotations

import math
from typing import Final, Generic, TypeVar

# With the defaults, flushing a caller that is over the threshold takes 8,192 * 1,000 guesses of others in a
# minute, or 136,000 a second. Both windows together take 6 MB at most.
MAX_CALLERS: Final = 8192

K = TypeVar("K")


class _Tally:
    """What is known of one caller in one window."""

    __slots__ = ("count", "error", "quiet_until_s")

    def __init__(self, inherited: int) -> None:
        self.count = inherited  # at least the caller's own guesses
        self.error = inherited  # of these, at most so many were the guesses of others
        self.quiet_until_s = -math.inf  # until then, the caller is not reported again

    @property
    def sure(self) -> int:
        return self.count - self.error


class _Window(Generic[K]):
    """The callers with the most guesses of one window."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._tallies: dict[K, _Tally] = {}
        # Dictionaries in place of sets: a set has no `pop` that takes constant time in any case.
        self._callers_by_count: dict[int, dict[K, None]] = {}
        self._least = 0  # the least count in the table

    def __len__(self) -> int:
        return len(self._tallies)

    def get(self, caller: K) -> _Tally | None:
        return self._tallies.get(caller)

    def add(self, caller: K) -> _Tally:
        """Count a guess; return the caller's tally."""
        tally = self._tallies.get(caller)
        if tally is None:
            return self._admitted(caller)
        count, buckets = tally.count, self._callers_by_count
        bucket = buckets[count]
        del bucket[caller]
        tally.count = count + 1
        if bucket:
            buckets.setdefault(count + 1, {})[caller] = None
            return tally
        del buckets[count]
        # A caller that is far ahead of the others takes its bucket along.
        buckets.setdefault(count + 1, bucket)[caller] = None
        if count == self._least:
            self._least = count + 1
        return tally

    def _admitted(self, caller: K) -> _Tally:
        buckets = self._callers_by_count
        if len(self._tallies) < self._capacity:
            tally = _Tally(0)
            self._least = 1
        else:
            least = self._least
            victim, _ = buckets[least].popitem()
            del self._tallies[victim]
            if not buckets[least]:
                del buckets[least]
                self._least = least + 1  # where the new caller goes
            tally = _Tally(least)
        tally.count += 1
        self._tallies[caller] = tally
        buckets.setdefault(tally.count, {})[caller] = None
        return tally


class GuessCounter(Generic[K]):
    """Counts guesses by caller, and tells how many a caller has made within the last `window_s` seconds."""

    def __init__(self, window_s: float, *, capacity: int = MAX_CALLERS) -> None:
        self._window_s = window_s
        self._capacity = capacity
        self._began_s = -math.inf
        self._current: _Window[K] = _Window(capacity)
        self._previous: _Window[K] = _Window(capacity)

    def count(self, caller: K, *, now_s: float) -> int:
        """Count a guess; return how many the caller has made within the window, this one included.

        Exact within the first window after a pause of two. Otherwise the guesses of the window before are
        taken as spread evenly over it. Never more than the caller has made in both windows.
        """
        if now_s - self._began_s >= self._window_s:
            self._turn(now_s)
        tally = self._current.add(caller)
        before = self._previous.get(caller)
        if before is None:
            return tally.sure
        share = 1 - (now_s - self._began_s) / self._window_s
        return tally.sure + int(before.sure * share)

    def may_report(self, caller: K, *, now_s: float) -> bool:
        """Tell whether the caller that was just counted is due for a report: once in `window_s`."""
        tally, before = self._current.get(caller), self._previous.get(caller)
        assert tally is not None, "count first"
        if now_s < tally.quiet_until_s or (before is not None and now_s < before.quiet_until_s):
            return False
        tally.quiet_until_s = now_s + self._window_s
        return True

    def callers(self, *, now_s: float) -> int:
        """Return how many callers have guessed in the current window, at most the capacity."""
        return len(self._current) if now_s - self._began_s < self._window_s else 0

    def _turn(self, now_s: float) -> None:
        if now_s - self._began_s < 2 * self._window_s:
            self._previous, self._began_s = self._current, self._began_s + self._window_s
        else:
            # A new window begins with its first guess, so that a burst after a pause is within one.
            self._previous, self._began_s = _Window(self._capacity), now_s
        self._current = _Window(self._capacity)
