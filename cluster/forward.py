"""Calls to the owners of tokens, and telling: what peers must drop from their caches.

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

Telling
-------
    writer (lease_keeper.py)   forward.py               node that may have copies
       |-- row written, not yet acknowledged
       |-- tell() ------------->|                            |
       |                        |-- Invalidate(tokens) ----->|  drops its copies
       |                        |<-- InvalidateResponse -----|
       |<- who has not confirmed|                            |

Nodes are told whether or not the breaker is open: who does not confirm is barred (lease.py), and then neither
told nor waited for. A node that confirms is asked again at once. So is one that gossip hears again, after
an answer to an empty Invalidate.

Rules for editing:

- A read and a write never share a batch (owner.py).
- An item whose outcome is not known counts as done by the peer, and as not done for the caller.
"""

from __future__ import annotations

import asyncio
import logging
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol

from aio.deadline import Deadline
from aio.later import Later, Outcome, failed
from aio.periodic import run_periodically
from aio.tasks import Tasks
from cluster.breaker import BreakerState
from cluster.errors import ClusterError, PeerSkipped, PeerTimeout, PeerUnreachable
from cluster.forward_stream import ForwardStream
from cluster.owner import Owner
from cluster.peerpb import peer_pb2 as pb
from cluster.peers import ChannelKind, Peers
from cluster.timing import ANSWER_S, HALF_OPEN_S, LEAST_TRY_S, TELL_S, TRIAL_PERIOD_S, TRY_S
from cluster.view import View
from cluster.wire import parse_answers, parsed

log = logging.getLogger(__name__)

_TOKENS_A_CALL: Final = 1000
_MAX_TRIALS: Final = 4096  # one for each member of the largest usual cluster, and more
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


class _Line:
    """The way to one peer, for what an Owner keeps of it. A Line of call_queue.py."""

    def __init__(self, forwarder: Forwarder, name: str) -> None:
        self._forwarder = forwarder
        self._name = name
        self.owner: Owner  # which has this line

    def send(self, items: list[pb.Item], timeout_s: float) -> Later[Sequence[pb.Answer]]:
        return self._forwarder.send_items(self._name, self.owner, items, timeout_s)

    def answered(self, count: int) -> None:
        self._forwarder.answered(self._name, self.owner, count)

    def failed(self, failure: ClusterError, try_s: float) -> None:
        self._forwarder.failed(self._name, self.owner, failure, try_s)


