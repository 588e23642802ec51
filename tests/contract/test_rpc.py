"""What every gRPC engine does for a stock client: one suite, over real sockets, run on each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp
from mnemosynerpc.session_pb2 import (
    AbandonRequest,
    ContextResponse,
    DeleteRequest,
    ExistsRequest,
    GetRequest,
    ListRequest,
    Query,
    Session,
    SetValueRequest,
    SetValueResponse,
    StartRequest,
    StartResponse,
)
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from secrecy import CANARY
from serving import ENGINES, LIFETIME, Node, serving

from mnemosyned.sessions.model import Criteria
from mnemosyned.sessions.store import Deletion
from mnemosyned.storage.memory import MemoryStore

StatusCode = grpc.StatusCode
SERVICE = "/mnemosynerpc.SessionManager"


class Time:
    """Wall-clock microseconds that a test can move."""

    def __init__(self) -> None:
        self.ahead_us = 0

    def wall_us(self) -> int:
        return time.time_ns() // 1000 + self.ahead_us


@pytest.fixture
def moment() -> Time:
    return Time()


@pytest.fixture
def store(moment: Time) -> MemoryStore:
    return MemoryStore(wall_us=moment.wall_us)


@pytest.fixture(params=sorted(ENGINES))
async def node(request: pytest.FixtureRequest, store: MemoryStore) -> AsyncIterator[Node]:
    async with serving(store, request.param) as one:
        yield one


async def started(node: Node, **fields: object) -> Session:
    new = Session(**({"subject_id": "s", "bag": {CANARY: CANARY}} | fields))  # type: ignore[arg-type]
    return (await node.stub.Start(StartRequest(session=new))).session


async def failure(call: grpc.aio.UnaryUnaryCall) -> tuple[grpc.StatusCode, str | None]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details()


def us(timestamp: Timestamp) -> int:
    return timestamp.ToMicroseconds()


NOT_FOUND = (StatusCode.NOT_FOUND, "mnemosyned: storage: session not found")
MISSING_TOKEN = (StatusCode.INVALID_ARGUMENT, "mnemosyned: missing access token")


async def test_start_returns_the_session_with_a_token_and_an_expiry(node: Node) -> None:
    before_us = time.time_ns() // 1000
    ignored = Timestamp(seconds=1)
    session = await started(
        node, subject_client="web", refresh_token="r", bag={"k": "v", "ż": "日本"}, expire_at=ignored
    )
    after_us = time.time_ns() // 1000

    assert len(session.access_token) == 128
    assert set(session.access_token) <= set("0123456789abcdef")
    assert (session.subject_id, session.subject_client, session.refresh_token) == ("s", "web", "r")
    assert dict(session.bag) == {"k": "v", "ż": "日本"}
    assert before_us <= us(session.expire_at) - LIFETIME.idle_us <= after_us


async def test_start_keeps_a_given_token_and_refuses_it_twice(node: Node) -> None:
    assert (await started(node, access_token="mine")).access_token == "mine"
    again = StartRequest(session=Session(access_token="mine", subject_id="other"))

    assert (await failure(node.stub.Start(again)))[0] is StatusCode.ALREADY_EXISTS


async def test_get_returns_what_was_started_and_extends_it(node: Node, moment: Time) -> None:
    session = await started(node, bag={"k": "v"})
    moment.ahead_us = 1_000_000
    got = (await node.stub.Get(GetRequest(access_token=session.access_token))).session
    await asyncio.sleep(0.005)  # the test is that time passes
    again = (await node.stub.Get(GetRequest(access_token=session.access_token))).session

    assert dict(got.bag) == {"k": "v"}
    assert us(again.expire_at) > us(got.expire_at) >= us(session.expire_at) - 1000
    got.ClearField("expire_at")
    session.ClearField("expire_at")
    assert got == session


@pytest.mark.parametrize("value", ["{}", "Bearer {}", "bearer {}"])
async def test_context_takes_the_token_from_the_metadata(node: Node, value: str) -> None:
    session = await started(node)
    metadata = (("authorization", value.format(session.access_token)),)
    response: ContextResponse = await node.stub.Context(Empty(), metadata=metadata)

    assert response.session.access_token == session.access_token
    assert us(response.session.expire_at) >= us(session.expire_at) - 1000


@pytest.mark.parametrize("metadata", [(), (("authorization", ""),), (("authorization", "Bearer"),)])
async def test_context_without_a_token_is_refused(node: Node, metadata: tuple[tuple[str, str], ...]) -> None:
    assert await failure(node.stub.Context(Empty(), metadata=metadata)) == (
        StatusCode.INVALID_ARGUMENT,
        "mnemosyned: missing access token in metadata",
    )


async def test_calls_without_a_token_are_refused(node: Node) -> None:
    assert await failure(node.stub.Get(GetRequest())) == MISSING_TOKEN
    assert await failure(node.stub.Exists(ExistsRequest())) == MISSING_TOKEN
    assert await failure(node.stub.Abandon(AbandonRequest())) == MISSING_TOKEN
    assert await failure(node.stub.SetValue(SetValueRequest(key="k"))) == MISSING_TOKEN


async def test_incomplete_requests_are_refused_in_the_original_words(node: Node) -> None:
    refusals = {
        "mnemosyned: missing session": node.stub.Start(StartRequest()),
        "mnemosyned: missing subject accessToken": node.stub.Start(StartRequest(session=Session())),
        "mnemosyned: missing bag key": node.stub.SetValue(SetValueRequest(access_token="t")),
        "mnemosyned: none of expected arguments was provided": node.stub.Delete(DeleteRequest()),
    }
    for text, call in refusals.items():
        assert await failure(call) == (StatusCode.INVALID_ARGUMENT, text)


async def test_an_unknown_token_is_not_found(node: Node) -> None:
    assert await failure(node.stub.Get(GetRequest(access_token="x"))) == NOT_FOUND
    assert await failure(node.stub.Context(Empty(), metadata=(("authorization", "x"),))) == NOT_FOUND
    assert await failure(node.stub.Abandon(AbandonRequest(access_token="x"))) == NOT_FOUND
    assert await failure(node.stub.SetValue(SetValueRequest(access_token="x", key="k"))) == NOT_FOUND
    assert (await node.stub.Exists(ExistsRequest(access_token="x"))).value is False
    assert (await node.stub.Delete(DeleteRequest(access_token="x"))).value == 0


async def test_exists_tells_cached_or_not_and_does_not_extend(node: Node, store: MemoryStore) -> None:
    session = await started(node)
    node.cache.drop(session.access_token)

    assert (await node.stub.Exists(ExistsRequest(access_token=session.access_token))).value is True
    await node.stub.Get(GetRequest(access_token=session.access_token))
    await node.touches.flush()
    before = store._session_by_token[session.access_token]
    assert (await node.stub.Exists(ExistsRequest(access_token=session.access_token))).value is True
    await node.touches.flush()
    assert store._session_by_token[session.access_token] == before


async def test_abandon_ends_a_session_for_every_call(node: Node) -> None:
    token = (await started(node)).access_token
    await node.stub.Get(GetRequest(access_token=token))

    assert (await node.stub.Abandon(AbandonRequest(access_token=token))).value is True
    assert await failure(node.stub.Abandon(AbandonRequest(access_token=token))) == NOT_FOUND
    assert await failure(node.stub.Get(GetRequest(access_token=token))) == NOT_FOUND
    assert (await node.stub.Exists(ExistsRequest(access_token=token))).value is False


async def test_a_set_value_is_returned_and_read_by_the_next_get(node: Node) -> None:
    token = (await started(node, bag={"a": "1"})).access_token
    await node.stub.Get(GetRequest(access_token=token))
    response: SetValueResponse = await node.stub.SetValue(
        SetValueRequest(access_token=token, key="b", value="2")
    )

    assert dict(response.bag) == {"a": "1", "b": "2"}
    got = (await node.stub.Get(GetRequest(access_token=token))).session
    assert dict(got.bag) == {"a": "1", "b": "2"}


async def test_concurrent_set_values_of_different_keys_are_all_kept(node: Node) -> None:
    token = (await started(node, bag={})).access_token
    await asyncio.gather(
        *(node.stub.SetValue(SetValueRequest(access_token=token, key=str(n))) for n in range(50))
    )

    assert len((await node.stub.Get(GetRequest(access_token=token))).session.bag) == 50


async def test_list_is_ordered_paged_and_sees_the_latest_expiries(node: Node) -> None:
    tokens = [(await started(node, access_token=name)).access_token for name in ("a", "b", "c")]
    await asyncio.sleep(0.002)  # so that the Get extends by a whole millisecond
    await node.stub.Get(GetRequest(access_token="a"))
    listed = (await node.stub.List(ListRequest())).sessions
    page = (await node.stub.List(ListRequest(offset=1, limit=1))).sessions

    assert sorted(tokens) == ["a", "b", "c"]
    assert [session.access_token for session in listed] == ["b", "c", "a"]
    assert [session.access_token for session in page] == ["c"]


async def test_list_returns_ten_unless_told_otherwise(node: Node) -> None:
    await asyncio.gather(*(started(node) for _ in range(12)))

    assert len((await node.stub.List(ListRequest())).sessions) == 10
    assert len((await node.stub.List(ListRequest(limit=1000))).sessions) == 12


@pytest.mark.parametrize(("offset", "limit"), [(-1, 1), (0, -1), (0, 1001), (0, 2**63 - 1)])
async def test_list_refuses_bounds_that_make_no_sense(node: Node, offset: int, limit: int) -> None:
    code, _ = await failure(node.stub.List(ListRequest(offset=offset, limit=limit)))

    assert code is StatusCode.INVALID_ARGUMENT


async def test_list_and_delete_honour_every_criterion(node: Node) -> None:
    one = await started(node, access_token="1", subject_id="a", refresh_token="r")
    await asyncio.sleep(0.002)
    two = await started(node, access_token="2", subject_id="a", refresh_token="q")
    await started(node, access_token="3", subject_id="b", refresh_token="r")

    async def listed(**query: object) -> list[str]:
        request = ListRequest(query=Query(**query))  # type: ignore[arg-type]
        return sorted(session.access_token for session in (await node.stub.List(request)).sessions)

    assert await listed(refresh_token="r") == ["1", "3"]
    assert await listed(expire_at_to=two.expire_at) == ["1"]
    assert await listed(expire_at_from=one.expire_at) == ["2", "3"]

    delete = node.stub.Delete
    assert (await delete(DeleteRequest(subject_id="a", refresh_token="nobody's"))).value == 0
    assert (await delete(DeleteRequest(subject_id="a", refresh_token="q"))).value == 1
    assert (await delete(DeleteRequest(subject_id="a", expire_at_to=two.expire_at))).value == 1
    assert await listed() == ["3"]


async def test_delete_by_subject_logs_out_everywhere(node: Node) -> None:
    sessions = [await started(node, subject_id="user:1") for _ in range(3)]
    await asyncio.gather(*(node.stub.Get(GetRequest(access_token=s.access_token)) for s in sessions))

    assert (await node.stub.Delete(DeleteRequest(subject_id="user:1"))).value == 3
    for session in sessions:
        assert await failure(node.stub.Get(GetRequest(access_token=session.access_token))) == NOT_FOUND


async def test_aliases_are_the_same_methods(node: Node) -> None:
    response: StartResponse = await node.stub.Create(StartRequest(session=Session(subject_id="s")))
    token = response.session.access_token
    bag = (await node.stub.SetData(SetValueRequest(access_token=token, key="k", value="v"))).bag

    assert dict(bag) == {"k": "v"}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"subject_id": "a\0b"}, "subject_id"),
        ({"subject_client": "a\0b"}, "subject_client"),
        ({"subject_id": "x" * 2049}, "subject_id"),
        ({"subject_client": "x" * 65537}, "subject_client"),
        ({"refresh_token": "x" * 2049}, "refresh_token"),
        ({"access_token": "x" * 4097}, "access token"),
        ({"access_token": "ż" * 2049}, "access token"),
        ({"access_token": "a\0b"}, "access token"),
    ],
)
async def test_what_cannot_be_stored_is_refused_by_name(
    node: Node, fields: dict[str, str], named: str
) -> None:
    new = Session(**({"subject_id": "s"} | fields))
    code, text = await failure(node.stub.Start(StartRequest(session=new)))

    assert code is StatusCode.INVALID_ARGUMENT
    assert named in str(text)


async def test_an_impossible_timestamp_is_refused_by_name(node: Node) -> None:
    request = DeleteRequest(expire_at_from=Timestamp(seconds=2**62))

    assert await failure(node.stub.Delete(request)) == (
        StatusCode.INVALID_ARGUMENT,
        "mnemosyned: expire_at_from is not a valid timestamp",
    )


async def test_a_bag_of_three_megabytes_makes_the_round_trip(node: Node) -> None:
    bag = {f"k{n}": "x" * 1_000_000 for n in range(3)}
    token = (await started(node, bag=bag)).access_token
    node.cache.drop(token)

    assert dict((await node.stub.Get(GetRequest(access_token=token))).session.bag) == bag


async def test_a_message_over_the_limit_is_resource_exhausted(node: Node) -> None:
    request = StartRequest(session=Session(subject_id="s", bag={"k": "x" * (4 * 1024**2)}))

    assert (await failure(node.stub.Start(request)))[0] is StatusCode.RESOURCE_EXHAUSTED
    assert (await started(node)).access_token


async def test_a_thousand_concurrent_calls_are_answered_each_with_its_own(node: Node) -> None:
    sessions = await asyncio.gather(*(started(node, subject_id=f"s{n}") for n in range(1000)))
    got = await asyncio.gather(
        *(node.stub.Get(GetRequest(access_token=session.access_token)) for session in sessions)
    )

    assert [one.session.subject_id for one in got] == [f"s{n}" for n in range(1000)]


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_compressed_requests_are_understood(node: Node, compression: grpc.Compression) -> None:
    request = StartRequest(session=Session(subject_id="s", bag={"k": "x" * 10_000}))
    response: StartResponse = await node.stub.Start(request, compression=compression)

    assert response.session.bag["k"] == "x" * 10_000


@pytest.mark.parametrize("path", [f"{SERVICE}/Nothing", "/no.Service/Get", "/nothing"])
async def test_an_unknown_method_or_service_is_unimplemented(node: Node, path: str) -> None:
    code, text = await failure(node.channel.unary_unary(path)(b""))

    assert code is StatusCode.UNIMPLEMENTED
    # The path may contain a token, and texts of statuses are logged by clients and proxies.
    assert text == "mnemosyned: unknown method"


@pytest.mark.parametrize("method", ["Get", "Start", "SetValue", "List", "Delete", "Abandon", "Exists"])
async def test_bytes_that_are_no_message_are_refused_without_harm(node: Node, method: str) -> None:
    code, text = await failure(node.channel.unary_unary(f"{SERVICE}/{method}")(b"\x0a\xff\xff"))

    assert code is StatusCode.INTERNAL
    assert "is not a valid mnemosynerpc." in str(text)
    assert (await started(node)).access_token


async def test_text_that_is_not_utf_8_is_refused(node: Node) -> None:
    code, _ = await failure(node.channel.unary_unary(f"{SERVICE}/Get")(b"\x0a\x02\xc3\x28"))

    assert code is StatusCode.INTERNAL


async def test_unknown_fields_are_ignored(node: Node) -> None:
    token = (await started(node)).access_token
    request = GetRequest(access_token=token).SerializeToString() + b"\xfa\x07\x03abc"

    assert await node.channel.unary_unary(f"{SERVICE}/Get")(request)


class Stuck:
    """A store whose loads wait for ever; the rest is as it was."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.release = asyncio.Event()

    def stick(self, store: MemoryStore) -> None:
        load = store.load

        async def stuck(tokens: list[str]) -> object:
            self.begun.set()
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
            return await load(tokens)

        store.load = stuck  # type: ignore[method-assign,assignment]


