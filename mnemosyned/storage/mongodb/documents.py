"""How a session is stored in MongoDB: one document. Pure.

    _id       the stored key, a string: MongoDB compares strings by their bytes, and binaries by their length
    s c r     subject, client, refresh token: strings
    b         bag: binary, see sessions/bag.py
    e         expiry: a 64-bit whole number, microseconds since the epoch on the storage's clock
    v         version: 8 random bytes, others after every change of the bag
    w         start: 8 random bytes, by which a Start knows its own session
    purge_at  a day after the expiry: a date, for the index that removes what no cleanup has removed
    o l       until l, only the writer o may change the bag (value_writer.py); usually missing

A document whose _id is no string, or not UTF-8, is no session. Any other that has not this form is a damaged
session.

Expressions here are evaluated by the server. `$$NOW` is its clock when the command began, in whole
milliseconds. Texts of callers stand behind `$literal`, or where no expression is: a subject may be "$e".
"""

from __future__ import annotations

from typing import Any, Final

from bson import Int64
from bson.datetime_ms import DatetimeMS

from aio.units import NEVER_US
from mnemosyned.sessions.model import (
    MAX_BAG_BYTES,
    MAX_CLIENT_BYTES,
    MAX_INDEXED_BYTES,
    DamagedSession,
    NewSession,
    Session,
)
from mnemosyned.sessions.token import MAX_TOKEN_BYTES

MARK_BYTES: Final = 8
# An expiry that no session has: of a Start that came too late, until it is removed.
NEVER_LIVED_US: Final = 0
_US_PER_MS: Final = 1000
_DAY_MS: Final = 86_400_000
# Longer ones are not read at all.
_MAX_DOCUMENT_BYTES: Final = (
    MAX_BAG_BYTES + MAX_CLIENT_BYTES + 2 * MAX_INDEXED_BYTES + MAX_TOKEN_BYTES + 64 * 1024
)

# The first bytes of characters of three and of four bytes in UTF-8.
_LEADS_THREE: Final = 0xE0
_LEADS_FOUR: Final = 0xF0

NOW_US: Final = {"$multiply": [{"$toLong": "$$NOW"}, _US_PER_MS]}
_IS_LIVE: Final = {"$gt": ["$e", NOW_US]}
_HAS_EXPIRY: Final = {"$type": "long"}
# What is read of a session: the document, unless it is too long; its size; the server's clock.
SHOWN: Final = {
    "$project": {
        "d": {"$cond": [{"$lte": [{"$bsonSize": "$$ROOT"}, _MAX_DOCUMENT_BYTES]}, "$$ROOT", None]},
        "z": {"$bsonSize": "$$ROOT"},
        "now": "$$NOW",
    }
}


def in_time(not_after_us: int) -> dict[str, Any]:
    """Return whether a write may still be done: the clock shows whole milliseconds, rounded down."""
    return {"$lte": [{"$add": [NOW_US, _US_PER_MS]}, Int64(not_after_us)]}


def is_late(now_us: int, not_after_us: int) -> bool:
    """Tell the opposite of an instant that the clock has shown."""
    return now_us + _US_PER_MS > not_after_us


def live(not_after_us: int = NEVER_US, *also: dict[str, Any]) -> dict[str, Any]:
    """Return the filter of live sessions, as long as a write may be done; `also`: other expressions."""
    conditions = [_IS_LIVE, *([] if not_after_us >= NEVER_US else [in_time(not_after_us)]), *also]
    return {"e": _HAS_EXPIRY, "$expr": {"$and": conditions} if len(conditions) > 1 else _IS_LIVE}


