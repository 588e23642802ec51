"""PyMongo's client for one address, and what it is told.

- Writes are acknowledged when a majority of the members has them in its journal (`w: "majority", j: true`).
- Retryable writes are on. The driver repeats a command once its connection breaks or the primary changes, as
  long as there is time. The server does a repeated write once, and returns what it has returned before.
- Each call has a deadline (`pymongo.timeout`). The driver sends what is left of it as `maxTimeMS`, so the
  server ends a command, and its wait for a majority, before the caller gives up. That is why there is no
  `wtimeoutMS` besides.
- Strings that are not UTF-8, and dates that Python does not have, are read as something that is no session.
  One damaged document therefore costs no other.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import pymongo
from bson import CodecOptions, DatetimeConversion
from pymongo import AsyncMongoClient, ReadPreference, WriteConcern
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.asynchronous.database import AsyncDatabase
from pymongo.monitoring import ConnectionPoolListener
from pymongo.read_concern import ReadConcern

from mnemosyned.storage.mongodb.address import Address

Document: TypeAlias = dict[str, Any]
Collection: TypeAlias = AsyncCollection[Document]
Database: TypeAlias = AsyncDatabase[Document]

LINEARIZABLE: Final = ReadConcern("linearizable")
MAJORITY: Final = WriteConcern("majority", j=True)
_CODEC: Final[CodecOptions[Document]] = CodecOptions(
    unicode_decode_error_handler="surrogateescape", datetime_conversion=DatetimeConversion.DATETIME_MS
)
_CLIENT_NAME: Final = "mnemosyned"
# How often the driver asks each server what it is, if the server has not told it of a change meanwhile.
_HEARTBEAT_MS: Final = 1000
# How long the driver may take to tell the server that its sessions end. Otherwise it waits 30 s for a server.
_CLOSE_S: Final = 1.0


class _Connections(ConnectionPoolListener):
    """Counts the connections that are open, but for those of the driver's own watch."""

    def __init__(self) -> None:
        self.count = 0

    def connection_created(self, _: object) -> None:
        self.count += 1

    def connection_closed(self, _: object) -> None:
        self.count -= 1

    def _ignored(self, _: object) -> None:
        pass

    # mypy takes an assignment for another type than that of the same method.
    pool_created = pool_ready = pool_cleared = pool_closed = _ignored  # type: ignore[assignment]  # see above
    connection_ready = connection_check_out_started = _ignored  # type: ignore[assignment]  # likewise
    connection_check_out_failed = _ignored  # type: ignore[assignment]  # likewise
    connection_checked_out = connection_checked_in = _ignored  # type: ignore[assignment]  # likewise


class Client:
    """A client of one address. It connects when it is first used, and follows the primary by itself."""

    def __init__(self, address: Address, *, connections: int, connect_timeout_s: float) -> None:
        """`connections`: the most to each server."""
        self.address = address
        self.in_use = 0  # calls under way, counted by the pool
        self._connections = _Connections()
        login, files = address.login, address.files
        given: dict[str, Any] = {
            "appName": _CLIENT_NAME,
            **address.options,
            "username": login.user or None,
            "password": login.password or None,
            "tlsCAFile": files.cacert or None,
            "tlsCertificateKeyFile": files.cert_and_key or None,
            "tlsCertificateKeyFilePassword": files.key_password or None,
        }
        self._client: AsyncMongoClient[Document] = AsyncMongoClient(
            address.url,
            document_class=dict,
            maxPoolSize=connections,
            connectTimeoutMS=int(connect_timeout_s * 1000) or 1,
            heartbeatFrequencyMS=_HEARTBEAT_MS,
            retryWrites=True,
            event_listeners=[self._connections],
            **{name: value for name, value in given.items() if value is not None},
        )
        self.database: Database = self._client.get_database(
            address.database,
            codec_options=_CODEC,
            read_preference=ReadPreference.PRIMARY,
            write_concern=MAJORITY,
        )

    @property
    def open_connections(self) -> int:
        """How many are open, to all servers."""
        return self._connections.count

    @property
    def election(self) -> str:
        """Names the primary's term of office, as the driver last heard of it; empty behind a mongos."""
        for server in self._client.topology_description.server_descriptions().values():
            if server.server_type_name == "RSPrimary" and server.election_id is not None:
                return str(server.election_id)
        return ""

    def failures(self) -> list[tuple[str, BaseException]]:
        """Return the servers that could not be reached, and why."""
        servers = self._client.topology_description.server_descriptions().values()
        return [
            (":".join(map(str, filter(None, server.address))), server.error)
            for server in servers
            if server.error is not None
        ]

    def roles(self) -> list[str]:
        """Return what the driver knows of each server."""
        servers = self._client.topology_description.server_descriptions().values()
        return sorted({server.server_type_name for server in servers})

    async def hello(self) -> Document:
        """Return what the primary, or the mongos, says of itself."""
        found: Document = await self._client.admin.command("hello")
        return found

    async def build_info(self) -> Document:
        """Return what is said of the server's version; needs no right."""
        found: Document = await self._client.admin.command("buildInfo")
        return found

    async def close(self) -> None:
        """Close all connections; calls under way fail. A server that does not answer is not waited for."""
        with pymongo.timeout(_CLOSE_S):
            await self._client.close()