class Forwarder:
    """Calls to the owners of tokens, and telling, through the current view. A Teller."""

    def __init__(self, peers: Peers, *, storage_now_us: Callable[[], int]) -> None:
        """Ask no peer yet. `storage_now_us` is a clock that all nodes share."""
        self.counters = ForwardCounters()
        self._peers = peers
        self._origin_for: Callable[[str], pb.Origin] = lambda name: pb.Origin(callee=name)
        self._storage_now_us = storage_now_us
        self._view: View | None = None
        self._suspicious: Suspicious | None = None
        self._owners: dict[str, Owner] = {}  # by name: every peer to which something was sent
        self._trials = Tasks("trial", max_tasks=_MAX_TRIALS)
        self._has_peers = asyncio.Event()  # `run` has something to look after

    def bind(self, origin_for: Callable[[str], pb.Origin], suspicious: Suspicious) -> None:
        """Say who this node is to the node of a name, and which part finds out about silent peers."""
        self._origin_for = origin_for
        self._suspicious = suspicious

    def follow(self, view: View) -> None:
        """Route by this view from now on."""
        known = self._view.address_by_name if self._view is not None else {}
        self._view = view
        if view.address_by_name:
            self._has_peers.set()
        for name in view.address_by_name.keys() - known.keys():
            self.answers_again(name)

    def answers_again(self, name: str) -> None:
        """Find out at once whether a peer with an open breaker answers: there is a sign that it does.

        The sign itself closes no breaker. Gossip has a connection of its own, and a peer may answer gossip
        and no calls.
        """
        owner = self._owners.get(name)
        if owner is not None and self.knows(name) and owner.breaker.begin_trial():
            self._trials.spawn(self._begun_trial(name))

    def breaker_states(self) -> dict[str, BreakerState]:
        """Return the breaker of each peer that was ever asked and is still there."""
        # A copy, made in one step: the admin port reads it from another thread.
        return {name: owner.breaker.state for name, owner in list(self._owners.items())}

    def may_ask(self, name: str) -> bool:
        """Tell whether a member is not known to give no answers."""
        owner = self._owners.get(name)
        return owner is None or owner.breaker.is_closed

    def ask(
        self, name: str, item: pb.Item, *, is_write: bool, deadline: Deadline, try_s: float | None = None
    ) -> Later[pb.Answer]:
        """Return the owner's own answer, whatever its status.

        It gets `try_s`; by default at most half of what the caller has left, so that the storage still
        answers in time if the peer does not. After PeerUnreachable and PeerTimeout the peer may be doing the
        work still, but no write from the item's `deadline_us` on.

        Raises:
            PeerSkipped: it is known not to answer, or too many calls wait for it; nothing was sent.

        The Later fails with:
            PeerUnreachable: there is no connection, or it broke.
            PeerTimeout: no answer within the time it gets.
        """
        owner = self._owner(name)
        try_s = deadline.share_s(TRY_S) if try_s is None else try_s
        answered_s = try_s - ANSWER_S if try_s > TRY_S else try_s
        item.timeout_ms = max(1, int(answered_s * _MS_PER_S))
        # On a clock that the owner shares. If the item waits here or at the owner, the owner sees how late it
        # is.
        item.deadline_us = self._storage_now_us() + int(try_s * _US_PER_S)
        try:
            return owner.forward(item, is_write=is_write, try_s=try_s)
        except PeerSkipped:
            self.counters.by_outcome[name, "skipped"] += 1
            raise

    async def wait_until_expired(self, item: pb.Item) -> None:
        """Return when no node does any more what `ask` was asked to.

        A write that began earlier here might be overtaken by the same write at the owner, which is late.
        """
        left_s = self.expires_in_s(item)
        if left_s > 0:
            await asyncio.sleep(left_s)

    def expires_in_s(self, item: pb.Item) -> float:
        """Return after how many seconds no node does any more what `ask` was asked to; it may be over."""
        # The storage's clock may have been set back: then it is not waited for.
        return min((item.deadline_us - self._storage_now_us()) / _US_PER_S, 2 * item.timeout_ms / _MS_PER_S)

    def knows(self, name: str) -> bool:
        """See Teller."""
        return self._view is not None and name in self._view.address_by_name

    async def tell(
        self, nodes: Mapping[str, int], keys: Sequence[str] | None, *, timeout_s: float
    ) -> list[str]:
        """See Teller; with no keys it finds out whether the nodes answer."""
        confirmed = await asyncio.gather(*(self._tell(name, keys, timeout_s) for name in nodes))
        return [name for name, by in zip(nodes, confirmed, strict=True) if by != nodes[name]]

    async def have_ends_settled(self, nodes: Sequence[str], *, timeout_s: float) -> bool:
        """See Teller."""
        if not all(self.knows(name) and self.may_ask(name) for name in nodes):
            return False
        return all(await asyncio.gather(*(self._have_ends_settled(name, timeout_s) for name in nodes)))

    async def _have_ends_settled(self, name: str, timeout_s: float) -> bool:
        # First whether it answers at all: the rest may take long.
        if await self._tell(name, (), TRY_S) is None:
            return False
        request = pb.InvalidateRequest(origin=self._origin_for(name), await_ends=True)
        try:
            return (await self._invalidate(name, request, timeout_s)).have_ends_settled
        except ClusterError as exc:
            log.debug("ends_not_awaited", extra={"peer_node": name, "error": str(exc)})
            return False

    async def run(self) -> None:
        """Try peers that do not answer, until cancelled."""
        await self._has_peers.wait()
        await run_periodically("forwarder", self._round, period_s=self._period_s)

    def _period_s(self) -> float:
        """Return when to look next: a breaker that opens meanwhile has its first trial after HALF_OPEN_S."""
        are_closed = all(owner.breaker.is_closed for owner in self._owners.values())
        return HALF_OPEN_S if are_closed else TRIAL_PERIOD_S

    async def _round(self) -> None:
        await self._look_after_owners()
        # Alone, this node has no peer to look after. The round then lasts until there is one, without a
        # timer.
        await self._has_peers.wait()

    async def _look_after_owners(self) -> None:
        """Drop former peers, end streams that are not used, and try the peers that need it."""
        names = set(self._view.address_by_name) if self._view is not None else set()
        for name, owner in list(self._owners.items()):
            if name not in names:
                await self._drop_owner(name)
            else:
                owner.end_idle(_IDLE_STREAM_S if self._is_on_ring(name) else 0.0)
        # The list is made after the awaits above, in which calls may have added peers.
        await asyncio.gather(*(self._try(name) for name in list(self._owners) if name in names))
        if not names and not self._owners:
            self._has_peers.clear()

    async def close(self) -> None:
        """Cancel what is under way."""
        await self._trials.close()
        for name in list(self._owners):
            await self._drop_owner(name)

    def _owner(self, name: str) -> Owner:
        owner = self._owners.get(name)
        if owner is None:
            line = _Line(self, name)
            owner = line.owner = Owner(line, partial(self._send_notices, name))
            self._owners[name] = owner
            self._has_peers.set()
        return owner

    async def _drop_owner(self, name: str) -> None:
        # Out of the dictionary before the await, so that a new call gets a new Owner and not a closed one.
        await self._owners.pop(name).close()

    def _is_on_ring(self, name: str) -> bool:
        return self._view is not None and name in self._view.ring.nodes

    def send_items(
        self, name: str, owner: Owner, items: list[pb.Item], timeout_s: float
    ) -> Later[Sequence[pb.Answer]]:
        """Send a batch of calls; a failure here fails each of them."""
        try:
            address = self._address(name)
        except PeerUnreachable as exc:
            return failed(exc)
        batch = pb.Batch(origin=self._origin_for(name), items=items).SerializeToString()
        # A stream may break between the look and the batch. That is a failed batch: the callers turn to the
        # storage, and a second try would take the time that they need for it.
        stream = owner.take_stream(address) or self._peers.open_stream(address, name)
        answers = stream.ask(batch, timeout_s=timeout_s)
        return answers.through(partial(self._answered, owner, stream, len(items)))

    def _answered(
        self, owner: Owner, stream: ForwardStream, count: int, answers: Outcome[bytes]
    ) -> Outcome[Sequence[pb.Answer]]:
        if not isinstance(answers, bytes):
            assert isinstance(answers, BaseException)
            return answers
        # Only after an answer: a stream with a late answer in it must not be used again.
        owner.give_back(stream)
        each = parse_answers(answers, count)
        self.counters.batch_sizes[bisect_left(BATCH_BUCKETS, count)] += 1
        self.counters.items += count
        return each

    def _address(self, name: str) -> str:
        address = self._view.address_by_name.get(name) if self._view is not None else None
        if address is None:
            raise PeerUnreachable("it is no member any more")
        return address

    def answered(self, name: str, owner: Owner, count: int) -> None:
        """Count calls that a peer has answered, whatever it said."""
        owner.breaker.answered()
        self.counters.by_outcome[name, "ok"] += count

    def failed(self, name: str, owner: Owner, failure: ClusterError, try_s: float) -> None:
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
        """Find out whether a peer with an open breaker answers again, without a call of a client."""
        breaker = self._owners[name].breaker
        if breaker.may_try(now=time.monotonic()):
            await self._begun_trial(name)

    async def _begun_trial(self, name: str) -> None:
        await self._tell(name, (), TRY_S)

    async def _tell(self, name: str, keys: Sequence[str] | None, timeout_s: float) -> int | None:
        """Have one peer drop its copies; return which process has confirmed it, None: none has."""
        owner = self._owner(name)
        try:
            async with asyncio.timeout(timeout_s):
                # The usual write changes one session: many of them share one call.
                confirmed = await (
                    owner.notify(keys[0], tell_s=timeout_s)
                    if keys is not None and len(keys) == 1
                    else self._send_tokens(name, keys, timeout_s)
                )
            if isinstance(confirmed, ClusterError):
                raise confirmed
        except TimeoutError:
            self.failed(name, owner, PeerTimeout("no answer in time"), timeout_s)
        except PeerSkipped:
            # The peer has not seen it, so this is no evidence against the peer.
            pass
        except ClusterError as exc:
            self.failed(name, owner, exc, timeout_s)
        else:
            if not owner.breaker.is_closed:
                log.info("breaker_closed", extra={"peer_node": name})
            owner.breaker.answered()
            return confirmed
        return None

    async def _send_notices(self, name: str, keys: Sequence[str]) -> Sequence[int]:
        return [await self._send_tokens(name, keys, TELL_S)] * len(keys)

    async def _invalidate(
        self, name: str, request: pb.InvalidateRequest, timeout_s: float
    ) -> pb.InvalidateResponse:
        answer = await self._peers.call(
            self._address(name),
            "Invalidate",
            request.SerializeToString(),
            timeout_s=timeout_s,
            channel_kind=ChannelKind.CALLS,
            callee=name,
        )
        return parsed(pb.InvalidateResponse, answer)

    async def _send_tokens(self, name: str, keys: Sequence[str] | None, timeout_s: float) -> int:
        """Return which process has dropped its copies. Raises ClusterError."""
        if keys is None:
            request = pb.InvalidateRequest(origin=self._origin_for(name), everything=True)
            return (await self._invalidate(name, request, timeout_s)).instance
        instance = 0
        # One call at least: an empty one shows that the peer answers.
        for start in range(0, len(keys) or 1, _TOKENS_A_CALL):
            request = pb.InvalidateRequest(
                origin=self._origin_for(name), tokens=keys[start : start + _TOKENS_A_CALL]
            )
            response = await self._invalidate(name, request, timeout_s)
            if start and response.instance != instance:
                raise PeerUnreachable("it was restarted meanwhile")
            instance = response.instance
        return instance
