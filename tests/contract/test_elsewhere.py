"""A node whose storage is lost: its calls are answered by another member, also those that wait already."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
from mnemosynerpc.session_pb2 import (
    AbandonRequest,
    DeleteRequest,
    GetRequest,
    ListRequest,
    Session,
    SetValueRequest,
    StartRequest,
)
from peering import Peer, peering, until_they_serve_copies

from mnemosyned.errors import StorageUnavailable
from mnemosyned.storage.memory import MemoryStore

WRITES = {"Start", "SetValue", "Abandon", "Delete"}
METHODS = {"start", "set_values", "abandon", "delete"}


@dataclass
class Line:
    """One node's way to a storage that others have too. What is sent while it is cut has no answer."""

    store: MemoryStore
    is_cut: bool = False
    does_the_work: bool = True  # only the answers are lost
    refuses: bool = False  # as a server that does not listen
    delay_s: float = 0.0
    ends: asyncio.Event = field(default_factory=asyncio.Event)
    limits_us: list[int] = field(default_factory=list)  # of the writes that had no answer

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # a method of the store
        method = getattr(self.store, name)

        async def through(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # of any method
            if self.refuses and name in METHODS:
                error = StorageUnavailable("mnemosyned: storage: unavailable")
                error.is_under_way = False
                raise error
            if not self.is_cut:
                await asyncio.sleep(self.delay_s if name == "find" else 0)
                return await method(*args, **kwargs)
            if name in METHODS:
                limit_us = kwargs.get("not_after_us") or args[0][0].not_after_us
                self.limits_us.append(limit_us)
                if self.does_the_work:
                    await method(*args, **kwargs)
            await self.ends.wait()
            raise StorageUnavailable("the test is over")

        return through


@dataclass
class Pair:
    one: Peer
    line: Line  # of `one`
    other: Peer
    other_line: Line

    def token(self) -> str:
        """Return a token that `one` owns."""
        names = (f"token-{number}" for number in range(1000))
        return next(name for name in names if self.one.node.view.ring.owner(name) == self.one.address)


@pytest.fixture(params=["h2", "grpcio"])
async def pair(request: pytest.FixtureRequest) -> AsyncIterator[Pair]:
    store = MemoryStore()
    line, other_line = Line(store), Line(store)
    lines: Any = (line, other_line)
    async with (
        peering(lines[0], request.param) as one,
        peering(lines[1], request.param, seeds=(one.address,)) as other,
    ):
        await until_they_serve_copies(one, other)
        try:
            yield Pair(one, line, other, other_line)
        finally:
            line.is_cut = False
            line.ends.set()


async def call(stub: Any, method: str, token: str) -> Any:  # noqa: ANN401  # grpc.aio has no types
    match method:
        case "Start":
            session = Session(access_token=token, subject_id="s", bag={"k": "v"})
            return await stub.Start(StartRequest(session=session), timeout=3)
        case "SetValue":
            request = SetValueRequest(access_token=token, key="k", value="new")
            return await stub.SetValue(request, timeout=3)
        case "Abandon":
            return await stub.Abandon(AbandonRequest(access_token=token), timeout=3)
        case _:
            return await stub.Delete(DeleteRequest(access_token=token), timeout=3)


@pytest.mark.parametrize("does_the_work", [True, False], ids=["done", "not done"])
@pytest.mark.parametrize("method", sorted(WRITES))
async def test_a_write_that_waits_for_a_lost_storage_is_retried_when_it_can_be_done_no_more(
    pair: Pair, method: str, *, does_the_work: bool
) -> None:
    token = pair.token()
    if method != "Start":
        await call(pair.one.stub, "Start", token)
    pair.line.is_cut, pair.line.does_the_work = True, does_the_work
    answer = await call(pair.one.stub, method, token)

    assert time.time_ns() // 1000 > pair.line.limits_us[0]
    if method == "SetValue":
        assert answer.bag == {"k": "new"}
    found = pair.other.stub.Get(GetRequest(access_token=token), timeout=3)
    if method in {"Start", "SetValue"}:
        assert (await found).session.bag == {"k": "v" if method == "Start" else "new"}
    else:
        with pytest.raises(grpc.aio.AioRpcError, match="NOT_FOUND"):
            await found


async def test_a_start_of_a_token_that_is_in_use_is_refused_by_a_retry_too(pair: Pair) -> None:
    token = pair.token()
    used = Session(access_token=token, subject_id="another")
    await pair.other.stub.Start(StartRequest(session=used), timeout=3)
    pair.line.is_cut, pair.line.does_the_work = True, False

    with pytest.raises(grpc.aio.AioRpcError, match="ALREADY_EXISTS"):
        await call(pair.one.stub, "Start", token)


async def test_a_slow_list_of_a_node_without_storage_is_waited_for(pair: Pair) -> None:
    await call(pair.other.stub, "Start", pair.token())
    pair.line.is_cut, pair.other_line.delay_s = True, 0.8
    request = ListRequest(limit=10)
    answers = await asyncio.gather(*(pair.one.stub.List(request, timeout=4) for _ in range(3)))

    assert [len(answer.sessions) for answer in answers] == [1] * 3
    assert len((await pair.one.stub.List(request, timeout=4)).sessions) == 1


@pytest.mark.parametrize("method", sorted(WRITES))
async def test_a_write_that_no_node_can_do_fails_at_once_instead_of_at_its_deadline(
    pair: Pair, method: str
) -> None:
    pair.line.refuses = pair.other_line.refuses = True
    begun_s = time.monotonic()

    with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
        await call(pair.one.stub, method, pair.token())
    assert time.monotonic() - begun_s < 1.5
