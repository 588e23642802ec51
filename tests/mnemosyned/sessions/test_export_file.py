"""The file of `mnemosyned export`: what is written is read as it was, and nothing else is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from secrecy import CANARY

from mnemosyned.sessions import bag
from mnemosyned.sessions.bag import BagLimits
from mnemosyned.sessions.export_file import MAX_LINE_BYTES, BadExport, Header, Reader, Summary, Writer
from mnemosyned.sessions.model import Session

HEADER = Header(engine="postgres", version="1.2.3", exported_at_us=1_700_000_000_000_001, hmac_key_ids=())
HASH = "\0" + "0a" * 36
# {"k": "v"}, as the Go daemon stores it.
GOB = bytes.fromhex("127f0401010342616701ff8000010c010c0000") + bytes.fromhex("08ff800001016b0176")
EXPIRY_US = 1_800_000_000_000_001


def session(key: str = "t", **fields: object) -> Session:
    values = {
        "subject_id": "s",
        "subject_client": "",
        "refresh_token": "",
        "bag": b"",
        "expires_at_us": EXPIRY_US,
    }
    return Session(access_token=key, **(values | fields))  # type: ignore[arg-type]


def file_of(*sessions: Session, header: Header = HEADER) -> list[bytes]:
    writer = Writer()
    lines = [writer.header(header), *map(writer.session, sessions), writer.end(expired=3, damaged=2)]
    return [line.encode("ascii") for line in lines]


def read(lines: list[bytes]) -> list[Session]:
    return list(Reader(limits=BagLimits()).sessions(lines))


def signed(*lines: bytes) -> list[bytes]:
    """Lines with an end that fits, as another program may write them."""
    digest = hashlib.sha256(b"".join(lines)).hexdigest()
    end = {"sessions": len(lines) - 1, "sha256": digest, "expired": 0, "damaged": 0}
    return [*lines, json.dumps({"end": end}).encode() + b"\n"]


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=50)
bags = st.dictionaries(texts, texts, max_size=5).map(bag.encode) | st.just(GOB)


@given(
    st.builds(
        session,
        texts.filter(bool) | st.just(HASH),
        subject_id=texts,
        subject_client=texts,
        refresh_token=st.text(st.characters(exclude_categories=("Cs",)), max_size=50),
        bag=bags,
        expires_at_us=st.integers(1, 253_402_300_799_999_999),
    )
)
def test_a_session_comes_out_as_it_went_in(one: Session) -> None:
    assert read(file_of(one)) == [one]


def test_header_and_summary_are_read() -> None:
    reader = Reader(limits=BagLimits())

    sessions = list(reader.sessions(file_of(session(HASH), session("a"), session("b"))))

    assert [one.access_token for one in sessions] == [HASH, "a", "b"]
    assert reader.header == HEADER
    assert reader.summary == Summary(sessions=3, expired=3, damaged=2)


def test_a_person_can_read_the_file() -> None:
    lines = file_of(session(bag=bag.encode({"ключ": "v"}), refresh_token="r"), session("u", bag=GOB))

    assert json.loads(lines[1]) == {
        "session": {
            "access_token": "t",
            "subject_id": "s",
            "expire_at": "2027-01-15T08:00:00.000001Z",
            "refresh_token": "r",
            "bag": {"ключ": "v"},
        }
    }
    assert set(json.loads(lines[2])["session"]) == {"access_token", "subject_id", "expire_at", "bag_base64"}
    assert hashlib.sha256(b"".join(lines[:-1])).hexdigest() == json.loads(lines[-1])["end"]["sha256"]


def test_an_expiry_after_every_year_becomes_the_last_one() -> None:
    (read_back,) = read(file_of(session(expires_at_us=2**62)))

    assert read_back.expires_at_us == 253_402_300_799_999_999


def test_the_longest_session_fits_into_a_line() -> None:
    longest = session("\x01" * 4096, subject_client="\x01" * 65536, bag=bag.encode({"k": "\x01" * 3_999_900}))

    lines = file_of(longest)

    assert len(lines[1]) < MAX_LINE_BYTES
    assert read(lines) == [longest]


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_a_file_that_was_cut_between_lines_is_recognised(kept: int) -> None:
    lines = file_of(session("a"), session("b"))

    with pytest.raises(BadExport, match=f"cut off after line {kept}: its last line is missing"):
        read(lines[:kept])


def test_a_file_that_was_cut_anywhere_is_recognised() -> None:
    whole = b"".join(file_of(session("a"), session("b")))

    for length in range(len(whole)):
        with pytest.raises(BadExport):
            read(whole[:length].splitlines(keepends=True))


def test_a_change_of_any_byte_is_recognised() -> None:
    whole = b"".join(file_of(session("a", bag=bag.encode({"k": "v"})), session("b")))
    end = whole.rindex(b'"expired"')

    for at in range(end):
        changed = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        with pytest.raises(BadExport):
            read(changed.splitlines(keepends=True))


def test_lines_in_another_sequence_are_refused() -> None:
    with pytest.raises(BadExport, match="line 3: the session is not behind the one before it"):
        read(file_of(session("b"), session("a")))
    with pytest.raises(BadExport, match="line 3: the session is not behind the one before it"):
        read(file_of(session("a"), session("a")))


def test_another_format_is_refused_by_its_number() -> None:
    lines = signed(file_of()[0].replace(b'"format":1', b'"format":2'))

    with pytest.raises(BadExport, match="the file has format 2, and this version reads format 1 only"):
        read(lines)


@pytest.mark.parametrize(
    "line", [b"", b"\n", b"[]\n", b"{}\n", b'{"a":1}\n', b'{"session":{}}\n', b"\xff\n", b'{"header":{}}\n']
)
def test_what_is_no_such_file_is_told_so(line: bytes) -> None:
    with pytest.raises(BadExport, match=r"it is no file of mnemosyned export|has no content|its last line"):
        read([line] if line else [])


def changed(**members: object) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda content: {key: value for key, value in (content | members).items() if value is not None}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (changed(access_token=None), "access_token is missing, or not a text"),
        (changed(access_token=7), "access_token is missing, or not a text"),
        (changed(access_token=""), "access_token is none that a call can name"),
        (changed(access_token="a\0b"), "access_token is none that a call can name"),
        (changed(access_token="\ud800"), "access_token is not Unicode"),
        (changed(refresh_token="\ud800"), "refresh_token is not Unicode"),
        (changed(access_token_hmac="hmac:00"), "access_token_hmac is none, or stands beside a token"),
        (changed(subject_id=None), "subject_id is missing, or not a text"),
        (changed(subject_id="a\0b"), "subject_id contains a NUL character"),
        (changed(subject_id="x" * 3000), "subject_id is longer than 2048 bytes"),
        (changed(expire_at="tomorrow"), "expire_at is no time with its zone"),
        (changed(expire_at="2030-01-01T00:00:00"), "expire_at is no time with its zone"),
        (changed(bag=["k"]), "bag is not an object of texts"),
        (changed(bag={"k": 1}), "bag is not an object of texts"),
        (changed(bag={"k": "\ud800"}), "its bag cannot be read"),
        (changed(bag={}, bag_base64=""), "two bags"),
        (changed(bag_base64="?"), "its bag cannot be read"),
        (changed(bag_base64="AAAA"), "a bag has a field that no bag has"),
        (changed(created_at="now"), "the session has a member that this version does not know"),
    ],
)
def test_a_bad_session_is_named_by_its_line_without_its_content(
    change: Callable[[dict[str, Any]], dict[str, Any]], complaint: str
) -> None:
    header, first, second, _ = file_of(session("a"), session(CANARY, refresh_token=CANARY))
    content = json.loads(second)["session"]
    line = json.dumps({"session": change(content)}).encode() + b"\n"

    with pytest.raises(BadExport) as caught:
        read(signed(header, first, line))

    assert str(caught.value) == f"line 3: {complaint}"
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{\n", "it is not one JSON object"),
        (b"7\n", "it is not one JSON object"),
        (b"[" * 100_000 + b"\n", "it is not one JSON object"),
        (b'{"session":{},"more":{}}\n', "it is not one JSON object"),
        (b'{"session":7}\n', "it has no content"),
        (b'{"event":{}}\n', "a kind of line that this version does not know"),
        (file_of()[0], "a second header"),
        (b"x" * MAX_LINE_BYTES, "it is too long"),
        (b'{"session":{}', "the file is cut off here"),
        (
            b'{"end":{"sessions":true,"sha256":"","expired":0,"damaged":0}}\n',
            "sessions is no number of sessions",
        ),
        (
            b'{"end":{"sessions":0,"sha256":"","expired":-1,"damaged":0}}\n',
            "expired is no number of sessions",
        ),
    ],
)
def test_a_bad_line_is_named_by_its_number(line: bytes, complaint: str) -> None:
    with pytest.raises(BadExport, match=f"^line 2: {complaint}$"):
        read(signed(file_of()[0], line))


def test_nothing_may_follow_the_last_line() -> None:
    with pytest.raises(BadExport, match="line 3: something follows the last line"):
        read([*file_of(), b"\n"])
