"""Asking the owner of a token: in batches, for a short while, and not at all when it is known to be away.

What fails here is no failure of a call: whoever asks then turns to the storage. A batch holds reads or
writes, never both, lest reads wait for a row lock.
"""

from __future__ import annotations

import asyncio
import logging
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Protocol, TypeVar

from google.protobuf.message import DecodeError

from aio.batcher import Batcher, BatchLimits
from aio.deadline import NO_DEADLINE, Deadline
from cluster.breaker import Breaker, BreakerState
from cluster.errors import ClusterError, MalformedPacket, PeerSkipped, PeerTimeout, PeerUnreachable
from cluster.peerpb import peer_pb2 as pb
from cluster.peers import ChannelKind, ForwardStream, Peers
from cluster.pending_invalidations import PendingInvalidations
from cluster.view import View

log = logging.getLogger(__name__)

# The try ends in time for the storage to answer within the caller's deadline.
_TRY_S: Final = 0.25
# Who writes waits this long for those that have copies: longer than it takes to stop asking them.
_TELL_S: Final = 1.0
# A time-out after less than this says more of the caller's deadline than of the peer.
_LEAST_TRY_S: Final = 0.05
# The stream gives up first, so that its connection comes under suspicion.
_GRACE_S: Final = 0.02
_TRIAL_PERIOD_S: Final = 0.25
_MAX_PENDING: Final = 10_000
# What a node can write in the time that a copy lives.
_MAX_CHANGED: Final = 50_000
_TOKENS_A_CALL: Final = 1000
# Of what stands for a token that this node does not know: whoever has a copy finds it by that.
_UNOWNED: Final = "\0"
# The engines close a stream on which nothing came for a minute.
_IDLE_STREAM_S: Final = 20.0
BATCH_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128)
_US_PER_S: Final = 1_000_000
_MS_PER_S: Final = 1000

# A quarter of an h2corn flow-control window: such a batch is on the wire at once.
_BATCHES: Final = BatchLimits(
    max_items=128, max_bytes=256 * 1024, max_waiting=10_000, concurrency=2, is_eager=True
)

Item = TypeVar("Item")
Result = TypeVar("Result")


class Suspicious(Protocol):
    """Who is told of a peer that does not answer."""

    def probe(self, name: str) -> None:
        """Find out soon whether the peer is alive."""
        ...


@dataclass(slots=True)
class ForwardCounters:
    """Calls that were for another node."""

    by_outcome: Counter[tuple[str, str]] = field(default_factory=Counter)  # by peer and outcome
    items: int = 0
    # Batches of at most that many items, and one count more for the larger.
    batch_sizes: list[int] = field(default_factory=lambda: [0] * (len(BATCH_BUCKETS) + 1))


@dataclass(slots=True, eq=False)
class _Owner:
    reads: Batcher[pb.Item, pb.Answer]
    writes: Batcher[pb.Item, pb.Answer]
    notices: Batcher[str, None]  # tokens to drop
    breaker: Breaker = field(default_factory=Breaker)
    pending: PendingInvalidations = field(
        default_factory=lambda: PendingInvalidations(max_tokens=_MAX_PENDING)
    )
    # (since when, stream), the latest used last; never more than batches may be under way.
    idle: list[tuple[float, ForwardStream]] = field(default_factory=list)

    @property
    def may_be_asked(self) -> bool:
        """Whether it answers, as far as is known, and has missed no change."""
        return self.breaker.is_closed and not self.pending


