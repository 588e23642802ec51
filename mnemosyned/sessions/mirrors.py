"""This node's mirrors of other nodes' copies, and what this node has granted to others.

    as the entry node                                     as the owner
    (api/router.py)                                       (api/owner_router.py)
    open_at ── may one be served now?
    cache.peek ── hit: answered here
             └─── miss: a fill, and the call is
                  forwarded ────────────────────────────> grant ── the copy is read often: recorded, granted
    keep <─────────────────────────────────────────────── answer

`cluster/lease.py` has the rules, 17 to 21. A mirror is an entry of a second `ReadThrough`. It ends by this
machine's clock: the storage's may be set back, and the owner forgets what it has granted.

What a mirror is read for is written to the storage by this node (`touches.py`), in the way of the owner: a
session is extended no matter which of its copies was read, and whatever becomes of the owner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from aio.units import NS_PER_US
from cache.lru import Slot
from cluster.mirrors import Grants, MirrorHistory
from mnemosyned.sessions.clock import StorageClock, uptime_ns
from mnemosyned.sessions.encoded import EncodedSession
from mnemosyned.sessions.token_index import drop

if TYPE_CHECKING:
    from cache.read_through import Fill, ReadThrough
    from cluster.lease import Lease
    from cluster.view import View
    from mnemosyned.sessions.token_index import TokenIndex

# Calls of nodes that a copy answers until it is granted, with the last of them: the third read, after the one
# that loads it. A recall takes 370 us of CPU, and a mirror saves 260 a read (nodes and client, one call at a
# time). So a session that is written to after every second read never costs a recall, and whatever its
# callers do, granting costs at most about twice what would be best.
_READS: Final = 2
# For less time a mirror is not worth its message.
_LEAST_KEEP_US: Final = 1_000_000


class Grant(NamedTuple):
    """What the owner says with its answer."""

    keep_us: int  # how long the mirror may be kept, from before the owner was asked
    instance: int  # the owner's process, as its row names it
    expires_at_us: int  # as the answer has it


@dataclass(slots=True)
class MirrorCounters:
    """What happened to mirrors, besides hits and misses, which their cache counts."""

    grants: int = 0  # given to other nodes
    recalled: int = 0  # mirrors of this node that other nodes had it drop


class Mirrors:
    """The mirrors that this node has, and the grants that it gives."""

    def __init__(
        self,
        own: ReadThrough[EncodedSession],
        cache: ReadThrough[EncodedSession],
        *,
        index: TokenIndex | None,
        grants: Grants,
        lease: Lease,
        clock: StorageClock,
        is_wanted: bool,
    ) -> None:
        """Begin without any mirror.

        - `own` has the copies of this node's own tokens, of which it grants mirrors.
        - `cache` has the mirrors, and `index` observes it where tokens are hashed at rest.
        - `is_wanted` is whether this node asks other nodes for mirrors.
        """
        self.cache = cache
        self._index = index
        self.counters = MirrorCounters()
        self._own = own
        self._grants = grants
        self._lease = lease
        self._clock = clock
        self._is_wanted = is_wanted
        self._is_on = False  # this node is on the ring by which it routes
        self._history = MirrorHistory()
        cache.keeps = self._history.keeps

    # The entry node.

    def open_at(self, view: View, token: str, owner: str) -> int:
        """Return the time of a call that arrives now, if a mirror may answer it (rule 18); otherwise 0."""
        now_us = uptime_ns() // NS_PER_US
        if not self._is_on or now_us >= self._lease.until_us:
            return 0
        return now_us if not view.former or view.may_mirror(token, owner) else 0

    def keep(
        self, fill: Fill[EncodedSession], owner: str, response: bytes, grant: Grant, *, asked_us: int
    ) -> None:
        """Keep what the owner has answered and granted to a call that was sent after `asked_us`."""
        if grant.instance != self._history.process_of(owner):
            return
        encoded = EncodedSession.of_response(response, grant.expires_at_us)
        if encoded is not None:
            fill.put(Slot(encoded, encoded.size_bytes, asked_us + grant.keep_us))

    def follow(self, view: View) -> None:
        """Take a view with another ring, before any call is routed by it."""
        self._is_on = self._is_wanted and bool(view.routed)
        self.cache.change_generation()
        self._history.follow(view, self.cache.generation)

    def met(self, processes: Mapping[str, int]) -> None:
        """Take the processes of all rows, before any call sees the lease that came with them."""
        if self._history.is_new(processes):
            self.cache.change_generation()
            self._history.met(processes, self.cache.generation)

    def drop(self, keys: Iterable[str] | None) -> None:
        """Drop this node's mirrors of these sessions, named by their tokens or stored keys; None: of all."""
        if keys is None:
            self.cache.drop_everything()
            return
        for key in keys:
            drop(self.cache, self._index, key)

    def recall(self, drop_copies: Callable[[], None]) -> None:
        """Have this node drop copies for another node, and count the mirrors among them."""
        before = len(self.cache.lru)
        drop_copies()
        self.counters.recalled += before - len(self.cache.lru)

    # The owner.

    def grant(self, token: str, node: str) -> Grant | None:
        """Grant a mirror of the copy that was just read for a call of a node; None: it gets none.

        Call it in the step in which the copy was found and allowed to be served.
        """
        slot = self._own.lru.slots.get(token)
        if slot is None or not node:
            return None
        encoded = slot.value
        encoded.reads_of_peers += 1
        if encoded.reads_of_peers < _READS:
            return None
        keep_us = min(slot.fresh_until_us - self._clock.now_us(), self._grants.keep_us)
        if keep_us < _LEAST_KEEP_US or not self._grants.grant(token, node, now_us=uptime_ns() // NS_PER_US):
            return None
        self.counters.grants += 1
        return Grant(keep_us, self._lease.instance, encoded.expires_at_us)
