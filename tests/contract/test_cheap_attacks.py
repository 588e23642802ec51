"""What costs a client nothing is bounded: silent connections, half requests, streams, floods."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from mnemosynerpc.session_pb2 import GetRequest, Session, StartRequest
from raw_http2 import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    FRAME_SIZE_ERROR,
    GOAWAY,
    HEADERS,
    MAGIC,
    PING,
    PREFACE,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    block,
    frame,
    goaways_of,
    literal,
    open_request,
    request,
    request_headers,
    setting,
)
from serving import ENGINES, Node, serving
from toy_engines import ECHO, HELLO, WAIT, Toy, assert_served, raw_client, toy_engine

from http2.messages import framed
from mnemosyned import assembly
from mnemosyned.config.config import Config
from mnemosyned.storage.memory import MemoryStore
from mnemosyned.transport.engine import EngineOptions
from mnemosyned.transport.h2_engine import H2Engine

WATCH = block(request_headers(b"/grpc.health.v1.Health/Watch"))
START = block(request_headers(b"/mnemosynerpc.SessionManager/Start"))
MIB = 2**20


# Silent connections


SILENT = {"nothing": b"", "half a preface": MAGIC[:10], "no SETTINGS": MAGIC}


@pytest.mark.parametrize("engine", sorted(ENGINES))
async def test_a_connection_that_does_not_begin_is_closed_in_time(engine: str) -> None:
    async with serving(MemoryStore(), engine, flags=["-grpc.handshake-timeout=1s"]) as node:

        async def lasted_s(first: bytes) -> float:
            reader, writer = await asyncio.open_connection(*node.address.split(":"))
            writer.write(first)
            begun_s = time.monotonic()
            async with asyncio.timeout(10):
                with suppress(ConnectionError):
                    while await reader.read(65536):
                        pass
            writer.transport.abort()
            return time.monotonic() - begun_s

        lasted = await asyncio.gather(*map(lasted_s, SILENT.values()))
        await started(node, "t")

    assert max(lasted) < 6


async def started(node: Node, token: str, value: str = "v") -> None:
    new = Session(access_token=token, subject_id="s", bag={"k": value})
    await node.stub.Start(StartRequest(session=new), timeout=5)


# Streams that last


@pytest.mark.parametrize("engine", sorted(ENGINES))
async def test_watches_of_one_connection_are_bounded_and_others_are_served(engine: str) -> None:
    async with serving(MemoryStore(), engine) as node, AsyncExitStack() as stack:
        calls = [health_pb2_grpc.HealthStub(node.channel).Watch(watched()) for _ in range(16)]
        for call in calls:
            assert (await call.read()).status == 1
        too_many = health_pb2_grpc.HealthStub(node.channel).Watch(watched())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await too_many.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

        own = [("grpc.use_local_subchannel_pool", 1)]
        other = await stack.enter_async_context(grpc.aio.insecure_channel(node.address, options=own))
        of_other = health_pb2_grpc.HealthStub(other).Watch(watched())
        assert (await of_other.read()).status == 1
        calls.pop().cancel()
        await until_watched(node)
        for call in (*calls, of_other):
            call.cancel()


def watched() -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest()


async def until_watched(node: Node) -> None:
    """A place that was given back can be had, soon."""
    async with asyncio.timeout(5):
        while True:
            call = health_pb2_grpc.HealthStub(node.channel).Watch(watched())
            with suppress(grpc.aio.AioRpcError):
                await call.read()
                call.cancel()
                return
            await asyncio.sleep(0.01)


# Requests that are not complete


@asynccontextmanager
async def bounded_node(monkeypatch: pytest.MonkeyPatch, request_bytes: int) -> AsyncIterator[Node]:
    options = assembly.engine_options

    def limited(config: Config) -> EngineOptions:
        return replace(options(config), max_request_bytes=request_bytes)

    monkeypatch.setattr(assembly, "engine_options", limited)
    async with serving(MemoryStore(), "h2") as node:
        yield node


HALVES: dict[str, Callable[[int], bytes]] = {
    "half requests": lambda it: open_request(it, START),
    "first parts of bodies": lambda it: open_request(it, START) + frame(DATA, 0, it, bytes(400)),
}


@pytest.mark.parametrize("kind", HALVES)
async def test_halves_of_requests_do_not_fill_the_memory_together(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    async with bounded_node(monkeypatch, MIB) as node, AsyncExitStack() as stack:
        await started(node, "t")
        toy = Toy(port=int(node.address.split(":")[1]))
        for _ in range(10):
            client = await stack.enter_async_context(raw_client(toy))
            client.send(b"".join(map(HALVES[kind], range(1, 200, 2))))
        engine = node.engine
        assert isinstance(engine, H2Engine)
        async with asyncio.timeout(10):
            while not engine._options.stats.ended["incomplete"]:
                await asyncio.sleep(0.01)

        assert engine._server is not None
        assert engine._server.request_total.size_bytes <= MIB
        assert (await node.stub.Get(GetRequest(access_token="t"), timeout=5)).session.bag == {"k": "v"}
        await started(node, "large", "x" * (MIB // 2))
        total = engine._server.request_total
    assert total.size_bytes == 0


# Frames


@pytest.fixture
async def toy() -> AsyncIterator[Toy]:
    async with toy_engine() as one:
        yield one


def headers_of(size_bytes: int) -> bytes:
    filling = literal(b"x", b"y" * 16_384)
    return (ECHO + filling)[:size_bytes] + bytes(max(0, size_bytes - len(ECHO + filling)))


OVER = 16_385
TOO_LARGE = {
    "HEADERS": frame(HEADERS, END_HEADERS | END_STREAM, 1, headers_of(OVER)),
    "HEADERS without their end": frame(HEADERS, END_STREAM, 1, headers_of(OVER)),
    "CONTINUATION": frame(HEADERS, 0, 1, ECHO) + frame(CONTINUATION, END_HEADERS, 1, bytes(OVER)),
    "trailers": open_request(1, ECHO) + frame(HEADERS, END_HEADERS | END_STREAM, 1, headers_of(OVER)),
    "DATA": open_request(1, ECHO) + frame(DATA, END_STREAM, 1, bytes(OVER)),
    "SETTINGS": frame(SETTINGS, 0, 0, setting(0x99, 1) * 2731),
    "PING": frame(PING, 0, 0, bytes(OVER)),
    "PRIORITY": frame(PRIORITY, 0, 3, bytes(OVER)),
    "RST_STREAM": open_request(1, ECHO) + frame(RST_STREAM, 0, 1, bytes(OVER)),
    "WINDOW_UPDATE": frame(WINDOW_UPDATE, 0, 0, bytes(OVER)),
    "GOAWAY": frame(GOAWAY, 0, 0, bytes(OVER)),
    "PUSH_PROMISE": frame(PUSH_PROMISE, END_HEADERS, 1, bytes(OVER)),
    "unknown": frame(0x63, 0, 0, bytes(OVER)),
}
# 128 streams are open, and further ones wait: frames are cut there before the library sees them.
FULL = b"".join(request(it, HELLO, headers=WAIT) for it in range(1001, 1301, 2))


@pytest.mark.parametrize("kind", TOO_LARGE)
@pytest.mark.parametrize("missing_bytes", [0, 300, 16_000])
async def test_a_frame_over_the_limit_ends_the_connection(toy: Toy, kind: str, missing_bytes: int) -> None:
    async with raw_client(toy) as client:
        client.send(TOO_LARGE[kind][: len(TOO_LARGE[kind]) - missing_bytes])
        await client.until_closed()

    assert [code for _, code in goaways_of(client.sent)] == [FRAME_SIZE_ERROR]
    await assert_served(toy)


@pytest.mark.parametrize("kind", ["HEADERS", "PING", "unknown", "SETTINGS"])
async def test_a_frame_over_the_limit_ends_a_connection_with_requests_that_wait(toy: Toy, kind: str) -> None:
    large = TOO_LARGE[kind].replace(b"\0\0\0\1", b"\0\0\x05\x15", 1) if kind == "HEADERS" else TOO_LARGE[kind]
    async with raw_client(toy) as client:
        client.send(FULL + large)
        await client.until(lambda sent: any(it.kind == SETTINGS for it in sent))
        toy.go_on.set()
        await client.until_closed()

    assert [code for _, code in goaways_of(client.sent)] == [FRAME_SIZE_ERROR]


async def test_large_settings_are_a_flood_sooner_than_small_ones(toy: Toy) -> None:
    async with raw_client(toy, PREFACE) as client:
        client.send(frame(SETTINGS, 0, 0, setting(0x99, 1) * 2000) * 60)
        await client.until_closed()

    assert len(goaways_of(client.sent)) == 1


async def test_a_client_with_one_request_does_not_wait_for_all_that_others_send(toy: Toy) -> None:
    many = b"".join(request(it, HELLO, headers=ECHO) for it in range(1, 2401, 2))
    async with AsyncExitStack() as stack:
        floods = [await stack.enter_async_context(raw_client(toy)) for _ in range(10)]
        client = await stack.enter_async_context(raw_client(toy))
        client.send(request(1, HELLO))
        await client.until_ended(1)
        for flood in floods:
            flood.send(many)
        await asyncio.sleep(0)
        client.send(request(3, HELLO))
        await client.until_ended(3)
        counts = [flood.sent.count(HELLO) for flood in floods]
        await asyncio.gather(*(flood.until_ended(2399) for flood in floods))

        assert sum(counts) < 10 * 1200
        assert [flood.sent.count(HELLO) for flood in floods] == [1200] * 10


# Log lines


async def test_overload_by_clients_does_not_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mnemosyned")
    body = framed(watched().SerializeToString())
    async with serving(MemoryStore(), "h2") as node:
        toy: Any = Toy(port=int(node.address.split(":")[1]))
        async with raw_client(toy) as client:
            for first in range(1, 2001, 200):
                ids = range(first, first + 200, 2)
                client.send(b"".join(request(it, body, headers=WATCH) for it in ids))
            await client.until_ended(1999)

    failed = [it for it in caplog.records if it.getMessage() == "rpc_failed"]
    assert 0 < len(failed) <= 300
    assert {it.levelname for it in failed} <= {"WARNING", "INFO"}
