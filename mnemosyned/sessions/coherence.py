"""Who must drop which copy before which acknowledgement. The one initiator of invalidation.

Besides the storage, a session may be in each node's cache, in its negative cache, and in its mirrors of other
nodes' copies. Every write goes through this module, around its call of the store:

    caller          service          store             this node's cache      lease_keeper.py    other nodes
      |  Abandon       |                |                     |                      |                |
      |--------------->|--- batch ----->| commit              |                      |                |
      |                |<---------------|                     |                      |                |
      |                |---------------- drop, close fills -->|                      |                |
      |                |---------------- settle ------------------------------------>| tell, or bar ->|
      |                |<--------------- settled ------------------------------------|                |
      |<-- answer -----|

The rules:

1. This node's copies are dropped as soon as the store has answered, before any caller gets the answer. They
   are dropped also when the store failed, because the write may have been done. A copy of what the write has
   left may take their place in the same step (`changed_copies.py`).
2. A write is acknowledged when the `Settler` says that no other node serves what was before it. When all is
   well it says so at once (`cluster/lease.py` has its rules).
3. If nothing proves that, the caller is told that the outcome is unknown.
4. Settling does not end with its caller, and is tried again in the background until it succeeds: the session
   has changed, whether or not a caller still waits. So has a session whose write had an unknown outcome.
5. "A write" is every call after which its caller may believe something new: Start, SetValue, Abandon,
   also an Abandon that finds nothing, and Delete. What finds nothing may follow a write of unknown outcome,
   whose copies are still there.
6. A Delete by other criteria than the token does not find what another call is ending or has ended, and
   nothing here knows which sessions those are. So it waits until the ends that are under way, here and on
   other nodes, are settled. If one is open, since its outcome or its settling is not known, or if a node
   cannot be asked, or was lost, it has every node drop every copy. So it does after a failover: the store may
   have lost sessions of which nodes have copies, and a Delete does not find those either.

The unit is the batch: one settling for all sessions that one batch of the store has changed.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeAlias, TypeVar

from aio.tasks import Tasks
from mnemosyned.errors import MnemosyneError, StorageUnavailable
from mnemosyned.sessions import token_hash
from mnemosyned.sessions.token_index import drop

if TYPE_CHECKING:
    from cache.read_through import Fill, ReadThrough
    from mnemosyned.sessions.encoded import EncodedSession
    from mnemosyned.sessions.mirrors import Mirrors
    from mnemosyned.sessions.store import Deletion
    from mnemosyned.sessions.token_index import TokenIndex

log = logging.getLogger(__name__)

Result = TypeVar("Result")
# Begins to settle once more; None: there is nothing to wait for.
Settling: TypeAlias = "Callable[[], Coroutine[Any, Any, None] | None]"

# Between two tries to settle in the background, and how long they go on: by then no copy is left, unless
# `-cache.ttl` is longer.
_RETRY_S: Final = 0.5
_TRIES: Final = 120
# Most ends are settled sooner. Having every copy dropped takes about as long, and needs no wait for others.
_ENDS_S: Final = 0.3


class Settler(Protocol):
    """Has other nodes serve no copy from before a write; a node alone on its storage has none."""

    def settle(self, tokens: Sequence[str]) -> Coroutine[Any, Any, None] | None:
        """Return what to wait for after a write to these tokens' sessions; None: nothing.

        The work raises StorageUnavailable if it is not known that no old copy is left.
        """
        ...

    def settle_stored(self, stored_keys: Sequence[str]) -> Coroutine[Any, Any, None] | None:
        """Return the same for sessions that are named by their stored keys."""
        ...

    def settle_everything(self) -> Coroutine[Any, Any, None] | None:
        """Return the same for all sessions."""
        ...

    async def others_have_settled(self) -> bool:
        """Wait until what other nodes were ending is settled; False: that is not known. Never raises."""
        ...


# Not frozen: one is made for each write, and a frozen one takes three times as long.
@dataclass(slots=True)
class Written(Generic[Result]):
    """What one item of a batch of writes came to, and the settling that its caller must wait for."""

    result: Result | MnemosyneError
    settling: asyncio.Task[None] | None

    def outcome(self) -> Result | Coroutine[Any, Any, Result]:
        """Return the result, or raise it, once the write is settled: at once, or by the coroutine.

        Raises:
            StorageUnavailable: it is not known whether an old copy is left.
        """
        if self.settling is not None:
            return self._settled_outcome(self.settling)
        if isinstance(self.result, MnemosyneError):
            raise self.result
        return self.result

    async def _settled_outcome(self, settling: asyncio.Task[None]) -> Result:
        # Not cancelled with this caller: others wait for it too.
        await asyncio.shield(settling)
        if isinstance(self.result, MnemosyneError):
            raise self.result
        return self.result


class Coherence:
    """Drops this node's copies, and has other nodes drop theirs."""

    def __init__(
        self,
        cache: ReadThrough[EncodedSession],
        *,
        index: TokenIndex | None = None,
        settler: Settler | None = None,
        mirrors: Mirrors | None = None,
    ) -> None:
        """`index` observes the cache's keys where tokens are hashed at rest."""
        self._cache = cache
        self._index = index
        self._mirrors = mirrors
        self._settler = settler
        # As many as there are batches in the time that one settling takes: leaving one out breaks rule 2.
        self._tasks = Tasks("settling", max_tasks=sys.maxsize)
        self._ends: set[asyncio.Future[None]] = set()  # calls that end sessions, until settled or failed
        self._unsettled = 0  # writes that have failed to be settled, and are tried again

    async def close(self) -> None:
        """Cancel what is not settled yet."""
        await self._tasks.close()

    async def around_write(
        self,
        tokens: Sequence[str],
        store_call: Awaitable[Sequence[Result | MnemosyneError]],
        *,
        drop: Callable[[str], None] | None = None,
        keep: Callable[[Sequence[Result | MnemosyneError]], None] | None = None,
        is_end: bool = False,
    ) -> list[Written[Result]]:
        """Await a batch of writes to these tokens' sessions, and settle it by the rules above.

        `drop` replaces `drop_copy` for this node's own cache. `keep` gets the results in the same step, after
        that. `is_end` is whether the writes end the sessions. It must run in a task that no caller cancels.
        """
        end = self._begin_end() if is_end else None
        try:
            results = await store_call
        finally:
            settling = self._settle(tokens, drop or self.drop_copy)
            if end is not None:
                _when_settled(settling, end)
        if keep is not None:
            keep(results)
        return [Written(result, settling) for result in results]

    async def have_ends_settled(self) -> bool:
        """Wait for the calls that are ending sessions here; tell whether all that have ended any are settled.

        Those that have failed are not waited for, and those that take long are not for long.
        """
        pending = None
        if self._ends:
            # A copy: what begins meanwhile is not waited for.
            _, pending = await asyncio.wait(set(self._ends), timeout=_ENDS_S)
        return not (pending or self._unsettled)

    async def around_delete(
        self,
        store_call: Coroutine[Any, Any, Deletion],
        *,
        token: str | None = None,
        is_retry: bool = False,
    ) -> Deletion:
        """Await one step of a Delete, settle it, and return it; runs on without its caller.

        `token` is the criterion, if there is one, or a session id in its place. Then its copies are dropped
        also when the store failed or found nothing. `is_retry` tells that another node has failed to do it.
        """
        return await self._tasks.run_shielded(self._delete(store_call, token, is_retry=is_retry))

    def drop_made(self, token: str) -> None:
        """Drop what this node read before a session with this token was started."""
        self._cache.made(token)
        if self._mirrors is not None:
            self._mirrors.drop([token])

    def drop_copy(self, key: str, *, but: Fill[EncodedSession] | None = None) -> None:
        """Drop this node's copies of one session, its mirror too, named by its token or its stored key.

        The fill `but` of its token stays open.
        """
        drop(self._cache, self._index, key, but=but)
        if self._mirrors is not None:
            self._mirrors.drop([key])

    def drop_copies(self, keys: Iterable[str] | None) -> None:
        """Drop this node's copies of these sessions; None: of all."""
        if keys is None:
            self._cache.drop_everything()
            if self._mirrors is not None:
                self._mirrors.drop(None)
            return
        for key in keys:
            self.drop_copy(key)

    def _settle(self, tokens: Sequence[str], drop: Callable[[str], None]) -> asyncio.Task[None] | None:
        for token in tokens:
            drop(token)
        if self._settler is None:
            return None
        work = self._settler.settle(tokens)
        return None if work is None else self._run(work, partial(self._settler.settle, tokens))

    def _run(self, work: Coroutine[Any, Any, None], again: Settling) -> asyncio.Task[None]:
        task = asyncio.create_task(self._tasks.run_shielded(work))

        def ended(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and task.exception() is not None:
                self._unsettled += 1
                self._tasks.spawn(self._settle_later(again))

        task.add_done_callback(ended)
        return task

    async def _settle_later(self, again: Settling) -> None:
        for _ in range(_TRIES):
            await asyncio.sleep(_RETRY_S)
            try:
                work = again()
                if work is not None:
                    await work
            except MnemosyneError as exc:
                log.debug("settling_waits", extra={"error": str(exc)})
            else:
                break
        self._unsettled -= 1

    async def _delete(
        self, store_call: Coroutine[Any, Any, Deletion], token: str | None, *, is_retry: bool
    ) -> Deletion:
        named = [] if token is None else [self._key_of(token)]
        end, settling = self._begin_end(), None
        try:
            deletion = await store_call
            settling = self._settle_stored(deletion.stored_keys or named)
        except MnemosyneError as exc:
            is_known = token is not None or not (isinstance(exc, StorageUnavailable) and exc.is_under_way)
            settling = self._settle_stored(named) if is_known else self._settle_everything()
            raise
        finally:
            _when_settled(settling, end)
        if settling is not None:
            await settling
        if token is None and deletion.is_all:
            await self._settle_ends(may_be_settled=not is_retry)
        return deletion

    async def _settle_ends(self, *, may_be_settled: bool) -> None:
        """Settle what other calls have ended (rule 6).

        Whoever waits here is none of those calls any more: two that wait for one another would never end.
        """
        if self._settler is None:
            return
        are_settled = (
            may_be_settled and await self.have_ends_settled() and await self._settler.others_have_settled()
        )
        if not are_settled and (settling := self._settle_everything()) is not None:
            await settling

    def _settle_everything(self) -> asyncio.Task[None] | None:
        self.drop_copies(None)
        if self._settler is None:
            return None
        work = self._settler.settle_everything()
        return None if work is None else self._run(work, self._settler.settle_everything)

    def _begin_end(self) -> asyncio.Future[None]:
        end = asyncio.get_running_loop().create_future()
        self._ends.add(end)
        end.add_done_callback(self._ends.discard)
        return end

    def _settle_stored(self, keys: Sequence[str]) -> asyncio.Task[None] | None:
        self.drop_copies(keys)
        if self._settler is None or not keys:
            return None
        work = self._settler.settle_stored(keys)
        return None if work is None else self._run(work, partial(self._settler.settle_stored, keys))

    def _key_of(self, token: str) -> str:
        """Return the stored key that a session id stands for, or the token itself."""
        if self._index is None or not token_hash.is_session_id(token):
            return token
        key = token_hash.from_session_id(token)
        # One by an unknown key would have every node drop all copies, and anybody can make one up.
        return key if self._index.knows(key) else token


def _when_settled(settling: asyncio.Task[None] | None, end: asyncio.Future[None]) -> None:
    if settling is None:
        end.set_result(None)
    else:
        settling.add_done_callback(lambda _: end.set_result(None))
