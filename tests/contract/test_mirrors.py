"""What a node answers from its mirrors of other nodes' sessions, before and after each kind of write."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import grpc
import pytest
from clusters import until
from mnemosynerpc.session_pb2 import (
    AbandonRequest,
    DeleteRequest,
    ExistsRequest,
    GetRequest,
    Session,
    SetValueRequest,
    StartRequest,
)
from peering import Peer, peering, until_they_serve_copies

from cluster.lease import MayHave
from mnemosyned.sessions.lease_keeper import _any_node
from mnemosyned.sessions.model import Criteria
from mnemosyned.sessions.token_hash import TokenHasher
from mnemosyned.storage.hashed import HashedStore
from mnemosyned.storage.memory import MemoryStore

HASHER = TokenHasher([b"a key that only these tests know"], is_hashing=True)


@dataclass
class Trio:
    """Three nodes; the first owns the session, the second has a mirror of it, the third has nothing."""

    owner: Peer
    reader: Peer
    third: Peer
    token: str

    async def value(self, peer: Peer) -> str | None:
        """Return the value of the session's only key by a node; None: there is no such session."""
        try:
            found = await peer.stub.Get(GetRequest(access_token=self.token))
        except grpc.aio.AioRpcError as exc:
            assert exc.code() is grpc.StatusCode.NOT_FOUND  # noqa: PT017  # it is the answer
            return None
        return found.session.bag["k"]


@pytest.fixture(params=["plain", "hashed"])
async def peers(request: pytest.FixtureRequest) -> AsyncIterator[list[Peer]]:
    plain = MemoryStore()
    async with AsyncExitStack() as stack:
        peers: list[Peer] = []
        for _ in range(3):
            store = HashedStore(plain, HASHER) if request.param == "hashed" else plain
            seeds = tuple(peer.address for peer in peers[:1])
            peers.append(await stack.enter_async_context(peering(store, seeds=seeds)))
        await until_they_serve_copies(*peers)
        await until(lambda: all(peer.keeper.lease.agrees for peer in peers))
        yield peers


@pytest.fixture
async def trio(peers: list[Peer]) -> Trio:
    request = StartRequest(session=Session(subject_id="s", bag={"k": "old"}))
    token = (await peers[0].stub.Start(request)).session.access_token
    owner = next(peer for peer in peers if peer.node.view.owns(token))
    reader, third = (peer for peer in peers if peer is not owner)
    trio = Trio(owner, reader, third, token)
    for _ in range(3):
        assert await trio.value(reader) == "old"
    assert token in reader.mirrors.cache.lru
    return trio


async def hits(trio: Trio, read: Callable[[], Awaitable[object]]) -> int:
    """Return how many lookups the reader's mirrors answer in a read."""
    before = trio.reader.mirrors.cache.counters.hits
    await read()
    return trio.reader.mirrors.cache.counters.hits - before


async def test_a_node_answers_from_its_mirror_as_the_owner_does(trio: Trio) -> None:
    found = []
    for peer in (trio.owner, trio.reader):
        response = await peer.stub.Get(GetRequest(access_token=trio.token))
        # Of the time of the call.
        response.session.ClearField("expire_at")
        found.append(response.SerializeToString(deterministic=True))

    assert found[0] == found[1]
    assert await hits(trio, lambda: trio.value(trio.reader)) == 1
    assert await hits(trio, lambda: trio.reader.stub.Exists(ExistsRequest(access_token=trio.token))) == 1


async def test_a_session_that_is_read_from_a_mirror_is_extended(trio: Trio) -> None:
    expiries = []
    for _ in range(2):
        response = await trio.reader.stub.Get(GetRequest(access_token=trio.token))
        expiries.append(response.session.expire_at.ToMilliseconds())
        await asyncio.sleep(0.02)
    await trio.reader.node._sessions.touches.flush()
    (stored,) = await trio.reader.service._store.load([trio.reader.service._lookup(trio.token)])

    assert expiries[0] < expiries[1]
    assert stored.expires_at_us >= expiries[1] * 1000  # type: ignore[union-attr]


async def set_value(peer: Peer, token: str) -> None:
    await peer.stub.SetValue(SetValueRequest(access_token=token, key="k", value="new"))


async def abandon(peer: Peer, token: str) -> None:
    await peer.stub.Abandon(AbandonRequest(access_token=token))


async def delete_by_token(peer: Peer, token: str) -> None:
    await peer.stub.Delete(DeleteRequest(access_token=token))


async def delete_by_subject(peer: Peer, _: str) -> None:
    await peer.stub.Delete(DeleteRequest(subject_id="s"))


async def replace(peer: Peer, token: str) -> None:
    await abandon(peer, token)
    await peer.stub.Start(StartRequest(session=Session(access_token=token, subject_id="s", bag={"k": "new"})))


@pytest.mark.parametrize("entry", ["owner", "reader", "third"])
@pytest.mark.parametrize(
    ("write", "left"),
    [
        (set_value, "new"),
        (abandon, None),
        (delete_by_token, None),
        (delete_by_subject, None),
        (replace, "new"),
    ],
)
async def test_after_a_write_no_mirror_is_read(
    trio: Trio, write: Callable[[Peer, str], Awaitable[None]], left: str | None, entry: str
) -> None:
    await write(getattr(trio, entry), trio.token)

    assert trio.token not in trio.reader.mirrors.cache.lru
    assert await trio.value(trio.reader) == left
    assert await trio.value(trio.third) == left
    assert await trio.value(trio.owner) == left