class Forwarder:
    """Calls to the owners of tokens, through the current view."""

    def __init__(
        self,
        peers: Peers,
        *,
        storage_now_us: Callable[[], int],
        remember_s: float,
    ) -> None:
        """Ask nobody yet.

        `storage_now_us` is a clock that all nodes share; `remember_s` is how long an owner may serve
        a copy that it could not be told to drop.
        """
        self.counters = ForwardCounters()
        self._peers = peers
        self._origin_for: Callable[[str], pb.Origin] = lambda name: pb.Origin(callee=name)
        self._storage_now_us = storage_now_us
        self._remember_s = remember_s
        self._view: View | None = None
        self._suspicious: Suspicious | None = None
        self._owners: dict[str, _Owner] = {}
        self._is_needed = asyncio.Event()
        self._changed = PendingInvalidations(max_tokens=_MAX_CHANGED)
        self._tasks: set[asyncio.Task[None]] = set()

    def bind(self, origin_for: Callable[[str], pb.Origin], suspicious: Suspicious) -> None:
        """Say who this node is to the node of a name, and whom to tell of peers that do not answer."""
        self._origin_for = origin_for
        self._suspicious = suspicious

    def follow(self, view: View) -> None:
        """Route by this view from now on."""
        old, self._view = self._view, view
        if view.address_by_name:
            self._is_needed.set()
        if old is None or old.ring.nodes != view.ring.nodes:
            # Their new owners may have read them before they changed here.
            self._changed.forget(before=time.monotonic() - self._remember_s)
            if self._changed:
                self._hand_over(view)

    def changed(self, tokens: Iterable[str]) -> None:
        """Remember for a while what was changed or ended here, in case it gets another owner."""
        now = time.monotonic()
        self._changed.forget(before=now - self._remember_s)
        self._changed.add(tokens, now=now)

    def breaker_states(self) -> dict[str, BreakerState]:
        """Return the breaker of each peer that was ever asked and is still there."""
        return {name: owner.breaker.state for name, owner in list(self._owners.items())}

    async def ask(self, name: str, item: pb.Item, *, written: str | None, deadline: Deadline) -> pb.Answer:
        """Return the owner's own answer, whatever its status; `written` is the token that the call changes.

        After PeerUnreachable and PeerTimeout the peer may be doing the work still, but no write from the
        item's `deadline_us` on.

        Raises:
            PeerSkipped: it is known not to answer, has yet to hear of changes, or too many calls wait for
                it; nothing was sent.
            PeerUnreachable: there is no connection, or it broke.
            PeerTimeout: no answer within the short time it gets.
        """
        owner = self._owner(name)
        try:
            result = await self._asked(owner, item, written=written, deadline=deadline)
        except PeerSkipped:
            self.counters.by_outcome[name, "skipped"] += 1
            raise
        if isinstance(result, ClusterError):
            if written is not None:
                owner.pending.add([written], now=time.monotonic())
            self._failed(name, owner, result, item.timeout_ms / _MS_PER_S)
            raise result
        owner.breaker.answered()
        self.counters.by_outcome[name, "ok"] += 1
        return result

    async def _asked(
        self, owner: _Owner, item: pb.Item, *, written: str | None, deadline: Deadline
    ) -> pb.Answer | ClusterError:
        if not owner.may_be_asked:
            raise PeerSkipped("it does not answer, or has missed changes")
        try_s = deadline.share_s(_TRY_S)
        item.timeout_ms = max(1, int(try_s * _MS_PER_S))
        item.deadline_us = self._storage_now_us() + int(try_s * _US_PER_S)
        return await _submitted(owner.reads if written is None else owner.writes, item, try_s + _GRACE_S)

    async def wait_until_expired(self, item: pb.Item) -> None:
        """Return when nobody does any more what `ask` was asked to."""
        left_us = item.deadline_us - self._storage_now_us()
        if left_us > 0:
            await asyncio.sleep(left_us / _US_PER_S)

    async def invalidate(self, tokens: Sequence[str]) -> None:
        """Have the owners drop their copies, or everybody those of what begins with NUL.

        One that cannot be told now is told before it is asked again. Owners by former rings are owners too,
        while those may be routed by.
        """
        view = self._view
        if view is None or (view.is_alone and not view.former):
            return
        by_owner = _by_owner(view, tokens)
        await asyncio.gather(*(self._invalidate(name, part, _TELL_S) for name, part in by_owner.items()))

    async def invalidate_everywhere(self, tokens: Sequence[str], *, deadline: Deadline = NO_DEADLINE) -> None:
        """Have every node drop its copies: for when nodes may not agree on the owner."""
        if self._view is not None:
            tell_s = deadline.share_s(_TELL_S)
            names = self._view.address_by_name
            await asyncio.gather(*(self._invalidate(name, tokens, tell_s) for name in names))

    def ask_nothing_before(self, tokens: Sequence[str]) -> None:
        """Ask no peer anything before it has been told of these tokens; for a write that was not waited for."""
        now = time.monotonic()
        for name in () if self._view is None else self._view.address_by_name:
            self._owner(name).pending.add(tokens, now=now)

    async def run(self) -> None:
        """Try peers that do not answer, and tell them what they missed; for ever."""
        while True:
            # Alone, there is nobody to look after, and no timer.
            await self._is_needed.wait()
            await asyncio.sleep(_TRIAL_PERIOD_S)
            try:
                await self._look_after_owners()
            except Exception as exc:  # the root of this work: the next round may succeed
                log.error("forwarder_failed", exc_info=exc)

    async def _look_after_owners(self) -> None:
        names = set(self._view.address_by_name) if self._view is not None else set()
        for name, owner in list(self._owners.items()):
            owner.pending.forget(before=time.monotonic() - self._remember_s)
            if name not in names and not owner.pending:
                await self._drop_owner(name)
            else:
                await _end_idle(owner, _IDLE_STREAM_S if self._is_owner(name) else 0.0)
        await asyncio.gather(*(self._try_again(name) for name in list(self._owners) if name in names))
        if not names and not self._owners:
            self._is_needed.clear()

    async def close(self) -> None:
        """Cancel what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for name in list(self._owners):
            await self._drop_owner(name)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        # Owned by the set until it ends or `close`.
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _owner(self, name: str) -> _Owner:
        owner = self._owners.get(name)
        if owner is None:
            run, tell = partial(self._run, name), partial(self._tell, name)
            owner = self._owners[name] = _Owner(
                reads=Batcher(run, limits=_BATCHES, size_bytes=_item_bytes, full=_queue_full),
                writes=Batcher(run, limits=_BATCHES, size_bytes=_item_bytes, full=_queue_full),
                notices=Batcher(tell, limits=_BATCHES, size_bytes=len, full=_queue_full),
            )
            self._is_needed.set()
        return owner

    async def _drop_owner(self, name: str) -> None:
        owner = self._owners.pop(name)
        for batches in (owner.reads, owner.writes, owner.notices):
            await batches.close()
        await _end_idle(owner, 0.0)

    def _is_owner(self, name: str) -> bool:
        return self._view is not None and name in self._view.ring.nodes

    async def _run(self, name: str, items: Sequence[pb.Item]) -> Sequence[pb.Answer]:
        batch = pb.Batch(origin=self._origin_for(name), items=items).SerializeToString()
        left_us = max(item.deadline_us for item in items) - self._storage_now_us()
        body = await self._exchanged(name, batch, max(0.0, left_us / _US_PER_S))
        answers = _answers(body, len(items))
        self.counters.batch_sizes[bisect_left(BATCH_BUCKETS, len(items))] += 1
        self.counters.items += len(items)
        return answers

    async def _exchanged(self, name: str, batch: bytes, timeout_s: float) -> bytes:
        owner, address = self._owner(name), self._address(name)
        exchange = None
        while owner.idle and exchange is None:
            _, exchange = owner.idle.pop()
            if not exchange.is_open or exchange.address != address:
                exchange = None
        exchange = exchange or self._peers.exchange(address)
        answer = await exchange.ask(batch, timeout_s=timeout_s)
        owner.idle.append((time.monotonic(), exchange))
        return answer

    def _address(self, name: str) -> str:
        address = self._view.address_by_name.get(name) if self._view is not None else None
        if address is None:
            raise PeerUnreachable("it is no member any more")
        return address

    def _failed(self, name: str, owner: _Owner, failure: ClusterError, try_s: float) -> None:
        was_closed = owner.breaker.is_closed
        is_timeout = isinstance(failure, PeerTimeout)
        self.counters.by_outcome[name, "timeout" if is_timeout else "unreachable"] += 1
        if not is_timeout:
            owner.breaker.broke(now=time.monotonic())
        elif try_s >= _LEAST_TRY_S:
            owner.breaker.timed_out(now=time.monotonic())
        if was_closed and not owner.breaker.is_closed:
            log.warning("breaker_opened", extra={"peer_node": name, "error": str(failure)})
        if self._suspicious is not None:
            self._suspicious.probe(name)

    async def _try_again(self, name: str) -> None:
        owner = self._owners[name]
        if owner.breaker.is_closed:
            if owner.pending:
                await self._tell_again(name, owner)
            return
        if not owner.breaker.may_try(now=time.monotonic()):
            return
        # The trial is what it missed, if anything: that must be dropped before it is asked again.
        failure = await self._tell_again(name, owner)
        if failure is None:
            owner.breaker.answered()
            log.info("breaker_closed", extra={"peer_node": name})
        elif isinstance(failure, PeerTimeout):
            owner.breaker.timed_out(now=time.monotonic())
        else:
            owner.breaker.broke(now=time.monotonic())

    def _hand_over(self, view: View) -> None:
        """Have owners drop what changed here lately; they are asked nothing before they have."""
        now = time.monotonic()
        if self._changed.is_everything:
            for name in view.address_by_name:
                self._owner(name).pending.add_everything(now=now)
            names = list(view.address_by_name)
        else:
            by_owner = _by_owner(view, self._changed.tokens())
            for name, tokens in by_owner.items():
                self._owner(name).pending.add(tokens, now=now)
            names = list(by_owner)
        for name in names:
            self._spawn(self._tell_now(name))

    async def _tell_now(self, name: str) -> None:
        owner = self._owner(name)
        if owner.breaker.may_answer_yet(now=time.monotonic()):
            failure = await self._tell_again(name, owner)
            if failure is not None:
                self._failed(name, owner, failure, _TRY_S)

    async def _invalidate(self, name: str, tokens: Sequence[str], tell_s: float) -> None:
        owner = self._owner(name)
        # One that is slow, or that only this node has lost, still serves others, from copies.
        if owner.breaker.may_answer_yet(now=time.monotonic()):
            failure = await self._told(name, owner, tokens, tell_s)
            if failure is None:
                if owner.breaker.is_closed:
                    owner.breaker.answered()
                return
            if not isinstance(failure, PeerSkipped):
                self._failed(name, owner, failure, tell_s)
        owner.pending.add(tokens, now=time.monotonic())

    async def _told(
        self, name: str, owner: _Owner, tokens: Sequence[str], tell_s: float
    ) -> ClusterError | None:
        try:
            if len(tokens) == 1:
                return await _submitted(owner.notices, tokens[0], tell_s)
            await self._send_tokens(name, tokens, tell_s)
        except ClusterError as exc:
            return exc
        return None

    async def _tell(self, name: str, tokens: Sequence[str]) -> Sequence[None]:
        await self._send_tokens(name, tokens, _TELL_S)
        return [None] * len(tokens)

    async def _tell_again(self, name: str, owner: _Owner) -> ClusterError | None:
        since_s = time.monotonic()
        try:
            await self._send_tokens(
                name, owner.pending.tokens(), _TRY_S, is_everything=owner.pending.is_everything
            )
        except ClusterError as exc:
            return exc
        # What has come to it meanwhile stays.
        owner.pending.forget(before=since_s)
        return None

    async def _send_tokens(
        self, name: str, tokens: Sequence[str], try_s: float, *, is_everything: bool = False
    ) -> None:
        for start in range(0, len(tokens) or 1, _TOKENS_A_CALL):
            request = pb.InvalidateRequest(
                origin=self._origin_for(name),
                tokens=tokens[start : start + _TOKENS_A_CALL],
                everything=is_everything,
            )
            body = request.SerializeToString()
            await self._peers.call(
                self._address(name), "Invalidate", body, timeout_s=try_s, lane=ChannelKind.CALLS
            )


async def _end_idle(owner: _Owner, after_s: float) -> None:
    before_s = time.monotonic() - after_s
    while owner.idle and owner.idle[0][0] <= before_s:
        _, exchange = owner.idle.pop(0)
        await exchange.end()


def _queue_full() -> ClusterError:
    return PeerSkipped("too many calls wait for it")


async def _submitted(batcher: Batcher[Item, Result], item: Item, try_s: float) -> Result | ClusterError:
    try:
        async with asyncio.timeout(try_s):
            return await batcher.submit(item)
    except TimeoutError:
        return PeerTimeout("no answer in time")
    except PeerSkipped:
        raise
    except ClusterError as exc:
        return exc
    except asyncio.CancelledError:
        if asyncio.current_task().cancelling():  # type: ignore[union-attr]  # this is a coroutine
            raise
        # Not the caller was cancelled but the batch: the peer has left the cluster.
        return PeerUnreachable("it is no member any more")


def _by_owner(view: View, tokens: Iterable[str]) -> dict[str, list[str]]:
    """Sort tokens by the peers that own them, or have by a former ring."""
    found: dict[str, list[str]] = {}
    for token in tokens:
        owners = {ring.owner(token): None for ring in (view.ring, *view.former)}
        for name in view.address_by_name if token.startswith(_UNOWNED) else owners:
            if name in view.address_by_name:
                found.setdefault(name, []).append(token)
    return found


def _item_bytes(item: pb.Item) -> int:
    return len(item.message)


def _answers(body: bytes, count: int) -> Sequence[pb.Answer]:
    response = pb.ForwardResponse()
    try:
        response.ParseFromString(body)
    except DecodeError:
        raise MalformedPacket("not a valid ForwardResponse") from None
    if len(response.answers) != count:
        raise MalformedPacket(f"{len(response.answers)} answers to {count} items")
    return response.answers
