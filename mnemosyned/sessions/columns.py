"""The sessions of a page by columns: a bulk read makes no object for a session. Pure.

    rows of the storage ── columns ── damage.are_ordinary ── page_response ── bytes of the answer
                              └── Session, for who asks for a single one

An object for a session costs as much as reading, checking and encoding it. A page of sessions that are all
as they should be therefore stays in columns, from the storage to the answer. Others are looked at one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import TypeAlias, overload

from mnemosyned.sessions.model import DamagedSession, Session

Found: TypeAlias = Session | DamagedSession


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionColumns(Sequence[Found]):
    """Sessions, of which none is known to be damaged; all texts are UTF-8, and empty where there is none."""

    tokens: Sequence[bytes] = field(repr=False)
    subject_ids: Sequence[bytes]
    subject_clients: Sequence[bytes]
    refresh_tokens: Sequence[bytes] = field(repr=False)
    bags: Sequence[bytes] = field(repr=False)  # stored form, see bag.py
    expiries_us: Sequence[int]

    @classmethod
    def of(cls, found: Sequence[Found]) -> SessionColumns | None:
        """Return sessions by columns; None: one of them is damaged."""
        if isinstance(found, cls):
            return found
        sessions = [one for one in found if isinstance(one, Session)]
        if len(sessions) < len(found):
            return None
        try:
            return cls(
                tokens=[one.access_token.encode() for one in sessions],
                subject_ids=[one.subject_id.encode() for one in sessions],
                subject_clients=[one.subject_client.encode() for one in sessions],
                refresh_tokens=[one.refresh_token.encode() for one in sessions],
                bags=[one.bag for one in sessions],
                expiries_us=[one.expires_at_us for one in sessions],
            )
        except UnicodeEncodeError:
            # A key in the storage that is no text.
            return None

    def __len__(self) -> int:
        return len(self.tokens)

    def __iter__(self) -> Iterator[Found]:
        return map(self.__getitem__, range(len(self)))

    @overload
    def __getitem__(self, at: int) -> Found: ...

    @overload
    def __getitem__(self, at: slice) -> SessionColumns: ...

    def __getitem__(self, at: int | slice) -> Found | SessionColumns:
        if isinstance(at, slice):
            return SessionColumns(
                tokens=self.tokens[at],
                subject_ids=self.subject_ids[at],
                subject_clients=self.subject_clients[at],
                refresh_tokens=self.refresh_tokens[at],
                bags=self.bags[at],
                expiries_us=self.expiries_us[at],
            )
        return Session(
            access_token=self.tokens[at].decode(),
            subject_id=self.subject_ids[at].decode(),
            subject_client=self.subject_clients[at].decode(),
            refresh_token=self.refresh_tokens[at].decode(),
            bag=self.bags[at],
            expires_at_us=self.expiries_us[at],
        )


def those(found: Sequence[Found], are_wanted: Sequence[bool]) -> Sequence[Found]:
    """Return the sessions that are wanted, by columns if they were."""
    if not isinstance(found, SessionColumns):
        return list(compress(found, are_wanted))
    return SessionColumns(
        tokens=list(compress(found.tokens, are_wanted)),
        subject_ids=list(compress(found.subject_ids, are_wanted)),
        subject_clients=list(compress(found.subject_clients, are_wanted)),
        refresh_tokens=list(compress(found.refresh_tokens, are_wanted)),
        bags=list(compress(found.bags, are_wanted)),
        expiries_us=list(compress(found.expiries_us, are_wanted)),
    )


def tokens_of(found: Sequence[Found]) -> Sequence[bytes]:
    """Return the tokens of sessions as bytes, also those that are no text."""
    if isinstance(found, SessionColumns):
        return found.tokens
    return [one.access_token.encode(errors="surrogateescape") for one in found]
