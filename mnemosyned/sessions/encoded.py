"""A session as a response ready to send, but for its expiry.

GetResponse, ContextResponse and StartResponse have one shape: field 1 is the session. The fields
of the session that do not change are encoded once; the expiry is appended, which protobuf allows
in any order. A cached Get is then one concatenation. A large response is not even that: it is returned
in pieces, and all callers share the one that is large.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Final, TypeAlias

from aio.units import NS_PER_US, US_PER_S
from mnemosyned.sessions.model import Session

SESSION_TAG: Final = b"\x0a"  # field 1, length-delimited
# Fields 1, 2, 3 and 6 of a Session, length-delimited.
TOKEN_TAG: Final = b"\x0a"
SUBJECT_TAG: Final = b"\x12"
CLIENT_TAG: Final = b"\x1a"
REFRESH_TAG: Final = b"\x32"
EXPIRE_AT_TAG: Final = b"\x2a"  # field 5, length-delimited
SECONDS_TAG: Final = b"\x08"  # field 1, varint
NANOS_TAG: Final = b"\x10"  # field 2, varint
_VARINT_CONTINUES: Final = 0x80
_LONG_VARINT: Final = 1 << 28  # from here on, and below 1 << 35, a varint has five bytes
_LONG_VARINT_BYTES: Final = 5
# Lengths of nearly all sessions, and of their fields.
_SHORT: Final = 1024
_SHORT_VARINTS: Final = tuple(
    bytes([value]) if value < _VARINT_CONTINUES else bytes([value & 0x7F | _VARINT_CONTINUES, value >> 7])
    for value in range(_SHORT)
)
# What stands before the fields of nearly all sessions.
_SHORT_HEADS: Final = tuple(SESSION_TAG + size for size in _SHORT_VARINTS)
# Python objects around the bytes of an entry: its slot, its place in the dictionary, the token.
_OVERHEAD_BYTES: Final = 700
# From here on, a response in pieces costs less than a copy.
SHARED_BYTES: Final = 64 * 1024

# A serialized message, whole or in pieces.
EncodedResponse: TypeAlias = bytes | tuple[bytes, ...]


def varint(value: int) -> bytes:
    """Encode an unsigned protobuf varint."""
    if value < _SHORT:
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


class Heads(dict[int, bytes]):
    """What stands before a length-delimited field of one tag, by the length; each is encoded once.

    It is for lengths that have a bound.
    """

    def __init__(self, tag: bytes) -> None:
        super().__init__()
        self._tag = tag

    def __missing__(self, length: int) -> bytes:
        head = self[length] = self._tag + varint(length)
        return head

    def before(self, texts: Sequence[bytes]) -> Iterable[bytes]:
        """Return what stands before each text; without end if all have one length, as tokens mostly have."""
        lengths = set(map(len, texts))
        return repeat(self[lengths.pop()]) if len(lengths) == 1 else map(self.__getitem__, map(len, texts))


class TextHeads(Heads):
    """What stands before a text; an empty one is no field."""

    def __init__(self, tag: bytes) -> None:
        super().__init__(tag)
        self[0] = b""


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
                self._seconds, self._seconds_field = seconds, SECONDS_TAG + varint(seconds)
                size = len(self._seconds_field) + len(NANOS_TAG) + _LONG_VARINT_BYTES
                self._long_head = EXPIRE_AT_TAG + varint(size) + self._seconds_field + NANOS_TAG
            nanos = us * NS_PER_US
            if nanos >= _LONG_VARINT:
                # Three of four, if expiries are no whole milliseconds, as those of List.
                self._field = self._long_head + varint(nanos)
                return self._field
            timestamp = self._seconds_field
            if us:
                timestamp += NANOS_TAG + varint(nanos)
            self._field = EXPIRE_AT_TAG + varint(len(timestamp)) + timestamp
        return self._field


class EncodedSession:
    """What the cache holds for a token: the session as a response, but for its expiry."""

    __slots__ = ("_fields", "expires_at_us", "is_dirty", "reads_of_peers", "size_bytes")

    def __init__(self, session: Session) -> None:
        self._begin(encoded_fields(session), session.expires_at_us)

    @classmethod
    def of_response(cls, response: bytes, expires_at_us: int) -> EncodedSession | None:
        """Return the session of another node's response with this expiry; None: it is not in our form."""
        end = _end_of_varint(response, len(SESSION_TAG))
        expiry = ExpiryField().encode(expires_at_us)
        fields = response[end : -len(expiry)]
        if response != SESSION_TAG + varint(len(fields) + len(expiry)) + fields + expiry:
            return None
        encoded = cls.__new__(cls)
        encoded._begin(fields, expires_at_us)  # noqa: SLF001  # its own
        return encoded

    def _begin(self, fields: bytes, expires_at_us: int) -> None:
        self.expires_at_us = expires_at_us  # the latest promised to a caller
        self.is_dirty = False  # the storage does not know `expires_at_us` yet
        self.reads_of_peers = 0  # calls of other nodes that this copy has answered
        self._fields = fields
        # An estimate of the memory that the cached entry takes.
        self.size_bytes = len(fields) + _OVERHEAD_BYTES

    def response(self, expiry: bytes) -> EncodedResponse:
        """Return the response message with this `expire_at` field; a large one in pieces."""
        fields = self._fields
        size = len(fields) + len(expiry)
        if size < _SHORT:
            # Made each time: every fourth expiry has another size, and memory would hold the fields twice.
            return _SHORT_HEADS[size] + fields + expiry
        head = SESSION_TAG + varint(size)
        return (head, fields, expiry) if size >= SHARED_BYTES else b"".join((head, fields, expiry))


def encoded_fields(session: Session) -> bytes:
    """Encode the fields of a Session but for `expire_at`.

    The bag's bytes are not parsed, so they must be our own: written here, or `damage.checked`.
    """
    # By hand: a protobuf object takes three times as long.
    token = session.access_token.encode()
    subject = session.subject_id.encode()
    client = refresh = b""
    if session.subject_client:
        client = session.subject_client.encode()
        client = CLIENT_TAG + varint(len(client)) + client
    if session.refresh_token:
        refresh = session.refresh_token.encode()
        refresh = REFRESH_TAG + varint(len(refresh)) + refresh
    heads = varint(len(token)), varint(len(subject))
    return b"".join(
        (TOKEN_TAG, heads[0], token, SUBJECT_TAG, heads[1], subject, client, refresh, session.bag)
    )


def joined(encoded: EncodedResponse) -> bytes:
    """Return a message as a whole."""
    return encoded if isinstance(encoded, bytes) else b"".join(encoded)
