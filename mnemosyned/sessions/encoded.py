"""A session as a response ready to send, but for its expiry.

GetResponse, ContextResponse and StartResponse have one shape: field 1 is the session. The fields
of the session that do not change are encoded once; the expiry is appended, which protobuf allows
in any order. A cached Get is then one concatenation. A large response is not even that: it is returned
in pieces, and all callers share the one that is large.
"""

from __future__ import annotations

from collections.abc import Sequence
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
_PAGE_FIELDS_BYTES: Final = 16  # at most, of the fields of a ListResponse besides its sessions
_VARINT_CONTINUES: Final = 0x80
_SHORT_VARINTS: Final = tuple(bytes([value]) for value in range(_VARINT_CONTINUES))
# Python objects around the bytes of an entry: its slot, its place in the dictionary, the token.
_OVERHEAD_BYTES: Final = 700
# From here on, a response in pieces costs less than a copy.
SHARED_BYTES: Final = 64 * 1024

# A serialized message, whole or in pieces.
EncodedResponse: TypeAlias = bytes | tuple[bytes, ...]


def varint(value: int) -> bytes:
    """Encode an unsigned protobuf varint."""
    if value < _VARINT_CONTINUES:
        return _SHORT_VARINTS[value]
    if value < _VARINT_CONTINUES**2:
        return bytes((value & 0x7F | _VARINT_CONTINUES, value >> 7))
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

    __slots__ = ("_expires_at_us", "_field", "_seconds", "_seconds_field")

    def __init__(self) -> None:
        self._expires_at_us = -1
        self._field = b""
        self._seconds = -1
        self._seconds_field = b""

    def encode(self, expires_at_us: int) -> bytes:
        """Return the field for an expiry, microseconds since the epoch."""
        if expires_at_us != self._expires_at_us:
            self._expires_at_us = expires_at_us
            seconds, us = divmod(expires_at_us, US_PER_S)
            if seconds != self._seconds:
                self._seconds, self._seconds_field = seconds, _SECONDS_TAG + varint(seconds)
            timestamp = self._seconds_field
            if us:
                timestamp += _NANOS_TAG + varint(us * NS_PER_US)
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
    fields = [_TOKEN_TAG, varint(len(token)), token, _SUBJECT_TAG, varint(len(subject)), subject]
    if session.subject_client:
        client = session.subject_client.encode()
        fields += (_CLIENT_TAG, varint(len(client)), client)
    if session.refresh_token:
        refresh = session.refresh_token.encode()
        fields += (_REFRESH_TAG, varint(len(refresh)), refresh)
    fields.append(session.bag)
    return b"".join(fields)


def list_response(found: Sequence[Session | MnemosyneError], *, max_bytes: int, is_cut: bool) -> Steps[bytes]:
    """Encode a ListResponse; its field 1 is repeated, so it is one response after the other.

    Errors are left out and counted. The response ends before a session that would make it larger than
    `max_bytes`, if it has one; `is_cut` is whether the page was cut before.
    """
    expiry_field = ExpiryField()
    parts: list[bytes] = []
    left_out = size_bytes = step_bytes = 0
    for number, session in enumerate(found, start=1):
        if isinstance(session, MnemosyneError):
            left_out += 1
            continue
        fields = encoded_fields(session)
        expiry = expiry_field.encode(session.expires_at_us)
        head = _SESSION_TAG + varint(len(fields) + len(expiry))
        piece_bytes = len(head) + len(fields) + len(expiry)
        size_bytes += piece_bytes
        if parts and size_bytes > max_bytes - _PAGE_FIELDS_BYTES:
            is_cut = True
            break
        parts += (head, fields, expiry)
        step_bytes += piece_bytes
        if number % STEP_ITEMS == 0 or step_bytes > STEP_BYTES:
            step_bytes = 0
            yield
    if left_out:
        parts.append(_LEFT_OUT_TAG + varint(left_out))
    if is_cut:
        parts.append(_TRUNCATED)
    return b"".join(parts)


def joined(encoded: EncodedResponse) -> bytes:
    """Return a message as a whole."""
    return encoded if isinstance(encoded, bytes) else b"".join(encoded)
