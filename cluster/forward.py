"""Asking the owner of a token: in batches, for a short while, and not at all when it is known to be away.

What fails here is no failure of a call: whoever asks then turns to the storage. A batch holds reads or
writes, never both, lest reads wait for a row lock.
"""

from __future__ import annotations

import asyncio
import logging
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from google.protobuf.message import DecodeError

from cluster.breaker import Breaker, BreakerState
from cluster.errors import ClusterError, MalformedPacket, PeerSkipped, PeerTimeout, PeerUnreachable
from cluster.peerpb import peer_pb2 as pb
from cluster.peers import Exchange, Lane, Peers
from cluster.view import View

log = logging.getLogger(__name__)

# The try ends in time for the storage to answer within the caller's deadline.
_TRY_S: Final = 0.25
_TRIAL_PERIOD_S: Final = 0.25
# Tokens whose owner could not be told; what is older than a cache entry may live needs no telling.
_MAX_UNTOLD: Final = 10_000
_TOKENS_A_CALL: Final = 1000
# The engines close a stream on which nothing came for a minute.
_IDLE_STREAM_S: Final = 20.0
# All nodes route alike again by then.
_HANDOVER_S: Final = 2.0
BATCH_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128)
_US_PER_S: Final = 1_000_000
_MS_PER_S: Final = 1000


class Batches(Protocol):
    """Natural batching, as the daemon's Batcher does it."""

    async def submit(self, item: pb.Item) -> pb.Answer | ClusterError:
        """Return the item's own result."""
        ...

    async def close(self) -> None:
        """Cancel what is under way."""
        ...


RunBatch = Callable[[Sequence[pb.Item]], Awaitable[Sequence[pb.Answer | ClusterError]]]


class Suspicious(Protocol):
    """Who is told of a peer that does not answer."""

    def look_into(self, name: str) -> None:
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
    reads: Batches
    writes: Batches
    breaker: Breaker = field(default_factory=Breaker)
    # (when, token), the oldest first.
    untold: deque[tuple[float, str]] = field(default_factory=lambda: deque(maxlen=_MAX_UNTOLD))
    # (since when, stream), the latest used last; never more than batches may be under way.
    idle: list[tuple[float, Exchange]] = field(default_factory=list)


