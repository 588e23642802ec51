"""How long a suspect has left: Lifeguard's suspicion, and a shorter one for refused connections. Pure.

Source: Dadgar, Phillips, Currey, "Lifeguard: Local Health Awareness for More Accurate Failure Detection"
(2018), section IV-B. A suspicion begins with the longest time, and each independent accuser shortens it. A
node whose own network is bad is alone with its accusation, so the suspect has the longest time to refute it:

    time = max(min_s, max_s - (max_s - min_s) * log(c + 1) / log(k + 1))

Here c is the number of accusers besides the first, at most k. With k of them the time is `min_s`. The
logarithm makes the first confirmations count most.

Beyond the paper: a refused dial shows that a process is gone, which no silence can show. If enough members
were refused, the suspect has `refused_s` from the first of these dials.
"""

from __future__ import annotations

import math
from typing import Final

# More accusers would change nothing, and a large cluster has many.
_MAX_ACCUSERS: Final = 16


class Suspicion:
    """The case against one member at one incarnation. Times are seconds on the caller's clock.

    It ends when the member refutes, is declared dead or leaves: swim.py then drops it.
    """

    __slots__ = (
        "_accusers",
        "_confirmations",
        "_first_refused_s",
        "_max_s",
        "_min_s",
        "_refusals_needed",
        "_refused_s",
        "_refusers",
        "began_s",
    )

    def __init__(  # the parameters of the paper
        self,
        *,
        now: float,
        min_s: float,
        max_s: float,
        confirmations: int,
        refused_s: float,
        refusals_needed: int,
    ) -> None:
        """Begin; `confirmations` independent accusers besides the first bring the time down to `min_s`."""
        self.began_s = now
        self._min_s = min_s
        self._max_s = max_s
        self._confirmations = confirmations
        self._refused_s = refused_s
        self._refusals_needed = refusals_needed
        # Dictionaries and not sets, so that every process iterates them in the same sequence.
        self._accusers: dict[str, None] = {}
        self._refusers: dict[str, None] = {}
        self._first_refused_s = math.inf

    @property
    def confirmations(self) -> int:
        """Independent accusers besides the first."""
        return max(0, len(self._accusers) - 1)

    @property
    def is_refused(self) -> bool:
        """Whether refused connections alone are enough."""
        return len(self._refusers) >= self._refusals_needed

    def accuse(self, accuser: str, *, is_refused: bool, now: float) -> bool:
        """Take an accusation in; return whether it says something that other members should hear.

        Only accusations that shorten the time are passed on. Else n accusers would cause n times n packets.
        """
        is_new = accuser not in self._accusers and len(self._accusers) <= self._confirmations
        if len(self._accusers) < _MAX_ACCUSERS:
            self._accusers[accuser] = None
        if is_refused and accuser not in self._refusers and len(self._refusers) < self._refusals_needed:
            self._refusers[accuser] = None
            self._first_refused_s = min(self._first_refused_s, now)
            is_new = True
        return is_new

    @property
    def deadline_s(self) -> float:
        """When the suspect is dead unless it has refuted."""
        if self._confirmations < 1:
            slow_s = self.began_s + self._min_s
        else:
            done = math.log(min(self.confirmations, self._confirmations) + 1) / math.log(
                self._confirmations + 1
            )
            slow_s = self.began_s + max(self._min_s, self._max_s - (self._max_s - self._min_s) * done)
        if self.is_refused:
            return min(slow_s, self._first_refused_s + self._refused_s)
        return slow_s

    def shift(self, seconds: float) -> None:
        """Grant the time in which this node itself was stalled, and could read no refutation."""
        self.began_s += seconds
        self._first_refused_s += seconds
