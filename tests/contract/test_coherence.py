"""What the caches of several nodes serve after a write, when owners change or do not answer meanwhile."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator, Sequence

import grpc
import pytest
from clusters import until
from mnemosynerpc.session_pb2 import (
    AbandonRequest,
    ExistsRequest,
    GetRequest,
    Session,
    SetValueRequest,
    StartRequest,
)
from peering import Peer, peering, until_they_serve_copies
from serving import kept, serving
from stores import new

from cluster.peerpb import peer_pb2 as pb
from cluster.ring import Ring
from cluster.view import View
from mnemosyned.api.rpc import new_token
from mnemosyned.errors import MnemosyneError
from mnemosyned.sessions import model as session
from mnemosyned.sessions.model import Abandonment, ChangedBag, Lookup, NewSession, ValueChange
from mnemosyned.storage.memory import MemoryStore
from mnemosyned.transport.call import Call
from mnemosyned.transport.methods import MethodTable


class HeldStore(MemoryStore):
    """A memory store whose answers can be kept back, as by a lock or in a socket."""

    def __init__(self) -> None:
        super().__init__()
        self.may_abandon = asyncio.Event()
        self.may_abandon.set()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.loads = 0
        self.loses_next_answer = False
        self.is_late = False

    async def abandon(self, endings: Sequence[Abandonment]) -> list[bool | MnemosyneError]:
        await self.may_abandon.wait()
        ended = await super().abandon(endings)
        await self._answer_of_a_write()
        return ended

    async def start(self, sessions: Sequence[NewSession]) -> list[session.Session | MnemosyneError]:
        started = await super().start(sessions)
        await self._answer_of_a_write()
        return started

    async def set_values(self, changes: Sequence[ValueChange]) -> list[ChangedBag | MnemosyneError]:
        changed = await super().set_values(changes)
        await self._answer_of_a_write()
        return changed

    async def _answer_of_a_write(self) -> None:
        """Keep back the next answer to a write, if so told, though it is done."""
        if self.loses_next_answer:
            self.loses_next_answer, self.is_late = False, True
            await asyncio.sleep(1.0)
            self.is_late = False

    async def load(self, lookups: Sequence[Lookup]) -> list[session.Session | MnemosyneError]:
        loaded = await super().load(lookups)
        self.loads += 1
        await self.may_answer.wait()
        return loaded


@pytest.fixture
def store() -> HeldStore:
    return HeldStore()


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a process that stands still: its kernel takes connections, and nobody answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
        yield f"{host}:{port}"


async def start(peer: Peer, count: int = 1) -> list[str]:
    """Start sessions of any owners: a node would choose tokens of its own."""
    tokens = [new_token() for _ in range(count)]
    for token in tokens:
        await peer.stub.Start(StartRequest(session=Session(access_token=token, subject_id="s")))
    return tokens


async def stored(store: HeldStore, count: int) -> list[str]:
    """Start sessions of which no node here has heard."""
    tokens = [f"stored-{number}" for number in range(count)]
    await store.start([new(token, bag=b"") for token in tokens])
    return tokens


async def served(peer: Peer, tokens: Sequence[str]) -> list[str]:
    """Of these tokens, those for which the node returns a session."""
    found = []
    for token in tokens:
        try:
            found.append((await peer.stub.Get(GetRequest(access_token=token))).session.access_token)
        except grpc.aio.AioRpcError as exc:
            assert exc.code() is grpc.StatusCode.NOT_FOUND  # noqa: PT017  # the loop goes on
    return found


async def until_each_serves_copies(*peers: Peer) -> None:
    """Wait until each of these nodes, which do not know one another, serves copies."""
    for peer in peers:
        await until_they_serve_copies(peer)


def look_as(peer: Peer, *nodes: str, others: Sequence[str] = (), former: Sequence[str] = ()) -> None:
    """Have a node route by these nodes, whether or not they are there, and know others."""
    addresses = {name: name for name in (*nodes, *others) if name != peer.address}
    rings = (Ring(former),) if former else ()
    peer.node._follow(View(me=peer.address, ring=Ring(nodes), address_by_name=addresses, former=rings))


async def abandoning(peer: Peer, tokens: Sequence[str]) -> asyncio.Task[list[object]]:
    """Begin to end these sessions, as far as the storage."""

    async def all_of_them() -> list[object]:
        return list(
            await asyncio.gather(*(peer.stub.Abandon(AbandonRequest(access_token=token)) for token in tokens))
        )

    task = asyncio.create_task(all_of_them())
    stats = peer.table.unary["/mnemosynerpc.SessionManager/Abandon"].stats
    await until(lambda: stats.in_flight == len(tokens))
    return task


async def test_a_write_that_ends_under_a_new_ring_is_told_to_the_new_owner(store: HeldStore) -> None:
    async with peering(store) as old:
        await until_they_serve_copies(old)
        tokens = await start(old, 16)
        store.may_abandon.clear()
        ending = await abandoning(old, tokens)
        async with peering(store, seeds=(old.address,)) as new:
            await until_they_serve_copies(old, new)
            moved = [token for token in tokens if new.node.view.ring.owner(token) == new.address]
            # The new owner reads them before they end.
            assert await served(old, moved) == moved
            assert set(kept(new.cache)) == set(moved)
            store.may_abandon.set()
            await ending

            assert moved
            assert await served(new, tokens) == []
            assert await served(old, tokens) == []


async def test_while_rings_may_differ_a_write_is_told_to_every_node(store: HeldStore) -> None:
    async with peering(store) as one, peering(store) as other:
        await until_each_serves_copies(one, other)
        tokens = await stored(store, 3)
        # Each holds itself for the owner, as after two clusters have found each other.
        assert await served(other, tokens) == tokens
        assert set(kept(other.cache)) == set(tokens)
        look_as(one, one.address, others=[other.address], former=[one.address])
        for token in tokens:
            await one.stub.Abandon(AbandonRequest(access_token=token))

        assert await served(other, tokens) == []


async def test_a_write_that_ends_under_another_view_is_told_to_every_node(store: HeldStore) -> None:
    async with peering(store) as one, peering(store) as other:
        await until_each_serves_copies(one, other)
        tokens = await stored(store, 3)
        store.may_abandon.clear()
        ending = await abandoning(one, tokens)
        look_as(one, one.address, others=[other.address])
        assert await served(other, tokens) == tokens
        assert set(kept(other.cache)) == set(tokens)
        store.may_abandon.set()
        await ending

        assert await served(other, tokens) == []


async def test_where_rings_agree_the_owner_of_a_session_changes_it_without_a_word(store: HeldStore) -> None:
    told: list[str] = []

    def note_invalidations(table: MethodTable) -> None:
        method = table.unary["/mnemosynepeer.Peer/Invalidate"]

        async def noted(message: bytes, call: Call) -> bytes:
            told.extend(pb.InvalidateRequest.FromString(message).tokens)
            return method.handle(message, call)  # type: ignore[return-value]  # it answers at once

        table.add_unary("mnemosynepeer.Peer", "Invalidate", noted)

    async with (
        peering(store, prepare=note_invalidations) as one,
        peering(store, seeds=(one.address,), prepare=note_invalidations) as other,
    ):
        await until_they_serve_copies(one, other)
        # Each has seen the ring of the other in the storage.
        await until(lambda: one.keeper.lease.agrees and other.keeper.lease.agrees)
        # A call that this process is too busy to answer in time is made where it came in: that node tells.
        for _ in range(3):
            told.clear()
            for token in await start(one, 16):
                await one.stub.SetValue(SetValueRequest(access_token=token, key="k", value="v"))
                await other.stub.Abandon(AbandonRequest(access_token=token))
            if not told:
                break

        assert told == []


async def test_copies_of_sessions_whose_owner_stays_outlast_a_change_of_the_ring(store: HeldStore) -> None:
    async with peering(store) as one:
        await until_they_serve_copies(one)
        tokens = await start(one, 16)
        async with peering(store, seeds=(one.address,)) as other:
            await until_they_serve_copies(one, other)
            stayed = [token for token in tokens if one.node.view.owns(token)]
            assert 0 < len(stayed) < 16
            store.loads = 0
            assert await served(one, stayed) == stayed
            assert store.loads == 0
            moved = [token for token in tokens if token not in stayed]
            assert await served(one, moved) == moved
            assert 0 < store.loads <= len(moved)
            assert set(kept(other.cache)) == set(moved)

        # They come back, and what this node had of them may be old.
        await until(lambda: one.node.view.is_alone)
        await until_they_serve_copies(one)
        store.loads = 0
        assert await served(one, tokens) == tokens
        assert store.loads == len(moved)


async def test_a_node_that_cannot_be_told_serves_no_copies_when_the_write_is_acknowledged(
    store: HeldStore,
) -> None:
    def hold_invalidations(table: MethodTable) -> None:
        async def held(_: bytes, __: Call) -> bytes:
            await asyncio.sleep(60)
            return b""

        table.add_unary("mnemosynepeer.Peer", "Invalidate", held)

    async with peering(store) as one, peering(store, prepare=hold_invalidations) as other:
        await until_each_serves_copies(one, other)
        tokens = await stored(store, 3)
        assert await served(other, tokens) == tokens
        assert set(kept(other.cache)) == set(tokens)
        look_as(one, one.address, others=[other.address])
        await one.stub.Abandon(AbandonRequest(access_token=tokens[0]))
        assert other.keeper.reason() == "barred"
        assert kept(other.cache) == []
        assert await served(other, tokens) == tokens[1:]
        # Meanwhile nobody waits for it.
        began_s = time.monotonic()
        await one.stub.Abandon(AbandonRequest(access_token=tokens[1]))

        assert time.monotonic() - began_s < 0.25
        assert await served(other, tokens) == tokens[2:]
        assert kept(other.cache) == []


@pytest.mark.parametrize("rpc", ["Abandon", "SetValue", "Start"])
async def test_a_caller_that_leaves_while_other_nodes_are_told_leaves_no_old_copy(
    store: HeldStore, rpc: str
) -> None:
    is_told, may_drop = asyncio.Event(), asyncio.Event()

    def hold_invalidations(table: MethodTable) -> None:
        method = table.unary["/mnemosynepeer.Peer/Invalidate"]

        async def held(message: bytes, call: Call) -> bytes:
            is_told.set()
            await may_drop.wait()
            return method.handle(message, call)  # type: ignore[return-value]  # it answers at once

        table.add_unary("mnemosynepeer.Peer", "Invalidate", held)

    async with peering(store) as one, peering(store, prepare=hold_invalidations) as other:
        await until_each_serves_copies(one, other)
        token = "early" if rpc == "Start" else (await stored(store, 1))[0]
        # Whether a session or that there is none: the other node has a copy.
        await served(other, [token])
        assert token in kept(other.cache)
        look_as(one, one.address, others=[other.address], former=[one.address])
        writing = {
            "Abandon": lambda: one.stub.Abandon(AbandonRequest(access_token=token)),
            "SetValue": lambda: one.stub.SetValue(SetValueRequest(access_token=token, key="k", value="v")),
            "Start": lambda: one.stub.Start(
                StartRequest(session=Session(access_token=token, subject_id="s", bag={"k": "v"}))
            ),
        }[rpc]()
        async with asyncio.timeout(5):
            await is_told.wait()
        writing.cancel()
        stats = one.table.unary[f"/mnemosynerpc.SessionManager/{rpc}"].stats
        await until(lambda: not stats.in_flight)
        may_drop.set()
        await until(lambda: token not in kept(other.cache))

        if rpc == "Abandon":
            assert await served(other, [token]) == []
        else:
            assert (await other.stub.Get(GetRequest(access_token=token))).session.bag == {"k": "v"}


async def test_a_write_is_repeated_only_when_the_owners_time_for_it_is_over(store: HeldStore) -> None:
    async with peering(store) as one:
        gone = "127.0.0.1:9"
        ring = Ring([one.address, gone])
        (token, *_) = (token for token in await stored(store, 16) if ring.owner(token) == gone)
        look_as(one, one.address, gone)
        began_s = time.monotonic()
        await one.stub.SetValue(SetValueRequest(access_token=token, key="k", value="v"))

        # Nobody listens there, which is known at once: but whether it had begun is not.
        assert time.monotonic() - began_s >= 0.2


async def test_a_write_past_the_cache_of_a_node_that_becomes_the_owner_ends_its_own_copy(
    store: HeldStore,
) -> None:
    async with peering(store) as one:
        await until_they_serve_copies(one)
        gone = "127.0.0.1:9"
        look_as(one, one.address, gone)
        tokens = [token for token in await start(one, 16) if one.node.view.ring.owner(token) == gone]
        store.may_abandon.clear()
        ending = await abandoning(one, tokens)
        look_as(one, one.address)
        assert await served(one, tokens) == tokens
        assert set(kept(one.cache)) >= set(tokens)
        store.may_abandon.set()
        await ending

        assert tokens
        assert await served(one, tokens) == []


async def test_a_read_past_the_cache_joins_none_that_began_before_a_write(store: HeldStore) -> None:
    async with peering(store) as one:
        (token,) = await start(one)
        # Both read it as of another node, which nobody can ask.
        look_as(one, "127.0.0.1:9")
        await served(one, [token])
        store.may_answer.clear()
        store.loads = 0
        before = asyncio.create_task(served(one, [token]))
        await until(lambda: store.loads == 1)
        await store.abandon([Abandonment(access_token=token)])
        after = asyncio.create_task(served(one, [token]))
        await until(lambda: one.table.unary["/mnemosynerpc.SessionManager/Get"].stats.in_flight == 2)
        store.may_answer.set()

        assert await before == [token]
        assert await after == []


async def test_the_writes_of_a_node_that_joins_reach_the_owners_caches(store: HeldStore) -> None:
    async with peering(store) as old:
        await until_they_serve_copies(old)
        tokens = await start(old, 8)
        assert set(kept(old.cache)) == set(tokens)
        async with peering(store, seeds=(old.address,), runs=False) as new:
            await new.stub.Abandon(AbandonRequest(access_token=tokens[0]))
            assert not new.node.has_joined.is_set()
            assert await served(old, tokens) == tokens[1:]
            new.run()
            await until(new.node.has_joined.is_set)
            for token in tokens[1:]:
                await new.stub.Abandon(AbandonRequest(access_token=token))

            assert await served(old, tokens) == []


async def test_a_write_succeeds_in_time_though_the_owner_stands_still(store: HeldStore, silent: str) -> None:
    async with peering(store) as one:
        ring = Ring([one.address, silent])
        tokens = [token for token in await stored(store, 16) if ring.owner(token) == silent]
        look_as(one, one.address, silent)
        for token in tokens[:5]:
            request = SetValueRequest(access_token=token, key="k", value="v")
            assert (await one.stub.SetValue(request, timeout=0.45)).bag == {"k": "v"}


async def test_a_copy_lives_from_when_it_was_asked_for(store: HeldStore) -> None:
    cache_s = 0.5
    async with serving(store, flags=("-cache.ttl=500ms",)) as node:
        request = StartRequest(session=Session(subject_id="s"))
        token = (await node.stub.Start(request)).session.access_token
        node.cache.drop(token)
        store.may_answer.clear()
        reading = node.stub.Get(GetRequest(access_token=token))
        await until(lambda: store.loads == 1)
        # As if another node had ended it, and this one had stood still with the answer in its socket.
        await store.abandon([Abandonment(access_token=token)])
        await asyncio.sleep(cache_s)
        store.may_answer.set()
        await reading

        assert not (await node.stub.Exists(ExistsRequest(access_token=token))).value


async def test_a_write_whose_answer_was_lost_counts_once(store: HeldStore) -> None:
    async with peering(store) as one, peering(store, seeds=(one.address,)) as owner:
        await until(lambda: len(one.node.view.ring.nodes) == len(owner.node.view.ring.nodes) == 2)
        token = next(name for name in map(str, range(99)) if one.node.view.ring.owner(name) == owner.address)
        new = StartRequest(session=Session(access_token=token, subject_id="s", bag={"a": "b"}))

        async def repeated() -> bool:
            """Whether the owner's answer to the last call came too late."""
            was_late = one.node.forwarder.counters.by_outcome.pop((owner.address, "timeout"), 0) == 1
            # The storage as well: the next batch of writes waits for the one that is late.
            await until(
                lambda: one.node.forwarder._owners[owner.address].breaker.is_closed and not store.is_late
            )
            return was_late

        store.loses_next_answer = True
        started = (await one.stub.Start(new)).session
        assert (started.access_token, dict(started.bag)) == (token, {"a": "b"})
        assert await repeated()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await one.stub.Start(StartRequest(session=Session(access_token=token, subject_id="another")))
        assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
        store.loses_next_answer = True
        change = SetValueRequest(access_token=token, key="k", value="v")
        assert dict((await one.stub.SetValue(change)).bag) == {"a": "b", "k": "v"}
        assert await repeated()
        store.loses_next_answer = True
        assert (await one.stub.Abandon(AbandonRequest(access_token=token))).value
        assert await repeated()

        assert await served(one, [token]) == []
        assert await served(owner, [token]) == []


