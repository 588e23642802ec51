"""Floods, slow and silent clients on a real socket: each loses its connection, and no other client does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable

import grpc
import pytest
from raw_http2 import (
    CANCEL,
    DATA,
    END_STREAM,
    ENHANCE_YOUR_CALM,
    GOAWAY,
    HEADERS,
    MAGIC,
    PREFACE,
    PRIORITY,
    PROTOCOL_ERROR,
    RST_STREAM,
    block,
    frame,
    open_request,
    ping,
    request,
    request_headers,
    rst_stream,
    settings,
    window_update,
)
from toy_engines import (
    BIG,
    ECHO,
    HELLO,
    WAIT,
    Toy,
    assert_served,
    code_of,
    raw_client,
    toy_engine,
)

from http2.messages import framed
from http2.stream import ServerLimits

SHORT = ServerLimits(preface_s=0.5, frame_s=0.5, body_s=0.5, idle_s=0.5, send_s=0.5)
_SOON_S = 6.0


@pytest.fixture
async def toy() -> AsyncIterator[Toy]:
    async with toy_engine() as one:
        yield one


FLOODS = {
    "PING": ping(),
    "SETTINGS": settings(),
    "PRIORITY": frame(PRIORITY, 0, 5, b"\0\0\0\3\x10"),
    "WINDOW_UPDATE": window_update(0, 1),
    "empty DATA": frame(DATA, 0, 1),
    "small DATA": frame(DATA, 0, 1, b"x"),
    "unknown frames": frame(0x63, 0, 0),
}


@pytest.mark.parametrize("kind", FLOODS)
async def test_a_flood_ends_its_connection_alone(toy: Toy, kind: str) -> None:
    async with raw_client(toy) as client, raw_client(toy) as other:
        client.send(open_request(1, WAIT) + FLOODS[kind] * 20_000)
        other.send(request(1, HELLO))
        answer = await other.until_ended(1)
        frames = await client.until_closed()
        other.send(request(3, HELLO))
        await other.until_ended(3)

    assert [code_of(it) for it in frames if it.kind == GOAWAY] == [ENHANCE_YOUR_CALM]
    assert HELLO in [it.payload for it in answer]


async def test_rapid_resets_end_with_the_connection_and_leave_no_work(toy: Toy) -> None:
    async with raw_client(toy) as client:
        for at in range(0, 20_000, 100):
            ids = range(2 * at + 1, 2 * at + 201, 2)
            client.send(b"".join(request(it, HELLO, headers=WAIT) + rst_stream(it) for it in ids))
            await asyncio.sleep(0)
        frames = await client.until_closed()

    assert frames[-1].kind == GOAWAY
    await assert_served(toy)
    assert toy.waiting == 0


async def test_deadlines_that_pass_by_the_hundred_harm_no_call_with_time_left(toy: Toy) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{toy.port}") as channel:
        wait = channel.unary_unary("/toy.Toy/Wait")
        echo = channel.unary_unary("/toy.Toy/Echo")
        await echo(b"connected")
        patient = [wait(b"patient", timeout=30) for _ in range(20)]
        late = [wait(b"late", timeout=0.2) for _ in range(400)]
        await asyncio.sleep(0.1)

        time.sleep(0.4)  # noqa: ASYNC251  # the node stalls

        failed = await asyncio.gather(*late, return_exceptions=True)
        assert await echo(b"still there", timeout=5) == b"still there"
        toy.go_on.set()
        assert await asyncio.gather(*patient) == [b"patient"] * 20
    assert {exc.code() for exc in failed} == {grpc.StatusCode.DEADLINE_EXCEEDED}  # type: ignore[union-attr]


async def test_hundreds_of_resets_while_a_call_waits_do_it_no_harm(toy: Toy) -> None:
    async with raw_client(toy) as client:
        client.send(request(1, HELLO, headers=WAIT))
        for stream_id in range(3, 1203, 2):
            client.send(request(stream_id, HELLO, headers=WAIT))
            if stream_id % 100 == 1:
                client.send(b"".join(rst_stream(it) for it in range(stream_id - 98, stream_id + 1, 2)))
                await asyncio.sleep(0)
        client.send(b"".join(rst_stream(it) for it in range(1103, 1203, 2)) + request(1203, HELLO))
        await client.until_ended(1203)
        toy.go_on.set()
        answer = await client.until_ended(1)

    assert HELLO in [it.payload for it in answer]


# Each client does nothing more after its first bytes. What must have come from the server when it closes.
IDLERS: dict[str, tuple[bytes, set[int]]] = {
    "silent": (b"", {PROTOCOL_ERROR}),
    "half a preface": (MAGIC[:10], {PROTOCOL_ERROR}),
    "no SETTINGS": (MAGIC, {PROTOCOL_ERROR}),
    "half a frame": (PREFACE + request(1)[:20], {PROTOCOL_ERROR}),
    "half a block": (PREFACE + frame(HEADERS, 0, 1, ECHO), {PROTOCOL_ERROR}),
    "no window": (MAGIC + settings((4, 0)) + request(1, HELLO), {CANCEL}),
    "no request": (PREFACE, {0}),
    "half a request": (PREFACE + open_request(1, ECHO), {0}),
}


async def test_slow_and_silent_clients_are_closed_in_time() -> None:
    async with toy_engine(SHORT) as toy:

        async def closed(first: bytes) -> set[int]:
            async with asyncio.timeout(_SOON_S), raw_client(toy, first) as client:
                frames = await client.until_closed()
            return {code_of(it) for it in frames if it.kind == GOAWAY}

        clients: list[Awaitable[set[int]]] = [closed(first) for first, _ in IDLERS.values()]
        found = dict(zip(IDLERS, await asyncio.gather(*clients), strict=True))
        await assert_served(toy)

    assert found == {name: codes for name, (_, codes) in IDLERS.items()}


async def test_a_slow_body_ends_its_stream_alone() -> None:
    async with toy_engine(ServerLimits(body_s=0.5)) as toy, raw_client(toy) as client:
        client.send(open_request(1, ECHO) + request(3, HELLO, headers=WAIT))
        frames = await client.until_ended(1)
        toy.go_on.set()
        answer = await client.until_ended(3)

    assert [code_of(it) for it in frames if it.kind == RST_STREAM] == [CANCEL]
    assert HELLO in [it.payload for it in answer]


async def test_answers_that_are_not_read_are_held_and_end_their_connection_alone() -> None:
    async with toy_engine(ServerLimits(send_s=0.5)) as toy, raw_client(toy) as other:
        many = b"".join(request(it, framed(b"1000000"), headers=BIG) for it in range(1, 41, 2))
        async with raw_client(toy, MAGIC + settings((4, 0)) + many) as client:
            other.send(request(1, HELLO))
            await other.until_ended(1)
            frames = await client.until_closed()

        assert [code_of(it) for it in frames if it.kind == GOAWAY] == [CANCEL]
        assert len(client.sent) < 10_000
        await assert_served(toy)


async def test_a_client_that_has_shut_its_side_gets_its_answer(toy: Toy) -> None:
    async with raw_client(toy) as client:
        client.send(request(1, HELLO, headers=WAIT) + open_request(3, ECHO))
        client.writer.write_eof()
        await client.until_ended(3)
        toy.go_on.set()
        answer = await client.until_ended(1)
        await client.until_closed()

    assert HELLO in [it.payload for it in answer]
    assert client.is_closed


async def test_a_client_that_vanishes_leaves_no_work(toy: Toy) -> None:
    async with raw_client(toy) as client:
        client.send(request(1, HELLO, headers=WAIT) + ping())
        await client.until(lambda sent: any(it.kind == 6 for it in sent))
        assert toy.waiting == 1
        client.writer.transport.abort()
        await assert_served(toy)
        async with asyncio.timeout(_SOON_S):
            while toy.waiting:
                await asyncio.sleep(0.01)


async def test_a_call_whose_connection_ends_at_once_is_counted_out(toy: Toy) -> None:
    async with raw_client(toy) as client:
        client.send(request(1, HELLO, headers=WAIT) + frame(DATA, 0, 0))
        await client.until_closed()

    [stats] = [it for it in toy.stats if it.labels[1] == "Wait"]
    assert stats.in_flight == 0
    assert stats.requests_by_code() == {"CANCELLED": 1}


async def test_thousands_of_requests_at_once_are_all_answered(toy: Toy) -> None:
    async with raw_client(toy, b"") as client:
        client.send(PREFACE + b"".join(request(it, HELLO) for it in range(1, 6001, 2)))
        await client.until_ended(5999)

    assert client.sent.count(HELLO) == 3000
    assert not client.is_closed


@pytest.mark.parametrize("method", [b"Echo", b"Chat"])
async def test_a_request_that_passes_the_bound_as_it_ends_is_refused_for_that(method: bytes) -> None:
    body, headers = framed(b"x" * 115), block(request_headers(b"/toy.Toy/" + method))
    whole = frame(DATA, 0, 1, body[:60]) + frame(DATA, END_STREAM, 1, body[60:])
    async with toy_engine(ServerLimits(max_request_bytes=100)) as toy, raw_client(toy) as client:
        client.send(open_request(1, headers) + whole)
        answer = await client.until_ended(1)

        assert b"\x0bgrpc-status\x0214" in b"".join(sent.payload for sent in answer if sent.kind == HEADERS)
        await assert_served(toy)
