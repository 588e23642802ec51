"""Connections to Redis: bounded, timed, counted, and with errors of `mnemosyned/errors.py`.

A batch is one script, and one round trip:

    EVALSHA script ──> NOSCRIPT? load all scripts, and send it again: nothing was done
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
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from redis.exceptions import AuthenticationError, MasterDownError, NoScriptError, ReadOnlyError
from redis.exceptions import ConnectionError as LostConnection

from mnemosyned.errors import StorageUnavailable
from mnemosyned.observe.metrics import QueryMetrics
from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.fault_log import FaultLog
from mnemosyned.storage.redis import faults, scripts
from mnemosyned.storage.redis.address import AddressError, parse
from mnemosyned.storage.redis.config import check_files
from mnemosyned.storage.redis.connector import Connector
from mnemosyned.storage.redis.faults import FAULTS, NotReplicated, hint_of, is_refusal, name_of
from mnemosyned.storage.redis.link import Command, Link
from mnemosyned.storage.redis.scripts import Script

# For so long after replicas have confirmed a write, this server counts as the primary for reads. Sentinels
# need longer to replace it (down-after-milliseconds).
_PROVEN_S: Final = 1.0
# Of the time for an answer, what WAIT may take: its answer must still arrive.
_WAIT_SHARE: Final = 0.8
# Connections that leases may use besides, so that no other call delays a renewal.
_URGENT: Final = 2
_OTHER_SERVER: Final = (ReadOnlyError, MasterDownError, LostConnection, OSError, NotReplicated)


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisOptions:
    """How to reach the server."""

    address: str = field(repr=False)  # with a password
    prefix: str
    pool_size: int
    connect_timeout_s: float
    timeout_s: float
    wait: int | None  # None: 1 with Sentinels, else 0


class RedisPool:
    """Runs scripts; every method raises StorageUnavailable for any error of Redis or the network."""

    def __init__(self, options: RedisOptions, metrics: QueryMetrics) -> None:
        self._options = options
        self._metrics = metrics
        self._faults = FaultLog(faults)
        self._address = options.address
        self._connector: Connector | None = None
        self._idle: list[Link] = []
        self._in_use: set[Link] = set()
        self._waiting = 0
        self._epoch = 0  # raised by `renew`: links of earlier ones are not kept
        self._proven_s = float("-inf")
        self._free = asyncio.Semaphore(options.pool_size)
        self._free_urgent = asyncio.Semaphore(_URGENT)
        self._is_open = False
        # What reads the file of the address again.
        self.on_auth_failure: Callable[[], None] = _do_nothing
        metrics.watch_pool(
            size=lambda: len(self._idle) + len(self._in_use),
            in_use=lambda: len(self._in_use),
            waiting=lambda: self._waiting,
        )

    @property
    def wait(self) -> int:
        """How many replicas must have a write."""
        if self._options.wait is not None:
            return self._options.wait
        return 1 if self._connector is not None and self._connector.address.service else 0

    async def open(self, look: Callable[[Link], Awaitable[None]]) -> None:
        """Connect, and look at the server by a function, which may raise StorageRefused.

        Raises:
            StorageUnavailable: the server cannot be reached now.
            StorageRefused: it refuses us, or the address is wrong.
        """
        self._take(self._new_connector(self._address))
        self._is_open = True
        try:
            await self._with_link("connect", look)
        except StorageUnavailable as exc:
            await self.close()
            raise self.refused(exc) or exc from exc.__cause__
        except BaseException:
            await self.close()
            raise

    def refused(self, failure: StorageUnavailable) -> StorageRefused | None:
        """Return why the server refuses us for good, for the end of the start; None: it may take us later."""
        exc = failure.__cause__
        if exc is None or not is_refusal(exc) or self._connector is None:
            return None
        return StorageRefused(f"Redis at {self._connector.address}: {name_of(exc)}; {hint_of(exc)}")

    async def use(self, address: str) -> None:
        """Use another address from now on, if a connection to it can be made. Raises StorageRefused."""
        if address == self._address:
            return
        connector = self._new_connector(address)
        if self._is_open:
            try:
                link = await connector.connect()
            except FAULTS as exc:
                raise StorageRefused(f"Redis at {connector.address}: {name_of(exc)}; {hint_of(exc)}") from exc
            await link.close()
        self._address = address
        self._take(connector)
        await self.renew()

    async def follow_primary(self) -> None:
        """Drop the connections if the Sentinels name another primary than they are to."""
        connector = self._connector
        if connector is None or not connector.address.service:
            return
        with suppress(*FAULTS):
            found = await connector.primary()
            if found is not None and any(link.target != f"{found[0]}:{found[1]}" for link in self._idle):
                await self.renew()

    async def renew(self) -> None:
        """Replace all connections: idle ones now, and others at the end of their call."""
        self._epoch += 1
        self._proven_s = float("-inf")
        idle, self._idle = self._idle, []
        for link in idle:
            await _closed(link)

    async def close(self) -> None:
        """Close all connections; calls under way fail."""
        self._is_open = False
        await self.renew()
        for link in list(self._in_use):
            await _closed(link)

    async def run(
        self,
        script: Script,
        *arguments: str | bytes | int,
        is_write: bool = False,
        is_urgent: bool = False,
        timeout_s: float | None = None,
        part: str = "",
    ) -> Any:  # noqa: ANN401  # as the script returns it
        """Run one script; return what it returns. `part`: on keys of their own.

        `is_write`: its caller is told of its effect, or of that of another.
        """
        timeout_s = timeout_s or self._options.timeout_s
        command: Command = ("EVALSHA", script.sha, 1, f"{self._options.prefix}{part}x", *arguments)
        started_s = time.perf_counter()
        is_proven = time.monotonic() - self._proven_s < _PROVEN_S
        wait = self.wait if is_write or not is_proven else 0
        try:
            return await self._with_link(
                script.name,
                lambda link: self._run(link, command, wait=wait, wait_s=timeout_s * _WAIT_SHARE),
                is_urgent=is_urgent,
                timeout_s=timeout_s,
            )
        finally:
            self._metrics.count(script.name, time.perf_counter() - started_s)

    async def _run(
        self,
        link: Link,
        command: Command,
        *,
        wait: int,
        wait_s: float,
    ) -> Any:  # noqa: ANN401  # as the script returns it
        commands = [command]
        sent_s = time.monotonic()
        if wait:
            commands.append(("EVALSHA", scripts.MARK.sha, 1, f"{self._options.prefix}x"))
            commands.append(("WAIT", wait, int(wait_s * 1000)))
        replies = await link.call(commands)
        if any(isinstance(reply, NoScriptError) for reply in replies):
            await load(link)
            # Never once more what was done: the server may have lacked the mark alone.
            done = 0 if isinstance(replies[0], NoScriptError) else 1
            replies[done:] = await link.call(commands[done:])
        for reply in replies:
            if isinstance(reply, Exception):
                return reply
        if wait:
            if replies[-1] < wait:
                return NotReplicated()
            self._proven_s = max(self._proven_s, sent_s)
        return replies[0]

    async def _with_link(
        self,
        doing: str,
        work: Callable[[Link], Coroutine[Any, Any, Any] | Awaitable[Any]],
        *,
        is_urgent: bool = False,
        timeout_s: float | None = None,
    ) -> Any:  # noqa: ANN401  # what the work returns
        timeout_s = timeout_s or self._options.timeout_s
        free = self._free_urgent if is_urgent else self._free
        self._waiting += 1
        try:
            async with asyncio.timeout(timeout_s):
                await free.acquire()
        except TimeoutError as exc:
            raise await self._failed("acquire", exc) from exc
        finally:
            self._waiting -= 1
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
            if isinstance(result, Exception):
                raise await self._failed(doing, result) from result
            return result
        finally:
            free.release()

    async def _link(self) -> Link:
        connector = self._connector
        if connector is None or not self._is_open:
            raise StorageUnavailable("mnemosyned: storage: not connected")
        while self._idle:
            link = self._idle.pop()
            self._in_use.add(link)
            if await link.is_usable():
                return link
            await self._release(link, is_idle=False)
        epoch = self._epoch
        try:
            link = await connector.connect()
        except FAULTS as exc:
            raise await self._failed("connect", exc) from exc
        link.epoch = epoch
        self._in_use.add(link)
        return link

    async def _release(self, link: Link, *, is_idle: bool) -> None:
        self._in_use.discard(link)
        if is_idle and self._is_open and link.epoch == self._epoch:
            self._idle.append(link)
            return
        await _closed(link)

    def _new_connector(self, address: str) -> Connector:
        try:
            found = parse(address)
            check_files(found)
        except AddressError as exc:
            raise StorageRefused(f"flag -redis.address: {exc}") from None
        return Connector(found, timeout_s=self._options.connect_timeout_s)

    def _take(self, connector: Connector) -> None:
        self._connector = connector
        self._faults.where = connector.address.where

    async def _failed(self, doing: str, exc: BaseException) -> StorageUnavailable:
        """Count and log a fault; return what to raise for it."""
        self._metrics.count_error(doing)
        self._faults.failed(doing, exc)
        if isinstance(exc, AuthenticationError):
            self.on_auth_failure()
        if isinstance(exc, _OTHER_SERVER):
            await self.renew()
        is_late = isinstance(exc, TimeoutError | NotReplicated)
        error = StorageUnavailable(
            "mnemosyned: storage: " + ("no answer in time" if is_late else "unavailable")
        )
        # Without a connection nothing was sent.
        error.is_under_way = doing not in {"acquire", "connect"}
        error.detail, error.hint = self._faults.described(doing, exc), hint_of(exc)
        return error


async def load(link: Link) -> None:
    """Load all scripts into the server. Raises redis-py's errors."""
    replies = await link.call([("SCRIPT", "LOAD", script.source) for script in scripts.ALL])
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply


async def _closed(link: Link) -> None:
    with suppress(*FAULTS):
        await link.close()


def _do_nothing() -> None:
    pass
