"""A session as the storage keeps it, what may be asked of one, and the limits of what may be stored. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from aio.units import NEVER_US
from mnemosyned.errors import CorruptSession, InvalidArgument
from mnemosyned.sessions.token import check_token

# Every engine indexes these fields; PostgreSQL's index entries, the smallest, hold about 2,700 bytes.
MAX_INDEXED_BYTES: Final = 2048
MAX_CLIENT_BYTES: Final = 64 * 1024
# Nearly all fields but the bag are as short: the quick ways of List are for pages of such sessions.
SHORT_FIELD_BYTES: Final = 512
# A session must fit into the 4 MiB that a gRPC client accepts unless it is told otherwise.
MAX_BAG_BYTES: Final = 4_000_000
MAX_LIST_LIMIT: Final = 1000
DEFAULT_LIST_LIMIT: Final = 10
# The bags of one page of List together; a client accepts 4 MiB unless it is told otherwise.
MAX_PAGE_BYTES: Final = 16 * 1024 * 1024  # of a response of List
# What gRPC clients accept unless they are told otherwise.
DEFAULT_PAGE_BYTES: Final = 4 * 1024 * 1024

# The bound on a bag's entries when a change names none.
NO_LIMIT: Final = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSession:
    """A session to start. The storage decides its expiry: the time on its clock plus `ttl_us`."""

    access_token: str = field(repr=False)
    subject_id: str
    ttl_us: int
    subject_client: str = ""
    refresh_token: str = field(default="", repr=False)
    bag: bytes = field(default=b"", repr=False)  # stored form, see bag.py
    not_after_us: int = NEVER_US  # on the storage's clock; a later start must not be done

    def size_bytes(self) -> int:
        """Bound the memory that the session takes in a batch; strings count as ASCII."""
        return len(self.access_token) + len(self.subject_id) + len(self.subject_client) + len(self.bag)

    def stored(self, expires_at_us: int) -> Session:
        """Return the session that it has become."""
        return Session(
            access_token=self.access_token,
            subject_id=self.subject_id,
            subject_client=self.subject_client,
            refresh_token=self.refresh_token,
            bag=self.bag,
            expires_at_us=expires_at_us,
        )


# Not frozen: one is made for each row, and a frozen one takes three times as long. Nothing changes one.
@dataclass(slots=True, kw_only=True)
class Session:
    """A live session."""

    access_token: str = field(repr=False)
    subject_id: str
    subject_client: str
    refresh_token: str = field(repr=False)
    bag: bytes = field(repr=False)  # stored form, see bag.py
    expires_at_us: int  # microseconds since the epoch, on the storage's clock

    def is_from(self, new: NewSession) -> bool:
        """Tell whether the session is what this start made, unchanged."""
        return (self.access_token, self.subject_id, self.subject_client, self.refresh_token, self.bag) == (
            new.access_token,
            new.subject_id,
            new.subject_client,
            new.refresh_token,
            new.bag,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DamagedSession:
    """A stored session that an engine cannot read; other sessions are not affected."""

    access_token: str = field(repr=False)  # as in Session; bytes that are not UTF-8 are surrogates
    reason: str  # holds no value of the session

    def error(self) -> CorruptSession:
        """Return what a caller sees who asks for the session."""
        return CorruptSession(f"mnemosyned: storage: {self.reason}")


# Not frozen: one is made for each miss, and a frozen one takes three times as long.
@dataclass(slots=True, kw_only=True)
class Lookup:
    """A session to read for a Get, which extends it to the time on the storage's clock plus `ttl_us`.

    The stored expiry is moved only when it lies more than `touch_interval_us` behind, so most reads write
    nothing.
    """

    access_token: str = field(repr=False)
    ttl_us: int
    touch_interval_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueChange:
    """One key of one session's bag, to be set."""

    access_token: str = field(repr=False)
    key: str = field(repr=False)
    value: str = field(repr=False)
    not_after_us: int = NEVER_US
    max_entries: int = NO_LIMIT  # of the bag, if the key is new to it
    max_key_bytes: int = NO_LIMIT  # of the keys that the bag has already

    def size_bytes(self) -> int:
        """Bound the memory that the change takes in a batch; strings count as ASCII."""
        return len(self.access_token) + len(self.key) + len(self.value)


