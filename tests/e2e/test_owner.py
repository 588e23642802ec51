"""A client that asks is told where its token's owner is, and may go there next."""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import ExitStack

import grpc
import pytest
from clusters import CALL_TIMEOUT_S, Cluster, free_ports
from mnemosynerpc.owners import OWNER_KEY, OwnerReader
from mnemosynerpc.session_pb2 import GetRequest, Session, StartRequest
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from processes import Daemon, mnemosyned
from secrecy import CANARY

pytestmark = pytest.mark.timeout(120)
ASKS = ((OWNER_KEY, "wanted"),)


def trailer(address: str, token: str, metadata: tuple[tuple[str, str], ...] = ASKS) -> str | None:
    with grpc.insecure_channel(address) as channel:
        call = SessionManagerStub(channel).Get.with_call(
            GetRequest(access_token=token), timeout=CALL_TIMEOUT_S, metadata=metadata
        )[1]
        found: str | None = dict(call.trailing_metadata()).get(OWNER_KEY)
        return found


def started(address: str, count: int) -> list[str]:
    with grpc.insecure_channel(address) as channel:
        stub = SessionManagerStub(channel)
        new = StartRequest(session=Session(subject_id="user:1"))
        return [stub.Start(new, timeout=CALL_TIMEOUT_S).session.access_token for _ in range(count)]


def advertise(cluster: Cluster) -> None:
    """Start each node with the address of its gRPC port, and wait until they serve."""
    for daemon in [cluster.launch(name, f"-grpc.advertise={name}") for name in cluster.names]:
        daemon.serving()


@pytest.mark.parametrize("engine", ["h2", "grpcio"])
async def test_all_nodes_name_the_same_owner_and_only_when_asked(engine: str, postgres_dsn: str) -> None:
    with Cluster(postgres_dsn, 2, f"-grpc.engine={engine}") as cluster:
        await asyncio.to_thread(advertise, cluster)
        await cluster.rings_equal(cluster.names)
        tokens = await asyncio.to_thread(started, cluster.names[0], 20)

        owners = [
            [await asyncio.to_thread(trailer, name, token) for token in tokens] for name in cluster.names
        ]
        unasked = await asyncio.to_thread(trailer, cluster.names[0], tokens[0], ())
        failed = await asyncio.to_thread(_refused, cluster.names[0])

    assert owners[0] == owners[1]
    assert set(owners[0]) == set(cluster.names)
    assert unasked is None
    assert failed in cluster.names


def _refused(address: str) -> str | None:
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        SessionManagerStub(channel).Get(GetRequest(access_token="nobody's"), timeout=3, metadata=ASKS)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    return dict(caught.value.trailing_metadata()).get(OWNER_KEY)


async def test_a_node_that_says_no_public_address_has_no_trailer(postgres_dsn: str) -> None:
    with Cluster(postgres_dsn, 1) as cluster:
        await asyncio.to_thread(cluster.start)
        (token,) = await asyncio.to_thread(started, cluster.names[0], 1)

        assert await asyncio.to_thread(trailer, cluster.names[0], token) is None


async def test_a_reader_goes_to_owners_and_falls_back_on_the_balancer(postgres_dsn: str) -> None:
    with Cluster(postgres_dsn, 2) as cluster:
        await asyncio.to_thread(advertise, cluster)
        await cluster.rings_equal(cluster.names)
        entry, other = cluster.names
        tokens = await asyncio.to_thread(started, entry, 20)
        dialled: list[str] = []

        def dial(owner: str) -> grpc.Channel:
            dialled.append(owner)
            return grpc.insecure_channel(owner)

        def read() -> None:
            for token in tokens:
                assert reader.get(token).session.access_token == token

        with grpc.insecure_channel(entry) as balancer:
            reader = OwnerReader(balancer, dial=dial)
            await asyncio.to_thread(read)
            assert (reader.at_owners, dialled) == (0, [])
            await asyncio.to_thread(read)
            assert reader.at_owners == len(tokens)
            assert sorted(dialled) == sorted(cluster.names)

            # Stands still, so that only the time-out tells.
            cluster.signal(other, signal.SIGSTOP)
            began_s = time.monotonic()
            await asyncio.to_thread(read)
            took_s = time.monotonic() - began_s
            cluster.signal(other, signal.SIGCONT)
            reader.close()

    # One call waits for half of its 3 s; the others know, or a hop is bounded by the daemon.
    assert took_s < 8.0


async def test_what_another_service_at_an_owners_address_says_counts_for_nothing(postgres_dsn: str) -> None:
    with Cluster(postgres_dsn, 2) as cluster, ExitStack() as stack:
        await asyncio.to_thread(advertise, cluster)
        await cluster.rings_equal(cluster.names)
        entry, other = cluster.names
        token = await asyncio.to_thread(_owned_by, other, entry)
        reader = OwnerReader(stack.enter_context(grpc.insecure_channel(entry)))
        stack.callback(reader.close)
        await asyncio.to_thread(reader.get, token)
        assert reader._owner_by_token == {token: other}
        await asyncio.to_thread(cluster.daemons[other].stop)
        stranger = stack.enter_context(Daemon("-storage=memory", f"-port={other.rpartition(':')[2]}"))
        await asyncio.to_thread(stranger.serving)

        answer = await asyncio.to_thread(reader.get, token)

    assert answer.session.access_token == token
    assert reader._owner_by_token == {token: entry}


def _owned_by(owner: str, entry: str) -> str:
    """Start sessions until one is of this node."""
    return next(token for token in iter(lambda: started(entry, 1)[0], "") if trailer(entry, token) == owner)


def test_what_a_reader_remembers_is_bounded() -> None:
    (port,) = free_ports(1)
    opened: list[str] = []

    def dial(owner: str) -> grpc.Channel:
        opened.append(owner)
        return grpc.insecure_channel(owner)

    with grpc.insecure_channel(f"127.0.0.1:{port}") as balancer:
        reader = OwnerReader(balancer, dial=dial, max_owners=2)
        for owner in ("a:1", "b:1", "c:1", "a:1", "a:1"):
            reader._stub(owner)  # needs no server
        reader.close()

    # The third took the place of the first.
    assert opened == ["a:1", "b:1", "c:1", "a:1"]


def test_a_public_address_without_a_cluster_is_refused() -> None:
    code, _, err = mnemosyned("-grpc.advertise=127.0.0.1:8080")

    assert code == 2
    assert "-cluster.listen" in err


@pytest.mark.parametrize("engine", ["h2", "grpcio"])
def test_a_token_in_the_metadata_reaches_no_log(engine: str) -> None:
    token = f"{CANARY}-in-metadata"
    # When it ends, all that it has printed is searched for the word.
    with Daemon(
        "-storage=memory", f"-grpc.engine={engine}", "-grpc.debug=true", "-log.level=debug"
    ) as daemon:
        with daemon.serving().stub() as stub, pytest.raises(grpc.RpcError) as caught:
            stub.Get(GetRequest(access_token=token), timeout=3, metadata=(("x-mnemosyne-token", token),))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        daemon.wait_for("rpc_failed")
