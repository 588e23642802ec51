"""Judges histories: whether what was read agrees with what was acknowledged before. Pure.

Each session is judged alone, and each key of its bag is a register. A write takes effect at one instant of
its interval: from its begin to its answer, or to its deadline if it failed ("maybe"). It has no effect at all
if it never reached a node. One write *precedes* another if its interval ends before that of the other begins.

A read accuses a node only if no order explains it:

- It saw a value. Then the write of this value is *overwritten* if it precedes an acknowledged write or end
  that was answered before the read began.
- It saw the session. Then some Start must be left that precedes no acknowledged end of this kind.
- It saw no session. Then some end, or the time before all, must be left that precedes no proof of life of
  this kind: an acknowledged Start, SetValue.

Reads prove nothing to one another: while a write is under way, a node may serve the old bag after another
node has served the new one. Only what was acknowledged is promised.

Every rule is necessary for a correct history, so there is no false alarm. They are not sufficient together:
an order that breaks no rule for each read alone may still not exist for all reads.

A write answers from the storage, so what it finds is what the storage has: a change that is missing there is
lost, or undone by a write that came late. A read may have found a cached copy.

Each rule is a search in a sorted list, so a history takes n log n.
"""

from __future__ import annotations

import enum
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from faults.history import DONE_OR_UNKNOWN, ENDS, READS, UNKNOWN, Kind, Operation, Outcome

# A failed write may end this much after its deadline. The node counts the time that the call gives it from
# when it reads the call, and a busy machine lets it read late.
LATE_BY_S: Final = 0.5


