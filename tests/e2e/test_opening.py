"""Calls that come while a node starts: they wait until it has joined, and fail if the storage is away."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from clusters import SECRET, Cluster, free_ports
from mnemosynerpc.session_pb2 import (
    AbandonRequest,
    DeleteRequest,
    ExistsRequest,
    GetRequest,
    ListRequest,
    Session,
    SetValueRequest,
    StartRequest,
)
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from networks import Relay
from probes import code_of
from processes import Daemon
from redis_servers import needs_redis, redis_server

from cluster.errors import PeerUnreachable
from cluster.peer_auth import PeerAuth
from cluster.peers import ChannelKind, Peers

TOKEN = "of-no-session"  # names nothing
CALLS: dict[str, Callable[[SessionManagerStub], object]] = {
    "Start": lambda stub: stub.Start(StartRequest(session=Session(subject_id="u"))),
    "Get": lambda stub: stub.Get(GetRequest(access_token=TOKEN)),
    "Exists": lambda stub: stub.Exists(ExistsRequest(access_token=TOKEN)),
    "SetValue": lambda stub: stub.SetValue(SetValueRequest(access_token=TOKEN, key="k", value="v")),
    "Abandon": lambda stub: stub.Abandon(AbandonRequest(access_token=TOKEN)),
    "List": lambda stub: stub.List(ListRequest()),
    "List of pages": lambda stub: stub.List(ListRequest(page_token="")),
    "Delete of a session": lambda stub: stub.Delete(DeleteRequest(access_token=TOKEN)),
    "Delete of a user": lambda stub: stub.Delete(DeleteRequest(subject_id="u")),
}
# Nothing listens there.
AWAY = {
    "postgres": ("-postgres.address=postgres://u:p@127.0.0.1:9/d",),
    "redis": ("-storage=redis", "-redis.address=redis://127.0.0.1:9"),
    "redis-cluster": ("-storage=redis", "-redis.address=redis+cluster://127.0.0.1:9"),
    "mongodb": ("-storage=mongodb", "-mongodb.address=mongodb://127.0.0.1:9/d"),
}


@pytest.mark.parametrize("engine", AWAY)
def test_without_a_storage_each_call_is_unavailable(engine: str) -> None:
    with Daemon(*AWAY[engine]) as daemon, daemon.listening().stub() as stub:
        daemon.wait_for("storage_not_ready")
        codes = {name: code_of(lambda: call(stub)) for name, call in CALLS.items()}  # noqa: B023  # done at once
        assert daemon.stop() == 0

    assert codes == dict.fromkeys(CALLS, grpc.StatusCode.UNAVAILABLE)


async def test_a_peer_that_calls_before_the_storage_is_open_is_no_warning() -> None:
    """Nodes that start together call each other early: the log of a healthy start has no failures."""
    (port,) = free_ports(1)
    node = f"127.0.0.1:{port}"
    own = (f"-port={port}", f"-cluster.listen={node}", f"-cluster.secret={SECRET}", "-log.level=debug")
    peers = Peers(PeerAuth([SECRET.encode()], process=os.urandom(16)), {"Gossip": _Uncounted()})
    with Daemon(*AWAY["postgres"], *own) as daemon:
        daemon.listening()
        with pytest.raises(PeerUnreachable):
            await peers.call(node, "Gossip", b"", timeout_s=5, channel_kind=ChannelKind.GOSSIP)
        line = daemon.wait_for("rpc_failed")
    await peers.close()

    assert (line["level"], line["code"]) == ("debug", "UNAVAILABLE")


class _Uncounted:
    """Where calls are not counted."""

    def begin(self) -> None:
        pass

    def end(self, code: str, elapsed_s: float) -> None:
        pass


@pytest.fixture(params=["postgres", pytest.param("redis", marks=needs_redis)])
def slow_storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, ...]]:
    """Lend the flags of a storage that takes some tenths of a second to open."""
    with ExitStack() as stack:
        if request.param == "postgres":
            address, flags = request.getfixturevalue("postgres_dsn"), ("-postgres.address=",)
        else:
            address = stack.enter_context(redis_server(tmp_path / "redis")).url
            flags = ("-storage=redis", "-redis.address=")
        head, _, rest = address.rpartition(":")
        port, _, name = rest.partition("/")
        relay = stack.enter_context(Relay("127.0.0.1", int(port)))
        relay.delay_s = 0.01
        yield (*flags[:-1], f"{flags[-1]}{head}:{relay.port}/{name}")


def test_a_call_waits_while_the_storage_is_opened(slow_storage: tuple[str, ...]) -> None:
    """A balancer that looks at the port alone sends calls as soon as it listens."""
    with Daemon(*slow_storage) as daemon, daemon.listening().stub() as stub:
        assert '"storage_ready"' not in daemon.log
        assert code_of(lambda: CALLS["Get"](stub)) is grpc.StatusCode.NOT_FOUND
        daemon.serving()
        assert daemon.stop() == 0


def test_a_write_that_waits_too_long_for_the_storage_is_not_done(slow_storage: tuple[str, ...]) -> None:
    with Daemon(*slow_storage) as daemon, daemon.listening().stub() as stub:
        late = StartRequest(session=Session(access_token=TOKEN))
        assert code_of(lambda: stub.Start(late, timeout=0.05)) is grpc.StatusCode.DEADLINE_EXCEEDED
        assert '"storage_ready"' not in daemon.log
        daemon.serving()
        assert code_of(lambda: CALLS["Get"](stub)) is grpc.StatusCode.NOT_FOUND
        assert daemon.stop() == 0


async def test_a_write_at_a_node_that_is_restarted_has_no_other_drop_its_copies(postgres_dsn: str) -> None:
    with Cluster(postgres_dsn, 3) as cluster:
        await asyncio.to_thread(cluster.start)
        await cluster.rings_equal(cluster.names)
        restarted = cluster.names[0]
        assert await asyncio.to_thread(cluster.daemons[restarted].stop) == 0
        daemon = await asyncio.to_thread(cluster.launch(restarted).listening)
        with daemon.stub() as stub:
            for number in range(20):
                await asyncio.to_thread(stub.Start, StartRequest(session=Session(subject_id=f"{number}")))
        await asyncio.to_thread(daemon.serving)
        logs = [daemon.log for daemon in cluster.daemons.values()]

    assert not [log for log in logs if '"barred_a_node"' in log]
