"""SetValue in MongoDB: a bag is changed here, and written if its version is still the one that was read.

    round        reads the bags                          writes a bag where
    4 quick      as they are                             its version is the same, and no other claims it
    claiming     claims them first, for half a second    the same

No lock is held between reading and writing. A writer far from the primary could lose every round to nearer
ones: after four it claims the bags that it reads, and others lose their rounds meanwhile. A claim that is not
used ends by itself.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from bson import Int64

from aio.slices import in_slices
from aio.units import NEVER_US
from mnemosyned.errors import MnemosyneError, StorageUnavailable
from mnemosyned.sessions.model import ChangedBag, Session, ValueChange
from mnemosyned.storage.mongodb import documents
from mnemosyned.storage.value_changes import Changed, Outcome, changing

if TYPE_CHECKING:
    from mnemosyned.storage.mongodb.client import Database, Document
    from mnemosyned.storage.mongodb.pool import MongoPool
    from mnemosyned.storage.mongodb.schema import Names
    from mnemosyned.storage.mongodb.walks import Walks

_QUICK_ROUNDS: Final = 4
_CLAIMED_US: Final = 500_000
# Writers that have lost a round pause, at most for so many times as long as it took: not all begin together.
_MOST_PAUSES: Final = 5


class ValueWriter:
    """Sets keys of bags; gives up what it could not write within `timeout_s`."""

    def __init__(self, pool: MongoPool, names: Names, walks: Walks, *, timeout_s: float) -> None:
        self._pool = pool
        self._names = names
        self._walks = walks
        self._timeout_s = timeout_s

    async def apply(self, changes: Sequence[ValueChange]) -> list[ChangedBag | MnemosyneError]:
        """Apply the changes, in order; see SessionStore.set_values."""
        time_s = asyncio.get_running_loop().time
        until_s = time_s() + self._timeout_s
        results: dict[int, ChangedBag | MnemosyneError] = {}
        left = list(range(len(changes)))
        rounds, round_s, claim = 0, 0.0, b""
        while left and (rounds <= _QUICK_ROUNDS or time_s() < until_s):
            if rounds:
                await asyncio.sleep(random.random() * round_s * min(rounds, _MOST_PAUSES))  # noqa: S311  # no secret
            if rounds >= _QUICK_ROUNDS:
                claim = claim or secrets.token_bytes(documents.MARK_BYTES)
            begun_s = time_s()
            outcomes, written = await self._try([changes[at] for at in left], claim, is_begun=bool(rounds))
            round_s = time_s() - begun_s
            for at, outcome in zip(left, outcomes, strict=True):
                if isinstance(outcome.result, MnemosyneError):
                    results[at] = outcome.result
                elif outcome.token in written:
                    results[at] = ChangedBag(outcome.result, written[outcome.token])
            left = [at for at in left if at not in results]
            rounds += 1
        locked = StorageUnavailable("mnemosyned: storage: the session is locked by another writer")
        return [results.get(at, locked) for at in range(len(changes))]

    async def _try(
        self, changes: Sequence[ValueChange], claim: bytes, *, is_begun: bool
    ) -> tuple[list[Outcome], dict[bytes, Session]]:
        """Run one round; return the outcomes, and the sessions whose bags were written."""
        tokens = list({change.access_token: None for change in changes})
        if claim:
            await self._pool.run_each(
                "claim", [self._claiming(token, claim) for token in tokens], is_begun=is_begun
            )
        shown = await self._walks.those_of(tokens, "read_bags", is_begun=is_begun)
        found = {token.encode(): one for token, one in shown.items() if documents.is_live(one)}
        sessions = {token: documents.session_of(one) for token, one in found.items()}
        before = {
            token: {
                "bag": session.bag if isinstance(session, Session) else None,
                "now": documents.now_us(found[token]),
            }
            for token, session in sessions.items()
        }
        changed = await in_slices(changing(changes, before), is_urgent=bool(claim))
        written = await self._write(changed, found, claim, is_begun=is_begun)
        # No other field has changed: the version would have changed with it. The expiry moves only forward.
        return changed.outcomes, {
            token: replace(session, bag=changed.bags[token])
            for token in written
            if isinstance(session := sessions[token], Session)
        }

    async def _write(
        self, changed: Changed, found: Mapping[bytes, Document], claim: bytes, *, is_begun: bool
    ) -> set[bytes]:
        limits_us = changed.limits_us()
        tokens = list(changed.bags)
        writes = [
            self._writing(found[token], changed.bags[token], limits_us[token], claim) for token in tokens
        ]
        flags = await self._pool.run_each("write_bags", writes, is_begun=is_begun)
        return {token for token, is_written in zip(tokens, flags, strict=True) if is_written}

    def _writing(
        self, shown: Document, bag: bytes, not_after_us: int, claim: bytes
    ) -> Callable[[Database], Awaitable[bool]]:
        wanted = {
            "_id": shown["_id"],
            "v": {"$eq": shown["d"].get("v")},
            **documents.live(not_after_us, _is_claimable(claim)),
        }
        update = {
            "$set": {"b": bag, "v": secrets.token_bytes(documents.MARK_BYTES)},
            "$unset": {"o": "", "l": ""},
        }

        async def write(database: Database) -> bool:
            return (await self._names.written(database).update_one(wanted, update)).matched_count > 0

        return write

    def _claiming(self, token: str, claim: bytes) -> Callable[[Database], Awaitable[None]]:
        wanted = {"_id": token, **documents.live(NEVER_US, _is_claimable(claim))}
        until_us = {"$add": [documents.NOW_US, _CLAIMED_US]}

        async def claim_it(database: Database) -> None:
            claimed = [{"$set": {"o": {"$literal": claim}, "l": until_us}}]
            await self._names.written(database).update_one(wanted, claimed)

        return claim_it


def _is_claimable(claim: bytes) -> dict[str, Any]:
    is_over = {"$lte": [{"$ifNull": ["$l", Int64(0)]}, documents.NOW_US]}
    return {"$or": [is_over, {"$eq": ["$o", {"$literal": claim}]}]}
