"""Opens connections to the servers of an address: which is tried, for how long, and with or without TLS.

    hosts of the address ──> their IP addresses ──> with TLS, without (sslmode) ──> Connection
        │ random, if load_balance_hosts             └── next ── no answer, starting up, full, not the target
        └── the one that answered last, first

- `-postgres.connect.timeout` is for all together. Each IP address has its share of what is left, so that one
  that does not answer leaves time for the others. asyncpg gives all of it to the first.
- Of several servers that can be written to, the one on the latest timeline is used (`timeline.py`). The
  server that was used last is taken without a look at the others.
- Names are looked up for each connection, since an address may move.
- Without target_session_attrs, a server that refuses writes is used only if no other answers: to read from.
- A server that answers and refuses (wrong password) ends the search, as in libpq: others would refuse too.
- sslmode prefer and allow try the other way if the server wants it so. A server without TLS is remembered.

What an attempt met at each host is a note of the exception that is raised (`BaseException.add_note`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import ssl
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import asyncpg

from mnemosyned.storage.postgres.address import PREFER_WRITABLE, Address, AddressError, Host
from mnemosyned.storage.postgres.address_files import AddressFiles
from mnemosyned.storage.postgres.faults import TRANSIENT, NotPostgresqlError, hint_of, name_of
from mnemosyned.storage.postgres.read_only import refuses_writes
from mnemosyned.storage.postgres.timeline import FormerPrimaryError, Timeline, Timelines, timeline_of

if TYPE_CHECKING:
    from asyncpg import Connection, Record

log = logging.getLogger(__name__)

# Another server may answer otherwise.
_NEXT: Final = (
    OSError,
    TimeoutError,
    asyncpg.CannotConnectNowError,
    asyncpg.TooManyConnectionsError,
    asyncpg.TargetServerAttributeNotMatched,
)
_TLS_BY_MODE: Final = {"disable": (False,), "allow": (False, True), "prefer": (True, False)}
# A firewall may drop an idle connection without a word: the kernel asks after 30 s, and gives up after 60.
_KEEPALIVES: Final = {
    "keepalives": 1,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
}
_OPTIONS: Final = {
    "keepalives": (socket.SOL_SOCKET, "SO_KEEPALIVE"),
    "keepalives_idle": (socket.IPPROTO_TCP, "TCP_KEEPIDLE"),
    "keepalives_interval": (socket.IPPROTO_TCP, "TCP_KEEPINTVL"),
    "keepalives_count": (socket.IPPROTO_TCP, "TCP_KEEPCNT"),
    "tcp_user_timeout": (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server that has answered, with a connection to it."""

    name: str
    host: Host
    connection: Connection[Record]
    is_writable: bool
    timeline: Timeline | None
    is_sure: bool  # no other server needs to be looked at

    @property
    def rank(self) -> tuple[bool, int]:
        """What makes one server better than another."""
        return self.is_writable, self.timeline.number if self.timeline else 0


@dataclass(slots=True)
class _Search:
    """The best server so far, with the only connection that is kept, and what the others said."""

    is_whole: bool = False  # to look at all servers
    best: Server | None = None
    failure: Exception = field(default_factory=lambda: OSError("no host"))
    failures: list[str] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return not self.is_whole and self.best is not None and self.best.is_sure

    def take(self, one: Server | tuple[str, Exception]) -> None:
        if not isinstance(one, Server):
            name, self.failure = one
            self.failures.append(f"{name}: {name_of(self.failure)}")
            return
        worse: Server | None = one
        if self.best is None or one.rank > self.best.rank:
            self.best, worse = one, self.best
        _end(worse)
        if not one.is_writable:
            self.failures.append(f"{one.name}: read-only")


