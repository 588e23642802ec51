"""Daemons on MongoDB's protocol, as users start them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from clusters import SECRET, free_ports
from mnemosynerpc.session_pb2 import (
    AbandonRequest,
    DeleteRequest,
    ExistsRequest,
    GetRequest,
    ListRequest,
    Query,
    Session,
    SetValueRequest,
    StartRequest,
)
from mongodb_servers import MongoServer, needs_mongodb
from processes import Daemon, mnemosyned
from secrecy import CANARY

pytestmark = needs_mongodb

NEW = StartRequest(session=Session(subject_id="user:1", refresh_token="r", bag={"k": CANARY}))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MongoServer]:
    with MongoServer(tmp_path / "mongodb") as found:
        yield found


def wait_until(is_met: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not is_met():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def code_of(call: Callable[[object], object], request: object) -> grpc.StatusCode | None:
    try:
        call(request)
    except grpc.RpcError as exc:
        code: grpc.StatusCode = exc.code()
        return code
    return None


def test_a_daemon_survives_a_restart_of_the_server_and_the_server_one_of_the_daemon(
    server: MongoServer,
) -> None:
    flags = ("-storage=mongodb", f"-mongodb.address={server.url}", "-cache.ttl=0", "-mongodb.timeout=1s")
    with Daemon(*flags) as daemon, daemon.serving().stub() as stub:
        kept, ended = (stub.Start(NEW).session.access_token for _ in range(2))
        assert stub.Abandon(AbandonRequest(access_token=ended)).value
        server.kill()
        assert code_of(stub.Get, GetRequest(access_token=kept)) is grpc.StatusCode.UNAVAILABLE
        wait_until(lambda: daemon.http("/healthr")[0] == 503)
        assert "no server can be written to" in daemon.http("/healthr")[1]
        server.start()
        wait_until(lambda: daemon.http("/healthr")[0] == 200)

        assert dict(stub.Get(GetRequest(access_token=kept)).session.bag) == {"k": CANARY}
        assert code_of(stub.Get, GetRequest(access_token=ended)) is grpc.StatusCode.NOT_FOUND
        assert 'mnemosyned_storage_mongodb_queries_total{query="load"}' in daemon.http("/metrics")[1]
        assert daemon.stop() == 0

    with Daemon(*flags) as daemon, daemon.serving().stub() as stub:
        assert stub.Get(GetRequest(access_token=kept)).session.subject_id == "user:1"
        listed = stub.List(ListRequest(query=Query(refresh_token="r"))).sessions
        assert [one.access_token for one in listed] == [kept]
        assert stub.Delete(DeleteRequest(subject_id="user:1")).value == 1


def test_nodes_see_each_others_writes_at_once(server: MongoServer) -> None:
    names = [f"127.0.0.1:{port}" for port in free_ports(2)]
    common = (
        "-storage=mongodb",
        f"-mongodb.address={server.url}",
        f"-cluster.seeds={','.join(names)}",
        f"-cluster.secret={SECRET}",
    )
    nodes = [Daemon(*common, f"-cluster.listen={name}", f"-port={name.rpartition(':')[2]}") for name in names]
    with nodes[0] as one, nodes[1] as other, one.leased().stub() as here, other.leased().stub() as there:
        for number in range(20):
            token = here.Start(NEW).session.access_token
            assert there.Get(GetRequest(access_token=token)).session.subject_id == "user:1"
            here.SetValue(SetValueRequest(access_token=token, key="n", value=str(number)))
            assert there.Get(GetRequest(access_token=token)).session.bag["n"] == str(number)
            assert there.Abandon(AbandonRequest(access_token=token)).value
            assert not here.Exists(ExistsRequest(access_token=token)).value
        assert one.stop() == other.stop() == 0


def test_commands_work(server: MongoServer, tmp_path: Path) -> None:
    key = tmp_path / "token.key"
    key.write_text(f"{CANARY}-the-key-of-the-tokens-on-mongodb\n")
    flags = ("-storage=mongodb", f"-mongodb.address={server.url}")
    hashing = (*flags, "-token.protection=hmac", f"-token.key.file={key}")
    with Daemon(*flags) as daemon, daemon.serving().stub() as stub:
        tokens = [stub.Start(NEW).session.access_token for _ in range(3)]
        assert daemon.stop() == 0

    code, out, _ = mnemosyned("migrate", *hashing)
    assert (code, "3" in out) == (0, True), out
    with server.connected() as database:
        database["session"].insert_one({"_id": "damaged", "b": "text"})
    code, out, _ = mnemosyned("check", *flags)
    assert (code, "4 sessions checked, 1 damaged" in out) == (1, True), out
    assert mnemosyned("check", "-fix", *flags)[0] == 0
    with Daemon(*hashing) as daemon, daemon.serving().stub() as stub:
        for token in tokens:
            assert stub.Get(GetRequest(access_token=token)).session.subject_id == "user:1"


def test_another_address_in_the_file_is_taken_without_a_failed_call(
    server: MongoServer, tmp_path: Path
) -> None:
    file = tmp_path / "address"
    file.write_text(server.url)
    flags = ("-storage=mongodb", f"-mongodb.address.file={file}", "-cache.ttl=0", "-mongodb.timeout=1s")
    with Daemon(*flags) as daemon, daemon.serving().stub() as stub:
        token = stub.Start(NEW).session.access_token
        file.write_text(server.url.replace("127.0.0.1", "localhost"))
        daemon.wait_for("mongodb_address_reloaded")
        for _ in range(20):
            assert stub.Get(GetRequest(access_token=token)).session.subject_id == "user:1"
        file.write_text(f"mongodb://127.0.0.1:1/test?appName={CANARY}")
        daemon.wait_for("mongodb_address_reload_failed")
        assert stub.Get(GetRequest(access_token=token)).session.subject_id == "user:1"


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
