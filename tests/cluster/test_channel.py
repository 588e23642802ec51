"""A channel over real sockets, to a server of the `h2` library that does as it is told."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import pytest
from clusters import free_ports

from cluster.channel import Channel
from cluster.channel_stream import ChannelStream
from cluster.responses import CallFailed, ConnectionLost
from http2.messages import framed
from http2.status import StatusCode

PATH = b"/a.Service/Method"
HEAD = [(":status", "200"), ("content-type", "application/grpc")]
OK = [("grpc-status", "0")]


class Connection(asyncio.Protocol):
    """One connection of the server; `server.on_request` decides what becomes of a request."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.http = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=False, header_encoding="utf-8")
        )
        self.bodies: dict[int, bytes] = {}
        self.transport: asyncio.Transport = None  # type: ignore[assignment]  # with the connection
        self.resets: list[int] = []
        self.is_open = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # a TCP connection's
        self.server.connections.append(self)
        self.http.initiate_connection()
        self.http.update_settings(self.server.settings)
        self.flush()

    def data_received(self, data: bytes) -> None:
        for event in self.http.receive_data(data):
            if isinstance(event, h2.events.RequestReceived):
                self.bodies[event.stream_id] = b""
                self.server.headers.append(dict(event.headers))
            elif isinstance(event, h2.events.DataReceived):
                self.bodies[event.stream_id] += event.data
                if self.server.reads:
                    self.http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                if event.data:
                    self.server.on_request(self, event.stream_id)
            elif isinstance(event, h2.events.StreamReset):
                self.resets.append(event.stream_id)
        self.flush()

    def connection_lost(self, _exc: Exception | None) -> None:
        self.is_open = False

    def flush(self) -> None:
        self.transport.write(self.http.data_to_send())

    def answer(self, stream_id: int, message: bytes = b"answer") -> None:
        self.http.send_headers(stream_id, HEAD)
        self.http.send_data(stream_id, framed(message))
        self.http.send_headers(stream_id, OK, end_stream=True)
        self.flush()

    def fail(self, stream_id: int, code: str, text: str) -> None:
        self.http.send_headers(
            stream_id, [*HEAD, ("grpc-status", code), ("grpc-message", text)], end_stream=True
        )
        self.flush()


class Server:
    def __init__(self) -> None:
        self.connections: list[Connection] = []
        self.settings: dict[int, int] = {}
        self.headers: list[dict[str, str]] = []
        self.reads = True
        self.on_request: Callable[[Connection, int], None] = Connection.answer
        self.address = ""

    @property
    def requests(self) -> int:
        return len(self.headers)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(lambda: Connection(server), "127.0.0.1", 0)
    server.address = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    yield server
    listener.close()
    for connection in server.connections:
        connection.transport.abort()
    await listener.wait_closed()


@pytest.fixture
async def channel(server: Server) -> AsyncIterator[Channel]:
    channel = Channel(server.address)
    yield channel
    await channel.close()