class Forwarder:
    """Calls to the owners of tokens, through the current view."""

    def __init__(
        self,
        peers: Peers,
        *,
        new_batches: Callable[[RunBatch], Batches],
        storage_now_us: Callable[[], int],
        remember_s: float,
    ) -> None:
        """Ask nobody yet.

        `storage_now_us` is a clock that all nodes share; `remember_s` is how long an owner may serve
        a copy that it could not be told to drop.
        """
        self.counters = ForwardCounters()
        self._peers = peers
        self._origin = pb.Origin()
        self._new_batches = new_batches
        self._storage_now_us = storage_now_us
        self._remember_s = remember_s
        self._view: View | None = None
        self._suspicious: Suspicious | None = None
        self._owners: dict[str, _Owner] = {}
        self._changed: deque[tuple[float, str]] = deque(maxlen=_MAX_UNTOLD)
        self._tasks: set[asyncio.Task[None]] = set()

    def introduce(self, origin: pb.Origin, suspicious: Suspicious) -> None:
        """Say who this node is, and whom to tell of peers that do not answer."""
        self._origin = origin
        self._suspicious = suspicious

    def follow(self, view: View) -> None:
        """Route by this view from now on."""
        old, self._view = self._view, view
        if old is not None and old.ring.nodes != view.ring.nodes:
            # Their new owners may have read them before they changed here.
            since_s = time.monotonic() - _HANDOVER_S
            moved = [token for when_s, token in self._changed if when_s >= since_s]
            if moved:
                self._spawn(self.invalidate(moved))

    def changed(self, tokens: Iterable[str]) -> None:
        """Remember for a while what was changed or ended here, in case it gets another owner."""
        now = time.monotonic()
        self._changed.extend((now, token) for token in tokens)

    def breaker_states(self) -> dict[str, BreakerState]:
        """Return the breaker of each peer that was ever asked and is still there."""
        return {name: owner.breaker.state for name, owner in list(self._owners.items())}

    async def ask(self, name: str, item: pb.Item, *, is_write: bool, time_left_s: float | None) -> pb.Answer:
        """Return the owner's own answer, whatever its status.

        Raises:
            PeerSkipped: its breaker is open, so nothing was sent.
            PeerUnreachable: there is no connection, or it broke.
            PeerTimeout: no answer within the short time it gets.
        """
        owner = self._owner(name)
        if not owner.breaker.is_closed:
            self.counters.by_outcome[name, "skipped"] += 1
            raise PeerSkipped("its breaker is open")
        try_s = _TRY_S if time_left_s is None else min(time_left_s / 2, _TRY_S)
        item.timeout_ms = max(1, int(try_s * _MS_PER_S))
        result = await _submitted(owner.writes if is_write else owner.reads, item, try_s)
        if isinstance(result, ClusterError):
            self._failed(name, owner, result)
            raise result
        owner.breaker.answered()
        self.counters.by_outcome[name, "ok"] += 1
        return result

    async def invalidate(self, tokens: Sequence[str]) -> None:
        """Have the owners drop their copies; one that cannot be told now is told when it is back."""
        view = self._view
        if view is None or view.is_alone:
            return
        by_owner: dict[str, list[str]] = {}
        for token in tokens:
            name = view.ring.owner(token)
            if name != view.me:
                by_owner.setdefault(name, []).append(token)
        await asyncio.gather(*(self._invalidate(name, part) for name, part in by_owner.items()))

    async def invalidate_everywhere(self, tokens: Sequence[str]) -> None:
        """Have every node drop its copies: for when nodes may not agree on the owner."""
        if self._view is not None:
            await asyncio.gather(*(self._invalidate(name, tokens) for name in self._view.address_by_name))

    async def run(self) -> None:
        """Try peers whose breaker is open, and tell them what they missed; for ever."""
        while True:
            await asyncio.sleep(_TRIAL_PERIOD_S)
            names = set(self._view.address_by_name) if self._view is not None else set()
            gone = [name for name in self._owners if name not in names]
            for name in gone:
                if not self._missed(self._owners[name]):
                    await self._drop_owner(name)
            for name, owner in self._owners.items():
                await _end_idle(owner, _IDLE_STREAM_S if self._is_owner(name) else 0.0)
            await asyncio.gather(*(self._try_again(name) for name in self._owners if name in names))

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

            async def run(items: Sequence[pb.Item]) -> Sequence[pb.Answer | ClusterError]:
                return await self._run(name, items)

            owner = self._owners[name] = _Owner(self._new_batches(run), self._new_batches(run))
        return owner

    async def _drop_owner(self, name: str) -> None:
        owner = self._owners.pop(name)
        await owner.reads.close()
        await owner.writes.close()
        await _end_idle(owner, 0.0)

    def _is_owner(self, name: str) -> bool:
        return self._view is not None and name in self._view.ring.nodes

    async def _run(self, name: str, items: Sequence[pb.Item]) -> Sequence[pb.Answer | ClusterError]:
        timeout_s = max(item.timeout_ms for item in items) / _MS_PER_S
        # A peer that stood still must not do later what others have long done instead.
        deadline_us = self._storage_now_us() + int(timeout_s * _US_PER_S)
        batch = pb.Batch(origin=self._origin, items=items, deadline_us=deadline_us).SerializeToString()
        try:
            body = await self._exchanged(name, batch, timeout_s)
            answers = _answers(body, len(items))
        except ClusterError as exc:
            return [type(exc)(*exc.args) for _ in items]
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

    def _failed(self, name: str, owner: _Owner, failure: ClusterError) -> None:
        was_closed = owner.breaker.is_closed
        is_timeout = isinstance(failure, PeerTimeout)
        if is_timeout:
            owner.breaker.timed_out(now=time.monotonic())
        else:
            owner.breaker.broke(now=time.monotonic())
        self.counters.by_outcome[name, "timeout" if is_timeout else "unreachable"] += 1
        if was_closed and not owner.breaker.is_closed:
            log.warning("breaker_opened", extra={"peer_node": name, "error": str(failure)})
        if self._suspicious is not None:
            self._suspicious.look_into(name)

    async def _try_again(self, name: str) -> None:
        owner = self._owners[name]
        if owner.breaker.is_closed:
            if owner.untold:
                await self._tell_again(name, owner)
            return
        if not owner.breaker.may_try(now=time.monotonic()):
            return
        # The trial is what it missed, if anything: that must be dropped before it is asked again.
        if await self._tell_again(name, owner):
            owner.breaker.answered()
            log.info("breaker_closed", extra={"peer_node": name})
        else:
            owner.breaker.broke(now=time.monotonic())

    async def _invalidate(self, name: str, tokens: Sequence[str]) -> None:
        owner = self._owner(name)
        if owner.breaker.is_closed:
            try:
                await self._send_tokens(name, tokens)
            except ClusterError as exc:
                self._failed(name, owner, exc)
            else:
                return
        now = time.monotonic()
        owner.untold.extend((now, token) for token in tokens)

    async def _tell_again(self, name: str, owner: _Owner) -> bool:
        try:
            await self._send_tokens(name, self._missed(owner))
        except ClusterError:
            return False
        owner.untold.clear()
        return True

    def _missed(self, owner: _Owner) -> list[str]:
        since_s = time.monotonic() - self._remember_s
        return [token for when_s, token in owner.untold if when_s >= since_s]

    async def _send_tokens(self, name: str, tokens: Sequence[str]) -> None:
        for start in range(0, len(tokens) or 1, _TOKENS_A_CALL):
            request = pb.InvalidateRequest(origin=self._origin, tokens=tokens[start : start + _TOKENS_A_CALL])
            body = request.SerializeToString()
            await self._peers.call(self._address(name), "Invalidate", body, timeout_s=_TRY_S, lane=Lane.CALLS)


async def _end_idle(owner: _Owner, after_s: float) -> None:
    before_s = time.monotonic() - after_s
    while owner.idle and owner.idle[0][0] <= before_s:
        _, exchange = owner.idle.pop(0)
        await exchange.end()


async def _submitted(batches: Batches, item: pb.Item, try_s: float) -> pb.Answer | ClusterError:
    try:
        async with asyncio.timeout(try_s):
            return await batches.submit(item)
    except TimeoutError:
        return PeerTimeout("no answer in time")
    except asyncio.CancelledError:
        if asyncio.current_task().cancelling():  # type: ignore[union-attr]  # this is a coroutine
            raise
        # Not the caller was cancelled but the batch: the peer has left the cluster.
        return PeerUnreachable("it is no member any more")


def _answers(body: bytes, count: int) -> Sequence[pb.Answer]:
    response = pb.ForwardResponse()
    try:
        response.ParseFromString(body)
    except DecodeError:
        raise MalformedPacket("not a valid ForwardResponse") from None
    if len(response.answers) != count:
        raise MalformedPacket(f"{len(response.answers)} answers to {count} items")
    return response.answers