class Anomaly(enum.Enum):
    """How a promise can be broken."""

    STALE = "stale"  # a node served a session after its end was acknowledged
    OLD_BAG = "old bag"  # a node served a bag after a newer one was acknowledged
    HIDDEN = "hidden"  # a node denied a session after its Start was acknowledged
    LOST = "lost"  # the storage does not have an acknowledged change
    LATE = "late write"  # a failed write was done after its deadline


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One answer that nothing explains, and what it contradicts."""

    anomaly: Anomaly
    seen: Operation
    against: Operation
    cause: Operation | None  # what explains the answer best, but is over before `against` began
    key: str = ""

    @property
    def age_s(self) -> float:
        """How long after the acknowledgement the call began."""
        return self.seen.began_s - self.against.ended_s


def check(operations: Iterable[Operation]) -> list[Finding]:
    """Return what contradicts the promises, in the order of the calls."""
    by_token: dict[str, list[Operation]] = defaultdict(list)
    for one in operations:
        by_token[one.token].append(one)
    findings = [finding for history in by_token.values() for finding in _check_session(history)]
    return sorted(findings, key=lambda finding: finding.seen.began_s)


def _check_session(history: Sequence[Operation]) -> Iterator[Finding]:
    sent = [one for one in history if one.outcome is not Outcome.UNSENT]
    rules = _Rules(sent)
    for one in sent:
        if _found(one):
            yield from rules.check_presence(one)
        elif _missed(one):
            yield from rules.check_absence(one)


def _found(one: Operation) -> bool:
    # A Start that finds a session may have found that of its own first try, which the daemon repeated.
    return one.outcome is Outcome.DONE and (one.kind in READS or one.kind is Kind.SET)


def _missed(one: Operation) -> bool:
    # A Delete that the daemon repeats may say 0 after its own first try, so its number proves nothing.
    return one.outcome is Outcome.ABSENT and one.kind is not Kind.DELETE


class _Rules:
    """What the writes of one session allow."""

    def __init__(self, sent: Sequence[Operation]) -> None:
        starts = [one for one in sent if one.kind is Kind.START]
        ends = [one for one in sent if one.kind in ENDS]
        # An Abandon that finds nothing does nothing, but tells its caller that the session is gone.
        self._ends = _Acknowledged(one for one in ends if one.outcome is not Outcome.MAYBE)
        causes_of_absence = [
            one for one in ends if one.kind is Kind.DELETE or one.outcome is not Outcome.ABSENT
        ]
        self._causes_of_absence = _Latest(causes_of_absence)
        self._causes_of_presence = _Latest(starts)
        # Nothing shows which of several ends was done late. If one may have been, the storage lost nothing.
        self._failed_ends = _Latest(one for one in causes_of_absence if one.outcome in UNKNOWN)
        self._failed_starts = _Latest(one for one in starts if one.outcome in UNKNOWN)
        self._proofs_of_life = _Acknowledged(
            one for one in sent if one.kind in {Kind.START, Kind.SET} and one.outcome is Outcome.DONE
        )
        self._registers = _registers(sent)

    def check_presence(self, one: Operation) -> Iterator[Finding]:
        end = self._ends.before(one)
        if end is not None:
            start = self._causes_of_presence.until(one)
            if start is None or _over_s(start) < end.began_s:
                cause = start if one.kind in READS else self._failed_starts.until(one) or start
                yield Finding(anomaly=_name(one, cause, Anomaly.STALE), seen=one, against=end, cause=cause)
                return
        for key, value in one.seen.items():
            if key not in one.written and key in self._registers:
                yield from self._check_value(one, key, value)

    def _check_value(self, one: Operation, key: str, value: int) -> Iterator[Finding]:
        register = self._registers[key]
        overwriter = register.overwriters.before(one)
        if overwriter is None:
            return
        write = register.write_by_value.get(value)
        if write is None or _over_s(write) < overwriter.began_s:
            of_a_read = Anomaly.STALE if overwriter.kind in ENDS else Anomaly.OLD_BAG
            yield Finding(
                anomaly=_name(one, write, of_a_read), seen=one, against=overwriter, cause=write, key=key
            )

    def check_absence(self, one: Operation) -> Iterator[Finding]:
        proof = self._proofs_of_life.before(one)
        if proof is None:
            return
        end = self._causes_of_absence.until(one)
        if end is None or _over_s(end) < proof.began_s:
            cause = end if one.kind in READS else self._failed_ends.until(one) or end
            yield Finding(anomaly=_name(one, cause, Anomaly.HIDDEN), seen=one, against=proof, cause=cause)


def _name(one: Operation, cause: Operation | None, of_a_read: Anomaly) -> Anomaly:
    if one.kind in READS:
        return of_a_read
    return Anomaly.LATE if cause is not None and cause.outcome in UNKNOWN else Anomaly.LOST


def _over_s(write: Operation) -> float:
    return write.latest_s + (LATE_BY_S if write.outcome in UNKNOWN else 0.0)


class _Acknowledged:
    """Acknowledged writes: the one that began last of those answered before a call."""

    def __init__(self, writes: Iterable[Operation]) -> None:
        ordered = sorted(writes, key=lambda one: one.ended_s)
        self._ended_s = [one.ended_s for one in ordered]
        self._last_begun: list[Operation] = []
        for one in ordered:
            if self._last_begun and self._last_begun[-1].began_s > one.began_s:
                one = self._last_begun[-1]  # noqa: PLW2901  # the running maximum
            self._last_begun.append(one)

    def before(self, call: Operation) -> Operation | None:
        place = bisect_left(self._ended_s, call.began_s)
        return self._last_begun[place - 1] if place else None


class _Latest:
    """Writes of any outcome: the one that may be done last of those begun before a call was answered."""

    def __init__(self, writes: Iterable[Operation]) -> None:
        ordered = sorted(writes, key=lambda one: one.began_s)
        self._began_s = [one.began_s for one in ordered]
        self._latest: list[Operation] = []
        for one in ordered:
            if self._latest and _over_s(self._latest[-1]) > _over_s(one):
                one = self._latest[-1]  # noqa: PLW2901  # the running maximum
            self._latest.append(one)

    def until(self, call: Operation) -> Operation | None:
        place = bisect_right(self._began_s, call.ended_s)
        return self._latest[place - 1] if place else None


@dataclass(frozen=True, slots=True)
class _Register:
    write_by_value: dict[int, Operation]
    overwriters: _Acknowledged


def _registers(sent: Sequence[Operation]) -> dict[str, _Register]:
    writes: dict[str, list[Operation]] = defaultdict(list)
    for one in sent:
        # A SetValue that finds nothing may have been done by its own first try, and then an end came.
        may_be_done = one.outcome in DONE_OR_UNKNOWN or one.kind is Kind.SET
        for key in one.written if may_be_done else ():
            writes[key].append(one)
    ends = [one for one in sent if one.kind in ENDS and one.outcome is not Outcome.MAYBE]
    return {
        key: _Register(
            {one.written[key]: one for one in of_key},
            _Acknowledged([*(one for one in of_key if one.outcome is Outcome.DONE), *ends]),
        )
        for key, of_key in writes.items()
    }
