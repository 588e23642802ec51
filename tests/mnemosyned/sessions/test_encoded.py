from __future__ import annotations

from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st
from mnemosynerpc.session_pb2 import GetResponse
from mnemosynerpc.session_pb2 import Session as Wire

from mnemosyned.sessions import bag
from mnemosyned.sessions.encoded import (
    SHARED_BYTES,
    EncodedSession,
    ExpiryField,
    joined,
    varint,
)
from mnemosyned.sessions.model import Session

YEAR_9999_US = 253_402_300_799_999_999


def stored(expires_at_us: int, values: dict[str, str]) -> Session:
    return Session(
        access_token="token",
        subject_id="subject",
        subject_client="client",
        refresh_token="refresh",
        bag=bag.encode(values),
        expires_at_us=expires_at_us,
    )


@given(st.integers(0, YEAR_9999_US), st.integers(0, YEAR_9999_US), st.dictionaries(st.text(), st.text()))
def test_a_response_is_what_protobuf_would_make_whatever_the_expiry(
    first_us: int, second_us: int, values: dict[str, str]
) -> None:
    encoded = EncodedSession(stored(first_us, values))

    for expires_at_us in (first_us, second_us):
        session = GetResponse.FromString(
            joined(encoded.response(ExpiryField().encode(expires_at_us)))
        ).session
        assert session.expire_at.ToMicroseconds() == expires_at_us
        session.ClearField("expire_at")
        assert session == Wire(
            access_token="token",
            subject_id="subject",
            subject_client="client",
            refresh_token="refresh",
            bag=values,
        )


def test_the_bytes_of_a_large_session_are_shared_by_its_responses() -> None:
    encoded = EncodedSession(stored(0, {"k": "x" * SHARED_BYTES}))
    first, second = (encoded.response(ExpiryField().encode(instant_us)) for instant_us in (1, 2_000_000))

    assert max(first, key=len) is max(second, key=len)
    session = GetResponse.FromString(joined(second)).session
    assert session.expire_at.ToMicroseconds() == 2_000_000
    assert len(session.bag["k"]) == SHARED_BYTES
    assert encoded.size_bytes < 1.1 * SHARED_BYTES


def test_the_last_expiry_is_encoded_once() -> None:
    field = ExpiryField()

    assert field.encode(5_000) is field.encode(5_000)
    assert field.encode(6_000) == ExpiryField().encode(6_000)


@given(st.integers(0, YEAR_9999_US), st.integers(0, 2_000_000))
def test_an_expiry_is_encoded_as_protobuf_does(first_us: int, more_us: int) -> None:
    field = ExpiryField()
    for expires_at_us in (first_us, min(first_us + more_us, YEAR_9999_US)):
        timestamp = Timestamp()
        timestamp.FromMicroseconds(expires_at_us)
        wanted = Wire(expire_at=timestamp).SerializeToString()
        if expires_at_us >= 1_000_000:
            assert field.encode(expires_at_us) == wanted
        else:
            # The seconds are there even if they are 0.
            assert Wire.FromString(field.encode(expires_at_us)) == Wire.FromString(wanted)


def test_an_entry_costs_at_least_its_bytes() -> None:
    assert EncodedSession(stored(0, {"k": "x" * 10_000})).size_bytes > 10_000


@given(st.integers(0, 2**64 - 1))
def test_varints_are_those_of_protobuf(value: int) -> None:
    decoded = sum((byte & 0x7F) << (7 * at) for at, byte in enumerate(varint(value)))

    assert decoded == value
