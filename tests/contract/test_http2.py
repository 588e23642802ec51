"""What RFC 9113 demands of a server, on a real socket: each violation ends what it must, and nothing else.

The codes are those that the RFC allows. A stream error may be treated as a connection error (section 5.4.2).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

import pytest
from raw_http2 import (
    ACK,
    COMPRESSION_ERROR,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    ENHANCE_YOUR_CALM,
    FLOW_CONTROL_ERROR,
    FRAME_SIZE_ERROR,
    GOAWAY,
    HAS_PRIORITY,
    HEADERS,
    MAGIC,
    NO_ERROR,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    PROTOCOL_ERROR,
    PUSH_PROMISE,
    REQUEST_BLOCK,
    RST_STREAM,
    SETTINGS,
    STREAM_CLOSED,
    WINDOW_UPDATE,
    Pairs,
    Sent,
    block,
    frame,
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
from toy_engines import HELLO, WAIT, Toy, assert_served, code_of, raw_client, toy_engine

HIGHEST = 2**31 - 1
OPEN = open_request(1)
HALF_CLOSED = request(1, HELLO, headers=WAIT)


@pytest.fixture
async def toy() -> AsyncIterator[Toy]:
    async with toy_engine() as one:
        yield one


# What is sent after the preface, and the codes with which the connection may end.
OF_THE_CONNECTION: dict[str, tuple[bytes, set[int]]] = {
    "DATA on stream 0": (frame(DATA, 0, 0, b"x"), {PROTOCOL_ERROR}),
    "DATA on an idle stream": (frame(DATA, 0, 1, b"x"), {PROTOCOL_ERROR}),
    "DATA with too much padding": (OPEN + frame(DATA, PADDED, 1, b"\x05x"), {PROTOCOL_ERROR}),
    "padded DATA without a length": (OPEN + frame(DATA, PADDED, 1), {PROTOCOL_ERROR, FRAME_SIZE_ERROR}),
    "HEADERS on stream 0": (request(0), {PROTOCOL_ERROR}),
    "HEADERS on an even stream": (request(2), {PROTOCOL_ERROR}),
    "HEADERS on an earlier stream": (request(5) + request(3), {PROTOCOL_ERROR, STREAM_CLOSED}),
    "HEADERS with too much padding": (
        frame(HEADERS, END_HEADERS | PADDED, 1, b"\xff" + REQUEST_BLOCK),
        {PROTOCOL_ERROR},
    ),
    "HEADERS that depend on themselves": (
        frame(HEADERS, END_HEADERS | HAS_PRIORITY, 1, b"\0\0\0\1\x10" + REQUEST_BLOCK),
        {PROTOCOL_ERROR},
    ),
    "PRIORITY on stream 0": (frame(PRIORITY, 0, 0, b"\0\0\0\3\x10"), {PROTOCOL_ERROR}),
    "RST_STREAM on stream 0": (rst_stream(0), {PROTOCOL_ERROR}),
    "RST_STREAM on an idle stream": (rst_stream(1), {PROTOCOL_ERROR}),
    "RST_STREAM of 3 bytes": (OPEN + frame(RST_STREAM, 0, 1, b"abc"), {FRAME_SIZE_ERROR}),
    "RST_STREAM of 5 bytes": (OPEN + frame(RST_STREAM, 0, 1, b"abcde"), {FRAME_SIZE_ERROR}),
    "SETTINGS on a stream": (frame(SETTINGS, 0, 1), {PROTOCOL_ERROR}),
    "SETTINGS of 5 bytes": (frame(SETTINGS, 0, 0, b"\0\1\0\0\0"), {FRAME_SIZE_ERROR}),
    "SETTINGS that acknowledge with a payload": (
        frame(SETTINGS, ACK, 0, b"\0\1\0\0\0\0"),
        {FRAME_SIZE_ERROR},
    ),
    "ENABLE_PUSH of 2": (settings((2, 2)), {PROTOCOL_ERROR}),
    "INITIAL_WINDOW_SIZE too large": (settings((4, 2**31)), {FLOW_CONTROL_ERROR}),
    "MAX_FRAME_SIZE too small": (settings((5, 16_383)), {PROTOCOL_ERROR}),
    "MAX_FRAME_SIZE too large": (settings((5, 2**24)), {PROTOCOL_ERROR}),
    "PUSH_PROMISE": (
        OPEN + frame(PUSH_PROMISE, END_HEADERS, 1, b"\0\0\0\2" + REQUEST_BLOCK),
        {PROTOCOL_ERROR},
    ),
    "PING on a stream": (frame(PING, 0, 1, bytes(8)), {PROTOCOL_ERROR}),
    "PING of 7 bytes": (frame(PING, 0, 0, bytes(7)), {FRAME_SIZE_ERROR}),
    "GOAWAY on a stream": (frame(GOAWAY, 0, 1, bytes(8)), {PROTOCOL_ERROR}),
    "GOAWAY of 7 bytes": (frame(GOAWAY, 0, 0, bytes(7)), {FRAME_SIZE_ERROR}),
    "WINDOW_UPDATE by 0": (window_update(0, 0), {PROTOCOL_ERROR}),
    "WINDOW_UPDATE of 3 bytes": (frame(WINDOW_UPDATE, 0, 0, b"\0\0\1"), {FRAME_SIZE_ERROR}),
    "WINDOW_UPDATE on an idle stream": (window_update(1, 1), {PROTOCOL_ERROR}),
    "WINDOW_UPDATE of the connection to too much": (window_update(0, HIGHEST), {FLOW_CONTROL_ERROR}),
    "windows to too much by SETTINGS": (
        HALF_CLOSED + window_update(1, HIGHEST - 65_535) + settings((4, 65_536)),
        {FLOW_CONTROL_ERROR},
    ),
    "CONTINUATION of nothing": (frame(CONTINUATION, END_HEADERS, 1, REQUEST_BLOCK), {PROTOCOL_ERROR}),
    "CONTINUATION after the end": (OPEN + frame(CONTINUATION, END_HEADERS, 1), {PROTOCOL_ERROR}),
    "CONTINUATION on stream 0": (
        frame(HEADERS, 0, 1, REQUEST_BLOCK) + frame(CONTINUATION, END_HEADERS, 0),
        {PROTOCOL_ERROR},
    ),
    "CONTINUATION of another stream": (
        frame(HEADERS, 0, 1, REQUEST_BLOCK) + frame(CONTINUATION, END_HEADERS, 3),
        {PROTOCOL_ERROR},
    ),
    "DATA within a block of headers": (
        frame(HEADERS, 0, 1, REQUEST_BLOCK) + frame(DATA, 0, 1),
        {PROTOCOL_ERROR},
    ),
    "RST_STREAM within a block of headers": (
        frame(HEADERS, 0, 1, REQUEST_BLOCK) + rst_stream(1),
        {PROTOCOL_ERROR},
    ),
    "unknown frame within a block of headers": (
        frame(HEADERS, 0, 1, REQUEST_BLOCK) + frame(0x63, 0, 1),
        {PROTOCOL_ERROR},
    ),
    "HEADERS within a block of headers": (frame(HEADERS, 0, 1, REQUEST_BLOCK) + request(3), {PROTOCOL_ERROR}),
    "many CONTINUATION": (
        frame(HEADERS, 0, 1, REQUEST_BLOCK) + frame(CONTINUATION, 0, 1) * 10_000,
        {ENHANCE_YOUR_CALM},
    ),
    "a frame larger than any may be": (
        (16_385).to_bytes(3, "big") + bytes((DATA, 0, 0, 0, 0, 1)),
        {FRAME_SIZE_ERROR},
    ),
    "HEADERS larger than any may be": (
        (16_385).to_bytes(3, "big") + bytes((HEADERS, 4, 0, 0, 0, 1)),
        {FRAME_SIZE_ERROR},
    ),
    "headers of no table": (request(1, headers=b"\x80"), {COMPRESSION_ERROR}),
    "headers beyond the table": (request(1, headers=REQUEST_BLOCK + b"\xff\x80\x01"), {COMPRESSION_ERROR}),
    "headers cut short": (request(1, headers=REQUEST_BLOCK[:-1]), {COMPRESSION_ERROR}),
    "a table of headers too large": (
        request(1, headers=b"\x3f\xe2\x1f" + REQUEST_BLOCK),
        {COMPRESSION_ERROR},
    ),
    "Huffman code with its end in it": (
        request(1, headers=REQUEST_BLOCK + b"\0\1a\x84\xff\xff\xff\xff"),
        {COMPRESSION_ERROR},
    ),
    "headers of 100 KB from 15": (
        request(1, headers=REQUEST_BLOCK + b"\x40" + literal(b"a", bytes(100))[1:] + b"\xbe" * 15_000),
        {ENHANCE_YOUR_CALM},
    ),
}

# What is sent after the preface, and the codes with which stream 1 may end.
OF_A_STREAM: dict[str, tuple[bytes, set[int]]] = {
    "DATA after the end": (HALF_CLOSED + frame(DATA, END_STREAM, 1, b"x"), {STREAM_CLOSED}),
    "HEADERS after the end": (HALF_CLOSED + request(1), {STREAM_CLOSED, PROTOCOL_ERROR}),
    "DATA after RST_STREAM": (OPEN + rst_stream(1) + frame(DATA, 0, 1, b"x"), {STREAM_CLOSED}),
    "HEADERS after RST_STREAM": (OPEN + rst_stream(1) + request(1), {STREAM_CLOSED, PROTOCOL_ERROR}),
    "PRIORITY of 4 bytes": (OPEN + frame(PRIORITY, 0, 1, b"\0\0\0\3"), {FRAME_SIZE_ERROR}),
    "WINDOW_UPDATE of a stream by 0": (OPEN + window_update(1, 0), {PROTOCOL_ERROR}),
    "WINDOW_UPDATE of a stream to too much": (OPEN + window_update(1, HIGHEST), {FLOW_CONTROL_ERROR}),
    "trailers without an end": (OPEN + frame(HEADERS, END_HEADERS, 1, literal(b"a", b"b")), {PROTOCOL_ERROR}),
    "trailers with a path": (
        OPEN + frame(HEADERS, END_HEADERS | END_STREAM, 1, literal(b":path", b"/")),
        {PROTOCOL_ERROR},
    ),
    "DATA of another length": (
        open_request(1, REQUEST_BLOCK + literal(b"content-length", b"3")) + frame(DATA, END_STREAM, 1, b"x"),
        {PROTOCOL_ERROR},
    ),
    "no DATA but a length": (
        request(1, headers=REQUEST_BLOCK + literal(b"content-length", b"3")),
        {PROTOCOL_ERROR},
    ),
}


def without(name: bytes) -> bytes:
    return block([pair for pair in request_headers() if pair[0] != name])


def with_more(*more: tuple[bytes, bytes]) -> bytes:
    return block(request_headers(b"/toy.Toy/Echo", *more))


def replaced(pairs: Pairs) -> bytes:
    return block([*pairs, *request_headers()[len(pairs) :]])


MALFORMED: dict[str, bytes] = {
    "upper case": with_more((b"Upper", b"x")),
    "an unknown pseudo-header": literal(b":unknown", b"x") + REQUEST_BLOCK,
    "a pseudo-header of answers": literal(b":status", b"200") + REQUEST_BLOCK,
    "a pseudo-header after others": without(b":path") + literal(b":path", b"/"),
    "two methods": literal(b":method", b"POST") + REQUEST_BLOCK,
    "two schemes": literal(b":scheme", b"http") + REQUEST_BLOCK,
    "two paths": literal(b":path", b"/") + REQUEST_BLOCK,
    "no method": without(b":method"),
    "no scheme": without(b":scheme"),
    "no path": without(b":path"),
    "an empty path": literal(b":path", b"") + without(b":path"),
    "a connection's header": with_more((b"connection", b"keep-alive")),
    "transfer-encoding": with_more((b"transfer-encoding", b"chunked")),
    "te but not trailers": with_more((b"te", b"gzip")),
    "a line break in a value": with_more((b"a", b"b\r\nc: d")),
    "a zero in a value": with_more((b"a", b"b\0c")),
    "an empty name": with_more((b"", b"x")),
    "a space in a name": with_more((b"a b", b"x")),
}


def ends(frames: Iterable[Sent], kinds: set[int]) -> list[int]:
    return [code_of(sent) for sent in frames if sent.kind in kinds]


@pytest.mark.parametrize("case", OF_THE_CONNECTION)
async def test_a_violation_ends_its_connection_alone(toy: Toy, case: str) -> None:
    violation, codes = OF_THE_CONNECTION[case]
    async with raw_client(toy) as client:
        client.send(violation)
        frames = await client.until_closed()

    assert len(ends(frames, {GOAWAY})) == 1
    assert set(ends(frames, {GOAWAY})) <= codes
    await assert_served(toy)


@pytest.mark.parametrize("case", OF_A_STREAM)
async def test_a_violation_ends_its_stream(toy: Toy, case: str) -> None:
    violation, codes = OF_A_STREAM[case]
    async with raw_client(toy) as client:
        client.send(violation)
        frames = await client.until(lambda sent: bool(ends(sent, {RST_STREAM, GOAWAY})))

    assert set(ends(frames, {RST_STREAM, GOAWAY})) <= codes
    await assert_served(toy)


@pytest.mark.parametrize("case", MALFORMED)
async def test_a_malformed_request_ends_its_stream_alone(toy: Toy, case: str) -> None:
    async with raw_client(toy) as client:
        client.send(request(1, headers=MALFORMED[case]) + request(3, HELLO))
        answer = await client.until_ended(3)
        frames = await client.until_ended(1)

    assert ends(frames, {RST_STREAM}) == [PROTOCOL_ERROR]
    assert HELLO in [it.payload for it in answer]


LEGAL: dict[str, bytes] = {
    "unknown frame": frame(0x63, 0xFF, 0, b"x") + frame(0x63, 0, 77, b"x"),
    "unknown setting": settings((0x7777, 5)),
    "unknown flags": ping(flags=0xFE),
    "PRIORITY on an idle stream": frame(PRIORITY, 0, 9, b"\0\0\0\3\x10"),
    "answer to no PING": ping(flags=ACK),
    "the highest windows": settings((4, HIGHEST)) + window_update(0, HIGHEST - 65_535),
    "a window of zero": settings((4, 0)) + settings((4, 65_535)),
    "the largest frames": settings((5, 2**24 - 1)),
    "no table of headers": settings((1, 0)),
    "no push": settings((2, 0)),
    "the reserved bit": (b"\0\0\4\x08\0\x80\0\0\0" + b"\x80\0\0\1"),
}


@pytest.mark.parametrize("case", LEGAL)
async def test_what_is_unusual_and_legal_does_no_harm(toy: Toy, case: str) -> None:
    async with raw_client(toy) as client:
        client.send(LEGAL[case] + request(1, HELLO))
        answer = await client.until_ended(1)

    assert HELLO in [it.payload for it in answer]


REQUESTS: dict[str, bytes] = {
    "padded": frame(HEADERS, END_HEADERS | PADDED, 1, b"\3" + REQUEST_BLOCK + bytes(3))
    + frame(DATA, END_STREAM | PADDED, 1, b"\3" + HELLO + bytes(3)),
    "with a priority": frame(HEADERS, END_HEADERS | HAS_PRIORITY, 1, b"\0\0\0\3\x10" + REQUEST_BLOCK)
    + frame(DATA, END_STREAM, 1, HELLO),
    "in many frames": frame(HEADERS, 0, 1, REQUEST_BLOCK[:5])
    + frame(CONTINUATION, 0, 1, REQUEST_BLOCK[5:9])
    + frame(CONTINUATION, END_HEADERS, 1, REQUEST_BLOCK[9:])
    + b"".join(frame(DATA, 0, 1, HELLO[at : at + 1]) for at in range(len(HELLO)))
    + frame(DATA, END_STREAM, 1),
    "with trailers": open_request(1)
    + frame(DATA, 0, 1, HELLO)
    + frame(HEADERS, END_HEADERS | END_STREAM, 1, literal(b"a", b"b")),
    "with its length": open_request(1, REQUEST_BLOCK + literal(b"content-length", b"10"))
    + frame(DATA, END_STREAM, 1, HELLO),
}


@pytest.mark.parametrize("case", REQUESTS)
async def test_a_request_may_be_cut_and_padded(toy: Toy, case: str) -> None:
    async with raw_client(toy) as client:
        client.send(REQUESTS[case])
        answer = await client.until_ended(1)

    assert HELLO in [it.payload for it in answer]


async def test_settings_and_pings_are_answered(toy: Toy) -> None:
    async with raw_client(toy) as client:
        client.send(ping(b"abcdefgh"))
        frames = await client.until(lambda sent: any(it.kind == PING for it in sent))

    assert frames[0].kind == SETTINGS
    assert Sent(SETTINGS, ACK, 0, b"") in frames
    assert frames[-1] == Sent(PING, ACK, 0, b"abcdefgh")


@pytest.mark.parametrize(
    "first",
    [MAGIC[:-1] + b"X" + settings(), MAGIC + ping(), MAGIC + request(1)],
)
async def test_a_connection_begins_with_the_preface(toy: Toy, first: bytes) -> None:
    async with raw_client(toy, first) as client:
        frames = await client.until_closed()

    assert set(ends(frames, {GOAWAY})) <= {PROTOCOL_ERROR}
    await assert_served(toy)


async def test_the_preface_may_come_byte_by_byte(toy: Toy) -> None:
    async with raw_client(toy, b"") as client:
        for byte in PREFACE + request(1, HELLO):
            client.send(bytes((byte,)))
            await asyncio.sleep(0)
        answer = await client.until_ended(1)

    assert HELLO in [it.payload for it in answer]


@pytest.mark.parametrize(
    ("first", "answer"),
    [
        (b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", b"HTTP/1.1 505 "),
        (b"POST /x HTTP/1.0\r\n\r\n", b"HTTP/1.1 505 "),
        (bytes.fromhex("16030100c8010000c403033a"), b""),
        (bytes(100), b""),
    ],
    ids=["GET", "POST", "TLS", "zeros"],
)
async def test_another_protocol_is_refused(toy: Toy, first: bytes, answer: bytes) -> None:
    async with raw_client(toy, first) as client:
        await client.until_closed()

    assert client.sent[:13] == answer
    await assert_served(toy)


async def test_a_client_that_says_goodbye_gets_its_answers(toy: Toy) -> None:
    async with raw_client(toy) as client:
        client.send(request(1, HELLO, headers=WAIT) + goaway(0))
        await client.until(lambda sent: Sent(SETTINGS, ACK, 0, b"") in sent)
        toy.go_on.set()
        answer = await client.until_ended(1)

    assert HELLO in [it.payload for it in answer]


async def test_a_goaway_names_the_last_stream_and_its_reason(toy: Toy) -> None:
    async with raw_client(toy) as client:
        client.send(request(1, HELLO) + request(3, HELLO) + frame(DATA, 0, 0))
        frames = await client.until_closed()

    [last] = [sent for sent in frames if sent.kind == GOAWAY]
    assert int.from_bytes(last.payload[:4], "big") == 3
    assert code_of(last) == PROTOCOL_ERROR


async def test_an_answer_before_the_end_of_its_request_resets_without_an_error(toy: Toy) -> None:
    async with raw_client(toy) as client:
        client.send(open_request(1) + frame(DATA, 0, 1, b"\0\xff\xff\xff\xff"))
        frames = await client.until(lambda sent: bool(ends(sent, {RST_STREAM})))

    assert ends(frames, {RST_STREAM}) == [NO_ERROR]