async def until(is_met: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not is_met():
            await asyncio.sleep(0.005)


def keep(_connection: Connection, _stream_id: int) -> None:
    """Answer nothing."""


async def call(channel: Channel, message: bytes = b"question", *, timeout_s: float = 5.0) -> bytes:
    return await channel.call(PATH, [(b"k", b"v")], message, timeout_s=timeout_s)


async def test_a_call_is_what_every_server_of_grpc_expects(server: Server, channel: Channel) -> None:
    assert await call(channel) == b"answer"

    headers = server.headers[0]
    assert headers[":method"] == "POST"
    assert headers[":path"] == PATH.decode()
    assert headers[":authority"] == server.address
    assert (headers["content-type"], headers["te"], headers["k"]) == ("application/grpc", "trailers", "v")
    assert server.connections[0].bodies[1] == framed(b"question")


async def test_calls_share_one_connection(server: Server, channel: Channel) -> None:
    await asyncio.gather(*(call(channel) for _ in range(50)))

    assert (len(server.connections), server.requests) == (1, 50)


async def test_a_status_and_its_text_reach_the_caller(server: Server, channel: Channel) -> None:
    server.on_request = lambda connection, stream_id: connection.fail(stream_id, "7", "n%C3%B3%25")

    with pytest.raises(CallFailed, match="nó%") as caught:
        await call(channel)
    assert caught.value.code is StatusCode.PERMISSION_DENIED


async def test_an_answer_that_is_no_grpc_is_unknown(server: Server, channel: Channel) -> None:
    def refuse(connection: Connection, stream_id: int) -> None:
        connection.http.send_headers(stream_id, [(":status", "503")], end_stream=True)

    server.on_request = refuse

    with pytest.raises(CallFailed, match="HTTP 503") as caught:
        await call(channel)
    assert caught.value.code is StatusCode.UNKNOWN


async def test_no_answer_in_time_resets_the_stream_and_nothing_else(server: Server, channel: Channel) -> None:
    server.on_request = keep
    with pytest.raises(TimeoutError):
        await call(channel, timeout_s=0.05)
    await until(lambda: server.connections[0].resets == [1])
    server.on_request = Connection.answer

    assert await call(channel) == b"answer"
    assert len(server.connections) == 1


async def test_a_caller_that_is_cancelled_resets_its_stream(server: Server, channel: Channel) -> None:
    server.on_request = keep
    waiting = asyncio.create_task(call(channel))
    await until(lambda: server.requests == 1)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await until(lambda: bool(server.connections[0].resets))

    assert server.connections[0].resets == [1]


async def test_a_stream_that_is_reset_is_lost(server: Server, channel: Channel) -> None:
    server.on_request = lambda connection, stream_id: connection.http.reset_stream(stream_id, 7)

    with pytest.raises(ConnectionLost, match="code 7"):
        await call(channel)


async def test_a_connection_that_breaks_loses_its_calls_and_the_next_call_dials(
    server: Server, channel: Channel
) -> None:
    server.on_request = lambda connection, _: connection.transport.abort()
    with pytest.raises(ConnectionLost):
        await call(channel)
    server.on_request = Connection.answer

    assert await call(channel) == b"answer"
    assert len(server.connections) == 2


async def test_a_server_that_errs_loses_its_calls(server: Server, channel: Channel) -> None:
    server.on_request = lambda connection, _: connection.transport.write(b"\0\0\1\6\0\0\0\0\0x")

    with pytest.raises(ConnectionLost):
        await call(channel)
    await until(lambda: not server.connections[0].is_open)


async def test_after_a_goaway_calls_under_way_finish_and_new_ones_go_to_a_new_connection(
    server: Server, channel: Channel
) -> None:
    server.on_request = keep
    old = asyncio.create_task(call(channel))
    await until(lambda: server.requests == 1)
    first = server.connections[0]
    # The library would send nothing after its own GOAWAY.
    first.transport.write(b"\0\0\x08\7\0\0\0\0\0\0\0\0\1\0\0\0\0")
    server.on_request = Connection.answer
    dialled = channel._connection
    assert dialled is not None
    await until(lambda: dialled.http.is_retiring)
    assert await call(channel) == b"answer"
    assert len(server.connections) == 2
    first.answer(1, b"late")

    assert await old == b"late"
    await until(lambda: not first.is_open)


async def test_calls_beyond_the_servers_limit_wait(server: Server, channel: Channel) -> None:
    server.settings = {h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: 2}
    assert await call(channel) == b"answer"
    server.on_request = keep
    calls = [asyncio.create_task(call(channel, b"%d" % number)) for number in range(4)]
    connection = server.connections[0]
    await until(lambda: server.requests == 3)
    await asyncio.sleep(0.02)
    assert server.requests == 3
    for stream_id in (3, 5, 7, 9):
        await until(lambda stream_id=stream_id: stream_id in connection.bodies)  # type: ignore[misc]
        connection.answer(stream_id, b"%d" % stream_id)

    assert sorted(await asyncio.gather(*calls)) == [b"3", b"5", b"7", b"9"]


async def test_a_call_that_waits_for_a_place_times_out(server: Server, channel: Channel) -> None:
    server.settings = {h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: 1}
    assert await call(channel) == b"answer"
    server.on_request = keep
    first = asyncio.create_task(call(channel))
    await until(lambda: server.requests == 2)

    with pytest.raises(TimeoutError):
        await call(channel, timeout_s=0.05)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)


async def test_large_messages_pass_in_both_directions(server: Server, channel: Channel) -> None:
    message = bytes(range(256)) * 12_000

    def echo(connection: Connection, stream_id: int) -> None:
        if len(connection.bodies[stream_id]) == len(message) + 5:
            asyncio.get_running_loop().create_task(send(connection, stream_id))

    async def send(connection: Connection, stream_id: int) -> None:
        body = connection.bodies[stream_id]
        connection.http.send_headers(stream_id, HEAD)
        while body:
            size = min(connection.http.local_flow_control_window(stream_id), 16_384, len(body))
            connection.http.send_data(stream_id, body[:size])
            connection.flush()
            body = body[size:]
            await asyncio.sleep(0)
        connection.http.send_headers(stream_id, OK, end_stream=True)
        connection.flush()

    server.on_request = echo

    assert await call(channel, message) == message


async def test_a_server_that_reads_nothing_costs_one_call_its_time(server: Server, channel: Channel) -> None:
    server.reads, server.on_request = False, keep

    with pytest.raises(TimeoutError):
        await call(channel, b"x" * 3_000_000, timeout_s=0.1)
    dialled = channel._connection
    assert dialled is not None
    assert dialled.http.unsent_bytes == 0


async def test_an_answer_that_is_too_large_is_not_awaited(server: Server, channel: Channel) -> None:
    def announce(connection: Connection, stream_id: int) -> None:
        connection.http.send_headers(stream_id, HEAD)
        connection.http.send_data(stream_id, b"\0\x7f\xff\xff\xff")

    server.on_request = announce

    with pytest.raises(CallFailed) as caught:
        await call(channel)
    assert caught.value.code is StatusCode.RESOURCE_EXHAUSTED


