"""Calls to the owners of tokens, and invalidations: what peers must drop from their caches.

A failure here is never the failure of a client's call. All nodes share one storage, and the entry node
answers from there. This module decides how long a peer gets, and which peers are asked nothing for a while.

A forwarded call
----------------
    entry node                              owner                               storage
    (router.py)      forward.py             (api/peer.py)
       |--- ask() ---->|                      |                                    |
       |               |-- Batch of Items --->|                                    |
       |               |   (timeout_ms,       |-- from its cache, or -- query ---->|
       |               |    deadline_us)      |<---------------------- rows -------|
       |               |<-- Answers ----------|                                    |
       |<-- Answer ----|                      |                                    |
       |                                                                           |
       |   after PeerSkipped: at once; after any other error: at once for a read,  |
       |   and after `wait_until_expired` for a write                              |
       |------------------------------------ query ------------------------------->|

Each item carries two deadlines over the hop: `timeout_ms` on the owner's own clock, and `deadline_us` on the
storage's clock, which all nodes share. The owner does no write after `deadline_us`, and the entry
node begins its own no earlier. Therefore a write of the owner cannot follow the repeated one.

An invalidation
---------------
    writer (service)     forward.py                  peer with a copy
       |-- row written, not yet acknowledged
       |-- invalidate() -->|                            |
       |                   |-- Invalidate(tokens) ----->|  drops its copies
       |                   |<-- InvalidateResponse -----|
       |<------------------|                            |
       |   the write is acknowledged

If the peer does not answer within TELL_S, the tokens are pending for it, and the write is acknowledged. From
then on this node asks the peer nothing until the pending tokens are delivered. `run` delivers them.

Which invalidations are sent, and when:

- `invalidate`: to the owners, by the present ring and by former rings, of a token that was written here.
- `invalidate_everywhere`: to every peer, where nodes may not agree on the owner.
- A new ring: to new owners, of all that changed here lately. A new owner may have read a session before this
  node changed it.
- A forwarded write that failed: to that owner, before it is asked again. This node has then written itself,
  and the owner may hold a copy from before.

Rules for editing:

- A read and a write never share a batch (owner.py).
- An item whose outcome is not known counts as done by the peer, and as not done for the caller.
- What is pending for a peer is removed only after the peer has answered, or when no copy is that old.
"""

from __future__ import annotations

import asyncio
import logging
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol

from aio.deadline import NO_DEADLINE, Deadline
from aio.periodic import run_periodically
from aio.tasks import Tasks
from cluster.breaker import BreakerState
from cluster.errors import ClusterError, PeerSkipped, PeerTimeout, PeerUnreachable
from cluster.owner import Owner
from cluster.peerpb import peer_pb2 as pb
from cluster.peers import ChannelKind, Peers
from cluster.pending_invalidations import PendingInvalidations
from cluster.routing import peers_with_copies
from cluster.timing import LEAST_TRY_S, TELL_S, TRIAL_PERIOD_S, TRY_S
from cluster.view import View
from cluster.wire import parse_answers

log = logging.getLogger(__name__)

# What a node can write in the time that a copy lives. Beyond it, new owners drop everything.
_MAX_CHANGED: Final = 50_000
_TOKENS_A_CALL: Final = 1000
# The engines close a stream on which nothing came for a minute. This side ends it first, between two batches.
_IDLE_STREAM_S: Final = 20.0
BATCH_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128)
_US_PER_S: Final = 1_000_000
_MS_PER_S: Final = 1000


class Suspicious(Protocol):
    """The part that finds out whether a peer that does not answer is dead: gossip.py."""

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


