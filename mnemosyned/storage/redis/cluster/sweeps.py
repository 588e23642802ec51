"""Delete and cleanup on a Redis Cluster: count what each bucket has, share the limit out, and look again.

A bucket is one store, and ends its share in one atomic step. All of them together are not looked at in one
instant: a session that is renamed meanwhile (moves.py) may leave a bucket that was not looked at yet, for
one that was. Since it does so once, a Delete is over when a second look at all buckets has found nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

from mnemosyned.errors import DeadlineExceeded, MnemosyneError, StorageUnavailable
from mnemosyned.sessions.model import Criteria
from mnemosyned.sessions.store import Deletion
from mnemosyned.storage.redis import scripts
from mnemosyned.storage.redis.criteria import texts_of

if TYPE_CHECKING:
    from mnemosyned.storage.redis.cluster.moves import Moves
    from mnemosyned.storage.redis.cluster.pool import ClusterPool
    from mnemosyned.storage.redis.store import RedisStore

_LOOKS: Final = 2
# What one bucket ends at a time: one script, so that none of it is lost if the next one fails.
_MOST_AT_ONCE: Final = 250
# Sessions under way to other names that one count takes to their ends, for each bucket.
_MOST_MOVES: Final = 100

# Ends at most so many sessions of a bucket; returns their keys, and whether no more are left in it.
End = Callable[[int, int], Awaitable[tuple[list[str], bool]]]


class Sweeps:
    """Ends sessions in all buckets."""

    def __init__(self, pool: ClusterPool, moves: Moves) -> None:
        self._pool = pool
        self._moves = moves
        self.stores: Sequence[RedisStore] = ()  # one for each bucket

    async def delete(self, criteria: Criteria, *, limit: int, not_after_us: int) -> Deletion:
        """See SessionStore."""

        async def end(bucket: int, share: int) -> tuple[list[str], bool]:
            done = await self.stores[bucket].delete(criteria, limit=share, not_after_us=not_after_us)
            return done.stored_keys, done.is_all

        keys: list[str] = []
        looks, found = 0, 0
        while looks < _LOOKS or found:
            begun = len(keys)
            try:
                await self._sweep(keys, limit, await self._counted(criteria, ""), end)
            except (StorageUnavailable, DeadlineExceeded):
                if not keys:
                    raise
                # What has been ended must be told. The next step meets the failure once more.
                return Deletion(stored_keys=keys, is_all=False)
            if len(keys) >= limit:
                return Deletion(stored_keys=keys, is_all=False)
            looks, found = looks + 1, len(keys) - begun
        return Deletion(stored_keys=keys, is_all=True)

    async def clean_up(self, *, limit: int) -> list[str]:
        """See SessionStore."""

        async def end(bucket: int, share: int) -> tuple[list[str], bool]:
            done = await self.stores[bucket].clean_up(limit=share)
            return done, len(done) < share

        keys: list[str] = []
        try:
            await self._sweep(keys, limit, await self._counted(Criteria(), "expired"), end)
        except StorageUnavailable:
            if not keys:
                raise
        return keys

    async def _sweep(self, keys: list[str], limit: int, counts: Mapping[int, int], end: End) -> None:
        """End sessions where there are any, up to a limit, and add their keys; raise the first failure."""
        left = dict(counts)
        while left and len(keys) < limit:
            shares = _shares(left, limit - len(keys))
            outcomes = await asyncio.gather(
                *(end(bucket, share) for bucket, share in shares.items()), return_exceptions=True
            )
            failure: BaseException | None = None
            for bucket, outcome in zip(shares, outcomes, strict=True):
                if isinstance(outcome, BaseException):
                    failure = failure or outcome
                    continue
                ended, is_all = outcome
                keys += ended
                left[bucket] -= len(ended)
                if is_all:
                    del left[bucket]
            if failure is not None:
                raise failure

    async def _counted(self, criteria: Criteria, which: Literal["", "expired"]) -> dict[int, int]:
        """Return the buckets with names to look at, and how many; first end the moves that are under way."""
        counts = await self._counts(criteria, which)
        moving = [bucket for bucket, (_, departed) in counts.items() if departed]
        if moving:
            await self._finish(moving)
            counts = await self._counts(criteria, which)
        return {bucket: count for bucket, (count, _) in counts.items() if count}

    async def _counts(self, criteria: Criteria, which: str) -> dict[int, tuple[int, int]]:
        holding = await self._pool.holding(criteria)
        places = {space: bucket for bucket, space in enumerate(self._pool.buckets)}
        numbers = [places[space] for space in holding]
        replies = await self._run(scripts.COUNT, numbers, (*texts_of(criteria), which))
        return {bucket: (count, departed) for bucket, (count, departed) in zip(numbers, replies, strict=True)}

    async def _finish(self, numbers: Sequence[int]) -> None:
        for _, *names in await self._run(scripts.DEPARTED, numbers, (_MOST_MOVES,)):
            await self._moves.finish(names)

    async def _run(
        self, script: scripts.Script, numbers: Sequence[int], given: Sequence[str | bytes | int]
    ) -> list[Any]:
        calls = [(self._pool.buckets[bucket], given) for bucket in numbers]
        replies = await self._pool.run_all(script, calls)
        for reply in replies:
            if isinstance(reply, MnemosyneError):
                raise reply
        return replies


def _shares(counts: Mapping[int, int], limit: int) -> dict[int, int]:
    """Return how many sessions each bucket may end: all of them together no more than the limit."""
    shares: dict[int, int] = {}
    for bucket, count in counts.items():
        if limit <= 0:
            break
        # One more than it has: less than its share says that it has no more.
        shares[bucket] = min(max(count, 0) + 1, limit, _MOST_AT_ONCE)
        limit -= shares[bucket]
    return shares
