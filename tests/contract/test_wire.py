"""What no stock client sends: frames and headers written by hand, on a raw HTTP/2 connection."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import h2.config
import h2.connection
import h2.events
import pytest
from mnemosynerpc.session_pb2 import ExistsRequest, GetRequest, StartRequest
from mnemosynerpc.session_pb2 import Session as WireSession
from serving import ENGINES, Node, serving

from http2.messages import framed
from mnemosyned.storage.memory import MemoryStore

EXISTS = framed(ExistsRequest(access_token="t").SerializeToString())
OK, INVALID_ARGUMENT, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL = (
    "0", "3", "4", "8", "12", "13",
)  # fmt: skip
Headers = list[tuple[str, str]]
_FRAME_BYTES = 16_000


@dataclass
class Answer:
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    was_reset: bool = False

    def take(self, event: h2.events.Event) -> bool:
        """Take one event of the stream in; tell whether it was the last."""
        if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
            self.headers |= dict(event.headers)  # type: ignore[arg-type]  # text, as configured
        elif isinstance(event, h2.events.DataReceived):
            self.body += event.data
        self.was_reset = isinstance(event, h2.events.StreamReset)
        return self.was_reset or isinstance(event, h2.events.StreamEnded)

    @property
    def status(self) -> str:
        return self.headers.get("grpc-status", "none")


class Client:
    """One HTTP/2 connection, one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        config = h2.config.H2Configuration(header_encoding="utf-8", validate_outbound_headers=False)
        self.h2 = h2.connection.H2Connection(config)
        self.h2.initiate_connection()

    def send(
        self,
        body: bytes,
        *,
        method: str = "Exists",
        extra: Headers | None = None,
        without: str = "",
        **pseudo: str,
    ) -> int:
        """Send a request; return its stream."""
        headers = [
            (":method", pseudo.get("verb", "POST")),
            (":scheme", "http"),
            (":authority", "localhost"),
            (":path", f"/mnemosynerpc.SessionManager/{method}"),
            ("content-type", pseudo.get("content_type", "application/grpc")),
            ("te", "trailers"),
            *(extra or []),
        ]
        stream = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream, [pair for pair in headers if pair[0] != without])
        chunks = [body[at : at + _FRAME_BYTES] for at in range(0, len(body), _FRAME_BYTES)] or [b""]
        for at, chunk in enumerate(chunks, start=1):
            self.h2.send_data(stream, chunk, end_stream=at == len(chunks))
        self.writer.write(self.h2.data_to_send())
        return stream

    async def ask(self, body: bytes, **options: Any) -> Answer:  # noqa: ANN401  # what `send` takes
        """Send a request as `send` does, and wait for its answer."""
        return await asyncio.wait_for(self._answer(self.send(body, **options)), 10)

    async def _answer(self, stream: int) -> Answer:
        answer = Answer()
        while received := await self.reader.read(65536):
            events = self.h2.receive_data(received)
            self.writer.write(self.h2.data_to_send())
            for event in events:
                if getattr(event, "stream_id", None) == stream and answer.take(event):
                    return answer
        answer.was_reset = True
        return answer


def new_store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture(params=sorted(ENGINES))
async def node(request: pytest.FixtureRequest) -> AsyncIterator[Node]:
    async with serving(new_store(), request.param) as one:
        yield one


@pytest.fixture
async def client(node: Node) -> AsyncIterator[Client]:
    async with connected(node) as one:
        yield one


@pytest.fixture
async def strict_client() -> AsyncIterator[Client]:
    """A client of the engine that is ours; gRPC's core is lax with some of this, or silent."""
    async with serving(new_store(), "h2") as node, connected(node) as one:
        yield one


@asynccontextmanager
async def connected(node: Node) -> AsyncIterator[Client]:
    host, port = node.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    yield Client(reader, writer)
    writer.close()
    await writer.wait_closed()


async def test_a_call_by_hand_is_answered(client: Client) -> None:
    answer = await client.ask(EXISTS)

    assert (answer.headers[":status"], answer.status) == ("200", OK)
    assert answer.headers["content-type"].startswith("application/grpc")
    assert answer.body == framed(b"")


async def test_an_error_carries_its_text(client: Client) -> None:
    answer = await client.ask(framed(b""))

    assert answer.status == "3"
    assert answer.headers["grpc-message"] == "mnemosyned: missing access token"


@pytest.mark.parametrize(
    "content_type",
    [
        "application/grpc+proto",
        "Application/GRPC",
        "APPLICATION/gRPC+Proto",
        "application/grpc;charset=utf-8",
        "application/grpc ; charset=utf-8",
    ],
)
async def test_content_types_of_grpc_are_taken_in_any_case(client: Client, content_type: str) -> None:
    assert (await client.ask(EXISTS, content_type=content_type)).status == OK


@pytest.mark.parametrize("body", [b"", EXISTS[:3], EXISTS[:-1]])
async def test_a_call_without_a_whole_message_is_refused_at_once(client: Client, body: bytes) -> None:
    async with asyncio.timeout(2):
        answer = await client.ask(body)

    assert answer.status in {UNIMPLEMENTED, INTERNAL}
    assert (await client.ask(EXISTS)).status == OK


