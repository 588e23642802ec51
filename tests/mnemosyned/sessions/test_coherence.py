from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
from serving import kept
from stores import new

from cache.lru import Lru, Slot
from cache.read_through import ReadThrough
from mnemosyned.errors import DeadlineExceeded, MnemosyneError, SessionNotFound, StorageUnavailable
from mnemosyned.sessions.coherence import Coherence, Written
from mnemosyned.sessions.encoded import EncodedSession
from mnemosyned.sessions.model import Session
from mnemosyned.sessions.store import Deletion
from mnemosyned.sessions.token_hash import TokenHasher, session_id
from mnemosyned.sessions.token_index import TokenIndex

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


class Others:
    """Other nodes, whose copies are gone when the test says so; a Settler."""

    def __init__(self) -> None:
        self.told: list[tuple[str, ...]] = []
        self.settled: list[tuple[str, ...]] = []
        self.may_settle = asyncio.Event()
        self.is_needed = True
        self.awaited = 0  # how often their own ends were awaited
        self.have_settled = True
        self.failures = 0  # so many of the next settlings fail

    def settle(self, tokens: Sequence[str]) -> Coroutine[Any, Any, None] | None:
        return self._settle(tokens) if self.is_needed else None

    def settle_stored(self, stored_keys: Sequence[str]) -> Coroutine[Any, Any, None] | None:
        return self._settle(stored_keys) if self.is_needed else None

    def settle_everything(self) -> Coroutine[Any, Any, None] | None:
        return self._settle(["everything"])

    async def others_have_settled(self) -> bool:
        self.awaited += 1
        return self.have_settled

    async def _settle(self, keys: Sequence[str]) -> None:
        self.told.append(tuple(keys))
        if self.failures:
            self.failures -= 1
            raise StorageUnavailable("nothing proves it")
        await self.may_settle.wait()
        self.settled.append(tuple(keys))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


async def written(*results: bool | MnemosyneError) -> list[bool | MnemosyneError]:
    return list(results)


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Others:
    monkeypatch.setattr("mnemosyned.sessions.coherence._RETRY_S", 0.01)
    return Others()


async def outcome_of(written: Written[Any]) -> object:
    outcome = written.outcome()
    return await outcome if isinstance(outcome, Coroutine) else outcome


async def test_own_copies_are_gone_before_the_caller_has_the_answer() -> None:
    cache = new_cache(None, "t", "u")
    coherence = Coherence(cache)
    (one,) = await coherence.around_write(["t"], written(True))

    assert kept(cache) == ["u"]
    assert await outcome_of(one)


async def test_own_copies_are_gone_though_the_store_failed_and_the_write_is_settled(others: Others) -> None:
    cache = new_cache(None, "t")
    coherence = Coherence(cache, settler=others)

    async def fail() -> list[bool | MnemosyneError]:
        raise StorageUnavailable("no answer: the write may have been done")

    with pytest.raises(StorageUnavailable):
        await coherence.around_write(["t"], fail())
    assert not kept(cache)
    others.may_settle.set()

    await until(lambda: others.settled == [("t",)])


async def test_a_caller_waits_for_other_nodes_also_where_its_own_item_failed(others: Others) -> None:
    coherence = Coherence(new_cache(), settler=others)
    good, bad = await coherence.around_write(["t", "u"], written(True, SessionNotFound()))
    callers = [asyncio.create_task(outcome_of(one)) for one in (good, bad)]
    await until(lambda: others.told == [("t", "u")])

    assert not any(caller.done() for caller in callers)
    others.may_settle.set()
    assert await callers[0]
    with pytest.raises(SessionNotFound):
        await callers[1]


async def test_a_caller_that_leaves_does_not_end_the_settling(others: Others) -> None:
    coherence = Coherence(new_cache(), settler=others)
    one, other = await coherence.around_write(["t", "u"], written(True, True))
    callers = [asyncio.create_task(outcome_of(item)) for item in (one, other)]
    await until(lambda: others.told)
    callers[0].cancel()
    await asyncio.gather(callers[0], return_exceptions=True)
    others.may_settle.set()

    assert await callers[1]
    assert others.settled == [("t", "u")]


