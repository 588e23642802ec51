"""The service for other nodes, on both engines: what it does for peers, and nothing for anybody else."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

import grpc
import pytest
from clusters import until
from mnemosynerpc.session_pb2 import (
    AbandonRequest,
    ExistsRequest,
    GetRequest,
    GetResponse,
    Session,
    StartRequest,
)
from peering import Peer, peering, until_they_serve_copies
from serving import ENGINES, kept

from aio.later import Later
from cluster import wire
from cluster.identity import Identity
from cluster.member import Kind, Member, Packet, Phase, State
from cluster.peer_auth import METADATA_KEY, NO_KEY, PeerAuth, PeerKey, StreamMac
from cluster.peerpb import peer_pb2 as pb
from mnemosyned.api.rpc import new_token
from mnemosyned.storage.memory import MemoryStore
from mnemosyned.transport.call import Call

SERVICE = "mnemosynepeer.Peer"
METHODS = ["Gossip", "Invalidate", "Leave"]
STRANGER = Member("127.0.0.9:1", "127.0.0.9:1", 1, 0, State.ALIVE, Phase.ACTIVE, 99)
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
FAILED_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture(params=sorted(ENGINES))
async def peer(request: pytest.FixtureRequest, store: MemoryStore) -> AsyncIterator[Peer]:
    async with peering(store, request.param) as one:
        yield one


@pytest.fixture
async def origin(store: MemoryStore, peer: Peer) -> pb.Origin:
    return Identity(label="", storage_fingerprint=await store.identity()).message(peer.address)


def nonced(key: PeerKey, method: str, body: bytes) -> str:
    return key.sign(method, body, now_ms=time.time_ns() // 1_000_000, nonce=os.urandom(12))


async def greeted(peer: Peer, caller: PeerAuth | None = None) -> PeerKey:
    """The key of the calling process, after Hello."""
    caller = caller or peer.peer_auth
    body = pb.HelloRequest(callee=peer.address).SerializeToString()
    greeting = caller.greeting(body, now_ms=time.time_ns() // 1_000_000, nonce=os.urandom(12))
    hello = pb.HelloResponse.FromString(await call(peer, "Hello", body, signature=greeting))
    return caller.key_for(hello.process, hello.proof, greeting=greeting)


async def call(peer: Peer, method: str, body: bytes, *, signature: str) -> bytes:
    metadata = ((METADATA_KEY, signature),) if signature else ()
    answer: bytes = await peer.channel.unary_unary(f"/{SERVICE}/{method}")(body, metadata=metadata, timeout=5)
    return answer


async def ask(peer: Peer, method: str, body: bytes) -> bytes:
    """Call as a peer does, and check the answer."""
    key = await greeted(peer)
    signature = nonced(key, method, body)
    sealed = pb.SealedAnswer.FromString(await call(peer, method, body, signature=signature))
    key.check_answer(signature, sealed.answer, sealed.seal)
    return sealed.answer


async def status_of(awaited: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaited  # type: ignore[misc]
    return caught.value.code(), caught.value.details() or ""


class Stream:
    """A peer's stream of forwarded calls."""

    def __init__(self, peer: Peer, origin: pb.Origin, key: PeerKey, *, opening: str | None = None) -> None:
        self.opening = nonced(key, "Forward", b"") if opening is None else opening
        metadata = ((METADATA_KEY, self.opening),) if self.opening else ()
        self.call = peer.channel.stream_stream(f"/{SERVICE}/Forward")(metadata=metadata, timeout=10)
        self._batches, self._answers = key.stream_macs(self.opening)
        self._origin = origin

    async def forward(self, *items: pb.Item, stream_mac: StreamMac | None = None) -> Sequence[pb.Answer]:
        batch = pb.Batch(origin=self._origin, items=items).SerializeToString()
        seal = (stream_mac or self._batches).seal(batch)
        return await self.send(pb.ForwardRequest(batch=batch, seal=seal).SerializeToString())

    async def send(self, message: bytes) -> Sequence[pb.Answer]:
        await self.call.write(message)
        answer = await self.call.read()
        assert answer is not grpc.aio.EOF
        response = pb.ForwardResponse.FromString(answer)
        self._answers.check(response.seal, response.answers)
        return pb.Answers.FromString(response.answers).answers