async def test_a_compressed_message_by_hand_is_answered(client: Client) -> None:
    payload = gzip.compress(EXISTS[5:])
    body = b"\1" + len(payload).to_bytes(4, "big") + payload

    assert (await client.ask(body, extra=[("grpc-encoding", "gzip")])).status == OK


MALFORMED = {
    "no message": (b"", [], UNIMPLEMENTED),
    "two messages": (EXISTS + EXISTS, [], UNIMPLEMENTED),
    "cut short": (EXISTS[:-1], [], INTERNAL),
    "cut short within its header": (EXISTS[:3], [], INTERNAL),
    "compressed, but not said how": (b"\1" + EXISTS[1:], [], INTERNAL),
    "not gzip": (b"\1" + EXISTS[1:], [("grpc-encoding", "gzip")], INTERNAL),
    "unknown encoding": (b"\1" + EXISTS[1:], [("grpc-encoding", "br")], UNIMPLEMENTED),
    "unknown flag": (b"\x07" + EXISTS[1:], [], INTERNAL),
    "something after it": (EXISTS + b"\0", [], INTERNAL),
}


@pytest.mark.parametrize("case", MALFORMED)
async def test_a_malformed_body_is_refused_and_the_connection_goes_on(
    strict_client: Client, case: str
) -> None:
    body, extra, status = MALFORMED[case]

    assert (await strict_client.ask(body, extra=extra)).status == status
    assert (await strict_client.ask(EXISTS)).status == OK


@pytest.mark.parametrize("case", MALFORMED)
async def test_a_malformed_body_harms_nobody_else(node: Node, case: str) -> None:
    body, extra, _ = MALFORMED[case]
    async with connected(node) as bad, connected(node) as good:
        bad.send(body, extra=extra)

        assert (await good.ask(EXISTS)).status == OK


async def test_a_message_that_announces_four_gigabytes_is_refused_at_once(client: Client) -> None:
    answer = await client.ask(b"\0\xff\xff\xff\xff" + b"x" * 100)

    assert answer.status == RESOURCE_EXHAUSTED
    assert (await client.ask(EXISTS)).status == OK


async def test_a_bomb_is_refused(client: Client) -> None:
    payload = gzip.compress(b"\0" * 10_000_000)
    body = b"\1" + len(payload).to_bytes(4, "big") + payload

    answer = await client.ask(body, extra=[("grpc-encoding", "gzip")])

    assert answer.status == RESOURCE_EXHAUSTED


@pytest.mark.parametrize("content_type", ["application/json", "application/grpc-web", "text/plain"])
async def test_what_is_not_grpc_is_refused(strict_client: Client, content_type: str) -> None:
    assert (await strict_client.ask(EXISTS, content_type=content_type)).headers[":status"] == "415"


async def test_a_client_that_takes_no_trailers_is_told(strict_client: Client) -> None:
    assert (await strict_client.ask(EXISTS, without="te")).status == UNIMPLEMENTED


MALFORMED_TIMEOUTS = ["", "5", "1.5S", "-1S", "+1S", "S", "1s", "1x", "1 S", "123456789S", "0x1S", "\u0661S"]


@pytest.mark.parametrize("value", MALFORMED_TIMEOUTS)
async def test_a_malformed_timeout_is_an_invalid_argument_whatever_the_cache_has(
    strict_client: Client, value: str
) -> None:
    message = StartRequest(session=WireSession(subject_id="s", access_token="t"))
    await strict_client.ask(framed(message.SerializeToString()), method="Start")
    cached = framed(GetRequest(access_token="t").SerializeToString())
    assert (await strict_client.ask(cached, method="Get")).status == OK
    extra = [("grpc-timeout", value)]

    # Also a second value, which a proxy may go by.
    for headers in (extra, [("grpc-timeout", "5S"), *extra]):
        for body, method in ((cached, "Get"), (EXISTS, "Exists"), (b"", "Context")):
            answer = await strict_client.ask(body, method=method, extra=headers)
            assert answer.status == INVALID_ARGUMENT
            assert answer.headers["grpc-message"] == "mnemosyned: malformed grpc-timeout"
    assert (await strict_client.ask(cached, method="Get")).status == OK


@pytest.mark.parametrize("value", ["", "5", "1.5S", "-1S", "S", "1x"])
async def test_no_engine_runs_a_call_with_a_malformed_timeout(client: Client, value: str) -> None:
    # grpcio's core answers INTERNAL, before this daemon sees the call.
    answer = await client.ask(EXISTS, extra=[("grpc-timeout", value)])

    assert answer.status in {INVALID_ARGUMENT, INTERNAL}
    assert (await client.ask(EXISTS)).status == OK


@pytest.mark.parametrize("value", ["0S", "00000000n"])
async def test_a_timeout_of_zero_has_passed(client: Client, value: str) -> None:
    answer = await client.ask(EXISTS, extra=[("grpc-timeout", value)])

    assert answer.was_reset or answer.status == DEADLINE_EXCEEDED


async def test_a_timeout_that_has_passed_already_ends_a_call_that_must_wait(
    strict_client: Client,
) -> None:
    message = StartRequest(session=WireSession(subject_id="s")).SerializeToString()
    answer = await strict_client.ask(framed(message), method="Start", extra=[("grpc-timeout", "1n")])

    assert answer.was_reset or answer.status == DEADLINE_EXCEEDED