async def test_a_settling_that_fails_leaves_the_outcome_unknown_and_goes_on(others: Others) -> None:
    coherence = Coherence(new_cache(), settler=others)
    others.failures = 3
    one, other = await coherence.around_write(["t", "u"], written(True, SessionNotFound()))
    for item in (one, other):
        with pytest.raises(StorageUnavailable):
            await outcome_of(item)
    others.may_settle.set()

    await until(lambda: others.settled == [("t", "u")])
    assert len(others.told) == 4
    await asyncio.sleep(0.05)
    assert len(others.told) == 4


async def test_a_settling_of_which_there_is_nothing_left_is_tried_no_more(others: Others) -> None:
    coherence = Coherence(new_cache(), settler=others)
    others.failures = 1
    (one,) = await coherence.around_write(["t"], written(True))
    with pytest.raises(StorageUnavailable):
        await outcome_of(one)
    others.is_needed = False
    await asyncio.sleep(0.05)

    assert others.told == [("t",)]
    await coherence.close()


async def test_where_no_other_node_can_have_a_copy_no_caller_waits(others: Others) -> None:
    others.is_needed = False
    (one,) = await Coherence(new_cache(), settler=others).around_write(["t"], written(True))

    assert one == Written(True, None)


async def test_a_delete_is_settled_and_runs_on_without_its_caller(others: Others) -> None:
    cache, may_delete = new_cache(None, "t"), asyncio.Event()
    coherence = Coherence(cache, settler=others)

    async def delete() -> Deletion:
        await may_delete.wait()
        return Deletion(stored_keys=["t"], is_all=True)

    deleting = asyncio.create_task(coherence.around_delete(delete()))
    await asyncio.sleep(0)
    deleting.cancel()
    await asyncio.gather(deleting, return_exceptions=True)
    may_delete.set()

    await until(lambda: others.told == [("t",)])
    assert not kept(cache)
    await coherence.close()


async def test_a_delete_waits_until_it_is_settled(others: Others) -> None:
    coherence = Coherence(new_cache(), settler=others)

    async def delete() -> Deletion:
        return Deletion(stored_keys=["t", "u"], is_all=True)

    deleting = asyncio.create_task(coherence.around_delete(delete()))
    await until(lambda: others.told == [("t", "u")])
    assert not deleting.done()
    others.may_settle.set()
    assert (await deleting).is_all
    others.failures = 1
    with pytest.raises(StorageUnavailable):
        await coherence.around_delete(delete())

    await until(lambda: len(others.settled) == 2)


async def test_a_delete_that_found_nothing_waits_for_the_ends_that_were_under_way(others: Others) -> None:
    coherence = Coherence(new_cache(), settler=others)

    async def delete(*keys: str) -> Deletion:
        return Deletion(stored_keys=list(keys), is_all=True)

    (abandoned,) = await coherence.around_write(["t"], written(True), is_end=True)
    deleting = [asyncio.create_task(coherence.around_delete(delete("u")))]
    await until(lambda: others.told == [("t",), ("u",)])
    # Each waits for what began before, and none for another one that waits.
    deleting += [asyncio.create_task(coherence.around_delete(delete())) for _ in range(2)]
    await asyncio.wait(deleting, timeout=0.02)
    assert not any(task.done() for task in deleting)
    assert others.awaited == 0
    others.may_settle.set()
    await asyncio.gather(*deleting, outcome_of(abandoned))

    assert others.awaited == 3


