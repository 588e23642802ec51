"""Which stored sessions are not believed. Pure.

Others may write to the table: an older daemon, a person with SQL, a broken disk. What they have put there
must harm no other session, and must not say more than a session may. Three places ask the questions here:

- a fill of the cache, once for each session that it reads; a hit asks nothing
- List, which leaves damaged sessions out and counts them
- `mnemosyned check`, which finds and removes them

An engine answers the questions that only it can: what is missing, what is too long to be read at all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from aio.steps import Steps, finished
from mnemosyned.errors import CorruptSession, InvalidArgument
from mnemosyned.sessions import bag, many_bags, token_hash
from mnemosyned.sessions.bag import BagLimits
from mnemosyned.sessions.columns import SessionColumns
from mnemosyned.sessions.model import (
    MAX_INDEXED_BYTES,
    SHORT_FIELD_BYTES,
    DamagedSession,
    Session,
    check_fields,
)
from mnemosyned.sessions.token import check_token

# The last microsecond of the year 9999, where a google.protobuf.Timestamp ends.
MAX_EXPIRY_US: Final = 253_402_300_799_999_999
_SHORT_TEXT: Final = MAX_INDEXED_BYTES // 4


def checked(session: Session, limits: BagLimits) -> Session:
    """Return a session from the storage, its bag in our own form and its expiry one that an answer can hold.

    `limits` are those of stored bags (`BagLimits.of_stored`). An expiry after the year 9999, such as infinity
    in PostgreSQL, becomes the end of that year: it was written so that the session stays.

    Raises:
        CorruptSession: a field is over its limit, or the bag is damaged.
    """
    return finished(checking(session, limits))


def checking(session: Session, limits: BagLimits) -> Steps[Session]:
    """Do what `checked` does."""
    try:
        check_fields(session)
    except InvalidArgument as exc:
        raise CorruptSession(str(exc).replace("mnemosyned: ", "mnemosyned: storage: ", 1)) from None
    expires_at_us = max(0, min(session.expires_at_us, MAX_EXPIRY_US))
    fields = yield from bag.checking_fields(session.bag, limits)
    if fields is session.bag and expires_at_us == session.expires_at_us:
        return session
    return replace(session, bag=fields, expires_at_us=expires_at_us)


def is_ordinary(session: Session) -> bool:
    """Tell whether `checked` returns the session as it is; the quick answer for nearly all."""
    return has_ordinary_fields(session) and bag.is_ordinary(session.bag)


def has_ordinary_fields(session: Session) -> bool:
    """Tell the same of a session whose bag this daemon has just written."""
    return (
        # A character takes four bytes at most.
        len(session.subject_id) <= _SHORT_TEXT
        and len(session.subject_client) <= _SHORT_TEXT
        and len(session.refresh_token) <= _SHORT_TEXT
        and "\0" not in session.subject_id
        and "\0" not in session.subject_client
        and 0 <= session.expires_at_us <= MAX_EXPIRY_US
    )


def are_ordinary(sessions: SessionColumns) -> bool:
    """Tell of what a walk has found whether all of it is ordinary, and nameable; a quick answer for many."""
    if not sessions:
        return True
    texts = (sessions.tokens, sessions.subject_ids, sessions.subject_clients)
    return (
        all(sessions.tokens)
        and all(max(map(len, column)) <= SHORT_FIELD_BYTES for column in (*texts, sessions.refresh_tokens))
        and not any(b"\0" in b"".join(column) for column in texts)
        and min(sessions.expiries_us) >= 0
        and max(sessions.expiries_us) <= MAX_EXPIRY_US
        and many_bags.are_ordinary(sessions.bags)
    )


def nameable(found: Session | DamagedSession) -> Session | DamagedSession:
    """Return what a walk over stored keys has found; as damaged, if no call can name it by its key.

    A fill need not ask this: it has read the session by a token that was checked.
    """
    if isinstance(found, DamagedSession) or token_hash.is_session_id(
        token_hash.session_id(found.access_token)
    ):
        return found
    try:
        check_token(found.access_token)
    except InvalidArgument:
        reason = "access_token is none that a call can name"
        return DamagedSession(access_token=found.access_token, reason=reason)
    return found


def reason_against(found: Session | DamagedSession, limits: BagLimits) -> str | None:
    """Return what is wrong with what a walk over stored keys has found; None: nothing.

    `limits` are those of stored bags (`BagLimits.of_stored`).
    """
    named = nameable(found)
    if isinstance(named, DamagedSession):
        return named.reason
    try:
        checked(named, limits)
    except CorruptSession as exc:
        return reason_of(exc)
    return None


def reason_of(error: CorruptSession) -> str:
    """Return what an error says of a session, for a log line or a report."""
    return str(error).removeprefix("mnemosyned: storage: ")
