"""Commands to MongoDB: bounded, timed, counted, and with errors of `mnemosyned/errors.py`.

The driver has the connections, finds the primary, and repeats what a broken connection has interrupted
(`client.py`). What is added here:

- At most `-mongodb.pool.size` commands run at once, and the others wait in line, each for its time at most.
  Renewals of the lease have two places of their own, so that no other call delays them.
- A command that has failed is StorageUnavailable. It says whether the server may have got it.

`maxTimeMS` and the driver's retries are within the time of a command. So is the wait for a primary: a
step-down that is over in time costs a delay, and no failed call.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, TypeVar

import pymongo

from mnemosyned.errors import StorageUnavailable
from mnemosyned.observe.metrics import QueryMetrics
from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.addresses import AddressError
from mnemosyned.storage.fault_log import FaultLog, advice
from mnemosyned.storage.mongodb import faults
from mnemosyned.storage.mongodb.address import parse
from mnemosyned.storage.mongodb.client import Client, Database
from mnemosyned.storage.mongodb.config import check_files
from mnemosyned.storage.mongodb.faults import FAULTS, hint_of, is_refusal

Result = TypeVar("Result")

# Connections that leases may use besides, so that no other call delays a renewal.
_URGENT: Final = 2
# The driver ends a command in time, or half a second later if it waits for a primary. This is for what it
# does not time, such as a look-up in the DNS.
_GRACE_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MongoOptions:
    """How to reach the servers."""

    address: str = field(repr=False)  # with a password
    pool_size: int
    connect_timeout_s: float
    timeout_s: float


class MongoPool:
    """Runs commands; every method raises StorageUnavailable for any error of MongoDB or the network."""

    def __init__(self, options: MongoOptions, metrics: QueryMetrics) -> None:
        self._options = options
        self._metrics = metrics
        self._faults = FaultLog(faults)
        self._address = options.address
        self._client: Client | None = None
        self._retired: set[Client] = set()  # of former addresses, with calls under way
        self._waiting = 0
        self._free = asyncio.Semaphore(options.pool_size)
        self._free_urgent = asyncio.Semaphore(_URGENT)
        # What reads the file of the address again.
        self.on_auth_failure: Callable[[], None] = _do_nothing
        metrics.watch_pool(
            size=lambda: sum(client.open_connections for client in self._clients()),
            in_use=lambda: sum(client.in_use for client in self._clients()),
            waiting=lambda: self._waiting,
        )

    @property
    def election(self) -> str:
        """Names the primary's term of office; see Client."""
        return "" if self._client is None else self._client.election

    async def open(self, look: Callable[[Client], Awaitable[None]]) -> None:
        """Connect, and look at the servers by a function, which may raise StorageRefused.

        Raises:
            StorageUnavailable: the servers cannot be reached now.
            StorageRefused: they refuse us, or the address is wrong.
        """
        client = self._new_client(self._address)
        self._take(client)
        try:
            await self._run("connect", lambda: look(client), self._options.timeout_s)
        except StorageUnavailable as exc:
            await self.close()
            raise self.refused(exc) or exc from exc.__cause__
        except BaseException:
            await self.close()
            raise

    def refused(self, failure: StorageUnavailable) -> StorageRefused | None:
        """Return why the servers refuse us for good, for the end of the start; None: a retry may succeed."""
        exc = failure.__cause__
        if exc is None or not is_refusal(exc):
            return None
        return StorageRefused(f"MongoDB at {parse(self._address)}: {advice(faults, exc)}")

    async def use(self, address: str) -> None:
        """Use another address from now on, if a command to it succeeds. Raises StorageRefused."""
        if address == self._address:
            return
        client = self._new_client(address)
        if self._client is not None:
            try:
                with pymongo.timeout(self._options.timeout_s):
                    async with asyncio.timeout(self._options.timeout_s + _GRACE_S):
                        # Unlike hello, it needs the login.
                        await client.database.list_collection_names()
            except FAULTS as exc:
                # A client that is closed has forgotten what it has met.
                failure = self._named(exc, client)
                await client.close()
                raise StorageRefused(f"MongoDB at {client.address}: {advice(faults, failure)}") from exc
        self._address = address
        former = self._client
        self._take(client)
        if former is not None:
            self._retired.add(former)
            await self._close_retired()

    async def close(self) -> None:
        """Close all connections; calls under way fail."""
        clients, self._client = self._clients(), None
        self._retired.clear()
        for client in clients:
            with suppress(*FAULTS):
                await client.close()

    async def run(
        self,
        doing: str,
        work: Callable[[Database], Awaitable[Result]],
        *,
        is_urgent: bool = False,
        timeout_s: float | None = None,
        is_begun: bool = False,
    ) -> Result:
        """Run a command, or a few that belong together; return what the work returns.

        `is_begun`: the call that this is a part of has written something already.
        """
        timeout_s = timeout_s or self._options.timeout_s
        free = self._free_urgent if is_urgent else self._free
        self._waiting += 1
        try:
            async with asyncio.timeout(timeout_s):
                await free.acquire()
        except TimeoutError as exc:
            raise self._failed("acquire", exc, is_under_way=is_begun) from exc
        finally:
            self._waiting -= 1
        client = self._client
        try:
            if client is None:
                raise StorageUnavailable("mnemosyned: storage: not connected")
            client.in_use += 1
            started_s = time.perf_counter()
            try:
                return await self._run(doing, lambda: work(client.database), timeout_s, is_begun=is_begun)
            finally:
                client.in_use -= 1
                self._metrics.count(doing, time.perf_counter() - started_s)
        finally:
            free.release()
            if self._retired:
                await self._close_retired()

    async def run_each(
        self, doing: str, works: Iterable[Callable[[Database], Awaitable[Result]]], *, is_begun: bool = False
    ) -> list[Result]:
        """Run commands side by side; the first failure is raised when those that were begun have ended.

        They leave half of the places to other calls, which would wait for the last of them otherwise. After
        a failure no more are begun: each would take its whole time-out at a server that does not answer.
        """
        places = asyncio.Semaphore(max(1, self._options.pool_size // 2))
        failed: list[StorageUnavailable] = []

        async def run(work: Callable[[Database], Awaitable[Result]]) -> Result:
            async with places:
                if failed:
                    raise failed[0]
                try:
                    return await self.run(doing, work, is_begun=is_begun)
                except StorageUnavailable as exc:
                    failed.append(exc)
                    raise

        outcomes = await asyncio.gather(*map(run, works), return_exceptions=True)
        done = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
        for outcome in outcomes:
            if isinstance(outcome, StorageUnavailable):
                outcome.is_under_way = bool(done) or any(one.is_under_way for one in failed)
            if isinstance(outcome, BaseException):
                raise outcome
        return done

    async def _run(
        self, doing: str, work: Callable[[], Awaitable[Result]], timeout_s: float, *, is_begun: bool = False
    ) -> Result:
        try:
            with pymongo.timeout(timeout_s):
                async with asyncio.timeout(timeout_s + _GRACE_S):
                    return await work()
        except FAULTS as exc:
            # The driver says that there is no primary only if it has sent nothing yet.
            is_sent = is_begun or not faults.is_no_primary(exc)
            raise self._failed(doing, exc, is_under_way=is_sent) from exc

    def _clients(self) -> list[Client]:
        return [*self._retired, *([] if self._client is None else [self._client])]

    async def _close_retired(self) -> None:
        unused = [client for client in self._retired if not client.in_use]
        self._retired.difference_update(unused)
        for client in unused:
            with suppress(*FAULTS):
                await client.close()

    def _new_client(self, address: str) -> Client:
        try:
            found = parse(address)
            check_files(found)
        except AddressError as exc:
            raise StorageRefused(f"flag -mongodb.address: {exc}") from None
        return Client(
            found,
            connections=self._options.pool_size + _URGENT,
            connect_timeout_s=self._options.connect_timeout_s,
        )

    def _take(self, client: Client) -> None:
        self._client = client
        self._faults.where = client.address.where

    def _named(self, exc: BaseException, client: Client | None) -> BaseException:
        """Return a fault with what the driver knows of the servers, if it has found no primary."""
        if client is None or not faults.is_no_primary(exc):
            return exc
        return faults.no_primary(exc, client.failures(), client.roles())

    def _failed(self, doing: str, exc: BaseException, *, is_under_way: bool) -> StorageUnavailable:
        """Count and log a fault; return what to raise for it."""
        named = self._named(exc, self._client)
        self._metrics.count_error(doing)
        self._faults.failed(doing, named)
        if faults.is_login_failure(exc):
            self.on_auth_failure()
        error = StorageUnavailable(
            "mnemosyned: storage: " + ("no answer in time" if faults.is_late(exc) else "unavailable")
        )
        error.is_under_way = is_under_way
        error.detail, error.hint = self._faults.described(doing, named), hint_of(named)
        return error


def _do_nothing() -> None:
    pass
