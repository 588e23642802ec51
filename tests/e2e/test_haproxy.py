"""HAProxy in front of nodes, configured as in deploy/: it balances calls, and refuses those of peers."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import grpc
import pytest
from clusters import CALL_TIMEOUT_S, Cluster, Load, free_ports, until
from google.protobuf.empty_pb2 import Empty
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub
from mnemosynerpc.session_pb2 import ExistsRequest
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from serving import ENGINES, Node, serving

from mnemosyned.storage.memory import MemoryStore

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed"),
]


@contextmanager
def balancing(names: Sequence[str], directory: Path) -> Iterator[str]:
    """Run HAProxy in front of these nodes; lend its address."""
    (port,) = free_ports(1)
    text = (ROOT / "deploy" / "haproxy.cfg").read_text().replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    for example, name in zip((8080, 8082, 8084), names, strict=True):
        text = text.replace(f"127.0.0.1:{example}\n", f"{name}\n")
    (directory / "haproxy.cfg").write_text(text)
    with subprocess.Popen(["haproxy", "-f", str(directory / "haproxy.cfg")]) as process:
        try:
            end_s = time.monotonic() + 10
            while time.monotonic() < end_s:
                with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                    break
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()


def answered(cluster: Cluster, name: str) -> float:
    _, page = cluster.daemons[name].http("/metrics")
    wanted = 'grpc_server_requests_total{code="OK",handler="Get",service="mnemosynerpc.SessionManager"'
    return sum(float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith(wanted))


@pytest.mark.slow
async def test_calls_are_balanced_and_none_fails_while_each_node_restarts(
    postgres_dsn: str, tmp_path: Path
) -> None:
    with Cluster(postgres_dsn, 3) as cluster:
        await asyncio.to_thread(cluster.start)
        await cluster.rings_equal(cluster.names)
        with balancing(cluster.names, tmp_path) as address:
            async with Load([address], rate=300.0) as load:
                await until(lambda: all(answered(cluster, name) > 50 for name in cluster.names))
                for name in cluster.names:
                    assert await asyncio.to_thread(cluster.daemons[name].stop) == 0
                    await asyncio.to_thread(cluster.launch(name).serving)
                    await cluster.rings_equal(cluster.names)
                    await until(lambda name=name: answered(cluster, name) > 20)  # type: ignore[misc]

        assert not load.outcome.failures, load.outcome.report


@pytest.mark.parametrize("engine", sorted(ENGINES))
async def test_a_node_that_does_not_serve_gets_no_calls_and_its_admin_port_is_never_asked(
    engine: str, tmp_path: Path
) -> None:
    store = MemoryStore(wall_us=lambda: 0)
    # Nobody is at the third's address.
    ports = free_ports(3)
    with ExitStack() as stack:
        operators = [stack.enter_context(socket.create_server(("127.0.0.1", port + 1))) for port in ports]
        async with (
            serving(store, engine, flags=[f"-port={ports[0]}"]) as first,
            serving(store, engine, flags=[f"-port={ports[1]}"]) as second,
        ):
            address = stack.enter_context(balancing([f"127.0.0.1:{port}" for port in ports], tmp_path))
            async with grpc.aio.insecure_channel(address) as channel:
                stub = SessionManagerStub(channel)
                await alone(stub, [first, second])
                second.health.set_serving(False)
                away_s = await alone(stub, [first])
                second.health.set_serving(True)
                await alone(stub, [first, second])
                # For good, as when it drains.
                second.health.close()
                await alone(stub, [first])

        for operator in operators:
            operator.setblocking(False)
            with pytest.raises(BlockingIOError):
                operator.accept()
    assert away_s < 2.0


@pytest.mark.parametrize("engine", sorted(ENGINES))
async def test_a_call_of_the_peer_service_is_refused_and_others_pass(
    engine: str, postgres_dsn: str, tmp_path: Path
) -> None:
    with Cluster(postgres_dsn, 1, f"-grpc.engine={engine}") as cluster:
        await asyncio.to_thread(cluster.start)
        (name,) = cluster.names
        with balancing([name] * 3, tmp_path) as address:
            async with grpc.aio.insecure_channel(address) as proxy, grpc.aio.insecure_channel(name) as node:
                stub = SessionManagerStub(proxy)
                await until_answered(stub)
                await HealthStub(proxy).Check(HealthCheckRequest(), timeout=CALL_TIMEOUT_S)
                # The node itself would answer, with a complaint about the caller.
                direct = await code_of(node, "/mnemosynepeer.Peer/Gossip")
                codes = {path: await code_of(proxy, path) for path in PEER_PATHS}

    assert direct is grpc.StatusCode.UNAUTHENTICATED
    assert set(codes.values()) == {grpc.StatusCode.PERMISSION_DENIED}, codes


async def test_calls_that_repeat_their_token_arrive_at_one_node_each_and_others_take_turns(
    tmp_path: Path,
) -> None:
    store = MemoryStore(wall_us=lambda: 0)
    ports = free_ports(2)
    async with (
        serving(store, "h2", flags=[f"-port={ports[0]}"]) as first,
        serving(store, "h2", flags=[f"-port={ports[1]}"]) as second,
    ):
        nodes = [first, second]
        names = [f"127.0.0.1:{port}" for port in ports]
        with balancing([*names, names[0]], tmp_path) as address:
            async with grpc.aio.insecure_channel(address) as channel:
                stub = SessionManagerStub(channel)
                await until_answered(stub)
                by_token = [await reached(stub, nodes, f"token-{number}") for number in range(20)]
                await alone(stub, nodes)

    # One each, whatever says the token, and not the same for all.
    assert {sum(map(bool, calls)) for calls in by_token} == {1}, by_token
    assert len({calls[0] > 0 for calls in by_token}) == 2, by_token


async def reached(stub: SessionManagerStub, nodes: Sequence[Node], token: str) -> list[int]:
    """Return how many of four calls for a token each node got."""
    before = [called_any(node) for node in nodes]
    for _ in range(2):
        await stub.Exists(
            ExistsRequest(access_token=token),
            timeout=CALL_TIMEOUT_S,
            metadata=(("x-mnemosyne-token", token),),
        )
    for value in (token, f"bearer {token}"):
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Context(Empty(), timeout=CALL_TIMEOUT_S, metadata=(("authorization", value),))
    return [called_any(node) - count for node, count in zip(nodes, before, strict=True)]


def called_any(node: Node) -> int:
    return sum(sum(one.requests_by_code().values()) for one in node.table.stats() if one.labels[1] in CALLS)


CALLS = ("Exists", "Context")
PEER_PATHS = (
    *(f"/mnemosynepeer.Peer/{method}" for method in ("Gossip", "Forward", "Invalidate", "Leave", "Other")),
    "/MNEMOSYNEPEER.PEER/Leave",
    "/mnemosynepeer.peer/leave",
    "/%6dnemosynepeer.Peer/Leave",
    "/mnemosynepeer%2EPeer%2FLeave",
    "//mnemosynepeer.Peer/Leave",
    "/x/../mnemosynepeer.Peer/Leave",
    "/mnemosynepeer.Peer/Leave?x",
    "/mnemosynepeer.Peer",
)


async def until_answered(stub: SessionManagerStub) -> None:
    """Call until the proxy has found its nodes healthy."""
    request = ExistsRequest(access_token="t")
    async with asyncio.timeout(10):
        while True:
            with suppress(grpc.aio.AioRpcError):
                await stub.Exists(request, timeout=CALL_TIMEOUT_S)  # type: ignore[misc]
                return
            await asyncio.sleep(0.02)


async def code_of(channel: grpc.aio.Channel, path: str) -> grpc.StatusCode:
    try:
        await channel.unary_unary(path)(b"", timeout=CALL_TIMEOUT_S)
    except grpc.aio.AioRpcError as exc:
        return exc.code()
    return grpc.StatusCode.OK


async def alone(stub: SessionManagerStub, nodes: Sequence[Node]) -> float:
    """Call until all of these nodes, and no others, answer twelve calls; return how long that took."""
    began_s = time.monotonic()
    while True:
        before = [called(node) for node in nodes]
        for _ in range(12):
            await stub.Exists(ExistsRequest(access_token="t"), timeout=CALL_TIMEOUT_S)  # type: ignore[misc]
        answered = [called(node) - count for node, count in zip(nodes, before, strict=True)]
        if all(answered) and sum(answered) == 12:
            return time.monotonic() - began_s
        assert time.monotonic() - began_s < 15, answered


def called(node: Node) -> int:
    return sum(one.ok for one in node.table.stats() if one.labels[1] == "Exists")