@pytest.fixture
def stuck(store: MemoryStore) -> Stuck:
    one = Stuck()
    one.stick(store)
    return one


async def test_a_deadline_ends_the_call_and_the_work_behind_it(stuck: Stuck, node: Node) -> None:
    code, _ = await failure(node.stub.Get(GetRequest(access_token="t"), timeout=0.2))

    assert code is StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(stuck.cancelled.wait(), 5)


async def test_a_cancelled_call_ends_the_work_behind_it(stuck: Stuck, node: Node) -> None:
    call = node.stub.Get(GetRequest(access_token="t"))
    task = asyncio.ensure_future(_swallow(call))
    await asyncio.wait_for(stuck.begun.wait(), 5)
    call.cancel()
    await task

    assert await asyncio.wait_for(stuck.cancelled.wait(), 5)


async def test_a_delete_whose_caller_left_is_finished_and_the_cache_is_told(
    node: Node, store: MemoryStore
) -> None:
    token = (await started(node)).access_token
    delete, begun, release = store.delete, asyncio.Event(), asyncio.Event()

    async def slow(criteria: Criteria, *, limit: int, not_after_us: int) -> Deletion:
        begun.set()
        await release.wait()
        return await delete(criteria, limit=limit, not_after_us=not_after_us)

    store.delete = slow  # type: ignore[method-assign]
    call = node.stub.Delete(DeleteRequest(subject_id="s"))
    await asyncio.wait_for(begun.wait(), 5)
    call.cancel()
    stats = node.table.unary["/mnemosynerpc.SessionManager/Delete"].stats
    async with asyncio.timeout(5):
        while stats.in_flight:
            await asyncio.sleep(0.001)
    release.set()
    async with asyncio.timeout(5):
        while token in node.cache.lru:
            await asyncio.sleep(0)

    assert await failure(node.stub.Get(GetRequest(access_token=token))) == NOT_FOUND


