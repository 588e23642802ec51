"""A call runs a method if its path is the method's, byte for byte, and in no other case.

Rules of a proxy are about paths. A path that the proxy lets through must not become another method here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import h2.config
import h2.connection
import h2.events
import pytest
from mnemosynerpc.session_pb2 import DeleteRequest, ExistsRequest, Session, StartRequest
from raw_http2 import (
    DATA,
    END_STREAM,
    PREFACE,
    Pairs,
    block,
    frame,
    open_request,
    request_headers,
)
from serving import ENGINES, Node, serving

from http2.messages import framed
from mnemosyned.storage.memory import MemoryStore

SERVICE = b"/mnemosynerpc.SessionManager"
DELETE = SERVICE + b"/Delete"
DELETE_ALL = framed(DeleteRequest(subject_id="s").SerializeToString())
TOKEN = b"a-token-that-stands-in-a-path"
UNIMPLEMENTED = b"12"

PATHS = {
    "a letter in percent-encoding": SERVICE + b"/%44elete",
    "a slash in percent-encoding": SERVICE + b"%2FDelete",
    "a query": DELETE + b"?x",
    "an empty query": DELETE + b"?",
    "a fragment": DELETE + b"#x",
    "a parameter": DELETE + b";x",
    "a slash before": b"/" + DELETE,
    "a slash within": SERVICE + b"//Delete",
    "a slash behind": DELETE + b"/",
    "a backslash": SERVICE + b"\\Delete",
    "no slash before": DELETE[1:],
    "a dot": b"/." + DELETE,
    "two dots": SERVICE + b"/.." + DELETE,
    "upper case": DELETE.upper(),
    "lower case": SERVICE + b"/delete",
    "a scheme and a host": b"http://localhost" + DELETE,
    "a host": b"localhost" + DELETE,
    "not ASCII": DELETE + "ä".encode(),
    "full width": SERVICE + "/\uff24elete".encode(),
    "not UTF-8": DELETE + b"\xff",
    "a part of a character": DELETE + b"\xc3",
    "a lone surrogate": DELETE + b"\xed\xa0\x80",
    "an overlong slash": SERVICE + b"\xc0\xafDelete",
    "a service alone": SERVICE,
    "a method alone": b"/Delete",
    "an asterisk": b"*",
    "a slash": b"/",
    "a token behind": SERVICE + b"/Get/" + TOKEN,
    "a token alone": b"/" + TOKEN,
    "a long path": DELETE + b"x" * 8000,
}
# A client cannot mean them; RFC 9113, section 8.2.1, has them refused as malformed.
MALFORMED = {
    "a tab": DELETE + b"\t",
    "a space": DELETE + b" ",
    "a space before": b" " + DELETE,
    "a NUL": SERVICE + b"/Del\0ete",
    "a line break": DELETE + b"\r\n",
    "DEL": DELETE + b"\x7f",
    "nothing": b"",
}
VERBS = (b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"TRACE", b"PATCH", b"CONNECT", b"post", b"QUERY")


@dataclass
class Answered:
    """What came back on stream 1."""

    headers: dict[bytes, bytes] = field(default_factory=dict)
    was_reset: bool = False

    def take(self, event: h2.events.Event) -> bool:
        if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
            self.headers |= dict(event.headers)
        self.was_reset = isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated)
        return self.was_reset or isinstance(event, h2.events.StreamEnded)

    @property
    def status(self) -> bytes | None:
        return self.headers.get(b"grpc-status")


async def ask(node: Node, headers: Pairs, body: bytes = DELETE_ALL) -> Answered:
    """Send one request of any headers, on a connection of its own."""
    host, port = node.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(PREFACE + open_request(1, block(headers)) + frame(DATA, END_STREAM, 1, body))
    answered = Answered()
    try:
        async with asyncio.timeout(10):
            await _read(reader, answered)
    except ConnectionError:
        answered.was_reset = True
    finally:
        writer.transport.abort()
    return answered


async def _read(reader: asyncio.StreamReader, answered: Answered) -> None:
    http = h2.connection.H2Connection(
        h2.config.H2Configuration(header_encoding=None, validate_inbound_headers=False)
    )
    http.initiate_connection()
    http.send_headers(1, request_headers(), end_stream=True)
    while received := await reader.read(65536):
        if any(answered.take(event) for event in http.receive_data(received)):
            return
    answered.was_reset = True


def replaced(name: bytes, value: bytes, path: bytes = DELETE) -> Pairs:
    return [(it, value if it == name else old) for it, old in request_headers(path)]


@pytest.fixture(params=sorted(ENGINES))
async def node(request: pytest.FixtureRequest) -> AsyncIterator[Node]:
    async with with_session(request.param) as one:
        yield one


@pytest.fixture
async def h2_node() -> AsyncIterator[Node]:
    async with with_session("h2") as one:
        yield one


@asynccontextmanager
async def with_session(engine: str) -> AsyncIterator[Node]:
    """A node with one session; it must still be there, and the node must still answer."""
    async with serving(MemoryStore(), engine) as one:
        await one.stub.Start(StartRequest(session=Session(access_token="t", subject_id="s")))
        yield one
        assert (await one.stub.Exists(ExistsRequest(access_token="t"), timeout=5)).value


@pytest.mark.parametrize("case", PATHS)
async def test_another_path_is_unimplemented(node: Node, case: str) -> None:
    answered = await ask(node, request_headers(PATHS[case]))

    assert answered.status == UNIMPLEMENTED
    assert answered.headers[b"grpc-message"] == b"mnemosyned: unknown method"


@pytest.mark.parametrize("case", MALFORMED)
async def test_a_malformed_path_runs_nothing(node: Node, case: str) -> None:
    answered = await ask(node, request_headers(MALFORMED[case]))

    assert answered.was_reset or answered.status == UNIMPLEMENTED


@pytest.mark.parametrize("verb", VERBS)
async def test_only_post_runs_a_method(node: Node, verb: bytes) -> None:
    answered = await ask(node, replaced(b":method", verb))

    assert answered.headers.get(b":status") == b"405" or answered.was_reset or answered.status == b"13"


@pytest.mark.parametrize("verb", VERBS)
async def test_another_verb_is_told_which_one_is_allowed(h2_node: Node, verb: bytes) -> None:
    answered = await ask(h2_node, replaced(b":method", verb))

    assert (answered.headers[b":status"], answered.headers[b"allow"]) == (b"405", b"POST")


@pytest.mark.parametrize(
    "content_type",
    [
        b"",
        b"text/plain",
        b"application/grpcx",
        b"application/grpc-web+proto",
        b"text/plain, application/grpc",
    ],
)
async def test_another_content_type_runs_nothing(h2_node: Node, content_type: bytes) -> None:
    answered = await ask(h2_node, replaced(b"content-type", content_type))

    assert answered.headers[b":status"] == b"415"


async def test_a_second_content_type_does_not_mend_the_first(h2_node: Node) -> None:
    headers = [*replaced(b"content-type", b"text/plain"), (b"content-type", b"application/grpc")]

    assert (await ask(h2_node, headers)).headers[b":status"] == b"415"


async def test_paths_that_are_not_utf_8_come_by_the_hundred_and_calls_go_on(node: Node) -> None:
    answered = await asyncio.gather(
        *(ask(node, request_headers(b"/\xff" + bytes([0x80 + number]))) for number in range(100))
    )

    assert {it.status for it in answered} == {UNIMPLEMENTED}


async def test_a_token_in_a_path_is_in_no_log_line(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    for path in (SERVICE + b"/Get/" + TOKEN, b"/" + TOKEN, DELETE + b"?" + TOKEN):
        await ask(node, request_headers(path))

    # The test's own client logs what it sends.
    lines = [it for it in caplog.records if it.name.startswith(("mnemosyned", "grpc"))]
    assert not [line for line in lines if TOKEN.decode() in str(line.__dict__)]
