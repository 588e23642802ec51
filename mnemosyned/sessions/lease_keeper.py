"""Keeps this node's lease, and settles writes: clock, store and messages around `cluster/lease.py`.

    run ── each period, and at once when asked ──> store.renew ──> Lease.answered ──> drop every copy, perhaps
    settle(keys) ── healthy, and no mirror ──> None: acknowledge at once
             ├───── healthy ───> clear those that have a mirror
             └───── otherwise ─> renew if the rows are old ── clear all nodes ── and once more
    clear ── tell ── bar who did not confirm ── wait

One settling is for all sessions of a batch of writes. Bars are joined: one that is under way serves every
settling that needs it, because it lasts.

A settling that fails has not proved that no old copy is served. The caller is told that the write's outcome
is unknown, and the settling goes on in the background (`coherence.py`).
"""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from aio.tasks import Tasks
from cluster.lease import (
    BAR_US,
    LOOK_US,
    PERIOD_US,
    TELL_US,
    Lease,
    MayHave,
    Wait,
)
from cluster.mirrors import Grants
from cluster.node_row import Renewal, Renewed
from mnemosyned.errors import MnemosyneError, StorageUnavailable
from mnemosyned.sessions.clock import StorageClock
from mnemosyned.sessions.row_watch import RowWatch
from mnemosyned.sessions.store import LeaseStore

log = logging.getLogger(__name__)

_US_PER_S: Final = 1_000_000
# Another node says after this at most whether its ends are settled (coherence.py), and its answer travels.
_ENDS_S: Final = 0.5
SETTLE_BUCKETS_S: Final = (0.005, 0.02, 0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 5.0)
# A renewal without an answer for so long says that the storage does not answer, before the lease ends.
_DOUBT_S: Final = 0.5


def _any_node(_name: str) -> bool:
    return True


class Teller(Protocol):
    """Has other nodes drop their copies."""

    async def tell(
        self, nodes: Mapping[str, int], keys: Sequence[str] | None, *, timeout_s: float
    ) -> list[str]:
        """Tell these nodes, by name and process, of these sessions; return which have not confirmed in time.

        None stands for all sessions. Never raises.
        """
        ...

    def knows(self, name: str) -> bool:
        """Tell whether a node is a member of this node's cluster."""
        ...

    async def have_ends_settled(self, nodes: Sequence[str], *, timeout_s: float) -> bool:
        """Wait until what these nodes were ending is settled; False: one does not say so. Never raises."""
        ...


@dataclass(slots=True)
class LeaseCounters:
    """What happened to this node's lease, and what its writes waited for."""

    renewals: Counter[str] = field(default_factory=Counter)  # by outcome: ok, refused, failed
    recalls: int = 0  # nodes that this one has had drop a mirror
    bars_given: int = 0
    bars_received: int = 0
    drops: Counter[str] = field(default_factory=Counter)  # of every copy, by cause
    refused: Counter[str] = field(default_factory=Counter)  # calls that no copy could answer, by cause
    # Settlings that took at most so long, and one count more for the longer; and the time of all.
    settle_buckets: list[int] = field(default_factory=lambda: [0] * (len(SETTLE_BUCKETS_S) + 1))
    settle_s: float = 0.0
    settle_bounds_s: tuple[float, ...] = SETTLE_BUCKETS_S


