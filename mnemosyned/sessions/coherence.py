"""Who must drop which copy before which acknowledgement. The one initiator of invalidation.

A session may be in four places besides the storage: this node's cache, this node's negative cache, and both
caches of other nodes. Every write goes through this module, around its call of the store:

    caller          service          store                  this node's cache     other nodes
      |  Abandon       |                |                          |                   |
      |--------------->|--- batch ----->| commit                   |                   |
      |                |<---------------|                          |                   |
      |                |---------------- drop, close fills ------->|                   |
      |                |---------------- invalidate, if another node may have a copy ->| drop, close fills
      |                |<--------------- confirmed, or given up after the time of forwarding
      |<-- answer -----|                                                               |

The rules:

1. This node's copies are dropped as soon as the store has answered, before any caller gets the answer. They
   are dropped also when the store failed, because the write may have been done.
2. Other nodes are told when they may have a copy. The `Invalidator` decides that from what this node
   routed by before and after the store's call (`cluster/`, `node.py`).
3. A write is acknowledged when the nodes that must be told have confirmed, or when half of the caller's
   remaining time has passed. What could not be told by then is remembered and told later; until then this
   node asks that peer nothing.
4. Telling does not end with its caller. A caller that is cancelled, or whose connection breaks, leaves
   the invalidation running, because the session has changed, whether or not a caller still waits.
5. "A write" is every call after which its caller may believe something new: Start, SetValue, Abandon,
   also an Abandon that finds nothing, and Delete.

The unit of invalidation is the batch: one round of messages for all sessions that one batch of the store
has changed.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar

from aio.deadline import NO_DEADLINE, Deadline
from aio.tasks import Tasks
from mnemosyned.errors import MnemosyneError
from mnemosyned.sessions import token_hash

if TYPE_CHECKING:
    from cache.read_through import ReadThrough
    from mnemosyned.sessions.encoded import EncodedSession
    from mnemosyned.sessions.store import Deletion
    from mnemosyned.sessions.token_hash import TokenHasher

Result = TypeVar("Result")

# No settling takes longer than the invalidator's own time-outs; a caller without a deadline waits for those.
_NO_LIMIT_S: Final = 3600.0


class Invalidator(Protocol):
    """Has other nodes drop their copies of sessions.

    A lease in the store will replace what is behind this port; a node without peers has none.
    """

    def routing(self) -> object:
        """Return what this node routes by now; taken before the store is asked."""
        ...

    def after_write(self, tokens: Sequence[str], routed_by: object) -> Coroutine[Any, Any, None] | None:
        """Return the work of telling other nodes of these tokens; None if no other node can have a copy.

        `routed_by` is what `routing` returned before the write. The work ends within the invalidator's own
        time-out, raises nothing, and remembers what it could not tell.
        """
        ...

    def give_up(self, tokens: Sequence[str]) -> None:
        """Take note that a caller is answered before every node has confirmed.

        This node then asks no other node about any session before that node has been told of these.
        """
        ...

    def after_delete(self, stored_keys: Sequence[str]) -> Coroutine[Any, Any, None] | None:
        """Return the same for sessions that were found by criteria, named by their stored keys.

        A stored key that is a hash names its owner to no node, so every node is told of it.
        """
        ...


@dataclass(frozen=True, slots=True)
class Telling:
    """The invalidation of other nodes' copies for one batch of writes, under way."""

    task: asyncio.Task[None]
    give_up: Callable[[], None]

    async def wait(self, deadline: Deadline) -> None:
        """Return when it has ended, or when half of the time that is left has passed; cancel nothing."""
        _, unfinished = await asyncio.wait([self.task], timeout=deadline.share_s(_NO_LIMIT_S))
        if unfinished:
            self.give_up()


# Not frozen: one is made for each write, and a frozen one takes three times as long.
@dataclass(slots=True)
class Written(Generic[Result]):
    """What one item of a batch of writes came to, and the telling that its caller must wait for."""

    result: Result | MnemosyneError
    telling: Telling | None

    async def outcome(self, deadline: Deadline) -> Result:
        """Wait until other nodes have dropped their copies; then return the result, or raise it."""
        if self.telling is not None:
            await self.telling.wait(deadline)
        if isinstance(self.result, MnemosyneError):
            raise self.result
        return self.result


