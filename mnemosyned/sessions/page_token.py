"""Page tokens of List: where the next page begins. Pure.

    request                  page            its next_page_token
    without a token          by expiry       the least key, and the sessions of this page, as shown
    with an empty token      by stored key   a key after this page
    with a token             by stored key   a key after this page, and what its own token has as shown

Pages after the first go by stored key: the primary key of every engine, and the one thing of a session that
no use changes. So none of the sessions that exist throughout is left out or comes twice, however often they
are extended meanwhile, and a page costs the same wherever it begins. An expiry has neither property. What the
first page has shown, by expiry, is left out of the pages after it: the token has digests of these sessions.

A token begins with a digest of the query and of itself. That is to find mistakes: List is for callers who
may see all sessions, so there is nothing to forge. It names the next page by the fewest bytes that do, and
not by a whole stored key, which may be a session's token.
"""

from __future__ import annotations

import binascii
import json
from base64 import b64decode, urlsafe_b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from hashlib import blake2b
from typing import Final

from mnemosyned.errors import InvalidArgument
from mnemosyned.sessions.columns import tokens_of
from mnemosyned.sessions.model import MAX_LIST_LIMIT, Criteria
from mnemosyned.sessions.store import KeyedPage, Page
from mnemosyned.sessions.token import MAX_TOKEN_BYTES

SALT_BYTES: Final = 8
_DIGEST_BYTES: Final = 8
_COUNT_BYTES: Final = 2
# The digest of the token, the number of digests and their salt.
_HEAD_BYTES: Final = _DIGEST_BYTES + _COUNT_BYTES + SALT_BYTES
# A damaged row may have a longer key than a token may be.
_MAX_START_BYTES: Final = MAX_TOKEN_BYTES + 2
_MAX_BYTES: Final = _HEAD_BYTES + MAX_LIST_LIMIT * _DIGEST_BYTES + _MAX_START_BYTES
_MAX_CHARACTERS: Final = 4 * (_MAX_BYTES + 2) // 3
_FORM: Final = b"list 1"  # another one makes all former tokens invalid
_CRITERIA: Final = tuple(one.name for one in fields(Criteria))
_IN_ONE_FORM: Final = json.JSONEncoder(sort_keys=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """The sessions of a first page, by digests of what List has shown as their tokens.

    The salt is random: so nobody can choose tokens of which one hides the other.
    """

    salt: bytes = b"\0" * SALT_BYTES
    digests: bytes = b""

    @classmethod
    def of(cls, tokens: Sequence[bytes], salt: bytes) -> Shown:
        """Return those with these tokens."""
        digest_of = _digester(salt)
        return cls(salt=salt, digests=b"".join([digest_of(one) for one in tokens]))

    def finder(self) -> Callable[[bytes], bool]:
        """Return what tells whether the session with a token is one of them."""
        digests, digest_of = set(_pieces(self.digests)), _digester(self.salt)
        return (lambda token: digest_of(token) in digests) if digests else lambda _: False


def _digester(salt: bytes) -> Callable[[bytes], bytes]:
    # A copy takes half as long as a new one with its parameters.
    empty = blake2b(digest_size=_DIGEST_BYTES, salt=salt)

    def digest_of(token: bytes) -> bytes:
        own = empty.copy()
        own.update(token)
        return own.digest()

    return digest_of


@dataclass(frozen=True, slots=True, kw_only=True)
class PageToken:
    """Where a page begins, by stored key, and what it leaves out."""

    start: bytes = field(default=b"", repr=False)
    shown: Shown = Shown()

    def encode(self, criteria: Criteria) -> str:
        """Return the text for a response."""
        shown = self.shown
        count = (len(shown.digests) // _DIGEST_BYTES).to_bytes(_COUNT_BYTES)
        content = count + shown.salt + shown.digests + self.start
        return urlsafe_b64encode(_digest_of(criteria, content) + content).decode().rstrip("=")

    @classmethod
    def parse(cls, text: str, criteria: Criteria) -> PageToken:
        """Return what a request has; the empty text is the beginning.

        Raises:
            InvalidArgument: no page of these criteria had this token.
        """
        if not text:
            return cls()
        raw = b"" if len(text) > _MAX_CHARACTERS else _decoded(text)
        content = raw[_DIGEST_BYTES:]
        digests_at = _COUNT_BYTES + SALT_BYTES
        start_at = digests_at + _DIGEST_BYTES * int.from_bytes(content[:_COUNT_BYTES])
        if raw[:_DIGEST_BYTES] != _digest_of(criteria, content) or len(content) < start_at:
            raise InvalidArgument("mnemosyned: page_token is none of this query")
        shown = Shown(salt=content[_COUNT_BYTES:digests_at], digests=content[digests_at:start_at])
        return cls(start=content[start_at:], shown=shown)


@dataclass(frozen=True, slots=True, kw_only=True)
class Following:
    """The token of the page after one that is not encoded yet."""

    most_bytes: int  # how long it may be
    # The token, by how many sessions of its page the response has; the empty text at the end.
    token: Callable[[int], str]


NOTHING: Final = Following(most_bytes=0, token=lambda _: "")


def after_first(criteria: Criteria, page: Page, *, salt: bytes) -> Following:
    """Return what follows a page by expiry that begins with the first session; `salt`: random SALT_BYTES."""
    found = page.sessions

    def token(count: int) -> str:
        if count == len(found) and page.is_last:
            return ""
        shown = Shown.of(tokens_of(found[:count]), salt)
        return PageToken(shown=shown).encode(criteria)

    return Following(most_bytes=_most_bytes(len(found), 0), token=token)


def after_keyed(criteria: Criteria, token: PageToken, page: KeyedPage) -> Following:
    """Return what follows a page by stored key, which had a token."""
    keys = page.keys

    def next_token(count: int) -> str:
        start = page.next_key if count == len(keys) else between(keys[count - 1], keys[count])
        return "" if start is None else replace(token, start=start).encode(criteria)

    longest = max(map(len, [*keys, page.next_key or b""]))
    return Following(
        most_bytes=_most_bytes(len(token.shown.digests) // _DIGEST_BYTES, longest), token=next_token
    )


def between(last: bytes, following: bytes) -> bytes:
    """Return the fewest bytes that are greater than one key, and not greater than the one that follows it."""
    for at, byte in enumerate(last):
        if following[at : at + 1] != bytes((byte,)):
            return following[: at + 1]
    # Keys that were cut, as those of damaged rows, may look the same.
    return following[: len(last) + 1] if len(following) > len(last) else following + b"\0"


def _most_bytes(digests: int, start_bytes: int) -> int:
    return 4 * (_HEAD_BYTES + digests * _DIGEST_BYTES + start_bytes + 3) // 3


def _digest_of(criteria: Criteria, content: bytes) -> bytes:
    # By the criteria that are given, so that the form stays when others are added.
    given = {name: value for name in _CRITERIA if (value := getattr(criteria, name)) is not None}
    query = _IN_ONE_FORM.encode(given).encode()
    parts = (_FORM, len(query).to_bytes(4), query, content)
    return blake2b(b"".join(parts), digest_size=_DIGEST_BYTES).digest()


def _pieces(digests: bytes) -> list[bytes]:
    return [digests[at : at + _DIGEST_BYTES] for at in range(0, len(digests), _DIGEST_BYTES)]


def _decoded(text: str) -> bytes:
    try:
        return b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return b""
