"""One connection to a server of Redis: commands go out in one piece, and replies come back in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from hiredis import pack_command
from redis.asyncio.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import BusyLoadingError, ResponseError
from redis.exceptions import ConnectionError as LostConnection

from mnemosyned.storage.addresses import Login
from mnemosyned.storage.redis.address import Address

Command = tuple[str | bytes | int, ...]

# Its stub has a tuple of one.
_packed: Callable[[Command], bytes] = pack_command  # type: ignore[assignment]
_CLIENT_NAME: Final = "mnemosyned"


class Link:
    """A connection that is open; after a failure it is not used again."""

    __slots__ = ("_connection", "epoch", "identity", "target")

    def __init__(self, connection: Connection | UnixDomainSocketConnection, target: str) -> None:
        self._connection = connection
        self.target = target  # which server it is, for comparison
        self.epoch = 0
        self.identity = ""  # of the server and its data; known on a cluster

    async def is_usable(self) -> bool:
        """Tell whether it is open, and nothing has come that was not asked for."""
        try:
            return self._connection.is_connected and not await self._connection.can_read()
        except (OSError, LostConnection):
            return False

    async def call(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands, and return their replies; an error of the server is a reply.

        Raises redis-py's errors, or OSError, if the connection is lost. Without an answer it waits for ever.
        """
        connection = self._connection
        # The library would pack each argument in Python, and wait for the end of what is sent with a timer.
        await connection.send_packed_command(list(map(_packed, commands)), check_health=False)
        replies: list[Any] = []
        for _ in commands:
            try:
                replies.append(await connection.read_response())
            except (ResponseError, BusyLoadingError) as exc:
                replies.append(exc)
        return replies

    async def close(self) -> None:
        """Close it; what is under way on it fails."""
        await self._connection.disconnect(nowait=True)


async def open_link(address: Address, host: tuple[str, int] | None, login: Login, database: int) -> Link:
    """Connect to one server, `host` or the socket of the address, and log in. Raises like `Link.call`."""
    settings: dict[str, Any] = {
        "db": database,
        "username": login.user or None,
        "password": login.password or None,
        # The caller's own time-outs are around all of it.
        "socket_timeout": None,
        "socket_connect_timeout": None,
        # A script whose outcome is unknown must not be sent again.
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
        "client_name": _CLIENT_NAME,
        "driver_info": None,
    }
    connection: Connection | UnixDomainSocketConnection
    if host is None:
        connection, target = UnixDomainSocketConnection(path=address.path, **settings), address.path
    else:
        settings |= {"host": host[0], "port": host[1]}
        target = f"{host[0]}:{host[1]}"
        if address.is_tls:
            files = address.files
            connection = SSLConnection(
                ssl_ca_certs=files.cacert or None,
                ssl_certfile=files.cert or None,
                ssl_keyfile=files.key or None,
                **settings,
            )
        else:
            connection = Connection(**settings)
    try:
        await connection.connect()  # type: ignore[no-untyped-call]  # redis-py's own
    except BaseException:
        await connection.disconnect(nowait=True)
        raise
    return Link(connection, target)