async def test_work_that_others_wait_for_goes_on(stuck: Stuck, node: Node) -> None:
    session = await started(node)
    node.cache.drop(session.access_token)
    request = GetRequest(access_token=session.access_token)
    leaves = asyncio.ensure_future(failure(node.stub.Get(request, timeout=0.2)))
    stays = asyncio.ensure_future(_answer(node.stub.Get(request)))

    assert (await leaves)[0] is StatusCode.DEADLINE_EXCEEDED
    stuck.release.set()
    assert (await stays).session.access_token == session.access_token


async def test_calls_are_counted_by_outcome_and_none_stays_in_flight(stuck: Stuck, node: Node) -> None:
    await failure(node.stub.Get(GetRequest(access_token="t"), timeout=0.1))
    await failure(node.stub.Get(GetRequest()))
    await asyncio.wait_for(stuck.cancelled.wait(), 5)
    stats = node.table.unary[f"{SERVICE}/Get"].stats
    async with asyncio.timeout(5):
        while stats.in_flight:
            await asyncio.sleep(0)

    counts = stats.requests_by_code()
    assert counts.pop("INVALID_ARGUMENT") == 1
    # Whether the server's timer or the client's reset is first is a matter of microseconds.
    assert counts in ({"DEADLINE_EXCEEDED": 1}, {"CANCELLED": 1})


