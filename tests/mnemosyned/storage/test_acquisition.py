"""Who gets a connection, and who waits, when the server has no more."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from mnemosyned.storage.postgres.acquisition import Acquisition


class Pool:
    """As asyncpg's, of connections that are numbers; the server has `has` of them."""

    def __init__(self, has: int) -> None:
        self.has = has
        self.attempts = 0
        self.idle: list[int] = []
        self.size = 0

    def get_size(self) -> int:
        return self.size

    async def acquire(self, *, timeout: float) -> int:  # noqa: ASYNC109  # asyncpg's
        assert timeout > 0
        await asyncio.sleep(0)
        if self.idle:
            return self.idle.pop()
        self.attempts += 1
        if self.size >= self.has:
            raise asyncpg.TooManyConnectionsError("sorry")
        self.size += 1
        return self.size


async def calls(acquisition: Acquisition, pool: Pool, count: int) -> None:
    async def call() -> None:
        connection = await acquisition.take(pool, 5.0)  # type: ignore[arg-type]
        await asyncio.sleep(0)
        pool.idle.append(connection)  # type: ignore[arg-type]
        acquisition.released()

    await asyncio.gather(*(call() for _ in range(count)))


async def test_all_calls_are_served_by_the_connections_that_the_server_has() -> None:
    pool, acquisition = Pool(3), Acquisition(16)
    await calls(acquisition, pool, 1000)
    first = pool.attempts
    await calls(acquisition, pool, 1000)

    # One attempt for each place in the pool, and none while the server is known to be full.
    assert first <= 16
    assert pool.attempts == first


async def test_without_a_connection_the_servers_answer_is_raised_at_once() -> None:
    pool, acquisition = Pool(0), Acquisition(4)
    with pytest.raises(asyncpg.TooManyConnectionsError):
        await acquisition.take(pool, 5.0)  # type: ignore[arg-type]
    pool.has = 1
    await calls(acquisition, pool, 10)


async def test_calls_that_give_up_leave_their_place_to_others() -> None:
    pool, acquisition = Pool(1), Acquisition(1)
    held = await acquisition.take(pool, 5.0)  # type: ignore[arg-type]
    with pytest.raises(TimeoutError):
        await acquisition.take(pool, 0.01)  # type: ignore[arg-type]
    waiting = [asyncio.create_task(acquisition.take(pool, 5.0)) for _ in range(3)]  # type: ignore[arg-type]
    await asyncio.sleep(0)
    pool.idle.append(held)  # type: ignore[arg-type]
    acquisition.released()
    # It has been given the place, and has not yet run.
    waiting[0].cancel()
    waiting[1].cancel()

    async with asyncio.timeout(5):
        assert await waiting[2] == held
    assert [task.cancelled() for task in waiting[:2]] == [True, True]
