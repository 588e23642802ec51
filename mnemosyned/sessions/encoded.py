"""A session as a response ready to send, but for its expiry.

GetResponse, ContextResponse and StartResponse have one shape: field 1 is the session. The fields
of the session that do not change are encoded once; the expiry is appended, which protobuf allows
in any order. A cached Get is then one concatenation. A large response is not even that: it is returned
in pieces, and all callers share the one that is large.
"""

from __future__ import annotations

from typing import Final, TypeAlias

from mnemosynerpc.session_pb2 import Session

from aio.units import NS_PER_US, US_PER_S
from mnemosyned.sessions.model import Session as StoredSession

_SESSION_TAG: Final = b"\x0a"  # field 1, length-delimited
_EXPIRE_AT_TAG: Final = b"\x2a"  # field 5, length-delimited
_SECONDS_TAG: Final = b"\x08"  # field 1, varint
_NANOS_TAG: Final = b"\x10"  # field 2, varint
_LEFT_OUT_TAG: Final = b"\x10"  # field 2 of ListResponse, varint
_VARINT_CONTINUES: Final = 0x80
# Python objects around the bytes of an entry: its slot, its place in the dictionary, the token.
_OVERHEAD_BYTES: Final = 700
# From here on, a response in pieces costs less than a copy.
SHARED_BYTES: Final = 64 * 1024

# A serialized message, whole or in pieces.
EncodedResponse: TypeAlias = bytes | tuple[bytes, ...]


def varint(value: int) -> bytes:
    """Encode an unsigned protobuf varint."""
    encoded = bytearray()
    while value >= _VARINT_CONTINUES:
        encoded.append(value & 0x7F | _VARINT_CONTINUES)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


class ExpiryField:
    """Encodes `expire_at` as a field of a Session, with the last result at hand.

    Expiries are whole milliseconds, so at speed many answers share one.
    """

    __slots__ = ("_expires_at_us", "_field")

    def __init__(self) -> None:
        self._expires_at_us = -1
        self._field = b""

    def encode(self, expires_at_us: int) -> bytes:
        """Return the field for an expiry, microseconds since the epoch."""
        if expires_at_us != self._expires_at_us:
            self._expires_at_us = expires_at_us
            seconds, us = divmod(expires_at_us, US_PER_S)
            timestamp = _SECONDS_TAG + varint(seconds)
            if us:
                timestamp += _NANOS_TAG + varint(us * NS_PER_US)
            self._field = _EXPIRE_AT_TAG + varint(len(timestamp)) + timestamp
        return self._field


class EncodedSession:
    """What the cache holds for a token: the session as a response, but for its expiry."""

    __slots__ = ("_expiry_size", "_fields", "_head", "_is_shared", "expires_at_us", "is_dirty", "size_bytes")

    def __init__(self, session: StoredSession) -> None:
        self.expires_at_us = session.expires_at_us  # the latest promised to a caller
        self.is_dirty = False  # the storage does not know `expires_at_us` yet
        self._fields = encoded_fields(session)
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


def encoded_fields(session: StoredSession) -> bytes:
    """Encode the fields of a Session but for `expire_at`.

    The bag's bytes are not parsed, so they must be our own: written here, or `damage.checked`.
    """
    head = Session(
        access_token=session.access_token,
        subject_id=session.subject_id,
        subject_client=session.subject_client,
        refresh_token=session.refresh_token,
    )
    return head.SerializeToString() + session.bag


def list_response(sessions: list[StoredSession], *, left_out: int = 0) -> bytes:
    """Encode a ListResponse; its field 1 is repeated, so it is one response after the other."""
    expiry_field = ExpiryField()
    parts = [
        joined(EncodedSession(session).response(expiry_field.encode(session.expires_at_us)))
        for session in sessions
    ]
    if left_out:
        parts.append(_LEFT_OUT_TAG + varint(left_out))
    return b"".join(parts)


def joined(encoded: EncodedResponse) -> bytes:
    """Return a message as a whole."""
    return encoded if isinstance(encoded, bytes) else b"".join(encoded)
