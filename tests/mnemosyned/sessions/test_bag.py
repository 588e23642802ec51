from __future__ import annotations

from random import Random

import damaged
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mnemosynerpc.session_pb2 import Session

from aio.steps import finished
from mnemosyned.errors import InvalidArgument
from mnemosyned.sessions import bag

HEADER = "127f0401010342616701ff8000010c010c0000"
GOB_VECTORS = [
    ({}, HEADER + "04ff800000"),
    ({"k": "v"}, HEADER + "08ff800001016b0176"),
    ({"": ""}, HEADER + "06ff8000010000"),
    (
        {"username": "johnsnow@gmail.com"},
        HEADER + "20ff80000108757365726e616d65126a6f686e736e6f7740676d61696c2e636f6d",
    ),
    ({"zażółć": "日本語"}, HEADER + "19ff8000010a7a61c5bcc3b3c582c48709e697a5e69cace8aa9e"),
    ({"a": "1", "b": "2"}, HEADER + "0cff8000020161013101620132"),
    ({"long": "x" * 300}, HEADER + "fe0138ff800001046c6f6e67fe012c" + "78" * 300),
]


@pytest.mark.parametrize(("values", "stored"), GOB_VECTORS)
def test_bags_of_the_go_daemon_are_read(values: dict[str, str], stored: str) -> None:
    assert bag.is_gob(bytes.fromhex(stored))
    assert bag.decode(bytes.fromhex(stored)) == values


@given(st.dictionaries(st.text(), st.text()))
def test_what_is_written_is_read_back(values: dict[str, str]) -> None:
    stored = bag.encode(values)

    assert bag.decode(stored) == values
    assert not bag.is_gob(stored)


def test_our_own_form_is_spliced_into_a_session_without_parsing() -> None:
    stored = bag.encode({"k": "v"})

    assert bag.checked_fields(stored) is stored
    assert dict(Session.FromString(b"\x0a\x01t" + stored).bag) == {"k": "v"}


def test_a_gob_bag_is_converted_for_a_session() -> None:
    fields = bag.checked_fields(bytes.fromhex(GOB_VECTORS[1][1]))

    assert dict(Session.FromString(fields).bag) == {"k": "v"}


@pytest.mark.parametrize(("_", "stored"), GOB_VECTORS)
def test_a_damaged_gob_bag_is_refused_and_never_misread(_: dict[str, str], stored: str) -> None:
    whole = bytes.fromhex(stored)

    for size in range(1, len(whole)):
        with pytest.raises(bag.CorruptSession):
            bag.decode(whole[:size])
    with pytest.raises(bag.CorruptSession):
        bag.decode(whole + b"\0")


@pytest.mark.fuzz
@given(st.binary(max_size=80))
def test_no_bytes_after_the_header_do_worse_than_be_refused(junk: bytes) -> None:
    try:
        values = bag.decode(bytes.fromhex(HEADER) + junk)
    except bag.CorruptSession:
        return
    assert all(isinstance(text, str) for pair in values.items() for text in pair)


@pytest.mark.parametrize(
    "stored",
    [
        b"\x0a\x01t\xff",  # not protobuf
        bytes.fromhex(HEADER + "0bff8000f77fffffffffffffff"),  # a number of nine bytes
        bytes.fromhex(HEADER + "05ff80007f00"),  # more pairs than its bytes could hold
        bytes.fromhex(HEADER + "05ff80000000"),  # bytes left over
        bytes.fromhex(HEADER + "08ff81ff01016b0176"),  # another type
        bytes.fromhex(HEADER + "08ff80000101ff0176"),  # not UTF-8
    ],
)
def test_bytes_that_no_daemon_wrote_are_refused(stored: bytes) -> None:
    with pytest.raises(bag.CorruptSession):
        bag.decode(stored)


def test_a_value_is_set_in_either_form_and_the_result_is_our_own() -> None:
    values, stored = bag.with_value(bytes.fromhex(GOB_VECTORS[5][1]), "b", "3", max_entries=3)

    assert values == {"a": "1", "b": "3"}
    assert bag.decode(stored) == values
    assert not bag.is_gob(stored)


def test_a_bag_stays_small_enough_for_a_client_to_read() -> None:
    with pytest.raises(InvalidArgument, match="bag is longer than 4000000 bytes"):
        bag.with_value(b"", "k", "x" * 4_000_000, max_entries=3)


