"""Any bytes, and valid sequences that were cut, repeated, shuffled and damaged, in chunks of any size."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import hpack
import pytest
from h2_peers import Server
from hypothesis import given
from hypothesis import strategies as st
from raw_http2 import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    FRAME_HEADER_BYTES,
    HEADERS,
    MAGIC,
    PREFACE,
    RST_STREAM,
    block,
    frame,
    frames_of,
    goaway,
    literal,
    open_request,
    ping,
    request,
    request_headers,
    rst_stream,
    settings,
    window_update,
)
from toy_engines import ECHO, HELLO, WAIT, Toy

from http2.stream import ServerLimits
from mnemosyned.transport.engine import ConnectionStats
from mnemosyned.transport.h2_connection import Connection
from mnemosyned.transport.h2_server import Server as Shared

LIMITS: Final = ServerLimits(
    max_streams=4, max_request_bytes=40_000, max_unsent_bytes=5000, body_s=5, send_s=5, frame_s=5, idle_s=20
)
_BLOCKS: Final = [
    *(block(request_headers(path)) for path in (b"/echo", b"/hold", b"/big/100000")),
    ECHO,
    WAIT,
    literal(b"a", b"b"),
    b"\x82",
    b"",
]
_stream_ids = st.sampled_from([0, 1, 2, 3, 5, 7, 9, 11, 13, 15, 17, 99])
_odd_ids = st.sampled_from([1, 3, 5, 7, 9, 11])
_blocks = st.sampled_from(_BLOCKS)
_numbers = st.sampled_from([0, 1, 5, 100, 16_384, 65_535, 2**20, 2**31 - 1])
_bodies = st.sampled_from([b"", b"x", HELLO, bytes(300), bytes(16_384)])

_likely = st.one_of(
    st.builds(request, _stream_ids, _bodies, _blocks),
    st.builds(open_request, _stream_ids, _blocks),
    st.builds(lambda it, body, flags: frame(DATA, flags, it, body), _stream_ids, _bodies, st.integers(0, 1)),
    st.builds(rst_stream, _stream_ids, _numbers),
    st.builds(window_update, _stream_ids, _numbers),
    st.builds(lambda key, value: settings((key, value)), st.integers(0, 9), _numbers),
    st.builds(lambda flags: ping(b"goodbye!", flags=flags), st.integers(0, 1)),
    st.builds(goaway, _stream_ids, _numbers),
    st.builds(lambda it, head: frame(HEADERS, 0, it, head), _stream_ids, _blocks),
    st.builds(
        lambda it, more, flags: frame(CONTINUATION, flags, it, more), _stream_ids, _blocks, st.integers(0, 4)
    ),
)
_harmless = st.one_of(
    st.builds(rst_stream, _odd_ids, _numbers),
    st.builds(window_update, _odd_ids, st.integers(1, 100_000)),
    st.builds(lambda window: settings((4, window)), st.integers(0, 100_000)),
    st.just(ping()),
)
_any_frame = st.builds(frame, st.integers(0, 255), st.integers(0, 255), _stream_ids, st.binary(max_size=40))
# In rising sequence of streams, so that most of it is valid.
_conversations = st.lists(st.tuples(st.sampled_from(_BLOCKS[:5]), _bodies, st.booleans()), max_size=12).map(
    lambda calls: [
        piece
        for at, (headers, body, ends) in enumerate(calls)
        for piece in (
            open_request(2 * at + 1, headers),
            frame(DATA, END_STREAM if ends else 0, 2 * at + 1, body),
        )
    ]
)


@st.composite
def _mutated(draw: st.DrawFn) -> bytes:
    """A conversation with some frames between, of which a few are repeated, left out, moved or damaged."""
    pieces = draw(_conversations)
    for _ in range(draw(st.integers(0, 6))):
        pieces.insert(
            draw(st.integers(0, len(pieces))), draw(st.one_of(_harmless, _harmless, _likely, _any_frame))
        )
    for _ in range(draw(st.integers(0, 2))):
        if pieces:
            at = draw(st.integers(0, len(pieces) - 1))
            piece = pieces.pop(at)
            how = draw(st.sampled_from(["cut", "again", "moved", "damaged", "left out"]))
            if how == "cut":
                pieces.insert(at, piece[: draw(st.integers(0, len(piece)))])
            elif how == "again":
                pieces[at:at] = [piece, piece]
            elif how == "moved":
                pieces.insert(draw(st.integers(0, len(pieces))), piece)
            elif how == "damaged" and piece:
                bit = draw(st.integers(0, 8 * min(len(piece), 60) - 1))
                damaged = bytearray(piece)
                damaged[bit // 8] ^= 1 << bit % 8
                pieces.insert(at, bytes(damaged))
    return b"".join(pieces)


@st.composite
def _chunks(draw: st.DrawFn) -> list[bytes]:
    first = draw(st.sampled_from([PREFACE, PREFACE, PREFACE, MAGIC, MAGIC + settings((4, 10))]))
    data = first + draw(
        st.one_of(_mutated(), _mutated(), st.lists(_likely).map(b"".join), st.binary(max_size=300))
    )
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=8)))
    return [data[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def assert_well_formed(sent: bytes) -> None:
    """Nothing in it may be called malformed by a client that keeps the books."""
    decoder = hpack.Decoder()
    begun: set[int] = set()
    ended: set[int] = set()
    size_bytes = 0
    for it in frames_of(sent):
        size_bytes += FRAME_HEADER_BYTES + len(it.payload)
        assert len(it.payload) <= 16_384
        if it.kind in {HEADERS, DATA}:
            assert it.stream_id & 1
            assert it.stream_id not in ended
            if it.kind == HEADERS:
                assert it.flags & END_HEADERS
                names = [name for name, _ in decoder.decode(it.payload, raw=True)]
                assert (b":status" in names) == (it.stream_id not in begun)
                begun.add(it.stream_id)
            assert it.stream_id in begun
            if it.flags & END_STREAM:
                ended.add(it.stream_id)
        elif it.kind == RST_STREAM:
            ended.add(it.stream_id)
    assert size_bytes == len(sent)


@pytest.mark.fuzz
@given(_chunks(), st.booleans())
def test_no_bytes_break_a_connection(chunks: list[bytes], half_closes: bool) -> None:  # noqa: FBT001
    server = Server(LIMITS)
    sent = b""
    for chunk in chunks:
        sent += server.receive(chunk)
    assert len(server.http.streams) <= LIMITS.max_streams
    if half_closes:
        server.http.end_input()
    for stream in list(server.held.values()):
        if not stream.is_reset:
            server.answer(stream)
    sent += server.flush()
    sent += server.pass_time(15)
    while server.held and not server.http.is_over:
        server.answer(next(iter(server.held.values())))
        sent += server.flush()
    sent += server.pass_time(15)

    assert_well_formed(sent)
    assert server.http.is_over or server.http.streams == {}
    server.http.abandon()
    assert (server.unsent.size_bytes, server.incomplete.size_bytes) == (0, 0)
    assert server.http.streams == {}


class _Transport(asyncio.Transport):
    """Takes all that is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.has_ended = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.has_ended
        self.written += bytes(data)

    def write_eof(self) -> None:
        self.has_ended = True

    def can_write_eof(self) -> bool:
        return True

    def close(self) -> None:
        self.has_ended = True

    abort = close

    def is_closing(self) -> bool:
        return self.has_ended

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_extra_info(self, name: str, default: Any = None) -> Any:  # noqa: ANN401  # as declared
        return ("127.0.0.1", 1) if name == "peername" else default


async def _converse(chunks: list[bytes]) -> None:
    errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    table = (toy := Toy()).table()
    shared = Shared(
        limits=LIMITS,
        unary={path.encode(): method for path, method in table.unary.items()},
        streams={path.encode(): method for path, method in table.streams.items()},
        max_message_bytes=1000,
        max_unsent_bytes=10**6,
        max_request_bytes=10**5,
        stats=ConnectionStats(),
    )
    connection, transport = Connection(shared), _Transport()
    connection.connection_made(transport)
    for chunk in chunks:
        connection.data_received(chunk)
        await asyncio.sleep(0)
    assert_well_formed(transport.written)
    connection.connection_lost(None)
    while len(asyncio.all_tasks()) > 1:
        await asyncio.sleep(0)

    assert errors == []
    assert toy.waiting == 0
    assert [stats.in_flight for stats in toy.stats] == [0] * len(toy.stats)
    assert (shared.unsent_total.size_bytes, shared.request_total.size_bytes) == (0, 0)
    assert not shared.connections


@pytest.mark.fuzz
@given(_chunks())
def test_no_bytes_break_the_protocol_class(chunks: list[bytes]) -> None:
    asyncio.run(_converse(chunks))
