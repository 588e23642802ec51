"""A session as a response ready to send, but for its expiry.

GetResponse, ContextResponse and StartResponse have one shape: field 1 is the session. The fields
of the session that do not change are encoded once; the expiry is appended, which protobuf allows
in any order. A cached Get is then one concatenation. A large response is not even that: it is returned
in pieces, and all callers share the one that is large.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from aio.steps import STEP_BYTES, STEP_ITEMS, Steps
from aio.units import NS_PER_US, US_PER_S
from mnemosyned.errors import MnemosyneError
from mnemosyned.sessions.model import Session

_SESSION_TAG: Final = b"\x0a"  # field 1, length-delimited
# Fields 1, 2, 3 and 6 of a Session, length-delimited.
_TOKEN_TAG: Final = b"\x0a"
_SUBJECT_TAG: Final = b"\x12"
_CLIENT_TAG: Final = b"\x1a"
_REFRESH_TAG: Final = b"\x32"
_EXPIRE_AT_TAG: Final = b"\x2a"  # field 5, length-delimited
_SECONDS_TAG: Final = b"\x08"  # field 1, varint
_NANOS_TAG: Final = b"\x10"  # field 2, varint
_LEFT_OUT_TAG: Final = b"\x10"  # field 2 of ListResponse, varint
_TRUNCATED: Final = b"\x18\x01"  # field 3 of ListResponse, true
_NEXT_TOKEN_TAG: Final = b"\x22"  # field 4 of ListResponse, length-delimited
# At most, of the fields of a ListResponse besides its sessions and the content of the token.
_PAGE_FIELDS_BYTES: Final = 20
_VARINT_CONTINUES: Final = 0x80
_LONG_VARINT: Final = 1 << 28  # from here on, and below 1 << 35, a varint has five bytes
_LONG_VARINT_BYTES: Final = 5
# Lengths of nearly all sessions, and of their fields.
_SHORT_VARINTS: Final = tuple(
    bytes([value]) if value < _VARINT_CONTINUES else bytes([value & 0x7F | _VARINT_CONTINUES, value >> 7])
    for value in range(1024)
)
# Python objects around the bytes of an entry: its slot, its place in the dictionary, the token.
_OVERHEAD_BYTES: Final = 700
# From here on, a response in pieces costs less than a copy.
SHARED_BYTES: Final = 64 * 1024

# A serialized message, whole or in pieces.
EncodedResponse: TypeAlias = bytes | tuple[bytes, ...]


def varint(value: int) -> bytes:
    """Encode an unsigned protobuf varint."""
    if value < len(_SHORT_VARINTS):
        return _SHORT_VARINTS[value]
    if _LONG_VARINT <= value < _LONG_VARINT << 7:
        # Seconds, and nanoseconds mostly.
        return bytes(
            (
                value & 127 | 128,
                value >> 7 & 127 | 128,
                value >> 14 & 127 | 128,
                value >> 21 & 127 | 128,
                value >> 28,
            )
        )
    encoded = bytearray()
    while value >= _VARINT_CONTINUES:
        encoded.append(value & 0x7F | _VARINT_CONTINUES)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _end_of_varint(encoded: bytes, start: int) -> int:
    while start < len(encoded) and encoded[start] >= _VARINT_CONTINUES:
        start += 1
    return start + 1


class ExpiryField:
    """Encodes `expire_at` as a field of a Session, with the last result at hand.

    Expiries are whole milliseconds, so at speed many answers share one.
    """

    __slots__ = ("_expires_at_us", "_field", "_long_head", "_seconds", "_seconds_field")

    def __init__(self) -> None:
        self._expires_at_us = -1
        self._field = b""
        self._seconds = -1
        self._seconds_field = b""
        self._long_head = b""

    def encode(self, expires_at_us: int) -> bytes:
        """Return the field for an expiry, microseconds since the epoch."""
        if expires_at_us != self._expires_at_us:
            self._expires_at_us = expires_at_us
            seconds, us = divmod(expires_at_us, US_PER_S)
            if seconds != self._seconds:
                self._seconds, self._seconds_field = seconds, _SECONDS_TAG + varint(seconds)
                size = len(self._seconds_field) + len(_NANOS_TAG) + _LONG_VARINT_BYTES
                self._long_head = _EXPIRE_AT_TAG + varint(size) + self._seconds_field + _NANOS_TAG
            nanos = us * NS_PER_US
            if nanos >= _LONG_VARINT:
                # Three of four, if expiries are no whole milliseconds, as those of List.
                self._field = self._long_head + varint(nanos)
                return self._field
            timestamp = self._seconds_field
            if us:
                timestamp += _NANOS_TAG + varint(nanos)
            self._field = _EXPIRE_AT_TAG + varint(len(timestamp)) + timestamp
        return self._field


class EncodedSession:
    """What the cache holds for a token: the session as a response, but for its expiry."""

    __slots__ = (
        "_expiry_size",
        "_fields",
        "_head",
        "_is_shared",
        "expires_at_us",
        "is_dirty",
        "reads_of_peers",
        "size_bytes",
    )

    def __init__(self, session: Session) -> None:
        self._begin(encoded_fields(session), session.expires_at_us)

    @classmethod
    def of_response(cls, response: bytes, expires_at_us: int) -> EncodedSession | None:
        """Return the session of another node's response with this expiry; None: it is not in our form."""
        end = _end_of_varint(response, len(_SESSION_TAG))
        expiry = ExpiryField().encode(expires_at_us)
        fields = response[end : -len(expiry)]
        if response != _SESSION_TAG + varint(len(fields) + len(expiry)) + fields + expiry:
            return None
        encoded = cls.__new__(cls)
        encoded._begin(fields, expires_at_us)  # noqa: SLF001  # its own
        return encoded

    def _begin(self, fields: bytes, expires_at_us: int) -> None:
        self.expires_at_us = expires_at_us  # the latest promised to a caller
        self.is_dirty = False  # the storage does not know `expires_at_us` yet
        self.reads_of_peers = 0  # calls of other nodes that this copy has answered
        self._fields = fields
        self._expiry_size = -1
        self._head = b""
        self._is_shared = len(self._fields) >= SHARED_BYTES
        # An estimate of the memory that the cached entry takes: `_fields`, and `_head`, which has a copy of
        # small ones.
        self.size_bytes = (1 if self._is_shared else 2) * len(self._fields) + _OVERHEAD_BYTES

    def response(self, expiry: bytes) -> EncodedResponse:
        """Return the response message with this `expire_at` field; a large one in pieces."""
        # The length in front depends on the size of the expiry, which hardly ever changes.
        if len(expiry) != self._expiry_size:
            self._expiry_size = len(expiry)
            self._head = _SESSION_TAG + varint(len(self._fields) + len(expiry))
            if not self._is_shared:
                self._head += self._fields
        if self._is_shared:
            return self._head, self._fields, expiry
        return self._head + expiry


