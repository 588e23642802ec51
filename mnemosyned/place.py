"""One of several workers of a daemon: what it is told by its supervisor (workers/), and what it tells.

    supervisor ── Place: number, names, sockets ──> worker
    supervisor <── events: listening, serving, leaving, failed ── worker        one socket pair, lines of JSON
    supervisor ── its end, however it ends ──> the socket pair breaks: the worker drains

A worker is a node of a cluster like any other. Three things are different, and all of them are here:

- Its configuration: a name and a peers' port of its own, and its part of what the daemon may use.
- Its sockets. Clients' connections come through sockets that all workers share (transport/turns.py). Siblings
  call one another through Unix sockets, in a directory that only this user can enter. So they need neither
  secret nor TLS between them.
- Its admin port, which is a Unix socket too: the supervisor has the real one.

Names. With `-cluster.listen=host:port`, worker k is `host:port+k-1`, where other hosts dial it. Without it no
other host may join, and no address is dialled. A name must still be one of its own in the table of leases,
which daemons of other hosts may use too: it is an address in a private network (RFC 4193) that is drawn at
each start, with the worker's number at its end.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from mnemosyned.node_config import ClusterConfig, joined_address, split_address
from mnemosyned.sessions.config import CacheConfig
from mnemosyned.storage.mongodb.config import MongoConfig
from mnemosyned.storage.postgres.config import PostgresConfig
from mnemosyned.storage.redis.config import RedisConfig
from mnemosyned.transport.config import GrpcConfig
from mnemosyned.transport.engine import UNIX_PREFIX

if TYPE_CHECKING:
    import asyncio

    from mnemosyned.config.config import Config

# Of the daemon; each worker has its part, and no less than the number beside it.
_DIVIDED: Final = (
    (GrpcConfig, "max_connections", 1),
    (GrpcConfig, "max_unsent_bytes", 1024**2),
    (GrpcConfig, "max_request_bytes", 1024**2),
    (GrpcConfig, "max_watches", 1),
    (CacheConfig, "max_sessions", 1),
    (CacheConfig, "max_bytes", 1024**2),
    (CacheConfig, "negative_bytes", 0),
    (CacheConfig, "mirror_bytes", 0),
    (PostgresConfig, "pool_size", 2),
    (RedisConfig, "pool_size", 2),
    (MongoConfig, "pool_size", 2),
)
_SHARING: Final = (GrpcConfig, CacheConfig, PostgresConfig, RedisConfig, MongoConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one worker stands among the workers of its daemon; numbers are from 1."""

    number: int
    names: tuple[str, ...]  # of all workers as nodes
    directory: str  # of their Unix sockets
    listeners: tuple[int, ...]  # files of the sockets for clients
    rows: int  # the file of transport/turns.py

    @property
    def name(self) -> str:
        """This worker's name as a node."""
        return self.names[self.number - 1]

    @property
    def siblings(self) -> dict[str, str]:
        """The Unix sockets of the other workers, by name."""
        return {
            name: self.peers_socket(number)
            for number, name in enumerate(self.names, start=1)
            if number != self.number
        }

    def peers_socket(self, number: int) -> str:
        """Return where siblings call a worker."""
        return f"{self.directory}/peers-{number}"

    def admin_socket(self, number: int) -> str:
        """Return where the supervisor asks a worker for metrics and health."""
        return admin_socket(self.directory, number)

    def applied_to(self, config: Config) -> Config:
        """Return this worker's configuration, made from that of the daemon."""
        grpc, cluster = config[GrpcConfig], config[ClusterConfig]
        bind = ""
        if cluster.listen:
            host, port = split_address(self.name)
            bind = joined_address(grpc.host, port)
            if cluster.bind:
                host, port = split_address(cluster.bind)
                bind = joined_address(host, port + self.number - 1)
        parts = [_part(config[section], len(self.names)) for section in _SHARING]
        return config.replaced(*parts, replace(cluster, listen=self.name, bind=bind))


def _part(section: Any, count: int) -> Any:  # noqa: ANN401  # to mypy, a Section is no dataclass
    """Return one worker's part of what a section allows the daemon."""
    return replace(
        section,
        **{
            name: max(least, -(-getattr(section, name) // count))
            for owner, name, least in _DIVIDED
            if owner is type(section)
        },
    )


def admin_socket(directory: str, number: int) -> str:
    """Return where a worker of this number is asked for metrics and health."""
    return f"{directory}/admin-{number}"


def unix_host(path: str) -> str:
    """Return a Unix socket as a host to listen on."""
    return UNIX_PREFIX + path


class Supervised:
    """A worker's end of the socket pair."""

    def __init__(self, end: socket.socket, place: Place) -> None:
        """Own the socket, from which the place has been read."""
        self._end = end
        self.place = place

    def tell(self, event: str, **fields: str) -> None:
        """Tell the supervisor, if it is there; this never waits."""
        line: Mapping[str, str] = {"event": event} | fields
        try:
            self._end.send(json.dumps(line).encode() + b"\n", socket.MSG_DONTWAIT)
        except OSError:
            # It is gone, and `follow` says so; or it does not read, and sees the end of this process.
            return

    def follow(self, loop: asyncio.AbstractEventLoop, stop: Callable[[], Any]) -> None:
        """Call `stop` when the supervisor has ended, from now on."""

        def look() -> None:
            try:
                is_over = not self._end.recv(1, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                is_over = True
            if is_over:
                loop.remove_reader(self._end)
                stop()

        loop.add_reader(self._end, look)
