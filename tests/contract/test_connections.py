"""What the h2 engine does with connections: how many, how old, and what they hold together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import grpc
import h2.config
import h2.connection
import pytest
from mnemosynerpc.session_pb2 import ExistsRequest, GetRequest, Session, StartRequest
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from serving import Node, serving

from http2.messages import framed
from mnemosyned import assembly
from mnemosyned.config.config import Config
from mnemosyned.storage.memory import MemoryStore
from mnemosyned.transport.engine import ConnectionStats, EngineOptions
from mnemosyned.transport.h2_engine import H2Engine

# Two channels of one process share a connection otherwise.
OWN = [("grpc.use_local_subchannel_pool", 1)]


async def until(is_met: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not is_met():
            await asyncio.sleep(0.01)


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    flags = ["-grpc.max-connections=3", "-grpc.max-connections-per-address=2", "-grpc.max-age=1s"]
    async with serving(MemoryStore(), "h2", flags=flags) as node:
        yield node


def stats_of(node: Node) -> ConnectionStats:
    engine = node.engine
    assert isinstance(engine, H2Engine)
    return engine._options.stats


async def connected(node: Node, count: int) -> list[grpc.aio.Channel]:
    channels = [grpc.aio.insecure_channel(node.address, options=OWN) for _ in range(count)]
    for channel in channels:
        await SessionManagerStub(channel).Exists(ExistsRequest(access_token="t"))
    return channels


async def test_connections_are_counted_and_their_ends_too(node: Node) -> None:
    stats = stats_of(node)
    channels = await connected(node, 2)
    assert stats.open == 2
    for channel in channels:
        await channel.close()

    await until(lambda: stats.open == 0)
    assert stats.ended == {"client": 2}


async def test_connections_of_one_address_are_bounded_and_a_place_is_given_back(node: Node) -> None:
    stats = stats_of(node)
    first, second = await connected(node, 2)
    async with grpc.aio.insecure_channel(node.address, options=OWN) as third:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await SessionManagerStub(third).Exists(ExistsRequest(access_token="t"))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert stats.ended["limit"] >= 1
        await first.close()
        await until(lambda: stats.open == 1)

        await SessionManagerStub(third).Exists(ExistsRequest(access_token="t"), wait_for_ready=True)
    await second.close()


async def test_an_old_connection_is_replaced_and_no_call_fails(node: Node) -> None:
    stats = stats_of(node)
    loop = asyncio.get_running_loop()
    (channel,) = await connected(node, 1)
    stub, end_s = SessionManagerStub(channel), loop.time() + 4
    while loop.time() < end_s:
        await stub.Exists(ExistsRequest(access_token="t"))
        await asyncio.sleep(0.001)

    assert stats.ended["age"] >= 1
    await channel.close()


async def test_connections_that_were_opened_together_do_not_become_too_old_together() -> None:
    async with serving(MemoryStore(), "h2", flags=["-grpc.max-age=100s"]) as node:
        channels = await connected(node, 5)
        assert isinstance(node.engine, H2Engine)
        ages = {connection._http._limits.max_age_s for connection in node.engine._connections()}
        for channel in channels:
            await channel.close()

    assert len(ages) == 5
    assert all(90 <= age <= 110 for age in ages)


async def test_an_age_of_zero_is_no_limit() -> None:
    async with serving(MemoryStore(), "h2", flags=["-grpc.max-age=0"]) as node:
        (channel,) = await connected(node, 1)
        await asyncio.sleep(1.5)

        assert stats_of(node).ended == {}
        await channel.close()


async def test_clients_that_read_nothing_do_not_fill_the_memory_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = assembly.engine_options

    def limited(config: Config) -> EngineOptions:
        return replace(options(config), max_unsent_bytes=8_000_000)

    monkeypatch.setattr(assembly, "engine_options", limited)
    async with serving(MemoryStore(), "h2", flags=["-bag.max-value=3MiB"]) as node:
        stats = stats_of(node)
        new = Session(access_token="t", subject_id="s", bag={"k": "x" * 3_000_000})
        await node.stub.Start(StartRequest(session=new))
        clients = [await deaf_client(node.address) for _ in range(5)]
        await until(lambda: stats.ended["unread"] >= 3)

        assert (await node.stub.Get(GetRequest(access_token="t"))).session.bag == new.bag
        for writer in clients:
            writer.close()


async def deaf_client(address: str) -> asyncio.StreamWriter:
    """Ask for the session, grant a large window, and read nothing."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
    reader._transport.pause_reading()  # type: ignore[attr-defined]  # its own protocol would read
    http = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    http.initiate_connection()
    http.increment_flow_control_window(1_000_000_000)
    http.send_headers(
        1,
        [
            (":method", "POST"),
            (":scheme", "http"),
            (":authority", "x"),
            (":path", "/mnemosynerpc.SessionManager/Get"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ],
    )
    http.send_data(1, framed(GetRequest(access_token="t").SerializeToString()), end_stream=True)
    writer.write(http.data_to_send())
    return writer