async def test_a_token_in_use_is_refused_by_a_repeated_start_as_well(store: HeldStore, silent: str) -> None:
    async with peering(store) as one:
        ring = Ring([one.address, silent])
        (token, *_) = (token for token in await stored(store, 16) if ring.owner(token) == silent)
        look_as(one, one.address, silent)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await one.stub.Start(StartRequest(session=Session(access_token=token, subject_id="another")))

        assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS


async def exists(peer: Peer, token: str) -> bool:
    return bool((await peer.stub.Exists(ExistsRequest(access_token=token))).value)


async def test_what_was_asked_for_too_early_is_there_once_it_has_started(store: HeldStore) -> None:
    async with peering(store) as one, peering(store, seeds=(one.address,)) as other:
        await until_they_serve_copies(one, other)
        for number in range(20):
            token = f"early-{number}"
            assert await served(one, [token]) == await served(other, [token]) == []
            assert not await exists(one, token)
            new = StartRequest(session=Session(access_token=token, subject_id="s"))
            await (one, other)[number % 2].stub.Start(new)

            assert await served(one, [token]) == await served(other, [token]) == [token]
            assert await exists(one, token)


async def test_what_was_asked_for_too_early_is_there_though_its_owner_is_passed_by(store: HeldStore) -> None:
    async with peering(store) as one, peering(store) as other:
        await until_each_serves_copies(one, other)
        # Each holds itself for the owner, as while the ring changes.
        token = "early"
        assert await served(other, [token]) == []
        assert kept(other.cache) == [token]
        look_as(one, one.address, others=[other.address], former=[one.address])
        await one.stub.Start(StartRequest(session=Session(access_token=token, subject_id="s")))

        assert await served(other, [token]) == [token]


