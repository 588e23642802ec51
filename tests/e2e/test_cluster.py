"""Several daemons as users run them: found, lost, restarted and parted under load."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import grpc
import pytest
import scenarios
from clusters import SECRET, Cluster, until
from mnemosynerpc.session_pb2 import AbandonRequest, DeleteRequest, GetRequest, Session, StartRequest
from networks import EVERYBODY, IS_POSSIBLE, Network, Relay
from processes import Daemon

from mnemosyned.embedded.server import EmbeddedPostgres

pytestmark = pytest.mark.timeout(120)
needs_network = pytest.mark.skipif(not IS_POSSIBLE, reason="network namespaces need root, ip and nft")

MakeCluster = Callable[..., Cluster]
# The callers share the machine with the nodes, and may be late to see that one is about to stop.
SLOW_DRAIN = "-drain.delay=1s"
TOUCHES = 'mnemosyned_storage_postgres_queries_total{query="touch"}'


@pytest.fixture
def make_cluster(postgres_dsn: str) -> Iterator[MakeCluster]:
    with ExitStack() as stack:

        def make(count: int, *flags: str) -> Cluster:
            return stack.enter_context(Cluster(postgres_dsn, count, *flags))

        yield make


@pytest.fixture
def network() -> Iterator[Network]:
    with Network(["n0", "n1", "n2", "n3", "n4"]) as one:
        yield one


@pytest.fixture
def spread(network: Network, postgres_server: EmbeddedPostgres, postgres_dsn: str) -> Iterator[Cluster]:
    port = urlsplit(postgres_server.dsn).port
    assert port is not None
    with Relay(network.address, port) as relay:
        dsn = postgres_dsn.replace(f"127.0.0.1:{port}", f"{network.address}:{relay.port}")
        with Cluster(dsn, [f"{host}:7000" for host in network.addresses], network=network) as cluster:
            yield cluster


async def started(cluster: Cluster) -> Cluster:
    await asyncio.to_thread(cluster.start)
    await cluster.rings_equal(cluster.names)
    return cluster


def start(daemon: Daemon, **fields: str) -> str:
    with daemon.stub() as stub:
        return stub.Start(
            StartRequest(session=Session(subject_id="s", **fields)), timeout=5
        ).session.access_token


def get(daemon: Daemon, token: str) -> Session:
    with daemon.stub() as stub:
        return stub.Get(GetRequest(access_token=token), timeout=5).session


def metric(daemon: Daemon, name: str) -> float:
    _, text = daemon.http("/metrics")
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


async def stored_expiries(cluster: Cluster) -> list[Any]:
    connection = await asyncpg.connect(cluster.dsn)
    try:
        rows = await connection.fetch("SELECT expire_at FROM mnemosyne.session ORDER BY access_token")
    finally:
        await connection.close()
    return [row["expire_at"] for row in rows]


@pytest.mark.slow
async def test_nine_nodes_started_at_once_agree_and_any_of_them_answers_for_every_token(
    make_cluster: MakeCluster,
) -> None:
    cluster = make_cluster(9)
    took_s, _ = await scenarios.start_all(cluster)
    daemons = list(cluster.daemons.values())
    tokens = [start(daemon) for daemon in daemons]
    owners = {cluster.page(cluster.names[0], f"?token={token}")["owner"] for token in tokens * 2}

    assert took_s < 20.0
    assert len({cluster.page(name)["ring"]["fingerprint"] for name in cluster.names}) == 1
    assert [get(daemons[number - 1], token).access_token for number, token in enumerate(tokens)] == tokens
    assert owners <= set(cluster.names)


@pytest.mark.parametrize("engine", ["h2", "grpcio"])
async def test_no_call_fails_when_a_node_is_killed(make_cluster: MakeCluster, engine: str) -> None:
    cluster = await started(make_cluster(5, f"-grpc.engine={engine}"))
    loss = await scenarios.lose(cluster, cluster.names[2])

    assert not loss.outcome.failures, loss.outcome.report
    assert not loss.outcome.stale, loss.outcome.report
    # Without the refused connections it would take more than four; the drill measures how much less.
    assert loss.removed_s < 4.0


@pytest.mark.slow
async def test_no_call_fails_while_a_node_stands_still(make_cluster: MakeCluster) -> None:
    cluster = await started(make_cluster(5))
    loss = await scenarios.lose(cluster, cluster.names[1], number=signal.SIGSTOP, hold_s=7.0)

    assert not loss.outcome.failures, loss.outcome.report


async def test_no_call_fails_in_a_rolling_restart(make_cluster: MakeCluster) -> None:
    cluster = await started(make_cluster(5, SLOW_DRAIN))
    outcome = await scenarios.restart_each(cluster)

    assert not outcome.failures, outcome.report
    assert not any("Traceback" in daemon.log for daemon in cluster.daemons.values())


@needs_network
async def test_no_call_fails_when_a_host_falls_silent(spread: Cluster, network: Network) -> None:
    cluster = await started(spread)
    loss = await scenarios.silence(cluster, network, cluster.names[3])

    assert not loss.outcome.failures, loss.outcome.report
    # They listen where others could call them, and ask nobody who it is.
    assert all("anybody_may_call" in daemon.log for daemon in cluster.daemons.values())
    assert loss.removed_s < 14.0
    assert loss.rejoined_s < 14.0


@pytest.mark.slow
@needs_network
async def test_both_parts_of_a_parted_cluster_answer_and_find_one_another_again(
    spread: Cluster, network: Network
) -> None:
    cluster = await started(spread)
    names = cluster.names
    loss = await scenarios.part(cluster, network, (names[:3], names[3:]), hold_s=0.0)

    assert not loss.outcome.failures, loss.outcome.report
    assert loss.rejoined_s < 20.0


@needs_network
async def test_a_node_is_found_under_its_new_address(spread: Cluster, network: Network) -> None:
    cluster = await started(spread)
    took_s = await scenarios.move(cluster, network, cluster.names[4])

    assert took_s < 10.0


@pytest.mark.slow
@needs_network
async def test_no_call_fails_when_every_node_is_replaced_at_another_address(
    spread: Cluster, network: Network
) -> None:
    cluster = spread
    cluster.flags = (SLOW_DRAIN,)
    # As pods have it: one name for all, which is this node's own as well.
    cluster.seeds = [f"{EVERYBODY}:7000"]
    await started(cluster)
    before = dict(network.addresses)
    outcome = await scenarios.roll_out(cluster, network)

    assert not outcome.failures, outcome.report
    assert not before.items() & network.addresses.items()
    members = {one["name"]: one for one in cluster.page(cluster.names[0])["members"]}
    assert {name: one["address"] for name, one in members.items()} == {
        name: f"{network.addresses[name.partition(':')[0]]}:7000" for name in cluster.names
    }


async def test_a_delete_on_one_node_ends_what_others_have_cached(make_cluster: MakeCluster) -> None:
    cluster = await started(make_cluster(3, "-cache.ttl=1h"))
    first, *others = cluster.daemons.values()
    tokens = [start(first) for _ in range(12)]
    for daemon in (first, *others):
        for token in tokens:
            get(daemon, token)
    with first.stub() as stub:
        assert stub.Delete(DeleteRequest(subject_id="s"), timeout=5).value == len(tokens)

    for daemon in (first, *others):
        for token in tokens:
            with pytest.raises(grpc.RpcError) as caught:
                get(daemon, token)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]


async def test_errors_of_the_owner_reach_the_caller_as_they_are(make_cluster: MakeCluster) -> None:
    cluster = await started(make_cluster(2))
    said = set()
    for token in (f"absent-{number}" for number in range(16)):
        for daemon in cluster.daemons.values():
            with daemon.stub() as stub, pytest.raises(grpc.RpcError) as caught:
                stub.Abandon(AbandonRequest(access_token=token), timeout=5)
            said.add((caught.value.code(), caught.value.details()))  # type: ignore[attr-defined]

    assert len(said) == 1
    assert next(iter(said))[0] is grpc.StatusCode.NOT_FOUND
    assert all(metric(daemon, "mnemosyned_cluster_forwards_total") for daemon in cluster.daemons.values())


async def test_the_expiry_of_what_moves_to_another_owner_is_written(
    make_cluster: MakeCluster,
) -> None:
    cluster = make_cluster(2, "-ttl=10h", "-touch.interval=1h")
    first, second = cluster.names
    await asyncio.to_thread(cluster.start, [first])
    tokens = [start(cluster.daemons[first]) for _ in range(40)]
    for token in tokens:
        get(cluster.daemons[first], token)
    before = await stored_expiries(cluster)
    await asyncio.to_thread(cluster.start, [second])
    await cluster.rings_equal(cluster.names)
    kept = [token for token in tokens if cluster.page(first, f"?token={token}")["owner"] == first]

    assert 0 < len(kept) < len(tokens)
    await until(lambda: metric(cluster.daemons[first], TOUCHES) > 0)
    after = await stored_expiries(cluster)
    assert all(then < now for then, now in zip(before, after, strict=True))


async def test_groups_that_grew_apart_become_one(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(3)
    one, other, bridge = cluster.names
    alone = [cluster.launch(name, seeds=[]).serving() for name in (one, other)]
    assert [cluster.ring(name) for name in (one, other)] == [[one], [other]]
    cluster.launch(bridge).serving()

    await cluster.rings_equal(cluster.names)
    assert all(daemon.process.poll() is None for daemon in alone)


async def test_a_node_whose_seeds_are_away_serves_alone_and_joins_when_they_come(
    make_cluster: MakeCluster,
) -> None:
    cluster = make_cluster(2)
    early, late = cluster.names
    daemon = cluster.launch(early, seeds=[late])
    await asyncio.to_thread(daemon.wait_for, "no_seed_answers")
    token = start(await asyncio.to_thread(daemon.serving))
    await asyncio.to_thread(cluster.launch(late, seeds=[]).serving)

    await cluster.rings_equal(cluster.names)
    assert get(cluster.daemons[late], token).access_token == token


async def test_a_node_is_not_ready_before_it_knows_whom_to_tell_of_writes(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(1)
    (name,) = cluster.names
    # A seed that takes connections and says nothing.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        daemon = cluster.launch(name, seeds=[f"127.0.0.1:{silent.getsockname()[1]}"])
        await asyncio.to_thread(daemon.listening)
        gave_up = await asyncio.to_thread(daemon.wait_for, "no_seed_answers")
        serving = await asyncio.to_thread(daemon.wait_for, "serving")
        assert daemon.http("/healthr")[0] == 200

    assert gave_up["ts"] <= serving["ts"]


@pytest.mark.parametrize(
    ("flags", "secret", "heard", "word"),
    [
        ([], "hunter2-of-another-cluster", "rpc_failed", "secret"),
        (["-cluster.label=another"], SECRET, "peer_refused", "label"),
        (["-postgres.table=another"], SECRET, "peer_refused", "tables"),
    ],
    ids=["secret", "label", "table"],
)
async def test_a_node_of_another_cluster_is_kept_out_and_both_sides_say_why(
    make_cluster: MakeCluster, flags: list[str], secret: str, heard: str, word: str
) -> None:
    cluster = make_cluster(2)
    member, stranger = cluster.names
    await asyncio.to_thread(cluster.start, [member])
    daemon = cluster.launch(stranger, *flags, secret=secret)
    refused = await asyncio.to_thread(daemon.wait_for, "peer_refuses_us")
    told = await asyncio.to_thread(cluster.daemons[member].wait_for, heard)

    assert word in refused["error"]
    assert word in told["error"]
    assert secret not in daemon.log
    assert [one["name"] for one in cluster.page(member)["members"]] == [member]


@pytest.mark.slow
async def test_secrets_are_rotated_node_by_node(make_cluster: MakeCluster) -> None:
    cluster = make_cluster(2)
    first, second = cluster.names
    await asyncio.to_thread(cluster.start)
    for secrets in (
        f"{SECRET},hunter2-the-secret-of-tomorrow",
        f"hunter2-the-secret-of-tomorrow,{SECRET}",
        "hunter2-the-secret-of-tomorrow",
    ):
        for name in (first, second):
            assert await asyncio.to_thread(cluster.daemons[name].stop) == 0
            await asyncio.to_thread(cluster.launch(name, secret=secrets).serving)
            await cluster.rings_equal(cluster.names)


async def test_a_node_without_a_secret_warns_and_one_without_seeds_is_silent(postgres_dsn: str) -> None:
    with Cluster(postgres_dsn, 2) as cluster:
        lone = cluster.launch(cluster.names[0], seeds=[]).serving()
        with Daemon(
            f"-postgres.address={postgres_dsn}", "-cluster.listen=127.0.0.1:1", "-cluster.seeds=127.0.0.1:2"
        ) as daemon:
            assert daemon.listening().wait_for("cluster_without_secret")["peers_from"] == "this host only"
        token = start(lone)

        assert get(lone, token).access_token == token
        assert metric(lone, "mnemosyned_cluster_gossip_messages_total") == 0
