"""A page of List as a response, one part of its sessions after the other. Pure.

A part whose sessions are all ordinary (`damage.are_ordinary`) is encoded by columns, at half a microsecond a
session. Every other part is encoded session by session, as are Gets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Final

from aio.steps import STEP_BYTES, Steps
from mnemosyned.errors import MnemosyneError
from mnemosyned.sessions.columns import SessionColumns
from mnemosyned.sessions.encoded import (
    CLIENT_TAG,
    REFRESH_TAG,
    SESSION_TAG,
    SUBJECT_TAG,
    TOKEN_TAG,
    ExpiryField,
    Heads,
    TextHeads,
    encoded_fields,
    varint,
)
from mnemosyned.sessions.many_expiries import expiry_fields
from mnemosyned.sessions.model import Session

_LEFT_OUT_TAG: Final = b"\x10"  # field 2 of ListResponse, varint
_TRUNCATED: Final = b"\x18\x01"  # field 3 of ListResponse, true
_NEXT_TOKEN_TAG: Final = b"\x22"  # field 4 of ListResponse, length-delimited
# At most, of the fields of a ListResponse besides its sessions and the content of the token.
_PAGE_FIELDS_BYTES: Final = 20
# Of ordinary sessions, which are short.
_SESSION_HEADS: Final = Heads(SESSION_TAG)
_TOKEN_HEADS: Final = TextHeads(TOKEN_TAG)
_SUBJECT_HEADS: Final = TextHeads(SUBJECT_TAG)
_CLIENT_HEADS: Final = TextHeads(CLIENT_TAG)
_REFRESH_HEADS: Final = TextHeads(REFRESH_TAG)


class PageResponse:
    """A ListResponse that grows; its field 1 is repeated, so it is one response after the other.

    It ends before a session that would make it larger than `max_bytes`, if it has one. `max_bytes` is without
    the token of the next page.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self._most_bytes = max_bytes - _PAGE_FIELDS_BYTES
        self._parts: list[bytes] = []
        self._size_bytes = 0
        self._left_out = 0
        self._encode_expiry = ExpiryField().encode
        self.count = 0  # of those found that it is about, with those that are left out
        self.is_full = False  # one more would make it too large

    def add_ordinary(self, sessions: SessionColumns) -> bool:
        """Add sessions that are all ordinary, at most STEP_ITEMS, unless they do not fit together."""
        part = _encoded(sessions)
        if self._size_bytes + len(part) > self._most_bytes:
            return False
        self._size_bytes += len(part)
        self._parts.append(part)
        self.count += len(sessions)
        return True

    def add(self, found: Sequence[Session | MnemosyneError]) -> Steps[None]:
        """Add what fits. Errors are left out and counted. The bags must be our own, or `damage.checked`."""
        step_bytes = 0
        for one in found:
            if isinstance(one, MnemosyneError):
                self._left_out += 1
                self.count += 1
                continue
            fields = encoded_fields(one)
            expiry = self._encode_expiry(one.expires_at_us)
            head = SESSION_TAG + varint(len(fields) + len(expiry))
            size_bytes = len(head) + len(fields) + len(expiry)
            if self._size_bytes + size_bytes > self._most_bytes and self._parts:
                self.is_full = True
                return
            self._size_bytes += size_bytes
            self._parts += (head, fields, expiry)
            self.count += 1
            step_bytes += size_bytes
            if step_bytes > STEP_BYTES:
                step_bytes = 0
                yield

    def finished(self, *, is_cut: bool, next_token: Callable[[int], str]) -> bytes:
        """Return the message.

        `is_cut` is whether the page was cut before; `next_token` returns the token of the next page by
        `count`.
        """
        parts = self._parts
        if self._left_out:
            parts.append(_LEFT_OUT_TAG + varint(self._left_out))
        if is_cut or self.is_full:
            parts.append(_TRUNCATED)
        if token := next_token(self.count).encode():
            parts += (_NEXT_TOKEN_TAG, varint(len(token)), token)
        return b"".join(parts)


def _encoded(sessions: SessionColumns) -> bytes:
    columns = (
        *_field(_TOKEN_HEADS, sessions.tokens),
        *_field(_SUBJECT_HEADS, sessions.subject_ids),
        *_field(_CLIENT_HEADS, sessions.subject_clients),
        *_field(_REFRESH_HEADS, sessions.refresh_tokens),
        sessions.bags,
        expiry_fields(sessions.expiries_us),
    )
    # Not strict: what stands before texts of one length has no end.
    encoded = list(map(b"".join, zip(*columns, strict=False)))
    return b"".join(chain.from_iterable(zip(_SESSION_HEADS.before(encoded), encoded, strict=False)))


def _field(heads: TextHeads, texts: Sequence[bytes]) -> Sequence[Iterable[bytes]]:
    """Return what a field adds to each session, as columns: what stands before the text, and the text."""
    return (heads.before(texts), texts) if any(texts) else ()
