"""SetValue between reading and writing: changes applied to the bags as they were. Pure.

An engine reads rows, runs `changing`, and writes each row that is unchanged since. A change is applied here
and not in the database, which can neither parse a bag nor tell whether it would be too large.

Several changes of one batch may be for one token. They form a chain: each is applied to the bag that the one
before it left, its result shows the bag after itself, and one write stores the bag after the last. The bag
is read and encoded once for all of them. All of it is in steps, since a bag may be large (aio/steps.py). A
change that fails (too large, late) leaves no mark on the chain. If the row was changed by another writer
meanwhile, the whole chain is applied again to the new bag in the next round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from aio.steps import Steps
from aio.units import NEVER_US
from mnemosyned.errors import (
    CorruptSession,
    DeadlineExceeded,
    InvalidArgument,
    MnemosyneError,
    SessionNotFound,
)
from mnemosyned.sessions import bag
from mnemosyned.sessions.model import ValueChange

# Of the bags that one statement writes; a larger one goes alone. Two milliseconds of copying.
_PORTION_BYTES: Final = 1024**2


# Not frozen: one is made for each change, and a frozen one takes three times as long.
@dataclass(slots=True)
class Outcome:
    """What one change leads to: a result, which counts once the bag is written, or a failure."""

    token: bytes
    result: dict[str, str] | MnemosyneError
    not_after_us: int = NEVER_US  # of the change, on the storage's clock

    @property
    def is_failure(self) -> bool:
        """Whether the bag is as it was without this change."""
        return isinstance(self.result, MnemosyneError)


@dataclass(frozen=True, slots=True)
class Changed:
    """What a batch of changes leads to: one outcome for each, and the bags to write, by token."""

    outcomes: list[Outcome]
    bags: dict[bytes, bytes]

    def limits_us(self) -> dict[bytes, int]:
        """Return until when each bag may be written: its changes share one write, and the least limit."""
        limits_us = dict.fromkeys(self.bags, NEVER_US)
        for outcome in self.outcomes:
            if outcome.token in limits_us and not outcome.is_failure:
                limits_us[outcome.token] = min(limits_us[outcome.token], outcome.not_after_us)
        return limits_us

    def portions(self) -> Iterator[list[bytes]]:
        """Return the tokens of bags that share a statement: clients take its parameters in one piece."""
        portion: list[bytes] = []
        size_bytes = 0
        for token, stored in self.bags.items():
            size_bytes += len(stored)
            if portion and size_bytes > _PORTION_BYTES:
                yield portion
                portion, size_bytes = [], len(stored)
            portion.append(token)
        if portion:
            yield portion


def changing(changes: Sequence[ValueChange], before: Mapping[bytes, Any]) -> Steps[Changed]:
    """Apply the changes one after the other.

    `before` has the rows as they were, by token: `bag`, `version`, and `now`, the storage's clock. The
    clock saves the write of a change that is late already. The statement that writes checks it again.
    """
    opened: dict[bytes, bag.OpenBag | CorruptSession] = {}
    outcomes: list[Outcome] = []
    for change in changes:
        token = change.access_token.encode()
        if token not in before:
            outcomes.append(Outcome(token, SessionNotFound()))
        elif before[token]["now"] >= change.not_after_us:
            outcomes.append(Outcome(token, DeadlineExceeded()))
        else:
            if token in opened:
                # The copy of a large bag, for the result of the change before.
                yield
            else:
                opened[token] = yield from _opening(change, before[token]["bag"])
            outcomes.append(_outcome(change, token, opened[token]))
    bags: dict[bytes, bytes] = {}
    for token in {outcome.token for outcome in outcomes if not outcome.is_failure}:
        changed = opened[token]
        assert isinstance(changed, bag.OpenBag)
        bags[token] = yield from changed.encoding()
    return Changed(outcomes, bags)


def _opening(change: ValueChange, stored: bytes | None) -> Steps[bag.OpenBag | CorruptSession]:
    if stored is None:
        return CorruptSession("mnemosyned: storage: a bag is missing or too long")
    try:
        return (
            yield from bag.opening(stored, max_entries=change.max_entries, max_key_bytes=change.max_key_bytes)
        )
    except CorruptSession as exc:
        return exc


def _outcome(change: ValueChange, token: bytes, opened: bag.OpenBag | CorruptSession) -> Outcome:
    if isinstance(opened, CorruptSession):
        return Outcome(token, opened)
    try:
        values = opened.put(change.key, change.value, max_entries=change.max_entries)
    except InvalidArgument as exc:
        return Outcome(token, exc)
    return Outcome(token, values, change.not_after_us)