async def test_a_delete_has_all_copies_dropped_if_what_was_ended_is_not_known(others: Others) -> None:
    cache = new_cache(None, "t", "u")
    coherence = Coherence(cache, settler=others)
    others.may_settle.set()

    async def fail() -> Deletion:
        raise StorageUnavailable("no answer: some sessions may have ended")

    async def delete() -> Deletion:
        return Deletion(stored_keys=[], is_all=True)

    with pytest.raises(StorageUnavailable):
        await coherence.around_delete(fail())
    assert not kept(cache)
    await until(lambda: others.settled == [("everything",)])
    # All is settled: nothing more is to do for another Delete.
    await coherence.around_delete(delete())
    assert others.settled == [("everything",)]
    others.have_settled = False
    await coherence.around_delete(delete())
    assert others.settled == [("everything",)] * 2


async def test_a_delete_that_was_never_sent_drops_nothing(others: Others) -> None:
    cache = new_cache(None, "t")

    async def fail() -> Deletion:
        raise DeadlineExceeded

    with pytest.raises(DeadlineExceeded):
        await Coherence(cache, settler=others).around_delete(fail())
    assert kept(cache) == ["t"]
    assert not others.told


async def test_a_delete_that_found_nothing_is_settled_if_it_names_its_session(others: Others) -> None:
    index = TokenIndex(HASHER)
    cache = new_cache(index, "t", "u", "v")
    coherence = Coherence(cache, index=index, settler=others)
    others.may_settle.set()

    async def delete() -> Deletion:
        return Deletion(stored_keys=[], is_all=True)

    assert (await coherence.around_delete(delete())).is_all
    assert others.settled == []
    # An earlier Delete may have ended it, and failed.
    await coherence.around_delete(delete(), token="t")
    stored = HASHER.stored_key("u")
    await coherence.around_delete(delete(), token=session_id(stored))
    unknown = session_id(FOREIGN.stored_key("v"))
    await coherence.around_delete(delete(), token=unknown)

    assert others.settled == [("t",), (stored,), (unknown,)]
    assert kept(cache) == ["v"]


async def test_a_delete_of_a_token_that_failed_drops_its_copies_too(others: Others) -> None:
    cache = new_cache(None, "t", "u")
    others.may_settle.set()

    async def fail() -> Deletion:
        raise StorageUnavailable("no answer: the session may have ended")

    with pytest.raises(StorageUnavailable):
        await Coherence(cache, settler=others).around_delete(fail(), token="t")

    assert kept(cache) == ["u"]
    await until(lambda: others.settled == [("t",)])


def test_a_copy_is_dropped_by_the_hash_of_its_token() -> None:
    index = TokenIndex(HASHER)
    cache = new_cache(index, "a", "b")
    coherence = Coherence(cache, index=index)
    coherence.drop_copies([HASHER.stored_key("a"), HASHER.stored_key("unknown"), "c"])

    assert kept(cache) == ["b"]


def test_a_fill_under_way_is_fenced_by_the_hash_too() -> None:
    index = TokenIndex(HASHER)
    cache = new_cache(index)
    with cache.begin_fill("a") as fill:
        Coherence(cache, index=index).drop_copy(HASHER.stored_key("a"))
        fill.put(Slot(encoded("a"), 1, NEVER_US))

    assert not kept(cache)


def test_a_hash_by_another_key_may_be_of_any_token_and_drops_all() -> None:
    index = TokenIndex(HASHER)
    cache = new_cache(index, "a", "b")
    coherence = Coherence(cache, index=index)
    with cache.begin_fill("c") as fill:
        coherence.drop_copy(FOREIGN.stored_key("a"))
        fill.put(Slot(encoded("c"), 1, NEVER_US))

    assert not kept(cache)
    assert index.find(HASHER.stored_key("a")) is None


def test_a_hash_may_be_of_any_token_where_no_key_is_known() -> None:
    cache = new_cache(None, "a", "b")
    Coherence(cache).drop_copy(HASHER.stored_key("a"))

    assert not kept(cache)


def test_without_keys_given_every_copy_is_dropped() -> None:
    cache = new_cache(None, "a", "b")
    Coherence(cache).drop_copies(None)

    assert not kept(cache)
