"""Decisions about a connection, made with an `h2` client and a clock of the test's; no socket, no waiting."""

from __future__ import annotations

import math

import h2.connection
import h2.events
import h2.settings
import pytest
from h2_peers import Joined, Server
from raw_http2 import (
    CANCEL,
    CONTINUATION,
    DATA,
    ENHANCE_YOUR_CALM,
    HEADERS,
    MAGIC,
    NO_ERROR,
    PREFACE,
    PRIORITY,
    PROTOCOL_ERROR,
    REFUSED_STREAM,
    REQUEST_BLOCK,
    block,
    frame,
    goaways_of,
    open_request,
    ping,
    request,
    request_headers,
    resets_of,
    rst_stream,
    settings,
    window_update,
)

from http2.core import CLOSE_AFTER_STREAMS, RETIRE_AFTER_STREAMS
from http2.server import Phase
from http2.stream import STREAM_BYTES, ServerLimits

HIGHEST = 2**31 - 1
HOLD = block(request_headers(b"/hold"))


def big(size: int) -> bytes:
    return block(request_headers(b"/big/%d" % size))


def test_a_request_is_answered() -> None:
    joined = Joined()
    stream_id = joined.send()

    joined.exchange()

    assert joined.ended() == [stream_id]
    assert [it.data for it in joined.events if isinstance(it, h2.events.DataReceived)] == [b"hello"]
    assert joined.server.http.streams == {}


def test_single_bytes_are_answered_as_one_chunk_is() -> None:
    data = PREFACE + b"".join(request(it, b"body") for it in (1, 3, 5)) + open_request(7) + rst_stream(7)
    whole, pieces = Server(), Server()

    sent = whole.receive(data)

    assert b"".join(pieces.receive(data[at : at + 1]) for at in range(len(data))) == sent
    assert pieces.answered == whole.answered == [1, 3, 5]
    assert pieces.was_reset == [7]


def test_requests_sent_before_the_limit_is_known_are_all_answered() -> None:
    server = Server()
    count = 2000

    server.receive(PREFACE + b"".join(request(2 * it + 1, b"x") for it in range(count)))

    assert server.answered == [2 * it + 1 for it in range(count)]
    assert not server.http.is_over


def test_requests_beyond_the_limit_wait_and_a_reset_of_one_is_kept() -> None:
    server = Server(ServerLimits(max_streams=2))
    server.receive(PREFACE + b"".join(request(it, headers=HOLD) for it in (1, 3, 5, 7)))
    assert list(server.held) == [1, 3]

    server.receive(window_update(5, 10) + rst_stream(5))
    server.answer(server.held[1])
    sent = server.flush()

    assert list(server.held) == [3, 7]
    assert resets_of(sent) == []
    assert not server.http.is_over


def test_too_many_waiting_bytes_are_a_flood() -> None:
    server = Server(ServerLimits(max_streams=1))
    server.receive(PREFACE + request(1, headers=HOLD))

    sent = b"".join(server.receive(open_request(3) + frame(DATA, 0, 3, bytes(16_000)) * 70) for _ in "x")

    assert goaways_of(sent) == [(1, ENHANCE_YOUR_CALM)]
    assert server.http.is_over


@pytest.mark.parametrize("resets", [400, 3000])
def test_resets_by_the_hundred_harm_no_other_call(resets: int) -> None:
    server = Server()
    server.receive(PREFACE + request(1, headers=HOLD))
    for at in range(resets):
        server.receive(request(2 * at + 3, headers=HOLD) + (rst_stream(2 * at + 3)))

    server.answer(server.held[1])
    server.flush()
    last = 2 * resets + 3
    server.receive(request(last))

    assert server.answered == [1, last]
    assert len(server.was_reset) == resets
    assert not server.http.is_over