async def test_a_drain_lets_calls_finish_and_refuses_new_ones(stuck: Stuck, node: Node) -> None:
    in_flight = asyncio.ensure_future(failure(node.stub.Get(GetRequest(access_token="t"))))
    await asyncio.wait_for(stuck.begun.wait(), 5)
    drain = asyncio.ensure_future(node.engine.drain())
    async with asyncio.timeout(5):
        while True:
            refused = await _outcome(node.stub.Exists(ExistsRequest(access_token="t"), timeout=1))
            if refused is not StatusCode.OK:
                break
            await asyncio.sleep(0)
    stuck.release.set()

    # gRPC's core cancels what arrives after its GOAWAY on a connection that is still open.
    assert refused in {StatusCode.UNAVAILABLE, StatusCode.CANCELLED}
    assert await in_flight == NOT_FOUND
    await asyncio.wait_for(drain, 5)


@pytest.mark.parametrize("engine", sorted(ENGINES))
async def test_a_drain_ends_in_its_time_whatever_the_calls_do(
    stuck: Stuck, store: MemoryStore, engine: str
) -> None:
    async with serving(store, engine, flags=("-drain.timeout=300ms",)) as node:
        in_flight = asyncio.ensure_future(_outcome(node.stub.Get(GetRequest(access_token="t"))))
        await asyncio.wait_for(stuck.begun.wait(), 5)
        begun_s = time.monotonic()
        await node.engine.drain()

        assert time.monotonic() - begun_s < 1.5
        assert await in_flight in {StatusCode.UNAVAILABLE, StatusCode.CANCELLED, StatusCode.INTERNAL}
        assert await asyncio.wait_for(stuck.cancelled.wait(), 5)