async def stream_to(peer: Peer, origin: pb.Origin) -> Stream:
    return Stream(peer, origin, await greeted(peer))


def item(method: str, message: bytes = b"", *, in_ms: int = 1000, **fields: str) -> pb.Item:
    """An item for which its caller waits so long."""
    deadline_us = time.time_ns() // 1000 + in_ms * 1000
    return pb.Item(
        method=method, message=message, timeout_ms=max(1, in_ms), deadline_us=deadline_us, **fields
    )


def get(token: str) -> pb.Item:
    return item("Get", GetRequest(access_token=token).SerializeToString())


async def started(peer: Peer, **fields: str) -> str:
    """Start a session of any owner: a node would choose a token of its own."""
    session = Session(**{"access_token": new_token(), "subject_id": "s"} | fields)
    return (await peer.stub.Start(StartRequest(session=session))).session.access_token


@pytest.mark.parametrize("method", ["Hello", *METHODS])
@pytest.mark.parametrize("signature", ["", "v2 1 2 3 4", "nonsense"])
async def test_an_unauthenticated_peer_is_refused(peer: Peer, method: str, signature: str) -> None:
    code, text = await status_of(call(peer, method, b"", signature=signature))

    assert code is UNAUTHENTICATED
    assert "secret" in text
    assert not peer.stopped.is_set()


async def test_another_clusters_secret_is_refused(peer: Peer) -> None:
    stranger = PeerAuth([b"hunter2-of-another-cluster"], process=os.urandom(16))

    assert (await status_of(greeted(peer, stranger)))[0] is UNAUTHENTICATED


async def test_a_hello_for_another_node_gets_no_proof(peer: Peer) -> None:
    body = pb.HelloRequest(callee="127.0.0.1:1").SerializeToString()
    now_ms = time.time_ns() // 1_000_000
    greeting = peer.peer_auth.greeting(body, now_ms=now_ms, nonce=os.urandom(12))

    assert (await status_of(call(peer, "Hello", body, signature=greeting)))[0] is FAILED_PRECONDITION


async def test_a_call_is_believed_once_and_for_its_own_method(peer: Peer) -> None:
    body = pb.LeaveRequest(node=peer.address).SerializeToString()
    signature = nonced(await greeted(peer), "Leave", body)
    assert (await status_of(call(peer, "Invalidate", body, signature=signature)))[0] is UNAUTHENTICATED
    await call(peer, "Leave", body, signature=signature)
    assert peer.stopped.is_set()

    assert (await status_of(call(peer, "Leave", body, signature=signature)))[0] is UNAUTHENTICATED


async def test_without_a_secret_a_leave_needs_more_than_to_be_on_this_host(store: MemoryStore) -> None:
    async with peering(store, secrets=()) as peer:
        body = pb.LeaveRequest(node=peer.address).SerializeToString()
        assert (await status_of(call(peer, "Leave", body, signature="")))[0] is UNAUTHENTICATED
        assert not peer.stopped.is_set()


@pytest.mark.parametrize("method", ["Hello", *METHODS])
async def test_without_a_secret_a_proxy_on_this_host_is_no_peer(store: MemoryStore, method: str) -> None:
    async with peering(store, secrets=()) as peer:
        unary = peer.channel.unary_unary(f"/{SERVICE}/{method}")
        code, text = await status_of(unary(b"", metadata=(("x-forwarded-for", "192.0.2.1"),), timeout=5))

        assert code is UNAUTHENTICATED
        assert "proxy" in text


@pytest.mark.parametrize("opening", ["", "nonsense"])
async def test_the_stream_of_an_unauthenticated_peer_is_ended_before_its_first_batch(
    peer: Peer, origin: pb.Origin, opening: str
) -> None:
    stream = Stream(peer, origin, NO_KEY, opening=opening)

    assert (await status_of(stream.call.read()))[0] is UNAUTHENTICATED


