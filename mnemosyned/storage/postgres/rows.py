"""What the rows of PostgreSQL mean: sessions, pages and the results of single items. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aio.steps import Steps, cut
from mnemosyned.errors import DeadlineExceeded, MnemosyneError, SessionAlreadyExists
from mnemosyned.sessions.model import DamagedSession, NewSession, Session
from mnemosyned.sessions.store import Page

if TYPE_CHECKING:
    from asyncpg import Record


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
    try:
        # Rows of the Go daemon may have NULL for the client or the refresh token; it means the same as "".
        return Session(
            access_token=row["access_token"].decode(),
            subject_id=row["subject_id"],
            subject_client=row["subject_client"] or "",
            refresh_token=(row["refresh_token"] or b"").decode(),
            bag=row["bag"],
            expires_at_us=row["expire_at"],
        )
    except UnicodeDecodeError:
        return DamagedSession(access_token=escaped(row["access_token"]), reason="a token is not UTF-8")


def page_of(rows: list[Record], max_bytes: int) -> Steps[Page]:
    """Return the rows that fit into so many bytes, at least one. PostgreSQL withholds bags beyond them."""
    found: list[Session | DamagedSession] = []
    size_bytes = 0
    for part in cut(rows):
        if found:
            yield
        for row in part:
            is_withheld = row["bag"] is None and row["damage"] is None
            size_bytes += len(row["bag"] or b"")
            if found and (is_withheld or size_bytes > max_bytes):
                return Page(sessions=found, is_cut=True)
            found.append(session_of(row))
    return Page(sessions=found, is_cut=False)


def started(new: NewSession, row: Record) -> Session | MnemosyneError:
    """Return the result of a start whose row was asked for."""
    if row["expire_at"] is None:
        # A duplicate may be called late, which is safe: its caller does not know the outcome. A late start
        # is never called a duplicate, as its caller would take the token for used.
        return DeadlineExceeded() if row["is_late"] else SessionAlreadyExists()
    return Session(
        access_token=new.access_token,
        subject_id=new.subject_id,
        subject_client=new.subject_client,
        refresh_token=new.refresh_token,
        bag=new.bag,
        expires_at_us=row["expire_at"],
    )


def abandoned(row: Record | None) -> bool | MnemosyneError:
    """Return the result of an end; `row`: what was locked under the key."""
    # An expired row is deleted as well, but its session did not exist: False.
    if row is None:
        return False
    return DeadlineExceeded() if row["is_late"] else bool(row["was_live"])