async def test_metadata_of_ordinary_size_is_taken(node: Node) -> None:
    token = (await started(node)).access_token
    metadata = (("x-large", "x" * 20_000),)

    assert await node.stub.Get(GetRequest(access_token=token), metadata=metadata)


async def test_metadata_of_any_size_harms_nobody(node: Node) -> None:
    metadata = (("x-large", "x" * 100_000),)

    assert (await failure(node.stub.Get(GetRequest(access_token="t"), metadata=metadata)))[0]
    assert (await started(node)).access_token


async def test_the_cache_counters_add_up_to_the_lookups(node: Node) -> None:
    token = (await started(node)).access_token
    for _ in range(5):
        await node.stub.Get(GetRequest(access_token=token))
    node.cache.drop(token)
    await node.stub.Get(GetRequest(access_token=token))
    await node.stub.Exists(ExistsRequest(access_token="absent"))

    counters = node.cache.counters
    assert (counters.hits, counters.misses, counters.refreshes) == (5, 2, 0)


async def _swallow(call: grpc.aio.UnaryUnaryCall) -> None:
    try:
        await call
    except (asyncio.CancelledError, grpc.aio.AioRpcError):
        return


async def _answer(call: grpc.aio.UnaryUnaryCall) -> ContextResponse:
    return await call


