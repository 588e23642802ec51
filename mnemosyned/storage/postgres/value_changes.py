"""SetValue between its two statements: changes applied to the bags that were read. Pure.

`store.py` reads rows, calls `with_values`, and writes each row that is unchanged since. A change is applied
here and not in SQL, because PostgreSQL can neither parse a bag nor tell whether it would be too large.

Several changes of one batch may be for one token. They form a chain: each is applied to the bag that the one
before it left, its result shows the bag after itself, and one UPDATE writes the bag after the last. A change
that fails (too large, late) leaves no mark on the chain. If the row was changed by another writer meanwhile,
the whole chain is applied again to the new bag in the next round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from asyncpg import Record


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one change leads to: a result and the bag to write, or a failure and None.

    The result counts only once the bag is written; a failure counts at once.
    """

    token: bytes
    result: dict[str, str] | MnemosyneError
    after: bytes | None
    not_after_us: int = NEVER_US  # of the change, on the storage's clock


def with_values(changes: Sequence[ValueChange], before: Mapping[bytes, Record]) -> list[Outcome]:
    """Apply the changes one after the other; return one outcome per change.

    `before` has the rows that were read, by token: `bag`, `version`, and `now`, the storage's clock. The
    clock saves the write of a change that is late already. The statement that writes checks it again.
    """
    # None: the bag is missing, or too long to be read.
    bags: dict[bytes, bytes | None] = {token: row["bag"] for token, row in before.items()}
    outcomes: list[Outcome] = []
    for change in changes:
        token = change.access_token.encode()
        if token not in bags:
            outcomes.append(Outcome(token, SessionNotFound(), None))
        elif before[token]["now"] >= change.not_after_us:
            outcomes.append(Outcome(token, DeadlineExceeded(), None))
        else:
            outcomes.append(_with_value(change, token, bags))
    return outcomes


def _with_value(change: ValueChange, token: bytes, bags: dict[bytes, bytes | None]) -> Outcome:
    before = bags[token]
    if before is None:
        return Outcome(token, CorruptSession("mnemosyned: storage: a bag is missing or too long"), None)
    try:
        values, after = bag.with_value(
            before,
            change.key,
            change.value,
            max_entries=change.max_entries,
            max_key_bytes=change.max_key_bytes,
        )
    except (InvalidArgument, CorruptSession) as exc:
        return Outcome(token, exc, None)
    bags[token] = after
    return Outcome(token, values, after, change.not_after_us)