@pytest.mark.parametrize("later", ["owner", "third"])
async def test_a_delete_is_not_acknowledged_before_what_another_call_has_ended_is_settled(
    trio: Trio, later: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper, may_settle, begun = trio.third.keeper, asyncio.Event(), asyncio.Event()
    clear = keeper._clear

    async def clear_later(keys: Sequence[str] | None, may_have: MayHave = _any_node) -> list[str]:
        if keys is not None:
            begun.set()
            await may_settle.wait()
        return await clear(keys, may_have)

    monkeypatch.setattr(keeper, "_clear", clear_later)
    first = asyncio.create_task(delete_by_subject(trio.third, trio.token))
    await begun.wait()
    assert await trio.value(trio.reader) == "old"
    # It finds nothing, but the mirror is there still.
    await delete_by_subject(getattr(trio, later), trio.token)
    assert await trio.value(trio.reader) is None
    assert not first.done()
    may_settle.set()
    await first


@pytest.mark.parametrize("why", ["not asked", "lost", "open"])
async def test_a_delete_that_cannot_know_what_was_ended_has_all_copies_dropped(
    trio: Trio, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By a node that died before it had settled it.
    store = trio.third.service._store
    await store.delete(Criteria(subject_id="s"), limit=10)
    assert await trio.value(trio.reader) == "old"
    if why == "not asked":
        monkeypatch.setattr(trio.third.node.forwarder, "may_ask", lambda _name: False)
    elif why == "lost":
        trio.third.keeper.lease.losses += 1
    else:
        trio.owner.node._sessions.coherence._unsettled += 1
    await delete_by_subject(trio.third, trio.token)

    assert await trio.value(trio.reader) is None
    assert await trio.value(trio.owner) is None


async def test_a_session_that_is_written_to_again_and_again_has_no_mirror(trio: Trio) -> None:
    granted = trio.owner.mirrors.counters.grants
    for _ in range(5):
        await set_value(trio.owner, trio.token)
        assert await trio.value(trio.reader) == "new"
        assert await trio.value(trio.third) == "new"

    assert trio.owner.mirrors.counters.grants == granted
    assert trio.owner.keeper.counters.recalls == 1


async def test_the_copy_that_a_set_value_leaves_is_granted_once_it_is_read_often(trio: Trio) -> None:
    await set_value(trio.owner, trio.token)
    assert trio.token in trio.owner.cache.lru
    assert trio.token not in trio.reader.mirrors.cache.lru
    for number in range(1, 4):
        assert await trio.value(trio.reader) == "new"
        assert (trio.token in trio.reader.mirrors.cache.lru) is (number == 3)


async def test_a_mirror_that_is_granted_while_older_ones_are_recalled_is_recalled_in_turn(
    trio: Trio, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper, may_tell, begun = trio.owner.keeper, asyncio.Event(), asyncio.Event()
    tell = keeper._tell

    async def tell_later(nodes: Mapping[str, int], keys: Sequence[str] | None) -> list[str]:
        begun.set()
        await may_tell.wait()
        return await tell(nodes, keys)

    monkeypatch.setattr(keeper, "_tell", tell_later)
    writing = asyncio.create_task(set_value(trio.owner, trio.token))
    await begun.wait()
    # The new copy is there, and is granted to another node.
    for _ in range(3):
        assert await trio.value(trio.third) == "new"
    assert trio.token in trio.third.mirrors.cache.lru
    may_tell.set()
    await writing
    assert trio.token not in trio.reader.mirrors.cache.lru
    assert trio.token in trio.third.mirrors.cache.lru
    await abandon(trio.owner, trio.token)

    assert await trio.value(trio.third) is None


async def test_a_write_that_the_owner_cannot_settle_alone_tells_every_node(trio: Trio) -> None:
    # Forwarded to nobody: the third node takes itself for alone, as after a failure of the owner.
    await trio.third.service.set_value_uncached(trio.token, "k", "new")

    assert await trio.value(trio.reader) == "new"
    assert trio.reader.mirrors.counters.recalled == 1


async def test_mirrors_of_another_process_of_the_owner_are_not_served(trio: Trio) -> None:
    mirrors, lease = trio.reader.mirrors, trio.reader.keeper.lease
    mirrors.met({**lease.processes, trio.owner.address: 1})

    assert await hits(trio, lambda: trio.value(trio.reader)) == 0
    # Nor is what this process grants, until the rows name it.
    assert trio.token not in mirrors.cache.lru


async def test_a_node_without_a_lease_serves_no_mirror(trio: Trio) -> None:
    trio.reader.keeper.lease.until_us = 0

    assert await hits(trio, lambda: trio.value(trio.reader)) == 0


async def test_a_node_without_room_for_mirrors_asks_for_none() -> None:
    store = MemoryStore()
    async with (
        peering(store, mirror_bytes=0) as one,
        peering(store, seeds=(one.address,), mirror_bytes=0) as other,
    ):
        await until_they_serve_copies(one, other)
        for _ in range(8):
            token = (await one.stub.Start(StartRequest(session=Session(subject_id="s")))).session.access_token
            for _ in range(4):
                await one.stub.Get(GetRequest(access_token=token))

        assert other.mirrors.counters.grants == 0
        assert one.mirrors.cache.counters.misses == 0
