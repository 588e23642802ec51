"""SetValue in Redis: a bag is changed here, and written if its version is still the one that was read.

    round        reads the bags                   writes a bag where
    known        from memory, without a script    its version is the same, and nobody else has claimed it
    4 quick      with one script                  the same
    claiming     the same, and claims the bags    the same

The memory need not be right: a bag that was changed meanwhile has another version, and the change is read and
made in the next round. So is a change that fails on a remembered bag.

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
from mnemosyned.storage.remembered import Remembered
from mnemosyned.storage.value_changes import Changed, Outcome, changing

if TYPE_CHECKING:
    from mnemosyned.storage.redis.items import ItemPool

_QUICK_ROUNDS: Final = 4
_CLAIMED_MS: Final = 500
# Writers that have lost a round do not begin the next one together.
_MAX_PAUSE_S: Final = 0.02


class ValueWriter:
    """Sets keys of bags, and remembers small ones; gives up what it could not write within `timeout_s`."""

    def __init__(self, pool: ItemPool, *, timeout_s: float) -> None:
        self._pool = pool
        self._timeout_s = timeout_s
        self.records = Remembered()  # of which the expiry does not count

    async def apply(self, changes: Sequence[ValueChange]) -> list[dict[str, str] | MnemosyneError]:
        """Apply the changes, in order; see SessionStore.set_values."""
        results = dict(enumerate(await self._try_known(changes)))
        left = [at for at, result in results.items() if result is None]
        until_s = asyncio.get_running_loop().time() + self._timeout_s
        rounds, claim = 0, b""
        while left and (rounds <= _QUICK_ROUNDS or asyncio.get_running_loop().time() < until_s):
            if rounds:
                await asyncio.sleep(random.random() * _MAX_PAUSE_S * min(rounds, 5) / 5)  # noqa: S311  # no secret
            if rounds >= _QUICK_ROUNDS:
                claim = claim or secrets.token_bytes(16)
            batch = [changes[at] for at in left]
            results |= zip(left, await self._try(batch, claim), strict=True)
            left = [at for at in left if results[at] is None]
            rounds += 1
        locked = StorageUnavailable("mnemosyned: storage: the session is locked by another writer")
        return [locked if result is None else result for result in results.values()]

    async def _try_known(
        self, changes: Sequence[ValueChange]
    ) -> list[dict[str, str] | MnemosyneError | None]:
        """Run the round that reads nothing; return the results, None where the bag must be read."""
        tokens = [change.access_token.encode() for change in changes]
        before: dict[bytes, dict[str, Any]] = {}
        for token in tokens:
            # Until it is written: otherwise a script that fails would leave what may be no more.
            record = self.records.take(token)
            if record is not None:
                # The clock is compared when it is written.
                before[token] = {"now": 0, "record": record, "bag": records.bag_of(record)}
        if not before:
            return [None] * len(changes)
        known = [change for change, token in zip(changes, tokens, strict=True) if token in before]
        changed = await in_slices(changing(known, before))
        # A failure on a bag that is remembered proves nothing.
        for outcome in changed.outcomes:
            if outcome.is_failure:
                changed.bags.pop(outcome.token, None)
        written = await self._write(changed, before, b"")
        outcomes = iter(changed.outcomes)
        tried = [next(outcomes) if token in before else None for token in tokens]
        return [_result(one, written) if one and one.token in written else None for one in tried]

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
            versions = secrets.token_bytes(8 * len(tokens))
            bodies = {
                token: records.body_with_bag(
                    before[token]["record"], versions[8 * at : 8 * at + 8], changed.bags[token]
                )
                for at, token in enumerate(tokens)
            }
            items = [
                (token, records.version_of(before[token]["record"]), limits_us[token], body)
                for token, body in bodies.items()
            ]
            flags = await self._pool.each(scripts.WRITE_BAGS, (claim,), items, is_write=True)
            for (token, body), flag in zip(bodies.items(), flags, strict=True):
                written[token] = flag if isinstance(flag, MnemosyneError) else bool(flag)
                if written[token] is True:
                    self.records.add(token, records.without_expiry(body))
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