def test_a_client_without_windows_left_by_resets_does_not_starve() -> None:
    joined = Joined()
    for _ in range(300):
        stream_id = joined.send(body=bytes(16_000), ends=False)
        joined.exchange()
        joined.h2.reset_stream(stream_id, CANCEL)

    stream_id = joined.send(body=bytes(16_000))
    joined.exchange()

    assert joined.ended() == [stream_id]


def test_a_request_answered_before_its_end_need_not_be_completed() -> None:
    server = Server()
    server.receive(PREFACE + open_request(1))

    server.http.answers.head(server.http.streams[1], 200, [(b"grpc-status", b"8")], ends=True)
    sent = server.flush()

    assert resets_of(sent) == [(1, NO_ERROR)]
    server.receive(frame(DATA, 0, 1, bytes(1000)))
    server.receive(request(3))
    assert server.answered == [3]


def test_requests_that_came_with_an_error_do_no_harm() -> None:
    server = Server()

    sent = server.receive(PREFACE + request(1) + request(3, headers=HOLD) + frame(DATA, 0, 0, b"x"))

    assert server.http.is_over
    assert [code for _, code in goaways_of(sent)] == [PROTOCOL_ERROR]
    server.answer(server.held[3])
    assert server.receive(request(5)) != b""
    assert server.answered == [1, 3]


# Windows


def test_an_answer_waits_for_the_window() -> None:
    joined = Joined(window=10)
    stream_id = joined.send(body=bytes(50))
    joined.exchange()
    assert joined.ended() == []
    assert joined.server.unsent.size_bytes == 40

    joined.h2.increment_flow_control_window(40, stream_id)
    joined.exchange()

    assert joined.ended() == [stream_id]
    assert joined.server.unsent.size_bytes == 0


def test_a_window_can_be_taken_back() -> None:
    server = Server()
    server.receive(PREFACE + request(1, headers=big(100_000)))
    rest = 100_000 - 65_535
    assert server.unsent.size_bytes == rest
    server.receive(window_update(0, 10**6))

    # Below zero, up to zero, and then as far as the rest needs.
    server.receive(settings((4, 0)) + window_update(1, 65_535))
    assert server.unsent.size_bytes == rest
    server.receive(settings((4, rest)))

    assert server.unsent.size_bytes == 0


def test_begun_requests_wait_while_too_much_is_unsent() -> None:
    server = Server(ServerLimits(max_unsent_bytes=1000))
    server.receive(MAGIC + settings((4, 0)) + request(1, headers=big(1001)) + request(3, headers=HOLD))
    assert (server.answered, server.held) == ([1], {})

    server.receive(window_update(1, 1001))

    assert list(server.held) == [3]


def test_a_request_that_waited_and_was_reset_is_not_begun() -> None:
    server = Server(ServerLimits(max_unsent_bytes=1000))
    server.receive(MAGIC + settings((4, 0)) + request(1, headers=big(1001)) + request(3, headers=HOLD))

    server.receive(rst_stream(3) + window_update(1, 1001))

    assert server.held == {}


def test_nothing_is_framed_in_a_pause() -> None:
    server = Server()
    server.receive(PREFACE + request(1, headers=HOLD))
    server.http.answers.pause(server.now_s)
    server.answer(server.held[1], bytes(1000))

    assert len(server.flush()) < 100
    server.http.answers.resume()
    assert len(server.flush()) > 1000


def test_the_incomplete_bytes_of_a_connection_are_bounded() -> None:
    server = Server(ServerLimits(max_request_bytes=1000))
    server.receive(PREFACE + open_request(1) + frame(DATA, 0, 1, bytes(900)))
    server.receive(open_request(3) + frame(DATA, 0, 3, bytes(300)))
    sent = server.receive(frame(DATA, 0, 1, bytes(200)))

    assert resets_of(sent) == [(1, NO_ERROR)]
    assert server.incomplete.size_bytes == 0
    server.receive(frame(DATA, 1, 3, b"end"))
    assert server.answered == [3]
    assert server.incomplete.size_bytes == 0


