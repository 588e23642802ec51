"""The storage port: what the daemon needs of a storage engine, in four parts.

- `SessionStore`: the sessions themselves. Every engine has it.
- `Storage`: opening, closing, the clock and the identity. Every engine has it.
- `RenamableStore`: renaming and walking through stored keys, which hashing tokens at rest needs. An
  engine without it says so in its capabilities (`storage/engines.py`).
- `CheckableStore`: walking through sessions, and removing them if unchanged, for `mnemosyned check`. The same
  holds for it.

The port speaks of sessions, not of rows, statements or commands: an adapter translates into its engine's
dialect, and the engine's errors into those of `mnemosyned/errors.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from aio.units import NEVER_US
from cluster.node_row import Barred, Renewal, Renewed
from mnemosyned.errors import MnemosyneError
from mnemosyned.sessions.columns import Found
from mnemosyned.sessions.model import (
    MAX_PAGE_BYTES,
    Abandonment,
    ChangedBag,
    Criteria,
    DamagedSession,
    Lookup,
    NewSession,
    Session,
    Touch,
    ValueChange,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletion:
    """What one step of a Delete has done."""

    stored_keys: list[str] = field(repr=False)  # of the ended sessions: tokens, or their hashes
    # No session is left that met the criteria when the step began.
    is_all: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What List has found."""

    sessions: Sequence[Found] = field(repr=False)
    is_cut: bool  # for its size, before its limit
    is_last: bool = False  # no session follows; an engine leaves it to its caller


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyedPage:
    """What a walk by stored key has found."""

    sessions: Sequence[Found] = field(repr=False)
    keys: Sequence[bytes] = field(repr=False)  # of the sessions; those of damaged ones may be cut
    next_key: bytes | None = field(repr=False)  # where the walk goes on; None: there is nothing left
    is_cut: bool  # for its size, before its limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Renaming:
    """Another stored key for a session."""

    old: str = field(repr=False)
    new: str = field(repr=False)


class SessionStore(Protocol):
    """Sessions by stored key, batch-first. An expired session does not exist, cleaned up or not.

    Results. Every batch method returns one result per item, in order. An item fails alone by having an
    exception for its result. Any method may raise StorageUnavailable for the whole batch, within the
    engine's own time-out. What the batch then did is unknown.

    Order. Batches never deadlock with one another, on this node or across nodes.

    Checks. The items are checked already (`model.py`), except for what only the engine can know: that is
    the item's InvalidArgument.

    Late writes. A write past its `not_after_us`, on the storage's clock, fails with DeadlineExceeded and is
    not done. It is therefore either done before everything that begins on this session after that instant,
    or never: its caller may repeat it then.
    """

    async def start(self, sessions: Sequence[NewSession]) -> list[Session | MnemosyneError]:
        """Store the sessions, to expire at now + their `ttl_us`; on return they survive a crash.

        An item's failure: SessionAlreadyExists (a live session, or an earlier item, has the token).
        """
        ...

    async def load(self, lookups: Sequence[Lookup]) -> list[Session | MnemosyneError]:
        """Read sessions, and move a stored expiry that has fallen behind; see `Lookup`.

        The result shows the stored expiry, moved or not. A load does not wait for a writer.
        An item's failure: SessionNotFound, CorruptSession (the engine cannot read it).
        """
        ...

    async def exist(self, tokens: Sequence[str]) -> list[bool | MnemosyneError]:
        """Tell which tokens have a live session; extends none."""
        ...

    async def set_values(self, changes: Sequence[ValueChange]) -> list[ChangedBag | MnemosyneError]:
        """Set keys of bags, in order; each result has the bag after its own change.

        Concurrent changes to different keys of one session never lose each other.
        A result may tell the session too, if that takes no further look: as the storage had it at one moment
        between the call and its return, when all changes of its token in the batch were done. Only its expiry
        may have moved on since it was found. Its bag is as this daemon writes it. An engine that does not
        know which of several changes was the last may tell different sessions for one token: a caller takes
        none.
        An item's failure: SessionNotFound, InvalidArgument (the bag would be too large), CorruptSession.
        """
        ...

    async def abandon(self, endings: Sequence[Abandonment]) -> list[bool | MnemosyneError]:
        """End sessions; False where there was no live one."""
        ...

    async def touch(self, touches: Sequence[Touch]) -> list[bool | MnemosyneError]:
        """Move stored expiries forward, never back; False where there is no live session."""
        ...

    async def find(
        self, criteria: Criteria, *, offset: int, limit: int, max_bytes: int = MAX_PAGE_BYTES
    ) -> Page:
        """Return live sessions by expiry, then by the bytes of the stored key.

        A bag over MAX_BAG_BYTES is damage, and is not read. The page is cut before the session with which its
        bags would be over `max_bytes`, if it has one already: no more is held in memory.
        """
        ...

    async def walk(
        self, criteria: Criteria, *, start: bytes, limit: int, max_bytes: int = MAX_PAGE_BYTES
    ) -> KeyedPage:
        """Return live sessions from a stored key on, by the bytes of the key; otherwise as `find`.

        It costs the same wherever it begins. An engine may therefore look at a bounded number of sessions
        that do not meet the criteria, and leave the others to the next page.
        """
        ...

    async def delete(self, criteria: Criteria, *, limit: int, not_after_us: int = NEVER_US) -> Deletion:
        """End at most `limit` sessions that meet all criteria, expired ones included.

        Late, it raises DeadlineExceeded and ends none.
        """
        ...

    async def clean_up(self, *, limit: int) -> list[str]:
        """Remove at most `limit` expired sessions; return their stored keys.

        Removes nothing while another node cleans up.
        """
        ...


