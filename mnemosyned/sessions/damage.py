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

from mnemosyned.errors import CorruptSession, InvalidArgument
from mnemosyned.sessions import bag, token_hash
from mnemosyned.sessions.bag import BagLimits
from mnemosyned.sessions.model import DamagedSession, Session, check_fields
from mnemosyned.sessions.token import check_token

# A google.protobuf.Timestamp ends with the year 9999.
_MAX_EXPIRY_US: Final = 253_402_300_800_000_000


def checked(session: Session, limits: BagLimits) -> Session:
    """Return a session from the storage, its bag in our own form.

    `limits` are those of stored bags (`BagLimits.of_stored`).

    Raises:
        CorruptSession: a field is over its limit, the bag is damaged, or the expiry is no time.
    """
    try:
        check_fields(session)
    except InvalidArgument as exc:
        raise CorruptSession(str(exc).replace("mnemosyned: ", "mnemosyned: storage: ", 1)) from None
    if not 0 <= session.expires_at_us < _MAX_EXPIRY_US:
        raise CorruptSession("mnemosyned: storage: expire_at is no time before the year 10000")
    fields = bag.checked_fields(session.bag, limits)
    return session if fields is session.bag else replace(session, bag=fields)


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


def reason_of(error: CorruptSession) -> str:
    """Return what an error says of a session, for a log line or a report."""
    return str(error).removeprefix("mnemosyned: storage: ")
