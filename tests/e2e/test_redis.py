"""Daemons on Redis, as users start them."""

from __future__ import annotations

import time
from collections.abc import Iterator
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
from processes import Daemon, mnemosyned
from redis_servers import PASSWORD, RedisServer, needs_redis, redis_server
from secrecy import CANARY

pytestmark = needs_redis

NEW = StartRequest(session=Session(subject_id="user:1", refresh_token="r", bag={"k": CANARY}))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path / "redis") as found:
        yield found


def wait_until(is_met: object) -> None:
    deadline_s = time.monotonic() + 15
    while not is_met():  # type: ignore[operator]  # a function
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def code_of(call: object, request: object) -> grpc.StatusCode | None:
    try:
        call(request)  # type: ignore[operator]  # of a stub
    except grpc.RpcError as exc:
        code: grpc.StatusCode = exc.code()
        return code
    return None


def test_a_daemon_survives_a_restart_of_redis_and_redis_one_of_the_daemon(server: RedisServer) -> None:
    flags = ("-storage=redis", f"-redis.address={server.url}", "-cache.ttl=0")
    with Daemon(*flags) as daemon, daemon.serving().stub() as stub:
        kept, ended = (stub.Start(NEW).session.access_token for _ in range(2))
        assert stub.Abandon(AbandonRequest(access_token=ended)).value
        server.kill()
        assert code_of(stub.Get, GetRequest(access_token=kept)) is grpc.StatusCode.UNAVAILABLE
        wait_until(lambda: daemon.http("/healthr")[0] == 503)
        server.start()
        wait_until(lambda: daemon.http("/healthr")[0] == 200)

        assert dict(stub.Get(GetRequest(access_token=kept)).session.bag) == {"k": CANARY}
        assert code_of(stub.Get, GetRequest(access_token=ended)) is grpc.StatusCode.NOT_FOUND
        assert 'mnemosyned_storage_redis_queries_total{query="load"}' in daemon.http("/metrics")[1]
        assert daemon.stop() == 0
    assert PASSWORD not in daemon.log

    with Daemon(*flags) as daemon, daemon.serving().stub() as stub:
        assert stub.Get(GetRequest(access_token=kept)).session.subject_id == "user:1"
        assert [
            one.access_token for one in stub.List(ListRequest(query=Query(refresh_token="r"))).sessions
        ] == [kept]
        assert stub.Delete(DeleteRequest(subject_id="user:1")).value == 1


def test_nodes_on_redis_see_each_others_writes_at_once(server: RedisServer) -> None:
    names = [f"127.0.0.1:{port}" for port in free_ports(2)]
    common = (
        "-storage=redis",
        f"-redis.address={server.url}",
        f"-cluster.seeds={','.join(names)}",
        f"-cluster.secret={SECRET}",
    )
    nodes = [Daemon(*common, f"-cluster.listen={name}", f"-port={name.rpartition(':')[2]}") for name in names]
    with nodes[0] as one, nodes[1] as other, one.leased().stub() as here, other.leased().stub() as there:
        for number in range(40):
            token = here.Start(NEW).session.access_token
            assert there.Get(GetRequest(access_token=token)).session.subject_id == "user:1"
            here.SetValue(SetValueRequest(access_token=token, key="n", value=str(number)))
            assert there.Get(GetRequest(access_token=token)).session.bag["n"] == str(number)
            assert there.Abandon(AbandonRequest(access_token=token)).value
            assert not here.Exists(ExistsRequest(access_token=token)).value
        assert one.stop() == other.stop() == 0


def test_commands_work_on_redis(server: RedisServer, tmp_path: Path) -> None:
    key = tmp_path / "token.key"
    key.write_text(f"{CANARY}-the-key-of-the-tokens-on-redis\n")
    flags = ("-storage=redis", f"-redis.address={server.url}")
    hashing = (*flags, "-token.protection=hmac", f"-token.key.file={key}")
    with Daemon(*flags) as daemon, daemon.serving().stub() as stub:
        tokens = [stub.Start(NEW).session.access_token for _ in range(3)]
        assert daemon.stop() == 0

    code, out, _ = mnemosyned("migrate", *hashing)
    assert (code, "3" in out) == (0, True), out
    server.command("SET", "mnemosyne:s:damaged", "x")
    server.command("ZADD", "mnemosyne:n", "0", "damaged")
    code, out, _ = mnemosyned("check", *flags)
    assert (code, "4 sessions checked, 1 damaged" in out) == (1, True), out
    assert mnemosyned("check", "-fix", *flags)[0] == 0
    with Daemon(*hashing) as daemon, daemon.serving().stub() as stub:
        for token in tokens:
            assert stub.Get(GetRequest(access_token=token)).session.subject_id == "user:1"


def test_a_new_password_in_the_file_is_taken_without_a_failed_call(
    server: RedisServer, tmp_path: Path
) -> None:
    file = tmp_path / "address"
    file.write_text(server.url)
    with Daemon("-storage=redis", f"-redis.address.file={file}", "-cache.ttl=0") as daemon:
        with daemon.serving().stub() as stub:
            token = stub.Start(NEW).session.access_token
            user = f"{CANARY}-of-another-user"
            server.command("ACL", "SETUSER", "other", "on", f">{user}", "~*", "+@all")
            file.write_text(server.url.replace(f":{PASSWORD}", f"other:{user}"))
            daemon.wait_for("redis_address_reloaded")
            for _ in range(20):
                assert stub.Get(GetRequest(access_token=token)).session.subject_id == "user:1"
        assert b"user=other" in server.command("CLIENT", "LIST")