class Forwarder:
    """Calls to the owners of tokens, and invalidations, through the current view."""

    def __init__(
        self,
        peers: Peers,
        *,
        storage_now_us: Callable[[], int],
        remember_s: float,
    ) -> None:
        """Ask no peer yet.

        `storage_now_us` is a clock that all nodes share. `remember_s` is how long a peer may serve a copy
        that it could not be told to drop.
        """
        self.counters = ForwardCounters()
        self._peers = peers
        self._origin_for: Callable[[str], pb.Origin] = lambda name: pb.Origin(callee=name)
        self._storage_now_us = storage_now_us
        self._remember_s = remember_s
        self._view: View | None = None
        self._suspicious: Suspicious | None = None
        self._owners: dict[str, Owner] = {}  # by name: every peer to which something was sent
        self._has_peers = asyncio.Event()  # `run` has something to look after
        self._changed = PendingInvalidations(max_tokens=_MAX_CHANGED)  # lately, here
        self._tasks = Tasks("forwarder")

    def bind(self, origin_for: Callable[[str], pb.Origin], suspicious: Suspicious) -> None:
        """Say who this node is to the node of a name, and which part finds out about silent peers."""
        self._origin_for = origin_for
        self._suspicious = suspicious

    def follow(self, view: View) -> None:
        """Route by this view from now on."""
        old, self._view = self._view, view
        if view.address_by_name:
            self._has_peers.set()
        if old is None or old.ring.nodes != view.ring.nodes:
            # A new owner may have read a session from the storage, by the new ring, before this node changed
            # it by the old one. Its copy is then old, and no later write of this node would reach it.
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
        # A copy, made in one step: the admin port reads it from another thread.
        return {name: owner.breaker.state for name, owner in list(self._owners.items())}

    async def ask(self, name: str, item: pb.Item, *, written: str | None, deadline: Deadline) -> pb.Answer:
        """Return the owner's own answer, whatever its status; `written` is the token that the call changes.

        After PeerUnreachable and PeerTimeout the peer may be doing the work still, but no write from the
        item's `deadline_us` on.

        Raises:
            PeerSkipped: it is known not to answer, has pending invalidations, or too many calls wait for it;
                nothing was sent.
            PeerUnreachable: there is no connection, or it broke.
            PeerTimeout: no answer within the short time it gets.
        """
        owner = self._owner(name)
        try:
            result = await self._forward(owner, item, is_write=written is not None, deadline=deadline)
        except PeerSkipped:
            self.counters.by_outcome[name, "skipped"] += 1
            raise
        if isinstance(result, ClusterError):
            if written is not None:
                # The caller now writes to the storage itself. Whether or not the peer did the write too, the
                # peer's copy may be from before the caller's write.
                owner.pending.add([written], now=time.monotonic())
            self._failed(name, owner, result, item.timeout_ms / _MS_PER_S)
            raise result
        owner.breaker.answered()
        self.counters.by_outcome[name, "ok"] += 1
        return result

    async def _forward(
        self, owner: Owner, item: pb.Item, *, is_write: bool, deadline: Deadline
    ) -> pb.Answer | ClusterError:
        """Give the item its deadlines over the hop, and put it into a batch."""
        if not owner.may_be_asked:
            raise PeerSkipped("it does not answer, or has missed changes")
        # At most half of what the caller has left: the storage must still answer in time if the peer does
        # not.
        try_s = deadline.share_s(TRY_S)
        item.timeout_ms = max(1, int(try_s * _MS_PER_S))
        # On a clock that the owner shares. If the item waits here or at the owner, the owner sees how late it
        # is.
        item.deadline_us = self._storage_now_us() + int(try_s * _US_PER_S)
        return await owner.forward(item, is_write=is_write, try_s=try_s)

    async def wait_until_expired(self, item: pb.Item) -> None:
        """Return when no node does any more what `ask` was asked to.

        A write that began earlier here might be overtaken by the same write at the owner, which is late.
        """
        left_us = item.deadline_us - self._storage_now_us()
        if left_us > 0:
            await asyncio.sleep(left_us / _US_PER_S)

    async def invalidate(self, tokens: Sequence[str]) -> None:
        """Have the owners of these tokens drop their copies; any peer may have one of a key that begins NUL.

        If an invalidation cannot be delivered to a peer, this node asks the peer nothing until it has been
        delivered. Owners by former rings are owners too, while other nodes may route by those.
        """
        view = self._view
        if view is None or (view.is_alone and not view.former):
            return
        tokens_by_peer = peers_with_copies(view, tokens)
        await asyncio.gather(*(self._invalidate(name, part, TELL_S) for name, part in tokens_by_peer.items()))

    async def invalidate_everywhere(self, tokens: Sequence[str], *, deadline: Deadline = NO_DEADLINE) -> None:
        """Have every peer drop its copies: for when nodes may not agree on the owner.

        The caller's deadline bounds the wait. A peer that is cut off by it gets the tokens as pending.
        """
        if self._view is not None:
            tell_s = deadline.share_s(TELL_S)
            names = self._view.address_by_name
            await asyncio.gather(*(self._invalidate(name, tokens, tell_s) for name in names))

    def ask_nothing_before(self, tokens: Sequence[str]) -> None:
        """Ask no peer anything before it has been told of these tokens.

        For a write whose caller was answered before every peer had confirmed.
        """
        now = time.monotonic()
        for name in () if self._view is None else self._view.address_by_name:
            self._owner(name).pending.add(tokens, now=now)

    async def run(self) -> None:
        """Try peers that do not answer, and deliver what is pending, until cancelled."""
        await self._has_peers.wait()
        await run_periodically("forwarder", self._round, period_s=lambda: TRIAL_PERIOD_S)

    async def _round(self) -> None:
        await self._look_after_owners()
        # Alone, this node has no peer to look after. The round then lasts until there is one, without a
        # timer.
        await self._has_peers.wait()

    async def _look_after_owners(self) -> None:
        """Drop former peers, end streams that are not used, and try the peers that need it.

        A former peer with pending tokens is kept: if it comes back with its process alive, it may have
        copies.
        """
        names = set(self._view.address_by_name) if self._view is not None else set()
        for name, owner in list(self._owners.items()):
            # No copy is that old, so the peer cannot serve one any more.
            owner.pending.forget(before=time.monotonic() - self._remember_s)
            if name not in names and not owner.pending:
                await self._drop_owner(name)
            else:
                owner.end_idle(_IDLE_STREAM_S if self._is_on_ring(name) else 0.0)
        # The list is made after the awaits above, in which calls may have added peers.
        await asyncio.gather(*(self._try(name) for name in list(self._owners) if name in names))
        if not names and not self._owners:
            self._has_peers.clear()

    async def close(self) -> None:
        """Cancel what is under way."""
        await self._tasks.close()
        for name in list(self._owners):
            await self._drop_owner(name)

    def _owner(self, name: str) -> Owner:
        owner = self._owners.get(name)
        if owner is None:
            owner = Owner(partial(self._send_items, name), partial(self._send_notices, name))
            self._owners[name] = owner
            self._has_peers.set()
        return owner

    async def _drop_owner(self, name: str) -> None:
        # Out of the dictionary before the await, so that a new call gets a new Owner and not a closed one.
        await self._owners.pop(name).close()

    def _is_on_ring(self, name: str) -> bool:
        return self._view is not None and name in self._view.ring.nodes

    async def _send_items(self, name: str, items: Sequence[pb.Item]) -> Sequence[pb.Answer]:
        """Send a batch of calls; a failure here fails each of them, and `ask` takes note."""
        batch = pb.Batch(origin=self._origin_for(name), items=items).SerializeToString()
        # The last deadline of the batch. A caller with less time left stops waiting by itself.
        left_us = max(item.deadline_us for item in items) - self._storage_now_us()
        body = await self._exchange(name, batch, max(0.0, left_us / _US_PER_S))
        answers = parse_answers(body, len(items))
        self.counters.batch_sizes[bisect_left(BATCH_BUCKETS, len(items))] += 1
        self.counters.items += len(items)
        return answers

    async def _exchange(self, name: str, batch: bytes, timeout_s: float) -> bytes:
        owner, address = self._owner(name), self._address(name)
        # A stream may break between the look and the batch. That is a failed batch: the callers turn to the
        # storage, and a second try would take the time that they need for it.
        stream = owner.take_stream(address) or self._peers.open_stream(address, name)
        answer = await stream.ask(batch, timeout_s=timeout_s)
        # Only after an answer: a stream with a late answer in it must not be used again.
        owner.give_back(stream)
        return answer

    def _address(self, name: str) -> str:
        address = self._view.address_by_name.get(name) if self._view is not None else None
        if address is None:
            raise PeerUnreachable("it is no member any more")
        return address

    def _failed(self, name: str, owner: Owner, failure: ClusterError, try_s: float) -> None:
        """Count a failure against the peer, and have membership find out whether the peer is alive.

        - A broken connection opens the breaker at once: the next call would fail as well.
        - Time-outs open it when there are several in a row. A try that was cut short by its caller's deadline
          does not count.
        """
        was_closed = owner.breaker.is_closed
        is_timeout = isinstance(failure, PeerTimeout)
        self.counters.by_outcome[name, "timeout" if is_timeout else "unreachable"] += 1
        if not is_timeout:
            owner.breaker.broke(now=time.monotonic())
        elif try_s >= LEAST_TRY_S:
            owner.breaker.timed_out(now=time.monotonic())
        if was_closed and not owner.breaker.is_closed:
            log.warning("breaker_opened", extra={"peer_node": name, "error": str(failure)})
        if self._suspicious is not None:
            self._suspicious.probe(name)

    async def _try(self, name: str) -> None:
        """Deliver what is pending for a peer; with an open breaker that is the trial that may close it."""
        owner = self._owners[name]
        if owner.breaker.is_closed:
            if owner.pending:
                # A failure leaves the tokens pending, and the next round tries again.
                await self._deliver_pending(name, owner)
            return
        if not owner.breaker.may_try(now=time.monotonic()):
            return
        # With nothing pending the trial is an empty invalidation. No call of a client is risked for it.
        failure = await self._deliver_pending(name, owner)
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
            tokens_by_peer = peers_with_copies(view, self._changed.tokens())
            for name, tokens in tokens_by_peer.items():
                self._owner(name).pending.add(tokens, now=now)
            names = list(tokens_by_peer)
        for name in names:
            # At once. Until it is done, calls for the peer's tokens go to the storage.
            self._tasks.spawn(self._deliver_now(name))

    async def _deliver_now(self, name: str) -> None:
        owner = self._owner(name)
        if owner.breaker.may_answer_yet(now=time.monotonic()):
            failure = await self._deliver_pending(name, owner)
            if failure is not None:
                self._failed(name, owner, failure, TRY_S)

    async def _invalidate(self, name: str, tokens: Sequence[str], tell_s: float) -> None:
        """Have one peer drop its copies of these tokens, or make them pending for it. Never raises.

        A peer that is slow, or that only this node cannot reach, still serves other nodes from its copies.
        Therefore a breaker that has opened lately does not stop this.
        """
        owner = self._owner(name)
        if owner.breaker.may_answer_yet(now=time.monotonic()):
            failure = await self._notify(name, owner, tokens, tell_s)
            if failure is None:
                if owner.breaker.is_closed:
                    # Ends a row of time-outs. It does not close an open breaker: that takes a trial, after
                    # which nothing is pending.
                    owner.breaker.answered()
                return
            if not isinstance(failure, PeerSkipped):
                self._failed(name, owner, failure, tell_s)
        owner.pending.add(tokens, now=time.monotonic())

    async def _notify(
        self, name: str, owner: Owner, tokens: Sequence[str], tell_s: float
    ) -> ClusterError | None:
        try:
            if len(tokens) == 1:
                # The usual write changes one session: many of them share one call.
                return await owner.notify(tokens[0], tell_s=tell_s)
            await self._send_tokens(name, tokens, tell_s)
        except ClusterError as exc:
            return exc
        return None

    async def _send_notices(self, name: str, tokens: Sequence[str]) -> Sequence[None]:
        await self._send_tokens(name, tokens, TELL_S)
        return [None] * len(tokens)

    async def _deliver_pending(self, name: str, owner: Owner) -> ClusterError | None:
        """Send the pending tokens of a peer; return the failure, after which they are pending still."""
        since_s = time.monotonic()
        is_everything = owner.pending.is_everything
        try:
            await self._send_tokens(name, owner.pending.tokens(), TRY_S, is_everything=is_everything)
        except ClusterError as exc:
            return exc
        # Tokens that were added while the call was under way stay: the peer has not seen them.
        owner.pending.forget(before=since_s)
        return None

    async def _send_tokens(
        self, name: str, tokens: Sequence[str], try_s: float, *, is_everything: bool = False
    ) -> None:
        # One call at least: an empty one shows that the peer answers.
        for start in range(0, len(tokens) or 1, _TOKENS_A_CALL):
            request = pb.InvalidateRequest(
                origin=self._origin_for(name),
                tokens=tokens[start : start + _TOKENS_A_CALL],
                everything=is_everything,
            )
            body = request.SerializeToString()
            await self._peers.call(
                self._address(name),
                "Invalidate",
                body,
                timeout_s=try_s,
                channel_kind=ChannelKind.CALLS,
                callee=name,
            )