def test_a_request_counts_in_the_total_until_it_is_forgotten() -> None:
    server = Server()
    server.receive(PREFACE + open_request(1) + frame(DATA, 0, 1, bytes(900)))
    [stream] = server.http.streams.values()
    assert server.incomplete.size_bytes == 0

    server.http.requests.count_incomplete(stream)
    server.http.requests.count_incomplete(stream)
    assert server.incomplete.size_bytes == STREAM_BYTES + 900
    server.http.requests.take_body(stream)
    assert server.incomplete.size_bytes == STREAM_BYTES
    server.receive(frame(DATA, 0, 1, bytes(50)) + frame(DATA, 0, 1, bytes(50)))
    server.http.requests.count(stream, 10)
    assert server.incomplete.size_bytes == STREAM_BYTES + 110
    assert server.http.requests.size_bytes == STREAM_BYTES + 110
    assert server.http.requests.since_s(server.http.begun_s) == server.now_s

    server.http.cancel(stream)
    server.http.requests.count(stream, -10)
    assert server.incomplete.size_bytes == 0
    assert server.http.requests.since_s(server.http.begun_s) == math.inf


def test_requests_beyond_the_limit_of_streams_count_in_the_total() -> None:
    server = Server(ServerLimits(max_streams=1))
    waiting = request(3, bytes(500))
    server.receive(PREFACE + request(1, headers=HOLD) + waiting)

    assert server.incomplete.size_bytes == len(waiting)
    server.answer(server.held[1])
    server.flush()
    assert server.answered == [1, 3]
    assert server.incomplete.size_bytes == 0


# Floods


@pytest.mark.parametrize(
    "flood",
    [
        ping(),
        settings(),
        frame(PRIORITY, 0, 5, b"\0\0\0\3\x10"),
        window_update(0, 1),
        frame(0x63, 0, 0),
        frame(DATA, 0, 1, b"x"),
        frame(DATA, 0, 1, b""),
        frame(DATA, 0x8, 1, b"\xff" + bytes(255)),
        rst_stream(3),
    ],
    ids=[
        "PING",
        "SETTINGS",
        "PRIORITY",
        "WINDOW_UPDATE",
        "unknown",
        "small DATA",
        "empty DATA",
        "padded DATA",
        "RST_STREAM",
    ],
)
def test_frames_without_use_are_a_flood(flood: bytes) -> None:
    server = Server()
    server.receive(PREFACE + request(3, headers=HOLD) + open_request(5))
    flood = flood.replace(b"\0\0\0\1", b"\0\0\0\5", 1) if flood[3] == DATA else flood

    sent = b""
    for _ in range(101):
        sent += server.receive(flood * 100)
        if server.http.is_over:
            break

    assert [code for _, code in goaways_of(sent)] == [ENHANCE_YOUR_CALM]
    assert server.http.reason == "flood"


def test_the_same_frames_at_the_pace_of_a_client_are_none() -> None:
    server = Server()
    server.receive(PREFACE)

    for _ in range(500):
        server.receive(ping() * 900)
        server.now_s += 1.0

    assert not server.http.is_over


@pytest.mark.parametrize("begin", [b"", REQUEST_BLOCK])
def test_a_block_of_headers_without_an_end_is_a_flood(begin: bytes) -> None:
    server = Server()
    sent = server.receive(PREFACE + frame(HEADERS, 0, 1, begin) + frame(CONTINUATION, 0, 1) * 1000)

    assert [code for _, code in goaways_of(sent)] == [ENHANCE_YOUR_CALM]
    assert server.http.is_over


# How it ends


def test_a_retired_connection_is_over_after_its_last_answer() -> None:
    server = Server()
    server.receive(PREFACE + request(1, headers=HOLD))

    server.http.retire("drain", server.now_s)

    assert goaways_of(server.flush()) == [(HIGHEST, NO_ERROR)]
    assert goaways_of(server.receive(ping(b"goodbye!", flags=1))) == [(1, NO_ERROR)]
    assert not server.http.is_over
    server.answer(server.held[1])
    server.flush()
    assert server.http.is_over


