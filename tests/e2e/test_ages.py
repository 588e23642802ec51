"""Connections that become too old, or idle: clients and peers reconnect, and no call fails."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import pytest
from clusters import Cluster, Load
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from probes import OPTIONS, UNKNOWN, H2Client
from processes import Daemon, mnemosyned

ENGINES = ["h2", "grpcio"]
GOAWAY = 7
pytestmark = pytest.mark.timeout(120)


def goaway_after_s(address: str) -> float:
    """Return after how long an idle connection is asked to end."""
    client = H2Client(address, window=65_535)
    client.socket.sendall(b"\0\0\0\4\1\0\0\0\0")
    began_s = time.monotonic()
    with client.socket:
        assert any(kind == GOAWAY for kind, *_ in client.frames())
        return time.monotonic() - began_s


@pytest.mark.parametrize("engine", ENGINES)
async def test_clients_of_connections_that_age_see_no_failed_call(engine: str) -> None:
    flags = ["-grpc.max-connection-age=1s", "-grpc.max-age-grace=5s"]
    with Daemon("-storage=memory", f"-grpc.engine={engine}", *flags) as daemon:
        daemon.serving()
        until_s, counts = time.monotonic() + 5, [0] * 8

        async def call(number: int) -> None:
            async with grpc.aio.insecure_channel(daemon.address, options=OPTIONS) as channel:
                stub: Any = SessionManagerStub(channel)
                while time.monotonic() < until_s:
                    await stub.Exists(UNKNOWN, timeout=5)
                    counts[number] += 1

        async with asyncio.TaskGroup() as group:
            for number in range(len(counts)):
                group.create_task(call(number))
        if engine == "h2":
            (line,) = [one for one in daemon.http("/metrics")[1].splitlines() if 'reason="age"' in one]
            # More than once for each client.
            assert float(line.split()[-1]) >= 2 * len(counts)

        assert min(counts) > 50
        assert daemon.stop() == 0


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_stream_outlives_the_age_by_the_grace_and_can_be_begun_again(engine: str) -> None:
    flags = ["-grpc.max-age=1s", "-grpc.max-age-grace=1s"]
    with Daemon("-storage=memory", f"-grpc.engine={engine}", *flags) as daemon:
        daemon.serving()
        async with grpc.aio.insecure_channel(daemon.address, options=OPTIONS) as channel:
            for _ in range(2):
                began_s = time.monotonic()
                watch = HealthStub(channel).Watch(HealthCheckRequest(), timeout=20)
                assert (await watch.read()).status == HealthCheckResponse.SERVING
                with pytest.raises(grpc.aio.AioRpcError) as ended:
                    await watch.read()

                assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
                assert 1.8 < time.monotonic() - began_s < 6


@pytest.mark.parametrize("engine", ENGINES)
def test_an_idle_connection_is_ended_after_the_time_that_is_set(engine: str) -> None:
    with Daemon("-storage=memory", f"-grpc.engine={engine}", "-grpc.max-idle=1s") as daemon:
        daemon.serving()

        assert goaway_after_s(daemon.address) < 5


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
async def test_forwarded_calls_do_not_fail_when_connections_of_peers_age(
    engine: str, postgres_dsn: str
) -> None:
    # A call that the grace is too short for fails: on a busy machine, one of a second is.
    flags = [f"-grpc.engine={engine}", "-grpc.max-age=1s", "-grpc.max-age-grace=5s", "-grpc.max-idle=1s"]
    with Cluster(postgres_dsn, 2, *flags) as cluster:
        cluster.start()
        await cluster.rings_equal(cluster.names)
        async with Load(cluster.addresses(cluster.names), rate=200) as load:
            await asyncio.sleep(5)
        forwards = [
            line
            for name in cluster.names
            for line in cluster.daemons[name].http("/metrics")[1].splitlines()
            if line.startswith("mnemosyned_cluster_forwards_total")
        ]

        assert load.outcome.failures == []
        assert any('outcome="ok"' in line for line in forwards)
        # A slow machine answers late, and then other forwards are left out. That is no connection's fault.
        broken = [line for line in forwards if 'outcome="unreachable"' in line]
        assert [line for line in broken if not line.endswith(" 0.0")] == []
        assert not any("member_suspected" in daemon.log for daemon in cluster.daemons.values())


def test_the_age_has_two_names_of_which_one_may_be_given() -> None:
    code, _, err = mnemosyned("-check-config", "-grpc.max-age=1h", "-grpc.max-connection-age=2h")

    assert code == 2
    assert "-grpc.max-connection-age: -grpc.max-age is given as well" in err
    assert mnemosyned("-check-config", MNEMOSYNED_GRPC_MAX_CONNECTION_AGE="2h")[0] == 0