async def test_a_start_under_an_old_ring_is_told_to_the_new_owner(store: HeldStore) -> None:
    async with peering(store) as one, peering(store) as other:
        ring = Ring([one.address, other.address])
        token = next(f"early-{n}" for n in range(99) if ring.owner(f"early-{n}") == other.address)
        await until_each_serves_copies(one, other)
        assert await served(other, [token]) == []
        assert kept(other.cache) == [token]
        await one.stub.Start(StartRequest(session=Session(access_token=token, subject_id="s")))
        look_as(one, one.address, other.address)

        assert await served(one, [token]) == [token]
        assert await served(other, [token]) == [token]


async def test_a_get_that_raced_with_a_start_does_not_hide_the_session(store: HeldStore) -> None:
    async with serving(store) as node:
        store.may_answer.clear()
        early = asyncio.ensure_future(node.stub.Get(GetRequest(access_token="t")))
        await until(lambda: store.loads == 1)
        await node.stub.Start(StartRequest(session=Session(access_token="t", subject_id="s")))
        store.may_answer.set()
        with pytest.raises(grpc.aio.AioRpcError):
            await early
        # Gone from among the sessions, as by eviction, so that an absence would be seen.
        node.cache.lru.pop("t")

        assert (await node.stub.Get(GetRequest(access_token="t"))).session.subject_id == "s"


async def test_an_unknown_token_asks_the_storage_once_and_is_counted(store: HeldStore) -> None:
    async with serving(store) as node:
        for _ in range(5):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await node.stub.Get(GetRequest(access_token="t"))
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            assert not (await node.stub.Exists(ExistsRequest(access_token="t"))).value

        assert store.loads == 1
        assert (node.cache.counters.misses, node.cache.counters.negative_hits) == (10, 9)


async def test_an_ended_session_is_asked_for_once_more(store: HeldStore) -> None:
    async with serving(store) as node:
        for _ in range(3):
            await node.stub.Start(StartRequest(session=Session(access_token="t", subject_id="s")))
            await node.stub.Abandon(AbandonRequest(access_token="t"))
            with pytest.raises(grpc.aio.AioRpcError):
                await node.stub.Get(GetRequest(access_token="t"))

        assert node.cache.counters.negative_hits == 0
