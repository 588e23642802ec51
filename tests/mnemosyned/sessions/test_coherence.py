from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

import pytest
from stores import new

from aio.deadline import NO_DEADLINE, Deadline
from cache.lru import Lru, Slot
from cache.read_through import ReadThrough
from mnemosyned.errors import MnemosyneError, SessionNotFound, StorageUnavailable
from mnemosyned.sessions.coherence import Coherence, TokenIndex, Written
from mnemosyned.sessions.encoded import EncodedSession
from mnemosyned.sessions.model import Session
from mnemosyned.sessions.store import Deletion
from mnemosyned.sessions.token_hash import TokenHasher

NEVER_US = 2**61
HASHER = TokenHasher([b"a key that only these tests know"], is_hashing=True)
FOREIGN = TokenHasher([b"a key of another cluster"], is_hashing=True)


def encoded(token: str) -> EncodedSession:
    made = new(token)
    return EncodedSession(
        Session(
            access_token=token,
            subject_id=made.subject_id,
            subject_client="",
            refresh_token="",
            bag=b"",
            expires_at_us=NEVER_US,
        )
    )


def new_cache(index: TokenIndex | None = None, *tokens: str) -> ReadThrough[EncodedSession]:
    cache: ReadThrough[EncodedSession] = ReadThrough(
        Lru(max_entries=10, max_bytes=10**6), Lru(max_entries=10, max_bytes=10**6), observer=index
    )
    for token in tokens:
        with cache.begin_fill(token) as fill:
            fill.put(Slot(encoded(token), 1, NEVER_US))
    return cache


class Remote:
    """Other nodes, which confirm when they are let."""

    def __init__(self) -> None:
        self.told: list[tuple[str, ...]] = []
        self.confirmed: list[tuple[str, ...]] = []
        self.given_up: list[tuple[str, ...]] = []
        self.may_confirm = asyncio.Event()
        self.is_needed = True

    def routing(self) -> object:
        return "the ring"

    def after_write(self, tokens: Sequence[str], routed_by: object) -> Coroutine[Any, Any, None] | None:
        assert routed_by == "the ring"
        return self._tell(tokens) if self.is_needed else None

    def give_up(self, tokens: Sequence[str]) -> None:
        self.given_up.append(tuple(tokens))

    def after_delete(self, stored_keys: Sequence[str]) -> Coroutine[Any, Any, None] | None:
        return self._tell(stored_keys) if self.is_needed else None

    async def _tell(self, keys: Sequence[str]) -> None:
        self.told.append(tuple(keys))
        await self.may_confirm.wait()
        self.confirmed.append(tuple(keys))


async def until(condition: object) -> None:
    async with asyncio.timeout(5):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0)


async def written(*results: bool | MnemosyneError) -> list[bool | MnemosyneError]:
    return list(results)


async def test_own_copies_are_gone_before_the_caller_has_the_answer() -> None:
    cache = new_cache(None, "t", "u")
    coherence = Coherence(cache)
    (one,) = await coherence.around_write(["t"], written(True))

    assert "t" not in cache.lru
    assert "u" in cache.lru
    assert await one.outcome(NO_DEADLINE)


async def test_own_copies_are_gone_though_the_store_failed() -> None:
    cache, remote = new_cache(None, "t"), Remote()
    coherence = Coherence(cache, invalidator=remote)

    async def fail() -> list[bool | MnemosyneError]:
        raise StorageUnavailable("no answer: the write may have been done")

    writing = asyncio.create_task(coherence.around_write(["t"], fail()))
    await until(lambda: remote.told == [("t",)])

    assert "t" not in cache.lru
    assert not writing.done()
    remote.may_confirm.set()
    with pytest.raises(StorageUnavailable):
        await writing


async def test_a_caller_waits_for_other_nodes_also_where_its_own_item_failed() -> None:
    remote = Remote()
    coherence = Coherence(new_cache(), invalidator=remote)
    good, bad = await coherence.around_write(["t", "u"], written(True, SessionNotFound()))
    callers = [asyncio.create_task(one.outcome(NO_DEADLINE)) for one in (good, bad)]
    await until(lambda: remote.told == [("t", "u")])

    assert not any(caller.done() for caller in callers)
    remote.may_confirm.set()
    assert await callers[0]
    with pytest.raises(SessionNotFound):
        await callers[1]


