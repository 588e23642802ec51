from __future__ import annotations

import os
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest

from mnemosyned.errors import InvalidArgument
from mnemosyned.sessions.model import Criteria, Session
from mnemosyned.sessions.page_token import (
    NOTHING,
    PageToken,
    Shown,
    _digest_of,
    after_first,
    after_keyed,
    between,
)
from mnemosyned.sessions.store import KeyedPage, Page

EVERYTHING = Criteria()
SALT = b"8 bytes."
OTHERS = [
    Criteria(refresh_token="r"),
    Criteria(subject_id="r"),
    Criteria(expires_after_us=1),
    Criteria(expires_before_us=1),
    Criteria(expires_after_us=1, expires_before_us=1),
]


def session(token: str) -> Session:
    return Session(
        access_token=token, subject_id="s", subject_client="", refresh_token="", bag=b"", expires_at_us=1
    )


def parsed(text: str, criteria: Criteria = EVERYTHING) -> PageToken:
    return PageToken.parse(text, criteria)


@pytest.mark.parametrize("start", [b"", b"\0\xff", b"a" * 4098])
@pytest.mark.parametrize("shown", [[], [b"a"], [b"t%d" % number for number in range(1000)]])
def test_a_token_is_read_as_it_was_written(start: bytes, shown: list[bytes]) -> None:
    token = PageToken(start=start, shown=Shown.of(shown, SALT))

    assert parsed(token.encode(EVERYTHING)) == token


def test_the_empty_token_is_the_beginning() -> None:
    assert parsed("") == PageToken()


def test_a_token_is_bound_to_its_query() -> None:
    queries = [EVERYTHING, *OTHERS]
    tokens = [PageToken(start=b"k").encode(query) for query in queries]
    for at, query in enumerate(queries):
        for other, token in enumerate(tokens):
            if at == other:
                assert parsed(token, query).start == b"k"
            else:
                with pytest.raises(InvalidArgument, match="mnemosyned: page_token is none of this query"):
                    parsed(token, query)


@pytest.mark.parametrize(
    "text", ["x", "====", "é", "a b", "A" * 20_000, "AAAA", "AAAAAAAAAAAAAAAAAAAA", "\0"]
)
def test_what_no_page_had_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="mnemosyned: page_token is none of this query"):
        parsed(text)


def test_a_changed_token_is_refused_wherever_it_was_changed() -> None:
    raw = urlsafe_b64decode(
        PageToken(start=b"key.", shown=Shown.of([b"a", b"b"], SALT)).encode(EVERYTHING) + "=="
    )
    for at in range(len(raw)):
        changed = raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]
        for one in (changed, raw[:at]):
            if one:
                with pytest.raises(InvalidArgument):
                    parsed(urlsafe_b64encode(one).decode().rstrip("="))


@pytest.mark.parametrize("content", [b"", b"\0", b"\0\1salt....7 bytes", b"\xff\xff" + b"x" * 1000])
def test_a_forged_token_with_a_count_beyond_its_end_is_refused(content: bytes) -> None:
    forged = urlsafe_b64encode(_digest_of(EVERYTHING, content) + content)

    with pytest.raises(InvalidArgument):
        parsed(forged.decode().rstrip("="))


def test_what_was_shown_is_known_and_nothing_else() -> None:
    shown = [b"t%d" % number for number in range(1000)] + [b"\xff"]
    is_shown = parsed(PageToken(shown=Shown.of(shown, SALT)).encode(EVERYTHING)).shown.finder()

    assert all(map(is_shown, shown))
    assert not any(is_shown(b"u%d" % number) for number in range(10_000))
    assert not PageToken().shown.finder()(b"t1")


def test_what_is_shown_looks_different_with_each_salt() -> None:
    one, other = (Shown.of([b"a", b"b"], salt) for salt in (b"01234567", b"01234568"))

    assert one.digests[:8] != other.digests[:8]
    assert one.digests[8:] != other.digests[8:]
    assert all(map(one.finder(), [b"a", b"b"]))
    assert not any(map(replace(one, salt=other.salt).finder(), [b"a", b"b"]))


def test_no_first_page_has_a_token_that_has_a_whole_token_of_a_session() -> None:
    tokens = [os.urandom(64).hex() for _ in range(10)]
    following = after_first(EVERYTHING, Page(sessions=[*map(session, tokens)], is_cut=False), salt=SALT)
    raw = urlsafe_b64decode(following.token(10) + "===")

    assert not any(token.encode()[:8] in raw for token in tokens)


def test_what_lies_between_two_keys_is_short_and_separates_them() -> None:
    random = Random(3)  # no secret
    keys = sorted({random.choice([b"", b"k"]) + random.randbytes(random.randint(1, 4)) for _ in range(3000)})
    for last, following in pairwise(keys):
        found = between(last, following)
        assert last < found <= following
        assert following.startswith(found)
    tokens = sorted(os.urandom(64).hex().encode() for _ in range(1000))
    assert max(len(between(*pair)) for pair in pairwise(tokens)) < 20


def test_keys_that_look_the_same_are_passed() -> None:
    assert between(b"k", b"k") == b"k\0"
    assert between(b"k", b"ka") == b"ka"


def test_the_last_first_page_has_no_token() -> None:
    found = [session("a"), session("b")]
    last = Page(sessions=found, is_cut=False, is_last=True)

    assert after_first(EVERYTHING, last, salt=SALT).token(2) == ""
    # The response is full before.
    assert after_first(EVERYTHING, last, salt=SALT).token(1)
    assert after_first(EVERYTHING, Page(sessions=found, is_cut=False), salt=SALT).token(2)
    assert after_first(EVERYTHING, Page(sessions=[], is_cut=False, is_last=True), salt=SALT).token(0) == ""
    assert NOTHING.token(2) == ""


def test_a_page_goes_on_where_its_response_ended() -> None:
    keys = [b"a1", b"b2", b"c3"]
    page = KeyedPage(sessions=[session(key.decode()) for key in keys], keys=keys, next_key=b"d", is_cut=False)
    token = PageToken(start=b"a", shown=Shown.of([b"z"], SALT))
    following = after_keyed(EVERYTHING, token, page)
    starts = [parsed(following.token(count)).start for count in (1, 2, 3)]

    assert starts == [b"b", b"c", b"d"]
    assert parsed(following.token(3)).shown == token.shown
    last = KeyedPage(sessions=page.sessions, keys=keys, next_key=None, is_cut=False)
    assert after_keyed(EVERYTHING, token, last).token(3) == ""
    assert parsed(after_keyed(EVERYTHING, token, last).token(2)).start == b"c"


def test_a_token_is_never_longer_than_was_said_before() -> None:
    for count in (0, 1, 10, 1000):
        tokens = [os.urandom(64).hex() for _ in range(count)]
        page = Page(sessions=[*map(session, tokens)], is_cut=False)
        following = after_first(EVERYTHING, page, salt=SALT)
        token = parsed(following.token(count))
        assert len(following.token(count)) <= following.most_bytes
        keys = [b"k" * 4097]
        keyed = KeyedPage(sessions=[session("k")], keys=keys, next_key=b"k" * 4098, is_cut=False)
        after = after_keyed(EVERYTHING, token, keyed)
        assert len(after.token(1)) <= after.most_bytes
        assert parsed(after.token(1)).start == keyed.next_key
