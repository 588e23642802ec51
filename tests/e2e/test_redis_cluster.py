"""Daemons on a Redis Cluster, as users start them."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from engine_calls import (
    assert_address_is_taken,
    assert_migrates,
    change_here_and_read_there,
    hashing,
    started,
    two_nodes,
)
from mnemosynerpc.session_pb2 import DeleteRequest, GetRequest, Session, StartRequest
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from processes import Daemon, mnemosyned
from redis_clusters import RedisCluster, call, redis_cluster
from redis_servers import PASSWORD, RedisServer, needs_redis
from secrecy import CANARY

from mnemosyned.storage.redis.cluster import slots

pytestmark = needs_redis


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    directory = tmp_path_factory.mktemp("cluster")
    with redis_cluster(directory, **{"cluster-require-full-coverage": "no"}) as found:
        yield found


def test_nodes_see_each_others_writes_at_once_also_while_a_primary_is_replaced(cluster: RedisCluster) -> None:
    with two_nodes("-storage=redis", f"-redis.address={cluster.url}") as (here, there, nodes):
        until_s, calls = time.monotonic() + 20, 0
        while calls <= 20:
            calls += count_of_coherent_calls(here, there, seconds=0.5)
            assert time.monotonic() < until_s
        victim = cluster.primaries()[0]
        victim.kill()
        count_of_coherent_calls(here, there, seconds=2)
        cluster.until_whole(0)

        victim.start()
        cluster.until_whole()
        until_s = time.monotonic() + 20
        # Leases from before run out first.
        while count_of_coherent_calls(there, here, seconds=0.5) <= 5:
            assert time.monotonic() < until_s
    assert PASSWORD not in nodes[0].log


def count_of_coherent_calls(here: SessionManagerStub, there: SessionManagerStub, *, seconds: float) -> int:
    """Change a session at one node and read it at another; return how often that worked."""
    count, until_s = 0, time.monotonic() + seconds
    while time.monotonic() < until_s:
        try:
            change_here_and_read_there(here, there, count, timeout_s=1)
        except grpc.RpcError as exc:
            if exc.code() not in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}:
                raise
        else:
            count += 1
    return count


@pytest.mark.slow
def test_commands_work_on_a_cluster(cluster: RedisCluster, tmp_path: Path) -> None:
    flags = ("-storage=redis", f"-redis.address={cluster.url}", "-redis.prefix=commands:")
    hashed = hashing(flags, tmp_path)
    assert_migrates(hashed, started(flags, 20))

    code, out, _ = mnemosyned("check", *hashed)
    assert (code, "20 sessions checked" in out) == (0, True), out
    with Daemon(*hashed) as daemon, daemon.serving().stub() as stub:
        assert stub.Delete(DeleteRequest(subject_id="user:1")).value == 20


def test_a_new_password_in_the_file_is_taken_without_a_failed_call(
    cluster: RedisCluster, tmp_path: Path
) -> None:
    file = tmp_path / "address"
    file.write_text(cluster.url)
    with Daemon("-storage=redis", f"-redis.address.file={file}", "-cache.ttl=0") as daemon:
        with daemon.serving().stub() as stub:
            password = f"{CANARY}-of-another-user"
            for node in cluster.nodes:
                call(node, ("ACL", "SETUSER", "other", "on", f">{password}", "~*", "+@all"))
            address = cluster.url.replace(f":{PASSWORD}", f"other:{password}")
            assert_address_is_taken(daemon, stub, file, address, event="redis_address_reloaded")
            file.write_text(f"redis://:{PASSWORD}@127.0.0.1:1")
            refused = daemon.wait_for("redis_address_reload_failed")
            assert "a change to a single server needs a restart" in refused["error"]
        clients = [call(node, ("CLIENT", "LIST"))[0] for node in cluster.primaries()]
        assert any(b"user=other" in one for one in clients)


@pytest.mark.slow
def test_no_copy_outlives_a_delete_that_could_not_find_its_session_after_a_failover(
    cluster: RedisCluster,
) -> None:
    """The leases are on another primary, which nothing happens to."""
    cluster.until_whole()
    flags = (
        "-storage=redis",
        f"-redis.address={cluster.url}",
        "-redis.prefix=lost:",
        "-redis.wait=0",
        "-cache.ttl=1m",
    )
    home = cluster.primary_of(slots.home("lost:").slot)
    victim = next(node for node in cluster.primaries() if node is not home)
    replica = cluster.replica_of(victim)
    tokens = tokens_at(cluster, victim, count=20)
    with two_nodes(*flags) as (here, there, _):
        # The replica stands still, and its connection is closed. It does not get what is written now.
        replica.signal(signal.SIGSTOP)
        call(victim, ("CLIENT", "KILL", "TYPE", "replica"))
        for token in tokens:
            session = Session(access_token=token, subject_id="lost", bag={"k": CANARY})
            here.Start(StartRequest(session=session), timeout=2)
            for stub in (here, there):
                stub.Get(GetRequest(access_token=token), timeout=2)
        victim.kill()
        replica.signal(signal.SIGCONT)
        until_s = time.monotonic() + 20
        while True:
            try:
                deleted = here.Delete(DeleteRequest(subject_id="lost"), timeout=5).value
                break
            except grpc.RpcError:
                assert time.monotonic() < until_s
        served = [token for token in tokens for stub in (here, there) if is_served(stub, token)]
        victim.start()

        assert (deleted, served) == (0, [])


def tokens_at(cluster: RedisCluster, primary: RedisServer, *, count: int) -> list[str]:
    """Return tokens whose sessions are at this primary."""
    buckets = slots.buckets("lost:", 128)
    tokens = (f"{CANARY}-{number}" for number in itertools.count())
    there = {space.slot for space in buckets if cluster.primary_of(space.slot) is primary}
    return list(
        itertools.islice(
            (token for token in tokens if buckets[slots.bucket_of(token.encode(), 128)].slot in there), count
        )
    )


def is_served(stub: SessionManagerStub, token: str) -> bool:
    try:
        stub.Get(GetRequest(access_token=token), timeout=2)
    except grpc.RpcError:
        return False
    return True
