"""The engine of ours with a service for tests, and a client that sends any bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from raw_http2 import (
    DATA,
    FRAME_HEADER_BYTES,
    GOAWAY,
    HEADERS,
    PREFACE,
    RST_STREAM,
    Sent,
    block,
    frames_of,
    request,
    request_headers,
)

from http2.messages import framed
from http2.stream import ServerLimits
from mnemosyned.transport.call import Call, MethodStats
from mnemosyned.transport.engine import EngineOptions
from mnemosyned.transport.h2_engine import H2Engine
from mnemosyned.transport.methods import MethodTable

ECHO, WAIT, BIG = (block(request_headers(b"/toy.Toy/" + name)) for name in (b"Echo", b"Wait", b"Big"))
HELLO = framed(b"hello")
_WAIT_S = 30  # for a flood that is answered while other tests have the processors


@dataclass
class Toy:
    """`Wait` is answered when `go_on` is set, `Big` with as many bytes as its message says.

    `Age` answers how long it may have waited until it was taken in, in seconds.
    """

    port: int = 0
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    waiting: int = 0
    stats: list[MethodStats] = field(default_factory=list)

    def table(self) -> MethodTable:
        table = MethodTable()
        table.add_unary("toy.Toy", "Echo", lambda message, _call: message)
        table.add_unary("toy.Toy", "Wait", self._wait)
        table.add_unary("toy.Toy", "Big", lambda message, _call: bytes(int(message)))
        table.add_unary("toy.Toy", "Age", lambda _message, call: str(call.deadline.waited_s).encode())
        table.add_stream("toy.Toy", "Chat", self._chat)
        self.stats = table.stats()
        return table

    async def _wait(self, message: bytes, _call: Call) -> bytes:
        self.waiting += 1
        try:
            await self.go_on.wait()
        finally:
            self.waiting -= 1
        return message

    async def _chat(self, messages: AsyncIterator[bytes], _call: Call) -> AsyncIterator[bytes]:
        async for message in messages:
            yield message


class RawClient:
    """One connection; `sent` is all that its server has sent."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.sent = b""
        self.is_closed = False  # by the server
        self._reader = reader
        # What is in these is not cut again with each read: a test may wait for thousands of answers.
        self._frames: list[Sent] = []
        self._cut_bytes = 0  # of `sent`
        self._ended: set[int] = set()

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def until(self, is_met: Callable[[list[Sent]], bool]) -> list[Sent]:
        """Read until the frames meet a condition, or the server closes the connection."""
        async with asyncio.timeout(_WAIT_S):
            while not is_met(self._frames) and not self.is_closed:
                await self._read()
        return list(self._frames)

    async def until_closed(self) -> list[Sent]:
        return await self.until(lambda _: False)

    async def until_ended(self, stream_id: int) -> list[Sent]:
        """Read until a stream has ended; return its frames."""
        frames = await self.until(lambda _: stream_id in self._ended)
        return [it for it in frames if it.stream_id == stream_id]

    async def _read(self) -> None:
        try:
            data = await self._reader.read(2**16)
        except ConnectionError:
            data = b""
        self.sent += data
        self.is_closed = not data
        new = frames_of(self.sent[self._cut_bytes :])
        self._frames += new
        self._cut_bytes += sum(FRAME_HEADER_BYTES + len(it.payload) for it in new)
        self._ended |= {it.stream_id for it in new if _ends(it)}


def _ends(sent: Sent) -> bool:
    return sent.kind == RST_STREAM or (sent.kind in {HEADERS, DATA} and bool(sent.flags & 1))


def code_of(sent: Sent) -> int:
    """The error code of a RST_STREAM or GOAWAY."""
    return int.from_bytes(sent.payload[4:8] if sent.kind == GOAWAY else sent.payload, "big")


@asynccontextmanager
async def toy_engine(limits: ServerLimits | None = None, *, max_connections: int = 100) -> AsyncIterator[Toy]:
    toy = Toy()
    options = EngineOptions(
        host="127.0.0.1",
        port=0,
        max_message_bytes=2**20,
        max_streams=128,
        max_connections=max_connections,
        drain_timeout_s=0.2,
    )
    engine = H2Engine(toy.table(), options, limits=limits)
    toy.port = await engine.start()
    try:
        yield toy
    finally:
        await engine.drain()


@asynccontextmanager
async def raw_client(toy: Toy, first: bytes = PREFACE) -> AsyncIterator[RawClient]:
    reader, writer = await asyncio.open_connection("127.0.0.1", toy.port)
    writer.write(first)
    try:
        yield RawClient(reader, writer)
    finally:
        writer.transport.abort()


async def assert_served(toy: Toy) -> None:
    """A client that does nothing wrong gets its answer, on a connection of its own."""
    async with raw_client(toy) as client:
        client.send(request(1, HELLO))
        answer = await client.until_ended(1)
    assert b"".join(it.payload for it in answer if it.kind == DATA) == HELLO
