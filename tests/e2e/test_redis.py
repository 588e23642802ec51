"""Daemons on Redis, as users start them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_calls import (
    assert_address_is_taken,
    assert_damage_is_found_and_mended,
    assert_migrates,
    assert_served,
    assert_sessions_survive,
    change_here_and_read_there,
    hashing,
    started,
    two_nodes,
)
from processes import Daemon
from redis_servers import PASSWORD, RedisServer, needs_redis, redis_server
from secrecy import CANARY

pytestmark = needs_redis


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path / "redis") as found:
        yield found


def flags(server: RedisServer) -> tuple[str, ...]:
    return ("-storage=redis", f"-redis.address={server.url}")


def test_a_daemon_survives_a_restart_of_redis_and_redis_one_of_the_daemon(server: RedisServer) -> None:
    query = 'mnemosyned_storage_redis_queries_total{query="load"}'
    daemon = assert_sessions_survive((*flags(server), "-cache.ttl=0"), server, query=query)

    assert PASSWORD not in daemon.log


def test_nodes_on_redis_see_each_others_writes_at_once(server: RedisServer) -> None:
    with two_nodes(*flags(server)) as (here, there, _):
        for number in range(40):
            change_here_and_read_there(here, there, number)


@pytest.mark.slow
def test_commands_work_on_redis(server: RedisServer, tmp_path: Path) -> None:
    hashed, tokens = hashing(flags(server), tmp_path), started(flags(server), 3)
    assert_migrates(hashed, tokens)
    server.command("SET", "mnemosyne:s:damaged", "x")
    server.command("ZADD", "mnemosyne:n", "0", "damaged")

    assert_damage_is_found_and_mended(flags(server), sessions=4)
    assert_served(hashed, tokens)


def test_a_new_password_in_the_file_is_taken_without_a_failed_call(
    server: RedisServer, tmp_path: Path
) -> None:
    file = tmp_path / "address"
    file.write_text(server.url)
    with Daemon("-storage=redis", f"-redis.address.file={file}", "-cache.ttl=0") as daemon:
        with daemon.serving().stub() as stub:
            password = f"{CANARY}-of-another-user"
            server.command("ACL", "SETUSER", "other", "on", f">{password}", "~*", "+@all")
            address = server.url.replace(f":{PASSWORD}", f"other:{password}")
            assert_address_is_taken(daemon, stub, file, address, event="redis_address_reloaded")
        assert b"user=other" in server.command("CLIENT", "LIST")