def encoded_fields(session: Session) -> bytes:
    """Encode the fields of a Session but for `expire_at`.

    The bag's bytes are not parsed, so they must be our own: written here, or `damage.checked`.
    """
    # By hand: a protobuf object takes three times as long, and List encodes a thousand.
    token = session.access_token.encode()
    subject = session.subject_id.encode()
    client = refresh = b""
    if session.subject_client:
        client = session.subject_client.encode()
        client = _CLIENT_TAG + varint(len(client)) + client
    if session.refresh_token:
        refresh = session.refresh_token.encode()
        refresh = _REFRESH_TAG + varint(len(refresh)) + refresh
    heads = varint(len(token)), varint(len(subject))
    return b"".join(
        (_TOKEN_TAG, heads[0], token, _SUBJECT_TAG, heads[1], subject, client, refresh, session.bag)
    )


def list_response(
    found: Sequence[Session | MnemosyneError],
    *,
    max_bytes: int,
    is_cut: bool,
    next_token: Callable[[int], str],
) -> Steps[bytes]:
    """Encode a ListResponse; its field 1 is repeated, so it is one response after the other.

    Errors are left out and counted. The response ends before a session that would make it larger than
    `max_bytes`, if it has one; `is_cut` is whether the page was cut before. `max_bytes` is without the token
    of the next page, which `next_token` returns, by how many of those found the response has.
    """
    encode_expiry = ExpiryField().encode
    parts: list[bytes] = []
    count = len(found)
    left_out = size_bytes = step_bytes = 0
    most_bytes = max_bytes - _PAGE_FIELDS_BYTES
    for number, session in enumerate(found):
        if isinstance(session, MnemosyneError):
            left_out += 1
            continue
        fields = encoded_fields(session)
        expiry = encode_expiry(session.expires_at_us)
        session_bytes = len(fields) + len(expiry)
        head = varint(session_bytes)
        size_bytes += session_bytes + len(head) + 1
        if size_bytes > most_bytes and parts:
            count, is_cut = number, True
            break
        parts += (_SESSION_TAG, head, fields, expiry)
        step_bytes += session_bytes
        if number % STEP_ITEMS == STEP_ITEMS - 1 or step_bytes > STEP_BYTES:
            step_bytes = 0
            yield
    if left_out:
        parts.append(_LEFT_OUT_TAG + varint(left_out))
    if is_cut:
        parts.append(_TRUNCATED)
    if token := next_token(count).encode():
        parts += (_NEXT_TOKEN_TAG, varint(len(token)), token)
    return b"".join(parts)


def joined(encoded: EncodedResponse) -> bytes:
    """Return a message as a whole."""
    return encoded if isinstance(encoded, bytes) else b"".join(encoded)
