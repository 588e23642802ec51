"""Taking a connection from asyncpg's pool, which opens another if all are in use and there may be more.

A server may have none left (53300), and a pooler may let a new client wait. The pool would fail each call
that makes it ask for one more, though connections that it has are given back all the time:

    all in use ── one more is opened ──> taken
                        └── none left ──> for 10 s, no more than there are ──> taken when one is given back

Calls wait here and not in the queue of asyncpg, where each of them would make its own attempt in turn.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final

import asyncpg

if TYPE_CHECKING:
    from asyncpg import Pool, Record
    from asyncpg.pool import PoolConnectionProxy

# How long no more connections are asked for after the server had none left.
_FULL_S: Final = 10.0


class Acquisition:
    """Takes connections for the calls of one pool; `released` is told of each that is given back."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._limit = most
        self._full_until_s = 0.0
        self._taken = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def take(
        self, pool: Pool[Record], timeout_s: float, *, is_urgent: bool = False
    ) -> PoolConnectionProxy[Record]:
        """Return a connection, an urgent call before the others; raises asyncpg's errors, or TimeoutError."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + timeout_s
        while True:
            if self._limit < self._most and loop.time() >= self._full_until_s:
                self._limit = self._most
            if self._taken < self._limit:
                self._taken += 1
            else:
                await self._wait(until_s, is_urgent=is_urgent)
            try:
                return await pool.acquire(timeout=max(until_s - loop.time(), 0.001))
            except (asyncpg.TooManyConnectionsError, TimeoutError):
                self.released()
                if not pool.get_size() or loop.time() >= until_s:
                    raise
                self._limit, self._full_until_s = pool.get_size(), loop.time() + _FULL_S
            except BaseException:
                self.released()
                raise

    def released(self) -> None:
        """Take note that a connection was given back; the call that waits longest may take it."""
        if self._taken <= self._limit:
            while self._waiting:
                waiter = self._waiting.popleft()
                if not waiter.done():
                    waiter.set_result(None)
                    return
        self._taken -= 1

    async def _wait(self, until_s: float, *, is_urgent: bool) -> None:
        """Wait for the place of another call."""
        waiter = asyncio.get_running_loop().create_future()
        if is_urgent:
            self._waiting.appendleft(waiter)
        else:
            self._waiting.append(waiter)
        try:
            async with asyncio.timeout_at(until_s):
                await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled():
                # It got a place at the moment at which it gave up.
                self.released()
            raise
