from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mnemosynerpc.session_pb2 import ListResponse
from mnemosynerpc.session_pb2 import Session as Wire

from aio.steps import finished
from mnemosyned.errors import CorruptSession
from mnemosyned.sessions import bag, damage
from mnemosyned.sessions.columns import SessionColumns, tokens_of
from mnemosyned.sessions.model import SHORT_FIELD_BYTES, DamagedSession, Session
from mnemosyned.sessions.page_response import PageResponse

YEAR_9999_US = 253_402_300_799_999_999
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=100)
SESSIONS = st.builds(
    Session,
    access_token=TEXTS.filter(bool),
    subject_id=TEXTS,
    subject_client=TEXTS,
    refresh_token=TEXTS,
    bag=st.dictionaries(TEXTS, TEXTS, max_size=5).map(bag.encode),
    expires_at_us=st.integers(0, YEAR_9999_US),
)


def stored(number: int, **fields: object) -> Session:
    given_fields: dict[str, object] = {
        "access_token": f"token {number}",
        "subject_id": "subject",
        "subject_client": "",
        "refresh_token": "refresh",
        "bag": bag.encode({"a": "1"}),
        "expires_at_us": 2_000_000_000_000_000 + number * 500_001,
    }
    return Session(**{**given_fields, **fields})  # type: ignore[arg-type]


def columns_of(sessions: Sequence[Session]) -> SessionColumns:
    columns = SessionColumns.of(sessions)
    assert columns is not None
    return columns


def wire(session: Session) -> Wire:
    made = Wire.FromString(session.bag)
    made.access_token, made.subject_id = session.access_token, session.subject_id
    made.subject_client, made.refresh_token = session.subject_client, session.refresh_token
    made.expire_at.FromMicroseconds(session.expires_at_us)
    return made


@given(st.lists(SESSIONS, min_size=1, max_size=5))
def test_both_ways_encode_what_protobuf_would(sessions: list[Session]) -> None:
    by_columns, one_by_one = PageResponse(max_bytes=10**6), PageResponse(max_bytes=10**6)

    assert damage.are_ordinary(columns_of(sessions))
    assert by_columns.add_ordinary(columns_of(sessions))
    finished(one_by_one.add(sessions))

    for response in (by_columns, one_by_one):
        encoded = response.finished(is_cut=False, next_token=str)
        assert ListResponse.FromString(encoded) == ListResponse(
            sessions=map(wire, sessions), next_page_token=str(len(sessions))
        )


@pytest.mark.parametrize(
    "fields",
    [
        {"access_token": ""},
        {"access_token": "a\0b"},
        {"subject_id": "a\0b"},
        {"subject_client": "x" * (SHORT_FIELD_BYTES + 1)},
        {"refresh_token": "x" * (SHORT_FIELD_BYTES + 1)},
        {"expires_at_us": -1},
        {"expires_at_us": YEAR_9999_US + 1},
        {"bag": b"\x1a\x03web"},
    ],
)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_one_session_that_is_not_ordinary_is_met_wherever_it_is(at: int, fields: dict[str, object]) -> None:
    sessions = [stored(1), stored(2)]

    assert damage.are_ordinary(columns_of(sessions))
    sessions.insert(at, stored(3, **fields))
    assert not damage.are_ordinary(columns_of(sessions))


def test_columns_are_a_sequence_of_their_sessions() -> None:
    sessions = [stored(number) for number in range(5)]
    columns = columns_of(sessions)

    assert list(columns) == sessions
    assert list(columns[1:3]) == sessions[1:3]
    assert columns_of(columns) is columns
    assert tokens_of(columns) == tokens_of(sessions) == [b"token %d" % number for number in range(5)]


def test_damaged_sessions_have_no_columns() -> None:
    assert SessionColumns.of([stored(1), DamagedSession(access_token="t", reason="r")]) is None
    # As a storage has it whose keys are any bytes.
    assert SessionColumns.of([stored(1, access_token="\udcff")]) is None


def test_what_is_damaged_is_left_out_and_counted() -> None:
    found = [stored(1), CorruptSession("mnemosyned: storage: damaged"), stored(2)]

    def listed(max_bytes: int) -> ListResponse:
        response = PageResponse(max_bytes=max_bytes)
        finished(response.add(found))
        return ListResponse.FromString(
            response.finished(is_cut=False, next_token=lambda count: f"after {count}")
        )

    whole, cut = listed(1000), listed(1)

    assert [one.access_token for one in whole.sessions] == ["token 1", "token 2"]
    assert (whole.left_out, whole.truncated) == (1, False)
    assert (len(cut.sessions), cut.left_out, cut.truncated) == (1, 1, True)
    assert (whole.next_page_token, cut.next_page_token) == ("after 3", "after 2")


def test_a_part_that_does_not_fit_is_added_session_by_session() -> None:
    sessions = [stored(number) for number in range(10)]
    response = PageResponse(max_bytes=300)

    assert not response.add_ordinary(columns_of(sessions))
    finished(response.add(sessions))

    found = ListResponse.FromString(response.finished(is_cut=False, next_token=lambda _: ""))
    assert response.is_full
    assert found.truncated
    assert 1 < len(found.sessions) == response.count < 10
    assert found.ByteSize() <= 300