def test_a_full_bag_takes_new_values_but_no_new_keys() -> None:
    stored = bag.encode({"a": "1", "b": "2"})

    assert bag.with_value(stored, "b", "3", max_entries=1)[0] == {"a": "1", "b": "3"}
    with pytest.raises(InvalidArgument, match="bag would have more than 2 entries"):
        bag.with_value(stored, "c", "3", max_entries=2)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"a": "", "b": "", "c": ""}, "bag would have more than 2 entries"),
        ({"żżż": ""}, "bag key is longer than 5 bytes"),
        ({"k": "żżżżż"}, "bag value is longer than 9 bytes"),
    ],
)
def test_a_bag_over_a_limit_is_refused(values: dict[str, str], complaint: str) -> None:
    limits = bag.BagLimits(entries=2, key_bytes=5, value_bytes=9)

    within = {"żżx": "żżżżx", "": ""}
    assert finished(limits.encoding(within)) == bag.encode(within)
    with pytest.raises(InvalidArgument, match=complaint):
        finished(limits.encoding(values))
    assert limits.encoded_at_once(Session(bag=values)) is None


@given(st.dictionaries(st.text(), st.text(), max_size=5), st.integers(0, 40), st.integers(0, 40))
def test_a_small_bag_of_a_message_is_encoded_at_once_within_every_limit(
    values: dict[str, str], key_bytes: int, value_bytes: int
) -> None:
    message = Session(access_token="t", subject_id="s", refresh_token="r", bag=values)
    message.expire_at.seconds = 1
    # A field of a later version of the client.
    message.MergeFromString(b"\x82\x7d\x01x")
    limits = bag.BagLimits(key_bytes=key_bytes, value_bytes=value_bytes)
    stored = bag.encode(values)

    assert bag.DEFAULT_LIMITS.encoded_at_once(message) == stored
    at_once = limits.encoded_at_once(message)
    assert at_once == (stored if len(stored) <= min(key_bytes, value_bytes) else None)
    if at_once is not None:
        assert finished(limits.encoding(values)) == at_once
    assert message.access_token == "t"


@pytest.mark.parametrize("stored", damaged.BAGS.values(), ids=damaged.BAGS)
def test_a_bag_that_no_daemon_wrote_is_refused(stored: bytes) -> None:
    with pytest.raises(bag.CorruptSession):
        bag.checked_fields(stored)
    with pytest.raises(bag.CorruptSession):
        bag.decode(stored)


@pytest.mark.fuzz
@given(
    st.binary(max_size=40) | st.builds(bytes.__add__, st.just(b"\x22\x06\x0a\x01k"), st.binary(max_size=9))
)
def test_what_is_believed_is_a_bag_and_nothing_else(stored: bytes) -> None:
    try:
        fields = bag.checked_fields(stored)
    except bag.CorruptSession:
        return
    assert fields == stored == bag.encode(bag.decode(stored))


@given(st.dictionaries(st.text(), st.text(), max_size=4), st.randoms(use_true_random=False))
def test_entries_may_have_any_sequence(values: dict[str, str], rng: Random) -> None:
    entries = [bag.encode({key: value}) for key, value in values.items()]
    rng.shuffle(entries)

    assert bag.checked_fields(b"".join(entries)) == b"".join(entries)


def test_long_keys_and_values_are_believed() -> None:
    for size in (100, 127, 128, 20_000, 65_000):
        values = {"k" * size: "v" * size, "ż" * (size // 2): ""}
        assert bag.decode(bag.checked_fields(bag.encode(values))) == values


def test_lower_limits_make_no_stored_bag_unreadable_and_higher_ones_allow_more() -> None:
    assert bag.BagLimits(entries=2, key_bytes=1, value_bytes=1).of_stored() == bag.DEFAULT_LIMITS
    assert bag.BagLimits(entries=20_000).of_stored().entries == 20_000
    stored = damaged.BAGS["too many entries"]
    assert bag.checked_fields(stored, bag.BagLimits(entries=20_000)) == stored


def in_steps(limits: bag.BagLimits, values: dict[str, str]) -> bytes:
    assert limits.encoded_at_once(Session(bag=values)) is None
    return finished(limits.encoding(values))


@pytest.mark.parametrize(
    "values",
    [
        {f"ż{number}": "v" * (number % 50) for number in range(3000)},
        {chr(number): "" for number in (*range(1, 0xD800, 97), *range(0xE000, 0x11_0000, 997))},
        {"k": "é" * 300_000, "": "x" * 70_000, "a": ""},
    ],
    ids=["many", "keys of any character", "large"],
)
def test_a_large_bag_in_steps_is_the_same_bag(values: dict[str, str]) -> None:
    stored = in_steps(bag.DEFAULT_LIMITS, values)

    assert stored == bag.encode(values)
    assert sum(1 for _ in bag.encoding(values)) >= 2
    assert bag.decode(stored) == values


@given(st.dictionaries(st.text(max_size=200), st.text(max_size=300), max_size=20), st.text(), st.text())
def test_an_open_bag_knows_its_length(values: dict[str, str], key: str, value: str) -> None:
    opened = finished(bag.opening(bag.encode(values)))
    changed = opened.put(key, value, max_entries=100)

    assert changed == values | {key: value}
    assert opened._size_bytes == len(finished(opened.encoding())) == len(bag.encode(changed))
