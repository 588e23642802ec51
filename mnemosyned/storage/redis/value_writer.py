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
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from aio.slices import in_slices
from mnemosyned.errors import MnemosyneError, StorageUnavailable
from mnemosyned.sessions.model import MAX_BAG_BYTES, ValueChange
from mnemosyned.storage.redis import records, scripts
from mnemosyned.storage.value_changes import Changed, Outcome, changing

if TYPE_CHECKING:
    from mnemosyned.storage.redis.items import ItemPool

_QUICK_ROUNDS: Final = 4
_CLAIMED_MS: Final = 500
# Writers that have lost a round do not begin the next one together.
_MAX_PAUSE_S: Final = 0.02


class ValueWriter:
    """Sets keys of bags; gives up what it could not write within `timeout_s`."""

    def __init__(self, pool: ItemPool, *, timeout_s: float) -> None:
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
            batch = [changes[at] for at in left]
            tried = zip(left, await self._try(batch, claim), strict=True)
            results |= {at: result for at, result in tried if result is not None}
            left = [at for at in left if at not in results]
            rounds += 1
        locked = StorageUnavailable("mnemosyned: storage: the session is locked by another writer")
        return [results.get(at, locked) for at in range(len(changes))]

    async def _try(
        self, changes: Sequence[ValueChange], claim: bytes
    ) -> list[dict[str, str] | MnemosyneError | None]:
        """Run one round; return the results, None where another writer has won."""
        tokens = list({change.access_token.encode(): None for change in changes})
        found = await self._pool.each(
            scripts.READ_BAGS, (claim, _CLAIMED_MS, MAX_BAG_BYTES), [(token,) for token in tokens]
        )
        failed: dict[bytes, MnemosyneError] = {}
        before: dict[bytes, dict[str, Any]] = {}
        for token, reply in zip(tokens, found, strict=True):
            if isinstance(reply, MnemosyneError):
                failed[token] = reply
            elif reply is not None:
                now_us, record = reply
                before[token] = {"now": now_us, "record": record, "bag": records.bag_of(record)}
        readable = [change for change in changes if change.access_token.encode() not in failed]
        changed = await in_slices(changing(readable, before), is_urgent=bool(claim))
        written = await self._write(changed, before, claim)
        outcomes = iter(changed.outcomes)
        return [
            failed[token] if token in failed else _result(next(outcomes), written)
            for token in (change.access_token.encode() for change in changes)
        ]

    async def _write(
        self, changed: Changed, before: dict[bytes, dict[str, Any]], claim: bytes
    ) -> dict[bytes, MnemosyneError | bool]:
        """Write the bags; tell of each token whether its bag was written, or what has failed."""
        limits_us = changed.limits_us()
        written: dict[bytes, MnemosyneError | bool] = {}
        for tokens in changed.portions():
            items: list[tuple[str | bytes | int, ...]] = []
            for token in tokens:
                record, version = before[token]["record"], secrets.token_bytes(8)
                body = records.body_with_bag(record, version, changed.bags[token])
                items.append((token, records.version_of(record), limits_us[token], body))
            flags = await self._pool.each(scripts.WRITE_BAGS, (claim,), items, is_write=True)
            for token, flag in zip(tokens, flags, strict=True):
                written[token] = flag if isinstance(flag, MnemosyneError) else bool(flag)
        return written


def _result(
    outcome: Outcome, written: Mapping[bytes, MnemosyneError | bool]
) -> dict[str, str] | MnemosyneError | None:
    if outcome.is_failure:
        return outcome.result
    flag = written[outcome.token]
    if isinstance(flag, MnemosyneError):
        return flag
    return outcome.result if flag else None
