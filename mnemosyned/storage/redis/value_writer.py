"""SetValue in Redis: a bag is changed here, and written if its version is still the one that was read.

    round        reads the bags                   writes a bag where
    4 quick      with one script                  its version is the same, and nobody else has claimed it
    claiming     the same, and claims the bags    the same

No lock is held between reading and writing. A writer far from the server could lose every round to nearer
ones: after four it claims the bags that it reads, for at most half a second, and others lose their rounds
meanwhile. A claim that is not used ends by itself.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from aio.slices import in_slices
from mnemosyned.errors import MnemosyneError, StorageUnavailable
from mnemosyned.sessions.model import MAX_BAG_BYTES, ValueChange
from mnemosyned.storage.redis import records, scripts
from mnemosyned.storage.value_changes import Changed, Outcome, changing

if TYPE_CHECKING:
    from mnemosyned.storage.redis.pool import RedisPool

_QUICK_ROUNDS: Final = 4
_CLAIMED_MS: Final = 500
# Writers that have lost a round do not begin the next one together.
_MAX_PAUSE_S: Final = 0.02


class ValueWriter:
    """Sets keys of bags; gives up what it could not write within `timeout_s`."""

    def __init__(self, pool: RedisPool, *, timeout_s: float) -> None:
        self._pool = pool
        self._timeout_s = timeout_s

    async def apply(self, changes: Sequence[ValueChange]) -> list[dict[str, str] | MnemosyneError]:
        """Apply the changes, in order; see SessionStore.set_values."""
        results: dict[int, dict[str, str] | MnemosyneError] = {}
        left = list(range(len(changes)))
        until_s = asyncio.get_running_loop().time() + self._timeout_s
        rounds, claim = 0, b""
        while left and (rounds <= _QUICK_ROUNDS or asyncio.get_running_loop().time() < until_s):
            if rounds:
                await asyncio.sleep(random.random() * _MAX_PAUSE_S * min(rounds, 5) / 5)  # noqa: S311  # no secret
            if rounds >= _QUICK_ROUNDS:
                claim = claim or secrets.token_bytes(16)
            outcomes, written = await self._try([changes[at] for at in left], claim)
            for at, outcome in zip(left, outcomes, strict=True):
                if outcome.is_failure or outcome.token in written:
                    results[at] = outcome.result
            left = [at for at in left if at not in results]
            rounds += 1
        locked = StorageUnavailable("mnemosyned: storage: the session is locked by another writer")
        return [results.get(at, locked) for at in range(len(changes))]

    async def _try(self, changes: Sequence[ValueChange], claim: bytes) -> tuple[list[Outcome], set[bytes]]:
        """Run one round; return the outcomes, and the tokens whose bags were written."""
        tokens = list({change.access_token.encode(): None for change in changes})
        now_us, *found = await self._pool.run(scripts.READ_BAGS, claim, _CLAIMED_MS, MAX_BAG_BYTES, *tokens)
        record_by_token = {
            token: record for token, record in zip(tokens, found, strict=True) if record is not None
        }
        before = {
            token: {"bag": records.bag_of(record), "now": now_us} for token, record in record_by_token.items()
        }
        changed = await in_slices(changing(changes, before), is_urgent=bool(claim))
        return changed.outcomes, await self._write(changed, record_by_token, claim)

    async def _write(self, changed: Changed, records_read: dict[bytes, Any], claim: bytes) -> set[bytes]:
        limits_us = changed.limits_us()
        written: set[bytes] = set()
        for tokens in changed.portions():
            arguments: list[str | bytes | int] = []
            for token in tokens:
                record, version = records_read[token], secrets.token_bytes(8)
                body = records.body_with_bag(record, version, changed.bags[token])
                arguments += (token, records.version_of(record), limits_us[token], body)
            flags = await self._pool.run(scripts.WRITE_BAGS, claim, *arguments, is_write=True)
            written.update(token for token, flag in zip(tokens, flags, strict=True) if flag)
        return written
