"""What the host allows this process: open files, and threads.

A connection is a file. A process that has used its last one can accept no client, and neither dial PostgreSQL
or a peer, nor read a certificate. So the connections of clients are bounded before that, whatever
`-grpc.max-connections` says:

    hard limit = connections of the gRPC port, and of the peers' port
               + PostgreSQL, dials to peers, admin port, and some for everything else

The soft limit is raised to the hard limit first. Often 1,024, it exists for programs that use select().

Threads are tried before anything is started. grpcio's core ends the process without a word if it gets none.
"""

from __future__ import annotations

import logging
import resource
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mnemosyned.node_config import ClusterConfig
from mnemosyned.storage.engines import StorageConfig
from mnemosyned.storage.mongodb.config import MongoConfig
from mnemosyned.storage.postgres.config import PostgresConfig
from mnemosyned.storage.redis.config import RedisConfig
from mnemosyned.transport.config import GrpcConfig

if TYPE_CHECKING:
    from mnemosyned.config.config import Config

log = logging.getLogger(__name__)

# Standard streams, libraries, listening sockets, look-ups of names, files that are read, and connections that
# are accepted only to be closed.
_OTHERS: Final = 64
_ADMIN: Final = 32
_DIALS: Final = 128  # two to each peer of a large cluster
_PEERS_SHARE: Final = 4  # the peers' port has one in four, if both ports together must have less than asked
_LEAST_SHARE: Final = 4  # and all of them one in four of a limit that is too low for anything


# More than each engine has when it serves, and those of the admin port.
_THREADS: Final = {"h2": 8, "grpcio": 24}


class TooFewThreads(Exception):
    """This process may not start the threads that it needs; the text is one line for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """How many connections each port may have, and what limit of files would allow all that are asked for."""

    clients: int
    peers: int
    wanted: int
    needed_files: int


def allow_many() -> int:
    """Raise the limit of open files as far as this process may; return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def connection_limits(config: Config, max_files: int) -> ConnectionLimits:
    """Return what each port may have with so many files."""
    wanted, has_peers_port = config[GrpcConfig].max_connections, bool(config[ClusterConfig].bind)
    reserve = _OTHERS + _ADMIN
    if config[StorageConfig].name == "postgres":
        reserve += config[PostgresConfig].pool_size
    if config[StorageConfig].name == "redis":
        reserve += config[RedisConfig].pool_size
    if config[StorageConfig].name == "mongodb":
        reserve += config[MongoConfig].pool_size
    if config[ClusterConfig].listen:
        reserve += _DIALS
    budget = max(max_files - reserve, max_files // _LEAST_SHARE, 1)
    peers = max(1, min(wanted, budget // _PEERS_SHARE)) if has_peers_port else 0
    if has_peers_port and 2 * wanted <= budget:
        peers = wanted
    return ConnectionLimits(
        clients=max(1, min(wanted, budget - peers)),
        peers=peers,
        wanted=wanted,
        needed_files=(1 + has_peers_port) * wanted + reserve,
    )


def warn(limits: ConnectionLimits, max_files: int) -> None:
    """Log once if there are fewer connections than `-grpc.max-connections` asks for."""
    if limits.needed_files <= max_files:
        return
    log.warning(
        "open_files_limit_too_low",
        extra={
            "flag": "-grpc.max-connections",
            "wanted": limits.wanted,
            "allowed": limits.clients,
            **({"allowed_peers": limits.peers} if limits.peers else {}),
            "hard_limit": max_files,
            "advice": f"raise the hard limit of open files to {limits.needed_files} (ulimit -n, LimitNOFILE "
            f"of systemd, ulimits of a container), or set -grpc.max-connections={limits.clients}",
        },
    )


def need_threads(config: Config) -> None:
    """Raise TooFewThreads if there are not enough for the gRPC engine."""
    needed = _THREADS[config[GrpcConfig].engine]
    may_end = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(needed):
            thread = threading.Thread(target=may_end.wait)
            thread.start()
            started.append(thread)
    except RuntimeError:
        raise TooFewThreads(
            f"cannot start {needed} threads, only {len(started)}: raise the limit of processes (ulimit -u, "
            "TasksMax of systemd, the pids limit of a container)"
        ) from None
    finally:
        may_end.set()
        for thread in started:
            thread.join()