@pytest.mark.parametrize("forger", ["no seal", "another stream", "a batch sent again"])
async def test_each_batch_is_sealed_for_its_stream_and_its_place(
    peer: Peer, origin: pb.Origin, forger: str
) -> None:
    token = await started(peer)
    key = await greeted(peer)
    stream = Stream(peer, origin, key)
    assert [answer.code for answer in await stream.forward(get(token))] == [0]
    stream_mac = {
        "no seal": StreamMac(None),
        "another stream": key.stream_macs(nonced(key, "Forward", b""))[0],
        "a batch sent again": key.stream_macs(stream.opening)[0],
    }[forger]
    if forger == "another stream":
        stream_mac.seal(b"")
    code, text = await status_of(stream.forward(get(token), stream_mac=stream_mac))

    assert code is UNAUTHENTICATED
    assert "sealed" in text


async def test_a_batch_is_answered_item_by_item(peer: Peer, origin: pb.Origin) -> None:
    token = await started(peer, subject_client="web")
    exists = item("Exists", ExistsRequest(access_token="x").SerializeToString())
    stream = await stream_to(peer, origin)
    for _ in range(2):
        good, absent, unknown, garbage, absent_too = await stream.forward(
            get(token), get("absent"), item("Dance"), item("Get", b"\xff"), exists
        )
        assert GetResponse.FromString(good.message).session.subject_client == "web"
        assert (absent.code, absent.message) == (grpc.StatusCode.NOT_FOUND.value[0], b"")
        assert unknown.code == grpc.StatusCode.UNIMPLEMENTED.value[0]
        assert garbage.code == grpc.StatusCode.INTERNAL.value[0]
        assert absent_too.code == 0


async def test_the_owners_error_has_one_prefix(peer: Peer, origin: pb.Origin) -> None:
    (answer,) = await (await stream_to(peer, origin)).forward(get("absent"))
    here = await status_of(peer.stub.Get(GetRequest(access_token="absent")))

    assert (answer.code, answer.text) == (here[0].value[0], here[1])


async def test_an_item_has_its_own_deadline_and_metadata(peer: Peer, origin: pb.Origin) -> None:
    seen: list[dict[str, str | None]] = []

    async def slow(_: bytes, call: Call) -> bytes:
        seen.append({key: call.metadata(key) for key in ("request_id", "traceparent", "authorization")})
        await asyncio.sleep(0.3)
        return b""

    peer.calls.add_unary("mnemosynerpc.SessionManager", "Slow", slow)
    short, long = await (await stream_to(peer, origin)).forward(
        item("Slow", in_ms=20, request_id="r-1", traceparent="00-a-b-01"), item("Slow", in_ms=5000)
    )

    assert (short.code, long.code) == (grpc.StatusCode.DEADLINE_EXCEEDED.value[0], 0)
    assert seen[0] == {"request_id": "r-1", "traceparent": "00-a-b-01", "authorization": None}


async def test_an_item_that_comes_late_is_not_begun(peer: Peer, origin: pb.Origin) -> None:
    request = StartRequest(session=Session(subject_id="s", access_token="late")).SerializeToString()
    late, in_time = await (await stream_to(peer, origin)).forward(
        item("Start", request, in_ms=-1000),
        item("Exists", ExistsRequest(access_token="late").SerializeToString()),
    )

    assert late.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    assert in_time == pb.Answer(message=b"")


async def test_a_write_that_could_not_be_done_well_in_time_is_not_done(peer: Peer, origin: pb.Origin) -> None:
    token = await started(peer)
    request = AbandonRequest(access_token=token).SerializeToString()
    (answer,) = await (await stream_to(peer, origin)).forward(item("Abandon", request, in_ms=20))

    assert answer.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    assert (await peer.stub.Exists(ExistsRequest(access_token=token))).value


async def test_what_is_for_another_node_is_refused(peer: Peer, origin: pb.Origin) -> None:
    token = await started(peer)
    for callee in ("127.0.0.1:1", ""):
        origin.callee = callee
        invalidate = pb.InvalidateRequest(origin=origin, tokens=[token]).SerializeToString()
        stream = await stream_to(peer, origin)
        for refused in (ask(peer, "Invalidate", invalidate), stream.forward(get(token))):
            code, text = await status_of(refused)
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert f"this node is {peer.address}" in text