async def _outcome(call: grpc.aio.UnaryUnaryCall) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as exc:
        return exc.code()
    return StatusCode.OK


async def test_a_page_of_list_is_what_a_default_client_takes(node: Node) -> None:
    for number in range(5):
        large = Session(access_token=f"t{number}", subject_id="s", bag={"k": "x" * 1_500_000})
        await node.stub.Start(StartRequest(session=large))
    tokens: list[str] = []
    sizes: list[int] = []
    async with grpc.aio.insecure_channel(node.address) as channel:
        stub = SessionManagerStub(channel)
        while True:
            page = await stub.List(ListRequest(offset=len(tokens), limit=100))
            tokens += [session.access_token for session in page.sessions]
            sizes.append(page.ByteSize())
            if not page.truncated:
                break
    larger = await node.stub.List(ListRequest(limit=100, max_bytes=16 * 1024**2))
    least = await node.stub.List(ListRequest(limit=100, max_bytes=1))

    assert tokens == [f"t{number}" for number in range(5)]
    assert max(sizes) <= 4 * 1024**2
    assert (len(larger.sessions), larger.truncated) == (5, False)
    assert (len(least.sessions), least.truncated) == (1, True)
    with pytest.raises(grpc.aio.AioRpcError, match="max_bytes is not between 0 and 16777216"):
        await node.stub.List(ListRequest(max_bytes=-1))
