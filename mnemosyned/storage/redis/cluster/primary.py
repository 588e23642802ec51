"""One primary of a Redis Cluster: its connections, what it is, and whether it answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from aio.units import NS_PER_US
from mnemosyned.errors import StorageUnavailable
from mnemosyned.sessions.clock import uptime_ns
from mnemosyned.storage.redis.faults import NotPrimary
from mnemosyned.storage.redis.server import Sending, Server

if TYPE_CHECKING:
    from mnemosyned.observe.metrics import QueryMetrics
    from mnemosyned.storage.redis.cluster.admission import Admission
    from mnemosyned.storage.redis.cluster.clocks import Clocks
    from mnemosyned.storage.redis.cluster.slots import Space
    from mnemosyned.storage.redis.cluster.topology import Host
    from mnemosyned.storage.redis.failures import Failures
    from mnemosyned.storage.redis.link import Link
    from mnemosyned.storage.redis.scripts import Existence, Script

# Replicas on one network confirm within a millisecond.
_SHORT_WAIT_S: Final = 0.1

Call = tuple["Space", Sequence[str | bytes | int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What all primaries of a cluster share."""

    connect: Callable[[Host], Awaitable[Link]]
    look: Callable[[Link], Awaitable[dict[str, str]]]  # as the judge of servers
    clocks: Clocks
    admission: Admission
    failures: Failures
    metrics: QueryMetrics
    on_suspect: Callable[[Primary], None]


class Primary:
    """A node that was said to be a primary.

    After a failure it is suspect: calls fail at once, and do not wait for it with the calls to other
    primaries that are in the same batch. The pool asks it until it answers again, or until another node has
    its slots.
    """

    def __init__(self, host: Host, around: Surroundings, *, size: int, timeout_s: float) -> None:
        self.host = host
        self.is_suspect = False
        self._suspicion: BaseException | None = None  # what has failed
        self._identity = ""  # as the last look has shown it
        self._around = around
        self._timeout_s = timeout_s
        self.server = Server(
            self._connect,
            size=size,
            failures=around.failures,
            metrics=around.metrics,
            admit=self._admit,
            short_wait_s=_SHORT_WAIT_S,
        )

    async def run(self, script: Script | Existence, calls: Sequence[Call], how: Sending) -> list[Any]:
        """Run a script on several key spaces; return what each run returns, or why it has failed."""
        # What is urgent waits with nothing else, and the home cannot be admitted without it.
        if self.is_suspect and not how.is_urgent:
            error = StorageUnavailable("mnemosyned: storage: unavailable")
            error.is_under_way = False
            error.detail = f"the primary at {self.host[0]}:{self.host[1]} does not answer"
            error.__cause__ = self._suspicion
            return [error] * len(calls)
        try:
            return await self.server.run(script, [(space.keys, given) for space, given in calls], how)
        except StorageUnavailable as exc:
            if isinstance(exc.__cause__, NotPrimary):
                # Nothing was sent, and the pool asks for the node that has its place.
                return [exc.__cause__] * len(calls)
            self._suspect(exc)
            return [exc] * len(calls)

    async def look(self) -> None:
        """Ask what it is and for its time. Raises StorageUnavailable."""
        try:
            await self.server.use("look", self.inspect, timeout_s=self._timeout_s)
            if self.is_suspect:
                # Calls fail at once meanwhile, rather than wait with calls to others.
                await self._around.admission.admit(self._identity)
        except StorageUnavailable as exc:
            self._suspect(exc)
            raise
        self.is_suspect = False

    async def inspect(self, link: Link) -> None:
        """See what it is, and take its time. Raises NotPrimary, and redis-py's errors."""
        sent_us = uptime_ns() // NS_PER_US
        (time,) = await link.call([("TIME",)])
        received_us = uptime_ns() // NS_PER_US
        if isinstance(time, Exception):
            raise time
        info = await self._around.look(link)
        if info.get("role") != "master":
            raise NotPrimary(f"it is a replica of {info.get('master_host')}:{info.get('master_port')}")
        seconds, micros = time
        clock_us = int(seconds) * 1_000_000 + int(micros)
        self._around.clocks.observe(self.host, clock_us, sent_us=sent_us, received_us=received_us)
        link.identity = f"{info.get('run_id')}/{info.get('master_replid')}"
        former, self._identity = self._identity, link.identity
        if former not in {"", link.identity}:
            # It was a replica meanwhile: what other connections know of it is outdated.
            await self.server.renew()

    async def _connect(self) -> Link:
        link = await self._around.connect(self.host)
        try:
            await self.inspect(link)
        except BaseException:
            await link.close()
            raise
        return link

    async def _admit(self, link: Link) -> None:
        if not self._around.admission.has_admitted(link.identity):
            await self._around.admission.admit(link.identity)

    def _suspect(self, exc: StorageUnavailable) -> None:
        # Calls that wait for a connection of ours say nothing of the server.
        if exc.__cause__ is not None and exc.detail.partition(":")[0] != "acquire" and not self.is_suspect:
            self.is_suspect, self._suspicion = True, exc.__cause__
            self._around.on_suspect(self)
