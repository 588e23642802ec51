"""Opens connections to the servers of an address: which is tried, for how long, and with or without TLS.

    hosts of the address ──> their IP addresses ──> with TLS, without (sslmode) ──> Connection
        │ random, if load_balance_hosts             └── next ── no answer, starting up, full, not the target
        └── the one that answered last, first

- `-postgres.connect.timeout` is for all together. Each IP address has its share of what is left, so that one
  that does not answer leaves time for the others. asyncpg gives all of it to the first.
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
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import asyncpg

from mnemosyned.storage.postgres.address import PREFER_WRITABLE, Address, Host
from mnemosyned.storage.postgres.address_files import AddressFiles
from mnemosyned.storage.postgres.faults import name_of
from mnemosyned.storage.postgres.read_only import refuses_writes

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


class Connector:
    """Opens connections to one address; nothing is set on them yet."""

    def __init__(
        self,
        address: Address,
        *,
        timeout_s: float,
        command_timeout_s: float,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self.address = address
        self._files = AddressFiles(address, environ)
        self._timeout_s = timeout_s
        self._command_timeout_s = command_timeout_s
        self._last: Host | None = None
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
        until_s = asyncio.get_running_loop().time() + self._timeout_s
        failures: list[str] = []
        failure: Exception = OSError("no host")
        to_read_from: Connection[Record] | None = None
        hosts = self._hosts()
        for host_number, host in enumerate(hosts):
            hosts_left = len(hosts) - host_number - 1
            try:
                async with _share(until_s, 1 + hosts_left):
                    dials = await _look_up(host)
            except (OSError, TimeoutError) as exc:
                failure = exc
                failures.append(f"{host}: {name_of(exc)}")
                continue
            for number, dial in enumerate(dials):
                try:
                    async with _share(until_s, len(dials) - number + hosts_left):
                        found = await self._connect(host, dial)
                except _NEXT as exc:
                    failure = exc
                    failures.append(f"{_shown(host, dial)}: {name_of(exc)}")
                    continue
                # A lone server is the one to use, whatever it is.
                if len(hosts) + len(dials) == 2 or not await self._is_unwanted(found, until_s):  # noqa: PLR2004
                    _end(to_read_from)
                    self._last = host
                    return found
                failures.append(f"{_shown(host, dial)}: read-only")
                _end(to_read_from)
                to_read_from = found
        if to_read_from is not None:
            return to_read_from
        failure.add_note("; ".join(failures))
        raise failure

    async def _is_unwanted(self, connection: Connection[Record], until_s: float) -> bool:
        """Tell whether another server is to be tried before this one, which refuses writes."""
        if self.address.target != PREFER_WRITABLE:
            return False
        try:
            async with asyncio.timeout_at(until_s):
                return await refuses_writes(connection)
        except BaseException:
            connection.terminate()
            raise

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
        connection: Connection[Record] = await connect(
            host=dial,
            port=host.port,
            user=address.user,
            password=self._files.password(host),
            database=address.database,
            ssl=self._files.context(host) if is_tls else False,
            direct_tls=address.tls.is_direct and is_tls,
            # In the start-up message, where a provider's proxy reads it too.
            server_settings={"options": address.options} if address.options else None,
            target_session_attrs=address.target or "any",
            # `_share` is the limit.
            timeout=None,
            command_timeout=self._command_timeout_s,
            connection_class=self._connection_class,
            **address.kerberos,
        )
        return connection


def _end(connection: Connection[Record] | None) -> None:
    if connection is not None:
        connection.terminate()


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
