"""A page of List as a response, one part of its sessions after the other. Pure.

A part whose sessions are all ordinary (`damage.are_ordinary`) is encoded by columns, at half a microsecond a
session. Every other part is encoded session by session, as are Gets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from struct import Struct
from typing import Final

from aio.steps import STEP_BYTES, STEP_ITEMS, Steps
from aio.units import NS_PER_US, US_PER_S
from mnemosyned.errors import MnemosyneError
from mnemosyned.sessions.columns import SessionColumns
from mnemosyned.sessions.encoded import (
    CLIENT_TAG,
    EXPIRE_AT_TAG,
    NANOS_TAG,
    REFRESH_TAG,
    SECONDS_TAG,
    SESSION_TAG,
    SUBJECT_TAG,
    TOKEN_TAG,
    ExpiryField,
    Heads,
    encoded_fields,
    varint,
)
from mnemosyned.sessions.model import Session

_LEFT_OUT_TAG: Final = b"\x10"  # field 2 of ListResponse, varint
_TRUNCATED: Final = b"\x18\x01"  # field 3 of ListResponse, true
_NEXT_TOKEN_TAG: Final = b"\x22"  # field 4 of ListResponse, length-delimited
# At most, of the fields of a ListResponse besides its sessions and the content of the token.
_PAGE_FIELDS_BYTES: Final = 20
# Of ordinary sessions, which are short.
_SESSION_HEADS: Final = Heads(SESSION_TAG)
_TOKEN_HEADS: Final = Heads(TOKEN_TAG)
_SUBJECT_HEADS: Final = Heads(SUBJECT_TAG)
_CLIENT_HEADS: Final = Heads(CLIENT_TAG)
_REFRESH_HEADS: Final = Heads(REFRESH_TAG)


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
    encoded = map(
        b"".join,
        zip(
            _fields(_TOKEN_HEADS, sessions.tokens),
            _fields(_SUBJECT_HEADS, sessions.subject_ids),
            _fields(_CLIENT_HEADS, sessions.subject_clients),
            _fields(_REFRESH_HEADS, sessions.refresh_tokens),
            sessions.bags,
            expiry_fields(sessions.expiries_us),
            strict=True,
        ),
    )
    return b"".join([piece for one in encoded for piece in (_SESSION_HEADS[len(one)], one)])


def _fields(heads: Heads, texts: Sequence[bytes]) -> list[bytes]:
    return [heads[len(text)] + text if text else b"" for text in texts]


class _Varints:
    """Encodes many varints of one size at once.

    The values stand in one integer, each in a lane of eight bytes. A varint has seven bits of the value in a
    byte, so bits 7k to 7k + 6 of every lane move up by k, for all lanes in one step of the interpreter:

        value    … gggggggfffffffeeeeeeeddddddd      varint    0ggggggg 1fffffff 1eeeeeee 1ddddddd
    """

    def __init__(self, size_bytes: int) -> None:
        self.least, self.end = 1 << 7 * (size_bytes - 1), 1 << 7 * size_bytes  # values of this size
        lanes = int.from_bytes(b"\1\0\0\0\0\0\0\0" * STEP_ITEMS, "little")
        self._masks = [lanes * (0x7F << 7 * k) for k in range(size_bytes)]
        self._continuations = lanes * int.from_bytes(b"\x80" * (size_bytes - 1))
        self._lanes = Struct(f"{size_bytes}s{8 - size_bytes}x" * STEP_ITEMS)

    def encode(self, values: Sequence[int]) -> tuple[bytes, ...]:
        """Encode values, at most STEP_ITEMS; the result means nothing where one is not of this size."""
        packed = int.from_bytes(Struct(f"<{len(values)}Q").pack(*values), "little")
        spread = self._continuations
        for k, mask in enumerate(self._masks):
            spread |= (packed & mask) << k
        return self._lanes.unpack(spread.to_bytes(8 * STEP_ITEMS, "little"))


# Fewer expiries are encoded sooner one by one.
_FEW: Final = 32
_FOUR: Final = _Varints(4)
_FIVE: Final = _Varints(5)
_HEAD_WITH_FOUR: Final = EXPIRE_AT_TAG + varint(11) + SECONDS_TAG
_HEAD_WITH_FIVE: Final = EXPIRE_AT_TAG + varint(12) + SECONDS_TAG


def expiry_fields(expiries_us: Sequence[int]) -> list[bytes]:
    """Encode `expire_at` as a field of a Session for each of at most STEP_ITEMS expiries."""
    encode = ExpiryField().encode
    seconds = [us // US_PER_S for us in expiries_us]
    if len(seconds) < _FEW or min(seconds) < _FIVE.least or max(seconds) >= _FIVE.end:
        # Few; or one is before 1978 or after 3058.
        return list(map(encode, expiries_us))
    nanos = [us % US_PER_S * NS_PER_US for us in expiries_us]
    return [
        _HEAD_WITH_FIVE + second + NANOS_TAG + five
        if nano >= _FIVE.least
        else _HEAD_WITH_FOUR + second + NANOS_TAG + four
        if nano >= _FOUR.least
        else encode(us)
        for us, nano, second, four, five in zip(
            expiries_us, nanos, _FIVE.encode(seconds), _FOUR.encode(nanos), _FIVE.encode(nanos), strict=False
        )
    ]
