"""Callers that write to Redis while something is broken, and remember what was acknowledged."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final, TypeVar

from stores import lookups, new

from mnemosyned.errors import MnemosyneError, StorageUnavailable
from mnemosyned.sessions.model import Abandonment, ChangedBag, Session, ValueChange
from mnemosyned.sessions.store import SessionStore

Result = TypeVar("Result")
# Sessions that are ended before and after what happens.
_MORE: Final = 60


class Caller:
    """Starts sessions, changes them, ends every third one, and remembers what was acknowledged."""

    def __init__(self, store: SessionStore, number: int) -> None:
        self.store = store
        self.number = number
        self.kept: set[str] = set()
        self.ended: set[str] = set()
        self.failures: list[float] = []
        self.errors: set[str] = set()
        self.is_over = False

    async def run(self) -> None:
        count = 0
        while not self.is_over:
            count += 1
            token = f"{self.number}/{count}"
            try:
                session = _only(await self.store.start([new(token, bag=b"")]))
                assert isinstance(session, Session)
                change = ValueChange(access_token=token, key="k", value="v")
                changed = _only(await self.store.set_values([change]))
                assert isinstance(changed, ChangedBag)
                assert changed.values == {"k": "v"}
                self.kept.add(token)
                if count % 3 == 0:
                    self.kept.discard(token)
                    assert _only(await self.store.abandon([Abandonment(access_token=token)])) is True
                    self.ended.add(token)
            except StorageUnavailable as exc:
                self.failures.append(time.monotonic())
                self.errors.add(exc.detail)
                await asyncio.sleep(0.01)


@asynccontextmanager
async def calling(store: SessionStore) -> AsyncIterator[list[Caller]]:
    """Have sixteen callers write until the end of the block."""
    callers = [Caller(store, number) for number in range(16)]
    tasks = [asyncio.create_task(caller.run()) for caller in callers]
    try:
        await _until_more_have_ended(callers)
        yield callers
        # Some more after what has happened.
        await _until_more_have_ended(callers)
    finally:
        for caller in callers:
            caller.is_over = True
        await asyncio.gather(*tasks)


async def _until_more_have_ended(callers: list[Caller]) -> None:
    def ended() -> int:
        return sum(len(caller.ended) for caller in callers)

    before = ended()
    async with asyncio.timeout(30):
        while ended() - before < _MORE:
            await asyncio.sleep(0.01)


async def assert_nothing_is_lost(store: SessionStore, callers: list[Caller]) -> None:
    kept = [token for caller in callers for token in caller.kept]
    ended = [token for caller in callers for token in caller.ended]
    loaded = await store.load(lookups(*kept))

    assert min(len(kept), len(ended)) >= 2 * _MORE
    assert [token for token, one in zip(kept, loaded, strict=True) if not isinstance(one, Session)] == []
    assert await store.exist(ended) == [False] * len(ended)


async def until_it_takes_writes(store: SessionStore) -> None:
    async with asyncio.timeout(20):
        while isinstance(await _error_of_a_write(store), StorageUnavailable):
            await asyncio.sleep(0.02)


async def _error_of_a_write(store: SessionStore) -> StorageUnavailable | None:
    try:
        _only(await store.start([new()]))
    except StorageUnavailable as exc:
        return exc
    return None


def _only(results: Sequence[Result | MnemosyneError]) -> Result:
    """Return the result of a batch of one, or raise it: on a cluster an item fails alone."""
    (result,) = results
    if isinstance(result, MnemosyneError):
        raise result
    return result
