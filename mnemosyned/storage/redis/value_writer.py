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
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from aio.slices import in_slices
from mnemosyned.errors import MnemosyneError, StorageUnavailable
from mnemosyned.sessions.model import MAX_BAG_BYTES, ChangedBag, Session, ValueChange
from mnemosyned.storage.redis import records, scripts
from mnemosyned.storage.remembered import Remembered
from mnemosyned.storage.value_changes import Changed, Outcome, changing

if TYPE_CHECKING:
    from mnemosyned.storage.redis.items import ItemPool

_QUICK_ROUNDS: Final = 4
_CLAIMED_MS: Final = 500
# Writers that have lost a round do not begin the next one together.
_MAX_PAUSE_S: Final = 0.02

# Whether a bag was written, or what has failed; a session: it was, and that is stored now.
_Written: TypeAlias = Session | bool | MnemosyneError


class ValueWriter:
    """Sets keys of bags, and remembers small ones; gives up what it could not write within `timeout_s`."""

    def __init__(self, pool: ItemPool, *, timeout_s: float) -> None:
        self._pool = pool
        self._timeout_s = timeout_s
        # Not of what is started or read: that would cost each Start and Get more than it spares a SetValue.
        self._records = Remembered()  # that were written here; their expiries do not count

    async def apply(self, changes: Sequence[ValueChange]) -> list[ChangedBag | MnemosyneError]:
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

    async def _try_known(self, changes: Sequence[ValueChange]) -> list[ChangedBag | MnemosyneError | None]:
        """Run the round that reads nothing; return the results, None where the bag must be read."""
        tokens = [change.access_token.encode() for change in changes]
        before: dict[bytes, dict[str, Any]] = {}
        for token in tokens:
            # Until it is written: otherwise a script that fails would leave what may be no more.
            record = self._records.take(token)
            if record is not None:
                # The clock is compared when it is written.
                before[token] = _as_it_was(token, record, 0)
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
    ) -> list[ChangedBag | MnemosyneError | None]:
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
                before[token] = _as_it_was(token, record, now_us)
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
    ) -> dict[bytes, _Written]:
        """Write the bags; return what has become of each token."""
        limits_us = changed.limits_us()
        written: dict[bytes, _Written] = {}
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
            expiries = await self._pool.each(scripts.WRITE_BAGS, (claim,), items, is_write=True)
            for (token, body), expiry in zip(bodies.items(), expiries, strict=True):
                written[token] = _written(before[token]["session"], changed.bags[token], expiry)
                if isinstance(expiry, bytes):
                    self._records.add(token, records.without_expiry(body))
        return written


def _as_it_was(token: bytes, record: Any, now_us: int) -> dict[str, Any]:  # noqa: ANN401  # as the reply has it
    found = records.session_of(token.decode(), record)
    session = found if isinstance(found, Session) else None
    bag = None if session is None else session.bag
    return {"now": now_us, "record": record, "session": session, "bag": bag}


def _written(before: Session, bag: bytes, expiry: bytes | int | MnemosyneError) -> _Written:
    if not isinstance(expiry, bytes):
        return bool(expiry) if isinstance(expiry, int) else expiry
    # No other field has changed: the version would have changed with it.
    return replace(before, bag=bag, expires_at_us=int(expiry)) if expiry.isdigit() else True


def _result(outcome: Outcome, written: Mapping[bytes, _Written]) -> ChangedBag | MnemosyneError | None:
    if isinstance(outcome.result, MnemosyneError):
        return outcome.result
    found = written[outcome.token]
    if isinstance(found, MnemosyneError):
        return found
    return ChangedBag(outcome.result, found if isinstance(found, Session) else None) if found else None