def test_requests_under_way_at_the_first_goaway_are_answered_and_later_ones_refused() -> None:
    server = Server()
    server.receive(PREFACE + request(1, headers=HOLD))
    server.http.retire("drain", server.now_s)

    server.receive(request(3, headers=HOLD) + ping(b"goodbye!"))
    assert list(server.held) == [1, 3]
    sent = server.receive(ping(b"goodbye!", flags=1) + request(5))

    assert goaways_of(sent) == [(3, NO_ERROR)]
    assert resets_of(sent) == [(5, REFUSED_STREAM)]
    assert server.answered == []


def test_a_client_that_does_not_answer_the_goodbye_is_not_waited_for() -> None:
    server = Server()
    server.receive(PREFACE)
    server.http.retire("drain", server.now_s)

    sent = server.pass_time(3)

    assert goaways_of(sent) == [(HIGHEST, NO_ERROR), (0, NO_ERROR)]
    assert server.http.is_over


def test_a_connection_retires_before_the_library_ends_it() -> None:
    server = Server()
    server.receive(PREFACE)
    sent = b""
    for at in range(RETIRE_AFTER_STREAMS + 1):
        sent += server.receive(request(2 * at + 1))

    assert goaways_of(sent) == [(HIGHEST, NO_ERROR)]
    assert server.http.reason == "streams"
    assert len(server.answered) == RETIRE_AFTER_STREAMS + 1


@pytest.mark.parametrize("chunk_bytes", [50, 3000, 2**16])
@pytest.mark.parametrize("max_streams", [3, 100])
def test_a_peer_that_never_sees_the_goaway_loses_no_call_that_came_before_it(
    max_streams: int, chunk_bytes: int
) -> None:
    # As a client does whose deadlines pass while this process stands still.
    ids = range(1, 2 * (CLOSE_AFTER_STREAMS + 1000), 2)
    held = {ids[0], ids[2000]}
    data = PREFACE + b"".join(
        request(it, headers=HOLD) if it in held else request(it, b"x") + rst_stream(it) for it in ids
    )
    server = Server(ServerLimits(max_streams=max_streams))

    sent = b"".join(server.receive(data[at : at + chunk_bytes]) for at in range(0, len(data), chunk_bytes))

    last_id, code = goaways_of(sent)[-1]
    assert ids[RETIRE_AFTER_STREAMS] < last_id < 2 * 4096
    assert code == NO_ERROR
    assert set(server.held) == held
    for it in held:
        server.answer(server.held[it])
    server.flush()
    assert server.http.is_over
    assert server.http.reason == "streams"


def test_a_peer_that_has_shut_its_side_gets_its_answers() -> None:
    server = Server()
    server.receive(PREFACE + request(1, headers=HOLD) + open_request(3))

    assert [stream.id for stream in server.http.end_input()] == [3]

    assert resets_of(server.flush()) == [(3, CANCEL)]
    assert not server.http.is_over
    server.answer(server.held[1])
    server.flush()
    assert server.http.is_over


def test_what_is_held_is_forgotten_with_the_connection() -> None:
    server = Server()
    server.receive(MAGIC + settings((4, 0)) + request(1, headers=big(1000)) + open_request(3))
    server.receive(frame(DATA, 0, 3, bytes(500)))
    server.receive(frame(DATA, 0, 3, bytes(500)))
    assert (server.unsent.size_bytes, server.incomplete.size_bytes) == (1000, 1000)

    server.http.abandon()

    assert (server.unsent.size_bytes, server.incomplete.size_bytes) == (0, 0)
    assert server.http.streams == {}


# Time-outs

LIMITS = ServerLimits(preface_s=5, frame_s=5, body_s=5, idle_s=20, send_s=5, max_age_s=60, grace_s=3)


