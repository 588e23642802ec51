from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest
from prometheus_client import CollectorRegistry, Counter
from stores import TTL_US, lookups

from mnemosyned.errors import MnemosyneError, StorageUnavailable
from mnemosyned.sessions.encoded import EncodedSession
from mnemosyned.sessions.model import Abandonment, NewSession, Session, Touch
from mnemosyned.sessions.touches import TouchWriter
from mnemosyned.storage.memory import MemoryStore


class Store(MemoryStore):
    """A memory store that counts batches of touches and can be away."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []
        self.is_away = False
        self.refused = 0
        self.during_touch: Callable[[], None] = lambda: None

    async def touch(self, touches: Sequence[Touch]) -> list[bool | MnemosyneError]:
        self.during_touch()
        if self.is_away:
            self.refused += 1
            raise StorageUnavailable("unavailable")
        self.batches.append(len(touches))
        return await super().touch(touches)


class Setup:
    def __init__(self, max_waiting: int = 1000) -> None:
        self.store = Store()
        self.lost = Counter("lost", "Lost.", registry=CollectorRegistry())
        self.gone: list[str] = []
        self.touches = TouchWriter(
            self.store, max_waiting=max_waiting, lost=self.lost, on_gone=self.gone.append
        )

    async def extended(self, token: str) -> EncodedSession:
        (session,) = await self.store.start([NewSession(ttl_us=TTL_US, access_token=token, subject_id="s")])
        assert isinstance(session, Session)
        encoded = EncodedSession(session)
        encoded.expires_at_us += 1_000_000
        self.touches.mark(token, encoded)
        return encoded

    def stored_us(self, token: str) -> int:
        return self.store._session_by_token[token].expires_at_us


async def test_many_sessions_are_written_in_few_batches() -> None:
    setup = Setup()
    readies = {f"t{n}": await setup.extended(f"t{n}") for n in range(600)}
    await setup.touches.flush()

    assert setup.store.batches == [512, 88]
    assert all(setup.stored_us(token) == encoded.expires_at_us for token, encoded in readies.items())
    assert not any(encoded.is_dirty for encoded in readies.values())
    assert len(setup.touches) == 0


async def test_what_could_not_be_written_waits_for_the_next_flush() -> None:
    setup = Setup()
    encoded = await setup.extended("t")
    setup.store.is_away = True
    with pytest.raises(StorageUnavailable):
        await setup.touches.flush()
    assert encoded.is_dirty
    setup.store.is_away = False
    await setup.touches.flush()

    assert setup.stored_us("t") == encoded.expires_at_us


async def test_a_session_that_the_storage_lost_is_reported() -> None:
    setup = Setup()
    await setup.extended("t")
    await setup.store.abandon([Abandonment(access_token="t")])
    await setup.touches.flush()

    assert setup.gone == ["t"]


async def test_no_more_wait_than_the_bound_and_the_loss_is_counted() -> None:
    setup = Setup(max_waiting=2)
    readies = [await setup.extended(f"t{n}") for n in range(3)]

    assert len(setup.touches) == 2
    assert [encoded.is_dirty for encoded in readies] == [False, True, True]
    assert setup.lost._value.get() == 1


async def test_flushing_goes_on_by_itself_and_survives_an_unavailable_storage() -> None:
    setup = Setup()
    setup.store.is_away = True
    running = asyncio.create_task(setup.touches.run(0.02))
    encoded = await setup.extended("t")
    async with asyncio.timeout(5):
        while not setup.store.refused:
            await asyncio.sleep(0)
        setup.store.is_away = False
        while encoded.is_dirty:
            await asyncio.sleep(0)
    running.cancel()

    assert setup.stored_us("t") == encoded.expires_at_us


async def test_a_second_copy_of_a_session_does_not_lose_what_the_first_promised() -> None:
    setup = Setup()
    first = await setup.extended("t")
    promised_us = first.expires_at_us
    (session,) = await setup.store.load(lookups("t"))
    assert isinstance(session, Session)
    setup.touches.mark("t", EncodedSession(session))
    await setup.touches.flush()

    assert setup.stored_us("t") == promised_us


async def test_what_comes_back_does_not_take_the_place_of_what_was_marked_meanwhile() -> None:
    setup = Setup()
    first = await setup.extended("t")
    promised_us = first.expires_at_us
    (session,) = await setup.store.load(lookups("t"))
    assert isinstance(session, Session)
    second = EncodedSession(session)
    setup.store.during_touch = lambda: setup.touches.mark("t", second)
    setup.store.is_away = True
    with pytest.raises(StorageUnavailable):
        await setup.touches.flush()
    setup.store.is_away = False
    setup.store.during_touch = lambda: None
    await setup.touches.flush()

    assert setup.stored_us("t") == promised_us
    assert not second.is_dirty


async def test_concurrent_flushes_write_everything_once() -> None:
    setup = Setup()
    await setup.extended("t")
    await asyncio.gather(*(setup.touches.flush() for _ in range(5)))

    assert setup.store.batches == [1]
