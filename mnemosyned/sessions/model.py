"""A session as the storage keeps it, its token, and the limits of what may be stored."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Final

from aio.deadline import NEVER_US
from mnemosyned.errors import InvalidArgument, MessageTooLarge

MAX_TOKEN_BYTES: Final = 4096
# PostgreSQL cannot index a longer incompressible value (a third of a page less overhead).
MAX_INDEXED_BYTES: Final = 2048
MAX_CLIENT_BYTES: Final = 64 * 1024
MAX_LIST_LIMIT: Final = 1000
DEFAULT_LIST_LIMIT: Final = 10
# What the bags of one page may add up to; a client accepts 4 MiB unless it is told otherwise.
MAX_PAGE_BYTES: Final = 16 * 1024 * 1024

# Of a bag, when a change does not say how many it may have.
NO_LIMIT: Final = 2**31

TOKEN_ENTROPY_BYTES: Final = 128
_TOKEN_DIGEST_BYTES: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSession:
    """A session to start; its expiry is the storage's to decide."""

    access_token: str = field(repr=False)
    subject_id: str
    subject_client: str = ""
    refresh_token: str = field(default="", repr=False)
    bag: bytes = field(default=b"", repr=False)  # stored form, see bag.py
    not_after_us: int = NEVER_US  # on the storage's clock, as below

    def size_bytes(self) -> int:
        """Bound the memory that the session takes in a batch; strings count as ASCII."""
        return len(self.access_token) + len(self.subject_id) + len(self.subject_client) + len(self.bag)


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A live session."""

    access_token: str = field(repr=False)
    subject_id: str
    subject_client: str
    refresh_token: str = field(repr=False)
    bag: bytes = field(repr=False)  # stored form, see bag.py
    expires_at_us: int  # microseconds since the epoch, on the storage's clock

    def is_from(self, new: NewSession) -> bool:
        """Tell whether this is what the call made, unchanged."""
        return (self.access_token, self.subject_id, self.subject_client, self.refresh_token, self.bag) == (
            new.access_token,
            new.subject_id,
            new.subject_client,
            new.refresh_token,
            new.bag,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueChange:
    """One key of one session's bag, to be set."""

    access_token: str = field(repr=False)
    key: str = field(repr=False)
    value: str = field(repr=False)
    not_after_us: int = NEVER_US
    max_entries: int = NO_LIMIT  # of the bag, if the key is new to it

    def size_bytes(self) -> int:
        """Bound the memory that the change takes in a batch; strings count as ASCII."""
        return len(self.access_token) + len(self.key) + len(self.value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandonment:
    """A session to be ended."""

    access_token: str = field(repr=False)
    not_after_us: int = NEVER_US


@dataclass(frozen=True, slots=True, kw_only=True)
class Touch:
    """A new expiry that a session has had in memory since its last write."""

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

    def has_range(self) -> bool:
        """Tell whether the answer depends on when sessions expire."""
        return self.expires_after_us is not None or self.expires_before_us is not None


def generate_token(entropy: bytes) -> str:
    """Return an access token made of TOKEN_ENTROPY_BYTES random bytes.

    128 hexadecimal digits: SHAKE256 to 64 bytes, as the Go daemon makes them.
    """
    return hashlib.shake_256(entropy).hexdigest(_TOKEN_DIGEST_BYTES)


def check_token(token: str) -> str:
    """Return the token if it can name a session.

    Raises:
        InvalidArgument: it is empty, over MAX_TOKEN_BYTES or contains a NUL character.
    """
    if not token:
        raise InvalidArgument("mnemosyned: missing access token")
    if "\0" in token:
        raise InvalidArgument("mnemosyned: access token contains a NUL character")
    # A character takes four bytes at most: short tokens, all real ones, need no encoding.
    if len(token) * 4 > MAX_TOKEN_BYTES and len(token.encode()) > MAX_TOKEN_BYTES:
        raise InvalidArgument(f"mnemosyned: access token is longer than {MAX_TOKEN_BYTES} bytes")
    return token


def check_new(session: NewSession) -> NewSession:
    """Return the session if it can be stored.

    Raises:
        InvalidArgument: a field is over its limit or holds what PostgreSQL's TEXT cannot.
    """
    check_token(session.access_token)
    _check_text("subject_id", session.subject_id, MAX_INDEXED_BYTES)
    _check_text("subject_client", session.subject_client, MAX_CLIENT_BYTES)
    _check_size("refresh_token", session.refresh_token, MAX_INDEXED_BYTES)
    return session


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


def page_too_large() -> MessageTooLarge:
    """Return the error for a page whose bags are over MAX_PAGE_BYTES."""
    return MessageTooLarge(
        f"mnemosyned: the page is larger than {MAX_PAGE_BYTES} bytes; ask for fewer sessions"
    )


def _check_text(name: str, text: str, max_bytes: int) -> None:
    if "\0" in text:
        raise InvalidArgument(f"mnemosyned: {name} contains a NUL character")
    _check_size(name, text, max_bytes)


def _check_size(name: str, text: str, max_bytes: int) -> None:
    if len(text.encode()) > max_bytes:
        raise InvalidArgument(f"mnemosyned: {name} is longer than {max_bytes} bytes")
