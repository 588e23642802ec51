"""Guesses of tokens and keys: running daemons count and log them, and answer them late if asked to."""

from __future__ import annotations

import asyncio
import re
import secrets
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from certificates import Authority
from clusters import Cluster, free_ports
from google.protobuf.empty_pb2 import Empty
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
from probes import is_answered
from processes import Daemon, mnemosyned

ENGINES = ["h2", "grpcio"]
THRESHOLD = 20
EVENT = "caller_guesses"
DELAY_S = 1.0
NOT_FOUND, EXHAUSTED = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@contextmanager
def running(engine: str, *flags: str) -> Iterator[Daemon]:
    with Daemon(
        "-storage=memory", f"-grpc.engine={engine}", f"-guess.threshold={THRESHOLD}", *flags
    ) as daemon:
        yield daemon.serving()


def unknown() -> str:
    return secrets.token_hex(64)


def status(call: Callable[[], object]) -> grpc.StatusCode:
    try:
        call()
    except grpc.RpcError as exc:
        code: grpc.StatusCode = exc.code()  # type: ignore[attr-defined]  # of a call that has ended
        return code
    return grpc.StatusCode.OK


def guess(stub: Any, times: int, **options: Any) -> None:  # noqa: ANN401  # grpcio's
    for _ in range(times):
        assert (
            status(lambda: stub.Get(GetRequest(access_token=unknown()), timeout=10, **options)) is NOT_FOUND
        )


def metric(daemon: Daemon, name: str) -> float:
    _, page = daemon.http("/metrics")
    (value,) = re.findall(rf"^{re.escape(name)} (\S+)$", page, re.MULTILINE)
    return float(value)


def lines(daemon: Daemon) -> list[str]:
    return [line for line in daemon.lines if EVENT in line]


def started(stub: Any) -> str:  # noqa: ANN401  # grpcio's
    token: str = stub.Start(StartRequest(session=Session(subject_id="s")), timeout=5).session.access_token
    return token


def test_a_caller_that_guesses_is_logged_once_and_counted(engine: str) -> None:
    with running(engine) as daemon, daemon.stub() as stub:
        token = started(stub)
        guess(stub, THRESHOLD)
        assert stub.Get(GetRequest(access_token=token), timeout=5).session.access_token == token
        assert lines(daemon) == []
        guess(stub, 100)
        line = daemon.wait_for(EVENT)

        assert (line["level"], line["caller"], line["caller_kind"]) == ("warning", "127.0.0.1", "address")
        assert (line["unknown"], line["within_s"]) == (THRESHOLD + 1, 60)
        assert len(lines(daemon)) == 1
        assert metric(daemon, 'mnemosyned_guess_answers_total{about="token"}') == THRESHOLD + 100
        assert metric(daemon, 'mnemosyned_guess_exceeded_total{caller="address"}') == 1
        assert metric(daemon, "mnemosyned_guess_callers") == 1


def test_each_rpc_that_tells_about_a_token_counts(engine: str) -> None:
    with running(engine) as daemon, daemon.stub() as stub:
        token = started(stub)
        calls: list[Callable[[], object]] = [
            lambda: stub.Get(GetRequest(access_token=unknown()), timeout=5),
            lambda: stub.Context(Empty(), metadata=(("authorization", f"Bearer {unknown()}"),), timeout=5),
            lambda: stub.Exists(ExistsRequest(access_token=unknown()), timeout=5),
            lambda: stub.SetValue(SetValueRequest(access_token=unknown(), key="k"), timeout=5),
            lambda: stub.Abandon(AbandonRequest(access_token=unknown()), timeout=5),
            lambda: stub.Delete(DeleteRequest(access_token=unknown()), timeout=5),
            lambda: stub.Delete(DeleteRequest(refresh_token=unknown()), timeout=5),
            lambda: stub.List(ListRequest(query={"refresh_token": unknown()}), timeout=5),
            lambda: stub.Start(StartRequest(session=Session(access_token=token, subject_id="s")), timeout=5),
        ]
        for call in calls:
            status(call)
        # These tell nothing.
        for call in (
            lambda: stub.Exists(ExistsRequest(access_token=token), timeout=5),
            lambda: stub.Delete(DeleteRequest(subject_id="nothing"), timeout=5),
            lambda: stub.List(ListRequest(), timeout=5),
            lambda: stub.Get(GetRequest(), timeout=5),
            lambda: stub.Get(GetRequest(access_token="x" * 5000), timeout=5),
        ):
            status(call)

        assert metric(daemon, 'mnemosyned_guess_answers_total{about="token"}') == len(calls)


