"""Daemons on MongoDB's protocol, as users start them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_calls import (
    NEW,
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
from mnemosynerpc.session_pb2 import GetRequest
from mongodb_servers import MongoServer, needs_mongodb
from processes import Daemon, mnemosyned
from secrecy import CANARY

pytestmark = needs_mongodb


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MongoServer]:
    with MongoServer(tmp_path / "mongodb") as found:
        yield found


def flags(server: MongoServer) -> tuple[str, ...]:
    return ("-storage=mongodb", f"-mongodb.address={server.url}")


@pytest.mark.slow
def test_a_daemon_survives_a_restart_of_the_server_and_the_server_one_of_the_daemon(
    server: MongoServer,
) -> None:
    assert_sessions_survive(
        (*flags(server), "-cache.ttl=0", "-mongodb.timeout=1s"),
        server,
        query='mnemosyned_storage_mongodb_queries_total{query="load"}',
        outage="no server can be written to",
    )


def test_nodes_see_each_others_writes_at_once(server: MongoServer) -> None:
    with two_nodes(*flags(server)) as (here, there, _):
        for number in range(20):
            change_here_and_read_there(here, there, number)


def test_commands_work(server: MongoServer, tmp_path: Path) -> None:
    hashed, tokens = hashing(flags(server), tmp_path), started(flags(server), 3)
    assert_migrates(hashed, tokens)
    with server.connected() as database:
        database["session"].insert_one({"_id": "damaged", "b": "text"})

    assert_damage_is_found_and_mended(flags(server), sessions=4)
    assert_served(hashed, tokens)


def test_another_address_in_the_file_is_taken_without_a_failed_call(
    server: MongoServer, tmp_path: Path
) -> None:
    file = tmp_path / "address"
    file.write_text(server.url)
    common = ("-storage=mongodb", f"-mongodb.address.file={file}", "-cache.ttl=0", "-mongodb.timeout=1s")
    with Daemon(*common) as daemon, daemon.serving().stub() as stub:
        token = stub.Start(NEW).session.access_token
        address = server.url.replace("127.0.0.1", "localhost")
        assert_address_is_taken(daemon, stub, file, address, event="mongodb_address_reloaded")
        file.write_text(f"mongodb://127.0.0.1:1/test?appName={CANARY}")
        refused = daemon.wait_for("mongodb_address_reload_failed")
        assert stub.Get(GetRequest(access_token=token)).session.subject_id == "user:1"

    assert "no server can be written to: connection refused; no server listens there" in refused["error"]


def test_a_server_that_stands_alone_ends_the_start_in_one_line(tmp_path: Path) -> None:
    with MongoServer(tmp_path / "mongodb", ("--standalone",)) as server:
        code, out, err = mnemosyned("-storage=mongodb", f"-mongodb.address={server.url}", "-port=0")

    assert code != 0
    assert "it stands alone, and has no transactions: start it with --replSet" in out + err
    assert "Traceback" not in out + err


def test_without_a_server_of_ones_own_the_line_says_what_to_give() -> None:
    code, out, err = mnemosyned("-storage=mongodb", "-mongodb.address=embedded:")

    assert code == 2
    assert "a private MongoDB cannot be started: start a replica set yourself" in out + err
