"""The storage port: what the service needs of a storage engine, batch-first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mnemosyned.errors import MnemosyneError
from mnemosyned.sessions.model import Abandonment, Criteria, NewSession, Session, Touch, ValueChange


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletion:
    """What one step of a Delete has done."""

    names: list[str] = field(repr=False)  # of the sessions: their tokens, or what stands for these (names.py)
    # Nothing is left that met the criteria when the step began.
    is_all: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Renaming:
    """Another name for a session."""

    old: str = field(repr=False)
    new: str = field(repr=False)


class SessionStore(Protocol):
    """Sessions by token; expired ones do not exist, cleaned up or not.

    Every batch method returns one result per item, in order; an item fails alone by having an
    exception for a result. Any method may raise StorageUnavailable for the whole batch, within the
    engine's own time-out; what it then did is unknown. Batches never deadlock with one another:
    engines lock rows in the order of their tokens. Items are checked already (session.py), but for
    what only the engine can know (InvalidArgument).

    A write past its `not_after_us` fails with DeadlineExceeded and is not done. So it is either done
    before whatever is begun on the session after that instant, or never: its caller may repeat it then.
    """

    async def start(self, sessions: Sequence[NewSession]) -> list[Session | MnemosyneError]:
        """Store the sessions, to expire at now + ttl; on return they survive a crash.

        An item's failure: SessionAlreadyExists (a live session, or an earlier item, has the token).
        """
        ...

    async def load(self, tokens: Sequence[str]) -> list[Session | MnemosyneError]:
        """Read sessions for Gets, and move a stored expiry that has fallen behind now + ttl.

        It is moved only when it lies more than the engine's touch interval behind, so that most
        loads write nothing; the result shows the stored expiry, moved or not.
        An item's failure: SessionNotFound.
        """
        ...

    async def exist(self, tokens: Sequence[str]) -> list[bool | MnemosyneError]:
        """Tell which tokens have a live session; extends none."""
        ...

    async def set_values(self, changes: Sequence[ValueChange]) -> list[dict[str, str] | MnemosyneError]:
        """Set keys of bags, in order; each result is the bag after its own change.

        Concurrent changes to different keys of one session never lose each other.
        An item's failure: SessionNotFound, InvalidArgument (the bag would be too large), CorruptBag.
        """
        ...

    async def abandon(self, endings: Sequence[Abandonment]) -> list[bool | MnemosyneError]:
        """Delete sessions; False where there was no live one."""
        ...

    async def touch(self, touches: Sequence[Touch]) -> list[bool | MnemosyneError]:
        """Move stored expiries forward, never back; False where there is no live session."""
        ...

    async def find(self, criteria: Criteria, *, offset: int, limit: int) -> list[Session]:
        """Return live sessions by expiry, then token.

        Raises:
            MessageTooLarge: their bags are over MAX_PAGE_BYTES; no more than that was held in memory.
        """
        ...

    async def delete(self, criteria: Criteria, *, limit: int) -> Deletion:
        """Delete at most `limit` sessions that meet all criteria, expired rows included."""
        ...

    async def clean_up(self, *, limit: int) -> list[str]:
        """Delete at most `limit` expired rows and return their names; nothing while another node does so."""
        ...

    async def rename(self, renamings: Sequence[Renaming]) -> list[bool | MnemosyneError]:
        """Give live sessions new names; tell of each whether there is one by either name.

        No name comes twice. Where a live session has the new name already, the one by the old name ends.
        One that another writer holds is passed by, unless it is the only one to be renamed: then it is
        waited for, as nothing else is held meanwhile.
        An item's failure: StorageUnavailable (it was waited for too long), InvalidArgument.
        """
        ...

    async def stored_keys_after(self, name: str, *, limit: int) -> list[str]:
        """Return the least names, in the order of their bytes, that are greater; of expired rows too.

        Bytes that are no UTF-8, and so no session's that anybody could name, are surrogates in it.
        """
        ...

    async def now_us(self) -> int:
        """Return the storage's clock, microseconds since the epoch; also the test of its health."""
        ...

    async def fingerprint(self) -> bytes:
        """Return 16 bytes that only engines on the same sessions have in common."""
        ...

    async def open(self) -> None:
        """Make the storage ready for use, creating what is missing.

        Raises:
            StorageUnavailable: not now; calling again may succeed.
            StorageRefused: it will never work like this; the text tells the operator why.
        """
        ...

    async def close(self) -> None:
        """Let go of connections; calls under way fail."""
        ...


class StorageRefused(Exception):
    """The storage cannot be used as configured; no caller ever sees this."""
