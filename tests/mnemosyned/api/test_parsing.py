from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st
from mnemosynerpc.session_pb2 import (
    DeleteRequest,
    GetRequest,
    ListRequest,
    Session,
    SetValueRequest,
    StartRequest,
)

from aio.steps import finished
from mnemosyned.api.parsing import parsed, parsing
from mnemosyned.errors import InvalidArgument, MalformedMessage, MnemosyneError

LARGE = "x" * 20_000
BAG = {f"key-{number}": "ż" * (number % 300) for number in range(3000)}
REQUESTS: list[Message] = [
    StartRequest(session=Session(subject_id="s", bag=BAG, refresh_token="r", access_token=LARGE)),
    StartRequest(session=Session(subject_id="s", bag={"k": LARGE * 10, LARGE: "", "": ""})),
    StartRequest(),
    GetRequest(access_token=LARGE),
    SetValueRequest(access_token="t", key=LARGE, value=LARGE * 100),
    DeleteRequest(access_token=LARGE, subject_id=LARGE),
    ListRequest(limit=2**40, query={"refresh_token": LARGE, "expire_at_from": {"seconds": -5}}),
]


def steps_of(request: Callable[[], Message], data: bytes, *, max_entries: int = 10_000) -> Message:
    return finished(parsing(request, data, max_entries=max_entries))


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda it: type(it).__name__)
def test_a_request_in_steps_is_what_the_parser_makes_of_the_whole(request_: Message) -> None:
    assert steps_of(type(request_), request_.SerializeToString()) == request_


def test_what_comes_twice_is_merged() -> None:
    first = StartRequest(session=Session(subject_id="a", bag={"k": LARGE, "l": "1"}))
    second = StartRequest(session=Session(access_token="t", bag={"k": LARGE + "2"}))
    both = first.SerializeToString() + second.SerializeToString()

    assert steps_of(StartRequest, both) == parsed(StartRequest, both)


@pytest.mark.fuzz
@given(
    st.sampled_from(range(len(REQUESTS))), st.integers(0, 2**31), st.binary(max_size=8), st.integers(0, 20)
)
def test_damage_is_found_as_by_the_parser(number: int, at: int, junk: bytes, cut: int) -> None:
    request_ = REQUESTS[number]
    data = request_.SerializeToString()
    at %= len(data) + 1
    damaged = data[:at] + junk + data[at + cut :]
    try:
        wanted: Message | None = type(request_).FromString(damaged)  # type: ignore[attr-defined]  # of all
    except DecodeError:
        wanted = None
    try:
        found: Message | None = steps_of(type(request_), damaged)
    except (MalformedMessage, InvalidArgument):
        found = None

    # Groups and very many fields are refused, which no request has.
    assert found == wanted or found is None


def entries(count: int) -> bytes:
    return StartRequest(session=Session(bag={f"{n:x}": "" for n in range(count)})).SerializeToString()


def nested(body: bytes, tag: bytes) -> bytes:
    length = bytes((len(body) & 127 | 128, len(body) >> 7 & 127 | 128, len(body) >> 14))
    return tag + length + body


# Each is made when its test runs: the largest takes seconds.
TOO_MUCH: dict[str, tuple[Callable[[], Message], Callable[[], bytes], str]] = {
    "entries": (StartRequest, lambda: entries(300_000), "bag would have more than 10000 entries"),
    "fields": (GetRequest, lambda: b"\x0a\0" * 2_000_000, "more than 1000 fields"),
    "unknown fields": (StartRequest, lambda: b"\x78\1" * 2_000_000, "more than 1000 fields"),
    "fields of an entry": (
        StartRequest,
        lambda: nested(nested(b"\x0a\0" * 500_000, b"\x22"), b"\x0a"),
        "more than 1000 fields",
    ),
    "fields of a query": (ListRequest, lambda: nested(b"\x1a\0" * 500_000, b"\x5a"), "more than 1000 fields"),
    "fields with long tags": (StartRequest, lambda: nested(b"\xa2\x80\0\0" * 200_000, b"\x0a"), "more than"),
    "groups": (StartRequest, lambda: b"\x7b\x7c" * 2_000_000, "not a valid mnemosynerpc.StartRequest"),
}


@pytest.mark.parametrize("kind", TOO_MUCH)
def test_a_request_with_too_much_is_refused_before_it_is_parsed(kind: str) -> None:
    request_type, encode, complaint = TOO_MUCH[kind]
    data = encode()
    began_s = time.thread_time()
    with pytest.raises(MnemosyneError, match=complaint):
        steps_of(request_type, data)

    # 300,000 entries took 2 s.
    assert time.thread_time() - began_s < 0.2


def test_the_limit_of_entries_is_the_flags() -> None:
    data = StartRequest(
        session=Session(subject_id=LARGE, bag={"a": "", "b": "", "c": ""})
    ).SerializeToString()

    assert len(steps_of(StartRequest, data, max_entries=3).session.bag) == 3  # type: ignore[attr-defined]
    with pytest.raises(InvalidArgument, match="more than 2 entries"):
        steps_of(StartRequest, data, max_entries=2)


def test_a_large_bag_is_parsed_in_many_steps() -> None:
    steps = parsing(StartRequest, entries(10_000), max_entries=10_000)

    assert sum(1 for _ in steps) > 50
