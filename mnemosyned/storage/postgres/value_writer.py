"""SetValue in PostgreSQL: a bag is changed here, and written if it is still the one that was changed.

No lock is held between reading and writing: a process that is stalled there would stop every writer of the
session. A batch is written in rounds, and each has those changes that the one before it has lost:

    round       reads the bag                writes it where
    known       from memory, no statement    the row has this bag, byte by byte
    4 quick     by a statement               the row has this version
    locked      by a statement that locks    the same: another writer must wait

The memory need not be right: a bag that another node has changed is in no row any more, and the change is
read and made in the next round. So is a change that fails on a remembered bag.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from aio.slices import in_slices
from mnemosyned.errors import DeadlineExceeded, MnemosyneError
from mnemosyned.sessions.model import ChangedBag, Session, ValueChange
from mnemosyned.storage.postgres.faults import ITEM_FAULTS
from mnemosyned.storage.postgres.queries import Queries, Query
from mnemosyned.storage.postgres.repeats import ROLLED_BACK
from mnemosyned.storage.postgres.rows import changed_session
from mnemosyned.storage.remembered import Remembered
from mnemosyned.storage.value_changes import Changed, Outcome, changing

if TYPE_CHECKING:
    from asyncpg import Record
    from asyncpg.pool import PoolConnectionProxy

    from mnemosyned.storage.postgres.pool import PostgresPool

# A writer far from the database can lose every round to nearer ones. After so many rounds, the rows are
# locked from the read to the write.
_QUICK_ROUNDS: Final = 4
# If this process is stalled between the two, PostgreSQL ends the transaction after this time.
_LOCKED_MS: Final = 500

Written = dict[bytes, Session | None]  # what is stored now under the tokens; None: it is damaged
Tried = tuple[list[Outcome], Written]


class ValueWriter:
    """Sets keys of bags, and remembers the small bags that were last read or written."""

    def __init__(self, pool: PostgresPool, queries: Queries) -> None:
        """`queries`: of either form of the table, which have these statements in common."""
        self._pool = pool
        self.queries = queries
        self.bags = Remembered()  # as the rows have them

    async def apply(self, changes: Sequence[ValueChange]) -> list[ChangedBag | MnemosyneError]:
        """Apply the changes, in order; see SessionStore.set_values.

        - A failed change (no session, late, bag too large) has its result after the read.
        - A change whose row was written has its result after the write.
        - Any other change lost its row to another writer, and goes into the next round.
        - The last round locks the rows first (`_try_locked`). It can be lost only if the time is up.
        """
        results: dict[int, ChangedBag | MnemosyneError] = {}
        left = list(range(len(changes)))
        for attempt in (self._try_known, *[self._try_quick] * _QUICK_ROUNDS, self._try_locked):
            outcomes, written = await attempt([changes[at] for at in left])
            for at, outcome in zip(left, outcomes, strict=True):
                if isinstance(outcome.result, MnemosyneError):
                    results[at] = outcome.result
                elif outcome.token in written:
                    results[at] = ChangedBag(outcome.result, written[outcome.token])
            left = [at for at in left if at not in results]
            if not left:
                break
        # The locked round fails to write a row only for its time. The limit has passed, or passes too soon to
        # begin again.
        return [results.get(at) or DeadlineExceeded() for at in range(len(changes))]

    async def _try_known(self, changes: Sequence[ValueChange]) -> Tried:
        known: dict[bytes, bytes] = {}
        for token in map(_token, changes):
            # Until it is written: otherwise a batch that fails would leave what may be no more.
            bag = self.bags.take(token)
            if bag is not None:
                known[token] = bag
        # The clock is compared when the row is locked.
        before = {token: {"bag": bag, "now": 0} for token, bag in known.items()}
        changed = await in_slices(changing([one for one in changes if _token(one) in known], before))
        failed = {outcome.token for outcome in changed.outcomes if outcome.is_failure}
        bags = {token: bag for token, bag in changed.bags.items() if token not in failed}
        fetch = partial(self._pool.fetch, passing=ITEM_FAULTS)
        written = await self._write(self.queries.write_known, Changed(changed.outcomes, bags), known, fetch)
        outcomes = iter(changed.outcomes)
        tried = [next(outcomes) if token in known else _lost(token) for token in map(_token, changes)]
        # A failure on a bag that is remembered proves nothing.
        return [one if one.token in written else _lost(one.token) for one in tried], written

    async def _try_quick(self, changes: Sequence[ValueChange]) -> Tried:
        fetch = partial(self._pool.fetch, passing=ITEM_FAULTS)
        return await self._read_and_write(changes, self.queries.read_bags, fetch)

    # The transaction costs two more round trips, and the rows are locked during two of them.
    async def _try_locked(self, changes: Sequence[ValueChange]) -> Tried:
        """Read and write in one transaction that holds the rows, in turn with other writers."""

        async def read_and_write(connection: PoolConnectionProxy[Record]) -> Tried:
            await connection.execute(f"SET LOCAL idle_in_transaction_session_timeout = {_LOCKED_MS}")
            run = partial(self._pool.run, connection, passing=(*ITEM_FAULTS, *ROLLED_BACK))
            return await self._read_and_write(changes, self.queries.lock_bags, run)

        return await self._pool.in_transaction(read_and_write, passing=ITEM_FAULTS)

    async def _read_and_write(
        self,
        changes: Sequence[ValueChange],
        reading: Query,
        fetch: Callable[..., Awaitable[list[Record]]],
    ) -> Tried:
        """Run one round; return the outcomes, and the tokens whose bags were written.

        `fetch` runs a statement on any connection, or on the one that holds the locks.
        """
        rows = await fetch(reading, list({change.access_token.encode() for change in changes}))
        before = {row["access_token"]: row for row in rows}
        # In the round that holds locks, other writers and a time-out of the server wait for these slices.
        changed = await in_slices(changing(changes, before), is_urgent=reading is self.queries.lock_bags)
        versions = {token: before[token]["version"] for token in changed.bags}
        return changed.outcomes, await self._write(self.queries.write_bags, changed, versions, fetch)

    async def _write(
        self,
        writing: Query,
        changed: Changed,
        before: Mapping[bytes, object],
        fetch: Callable[..., Awaitable[list[Record]]],
    ) -> Written:
        """Write the bags whose rows are as `before` says; return the sessions that were written."""
        limits_us = changed.limits_us()
        written: Written = {}
        for tokens in changed.portions():
            bags = [changed.bags[token] for token in tokens]
            limits = [limits_us[token] for token in tokens]
            rows = await fetch(writing, tokens, [before[token] for token in tokens], bags, limits)
            for row in rows:
                token = row["access_token"]
                written[token] = changed_session(row, changed.bags[token])
        for token in written:
            self.bags.add(token, changed.bags[token])
        return written


def _token(change: ValueChange) -> bytes:
    return change.access_token.encode()


def _lost(token: bytes) -> Outcome:
    return Outcome(token, {})
