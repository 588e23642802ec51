"""The copies of sessions that this node's own SetValues have changed.

A write drops the copy of its session, and the next Get would load what this node has just written. So the
storage tells the session with the answer to a change, and its copy takes the place of the old one:

    caller       batched        store          this node's cache        another write
      | SetValue    |             |                    |                      |
      |------------>|-- begin: a fill of each token -->|                      |
      |             |-- batch --->| commit             |                      |
      |             |             |                    |<- drop, close fills -| has ended meanwhile
      |             |<- sessions -|                    |                      |
      |             |----------- drop, then keep ----->| refused in that case |
      |<- answer ---|             |                    |                      |

Rules for editing:
- The fill is opened before the store is called, and only if this node may keep copies of the session (rule 22
  of `cluster/lease.py`): by the ring by which the call was routed here, which `generation` stands for, and by
  the lease at that moment.
- Nothing is awaited between `drop` and `keep`. Without `keep`, after a failure, the copy is only dropped.
- Copies are kept of what the storage says, never of an old copy with a new value: meanwhile the session may
  have been ended, and another one started with its token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self, TypeAlias

from mnemosyned.sessions import damage
from mnemosyned.sessions.model import ChangedBag, Session, ValueChange

if TYPE_CHECKING:
    from cache.lru import Slot
    from cache.read_through import Fill, ReadThrough
    from mnemosyned.errors import MnemosyneError
    from mnemosyned.sessions.clock import StorageClock
    from mnemosyned.sessions.coherence import Coherence
    from mnemosyned.sessions.encoded import EncodedSession

# Makes the copy of a session that was asked for at an instant.
MakeSlot: TypeAlias = "Callable[[Session, int], Slot[EncodedSession]]"

# The bags of one batch of which copies are made. It is one step, and other calls wait for it.
_MOST_BYTES: Final = 512 * 1024
# A load would have answered the first Get of a node. So it is no read for which a mirror is granted.
_READS_BEFORE: Final = -1


# Not frozen: one is made for each change, and a frozen one takes three times as long.
@dataclass(slots=True)
class Change:
    """A change, and since which generation of the cache this node may keep a copy of it; None: it may not."""

    change: ValueChange
    generation: int | None

    @property
    def token(self) -> str:
        """The session's token."""
        return self.change.access_token

    def size_bytes(self) -> int:
        """Bound the memory that the change takes in a batch."""
        return self.change.size_bytes()


class ChangedCopies:
    """Opens the fills of each batch of changes."""

    def __init__(
        self,
        cache: ReadThrough[EncodedSession],
        coherence: Coherence,
        *,
        clock: StorageClock,
        make_slot: MakeSlot,
    ) -> None:
        self._cache = cache
        self._coherence = coherence
        self._clock = clock
        self._make_slot = make_slot

    def begin(self, changes: Sequence[Change]) -> BatchCopies:
        """Begin with a batch, before the store is called; use it as a context manager."""
        tokens = [change.token for change in changes]
        fills = {
            change.token: self._cache.begin_fill(change.token, generation=change.generation)
            for change in {
                change.token: change for change in changes if change.generation is not None
            }.values()
        }
        asked_us = self._clock.now_us()
        return BatchCopies(tokens, fills, self._coherence, lambda session: self._make_slot(session, asked_us))


class BatchCopies:
    """The copies that one batch of changes may leave."""

    def __init__(
        self,
        tokens: Sequence[str],
        fills: Mapping[str, Fill[EncodedSession]],
        coherence: Coherence,
        make_slot: Callable[[Session], Slot[EncodedSession]],
    ) -> None:
        self._tokens = tokens
        self._fills = fills
        self._coherence = coherence
        self._make_slot = make_slot

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for fill in self._fills.values():
            fill.__exit__()

    def drop(self, token: str) -> None:
        """Drop this node's copies of a session, and close all fills but that of this batch."""
        self._coherence.drop_copy(token, but=self._fills.get(token))

    def keep(self, results: Sequence[ChangedBag | MnemosyneError]) -> None:
        """Keep copies of what the store has told, unless another write has ended meanwhile."""
        size_bytes = 0
        for token, session in _told(self._tokens, results).items():
            if token not in self._fills or session is None or not damage.has_ordinary_fields(session):
                continue
            size_bytes += len(session.bag)
            if size_bytes > _MOST_BYTES:
                break
            slot = self._make_slot(session)
            slot.value.reads_of_peers = _READS_BEFORE
            self._fills[token].put(slot)


def _told(tokens: Sequence[str], results: Sequence[ChangedBag | MnemosyneError]) -> dict[str, Session | None]:
    """Return the session of each token if all changes of it have led to the same one."""
    told: dict[str, Session | None] = {}
    for token, result in zip(tokens, results, strict=True):
        session = result.session if isinstance(result, ChangedBag) else None
        told[token] = session if told.get(token, session) == session else None
    return told