class TokenIndex:
    """The tokens of cached sessions by stored key, for invalidations that name a hash. A KeyObserver."""

    def __init__(self, hasher: TokenHasher) -> None:
        self._hasher = hasher
        self._token_by_stored_key: dict[str, str] = {}

    def added(self, token: str) -> None:
        """See KeyObserver."""
        self._token_by_stored_key[self._hasher.stored_key(token)] = token

    def removed(self, token: str) -> None:
        """See KeyObserver."""
        self._token_by_stored_key.pop(self._hasher.stored_key(token), None)

    def cleared(self) -> None:
        """See KeyObserver."""
        self._token_by_stored_key.clear()

    def find(self, stored_key: str) -> str | None:
        """Return the cached token that this is the hash of."""
        return self._token_by_stored_key.get(stored_key)

    def knows(self, stored_key: str) -> bool:
        """Tell whether `find` can find this hash: one made with another key may stand for any token."""
        return self._hasher.makes(stored_key)


class Coherence:
    """Drops this node's copies, and has other nodes drop theirs."""

    def __init__(
        self,
        cache: ReadThrough[EncodedSession],
        *,
        index: TokenIndex | None = None,
        invalidator: Invalidator | None = None,
    ) -> None:
        """`index` observes the cache's keys where tokens are hashed at rest."""
        self._cache = cache
        self._index = index
        self._invalidator = invalidator
        # As many as there are batches in the time that one telling takes; dropping one would break rule 2.
        self._tasks = Tasks("invalidation", max_tasks=sys.maxsize)

    async def close(self) -> None:
        """Cancel what is still being told."""
        await self._tasks.close()

    async def around_write(
        self,
        tokens: Sequence[str],
        store_call: Awaitable[Sequence[Result | MnemosyneError]],
        *,
        drop: Callable[[str], None] | None = None,
    ) -> list[Written[Result]]:
        """Await a batch of writes to these tokens' sessions, and invalidate by the rules above.

        `drop` replaces `drop_copy` for this node's own cache. It must run in a task that no caller cancels.
        """
        routed_by = None if self._invalidator is None else self._invalidator.routing()
        try:
            results = await store_call
        except BaseException as exc:
            telling = self._invalidate(tokens, routed_by, drop or self.drop_copy)
            if telling is not None and isinstance(exc, Exception):
                # The batch fails as one, and the error itself cannot carry the telling to each caller.
                await telling.wait(NO_DEADLINE)
            raise
        telling = self._invalidate(tokens, routed_by, drop or self.drop_copy)
        return [Written(result, telling) for result in results]

    async def around_delete(
        self, store_call: Coroutine[Any, Any, Deletion], *, token: str | None = None
    ) -> Deletion:
        """Await one step of a Delete, invalidate what it ended, and return it; runs on without its caller.

        `token` is the criterion, if there is one: then its copies are dropped also when the store failed.
        Which sessions a failed Delete by other criteria has ended, nothing here knows.
        """
        return await self._tasks.run_shielded(self._delete(store_call, token))

    def drop_made(self, token: str) -> None:
        """Drop what this node read before a session with this token was started."""
        self._cache.made(token)

    def drop_copy(self, key: str) -> None:
        """Drop this node's copies of one session, named by its token or its stored key.

        A hash that this node cannot find the token of may be of any token, so it drops everything.
        """
        if not token_hash.is_hashed(key):
            self._cache.drop(key)
        elif self._index is None or not self._index.knows(key):
            self._cache.drop_everything()
        elif (token := self._index.find(key)) is not None:
            self._cache.drop(token)

    def drop_copies(self, keys: Iterable[str] | None) -> None:
        """Drop this node's copies of these sessions; None: of all."""
        if keys is None:
            self._cache.drop_everything()
            return
        for key in keys:
            self.drop_copy(key)

    def _invalidate(
        self, tokens: Sequence[str], routed_by: object, drop: Callable[[str], None]
    ) -> Telling | None:
        for token in tokens:
            drop(token)
        if self._invalidator is None:
            return None
        work = self._invalidator.after_write(tokens, routed_by)
        # After `close` there is no task; then the process ends, and its peers learn of that.
        task = None if work is None else self._tasks.spawn(work)
        return None if task is None else Telling(task, partial(self._invalidator.give_up, tokens))

    async def _delete(self, store_call: Coroutine[Any, Any, Deletion], token: str | None) -> Deletion:
        try:
            deletion = await store_call
        except Exception:
            await self._drop_ended([] if token is None else [token])
            raise
        await self._drop_ended(deletion.stored_keys)
        return deletion

    async def _drop_ended(self, stored_keys: Sequence[str]) -> None:
        self.drop_copies(stored_keys)
        if self._invalidator is not None and stored_keys:
            work = self._invalidator.after_delete(stored_keys)
            if work is not None:
                await work