class LeaseKeeper:
    """This node's lease in one store, from `begin` to `resign`."""

    def __init__(
        self,
        store: LeaseStore,
        lease: Lease,
        clock: StorageClock,
        *,
        grants: Grants,
        drop_everything: Callable[[], None],
        teller: Teller | None = None,
    ) -> None:
        """Begin without a lease.

        - `grants` are of mirrors, to other nodes.
        - `drop_everything` drops every copy, closes every fill, and forgets every load under way.
        - `teller` reaches other nodes; without one they can only be barred.
        """
        self.lease = lease
        self.grants = grants
        self.counters = LeaseCounters()
        self._store = store
        self._clock = clock
        self._drop_everything = drop_everything
        self._teller = teller
        # Gets the process of each node that has a row, with each answer of the store.
        self.on_rows: Callable[[Mapping[str, int]], None] = _do_nothing
        # Drops this node's mirrors of these sessions; None: of all.
        self.drop_mirrors: Callable[[Sequence[str] | None], None] = _do_nothing
        # Gets the ring that the store has taken.
        self.on_published: Callable[[str], None] = _do_nothing
        self._wake = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self._renewing: asyncio.Task[None] | None = None
        self._barring: dict[str, asyncio.Task[Wait]] = {}
        self._untold: set[str] = set()  # barred, and not known to be told since
        self._settled_losses = 0  # of `lease.losses`
        self._tasks = Tasks("lease")
        self._was_valid = False
        self.rows = RowWatch(store, lease, knows=self._knows)
        self._is_resigned = False
        # The storage does not answer just now: calls had better be answered elsewhere.
        self.is_in_doubt = False
        self.on_doubt: list[Callable[[bool], None]] = []
        self.has_registered = asyncio.Event()  # the store has taken a renewal

    # The lease.

    def route_by(self, ring: str) -> None:
        """Take the ring by which this node routes from now on; empty: it serves no copies."""
        if ring != self.lease.ring:
            self.lease.route_by(ring)
            self._wake.set()

    def begin(self) -> None:
        """Renew the lease from now on, until `resign`; the store is open."""
        self._running = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            # Before the renewal, so that what asks for another one meanwhile gets it.
            self._wake.clear()
            await self.refresh()
            self._bar_again()
            try:
                async with asyncio.timeout(PERIOD_US / _US_PER_S):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def resign(self) -> None:
        """Serve no copies any more, and delete the row; never raises."""
        self._is_resigned = True
        if self._running is None:
            return
        self._running.cancel()
        await asyncio.wait([self._running])
        self.lease.resign()
        self._drop_everything()
        if self._renewing is not None:
            await asyncio.wait([self._renewing])
        try:
            await self._store.resign((self.lease.name, self.lease.instance, None))
        except MnemosyneError as exc:
            # The others take it for dead as soon as its row has lapsed.
            log.debug("resignation_failed", extra={"error": str(exc)})

    async def close(self) -> None:
        """Cancel what is under way."""
        await self.rows.close()
        await self._tasks.close()

    async def refresh(self) -> None:
        """Renew once; join a renewal that is under way. A failure shows in the lease."""
        if self._renewing is None:
            self._renewing = asyncio.create_task(self._renew())
            self._renewing.add_done_callback(self._renewed)
        await asyncio.shield(self._renewing)

    def _renewed(self, _: asyncio.Task[None]) -> None:
        self._renewing = None

    async def _renew(self) -> None:
        if self._is_resigned:
            return
        renewal, sent_us = self.lease.renewal(), self._clock.uptime_us()
        doubt = asyncio.get_running_loop().call_later(_DOUBT_S, self._doubt, True)
        try:
            answer = await self._store.renew(renewal)
        except MnemosyneError as exc:
            self.counters.renewals["failed"] += 1
            self._doubt(True)
            self._tell_change(str(exc))
            return
        finally:
            doubt.cancel()
        self._doubt(False)
        received_us = self._clock.uptime_us()
        self._clock.observe(answer.clock_us, sent_us=sent_us, received_us=received_us)
        if not self._is_resigned:
            self._take(renewal, answer, sent_us, received_us)

    def _take(self, renewal: Renewal, answer: Renewed, sent_us: int, received_us: int) -> None:
        result = self.lease.answered(renewal, answer, sent_us=sent_us, received_us=received_us)
        self.on_rows(self.lease.processes)
        if result.must_drop:
            # Before anything else can run.
            self._drop_everything()
            self._wake.set()
            self.counters.drops[result.why] += 1
        if result.why == "barred":
            self.counters.bars_received += 1
            log.warning("node_barred", extra={"by": "another node, which could not tell it of a write"})
        self.counters.renewals["ok" if result.is_renewed else "refused"] += 1
        if result.is_renewed:
            self.has_registered.set()
            self.on_published(self.lease.published)
        self._tell_change("")
        self.rows.look(received_us)

    def _doubt(self, is_in_doubt: bool) -> None:  # noqa: FBT001  # a callback with one argument
        if is_in_doubt != self.is_in_doubt:
            self.is_in_doubt = is_in_doubt
            for follow in self.on_doubt:
                follow(is_in_doubt)

    def _tell_change(self, error: str) -> None:
        """Log when the lease begins and ends to be valid."""
        now_us = self._clock.uptime_us()
        is_valid = self.lease.is_valid(now_us)
        if is_valid == self._was_valid:
            return
        self._was_valid = is_valid
        if is_valid:
            log.info("lease_valid", extra={"node": self.lease.name})
        else:
            log.warning("lease_lost", extra={"reason": self.lease.reason(now_us), "error": error})

    def reason(self) -> str:
        """Return in one word why no copy may be served; empty: they may."""
        return self.lease.reason(self._clock.uptime_us())

    def age_s(self) -> float | None:
        """Return the time since the last answered renewal was sent; None: there was none."""
        age_us = self.lease.age_us(self._clock.uptime_us())
        return None if age_us is None else age_us / _US_PER_S

    def shown(self) -> dict[str, str]:
        """Return one word for each node that the store has a row of, for people."""
        return self.lease.shown(self._clock.uptime_us())

    # Writes.

    def settle(
        self, keys: Sequence[str], *, owns: Callable[[str], bool] | None
    ) -> Coroutine[Any, Any, None] | None:
        """Return what a write must wait for after its commit; None: nothing.

        `owns` tells whether this node may serve copies of a key; None: the keys name no owner. The work
        raises StorageUnavailable if nothing proves that the older copies are gone.
        """
        if self._is_settled(keys, owns):
            return None
        return self._settle(keys, owns)

    async def settle_everything(self) -> None:
        """Have every node drop every copy; raises as `settle` does."""
        begun_us, losses = self._clock.uptime_us(), self.lease.losses
        await self._clear_twice(None)
        self._count_settling(begun_us)
        self._settled_losses = max(losses, self._settled_losses)

    def _is_settled(self, keys: Sequence[str], owns: Callable[[str], bool] | None) -> bool:
        lease, now_us = self.lease, self._clock.uptime_us()
        if not lease.knows_others(now_us) or now_us < lease.complete_from_us():
            return False
        if self._owns_alone(keys, owns, now_us):
            return not self.grants.holders(keys)
        # There is nobody else.
        return not (lease.holders(now_us) or lease.rival() or lease.waits(now_us))

    def _owns_alone(self, keys: Sequence[str], owns: Callable[[str], bool] | None, now_us: int) -> bool:
        """Tell whether rule 7 holds: other nodes have of these keys at most mirrors that this one granted."""
        lease = self.lease
        return lease.agrees and owns is not None and now_us < lease.until_us and all(map(owns, keys))

    async def _settle(self, keys: Sequence[str], owns: Callable[[str], bool] | None) -> None:
        begun_us = self._clock.uptime_us()
        await self._know_others()
        if self._is_settled(keys, owns):
            return
        if self._owns_alone(keys, owns, self._clock.uptime_us()):
            await self._recall(keys)
        else:
            await self._clear_twice(keys)
        self._count_settling(begun_us)

    async def _clear_twice(self, keys: Sequence[str] | None) -> None:
        await self._know_others()
        await self._clear(keys)
        # No owner has an older copy now, of which it could grant a mirror once more (rule 21).
        await self._know_others()
        self.drop_mirrors(keys)
        await self._clear(keys)

    def _count_settling(self, begun_us: int) -> None:
        took_s = (self._clock.uptime_us() - begun_us) / _US_PER_S
        self.counters.settle_buckets[bisect_left(SETTLE_BUCKETS_S, took_s)] += 1
        self.counters.settle_s += took_s

    async def _know_others(self) -> None:
        """Renew if the rows are old (rule 6). Raises StorageUnavailable."""
        if not self.lease.knows_others(self._clock.uptime_us()):
            await self.refresh()
            if not self.lease.knows_others(self._clock.uptime_us()):
                raise _unsettled()

    async def _recall(self, keys: Sequence[str]) -> None:
        """Have the nodes that have a mirror drop it (rule 20)."""
        count, holders = self.grants.count, self.grants.holders(keys)
        confirmed = await self._clear(keys, holders.__contains__)
        self.grants.dropped(keys, confirmed, count=count)
        self.counters.recalls += len(confirmed)

    async def _clear(self, keys: Sequence[str] | None, may_have: MayHave = _any_node) -> list[str]:
        """See that none of these nodes serves an older copy (rules 8 to 10); return which have confirmed it.

        Raises StorageUnavailable.
        """
        lease, now_us = self.lease, self._clock.uptime_us()
        waits = lease.waits(now_us, may_have)
        self._untold |= {wait.name for wait in waits}
        nodes = lease.holders(now_us, may_have)
        untold = await self._tell(nodes, keys) if nodes else []
        confirmed = [name for name in nodes if name not in untold]
        untold += [lease.rival()] if lease.rival() else []
        waits += await asyncio.gather(*map(self._bar, untold))
        # Each time from the lease: the store may have been replaced since.
        while (now_us := self._clock.uptime_us()) < lease.complete_from_us() or any(
            not lease.is_over(wait, now_us) for wait in waits
        ):
            await asyncio.sleep(LOOK_US / _US_PER_S)
            await self.refresh()
        return confirmed

    async def others_have_settled(self) -> bool:
        """See Settler; a node that was lost may have left ends that it had not settled.

        A store that has been replaced may lack sessions of which nodes have copies (rule 14), and a Delete
        does not find these. So it is asked who it is, and the answer is no until no older lease is left.
        """
        if not await self._has_renewed_since(self._clock.uptime_us()):
            return False
        if self._clock.uptime_us() < self.lease.complete_from_us():
            return False
        nodes = self.lease.living()
        if self.lease.losses > self._settled_losses:
            return False
        if self._teller is None or not nodes:
            return not nodes
        return await self._teller.have_ends_settled(nodes, timeout_s=_ENDS_S)

    async def _has_renewed_since(self, instant_us: int) -> bool:
        """Renew; tell whether a renewal that was sent after an instant has been answered. Never raises."""
        for _ in range(2):  # the first may be one that was under way
            await self.refresh()
            age_us = self.lease.age_us(now_us := self._clock.uptime_us())
            if age_us is not None and now_us - age_us >= instant_us:
                return True
        return False

    def _knows(self, name: str) -> bool:
        return self._teller is not None and self._teller.knows(name)

    async def _tell(self, nodes: Mapping[str, int], keys: Sequence[str] | None) -> list[str]:
        if self._teller is None:
            return list(nodes)
        untold = await self._teller.tell(nodes, keys, timeout_s=TELL_US / _US_PER_S)
        self._untold -= nodes.keys() - set(untold)
        return untold

    async def _bar(self, name: str) -> Wait:
        """Bar a node, or join a bar that is under way. Raises StorageUnavailable."""
        task = self._barring.get(name)
        if task is None:
            task = self._barring[name] = asyncio.create_task(self._bar_alone(name))
            task.add_done_callback(lambda done: self._barred(name, done))
        return await asyncio.shield(task)

    def _barred(self, name: str, task: asyncio.Task[Wait]) -> None:
        del self._barring[name]
        if not task.cancelled():
            # Read, or asyncio would report a failure that nobody waited for.
            task.exception()

    async def _bar_alone(self, name: str) -> Wait:
        sent_us = self._clock.uptime_us()
        was_barred = bool(self.lease.bar_ends_us(name) > sent_us)
        barred = await self._store.bar(name)
        received_us = self._clock.uptime_us()
        if received_us >= sent_us + BAR_US:
            # The bar may be over, and a settling that has joined it may be for a later write.
            raise _unsettled()
        wait = self.lease.barred(name, barred, sent_us=sent_us, received_us=received_us)
        self.counters.bars_given += 1
        self._untold.add(name)
        if not was_barred:
            log.warning("barred_a_node", extra={"other": name, "reason": "it could not be told of a write"})
        return wait

    def _bar_again(self) -> None:
        """Keep nodes barred that cannot be told, so that no later write waits for them (rule 12)."""
        now_us = self._clock.uptime_us()
        for name in list(self._untold):
            ends_us = self.lease.bar_ends_us(name)
            if ends_us <= now_us:
                # It has lapsed, resigned, or was not needed: the next write finds out.
                self._untold.discard(name)
            elif ends_us - now_us < BAR_US // 2 and name not in self._barring:
                self._tasks.spawn(self._try_again(name))

    async def _try_again(self, name: str) -> None:
        if await self._tell({name: self.lease.instance_of(name)}, []):
            try:
                await self._bar(name)
            except MnemosyneError as exc:
                log.debug("bar_not_extended", extra={"other": name, "error": str(exc)})


def _unsettled() -> StorageUnavailable:
    return StorageUnavailable("mnemosyned: storage: unavailable; the change may have been made")


def _do_nothing(*_: object) -> None:
    pass
