"""One server of Redis: its connections, and which of its answers count. Bounded, timed and counted.

Scripts are sent together, in one round trip:

    EVALSHA script … ──> NOSCRIPT? load all scripts, and send those again: nothing was done
    EVALSHA mark, WAIT n   only with -redis.wait=n ──> fewer have it: StorageUnavailable, outcome unknown

Replication is asynchronous. A primary that is cut off from its replicas does not know when one of them takes
its place, and goes on answering. With `-redis.wait` this daemon does not believe it: a write needs the
confirmation of n replicas. A read needs one too, unless there was one within the last second. Renewals of
the lease are writes, so usually there was. What is written by other connections is confirmed too, since the
mark is written after it: a write that finds no session says so only when the end of it is confirmed.

Idle connections are dropped when one shows that the server is another one by now, or gone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from mnemosyned.errors import StorageUnavailable
from mnemosyned.storage.redis import scripts
from mnemosyned.storage.redis.faults import (
    FAULTS,
    NotReplicated,
    is_missing_script,
    is_not_done,
    is_other_server,
)

if TYPE_CHECKING:
    from mnemosyned.observe.metrics import QueryMetrics
    from mnemosyned.storage.redis.failures import Failures
    from mnemosyned.storage.redis.link import Command, Link
    from mnemosyned.storage.redis.scripts import Existence, Keys, Script

# For so long after replicas have confirmed a write, this server counts as the primary for reads. Sentinels
# and clusters need longer to replace it (down-after-milliseconds, cluster-node-timeout).
_PROVEN_S: Final = 1.0
# Of the time for an answer, what WAIT may take: its answer must still arrive.
_WAIT_SHARE: Final = 0.8
# Connections that leases may use besides, so that no other call delays a renewal.
_URGENT: Final = 2
# Tries to write a mark while slots move away.
_MARKS: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Sending:
    """How scripts are sent."""

    timeout_s: float
    wait: int = 0  # replicas that must confirm a write
    is_write: bool = False  # its caller is told of its effect, or of that of another
    is_urgent: bool = False


class Server:
    """The connections to one server; every method raises StorageUnavailable for any error of the network."""

    def __init__(
        self,
        connect: Callable[[], Awaitable[Link]],
        *,
        size: int,
        failures: Failures,
        metrics: QueryMetrics,
        admit: Callable[[Link], Awaitable[None]] | None = None,
        short_wait_s: float | None = None,
    ) -> None:
        """Begin without a connection.

        - `connect` opens one, within a time of its own.
        - `admit` returns when scripts that are not urgent may be sent on it.
        - `short_wait_s` is the time for replicas while they do not confirm, so that calls to other servers,
          which are in the same batch, do not wait for them again and again.
        """
        self._connect = connect
        self._admit = admit
        self._short_wait_s = short_wait_s
        self._lacks_replicas = False
        self._failures = failures
        self._metrics = metrics
        self.idle: list[Link] = []
        self.in_use: set[Link] = set()
        self.waiting = 0
        self._epoch = 0  # raised by `renew`: links of earlier ones are not kept
        self._proven_s = float("-inf")
        self._free = asyncio.Semaphore(size)
        self._free_urgent = asyncio.Semaphore(_URGENT)
        self._is_open = True
        self._is_retired = False

    async def run(
        self,
        script: Script | Existence,
        spaces: Sequence[tuple[Keys, Sequence[str | bytes | int]]],
        how: Sending,
    ) -> list[Any]:
        """Run one script on several key spaces; return what each returns, perhaps an error of the server."""
        commands = [script.command(keys, arguments) for keys, arguments in spaces]
        started_s = time.perf_counter()
        is_proven = time.monotonic() - self._proven_s < _PROVEN_S
        wait = how.wait if how.is_write or not is_proven else 0
        try:
            replies: list[Any] = await self.use(
                script.name,
                lambda link: self._run(link, commands, [keys for keys, _ in spaces], how, wait),
                timeout_s=how.timeout_s,
                is_urgent=how.is_urgent,
            )
        finally:
            self._metrics.count(script.name, time.perf_counter() - started_s)
        if any(isinstance(reply, Exception) and is_other_server(reply) for reply in replies):
            await self.renew()
        return replies

    async def _run(
        self, link: Link, commands: Sequence[Command], places: Sequence[Keys], how: Sending, wait: int
    ) -> list[Any]:
        if self._admit is not None and not how.is_urgent:
            await self._admit(link)
        if not wait:
            return await _sent(link, commands)
        wait_s = how.timeout_s * _WAIT_SHARE
        if self._lacks_replicas and self._short_wait_s is not None:
            wait_s = min(wait_s, self._short_wait_s)
        waiting: Command = ("WAIT", wait, int(wait_s * 1000))
        marks = [scripts.MARK.command(keys, ()) for keys in places]
        sent_s = time.monotonic()
        *replies, marked, confirmed = await _sent(link, [*commands, marks[0], waiting])
        if isinstance(marked, Exception) and is_not_done(marked):
            # The key of this mark has moved to another server. Those of scripts that were done have not.
            done = [
                mark for mark, reply in zip(marks, replies, strict=True) if not isinstance(reply, Exception)
            ]
            for mark in done[:_MARKS]:
                sent_s = time.monotonic()
                marked, confirmed = await _sent(link, [mark, waiting])
                if not isinstance(marked, Exception):
                    break
        failure = _unconfirmed(marked, confirmed, wait)
        self._lacks_replicas = isinstance(confirmed, int) and confirmed < wait
        if failure is None:
            self._proven_s = max(self._proven_s, sent_s)
            return replies
        return [reply if isinstance(reply, Exception) else failure for reply in replies]

    async def use(
        self,
        doing: str,
        work: Callable[[Link], Coroutine[Any, Any, Any] | Awaitable[Any]],
        *,
        timeout_s: float,
        is_urgent: bool = False,
    ) -> Any:  # noqa: ANN401  # what the work returns
        """Do something with a connection, and return what it returns."""
        free = self._free_urgent if is_urgent else self._free
        self.waiting += 1
        try:
            async with asyncio.timeout(timeout_s):
                await free.acquire()
        except TimeoutError as exc:
            raise await self._failed("acquire", exc) from exc
        finally:
            self.waiting -= 1
        try:
            link = await self._link()
            try:
                async with asyncio.timeout(timeout_s):
                    result = await work(link)
            except BaseException as exc:
                # Its replies are not known to be read.
                await self._release(link, is_idle=False)
                if isinstance(exc, FAULTS):
                    raise await self._failed(doing, exc) from exc
                raise
            await self._release(link, is_idle=True)
            return result
        finally:
            free.release()

    async def renew(self) -> None:
        """Replace all connections: idle ones now, and others at the end of their call."""
        self._epoch += 1
        self._proven_s = float("-inf")
        idle, self.idle = self.idle, []
        for link in idle:
            await _closed(link)

    async def retire(self) -> None:
        """Keep no connection beyond the end of its call: nothing more is to come."""
        self._is_retired = True
        await self.renew()

    def open(self) -> None:
        """Take calls, after a `close`."""
        self._is_open = True

    async def close(self) -> None:
        """Close all connections; calls under way fail."""
        self._is_open = False
        await self.renew()
        for link in list(self.in_use):
            await _closed(link)

    async def _link(self) -> Link:
        if not self._is_open:
            raise StorageUnavailable("mnemosyned: storage: not connected")
        while self.idle:
            link = self.idle.pop()
            self.in_use.add(link)
            if await link.is_usable():
                return link
            await self._release(link, is_idle=False)
        epoch = self._epoch
        try:
            link = await self._connect()
        except FAULTS as exc:
            raise await self._failed("connect", exc) from exc
        link.epoch = epoch
        self.in_use.add(link)
        return link

    async def _release(self, link: Link, *, is_idle: bool) -> None:
        self.in_use.discard(link)
        is_current = self._is_open and not self._is_retired and link.epoch == self._epoch
        if is_idle and is_current:
            self.idle.append(link)
            return
        await _closed(link)

    async def _failed(self, doing: str, exc: BaseException) -> StorageUnavailable:
        if is_other_server(exc):
            await self.renew()
        return self._failures.unavailable(doing, exc)


def _unconfirmed(marked: object, confirmed: Any, wait: int) -> Exception | None:  # noqa: ANN401  # as the reply has it
    """Return why the writes before a mark do not count; None: they do."""
    for reply in (marked, confirmed):
        if isinstance(reply, Exception):
            # What refuses a mark has not refused the scripts before it: they must not be sent again.
            return NotReplicated() if is_not_done(reply) else reply
    return NotReplicated() if confirmed < wait else None


async def load(link: Link) -> None:
    """Load all scripts into the server. Raises redis-py's errors."""
    replies = await link.call([("SCRIPT", "LOAD", script.source) for script in scripts.ALL])
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply


async def _sent(link: Link, commands: Sequence[Command]) -> list[Any]:
    """Send commands; send those again whose script the server has forgotten, and what is behind them."""
    replies = await link.call(commands)
    lacking = [at for at, reply in enumerate(replies) if is_missing_script(reply)]
    if lacking:
        await load(link)
        # Never once more what was done: the server may have lacked the mark alone.
        again = [*lacking, len(commands) - 1] if commands[-1][0] == "WAIT" else lacking
        for at, reply in zip(again, await link.call([commands[at] for at in again]), strict=True):
            replies[at] = reply
    return replies


async def _closed(link: Link) -> None:
    with suppress(*FAULTS):
        await link.close()
