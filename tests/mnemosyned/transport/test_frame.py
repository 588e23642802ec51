from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from random import Random
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio.steps import finished
from http2.messages import announced_bytes, framed, only_message
from mnemosyned.errors import (
    InvalidArgument,
    MalformedMessage,
    MessageTooLarge,
    MnemosyneError,
    Unimplemented,
)
from mnemosyned.transport.frame import (
    FrameReader,
    has_time,
    is_packed,
    status_message,
    timeout_s,
    unpacking_message,
)


def reader(encoding: bytes = b"", max_message_bytes: int = 100) -> FrameReader:
    return FrameReader(encoding=encoding, max_message_bytes=max_message_bytes)


def compressed(payload: bytes) -> bytes:
    return b"\1" + len(payload).to_bytes(4, "big") + payload


@given(st.lists(st.binary(max_size=50), max_size=5), st.integers(1, 20))
def test_messages_are_cut_out_however_their_bytes_arrive(messages: list[bytes], step: int) -> None:
    stream = b"".join(map(framed, messages))
    frames = reader()
    found = [m for at in range(0, len(stream), step) for m in frames.feed(stream[at : at + step])]
    frames.end()

    assert found == messages


@given(st.binary(max_size=50))
def test_a_whole_plain_frame_is_read_at_once(message: bytes) -> None:
    assert only_message(framed(message)) == message


@pytest.mark.parametrize("body", [b"", b"\0\0\0\0", framed(b"a") + b"b", framed(b"ab")[:-1], compressed(b"")])
def test_anything_else_is_left_to_the_reader(body: bytes) -> None:
    assert only_message(body) is None


@pytest.mark.parametrize(
    ("encoding", "payload"),
    [(b"gzip", gzip.compress(b"hello", mtime=0)), (b"deflate", zlib.compress(b"hello"))],
)
def test_compressed_messages_are_unpacked(encoding: bytes, payload: bytes) -> None:
    assert reader(encoding).feed(compressed(payload)) == [b"hello"]


@pytest.mark.parametrize("size_bytes", [0, 1, 65_536, 300_000, 1_000_000])
@pytest.mark.parametrize("level", [0, 1, 6, 9])
@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_what_is_packed_says_so_and_is_unpacked_in_steps(
    pack: Callable[[bytes, int], bytes], level: int, size_bytes: int
) -> None:
    for message in (bytes(size_bytes), Random(7).randbytes(size_bytes)):
        packed = pack(message, level)
        steps = unpacking_message(packed, max_bytes=size_bytes)

        assert is_packed(packed)
        assert finished(steps) == message


@pytest.mark.parametrize("message", [b"", b"x", b"\x0a\x01t", b"\x0a\x80\x01" + b"t" * 128])
def test_a_plain_message_is_not_called_packed(message: bytes) -> None:
    assert not is_packed(message)


def test_a_bomb_is_unpacked_up_to_the_limit_only() -> None:
    steps = unpacking_message(gzip.compress(bytes(10_000_000)), max_bytes=1_000_000)
    for _ in range(15):
        next(steps)

    with pytest.raises(MessageTooLarge):
        next(steps)


def test_a_frame_that_announces_too_much_is_refused_before_it_arrives() -> None:
    with pytest.raises(MessageTooLarge, match="larger than 100 bytes"):
        reader().feed(b"\0\0\0\0\x65")


def test_a_message_that_came_whole_and_is_too_large_is_refused() -> None:
    with pytest.raises(MessageTooLarge):
        reader().feed(framed(b"x" * 101))


def test_a_part_that_looks_like_a_message_is_a_part() -> None:
    frames, inner = reader(), framed(b"inner")
    outer = framed(b"begins " + inner)

    assert frames.feed(outer[: -len(inner)]) == []
    assert frames.feed(inner) == [b"begins " + inner]


def test_a_message_that_unpacks_to_too_much_is_refused() -> None:
    with pytest.raises(MessageTooLarge):
        reader(b"gzip").feed(compressed(gzip.compress(b"x" * 101)))


@pytest.mark.parametrize(
    ("encoding", "body", "error"),
    [
        (b"", compressed(b"x"), MalformedMessage),
        (b"identity", compressed(b"x"), MalformedMessage),
        (b"br", compressed(b"x"), Unimplemented),
        (b"gzip", compressed(b"not gzip"), MalformedMessage),
        (b"gzip", compressed(gzip.compress(b"hello", mtime=0)[:-9]), MalformedMessage),
        (b"", b"\2\0\0\0\0", MalformedMessage),
    ],
)
def test_a_frame_that_cannot_be_understood_is_refused(
    encoding: bytes, body: bytes, error: type[MnemosyneError]
) -> None:
    with pytest.raises(error):
        reader(encoding).feed(body)


def test_a_stream_that_ends_within_a_frame_is_refused() -> None:
    frames = reader()
    frames.feed(framed(b"abc")[:-1])

    with pytest.raises(MalformedMessage, match="ends within a message"):
        frames.end()


@pytest.mark.fuzz
@given(st.binary(max_size=200))
def test_no_bytes_do_worse_than_be_refused(junk: bytes) -> None:
    frames = reader(b"gzip")
    try:
        frames.feed(junk)
        frames.end()
    except (MalformedMessage, MessageTooLarge):
        pass


def test_a_body_announces_its_length() -> None:
    assert announced_bytes(b"\0\0\0\1\0") == 5 + 256
    assert announced_bytes(b"\0\0\0\0\1abcdef") == 11
    assert announced_bytes(b"") == 5


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(b"1H", 3600), (b"2M", 120), (b"3S", 3), (b"250m", 0.25), (b"9u", 9e-6), (b"99999999n", 0.099999999)],
)
def test_timeouts_are_read(value: bytes, seconds: float) -> None:
    assert timeout_s(value) == pytest.approx(seconds)
    assert has_time(value)
    assert not has_time(b"0" + value[-1:])


@pytest.mark.parametrize("value", [b"", b"1", b"S", b"-1S", b"123456789S", b"1.5S", b"1s", b" 1S"])
def test_malformed_timeouts_are_refused(value: bytes) -> None:
    with pytest.raises(InvalidArgument):
        timeout_s(value)
    assert not has_time(value)


@given(st.text())
def test_status_messages_are_ascii_and_say_the_same(text: str) -> None:
    encoded = status_message(text)

    assert all(0x20 <= byte <= 0x7E for byte in encoded)
    assert unquote(encoded.decode()) == text