# Not frozen: one is made for each change, and a frozen one takes three times as long. Nothing changes one.
@dataclass(slots=True)
class ChangedBag:
    """What a change has led to."""

    values: dict[str, str] = field(repr=False)  # the bag after this change
    # The session after the last change of its token in the batch; None: the engine does not tell.
    session: Session | None = field(repr=False, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandonment:
    """A session to be ended."""

    access_token: str = field(repr=False)
    not_after_us: int = NEVER_US


@dataclass(frozen=True, slots=True, kw_only=True)
class Touch:
    """The expiry that a session has in memory, for the storage to catch up with."""

    access_token: str = field(repr=False)
    expires_at_us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Criteria:
    """Which sessions to list or delete: all given criteria must hold; both ends are exclusive."""

    access_token: str | None = field(default=None, repr=False)
    refresh_token: str | None = field(default=None, repr=False)
    subject_id: str | None = None
    expires_after_us: int | None = None
    expires_before_us: int | None = None

    def is_empty(self) -> bool:
        """Tell whether nothing was asked for, which must never mean everything."""
        return self == Criteria()

    def meets(self, session: Session) -> bool:
        """Tell whether a session is one of those meant."""
        wanted_by_found = (
            (session.access_token, self.access_token),
            (session.refresh_token, self.refresh_token),
            (session.subject_id, self.subject_id),
        )
        is_wanted = all(wanted is None or found == wanted for found, wanted in wanted_by_found)
        return is_wanted and self.allows(session.expires_at_us)

    def allows(self, expires_at_us: int) -> bool:
        """Tell whether a session that expires then is in the range."""
        after_us, before_us = self.expires_after_us, self.expires_before_us
        is_late_enough = after_us is None or expires_at_us > after_us
        return is_late_enough and (before_us is None or expires_at_us < before_us)

    def has_range(self) -> bool:
        """Tell whether the answer depends on when sessions expire."""
        return self.expires_after_us is not None or self.expires_before_us is not None


def check_new(session: NewSession) -> NewSession:
    """Return the session if it can be stored.

    Raises:
        InvalidArgument: a field is over its limit or contains a NUL character, which not every engine can
        store.
    """
    check_token(session.access_token)
    check_fields(session)
    return session


def check_fields(session: NewSession | Session) -> None:
    """Raise InvalidArgument if another field than the token and the bag cannot be stored."""
    _check_text("subject_id", session.subject_id, MAX_INDEXED_BYTES)
    _check_text("subject_client", session.subject_client, MAX_CLIENT_BYTES)
    _check_size("refresh_token", session.refresh_token, MAX_INDEXED_BYTES)


def check_criteria(criteria: Criteria) -> Criteria:
    """Return the criteria if a storage can compare them.

    Raises:
        InvalidArgument: a criterion that no stored session could have.
    """
    if criteria.access_token is not None:
        check_token(criteria.access_token)
    if criteria.subject_id is not None:
        _check_text("subject_id", criteria.subject_id, MAX_INDEXED_BYTES)
    if criteria.refresh_token is not None:
        _check_size("refresh_token", criteria.refresh_token, MAX_INDEXED_BYTES)
    return criteria


def _check_text(name: str, text: str, max_bytes: int) -> None:
    if "\0" in text:
        raise InvalidArgument(f"mnemosyned: {name} contains a NUL character")
    _check_size(name, text, max_bytes)


def _check_size(name: str, text: str, max_bytes: int) -> None:
    # A character takes four bytes at most, so short texts need no encoding.
    if len(text) * 4 > max_bytes and len(text.encode()) > max_bytes:
        raise InvalidArgument(f"mnemosyned: {name} is longer than {max_bytes} bytes")