async def test_a_caller_that_leaves_does_not_end_the_telling() -> None:
    remote = Remote()
    coherence = Coherence(new_cache(), invalidator=remote)
    (one,) = await coherence.around_write(["t"], written(True))
    caller = asyncio.create_task(one.outcome(NO_DEADLINE))
    await until(lambda: remote.told)
    caller.cancel()
    await asyncio.gather(caller, return_exceptions=True)
    remote.may_confirm.set()

    await until(lambda: remote.confirmed == [("t",)])
    assert not remote.given_up


async def test_a_caller_waits_for_half_of_its_time_and_its_peers_are_told_on() -> None:
    remote = Remote()
    coherence = Coherence(new_cache(), invalidator=remote)
    (one,) = await coherence.around_write(["t"], written(True))

    assert await one.outcome(Deadline.in_s(0.02))
    assert remote.given_up == [("t",)]
    assert not remote.confirmed
    remote.may_confirm.set()
    await until(lambda: remote.confirmed == [("t",)])


async def test_where_no_other_node_can_have_a_copy_no_caller_waits() -> None:
    remote = Remote()
    remote.is_needed = False
    (one,) = await Coherence(new_cache(), invalidator=remote).around_write(["t"], written(True))

    assert one == Written(True, None)


async def test_a_delete_is_told_and_runs_on_without_its_caller() -> None:
    cache, remote, may_delete = new_cache(None, "t"), Remote(), asyncio.Event()
    coherence = Coherence(cache, invalidator=remote)

    async def delete() -> Deletion:
        await may_delete.wait()
        return Deletion(stored_keys=["t"], is_all=True)

    deleting = asyncio.create_task(coherence.around_delete(delete()))
    await asyncio.sleep(0)
    deleting.cancel()
    await asyncio.gather(deleting, return_exceptions=True)
    may_delete.set()

    await until(lambda: remote.told == [("t",)])
    assert "t" not in cache.lru
    await coherence.close()


async def test_a_delete_of_a_token_that_failed_drops_its_copies_too() -> None:
    cache, remote = new_cache(None, "t", "u"), Remote()
    remote.may_confirm.set()

    async def fail() -> Deletion:
        raise StorageUnavailable("no answer: the session may have ended")

    with pytest.raises(StorageUnavailable):
        await Coherence(cache, invalidator=remote).around_delete(fail(), token="t")

    assert cache.keys() == ["u"]
    assert remote.confirmed == [("t",)]


def test_a_copy_is_dropped_by_the_hash_of_its_token() -> None:
    index = TokenIndex(HASHER)
    cache = new_cache(index, "a", "b")
    coherence = Coherence(cache, index=index)
    coherence.drop_copies([HASHER.stored_key("a"), HASHER.stored_key("unknown"), "c"])

    assert cache.keys() == ["b"]


def test_a_fill_under_way_is_fenced_by_the_hash_too() -> None:
    index = TokenIndex(HASHER)
    cache = new_cache(index)
    with cache.begin_fill("a") as fill:
        Coherence(cache, index=index).drop_copy(HASHER.stored_key("a"))
        fill.put(Slot(encoded("a"), 1, NEVER_US))

    assert not cache.keys()


def test_a_hash_by_another_key_may_be_of_any_token_and_drops_all() -> None:
    index = TokenIndex(HASHER)
    cache = new_cache(index, "a", "b")
    coherence = Coherence(cache, index=index)
    with cache.begin_fill("c") as fill:
        coherence.drop_copy(FOREIGN.stored_key("a"))
        fill.put(Slot(encoded("c"), 1, NEVER_US))

    assert not cache.keys()
    assert index.find(HASHER.stored_key("a")) is None


def test_a_hash_may_be_of_any_token_where_no_key_is_known() -> None:
    cache = new_cache(None, "a", "b")
    Coherence(cache).drop_copy(HASHER.stored_key("a"))

    assert not cache.keys()


def test_without_keys_given_every_copy_is_dropped() -> None:
    cache = new_cache(None, "a", "b")
    Coherence(cache).drop_copies(None)

    assert not cache.keys()
