from __future__ import annotations

import asyncio
import json
import socket

import pytest

from mnemosyned import settings
from mnemosyned.config.config import Config
from mnemosyned.node_config import ClusterConfig
from mnemosyned.place import Place, Supervised
from mnemosyned.sessions.config import CacheConfig
from mnemosyned.storage.postgres.config import PostgresConfig
from mnemosyned.transport.config import GrpcConfig


def place(number: int = 2, *, names: tuple[str, ...] = ("h:90", "h:91", "h:92")) -> Place:
    return Place(number=number, names=names, directory="/d", listeners=(5,), rows=6)


def applied(*flags: str, number: int = 2) -> Config:
    return place(number).applied_to(settings.parse(flags, {}))


def test_a_worker_has_its_part_of_what_the_daemon_may_use() -> None:
    config = applied(
        *("-grpc.max-connections=100", "-cache.size=10", "-cache.bytes=3MiB", "-postgres.pool.size=16")
    )

    assert config[GrpcConfig].max_connections == 34
    assert config[CacheConfig].max_sessions == 4
    assert config[CacheConfig].max_bytes == 1024**2
    assert config[PostgresConfig].pool_size == 6


def test_a_part_is_not_less_than_what_a_worker_needs() -> None:
    config = applied("-grpc.max-connections=1", "-cache.bytes=1MiB", "-postgres.pool.size=2")

    assert config[GrpcConfig].max_connections == 1
    assert config[CacheConfig].max_bytes == 1024**2
    assert config[PostgresConfig].pool_size == 2


@pytest.mark.parametrize(
    ("flags", "bind"),
    [
        ([], ""),
        (["-cluster.listen=h:90"], "127.0.0.1:91"),
        (["-cluster.listen=h:90", "-host=::"], "[::]:91"),
        (["-cluster.listen=h:90", "-cluster.bind=10.0.0.1:70"], "10.0.0.1:71"),
    ],
)
def test_a_worker_has_a_name_and_a_port_for_peers(flags: list[str], bind: str) -> None:
    cluster = applied(*flags)[ClusterConfig]

    assert (cluster.listen, cluster.bind) == ("h:91", bind)


def test_siblings_call_one_another_through_sockets() -> None:
    assert place().siblings == {"h:90": "/d/peers-1", "h:92": "/d/peers-3"}


async def test_a_worker_ends_with_its_supervisor() -> None:
    ours, theirs = socket.socketpair()
    stop = asyncio.Event()
    supervised = Supervised(theirs, place())
    supervised.follow(asyncio.get_running_loop(), stop.set)

    supervised.tell("failed", error="no")
    told = json.loads(ours.recv(100))
    ours.close()

    await asyncio.wait_for(stop.wait(), 5)
    assert told == {"event": "failed", "error": "no"}
    supervised.tell("serving")
    theirs.close()
