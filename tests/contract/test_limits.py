"""The limits that an operator sets: on bags, streams and connections, on each engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import grpc
import h2.config
import h2.connection
import pytest
from mnemosynerpc.session_pb2 import ExistsRequest, GetRequest, Session, SetValueRequest, StartRequest
from serving import ENGINES, Node, serving

from mnemosyned.storage.memory import MemoryStore

pytestmark = pytest.mark.parametrize("engine", sorted(ENGINES))


@asynccontextmanager
async def limited(engine: str) -> AsyncIterator[Node]:
    store = MemoryStore()
    bag = ("-bag.max-entries=2", "-bag.max-key=3", "-bag.max-value=5")
    flags = (*bag, "-grpc.max-streams=7", "-grpc.max-connections=2")
    async with serving(store, engine, flags=flags) as node:
        yield node


async def refusal(call: grpc.aio.UnaryUnaryCall) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    return str(caught.value.details())


async def test_bags_keep_to_their_limits_when_they_start_and_when_they_change(engine: str) -> None:
    async with limited(engine) as node:

        def start(bag: dict[str, str]) -> grpc.aio.UnaryUnaryCall:
            return node.stub.Start(StartRequest(session=Session(subject_id="s", access_token="t", bag=bag)))

        async def set_value(key: str, value: str) -> str:
            return await refusal(node.stub.SetValue(SetValueRequest(access_token="t", key=key, value=value)))

        for bag, complaint in (
            ({"a": "1", "b": "2", "c": "3"}, "bag would have more than 2 entries"),
            ({"long": "1"}, "bag key is longer than 3 bytes"),
            ({"a": "longer"}, "bag value is longer than 5 bytes"),
        ):
            assert await refusal(start(bag)) == f"mnemosyned: {complaint}"
        await start({"a": "1", "b": "2"})

        assert await set_value("c", "3") == "mnemosyned: bag would have more than 2 entries"
        assert await set_value("long", "1") == "mnemosyned: bag key is longer than 3 bytes"
        assert await set_value("a", "longer") == "mnemosyned: bag value is longer than 5 bytes"
        await node.stub.SetValue(SetValueRequest(access_token="t", key="a", value="3"))
        got = await node.stub.Get(GetRequest(access_token="t"))
        assert dict(got.session.bag) == {"a": "3", "b": "2"}


class RawClient:
    """A bare HTTP/2 connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self.writer = reader, writer
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration())

    @classmethod
    async def come(cls, address: str) -> RawClient:
        host, _, port = address.rpartition(":")
        client = cls(*await asyncio.open_connection(host, int(port)))
        client.h2.initiate_connection()
        client.writer.write(client.h2.data_to_send())
        return client

    async def is_served(self, within_s: float) -> bool:
        """Tell whether the server greets it."""
        with suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(within_s):
                greeting = await self._reader.read(1000)
                self.h2.receive_data(greeting)
                return bool(greeting)
        return False


async def test_a_connection_is_told_how_many_calls_it_may_have_in_flight(engine: str) -> None:
    async with limited(engine) as node:
        client = await RawClient.come(node.address)

        assert await client.is_served(10)
        assert client.h2.remote_settings.max_concurrent_streams == 7
        client.writer.close()


async def test_one_connection_too_many_is_not_served_before_another_ends(engine: str) -> None:
    async with limited(engine) as node:
        await node.stub.Exists(ExistsRequest(access_token="t"))
        second = await RawClient.come(node.address)
        assert await second.is_served(10)

        third = await RawClient.come(node.address)
        assert not await third.is_served(0.3)
        await node.stub.Exists(ExistsRequest(access_token="t"))

        third.writer.close()
        second.writer.close()
        async with asyncio.timeout(10):
            while not await (fourth := await RawClient.come(node.address)).is_served(1):
                fourth.writer.close()
        fourth.writer.close()