async def test_a_leave_for_another_node_is_refused(peer: Peer) -> None:
    for name in ("127.0.0.1:1", ""):
        code, _ = await status_of(ask(peer, "Leave", pb.LeaveRequest(node=name).SerializeToString()))
        assert code is grpc.StatusCode.FAILED_PRECONDITION

    assert not peer.stopped.is_set()


async def test_answers_too_large_together_are_left_to_the_storage(
    peer: Peer, origin: pb.Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mnemosyned.api.forwarded_batch._MAX_RESPONSE_BYTES", 2500)
    tokens = [await started(peer, subject_client="x" * 1000) for _ in range(4)]
    answers = await (await stream_to(peer, origin)).forward(*map(get, tokens))

    unavailable = grpc.StatusCode.UNAVAILABLE.value[0]
    assert [answer.code for answer in answers] == [0, 0, unavailable, unavailable]


@pytest.mark.parametrize("changed", [{"cluster_label": "another"}, {"storage_fingerprint": b"another"}])
async def test_a_node_of_another_cluster_is_told_why_it_is_refused(
    peer: Peer, origin: pb.Origin, changed: dict[str, object]
) -> None:
    foreign = pb.Origin()
    foreign.CopyFrom(origin)
    for name, value in changed.items():
        setattr(foreign, name, value)
    word = "label" if "cluster_label" in changed else "databases"
    invalidate = pb.InvalidateRequest(origin=foreign, tokens=["t"]).SerializeToString()
    packet = Packet(Kind.SYNC, STRANGER)
    answer, _, refusal = wire.parse_response(await ask(peer, "Gossip", wire.request(packet, foreign)))

    assert answer is None
    assert word in refusal
    stream = await stream_to(peer, foreign)
    for refused in (ask(peer, "Invalidate", invalidate), stream.forward(get("t"))):
        code, text = await status_of(refused)
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert word in text
    assert peer.node.gossip is not None
    assert len(peer.node.gossip.swim.table) == 1


async def test_a_node_is_answered_and_no_member_before_it_answers(peer: Peer, origin: pb.Origin) -> None:
    packet = Packet(Kind.SYNC, STRANGER._replace(phase=Phase.JOINING))
    answer, _, _ = wire.parse_response(await ask(peer, "Gossip", wire.request(packet, origin)))

    assert answer is not None
    assert answer.kind is Kind.SYNC_REPLY
    assert answer.sender.name == peer.address
    assert peer.node.gossip is not None
    await until(lambda: peer.node.gossip.introductions.failed == 1)  # type: ignore[union-attr]
    assert peer.node.probes() == {}


@pytest.mark.parametrize("method", METHODS)
async def test_garbage_has_a_clear_answer(peer: Peer, method: str) -> None:
    code, text = await status_of(ask(peer, method, b"\xff\xff"))

    # As gRPC servers say it of bytes that are no message.
    assert code is grpc.StatusCode.INTERNAL
    assert "not a valid" in text


async def test_garbage_ends_a_stream_with_a_clear_status(peer: Peer, origin: pb.Origin) -> None:
    code, text = await status_of((await stream_to(peer, origin)).send(b"\xff"))

    assert code is grpc.StatusCode.INTERNAL
    assert "not a valid" in text


async def test_a_message_beyond_the_limit_is_refused(peer: Peer) -> None:
    code, _ = await status_of(ask(peer, "Invalidate", bytes(9 * 1024**2)))

    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_copies_are_dropped_when_a_peer_says_so(peer: Peer, origin: pb.Origin) -> None:
    await until_they_serve_copies(peer)
    token = await started(peer)
    assert token in kept(peer.cache)
    await ask(peer, "Invalidate", pb.InvalidateRequest(origin=origin, tokens=[token]).SerializeToString())

    assert token not in kept(peer.cache)


async def test_a_retry_accepts_that_the_work_is_done(peer: Peer, origin: pb.Origin) -> None:
    stream = await stream_to(peer, origin)
    session = Session(access_token="t", subject_id="s")
    starting = StartRequest(session=session).SerializeToString()
    ending = AbandonRequest(access_token="t").SerializeToString()
    for first, retried, message in (("Start", "Start", starting), ("Abandon", "Abandon", ending)):
        plain = await stream.forward(item(first, message))
        again = await stream.forward(item("", message, retried_method=retried))
        assert [answer.code for answer in (*plain, *again)] == [0, 0]

    # What a node of the former release makes of it, since it does not know the field.
    (unknown,) = await stream.forward(item("", starting))
    assert unknown.code == grpc.StatusCode.UNIMPLEMENTED.value[0]


async def test_streams_end_in_order_when_the_node_leaves(peer: Peer, origin: pb.Origin) -> None:
    token = await started(peer)
    stream = await stream_to(peer, origin)
    assert [answer.code for answer in await stream.forward(get(token))] == [0]
    await peer.node.leave()

    assert await stream.call.read() is grpc.aio.EOF
    assert await stream.call.code() is grpc.StatusCode.OK


async def test_a_caller_that_gives_up_as_its_answer_is_sent_is_no_bug(
    peer: Peer, origin: pb.Origin, caplog: pytest.LogCaptureFixture
) -> None:
    async def slow(_: bytes, __: Call) -> bytes:
        await asyncio.sleep(0.01)
        return b""

    peer.calls.add_unary("mnemosynerpc.SessionManager", "Slow", slow)
    for number in range(60):
        stream = await stream_to(peer, origin)
        await stream.forward(item("Slow"))
        with suppress(TimeoutError):
            async with asyncio.timeout(0.0095 + number % 30 * 0.0001):
                await stream.forward(item("Slow"))
        stream.call.cancel()

    stats = peer.table.streams[f"/{SERVICE}/Forward"].stats
    await until(lambda: stats.in_flight == 0)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_calls_of_a_peer_that_gives_up_are_cancelled(peer: Peer, origin: pb.Origin) -> None:
    waiting: Later[bytes] = Later()
    ended: list[str] = []

    async def slow(_: bytes, __: Call) -> bytes:
        ended.append("begun")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        return b""

    peer.calls.add_unary("mnemosynerpc.SessionManager", "Slow", slow)
    peer.calls.add_unary("mnemosynerpc.SessionManager", "Later", lambda _, __: waiting)
    stream = await stream_to(peer, origin)
    forwarding = asyncio.create_task(stream.forward(item("Later"), item("Slow", in_ms=60_000)))
    await until(lambda: ended == ["begun"])
    stream.call.cancel()

    # Before the time-out of the stream.
    await until(lambda: waiting.done() and ended == ["begun", "cancelled"], within_s=5)
    await asyncio.wait([forwarding])


async def test_a_session_is_started_where_it_enters_the_cluster(store: MemoryStore) -> None:
    async with peering(store) as first, peering(store, seeds=(first.address,)) as second:
        await until_they_serve_copies(first, second)
        for entry, other in ((first, second), (second, first)):
            request = StartRequest(session=Session(subject_id="s"))
            tokens = [(await entry.stub.Start(request)).session.access_token for _ in range(20)]
            # All but one of 4,096, for each of which the entry node draws twelve tokens in vain.
            own = [token for token in tokens if entry.node.view.ring.owner(token) == entry.address]
            assert len(own) >= 19
            assert set(own) <= set(kept(entry.cache))
            assert entry.node.forwarder.counters.by_outcome[other.address, "ok"] <= 1


@pytest.mark.parametrize("key", ["hops", "mnemosyned-hops", "mnemosyned-peer", "mnemosyned-forwarded"])
async def test_no_metadata_of_a_client_changes_who_answers(store: MemoryStore, key: str) -> None:
    async with peering(store) as first, peering(store, seeds=(first.address,)) as second:
        await until_they_serve_copies(first, second)
        tokens = [await started(first) for _ in range(12)]
        theirs = [token for token in tokens if first.node.view.ring.owner(token) == second.address]
        before = first.node.forwarder.counters.by_outcome.total()
        for token in theirs:
            await first.stub.Get(GetRequest(access_token=token), metadata=((key, "1"),))

        assert theirs
        # Whatever became of it: the call was for the owner.
        assert first.node.forwarder.counters.by_outcome.total() == before + len(theirs)
        assert not set(kept(first.cache)) & set(theirs)
