"""Pages of List by page tokens, for a stock client: on every storage engine, and on every gRPC engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
import stores
from google.protobuf.timestamp_pb2 import Timestamp
from mnemosynerpc.session_pb2 import (
    AbandonRequest,
    DeleteRequest,
    GetRequest,
    ListRequest,
    ListResponse,
    Query,
    Session,
    StartRequest,
)
from serving import ENGINES, Node, serving

from mnemosyned.sessions.token_hash import TokenHasher
from mnemosyned.storage.hashed import HashedStore

PLACES = [
    *(
        f"{name} h2"
        for name in (
            *stores.ENGINES,
            *(f"hashed {one}" for one in stores.RENAMABLE if one not in stores.SLOW),
        )
    ),
    *(f"memory {name}" for name in ENGINES if name != "h2"),
]


@pytest.fixture(params=PLACES)
async def node(request: pytest.FixtureRequest) -> AsyncIterator[Node]:
    storage, _, transport = request.param.rpartition(" ")
    async with stores.opened(storage.removeprefix("hashed "), request) as engine:
        store = engine.store
        if storage.startswith("hashed"):
            store = HashedStore(store, TokenHasher([b"a key that only these tests know"], is_hashing=True))
        async with serving(store, transport) as node:
            yield node


async def start(node: Node, count: int, **fields: object) -> list[str]:
    sessions = [Session(access_token=f"t{n:03}", subject_id="s", **fields) for n in range(count)]  # type: ignore[arg-type]
    await asyncio.gather(*(node.stub.Start(StartRequest(session=one)) for one in sessions))
    return [one.access_token for one in sessions]


async def pages(node: Node, *, first_token: str | None, **fields: object) -> list[ListResponse]:
    """Go through all pages, as clients do."""
    request = ListRequest(page_token=first_token, **fields)  # type: ignore[arg-type]
    found = []
    while not found or request.page_token:
        found.append(await node.stub.List(request))
        request.page_token = found[-1].next_page_token
    return found


def shown(found: list[ListResponse]) -> list[str]:
    return [session.access_token for page in found for session in page.sessions]


async def failure(node: Node, **fields: object) -> tuple[grpc.StatusCode, str | None]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await node.stub.List(ListRequest(**fields))  # type: ignore[arg-type]
    return caught.value.code(), caught.value.details()


@pytest.mark.parametrize("first_token", [None, ""])
@pytest.mark.parametrize("limit", [1, 7, 25, 26])
async def test_all_pages_have_each_session_once(node: Node, limit: int, first_token: str | None) -> None:
    await start(node, 25)
    whole = await node.stub.List(ListRequest(limit=100))
    found = await pages(node, first_token=first_token, limit=limit)

    assert sorted(shown(found)) == sorted(shown([whole]))
    assert whole.next_page_token == ""
    assert all(len(page.sessions) <= limit and not page.truncated for page in found)
    if first_token == "":
        assert shown(found) == sorted(shown(found))


@pytest.mark.parametrize("first_token", [None, ""])
async def test_sessions_that_are_used_meanwhile_come_once(node: Node, first_token: str | None) -> None:
    tokens = await start(node, 25)
    request = ListRequest(limit=4, page_token=first_token)
    found: list[ListResponse] = []
    while not found or request.page_token:
        found.append(await node.stub.List(request))
        request.page_token = found[-1].next_page_token
        await asyncio.gather(*(node.stub.Get(GetRequest(access_token=token)) for token in tokens))
        # Some reach the storage, and others wait.
        if len(found) % 2:
            await node.touches.flush()

    assert len(shown(found)) == 25
    assert len(set(shown(found))) == 25


async def test_the_expiries_of_a_walk_are_the_latest(node: Node) -> None:
    (token,) = await start(node, 1)
    await asyncio.sleep(0.002)  # so that the Get extends by a whole millisecond
    latest = (await node.stub.Get(GetRequest(access_token=token))).session.expire_at
    (page,) = await pages(node, first_token="")

    assert page.sessions[0].expire_at == latest


@pytest.mark.parametrize("first_token", [None, ""])
async def test_pages_that_end_for_their_size_go_on_there(node: Node, first_token: str | None) -> None:
    await start(node, 9, bag={"k": "x" * 10_000})
    found = await pages(node, first_token=first_token, limit=5, max_bytes=35_000)

    assert len(set(shown(found))) == len(shown(found)) == 9
    assert [page.truncated for page in found] == [True] * (len(found) - 1) + [False]
    assert all(page.ByteSize() <= 35_000 for page in found)
    least = await pages(node, first_token=first_token, limit=5, max_bytes=1)
    assert len(set(shown(least))) == len(shown(least)) == 9
    assert max(len(page.sessions) for page in least) == 1


async def test_a_walk_honours_its_query(node: Node) -> None:
    await start(node, 6, refresh_token="r")
    other = Session(access_token="u", subject_id="s", refresh_token="q")
    expire_at = (await node.stub.Start(StartRequest(session=other))).session.expire_at
    before = Timestamp()
    before.FromMicroseconds(expire_at.ToMicroseconds() - 1)

    async def count(**query: object) -> int:
        found = await pages(node, first_token="", limit=2, query=Query(**query))  # type: ignore[arg-type]
        return len(set(shown(found)))

    assert await count(refresh_token="r") == 6
    assert await count(refresh_token="q") == 1
    assert await count(refresh_token="none") == 0
    assert await count(expire_at_from=before) == 1
    assert await count(expire_at_from=before, refresh_token="r") == 0
    assert await count(expire_at_to=expire_at) == 6


@pytest.mark.parametrize("first_token", [None, ""])
async def test_a_token_of_another_query_is_refused(node: Node, first_token: str | None) -> None:
    await start(node, 3, refresh_token="r")
    query = Query(refresh_token="r")
    (first, *_) = await pages(node, first_token=first_token, limit=1, query=query)
    refusal = (grpc.StatusCode.INVALID_ARGUMENT, "mnemosyned: page_token is none of this query")

    assert await failure(node, page_token=first.next_page_token) == refusal
    assert await failure(node, page_token=first.next_page_token, query=Query(refresh_token="q")) == refusal
    assert await failure(node, page_token="next", query=query) == refusal
    assert await failure(node, page_token="x" * 100_000, query=query) == refusal
    # The size of a page is no part of the query.
    page = await node.stub.List(ListRequest(page_token=first.next_page_token, limit=9, query=query))
    assert len(page.sessions) == 2


async def test_an_offset_and_a_token_exclude_each_other(node: Node) -> None:
    await start(node, 3)
    first = await node.stub.List(ListRequest(limit=1))
    refusal = (grpc.StatusCode.INVALID_ARGUMENT, "mnemosyned: offset and page_token exclude each other")

    assert await failure(node, offset=1, page_token=first.next_page_token) == refusal
    assert await failure(node, offset=1, page_token="") == refusal
    page = await node.stub.List(ListRequest(offset=1, limit=1))
    assert (len(page.sessions), page.next_page_token) == (1, "")


async def test_a_walk_over_nothing_is_one_empty_page(node: Node) -> None:
    assert await pages(node, first_token="") == [ListResponse()]
    assert await pages(node, first_token=None) == [ListResponse()]


async def test_a_walk_goes_on_after_its_last_session_has_ended(node: Node) -> None:
    await start(node, 6)
    first = await node.stub.List(ListRequest(limit=3, page_token=""))
    for session in first.sessions:
        await node.stub.Delete(DeleteRequest(access_token=session.access_token))
    rest = await node.stub.List(ListRequest(limit=9, page_token=first.next_page_token))

    assert len(rest.sessions) == 3
    assert not set(shown([first])) & set(shown([rest]))


async def test_answers_to_old_clients_are_as_they_were_but_for_the_token(node: Node) -> None:
    tokens = await start(node, 5)
    for offset, limit in ((0, 10), (0, 5), (0, 2), (2, 2), (9, 2)):
        page = await node.stub.List(ListRequest(offset=offset, limit=limit))
        assert bool(page.next_page_token) == (offset == 0 and limit <= 5)
        assert len(page.sessions) == max(0, min(limit, 5 - offset))
        expiries = [session.expire_at.ToMicroseconds() for session in page.sessions]
        assert expiries == sorted(expiries)
    await asyncio.gather(*(node.stub.Abandon(AbandonRequest(access_token=token)) for token in tokens))
