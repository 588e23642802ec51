"""What waited unread is known to be old, wherever it waited; what was sent afterwards is new."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator

import pytest
from raw_http2 import ACK, DATA, PING, PREFACE, Sent, block, ping, request, request_headers
from toy_engines import HELLO, WAIT, RawClient, Toy, raw_client, toy_engine

AGE = block(request_headers(b"/toy.Toy/Age", (b"grpc-timeout", b"60S")))
STALL_S = 0.4
WITHIN_S = 5.0


@pytest.fixture
async def toy() -> AsyncIterator[Toy]:
    async with toy_engine() as one:
        yield one


async def age_s(client: RawClient, stream_id: int) -> float:
    """How old the engine takes a call to be that has been sent."""
    frames = await client.until_ended(stream_id)
    return float(next(it.payload for it in frames if it.kind == DATA)[5:])


async def pings(client: RawClient, count: int) -> list[bytes]:
    """What the engine's PINGs say, once there are so many."""

    def sent(frames: list[Sent]) -> list[bytes]:
        return [it.payload for it in frames if it.kind == PING and not it.flags & ACK]

    return sent(await client.until(lambda frames: len(sent(frames)) >= count))


def stall() -> None:
    """Let the loop stand still."""
    time.sleep(STALL_S)


async def forgotten(toy: Toy) -> None:
    """Wait until the stall is forgotten: a new client's calls are new."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            async with raw_client(toy) as other:
                other.send(request(1, HELLO, headers=AGE))
                if not await age_s(other, 1):
                    return


async def test_what_comes_before_the_echo_is_as_old_as_the_stall(toy: Toy) -> None:
    async with raw_client(toy) as client:
        client.send(request(1, HELLO, headers=AGE))
        assert await age_s(client, 1) == 0

        client.send(request(3, HELLO, headers=AGE))
        stall()
        assert await age_s(client, 3) > STALL_S * 0.75

        # The client held this one back in the stall, for want of room in the socket.
        (payload,) = await pings(client, 1)
        await forgotten(toy)
        client.send(request(5, HELLO, headers=AGE))
        assert await age_s(client, 5) > STALL_S * 0.75

        client.send(ping(payload, flags=ACK))
        client.send(request(7, HELLO))
        await client.until_ended(7)
        client.send(request(9, HELLO, headers=AGE))
        assert await age_s(client, 9) == 0


async def test_a_client_that_was_silent_in_the_stall_is_asked_for_nothing(toy: Toy) -> None:
    async with raw_client(toy) as client:
        client.send(request(1, HELLO, headers=AGE))
        assert await age_s(client, 1) == 0
        stall()
        await forgotten(toy)

        client.send(request(3, HELLO, headers=AGE))
        assert await age_s(client, 3) == 0
        assert [it for it in await client.until_ended(3) if it.kind == PING] == []


async def test_a_client_that_connects_in_the_stall_may_have_sent_its_call_then(toy: Toy) -> None:
    waiting = socket.create_connection(("127.0.0.1", toy.port))
    waiting.sendall(PREFACE + request(1, HELLO, headers=AGE))
    stall()
    reader, writer = await asyncio.open_connection(sock=waiting)

    assert await age_s(RawClient(reader, writer), 1) > STALL_S * 0.75
    writer.transport.abort()


async def test_a_call_beyond_the_limit_of_streams_is_as_old_as_its_wait(toy: Toy) -> None:
    async with raw_client(toy) as client:
        for at in range(128):
            client.send(request(2 * at + 1, HELLO, headers=WAIT))
        client.send(request(257, HELLO, headers=AGE))
        async with asyncio.timeout(WITHIN_S):
            while toy.waiting < 128:
                await asyncio.sleep(0.01)
        await asyncio.sleep(STALL_S)
        toy.go_on.set()

        assert await age_s(client, 257) > STALL_S * 0.75
