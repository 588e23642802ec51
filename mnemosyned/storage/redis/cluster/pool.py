"""Runs scripts on a Redis Cluster: which node has a bucket, what is sent again, and what never is.

    calls ──> by primary: one pipeline each, at the same time
          <── replies: MOVED                       take the new node, and send it there
                       ASK, TRYAGAIN               the slot is being moved: wait until it has been
                       READONLY, LOADING,
                       CLUSTERDOWN, MASTERDOWN     a failover: ask for the new primary, for a second at most
                       no reply                    never sent again: whether it was done is not known

A node refuses a script before it runs, so all that is sent again has not been done. A bucket that fails
harms no other bucket of the same batch. A primary that does not answer delays one batch, and no later one
(`primary.py`).

redis-py's own client for clusters is not used. It sends commands again whose outcome is not known, raises
errors of many kinds, and one when all of its connections are in use.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

from aio.tasks import Tasks
from mnemosyned.errors import StorageUnavailable
from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.addresses import AddressError
from mnemosyned.storage.fault_log import advice
from mnemosyned.storage.redis import faults, scripts
from mnemosyned.storage.redis.address import Address, parse
from mnemosyned.storage.redis.cluster import slots
from mnemosyned.storage.redis.cluster.admission import Admission
from mnemosyned.storage.redis.cluster.asking import replies_of, topology_of
from mnemosyned.storage.redis.cluster.clocks import Clocks
from mnemosyned.storage.redis.cluster.primary import Call, Primary, Surroundings
from mnemosyned.storage.redis.cluster.topology import Host, Topology
from mnemosyned.storage.redis.config import check_files
from mnemosyned.storage.redis.failures import Failures
from mnemosyned.storage.redis.faults import (
    FAULTS,
    Uncovered,
    is_elsewhere,
    is_not_done,
    is_refusal,
    moved_to,
)
from mnemosyned.storage.redis.link import Link, open_link
from mnemosyned.storage.redis.records import stored_name
from mnemosyned.storage.redis.server import Sending

if TYPE_CHECKING:
    from mnemosyned.observe.metrics import QueryMetrics
    from mnemosyned.sessions.model import Criteria
    from mnemosyned.storage.redis.cluster.slots import Space
    from mnemosyned.storage.redis.pool import RedisOptions
    from mnemosyned.storage.redis.scripts import Existence, Script
    from mnemosyned.storage.redis.server_watch import ServerWatch

# How long calls wait for the end of a failover; the time for an answer is longer, and is for slots that move.
_PATIENCE_S: Final = 1.0
_PAUSES_S: Final = (0.0, 0.005, 0.02, 0.05, 0.1)
# Between two questions to a primary that does not answer.
_PROBE_PERIOD_S: Final = 0.1
# Two looks at the slots are so far apart at least.
_LOOK_PERIOD_S: Final = 0.05


class ClusterPool:
    """Runs scripts on key spaces, wherever they are."""

    def __init__(self, options: RedisOptions, metrics: QueryMetrics, watch: ServerWatch) -> None:
        self._options = options
        self._address_text = options.address
        self._address: Address | None = None
        self._failures = Failures(metrics)
        self._primaries: dict[Host, Primary] = {}
        self._topology = Topology()
        self._looked_s = float("-inf")
        self._looking = asyncio.Lock()
        self._tasks = Tasks("redis_cluster")
        self._look_at = watch.admit
        self._watch = watch
        self.clocks = Clocks()
        self.admission = Admission(self._meet)
        self.home = slots.home(options.prefix)
        self._buckets: Sequence[Space] = ()
        self._around = Surroundings(
            connect=self._connect,
            look=self._look,
            clocks=self.clocks,
            admission=self.admission,
            failures=self._failures,
            metrics=metrics,
            on_suspect=self._doubt,
        )
        metrics.watch_pool(
            size=lambda: sum(len(one.server.idle) + len(one.server.in_use) for one in self.primaries()),
            in_use=lambda: sum(len(one.server.in_use) for one in self.primaries()),
            waiting=lambda: sum(one.server.waiting for one in self.primaries()),
        )

    # Nodes.

    async def open(self) -> None:
        """Find the primaries. Raises StorageUnavailable, StorageRefused."""
        self._address = _read(self._address_text)
        self._failures.take(self._address.where)
        self._tasks = Tasks("redis_cluster")
        self._look_at = self._watch.admit
        self.admission.forget()
        try:
            address = self._address
            await self._take(await topology_of(address, address.hosts, self._options.connect_timeout_s))
        except FAULTS as exc:
            raise self.refused(exc) or self._failures.unavailable("connect", exc) from exc

    def divide(self, count: int) -> None:
        """Take the number of buckets."""
        self._buckets = slots.buckets(self._options.prefix, count)

    @property
    def buckets(self) -> Sequence[Space]:
        """The key spaces of sessions. Raises StorageUnavailable: they are not known yet."""
        if not self._buckets:
            raise StorageUnavailable("mnemosyned: storage: not connected")
        return self._buckets

    def opened(self) -> None:
        """Tell of servers that will not do from now on, and use them all the same."""
        self._look_at = self._watch.look

    def refused(self, exc: BaseException | None, host: Host | None = None) -> StorageRefused | None:
        """Return why a node, `host` or any, refuses us for good; None: it may take us later."""
        if exc is None or not is_refusal(exc):
            return None
        where = parse(self._address_text) if host is None else f"{host[0]}:{host[1]}"
        return StorageRefused(f"Redis at {where}: {advice(faults, exc)}")

    async def close(self) -> None:
        """Close all connections; calls under way fail."""
        self._address = None
        await self._tasks.close()
        primaries, self._primaries, self._topology = self.primaries(), {}, Topology()
        for primary in primaries:
            await primary.server.close()

    async def use(self, text: str) -> None:
        """Use another address from now on, if one of its nodes answers. Raises StorageRefused.

        Until then, and if none does, connections are made by the former one.
        """
        if text == self._address_text:
            return
        address, found = _read(text), None
        if self._address is not None:
            try:
                found = await topology_of(address, address.hosts, self._options.connect_timeout_s)
                await self._check_buckets(address, found)
            except FAULTS as exc:
                raise StorageRefused(f"Redis at {address}: {advice(faults, exc)}") from exc
        self._address_text = text
        self._failures.take(address.where)
        # It may have been closed meanwhile.
        if found is not None and self._address is not None:
            self._address = address
            # They may be another cluster's.
            await self._take(found)
            for primary in self.primaries():
                await primary.server.renew()

    async def _check_buckets(self, address: Address, found: Topology) -> None:
        """Raise StorageRefused if the sessions there are in another number of buckets."""
        host = found.primary(self.home.slot)
        if host is None:
            raise Uncovered(f"slot {self.home.slot} has no primary")
        question = ("GET", f"{self.home.prefix}buckets")
        (count,) = await replies_of(address, host, self._options.connect_timeout_s, [question])
        if isinstance(count, Exception):
            raise count
        if count is not None and int(count) != len(self._buckets) > 0:
            raise StorageRefused(f"Redis at {address}: it has {int(count)} buckets: it needs a restart")

    def follow(self, ask: Callable[[], None]) -> None:
        """Have a function called when a node refuses the log-in."""
        self._failures.on_auth_failure = ask

    def primaries(self) -> list[Primary]:
        """Return the primaries, as far as they are known."""
        return list(self._primaries.values())

    def primary_of(self, space: Space) -> Primary | None:
        """Return the primary of a key space; None: none is known."""
        host = self._topology.primary(space.slot)
        if host is None:
            return None
        if host not in self._primaries:
            self._primaries[host] = self._new(host)
        return self._primaries[host]

    def _new(self, host: Host) -> Primary:
        return Primary(host, self._around, size=self._options.pool_size, timeout_s=self._options.timeout_s)

    async def look(self) -> None:
        """Ask for the primaries, unless that has just been done; an error leaves them as they are."""
        async with self._looking:
            address = self._address
            if time.monotonic() - self._looked_s < _LOOK_PERIOD_S or address is None:
                return
            well = [one.host for one in self.primaries() if not one.is_suspect]
            others = [*self._topology.primaries, *self._topology.replicas, *address.hosts]
            hosts = dict.fromkeys([*random.sample(well, len(well)), *random.sample(others, len(others))])
            try:
                found = await topology_of(address, list(hosts), self._options.connect_timeout_s / 4)
                if self._address is address:
                    await self._take(found)
            except FAULTS as exc:
                self._failures.unavailable("connect", exc)
            self._looked_s = time.monotonic()

    async def _take(self, found: Topology) -> None:
        self._topology = found
        new = found.primaries - self._primaries.keys()
        left = {host: one for host, one in self._primaries.items() if host not in found.primaries}
        for host, primary in left.items():
            del self._primaries[host]
            # What is under way there goes on to its end.
            await primary.server.retire()
        self.clocks.keep(found.primaries)
        if any(one.is_suspect for one in left.values()):
            # Calls to these sessions fail already: they do not begin to wait with others.
            for host in new:
                self._primaries[host] = self._new(host)
                self._primaries[host].is_suspect = True
                self._doubt(self._primaries[host])

    async def _connect(self, host: Host) -> Link:
        address = self._address
        if address is None:
            raise Uncovered("the store is closed")
        async with asyncio.timeout(self._options.connect_timeout_s):
            return await open_link(address, host, address.login, 0)

    async def _look(self, link: Link) -> dict[str, str]:
        return await self._look_at(link)

    def _doubt(self, primary: Primary) -> None:
        self._tasks.spawn(self._probe(primary))

    async def _probe(self, primary: Primary) -> None:
        """Ask a primary that does not answer, until it does, or another one has its place."""
        while True:
            await self.look()
            if self._primaries.get(primary.host) is not primary:
                return
            with suppress(StorageUnavailable):
                await primary.look()
                return
            await asyncio.sleep(_PROBE_PERIOD_S)

    async def _meet(self, servers: Sequence[str]) -> tuple[int, int]:
        calls = [(self.home, (secrets.token_hex(8), *servers))]
        (reply,) = await self.run_all(scripts.MEET, calls, is_write=True, is_urgent=True)
        if isinstance(reply, StorageUnavailable):
            # Whatever waits for this has not been sent.
            reply.is_under_way = False
            raise reply
        since_us, nodes = reply
        return since_us, nodes

    # Scripts.

    async def run_all(
        self,
        script: Script | Existence,
        calls: Sequence[Call],
        *,
        is_write: bool = False,
        is_urgent: bool = False,
        timeout_s: float | None = None,
    ) -> list[Any]:
        """Run a script on several key spaces; return what each run returns, or its StorageUnavailable.

        `is_write`: its caller is told of its effect, or of that of another.
        """
        if self._address is None:
            return [StorageUnavailable("mnemosyned: storage: not connected")] * len(calls)
        timeout_s = timeout_s or self._options.timeout_s
        wait = 1 if self._options.wait is None else self._options.wait
        how = Sending(timeout_s=timeout_s, wait=wait, is_write=is_write, is_urgent=is_urgent)
        begun_s, rounds = time.monotonic(), 0
        results: list[Any] = [None] * len(calls)
        left = list(range(len(calls)))
        while left:
            replies = await self._sent(script, [calls[at] for at in left], how)
            passed_s = time.monotonic() - begun_s
            again: dict[int, Exception] = {}
            for at, reply in zip(left, replies, strict=True):
                if isinstance(reply, Exception) and _may_repeat(reply, passed_s, timeout_s):
                    again[at] = reply
                else:
                    results[at] = self._result(script, reply)
            left = list(again)
            if left:
                await self._follow([(calls[at][0], exc) for at, exc in again.items()], rounds)
                rounds += 1
        return results

    async def holding(self, criteria: Criteria) -> Sequence[Space]:
        """Return the buckets that may have sessions that meet the criteria, or some kept aside (moves.py).

        Raises StorageUnavailable.
        """
        if criteria.access_token is not None:
            return [self.buckets[self.bucket_of(criteria.access_token)]]
        if criteria.subject_id is not None:
            index = f"u:{criteria.subject_id}"
        elif criteria.refresh_token:
            index = f"r:{criteria.refresh_token}"
        else:
            return self.buckets
        replies = await self.run_all(scripts.HAS_INDEX, [(space, (index, "l")) for space in self.buckets])
        for reply in replies:
            if isinstance(reply, StorageUnavailable):
                raise reply
        return [space for space, count in zip(self.buckets, replies, strict=True) if count]

    async def each(
        self,
        script: Script,
        head: Sequence[str | bytes | int],
        items: Sequence[tuple[str | bytes | int, ...]],
        *,
        is_write: bool = False,
    ) -> list[Any]:
        """Run a script for named sessions, once for each bucket; see RedisPool."""
        places: dict[int, list[int]] = {}
        for at, item in enumerate(items):
            places.setdefault(self.bucket_of(item[0]), []).append(at)
        calls = [
            (self.buckets[bucket], [*head, *chain.from_iterable(items[at] for at in its)])
            for bucket, its in places.items()
        ]
        found: list[Any] = [None] * len(items)
        for its, replies in zip(
            places.values(), await self.run_all(script, calls, is_write=is_write), strict=True
        ):
            failed = isinstance(replies, StorageUnavailable)
            for number, at in enumerate(its):
                found[at] = replies if failed else replies[number]
        return found

    def bucket_of(self, name: str | bytes | int) -> int:
        """Return the bucket that has the session with this name."""
        assert not isinstance(name, int)
        return slots.bucket_of(stored_name(name) if isinstance(name, str) else name, len(self.buckets))

    async def _sent(self, script: Script | Existence, calls: Sequence[Call], how: Sending) -> list[Any]:
        """Send each call to its primary, those to one of them together."""
        replies: list[Any] = [None] * len(calls)
        places: dict[Primary, list[int]] = {}
        for at, (space, _) in enumerate(calls):
            primary = self.primary_of(space)
            if primary is None:
                replies[at] = Uncovered(f"slot {space.slot} has no primary")
            else:
                places.setdefault(primary, []).append(at)
        if len(calls) > sum(map(len, places.values())) and not self._looking.locked():
            self._tasks.spawn(self.look())
        sent = [primary.run(script, [calls[at] for at in its], how) for primary, its in places.items()]
        # One alone needs no task.
        answers = [await sent[0]] if len(sent) == 1 else await asyncio.gather(*sent)
        for (primary, its), answer in zip(places.items(), answers, strict=True):
            for at, reply in zip(its, answer, strict=True):
                moved = moved_to(reply) if isinstance(reply, Exception) else None
                if moved is not None:
                    self._topology.moved(calls[at][0].slot, (moved[0] or primary.host[0], moved[1]))
                replies[at] = reply
        return replies

    async def _follow(self, refusals: Sequence[tuple[Space, Exception]], rounds: int) -> None:
        """Do what will have calls succeed that were refused."""
        await asyncio.sleep(_PAUSES_S[min(rounds, len(_PAUSES_S) - 1)])
        # A node that names another one may be wrong: after some rounds, others are asked too.
        if rounds > 1 or any(not is_elsewhere(exc) for _, exc in refusals):
            await self.look()

    def _result(self, script: Script | Existence, reply: Any) -> Any:  # noqa: ANN401  # as the reply has it
        if not isinstance(reply, Exception) or isinstance(reply, StorageUnavailable):
            return reply
        error = self._failures.unavailable(script.name, reply)
        if is_not_done(reply) or isinstance(reply, Uncovered):
            error.is_under_way = False
        return error


def _may_repeat(reply: Exception, passed_s: float, timeout_s: float) -> bool:
    """Tell whether a script has not been done, and it is worth to send it once more."""
    return is_not_done(reply) and passed_s < (
        timeout_s if is_elsewhere(reply) else min(_PATIENCE_S, timeout_s)
    )


def _read(text: str) -> Address:
    """Read an address. Raises StorageRefused."""
    try:
        found = parse(text)
        check_files(found)
    except AddressError as exc:
        raise StorageRefused(f"flag -redis.address: {exc}") from None
    if not found.is_cluster:
        raise StorageRefused("flag -redis.address: a change to a single server needs a restart")
    return found
