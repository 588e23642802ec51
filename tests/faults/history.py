"""What clients did and saw: the record that the checker judges. Pure.

All times are of one clock, that of the clients' process.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final


class Kind(enum.Enum):
    """What a client asked for."""

    START = "Start"
    SET = "SetValue"
    ABANDON = "Abandon"
    DELETE = "Delete"
    GET = "Get"
    EXISTS = "Exists"


ENDS: Final = frozenset({Kind.ABANDON, Kind.DELETE})
READS: Final = frozenset({Kind.GET, Kind.EXISTS})


class Outcome(enum.Enum):
    """What the answer says about the session."""

    DONE = "done"  # a write is acknowledged, or a read has found the session
    ABSENT = "absent"  # there is no such session
    TAKEN = "taken"  # a Start found a live session
    MAYBE = "maybe"  # the call failed: a write may be done until the deadline, a read says nothing
    UNSENT = "unsent"  # no connection: the node never saw the call


# Outcomes of writes that may be done, and of those that are or may be.
UNKNOWN: Final = frozenset({Outcome.MAYBE, Outcome.TAKEN})
DONE_OR_UNKNOWN: Final = UNKNOWN | {Outcome.DONE}


# Not frozen: a run makes hundreds of thousands, and a frozen one takes three times as long.
@dataclass(slots=True, kw_only=True)
class Operation:
    """One call on one session."""

    token: str
    kind: Kind
    node: str
    began_s: float
    ended_s: float
    deadline_s: float
    outcome: Outcome
    written: Mapping[str, int] = field(default_factory=dict)  # the keys that a Start or SetValue writes
    seen: Mapping[str, int] = field(default_factory=dict)  # the bag of the answer
    error: str = ""  # of a call that failed

    @property
    def latest_s(self) -> float:
        """When a write has been done at the latest, if it is done at all."""
        return self.deadline_s if self.outcome in UNKNOWN else self.ended_s

    def line(self, since_s: float) -> str:
        """Show it for people, with times since `since_s`."""
        bags = "".join(
            f" {word} {dict(bag)}" for word, bag in (("of", self.written), ("saw", self.seen)) if bag
        )
        return (
            f"{self.began_s - since_s:9.3f} .. {self.ended_s - since_s:9.3f}  {self.node:<4} "
            f"{self.kind.value}{bags}: {self.outcome.value} {self.error}".rstrip()
        )