async def test_while_a_dial_is_not_to_be_repeated_calls_fail_at_once() -> None:
    channel = Channel(f"127.0.0.1:{free_ports(1)[0]}")
    with pytest.raises(ConnectionLost):
        await call(channel)
    dials = channel._dial_after_s

    for _ in range(100):
        with pytest.raises(ConnectionLost):
            await call(channel)
    assert channel._dial_after_s == dials
    await channel.close()


async def test_a_server_that_comes_back_is_found_within_the_longest_pause(server: Server) -> None:
    host = server.address.rpartition(":")[0]
    (free,) = free_ports(1)
    channel = Channel(f"{host}:{free}")
    for _ in range(3):
        with pytest.raises(ConnectionLost):
            await call(channel)
        await asyncio.sleep(0.15)
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(lambda: Connection(server), host, free)

    async def answered() -> bytes:
        while True:
            try:
                return await call(channel)
            except ConnectionLost:
                await asyncio.sleep(0.02)

    assert await asyncio.wait_for(answered(), 2) == b"answer"
    await channel.close()
    listener.close()
    await listener.wait_closed()


async def test_a_close_lets_calls_finish_for_a_while(server: Server, channel: Channel) -> None:
    server.on_request = keep
    waiting = asyncio.create_task(call(channel))
    await until(lambda: server.requests == 1)
    closing = asyncio.create_task(channel.close(5.0))
    await asyncio.sleep(0.02)
    server.connections[0].answer(1)

    assert await waiting == b"answer"
    await closing
    with pytest.raises(ConnectionLost):
        await call(channel)


async def test_a_close_loses_what_takes_too_long(server: Server, channel: Channel) -> None:
    server.on_request = keep
    waiting = asyncio.create_task(call(channel))
    await until(lambda: server.requests == 1)
    await channel.close(0.02)

    with pytest.raises(ConnectionLost):
        await waiting


async def test_a_close_during_the_dial_fails_the_calls_that_wait_for_it() -> None:
    # A listener that accepts nothing: the kernel completes the connection, and TLS gets no answer.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        channel = Channel(address, tls=ssl.create_default_context(), server_name="localhost")
        calls = [asyncio.create_task(call(channel)) for _ in range(3)]
        await asyncio.sleep(0.05)
        await channel.close()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)

    assert [type(outcome) for outcome in outcomes] == [ConnectionLost] * 3


async def test_each_loss_is_told_once(server: Server, channel: Channel) -> None:
    losses = 0

    async def watch() -> None:
        nonlocal losses
        while True:
            await channel.until_lost()
            losses += 1

    watching = asyncio.create_task(watch())
    for number in (1, 2):
        await until(lambda number=number: len(server.connections) == number)  # type: ignore[misc]
        server.connections[-1].transport.abort()
        await until(lambda number=number: losses >= number)  # type: ignore[misc]
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)

    assert losses == 2


async def test_a_stream_carries_one_message_after_another(server: Server, channel: Channel) -> None:
    begun: set[int] = set()

    def echo(connection: Connection, stream_id: int) -> None:
        if stream_id not in begun:
            begun.add(stream_id)
            connection.http.send_headers(stream_id, HEAD)
        body, connection.bodies[stream_id] = connection.bodies[stream_id], b""
        connection.http.send_data(stream_id, body)

    server.on_request = echo
    stream = ChannelStream(channel, PATH, lambda _: [])
    await stream.open(timeout_s=5)
    for number in range(100):
        assert await stream.ask(b"%d" % number, timeout_s=5) == b"%d" % number

    assert server.requests == 1
    assert stream.is_open
    stream.finish()
    assert not stream.is_open


@pytest.mark.parametrize("order", [1, -1])
async def test_a_name_with_addresses_of_both_families_is_dialled_at_the_one_that_answers(
    server: Server, monkeypatch: pytest.MonkeyPatch, order: int
) -> None:
    port = int(server.address.rpartition(":")[2])

    async def resolve(*_: object, **__: object) -> list[object]:
        six = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0))
        four = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))
        return [six, four][::order]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
    channel = Channel(f"both.test:{port}")

    assert await call(channel) == b"answer"
    await channel.close()


async def test_a_part_of_an_answer_that_looks_like_an_answer_is_a_part(
    server: Server, channel: Channel
) -> None:
    inner = framed(b"inner")
    outer = framed(b"begins " + inner)
    begun = asyncio.Event()

    def begin(connection: Connection, stream_id: int) -> None:
        connection.http.send_headers(stream_id, HEAD)
        connection.http.send_data(stream_id, outer[: -len(inner)])
        begun.set()

    server.on_request = begin
    stream = ChannelStream(channel, PATH, lambda _: [])
    await stream.open(timeout_s=5)
    answer = stream.ask(b"question", timeout_s=5)
    await begun.wait()
    await until(lambda: len(stream._received) > 0)
    (connection,) = server.connections
    connection.http.send_data(1, inner)
    connection.flush()

    assert await answer == b"begins " + inner
    stream.cancel()
