from __future__ import annotations

from dataclasses import dataclass

import pytest
from raw_http2 import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HAS_PRIORITY,
    HEADERS,
    MAGIC,
    PADDED,
    PRIORITY,
    REQUEST_BLOCK,
    RST_STREAM,
    frame,
    open_request,
    ping,
    request,
    rst_stream,
    settings,
    window_update,
)

from http2.frames import FrameScanner, MalformedFrame, reset_at

EVERYTHING = b"".join(
    [
        MAGIC,
        settings(),
        request(1, b"x" * 300),
        ping(),
        open_request(3),
        rst_stream(3),
        window_update(0, 5),
        frame(HEADERS, END_STREAM, 5, REQUEST_BLOCK[:10]),
        frame(CONTINUATION, 0, 5, REQUEST_BLOCK[10:20]),
        frame(CONTINUATION, END_HEADERS, 5, REQUEST_BLOCK[20:]),
        frame(HEADERS, END_HEADERS | HAS_PRIORITY, 7, b"\0\0\0\5\x10" + REQUEST_BLOCK),
        frame(HEADERS, END_HEADERS | HAS_PRIORITY | PADDED, 9, b"\0\0\0\0\5\x10" + REQUEST_BLOCK),
        frame(PRIORITY, 0, 11, b"\0\0\0\3\x10"),
        frame(DATA, 0, 7, b"small"),
        frame(DATA, 0, 7, b"y" * 256),
        rst_stream(7),
        frame(0x63, 0, 0, b"unknown"),
    ]
)


@dataclass
class Seen:
    passed: bytes
    overhead: int
    resets: list[int]
    partial_since_s: float | None


def scan(*chunks: bytes) -> Seen:
    scanner = FrameScanner(preface_bytes=len(MAGIC))
    seen = Seen(b"", 0, [], None)
    for now_s, chunk in enumerate(chunks):
        part = scanner.scan(chunk, float(now_s))
        seen.passed += part
        seen.resets += [reset_at(part, at) for at in scanner.resets]
    seen.overhead, seen.partial_since_s = scanner.overhead, scanner.partial_since_s
    return seen


WHOLE = scan(EVERYTHING)


def test_what_brings_no_request_is_counted() -> None:
    # SETTINGS, PING, WINDOW_UPDATE, PRIORITY, small DATA, what is unknown, 2 RST_STREAM, 2 CONTINUATION.
    # One of these has over 64 bytes, and counts twice.
    assert Seen(EVERYTHING, 11, [3, 7], None) == WHOLE


def test_a_cut_between_any_two_bytes_changes_nothing() -> None:
    for at in range(1, len(EVERYTHING)):
        assert scan(EVERYTHING[:at], EVERYTHING[at:]) == WHOLE


def test_single_bytes_change_nothing() -> None:
    assert scan(*(EVERYTHING[at : at + 1] for at in range(len(EVERYTHING)))) == WHOLE


@pytest.mark.parametrize("length", [0, 3, 5])
def test_a_reset_of_the_wrong_length_is_left_to_the_library(length: int) -> None:
    malformed = frame(RST_STREAM, 0, 1, bytes(length))

    assert scan(MAGIC, malformed) == Seen(MAGIC + malformed, 1, [], None)


def test_a_reset_within_a_block_of_headers_is_left_to_the_library() -> None:
    assert scan(MAGIC, frame(HEADERS, 0, 1, b"") + rst_stream(1)).resets == []


@pytest.mark.parametrize(
    "malformed",
    [
        frame(PRIORITY, 0, 0, b"\0\0\0\3\x10"),
        frame(PRIORITY, 0, 5, b"\0\0\0\5\x10"),
        frame(PRIORITY, 0, 5, b"\x80\0\0\5\x10"),
        frame(HEADERS, END_HEADERS | HAS_PRIORITY, 5, b"\0\0\0\5\x10"),
        frame(HEADERS, END_HEADERS | HAS_PRIORITY | PADDED, 5, b"\0\0\0\0\5\x10"),
    ],
    ids=["stream 0", "itself", "itself, exclusively", "HEADERS", "padded HEADERS"],
)
def test_a_priority_that_cannot_be_is_malformed(malformed: bytes) -> None:
    for at in range(1, len(malformed)):
        with pytest.raises(MalformedFrame):
            scan(MAGIC, malformed[:at], malformed[at:])


@pytest.mark.parametrize(
    "malformed", [frame(PRIORITY, 0, 5, b"\0\0"), frame(HEADERS, END_HEADERS | HAS_PRIORITY, 5, b"\0")]
)
def test_a_priority_without_its_end_is_left_to_the_library(malformed: bytes) -> None:
    assert scan(MAGIC, malformed).passed == MAGIC + malformed
    # What follows is no part of it, whatever it looks like.
    assert scan(MAGIC, malformed + request(1)).passed == MAGIC + malformed + request(1)


def test_a_partial_frame_is_timed_from_its_beginning() -> None:
    assert scan(MAGIC, ping()[:3], ping()[3:5]).partial_since_s == 1.0
    assert scan(MAGIC, ping()[:10], ping()[10:12]).partial_since_s == 1.0
    assert scan(MAGIC, request(1), ping()[:3]).partial_since_s == 2.0
    assert scan(MAGIC + ping()[:3], ping()[3:] + ping()[:3]).partial_since_s == 1.0
    assert scan(MAGIC + ping()[:3], ping()[3:]).partial_since_s is None


def test_a_block_of_headers_is_timed_from_its_first_frame() -> None:
    begin, more = frame(HEADERS, 0, 1, b""), frame(CONTINUATION, 0, 1, b"")

    assert scan(MAGIC + begin, more, more).partial_since_s == 0.0
    assert scan(MAGIC + begin, more, frame(CONTINUATION, END_HEADERS, 1)).partial_since_s is None


def test_cut_keeps_a_frame_without_its_end_for_the_next_chunk() -> None:
    scanner = FrameScanner(preface_bytes=0)
    whole, partial = request(1), ping()
    part = scanner.scan(whole + partial[:10], 0.0)

    before, frames = scanner.cut(part, scanner.began_at)

    assert (before, [it.data for it in frames]) == (b"", [whole])
    assert scanner.scan(partial[10:], 0.0) == partial
    assert scanner.overhead == 1
    assert scanner.partial_since_s is None


def test_cut_refuses_a_frame_larger_than_any_may_be_before_it_comes() -> None:
    scanner = FrameScanner(preface_bytes=0)
    part = scanner.scan((16_385).to_bytes(3, "big") + bytes((DATA, 0)) + b"\0\0\0\1", 0.0)

    with pytest.raises(MalformedFrame) as raised:
        scanner.cut(part, 0)
    assert raised.value.is_too_large