class Connector:
    """Opens connections to one address; nothing is set on them yet."""

    def __init__(
        self,
        address: Address,
        *,
        timeout_s: float,
        command_timeout_s: float,
        timelines: Timelines,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        """`timelines` outlives this object: it is of the server, and not of its address."""
        self.address = address
        self.timelines = timelines
        self._files = AddressFiles(address, environ)
        self._timeout_s = timeout_s
        self._command_timeout_s = command_timeout_s
        self._last: Host | None = None
        self._told: set[tuple[Host, Timeline]] = set()  # former primaries
        self._without_tls: set[Host] = set()
        self._connection_class = _keeping_alive(_KEEPALIVES | dict(address.keepalives))

    def check(self) -> None:
        """Read the files that the address names. Raises AddressError."""
        for text in self._files.check():
            log.warning("postgres_file_not_used", extra={"error": text})

    async def connect(self, **_: object) -> Connection[Record]:
        """Open a connection; asyncpg's pool passes what this class knows better.

        Raises:
            AddressError: a file that the address names cannot be used.
            asyncpg's errors, OSError, TimeoutError: of the last server that was tried.
        """
        best = await self._best(_Search())
        if best.is_writable:
            self._use(best)
        return best.connection

    async def look_for_later(self) -> None:
        """Look at all servers, and use one from now on whose timeline is later than the one in use.

        Raises as `connect` does: no server that can be written to was found.
        """
        best = await self._best(_Search(is_whole=True))
        _end(best)
        used = self.timelines.used
        if used is not None and used.is_before(best.timeline):
            self._use(best)

    def _use(self, server: Server) -> None:
        self._last = server.host
        self.timelines.use(server.timeline)

    async def _best(self, search: _Search) -> Server:
        try:
            async with aclosing(self._servers()) as servers:
                async for one in servers:
                    search.take(one)
                    if search.is_over:
                        break
            if search.best is not None:
                # Another search may have found a later one meanwhile.
                self._refuse_former(search.best.host, search.best.timeline)
        except (AddressError, asyncpg.PostgresError):
            # That another server refuses us does not matter where one can be used.
            if search.best is None or not search.best.is_writable:
                _end(search.best)
                raise
        except BaseException:
            # Whatever ends the search, such as a cancellation: the connection has no owner yet.
            _end(search.best)
            raise
        if search.best is None:
            search.failure.add_note("; ".join(search.failures))
            raise search.failure
        return search.best

    async def _servers(self) -> AsyncGenerator[Server | tuple[str, Exception], None]:
        """Connect to the servers in turn; in place of one that cannot be used, its name and why not."""
        until_s = asyncio.get_running_loop().time() + self._timeout_s
        hosts = self._hosts()
        for host_number, host in enumerate(hosts):
            hosts_left = len(hosts) - host_number - 1
            try:
                async with _share(until_s, 1 + hosts_left):
                    dials = await _look_up(host)
            except (OSError, TimeoutError) as exc:
                yield str(host), exc
                continue
            is_alone = len(hosts) + len(dials) == 2  # noqa: PLR2004  # one of each
            for number, dial in enumerate(dials):
                try:
                    async with _share(until_s, len(dials) - number + hosts_left):
                        server = await self._judged(host, dial, is_alone=is_alone)
                except _NEXT as exc:
                    yield _shown(host, dial), exc
                else:
                    yield server

    async def _judged(self, host: Host, dial: str, *, is_alone: bool) -> Server:
        """Connect to a server, and find out whether it is the one to use."""
        connection = await self._connect(host, dial)
        try:
            # A lone server is the one to use, whatever it is.
            is_asked = self.address.target == PREFER_WRITABLE and not is_alone
            is_writable = not (is_asked and await refuses_writes(connection))
            timeline = await timeline_of(connection) if is_writable else None
            self._refuse_former(host, timeline)
        except BaseException:
            # Whatever ends it: nothing else knows of the connection.
            connection.terminate()
            raise
        is_known = host == self._last or (self.address.is_balanced and self.timelines.used is not None)
        return Server(
            name=_shown(host, dial),
            host=host,
            connection=connection,
            is_writable=is_writable,
            timeline=timeline,
            is_sure=is_alone or (is_writable and (timeline is None or is_known)),
        )

    def _refuse_former(self, host: Host, timeline: Timeline | None) -> None:
        used = self.timelines.used
        if timeline is None or used is None or not timeline.is_before(used):
            return
        error = FormerPrimaryError()
        if (host, timeline) not in self._told:
            self._told.add((host, timeline))
            log.warning(
                "former_primary_not_used",
                extra={
                    "server": str(host),
                    "timeline": timeline.number,
                    "used": used.number,
                    "hint": hint_of(error),
                },
            )
        raise error

    def _hosts(self) -> Sequence[Host]:
        hosts = list(self.address.hosts)
        if self.address.is_balanced:
            random.shuffle(hosts)
        elif self._last is not None:
            hosts.sort(key=lambda one: one != self._last)
        return hosts

    async def _connect(self, host: Host, dial: str) -> Connection[Record]:
        ways = _TLS_BY_MODE.get(self.address.tls.mode, (True,))
        if host.is_socket or (host in self._without_tls and self.address.tls.mode == "prefer"):
            ways = (False,)
        for is_tls in ways[:-1]:
            try:
                return await self._dial(host, dial, is_tls=is_tls)
            except (ssl.SSLError, ConnectionError, asyncpg.InvalidAuthorizationSpecificationError) as exc:
                if isinstance(exc, ConnectionRefusedError | asyncpg.InvalidPasswordError):
                    raise
                if type(exc) is ConnectionError:
                    # What asyncpg raises if the server answers that it has no TLS.
                    self._without_tls.add(host)
        return await self._dial(host, dial, is_tls=ways[-1])

    async def _dial(self, host: Host, dial: str, *, is_tls: bool) -> Connection[Record]:
        address = self.address
        # `Any`: the stubs know neither texts for two of the parameters, nor no time-out.
        connect: Any = asyncpg.connect
        parameters: dict[str, Any] = {
            "host": dial,
            "port": host.port,
            "user": address.user,
            "password": self._files.password(host),
            "database": address.database,
            "ssl": self._files.context(host) if is_tls else False,
            "direct_tls": address.tls.is_direct and is_tls,
            # In the start-up message, where a provider's proxy reads it too.
            "server_settings": {"options": address.options} if address.options else None,
            "target_session_attrs": address.target or "any",
            # `_share` is the limit.
            "timeout": None,
            "command_timeout": self._command_timeout_s,
            "connection_class": self._connection_class,
            **address.kerberos,
        }
        try:
            connection: Connection[Record] = await connect(**parameters)
        except (*TRANSIENT, asyncpg.PostgresError):
            raise
        except Exception as exc:
            # asyncpg believes what it is told, and fails as it happens.
            raise NotPostgresqlError from exc
        return connection


def _end(server: Server | None) -> None:
    if server is not None:
        server.connection.terminate()


def _shown(host: Host, dial: str) -> str:
    return str(host) if dial == host.name else f"{host} ({dial})"


def _share(until_s: float, parts: int) -> asyncio.Timeout:
    now_s = asyncio.get_running_loop().time()
    return asyncio.timeout_at(now_s + max(until_s - now_s, 0.0) / parts)


async def _look_up(host: Host) -> list[str]:
    """Return the addresses to dial, each once."""
    if host.is_socket:
        return [host.name]
    loop = asyncio.get_running_loop()
    name = host.hostaddr or host.name
    found = await loop.getaddrinfo(name, host.port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _keeping_alive(wanted: Mapping[str, int]) -> type[Connection[Record]]:
    """Return a class of connections whose sockets have these options."""

    class KeptAlive(asyncpg.Connection):
        __slots__ = ()

        def __init__(self, protocol: Any, transport: Any, *rest: Any) -> None:  # noqa: ANN401  # asyncpg's own
            super().__init__(protocol, transport, *rest)
            found = transport.get_extra_info("socket")
            if found is None or found.family == socket.AF_UNIX:
                return
            for name, value in wanted.items():
                level, option = _OPTIONS[name]
                # Some systems lack some of them.
                if hasattr(socket, option):
                    found.setsockopt(level, getattr(socket, option), value)

    return KeptAlive
