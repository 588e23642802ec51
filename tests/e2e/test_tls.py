"""TLS as users run it: a cluster whose nodes know one another by certificate, and files replaced on disk."""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import Authority
from clusters import Cluster
from mnemosynerpc.session_pb2 import ExistsRequest, GetRequest, Session, StartRequest
from mnemosynerpc.session_pb2_grpc import SessionManagerStub
from processes import Daemon, mnemosyned

from mnemosyned.security.certificates import names_of, validity_s

pytestmark = pytest.mark.timeout(120)
NEW = StartRequest(session=Session(subject_id="s"))
NODE = "node.cluster.example"
run = partial(mnemosyned, "cluster")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ours")


def node_flags(authority: Authority, *names: str) -> list[str]:
    names = names or (NODE,)
    mutual = ["-tls.client-auth=optional", "-tls.peer-names=*.cluster.example"]
    return [*authority.flags("127.0.0.1", *names, at=names[0]), *mutual]


@contextmanager
def stub(daemon: Daemon, authority: Authority, *names: str) -> Iterator[Any]:
    with grpc.secure_channel(daemon.address, authority.credentials(*names)) as channel:
        yield SessionManagerStub(channel)


def joined(cluster: Cluster, authority: Authority) -> None:
    cluster.start()
    asyncio.run(cluster.rings_equal(cluster.names))
    for daemon in cluster.daemons.values():
        daemon.context = ssl.create_default_context(cafile=str(authority.path))


def test_nodes_that_know_one_another_by_certificate_need_no_secret(
    postgres_dsn: str, authority: Authority
) -> None:
    with Cluster(postgres_dsn, 3, *node_flags(authority), secret="") as cluster:
        joined(cluster, authority)
        daemons = list(cluster.daemons.values())
        with stub(daemons[0], authority) as first, stub(daemons[1], authority) as second:
            tokens = [first.Start(NEW, timeout=5).session.access_token for _ in range(12)]
            assert [
                second.Get(GetRequest(access_token=one), timeout=5).session.access_token for one in tokens
            ] == tokens
        forwards = sum('outcome="ok"' in daemon.http("/metrics")[1] for daemon in daemons)

        assert forwards >= 2
        assert not any("cluster_without_secret" in daemon.log for daemon in daemons)


@pytest.mark.parametrize(
    "flags",
    [[], ["-cluster.secret=hunter2-that-nobody-asked-for"]],
    ids=["without a secret", "with one"],
)
def test_a_node_whose_certificate_is_not_a_nodes_can_do_nothing(
    postgres_dsn: str, authority: Authority, flags: list[str]
) -> None:
    with Cluster(postgres_dsn, 2, secret="") as cluster:
        member, stranger = cluster.names
        cluster.launch(member, *node_flags(authority), seeds=[]).serving()
        token_owner = cluster.daemons[member]
        with stub(token_owner, authority) as client:
            token = client.Start(NEW, timeout=5).session.access_token
        theirs = node_flags(authority, "web.example")
        daemon = cluster.launch(stranger, *theirs, *flags)
        refused = daemon.wait_for("peer_refuses_us")
        token_owner.context = ssl.create_default_context(cafile=str(authority.path))

        assert "peer-names" in refused["error"]
        assert [one["name"] for one in cluster.page(member)["members"]] == [member]
        assert token not in daemon.log


def test_a_node_without_tls_cannot_join(postgres_dsn: str, authority: Authority) -> None:
    with Cluster(postgres_dsn, 2) as cluster:
        member, stranger = cluster.names
        cluster.launch(member, *node_flags(authority), seeds=[]).serving()
        cluster.launch(stranger).wait_for("no_seed_answers")
        cluster.daemons[member].context = ssl.create_default_context(cafile=str(authority.path))

        assert [one["name"] for one in cluster.page(member)["members"]] == [member]


def test_a_client_without_a_certificate_is_refused_where_one_is_required(
    authority: Authority, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path / "theirs")
    flags = [*authority.flags("127.0.0.1"), "-tls.client-auth=require"]
    with Daemon("-storage=memory", *flags) as daemon:
        daemon.serving()
        with stub(daemon, authority, "web.example") as known:
            assert known.Start(NEW, timeout=5).session.access_token
        for unknown in (authority.credentials(), _mixed(authority, stranger)):
            with grpc.secure_channel(daemon.address, unknown) as channel:
                with pytest.raises(grpc.RpcError) as caught:
                    SessionManagerStub(channel).Start(NEW, timeout=5)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]