class Storage(Protocol):
    """The engine as a whole: its connections, its clock, and which sessions it holds."""

    async def open(self) -> None:
        """Make the storage ready for use, creating what is missing.

        Raises:
            StorageUnavailable: not now; calling again may succeed.
            StorageRefused: it will never work like this; the text tells the operator why.
        """
        ...

    async def close(self) -> None:
        """Close the connections; calls under way fail."""
        ...

    async def now_us(self) -> int:
        """Return the storage's clock, microseconds since the epoch."""
        ...

    async def check(self) -> object:
        """Return what changes when the sessions are no longer those of before: dropped, restored, replaced.

        The test of health, every second or two (`storage/health.py`): it may mend what it finds.

        Raises:
            StorageUnavailable: calls cannot be answered; `detail` says why.
        """
        ...

    async def identity(self) -> bytes:
        """Return 16 bytes that only engines on the same sessions have in common."""
        ...

    async def estimated_sessions(self) -> int:
        """Return about how many sessions are stored, expired ones included; it must cost next to nothing."""
        ...


class LeaseStore(Protocol):
    """The rows of the nodes that share the sessions (`cluster/lease.py`): what a shared engine needs besides.

    Each method is linearizable: its effect on a row, and what it returns of that row, is as if it happened at
    one moment between its call and its return. On return the effect survives a crash of the storage.

    Any method may raise StorageUnavailable; then it is unknown whether it has been done, or will be.
    """

    async def renew(self, renewal: Renewal) -> Renewed:
        """Store the row of this node, unless a newer one or another process's is there; return all rows.

        - A new row has `seen + 1` as its epoch and base.
        - A row is replaced if it has the same instance and a smaller number, or is the one that the renewal
          `replaces`. Its epoch and base stay, unless `seen` is above the epoch, which is then `seen + 1`.
        - Otherwise the renewal is refused, which only the returned row shows: it is as it was at some moment
          since the call, as those of other nodes are.
        """
        ...

    async def bar(self, name: str) -> Barred | None:
        """Raise the epoch of a node's row by one; None: it has no row."""
        ...

    async def resign(self, row: tuple[str, int, int | None]) -> None:
        """Delete a row by name and instance, and by number unless that is None; another row stays."""
        ...


class RenamableStore(Protocol):
    """What hashing tokens at rest needs besides (`storage/hashed.py`)."""

    async def rename(self, renamings: Sequence[Renaming]) -> list[bool | MnemosyneError]:
        """Give live sessions new stored keys; tell of each whether there is one by either key.

        No key comes twice. Where a live session has the new key already, the session with the old key ends.
        A session that another writer holds is passed over. If it is the only one to be renamed, the engine
        waits for it, since nothing else is held meanwhile.
        An item's failure: StorageUnavailable (the wait was too long), InvalidArgument.
        """
        ...

    async def stored_keys_after(self, stored_key: str, *, limit: int) -> list[str]:
        """Return the least stored keys that are greater, in the order of their bytes; expired sessions too.

        Bytes that are not UTF-8, which no caller can name, are surrogates in the result.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredSession:
    """A session as `mnemosyned check` meets it, expired ones included."""

    stored_key: str = field(repr=False)  # bytes that are not UTF-8 are surrogates
    found: Session | DamagedSession
    version: object = field(repr=False)  # another one after every change


class CheckableStore(Protocol):
    """What `mnemosyned check` needs besides (`commands/check.py`)."""

    async def stored_from(self, stored_key: str, *, limit: int) -> list[StoredSession]:
        """Return the least stored keys from this one on, in the order of their bytes; expired sessions too.

        At most `limit`, and about MAX_PAGE_BYTES; an empty page is the end.
        """
        ...

    async def remove_unchanged(self, sessions: Sequence[StoredSession]) -> list[str]:
        """Remove the sessions that have still these versions; return their stored keys."""
        ...


class EngineStore(SessionStore, Storage, Protocol):
    """What every engine has."""


class SharedStore(EngineStore, LeaseStore, Protocol):
    """What an engine has whose sessions several nodes share."""


class FullStore(SharedStore, RenamableStore, CheckableStore, Protocol):
    """An engine with every part of the port."""


class StorageRefused(Exception):
    """The storage cannot be used as configured; no caller ever sees this."""