@pytest.mark.parametrize(
    ("begin", "reason", "code"),
    [
        (b"", "preface_timeout", PROTOCOL_ERROR),
        (MAGIC, "preface_timeout", PROTOCOL_ERROR),
        (PREFACE + b"\0", "frame_timeout", PROTOCOL_ERROR),
        (PREFACE + request(1)[:20], "frame_timeout", PROTOCOL_ERROR),
        (PREFACE + frame(HEADERS, 0, 1), "frame_timeout", PROTOCOL_ERROR),
    ],
    ids=["nothing", "no SETTINGS", "a byte", "half a frame", "half a block"],
)
def test_what_is_waited_for_must_come_in_time(begin: bytes, reason: str, code: int) -> None:
    server = Server(LIMITS)
    server.receive(begin)

    assert goaways_of(server.pass_time(5)) == []
    sent = server.pass_time(1)

    assert server.http.reason == reason
    assert [found for _, found in goaways_of(sent)] == [code]
    assert server.http.is_over


def test_a_client_that_takes_nothing_is_not_waited_for() -> None:
    server = Server(LIMITS)
    server.receive(MAGIC + settings((4, 0)) + request(1, b"never taken"))

    assert goaways_of(server.pass_time(4)) == []
    assert goaways_of(server.pass_time(1)) == [(1, CANCEL)]

    assert server.http.reason == "send_timeout"


def test_a_frame_that_comes_byte_by_byte_is_not_waited_for_longer() -> None:
    server = Server(LIMITS)
    server.receive(PREFACE)
    data = open_request(1) + frame(DATA, 0, 1, bytes(100))[:-1]

    for at in range(len(data)):
        server.receive(data[at : at + 1])
        server.pass_time(1)

    assert server.http.reason == "frame_timeout"


def test_a_body_must_go_on() -> None:
    server = Server(LIMITS)
    server.receive(PREFACE + open_request(1))
    for _ in range(3):
        server.pass_time(4)
        server.receive(frame(DATA, 0, 1, b"x"))

    sent = server.pass_time(6)

    assert resets_of(sent) == [(1, CANCEL)]
    assert server.was_reset == [1]
    server.receive(request(3))
    assert server.answered == [3]


def test_an_answer_must_be_taken_or_its_stream_is_reset() -> None:
    server = Server(LIMITS)
    server.receive(MAGIC + settings((4, 0)) + request(1, b"never taken") + request(3, b"taken slowly"))
    sent = b""
    for _ in range(6):
        server.receive(window_update(3, 1))
        sent += server.pass_time(1)

    assert resets_of(sent) == [(1, CANCEL)]
    assert not server.http.is_over
    assert list(server.http.streams) == [3]


def test_a_long_pause_ends_the_connection() -> None:
    server = Server(LIMITS)
    server.receive(PREFACE)
    server.http.answers.pause(server.now_s)

    server.pass_time(6)

    assert server.http.reason == "send_timeout"


def test_an_idle_connection_retires() -> None:
    server = Server(LIMITS)
    server.receive(PREFACE + request(1))

    sent = server.pass_time(24)

    assert server.http.reason == "idle"
    assert [code for _, code in goaways_of(sent)] == [NO_ERROR, NO_ERROR]
    assert server.http.is_over


def test_a_connection_with_a_call_is_not_idle() -> None:
    server = Server(LIMITS)
    server.receive(PREFACE + request(1, headers=HOLD))

    server.pass_time(40)

    assert server.http.reason == ""
    server.answer(server.held[1])
    server.pass_time(3)
    assert server.http.reason in {"", "idle"}


def test_an_old_connection_retires_and_is_overdue_after_its_grace() -> None:
    server = Server(LIMITS)
    server.receive(PREFACE + request(1, headers=HOLD))

    server.pass_time(61)
    assert server.http.reason == "age"
    server.pass_time(3)
    assert not server.http.is_overdue(server.now_s)
    server.pass_time(4)

    assert server.http.is_overdue(server.now_s)
    assert server.http._phase is Phase.CLOSING
