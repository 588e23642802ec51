"""How a session is stored in Redis: one string. Pure.

    16 digits   expiry, microseconds since the epoch, so that a move overwrites it in place
     8 bytes    version, random, another one after every change but a move of the expiry
    16 bytes    lengths of the four fields, big-endian
                subject, refresh token, client, bag

The scripts read the first three parts, the subject and the refresh token.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, Final

from mnemosyned.sessions.model import MAX_BAG_BYTES, DamagedSession, NewSession, Session

_HEAD: Final = struct.Struct(">16s8sIIII")
_LENGTHS: Final = struct.Struct(">IIII")
_EXPIRY_BYTES: Final = 16
_VERSION_BYTES: Final = 8


def text(stored: bytes) -> str:
    """Return a key that is told to others."""
    return stored.decode(errors="replace")


def escaped(stored: bytes) -> str:
    """Return a key that is sent to Redis again, whatever its bytes are."""
    return stored.decode(errors="surrogateescape")


def stored_name(key: str) -> bytes:
    """Return the bytes of a key that `escaped` may have made."""
    return key.encode(errors="surrogateescape")


def new_body(new: NewSession, version: bytes) -> bytes:
    """Return the record of a new session, without its expiry, which the server decides."""
    fields = (new.subject_id.encode(), new.refresh_token.encode(), new.subject_client.encode(), new.bag)
    return b"".join((version, _LENGTHS.pack(*map(len, fields)), *fields))


def body_with_bag(record: bytes, version: bytes, bag: bytes) -> bytes:
    """Return a record with another bag, without its expiry; the record is one that `session_of` has read."""
    _, _, subject, refresh, client, _ = _HEAD.unpack_from(record)
    end = _HEAD.size + subject + refresh + client
    lengths = _LENGTHS.pack(subject, refresh, client, len(bag))
    return b"".join((version, lengths, record[_HEAD.size : end], bag))


def without_expiry(body: bytes) -> bytes:
    """Return a record whose expiry is not known."""
    return b"0" * _EXPIRY_BYTES + body


def version_of(record: bytes) -> bytes:
    """Return what changes with the bag."""
    return record[_EXPIRY_BYTES : _EXPIRY_BYTES + _VERSION_BYTES]


def state_of(record: Any) -> bytes:  # noqa: ANN401  # as the reply has it
    """Return what changes with anything in the session; empty for what is no record."""
    return record[: _EXPIRY_BYTES + _VERSION_BYTES] if isinstance(record, bytes) else b""


def expiry_of(record: Any) -> float:  # noqa: ANN401  # as the reply has it
    """Return the expiry of a record, or of its first bytes; what cannot be read never ends by itself."""
    try:
        return int(record[:_EXPIRY_BYTES])
    except (TypeError, ValueError):
        return math.inf


def bag_bytes_of(record: Any) -> int:  # noqa: ANN401  # as the reply has it
    """Return the length of the bag of a record, or of its first bytes; 0 if it will not be read."""
    if not isinstance(record, bytes) or len(record) < _HEAD.size:
        return 0
    bag: int = _HEAD.unpack_from(record)[-1]
    return bag if bag <= MAX_BAG_BYTES else 0


def session_of(key: str, record: Any) -> Session | DamagedSession:  # noqa: ANN401  # as the reply has it
    """Return the session of a record, or that it is damaged; `record` may be a number in place of one."""
    if not isinstance(record, bytes):
        return DamagedSession(access_token=key, reason="its key in Redis is not a string")
    try:
        expiry, _, subject, refresh, client, bag = _HEAD.unpack_from(record)
        at = _HEAD.size
        if len(record) != at + subject + refresh + client + bag or bag > MAX_BAG_BYTES:
            return DamagedSession(access_token=key, reason=_wrong_length(bag))
        return Session(
            access_token=key,
            subject_id=record[at : (at := at + subject)].decode(),
            refresh_token=record[at : (at := at + refresh)].decode(),
            subject_client=record[at : (at := at + client)].decode(),
            bag=record[at:],
            expires_at_us=int(expiry),
        )
    except UnicodeDecodeError:
        return DamagedSession(access_token=key, reason="a field is not UTF-8")
    except (struct.error, ValueError):
        return DamagedSession(access_token=key, reason="its record has no valid head")


def pairs_of(replies: Sequence[Any]) -> list[tuple[bytes, Any]]:
    """Return names and records that follow each other."""
    return list(zip(replies[::2], replies[1::2], strict=True))


def _wrong_length(bag: int) -> str:
    if bag > MAX_BAG_BYTES:
        return f"a bag is longer than {MAX_BAG_BYTES} bytes"
    return "its record has another length than its head says"
