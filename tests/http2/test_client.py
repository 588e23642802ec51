"""A client's connection without sockets, against a server of the `h2` library."""

from __future__ import annotations

from dataclasses import dataclass, field

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest

from http2.client import ClientConnection, ClientStream

PATH = b"/a.Service/Method"
HEADERS = [(b"host", b"x"), (b"content-type", b"application/grpc"), (b"te", b"trailers")]
HEAD = [(":status", "200"), ("content-type", "application/grpc")]
OK = [("grpc-status", "0")]


class Waits:
    """Who waits for an answer: remembers what it is told."""

    def take_news(self, _stream: ClientStream) -> None:
        raise AssertionError("the connection tells the protocol class, which tells this")


@dataclass
class Pair:
    client: ClientConnection = field(default_factory=ClientConnection)
    server: h2.connection.H2Connection = field(
        default_factory=lambda: h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=False, header_encoding="utf-8")
        )
    )
    events: list[h2.events.Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.server.initiate_connection()
        self.swap()

    def open(self, body: bytes = b"", *, is_finished: bool = True) -> ClientStream:
        stream = self.client.open(PATH, HEADERS, Waits())
        if body:
            self.client.send(stream, body, 0.0)
        if is_finished:
            self.client.finish(stream)
        return stream

    def swap(self) -> list[ClientStream]:
        """Carry bytes to and fro until there are none; return the streams with news."""
        news: list[ClientStream] = []
        while True:
            up = self.client.output(0.0)
            if up:
                self.events += self.server.receive_data(up)
            down = self.server.data_to_send()
            if down:
                news += self.client.receive(down)
            if not (up or down):
                return news

    def received(self, stream_id: int) -> bytes:
        return b"".join(
            event.data
            for event in self.events
            if isinstance(event, h2.events.DataReceived) and event.stream_id == stream_id
        )

    def answer(self, stream_id: int, body: bytes) -> None:
        self.server.send_headers(stream_id, HEAD)
        self.server.send_data(stream_id, body)
        self.server.send_headers(stream_id, OK, end_stream=True)


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_an_answer_comes_with_its_status_body_and_trailers(pair: Pair) -> None:
    stream = pair.open(b"hello")
    pair.swap()
    assert pair.received(1) == b"hello"
    pair.answer(1, b"world")

    assert pair.swap() == [stream]
    assert (stream.status, bytes(stream.take_body()), stream.trailers) == (
        200,
        b"world",
        [(b"grpc-status", b"0")],
    )
    assert stream.is_complete
    assert not pair.client.streams


def test_each_stream_is_told_once_a_chunk(pair: Pair) -> None:
    streams = [pair.open(b"x") for _ in range(5)]
    pair.swap()
    for stream in streams:
        pair.answer(stream.id, b"y")

    assert pair.client.receive(pair.server.data_to_send()) == streams


def test_a_part_of_an_answer_can_be_taken_before_its_end(pair: Pair) -> None:
    stream = pair.open(b"x", is_finished=False)
    pair.swap()
    pair.server.send_headers(1, HEAD)
    for part in (b"one", b"two"):
        pair.server.send_data(1, part)
        assert pair.swap() == [stream]
        assert stream.take_body() == part
    assert not stream.is_complete


def test_a_stream_that_the_server_ends_early_is_reset_from_here_too(pair: Pair) -> None:
    stream = pair.open(b"x", is_finished=False)
    pair.swap()
    pair.answer(1, b"y")
    pair.swap()

    assert stream.is_complete
    resets = [event for event in pair.events if isinstance(event, h2.events.StreamReset)]
    assert [event.stream_id for event in resets] == [1]
    pair.client.finish(stream)
    assert pair.client.output(0.0) == b""


def test_a_large_body_waits_for_windows(pair: Pair) -> None:
    body = b"x" * 1_000_000
    pair.open(body)
    pair.events += pair.server.receive_data(pair.client.output(0.0))
    assert len(pair.received(1)) == 65_535
    assert pair.client.unsent_bytes == len(body) - 65_535
    pair.server.increment_flow_control_window(2_000_000)
    pair.server.increment_flow_control_window(2_000_000, stream_id=1)
    pair.swap()

    assert pair.received(1) == body
    assert pair.client.unsent_bytes == 0
    assert any(isinstance(event, h2.events.StreamEnded) for event in pair.events)


def test_a_large_answer_comes_through(pair: Pair) -> None:
    stream, body = pair.open(b"x"), b"y" * 300_000
    pair.swap()
    pair.server.send_headers(1, HEAD)
    sent = 0
    while sent < len(body):
        size = min(pair.server.local_flow_control_window(1), 16_384, len(body) - sent)
        pair.server.send_data(1, body[sent : sent + size])
        sent += size
        pair.swap()
    pair.server.send_headers(1, OK, end_stream=True)
    pair.swap()

    assert stream.take_body() == body


def test_only_as_many_streams_as_the_server_accepts(pair: Pair) -> None:
    pair.server.update_settings({h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: 2})
    pair.swap()
    pair.open(b"x")
    assert pair.client.may_open
    pair.open(b"x")
    assert not pair.client.may_open
    pair.swap()
    pair.answer(1, b"y")
    pair.swap()

    assert pair.client.may_open


def test_a_cancelled_stream_is_reset_and_what_comes_for_it_is_dropped(pair: Pair) -> None:
    stream = pair.open(b"x")
    pair.swap()
    pair.answer(1, b"y")
    late = pair.server.data_to_send()
    pair.client.cancel(stream)

    assert pair.client.receive(late) == []
    assert not pair.client.streams
    other = pair.open(b"x")
    pair.swap()
    pair.answer(other.id, b"z")
    assert pair.swap() == [other]


def test_after_a_goaway_accepted_streams_go_on_and_later_ones_were_not_begun(pair: Pair) -> None:
    first, second = pair.open(b"x"), pair.open(b"x")
    pair.swap()
    pair.server.close_connection(last_stream_id=first.id)
    news = pair.client.receive(pair.server.data_to_send())

    assert news == [second]
    assert second.reset_code == 7
    assert not pair.client.may_open
    assert list(pair.client.streams) == [first.id]
    assert not pair.client.is_over


def test_a_server_that_errs_ends_the_connection_and_all_its_streams(pair: Pair) -> None:
    streams = [pair.open(b"x") for _ in range(3)]
    pair.swap()

    assert pair.client.receive(b"\0\0\1\6\0\0\0\0\0x") == streams  # a PING of one byte
    assert [stream.reset_code for stream in streams] == [8, 8, 8]
    assert pair.client.is_over
    assert not pair.client.may_open
    assert pair.client.receive(b"more") == []


def test_what_is_held_is_forgotten_with_the_connection(pair: Pair) -> None:
    stream = pair.open(b"x" * 1_000_000)
    assert pair.client.lose() == [stream]

    assert pair.client.unsent_bytes == 0


def test_hundreds_of_calls_on_one_connection(pair: Pair) -> None:
    for number in range(500):
        stream = pair.open(b"x")
        pair.swap()
        pair.answer(stream.id, b"%d" % number)
        pair.swap()
        pair.events.clear()
        assert stream.take_body() == b"%d" % number
