"""Runs scripts on one server, or on the primary that Sentinels name; `server.py` has the connections."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

from mnemosyned.errors import StorageUnavailable
from mnemosyned.sessions.store import StorageRefused
from mnemosyned.storage.addresses import AddressError
from mnemosyned.storage.fault_log import advice
from mnemosyned.storage.redis import faults
from mnemosyned.storage.redis.address import parse
from mnemosyned.storage.redis.config import check_files
from mnemosyned.storage.redis.connector import Connector
from mnemosyned.storage.redis.failures import Failures
from mnemosyned.storage.redis.faults import FAULTS, is_refusal
from mnemosyned.storage.redis.server import Sending, Server

if TYPE_CHECKING:
    from mnemosyned.observe.metrics import QueryMetrics
    from mnemosyned.storage.redis.link import Link
    from mnemosyned.storage.redis.scripts import Script


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
        self._address = options.address
        self._connector: Connector | None = None
        self._failures = Failures(metrics)
        self._server = Server(self._connect, size=options.pool_size, failures=self._failures, metrics=metrics)
        self._look: Callable[[Link], Awaitable[object]] = _see_nothing
        self._is_open = False
        metrics.watch_pool(
            size=lambda: len(self._server.idle) + len(self._server.in_use),
            in_use=lambda: len(self._server.in_use),
            waiting=lambda: self._server.waiting,
        )

    @property
    def wait(self) -> int:
        """How many replicas must have a write."""
        if self._options.wait is not None:
            return self._options.wait
        return 1 if self._connector is not None and self._connector.address.service else 0

    async def open(
        self, prepare: Callable[[Link], Awaitable[object]], look: Callable[[Link], Awaitable[object]]
    ) -> None:
        """Connect, and prepare the server by a function, which may raise StorageRefused.

        From then on, `look` sees each new connection. It raises no more than redis-py does.

        Raises:
            StorageUnavailable: the server cannot be reached now.
            StorageRefused: it refuses us, or the address is wrong.
        """
        self._look = _see_nothing
        self._take(self._new_connector(self._address))
        self._is_open = True
        self._server.open()
        try:
            await self._server.use("connect", prepare, timeout_s=self._options.timeout_s)
        except StorageUnavailable as exc:
            await self.close()
            raise self.refused(exc) or exc from exc.__cause__
        except BaseException:
            await self.close()
            raise
        self._look = look

    def refused(self, failure: StorageUnavailable) -> StorageRefused | None:
        """Return why the server refuses us for good, for the end of the start; None: it may take us later."""
        exc = failure.__cause__
        if exc is None or not is_refusal(exc) or self._connector is None:
            return None
        return StorageRefused(f"Redis at {self._connector.address}: {advice(faults, exc)}")

    async def look(self) -> None:
        """Look at the server once more."""
        await self._server.use("look", self._look, timeout_s=self._options.timeout_s)

    def follow(self, ask: Callable[[], None]) -> None:
        """Have a function called when the server refuses the log-in."""
        self._failures.on_auth_failure = ask

    async def use(self, address: str) -> None:
        """Use another address from now on, if a connection to it can be made. Raises StorageRefused."""
        if address == self._address:
            return
        connector = self._new_connector(address)
        if self._is_open:
            try:
                link = await connector.connect()
            except FAULTS as exc:
                raise StorageRefused(f"Redis at {connector.address}: {advice(faults, exc)}") from exc
            await link.close()
        self._address = address
        self._take(connector)
        await self._server.renew()

    async def follow_primary(self) -> None:
        """Drop the connections if the Sentinels name another primary than they are to."""
        connector = self._connector
        if connector is None or not connector.address.service:
            return
        with suppress(*FAULTS):
            found = await connector.primary()
            if found is not None and any(
                link.target != f"{found[0]}:{found[1]}" for link in self._server.idle
            ):
                await self._server.renew()

    async def close(self) -> None:
        """Close all connections; calls under way fail."""
        self._is_open = False
        await self._server.close()

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
        how = Sending(
            timeout_s=timeout_s or self._options.timeout_s,
            wait=self.wait,
            is_write=is_write,
            is_urgent=is_urgent,
        )
        space = (1, f"{self._options.prefix}{part}x")
        (reply,) = await self._server.run(script, [(space, arguments)], how)
        if isinstance(reply, Exception):
            raise self._failures.unavailable(script.name, reply) from reply
        return reply

    async def each(
        self,
        script: Script,
        head: Sequence[str | bytes | int],
        items: Sequence[tuple[str | bytes | int, ...]],
        *,
        is_write: bool = False,
        part: str = "",
    ) -> list[Any]:
        """Run a script whose arguments are a head, and items that begin with a name; return a reply for each.

        On a cluster the script is several, and where one fails, its error is the reply of its items.
        """
        arguments = [*head, *chain.from_iterable(items)]
        replies: list[Any] = await self.run(script, *arguments, is_write=is_write, part=part)
        return replies

    async def _connect(self) -> Link:
        assert self._connector is not None
        link = await self._connector.connect()
        try:
            await self._look(link)
        except BaseException:
            await link.close()
            raise
        return link

    def _new_connector(self, address: str) -> Connector:
        try:
            found = parse(address)
            check_files(found)
        except AddressError as exc:
            raise StorageRefused(f"flag -redis.address: {exc}") from None
        if found.is_cluster:
            raise StorageRefused("flag -redis.address: a change to a Redis Cluster needs a restart")
        return Connector(found, timeout_s=self._options.connect_timeout_s)

    def _take(self, connector: Connector) -> None:
        self._connector = connector
        self._failures.take(connector.address.where)


async def _see_nothing(_: Link) -> None:
    pass
