"""The copy that a SetValue leaves at the owner of its session, and what keeps it away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import grpc
import pytest
from clusters import until
from mnemosynerpc.session_pb2 import (
    AbandonRequest,
    GetRequest,
    Session,
    SetValueRequest,
    StartRequest,
)
from serving import Node, kept, serving
from stores import TTL_US, new

from mnemosyned.errors import MnemosyneError, StorageUnavailable
from mnemosyned.sessions import bag
from mnemosyned.sessions import model as session
from mnemosyned.sessions.model import Abandonment, ChangedBag, Lookup, ValueChange
from mnemosyned.sessions.token_hash import TokenHasher
from mnemosyned.storage.hashed import HashedStore
from mnemosyned.storage.memory import MemoryStore

HASHER = TokenHasher([b"a key that only these tests know"], is_hashing=True)
LARGE = 600 * 1024


class SlowStore(MemoryStore):
    """A memory store whose answers to SetValue can be kept back, after they are done; it counts loads."""

    def __init__(self) -> None:
        super().__init__()
        self.loads = 0
        self.changes = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.fails = False
        self.isolates = False  # it does changes one by one, and in another order

    async def load(self, lookups: Sequence[Lookup]) -> list[session.Session | MnemosyneError]:
        self.loads += len(lookups)
        return await super().load(lookups)

    async def set_values(self, changes: Sequence[ValueChange]) -> list[ChangedBag | MnemosyneError]:
        changed: list[ChangedBag | MnemosyneError] = []
        if self.isolates:
            for change in reversed(changes):
                changed = [*await super().set_values([change]), *changed]
        else:
            changed = await super().set_values(changes)
        self.changes += len(changes)
        await self.may_answer.wait()
        if self.fails:
            raise StorageUnavailable("mnemosyned: storage: no answer")
        return changed


@pytest.fixture
def store() -> SlowStore:
    return SlowStore()


@pytest.fixture(params=["plain", "hashed"])
async def node(request: pytest.FixtureRequest, store: SlowStore) -> AsyncIterator[Node]:
    behind = HashedStore(store, HASHER) if request.param == "hashed" else store
    async with serving(behind) as node:
        yield node


async def start(node: Node, **values: str) -> str:
    request = StartRequest(session=Session(subject_id="s", bag=values))
    return (await node.stub.Start(request)).session.access_token


async def set_value(node: Node, token: str, value: str, key: str = "k") -> dict[str, str]:
    request = SetValueRequest(access_token=token, key=key, value=value)
    return dict((await node.stub.SetValue(request)).bag)


async def got(node: Node, token: str) -> Session:
    return (await node.stub.Get(GetRequest(access_token=token))).session


async def begun(node: Node, store: SlowStore, token: str, value: str) -> asyncio.Task[dict[str, str]]:
    """Begin a SetValue that the storage has done, and not answered."""
    store.may_answer.clear()
    before = store.changes
    task = asyncio.create_task(set_value(node, token, value))
    await until(lambda: store.changes > before)
    return task


def copied_bag(node: Node, token: str) -> bytes:
    """The fields of the copy that the node keeps."""
    return node.cache.lru.slots[token].value._fields


async def test_a_get_after_a_set_value_loads_nothing(node: Node, store: SlowStore) -> None:
    token = await start(node, a="1")
    for number in range(3):
        store.loads = 0
        assert await set_value(node, token, str(number)) == {"a": "1", "k": str(number)}
        found = await got(node, token)
        assert dict(found.bag) == {"a": "1", "k": str(number)}
        assert (found.access_token, found.subject_id) == (token, "s")
        assert store.loads == 0


async def test_a_session_that_was_not_cached_is_after_its_first_change(node: Node, store: SlowStore) -> None:
    token = await start(node)
    node.cache.drop(token)
    await set_value(node, token, "v")

    assert dict((await got(node, token)).bag) == {"k": "v"}
    assert store.loads == 0


async def test_the_copy_has_the_stored_expiry_and_a_waiting_one_still_counts(
    node: Node, store: SlowStore
) -> None:
    token = await start(node)
    (stored_key,) = store._session_by_token
    stored_us = store._session_by_token[stored_key].expires_at_us
    promised = await got(node, token)
    promised_us = promised.expire_at.ToMicroseconds()
    await set_value(node, token, "v")
    slot = node.cache.lru.slots[token]
    # SetValue extends nothing, and what waits is not written yet.
    assert slot.value.expires_at_us == stored_us == store._session_by_token[stored_key].expires_at_us
    assert slot.fresh_until_us < stored_us
    # The next Get promises no less than the one before.
    assert (await got(node, token)).expire_at.ToMicroseconds() >= promised_us
    await node.touches.flush()
    assert store._session_by_token[stored_key].expires_at_us >= promised_us


async def test_a_copy_is_not_served_near_the_stored_expiry(node: Node, store: SlowStore) -> None:
    token = await start(node)
    (stored_key,) = store._session_by_token
    stored = store._session_by_token[stored_key]
    stored.expires_at_us -= TTL_US - 5_000_000  # within two touch intervals
    node.cache.drop(token)
    await set_value(node, token, "v")
    await got(node, token)

    assert store.loads == 1


@pytest.mark.parametrize("is_ended", [True, False])
async def test_another_write_that_ends_meanwhile_leaves_no_copy(
    node: Node, store: SlowStore, *, is_ended: bool
) -> None:
    token = await start(node)
    changing = await begun(node, store, token, "old")
    # As another node does: it writes, and has this one drop its copies.
    (stored_key,) = store._session_by_token
    if is_ended:
        await store.abandon([Abandonment(access_token=stored_key)])
    else:
        held = store._session_by_token[stored_key]
        held.bag = bag.encode({"k": "new"})
    node.service._coherence.drop_copies([stored_key])
    store.may_answer.set()
    await changing

    assert kept(node.cache) == []
    if is_ended:
        with pytest.raises(grpc.aio.AioRpcError):
            await got(node, token)
    else:
        assert dict((await got(node, token)).bag) == {"k": "new"}


async def test_an_end_on_this_node_meanwhile_leaves_no_copy(node: Node, store: SlowStore) -> None:
    token = await start(node)
    changing = await begun(node, store, token, "v")
    await node.stub.Abandon(AbandonRequest(access_token=token))
    # The token gets another session, whose maker keeps it.
    await node.stub.Start(StartRequest(session=Session(access_token=token, subject_id="another")))
    store.may_answer.set()
    await changing

    assert token not in node.cache.lru
    found = await got(node, token)
    assert (found.subject_id, dict(found.bag)) == ("another", {})


async def test_a_change_that_begins_when_another_session_has_the_token_keeps_that(
    node: Node, store: SlowStore
) -> None:
    token = await start(node)
    await set_value(node, token, "v")
    (stored_key,) = store._session_by_token
    await store.abandon([Abandonment(access_token=stored_key)])
    await store.start([new(stored_key, subject_id="another", bag=bag.encode({"b": "2"}))])
    store.loads = 0
    await set_value(node, token, "v")
    found = await got(node, token)

    assert (found.subject_id, dict(found.bag)) == ("another", {"b": "2", "k": "v"})
    assert store.loads == 0


async def test_a_load_that_began_before_the_change_does_not_replace_the_copy(
    node: Node, store: SlowStore
) -> None:
    token = await start(node, k="old")
    slot = node.cache.lru.slots[token]
    changing = await begun(node, store, token, "new")
    # It has read the old bag.
    with node.cache.begin_fill(token) as fill:
        store.may_answer.set()
        await changing
        fill.put(slot)

    assert dict((await got(node, token)).bag) == {"k": "new"}


async def test_the_copy_is_of_the_last_of_many_changes(node: Node, store: SlowStore) -> None:
    token = await start(node)
    for first in range(0, 200, 50):
        numbers = range(first, first + 50)
        bags = await asyncio.gather(*(set_value(node, token, str(n), key=str(n)) for n in numbers))
        store.loads = 0
        found = dict((await got(node, token)).bag)
        assert found == max(bags, key=len) == {str(n): str(n) for n in range(first + 50)}
        assert store.loads == 0


async def test_changes_of_which_the_last_is_not_known_leave_no_copy(node: Node, store: SlowStore) -> None:
    token = await start(node)
    store.isolates = True
    first = await begun(node, store, token, "1")
    others = [asyncio.create_task(set_value(node, token, value)) for value in "23"]
    stats = node.table.unary["/mnemosynerpc.SessionManager/SetValue"].stats
    await until(lambda: stats.in_flight == 3)
    store.may_answer.set()
    await asyncio.gather(first, *others)

    assert kept(node.cache) == []
    (stored,) = store._session_by_token.values()
    assert dict((await got(node, token)).bag) == bag.decode(stored.bag)


@pytest.mark.parametrize("fails", [True, False])
async def test_without_an_answer_or_a_change_only_the_old_copy_goes(
    node: Node, store: SlowStore, *, fails: bool
) -> None:
    token = await start(node)
    await got(node, token)
    if fails:
        store.fails = True
    else:
        (stored_key,) = store._session_by_token
        await store.abandon([Abandonment(access_token=stored_key)])
    with pytest.raises(grpc.aio.AioRpcError):
        await set_value(node, token, "v")

    assert kept(node.cache) == []


async def test_a_change_past_the_cache_keeps_nothing(node: Node) -> None:
    token = await start(node)
    await node.service.set_value_uncached(token, "k", "v")

    assert kept(node.cache) == []
    assert dict((await got(node, token)).bag) == {"k": "v"}


async def test_a_change_keeps_nothing_while_nothing_may_be_kept(node: Node) -> None:
    token = await start(node)
    node.cache.may_fill = lambda: False
    await set_value(node, token, "v")

    assert kept(node.cache) == []


async def test_what_is_kept_is_of_the_ring_of_the_call(node: Node, store: SlowStore) -> None:
    token = await start(node)
    first = await begun(node, store, token, "1")
    second = asyncio.create_task(set_value(node, token, "2"))
    stats = node.table.unary["/mnemosynerpc.SessionManager/SetValue"].stats
    await until(lambda: stats.in_flight == 2)
    # Another node gets the session, and this one once more, before the second batch begins.
    lost = node.cache.generation + 1
    node.cache.keeps = lambda _, generation: generation > lost
    node.cache.change_generation()
    node.cache.change_generation()
    store.may_answer.set()
    await asyncio.gather(first, second)
    store.loads = 0

    assert dict((await got(node, token)).bag) == {"k": "2"}
    assert store.loads == 1


async def test_damaged_and_very_large_sessions_are_not_kept(node: Node, store: SlowStore) -> None:
    tokens = [await start(node), await start(node)]
    await set_value(node, tokens[0], "x" * LARGE)
    damaged = list(store._session_by_token.values())[1]
    damaged.subject_id = "s\0"
    assert await set_value(node, tokens[1], "v") == {"k": "v"}

    assert kept(node.cache) == []
    assert len((await got(node, tokens[0])).bag["k"]) == LARGE
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await got(node, tokens[1])
    assert caught.value.code() is grpc.StatusCode.DATA_LOSS
