from __future__ import annotations

from dataclasses import replace

import pytest

from mnemosyned.errors import CorruptSession
from mnemosyned.sessions import bag, damage
from mnemosyned.sessions.bag import DEFAULT_LIMITS
from mnemosyned.sessions.damage_log import shown
from mnemosyned.sessions.model import DamagedSession, Session

END_OF_TIME_US = 253_402_300_800_000_000  # the year 10000
HASH = "\0" + "0a" * 36
HEALTHY = Session(
    access_token="t",
    subject_id="s",
    subject_client="",
    refresh_token="",
    bag=bag.encode({"k": "v"}),
    expires_at_us=END_OF_TIME_US - 1,
)


def test_a_healthy_session_is_returned_as_it_is() -> None:
    assert damage.checked(HEALTHY, DEFAULT_LIMITS) is HEALTHY


def test_a_bag_of_the_go_daemon_is_converted() -> None:
    gob = bytes.fromhex("127f0401010342616701ff8000010c010c000008ff800001016b0176")

    assert damage.checked(replace(HEALTHY, bag=gob), DEFAULT_LIMITS) == HEALTHY


@pytest.mark.parametrize(
    "field",
    [
        {"subject_id": "s" * 2049},
        {"subject_id": "ż" * 1025},
        {"subject_id": "a\0b"},
        {"subject_client": "c" * 65_537},
        {"subject_client": "\0"},
        {"refresh_token": "r" * 2049},
        {"bag": b"\x12\x05ADMIN"},
    ],
)
def test_a_session_that_cannot_have_been_started_is_not_believed(field: dict[str, object]) -> None:
    with pytest.raises(CorruptSession) as caught:
        damage.checked(replace(HEALTHY, **field), DEFAULT_LIMITS)  # type: ignore[arg-type]  # a Session's field

    assert str(caught.value).startswith("mnemosyned: storage: ")
    assert "ADMIN" not in str(caught.value)


@pytest.mark.parametrize(
    ("stored_us", "shown_us"),
    [(END_OF_TIME_US, END_OF_TIME_US - 1), (2**63 + 946_684_800_000_000, END_OF_TIME_US - 1), (-(2**63), 0)],
)
def test_an_expiry_beyond_what_an_answer_can_hold_is_the_nearest_that_it_can(
    stored_us: int, shown_us: int
) -> None:
    checked = damage.checked(replace(HEALTHY, expires_at_us=stored_us), DEFAULT_LIMITS)

    assert checked == replace(HEALTHY, expires_at_us=shown_us)


@pytest.mark.parametrize("token", ["", "\0", "a\0b", "t" * 4097, HASH[:-1], HASH + "0"])
def test_a_session_that_no_call_can_name_is_damaged(token: str) -> None:
    found = damage.nameable(replace(HEALTHY, access_token=token))

    assert isinstance(found, DamagedSession)
    assert token not in shown(token) or not token


def test_a_session_with_a_token_or_a_hash_can_be_named() -> None:
    for token in ("t", HASH, "hmac:" + HASH[1:]):
        session = replace(HEALTHY, access_token=token)
        assert damage.nameable(session) is session


def test_a_hashed_session_is_shown_by_its_session_id_and_a_token_never() -> None:
    assert shown(HASH) == "hmac:" + HASH[1:]
    assert "secret" not in shown("secret")
