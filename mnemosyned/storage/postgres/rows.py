"""What the rows of PostgreSQL mean: sessions, pages and the results of single items. Pure."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, cast

from aio.steps import Steps, cut
from mnemosyned.errors import DeadlineExceeded, MnemosyneError, SessionAlreadyExists
from mnemosyned.sessions.columns import SessionColumns
from mnemosyned.sessions.model import DamagedSession, NewSession, Session
from mnemosyned.sessions.page_token import between
from mnemosyned.sessions.store import KeyedPage, Page
from mnemosyned.storage.postgres.columns import POSTGRES_EPOCH_US

if TYPE_CHECKING:
    from asyncpg import Record

# Both statements of List begin with so many columns: `Reading.listed`, and the bag.
_LISTED: Final = 7


def text(stored: bytes) -> str:
    """Return a key that is told to others."""
    # The Go daemon checks no UTF-8. A row that this daemon cannot have written must not hide the others.
    return stored.decode(errors="replace")


def escaped(stored: bytes) -> str:
    """Return a key that is sent to PostgreSQL again, whatever its bytes are."""
    return stored.decode(errors="surrogateescape")


def session_of(row: Record) -> Session | DamagedSession:
    """Return the session of a row, or that it is damaged."""
    if row["damage"] is not None:
        return DamagedSession(access_token=escaped(row["access_token"]), reason=row["damage"])
    return _session(
        row["access_token"],
        row["refresh_token"],
        row["subject_id"],
        row["subject_client"],
        row["bag"],
        row["expire_at"],
    )


def changed_session(row: Record, bag: bytes) -> Session | None:
    """Return the session of a row into which this bag was written; None: it is damaged."""
    # By their places, as the statement has them: by name it takes twice as long.
    key, refresh, subject, client, expires_at_us, damage = row
    if damage is not None:
        return None
    found = _session(key, refresh, subject, client, bag, expires_at_us)
    return found if isinstance(found, Session) else None


def _session(  # noqa: PLR0917  # a row's columns, and keywords take longer
    key: bytes, refresh: bytes | None, subject: bytes, client: bytes | None, bag: bytes, expires_at_us: int
) -> Session | DamagedSession:
    try:
        # Rows of the Go daemon may have NULL for the client or the refresh token; it means the same as "".
        return Session(
            access_token=key.decode(),
            subject_id=subject.decode(),
            subject_client=client.decode() if client else "",
            refresh_token=refresh.decode() if refresh else "",
            bag=bag,
            expires_at_us=expires_at_us,
        )
    except UnicodeDecodeError:
        return DamagedSession(access_token=escaped(key), reason="a token is not UTF-8")


def page_of(rows: list[Record], max_bytes: int) -> Steps[Page]:
    """Return the rows that fit into so many bytes, at least one. PostgreSQL withholds bags beyond them."""
    columns = _columns_of(rows)
    if columns is not None and sum(map(len, columns.bags)) <= max_bytes:
        return Page(sessions=columns, is_cut=False)
    found: list[Session | DamagedSession] = []
    size_bytes = 0
    for part in cut(rows):
        if found:
            yield
        for row in part:
            key, refresh, subject, client, expiry, damage, bag = row[:_LISTED]
            size_bytes += len(bag or b"")
            is_withheld = bag is None and damage is None
            if (is_withheld or size_bytes > max_bytes) and found:
                return Page(sessions=found, is_cut=True)
            if damage is None:
                (expires_at_us,) = _instants_us([expiry])
                found.append(_session(key, refresh, subject, client, bag, expires_at_us))
            else:
                found.append(DamagedSession(access_token=escaped(key), reason=damage))
    return Page(sessions=found, is_cut=False)


def _columns_of(rows: list[Record]) -> SessionColumns | None:
    """Return the sessions of rows of List; None: one is damaged, or its bag is withheld."""
    if not rows:
        return None
    keys, refreshes, subjects, clients, expiries, damages, bags = list(zip(*rows, strict=True))[:_LISTED]
    if any(damages) or None in bags:
        return None
    found = SessionColumns(
        tokens=keys,
        subject_ids=subjects,
        subject_clients=[one or b"" for one in clients],
        refresh_tokens=[one or b"" for one in refreshes] if any(refreshes) else [b""] * len(rows),
        bags=bags,
        expiries_us=_instants_us(expiries),
    )
    try:
        for texts in (found.tokens, found.subject_ids, found.subject_clients, found.refresh_tokens):
            # No text goes on behind a NUL.
            b"\0".join(texts).decode()
    except UnicodeDecodeError:
        return None
    return found


def _instants_us(expiries: Sequence[bytes] | Sequence[int]) -> list[int]:
    """Return the expiries of List, which come as bytes, or from plain statements as numbers."""
    if isinstance(expiries[0], int):
        return [*cast("Sequence[int]", expiries)]
    found = b"".join(cast("Sequence[bytes]", expiries))
    return [us + POSTGRES_EPOCH_US for us in struct.unpack(f">{len(expiries)}q", found)]


def keyed_page_of(rows: list[Record], max_bytes: int) -> Steps[KeyedPage]:
    """Return the page of a walk, whose last row may be the one after it."""
    following = rows.pop() if rows and rows[-1]["is_next"] else None
    page = yield from page_of(rows, max_bytes)
    count = len(page.sessions)
    keys = [row["access_token"] for row in rows[:count]]
    next_key = None
    if page.is_cut:
        next_key = between(keys[-1], rows[count]["access_token"])
    elif following is not None:
        # The key before it need not be of the page: rows that meet nothing are not looked at again.
        next_key = between(following["before"], following["access_token"])
    return KeyedPage(sessions=page.sessions, keys=keys, next_key=next_key, is_cut=page.is_cut)


def started(new: NewSession, row: Record) -> Session | MnemosyneError:
    """Return the result of a start whose row was asked for."""
    if row["expire_at"] is None:
        # A duplicate may be called late, which is safe: its caller does not know the outcome. A late start
        # is never called a duplicate, as its caller would take the token for used.
        return DeadlineExceeded() if row["is_late"] else SessionAlreadyExists()
    return new.stored(row["expire_at"])


def abandoned(row: Record | None) -> bool | MnemosyneError:
    """Return the result of an end; `row`: what was locked under the key."""
    # An expired row is deleted as well, but its session did not exist: False.
    if row is None:
        return False
    return DeadlineExceeded() if row["is_late"] else bool(row["was_live"])
