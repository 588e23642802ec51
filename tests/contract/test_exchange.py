"""Streams on which each message is answered before the next is taken, on each engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import grpc
import pytest
from clusters import until
from serving import ENGINES, configured

from aio.later import Later, failed
from mnemosyned import assembly
from mnemosyned.errors import InvalidArgument, Unauthenticated
from mnemosyned.transport.call import Call, MethodStats
from mnemosyned.transport.methods import MethodTable


@dataclass
class Toy:
    """Answers a message with itself, or does what it says."""

    channel: grpc.aio.Channel = field(init=False)
    stats: MethodStats = field(init=False)
    waiting: list[Later[bytes]] = field(default_factory=list)
    finishes: list[Callable[[], None]] = field(default_factory=list)
    taken: list[bytes] = field(default_factory=list)
    closed: int = 0

    def begin(self, call: Call, finish: Callable[[], None]) -> Toy:
        if call.metadata("refuse"):
            raise Unauthenticated("mnemosyned: not you")
        self.finishes.append(finish)
        return self

    def answer(self, message: bytes) -> bytes | Later[bytes]:
        self.taken.append(message)
        command, _, value = message.partition(b" ")
        match command:
            case b"wait":
                later: Later[bytes] = Later()
                self.waiting.append(later)
                return later
            case b"known":
                known: Later[bytes] = Later()
                known.set_result(value)
                return known
            case b"lose":
                return failed(InvalidArgument("mnemosyned: lost"))
            case b"refuse":
                raise InvalidArgument("mnemosyned: refused")
            case b"err":
                raise ValueError("a secret")
            case b"fill":
                return bytes(int(value))
        return message

    def close(self) -> None:
        self.closed += 1

    def stream(self, timeout: float | None = 20, **metadata: str) -> grpc.aio.StreamStreamCall:
        return self.channel.stream_stream("/toy.Toy/Talk")(metadata=tuple(metadata.items()), timeout=timeout)


@pytest.fixture(params=sorted(ENGINES))
async def toy(request: pytest.FixtureRequest) -> AsyncIterator[Toy]:
    toy, table = Toy(), MethodTable()
    table.add_exchange("toy.Toy", "Talk", toy.begin, max_message_bytes=2**20)
    (toy.stats,) = table.stats()
    engine = ENGINES[request.param](table, assembly.engine_options(configured()))
    port = await engine.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            toy.channel = channel
            yield toy
    finally:
        await engine.drain()


async def answer(call: grpc.aio.StreamStreamCall, message: bytes) -> bytes:
    await call.write(message)
    return await call.read()  # type: ignore[no-any-return]


async def test_messages_are_answered_until_the_client_ends_the_stream(toy: Toy) -> None:
    call = toy.stream()
    for number in range(20):
        message = (b"a %d", b"known %d")[number % 2] % number
        assert (await answer(call, message)).endswith(b"%d" % number)
    await call.done_writing()

    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK
    assert (toy.stats.ok, toy.stats.in_flight, toy.closed) == (1, 0, 1)


async def test_a_message_waits_for_the_answer_before_it(toy: Toy) -> None:
    call = toy.stream()
    for message in (b"wait", b"first", b"known second", b"third"):
        await call.write(message)
    await until(lambda: bool(toy.waiting))
    # A stream of its own is answered meanwhile, so what has come of this one was seen.
    assert await answer(toy.stream(), b"other") == b"other"
    assert toy.taken == [b"wait", b"other"]
    toy.waiting[0].set_result(b"waited")

    assert [await call.read() for _ in range(4)] == [b"waited", b"first", b"second", b"third"]


@pytest.mark.parametrize(
    ("message", "code", "text"),
    [
        (b"refuse", grpc.StatusCode.INVALID_ARGUMENT, "mnemosyned: refused"),
        (b"lose", grpc.StatusCode.INVALID_ARGUMENT, "mnemosyned: lost"),
        (b"err", grpc.StatusCode.INTERNAL, "mnemosyned: internal error"),
        (bytes(2**20 + 1), grpc.StatusCode.RESOURCE_EXHAUSTED, ""),
    ],
)
async def test_an_error_ends_the_stream(toy: Toy, message: bytes, code: grpc.StatusCode, text: str) -> None:
    call = toy.stream()
    assert await answer(call, b"before") == b"before"
    await call.write(message)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()

    assert caught.value.code() is code
    assert (caught.value.details() or "").startswith(text)
    await until(lambda: toy.closed == 1)
    assert (toy.stats.by_code, toy.stats.in_flight) == ({code.name: 1}, 0)


async def test_an_answer_that_fails_later_ends_the_stream(toy: Toy) -> None:
    call = toy.stream()
    await call.write(b"wait")
    await call.write(b"never taken")
    await until(lambda: bool(toy.waiting))
    toy.waiting[0].set_exception(InvalidArgument("mnemosyned: lost"))

    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
    await until(lambda: toy.closed == 1)
    assert toy.taken == [b"wait"]


async def test_a_stream_may_be_refused_before_any_message(toy: Toy) -> None:
    call = toy.stream(refuse="yes")

    assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
    await until(lambda: toy.stats.by_code == {"UNAUTHENTICATED": 1})
    assert (toy.stats.in_flight, toy.taken) == (0, [])


async def test_this_side_ends_a_stream_that_waits_for_a_message(toy: Toy) -> None:
    call = toy.stream()
    assert await answer(call, b"a") == b"a"
    toy.finishes[0]()
    toy.finishes[0]()

    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK
    await until(lambda: (toy.stats.ok, toy.stats.in_flight, toy.closed) == (1, 0, 1))


async def test_this_side_ends_a_stream_after_the_answer_under_way(toy: Toy) -> None:
    call = toy.stream()
    await call.write(b"wait")
    await call.write(b"never taken")
    await until(lambda: bool(toy.waiting))
    # A stream of its own is answered meanwhile, so what has come of this one was seen.
    assert await answer(toy.stream(), b"other") == b"other"
    toy.finishes[0]()
    toy.waiting[0].set_result(b"waited")

    assert await call.read() == b"waited"
    assert await call.code() is grpc.StatusCode.OK
    assert toy.taken == [b"wait", b"other"]


async def test_a_client_that_gives_up_cancels_the_work_for_it(toy: Toy) -> None:
    call = toy.stream()
    await call.write(b"wait")
    await until(lambda: bool(toy.waiting))
    call.cancel()

    await until(toy.waiting[0].done)
    await until(lambda: (toy.closed, toy.stats.in_flight) == (1, 0))
    assert toy.stats.by_code == {"CANCELLED": 1}


async def test_a_stream_ends_with_the_deadline_of_its_client(toy: Toy) -> None:
    # One that does not end it itself: grpcio's own time-out would.
    call = toy.stream(timeout=None, **{"grpc-timeout": "300m"})
    await call.write(b"wait")
    await until(lambda: bool(toy.waiting))

    assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(toy.waiting[0].done)
    await until(lambda: (toy.closed, toy.stats.in_flight) == (1, 0))
    assert toy.stats.by_code == {"DEADLINE_EXCEEDED": 1}


async def test_a_client_that_does_not_read_is_not_answered_further(toy: Toy) -> None:
    call = toy.stream()
    for _ in range(200):
        await call.write(b"fill 100000")
    await until(lambda: len(toy.taken) > 1)
    assert await answer(toy.stream(), b"other") == b"other"
    # Of 20 MB, what a client that reads nothing takes, and what may be held for it.
    assert len(toy.taken) < 150
    for _ in range(200):
        assert len(await call.read()) == 100_000
    await call.done_writing()

    assert await call.code() is grpc.StatusCode.OK


async def test_a_message_in_pieces_is_answered_as_a_whole(toy: Toy) -> None:
    large = bytes(2**20)
    call = toy.stream()

    assert await asyncio.wait_for(answer(call, large), 20) == large