def start(new: NewSession, mark: bytes) -> list[dict[str, Any]]:
    """Return the update that starts a session where none is live, for an upsert by its key.

    A live session stays as it is. What comes too late, and finds no document, leaves one that never lived:
    an upsert cannot make none.
    """
    fields = {"v": mark, "w": mark}
    session = {
        "s": new.subject_id,
        "c": new.subject_client,
        "r": new.refresh_token,
        "b": new.bag,
        **fields,
    }
    nothing = {"s": "", "c": "", "r": "", "b": b"", **fields, "e": Int64(NEVER_LIVED_US)}
    lasts = {
        "e": {"$add": [NOW_US, Int64(new.ttl_us)]},
        "purge_at": {"$add": ["$$NOW", Int64(new.ttl_us // _US_PER_MS + _DAY_MS)]},
    }
    key, is_new = {"_id": "$_id"}, {"$eq": [{"$type": "$e"}, "missing"]}
    is_free = {"$or": [is_new, {"$lte": ["$e", NOW_US]}]}
    started = {"$mergeObjects": [key, {"$literal": session}, lasts]}
    refused = {"$cond": [is_new, {"$mergeObjects": [key, {"$literal": nothing}]}, "$$ROOT"]}
    return [{"$replaceWith": {"$cond": [{"$and": [is_free, in_time(new.not_after_us)]}, started, refused]}}]


def expiry(expires_at_us: int) -> dict[str, Any]:
    """Return the fields of an expiry."""
    return {"e": Int64(expires_at_us), "purge_at": DatetimeMS(expires_at_us // _US_PER_MS + _DAY_MS)}


def now_us(shown: dict[str, Any]) -> int:
    """Return the clock of what SHOWN has read."""
    return int(shown["now"]) * _US_PER_MS


def is_live(shown: dict[str, Any]) -> bool:
    """Tell whether what SHOWN has read is a live session; one that cannot be read never ends by itself."""
    at_us = (shown["d"] or {}).get("e")
    return not isinstance(at_us, int) or at_us > now_us(shown)


def session_of(shown: dict[str, Any]) -> Session | DamagedSession:
    """Return the session that SHOWN has read, or that it is damaged."""
    key, stored = shown["_id"], shown["d"]
    if stored is None:
        reason = f"its document is longer than {_MAX_DOCUMENT_BYTES} bytes"
        return DamagedSession(access_token=key, reason=reason)
    texts = [stored.get(name) for name in "scr"]
    bag, expires_at_us = stored.get("b"), stored.get("e")
    for name, text in zip(("subject", "client", "refresh token"), texts, strict=True):
        if not isinstance(text, str):
            return DamagedSession(access_token=key, reason=f"its {name} is missing, or not a string")
        if not is_text(text):
            return DamagedSession(access_token=key, reason="a field is not UTF-8")
    # A binary of another kind is read as an object of another class.
    if type(bag) is not bytes:
        return DamagedSession(access_token=key, reason="its bag is missing, or not a binary")
    if len(bag) > MAX_BAG_BYTES:
        return DamagedSession(access_token=key, reason=f"a bag is longer than {MAX_BAG_BYTES} bytes")
    if not isinstance(expires_at_us, int) or isinstance(expires_at_us, bool):
        return DamagedSession(access_token=key, reason="its expiry is missing, or not a whole number")
    subject, client, refresh = texts
    assert subject is not None and client is not None and refresh is not None  # noqa: PT018  # for mypy
    return Session(
        access_token=key,
        subject_id=subject,
        subject_client=client,
        refresh_token=refresh,
        bag=bag,
        expires_at_us=int(expires_at_us),
    )


def is_text(text: str) -> bool:
    """Tell whether a string can be sent to MongoDB again: it was UTF-8 there."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def version_of(shown: dict[str, Any]) -> dict[str, Any]:
    """Return the filter of a document that is as SHOWN has read it; it holds no large value."""
    stored = shown["d"] or {}
    same = {name: {"$eq": stored[name]} for name in ("e", "v") if isinstance(stored.get(name), int | bytes)}
    return {"_id": shown["_id"], **same, "$expr": {"$eq": [{"$bsonSize": "$$ROOT"}, shown["z"]]}}


def least_text(start: bytes) -> str:
    """Return the least string that is not below these bytes, which may end within a character."""
    try:
        return start.decode()
    except UnicodeDecodeError as exc:
        whole, cut = start[: exc.start], start[exc.start :]
    size = 2 if cut[0] < _LEADS_THREE else 3 if cut[0] < _LEADS_FOUR else 4
    # After these two leads, the least second byte is another one.
    second = {0xE0: b"\xa0", 0xF0: b"\x90"}.get(cut[0], b"\x80")
    filled = (cut + (second if len(cut) == 1 else b"")).ljust(size, b"\x80")
    return (whole + filled).decode(errors="ignore")
