from __future__ import annotations

import pytest
from raw_http2 import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    HEADERS,
    frame,
    open_request,
    ping,
    request,
    window_update,
)

from http2.admission import Admission, AdmissionFull
from http2.frames import Frame, FrameScanner


def frames(data: bytes) -> list[Frame]:
    scanner = FrameScanner(preface_bytes=0)
    return scanner.cut(scanner.scan(data, 0.0), 0)[1]


def test_without_room_requests_wait_with_their_bodies_and_windows() -> None:
    admission = Admission()
    first, second = request(1, b"body"), request(3, b"body") + window_update(3, 5)

    passed = admission.pass_on(frames(first + second + ping()), room=1, highest_id=0)

    assert passed == first + ping()
    assert 3 in admission
    assert admission.next(1) == second
    assert len(admission) == 0


def test_thousands_of_requests_are_admitted_in_their_sequence() -> None:
    admission = Admission()
    requests = [request(stream_id, b"x") for stream_id in range(1, 8001, 2)]

    passed = admission.pass_on(frames(b"".join(requests)), room=128, highest_id=0)
    while admission:
        passed += admission.next(7)

    assert passed == b"".join(requests)


def test_headers_of_an_open_stream_wait_behind_those_that_came_before() -> None:
    admission = Admission()
    trailers = frame(HEADERS, END_HEADERS, 1, b"")

    assert admission.pass_on(frames(request(3) + trailers), room=0, highest_id=1) == b""

    assert admission.next(1) == request(3) + trailers


def test_headers_of_a_stream_that_waits_are_no_new_stream() -> None:
    admission = Admission()
    trailers = frame(HEADERS, END_HEADERS, 3, b"")
    admission.pass_on(frames(open_request(3) + request(5)), room=0, highest_id=1)

    assert admission.pass_on(frames(trailers), room=0, highest_id=1) == b""

    assert len(admission) == 2
    assert admission.next(2) == open_request(3) + request(5) + trailers


def test_data_of_an_open_stream_does_not_wait() -> None:
    data = frame(DATA, 0, 1, b"x")

    assert Admission().pass_on(frames(request(3) + data), room=0, highest_id=1) == data


def test_a_block_of_headers_waits_as_a_whole() -> None:
    admission = Admission()
    more = frame(CONTINUATION, END_HEADERS, 3, b"")

    assert admission.pass_on(frames(frame(HEADERS, 0, 3) + more), room=0, highest_id=1) == b""
    assert admission.next(1) == frame(HEADERS, 0, 3) + more


def test_too_much_is_refused() -> None:
    admission = Admission()
    chunk = frames(open_request(1) + frame(DATA, 0, 1, bytes(16_000)) * 60)
    admission.pass_on(chunk, room=0, highest_id=0)

    with pytest.raises(AdmissionFull):
        admission.pass_on(frames(frame(DATA, 0, 1, bytes(16_000)) * 6), room=0, highest_id=1)


def test_what_was_admitted_makes_room_for_more() -> None:
    admission = Admission()
    for stream_id in range(1, 401, 2):
        many = open_request(stream_id) + frame(DATA, 0, stream_id, bytes(16_000))
        admission.pass_on(frames(many), room=0, highest_id=stream_id - 1)

        assert admission.next(1) == many