def test_connections_and_addresses_do_not_hide_a_guesser(engine: str) -> None:
    with running(engine) as daemon:
        for _ in range(THRESHOLD + 1):
            options = (("grpc.use_local_subchannel_pool", 1),)
            with grpc.insecure_channel(daemon.address, options=options) as channel:
                guess(SessionManagerStub(channel), 1, metadata=(("x-api-key", unknown()),))

        assert daemon.wait_for(EVENT)["caller"] == "127.0.0.1"


def test_all_clients_of_a_unix_socket_are_one_caller(engine: str, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    flags = [f"-host=unix:{tmp_path / 'grpc.sock'}", f"-port={port}"]
    with running(engine, *flags) as daemon:
        assert is_answered(daemon.address)
        for _ in range(3):
            with daemon.stub() as stub:
                guess(stub, THRESHOLD // 2)

        assert daemon.wait_for(EVENT)["caller"] == "unix"


def test_a_caller_with_a_key_is_named_by_the_line_of_the_key(engine: str, tmp_path: Path) -> None:
    keys = [mnemosyned("key", "session") for _ in range(2)]
    path = tmp_path / "keys"
    path.touch(mode=0o600)
    path.write_text("# callers\n" + "".join(out.splitlines()[1] + "\n" for _, out, _ in keys))
    web, other = (out.splitlines()[0] for _, out, _ in keys)
    with running(engine, f"-auth.keys={path}") as daemon, daemon.stub() as stub:
        guess(stub, THRESHOLD, metadata=(("x-api-key", other),))
        guess(stub, THRESHOLD + 1, metadata=(("x-api-key", web),))
        line = daemon.wait_for(EVENT)

        assert (line["caller"], line["caller_kind"]) == ("line 2 of -auth.keys", "key")
        assert len(lines(daemon)) == 1
        assert web not in daemon.log


def test_guesses_of_keys_count_by_address_however_many_keys_there_are(engine: str, tmp_path: Path) -> None:
    _, out, _ = mnemosyned("key", "session")
    path = tmp_path / "keys"
    path.touch(mode=0o600)
    path.write_text(out.splitlines()[1])
    with running(engine, f"-auth.keys={path}") as daemon, daemon.stub() as stub:
        for _ in range(THRESHOLD + 1):
            metadata = (("x-api-key", f"mnk_{secrets.token_urlsafe(32)}"),)
            code = status(
                lambda m=metadata: stub.Exists(ExistsRequest(access_token="t"), timeout=5, metadata=m)
            )  # type: ignore[misc]  # a lambda with a default
            assert code is grpc.StatusCode.UNAUTHENTICATED
        status(lambda: stub.Exists(ExistsRequest(access_token="t"), timeout=5))
        line = daemon.wait_for(EVENT)

        assert (line["caller"], line["unknown"]) == ("127.0.0.1", THRESHOLD + 1)
        assert metric(daemon, 'mnemosyned_guess_answers_total{about="key"}') == THRESHOLD + 1
        assert metric(daemon, 'mnemosyned_guess_answers_total{about="token"}') == 0


def test_a_caller_with_a_certificate_is_named_by_it(engine: str, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    with (
        running(engine, *authority.flags("127.0.0.1"), "-tls.client-auth=require") as daemon,
        grpc.secure_channel(daemon.address, authority.credentials("web.example")) as channel,
    ):
        daemon.context = ssl.create_default_context(cafile=str(authority.path))
        guess(SessionManagerStub(channel), THRESHOLD + 1)
        line = daemon.wait_for(EVENT)

        assert (line["caller"], line["caller_kind"]) == ("web.example", "certificate")
        assert metric(daemon, 'mnemosyned_guess_exceeded_total{caller="certificate"}') == 1


def test_over_the_limit_unknown_tokens_are_late_and_known_ones_are_not(engine: str) -> None:
    with running(engine, f"-guess.limit={THRESHOLD}") as daemon, daemon.stub() as stub:
        token = started(stub)
        guess(stub, THRESHOLD)
        begun_s = time.monotonic()
        guess(stub, 1)
        exists = stub.Exists(ExistsRequest(access_token=unknown()), timeout=5)
        took_s = time.monotonic() - begun_s
        begun_s = time.monotonic()
        for _ in range(10):
            stub.Get(GetRequest(access_token=token), timeout=5)
        known_s = time.monotonic() - begun_s

        assert not exists.value
        assert took_s >= 2 * DELAY_S
        assert known_s < DELAY_S
        assert metric(daemon, 'mnemosyned_guess_limited_total{answer="late"}') == 2
        assert daemon.wait_for(EVENT)["unknown"] == THRESHOLD + 1


def test_a_flood_of_guesses_is_refused_and_a_good_client_beside_it_notices_nothing(engine: str) -> None:
    with running(engine, f"-guess.limit={THRESHOLD}") as daemon, ExitStack() as stack:
        stub = stack.enter_context(daemon.stub())
        token, took_s, stop = started(stub), [], threading.Event()

        def read() -> None:
            # On the connection of the guesser, as behind a proxy.
            while not stop.is_set():
                begun_s = time.monotonic()
                stub.Get(GetRequest(access_token=token), timeout=5)
                took_s.append(time.monotonic() - begun_s)
                stop.wait(0.005)

        reader = threading.Thread(target=read)
        reader.start()
        futures = [stub.Get.future(GetRequest(access_token=unknown()), timeout=10) for _ in range(1000)]
        codes = Counter(future.code() for future in futures)
        texts = {future.details() for future in futures if future.code() is EXHAUSTED}
        stop.set()
        reader.join(10)

        assert set(codes) == {NOT_FOUND, EXHAUSTED}
        assert codes[NOT_FOUND] <= THRESHOLD + 8 * 10
        assert texts == {"mnemosyned: too many unknown tokens or API keys from this caller; try again later"}
        assert not reader.is_alive()
        assert took_s
        assert sorted(took_s)[len(took_s) // 2] < DELAY_S / 4
        refused = metric(daemon, 'mnemosyned_guess_limited_total{answer="refused"}')
        assert refused == codes[EXHAUSTED]
        assert daemon.wait_for(EVENT)["caller"] == "127.0.0.1"
        # The drain need not wait for what is late.
        assert daemon.stop() == 0


def test_the_delay_ends_with_the_deadline_and_is_off_by_default(engine: str) -> None:
    with running(engine, "-guess.limit=1") as daemon, daemon.stub() as stub:
        guess(stub, 1)
        begun_s = time.monotonic()
        code = status(lambda: stub.Get(GetRequest(access_token=unknown()), timeout=1.2))

        assert code is NOT_FOUND
        assert time.monotonic() - begun_s < DELAY_S
    with running(engine) as daemon, daemon.stub() as stub:
        begun_s = time.monotonic()
        guess(stub, THRESHOLD + 10)

        assert time.monotonic() - begun_s < 10 * DELAY_S
        assert metric(daemon, 'mnemosyned_guess_limited_total{answer="late"}') == 0


def test_a_forwarded_call_counts_once_where_it_enters(engine: str, postgres_dsn: str) -> None:
    flags = (f"-grpc.engine={engine}", f"-guess.threshold={THRESHOLD}")
    with Cluster(postgres_dsn, 2, *flags) as cluster:
        cluster.start()
        entry, other = (cluster.daemons[name] for name in cluster.names)
        asyncio.run(cluster.rings_equal(cluster.names))
        with closing(grpc.insecure_channel(entry.address)) as channel:
            stub = SessionManagerStub(channel)
            guess(stub, 2 * THRESHOLD)
            for _ in range(THRESHOLD):
                assert not stub.Exists(ExistsRequest(access_token=unknown()), timeout=5).value

        assert metric(entry, 'mnemosyned_guess_answers_total{about="token"}') == 3 * THRESHOLD
        assert metric(other, 'mnemosyned_guess_answers_total{about="token"}') == 0
        forwards = metric(
            entry, f'mnemosyned_cluster_forwards_total{{outcome="ok",peer="{cluster.names[1]}"}}'
        )
        assert forwards > 0
        assert entry.wait_for(EVENT)["unknown"] == THRESHOLD + 1
        assert lines(other) == []