def _mixed(authority: Authority, stranger: Authority) -> grpc.ChannelCredentials:
    directory = stranger.issue("web.example", at="client")
    key, chain = (directory / "key.pem").read_bytes(), (directory / "crt.pem").read_bytes()
    return grpc.ssl_channel_credentials(authority.pem, key, chain)


@pytest.mark.parametrize("engine", ["h2", "grpcio"])
def test_certificates_replaced_on_disk_are_served_within_five_seconds_and_no_call_fails(
    authority: Authority, engine: str
) -> None:
    flags = authority.flags("127.0.0.1", "old.example")
    with Daemon("-storage=memory", f"-grpc.engine={engine}", *flags) as daemon:
        daemon.serving()
        ports = [int(daemon.address.rpartition(":")[2]), int(daemon.admin.rpartition(":")[2])]
        assert all("old.example" in served(port) for port in ports)
        is_over = threading.Event()
        calls: dict[str, int] = {}
        callers = [
            threading.Thread(target=keep_calling, args=(daemon, authority, kind, is_over, calls))
            for kind in ("one", "new")
        ]
        for caller in callers:
            caller.start()
        time.sleep(0.3)
        authority.issue("127.0.0.1", "new.example")
        replaced_s = time.monotonic()
        while not all("new.example" in served(port) for port in ports):
            assert time.monotonic() - replaced_s < 5.0
            time.sleep(0.05)
        time.sleep(0.5)
        is_over.set()
        for caller in callers:
            caller.join()

        assert min(calls.values()) > 10, daemon.log
        daemon.wait_for("tls_reloaded")
        ends_at_s = validity_s((authority.directory / "node" / "crt.pem").read_bytes())[1]
        daemon.context = ssl.create_default_context(cafile=str(authority.path))
        _, page = daemon.http("/metrics")
        (line,) = (one for one in page.splitlines() if one.startswith("mnemosyned_tls_certificate_end"))
        assert float(line.split()[1]) == pytest.approx(ends_at_s, abs=1)
        (authority.directory / "node" / "crt.pem").write_text("nonsense")
        assert "no PEM file" in daemon.wait_for("tls_reload_failed")["error"]
        assert all("new.example" in served(port) for port in ports)
        assert daemon.stop() == 0


def served(port: int) -> tuple[str, ...]:
    return names_of(ssl.get_server_certificate(("127.0.0.1", port), timeout=5))


def keep_calling(
    daemon: Daemon, authority: Authority, kind: str, is_over: threading.Event, calls: dict[str, int]
) -> None:
    """Call until it is over, on one connection or on a new one each time; -1 calls if one fails."""
    credentials = authority.credentials()
    options = [("grpc.use_local_subchannel_pool", 1)]
    request, count = ExistsRequest(access_token="unknown"), 0
    channel = grpc.secure_channel(daemon.address, credentials, options=options)
    try:
        while not is_over.is_set():
            if kind == "new":
                channel.close()
                channel = grpc.secure_channel(daemon.address, credentials, options=options)
            SessionManagerStub(channel).Exists(request, timeout=5)
            count += 1
    except grpc.RpcError as exc:
        daemon.lines.append(f"failed: {exc}\n")
        count = -1
    finally:
        calls[kind] = count
        channel.close()


def test_the_operators_port_and_the_command_line_speak_tls(postgres_dsn: str, authority: Authority) -> None:
    with Cluster(postgres_dsn, 2, *node_flags(authority), secret="") as cluster:
        joined(cluster, authority)
        first = cluster.daemons[cluster.names[0]]
        assert first.admin.startswith("https://")
        assert first.http("/healthz")[0] == first.http("/healthr")[0] == 200
        node = ["-node", cluster.names[0]]
        well = run("check", *node, f"-tls.ca={authority.path}")
        variables = run("check", *node, MNEMOSYNED_TLS="true", MNEMOSYNED_TLS_CA=str(authority.path))
        distrusted = run("check", *node, "-tls")
        identity = authority.directory / NODE
        leave = ["leave", "-node", cluster.names[1], f"-tls.ca={authority.path}"]
        unknown = run(*leave)
        done = run(*leave, f"-tls.crt={identity}/crt.pem", f"-tls.key={identity}/key.pem")

        assert well == variables
        assert well[0] == 0
        assert "2 nodes" in well[1]
        assert distrusted[0] == 1
        assert "certificate verify failed" in distrusted[2]
        assert (unknown[0], "peer-names" in unknown[2]) == (1, True)
        assert done[0] == 0
        assert cluster.daemons[cluster.names[1]].end() == 0
